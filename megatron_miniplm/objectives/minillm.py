"""MiniLLM: the reverse KL of what the student writes, by policy gradient (arXiv:2306.08543).

    L = mean over written tokens of (KL(q_t || p_t) + L_pg,t) + lm_coef mean over prompts of L_pt,t

q_t and p_t are student and teacher at position t, over the whole vocabulary (the single-step term,
exact), L_pg is PPO's loss of the advantage of what follows (`objectives.advantages`), and L_pt the
cross entropy of the prompt, mixed with the forward cross entropy of the teacher where it is asked
for. Expected over draws from the student, without length norm and whitening, the gradient of the
first term's sum over a continuation is that of KL(q || p) of whole continuations.

The gradient of L_pg is that of a cross entropy with a weight that may be negative, so all terms are
one call of the loss kernels and no logits are kept. All positions go through the student once,
which keeps the paper's accounting: a token costs 3 + 1 forward passes of the student (training,
sampling) and 2 of the teacher (sampling, KL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.sparse_logits import PaddedLogits
from megatron_miniplm.kernels.record import TokenValues
from megatron_miniplm.kernels.token_loss import TokenLoss
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.flops import FORWARD_AND_BACKWARD
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.logit_loss import KernelLoss
from megatron_miniplm.models.signal import SignalFacts, TeacherSignal
from megatron_miniplm.objectives.advantages import AdvantageConfig, policy_gradient
from megatron_miniplm.objectives.lm import LanguageModeling
from megatron_miniplm.objectives.objective import (
    OBJECTIVES,
    LossConfig,
    LossOutput,
    Objective,
    Progress,
)
from megatron_miniplm.objectives.rollouts import Explorer, Rollout, RolloutConfig
from megatron_miniplm.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class MiniLlmConfig:
    """Reverse KL on the student's own continuations (--objective minillm, the verb minillm)."""

    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    single_step_importance: bool = False
    """Weigh the single-step term by the importance of the token, too (paper; the authors' code does
    not)."""
    lm_coef: float = 1.0
    """Factor of the loss on prompts."""
    lm_kd_ratio: float = 0.0
    """Share of the teacher's forward cross entropy in the loss on prompts (released code: 0.5),
    which costs a second pass through the output matrices; the rest is cross entropy."""
    ppo_epochs: int = 1
    """Updates of the weights on the same rollouts (released code: 4; equal FLOPs: 1)."""
    warm_start_samples: int = 0
    """Plain language modeling for so many samples before the student writes anything; 0 for one
    that was trained already (--load --finetune)."""

    def __post_init__(self) -> None:
        for name in ("lm_coef", "warm_start_samples"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative"
                )
        if not 0 <= self.lm_kd_ratio <= 1:
            raise ConfigError(f"--lm-kd-ratio {self.lm_kd_ratio} must be from 0 to 1")
        if self.ppo_epochs < 1:
            raise ConfigError(f"--ppo-epochs {self.ppo_epochs} must be at least 1")


