"""Charts as SVG, whose colours are the page's, and colours of cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT, LEFT, RIGHT, TOP = 460, 250, 44, 14, 10  # pixels
LETTER = 6.4  # pixels of a letter at most, on average
KINDS = 6  # colours of series


@dataclass(frozen=True)
class Series:
    """A line: `values` at the positions 0, 1, ..., with the ends of their intervals, if any; NaN is a gap."""

    name: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def interval(self, position: int) -> tuple[float, float] | None:
        """Its ends, if they are known."""
        if self.low is None or self.high is None or np.isnan(self.low[position]):
            return None
        return self.low[position], self.high[position]


def line_chart(
    series: Sequence[Series],
    ticks: Sequence[str],
    title: str,
    *,
    chance: float | None = None,
    band: tuple[float, float] | None = None,
    start: float | None = None,
) -> Markup:
    """Lines with intervals over named positions.

    Parameters
    ----------
    series : sequence of Series
    ticks : sequence of str
        Names of the positions.
    title : str
    chance : float, optional
        Where a dashed line is drawn.
    band : tuple of float, optional
        A range of y with a shade.
    start : float, optional
        What the y axis begins at, at most.

    Returns
    -------
    Markup

    Examples
    --------
    >>> "<svg" in line_chart([Series("a", [0.1, 0.4])], ["conv1", "conv2"], "NH")
    True
    """
    values = [v for one in series for part in (one.values, one.low, one.high) if part is not None for v in part]
    values += [v for v in (chance, start, *(band or ())) if v is not None]
    low, high, marks = _range(values)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(ticks))
    names, slanted = _ticks(ticks, step)
    below = 24 if not slanted else 20 + 0.72 * LETTER * max(map(len, names))
    bottom = HEIGHT - TOP

    def x(position: float, number: int) -> float:
        spread = min(14.0, 0.5 * step / max(1, len(series)))
        return LEFT + step * (position + 0.5) + spread * (number - (len(series) - 1) / 2)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - TOP)

    parts = []
    if band is not None:
        parts.append(
            f'<rect class="band" x="{LEFT}" y="{y(band[1]):.1f}" width="{WIDTH - LEFT - RIGHT}" '
            f'height="{y(band[0]) - y(band[1]):.1f}"/>'
        )
    for mark in marks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    if chance is not None:
        parts.append(
            f'<line class="chance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(chance):.1f}" y2="{y(chance):.1f}"/>'
        )
    for position, name in enumerate(names):
        place = LEFT + step * (position + 0.5)
        turn = f' transform="rotate(-40 {place:.1f} {bottom + 14})"' if slanted else ""
        anchor = "end" if slanted else "middle"
        parts.append(f'<text x="{place:.1f}" y="{bottom + 14}" text-anchor="{anchor}"{turn}>{escape(name)}</text>')
    for number, one in enumerate(series):
        parts.append(_line(one, number, ticks, partial(x, number=number), y))
    beyond = [_reach(name) - LEFT - step * (i + 0.5) for i, name in enumerate(names)] if slanted else []
    picture = _svg(title, series, parts, bottom + below, left=max([0.0, *beyond]))
    return Markup("<h3>{}</h3>").format(title) + picture + (_legend(series) if len(series) > 1 else Markup(""))


def _line(
    one: Series, number: int, ticks: Sequence[str], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    """One series: its line, interrupted where nothing is known, its intervals, its points."""
    parts, path = [], ""
    for position, value in enumerate(one.values):
        if value != value:
            path += " "
            continue
        path += f"{'L' if path and not path.endswith(' ') else 'M'}{x(position):.1f} {y(value):.1f}"
    parts.append(f'<path class="line" d="{path.strip()}"/>')
    for position, value in enumerate(one.values):
        if value != value:
            continue
        place, ends = x(position), one.interval(position)
        if ends is not None:
            parts.append(f'<path class="whisker" d="M{place:.1f} {y(ends[0]):.1f}V{y(ends[1]):.1f}"/>')
        parts.append(_dot(place, y(value), f"{one.name}, {ticks[position]}: {_said(value, ends)}"))
    return f'<g class="s{number % KINDS}">{"".join(parts)}</g>'


def _said(value: float, ends: tuple[float, float] | None) -> str:
    return f"{value:.3f}" if ends is None else f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def _dot(x: float, y: float, said: str, kind: str = "dot", *, r: int = 4) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"><title>{escape(said)}</title></circle>'


def interval_chart(one: Series, names: Sequence[str], title: str, *, marked: Sequence[bool] | None = None) -> Markup:
    """Values with intervals, one below the other; those `marked` in the first colour, the others in the second.

    >>> "conv2" in interval_chart(Series("NH", [0.1, 0.4], [0.0, 0.3], [0.2, 0.5]), ["conv1", "conv2"], "NH")
    True
    """
    texts = [_short(name, 34) for name in names]
    left = 16 + LETTER * max(map(len, texts))
    width, row = max(WIDTH, left + 240), 19
    values = [v for part in (one.values, one.low, one.high) if part is not None for v in part]
    low, high, marks = _range(values)
    bottom = TOP + row * len(names)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - RIGHT)

    parts = []
    for mark in marks:
        parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(mark):.1f}" y="{bottom + 14}" text-anchor="middle">{mark:g}</text>')
    for number, (name, text, value) in enumerate(zip(names, texts, one.values, strict=True)):
        place = TOP + row * (number + 0.5)
        parts.append(
            f'<text x="{left - 8:.1f}" y="{place + 4:.1f}" text-anchor="end">{escape(text)}'
            f"<title>{escape(name)}</title></text>"
        )
        if value != value:
            continue
        ends, colour = one.interval(number), 0 if marked is None or marked[number] else 1
        if ends is not None:
            parts.append(f'<path class="whisker s{colour}" d="M{x(ends[0]):.1f} {place:.1f}H{x(ends[1]):.1f}"/>')
        parts.append(_dot(x(value), place, f"{name}: {_said(value, ends)}", f"dot s{colour}"))
    return Markup("<h3>{}</h3>").format(title) + _svg(title, [one], parts, bottom + 24, width=width)


def scatter_chart(
    x: Sequence[float],
    y: Sequence[float],
    names: Sequence[str],
    title: str,
    *,
    across: str,
    best: Sequence[bool],
    zero: bool = True,
) -> Markup:
    """Numbered points; those that no other is better than in both ways, cheaper and higher, in the first colour.

    With `zero` the axis across begins at 0.

    >>> "2: b" in scatter_chart([1, 2], [0.1, 0.4], ["a", "b"], "NH", across="GMAC", best=[True, True])
    True
    """
    (low_x, high_x, marks_x), (low_y, high_y, marks_y) = _range([0.0, *x] if zero else x), _range(y)
    bottom = HEIGHT - TOP

    def place(i: int) -> tuple[float, float]:
        across_ = LEFT + (x[i] - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across_, bottom - (y[i] - low_y) / (high_y - low_y) * (bottom - TOP)

    parts = []
    for mark in marks_y:
        at = bottom - (mark - low_y) / (high_y - low_y) * (bottom - TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for mark in marks_x:
        at = LEFT + (mark - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{mark:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 30}" text-anchor="middle">{escape(across)}</text>'
    )
    taken: list[tuple[float, float]] = []
    for i, name in enumerate(names):
        left, top = place(i)
        said = f"{i + 1}: {name}, {x[i]:.3g} {across}, {y[i]:.3f}"
        parts.append(_dot(left, top, said, f"dot s{0 if best[i] else 1}", r=5))
        free = next((at for at in _beside(left, top) if _is_free(at, taken)), None)
        if free is not None:
            taken.append(free)
            parts.append(f'<text x="{free[0]:.1f}" y="{free[1]:.1f}" text-anchor="middle">{i + 1}</text>')
    return Markup("<h3>{}</h3>").format(title) + _svg(title, [], parts, bottom + 36)


def _beside(left: float, top: float) -> list[tuple[float, float]]:
    places = [(left, top - 9), (left, top + 17), (left + 14, top + 4), (left - 14, top + 4)]
    return [(min(max(a, LEFT), WIDTH - 8), max(b, 10)) for a, b in places]


def _is_free(at: tuple[float, float], taken: Sequence[tuple[float, float]]) -> bool:
    return all(abs(at[0] - a) > 15 or abs(at[1] - b) > 12 for a, b in taken)


def _range(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends of an axis and its marks."""
    known = [v for v in values if np.isfinite(v)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if high - low < 1e-9:
        low, high = low - 0.05, high + 0.05
    marks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return float(marks[0]), float(marks[-1]), [float(round(mark, 10)) + 0.0 for mark in marks]


def _ticks(names: Sequence[str], room: float) -> tuple[list[str], bool]:
    """Names below an axis: level where they fit, else slanted and short, and of very many some."""
    if all(LETTER * len(name) <= room for name in names):
        return list(names), False
    every = max(1, int(np.ceil(14 / room)))
    return [_short(name, 20) if i % every == 0 else "" for i, name in enumerate(names)], True


def _reach(name: str) -> float:
    """How far a slanted name reaches to the left of its end."""
    return 4 + 0.77 * LETTER * len(name)


def _short(text: str, most: int) -> str:
    """Text of at most so many letters: what is too much in its middle becomes "…".

    >>> _short("features.denseblock1.conv2", 12)
    'featur…conv2'
    """
    return text if len(text) <= most else text[: most // 2] + "…" + text[len(text) - (most - 1) // 2 :]


def _svg(
    title: str,
    series: Sequence[Series],
    parts: Sequence[str],
    height: float,
    *,
    width: float = WIDTH,
    left: float = 0.0,
) -> Markup:
    names = ", ".join(one.name for one in series)
    label = f"{title}: {names}" if names else title
    box = f"{-left:.0f} 0 {width + left:.0f} {height:.0f}"
    return Markup(f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def _legend(series: Sequence[Series]) -> Markup:
    entries = [
        Markup('<span class="s{}"><b>{}</b></span>').format(number % KINDS, one.name)
        for number, one in enumerate(series)
    ]
    return Markup('<div class="legend">{}</div>').format(Markup("").join(entries))


def shade(value: float, low: float, high: float) -> tuple[str, str]:
    """Colours of a cell and of its text: white at `low` to blue at `high`; of signs blue to red, white at 0.

    >>> shade(0.0, -1.0, 1.0), shade(1.0, 0.0, 1.0)
    (('#ffffff', '#000000'), ('#0b4f94', '#ffffff'))
    """
    blue, red = np.array([11, 79, 148]), np.array([178, 58, 20])
    share = value / max(-low, high) if low < 0 else (value - low) / max(high - low, 1e-12)
    end = red if low < 0 <= share else blue
    colour = 255 + (end - 255) * min(1.0, abs(share))
    channels = colour / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    bright = float(linear @ [0.2126, 0.7152, 0.0722])  # of WCAG 2: black has more contrast from 0.179 on
    return "#" + "".join(f"{round(v):02x}" for v in colour), "#000000" if bright > 0.179 else "#ffffff"
