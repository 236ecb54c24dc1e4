"""What a method costs: FLOPs of training and of what is done before it, and bytes on disk.

A forward pass of a model costs f FLOPs a token, and training 3 f. One token of a student::

    pretrain, seqkd, miniplm, pd     3 f_s
    vanilla-kd                       3 f_s +   f_t      the teacher's forward pass
    minillm                          4 f_s + 2 f_t      sampling; in it and for the reward, f_t

so that T updates without a teacher cost what T x 3 f_s / (that) updates of a method do
(`Method.share`). The paper (arXiv 2410.17215) takes f = 2 N with N rounded, and compares methods at
equal training FLOPs; what is done before, once for all students, is `OFFLINE` here.

Three ways to count f (`Counting`):

    parameters      2 N, embeddings included, attention left out: the paper's
    non-embedding   2 (N - embeddings), as Kaplan et al. count
    megatron        multiplications of the layers, causal attention included, and of the padded
                    head, not the embedding's look-up: what TFLOP/s and MFU are made of
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.flops import (
    FORWARD_AND_BACKWARD,
    count_parameters,
    embedding_parameters,
    forward_flops_per_token,
    nearest,
    share_beside_teacher,
)

Counting = Literal["megatron", "parameters", "non-embedding"]
Kind = Literal["training", "forward", "decoding"]
"""What work is like for the hardware: decoding reads all weights for a token."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, as far as costs depend on it."""

    name: str
    parameters: int
    forward: int
    """FLOPs of a forward pass, per token."""
    shape: ModelConfig | None = None
    """None where only the number of parameters is known."""

    @classmethod
    def of_size(cls, parameters: float, name: str = "") -> Model:
        """Known by its number of parameters: every counting is 2 N."""
        size = round(parameters)
        return cls(name=name or f"{parameters:g}", parameters=size, forward=2 * size)

    @classmethod
    def of_shape(cls, shape: ModelConfig, counting: Counting, seq_length: int, name: str) -> Model:
        """Known by its shape; `seq_length` matters where attention is counted."""
        size = count_parameters(shape)
        forward = {
            "parameters": 2 * size,
            "non-embedding": 2 * (size - embedding_parameters(shape)),
            "megatron": forward_flops_per_token(shape, seq_length),
        }[counting]
        return cls(name=name, parameters=size, forward=forward, shape=shape)


@dataclass(frozen=True, kw_only=True)
class PlanSetting:
    """Models and amounts, in tokens."""

    student: Model
    teacher: Model
    reference: Model
    tokens: int
    """That a student is trained on."""
    corpus_tokens: int
    """That exist to select from; fewer than `tokens` are trained on several times."""
    selection_ratio: float = 0.5
    """Share of the corpus that is selected."""
    reference_tokens: int = 5_000_000_000
    """That the reference is trained on."""
    proxy_tokens: int = 100_000_000
    """That teacher and reference score for MiniPLM-proxy."""
    proxy_epochs: float = 1
    """Passes over these in which the proxy is trained."""
    prompt_share: float = 0.75
    """Of an instance, what the teacher continues in SeqKD (768 of 1,024)."""
    seq_length: int = 1024
    """Tokens of an instance."""
    vocabulary: int = 151_936
    """Columns of the teacher's logits."""
    logit_bytes: float = 100
    """Bytes a token of a logit store."""

    @property
    def distinct(self) -> int:
        """Tokens of a training run that are not repetitions."""
        return min(self.tokens, self.corpus_tokens)

    @property
    def selected(self) -> int:
        """Tokens of the selected subset."""
        return round(self.selection_ratio * self.corpus_tokens)


