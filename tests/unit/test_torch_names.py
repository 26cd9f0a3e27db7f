"""Which names of torch the package uses, and what happens where one is missing. Old versions are not installed here."""
from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep import doctor, utils

ROOT = Path(__file__).resolve().parents[2]
# Everything else that is used has been in torch since 1.13 at least. Versions are of torch's release notes.
NEWER = {'float8_e4m3fn': (2, 1), 'itemsize': (2, 1), 'untyped_storage': (2, 0), 'stream_id': (2, 0)}
OLD = {
    'bfloat16', 'bool', 'cuda.Stream', 'cuda.current_device', 'cuda.current_stream', 'cuda.device_count',
    'cuda.device', 'cuda.get_device_name', 'cuda.is_available', 'cuda.is_current_stream_capturing', 'cuda.set_device',
    'cuda.set_stream', 'cuda.stream', 'device', 'dtype', 'empty', 'empty_strided', 'equal', 'float16', 'float32',
    'float64', 'int16', 'int32', 'int64', 'int8', 'uint8', 'Size', 'Tensor', 'distributed', 'utils.dlpack', 'arange',
    'version.cuda', '__version__', 'cuda.can_device_access_peer', 'cuda.get_device_properties', 'cuda.mem_get_info',
    'randn', 'rand', 'Generator', 'ones', 'full', 'frombuffer',
    'strided', 'as_strided', 'inference_mode'
}  # yapf: disable
# Without public names: of utils.py, tested below or in test_compile.py.
PRIVATE = {
    '_C', '_C._cuda_getCurrentRawStream', '_C._cuda_getCurrentStream', '_C._cuda_setStream', '_C._cuda_getDevice',
    '_C._dynamo', '_C.DisableTorchFunction', 'utils._python_dispatch'
}


def dotted(node: ast.expr) -> str:
    """`torch.cuda.Stream` -> the same text; an empty one for other expressions."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return '.'.join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ''


def used_names() -> set[str]:
    found = set()
    for path in (ROOT / 'deep_ep').glob('*.py'):
        tree = ast.parse(path.read_text())
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner and dotted(node).startswith('torch.'):
                found.add(dotted(node).removeprefix('torch.'))
            elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('torch.'):
                found.add(str(node.module).removeprefix('torch.'))
    return found


def test_every_name_of_torch_is_known_with_its_version() -> None:
    """A new one goes into OLD, or into NEWER with its version, which may raise the floor."""
    unknown = {name for name in used_names() if name not in OLD | PRIVATE and name not in NEWER
               and not any(name.startswith(f'{known}.') for known in OLD)}  # yapf: disable
    assert unknown == set()


def test_the_floor_is_that_of_the_newest_name() -> None:
    floor = max(NEWER.values())
    assert floor == doctor.OLDEST_TORCH
    text = '.'.join(map(str, floor))
    assert f'torch>={text}"' in (ROOT / 'pyproject.toml').read_text()
    assert f'torch {text} and later' in (ROOT / 'docs/packaging.md').read_text()
    package = '\n'.join(path.read_text() for path in (ROOT / 'deep_ep').glob('*.py'))
    for name in NEWER:
        assert re.search(rf'\.{name}\b', package), f'{name} is not used any more'


class PublicCuda:
    """torch.cuda, as far as the public ways go; streams are (stream_id, device_index, device_type)."""

    def __init__(self) -> None:
        self.current = (7, 0, 1)

    def current_stream(self, index: int) -> Any:
        stream_id, _, device_type = self.current
        return SimpleNamespace(cuda_stream=4242, stream_id=stream_id, device_index=index, device_type=device_type)

    @staticmethod
    def Stream(stream_id: int, device_index: int, device_type: int) -> tuple[int, int, int]:
        return (stream_id, device_index, device_type)

    def set_stream(self, stream: tuple[int, int, int]) -> None:
        self.current = stream


@pytest.fixture
def torch_without_private_names(monkeypatch: pytest.MonkeyPatch) -> PublicCuda:
    cuda = PublicCuda()
    monkeypatch.setattr(utils, 'torch', SimpleNamespace(cuda=cuda, _C=SimpleNamespace()))
    return cuda


def test_streams_are_found_without_the_private_names(torch_without_private_names: PublicCuda) -> None:
    assert utils.stream_handle_by_public_names(0) == 4242
    assert utils.current_stream_id(0) == (7, 0, 1)
    with utils.CurrentStream((9, 0, 1)):
        assert torch_without_private_names.current == (9, 0, 1)
    assert torch_without_private_names.current == (7, 0, 1)


def test_a_torch_of_this_machine_is_new_enough() -> None:
    assert doctor.check_torch(torch)[0].level == 'ok'
