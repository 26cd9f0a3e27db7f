"""What the documents promise: the quick start runs, tests and limits that are named exist, links lead somewhere, and
pictures are those that their scripts draw."""
from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest
import torch
from reference import layout

import deep_ep
import deep_ep_cpp
from deep_ep.__main__ import build_parser, with_default_benchmark

ROOT = Path(__file__).resolve().parents[2]
PICTURES = sorted(ROOT.glob('docs/pictures/*.svg'))
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('examples/*.md')])


def test_the_quick_start_of_the_readme_runs_on_two_ranks(tmp_path: Path) -> None:
    code = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    script = tmp_path / 'quickstart.py'
    script.write_text(code.group(1))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)]
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('sums right') == 2


@pytest.mark.parametrize('page', ['README.md', 'docs/testing.md', 'docs/migration.md'])
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    """Tables of what shows what stay true when tests are renamed."""
    text = (ROOT / page).read_text()
    sources = {
        path.name: path.read_text()
        for path in (ROOT / 'tests').rglob('*') if path.suffix in {'.py', '.cc', '.cu'}
    }
    everything = '\n'.join(sources.values())
    for name in re.findall(r'`(test_\w+)`', text):
        assert f'def {name}(' in everything, name
    for name, title in re.findall(r'`(\w+_test\.cc|\w+\.cu)`: ([^;|`]+?) *[;|]', text):
        assert title in sources[name], (name, title)
    for name in re.findall(r'`(?:tests/\w+/)?(test_\w+\.py)`', text):
        assert name in sources, name


def test_every_pitfall_names_a_test_that_exists() -> None:
    """All 42 bug classes, in order; the test above finds the names."""
    section = (ROOT / 'docs' / 'testing.md').read_text().split('## Bugs that others had')[1].split('\n## ')[0]
    rows = re.findall(r'^\| (\d+) \| ([^|]+) \| ([^|]+) \|$', section, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 43))
    for number, what, guards in rows:
        assert re.search(r'`test_\w+(\.py)?`|`\w+_test\.cc`: |`\w+\.cu`: ', guards), (number, what)


def test_the_limits_of_the_readme_are_those_of_the_library() -> None:
    readme = (ROOT / 'README.md').read_text()
    most_ranks = re.search(r'constexpr int kMaxRanks = (\d+);', (ROOT / 'csrc/layout/heap.h').read_text())
    assert most_ranks is not None
    assert f'9 to {most_ranks.group(1)} on one node; more than {most_ranks.group(1)}' in readme
    alignment = re.search(r'ROW_ALIGNMENT_BYTES = (\d+)', (ROOT / 'deep_ep/_tensors.py').read_text())
    assert alignment is not None
    assert f'multiple of {alignment.group(1)} bytes' in readme
    for name in ('ElasticBuffer', 'HybridEPBuffer'):
        assert f'`{name}`' in readme
        assert not hasattr(deep_ep, name)


def test_the_checks_of_the_framework_pages_run(tmp_path: Path) -> None:
    """How to see that this library is the one that is loaded."""
    pages = sorted((ROOT / 'docs' / 'frameworks').glob('*.md'))
    programs = {page.name: re.findall(r'^python -c "(.*)"$', page.read_text(), re.MULTILINE) for page in pages}
    assert all(programs.values()), programs
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    for program in {program for found in programs.values() for program in found}:
        run = subprocess.run([sys.executable, '-c', program], env=environment, cwd=tmp_path, capture_output=True,
                             text=True, timeout=120, check=False)  # yapf: disable
        assert run.returncode == 0, run.stderr
        assert deep_ep.__version__ in run.stdout


def commands_of(page: Path) -> list[str]:
    """The commands of this package that a page shows, in blocks or in the text."""
    found = re.findall(r'(?:^|`)python3? -m deep_ep (?!\.)([^`\n#]+)', page.read_text(), re.MULTILINE)
    return [command.strip() for command in found if '...' not in command]


@pytest.mark.parametrize('page', [page for page in PAGES if page.name != 'CHANGELOG.md' and commands_of(page)],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_have_the_options_that_it_names(page: Path) -> None:
    for command in commands_of(page):
        arguments = with_default_benchmark(shlex.split(command))
        if arguments == ['calibrate']:  # its name alone: reports must be given
            continue
        try:
            build_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f'{page}: {command}')


def test_the_errors_page_says_everything_once() -> None:
    table = (ROOT / 'docs' / 'errors.md').read_text().split('| sentence | usual cause | remedy |')[1].split('\n\n')[0]
    sentences = re.findall(r'^\| (`.+?) \|', table, re.MULTILINE)
    assert len(sentences) > 25
    assert sorted(sentences) == sorted(set(sentences))


# Sentences that the library puts together from parts.
COMPOSED = ('entered the call and stalled', 'mapping the heaps of the peers failed', 'connecting the nodes failed',
            'within a node, bytes go through', 'more streams than a device with')  # yapf: disable


def test_the_sentences_of_the_errors_page_are_those_of_the_library() -> None:
    """Their parts without numbers are literals of the sources."""
    sources = '\n'.join(
        path.read_text(encoding='utf-8') for folder in ('deep_ep', 'csrc') for path in (ROOT / folder).rglob('*')
        if path.suffix in ('.py', '.cc', '.cpp', '.cu', '.h'))
    literals = re.sub(r'"\s*,?\s*f?"', '', sources)  # of several lines
    section = (ROOT / 'docs' / 'errors.md').read_text().split('## Sentences')[1].split('\n## ')[0]
    for cell in re.findall(r'^\| (`.+?) \|', section, re.MULTILINE):
        for sentence in re.findall(r'`([^`]+)`', cell):
            parts = re.split(r'[0-9][0-9.]*|…|\.\.\.|: |[()]|got \w+', sentence)
            missing = [
                part for part in (part.strip(' ,;:.') for part in parts) if len(part) > 8 and part not in literals
            ]
            assert not missing or any(known in sentence for known in COMPOSED), (sentence, missing)


