"""Curves as SVG, both axes logarithmic: no library, no fonts, readable on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 860, 500
LEFT, RIGHT, TOP, BOTTOM = 84, 240, 52, 62
COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#b1399e", "#8c6d31", "#666666")
INK, GRID = "#24292f", "#d0d7de"


class Curve(NamedTuple):
    """``high``: a second value for each x, drawn as a band above (p50 and p99)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    high: Sequence[float] = ()


class Line(NamedTuple):
    """A bound, drawn straight across."""

    name: str
    y: float


def draw(title: str, x_title: str, y_title: str, curves: Sequence[Curve], lines: Sequence[Line] = ()) -> str:
    """The SVG. Values must be positive."""
    xs = [value for curve in curves for value in curve.x]
    ys = [value for curve in curves for value in (*curve.y, *curve.high)] + [line.y for line in lines]
    left, right = _decade(min(xs), math.floor), _decade(max(xs), math.ceil)
    bottom, top = _decade(min(ys), math.floor), _decade(max(ys), math.ceil)
    top = top if top > bottom else bottom + 1
    right = right if right > left else left + 1

    def place_x(value: float) -> float:
        return LEFT + (math.log10(value) - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(value) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="28" font-size="16" font-weight="bold">{escape(title)}</text>',
    ]
    for power in range(left, right + 1):
        x = place_x(10**power)
        parts.append(_rule(x, TOP, x, HEIGHT - BOTTOM))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{_plain(10**power)}</text>')
    for power in range(bottom, top + 1):
        y = place_y(10**power)
        parts.append(_rule(LEFT, y, WIDTH - RIGHT, y))
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{_plain(10**power)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_title)}</text>')
    upright = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="20" y="{upright:.0f}" text-anchor="middle" transform="rotate(-90 20 {upright:.0f})">'
        f"{escape(y_title)}</text>"
    )
    ends: list[tuple[float, str, str]] = []
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        points = [(place_x(x), place_y(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        if curve.high:
            above = [(place_x(x), place_y(y)) for x, y in zip(curve.x, curve.high, strict=True)]
            band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*points, *reversed(above)])
            parts.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.18"/>')
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colour}"/>' for x, y in points]
        ends.append((points[-1][1], curve.name, colour))
    for line in lines:
        y = place_y(line.y)
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{INK}" stroke-dasharray="5 4"/>'
        )
        ends.append((y, line.name, INK))
    parts += _names(ends)
    return "\n".join([*parts, "</svg>\n"])


def _names(ends: list[tuple[float, str, str]]) -> list[str]:
    """Each name beside its curve's end, moved apart where they would cover each other."""
    parts: list[str] = []
    lowest = -math.inf
    for y, name, colour in sorted(ends):
        at = max(y, lowest + 17)
        lowest = at
        x = WIDTH - RIGHT + 12
        parts.append(f'<text x="{x}" y="{at + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    return parts


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GRID}"/>'


def _decade(value: float, to: object) -> int:
    return int(to(math.log10(value) + (1e-9 if to is math.floor else -1e-9)))  # type: ignore[operator]


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
