"""The workloads: one module each, in the order they run.

A module has a docstring whose first line says what it measures, and `run(bench)`, which returns its rows.
"""

NAMES = [
    "seq_write",
    "seq_read",
    "buffered_write",
    "unpublished_read",
    "rand_write",
    "rand_read",
    "write_flush",
    "mixed",
    "worst_stall",
    "publish_stall",
    "copy_in",
    "copy_out",
    "memory_use",
]
