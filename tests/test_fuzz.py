"""Random programs of calls against the reference, and that what fails is found and made small: tests/fuzz.py."""

from collections.abc import Iterator

import fuzz_cases
import pytest
from fuzz import PLANTS, Campaign
from fuzz_cases import Case, Clean, HighThroughput, LowLatency, Topology, code_of, make_case, play, schedule
from low_latency_pending_call import FP8, Manner
from pending_call import How
from shrink import shrink
from utils import Pool
from workload import Workload

SECONDS = 15.0  # for each of two topologies
ONE_NODE, NODES = Topology(3), Topology(4, 2)
# What failed once, as tests/fuzz.py has printed it.
FOUND: list[Case] = [
    # None so far; this one has two open hooks, a clean-up that has to wait for them, and a dispatch in between.
    Case((LowLatency(Workload((3, 0), hidden=256), manner=Manner(
        FP8, mode="hook")), LowLatency(Workload(
            (1, 4), hidden=8, seed=1), manner=Manner(mode="hook")), Clean(Workload((1, 1))),
          HighThroughput(Workload((5, 2), hidden=8), how=How(is_async=True, worst_factor=1), has_cached=True)),
         order=(0, 1, 2, 3, 3, 1, 0, 3)),
]


@pytest.mark.parametrize("case", FOUND)
def test_what_failed_once(pool: Pool, case: Case) -> None:
    pool.run(play, case.num_ranks, case)


@pytest.mark.parametrize("topology", [ONE_NODE, NODES], ids=["one node", "nodes"])
def test_random_calls(topology: Topology) -> None:
    """Always the same first cases; how many, the machine decides."""
    campaign = Campaign(topology)
    report = campaign.run(0, SECONDS, least_cases=10, shrink_seconds=60)
    campaign.close()
    print(report)
    assert not report.findings, "\n".join(map(str, report.findings))


@pytest.fixture
def planted() -> Iterator[Campaign]:
    made = Campaign(Topology(2), plant="stale_row")
    yield made
    made.close()


def test_a_planted_fault_is_found_and_made_small(planted: Campaign) -> None:
    """Of up to three calls of many tokens: one dispatch with a handle, of rows of 16 bytes, two of which come."""
    seed = next(n for n in range(1000) if wants(make_case(n, Topology(2))))
    finding, = planted.run(seed, 0, num_cases=1, shrink_seconds=60).findings
    assert finding.smallest is not None, finding
    call, = finding.smallest.calls
    assert isinstance(call, HighThroughput)
    assert (call.has_cached, call.how, call.num_biases, call.work.num_topk) == (True, How(), 0, 1), finding
    assert sum(call.work.num_tokens) <= 3 and call.work.hidden == 8, finding
    assert code_of(finding.smallest) in str(finding)


def wants(case: Case) -> bool:
    """Two calls, the second of which has the fault."""
    return len(case.calls) == 2 and isinstance(case.calls[0], LowLatency) and isinstance(
        case.calls[1], HighThroughput) and case.calls[1].has_cached and case.num_ranks == 2 and min(
            case.calls[1].work.num_tokens) > 6 and case.calls[1].work.routing == "random"


# Without processes


@pytest.mark.parametrize("topology", [Topology(4), Topology(6, 2)])
def test_a_case_is_what_its_code_says(topology: Topology) -> None:
    names = {name: getattr(fuzz_cases, name) for name in fuzz_cases.NAMES}
    for seed in range(200):
        case = make_case(seed, topology)
        assert eval(code_of(case), names) == case  # noqa: S307 - written just now
        assert case == make_case(seed, topology)
        assert case.num_ranks in topology.group_sizes


@pytest.mark.parametrize("topology", [Topology(4), Topology(6, 2)])
def test_every_step_of_every_call_comes_once_and_no_third_hook_is_open(topology: Topology) -> None:
    for seed in range(300):
        case, steps = make_case(seed, topology), []
        is_open: dict[int, list[int]] = {0: [], 1: []}
        for idx, step in schedule(case):
            steps.append((idx, step))
            call = case.calls[idx]
            if isinstance(call, LowLatency) and call.holds_bank:
                hooks = is_open[call.buffer_idx]
                hooks.append(idx) if step.startswith("start") else hooks.remove(idx)
                assert len(hooks) <= 2, (seed, steps)
        wanted = [(idx, step) for idx, call in enumerate(case.calls) for step in call.steps]
        assert sorted(steps) == sorted(wanted), seed
        assert [step for step in steps if step[0] == 0] == [step for step in wanted if step[0] == 0]


def test_shrinking_leaves_what_the_fault_needs() -> None:
    """A fault of asynchronous calls with at least three tokens on some rank, and of nothing else."""

    def fails(case: Case) -> bool:
        return any(
            isinstance(call, HighThroughput) and call.how.is_async and max(call.work.num_tokens) >= 3
            for call in case.calls)

    for seed in range(300):
        case = make_case(seed, Topology(4))
        if fails(case):
            smallest, attempts = shrink(case, fails)
            assert smallest == Case((HighThroughput(smallest.calls[0].work, how=How(is_async=True)), ))
            assert sorted(smallest.calls[0].work.num_tokens) in ([3], [0, 3], [0, 0, 3], [0, 0, 0, 3])
            assert attempts < 150, (seed, attempts)


def test_shrinking_ends_in_time() -> None:
    case = make_case(0, Topology(4))
    assert shrink(case, lambda _: True, max_attempts=3)[1] == 3
    assert shrink(case, lambda _: True, seconds=0.0) == (case, 0)


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_planted_faults_break_nothing_for_good(name: str) -> None:
    from deep_ep import Buffer
    before = dict(vars(Buffer))
    with PLANTS[name]():
        assert dict(vars(Buffer)) != before
    assert dict(vars(Buffer)) == before
