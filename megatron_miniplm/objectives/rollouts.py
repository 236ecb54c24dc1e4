"""On-policy batches: the student continues the beginning of every instance, mixed with its teacher.

An update's instances become rollouts: the first tokens of each are the prompt, and what follows is
drawn from (1 - a) q + a p, q the student as it is now and p the teacher (MiniLLM's teacher-mixed
sampling, arXiv:2306.08543). Of each written token they say its log-probability under the student,
its importance weight q / drawn, at most 1 / (1 - a), its reward and advantage
(`objectives.advantages`).

A draw depends on the seed, the number of the sample in the run and the position. So rollouts follow
from the weights and `Progress.consumed`: nothing is kept between updates, and micro-batches and
data-parallel ranks are free.

Shapes: b rows of a micro-batch, R rows of this rank in an update, s positions, of which number j
has token j + 1 as its label, p ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.generated import ShortInstances, prompt_lengths
from megatron_miniplm.data.instances import Batch, training_mask
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.generate import Prompts, generate
from megatron_miniplm.models.sampling import Sampler, SamplingConfig
from megatron_miniplm.objectives.advantages import (
    AdvantageConfig,
    advantages,
    rewards,
    whitened,
)
from megatron_miniplm.objectives.objective import Normalization, Progress
from megatron_miniplm.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What the student writes."""

    prompt_length: int = 768
    """Tokens of an instance that are given; the student writes as many as the instance has more, or
    up to the separator."""
    short_instances: ShortInstances = "fraction"
    """An instance without more tokens than that: fraction takes 3/4 of it as the prompt, copy
    writes nothing."""
    teacher_mixture: float = 0.2
    """The teacher's part of the distribution that tokens are drawn from; 0: the student's alone."""
    rollout_batch_size: int | None = None
    """Instances that are continued together on a rank; default: a micro-batch."""

    def __post_init__(self) -> None:
        for name in ("prompt_length", "rollout_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not 0 <= self.teacher_mixture < 1:
            raise ConfigError(
                f"--teacher-mixture {self.teacher_mixture} must be at least 0 and below 1: of what "
                "the teacher alone writes, importance weights have no bound"
            )


@dataclass(frozen=True)
class Rollout(Batch):
    """A micro-batch of which every row ends with what was written; fp32."""

    prompt_weight_bs: torch.Tensor
    """Weight of each position of a prompt in the mean over prompts, 0 elsewhere: the sum over the
    global batch is divided by its instances."""
    response_weight_bs: torch.Tensor
    """The same of what was written."""
    reward_bs: torch.Tensor
    advantage_bs: torch.Tensor
    importance_bs: torch.Tensor
    """Probability under the student over that of the draw; 1 where nothing was written."""
    logprob_bs: torch.Tensor
    """Of each written token under the student that wrote it, nats."""
    highest_importance_b: torch.Tensor
    """Of the global batch, the same in every row."""


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """Makes the micro-batches of an update into rollouts."""

    config: RolloutConfig
    advantage: AdvantageConfig
    normalization: Normalization
    student: ModelChunks
    teacher: ModelChunks
    data: Blend
    topology: Topology
    seed: int

    def __post_init__(self) -> None:
        config, longest = self.config, self.data.language.seq_length + 1
        if config.short_instances == "copy" and config.prompt_length >= longest:
            raise ConfigError(
                f"--prompt-length {config.prompt_length} with --short-instances copy: instances "
                f"have at most {longest} tokens, so nothing would be written. Lower it, or use "
                "--short-instances fraction"
            )

    def __call__(self, batches: Sequence[Batch], progress: Progress) -> list[Rollout]:
        """One for each micro-batch, of its shape (a collective)."""
        rows, samples = self._rows(batches, progress)
        limits = self.data.lengths(rows)
        prompts = prompt_lengths(limits, self.config.prompt_length, self.config.short_instances)
        given = torch.cat([_ids(batch) for batch in batches])
        size = self.config.rollout_batch_size or len(batches[0].rows_b)
        ids, lengths, importance, logprobs = self._write(given, prompts, limits, samples, size)
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

        places = torch.arange(1, ids.shape[1], device=ids.device)
        first, end = (torch.from_numpy(at).to(ids.device)[:, None] for at in (prompts, limits))
        room = (first <= places) & (places < end)
        prompt = torch.cat([batch.mask_bs for batch in batches]) & (places < first)
        response = room & training_mask(tokens, lengths - 1, eod_id=self.data.eod_id)
        reward = rewards(logprobs, response, self.advantage)
        advantage = torch.zeros_like(reward)
        part = slice(int(prompts.min()) - 1, int(limits.max()) - 1)  # nothing is written elsewhere
        advantage[:, part] = advantages(reward[:, part], response[:, part], self.advantage)
        importance = torch.where(response, importance, 1.0)

        counted = room if self.advantage.whiten == "code" else response
        instances = (prompt | response).any(1)
        sums = (
            instances, prompt, prompt.any(1), response, response.any(1),
            counted, advantage, advantage.square(),
        )  # fmt: skip
        totals, highest = self._everywhere([part.sum() for part in sums], importance.max())
        if self.advantage.whiten != "none":
            advantage = whitened(advantage, response, totals[5:])
        made = Rollout(
            tokens_bs=tokens, labels_bs=labels, mask_bs=prompt | response,
            rows_b=torch.cat([batch.rows_b for batch in batches]),
            prompt_weight_bs=self._weights(prompt, totals[0] / totals[1:3]),
            response_weight_bs=self._weights(response, totals[0] / totals[3:5]),
            reward_bs=reward.float(), advantage_bs=advantage.float(), importance_bs=importance,
            logprob_bs=logprobs[0], highest_importance_b=highest.expand(len(rows)),
        )  # fmt: skip
        sizes = [len(batch.rows_b) for batch in batches]
        columns = (getattr(made, item.name).split(sizes) for item in fields(made))
        return [Rollout(*parts) for parts in zip(*columns, strict=True)]

    def _rows(self, batches: Sequence[Batch], progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the data, numbers of their samples in the run) of this rank, int64[R]."""
        rows = [batch.rows_b.cpu().numpy() for batch in batches]
        ranks, rank = self.topology.dp_size, self.topology.dp_rank
        samples = [
            progress.consumed + (at * ranks + rank) * len(part) + np.arange(len(part))
            for at, part in enumerate(rows)
        ]
        return np.concatenate(rows), np.concatenate(samples)

    def _write(
        self,
        given: torch.Tensor,
        prompts: np.ndarray,
        limits: np.ndarray,
        samples: np.ndarray,
        size: int,
    ) -> tuple[torch.Tensor, ...]:
        """What all rows become, of which `size` are continued together.

        (ids [R, s + 1] padded with the separator, tokens of each row [R], importance weights
        [R, s], log-probabilities under student and teacher [2, R, s])
        """
        sampler = Sampler(SamplingConfig(seed=self.seed), mixture=self.config.teacher_mixture)
        models, stop_id = [self.student, self.teacher], self.data.eod_id
        on_host, device = given.cpu().numpy(), given.device
        ids = torch.full_like(given, stop_id)
        lengths = torch.zeros(len(ids), dtype=torch.int64, device=device)
        importance = torch.ones(ids.shape, device=device)
        logprobs = torch.zeros((2, *ids.shape), device=device)
        order = np.lexsort((limits, prompts))  # prompts of like lengths together
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            tokens = [on_host[row, : prompts[row]] for row in rows]
            asked = Prompts(tokens, samples[rows], limits[rows])
            found = generate(models, asked, sampler, stop_id=stop_id)
            here = slice(found.tokens_bs.shape[1])
            lengths[rows] = found.lengths_b.to(device)
            there = torch.arange(here.stop, device=device) < lengths[rows, None]
            ids[rows, here] = torch.where(there, found.tokens_bs, stop_id)
            importance[rows, here] = found.importance_bs
            logprobs[:, rows, here] = found.logprobs_mbs
        return ids, lengths, importance[:, 1:], logprobs[:, :, 1:]

    def _everywhere(
        self, sums: Sequence[torch.Tensor], highest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sums, at least 1 where they count; maximum) over the data-parallel ranks."""
        mine = torch.stack([value.double() for value in (*sums, highest)])
        every = [torch.empty_like(mine) for _ in range(self.topology.dp_size)]
        dist.all_gather(every, mine, group=self.topology.dp_group)
        table_pn = torch.stack(every)
        totals = table_pn[:, :-1].sum(0)
        totals[:6].clamp_(min=1)
        return totals, table_pn[:, -1].max().float()

    def _weights(self, mask: torch.Tensor, each_2: torch.Tensor) -> torch.Tensor:
        """Of the positions of a mean; `each_2`: of a token, and of an instance that has any."""
        token, instance = each_2.float()
        if self.normalization == "token":
            return mask * token
        return mask / mask.sum(1, keepdim=True).clamp(min=1) * instance


def _ids(batch: Batch) -> torch.Tensor:
    """Inputs and the last label: [b, s + 1]."""
    return torch.cat([batch.tokens_bs[:, :1], batch.labels_bs], dim=1)
