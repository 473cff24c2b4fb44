"""A few rows of a test set, run by the ordinary command in a temporary folder -> measured rates.

Except for its rows, this is a real run, so nothing is modelled here. Knows the report's keys
`seconds` and `workers`. Does not know Ray or JAX.
"""

import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.background import python_environment
from runner.common.errors import ConfigError, WorkerError
from runner.common.poolings import padded_length
from runner.common.records import Examples
from runner.config.command import command_flags
from runner.planner.records import Measured, Option, PlanInput
from runner.telemetry.progress import Progress
from sharding.batches import BatchShape, Plan
from sharding.fit import plan_flops
from sharding.times import compile_seconds

# How long all batches together should take, by the forecast before calibration.
MEASURE_S = 20.0
# Batches per length and replica: at least two, so that one is in flight while another computes.
FEWEST_BATCHES, MOST_BATCHES = 2, 8
# Where to sample rows in order of length, as shares of all FLOPs: each stands for a third of them.
PLACES = (5 / 6, 1 / 2, 1 / 6)
STOPS_WITHIN_S = 30


def calibrate(job: PlanInput, option: Option, examples: Examples, progress: Progress) -> Measured:
    """Run a few batches in the requested way and return the measurements.

    Args:
        option: the requested way.

    Raises:
        ConfigError: it does not fit.
        WorkerError: the run failed.
    """
    if not option.fits or option.plan is None:
        raise ConfigError(
            f"--calibrate runs a few batches in the requested way, which does not fit: "
            f"{option.why_not}. Received: --mode {option.mode}; --plan without --calibrate shows "
            "what fits"
        )
    rows = sample_rows(job, option)
    sample = _rows_of(examples, rows)
    replicas = option.replicas
    of_sample = replace(job, lengths=job.lengths[rows], plans={})
    plan = of_sample.plan(budget=option.budget, replicas=replicas)
    lengths = ", ".join(str(one.length) for one in plan.shapes)
    progress.note(f"calibrating: {len(plan.batches)} batches of {lengths} tokens a row")
    progress.phase("calibrating: a run of a few batches")
    runs = [_measure(job, sample)]
    if job.devices.is_host and any(worker["compiled_shapes"] for worker in runs[0]["workers"]):
        # Compiling took cores from the batches. Now the programs are in the cache.
        progress.phase("calibrating: the same again, with nothing left to compile")
        runs.append(_measure(job, sample))
    return _evaluate(job, option, plan, runs)


def _evaluate(job: PlanInput, option: Option, plan: Plan, runs: list[dict[str, Any]]) -> Measured:
    """Return what the reports of one or two runs of a plan show; only the first compiled."""
    first, last = runs[0], runs[-1]
    flops = plan_flops(job.preset.shape, plan) * _busiest_share(job, option)
    flops_per_s = flops / _busy_s(last["workers"])
    peak = job.peak(option)
    before_predict_s = first["seconds"]["total"] - first["seconds"]["predict"]
    one_shape_s = compile_seconds(
        job.preset.shape,
        kind=job.devices.kind,
        shapes=1,
        replicas=option.replicas,
        members=option.group_size,
        strategy=option.strategy,
    )
    slowness = 1.0
    if option.seconds is not None:
        expected_s = option.seconds.start + option.seconds.load + one_shape_s
        slowness = before_predict_s / expected_s
    # The default is for programs from the cache: other shapes may still have to be compiled.
    compile_s = max(
        (
            worker["compile_s"] / worker["compiled_shapes"]
            for worker in first["workers"]
            if worker["compiled_shapes"]
        ),
        default=one_shape_s,
    )
    others = len(plan.shapes) - 1
    if last is not first and others:
        # Batches and compiling shared the cores, so a shape added less than it took to compile.
        added = first["seconds"]["predict"] - last["seconds"]["predict"]
        compile_s = min(compile_s, max(0.0, added * option.replicas / others))
    return Measured(
        way=option.way,
        flops_per_s=flops_per_s,
        efficiency=flops_per_s / peak if peak else None,
        before_predict_s=before_predict_s,
        slowness=slowness,
        compile_s=compile_s,
        batches=len(plan.batches),
        seconds=sum(one["seconds"]["total"] for one in runs),
    )


