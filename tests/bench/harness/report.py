"""Rows of results, the targets they are held against, and how both are shown."""

from dataclasses import asdict, dataclass, field

from .cost import Cost
from .loads import Sample, Series

VERDICTS = {None: "", True: "PASS", False: "MISS"}


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

    def bound(self) -> float:
        """The bound itself, whichever way it holds."""
        return self.at_least if self.at_least is not None else self.at_most

    def __str__(self) -> str:
        bound = f"{'<=' if self.at_least is None else '>='} {self.bound():g}"
        return bound if self.of == "value" else f"{bound} of {self.of}"


@dataclass
class Row:
    """One figure of a workload beside its ceilings, all in the same unit, and what the load behind it cost.

    Rows of one measure differ by their `variant`, a size or a step, and by their block size.
    """

    measure: str
    hypernbd: Sample
    memory: Sample | None = None
    raw: Sample | None = None
    target: Target | None = None
    cost: Cost | None = None
    series: list[Series] = field(default_factory=list)
    variant: str = ""
    workload: str = ""
    block_size: int = 0

    def name(self) -> str:
        """The measure and its variant."""
        return f"{self.measure}, {self.variant}" if self.variant else self.measure

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

    def bound(self) -> float | None:
        """The target in the unit of the figure; None without a target, or without the ceiling it speaks of."""
        if self.target is None:
            return None
        if self.target.of == "value":
            return self.target.bound()
        ceiling = getattr(self, self.target.of)
        return self.target.bound() * ceiling.value if ceiling else None

    def as_json(self) -> dict:
        """Everything measured, and the ratios and the verdict made of it."""
        content = asdict(self) | {"ratio_memory": self.ratio("memory"), "ratio_raw": self.ratio("raw")}
        content |= {"target_text": str(self.target or ""), "met": self.met(), "verdict": VERDICTS[self.met()]}
        if self.cost:
            content["cost"] |= {
                "requests_per_mb": self.cost.requests_per_mb(),
                "bytes_per_user_byte": self.cost.bytes_per_user_byte(),
            }
        return content


def table(rows: list[Row]) -> str:
    """The rows as text: figures, ratios to both ceilings, latencies, verdicts."""
    head = ["workload", "measure", "block", "hypernbd", "unit", "memory", "ratio", "raw S3", "ratio"]
    head += ["p50 ms", "p99 ms", "worst ms", "target", "verdict"]
    lines = [head]
    for row in rows:
        sample = row.hypernbd
        line = [row.workload, row.name(), size_text(row.block_size), number(sample.value), sample.unit]
        line += [number(row.memory and row.memory.value), number(row.ratio("memory"))]
        line += [number(row.raw and row.raw.value), number(row.ratio("raw"))]
        line += [number(sample.p50_ms), number(sample.p99_ms), number(sample.worst_ms)]
        lines.append(line + [str(row.target or ""), VERDICTS[row.met()]])
    return _aligned(lines, text_columns={0, 1, 2, 4, 12, 13})


def costs(rows: list[Row]) -> str:
    """What the loads cost, as text: S3 requests, bytes on the line, memory. One line a load, whatever its figures."""
    lines = [["workload", "measure", "block", "S3 requests", "a user MB", "bytes a user byte", "peak MiB", "by kind"]]
    shown = set()
    for row in rows:
        if row.cost is None or id(row.cost) in shown:
            continue
        shown.add(id(row.cost))
        cost, traffic = row.cost, row.cost.traffic
        kinds = sorted(traffic.requests.items(), key=lambda item: -item[1]) if traffic else []
        line = [row.workload, row.name(), size_text(row.block_size), str(traffic.count()) if traffic else ""]
        line += [number(cost.requests_per_mb()), number(cost.bytes_per_user_byte())]
        line += [number(cost.peak_rss_bytes / (1 << 20)), ", ".join(f"{kind} {count}" for kind, count in kinds)]
        lines.append(line)
    return _aligned(lines, text_columns={0, 1, 2, 7}) if shown else ""


def verdicts(rows: list[Row]) -> str:
    """How many bounds are kept, and which are not."""
    bound = [row for row in rows if row.met() is not None]
    missed = [row for row in bound if not row.met()]
    lines = [f"{len(bound) - len(missed)} of {len(bound)} bounds kept"]
    for row in missed:
        ratio = row.hypernbd.value if row.target.of == "value" else row.ratio(row.target.of)
        block = size_text(row.block_size)
        lines.append(f"MISS {row.workload}, block {block}: {row.name()}: {number(ratio)}, bound {row.target}")
    return "\n".join(lines)


def matrix(rows: list[Row]) -> str:
    """One line a measure and one column a block size, as a Markdown table."""
    sizes = sorted({row.block_size for row in rows})
    measures: dict[tuple, dict[int, str]] = {}
    for row in rows:
        key = (f"{row.workload}: {row.name()}", row.hypernbd.unit)
        measures.setdefault(key, {})[row.block_size] = number(row.hypernbd.value)
    lines = [["workload", "unit", *map(size_text, sizes)]]
    lines.append(["---", "---", *("---:" for _ in sizes)])
    for (name, unit), values in measures.items():
        if len(values) > 1:
            lines.append([name, unit, *(values.get(size, "") for size in sizes)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size_text(size_bytes: int) -> str:
    """A block size with its suffix; `default` where the default was taken."""
    if not size_bytes:
        return "default"
    for suffix, unit in (("M", 1 << 20), ("K", 1 << 10)):
        if size_bytes % unit == 0:
            return f"{size_bytes // unit}{suffix}"
    return str(size_bytes)


def number(value: float | None) -> str:
    """A figure with about three digits; nothing for none."""
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
