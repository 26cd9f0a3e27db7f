"""Every Python block of the guides and of the API page runs, on two ranks, and prints what the page says."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_pages

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / 'docs' / 'guides'


def run(pages: list[Path], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
               ROOT / 'tests' / 'run_pages.py', GUIDES / 'README.md', *pages]  # yapf: disable
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True,
                          timeout=240, check=False)  # yapf: disable


def test_the_blocks_of_the_guides_run(tmp_path: Path) -> None:
    """In one group of two ranks, one page after the other."""
    guides = [page for page in sorted(GUIDES.glob('*.md')) if '```python' in page.read_text()]
    pages = [page for page in guides if page.name != 'README.md'] + [ROOT / 'docs' / 'api.md']
    assert len(pages) >= 4
    done = run(pages, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f'{page}: ok' for page in pages]


def test_every_page_with_a_python_block_is_run() -> None:
    """Those above; tests/unit/test_docs.py and tests/test_wheel.py run that of README."""
    pages = [*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('third-party/*.md')]
    with_blocks = {page for page in pages if '```python' in page.read_text()}
    assert with_blocks == {page
                           for page in GUIDES.glob('*.md')
                           if page in with_blocks} | {ROOT / 'README.md', ROOT / 'docs' / 'api.md'}
    assert (ROOT / 'README.md').read_text().count('```python') == 1


def test_blocks_are_found_with_their_lines_and_their_output() -> None:
    text = 'A page\n\n```python\nx = 1\n```\n\n```text\n7\n```\n\n```\nnot run\n```\n\n```python\ny = x\n```\n'
    blocks = run_pages.blocks_of(text)
    assert [(block.line, block.code, block.output) for block in blocks] == [(4, 'x = 1\n', '7\n'),
                                                                            (16, 'y = x\n', None)]
    assert text.splitlines()[15] == 'y = x'


def test_a_block_that_prints_something_else_fails() -> None:
    block = run_pages.Block(4, 'print(6)\n', '7\n')
    with pytest.raises(AssertionError, match=r'page\.md:4 printed\n6\nand not\n7'):
        block.run('page.md', {}, is_first_rank=True)
    block.run('page.md', {}, is_first_rank=False)


def test_a_traceback_has_the_line_of_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        run_pages.Block(12, '\n1 / 0\n', None).run('page.md', {}, is_first_rank=True)
    assert raised.traceback[-1].lineno == 12  # from 0