def sample_rows(job: PlanInput, option: Option) -> np.ndarray:
    """Return int64 (rows,): the rows for a few batches each of a long, a medium and a short length.

    Each row is repeated, since only its length determines the cost of a batch. Each length gets
    about the same FLOPs, since each represents a third of the test set's.
    """
    assert option.plan is not None, "this is a bug: only what fits has a plan"
    shape, replicas = job.preset.shape, option.replicas
    order = np.argsort(job.lengths, kind="stable")
    costs = np.array([shape.batch_flops(BatchShape(1, int(n))) for n in job.lengths[order]], float)
    up_to = np.cumsum(costs)
    chosen = []
    for place in PLACES:
        row = int(order[min(np.searchsorted(up_to, place * up_to[-1]), order.size - 1)])
        padded = padded_length(
            job.config.pooling, int(job.lengths[row]), job.config.sequence_length
        )
        rows_of_batch = max(1, option.budget // padded)
        batches = replicas * FEWEST_BATCHES
        if option.seconds and option.seconds.predict:
            total = sum(shape.batch_flops(batch.shape) for batch in option.plan.batches)
            one = shape.batch_flops(BatchShape(rows_of_batch, padded)) / total
            wanted = MEASURE_S / len(PLACES) / (one * option.seconds.predict)
            batches = replicas * round(min(max(wanted / replicas, FEWEST_BATCHES), MOST_BATCHES))
        chosen += [row] * (batches * rows_of_batch)
    return np.array(chosen)


def _rows_of(examples: Examples, rows: np.ndarray) -> Examples:
    """Return some rows under new ids, since rows may repeat."""
    return Examples(
        tuple(str(number) for number in range(len(rows))),
        {name: tuple(cells[row] for row in rows) for name, cells in examples.columns.items()},
    )


def _measure(job: PlanInput, sample: Examples) -> dict[str, Any]:
    """Run the ordinary command on a sample of rows and return its report."""
    with tempfile.TemporaryDirectory(prefix="arena-runner-calibrate-") as folder:
        rows, output = Path(folder, "rows.csv"), Path(folder, "submission.csv")
        task, task_file = replace(job.config.task, keep_columns=()), Path(folder, "task.toml")
        task_file.write_text(task.as_toml(), encoding="utf-8")
        with open(rows, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([task.id_column, *sample.columns])
            writer.writerows(zip(sample.ids, *sample.columns.values(), strict=True))
        flags = command_flags(job.config, calibrates=True, input=rows, output=output)
        process = subprocess.Popen(
            [sys.executable, "-m", "runner.cli", "--config", str(task_file), *flags],
            env=python_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = process.communicate()
        except BaseException:
            # On SIGTERM it ends its workers itself.
            process.terminate()
            try:
                process.communicate(timeout=STOPS_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        if process.returncode:
            lines = errors.splitlines() or ["it printed nothing"]
            said = next((line for line in lines if line.startswith("error: ")), lines[-1])
            raise WorkerError(
                f"The calibration run failed with exit code {process.returncode}: "
                f"{said.removeprefix('error: ')}"
            )
        report: dict[str, Any] = json.loads(
            output.with_name(f"{output.name}.report.json").read_text()
        )
        return report


def _busy_s(workers: list[dict[str, Any]]) -> float:
    """Return the busy seconds of all replicas together, each by its busiest member."""
    busiest: dict[int, float] = {}
    for worker in workers:
        replica = worker["replica"]
        busiest[replica] = max(busiest.get(replica, 0.0), worker["busy_s"])
    return sum(busiest.values())


def _busiest_share(job: PlanInput, option: Option) -> float:
    """Return the share of a replica's FLOPs that its busiest member computes."""
    layers, members = job.preset.shape.num_layers, option.group_size
    if option.strategy == "pipeline":
        return -(-layers // members) / layers
    return 1 / members
