"""Batches, the mask, and an order whose whole state is a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import (
    PADDING_ROW,
    Permutation,
    SampleOrder,
    make_batch,
    rank_share,
    training_mask,
)

EOD = 0


def test_golden_mask_a_b_eos_c_d() -> None:
    ids = torch.tensor([[5, 6, EOD, 7, 8]])
    mask = training_mask(ids[:, :-1], torch.tensor([4]), eod_id=EOD)
    assert mask.int().tolist() == [[1, 1, 0, 1]]


def test_mask_uses_lengths_and_not_the_padding_token() -> None:
    tokens = torch.tensor([[5, 6, 7, 9]])
    mask = training_mask(tokens, torch.tensor([2]), eod_id=EOD)
    assert mask.int().tolist() == [[1, 1, 0, 0]]


def test_batch_holds_the_instance_shifted_by_one(corpus: Path) -> None:
    opened = Corpus.open(corpus)
    row = int(np.argmin(opened.lengths))
    ids = opened.tokens(row)
    batch = make_batch(opened, [row, PADDING_ROW], length=opened.seq_length)
    count = len(ids) - 1
    assert batch.tokens_bs[0, :count].tolist() == ids[:-1].tolist()
    assert batch.labels_bs[0, :count].tolist() == ids[1:].tolist()
    assert not batch.mask_bs[0, count:].any()
    assert int(batch.mask_bs[0].sum()) == int((ids[:-1] != opened.eod_id).sum())
    assert not batch.mask_bs[1].any()
    assert batch.rows_b.tolist() == [row, PADDING_ROW]


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 5))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    images = Permutation(size, seed=seed, epoch=epoch)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_permutation_mixes_and_depends_on_seed_and_epoch() -> None:
    at = np.arange(10_000)
    orders = [Permutation(10_000, seed=s, epoch=e)(at) for s, e in ((1, 0), (1, 1), (2, 0))]
    for one in orders:
        # A random permutation has about one fixed point, and rank correlation near 0 with order.
        assert (one == at).sum() < 12
        assert abs(np.corrcoef(one, at)[0, 1]) < 0.04
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).sum() < 12


def test_permutation_of_a_trillion_rows_needs_no_table() -> None:
    size = 10**12
    images = Permutation(size, seed=7)(np.arange(size - 1000, size))
    assert len(np.unique(images)) == 1000
    assert images.min() >= 0
    assert images.max() < size


@given(st.integers(1, 97), st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_stream_does_not_depend_on_how_it_is_cut(size: int, cuts: list[int]) -> None:
    order = SampleOrder(size, seed=3)
    whole = order.rows(0, sum(cuts))
    parts, first = [], 0
    for count in cuts:
        parts.append(order.rows(first, count))
        first += count
    assert np.array_equal(np.concatenate(parts), whole)
    for epoch in range(len(whole) // size):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_partition_the_global_batch_in_megatrons_order(size: int) -> None:
    rows = np.arange(16)
    shares = [rank_share(rows, micro_batch_size=2, rank=rank, size=size) for rank in range(size)]
    assert sorted(np.concatenate(shares).ravel().tolist()) == rows.tolist()
    # Micro-batch i of rank r starts at (i * ranks + r) * micro_batch_size.
    for rank, share in enumerate(shares):
        assert share[:, 0].tolist() == [(i * size + rank) * 2 for i in range(len(share))]
