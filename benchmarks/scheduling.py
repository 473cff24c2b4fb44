"""How close to the bound do runs end, and how many workers can one driver feed?

Simulates runs (`benchmarks/simulated.py`): the real planner, backlog, dealer and steering, on
simulated devices and a simulated clock. Two workers have speeds 1.0 and 0.6; many have random
speeds, and some of them die, hang or slow down to a third. The makespan is compared with a bound
that no scheduler can beat: all work of the plan, as a fluid over the total speed, from the time
when each worker has its first program, without the time lost to a death. The many run again with
batches eight times as large: each worker then has few, and its last one matters more.

Then it measures the driver (`benchmarks/driver.py`): its time per batch if replicas compute
nothing, the number of workers at which that takes all of its time, and simulated runs on both sides
of that number. Prints one JSON object at the end; the exit code is 1 if a required makespan is more
than 3 % above its bound, or if planning takes more than 30 s.

    python benchmarks/scheduling.py                     # all, about 3 minutes
    python benchmarks/scheduling.py --rows 60000 --workers 64 --no-driver
"""

import argparse
import json
import os
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.simulated import (  # noqa: E402
    FLOPS_PER_S,
    FROM_CACHE_S,
    SHAPE,
    Replica,
    Simulated,
)
from sharding.batches import BatchShape  # noqa: E402

MOST_ABOVE, MOST_PLANNING_S = 0.03, 30.0
# With many workers: workers per node, and the fractions that die, hang and slow down.
ON_A_NODE = 8
DIE, HANG, SLOW_DOWN = 0.02, 0.005, 0.05
SPEEDS = (0.5, 1.5)
TOKENS_PER_BATCH, LARGE = 2048, 8
# Token lengths like those of the contest: the median, and the sigma of the logarithm.
MEDIAN_TOKENS, SIGMA = 400, 0.75
# The batches over which the driver is measured; and for simulations, multiples of the number of
# workers that it can just feed, and rows per worker.
DRIVER_BATCHES, AROUND, ROWS_OF_A_WORKER = 4000, (0.5, 0.9, 1.5), 600


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Simulate the scheduler at scale, and measure its driver.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows for many workers")
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--batch-s", type=float, default=1.0, help="mean seconds of a batch")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind, by random seed")
    parser.add_argument("--no-driver", action="store_true", help="simulate only, without Ray")
    arguments = parser.parse_args()
    rows, workers, batch_s = arguments.rows, arguments.workers, arguments.batch_s
    runs = []
    for seed in range(arguments.seeds):
        runs.append(alone(two_workers, seed))
        runs.append(alone(many_workers, rows, workers, batch_s, seed))
        runs.append(alone(many_workers, rows, workers, batch_s, seed, larger=LARGE))
    document: dict[str, Any] = {
        "benchmark": "scheduling",
        "arguments": vars(arguments),
        "load_average": os.getloadavg()[0],
        "runs": runs,
    }
    if not arguments.no_driver:
        document["driver"] = driver_limit(batch_s)
    print(json.dumps(document))
    sys.exit(
        any(
            run["is_asked"]
            and (run["above_bound"] > MOST_ABOVE or run["planning_s"] > MOST_PLANNING_S)
            for run in runs
        )
    )


def alone(
    simulate: Callable[..., dict[str, Any]], *arguments: Any, **options: Any
) -> dict[str, Any]:
    """Simulate a run in its own process, so that its memory is measured alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        run = process.submit(simulate, *arguments, **options).result()
    print(in_words(run), flush=True)
    return run


def lengths_of(rows: int, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    return chance.lognormal(np.log(MEDIAN_TOKENS), SIGMA, rows).clip(20, 512).astype(np.int64)


def two_workers(seed: int) -> dict[str, Any]:
    """Simulate 25,000 rows on two workers, one at 0.6 of the other's speed."""
    replicas = [Replica(0, speed=FLOPS_PER_S), Replica(1, speed=0.6 * FLOPS_PER_S)]
    run = one_run("25,000 rows on speeds 1.0 and 0.6", lengths_of(25_000, seed), replicas, seed)
    return run | {"is_asked": True}


