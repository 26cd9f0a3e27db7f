"""Records of arguments, which carry a call to the native code: csrc/bindings/record.h."""

from typing import Any, Callable

import pytest
import torch

import deep_ep_cpp
from deep_ep_cpp import CombineArgs, DispatchArgs, LowLatencyDispatchArgs

RECORDS: list[Any] = [member for member in vars(deep_ep_cpp).values() if hasattr(member, "FIELDS")]
LEAST_AND_MOST = {"address": (0, 2**64 - 1), "int32": (-2**31, 2**31 - 1), "uint32": (0, 2**32 - 1),
                  "int64": (-2**63, 2**63 - 1), "bool": (False, True)}  # yapf: disable


def distinct_values(record: Any) -> dict[str, Any]:
    """Another value for every field."""
    values: dict[str, Any] = {}
    for i, (name, kind, _) in enumerate(record.FIELDS):
        values[name] = i % 2 == 0 if kind == "bool" else (2 * i, 2 * i + 1) if kind == "two addresses" else 1000 + i
    return values


def read(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name, _, _ in type(record).FIELDS}


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_keeps_its_own_value(record: Any) -> None:
    values = distinct_values(record)
    assert read(record(**values)) == values
    assert read(record(**dict(reversed(values.items())))) == values


@pytest.mark.parametrize("record", RECORDS)
def test_fields_hold_the_whole_range_of_their_type(record: Any) -> None:
    for name, kind, _ in record.FIELDS:
        for value in LEAST_AND_MOST.get(kind, ()):
            assert getattr(record(**{name: value}), name) == value, name


def test_an_address_is_a_number_or_that_of_a_tensor() -> None:
    rows, bias = torch.zeros(4), torch.zeros(4)
    args = CombineArgs(x=rows[1:], topk_weights=None, bias=(bias, None), send_head=torch.empty(0))
    assert (read(args)["x"], read(args)["bias"]) == (rows.data_ptr() + 4, (bias.data_ptr(), 0))
    assert read(args)["topk_weights"] == read(args)["send_head"] == 0


def test_replace_leaves_the_record_as_it_was() -> None:
    values = distinct_values(LowLatencyDispatchArgs)
    first = LowLatencyDispatchArgs(**values)
    second = first.replace(x=5, hidden=6)
    assert read(first) == values
    assert read(second) == {**values, "x": 5, "hidden": 6}


def test_fields_cannot_be_set() -> None:
    with pytest.raises(AttributeError):
        CombineArgs(x=1).x = 2  # type: ignore[attr-defined]


def test_repr_has_what_was_given() -> None:
    assert repr(CombineArgs(num_rows=3, bias=(1, 2))) == "CombineArgs(num_rows=3, bias=(1, 2))"


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: CombineArgs(1), "CombineArgs takes keywords, after a record that it extends"),  # type: ignore[call-arg]
    (lambda: CombineArgs().replace(1), "CombineArgs.replace takes keywords only"),  # type: ignore[call-arg]
    (lambda: CombineArgs(rows=1), "CombineArgs has no field 'rows'"),  # type: ignore[call-arg]
    (lambda: CombineArgs(x=-1), "CombineArgs: x must have the type address, got -1"),
    (lambda: CombineArgs(x=2**64), "CombineArgs: x must have the type address, got 18446744073709551616"),
    (lambda: CombineArgs(x="x"), "CombineArgs: x must have the type address, got 'x'"),
    (lambda: CombineArgs(num_rows=2**31), "CombineArgs: num_rows must have the type int32, got 2147483648"),
    (lambda: CombineArgs(num_rows=1.5), "num_rows must have the type int32, got 1.5"),  # type: ignore[arg-type]
    (lambda: CombineArgs(num_rows=None), "num_rows must have the type int32, got None"),  # type: ignore[arg-type]
    (lambda: CombineArgs(bias=(1, )), r"bias must have the type two addresses, got \(1,\)"),  # type: ignore[arg-type]
    (lambda: DispatchArgs(row_bytes=-16), "DispatchArgs: row_bytes must have the type uint32, got -16"),
]  # yapf: disable


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_values_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def make_buffer() -> deep_ep_cpp.Buffer:
    return deep_ep_cpp.Buffer(deep_ep_cpp.Device(-1), 0, 1, num_data_bytes=128, timeout_s=10.0, warn_s=5.0)


def test_an_operation_refuses_what_nobody_gave() -> None:
    values = distinct_values(CombineArgs)
    del values["send_head"], values["combined_x"]
    with pytest.raises(TypeError, match="CombineArgs lacks send_head, combined_x"):
        make_buffer().combine(CombineArgs(**values), 1, 0)


def test_an_operation_refuses_the_record_of_another() -> None:
    with pytest.raises(TypeError, match=r"expected CombineArgs, got .*DispatchArgs"):
        make_buffer().combine(DispatchArgs(**distinct_values(DispatchArgs)), 1, 0)  # type: ignore[arg-type]
