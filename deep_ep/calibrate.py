"""How long a high-throughput call takes on how many SMs, measured once for a machine, and the budget that follows.

A call that moves B bytes, R of them over links, takes

    latency + max(R / link, B / (SMs * rate of one SM))

so beyond some number of SMs more of them bring nothing, and a small call is not helped by any. `deep_ep calibrate` fits
latency, link and rate to a benchmark's figures and stores them:

    python -m deep_ep bench intranode --tokens 128,512,2048,8192 --num-sms 4,8,16,24 --save out
    python -m deep_ep calibrate out/*_intranode_*.json

From then on, calls without a `config` use no more SMs than they need, up to `Buffer.num_sms`. Calibrate again with
DEEP_EP_LEND_BYTES=0 for Buffers that lend nothing. DEEP_EP_COST_MODEL names another file, or "off".
"""

import functools
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Optional

from deep_ep import _env
from deep_ep_cpp import InvalidArgument

FORMAT_VERSION = 1
# A budget is enough when the largest one would be faster by no more than this.
TOLERANCE = 0.05
MIN_SMS = 2
OPERATIONS = ("dispatch", "combine")
READABLE_BY_ALL = 0o644
logger = logging.getLogger("deep_ep")


@dataclass(frozen=True)
class Sample:
    """One measured call."""

    num_sms: int
    num_bytes: int  # moved, to the own rank too
    remote_bytes: int  # of those, over links
    time_us: float


def enough_sms(most: int, time_us: Callable[[int], float]) -> int:
    """The smallest even number of SMs up to `most` with which a call is not slower by more than TOLERANCE."""
    limit = time_us(most) * (1 + TOLERANCE)
    return next((num_sms for num_sms in range(MIN_SMS, most, 2) if time_us(num_sms) <= limit), most)


@dataclass(frozen=True)
class Cost:
    """The cost of one operation."""

    latency_us: float
    link_gb_per_s: float  # 0: nothing crosses a link
    sm_gb_per_s: float

    def time_us(self, num_sms: int, num_bytes: float, remote_bytes: float) -> float:
        on_link = remote_bytes / self.link_gb_per_s / 1e3 if self.link_gb_per_s > 0 else 0.0
        return self.latency_us + max(on_link, num_bytes / (num_sms * self.sm_gb_per_s) / 1e3)

    def enough_sms(self, most: int, num_bytes: float, remote_bytes: float) -> int:
        """The smallest even number of SMs up to `most` that is not slower by more than TOLERANCE."""
        return enough_sms(most, lambda num_sms: self.time_us(num_sms, num_bytes, remote_bytes))


def fit(samples: Sequence[Sample], link_gb_per_s: float) -> Cost:
    """The cost with the least sum of squared relative errors. `link_gb_per_s`: the measured ceiling, 0 without links.

    The rate is searched over a geometric grid, the latency that goes best with each follows in closed form.
    """
    if len({sample.num_sms for sample in samples}) < 2 or len({sample.num_bytes for sample in samples}) < 2:
        raise InvalidArgument("a cost needs calls with at least two SM budgets and two sizes")
    weights = [1 / sample.time_us**2 for sample in samples]

    def at(rate: float) -> tuple[float, Cost]:
        bare = Cost(0.0, link_gb_per_s, rate)
        rests = [s.time_us - bare.time_us(s.num_sms, s.num_bytes, s.remote_bytes) for s in samples]
        latency = max(0.0, sum(w * rest for w, rest in zip(weights, rests)) / sum(weights))
        return sum(w * (rest - latency)**2 for w, rest in zip(weights, rests)), Cost(latency, link_gb_per_s, rate)

    rates = [0.001 * 1.02**i for i in range(700)]  # GB/s of one SM: from the CPU's 0.001 to 1000
    return min((at(rate) for rate in rates), key=lambda found: found[0])[1]


@dataclass(frozen=True)
class CostModel:
    """The costs of one machine, rank count and way of receiving (lent or through slots)."""

    costs: dict[str, Cost]  # by operation

    def budget(self, operation: str, most: int, num_bytes: int, num_ranks: int) -> int:
        """SMs for a call that moves so many bytes, evenly over all ranks; at most `most`."""
        return _budget(self.costs[operation], most, num_bytes, num_ranks) if operation in self.costs else most


@functools.lru_cache(maxsize=4096)
def _budget(cost: Cost, most: int, num_bytes: int, num_ranks: int) -> int:
    return cost.enough_sms(most, num_bytes, num_bytes * (num_ranks - 1) / num_ranks)


def default_path(gpu: str, num_ranks: int) -> Optional[Path]:
    """The cache for this kind of machine. None: there is no place for one."""
    folder = _env.cache_folder()
    name = "".join(c if c.isalnum() else "-" for c in gpu.lower()) or "cpu"
    return None if folder is None else folder / f"cost_model_{name}_x{num_ranks}.json"


def store(path: Path, way: str, model: CostModel, source: dict[str, Any], replaces_damaged: bool = False) -> None:
    """Adds the model for `way` ("lent" or "slots") to the file, beside one for the other way.

    Raises InvalidArgument when there is such a file and it is none of ours, unless `replaces_damaged`.
    """
    models: dict[str, Any] = {}
    if path.exists():
        try:
            models = dict(_read_models(path))
        except InvalidArgument:
            if not replaces_damaged:
                raise
    costs = {operation: asdict(cost) for operation, cost in model.costs.items()}
    models[way] = {"costs": costs, "source": source}
    path.parent.mkdir(parents=True, exist_ok=True)
    # By rename: who reads it meanwhile finds the old file or the new one, and so does everybody after a crash.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as file:
        part = Path(file.name)
        try:
            file.write(json.dumps({"format": FORMAT_VERSION, "models": models}, indent=2) + "\n")
            file.close()
            part.chmod(READABLE_BY_ALL)
            part.replace(path)
        except BaseException:
            part.unlink()
            raise


