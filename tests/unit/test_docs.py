"""What the documents promise: the quickstart runs, and links lead somewhere."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('examples/*.md')])


def test_the_quickstart_of_the_readme_runs_on_two_ranks(tmp_path: Path) -> None:
    code = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    script = tmp_path / 'quickstart.py'
    script.write_text(code.group(1))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)]
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('sums right') == 2


def test_the_tests_that_docs_testing_names_exist() -> None:
    """The table of pitfalls stays true when tests are renamed."""
    text = (ROOT / 'docs/testing.md').read_text()
    sources = {path.name: path.read_text() for path in (ROOT / 'tests').rglob('*') if path.suffix in {'.py', '.cc'}}
    everything = '\n'.join(sources.values())
    for name in re.findall(r'`(test_\w+)`', text):
        assert f'def {name}(' in everything, name
    for name, title in re.findall(r'`(\w+_test\.cc)`: ([^;|`]+?) *[;|]', text):
        assert title in sources[name], (name, title)
    for name in re.findall(r'`(test_\w+\.py)`', text):
        assert name in sources


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    targets = [target.split('#')[0] for target in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []
