"""Hidden states to bytes and back, in the digits that each form has."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.hidden_codec import HiddenEncoding, decode_hidden, encode_hidden
from megatron_miniplm.teachers.hidden_states import spread

# Largest rounding error relative to a number: half a unit of 8 and of 4 significant bits.
ROUNDING = {16: 2.0**-8, 8: 2.0**-4}


@pytest.mark.parametrize("bits", [16, 8])
def test_a_round_trip_only_rounds(bits: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 40) * torch.logspace(-6, 4, 9)[:, None]
    hidden[3] = 0
    record = encode_hidden(hidden, HiddenEncoding(hidden_bits=bits))
    found = decode_hidden(record.payload).wide(torch.float32)
    # Of numbers that e4m3 holds with all its bits: not below 2^-6 of 448 at the largest.
    normal = hidden.abs() >= hidden.abs().amax(1, keepdim=True) * 2**-6 / 448
    error = ((found - hidden).abs() / hidden.abs().clamp_min(1e-30))[normal & (hidden != 0)]
    assert error.max() <= ROUNDING[bits]
    assert not found[3].any()
    assert (record.num_positions, record.num_values) == (9, 360)
    assert len(record.payload) <= 12 + 9 * (40 * bits // 8 + 4)


def test_an_instance_without_positions_is_empty() -> None:
    record = encode_hidden(torch.zeros(0, 8), HiddenEncoding())
    assert decode_hidden(record.payload).numbers.shape == (0, 8)


@pytest.mark.parametrize("bits", [16, 8])
def test_states_lie_where_the_batch_trains_and_go_as_they_are_stored(bits: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 8)
    encoding = HiddenEncoding(hidden_bits=bits)
    row, none, empty = (
        decode_hidden(encode_hidden(each, encoding).payload)
        for each in (hidden, hidden[:0], hidden[:0])
    )
    trained = torch.zeros(3, 5, dtype=torch.bool)
    trained[1, [0, 2, 3]] = True
    found = spread(trained, [none, row, None], like=empty)
    assert found.numbers.dtype == (torch.bfloat16 if bits == 16 else torch.uint8)
    assert torch.equal(found.wide(torch.float32)[trained], row.wide(torch.float32))
    assert not found.wide(torch.float32)[~trained].any()
    with pytest.raises(DataError, match=r"row 1 of the batch trains 3 positions, but .* of 0"):
        spread(trained, [none, none, None], like=empty)
    padding = torch.zeros_like(trained)
    assert spread(padding, [None] * 3, like=empty).wide(torch.float32).shape == (3, 5, 8)


@pytest.mark.parametrize("damage", [b"", b"MPH1", b"MPH1" + bytes(8), b"XXXX\x10\0\0\0\4\0\0\0"])
def test_other_bytes_are_refused(damage: bytes) -> None:
    with pytest.raises(DataError, match="are no hidden states"):
        decode_hidden(damage)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        encode_hidden(torch.tensor([[1.0, torch.inf]]), HiddenEncoding())


@pytest.mark.parametrize(("bits", "broken"), [(16, b"\xc0\x7f"), (8, b"\x7f"), (8, b"\xff")])
def test_stored_numbers_that_are_not_finite_are_refused(bits: int, broken: bytes) -> None:
    payload = encode_hidden(torch.randn(3, 4), HiddenEncoding(hidden_bits=bits)).payload
    with pytest.raises(DataError, match="not finite"):
        decode_hidden(payload[: -len(broken)] + broken)
