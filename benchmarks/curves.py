"""Curves as a small SVG: lines over a common axis, with a legend, readable as text."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

from torchrec_freq.output import write_text

Curve = Sequence[tuple[float, float]]

COLORS: Final = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5")
_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 40, 50


def draw(
    path: Path, title: str, curves: Mapping[str, Curve], x_label: str, y_label: str, mark: float
) -> None:
    """Writes the picture.

    Args:
        curves: name -> points.
        mark: where on the x axis a vertical line stands.
    """
    points = [point for curve in curves.values() for point in curve]
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*points, strict=True))
    step = _round_step((high - low) / 5)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step

    def x(value: float) -> float:
        share = (value - left) / (right - left)
        return float(round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1))

    def y(value: float) -> float:
        share = (value - low) / (high - low)
        return float(round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        parts.append(f'<path d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:.{_digits(step)}f}'
            "</text>"
        )
    across = _round_step((right - left) / 8)
    for number in range(math.ceil(left / across), math.floor(right / across) + 1):
        value = number * across
        parts.append(
            f'<text x="{x(value)}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value:g}'
            "</text>"
        )
    parts.append(
        f'<path d="M{x(mark)} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#888" stroke-dasharray="4 3"/>'
    )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for number, (name, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        # The first is what the others are compared with, and is seen below them.
        pen = f'stroke="{color}" stroke-width="{2 if number else 7}"'
        pen += "" if number else ' stroke-opacity="0.4"'
        line = " ".join(f"{x(a)},{y(b)}" for a, b in curve)
        parts.append(f'<polyline points="{line}" fill="none" {pen}/>')
        at = _TOP + 14 + 18 * number
        parts.append(f'<path d="M{_WIDTH - 300} {at - 4}h24" {pen}/>')
        parts.append(f'<text x="{_WIDTH - 270}" y="{at}">{escape(name)}</text>')
    write_text(path, "\n".join([*parts, "</svg>", ""]))


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= step * (1 - 1e-9))


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(step)))
