"""Random high-throughput calls for as long as asked: each right against the reference, and the same bits every time.

Small calls are checked against tests/reference. Large ones, for which its token-by-token loops are too slow, send rows
out and back: what must come is a selection of the inputs, and their multiples.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.distributed as dist
from compare import same_bits, same_numbers
from pending_call import How, PendingCall
from utils import Worker
from workload import Workload

from deep_ep import Config

NUM_REPEATS = 4  # of each call
LARGE_EVERY = 4  # rounds
LARGE_FACTOR = 32  # times the tokens of a small call
NUM_NVL_BYTES = (1 << 22, 1 << 26)
# A digest over so many rounds is printed: two runs of the same seed and sizes must agree.
DIGEST_ROUNDS = 20
REPORT_EVERY_S = 60.0


@dataclass
class Digests:
    """Of the outputs of one call, made several times."""

    what: str
    wanted: list[str] = field(default_factory=list)

    def add(self, *outputs: Optional[torch.Tensor]) -> None:
        found = [digest(output) for output in outputs if output is not None]
        self.wanted = self.wanted or found
        assert found == self.wanted, f"{self.what}: a repeated call gave other bits, {found} after {self.wanted}"


def digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=12).hexdigest()


@dataclass
class Sizes:
    """The largest that a round may have."""

    num_tokens: int
    hidden: int
    num_topk: int
    experts_per_rank: int
    num_sms: int = 0  # of a high-throughput call


class Choice:
    """The same for every rank and run, by the number of the round."""

    def __init__(self, seed: int, round_idx: int) -> None:
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + round_idx)

    def of(self, *options: Any) -> Any:
        return options[int(torch.randint(len(options), (1, ), generator=self._generator))]


def run(worker: Worker, sizes: Sizes, seed: int, seconds: float, least_rounds: int = LARGE_EVERY) -> tuple[int, str]:
    """Collective. The number of rounds, and one digest over the first of them."""

    def play(round_idx: int, choice: Choice) -> Digests:
        is_large = round_idx % LARGE_EVERY == LARGE_EVERY - 1
        return (large_round if is_large else small_round)(worker, sizes, choice, seed * 100_000 + round_idx)

    return play_rounds(worker, seed, seconds, least_rounds, play)


def play_rounds(worker: Worker, seed: int, seconds: float, least_rounds: int,
                play: Callable[[int, Choice], Digests]) -> tuple[int, str]:
    """Collective. Rounds until the time is over; the seed alone decides what they do."""
    start, done, total = time.monotonic(), 0, hashlib.blake2b(digest_size=12)
    next_report = start + REPORT_EVERY_S
    while done < least_rounds or is_before(worker, start + seconds):
        digests = play(done, Choice(seed, done))
        if done < DIGEST_ROUNDS:
            total.update("".join(digests.wanted).encode())
        done += 1
        if worker.rank == 0 and time.monotonic() > next_report:
            print(f"{done} rounds after {time.monotonic() - start:.0f} s", flush=True)
            next_report += REPORT_EVERY_S
    return done, total.hexdigest()


def announce(sizes: Sizes, seed: int, seconds: float) -> None:
    print(f"pressure for {seconds:.0f} s with seed {seed} (--seed replays it) and at most {sizes}", flush=True)


def summary(found: list[tuple[int, str]]) -> str:
    """Of what the ranks returned."""
    rounds = found[0][0]
    return (f"{rounds} rounds of {NUM_REPEATS} calls with equal bits; digests of the first "
            f"{min(rounds, DIGEST_ROUNDS)} rounds by rank: {' '.join(digest for _, digest in found)}")


def is_before(worker: Worker, deadline: float) -> bool:
    """The same answer on every rank: that of the first."""
    answer = torch.tensor([int(time.monotonic() < deadline)])
    dist.broadcast(answer, worker.ranks[0], worker.group)
    return bool(answer.item())


def small_round(worker: Worker, sizes: Sizes, choice: Choice, seed: int) -> Digests:
    """Any shape, routing and mode, against the reference."""
    most, is_fp8 = sizes.num_tokens, choice.of(False, False, True)
    hidden = choice.of(*{max(16, sizes.hidden // part // 16 * 16) for part in (1, 2, 5, 16)})
    work = Workload(tuple(choice.of(0, 1, most // 3, most) for _ in range(worker.num_ranks)),
                    hidden=hidden,
                    num_topk=choice.of(*sorted({1, max(1, sizes.num_topk // 2), sizes.num_topk})),
                    experts_per_rank=choice.of(1, sizes.experts_per_rank),
                    routing=choice.of("random", "random", "holes", "duplicates", "one_rank", "spread"),
                    seed=seed,
                    dtype=torch.float8_e4m3fn if is_fp8 else torch.bfloat16,
                    num_scales=-(-hidden // 128) if is_fp8 else 0,
                    scale_layout=choice.of("row", "column"))
    is_async = choice.of(False, True)
    how = How(is_async=is_async,
              on_comm_stream=is_async and choice.of(False, True),
              expert_alignment=choice.of(1, 16),
              worst_factor=choice.of(0, 0, 1),
              num_sms=choice.of(2, sizes.num_sms))
    num_biases = choice.of(0, 1, 2)
    pending = PendingCall(worker, worker.buffer(choice.of(*NUM_NVL_BYTES)), work, how)
    pending.layout().dispatch().combine(num_biases)
    if choice.of(False, True):
        pending.cached_dispatch(work.next())
    return repeated(worker, pending, f"seed {seed}, {work}, {how}, {num_biases} biases", num_biases)


def repeated(worker: Worker, pending: PendingCall, what: str, num_biases: int) -> Digests:
    """The calls of a pending again and again, at different moments and on different numbers of SMs."""
    digests, most_sms, rank = Digests(what), pending.how.num_sms, worker.rank
    num_rows = [arrival.x.shape[0] for arrival in pending.arrivals]
    answers = pending.work.returned(num_rows)[rank]
    bias: Any = tuple(tensor.to(worker.device) for tensor in pending.work.biases(rank, num_biases)) or None
    bias = bias[0] if num_biases == 1 else bias
    for i in range(NUM_REPEATS):
        be_late(worker, i)
        pending.config = Config(max(2, most_sms // (1 + i % 2) // 2 * 2), 4, 8)
        pending.start_dispatch()
        recv_x, topk_idx, weights, _, handle, event = pending.result
        src_idx = pending.recv_src_idx
        pending.landed(event)
        rows = recv_x if isinstance(recv_x, tuple) else (recv_x, )
        combined, combined_weights, event = pending.buffer.combine(pending.padded(answers, src_idx.shape[0]), handle,
                                                                   weights, bias, pending.config,
                                                                   **pending.stream_options())
        pending.landed(event)
        received = (*rows, topk_idx, weights, src_idx)
        digests.add(*(tensor[:num_rows[rank]] for tensor in received), combined, combined_weights)
    return digests


def be_late(worker: Worker, i: int) -> None:
    """One rank now and then."""
    if i % 2 and worker.rank == i % worker.num_ranks:
        time.sleep(0.003)


def large_round(worker: Worker, sizes: Sizes, choice: Choice, seed: int) -> Digests:
    """Sizes of training: tokens out and back."""
    work = Workload((sizes.num_tokens * LARGE_FACTOR, ) * worker.num_ranks,
                    sizes.hidden,
                    sizes.num_topk,
                    sizes.experts_per_rank,
                    routing=choice.of("random", "one_rank", "holes"),
                    seed=seed)
    device, buffer, rank = worker.device, worker.buffer(NUM_NVL_BYTES[1]), worker.rank
    in_rank = [is_token_in_rank(work, source) for source in range(worker.num_ranks)]
    x = [work.x(source) for source in range(worker.num_ranks)]
    want = torch.cat([rows[chosen[:, rank]] for rows, chosen in zip(x, in_rank)])
    want_combined = sum_of_copies(x[rank], in_rank[rank], rank, buffer._session.topology.ranks_per_node)
    mine, topk_idx = x[rank].to(device), work.topk_idx(rank).to(device)
    weights = torch.rand(topk_idx.shape, generator=work.generator(rank, 4)).to(device)
    digests = Digests(f"seed {seed}, {work}")
    for i in range(NUM_REPEATS):
        be_late(worker, i)
        config = Config(max(2, sizes.num_sms // (1 + i % 2) // 2 * 2), 4, 8)
        per_rank, per_node, per_expert, chosen, _ = buffer.get_dispatch_layout(topk_idx, work.num_experts)
        recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(mine,
                                                                       None,
                                                                       per_rank,
                                                                       per_node,
                                                                       chosen,
                                                                       per_expert,
                                                                       topk_idx,
                                                                       weights,
                                                                       config=config)
        combined, combined_weights, _ = buffer.combine(recv_x, handle, recv_weights, config=config)
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if i == 0:
            same_bits("recv_x", recv_x, want)
            # Sums of equal numbers: exact in float32 for any number of ranks of a node.
            same_numbers("combined_x", combined, want_combined)
        digests.add(recv_x, recv_idx, recv_weights, combined, combined_weights)
    buffer.check()
    return digests


def sum_of_copies(x: torch.Tensor, in_rank: torch.Tensor, rank: int, ranks_per_node: int) -> torch.Tensor:
    """What a combine makes of rows that come back as they were sent. Every node but the own one rounds its sum."""
    by_node = [x.float() * ranks.sum(1, keepdim=True) for ranks in in_rank.split(ranks_per_node, 1)]
    own = by_node.pop(rank // ranks_per_node)
    for other in by_node:
        own += other.bfloat16().float()
    return own.bfloat16()


def is_token_in_rank(work: Workload, source: int) -> torch.Tensor:
    """bool [N, R], as the reference has it, but quick."""
    idx = work.topk_idx(source).long()
    ranks = torch.where(idx >= 0, idx // work.experts_per_rank, work.num_ranks)
    found = torch.zeros((idx.shape[0], work.num_ranks + 1), dtype=torch.bool)
    return found.scatter_(1, ranks, True)[:, :work.num_ranks]
