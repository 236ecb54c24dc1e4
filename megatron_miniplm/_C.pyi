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

class Packer:
    def __init__(
        self,
        *,
        flags: np.ndarray,
        byte_lengths: np.ndarray,
        eod_id: int,
        seq_length: int,
        max_chunks: int,
        bytes_per_token: int,
        append_eod: bool,
        flush_tails: bool,
        keep_tokens: bool,
    ) -> None: ...
    def add(
        self, ids: np.ndarray, offsets: np.ndarray, domains: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
    def counters(self) -> dict[str, int]: ...
    def domain_counters(self) -> list[dict[str, int]]: ...
