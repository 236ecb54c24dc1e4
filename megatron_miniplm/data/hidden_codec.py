"""A teacher's final hidden states as bytes: through its output matrix they give all of its logits.

Payload: header (`_HEADER`: bits of a number, hidden width h), then of n positions

    16 bits    bfloat16[n, h]
     8 bits    float32[n] scales, and float8 e4m3[n, h]; a state is its numbers times its scale

The scale of a position puts its largest number at the largest of e4m3 (448).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.movable import Movable
from megatron_miniplm.data.record_store import Record

_HEADER = struct.Struct("<4sHHI")
_MAGIC = b"MPH1"
_LARGEST = 448.0
_NAN = 0x7F  # of float8 e4m3, but for the sign
_TYPES = {16: torch.bfloat16, 8: torch.float8_e4m3fn}


@dataclass(frozen=True)
class HiddenStates(Movable):
    """States as they are stored, of some positions or of a batch; leading axes are any."""

    numbers: torch.Tensor
    """bfloat16[..., h]; of 8 bits, uint8 with the bits of float8 e4m3."""
    scale: torch.Tensor | None = None
    """float32[...] of 8 bits: what the numbers of a position are multiplied with."""

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.numbers)

    def wide(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that they stand for, [..., h]."""
        if self.scale is None:
            return self.numbers.to(dtype)
        numbers = self.numbers.view(torch.float8_e4m3fn).float()
        return numbers.mul_(self.scale[..., None]).to(dtype)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> HiddenStates:
        scale = None if self.scale is None else change(self.scale)
        return HiddenStates(change(self.numbers), scale)


@dataclass(frozen=True, kw_only=True)
class HiddenEncoding:
    """How hidden states become bytes (--what hidden)."""

    hidden_bits: Literal[16, 8] = 16
    """Bits of a number of a hidden state: 16 for bfloat16, 8 for float8 e4m3 and a scale for each
    position."""


def encode_hidden(hidden_nh: torch.Tensor, encoding: HiddenEncoding) -> Record:
    """The states of one instance's trained positions, any float type; refuses what is not finite.

    DataError there: the teacher or its precision is broken.
    """
    hidden_nh = hidden_nh.float().cpu()
    if not bool(hidden_nh.isfinite().all()):
        raise DataError("a hidden state is not finite: look at the teacher and its precision")
    count, width = hidden_nh.shape
    parts = [_HEADER.pack(_MAGIC, encoding.hidden_bits, 0, width)]
    if encoding.hidden_bits == 8:
        scale_n = hidden_nh.abs().amax(1).div(_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        parts.append(scale_n.numpy().tobytes())
        hidden_nh = hidden_nh / scale_n[:, None]
    numbers = hidden_nh.to(_TYPES[encoding.hidden_bits]).contiguous()
    parts.append(numbers.view(torch.uint8).numpy().tobytes())
    return Record(payload=b"".join(parts), num_positions=count, num_values=count * width)


def decode_hidden(payload: bytes | memoryview) -> HiddenStates:
    """Of n positions. DataError: it is no such payload."""
    head = bytes(payload[: _HEADER.size]).ljust(_HEADER.size)
    magic, bits, _, width = _HEADER.unpack(head)
    size = len(payload) - _HEADER.size
    row = width * bits // 8 + (4 if bits == 8 else 0)
    if magic != _MAGIC or bits not in _TYPES or row == 0 or size % row:
        raise DataError(
            f"{len(payload)} bytes that begin with {head.hex()} are no hidden states: read a store "
            "that `cache-logits --what hidden` made"
        )
    count = size // row
    scales = 4 * count if bits == 8 else 0
    # A copy, since a tensor wants memory that may be written.
    raw = np.frombuffer(payload, np.uint8, offset=_HEADER.size + scales).copy()
    numbers_nb = torch.from_numpy(raw.reshape(count, width * bits // 8))
    if bits == 16:
        found = HiddenStates(numbers_nb.view(torch.bfloat16))
        finite = found.numbers.isfinite().all()
    else:
        scale_n = torch.from_numpy(
            np.frombuffer(payload, np.float32, count, offset=_HEADER.size).copy()
        )
        found = HiddenStates(numbers_nb, scale_n)
        finite = scale_n.isfinite().all() & ((numbers_nb & 0x7F) != _NAN).all()
    if not bool(finite):
        raise DataError(
            "a stored hidden state is not finite: another program wrote it, or it is damaged; "
            "cache the hidden states again"
        )
    return found