def test_decisions_are_numbered_in_order() -> None:
    """By section; other pages and comments name them by these numbers."""
    headings = re.findall(r'^(##+) (\S+)', (ROOT / 'docs' / 'decisions.md').read_text(), re.MULTILINE)
    expected, section, number = [], 0, 0
    for level, _ in headings:
        section, number = (section + 1, 0) if level == '##' else (section, number + 1)
        expected.append((level, f'{section}.' if level == '##' else f'D{section}.{number}'))
    assert len(expected) > 60
    assert headings == expected


def test_the_index_has_every_page() -> None:
    index = ROOT / 'docs' / 'README.md'
    targets = re.findall(r'\]\(([^)#\s]+)', index.read_text())
    linked = {(index.parent / target).resolve() for target in targets if '://' not in target}
    missing = [page for page in ROOT.glob('docs/**/*.md') if page.resolve() not in linked and page != index]
    assert missing == []


# Pictures


def load_tool(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_the_picture_is_what_its_script_draws() -> None:
    tool = load_tool('draw_dispatch_combine')
    assert tool.PICTURE.read_text(encoding='utf-8') == tool.draw(), 'run tools/draw_dispatch_combine.py'


def test_the_picture_routes_as_the_library_does() -> None:
    """Once to each rank that owns an expert of the token; rows by source rank, then token."""
    tool = load_tool('draw_dispatch_combine')
    num_experts = len(tool.RANKS) * tool.EXPERTS_PER_RANK
    for rank in range(len(tool.RANKS)):
        rows = []
        for source, tokens in enumerate(tool.RANKS):
            topk_idx = torch.tensor([experts for _, experts in tokens])
            in_rank = layout(topk_idx, len(tool.RANKS), num_experts).is_token_in_rank
            rows += [(source, i) for i in range(len(tokens)) if in_rank[i, rank]]
        assert tool.received(rank) == rows


@pytest.mark.parametrize('picture', PICTURES, ids=lambda picture: picture.name)
def test_pictures_are_readable_on_light_and_dark_pages(picture: Path) -> None:
    """Every role has a color in both schemes, and text stands out from what it is written on (WCAG: 4.5, large: 3)."""
    root = ET.fromstring(picture.read_text(encoding='utf-8'))  # noqa: S314 - ours
    tag = '{http://www.w3.org/2000/svg}'
    style = root.find(f'{tag}style').text
    light, _, dark = style.partition('@media (prefers-color-scheme: dark)')
    used = {role for element in root.iter() for role in element.get('class', '').split()}
    for rules in (light, dark):
        colors = dict(re.findall(r'\.([\w-]+)\{(?:fill|stroke):(#\w{6})', rules))
        assert used <= set(colors)
        for text in ('ink', 'faint'):
            for ground in ('paper', 'panel'):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        for filled in ('first', 'second', 'third'):
            assert contrast(colors['paper'], colors[filled]) >= 4.5, filled
    assert root.find(f'{tag}title').text
    assert root.find(f'{tag}desc').text


def contrast(first: str, second: str) -> float:
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = (int(color[i:i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055)**2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# Links


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    targets = [target.split('#')[0] for target in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings(page: Path) -> None:
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    targets = [target.split('#') for target in re.findall(r'\]\(([^)\s:]*#[^)\s]+)\)', text)]
    missing = [
        '#'.join(target) for target in targets
        if target[1] not in anchors_of((page.parent / target[0]).resolve() if target[0] else page)
    ]
    assert missing == []


def test_the_walk_of_a_dispatch_names_files_that_are_on_it() -> None:
    """In words in docs/architecture.md, as a list of tools/dispatch_walk.py, which fails where a file is gone."""
    listed = subprocess.run([sys.executable, ROOT / 'tools' / 'dispatch_walk.py'],
                            capture_output=True,
                            text=True,
                            check=True)
    names = {Path(line.split()[1]).name for line in listed.stdout.splitlines() if len(line.split()) == 2}
    section = (ROOT / 'docs' / 'architecture.md').read_text().split('## The walk of a dispatch')[1].split('\n## ')[0]
    quoted = re.findall(r'`([\w./]*?)(?:\{([\w,]+)\})?([\w.*]*)`', section.split('\n| ')[0].split('\n\n', 2)[2])
    wanted = {
        f'{before}{middle}{after}'.split('/')[-1]
        for before, choices, after in quoted
        for middle in choices.split(',')
    }
    wanted = {name for name in wanted if re.search(r'\.(py|pyi|cc|cpp|cu|h|\*)$', name)}
    assert len(wanted) > 20
    missing = {name for name in wanted if not any(re.fullmatch(name.replace('.*', r'\..*'), there) for there in names)}
    assert missing == set()


def test_the_lent_part_is_the_one_that_the_api_page_states() -> None:
    for num_ranks, words in ((2, 'of the hint with two ranks'), (8, 'with eight')):
        hint = deep_ep.Buffer.get_dispatch_config(num_ranks).get_nvl_buffer_size_hint(7168 * 2, num_ranks)
        share = deep_ep_cpp.part_to_lend(hint, num_ranks) / hint
        assert f'{share:.0%} {words}'.replace('%', ' %') in (ROOT / 'docs' / 'api.md').read_text()
