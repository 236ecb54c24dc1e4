"""What is kept of logits against its definition in fp64, and that random draws are unbiased."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.instances import PADDING_ROW, Batch
from megatron_miniplm.data.sparse_logits import SparseLogits
from megatron_miniplm.kernels.block_top_k import top_k
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.truncate import Places, TruncationConfig, sparse_logits, truncated
from megatron_miniplm.parallel.vocab import VocabShard

GOLDEN = [2.0, 1.0, 0.0, -1.0, -2.0]  # as in test_sparse_kd.py
GOLDEN_TOP_P_K = [[0, 1], [0.636409, 0.234122]]
V, REAL, C = 1000, 987, 24
TAUS = (0.5, 2.0)


def places(labels: torch.Tensor, instance: int = 3, first: int = 0) -> Places:
    count = len(labels)
    return Places(
        row_N=torch.zeros(count, dtype=torch.int64), position_N=torch.arange(count) + first,
        labels_N=labels, ids_b=np.array([instance]),
    )  # fmt: skip


def keep(logits: torch.Tensor, labels: torch.Tensor | None = None, **flags) -> SparseLogits:
    labels = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
    shard = VocabShard(first=0, size=logits.shape[1], valid=min(REAL, logits.shape[1]), group=None)
    return truncated(logits, places(labels), shard, TruncationConfig(**flags))


def make(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of sure and unsure tokens, with poison where no column is; labels."""
    torch.manual_seed(0)
    logits = torch.randn(C, V) * torch.linspace(0.5, 6, C)[:, None]
    logits[:, REAL:] = 1e4
    return logits.to(dtype), torch.randint(0, REAL, (C,))


def entries(kept: SparseLogits, at: int) -> tuple[list[int], np.ndarray]:
    start = int(kept.counts[:at].sum())
    part = slice(start, start + int(kept.counts[at]))
    return kept.ids[part].tolist(), kept.log_probs[part]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "k"), [(1000, 7), (1000, 8), (1003, 3), (63, 63), (200, 1)])
def test_top_k_is_that_of_a_stable_sort(dtype: torch.dtype, width: int, k: int) -> None:
    torch.manual_seed(0)
    for scale in (1.0, 100.0):  # the integers have many that are equal, and both zeros
        logits = torch.randn(50, width + 9).mul(2 * scale).round().div(scale).to(dtype)[:, :width]
        values, columns = top_k(logits, k)
        expected, places = logits.float().sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, expected[:, :k])
        assert torch.equal(columns, places[:, :k])


def test_golden_top_p_k_of_the_specification() -> None:
    kept = keep(torch.tensor([GOLDEN]), top_p=0.95, top_k=2)
    ids, log_probs = entries(kept, 0)
    assert ids == GOLDEN_TOP_P_K[0]
    np.testing.assert_allclose(np.exp(log_probs), GOLDEN_TOP_P_K[1], atol=1e-6)
    for tau, expected in ((1.0, [0.731059, 0.268941]), (2.0, [0.622459, 0.377541])):
        targets = torch.from_numpy(log_probs / tau).softmax(0)
        np.testing.assert_allclose(targets, expected, atol=1e-6)
    assert entries(keep(torch.tensor([GOLDEN]), top_p=0.95), 0)[0] == [0, 1, 2]
    # The column that crosses is kept: .6364 is not .64, and .6365 is.
    assert entries(keep(torch.tensor([GOLDEN]), top_p=0.64), 0)[0] == [0, 1]
    assert entries(keep(torch.tensor([GOLDEN]), top_p=0.6364), 0)[0] == [0]
    assert entries(keep(torch.tensor([GOLDEN]), top_p=1e-9), 0)[0] == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "flags",
    [
        {}, {"top_k": 5, "force_gold": True}, {"top_p": 0.6, "top_k": 900},
        {"top_p": 0.999, "top_k": 900}, {"truncate": "none"},
    ],
)  # fmt: skip
def test_kept_logits_and_numbers_are_those_of_their_definition(
    dtype: torch.dtype, flags: dict
) -> None:
    logits, labels = make(dtype)
    before = logits.clone()
    kept = keep(logits, labels, kd_temperatures=TAUS, **flags)
    assert torch.equal(logits, before), "logits are as before"
    config = TruncationConfig(**flags)
    exact = logits[:, :REAL].double()
    log_q = exact.log_softmax(1)
    ordered, order = log_q.sort(dim=1, descending=True, stable=True)
    mass = ordered.exp().cumsum(1)
    most = REAL if config.truncate == "none" else config.top_k
    p = 1.0 if config.truncate == "none" else config.top_p
    for at in range(C):
        gold = {int(labels[at])} if config.force_gold else set()
        best = order[at].tolist()
        # As few as reach p; rounding in fp32 may decide otherwise of the last one.
        counts = {most} if p == 1 else {
            min(most, 1 + int((mass[at] < p + rounding).sum())) for rounding in (-1e-6, 0, 1e-6)
        }  # fmt: skip
        ids, log_probs = entries(kept, at)
        assert ids in [sorted(set(best[:count]) | gold) for count in counts]
        # fp32 sums of the records, and one rounding of the result.
        np.testing.assert_allclose(log_probs, log_q[at, ids], rtol=1e-6, atol=1e-6)
        left = sorted(set(range(REAL)) - set(ids))
        np.testing.assert_allclose(kept.tail_mass[at], log_q[at, left].exp().sum(), rtol=1e-5)
    np.testing.assert_allclose(kept.gold_log_prob, log_q[range(C), labels], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(kept.entropy, -(log_q.exp() * log_q).sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept.logit_std, exact.std(1), rtol=1e-5)
    for tau in TAUS:
        expected_z = (log_q / tau).logsumexp(1)
        np.testing.assert_allclose(kept.log_partitions[tau], expected_z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {"sampling": "rs"}, {"sampling": "rs", "sampling_power": 0.6},
        {"sampling": "rs", "force_gold": True}, {"sampling": "head-tail", "top_k": 4},
        {"sampling": "head-tail", "top_k": 4, "sampling_power": 1.3, "force_gold": True},
    ],
    ids=str,
)  # fmt: skip
def test_weights_of_draws_are_the_probabilities_on_average(flags: dict) -> None:
    """A column's mean weight over independent positions is within 5 standard errors of q."""
    torch.manual_seed(0)
    count, columns = 20_000, 24
    one = torch.randn(columns) * 2
    kept = keep(one.expand(count, -1).clone(), torch.full((count,), 5), sampling_draws=6, **flags)
    weights = np.zeros((count, columns))
    weights[np.repeat(np.arange(count), kept.counts), kept.ids] = np.exp(kept.log_probs)
    q = one.double().softmax(0).numpy()
    error = weights.std(0) / np.sqrt(count)
    # Of 24 columns x 5 cases, one is beyond 5 sigma by chance in a run of 14,000.
    assert (abs(weights.mean(0) - q) <= 5 * error + 1e-6).all()
    sure = weights.std(0) < 1e-6
    if "top_k" in flags:
        assert sure[np.argsort(-q)[:4]].all(), "the head is exact"
    if "force_gold" in flags:
        assert sure[5], "and so is the label"
    assert not sure.all()


