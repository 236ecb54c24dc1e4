"""SplitMix64's finaliser: the one mixer behind shuffles and draws that hash a row or an id.

z ^= z >> 30;  z *= BF58476D1CE4E5B9;  z ^= z >> 27;  z *= 94D049BB133111EB;  z ^= z >> 31
"""

from __future__ import annotations

import numpy as np


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection in which every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
