"""Which tensors need no more checks."""

import weakref
from typing import Generic, Optional, TypeVar

import torch

T = TypeVar("T")


class KnownTensors(Generic[T]):
    """Tensors that were checked together or made here, known again by their identity; this does not keep them alive.

    A layout is used once for each dispatch and a handle at least once, and the checks of either take 2 us. With the
    tensors goes what was found out about them.
    """

    MOST = 256

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple[weakref.ref[torch.Tensor], ...], T]] = {}  # by id of the first tensor

    def add(self, finding: T, *tensors: torch.Tensor) -> None:
        if len(self._entries) >= self.MOST:  # most of them are dead; those that are not are checked once more
            self._entries.clear()
        self._entries[id(tensors[0])] = (tuple(map(weakref.ref, tensors)), finding)

    def find(self, *tensors: object) -> Optional[T]:
        """What is known of exactly these tensors, if anything is."""
        entry = self._entries.get(id(tensors[0]))
        if entry is None:
            return None
        for ref, tensor in zip(entry[0], tensors):
            if ref() is not tensor:
                return None
        return entry[1]
