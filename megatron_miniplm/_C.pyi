# ruff: noqa: N999
import numpy as np

def text_sizes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]: ...

class RecordReader:
    def __init__(self, text_key: str, domain_key: str | None) -> None: ...
    def read(
        self, block: bytes
    ) -> tuple[list[str], list[str], list[tuple[int, int, bytes]], int, int, int]: ...

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

def tally_rows(
    lengths: np.ndarray,
    *,
    domains: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    num_domains: int = 1,
    longest: int,
) -> tuple[np.ndarray, np.ndarray]: ...

class KeyRows:
    def __init__(
        self,
        count: int,
        *,
        rule: int,
        per_token: bool = True,
        teacher_sum: np.ndarray | None = None,
        teacher_tokens: np.ndarray | None = None,
        reference_sum: np.ndarray | None = None,
        reference_tokens: np.ndarray | None = None,
        keys: np.ndarray | None = None,
        ids: np.ndarray | None = None,
        first_id: int = 0,
        random_state: int = 0,
        eligible_tokens: np.ndarray | None = None,
        least_tokens: int = 0,
        weights: np.ndarray | None = None,
        strata: np.ndarray | None = None,
        drop_behind: bool = False,
    ) -> None: ...

class KeyScan:
    totals: np.ndarray
    histogram: np.ndarray
    mask: np.ndarray
    overflowed: bool
    num_candidates: int
    lowest_kept: float
    def __init__(
        self,
        num_rows: int,
        *,
        low: list[float],
        high: list[float],
        max_candidates: int,
        buckets_log2: int = 0,
    ) -> None: ...
    def add(self, first: int, rows: KeyRows, *, threads: int = 0) -> int: ...
    def choose(
        self, rows: KeyRows, *, threshold: list[float], taken: list[int], budget: list[int]
    ) -> None: ...
    def candidate_histogram(
        self, *, low: list[float], high: list[float], log2: int
    ) -> np.ndarray: ...
    def tie_weights(self, threshold: list[float]) -> list[int]: ...

def key_images(keys: list[float]) -> list[int]: ...
def write_masked_index(
    descriptor: int,
    *,
    lengths: np.ndarray,
    pointers: np.ndarray,
    mask: np.ndarray,
    dtype_code: int,
    bytes_per_token: int,
    bin_bytes: int,
    contiguous: bool = False,
    drop_behind: bool = False,
    threads: int = 0,
) -> tuple[int, int]: ...
def copy_chosen_tokens(
    source: int,
    target: int,
    *,
    lengths: np.ndarray,
    pointers: np.ndarray,
    mask: np.ndarray,
    bytes_per_token: int,
    bin_bytes: int,
    drop_behind: bool = False,
    threads: int = 0,
) -> int: ...
def start_writeback(descriptor: int, offset: int, size: int) -> None: ...
def first_difference(
    *,
    lengths: np.ndarray,
    pointers: np.ndarray,
    tokens: np.ndarray,
    first: int,
    other_lengths: np.ndarray,
    other_pointers: np.ndarray,
    other_tokens: np.ndarray,
    other_rows: np.ndarray,
    bytes_per_token: int,
) -> int: ...

KD_RECORD_FLOATS: int

def kd_variants() -> list[str]: ...
def kd_run(
    *,
    steps: str,
    variant: str,
    form: str,
    beta: float,
    z_loss: float,
    student: int,
    student_stride: int,
    student_bf16: bool,
    teacher: int,
    teacher_stride: int,
    teacher_bf16: bool,
    rows: int,
    width: int,
    valid: int,
    first: int,
    labels: int,
    kd_weight: int,
    ce_weight: int,
    student_scale: int,
    teacher_scale: int,
    records: int,
    inners: int,
    threads: int,
) -> None: ...

SPARSE_KD_RECORD_FLOATS: int

def sparse_kd_run(
    *,
    steps: str,
    variant: str,
    form: str,
    z_loss: float,
    student: int,
    student_stride: int,
    student_bf16: bool,
    rows: int,
    width: int,
    valid: int,
    first: int,
    labels: int,
    kd_weight: int,
    ce_weight: int,
    student_scale: int,
    entries: int,
    ids: int,
    weights: int,
    tail: int,
    records: int,
    threads: int,
) -> None: ...
def encode_logits(
    counts: np.ndarray, ids: np.ndarray, log_probs: np.ndarray, *, vocab: int, bits: int
) -> bytes: ...
def decode_logits(
    data: bytes | memoryview, *, positions: int, entries: int, vocab: int, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
