"""What `convert` converts: weights of any format that is read, with tokenizer, ids and lineage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.core.manifest import Manifest
from megatron_miniplm.data.tokenizers import Tokenizer, TokenizerType, load_saved, load_tokenizer
from megatron_miniplm.models.checkpoint import (
    TrainedModel,
    latest_checkpoint,
    read_trained_model,
    verify_checkpoint,
)
from megatron_miniplm.models.gguf import GgufFile, is_gguf_file
from megatron_miniplm.models.gguf_tokenizer import write_tokenizer
from megatron_miniplm.models.global_tensors import GlobalSource, GlobalTensors
from megatron_miniplm.models.hf_folder import HfFolder
from megatron_miniplm.models.megatron_lm import MegatronLmCheckpoint, megatron_lm_checkpoint
from megatron_miniplm.models.pretrained import ForeignSource
from megatron_miniplm.parallel.topology import Topology

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class GivenTokenizer:
    """How a tokenizer is to be read."""

    path: Path | None
    """Folder or file; None: the one that lies with the model."""
    kind: TokenizerType
    eod_token: str | None

    def load(self, default: Path, *, eod_token: str | None = None) -> Tokenizer:
        """Read it, or that of `default`; `eod_token` is the separator where none is given."""
        return load_tokenizer(
            self.path or default, kind=self.kind, eod_token=self.eod_token or eod_token
        )


@dataclass(frozen=True, kw_only=True)
class Convertible:
    """A model with all that goes along when it is converted."""

    weights: GlobalSource
    trained: TrainedModel
    tokenizer: Tokenizer
    token_ids: Mapping[str, Any]
    parents: Mapping[str, tuple[str, Path]]
    """(fingerprint, path), by role."""
    lineage: Mapping[str, Any]
    """Facts for the model card."""


def open_convertible(
    kind: Literal["hf", "gguf", "megatron"],
    path: Path,
    given: GivenTokenizer,
    topology: Topology,
    stack: ExitStack,
) -> Convertible:
    """What `path` holds, which must be of that kind (a collective: the ranks hash its files).

    A folder that is needed meanwhile is there until `stack` ends. `LineageError`: a tokenizer that
    does not belong to the weights.
    """
    if kind == "megatron":
        stock = megatron_lm_checkpoint(path)
        if stock is None:
            return _from_checkpoint(path, given, topology)
        if given.path is None:
            raise ConfigError(
                f"{stock} is a checkpoint of Megatron-LM, which has no tokenizer: pass the one it "
                "was trained with as --tokenizer-model"
            )
        return _from_foreign(
            "megatron-lm", MegatronLmCheckpoint(stock), given.load(given.path), topology
        )
    if kind == "hf":
        return _from_foreign("huggingface", HfFolder(path), given.load(path), topology)
    if not is_gguf_file(path):
        raise CheckpointError(f"{path} is not a GGUF file")
    model = GgufFile(path)
    embedded = Path(stack.enter_context(TemporaryDirectory()))
    if given.path is None:
        write_tokenizer(model.metadata, embedded, path)
    return _from_foreign("gguf", model, given.load(embedded), topology)


def _from_foreign(
    role: str, model: ForeignSource, tokenizer: Tokenizer, topology: Topology
) -> Convertible:
    fingerprint = model.shared_fingerprint(topology)
    return Convertible(
        weights=model,
        trained=TrainedModel(
            config=model.config,
            valid_vocab=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            iteration=0,
            consumed_samples=0,
        ),
        tokenizer=tokenizer,
        token_ids=model.token_ids,
        parents={role: (fingerprint, model.path)},
        lineage={f"made from {role}": fingerprint},
    )


def _from_checkpoint(path: Path, given: GivenTokenizer, topology: Topology) -> Convertible:
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no complete checkpoint (no latest_checkpointed_iteration.txt)"
        )
    manifest, trained = read_trained_model(checkpoint)
    tokenizer = _tokenizer_of(given, checkpoint, trained)
    verify_checkpoint(checkpoint, topology=topology)
    end = {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id}
    return Convertible(
        weights=GlobalTensors(checkpoint),
        trained=trained,
        tokenizer=tokenizer,
        token_ids=manifest.config.get("token_ids") or end,
        parents={"checkpoint": (manifest.fingerprint, checkpoint)},
        lineage=_lineage(manifest, trained),
    )


def _tokenizer_of(given: GivenTokenizer, checkpoint: Path, trained: TrainedModel) -> Tokenizer:
    """The run's own tokenizer, or the given one if its ids mean the same."""
    folder = checkpoint.parent / TOKENIZER_FOLDER
    own = load_saved(folder)
    if own.fingerprint != trained.tokenizer_fingerprint:
        raise LineageError(
            f"{folder} is tokenizer {own.fingerprint}, but the checkpoint "
            f"was trained with {trained.tokenizer_fingerprint}: restore the folder"
        )
    if given.path is None:
        return own
    asked = given.load(given.path, eod_token=own.eod_token)
    if asked.token_bytes() != own.token_bytes():
        raise LineageError(
            f"--tokenizer-model {given.path} ({asked.vocab_size} tokens) is not the "
            f"tokenizer that {checkpoint} was trained with ({own.vocab_size} tokens)"
        )
    return asked


def _lineage(manifest: Manifest, trained: TrainedModel) -> dict[str, Any]:
    """Where the weights came from, for the model card."""
    facts: dict[str, Any] = {
        "checkpoint": manifest.fingerprint,
        "iteration": f"{trained.iteration:,}",
        "instances trained on": f"{trained.consumed_samples:,}",
        "tokenizer": trained.tokenizer_fingerprint,
    }
    facts |= {f"made from {role}": parent.fingerprint for role, parent in manifest.parents.items()}
    names = ("objective", "lr", "global_batch_size", "seed")
    return facts | {name: manifest.config[name] for name in names if name in manifest.config}
