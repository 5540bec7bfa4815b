"""The workloads: one module each, in the order they run.

A module has a docstring whose first line says what it measures, and `run(bench)`, which returns its rows.
"""

NAMES = [
    "seq_write",
    "cold_seq_read",
    "hot_read",
    "cold_read",
    "aged_read",
    "spread_read",
    "reads_under_write",
    "buffered_write",
    "unpublished_read",
    "long_random_write",
    "compaction",
    "write_flush",
    "wal_flush",
    "wal_group",
    "wal_seq_write",
    "discard_used",
    "buffer_file",
    "write_stall",
    "paced_write",
    "mixed",
    "copy_in",
    "transfer",
    "verbs",
    "open_time",
    "filesystem",
    "wal_database",
    "memory_use",
]

# Those where the size of a block matters: they run once for each block size, the others for the first one only.
SWEPT = {
    "seq_write",
    "cold_seq_read",
    "hot_read",
    "cold_read",
    "aged_read",
    "reads_under_write",
    "long_random_write",
    "write_flush",
    "mixed",
    "filesystem",
}
