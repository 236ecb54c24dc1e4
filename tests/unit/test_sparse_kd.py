"""Stored logits as targets: the golden values of top-p-k, what tails and temperatures mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.logit_codec import Encoding, decode, encode
from megatron_miniplm.data.sparse_logits import PaddedLogits, SparseLogits, pad
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.signal import SignalFacts
from megatron_miniplm.models.truncate import Places, TruncationConfig, truncated
from megatron_miniplm.objectives.kd import Distillation, KdConfig
from megatron_miniplm.objectives.objective import LossConfig, Progress
from megatron_miniplm.objectives.schedules import AlphaConfig
from megatron_miniplm.objectives.temperature import TemperatureConfig
from megatron_miniplm.parallel.vocab import VocabShard

# A worked example: top-p .95 keeps three columns, top-k 2 of them.
TEACHER = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
STUDENT = torch.tensor([1.0, 1.5, -0.5, 0.0, -1.0])
SHARD = VocabShard(first=0, size=5, valid=5, group=None)
ONE = torch.zeros(1, 1, dtype=torch.int64)
BATCH = Batch(ONE, ONE, ONE == 0, ONE[0])
FACTS = SignalFacts(sparse=True, temperatures=frozenset({2.0}), mean_logit_std=1.5)


def stored(kept: int, taus: tuple[float, ...] = (2.0,)) -> PaddedLogits:
    """The golden teacher's likeliest columns of one position whose label is column 0."""
    log_q = TEACHER.double().log_softmax(-1)
    q = log_q.exp()
    column = {
        "gold_log_prob": log_q[0], "entropy": -(q * log_q).sum(),
        "logit_std": TEACHER.std(), "tail_mass": q[kept:].sum(),
    }  # fmt: skip
    return pad(BATCH.mask_bs, [
        SparseLogits(
            counts=np.array([kept], np.uint32), ids=np.arange(kept, dtype=np.int32),
            log_probs=log_q[:kept].float().numpy(),
            log_partitions={t: np.float32([(log_q / t).logsumexp(-1)]) for t in taus},
            **{name: np.float32([value]) for name, value in column.items()},
        )
    ])  # fmt: skip


def learn(
    signal: PaddedLogits | Head,
    facts: SignalFacts = FACTS,
    *,
    z_loss: float = 0.0,
    consumed: int = 0,
    **settings,
) -> tuple[float, dict[str, float], torch.Tensor]:
    """(loss, metrics, gradient of the student's logits) of one token, in fp64."""
    hidden = STUDENT.double()[None, None].requires_grad_()
    head = Head(hidden_sbh=hidden, weight_vh=torch.eye(5, dtype=torch.float64), shard=SHARD)
    config = KdConfig(**{"kd_alpha": 1.0, "kd_student_temperature": 1.0, **settings})
    objective = Distillation(LossConfig(z_loss_weight=z_loss), config).taught_by(facts)
    progress = Progress(consumed=consumed, total=100, warmup=0, decay=0)
    output = objective.at(progress)(head, BATCH, signal)
    output.loss_sum.backward()
    assert set(output.metrics) == set(objective.metric_names)
    metrics = {name: float(pair[0]) for name, pair in output.metrics.items()}
    return float(output.loss_sum), metrics, hidden.grad[0, 0]


def dense() -> Head:
    hidden = TEACHER.double()[None, None]
    return Head(hidden_sbh=hidden, weight_vh=torch.eye(5, dtype=torch.float64), shard=SHARD)


GRADIENT = [-0.434768, 0.219559, 0.066111, 0.108999, 0.040099]


@pytest.mark.parametrize(
    ("loss", "temperature", "expected"),
    [
        ("soft_nll", 1.0, 1.081944), ("forward_kl", 1.0, 0.499741), ("brier", 1.0, 0.255089),
        ("soft_nll", 2.0, 1.027645), ("forward_kl", 2.0, 0.364797), ("brier", 2.0, 0.136558),
    ],
)  # fmt: skip
def test_renormalised_losses_have_the_golden_values(
    loss: str, temperature: float, expected: float
) -> None:
    value, metrics, grad = learn(
        stored(2), kd_loss=loss, kd_tail="renormalize", kd_temperature=temperature
    )
    assert value == pytest.approx(expected, abs=2e-6)
    assert metrics["kd loss"] == pytest.approx(expected, abs=2e-6)
    if loss != "brier" and temperature == 1:
        assert grad.tolist() == pytest.approx(GRADIENT, abs=2e-6)


