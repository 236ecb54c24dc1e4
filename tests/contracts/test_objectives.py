"""What every registered objective must do, on random hidden states and a random head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import get_args

import numpy as np
import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_miniplm import objectives
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.sparse_logits import PaddedLogits, SparseLogits, pad
from megatron_miniplm.kernels.token_loss import MIXTURES
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.signal import InstanceValues, SignalFacts
from megatron_miniplm.models.value_head import TargetScale, ValueHead
from megatron_miniplm.objectives.kd_losses import KD_LOSSES
from megatron_miniplm.objectives.objective import (
    OBJECTIVES,
    LossConfig,
    Objective,
    mean_by_definition,
    token_weights,
)
from megatron_miniplm.objectives.rollouts import Rollout
from megatron_miniplm.objectives.sparse_kd import Tail
from megatron_miniplm.objectives.temperature import TemperatureConfig
from megatron_miniplm.parallel.vocab import VocabShard

Registry.discover(objectives)

B, S, H, V = 4, 11, 6, 23
SCALE = TargetScale(mean=0.25, sd=0.5, score_normalization="mean")
REAL = V - 2
NORMALIZATIONS = ("sequence", "token")
# Every objective with its defaults, and every KD loss at a temperature and a mix that show.
KD = {"kd_alpha": 0.3, "kd_temperature": 2.0}
BETA = {mixture: {"kd_beta": 0.25} for mixture in MIXTURES}
CASES = {name: (name, {}) for name in OBJECTIVES.names()} | {
    f"kd {loss}": (
        "kd",
        {"kd_loss": loss, **KD, **BETA.get(loss, {})},
    )
    for loss in KD_LOSSES.names()
}
# Every way to a temperature, of the teacher alone and of both.
ADAPTIVE = {
    "normkd": {}, "wttm": {}, "adakd-sd": {"kd_temperature_center": 2.0}, "adakd-h": {},
}  # fmt: skip
CASES |= {
    f"kd {method}": (
        "kd",
        {
            **(KD if method != "adakd-h" else {"kd_alpha": 0.3}),
            "adaptive": TemperatureConfig(kd_temperature_method=method, **settings),
        },
    )
    for method, settings in ADAPTIVE.items()
}
# Of a stored teacher, of whom five tokens of every position are known.
SPARSE = {
    **{tail: {**KD, "kd_tail": tail} for tail in get_args(Tail) if tail != "sampled"},
    "sampled": {"kd_alpha": 0.3, "kd_tail": "sampled"},
    "soft_nll": {**KD, "kd_loss": "soft_nll"},
    "brier": {**KD, "kd_loss": "brier", "kd_tail": "renormalize"},
    "mse_centered": {**KD, "kd_loss": "mse_centered", "kd_tail": "raw"},
    "wttm": {**KD, "adaptive": TemperatureConfig(kd_temperature_method="wttm")},
    "adakd-sd": {
        **KD, "kd_tail": "renormalize",
        "adaptive": TemperatureConfig(kd_temperature_method="adakd-sd"),
    },
}  # fmt: skip
CASES |= {f"kd stored {name}": ("kd", settings) for name, settings in SPARSE.items()}
CASES |= {
    "minillm, teacher on prompts": ("minillm", {"lm_kd_ratio": 0.5, "lm_coef": 0.7}),
    "minillm, all weighed": ("minillm", {"single_step_importance": True}),
}
CASES["kd student at 1"] = ("kd", {**KD, "kd_student_temperature": 1.0, "kd_loss": "jeffreys"})

every_case = pytest.mark.parametrize("case", CASES)
every_normalization = pytest.mark.parametrize("normalization", NORMALIZATIONS)


def build(case: str, normalization: str, **common) -> Objective:
    name, settings = CASES[case]
    cls = OBJECTIVES[name]
    own = None if cls.Config is None else cls.Config(**settings)
    if name == "regression":  # its loss is of instances, whatever that of tokens is
        return cls(LossConfig(), own).taught_by(SignalFacts(targets=SCALE))
    objective = cls(LossConfig(loss_normalization=normalization, **common), own)
    if not case.startswith("kd stored"):
        return objective
    facts = SignalFacts(
        sparse=True, sampled="sampled" in case, temperatures=frozenset({2.0}), mean_logit_std=2.0
    )
    return objective.taught_by(facts)


def is_stored(objective: Objective) -> bool:
    return getattr(objective, "stored", None) is not None


def stored(models: Models, batch: Batch) -> PaddedLogits:
    """What a store would have of the teacher: five tokens, in fp32."""
    rows = []
    for logits, mask in zip(models.logits()[1].detach(), batch.mask_bs, strict=True):
        log_q = logits[mask].log_softmax(-1)
        ids = log_q.topk(5).indices.sort(-1).values
        kept = log_q.gather(-1, ids)
        column = {
            "gold_log_prob": log_q[:, 0], "entropy": -(log_q.exp() * log_q).sum(-1),
            "logit_std": log_q.std(-1), "tail_mass": 1 - kept.exp().sum(-1),
        }  # fmt: skip
        rows.append(SparseLogits(
            counts=np.full(len(ids), 5, np.uint32), ids=ids.flatten().int().numpy(),
            log_probs=kept.flatten().float().numpy(),
            log_partitions={2.0: (log_q / 2).logsumexp(-1).float().numpy()},
            **{name: value.float().numpy() for name, value in column.items()},
        ))  # fmt: skip
    return pad(batch.mask_bs, rows)


def number_head(weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A linear head whose weights are the first row of `weight`, so that its column is w . h."""
    core = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=1)
    head = ValueHead(core, tp_rank=0).double()
    places = {"weight": weight[:1], "bias": torch.zeros(1, dtype=torch.float64)}
    return lambda hidden, mask: torch.func.functional_call(head, places, (hidden, mask))


