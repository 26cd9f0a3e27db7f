"""One rank of a group across nodes, as a process of its own, to which the link is cut (tests/test_internode.py).

Says on stdout what it has come to, a JSON object a line, and goes on when a line comes on stdin.
"""

import json
import os
import sys
import time
from typing import Any

from pending_call import PendingCall
from utils import member
from workload import Workload

import deep_ep

TIMEOUT_S = 3.0


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    worker = member()
    work = Workload((5, 3, 0, 4)[:worker.num_ranks], hidden=64)
    warm = worker.new_buffer()  # first calls may take longer than the timeout
    PendingCall(worker, warm, work).whole_trip()
    buffer = worker.new_buffer(timeout_s=TIMEOUT_S)
    PendingCall(worker, buffer, work).whole_trip()
    say(ready=repr(buffer))
    sys.stdin.readline()
    started, failure = time.monotonic(), ""
    try:
        PendingCall(worker, buffer, work).whole_trip()
    except deep_ep.Error as error:
        failure = str(error)
    took = time.monotonic() - started
    buffer.destroy()
    say(failure=failure, took=took, released=time.monotonic() - started - took)
    os._exit(0)  # the group of torch waits for peers that it does not reach


if __name__ == "__main__":
    main()