def test_draws_depend_on_seed_instance_and_position_only() -> None:
    logits, labels = make()
    shard = VocabShard(first=0, size=V, valid=REAL, group=None)

    def drawn(rows: slice, instance: int = 3, seed: int = 1) -> SparseLogits:
        config = TruncationConfig(sampling="rs", sampling_draws=20, sampling_seed=seed)
        place = places(labels[rows], instance, rows.start or 0)
        return truncated(logits[rows].clone(), place, shard, config)

    whole = drawn(slice(0, C))
    alone = drawn(slice(17, 18))
    assert entries(whole, 17)[0] == entries(alone, 0)[0]
    for other in (drawn(slice(0, C), instance=4), drawn(slice(0, C), seed=2)):
        assert other.ids.tolist() != whole.ids.tolist()


def test_a_chunk_boundary_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    b, s, h = 3, 10, 8
    mask = torch.rand(b, s) < 0.7
    mask[1] = False
    tokens = torch.randint(0, REAL, (b, s))
    batch = Batch(tokens, tokens.roll(1, 1), mask, torch.tensor([4, PADDING_ROW, 2]))
    shard = VocabShard(first=0, size=V, valid=REAL, group=None)
    head = Head(hidden_sbh=torch.randn(s, b, h), weight_vh=torch.randn(V, h), shard=shard)
    config = TruncationConfig(sampling="head-tail", top_k=5, sampling_draws=9)
    logits_bsv = head.logits().transpose(0, 1)
    for chunk in (1 << 30, 4 * V * 5):
        monkeypatch.setitem(
            sparse_logits.__globals__["Head"].over_logits.__globals__["CHUNK_BYTES"], "cpu", chunk
        )
        found = sparse_logits(head, batch, [40, -1, 20], config)
        assert [len(each) for each in found] == mask.sum(1).tolist()
        for row in (0, 2):
            place = Places(
                row_N=torch.full((s,), row)[mask[row]], position_N=torch.arange(s)[mask[row]],
                labels_N=batch.labels_bs[row, mask[row]], ids_b=np.array([40, -1, 20]),
            )  # fmt: skip
            alone = truncated(logits_bsv[row, mask[row]].clone(), place, shard, config)
            assert found[row].ids.tolist() == alone.ids.tolist()
            # The product of some rows is rounded otherwise than that of others.
            np.testing.assert_allclose(found[row].log_probs, alone.log_probs, atol=1e-5)


def test_a_batch_without_a_trained_position_has_nothing() -> None:
    shard = VocabShard(first=0, size=V, valid=REAL, group=None)
    head = Head(hidden_sbh=torch.randn(4, 1, 8), weight_vh=torch.randn(V, 8), shard=shard)
    nothing = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(nothing, nothing, nothing.bool(), torch.tensor([PADDING_ROW]))
    (found,) = sparse_logits(head, batch, [-1], TruncationConfig(kd_temperatures=TAUS))
    assert (len(found), found.nnz) == (0, 0)


def test_logits_that_are_not_finite_name_instance_and_position() -> None:
    logits, labels = make()
    logits[9, 100] = torch.nan
    with pytest.raises(DataError, match="instance 3 at position 9 are not finite, and 0 more"):
        keep(logits, labels)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"sampling_draws": 3}, "--sampling-draws 3 has no effect with .* --sampling topk"),
        ({"sampling": "rs", "top_k": 7}, "--top-k 7 has no effect"),
        ({"truncate": "none", "sampling": "head-tail"}, "leaves nothing"),
        ({"kd_temperatures": (1.0,)}, "--kd-temperatures 1 "),
    ],
)
def test_flags_without_effect_or_sense_are_refused(flags: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TruncationConfig(**flags)
