"""Runs the Python blocks of documents on all ranks, as a reader would.

    torchrun --nproc_per_node 2 tests/run_pages.py docs/guides/README.md docs/guides/sizing.md ...

The blocks of the first page are the set-up. Those of each further page run after it, in order, in names of their own.
Where a block of text follows (```text), it is what rank 0 must have printed.
"""

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


@dataclass
class Block:
    line: int  # of its first line in the page, from 1
    code: str
    output: Optional[str]  # what it must print; None: nothing is said

    def run(self, page: str, names: dict[str, Any], is_first_rank: bool) -> None:
        """Lines of tracebacks are those of the page."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (self.line - 1) + self.code, page, "exec"), names)  # noqa: S102 - what this is for
        if self.output is not None and is_first_rank and printed.getvalue() != self.output:
            raise AssertionError(f"{page}:{self.line} printed\n{printed.getvalue()}and not\n{self.output}")


def blocks_of(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, found.start()) + 2, found.group(1), found.group(2)) for found in BLOCK.finditer(text)
    ]


def main(pages: list[str]) -> None:
    set_up: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(Path(pages[0]).read_text(encoding="utf-8")):
        block.run(pages[0], set_up, is_first_rank=False)
    is_first_rank = set_up["rank"] == 0
    for page in pages[1:]:
        names = dict(set_up)
        for block in blocks_of(Path(page).read_text(encoding="utf-8")):
            block.run(page, names, is_first_rank)
        if is_first_rank:
            print(f"{page}: ok", flush=True)
    set_up["dist"].barrier()
    set_up["dist"].destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
