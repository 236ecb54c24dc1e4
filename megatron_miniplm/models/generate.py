"""Decoding: prompts of unequal length -> continuations, of one model or of a mixture of two.

All rows of a batch stand at the same position. The first pass reads as many tokens as the shortest
prompt has; from there on every step reads one token of each row: its prompt's while that lasts,
then the one that was drawn. So nothing is padded on the left, no position needs a mask but the
causal one, and a separator inside a prompt is a token like any other.

Keys and values of what was read are kept (`_Cache`). megatron.core has contexts for that, but the
one that runs on a CPU keeps keys before their rotation and rotates all of them in every step
(0.16.1, attention.py, static batching); so for the time of a generation the layers get an attention
of ours, whose keys are rotated once. The layers' own attention, be it ours or Transformer Engine's,
is back in its place afterwards.

Every TP rank sees the logits of the whole vocabulary (one all-gather a step) and draws the same.

Shapes: b rows of the batch, n of them not finished, s positions, V real columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.sampling import Sampler
from megatron_miniplm.parallel.vocab import gather_shards


@dataclass(frozen=True)
class Prompts:
    """What a batch begins with."""

    tokens: Sequence[np.ndarray]
    """Of each row, at least one token."""
    ids: np.ndarray
    """int64[b]: what the draws of each row depend on."""
    limits: np.ndarray
    """int64[b]: tokens of the whole sequence, prompt included, at most."""


@dataclass(frozen=True)
class Generated:
    """Prompts and what follows them, right-padded with 0."""

    tokens_bs: torch.Tensor
    """int64."""
    prompt_lengths_b: torch.Tensor
    lengths_b: torch.Tensor
    """Tokens of the whole sequence; what is beyond means nothing."""
    sampling_logprob_bs: torch.Tensor
    """Under the distribution that was drawn from, fp32 nats; 0 where nothing was drawn."""
    logprobs_mbs: torch.Tensor
    """Under the full softmax of each model, likewise."""

    @property
    def importance_bs(self) -> torch.Tensor:
        """Probability of each token under the first model, over that of drawing it."""
        return (self.logprobs_mbs[0] - self.sampling_logprob_bs).exp()


@torch.no_grad()
def generate(
    models: Sequence[ModelChunks], prompts: Prompts, sampler: Sampler, *, stop_id: int | None
) -> Generated:
    """Continue every prompt to its limit, or to a drawn `stop_id`, which it keeps.

    The models share the vocabulary; of two, the sampler makes a mixture. Refuses pipeline and
    sequence parallelism, and layers that are not attention.
    """
    starts = np.array([len(tokens) for tokens in prompts.tokens])
    longest = int(max(prompts.limits.max(), starts.max()))
    with ExitStack() as stack:
        readers = [
            stack.enter_context(_reading(model, batch=len(starts), length=longest))
            for model in models
        ]
        return _Decoding(readers, prompts, starts, longest).run(sampler, stop_id)


def refuse_layout(*, pp_size: int, sequence_parallel: bool) -> None:
    """Refuse layouts in which one token at a time cannot be computed, or is not worth it."""
    if pp_size > 1:
        raise ConfigError(
            f"--pipeline-model-parallel-size {pp_size}: a step of one token would pass through "
            "the stages one after the other while all but one wait. Use tensor and data "
            "parallelism: checkpoints are read in any layout"
        )
    if sequence_parallel:
        raise ConfigError(
            "--sequence-parallel divides the sequence, and a step of generation has one token: "
            "leave it out"
        )


class _Decoding:
    """One batch on its way. Row j of the models' input is row ``rows[j]`` of the batch."""

    def __init__(
        self, readers: Sequence[_Reader], prompts: Prompts, starts: np.ndarray, longest: int
    ) -> None:
        self.readers, self.prompts, self.starts = readers, prompts, starts
        self.rows = np.arange(len(starts))
        self.limits = np.maximum(prompts.limits, starts)
        self.lengths = self.limits.copy()
        given = np.zeros((len(starts), longest), np.int64)
        for row, tokens in enumerate(prompts.tokens):
            given[row, : len(tokens)] = tokens
        device = readers[0].device
        self.tokens_bs = torch.from_numpy(given).to(device)
        self.sampling_logprob_bs = torch.zeros_like(self.tokens_bs, dtype=torch.float32)
        self.logprobs_mbs = self.sampling_logprob_bs.repeat(len(readers), 1, 1)

    def run(self, sampler: Sampler, stop_id: int | None) -> Generated:
        self._drop(self.limits > self.starts)
        position = int(self.starts[self.rows].min(initial=self.tokens_bs.shape[1]))
        fresh = self.tokens_bs[self.rows, :position]
        while len(self.rows):
            logits = [reader(fresh) for reader in self.readers]
            fresh = self._draw(logits, position, sampler)
            position += 1
            going = self.limits[self.rows] > position
            if stop_id is not None:
                ended = (fresh == stop_id).cpu().numpy() & (self.starts[self.rows] < position)
                self.lengths[self.rows[ended]] = position
                going &= ~ended
            fresh = fresh[self._drop(going)][:, None]
        return Generated(
            tokens_bs=self.tokens_bs,
            prompt_lengths_b=torch.from_numpy(self.starts),
            lengths_b=torch.from_numpy(self.lengths),
            sampling_logprob_bs=self.sampling_logprob_bs,
            logprobs_mbs=self.logprobs_mbs,
        )

    def _draw(
        self, logits: Sequence[torch.Tensor], position: int, sampler: Sampler
    ) -> torch.Tensor:
        """Tokens [n] at `position`, noted: the prompt's own where it is long enough."""
        drawing = np.flatnonzero(self.starts[self.rows] <= position)
        if len(drawing):
            rows = self.rows[drawing]
            if len(drawing) < len(self.rows):
                logits = [one[drawing] for one in logits]
            drawn = sampler(logits, self.prompts.ids[rows], position)
            self.tokens_bs[rows, position] = drawn.tokens_n
            self.sampling_logprob_bs[rows, position] = drawn.sampling_logprob_n
            self.logprobs_mbs[:, rows, position] = drawn.logprobs_mn
        return self.tokens_bs[self.rows, position]

    def _drop(self, going: np.ndarray) -> np.ndarray:
        """Close the gaps that finished rows leave; gives the old place of every row that is left.

        Rows from the end move into the gaps, so that a row's cache is copied at most once for each
        row that finishes.
        """
        count = int(going.sum())
        places = np.arange(count)
        gaps = np.flatnonzero(~going[:count])
        places[gaps] = count + np.flatnonzero(going[count:])
        if len(gaps):
            for reader in self.readers:
                reader.move(places[gaps], gaps)
        self.rows = self.rows[places]
        return places


