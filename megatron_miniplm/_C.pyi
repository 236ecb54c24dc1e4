# ruff: noqa: N999
import numpy as np

def write_view_index(
    descriptor: int,
    *,
    lengths: np.ndarray,
    pointers: np.ndarray,
    rows: np.ndarray,
    dtype_code: int,
    bytes_per_token: int,
    bin_bytes: int,
) -> int: ...
