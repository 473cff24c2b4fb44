"""The run as one sentence: read, render, tokenize, plan, predict, merge, write, report.

The only file that knows all phases. The passes over the rows are in `passes.py`, and the ways a run
can end in `ending.py`.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from runner.common.files import check_writable
from runner.common.machine import device_memory_bytes
from runner.config.run_config import RunConfig
from runner.demo import stand_in
from runner.driver.deadline import Deadline
from runner.driver.ending import end_without, fill, open_ledger, write
from runner.driver.guard import Guard
from runner.driver.passes import Passes
from runner.driver.setting import Rows, Setting, read
from runner.executors.executor import Executor
from runner.preset.auto import choose_strategy
from runner.preset.resolve import Job, find_job, settle
from runner.report.facts import say_summary, summarize
from runner.report.gather import Outcome, Reports
from runner.telemetry.logs import LogEvent, RunLogs
from runner.telemetry.metrics import Metrics
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Timeline
from sharding.strategies import Strategy


def run(
    config: RunConfig,
    *,
    started: float | None = None,
    on_signals_taken: Callable[[], None] = lambda: None,
    owns_process: bool = False,
) -> dict[str, Any]:
    """Do what `config` asks for and return the report, which is also on disk.

    Args:
        started: `time.monotonic()` at the start of the process, for `seconds.total` and the limit.
        on_signals_taken: called after Ray has replaced the signal handlers of the process.
        owns_process: whether this process belongs to the command, so that its streams may be taken.

    Raises:
        ConfigError, DataError: the user can fix it; nothing was written.
        DeadlineError: the time is over and --on-deadline is fail; the journal is kept.
        WorkerError, MergeError, JournalError: the run failed, and no submission was written. The
            message says what is safe in the journal.
    """
    started = time.monotonic() if started is None else started
    with (
        RunLogs(config.log_folder, takes_streams=owns_process, workers_too=config.verbose) as logs,
        Progress(
            started=started,
            stream=logs.terminal,
            log_format=config.log_format,
            record=logs.record,
        ) as progress,
        Metrics(config.metrics_port) as metrics,
    ):
        if metrics.url:
            progress.note(f"figures of this run: {metrics.url}", event="metrics", url=metrics.url)
        _check_outputs(config)
        logs.check()
        setting = _settle(config, progress, logs, started)
        report = _run(setting, metrics, on_signals_taken)
        logs.record(LogEvent("end", summarize(report, setting.config)))
    print(say_summary(report, setting.config), flush=True)
    return report


def _run(
    setting: Setting, metrics: Metrics, on_signals_taken: Callable[[], None]
) -> dict[str, Any]:
    """Read, predict, write and report."""
    config, job, progress = setting.config, setting.job, setting.progress
    progress.phase(f"reading {job.test_set.name}")
    rows = read(setting)
    if not rows.examples:
        progress.note(f"warning: {job.test_set} has no rows; the submission is a header.")
    outcome = Outcome(rows=len(rows.examples))
    reports = _reports(setting, rows, outcome)
    _open_logs(setting)

    def end() -> int:
        return end_without(setting, rows, outcome, lambda: reports.write(executor.computed))

    with (
        _open_executor(setting, rows) as executor,
        Guard(setting.last_call(is_starting=True), end) as guard,
    ):
        metrics.watch(lambda: reports.figures(executor.computed))
        dtype = executor.open(config.dtype) if rows.examples else ""
        if config.address is not None and rows.examples:
            # The memory of the nodes' devices was unknown until now.
            strategy = _choose_strategy(config, job, progress, executor.memory_bytes)
            setting = replace(setting, strategy=strategy)
            reports = replace(reports, strategy=strategy)
        on_signals_taken()
        with open_ledger(setting, rows, outcome, dtype) as ledger:
            passes = Passes(setting, rows, outcome, executor, ledger)
            if rows.table.unfinished() or passes.rows_to_improve():
                executor.start(job.spec(config, dtype), setting.strategy)
            if rows.table.unfinished():
                guard.postpone(setting.last_call())
                passes.predict()
                passes.repeat_broken_rows()
            guard.call_off()
            fill(setting, rows, ledger)
            progress.phase("merging and writing")
            write(setting, rows, outcome)
            passes.improve()
            quantization = passes.measure_quantization()
    return reports.write(executor.computed, quantization)


def _check_outputs(config: RunConfig) -> None:
    """Raise ConfigError if a file could not be written at the end."""
    check_writable("--output", config.output)
    for path in (config.report_path, config.page_path, config.trace_path):
        check_writable("--report", path)
    check_writable("--journal", config.journal_path)


def _settle(config: RunConfig, progress: Progress, logs: RunLogs, started: float) -> Setting:
    """Find the files, and resolve the settings that depend on them."""
    job = find_job(config, stand_in(config, progress))
    config = settle(config, job.preset)
    if config.address is None:
        strategy = _choose_strategy(config, job, progress, device_memory_bytes)
    else:
        strategy = choose_strategy(config, job.preset, lambda: None)
    return Setting(
        config=config,
        job=job,
        strategy=strategy,
        progress=progress,
        logs=logs,
        deadline=Deadline(config.time_limit, config.on_deadline),
        timeline=Timeline(started, clock=time.monotonic),
        started=started,
    )


def _choose_strategy(
    config: RunConfig, job: Job, progress: Progress, memory_bytes: Callable[[], int | None]
) -> Strategy | None:
    """Choose how groups share a replica in this memory, and tell the user why."""
    strategy = choose_strategy(config, job.preset, memory_bytes)
    if strategy is not None:
        progress.note(strategy.why)
    return strategy


def _open_logs(setting: Setting) -> None:
    is_json = setting.config.log_format == "json"
    setting.logs.open(
        None if is_json else setting.progress.show,
        leaves_stdout=setting.config.mode == "single" and not is_json,
    )


def _open_executor(setting: Setting, rows: Rows) -> Executor:
    config, progress, timeline = setting.config, setting.progress, setting.timeline
    progress.phase("starting")
    if config.mode == "single" or not rows.examples:
        from runner.executors.single import InProcess

        return InProcess(verbose=config.verbose, progress=progress, timeline=timeline)
    from runner.executors.ray.replicas import RayReplicas

    return RayReplicas(
        num_workers=config.num_workers,
        verbose=config.verbose,
        log_folder=setting.logs.folder,
        progress=progress,
        timeline=timeline,
        is_tensor=setting.strategy is not None and setting.strategy.name == "tensor",
        group_size=config.members,
        family=setting.job.preset.class_name,
        left_s=lambda: setting.deadline.left_s(setting.now()),
        address=config.address,
    )


def _reports(setting: Setting, rows: Rows, outcome: Outcome) -> Reports:
    return Reports(
        config=setting.config,
        strategy=setting.strategy,
        shape=setting.job.preset.shape,
        table=rows.table,
        outcome=outcome,
        seconds=setting.seconds,
        timeline=setting.timeline,
        progress=setting.progress,
        limit_s=setting.deadline.limit_s,
        events=setting.deadline.events,
        now=setting.now,
    )
