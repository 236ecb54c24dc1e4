"""``convert``: Hugging Face folder <-> Megatron checkpoint.

One process is enough: a checkpoint can be loaded in any layout, so there is nothing to reshard.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megatron_miniplm.core.config import to_flat, write_run
from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Manifest, Parent, relative_path
from megatron_miniplm.data.tokenizers import (
    Tokenizer,
    TokenizerType,
    load_saved,
    load_tokenizer,
)
from megatron_miniplm.models.build import build_model, fill_by_name
from megatron_miniplm.models.checkpoint import (
    TrainedModel,
    checkpoint_metadata,
    latest_checkpoint,
    load_weights,
    read_trained_model,
    refuse_foreign_folder,
    save_checkpoint,
    start_over,
)
from megatron_miniplm.models.convert import HfFolder, HfSource
from megatron_miniplm.models.hf_writer import (
    TORCH_DTYPES,
    HfExtras,
    global_tensors,
    write_hf_folder,
)
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown

Format = Literal["hf", "megatron"]
TOKENIZER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Convert a model between a Hugging Face folder and a Megatron checkpoint, bit for bit.

    The tokenizer goes with the model.
    """

    from_: Annotated[Format, tyro.conf.arg(name="from")]
    """What --load is."""
    to: Format
    """What to make."""
    load: Path
    """Hugging Face folder; or a run's --save folder (its latest checkpoint), or one iteration."""
    save: Path
    """Folder to make."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights written; bfloat16 rounds those of a float32 model."""
    tokenizer_model: Path | None = None
    """Tokenizer folder or file; default: the one that lies with the model."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """Kind of the tokenizer beside a Hugging Face model, or given by --tokenizer-model."""
    eod_token: str | None = None
    """Document separator of the model's corpus; default: <|endoftext|>, else the EOS token."""
    overwrite: bool = False
    """Replace what an earlier conversion left in --save."""

    def __post_init__(self) -> None:
        if self.from_ == self.to:
            raise ConfigError(f"--from {self.from_} --to {self.to}: nothing to convert")
        if self.load.absolute() == self.save.absolute():
            raise ConfigError(f"--load and --save are both {self.save}; choose another --save")


def run(config: Config) -> None:
    """Convert; --save is there only if it is complete."""
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise ConfigError(
            f"convert runs in one process, not {os.environ['WORLD_SIZE']}: start it without "
            "torchrun; the result can be loaded in any layout"
        )
    topology = initialize(ParallelConfig())
    try:
        if config.to == "megatron":
            _to_megatron(config, topology)
        else:
            _to_hf(config, topology)
    finally:
        shutdown()
    get_logger().info("converted: %s", config.save)


def _to_megatron(config: Config, topology: Topology) -> None:
    folder = HfFolder(config.load)
    tokenizer = load_tokenizer(
        config.tokenizer_model or config.load,
        kind=config.tokenizer_type,
        eod_token=config.eod_token,
    )
    refuse_foreign_folder(config.save, "convert")
    if not config.overwrite and latest_checkpoint(config.save) is not None:
        raise ConfigError(f"{config.save} holds a checkpoint; pass --overwrite to replace it")
    dtype = TORCH_DTYPES[config.dtype]
    model = build_model(folder.config, topology, valid_vocab=tokenizer.vocab_size, dtype=dtype)
    fill_by_name(model, HfSource(folder, dtype))
    write_run(config.save / "run.json", "convert", config)
    start_over(config.save)
    tokenizer.save(config.save / TOKENIZER)
    trained = TrainedModel(
        config=folder.config,
        valid_vocab=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        iteration=0,
        consumed_samples=0,
    )
    save_checkpoint(
        config.save,
        trained,
        {"model": model.sharded_state_dict(metadata=checkpoint_metadata())},
        topology=topology,
        parents={"huggingface": (folder.fingerprint, config.load)},
        config={**to_flat(config), "token_ids": folder.token_ids},
    )


def _to_hf(config: Config, topology: Topology) -> None:
    checkpoint = latest_checkpoint(config.load)
    if checkpoint is None:
        raise CheckpointError(
            f"{config.load} holds no complete checkpoint (no latest_checkpointed_iteration.txt)"
        )
    manifest, trained = read_trained_model(checkpoint)
    tokenizer = _tokenizer_of(config, checkpoint, trained)
    model = build_model(
        trained.config, topology, valid_vocab=trained.valid_vocab, dtype=TORCH_DTYPES[config.dtype]
    )
    load_weights(checkpoint, model, topology=topology)
    end = {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id}
    source = tokenizer.source
    extras = HfExtras(
        tokenizer_folder=source if source.is_dir() else source.parent,
        token_ids=manifest.config.get("token_ids") or end,
        lineage=_lineage(manifest, trained),
        parents={
            "checkpoint": Parent(
                fingerprint=manifest.fingerprint,
                path=relative_path(checkpoint, config.save / "manifest.json"),
            )
        },
    )
    write_hf_folder(
        config.save,
        trained.config,
        global_tensors(model),
        dtype=TORCH_DTYPES[config.dtype],
        extras=extras,
        overwrite=config.overwrite,
    )


def _tokenizer_of(config: Config, checkpoint: Path, trained: TrainedModel) -> Tokenizer:
    """The run's own tokenizer, or the given one if its ids mean the same."""
    own = load_saved(checkpoint.parent / TOKENIZER)
    if own.fingerprint != trained.tokenizer_fingerprint:
        raise LineageError(
            f"{checkpoint.parent / TOKENIZER} is tokenizer {own.fingerprint}, but the checkpoint "
            f"was trained with {trained.tokenizer_fingerprint}: restore the folder"
        )
    if config.tokenizer_model is None:
        return own
    given = load_tokenizer(
        config.tokenizer_model,
        kind=config.tokenizer_type,
        eod_token=config.eod_token or own.eod_token,
    )
    if given.token_bytes() != own.token_bytes():
        raise LineageError(
            f"--tokenizer-model {config.tokenizer_model} ({given.vocab_size} tokens) is not the "
            f"tokenizer that {checkpoint} was trained with ({own.vocab_size} tokens)"
        )
    return given


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
