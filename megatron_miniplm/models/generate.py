"""Decoding: prompts of unequal length -> continuations, of one model or of a mixture of two.

All rows of a batch stand at the same position. The first pass reads as many tokens as the shortest
prompt has; from there on every step reads one token of each row: its prompt's while that lasts,
then the one that was drawn. So nothing is padded on the left, no position needs a mask but the
causal one, and a separator inside a prompt is a token like any other.

What was read is kept by the architecture's `Reader`, which computes with the model's parameters and
leaves the model as it is.

Every TP rank sees the logits of the whole vocabulary (one all-gather a step). What the first one
draws counts: on a GPU, sums over the vocabulary may differ in the last bits from run to run.

Shapes: b rows of the batch, n of them not finished, s positions, V real columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig, Reader, get_family
from megatron_miniplm.models.sampling import Sampler
from megatron_miniplm.parallel.vocab import VocabShard, take_from_first


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
    readers = [_reader(model, rows=len(starts), length=longest) for model in models]
    device = next(models[0].parameters()).device
    shard = models[0].decoders[0].shard
    return _Decoding(readers, prompts, starts, longest, device, shard).run(sampler, stop_id)


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


def refuse_shape(shape: ModelConfig) -> None:
    """Refuse models of which nobody knows what to keep between tokens."""
    if get_family(shape.model_family).architecture.reader is None:
        raise _without_attention(f"a model of family {shape.model_family}")


class _Decoding:
    """One batch on its way. Row j of the models' input is row ``rows[j]`` of the batch."""

    def __init__(
        self,
        readers: Sequence[Reader],
        prompts: Prompts,
        starts: np.ndarray,
        longest: int,
        device: torch.device,
        shard: VocabShard,
    ) -> None:
        self.readers, self.prompts, self.starts, self.shard = readers, prompts, starts, shard
        self.rows = np.arange(len(starts))
        self.limits = np.maximum(prompts.limits, starts)
        self.lengths = self.limits.copy()
        given = np.zeros((len(starts), longest), np.int64)
        for row, tokens in enumerate(prompts.tokens):
            given[row, : len(tokens)] = tokens
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
            for mine in (drawn.tokens_n, drawn.sampling_logprob_n, drawn.logprobs_mn):
                take_from_first(mine, self.shard)
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


def _reader(model: ModelChunks, *, rows: int, length: int) -> Reader:
    """The model with a memory for so many rows and positions."""
    config = model.config
    refuse_layout(
        pp_size=config.pipeline_model_parallel_size, sequence_parallel=config.sequence_parallel
    )
    (decoder,) = model.decoders
    if decoder.make_reader is None:
        raise _without_attention(f"layers of type {type(decoder.decoder.layers[0]).__name__}")
    return decoder.make_reader(decoder, rows, length)


def _without_attention(what: str) -> ConfigError:
    return ConfigError(
        f"generation with {what} is not supported: what is kept between tokens is the keys and "
        "values of attention, which there are none of. Use a model with attention"
    )
