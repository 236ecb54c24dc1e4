"""From the rewards of what a student wrote to the weight of each token's gradient (MiniLLM).

With r_t = log p(y_t) - log q(y_t), p the teacher and q the student that wrote (arXiv:2306.08543):

    G_t = r_t + gamma G_{t+1}             reward-to-go
    A_t = G_{t+1}, or G_t                 divided by its number of terms, then whitened
    L_t = -min(rho A, clip(rho) A) w      PPO; rho = q_now / q_wrote, w = q_wrote / drawn

Since grad rho = rho grad log q, the gradient of L_t is that of a cross entropy of weight A rho w,
and none where the clip holds it: no loss of its own is needed.

Where the released code (microsoft/LMOps, minillm) and the paper disagree, both can be said.

Shapes: b rows, s positions, each that of the token before the one that was written. Values outside
the mask, what was written and counts, are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_miniplm.core.errors import ConfigError

LengthNorm = Literal["terms", "printed", "none"]
Whitening = Literal["masked", "code", "none"]


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Rewards to advantages, and how far an update follows them."""

    long_includes_current: bool = False
    """Let a token's own reward count in its reward-to-go, which the single-step term counts already
    (the released code); otherwise from the next token on (paper)."""
    gamma: float = 1.0
    """Discount of later rewards (paper: 1, released code: 0.95)."""
    length_norm: LengthNorm = "terms"
    """Divide a reward-to-go by its number of terms (released code); printed: by one less, at least
    1, as the paper's formula reads; none: leave it."""
    whiten: Whitening = "masked"
    """Advantages to mean 0 and variance 1 over the written tokens of the global batch; code: over
    the room for them, written or not (released code); none: leave them (paper)."""
    reward_scaling: float = 1.0
    """Divides rewards (released scripts: 0.5)."""
    reward_clip: float | None = None
    """Rewards are held within plus and minus this (released code: 100); default: they are not."""
    ppo_clip: float = 0.2
    """How far from 1 the ratio of a token's probabilities, now and when it was written, is
    followed."""
    clip_importance: bool = False
    """Hold ratio times importance weight within that (released code), which leaves out many tokens
    of the mixture from the start; otherwise the ratio alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"--gamma {self.gamma} must be from 0 to 1")
        for name in ("reward_scaling", "reward_clip", "ppo_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be above 0")


def rewards(
    logprobs_mbs: torch.Tensor, mask_bs: torch.Tensor, config: AdvantageConfig
) -> torch.Tensor:
    """R of every written token, fp64 nats; `logprobs_mbs`: of it under student and teacher."""
    student_bs, teacher_bs = logprobs_mbs.double()
    found_bs = (teacher_bs - student_bs) / config.reward_scaling
    if config.reward_clip is not None:
        found_bs = found_bs.clamp(-config.reward_clip, config.reward_clip)
    return torch.where(mask_bs, found_bs, 0.0)


def advantages(
    rewards_bs: torch.Tensor, mask_bs: torch.Tensor, config: AdvantageConfig
) -> torch.Tensor:
    """A before whitening; golden: rewards 1, 2, 3 give 5/2, 3, 0 (paper) or 2, 5/2, 3."""
    to_go_bs, terms_bs = torch.zeros_like(rewards_bs), torch.zeros_like(rewards_bs)
    later_b, count_b = rewards_bs.new_zeros((2, len(rewards_bs)))
    for at in range(rewards_bs.shape[1] - 1, -1, -1):
        here_b = mask_bs[:, at]
        if not config.long_includes_current:
            to_go_bs[:, at], terms_bs[:, at] = later_b, count_b
        later_b = torch.where(here_b, rewards_bs[:, at] + config.gamma * later_b, later_b)
        count_b = count_b + here_b
        if config.long_includes_current:
            to_go_bs[:, at], terms_bs[:, at] = later_b, count_b
    if config.length_norm != "none":
        fewer = int(config.length_norm == "printed")
        to_go_bs = to_go_bs / (terms_bs - fewer).clamp(min=1)
    return torch.where(mask_bs, to_go_bs, 0.0)


def whitened(
    advantages_bs: torch.Tensor, mask_bs: torch.Tensor, sums_3: torch.Tensor
) -> torch.Tensor:
    """Mean 0, variance 1; `sums_3`: of what is counted, its number, sum and sum of squares."""
    count, total, squares = sums_3
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    return torch.where(mask_bs, (advantages_bs - mean) * (variance + 1e-8).rsqrt(), 0.0)


def policy_gradient(
    advantages_bs: torch.Tensor,
    ratio_bs: torch.Tensor,
    importance_bs: torch.Tensor,
    config: AdvantageConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(L of every token, weight of its cross entropy that has the gradient of L)."""
    followed_bs = ratio_bs * importance_bs if config.clip_importance else ratio_bs
    outside_bs = torch.ones_like(importance_bs) if config.clip_importance else importance_bs
    held_bs = followed_bs.clamp(1 - config.ppo_clip, 1 + config.ppo_clip)
    free_bs = advantages_bs * followed_bs
    loss_bs = -torch.minimum(free_bs, advantages_bs * held_bs) * outside_bs
    follows_bs = free_bs <= advantages_bs * held_bs
    return loss_bs, torch.where(follows_bs, free_bs * outside_bs, 0.0)
