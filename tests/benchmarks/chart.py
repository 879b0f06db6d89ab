"""The ratios as a picture: SVG, drawn from the figures of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final
from xml.etree import ElementTree

from .report import Circumstances
from .timing import Result

WIDTH: Final = 860
LEFT: Final = 420
"""Where the bars begin, in pixels, right of their words."""
RIGHT: Final = 60
ROW: Final = 22
TOP: Final = 64

LEAST: Final = 0.001
MOST: Final = 100.0
"""The scale is logarithmic: it has room from a thousandth to a hundred times."""

MOUNT: Final = "#2b6cb0"
MIRROR: Final = "#2f855a"
INK: Final = "#333333"
FAINT: Final = "#bbbbbb"


def draw(circumstances: Circumstances, results: Sequence[Result]) -> str:
    """A picture of the ratios that have a target: shorter is faster."""
    rows = [result for result in results if result.comparison.target is not None]
    height = TOP + ROW * len(rows) + 40
    svg = ElementTree.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        width=str(WIDTH),
        height=str(height),
    )
    svg.set("font-family", "sans-serif")
    svg.set("font-size", "12")
    ElementTree.SubElement(svg, "rect", width="100%", height="100%", fill="white")
    _text(svg, 12, 22, "Time of xsfs as a multiple of what it is measured against", size=15)
    _text(
        svg,
        12,
        42,
        f"{circumstances.kind} daemon, {circumstances.nodes} nodes, medians of "
        f"{circumstances.rounds} rounds; blue: the mount, green: the mirror; the mark: the target",
    )
    bottom = TOP + ROW * len(rows)
    for power in range(round(math.log10(LEAST)), round(math.log10(MOST)) + 1):
        x = _x(10.0**power)
        color = INK if power == 0 else FAINT
        _line(svg, x, TOP - 8, x, bottom, color)
        _text(svg, x, bottom + 16, f"{10.0**power:g}", anchor="middle")
    for number, result in enumerate(rows):
        _row(svg, TOP + ROW * number, result)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _row(svg: ElementTree.Element, y: float, result: Result) -> None:
    comparison = result.comparison
    color = MIRROR if comparison.work.startswith("mirror") else MOUNT
    words = f"{comparison.work} / {comparison.theirs.name}"
    _text(svg, LEFT - 8, y + 13, words, anchor="end")
    end = _x(result.ratio)
    ElementTree.SubElement(
        *(svg, "rect"),
        x=str(LEFT),
        y=str(y + 2),
        width=f"{end - LEFT:.1f}",
        height="14",
        fill=color,
    )
    _text(svg, end + 6, y + 13, f"{result.ratio:.2g}")
    assert comparison.target is not None
    target = _x(comparison.target)
    _line(svg, target, y, target, y + 18, "#c53030")


def _x(ratio: float) -> float:
    span = math.log10(MOST / LEAST)
    return LEFT + (WIDTH - LEFT - RIGHT) * math.log10(max(ratio, LEAST) / LEAST) / span


def _text(
    svg: ElementTree.Element,
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    size: int = 12,
) -> None:
    text = ElementTree.SubElement(svg, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill=INK)
    text.set("text-anchor", anchor)
    text.set("font-size", str(size))
    text.text = words


def _line(svg: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, color: str) -> None:
    ElementTree.SubElement(
        *(svg, "line"), x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", stroke=color
    )
