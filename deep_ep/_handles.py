"""Which tensors need no more checks."""

import weakref
from typing import Any, Generic, Optional, TypeVar

T = TypeVar("T")
Reference = weakref.ref[Any]


class _NoneGiven:
    """Stands for a tensor where there are fewer than three."""


NONE_GIVEN = _NoneGiven()


class KnownTensors(Generic[T]):
    """Tensors that were checked together or made here, known again by their identity; this does not keep them alive.

    A layout is used once for each dispatch and a handle at least once, and the checks of either take 2 us. With the
    tensors goes what was found out about them.
    """

    MOST = 256

    def __init__(self) -> None:
        self._entries: dict[int, tuple[T, Reference, Reference, Reference]] = {}  # by id of the first tensor

    def add(self, finding: T, first: object, second: object = NONE_GIVEN, third: object = NONE_GIVEN) -> None:
        if len(self._entries) >= self.MOST:  # most of them are dead; those that are not are checked once more
            self._entries.clear()
        self._entries[id(first)] = finding, weakref.ref(first), weakref.ref(second), weakref.ref(third)

    def find(self, first: object, second: object = NONE_GIVEN, third: object = NONE_GIVEN) -> Optional[T]:
        """What is known of exactly these tensors, if anything is."""
        entry = self._entries.get(id(first))
        if entry is None:
            return None
        finding, first_ref, second_ref, third_ref = entry
        return finding if first_ref() is first and second_ref() is second and third_ref() is third else None