@OBJECTIVES.register("minillm")
class MiniLlm(Objective):
    """Reverse KL of what was written, and cross entropy of its prompts."""

    Config = MiniLlmConfig
    needs_teacher = True
    explores = True
    metric_names: Sequence[str] = (
        "lm loss", "reverse kl", "policy loss", "reward", "importance", "importance max",
        "response length",
    )  # fmt: skip
    teacher_passes = 2

    def __init__(self, common: LossConfig, config: MiniLlmConfig | None = None) -> None:
        self.common, self.config = common, config or MiniLlmConfig()
        self.updates_per_batch = self.config.ppo_epochs
        self.student_passes = 1 + FORWARD_AND_BACKWARD * self.config.ppo_epochs
        self.plain_samples = self.config.warm_start_samples
        self.kind = KernelLoss(TokenLoss(divergence="reverse_kl"))
        # What the reverse KL's kernel cannot say of prompts.
        self.lm_kind: KernelLoss | None = None
        if self.config.lm_kd_ratio or common.z_loss_weight:
            loss = TokenLoss(divergence="soft_nll", z_loss=common.z_loss_weight)
            self.lm_kind = KernelLoss(loss)

    def at(self, progress: Progress) -> Objective:
        """Language modeling, as long as the student is warmed up."""
        if progress.consumed < self.plain_samples:
            return LanguageModeling(self.common)
        return self

    def taught_by(self, facts: SignalFacts) -> MiniLlm:
        """Itself; refuses teachers that know the corpus's text alone."""
        if facts.stored:
            raise ConfigError(
                "--objective minillm asks the teacher about text that the student has just "
                "written, of which neither stores nor scores know: use --teacher online"
            )
        return self

    def explorer(
        self,
        *,
        student: ModelChunks,
        teacher: ModelChunks,
        data: Blend,
        topology: Topology,
        seed: int,
    ) -> Explorer:
        """What lets the student write."""
        return Explorer(
            config=self.config.rollouts, advantage=self.config.advantage,
            normalization=self.common.loss_normalization,
            student=student, teacher=teacher, data=data, topology=topology, seed=seed,
        )  # fmt: skip

    def __call__(
        self, head: Head, batch: Batch, teacher: TeacherSignal | None = None
    ) -> LossOutput:
        """The summed loss of one micro-batch of rollouts."""
        assert isinstance(batch, Rollout), "MiniLLM learns from rollouts: `explorer` makes them"
        assert isinstance(teacher, Head), "MiniLLM needs all logits of its teacher"
        terms = self._terms(batch, self._ratio(head, batch))
        loss_sum, of_response, of_prompt = self._losses(head, terms, teacher)
        instances = batch.mask_bs.any(1)
        written = batch.response_weight_bs
        said = {
            "lm loss": of_prompt.ce * batch.prompt_weight_bs,
            "reverse kl": of_response.kd * written,
            "policy loss": terms.policy_loss_bs * written,
            "reward": batch.reward_bs * written,
            "importance": batch.importance_bs * written,
            "importance max": batch.highest_importance_b * instances,
            "response length": (written != 0).float(),
        }
        count = instances.sum().int()
        metrics = {
            name: torch.stack([value.sum(dtype=torch.float64), count.double()])
            for name, value in said.items()
        }
        return LossOutput(loss_sum=loss_sum, count=count, metrics=metrics)

    def reference(
        self,
        logits_bsV: torch.Tensor,
        batch: Batch,
        teacher: torch.Tensor | PaddedLogits | None = None,
    ) -> torch.Tensor:
        """The same from whole logits of both, at the ratio that it was written with: 1."""
        assert isinstance(batch, Rollout)
        assert isinstance(teacher, torch.Tensor)
        terms = self._terms(batch, torch.ones_like(batch.logprob_bs))
        log_q, log_p = logits_bsV.log_softmax(-1), teacher.log_softmax(-1)
        ce_bs = -log_q.gather(-1, batch.labels_bs[..., None])[..., 0]
        reverse_bs = (log_q.exp() * (log_q - log_p)).sum(-1)
        forward_bs = -(log_p.exp() * log_q).sum(-1)
        z_bs = self.common.z_loss_weight * logits_bsV.logsumexp(-1).square()
        ratio = self.config.lm_kd_ratio
        total_bs = terms.policy_bs * ce_bs + terms.kl_bs * reverse_bs
        total_bs = total_bs + terms.prompt_bs * ((1 - ratio) * (ce_bs + z_bs) + ratio * forward_bs)
        return torch.where(batch.mask_bs, total_bs, 0).sum() / batch.mask_bs.any(1).sum()

    def _terms(self, batch: Rollout, ratio_bs: torch.Tensor) -> _Terms:
        policy_loss_bs, policy_bs = policy_gradient(
            batch.advantage_bs, ratio_bs, batch.importance_bs, self.config.advantage
        )
        written = batch.response_weight_bs
        weighs = self.config.single_step_importance
        return _Terms(
            labels_bs=batch.labels_bs,
            policy_loss_bs=policy_loss_bs,
            policy_bs=written * policy_bs,
            kl_bs=written * batch.importance_bs if weighs else written,
            prompt_bs=self.config.lm_coef * batch.prompt_weight_bs,
        )

    def _ratio(self, head: Head, batch: Rollout) -> torch.Tensor:
        """Probability of each written token now over that when it was written, [b, s]."""
        if self.config.ppo_epochs == 1:
            return torch.ones_like(batch.logprob_bs)
        written = (batch.response_weight_bs != 0).float()
        with torch.no_grad():
            positions = Positions(labels_bs=batch.labels_bs, ce_weight=written)
            _, values = replace(head, watch=None).loss(KernelLoss(), positions)
        return torch.where(written != 0, (-values.ce - batch.logprob_bs).exp(), 1.0)

    def _losses(
        self, head: Head, terms: _Terms, teacher: Head
    ) -> tuple[torch.Tensor, TokenValues, TokenValues]:
        """(summed loss, values of what was written, values of prompts)."""
        labels_bs, lm_kind = terms.labels_bs, self.lm_kind
        policy_bs = terms.policy_bs if lm_kind else terms.policy_bs + terms.prompt_bs
        loss_sum, values = head.loss(
            self.kind,
            Positions(labels_bs=labels_bs, ce_weight=policy_bs, kd_weight=terms.kl_bs),
            teacher,
        )
        if lm_kind is None:
            return loss_sum, values, values
        ratio = self.config.lm_kd_ratio
        positions = Positions(
            labels_bs=labels_bs,
            ce_weight=(1 - ratio) * terms.prompt_bs,
            kd_weight=ratio * terms.prompt_bs,
        )
        lm_sum, of_prompt = head.loss(lm_kind, positions, teacher)
        return loss_sum + lm_sum, values, of_prompt


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """What the loss kernels are told of each position [b, s]."""

    labels_bs: torch.Tensor
    policy_loss_bs: torch.Tensor
    """Value of PPO's loss, without a weight."""
    policy_bs: torch.Tensor
    """Weight of the cross entropy that has its gradient."""
    kl_bs: torch.Tensor
    """Weight of the single-step term."""
    prompt_bs: torch.Tensor
    """Weight of the loss on prompts."""
