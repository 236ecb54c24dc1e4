"""``convert``: Hugging Face folder, GGUF file and Megatron checkpoint, one into another.

No model is built. Every rank reads whole parameters, its share of them, and saves them as they are;
a checkpoint can be loaded in any layout, so there is nothing to reshard. One process is enough
where its memory holds the weights (to Megatron) or the largest tensor (to Hugging Face); under
torchrun, N ranks hold an Nth each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from megatron_miniplm.core.config import to_flat, write_run
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger, progress
from megatron_miniplm.core.manifest import Parent
from megatron_miniplm.data.staging import exclusive, writing
from megatron_miniplm.data.tokenizers import TokenizerType
from megatron_miniplm.evaluation.parity import (
    read_text,
    require_transformers,
    verify_with_transformers,
)
from megatron_miniplm.models.build import check_layout
from megatron_miniplm.models.checkpoint import (
    latest_checkpoint,
    refuse_foreign_folder,
    save_checkpoint,
    start_over,
)
from megatron_miniplm.models.convertible import (
    TOKENIZER_FOLDER,
    Convertible,
    GivenTokenizer,
    open_convertible,
)
from megatron_miniplm.models.family import get_family
from megatron_miniplm.models.global_tensors import (
    GlobalSource,
    GlobalTensors,
    Parameter,
    extra_states,
    sharded,
    share,
)
from megatron_miniplm.models.hf_writer import (
    TORCH_DTYPES,
    HfExtras,
    refuse_to_replace,
    write_hf_folder,
)
from megatron_miniplm.models.pretrained import parameters_of
from megatron_miniplm.parallel.topology import (
    JobConfig,
    ParallelConfig,
    Topology,
    initialize,
    shutdown,
)

_Verify = Callable[[GlobalSource, Path], None]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Convert a model between Hugging Face folder, GGUF file and Megatron checkpoint, bit for bit.

    The tokenizer goes with the model.
    """

    from_: Annotated[Literal["hf", "gguf", "megatron"], tyro.conf.arg(name="from")]
    """What --load is; the quantised weights of a GGUF file are expanded."""
    to: Literal["hf", "megatron"]
    """What to make."""
    load: Path
    """Hugging Face folder; GGUF file; a run's --save folder (its latest checkpoint), or one of its
    iterations."""
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
    verify: bool = False
    """Compare logits with those of transformers on a text; both models are then in memory."""
    verify_text: Path | None = None
    """UTF-8 text for --verify, its first 1,024 tokens; default: a built-in one."""
    overwrite: bool = False
    """Replace what an earlier conversion left in --save."""
    tensor_model_parallel_size: int = 1
    """Refuse a model that so many ranks cannot share; the result loads in every layout that can."""
    pipeline_model_parallel_size: int = 1
    """Likewise, that cannot be divided into so many stages."""
    job: JobConfig = field(default_factory=JobConfig)

    def __post_init__(self) -> None:
        if self.from_ == self.to:
            raise ConfigError(f"--from {self.from_} --to {self.to}: nothing to convert")
        if self.load.absolute() == self.save.absolute():
            raise ConfigError(f"--load and --save are both {self.save}; choose another --save")
        if self.verify_text is not None and not self.verify:
            raise ConfigError("--verify-text without --verify: nothing would read it")
        if self.from_ == "megatron" and self.tokenizer_model is None:
            for name in ("eod_token", "tokenizer_type"):
                if getattr(self, name) != getattr(Config, name):
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {getattr(self, name)} says how to read "
                        "--tokenizer-model, which is not given: the run's own tokenizer goes along"
                    )
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)} must be at least 1")


def run(config: Config) -> None:
    """Convert; --save is there only if it is complete."""
    topology = initialize(ParallelConfig(**asdict(config.job)))
    try:
        with ExitStack() as stack:
            # All that can be refused is, before anything is hashed or converted.
            text = _verification_text(config, topology)
            topology.from_rank0(lambda: stack.enter_context(_own_place(config)))
            given = GivenTokenizer(
                path=config.tokenizer_model, kind=config.tokenizer_type, eod_token=config.eod_token
            )
            source = open_convertible(config.from_, config.load, given, topology, stack)
            layout = replace(
                topology,
                tp_size=config.tensor_model_parallel_size,
                pp_size=config.pipeline_model_parallel_size,
            )
            check_layout(source.trained.config, layout, source.tokenizer.vocab_size)
            verify = partial(_verify, config, source, topology, text)
            (_to_megatron if config.to == "megatron" else _to_hf)(config, source, topology, verify)
            get_logger().info("converted: %s", config.save)
    finally:
        shutdown()


