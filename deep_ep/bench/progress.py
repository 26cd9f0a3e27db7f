"""How far a long sweep is: a bar where somebody looks at a terminal, a line now and then elsewhere."""
from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

try:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
except ImportError:
    tqdm = None

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0


def show_progress(items: list[T], is_shown: bool) -> Iterable[T]:
    """The items, on one rank with a sign of life on stderr."""
    if not is_shown or len(items) < 2:
        return items
    if tqdm is not None and sys.stderr.isatty():
        bar: Iterable[T] = tqdm(items, unit="case")
        return bar
    return _with_lines(items)


def _with_lines(items: list[T]) -> Iterator[T]:
    started = printed = time.monotonic()
    for i, item in enumerate(items):
        now = time.monotonic()
        if i == 1 or now - printed >= SECONDS_BETWEEN_LINES:
            print(f"{i} of {len(items)} cases after {now - started:.0f} s", file=sys.stderr, flush=True)
            printed = now
        yield item
