"""Small charts as inline SVG: no script, no font, no file beside the page."""

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 34


def line_chart(title: str, xs: Sequence[float], ys: Sequence[float], *, unit: str = "step", smooth: bool = False) -> str:
    """A line through the points; with `smooth` a running mean over it, the points paler."""
    if len(xs) != len(ys) or not xs:
        return f'<figure><figcaption>{html.escape(title)}</figcaption><p class="none">no points</p></figure>'
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    ticks = _ticks(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)
    low, high = ticks[0], ticks[-1]
    x_ticks = [tick for tick in _ticks(min(xs), max(xs)) if min(xs) <= tick <= max(xs)]
    points = [(_x(x, min(xs), max(xs)), _y(y, low, high)) for x, y in zip(xs, ys)]
    lines = [_path(points, "line pale" if smooth else "line")]
    if smooth:
        means = _running_mean(ys, max(3, len(ys) // 12))
        lines.append(_path([(x, _y(mean, low, high)) for (x, _), mean in zip(points, means)], "line"))
    if len(points) == 1:
        lines.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="4"/>')
    grid = [_grid_line(tick, low, high) for tick in ticks]
    grid += [
        f'<text x="{_x(t, min(xs), max(xs)):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(t)}</text>'
        for t in x_ticks
    ]
    axis = f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end" class="axis">{html.escape(unit)}</text>'
    return _figure(title, "".join([*grid, axis, *lines]))


def bar_chart(title: str, labels: Sequence[str], counts: Sequence[int], *, unit: str) -> str:
    """One bar a label, its height the count."""
    if not counts or max(counts) <= 0:
        return f'<figure><figcaption>{html.escape(title)}</figcaption><p class="none">nothing counted</p></figure>'
    ticks = _ticks(0.0, float(max(counts)))
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    every = math.ceil(len(labels) / 10)
    parts = [_grid_line(tick, 0.0, ticks[-1]) for tick in ticks]
    for i, (label, count) in enumerate(zip(labels, counts)):
        x, y = LEFT + i * step, _y(count, 0.0, ticks[-1])
        width = min(step * 0.84, 64.0)
        box = f'x="{x + (step - width) / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
        parts.append(f'<rect {box} rx="2"><title>{html.escape(label)}: {count}</title></rect>')
        if i % every == 0:
            middle = f'x="{x + step / 2:.1f}" y="{HEIGHT - BOTTOM + 18}"'
            parts.append(f'<text {middle} text-anchor="middle">{html.escape(label)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end" class="axis">{html.escape(unit)}</text>')
    return _figure(title, "".join(parts))


def interval_chart(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Rows of (label, low, value, high), all in [0, 1]: a dot with its confidence interval on a common scale."""
    height = 34 * len(rows) + 30
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(tick, 0.0, 1.0)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - 24}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:.0%}</text>')
    for i, (label, low, value, high) in enumerate(rows):
        y = 24 + 34 * i
        ends = f'x1="{_x(low, 0.0, 1.0):.1f}" x2="{_x(high, 0.0, 1.0):.1f}"'
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{html.escape(label)}</text>')
        parts.append(
            f'<line class="interval" {ends} y1="{y}" y2="{y}"/><circle cx="{_x(value, 0.0, 1.0):.1f}" cy="{y}" r="6"/>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="accuracy with its interval">{"".join(parts)}</svg>'


def _figure(title: str, body: str) -> str:
    name = html.escape(title)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{body}</svg>'
    return f"<figure><figcaption>{name}</figcaption>{svg}</figure>"


def _grid_line(tick: float, low: float, high: float) -> str:
    y = _y(tick, low, high)
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    text = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{text}"/>'


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, from at most `low` to at least `high`, about five of them."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """[len(values)] mean of up to `window` values ending at each."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def _number(value: float) -> str:
    if value and abs(value) < 1e-2:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value:,.10g}" if value == int(value) else f"{value:.3g}"