def _training(model: Model) -> int:
    return FORWARD_AND_BACKWARD * model.forward


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work that is done once, whatever the number of students."""

    kind: Kind
    flops: Callable[[PlanSetting], float]


OFFLINE: Mapping[str, Job] = {
    "train reference": Job(
        kind="training", flops=lambda s: _training(s.reference) * s.reference_tokens
    ),
    "score with teacher": Job(
        kind="forward", flops=lambda s: s.teacher.forward * s.corpus_tokens
    ),
    "score with reference": Job(
        kind="forward", flops=lambda s: s.reference.forward * s.corpus_tokens
    ),
    "score the proxy's sample": Job(
        kind="forward", flops=lambda s: (s.teacher.forward + s.reference.forward) * s.proxy_tokens
    ),
    "train proxy": Job(
        kind="training",
        flops=lambda s: _training(s.reference) * s.proxy_tokens * s.proxy_epochs,
    ),
    "score with proxy": Job(
        kind="forward", flops=lambda s: s.reference.forward * s.corpus_tokens
    ),
    "cache logits": Job(kind="forward", flops=lambda s: s.teacher.forward * s.distinct),
    "read prompts": Job(
        kind="forward", flops=lambda s: s.teacher.forward * s.distinct * s.prompt_share
    ),
    "generate": Job(
        kind="decoding", flops=lambda s: s.teacher.forward * s.distinct * (1 - s.prompt_share)
    ),
}  # fmt: skip


SUM_NLL_BYTES, NUM_TOKENS_BYTES = 4, 4
PREDICTION_BYTES = 4
"""Of an instance in a set of scores, and in a proxy's predictions. The paper counts one number of 4
bytes an instance."""
SUBSET_BYTES = 20 + 8
"""Of an instance in a subset: its row of the view, its id."""
DENSE_BYTES = 4
"""Of a logit that is kept as it is."""

STORED: Mapping[str, Callable[[PlanSetting], float]] = {
    # Each is one kind of artifact; the sizes of a row are those of `data.scores` and `data.subset`.
    "corpus": lambda s: 4 * s.corpus_tokens,
    "scores": lambda s: 2 * (SUM_NLL_BYTES + NUM_TOKENS_BYTES) * rows(s.corpus_tokens, s),
    "proxy scores": lambda s: PREDICTION_BYTES * rows(s.corpus_tokens, s),
    "subset": lambda s: SUBSET_BYTES * rows(s.selected, s),
    "logit store": lambda s: s.logit_bytes * s.distinct,
    "generated corpus": lambda s: 4 * s.distinct,
}


def rows(tokens: float, setting: PlanSetting) -> float:
    """Instances of so many tokens."""
    return tokens / setting.seq_length


def dense_logits(setting: PlanSetting) -> float:
    """Bytes of every logit of what is trained on: what nobody can store."""
    return DENSE_BYTES * setting.vocabulary * setting.distinct


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train students."""

    student_passes: int = FORWARD_AND_BACKWARD
    """Forward passes of the student that a token of training costs."""
    teacher_passes: int = 0
    offline: tuple[str, ...] = ()
    """Names in `OFFLINE`."""
    stored: tuple[str, ...] = ("corpus",)
    """Names in `STORED`."""
    samples: bool = False
    """Whether student and teacher write the rest of every instance in the step."""

    def training(self, setting: PlanSetting) -> int:
        """FLOPs of one student's training, a teacher in the step included."""
        student = self.student_passes * setting.student.forward
        return (student + self.teacher_passes * setting.teacher.forward) * setting.tokens

    def work(self, setting: PlanSetting) -> dict[Kind, float]:
        """The same, by what it is like for the hardware."""
        passes = setting.student.forward + setting.teacher.forward if self.samples else 0
        decoding = passes * setting.tokens * (1 - setting.prompt_share)
        return {"training": self.training(setting) - decoding, "decoding": decoding}

    def per_student(self, setting: PlanSetting, students: int) -> float:
        """FLOPs of one of so many students, with its part of all that comes before."""
        return self.training(setting) + sum(self.jobs(setting).values()) / students

    def jobs(self, setting: PlanSetting) -> dict[str, float]:
        """FLOPs of all that comes before, by name."""
        return {name: float(OFFLINE[name].flops(setting)) for name in self.offline}

    def storage(self, setting: PlanSetting) -> dict[str, float]:
        """Bytes of the artifacts that students are trained from, by name."""
        return {name: float(STORED[name](setting)) for name in self.stored}

    def share(self, *, student: int, teacher: int) -> Fraction:
        """Tokens for the training FLOPs of one token without distillation.

        `student`, `teacher`: parameters, or FLOPs of a forward pass.
        """
        return share_beside_teacher(
            student=student, teacher=teacher,
            student_passes=self.student_passes, teacher_passes=self.teacher_passes,
        )  # fmt: skip

    def aligned_updates(
        self, updates: int, *, student: int, teacher: int, multiple: int = 1
    ) -> int:
        """As many updates as cost what `updates` of `pretrain` do, at the nearest `multiple`."""
        return nearest(updates * self.share(student=student, teacher=teacher), multiple)


_SELECTED = ("corpus", "scores", "subset")
_SCORED = ("train reference", "score with teacher", "score with reference")
METHODS: Mapping[str, Method] = {
    "pretrain": Method(),
    "vanilla-kd": Method(teacher_passes=1),
    "seqkd": Method(offline=("read prompts", "generate"), stored=("corpus", "generated corpus")),
    "minillm": Method(student_passes=4, teacher_passes=2, samples=True),
    "miniplm": Method(offline=_SCORED, stored=_SELECTED),
    "miniplm-proxy": Method(
        offline=(
            "train reference", "score the proxy's sample", "train proxy", "score with proxy",
        ),
        stored=("corpus", "proxy scores", "subset"),
    ),
    "miniplm+vanilla-kd": Method(teacher_passes=1, offline=_SCORED, stored=_SELECTED),
    "pd-offline": Method(offline=("cache logits",), stored=("corpus", "logit store")),
    # Its logits are written while the teacher itself is trained, for no extra forward pass.
    "pd-online": Method(stored=("corpus", "logit store")),
}  # fmt: skip


def ranking_flops(setting: PlanSetting) -> tuple[float, float]:
    """FLOPs to rank the corpus by both models' scores, and by a proxy with all that it takes.

    Without the reference's training, which both need (arXiv 2410.17215, Table 9).
    """

    def total(method: str) -> float:
        jobs = METHODS[method].jobs(setting)
        return sum(flops for name, flops in jobs.items() if name != "train reference")

    return total("miniplm"), total("miniplm-proxy")


def pays_off_after(extra: float, saved: float) -> float:
    """Units (students, tokens) that must save `saved` each to make up for `extra`; or infinite."""
    if extra <= 0:
        return 0.0
    return extra / saved if saved > 0 else float("inf")