class _Reader:
    """A model that remembers what it read."""

    def __init__(self, model: ModelChunks, cache: _Cache) -> None:
        (self._decoder,), self._cache = model.decoders, cache
        self.device = next(model.parameters()).device

    def __call__(self, tokens_ns: torch.Tensor) -> torch.Tensor:
        """Read the next tokens of every row; [n, V] logits of what follows."""
        count, length = tokens_ns.shape
        at = self._cache.position
        positions = torch.arange(at, at + length, device=self.device).expand(count, -1)
        logits: torch.Tensor = self._decoder(tokens_ns, positions, None, process=_last_logits)
        self._cache.position += length
        return logits

    def move(self, old: np.ndarray, new: np.ndarray) -> None:
        """Put what is remembered of rows `old` where rows `new` were."""
        for memory in self._cache.memories:
            memory[new, :, : self._cache.position] = memory[old, :, : self._cache.position]


def _last_logits(head: Head) -> torch.Tensor:
    """[n, V] logits after the last position, of all real columns, on every TP rank."""
    hidden_nh = head.hidden_sbh[-1]
    shards_wvn = gather_shards(hidden_nh @ head.weight_vh.t(), head.shard)
    return torch.cat(list(shards_wvn), dim=-1)[:, : head.shard.valid]


class _Cache:
    """Keys and values of the positions that were read, and how many these are."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self.position = 0
        self.memories: list[torch.Tensor] = []

    def memory(self, like: torch.Tensor) -> torch.Tensor:
        """Room for keys or values [s, b, groups, dim] of a layer: [b, groups, s, dim]."""
        _, _, groups, dim = like.shape
        room = like.new_empty((self.batch, groups, self.length, dim))
        self.memories.append(room)
        return room


class _CachedAttention(torch.nn.Module):
    """Causal attention of new positions to themselves and to all that were read before."""

    def __init__(self, cache: _Cache) -> None:
        super().__init__()
        self._cache = cache
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **unused: Any
    ) -> torch.Tensor:
        """[s, n, heads * dim]; the first call may have any s, every later one has s = 1."""
        length, count, heads, dim = query.shape
        groups, start = key.shape[2], self._cache.position
        assert start == 0 or length == 1, "tokens after the first pass come one by one"
        if self._keys is None or self._values is None:
            self._keys, self._values = self._cache.memory(key), self._cache.memory(value)
        stop = start + length
        self._keys[:count, :, start:stop] = key.permute(1, 2, 0, 3)
        self._values[:count, :, start:stop] = value.permute(1, 2, 0, 3)
        keys, values = self._keys[:count, :, :stop], self._values[:count, :, :stop]
        if length > 1:
            out = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3), keys, values, is_causal=True, enable_gqa=heads != groups
            )
            return out.permute(2, 0, 1, 3).reshape(length, count, heads * dim)
        # All see everything: the heads of a group are as good as positions, and nothing is copied.
        out = F.scaled_dot_product_attention(
            query.reshape(count, groups, heads // groups, dim), keys, values
        )
        return out.reshape(1, count, heads * dim)


@contextmanager
def _reading(model: ModelChunks, *, batch: int, length: int) -> Iterator[_Reader]:
    """The model with a memory for so many rows and positions, as long as this is open."""
    config = model.config
    refuse_layout(
        pp_size=config.pipeline_model_parallel_size, sequence_parallel=config.sequence_parallel
    )
    (decoder,) = model.decoders
    _refuse_other_layers(decoder.decoder.layers)
    cache, was_training = _Cache(batch, length), model.training
    attentions = [layer.self_attention for layer in decoder.decoder.layers]
    own = [attention.core_attention for attention in attentions]
    turned = decoder.rotary_pos_emb.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "offset": cache.position}), with_kwargs=True
    )
    try:
        model.eval()
        for attention in attentions:
            attention.core_attention = _CachedAttention(cache)
        yield _Reader(model, cache)
    finally:
        turned.remove()
        for attention, core in zip(attentions, own, strict=True):
            attention.core_attention = core
        model.train(was_training)


def _refuse_other_layers(layers: Sequence[torch.nn.Module]) -> None:
    for layer in layers:
        if not hasattr(layer, "self_attention"):
            raise ConfigError(
                f"generation with layers of type {type(layer).__name__} is not supported: what is "
                "kept between tokens is the keys and values of attention, which it does not have. "
                "Use a teacher with attention"
            )
