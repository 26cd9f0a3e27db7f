"""DEEP_EP_CHECK_CALLS: before every collective call the ranks compare what they are about to call, and with what.

Ranks whose arguments differ read each other's messages at wrong places: that ends in wrong numbers or in a timeout, and
neither says why. The comparison takes the slow way of the constructor, so it is for looking for a mistake.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch

from deep_ep._streams import is_capturing

logger = logging.getLogger("deep_ep")


def describe_differences(values: Sequence[Any]) -> Optional[str]:
    """Which value which ranks have; None: all have the same."""
    ranks_by_value: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(value, []).append(rank)
    if len(ranks_by_value) <= 1:
        return None
    return "; ".join(f"{value!r} on rank(s) {', '.join(map(str, ranks))}" for value, ranks in ranks_by_value.items())


class CallCheck:
    """Compares the calls of one Buffer. `all_gather` is that of its Peers."""

    def __init__(self, all_gather: Callable[[Any], list[Any]], device: torch.device, timeout_s: float) -> None:
        self._all_gather = all_gather
        self._device = device
        self._timeout_s = timeout_s
        self._is_given_up = False

    def compare(self, operation: str, facts: dict[str, Any], fault: Optional[str] = None) -> None:
        """Raises ValueError on every rank when they differ in the operation or in a fact about its arguments, or when
        one of them found a fault in its own."""
        if self._is_given_up or is_capturing():
            return
        calls = self._gather((operation, facts, fault))
        if calls is None:
            self._is_given_up = True
            logger.warning("DEEP_EP_CHECK_CALLS: %s: not every rank made a call within %.1f s; calls are not compared "
                           "any more", operation, self._timeout_s)  # yapf: disable
            return
        faults = [f"rank {rank}: {text}" for rank, (_, _, text) in enumerate(calls) if text is not None]
        if faults:
            raise ValueError(f"{operation}: " + "; ".join(faults))
        difference = describe_differences([name for name, _, _ in calls])
        if difference is not None:
            raise ValueError(f"{operation}: every rank must make the same sequence of calls, got {difference}")
        for name in facts:
            difference = describe_differences([facts_of_rank[name] for _, facts_of_rank, _ in calls])
            if difference is not None:
                raise ValueError(f"{operation}: {name} must be the same on every rank, got {difference}")

    def _gather(self, mine: Any) -> Optional[list[Any]]:
        """None: a rank did not come. The call itself, which follows, will say which one."""
        gathered: list[Any] = []
        failure: list[BaseException] = []

        def gather() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                gathered.extend(self._all_gather(mine))
            except BaseException as error:  # noqa: BLE001 - raised below
                failure.append(error)

        # A collective of torch.distributed cannot be given up; its thread can.
        thread = threading.Thread(target=gather, name="deep_ep call check", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if failure:
            raise failure[0]
        return gathered or None
