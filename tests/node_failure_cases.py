"""Failures between nodes while nobody makes a call: what idle ranks are told, and by whom."""
from __future__ import annotations

import os
import time
from typing import Any

from pending_call import PendingCall
from utils import Worker
from workload import Workload

import deep_ep

PATIENCE_S = 20.0
CHILD_LIVES_S = 6.0


def wait_for_failure(buffer: Any, patience_s: float = PATIENCE_S) -> tuple[str, str]:
    """Kind and sentence of what check() raises, or two empty strings."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            buffer.check()
        except deep_ep.Error as error:
            return type(error).__name__, str(error)
        time.sleep(0.005)
    return "", ""


def killed_while_idle(worker: Worker, victim: int, has_child: bool) -> tuple[str, str, bool] | None:
    """The victim dies between calls; its forked child, which has its descriptors, lives on for a while."""
    buffer = worker.new_buffer()
    worker.barrier()
    if worker.rank == victim:
        if has_child and os.fork() == 0:
            time.sleep(CHILD_LIVES_S)
            os._exit(0)
        os._exit(7)
    started = time.monotonic()
    found = wait_for_failure(buffer)
    is_in_time = time.monotonic() - started < CHILD_LIVES_S
    buffer.destroy()
    return (*found, is_in_time)


def destroyed_while_others_idle(worker: Worker, leaver: int) -> tuple[str, str]:
    buffer = worker.new_buffer()
    worker.barrier()
    if worker.rank == leaver:
        buffer.destroy()
    found = wait_for_failure(buffer, 0.5) if worker.rank != leaver else ("", "")
    worker.barrier()
    buffer.destroy()
    return found


def called_after_one_left(worker: Worker, work: Workload, leaver: int) -> str:
    """All but one, which has destroyed its Buffer, dispatch."""
    buffer = worker.new_buffer(timeout_s=1.5)
    pending = PendingCall(worker, buffer, work).layout()
    worker.barrier()
    message = ""
    if worker.rank == leaver:
        buffer.destroy()
    else:
        try:
            pending.dispatch()
        except deep_ep.Error as error:
            message = str(error)
    worker.barrier()
    buffer.destroy()
    return message