def many_workers(
    rows: int, workers: int, batch_s: float, seed: int, *, larger: int = 1, driver_s: float = 0.0
) -> dict[str, Any]:
    """Simulate workers of random speeds; some die, hang or become stragglers during the run.

    Args:
        batch_s: seconds of a batch of `TOKENS_PER_BATCH` on a worker of speed one.
        larger: multiplies the tokens of a batch, and so its seconds.
        driver_s: seconds that the driver needs for every batch.
    """
    chance = random.Random(seed)
    lengths = lengths_of(rows, seed)
    length = round(float(lengths.mean()))
    flops = SHAPE.batch_flops(BatchShape(TOKENS_PER_BATCH // length, length))
    about_s = float(lengths.sum()) / TOKENS_PER_BATCH / workers * batch_s
    replicas = []
    for number in range(workers):
        replica = Replica(
            number,
            node=str(number // ON_A_NODE),
            speed=flops / batch_s * chance.uniform(*SPEEDS),
            starts_in_s=chance.uniform(5.0, 10.0),
        )
        at, fate = chance.uniform(0.1, 0.95) * about_s + 10, chance.random()
        if fate < DIE:
            replica.dies_at = at
        elif fate < DIE + HANG:
            replica.hangs_at = at
        elif fate < DIE + HANG + SLOW_DOWN:
            replica.slows_at = at
        replicas.append(replica)
    tokens = larger * TOKENS_PER_BATCH
    name = f"{rows:,} rows on {workers:,} workers, {tokens:,} tokens a batch"
    if driver_s:
        name += f", {driver_s * 1e3:.2f} ms of the driver for each"
    run = one_run(name, lengths, replicas, seed, max_tokens_per_batch=tokens, driver_s=driver_s)
    return run | {"is_asked": larger == 1 and not driver_s}


def one_run(
    name: str, lengths: np.ndarray, replicas: Sequence[Replica], seed: int, **options: Any
) -> dict[str, Any]:
    """Simulate a run; return its makespan and bound, and what it cost on this machine."""
    began = time.perf_counter()
    run = Simulated(lengths, replicas, seed=seed, **options)
    batches = len(run.first_plan.batches)
    ended_s = run.run()
    took_s = time.perf_counter() - began
    lost = [row for row, how in enumerate(run.merger.how) if how != "predicted"]
    assert not lost, f"this is a bug: {len(lost)} rows have no answer, the first {lost[0]}"
    bound_s = lower_bound_s(run.work, replicas)
    return {
        "name": name,
        "rows": len(lengths),
        "workers": len(replicas),
        "batches": batches,
        "seed": seed,
        "makespan_s": ended_s,
        "bound_s": bound_s,
        "above_bound": ended_s / bound_s - 1,
        "died": sum(replica.dies_at < ended_s for replica in replicas),
        "hung": sum(replica.hangs_at < ended_s for replica in replicas),
        "slowed": sum(replica.slows_at < ended_s for replica in replicas),
        "copied_batches": run.dealer.copied_batches,
        "planning_s": run.planning_s,
        "decision_s": run.deciding_s / run.decisions,
        "decisions": run.decisions,
        "simulated_in_s": took_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def lower_bound_s(work: float, replicas: Sequence[Replica]) -> float:
    """Return the earliest time at which any scheduler can end: `work` FLOPs as a fluid."""
    in_cache_at: dict[str, float] = defaultdict(lambda: float("inf"))
    for one in replicas:
        first_at = one.starts_in_s + one.compiles_in_s
        in_cache_at[one.node] = min(in_cache_at[one.node], first_at)

    def done(until: float) -> float:
        return sum(one.speed * useful_s(one, until, in_cache_at[one.node]) for one in replicas)

    low, high = 0.0, 1.0
    while done(high) < work:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if done(middle) < work else (low, middle)
    return high


def useful_s(replica: Replica, until: float, in_cache_at: float = float("inf")) -> float:
    """Return the full-speed seconds that a replica has up to `until`. A death or a hang costs only
    another start and first program: the bound knows of it at once.

    in_cache_at: when another replica of its node may have left a program in the cache.
    """
    from_s = min(
        replica.starts_in_s + replica.compiles_in_s,
        max(replica.starts_in_s, in_cache_at) + FROM_CACHE_S,
    )
    lost_at = min(replica.dies_at, replica.hangs_at)
    back_at = lost_at + replica.restarts_in_s + FROM_CACHE_S
    spans = [(from_s, min(until, lost_at)), (back_at, until)]
    total = 0.0
    for since, end in spans:
        at = min(max(since, replica.slows_at), max(since, end))
        total += max(0.0, at - since) + max(0.0, end - at) * replica.slows_to
    return total


def driver_limit(batch_s: float) -> dict[str, Any]:
    """Measure the driver's time per batch, say how many workers it can feed, and simulate runs on
    fewer and on more."""
    from benchmarks.driver import measure

    found = measure(DRIVER_BATCHES)
    most = batch_s / found["batch_s"]
    looks = [f"{count:,} workers {took * 1e3:.2f} ms" for count, took in found["look_s"].items()]
    print(
        f"driver: {found['batch_s'] * 1e3:.2f} ms a batch, {found['batch_cpu_s'] * 1e3:.2f} ms of "
        f"its processor; with batches of {batch_s:g} s it is the bottleneck from {most:,.0f} "
        f"workers on. One look at the calls of {', '.join(looks)}",
        flush=True,
    )
    around = [round(most * share) for share in AROUND]
    runs = [
        alone(
            many_workers, ROWS_OF_A_WORKER * workers, workers, batch_s, 0, driver_s=found["batch_s"]
        )
        for workers in around
    ]
    return found | {"most_workers": most, "runs": runs}


def in_words(run: dict[str, Any]) -> str:
    return (
        f"{run['name']}: {run['batches']:,} batches, {run['died']} died, {run['hung']} hung, "
        f"{run['slowed']} slowed to a third; {run['makespan_s']:.1f} s, "
        f"{run['above_bound']:+.2%} of the bound of {run['bound_s']:.1f} s; planned in "
        f"{run['planning_s']:.1f} s, {run['decision_s'] * 1e6:.0f} us a decision, "
        f"{run['copied_batches']} batches copied, {run['peak_rss_bytes'] / 1e6:,.0f} MB of memory, "
        f"simulated in {run['simulated_in_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
