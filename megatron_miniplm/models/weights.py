"""Weights to start from, score with or learn from, in any format that is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.tokenizers import Tokenizer, load_saved, load_tokenizer
from megatron_miniplm.models.build import VOCABULARY_KEYS, build_model, check_layout
from megatron_miniplm.models.checkpoint import (
    latest_checkpoint,
    load_weights,
    read_trained_model,
    verify_checkpoint,
)
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.gguf import GgufFile, is_gguf_file
from megatron_miniplm.models.gguf_tokenizer import token_bytes
from megatron_miniplm.models.global_tensors import GlobalSource, GlobalTensors, fill_from
from megatron_miniplm.models.hf_folder import HfFolder, is_hf_folder
from megatron_miniplm.models.megatron_lm import MegatronLmCheckpoint, megatron_lm_checkpoint
from megatron_miniplm.models.pretrained import ForeignSource, check_same_shape, parameters_of
from megatron_miniplm.models.value_head import TargetScale
from megatron_miniplm.parallel.topology import Layout, Topology


class Weights(ABC):
    """A trained model somewhere on disk."""

    path: Path
    config: ModelConfig
    fingerprint: str
    iteration: int | None = None
    """Updates that it was trained for; None where that is not known."""
    targets: TargetScale | None = None
    """What its head for a number of each instance predicts; None: it is a language model."""

    @abstractmethod
    def fill(self, model: ModelChunks, topology: Topology) -> None:
        """Set this rank's parameters (before the model is wrapped)."""

    @property
    @abstractmethod
    def parts(self) -> GlobalSource:
        """The same, to be read a parameter at a time."""

    def verify(self) -> None:
        """Refuse weights that are damaged or not finite; reads all of them, keeps none."""
        for key, layer, _ in parameters_of(get_family(self.config.model_family), self.config):
            shape = self.parts.shape(key, layer)
            if shape is None:
                raise CheckpointError(f"{self.path} has no parameter {key} (layer {layer})")
            if not self.parts.load((key, layer, shape), torch.float32).isfinite().all():
                raise CheckpointError(f"{self.path}: {key} (layer {layer}) is not finite")

    def output_rows(self, first: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``first .. first + size`` of the output matrix; zeros beyond its last."""
        tied = not self.config.untie_embeddings_and_output_weights
        key = VOCABULARY_KEYS[0 if tied else 1]
        shape = self.parts.shape(key, None)
        if shape is None:
            raise CheckpointError(f"{self.path} has no parameter {key}")
        rows = torch.zeros((size, shape[1]), dtype=dtype)
        there = max(0, min(size, shape[0] - first))
        if there:
            self.parts.read(
                key, None, (slice(first, first + there), slice(0, shape[1])), rows[:there]
            )
        return rows

    @abstractmethod
    def check_tokenizer(self, corpus: Corpus) -> None:
        """Refuse a corpus whose token ids mean something else to this model."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that lies beside it; refuses where there is none."""
        raise ConfigError(
            f"{self.path} has no tokenizer beside it: pass the model's with --tokenizer-model"
        )

    def shared_fingerprint(self, layout: Layout) -> str:
        """`fingerprint`; where it is a hash of many files, every rank reads some (a collective)."""
        return self.fingerprint

    def check_files(self, topology: Topology) -> None:
        """Refuse files that changed since they were written; the ranks share the work.

        Here: `fingerprint` is a hash of the files, so who compared it need not read them again.
        """
        return

    def require(self, shape: ModelConfig) -> None:
        """Refuse to be put into a model of another shape."""
        check_same_shape(shape, self.config, str(self.path))

    def fit(self, corpus: Corpus, layout: Layout, *, width: int | None = None) -> ModelConfig:
        """The shape that `build` makes of it, before anything of it is read; refuses misfits.

        `width`: columns of the logits, at least the real vocabulary, where they must be those of
        another model (default: its own); rows beyond either are padding and mean nothing.
        """
        self.check_tokenizer(corpus)
        self._check_vocabulary(corpus.vocab_size, f"the tokenizer of {corpus.prefix}")
        vocab = self.config.vocab_size or 0
        if corpus.seq_length > self.config.max_position_embeddings:
            raise ConfigError(
                f"{corpus.prefix} has instances of {corpus.seq_length} inputs, but {self.path} was "
                f"made for at most {self.config.max_position_embeddings}: use shorter instances"
            )
        shape = self.config
        if width is not None:
            shape = replace(shape, vocab_size=min(vocab, width), make_vocab_size_divisible_by=width)
        check_layout(shape, layout, corpus.vocab_size)
        return shape

    def build(
        self, corpus: Corpus, topology: Topology, dtype: torch.dtype, *, width: int | None = None
    ) -> ModelChunks:
        """This rank's part of the model, filled, frozen, for the vocabulary of `corpus`."""
        shape = self.fit(corpus, topology, width=width)
        return self.read(shape, topology, dtype, valid_vocab=corpus.vocab_size)

    def fit_tokenizer(self, tokenizer: Tokenizer, layout: Layout) -> ModelConfig:
        """`fit` where there is no corpus: for what this tokenizer makes of a text."""
        self._check_vocabulary(tokenizer.vocab_size, f"the tokenizer {tokenizer.source}")
        check_layout(self.config, layout, tokenizer.vocab_size)
        return self.config

    def _check_vocabulary(self, size: int, whose: str) -> None:
        vocab = self.config.vocab_size or 0
        if vocab < size:
            raise LineageError(
                f"{self.path} has {vocab} logit columns, but {whose} has {size} tokens: it was not "
                "made for that tokenizer"
            )

    def read(
        self, shape: ModelConfig, topology: Topology, dtype: torch.dtype, *, valid_vocab: int
    ) -> ModelChunks:
        """`build` of a shape that was found to `fit`."""
        model = build_model(
            shape, topology, valid_vocab=valid_vocab, dtype=dtype,
            value_head=self.targets is not None,
        )  # fmt: skip
        model.requires_grad_(False).eval()
        # Whatever is not written stays NaN: a part left at random values would only train badly.
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        self.fill(model, topology)
        self._refuse_gaps(model)
        return model

    def _refuse_gaps(self, model: ModelChunks) -> None:
        gaps = [name for name, value in model.named_parameters() if not value.isfinite().all()]
        if gaps:
            raise CheckpointError(
                f"{self.path} left {len(gaps)} parameters without finite values, first {gaps[0]}: "
                "it is incomplete, or the model diverged when it was trained"
            )


class _Checkpoint(Weights):
    def __init__(self, path: Path) -> None:
        self.path = path
        manifest, self.trained = read_trained_model(path)
        self.config, self.fingerprint = self.trained.config, manifest.fingerprint
        self.iteration, self.targets = self.trained.iteration, self.trained.targets

    def fill(self, model: ModelChunks, topology: Topology) -> None:
        load_weights(self.path, model, topology=topology)

    @property
    def parts(self) -> GlobalSource:
        return GlobalTensors(self.path)

    def check_files(self, topology: Topology) -> None:
        verify_checkpoint(self.path, topology=topology)

    def verify(self) -> None:
        verify_checkpoint(self.path)
        super().verify()

    def tokenizer(self) -> Tokenizer:
        folder = self.path.parent / "tokenizer"
        found = load_saved(folder)
        if found.fingerprint != self.trained.tokenizer_fingerprint:
            raise LineageError(
                f"{folder} is tokenizer {found.fingerprint}, but {self.path} was trained with "
                f"{self.trained.tokenizer_fingerprint}: restore the folder"
            )
        return found

    def check_tokenizer(self, corpus: Corpus) -> None:
        theirs = corpus.manifest.content["tokenizer"]["fingerprint"]
        if theirs != self.trained.tokenizer_fingerprint:
            raise LineageError(
                f"{self.path} was trained with tokenizer {self.trained.tokenizer_fingerprint}, "
                f"but {corpus.prefix} was made with {theirs}: use a corpus of its tokenizer"
            )


class _Foreign(Weights):
    """A model of another program, read in place: no copy of it is made."""

    source: ForeignSource

    def __init__(self, source: ForeignSource) -> None:
        self.path, self.source, self.config = source.path, source, source.config

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Hash of the files, read once when first asked for."""
        return self.source.fingerprint

    def shared_fingerprint(self, layout: Layout) -> str:
        return self.source.shared_fingerprint(layout)

    def fill(self, model: ModelChunks, topology: Topology) -> None:
        fill_from(model, self.source)

    @property
    def parts(self) -> GlobalSource:
        return self.source


class _HuggingFace(_Foreign):
    def tokenizer(self) -> Tokenizer:
        if not (self.path / "tokenizer.json").exists():
            return super().tokenizer()
        return load_tokenizer(self.path)

    def check_tokenizer(self, corpus: Corpus) -> None:
        ours = corpus.tokenizer()
        if not (self.path / "tokenizer.json").exists():
            raise LineageError(
                f"{self.path} has no tokenizer.json, so it cannot be checked that its token ids "
                f"are those of {corpus.prefix}: put the model's tokenizer files into it"
            )
        theirs = load_tokenizer(self.path, kind="HuggingFaceTokenizer", eod_token=ours.eod_token)
        self._compare(theirs.token_bytes(), corpus)

    def _compare(self, theirs: Sequence[bytes], corpus: Corpus) -> None:
        ours = corpus.tokenizer()
        if theirs != ours.token_bytes():
            raise LineageError(
                f"the tokenizer in {self.path} ({len(theirs)} tokens) is not the one of "
                f"{corpus.prefix} ({ours.vocab_size} tokens, {ours.fingerprint}): retokenize the "
                "corpus for it"
            )


class _Gguf(_HuggingFace):
    source: GgufFile

    def check_tokenizer(self, corpus: Corpus) -> None:
        self._compare(token_bytes(self.source.metadata), corpus)


class _MegatronLm(_Foreign):
    def check_tokenizer(self, corpus: Corpus) -> None:
        get_logger().warning(
            "%s is a Megatron-LM checkpoint, which has no tokenizer: it cannot be checked that it "
            "was trained with that of %s", self.path, corpus.prefix,
        )  # fmt: skip


def open_proxy(path: Path) -> tuple[Weights, TargetScale]:
    """A model with a head for a number of each instance, and what that predicts."""
    found = _open(path)
    if found.targets is None:
        raise CheckpointError(
            f"{path} is a language model and predicts no number for an instance: pass a checkpoint "
            "of `pretrain --objective regression`, or --head lm"
        )
    return found, found.targets


def open_weights(path: Path) -> Weights:
    """A language model at `path`.

    A Hugging Face folder, a GGUF file, SAVE of a run (its latest checkpoint) or one iteration of
    it, or the same of Megatron-LM.
    """
    found = _open(path)
    if found.targets is not None:
        raise CheckpointError(
            f"{path} was trained to predict a number for each instance (`pretrain --objective "
            "regression`) and is no language model any more: use it with `score --head proxy`, or "
            "pass the model that it was made from"
        )
    return found


def _open(path: Path) -> Weights:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if is_gguf_file(path):
        return _Gguf(GgufFile(path))
    if is_hf_folder(path):
        return _HuggingFace(HfFolder(path))
    if (plain := megatron_lm_checkpoint(path)) is not None:
        return _MegatronLm(MegatronLmCheckpoint(plain))
    folder = latest_checkpoint(path)
    if folder is None:
        raise CheckpointError(
            f"{path} is no GGUF file, no Hugging Face folder (no config.json) and no Megatron "
            "checkpoint (no latest_checkpointed_iteration.txt)"
        )
    return _Checkpoint(folder)
