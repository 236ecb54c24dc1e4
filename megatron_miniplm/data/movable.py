"""What a loader's thread makes and a device uses: tensors that travel together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch


class Movable(ABC):
    """A few tensors of one micro-batch."""

    def to(self, device: torch.device) -> Self:
        """The same on another device; from pinned memory, without waiting for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """The same in pinned memory, from where a GPU fetches it."""
        return self._each(torch.Tensor.pin_memory)

    @abstractmethod
    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same of changed tensors."""
