"""Two models' scores as a teacher: what the one knows of an instance that the other does not.

    r(x) = log p(x) - log p_ref(x)        nats, as difference sampling ranks by (`selection`)

The scores may be of what is trained on, or of what it was chosen from; instances are found by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import PADDING_ROW, Batch
from megatron_miniplm.data.scores import ScoreNormalization, Scores
from megatron_miniplm.models.signal import InstanceValues, SignalFacts
from megatron_miniplm.models.value_head import TargetScale
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.selection.inputs import (
    exact_differences,
    open_scores,
    rows_within,
    scored_corpus,
)
from megatron_miniplm.teachers.teacher import TEACHERS, Ahead, Ask, Lesson, Signals, Teacher


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Scores as targets (--teacher scores)."""

    teacher_scores: str = ""
    """Folder of the teacher's scores of the training data, or of what it was chosen from."""
    reference_scores: str = ""
    """Folder of the reference's scores of the same."""
    score_normalization: ScoreNormalization = "mean"
    """Score an instance by its mean or its sum over tokens, in nats."""


@TEACHERS.register("scores")
class ScoresTeacher(Teacher):
    """A number for each instance, in memory: 4 bytes each."""

    Config = ScoresConfig
    num_parameters = 0
    flops_per_token = 0.0

    def __init__(self, config: ScoresConfig, lesson: Lesson) -> None:
        paths = {"teacher": config.teacher_scores, "reference": config.reference_scores}
        for role, path in paths.items():
            if not path:
                raise ConfigError(f"--teacher scores needs --{role}-scores; `score` makes them")
        opened = {role: Scores.open(path) for role, path in paths.items()}
        self.parents = {f"{role}_scores": (s.fingerprint, s.path) for role, s in opened.items()}
        self.data = lesson.data
        self.nats = [
            _differences(source.corpus, opened, config.score_normalization)
            for source in lesson.data.sources
        ]
        targets = np.concatenate(self.nats)
        mean, sd = float(targets.mean()), float(targets.std())
        if sd == 0:
            raise DataError(
                f"{config.teacher_scores} and {config.reference_scores} differ by {mean} nats in "
                "every instance: there is nothing to learn; were they made by one model?"
            )
        self.facts = SignalFacts(
            stored=True,
            targets=TargetScale(mean=mean, sd=sd, score_normalization=config.score_normalization),
        )
        self.beside = Signals(token_bytes=0, dtype=lesson.dtype)

    def load(self, topology: Topology) -> None:
        """Nothing is left to read."""
        scale = self.facts.targets
        assert scale is not None
        get_logger().info(
            "targets of %s instances: %s nats over tokens, mean %.4f, standard deviation %.4f",
            f"{sum(map(len, self.nats)):,}", scale.score_normalization, scale.mean, scale.sd,
        )  # fmt: skip

    def verify(self) -> None:
        """Scores were checked when they were opened."""

    def read_ahead(self, batch: Batch) -> InstanceValues:
        """The targets of a batch; 0 where a row holds no instance."""
        rows = batch.rows_b.numpy()
        found = np.zeros(len(rows), np.float32)
        there = np.flatnonzero(rows != PADDING_ROW)
        sources, own_rows = self.data.locate(rows[there])
        for number in np.unique(sources):
            mine = sources == number
            found[there[mine]] = self.nats[number][own_rows[mine]]
        return InstanceValues(nats_b=torch.from_numpy(found))

    def __call__(self, batches: Sequence[Batch], ahead: Sequence[Ahead | None]) -> list[Ask]:
        """What was read ahead."""
        return [partial(_moved, each) for each in ahead]


def _moved(read: Ahead | None) -> InstanceValues | None:
    return read.to(platform.device()) if isinstance(read, InstanceValues) else None


def _differences(
    corpus: Corpus, scores: dict[str, Scores], normalization: ScoreNormalization
) -> np.ndarray:
    """float32[N] r of every instance of `corpus`; refuses scores of something else."""
    teacher = scores["teacher"]
    whole = scored_corpus(
        corpus, teacher.corpus_fingerprint, f"the scores at --teacher-scores {teacher.path}"
    )
    paths = {role: found.path for role, found in scores.items()}
    fitting = open_scores(whole, teacher=paths["teacher"], reference=paths["reference"])
    found = exact_differences(whole, fitting, normalization)
    return found[rows_within(corpus, whole)].astype(np.float32)
