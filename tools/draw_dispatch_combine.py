#!/usr/bin/env python3
"""Draws docs/pictures/dispatch_combine.svg, the picture of the README: what dispatch and combine do with tokens.

tools/draw_dispatch_combine.py            write the picture
tools/draw_dispatch_combine.py --check    fail when the file is not what this program draws
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svg import Picture

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "dispatch_combine.svg"

# Two ranks, three tokens each, four experts of which each rank owns two; the router's choice of two for each token.
RANKS = ((("a", (0, 1)), ("b", (0, 2)), ("c", (2, 3))), (("d", (1, 3)), ("e", (2, 3)), ("f", (0, 1))))
EXPERTS_PER_RANK = 2
ROLES = ("first", "second")

WIDTH, HEIGHT = 860, 470
PANEL_X, PANEL_WIDTH = (150, 510), 330
TOKEN, GAP = 30, 12
ROWS_Y = {"tokens": 62, "received": 180, "experts": 256, "answers": 310, "sums": 414}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    content = draw()
    if parser.parse_args().check:
        is_current = PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == content
        if not is_current:
            print(f"{PICTURE.name} is out of date: run tools/draw_dispatch_combine.py", file=sys.stderr)
        return int(not is_current)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(content, encoding="utf-8")
    return 0


def draw() -> str:
    picture = Picture(
        WIDTH, HEIGHT, "Dispatch and combine",
        "Two ranks with three tokens each and two experts each. Dispatch sends a copy of every token to each rank that "
        "owns one of its experts, once per rank. Experts work on the rows. Combine returns the rows to the ranks that "
        "the tokens came from and sums them.")
    draw_panels(picture)
    draw_copies(picture)
    draw_tokens(picture)
    draw_experts(picture)
    draw_labels(picture)
    return picture.render()


def owners(experts: tuple[int, ...]) -> list[int]:
    """The ranks that own these experts, each once."""
    return sorted({expert // EXPERTS_PER_RANK for expert in experts})


def received(rank: int) -> list[tuple[int, int]]:
    """The rows that a rank receives, as (source rank, token there), in the order of the library."""
    return [(source, i) for source, tokens in enumerate(RANKS) for i, (_, experts) in enumerate(tokens)
            if rank in owners(experts)]


def place_in_row(rank: int, i: int, num_items: int) -> float:
    """The left edge of the i-th of so many tokens, centered in the panel of a rank."""
    row_width = num_items * TOKEN + (num_items - 1) * GAP
    return PANEL_X[rank] + (PANEL_WIDTH - row_width) / 2 + i * (TOKEN + GAP)


def draw_panels(picture: Picture) -> None:
    for rank, x in enumerate(PANEL_X):
        picture.box(x, 14, PANEL_WIDTH, HEIGHT - 28, "panel", outline="line", radius=8)
        picture.text(x + 14, 36, f"rank {rank} (one GPU)", "faint")


def draw_copies(picture: Picture) -> None:
    """An arrow for every copy of a token, on its way to the experts and back."""
    for rank in range(len(RANKS)):
        rows = received(rank)
        for row, (source, i) in enumerate(rows):
            at_source = place_in_row(source, i, len(RANKS[source])) + TOKEN / 2
            at_owner = place_in_row(rank, row, len(rows)) + TOKEN / 2
            picture.curve(at_source, ROWS_Y["tokens"] + TOKEN, at_owner, ROWS_Y["received"], ROLES[source])
            picture.curve(at_owner, ROWS_Y["answers"] + TOKEN, at_source, ROWS_Y["sums"], ROLES[source])


def draw_tokens(picture: Picture) -> None:
    for rank, tokens in enumerate(RANKS):
        for i, (name, experts) in enumerate(tokens):
            x = place_in_row(rank, i, len(tokens))
            draw_token(picture, x, ROWS_Y["tokens"], name, rank)
            draw_token(picture, x, ROWS_Y["sums"], f"{name}\u2032", rank)
            chosen = "+".join(str(expert) for expert in experts)
            picture.text(x + TOKEN / 2, ROWS_Y["tokens"] - 6, chosen, "faint", size=11, anchor="middle")
        rows = received(rank)
        for row, (source, i) in enumerate(rows):
            x = place_in_row(rank, row, len(rows))
            name = RANKS[source][i][0]
            draw_token(picture, x, ROWS_Y["received"], name, source)
            draw_token(picture, x, ROWS_Y["answers"], name, source, is_filled=False)


def draw_token(picture: Picture, x: float, y: float, name: str, source: int, *, is_filled: bool = True) -> None:
    picture.box(x, y, TOKEN, TOKEN, ROLES[source] if is_filled else "paper", outline=ROLES[source])
    picture.text(x + TOKEN / 2, y + 20, name, "paper" if is_filled else "ink", size=14, anchor="middle", bold=True)


def draw_experts(picture: Picture) -> None:
    width = (PANEL_WIDTH - 3 * 20) / EXPERTS_PER_RANK
    for rank, x in enumerate(PANEL_X):
        for i in range(EXPERTS_PER_RANK):
            left = x + 20 + i * (width + 20)
            picture.box(left, ROWS_Y["experts"] - 30, width, 28, "paper", outline="faint")
            picture.text(left + width / 2,
                         ROWS_Y["experts"] - 11,
                         f"expert {rank * EXPERTS_PER_RANK + i}",
                         anchor="middle")
        picture.text(x + PANEL_WIDTH / 2,
                     ROWS_Y["experts"] + 22,
                     "your experts run on their rows",
                     "faint",
                     size=12,
                     anchor="middle")


def draw_labels(picture: Picture) -> None:
    for y, name, lines in ((ROWS_Y["tokens"] + 60, "dispatch", ("a copy to each rank", "that owns an expert",
                                                                 "of the token")),
                           (ROWS_Y["answers"] + 32, "combine", ("rows return home,", "each token gets",
                                                                 "the sum"))):  # yapf: disable
        picture.text(18, y, name, bold=True, size=17)
        for i, line in enumerate(lines):
            picture.text(18, y + 20 + 16 * i, line, "faint", size=12)
    picture.text(18, ROWS_Y["tokens"] - 6, "experts chosen", "faint", size=11)
    picture.text(18, ROWS_Y["tokens"] + 20, "tokens", size=13)
    picture.text(18, ROWS_Y["experts"] - 11, "experts", size=13)
    picture.text(18, ROWS_Y["sums"] + 20, "outputs", size=13)


if __name__ == "__main__":
    sys.exit(main())
