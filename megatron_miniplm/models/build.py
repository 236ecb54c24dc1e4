"""From a shape to this rank's part of a model, with the same weights in every layout.

Weights are filled in by their *global* name: `fill_by_name` walks the model's own sharded state
dict, asks a source for the full tensor and copies this rank's slice. The source is a random draw
(`InitialWeights`); what lies in files is read a part at a time (`global_tensors.fill_from`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer import TransformerConfig

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.engine import DEFAULT_ENGINE, EngineConfig
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.layers import Decoder, block_spec
from megatron_miniplm.models.value_head import VALUE_HEAD, ValueHead
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Layout, Topology
from megatron_miniplm.parallel.vocab import VocabShard

VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Parameters with a row a token, padded below."""

Source = Callable[[str, int | None, tuple[int, ...]], torch.Tensor]
"""(megatron key, layer or None, full shape) -> the full tensor."""


def build_model(
    config: ModelConfig,
    topology: Topology,
    *,
    valid_vocab: int,
    dtype: torch.dtype,
    virtual_stages: int = 1,
    engine: EngineConfig = DEFAULT_ENGINE,
    device: torch.device | None = None,
    value_head: bool = False,
) -> ModelChunks:
    """This rank's part of the model on `device`, or its own; weights are not yet meaningful.

    `valid_vocab` is the tokenizer's real size: logits from there on have probability 0.
    `virtual_stages` is the number of chunks on every pipeline rank. `value_head`: with a head for
    a number of each instance, which is 0 until it is filled or trained.
    """
    check_layout(config, topology, valid_vocab, virtual_stages=virtual_stages)
    core = transformer_config(config, topology, dtype, virtual_stages=virtual_stages, engine=engine)
    architecture = get_family(config.model_family).architecture
    shard = vocab_shard(topology, width=config.padded_vocab_size, valid=valid_vocab)
    make_head = _head_maker(core, topology, shard)
    chunks = [
        Decoder(
            core,
            block_spec(architecture.layer(config, core), core, at if virtual_stages > 1 else None),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.max_position_embeddings,
            pre_process=topology.is_first_stage and at == 0,
            post_process=topology.is_last_stage and at == virtual_stages - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
            position_embedding_type=architecture.position_embedding,
            rotary_base=config.rotary_base,
            rope_scaling=config.use_rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            vp_stage=at if virtual_stages > 1 else None,
        )
        for at in range(virtual_stages)
    ]
    for chunk in chunks:
        chunk.make_head, chunk.make_reader = make_head, architecture.reader
        chunk.shard = shard
        with_values = value_head and chunk.post_process
        chunk.value_head = ValueHead(core, tp_rank=topology.tp_rank) if with_values else None
    return ModelChunks(chunks).to(device or platform.device())


def vocab_shard(topology: Topology, *, width: int, valid: int) -> VocabShard:
    """This rank's part of `width` columns, of which `valid` are real."""
    size = width // topology.tp_size
    return VocabShard(
        first=topology.tp_rank * size,
        size=size,
        valid=valid,
        group=topology.tp_group if topology.tp_size > 1 else None,
    )


def _head_maker(
    core: TransformerConfig, topology: Topology, shard: VocabShard
) -> Callable[[torch.Tensor, torch.Tensor, bool], Head]:
    """What the last stage makes of its hidden states and output matrix."""

    def make_head(hidden_sbh: torch.Tensor, weight_vh: torch.Tensor, announce: bool) -> Head:
        return Head(
            hidden_sbh=hidden_sbh,
            weight_vh=weight_vh,
            shard=shard,
            sequence_parallel=topology.sequence_parallel,
            unit_upstream=core.calculate_per_token_loss and core.grad_scale_func is None,
            announce=announce,
        )

    return make_head


def transformer_config(
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    *,
    virtual_stages: int = 1,
    engine: EngineConfig = DEFAULT_ENGINE,
) -> TransformerConfig:
    """megatron.core's configuration of this shape in this layout."""
    interleaved = virtual_stages > 1
    own = get_family(config.model_family).architecture.settings(config, layout.tp_size)
    std = config.init_method_std
    return TransformerConfig(
        **own,
        **engine.settings(dtype),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=std,
        # Kept on although `fill_by_name` overwrites the values: the initialiser also sets the
        # tensor-parallel marks that the gradient norm needs.
        perform_initialization=True,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=virtual_stages if interleaved else None,
        # Anything else mispairs the messages of two ranks that are neighbours on both sides, and
        # trains wrong without an error (seen with 0.16.1); the other schedule refuses the overlap.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        **_uneven_stages(config.num_layers, layout.pp_size),
        sequence_parallel=layout.sequence_parallel,
        gradient_accumulation_fusion=False,
        # Losses are sums; the one division is by the count, in `finalize_model_grads`.
        calculate_per_token_loss=True,
    )


