"""Weights to start from or to score with: a Megatron checkpoint or a Hugging Face folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch

from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.models.build import build_model, fill_by_name
from megatron_miniplm.models.checkpoint import (
    latest_checkpoint,
    load_weights,
    read_trained_model,
)
from megatron_miniplm.models.convert import HfFolder, HfSource, check_same_shape, is_hf_folder
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.layers import Decoder
from megatron_miniplm.parallel.topology import Topology


class Weights(ABC):
    """A trained model somewhere on disk."""

    path: Path
    config: ModelConfig
    fingerprint: str

    @abstractmethod
    def fill(self, model: Decoder, topology: Topology) -> None:
        """Set this rank's parameters (before the model is wrapped)."""

    @abstractmethod
    def check_tokenizer(self, corpus: Corpus) -> None:
        """Refuse a corpus whose token ids mean something else to this model."""

    def require(self, shape: ModelConfig) -> None:
        """Refuse to be put into a model of another shape."""
        check_same_shape(shape, self.config, str(self.path))

    def build(self, corpus: Corpus, topology: Topology, dtype: torch.dtype) -> Decoder:
        """This rank's part of the model, filled, frozen, for the vocabulary of `corpus`."""
        self.check_tokenizer(corpus)
        if corpus.seq_length > self.config.max_position_embeddings:
            raise ConfigError(
                f"{corpus.prefix} has instances of {corpus.seq_length} inputs, but {self.path} was "
                f"made for at most {self.config.max_position_embeddings}: use shorter instances"
            )
        model = build_model(self.config, topology, valid_vocab=corpus.vocab_size, dtype=dtype)
        self.fill(model, topology)
        return model.requires_grad_(False).eval()


class _Checkpoint(Weights):
    def __init__(self, path: Path) -> None:
        self.path = path
        manifest, self.trained = read_trained_model(path)
        self.config, self.fingerprint = self.trained.config, manifest.fingerprint

    def fill(self, model: Decoder, topology: Topology) -> None:
        load_weights(self.path, model, topology=topology)

    def check_tokenizer(self, corpus: Corpus) -> None:
        theirs = corpus.manifest.content["tokenizer"]["fingerprint"]
        if theirs != self.trained.tokenizer_fingerprint:
            raise LineageError(
                f"{self.path} was trained with tokenizer {self.trained.tokenizer_fingerprint}, "
                f"but {corpus.prefix} was made with {theirs}: use a corpus of its tokenizer"
            )


class _HuggingFace(Weights):
    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, HfFolder(path)
        self.config, self.fingerprint = self.folder.config, self.folder.fingerprint

    def fill(self, model: Decoder, topology: Topology) -> None:
        fill_by_name(model, HfSource(self.folder, torch.float32, config=self.config))

    def check_tokenizer(self, corpus: Corpus) -> None:
        ours = corpus.tokenizer()
        if not (self.path / "tokenizer.json").exists():
            raise LineageError(
                f"{self.path} has no tokenizer.json, so it cannot be checked that its token ids "
                f"are those of {corpus.prefix}: put the model's tokenizer files into it"
            )
        theirs = load_tokenizer(self.path, kind="HuggingFaceTokenizer", eod_token=ours.eod_token)
        if theirs.token_bytes() != ours.token_bytes():
            raise LineageError(
                f"the tokenizer in {self.path} ({theirs.vocab_size} tokens) is not the one of "
                f"{corpus.prefix} ({ours.vocab_size} tokens): retokenize the corpus for it"
            )


def open_weights(path: Path) -> Weights:
    """Weights at `path`: a Hugging Face folder, SAVE of a run (its latest), or one iteration."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if is_hf_folder(path):
        return _HuggingFace(path)
    folder = latest_checkpoint(path)
    if folder is None:
        raise CheckpointError(
            f"{path} is neither a Hugging Face folder (no config.json) nor a Megatron checkpoint "
            "with a manifest (no latest_checkpointed_iteration.txt)"
        )
    return _Checkpoint(folder)
