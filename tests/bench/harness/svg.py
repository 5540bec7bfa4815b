"""One picture a workload: bars of Hypernbd, the ceilings and the bound; below them what was recorded over time."""

from dataclasses import dataclass, field
from html import escape

from .loads import Series
from .report import Row, number, size_text

WIDTH = 900
LABELS = 190  # width of the labels on the left
FIGURES = 90  # width of the figures on the right
BAR = 18
GRAPH_HEIGHT = 150
POINTS_MAX = 600
CUT = 3  # a ceiling this many times as high as everything else is drawn cut
COLOURS = {"met": "#2b8a3e", "missed": "#c92a2a", "plain": "#1c7ed6", "ceiling": "#adb5bd", "bound": "#212529"}


@dataclass
class Canvas:
    """Elements from the top down; `y` is where the next one begins."""

    y: int = 0
    elements: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, size: int = 12, anchor: str = "start", weight: str = "normal"):
        """Words at a place; `anchor` says which end of them is there."""
        attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
        self.elements.append(f"<text {attributes}>{escape(words)}</text>")

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "none"):
        """A straight line."""
        place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.elements.append(f'<line {place} stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dashes}"/>')

    def document(self) -> str:
        """The whole picture."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.y + 10}"'
        head += f' viewBox="0 0 {WIDTH} {self.y + 10}" font-family="sans-serif">'
        background = '<rect width="100%" height="100%" fill="white"/>'
        return "\n".join([head, background, *self.elements, "</svg>", ""])


@dataclass(frozen=True)
class Bar:
    """One bar of a panel, and the bound it is held against, in the same unit."""

    label: str
    value: float
    colour: str
    bound: float | None = None
    ceiling: bool = False


def picture(title: str, rows: list[Row]) -> str:
    """The picture of one workload as SVG: a panel of bars for each measure, a graph for each row with series."""
    canvas = Canvas(30)
    canvas.text(10, 22, title, size=16, weight="bold")
    measures: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        measures.setdefault((row.measure, row.hypernbd.unit), []).append(row)
    for (measure, unit), group in measures.items():
        bounds = sorted({f"bound {row.target}" for row in group if row.bound() is not None})
        _bars(canvas, "; ".join([f"{measure} ({unit})", *bounds]), bars(group))
    for row in rows:
        if any(series.points for series in row.series):
            _graph(canvas, f"{row.name()}, block {size_text(row.block_size)}", row.series)
    return canvas.document()


def bars(rows: list[Row]) -> list[Bar]:
    """The bars of one measure: each row, then each ceiling once where all rows have the same one."""

    def label(row: Row) -> str:
        block = f"block {size_text(row.block_size)}"
        several_blocks = len({other.block_size for other in rows}) > 1
        return ", ".join(part for part in (row.variant, block if several_blocks or not row.variant else "") if part)

    chosen = []
    for row in rows:
        colour = COLOURS[{None: "plain", True: "met", False: "missed"}[row.met()]]
        chosen.append(Bar(label(row), row.hypernbd.value, colour, row.bound()))
    for key, name in (("raw", "raw S3"), ("memory", "memory")):
        ceilings = {}
        for row in rows:
            ceiling = getattr(row, key)
            if ceiling:
                ceilings.setdefault((row.variant, ceiling.value), row)
        for (variant, value), row in ceilings.items():
            several = [one for one, _ in ceilings].count(variant) > 1
            of = label(row) if several else variant
            chosen.append(Bar(f"{name}, {of}" if of else name, value, COLOURS["ceiling"], ceiling=True))
    return chosen


def thinned(points: list[tuple[float, float]], most: int = POINTS_MAX) -> list[tuple[float, float]]:
    """At most `most` points: of neighbours the highest stays, so that no peak is lost."""
    share = -(-len(points) // most) or 1
    return [max(points[start : start + share], key=lambda point: point[1]) for start in range(0, len(points), share)]


def scale(chosen: list[Bar]) -> float:
    """The value whose bar takes all the room. Ceilings far above all else do not count: they are drawn cut."""
    ours = max([bar.value for bar in chosen if not bar.ceiling] + [bar.bound or 0 for bar in chosen])
    return max([ours] + [bar.value for bar in chosen if bar.ceiling and bar.value <= CUT * ours]) or 1


def _bars(canvas: Canvas, title: str, chosen: list[Bar]) -> None:
    canvas.text(10, canvas.y + 18, title, weight="bold")
    canvas.y += 28
    most = scale(chosen)
    room = WIDTH - LABELS - FIGURES
    for bar in chosen:
        middle = canvas.y + BAR - 5
        canvas.text(LABELS - 8, middle, bar.label, anchor="end")
        length = min(max(0.0, bar.value) / most, 1) * room
        place = f'x="{LABELS}" y="{canvas.y}" width="{length:.1f}" height="{BAR - 4}"'
        canvas.elements.append(f'<rect {place} fill="{bar.colour}"/>')
        if bar.value > most:
            cut = LABELS + length * 0.95
            canvas.elements.append(f'<rect x="{cut:.1f}" y="{canvas.y}" width="6" height="{BAR - 4}" fill="white"/>')
        canvas.text(LABELS + length + 6, middle, number(bar.value))
        if bar.bound is not None:
            x = LABELS + bar.bound / most * room
            canvas.line(x, canvas.y - 2, x, canvas.y + BAR - 2, COLOURS["bound"], "4 2")
        canvas.y += BAR
    canvas.y += 8


def _graph(canvas: Canvas, title: str, recorded: list[Series]) -> None:
    recorded = [series for series in recorded if series.points]
    canvas.text(10, canvas.y + 18, f"{title}, over time", weight="bold")
    top, bottom = canvas.y + 30, canvas.y + 30 + GRAPH_HEIGHT
    points = [point for series in recorded for point in series.points]
    end_s, most = max(at_s for at_s, _ in points) or 1, max(value for _, value in points) or 1
    room = WIDTH - LABELS - FIGURES
    canvas.line(LABELS, bottom, LABELS + room, bottom, "#495057")
    canvas.line(LABELS, top, LABELS, bottom, "#495057")
    canvas.text(LABELS - 8, top + 10, f"{number(most)} {recorded[0].unit}", anchor="end")
    canvas.text(LABELS - 8, bottom, "0", anchor="end")
    canvas.text(LABELS + room, bottom + 14, f"{number(end_s)} s", anchor="end")
    for order, series in enumerate(recorded):
        colour = [COLOURS["plain"], COLOURS["missed"], COLOURS["met"]][order % 3]
        places = (
            f"{LABELS + at_s / end_s * room:.1f},{bottom - max(0.0, value) / most * GRAPH_HEIGHT:.1f}"
            for at_s, value in thinned(series.points)
        )
        line = f'<polyline fill="none" stroke="{colour}" stroke-width="1.2" points="{" ".join(places)}"/>'
        canvas.elements.append(line)
        legend = LABELS + 160 * order
        canvas.line(legend, bottom + 10, legend + 6, bottom + 10, colour)
        canvas.text(legend + 10, bottom + 14, series.name)
    canvas.y = bottom + 24
