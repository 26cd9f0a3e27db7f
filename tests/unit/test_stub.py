"""deep_ep_cpp.pyi says what the extension has: mypy believes it, so nothing else would notice a difference."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

import pytest

import deep_ep_cpp

STUB = Path(__file__).parents[2] / "deep_ep_cpp.pyi"
TREE = ast.parse(STUB.read_text())
MAX_POSITIONAL = 5
LAZY = {"EventHandle", "topk_idx_t"}  # forwarded to the Python package
# Records of arguments are of another make; tools/render_stub.py writes what the stub says of them.
RECORDS = {name for name, member in vars(deep_ep_cpp).items() if hasattr(member, "FIELDS")}
# So are these: their functions have no signatures.
UNSIGNED = {"DirectCalls", "Hook", "StreamOrder", "TensorMaker"}
CLASSES = {node.name: node for node in TREE.body
           if isinstance(node, ast.ClassDef) and node.name.removeprefix("_") not in RECORDS}  # yapf: disable
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
METHODS = {(owner.name, node.name): node
           for owner in CLASSES.values() for node in owner.body if isinstance(node, ast.FunctionDef)}  # yapf: disable
CONSTANTS = {(owner.name, node.target.id): node
             for owner in CLASSES.values() for node in owner.body
             if owner.name not in UNSIGNED and isinstance(node, ast.AnnAssign)
             and isinstance(node.target, ast.Name)}  # yapf: disable


def native(owner: Optional[str], name: str) -> Any:
    return inspect.getattr_static(getattr(deep_ep_cpp, owner), name) if owner else getattr(deep_ep_cpp, name)


def is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list)


def bound_arguments(member: Any, name: str) -> list[str]:
    """The names that pybind11 has written into the docstring; `arg0` and so on where the binding gives none."""
    signature = re.search(rf"{name}\((.*)\) ->", member.__doc__)
    assert signature, member.__doc__
    return re.findall(r"(?:^|, )(\w+): ", signature.group(1))


@pytest.mark.parametrize(("owner", "name"), [*METHODS, *((None, name) for name in FUNCTIONS)])
def test_what_the_stub_declares_exists(owner: Optional[str], name: str) -> None:
    node = METHODS[owner, name] if owner else FUNCTIONS[name]
    member = native(owner, name)
    if is_property(node):
        assert isinstance(member, property)
        return
    if owner in UNSIGNED:
        return
    declared = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    bound = bound_arguments(member, name)
    assert len(bound) == len(declared)
    for declared_name, bound_name in zip(declared, bound):
        assert bound_name in {declared_name, "self"} or re.fullmatch(r"arg\d+", bound_name), (declared, bound)


def test_what_the_extension_has_is_declared() -> None:
    declared = {*CLASSES, *RECORDS, *FUNCTIONS, *LAZY}
    assert {name for name in vars(deep_ep_cpp) if not name.startswith("_")} - declared == set()
    for owner in ("Config", "Device", "Buffer"):
        members = {name for name in vars(getattr(deep_ep_cpp, owner)) if not name.startswith("_")}
        assert members - {name for class_name, name in (*METHODS, *CONSTANTS) if class_name == owner} == set(), owner


def test_constants_have_the_declared_types() -> None:
    for (owner, name), node in CONSTANTS.items():
        assert isinstance(node.annotation, ast.Name)
        assert type(getattr(getattr(deep_ep_cpp, owner), name)).__name__ == node.annotation.id, (owner, name)


def test_properties_have_the_declared_types() -> None:
    objects = {"Device": deep_ep_cpp.Device(-1), "Config": deep_ep_cpp.Config()}
    objects["Buffer"] = deep_ep_cpp.Buffer(objects["Device"],
                                           0,
                                           1,
                                           num_data_bytes=128,
                                           timeout_s=10.0,
                                           warn_s=5.0,
                                           num_lend_bytes=512)
    objects["LentRows"] = objects["Buffer"].lend(deep_ep_cpp.RowForm([((), 0, 32, None)]), 1, 0, False)
    for (owner, name), node in METHODS.items():
        if is_property(node) and not name.endswith("_ptr"):
            assert isinstance(node.returns, ast.Name)
            assert type(getattr(objects[owner], name)).__name__ == node.returns.id, (owner, name)


def test_records_are_declared_as_they_are() -> None:
    """A new field is in the stub: run tools/render_stub.py."""
    checked = subprocess.run([sys.executable, STUB.parent / "tools" / "render_stub.py", "--check"],
                             check=False,
                             capture_output=True,
                             text=True)
    assert checked.returncode == 0, checked.stderr


def test_no_long_rows_of_positional_arguments() -> None:
    """Two of them are soon exchanged, and all are integers."""
    for (owner, name), node in [*METHODS.items(), *(((None, name), node) for name, node in FUNCTIONS.items())]:
        arguments = [argument.arg for argument in node.args.args if argument.arg != "self"]
        assert len(arguments) <= MAX_POSITIONAL, (owner, name, arguments)