@torch.no_grad()
def fill_by_name(model: ModelChunks, source: Source) -> None:
    """Set every parameter from `source`, by global name (model before DDP and optimizer)."""
    for tensor in named_shards(model):
        layer_axes = tensor.prepend_axis_num
        starts = tensor.global_offset[layer_axes:]
        layer = int(tensor.global_offset[0]) if layer_axes else None
        full = source(tensor.key, layer, tuple(tensor.global_shape[layer_axes:]))
        sizes = zip(starts, tensor.local_shape, strict=True)
        tensor.data.copy_(full[tuple(slice(start, start + size) for start, size in sizes)])


def named_shards(model: ModelChunks) -> Iterator[ShardedTensor]:
    """This rank's parameters as views with their global name, shape and offset."""
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": False})
    apply_factories(state)
    yield from _sharded_tensors(state)


class InitialWeights:
    """A source of initial weights: drawn by (seed, name, layer), so layouts agree bit for bit."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(self, key: str, layer: int | None, shape: tuple[int, ...]) -> torch.Tensor:
        """What the architecture says; else N(0, std^2) for matrices, 1 for norms, 0 for the rest.

        Padded rows of the vocabulary are 0.
        """
        digest = hashlib.sha256(f"{self.seed}/{key}/{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        architecture = get_family(self.config.model_family).architecture
        if (own := architecture.initial(self.config, key, shape, generator)) is not None:
            return own
        if "norm" in key:
            return torch.ones(shape)
        if key.endswith("bias") or key.startswith(VALUE_HEAD):
            return torch.zeros(shape)
        full = torch.zeros(shape)
        # Draw the true vocabulary only: the padding must not shift what the rest gets.
        rows = self.config.vocab_size if key in VOCABULARY_KEYS else shape[0]
        full[:rows].normal_(0.0, self.config.init_method_std, generator=generator)
        return full


def _uneven_stages(num_layers: int, stages: int) -> dict[str, int]:
    """megatron.core's settings where the stages do not divide the layers; none where they do.

    Stages between the first and the last have equally many; the last, which has the head, has the
    fewest.
    """
    if num_layers % stages == 0:
        return {}
    between = -(-num_layers // stages)
    if num_layers - between * (stages - 2) < 2:
        between = num_layers // stages
    ends = num_layers - between * (stages - 2)
    return {
        "num_layers_in_first_pipeline_stage": ends - ends // 2,
        "num_layers_in_last_pipeline_stage": ends // 2,
    }


def _sharded_tensors(value: Any) -> Iterator[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _sharded_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sharded_tensors(item)


def _check_virtual_stages(config: ModelConfig, layout: Layout, virtual_stages: int) -> None:
    if virtual_stages == 1:
        return
    flag = f"--num-virtual-stages-per-pipeline-rank {virtual_stages}"
    if layout.pp_size == 1:
        raise ConfigError(f"{flag} needs --pipeline-model-parallel-size above 1")
    if config.num_layers % (layout.pp_size * virtual_stages):
        raise ConfigError(
            f"{flag} x --pipeline-model-parallel-size {layout.pp_size} stages do not divide "
            f"--num-layers {config.num_layers}"
        )


def check_layout(
    config: ModelConfig, layout: Layout, valid_vocab: int, *, virtual_stages: int = 1
) -> None:
    """Refuse a shape that this layout cannot divide, or that has fewer tokens than its corpus."""
    _check_virtual_stages(config, layout, virtual_stages)
    if config.num_layers < layout.pp_size:
        raise ConfigError(
            f"--num-layers {config.num_layers} are not enough for "
            f"--pipeline-model-parallel-size {layout.pp_size} stages"
        )
    divided = {
        **get_family(config.model_family).architecture.divided(config),
        "the padded vocabulary": config.padded_vocab_size,
    }
    for name, size in divided.items():
        if size % layout.tp_size:
            raise ConfigError(
                f"{name} ({size}) cannot be divided over --tensor-model-parallel-size "
                f"{layout.tp_size} ranks"
            )
    if config.vocab_size is None or config.vocab_size < valid_vocab:
        raise ConfigError(
            f"the model has {config.vocab_size} logit columns, but the tokenizer has "
            f"{valid_vocab} tokens; pass --vocab-size {valid_vocab} or a larger one"
        )