def load(path: Path, way: str) -> Optional[CostModel]:
    """None: the file has no model for `way`. Raises InvalidArgument when it is not such a file."""
    model = _read_models(path).get(way)
    if model is None:
        return None
    try:
        costs = {operation: Cost(**cost) for operation, cost in model["costs"].items()}
        _check(path, costs)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _no_model(path, error) from error
    return CostModel(costs)


def _no_model(path: Path, error: Exception) -> InvalidArgument:
    return InvalidArgument(f"cost model {path}: expected a file of deep_ep calibrate, got {error!r}")


def _read_models(path: Path) -> dict[str, Any]:
    """By way of receiving."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, models = content["format"], content["models"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _no_model(path, error) from error
    if version != FORMAT_VERSION or not isinstance(models, dict):
        raise InvalidArgument(f"cost model {path}: expected format {FORMAT_VERSION}, got {version}")
    return models


def _check(path: Path, costs: dict[str, Cost]) -> None:
    for operation, cost in costs.items():
        numbers = (cost.latency_us, cost.link_gb_per_s, cost.sm_gb_per_s)
        if operation not in OPERATIONS or not all(math.isfinite(n) and n >= 0 for n in numbers) or numbers[2] == 0:
            raise InvalidArgument(f"cost model {path}: not usable: {operation}: {cost}")


def find(gpu: str, num_ranks: int, way: str) -> Optional[CostModel]:
    """What DEEP_EP_COST_MODEL says ("off": none), or what was stored for such a machine, if anything was.

    Raises InvalidArgument when the caller named a file that is none. A cache that is none only costs a warning.
    """
    given = _env.cost_model()
    if given == "off":
        return None
    if given:
        return load(Path(given), way)
    path = default_path(gpu, num_ranks)
    try:
        return load(path, way) if path is not None and path.exists() else None
    except (OSError, InvalidArgument) as error:
        _warn_once(str(error))
        return None


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("the stored cost model is not used, calls take the SM budget of the caller: %s", reason)


def samples_of(rows: Iterable[dict[str, Any]], operation: str, num_ranks: int) -> list[Sample]:
    """From the rows of a benchmark's JSON: cached dispatches, plain combines, uniform routing."""
    names = {"dispatch": ("dispatch BF16 cached", "dispatch FP8 cached"), "combine": ("combine BF16", )}[operation]
    samples = []
    for row in rows:
        if row["operation"] not in names or row["routing"] != "uniform" or num_ranks < 2:
            continue
        num_bytes = row["remote_bytes"] * num_ranks // (num_ranks - 1)
        samples.append(
            Sample(row["num_sms"], num_bytes, row["remote_bytes"],
                   row.get("queued_us", 0.0) or row["chained_us"]))
    return samples


def calibrate(report: dict[str, Any], to: Optional[Path]) -> tuple[Path, str, CostModel]:
    """Fits and stores; returns the file, the way of receiving that was measured, and the model."""
    if report.get("benchmark") != "intranode":
        raise InvalidArgument(f"expected figures of the intranode benchmark, got {report.get('benchmark')!r}")
    environment = report.get("environment", {})
    if "host" in (report.get("heap"), environment.get("DEEP_EP_HEAP")):
        raise InvalidArgument("these figures are of a heap in host memory (DEEP_EP_HEAP=host, or GPUs without peer "
                              "access), which no model is for")
    num_ranks, rows = report["num_ranks"], report["rows"]
    link = 0.0 if report["ranks_as_threads"] else max((row["ceiling_gb_per_s"] for row in rows), default=0.0)
    costs = {operation: fit(samples_of(rows, operation, num_ranks), link) for operation in OPERATIONS}
    way = "slots" if environment.get("DEEP_EP_LEND_BYTES", "0") == "0" else "lent"
    path = to or default_path(report["machine"].get("gpu", ""), num_ranks)
    if path is None:
        raise InvalidArgument("this user has no home folder to store it in: set XDG_CACHE_HOME, or give --to")
    model = CostModel(costs)
    source = {key: report[key] for key in ("date", "commit", "command", "machine", "num_ranks", "ranks_as_threads")}
    store(path, way, model, source, replaces_damaged=to is None)
    return path, way, model


def run(reports: list[Path], to: Optional[Path]) -> int:
    """The exit status."""
    for report in reports:
        try:
            path, way, model = calibrate(json.loads(report.read_text(encoding="utf-8")), to)
        except (InvalidArgument, KeyError, json.JSONDecodeError) as error:
            print(f"{report}: {error}", file=sys.stderr)
            return 1
        print(f"{report} -> {path} ({way})")
        for operation, cost in model.costs.items():
            print(f"  {operation}: {cost.latency_us:.1f} us + max(remote bytes / {cost.link_gb_per_s:.0f} GB/s, "
                  f"bytes / (SMs * {cost.sm_gb_per_s:.1f} GB/s))")
    return 0


if __name__ == "__main__":
    from deep_ep.__main__ import main
    sys.exit(main(["calibrate", *sys.argv[1:]]))
