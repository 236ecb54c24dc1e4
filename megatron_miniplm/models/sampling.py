"""From logits to the next token: greedy or drawn, of one model or of a mixture of two.

    p     = softmax of the logits / temperature, cut to top-k and top-p and renormalised
    mixed = (1 - a) p_0 + a p_1             (the teacher-mixed sampling of MiniLLM)

A draw inverts the cumulated probabilities at a uniform number that is a function of (seed, id of
the prompt, position) alone, so that what a prompt is continued with does not depend on the batch
that it is in, on the ranks, or on what was drawn before. `Drawn` says what the token's probability
was when it was drawn, after every cut: importance weights are made of that number and no other.

Shapes: n rows, V real columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.splitmix import mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    decoding: Literal["sample", "greedy"] = "sample"
    """Draw from the model's distribution, or take its most probable token."""
    temperature: float = 1.0
    """Divides the logits before a draw."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability."""
    seed: int = 1
    """Of the draws."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"--temperature {self.temperature} must be above 0; for the most probable token, "
                "use --decoding greedy"
            )
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k} must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} must be above 0 and at most 1")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} must be at least 0")


@dataclass(frozen=True)
class Drawn:
    """One token of each row."""

    tokens_n: torch.Tensor
    """int64."""
    sampling_logprob_n: torch.Tensor
    """Log-probability under the distribution that was drawn from, fp32 nats; 0 if greedy."""
    logprobs_mn: torch.Tensor
    """Of each model m: log-probability under its full softmax at temperature 1, fp32 nats."""


class Sampler:
    """Chooses tokens from the logits of one model, or of two that share the vocabulary.

    `mixture` is the part a of the second model.
    """

    def __init__(self, config: SamplingConfig, *, mixture: float = 0.0) -> None:
        if not 0 <= mixture <= 1:
            raise ConfigError(f"the second model's part of a mixture is {mixture}, not in [0, 1]")
        self.config, self.mixture = config, mixture

    def __call__(
        self, logits: Sequence[torch.Tensor], ids_n: np.ndarray, positions: int | np.ndarray
    ) -> Drawn:
        """The tokens at `positions` of the prompts `ids_n` (int64), given each model's [n, V]."""
        scores = [one.float() for one in logits]
        if self.config.decoding == "greedy":
            tokens = (scores[0] if len(scores) == 1 else self._mixed(scores)).argmax(-1)
            sampling_logprob = torch.zeros_like(tokens, dtype=torch.float32)
        else:
            uniforms = torch.from_numpy(uniform(self.config.seed, ids_n, positions))
            tokens, sampling_logprob = _invert(
                self._mixed(scores), uniforms.to(scores[0].device, non_blocking=True)
            )
        chosen = tokens[:, None]
        logprobs = [
            (one.gather(-1, chosen) - one.logsumexp(-1, keepdim=True))[:, 0] for one in scores
        ]
        return Drawn(tokens, sampling_logprob, torch.stack(logprobs))

    def _mixed(self, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, V] probabilities to draw from."""
        parts = [self._cut(one / self.config.temperature).softmax(-1) for one in scores]
        if len(parts) == 1:
            return parts[0]
        first, second = parts
        return torch.lerp(first, second, self.mixture)

    def _cut(self, scores_nV: torch.Tensor) -> torch.Tensor:
        """Columns outside top-k, then outside top-p of what is left, get -inf."""
        top_k, top_p = self.config.top_k, self.config.top_p
        if 0 < top_k < scores_nV.shape[-1]:
            least = scores_nV.topk(top_k, sorted=True).values[:, -1:]
            scores_nV = scores_nV.masked_fill(scores_nV < least, -torch.inf)
        if top_p < 1:
            ordered, order = scores_nV.sort(dim=-1, descending=True, stable=True)
            probs = ordered.softmax(-1)
            # Dropped where those before it have enough: the most probable one always stays.
            dropped = (probs.cumsum(-1) - probs) >= top_p
            scores_nV = scores_nV.masked_fill(
                torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf
            )
        return scores_nV


def uniform(seed: int, ids: np.ndarray, positions: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1): a function of (seed, id, position), element by element."""
    state = mix(np.asarray([seed], np.uint64) + _GOLDEN)
    for key in (np.asarray(ids), np.asarray(positions)):
        state = mix((state ^ key.astype(np.uint64)) + _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _invert(probs_nV: torch.Tensor, uniform_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, its log-probability) where the cumulated probabilities pass the uniform number.

    In fp64, because in fp32 a number near 1 could round up to the total and pass the last column.
    """
    cumulated = probs_nV.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, uniform_n[:, None] * total, right=True)
    chosen = probs_nV.gather(-1, tokens).double() / total
    return tokens[:, 0], chosen.log().float()[:, 0]
