"""Times as a picture: SVG, with a panel for each job and a linear scale in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from .report import duration

WIDTH: Final = 760
LEFT: Final = 250
"""Where the bars begin, in pixels, right of their labels."""
RIGHT: Final = 90
"""Room for the figure of the longest bar."""
ROW: Final = 22
GAP: Final = 54
"""Between the bars of two panels: the scale, and the next title."""
TOP: Final = 78

COLORS: Final = ("#8a8f98", "#2b6cb0", "#2f855a")
"""Of the bars of a panel, in their order."""
INK: Final = "#24292f"
FAINT: Final = "#d0d7de"


@dataclass(frozen=True)
class Bar:
    label: str
    seconds: float | None
    """None: it cannot do the job."""


@dataclass(frozen=True)
class Panel:
    title: str
    bars: Sequence[Bar]


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """Shorter bars are faster."""
    height = TOP + sum(ROW * len(panel.bars) + GAP for panel in panels)
    svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg")
    svg.set("viewBox", f"0 0 {WIDTH} {height}")
    svg.set("font-family", "sans-serif")
    ElementTree.SubElement(svg, "rect", width="100%", height="100%", fill="white")
    _text(svg, 16, 26, title, size=17)
    _text(svg, 16, 46, subtitle)
    y = TOP
    for panel in panels:
        _panel(svg, y, panel)
        y += ROW * len(panel.bars) + GAP
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _panel(svg: ElementTree.Element, top: float, panel: Panel) -> None:
    most = max(bar.seconds or 0.0 for bar in panel.bars)
    scale = (WIDTH - LEFT - RIGHT) / most
    bottom = top + ROW * len(panel.bars)
    _text(svg, 16, top - 6, panel.title, weight="bold")
    for tick in ticks(most):
        x = LEFT + tick * scale
        ElementTree.SubElement(
            *(svg, "line"), x1=f"{x:.1f}", y1=f"{top}", x2=f"{x:.1f}", y2=f"{bottom}", stroke=FAINT
        )
        _text(svg, x, bottom + 14, duration(tick) if tick else "0", anchor="middle", size=11)
    for number, (bar, color) in enumerate(zip(panel.bars, COLORS, strict=True)):
        y = top + ROW * number
        _text(svg, LEFT - 8, y + 15, bar.label, anchor="end")
        if bar.seconds is None:
            _text(svg, LEFT + 6, y + 15, "not possible: read-only")
            continue
        width = max(bar.seconds * scale, 1.0)
        ElementTree.SubElement(
            *(svg, "rect"), x=f"{LEFT}", y=f"{y + 3}", width=f"{width:.1f}", height="15", fill=color
        )
        _text(svg, LEFT + width + 6, y + 15, duration(bar.seconds), weight="bold")


def ticks(most: float) -> Sequence[float]:
    """Two to five round numbers from 0 on, the last of which is at most `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    step = next(
        power * factor for factor in (0.2, 0.5, 1.0, 2.0, 5.0) if most / (power * factor) < 5
    )
    return [step * number for number in range(int(most / step) + 1)]


def _text(
    svg: ElementTree.Element,
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: str = "normal",
) -> None:
    text = ElementTree.SubElement(svg, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill=INK)
    text.set("text-anchor", anchor)
    text.set("font-size", str(size))
    text.set("font-weight", weight)
    text.text = words