def targets(batch: Batch) -> InstanceValues:
    """A number for each row, in nats."""
    return InstanceValues(nats_b=0.3 * batch.rows_b.float() - 0.2)


@dataclass(frozen=True)
class Models:
    """Final hidden states [s, b, h] and output matrices [v, h] of both models, fp64."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor

    def rows(self, part: slice) -> Models:
        return replace(
            self, hidden=self.hidden[:, part], teacher_hidden=self.teacher_hidden[:, part]
        )

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Real columns of both, [b, s, V]."""
        student = (self.hidden @ self.weight.t())[..., :REAL].transpose(0, 1)
        return student, (self.teacher_hidden @ self.teacher_weight.t())[..., :REAL].transpose(0, 1)


def make() -> tuple[Models, Batch]:
    """Two models of different width, and a batch with ragged masks and one empty row."""
    torch.manual_seed(1)
    double = {"dtype": torch.float64}
    models = Models(
        torch.randn(S, B, H, **double), torch.randn(V, H, **double),
        torch.randn(S, B, H + 3, **double), torch.randn(V, H + 3, **double),
    )  # fmt: skip
    tokens, labels = torch.randint(0, REAL, (2, B, S))
    mask = torch.rand(B, S) < 0.7
    mask[1, 3:] = False
    mask[2] = False
    return models, Batch(tokens, labels, mask, torch.arange(B))


def evaluate(objective: Objective, models: Models, batch: Batch):
    """(loss sum, count, gradient of hidden, gradient of weight)."""
    hidden = models.hidden.detach().clone().requires_grad_()
    weight = models.weight.detach().clone().requires_grad_()
    shard = VocabShard(first=0, size=V, valid=REAL, group=None)
    numbers = number_head(weight) if objective.targets else None
    head = Head(hidden_sbh=hidden, weight_vh=weight, shard=shard, value_head=numbers)
    teacher = Head(hidden_sbh=models.teacher_hidden, weight_vh=models.teacher_weight, shard=shard)
    signal = teacher
    if is_stored(objective):
        signal = stored(models, batch)
    elif objective.targets:
        signal = targets(batch)
    output = objective(head, batch, signal if objective.needs_teacher else None)
    assert set(output.metrics) == set(objective.metric_names)
    output.loss_sum.backward()
    return output.loss_sum.detach(), int(output.count), hidden.grad, weight.grad


def rows(batch: Batch, part: slice) -> Batch:
    return type(batch)(*(getattr(batch, item.name)[part] for item in fields(batch)))


