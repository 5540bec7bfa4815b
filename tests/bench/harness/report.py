"""Rows of results, the targets they are held against, and how both are shown."""

from dataclasses import asdict, dataclass

from .loads import Sample


@dataclass(frozen=True)
class Target:
    """A bound on a ratio to one of the ceilings (`of` is "memory" or "raw") or on the figure itself ("value")."""

    of: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, figure: float) -> bool:
        """Whether the figure keeps the bound."""
        if self.at_least is not None:
            return figure >= self.at_least
        return figure <= self.at_most

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return bound if self.of == "value" else f"{bound} of {self.of}"


@dataclass
class Row:
    """One figure of a workload beside its ceilings, all in the same unit."""

    measure: str
    hypernbd: Sample
    memory: Sample | None = None
    raw: Sample | None = None
    target: Target | None = None
    workload: str = ""
    block_size: int = 0

    def ratio(self, of: str) -> float | None:
        """The figure as a multiple of a ceiling."""
        ceiling = getattr(self, of)
        return self.hypernbd.value / ceiling.value if ceiling and ceiling.value else None

    def met(self) -> bool | None:
        """Whether the target is met; None without a target, or without the ceiling it speaks of."""
        if self.target is None:
            return None
        figure = self.hypernbd.value if self.target.of == "value" else self.ratio(self.target.of)
        return None if figure is None else self.target.met(figure)

    def as_json(self) -> dict:
        """Everything measured, and the ratios and the verdict made of it."""
        ratios = {"ratio_memory": self.ratio("memory"), "ratio_raw": self.ratio("raw")}
        return asdict(self) | ratios | {"target_text": str(self.target or ""), "met": self.met()}


def table(rows: list[Row]) -> str:
    """The rows as text: figures, ratios to both ceilings, latencies, verdicts."""
    head = ["workload", "measure", "block", "hypernbd", "unit", "memory", "ratio", "raw S3", "ratio"]
    head += ["p50 ms", "p99 ms", "worst ms", "target", "verdict"]
    lines = [head]
    for row in rows:
        sample = row.hypernbd
        verdict = {None: "", True: "met", False: "NOT MET"}[row.met()]
        line = [row.workload, row.measure, size_text(row.block_size), _number(sample.value), sample.unit]
        line += [_number(row.memory and row.memory.value), _number(row.ratio("memory"))]
        line += [_number(row.raw and row.raw.value), _number(row.ratio("raw"))]
        line += [_number(sample.p50_ms), _number(sample.p99_ms), _number(sample.worst_ms)]
        lines.append(line + [str(row.target or ""), verdict])
    return _aligned(lines, text_columns={0, 1, 2, 4, 12, 13})


def matrix(rows: list[Row]) -> str:
    """One line a measure and one column a block size, as a Markdown table."""
    sizes = sorted({row.block_size for row in rows})
    measures: dict[tuple, dict[int, str]] = {}
    for row in rows:
        key = (f"{row.workload}: {row.measure}", row.hypernbd.unit)
        measures.setdefault(key, {})[row.block_size] = _number(row.hypernbd.value)
    lines = [["workload", "unit", *map(size_text, sizes)]]
    lines.append(["---", "---", *("---:" for _ in sizes)])
    for (name, unit), values in measures.items():
        lines.append([name, unit, *(values.get(size, "") for size in sizes)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size_text(size_bytes: int) -> str:
    """A block size with its suffix; nothing where the default was taken."""
    if not size_bytes:
        return "default"
    for suffix, unit in (("M", 1 << 20), ("K", 1 << 10)):
        if size_bytes % unit == 0:
            return f"{size_bytes // unit}{suffix}"
    return str(size_bytes)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _aligned(lines: list[list[str]], text_columns: set[int]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = []
    for line in lines:
        cells = [
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)