def test_the_metrics_are_those_of_the_full_distribution() -> None:
    _, metrics, _ = learn(stored(2))
    log_q = TEACHER.log_softmax(-1)
    assert metrics["kept mass"] == pytest.approx(0.870530, abs=1e-6)
    assert metrics["teacher loss"] == pytest.approx(-float(log_q[0]), abs=1e-6)
    assert metrics["teacher entropy"] == pytest.approx(float(-(log_q.exp() * log_q).sum()))
    assert metrics["top-1 agreement"] == 0
    assert metrics["lm loss"] == pytest.approx(-float(STUDENT.log_softmax(-1)[0]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("student", [1.0, None])
@pytest.mark.parametrize("tail", ["residual", "renormalize", "renormalize-both", "raw", "uniform"])
def test_all_columns_stored_are_the_teacher_itself(
    tail: str, student: float | None, temperature: float
) -> None:
    settings = {"kd_temperature": temperature, "kd_student_temperature": student}
    online = learn(dense(), SignalFacts(), **settings)
    found = learn(stored(5), kd_tail=tail, **settings)
    assert found[0] == pytest.approx(online[0], abs=1e-6)
    torch.testing.assert_close(found[2], online[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["normkd", "wttm", "adakd-sd", "adakd-h"])
def test_all_columns_stored_adapt_as_the_teacher_itself(method: str) -> None:
    center = {"kd_temperature_center": 1.2} if method == "adakd-sd" else {}
    adaptive = TemperatureConfig(kd_temperature_method=method, **center)
    settings = {"adaptive": adaptive, "kd_student_temperature": None}
    settings["kd_temperature"] = 1.0 if method == "adakd-h" else 2.0
    online = learn(dense(), SignalFacts(), **settings)
    found = learn(stored(5), kd_tail="renormalize", **settings)
    assert found[0] == pytest.approx(online[0], rel=1e-5)
    torch.testing.assert_close(found[2], online[2], rtol=1e-5, atol=1e-6)


def test_weights_and_tail_are_a_distribution_whatever_the_encoding_rounded() -> None:
    signal = stored(3)
    rounded = replace(signal, log_probs=signal.log_probs + torch.tensor([0.01, -0.02, 0.015]))
    for temperature in (1.0, 2.0):
        config = KdConfig(kd_temperature=temperature)
        kind = Distillation(LossConfig(), config).taught_by(FACTS).stored
        targets = kind.targets(rounded, 1 / temperature, 5)
        total = float(targets.probs_NK.sum() + targets.tail_N.sum())
        assert total == pytest.approx(1, abs=1e-6)
        if temperature == 1:
            assert float(targets.tail_N) == pytest.approx(float(signal.tail_mass), rel=1e-6)


@pytest.mark.parametrize("bits", [10, 32])
def test_a_sure_teacher_has_its_tail_at_a_temperature(bits: int) -> None:
    vocab = 50_000  # at 1 all others have 1e-6 together, at 2 a fifth
    torch.manual_seed(0)
    logits = torch.randn(1, vocab)
    logits[0, 7] = 25.0
    shard = VocabShard(first=0, size=vocab, valid=vocab, group=None)
    places = Places.of(BATCH, [0])
    kept = truncated(logits, places, shard, TruncationConfig(top_p=1.0, kd_temperatures=(2.0,)))
    assert 0 < float(kept.tail_mass[0]) < 1e-5
    read = decode(encode(kept, Encoding(value_bits=bits), vocab_size=vocab).payload)
    kind = Distillation(LossConfig(), KdConfig(kd_temperature=2.0)).taught_by(FACTS).stored
    targets = kind.targets(pad(BATCH.mask_bs, [read]), 0.5, vocab)
    hot = (logits[0].double() / 2).softmax(-1)
    off = 1 - float(hot[torch.from_numpy(kept.ids).long()].sum())
    assert off > 0.1
    assert float(targets.tail_N) == pytest.approx(off, rel=1e-3)
    assert read.tail_mass[0] == pytest.approx(kept.tail_mass[0], rel=3e-4)


def test_positions_that_are_not_trained_give_nothing_and_no_nan() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    signal = pad(mask, [_row(stored(2)), None])
    for method in ("fixed", "wttm", "normkd"):
        adaptive = TemperatureConfig(kd_temperature_method=method)
        hidden = torch.randn(2, 2, 5, dtype=torch.float64).requires_grad_()
        head = Head(hidden_sbh=hidden, weight_vh=torch.eye(5, dtype=torch.float64), shard=SHARD)
        config = KdConfig(kd_tail="renormalize", kd_temperature=2.0, adaptive=adaptive)
        ids = torch.zeros(2, 2, dtype=torch.int64)
        output = Distillation(LossConfig(), config).taught_by(FACTS)(
            head, Batch(ids, ids, mask, ids[0]), signal
        )
        output.loss_sum.backward()
        assert int(output.count) == 1
        assert hidden.grad[0, 0].abs().min() > 0
        assert hidden.grad.sum() == hidden.grad[0, 0].sum()
        assert all(pair.isfinite().all() for pair in output.metrics.values())


def _row(signal: PaddedLogits) -> SparseLogits:
    return SparseLogits(
        counts=np.array([2], np.uint32), ids=signal.ids[0, 0].numpy(),
        log_probs=signal.log_probs[0, 0].numpy(),
        **{
            name: getattr(signal, name)[0].numpy()
            for name in ("gold_log_prob", "entropy", "logit_std", "tail_mass")
        },
    )  # fmt: skip


def test_a_share_that_is_nothing_for_a_while_is_left_out() -> None:
    schedule = AlphaConfig(kd_alpha_schedule="linear-inc")
    for signal, facts in ((stored(2), FACTS), (dense(), SignalFacts())):
        settings = {"alpha": schedule, "z_loss": 1e-3}
        value, metrics, grad = learn(signal, facts, consumed=0, **settings)
        assert metrics["kd alpha"] == 0
        lse = float(STUDENT.logsumexp(-1))
        assert value == pytest.approx(metrics["lm loss"] + 1e-3 * lse**2)
        value, metrics, _ = learn(signal, facts, consumed=100, **settings)
        assert metrics["kd alpha"] == 1
        assert value == pytest.approx(metrics["kd loss"])
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "facts", "message"),
    [
        ({"kd_loss": "reverse_kl"}, {}, "reverse_kl does not exist .*: it is infinite"),
        ({"kd_loss": "tvd"}, {}, "tvd does not exist .* of every token"),
        ({"kd_loss": "mse_logits"}, {}, "use mse_centered"),
        ({"kd_loss": "brier"}, {}, "--kd-loss brier has no term for --kd-tail residual"),
        ({"kd_tail": "sampled"}, {}, "which hold the likeliest tokens: pass --kd-tail residual"),
        ({}, {"sampled": True}, "which were sampled: pass --kd-tail sampled"),
        ({"kd_temperature": 3.0}, {}, r"the logits have 2: cache them with --kd-temperatures 3"),
        (
            {"kd_tail": "sampled", "kd_temperature": 2.0}, {"sampled": True},
            "unbiased at temperature 1 alone",
        ),
        (
            {"adaptive": TemperatureConfig(kd_temperature_method="adakd-h")}, {},
            "adakd-h gives every token another: pass --kd-tail renormalize",
        ),
        ({"kd_tail": "raw"}, {"sparse": False}, "no effect on a teacher of which all logits"),
    ],
)  # fmt: skip
def test_what_a_store_does_not_say_enough_for_is_refused(
    settings: dict, facts: dict, message: str
) -> None:
    objective = Distillation(LossConfig(), KdConfig(**settings))
    with pytest.raises(ConfigError, match=message):
        objective.taught_by(replace(FACTS, **facts))
