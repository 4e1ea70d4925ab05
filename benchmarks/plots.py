"""Plots as SVG: lines on two logarithmic axes, for how a cost grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 680, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 50
_STYLE = "font-family='sans-serif' font-size='12' fill='#333'"
_COLOURS = ("#1668b8", "#c2410c", "#15803d", "#7e22ce")
_DASHES = ("", "stroke-dasharray='6 4'")


@dataclass(frozen=True)
class Line:
    """One law.  Lines of one `kind` have one colour; those of the other program are dashed."""

    label: str
    kind: int
    other: bool
    points: Sequence[tuple[float, float]]


def plot(title: str, x_label: str, y_label: str, lines: Sequence[Line], x_text: Callable[[float], str]) -> str:
    """The SVG of `lines`; every x that has a point has a mark, written by `x_text`."""
    xs = sorted({x for line in lines for x, _y in line.points})
    ys = [y for line in lines for _x, y in line.points]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place_x(x: float) -> float:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return _LEFT + (right - _LEFT) * math.log(x / xs[0]) / span

    def place_y(y: float) -> float:
        return bottom - (bottom - _TOP) * (math.log10(y) - low) / ((high - low) or 1)

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{_HEIGHT}' viewBox='0 0 {_WIDTH} {_HEIGHT}'>",
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#fff'/>",
        _text(_LEFT, 22, title, "start", bold=True),
        _text((_LEFT + right) / 2, _HEIGHT - 12, x_label, "middle"),
        f"<g transform='translate(16 {(_TOP + bottom) / 2}) rotate(-90)'>{_text(0, 0, y_label, 'middle')}</g>",
    ]
    for exponent in range(low, high + 1):
        y = place_y(10.0**exponent)
        parts.append(f"<line x1='{_LEFT}' y1='{y:.1f}' x2='{right}' y2='{y:.1f}' stroke='#ddd'/>")
        parts.append(_text(_LEFT - 6, y + 4, f"{10.0**exponent:g}", "end"))
    for x in xs:
        parts.append(f"<line x1='{place_x(x):.1f}' y1='{_TOP}' x2='{place_x(x):.1f}' y2='{bottom}' stroke='#eee'/>")
        parts.append(_text(place_x(x), bottom + 16, x_text(x), "middle"))
    for number, line in enumerate(lines):
        stroke = f"stroke='{_COLOURS[line.kind]}' stroke-width='2' {_DASHES[line.other]}"
        points = [(place_x(x), place_y(y)) for x, y in line.points]
        parts.append(f"<polyline fill='none' {stroke} points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in points)}'/>")
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{_COLOURS[line.kind]}'/>" for x, y in points]
        y = _TOP + 12 + 20 * number
        parts.append(f"<line x1='{right + 12}' y1='{y}' x2='{right + 42}' y2='{y}' {stroke}/>")
        parts.append(_text(right + 48, y + 4, line.label, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = " font-weight='bold'" if bold else ""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_STYLE}{weight}>{escape(text)}</text>"
