"""A small SVG writer: pictures that are readable on light and on dark pages, the same text from the same input.

Shapes name a role (`ink`, `line`, `first`, ...) and never a color. The style sheet has a color of each role for both
schemes; the picture brings its own background, so it stays readable where the page's scheme is not the reader's.
"""
from __future__ import annotations

from html import escape

# The color of each role on a light and on a dark page.
COLORS = {
    "paper": ("#ffffff", "#0d1117"),
    "panel": ("#f3f5f7", "#161b22"),
    "line": ("#c4ccd4", "#3d444d"),
    "ink": ("#1f2328", "#e6edf3"),
    "faint": ("#59636e", "#9198a1"),
    "first": ("#0969da", "#4493f8"),
    "second": ("#bc4c00", "#f0883e"),
    "third": ("#1a7f37", "#3fb950"),
    "fourth": ("#8250df", "#ab7df8"),
    "other": ("#8c959f", "#6e7681"),
}
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


class Picture:
    """Shapes in the order of drawing; lengths in pixels."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.width, self.height = width, height
        self.title, self.description = title, description
        self.shapes: list[str] = []

    def box(self,
            x: float,
            y: float,
            width: float,
            height: float,
            role: str,
            *,
            outline: str = "",
            radius: float = 3) -> None:
        drawn = f' class="{role} o-{outline}"' if outline else f' class="{role}"'
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"{drawn}/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, role: str, *, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.shapes.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="o-{role}"{dash}/>')

    def curve(self, x1: float, y1: float, x2: float, y2: float, role: str) -> None:
        """From one point down to another, leaving and arriving vertically, with an arrow head at the end."""
        middle = (y1 + y2) / 2
        self.shapes.append(f'<path d="M{x1:g} {y1:g} C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2 - 6:g}" '
                           f'class="c-{role}"/>')
        self.shapes.append(f'<path d="M{x2:g} {y2:g} l-4 -8 h8 z" class="{role}"/>')

    def text(self,
             x: float,
             y: float,
             content: str,
             role: str = "ink",
             *,
             size: float = 13,
             anchor: str = "start",
             bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{role}" font-size="{size:g}" text-anchor="{anchor}"'
                           f'{weight}>{escape(content)}</text>')

    def render(self) -> str:
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img" font-family="{FONT}">')
        paper = (f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="6" '
                 'class="paper o-line"/>')
        lines = [
            head, f"<title>{escape(self.title)}</title>", f"<desc>{escape(self.description)}</desc>",
            f"<style>{style_sheet(0)}@media (prefers-color-scheme: dark){{{style_sheet(1)}}}</style>", paper,
            *self.shapes, "</svg>"
        ]
        return "\n".join(lines) + "\n"


def style_sheet(scheme: int) -> str:
    """`role` fills, `o-role` outlines, `c-role` is a curve that is not filled."""
    rules = []
    for role, colors in COLORS.items():
        color = colors[scheme]
        rules.append(f".{role}{{fill:{color}}}.o-{role}{{stroke:{color}}}"
                     f".c-{role}{{stroke:{color};fill:none;stroke-width:1.6}}")
    return "".join(rules)