def _verification_text(config: Config, topology: Topology) -> str:
    if not config.verify:
        return ""
    if topology.world_size > 1:
        raise ConfigError(
            f"--verify needs both models whole in one process, not {topology.world_size}: "
            "convert without it, or start it without torchrun"
        )
    require_transformers()
    return read_text(config.verify_text)


@contextmanager
def _own_place(config: Config) -> Iterator[None]:
    """Hold --save for this job alone; refuses one that is taken, or that must stay as it is."""
    save = config.save.resolve()
    lock = save.with_name(f".{save.name}.lock")
    with writing(save):
        save.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with exclusive(lock, wait=False, guards=save):
        try:
            if config.to == "hf":
                refuse_to_replace(save, overwrite=config.overwrite)
            else:
                refuse_foreign_folder(save, "convert")
                if not config.overwrite and latest_checkpoint(save) is not None:
                    raise ConfigError(f"{save} holds a checkpoint; pass --overwrite to replace it")
            yield
        finally:
            lock.unlink(missing_ok=True)


def _parameters(source: Convertible) -> list[Parameter]:
    shape = source.trained.config
    return list(parameters_of(get_family(shape.model_family), shape))


def _to_megatron(config: Config, source: Convertible, topology: Topology, verify: _Verify) -> None:
    def begin() -> None:
        write_run(config.save / "run.json", "convert", config)
        start_over(config.save)
        source.tokenizer.save(config.save / TOKENIZER_FOLDER)

    every = _parameters(source)
    parameters = share(every, topology.rank, topology.world_size)
    layers = source.trained.config.num_layers
    state: dict[str, Any] = {}
    if topology.rank == 0:
        state |= extra_states({key for key, _, _ in every}, layers)
    total = sum(math.prod(shape) for _, _, shape in parameters)
    with progress("reading (this rank)", total, "parameters") as bar:
        for parameter in parameters:
            key, layer, _ = parameter
            tensor = source.weights.load(parameter, TORCH_DTYPES[config.dtype])
            state[f"{key}/{layer}"] = sharded(key, layer, tensor, layers)
            bar.advance(tensor.numel())
    topology.from_rank0(begin)
    finished = save_checkpoint(
        config.save,
        source.trained,
        {"model": state},
        topology=topology,
        parents=source.parents,
        config={**to_flat(config), "token_ids": source.token_ids},
    )
    if config.verify:
        try:
            verify(GlobalTensors(finished), config.load)
        except BaseException:
            start_over(config.save)
            raise


def _to_hf(config: Config, source: Convertible, topology: Topology, verify: _Verify) -> None:
    dtype = TORCH_DTYPES[config.dtype]
    folder = source.tokenizer.source
    extras = HfExtras(
        tokenizer_folder=folder if folder.is_dir() else folder.parent,
        token_ids=source.token_ids,
        lineage=source.lineage,
        parents={
            role: Parent.of(fingerprint, path, named_in=config.save / "manifest.json")
            for role, (fingerprint, path) in source.parents.items()
        },
    )

    def tensors() -> Iterator[tuple[str, int | None, torch.Tensor]]:
        for parameter in share(_parameters(source), topology.rank, topology.world_size):
            yield *parameter[:2], source.weights.load(parameter, dtype)

    write_hf_folder(
        config.save,
        source.trained.config,
        tensors(),
        dtype=dtype,
        extras=extras,
        overwrite=config.overwrite,
        check=partial(verify, source.weights) if config.verify else lambda folder: None,
    )


def _verify(
    config: Config,
    source: Convertible,
    topology: Topology,
    text: str,
    ours: GlobalSource,
    theirs: Path,
) -> None:
    """Compare `ours`, the Megatron side or the GGUF file, with what transformers makes of `theirs`.

    Nothing that fails here may stay where it could be taken for a result.
    """
    found = verify_with_transformers(
        ours,
        source.trained.config,
        theirs,
        dtype=TORCH_DTYPES[config.dtype],
        tokenizer=source.tokenizer,
        text=text,
        topology=topology,
    )
    get_logger().info("verified: %s", found)
