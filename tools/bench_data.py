"""The suite ``data``: text to instances, instances to a chosen subset."""

from __future__ import annotations

from bench_adopt import adopt
from bench_core import Suite
from bench_preprocess import identical_ids, pack, preprocess, preprocess_memory
from bench_rows import materialize, miniplm_loop, view_index
from bench_selection import select, select_billion

SUITE = Suite(
    "data",
    {
        "preprocess": preprocess,
        "preprocess-memory": preprocess_memory,
        "identical-ids": identical_ids,
        "pack": pack,
        "select": select,
        "select-billion": select_billion,
        "view-index": view_index,
        "materialize": materialize,
        "miniplm-loop": miniplm_loop,
        "adopt": adopt,
    },
)