def learned_from(objective: Objective, batch: Batch) -> Batch:
    """The batch as the objective gets it: the end of each row was written, if it explores."""
    if not objective.explores:
        return batch
    written = batch.mask_bs & (torch.arange(S) >= S // 2)
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(3, B, S, generator=generator) * written
    return Rollout(
        *(getattr(batch, item.name) for item in fields(batch)),
        prompt_weight_bs=(batch.mask_bs & ~written) / 3.0,
        response_weight_bs=written / written.sum(1, keepdim=True).clamp(min=1),
        reward_bs=random[0], advantage_bs=random[1], importance_bs=random[2].exp(),
        logprob_bs=random[0] - 1, highest_importance_b=torch.ones(B),
    )  # fmt: skip


@every_case
@every_normalization
def test_mean_and_gradients_equal_the_definition(case: str, normalization: str) -> None:
    models, batch = make()
    objective = build(case, normalization, z_loss_weight=0.01)
    batch = learned_from(objective, batch)
    loss, count, grad_hidden, grad_weight = evaluate(objective, models, batch)
    hidden, weight = models.hidden.requires_grad_(), models.weight.requires_grad_()
    student, teacher = models.logits()
    if is_stored(objective):
        teacher = stored(models, batch)
    elif objective.targets:
        teacher = targets(batch)
    expected = objective.reference(student, batch, teacher)
    expected.backward()
    # fp64 throughout but for the weights of the tokens, which are fp32.
    torch.testing.assert_close(loss / count, expected.detach(), rtol=1e-6, atol=0)
    for found, right in ((grad_hidden, hidden.grad), (grad_weight, weight.grad)):
        scale = float(right.abs().max())
        torch.testing.assert_close(found / count, right, rtol=0, atol=1e-6 * scale)


@every_case
@every_normalization
def test_splitting_the_batch_changes_nothing(case: str, normalization: str) -> None:
    models, batch = make()
    objective = build(case, normalization)
    batch = learned_from(objective, batch)
    loss, count, grad_hidden, grad_weight = evaluate(objective, models, batch)
    parts = [
        evaluate(objective, models.rows(part), rows(batch, part))
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert sum(part[1] for part in parts) == count
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-10, atol=0)
    joined = torch.cat([part[2] for part in parts], dim=1)
    torch.testing.assert_close(joined, grad_hidden, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(part[3] for part in parts), grad_weight, rtol=1e-10, atol=1e-12)


@every_case
@every_normalization
def test_masked_positions_do_not_matter(case: str, normalization: str) -> None:
    models, batch = make()
    objective = build(case, normalization)
    batch = learned_from(objective, batch)
    before = evaluate(objective, models, batch)
    models.hidden[~batch.mask_bs.t()] = torch.nan
    models.teacher_hidden[~batch.mask_bs.t()] = torch.nan
    labels = torch.where(batch.mask_bs, batch.labels_bs, 0)
    after = evaluate(objective, models, replace(batch, labels_bs=labels))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not after[2][~batch.mask_bs.t()].any()


@every_case
@every_normalization
def test_columns_that_are_not_real_do_not_matter(case: str, normalization: str) -> None:
    models, batch = make()
    objective = build(case, normalization)
    batch = learned_from(objective, batch)
    before = evaluate(objective, models, batch)
    models.weight[REAL:] = 1e3
    models.teacher_weight[REAL:] = 1e3
    after = evaluate(objective, models, batch)
    for found, expected in zip(after, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not after[3][REAL:].any()


@every_case
def test_gradient_equals_finite_differences(case: str) -> None:
    models, batch = make()
    objective = build(case, "sequence")
    batch = learned_from(objective, batch)
    _, _, grad_hidden, grad_weight = evaluate(objective, models, batch)
    torch.manual_seed(2)
    step = 1e-5
    for name, grad in (("hidden", grad_hidden), ("weight", grad_weight)):
        tensor = getattr(models, name)
        direction = torch.randn_like(tensor)
        direction /= direction.norm()
        sides = [
            evaluate(objective, replace(models, **{name: tensor + sign * direction}), batch)[0]
            for sign in (step, -step)
        ]
        expected = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", KD_LOSSES.names())
def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_it(loss: str) -> None:
    models, batch = make()
    same = replace(models, teacher_hidden=models.hidden, teacher_weight=models.weight)
    cls = OBJECTIVES["kd"]
    objective = cls(LossConfig(), cls.Config(kd_loss=loss, kd_alpha=1.0))
    value, count, grad_hidden, grad_weight = evaluate(objective, same, batch)
    entropy = 0.0
    if loss == "soft_nll":
        log_q = same.logits()[1].log_softmax(-1)
        entropies = -(log_q.exp() * log_q).sum(-1)
        entropy = float(mean_by_definition(entropies, batch, "sequence"))
    assert float(value) / count == pytest.approx(entropy, rel=1e-6, abs=1e-14)
    # fp64; a gradient of another teacher is of order 0.1.
    assert float(grad_hidden.abs().max()) < 1e-14
    assert float(grad_weight.abs().max()) < 1e-14


def test_sequence_weights_sum_to_one_per_instance_and_count_instances() -> None:
    _, batch = make()
    weights, count = token_weights(batch, "sequence")
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert int(count) == 3


def test_token_weights_are_the_mask_and_count_tokens() -> None:
    _, batch = make()
    weights, count = token_weights(batch, "token")
    assert torch.equal(weights, batch.mask_bs.float())
    assert int(count) == int(batch.mask_bs.sum())
