"""The run as one sentence: read, render, tokenize, plan, predict, merge, write, report.

The only file that knows all stages.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from runner.accuracy import compare, reference_batch
from runner.config import RunConfig
from runner.dataset import read_examples
from runner.errors import ConfigError, DataError, WorkerError
from runner.fingerprint import fingerprint
from runner.merge import Merger
from runner.presets import Preset, check_lora, read_head, read_preset
from runner.progress import Progress
from runner.prompts import render_prompts
from runner.records import Faults, ModelSpec, TokenTable, WorkerInfo
from runner.report import make_report, summarize, versions, write_report
from runner.strategy import Strategy, choose_strategy, tokens_per_batch
from runner.submission import LABEL_COLUMNS, check_writable, write_submission
from runner.tokenization import tokenize
from sharding.batches import BatchShape, Plan, plan_batches
from sharding.buckets import choose_buckets
from sharding.topology import BUCKET_MULTIPLES

if TYPE_CHECKING:
    from runner.dispatch import RayReplicas
    from runner.single import InProcess

T = TypeVar("T")


def run(
    config: RunConfig,
    *,
    started: float | None = None,
    on_signals_taken: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Do what `config` asks for and return the report, which is also on disk then.

    Args:
        started: `time.monotonic()` of the process' start, for `seconds.total`.
        on_signals_taken: called when Ray has replaced the process' signal handlers.

    Raises:
        ConfigError, DataError: the person's to mend; nothing was written.
        WorkerError, MergeError: the run failed; no submission was written.
    """
    started = time.monotonic() if started is None else started
    seconds = dict.fromkeys(
        ("total", "read", "tokenize", "start_workers", "load", "compile", "predict", "merge"), 0.0
    )
    with Progress(started=started) as progress:
        check_writable("--output", config.output)
        check_writable("--report", config.report_path)
        files = _find_files(config, progress)
        preset = read_preset(files["preset"])
        spec = _model_spec(config, files, preset)

        progress.stage(f"reading {files['input'].name}")
        with _timed(seconds, "read"):
            examples = read_examples(files["input"])
            texts = render_prompts(examples, text_format=config.text_format)
        if not examples:
            progress.note(f"warning: {files['input']} has no rows; the submission is a header.")
            return _finish_without_rows(config, started, seconds)

        def count(rows: int) -> None:
            done = rows == len(texts)
            progress.stage(
                "starting, loading and compiling"
                if done
                else f"tokenizing {rows:,}/{len(texts):,} rows"
            )

        strategy = choose_strategy(config, preset)
        if strategy is not None:
            progress.note(strategy.why)
        progress.stage("tokenizing")
        with _open_executor(config, preset, strategy, progress) as executor:
            tokenizing = _in_background(
                lambda: _tokenize(texts, preset, config.sequence_length, count)
            )
            executor.start(spec)
            on_signals_taken()
            while not tokenizing.done():
                executor.poll()
                time.sleep(0.05)
            tokens, seconds["tokenize"] = tokenizing.result()

            replicas = len(executor.stats) // config.members
            plan = plan_run(tokens, config, preset, kind=executor.kind, replicas=replicas)
            costs = [float(preset.shape.batch_flops(batch.shape)) for batch in plan.batches]
            progress.expect(rows=len(examples), cost=sum(costs))
            merger = Merger(examples.ids, len(LABEL_COLUMNS))
            lengths = tokens.lengths
            for result in executor.run(plan, tokens, costs=costs, ids=examples.ids):
                merger.add(result)
                progress.advance(
                    rows=len(result.rows),
                    tokens=int(lengths[list(result.rows)].sum()),
                    cost=costs[result.batch],
                )
            progress.stage("merging and writing")
            with _timed(seconds, "merge"):
                probabilities = merger.finish()
                write_submission(config.output, examples.ids, probabilities)
            quantization = _quantization_report(
                config, preset, spec, executor, lengths, probabilities, progress
            )

        seconds |= {
            "start_workers": executor.start_workers_s,
            "load": max(worker.load_s for worker in executor.stats),
            "compile": max(worker.compile_s for worker in executor.stats),
            "predict": executor.predict_s,
            "total": time.monotonic() - started,
        }
        report = make_report(
            config,
            fingerprint=_fingerprint(config, files, preset, examples.ids, texts, executor.info),
            rows=len(examples),
            real_tokens=plan.real_tokens,
            padded_tokens=plan.padded_tokens,
            model_flops=_model_flops(preset, lengths),
            seconds=seconds,
            info=executor.info,
            workers=executor.stats,
            faults=executor.faults,
            plan=_describe(plan),
            strategy=strategy,
            quantization=quantization,
        )
        write_report(config.report_path, report)
    print(summarize(report, config, is_demo_model=config.uses_demo_model), flush=True)
    return report


def plan_run(
    tokens: TokenTable, config: RunConfig, preset: Preset, *, kind: str, replicas: int
) -> Plan:
    """Return the batches for these rows on so many replicas on this kind of device.

    `padded-mean` averages over every position up to the sequence length, so every row is padded
    to it; the other poolings do not see padding, and rows get the shortest bucket.
    """
    shape = preset.shape
    if config.pooling == "padded-mean":
        buckets: tuple[int, ...] = (config.sequence_length,)
    else:
        buckets = choose_buckets(
            tokens.lengths,
            sequence_length=config.sequence_length,
            cost=lambda length: shape.batch_flops(BatchShape(1, length)),
            cost_of_shape=shape.compile_flops(kind, replicas),
            multiple_of=BUCKET_MULTIPLES[kind],
        )
    budget = tokens_per_batch(config, preset, kind)
    return plan_batches(tokens.lengths, buckets=buckets, max_tokens_per_batch=budget)


def _find_files(config: RunConfig, progress: Progress) -> dict[str, Path]:
    """Return the files of the run, the demo's where the person named none."""
    named = {
        "preset": config.preset,
        "lora_weights": config.lora_weights,
        "head_kernel": config.head_kernel,
        "head_bias": config.head_bias,
        "input": config.input,
    }
    if config.preset is None or config.input is None:
        from runner.demo import ensure_demo

        demo = ensure_demo(cache_folder(), progress)
        if config.preset is None:
            named |= demo.model_files
        if config.input is None:
            named["input"] = demo.test_set
    return {name: path for name, path in named.items() if path is not None}


def _model_spec(config: RunConfig, files: dict[str, Path], preset: Preset) -> ModelSpec:
    """Check the model files and return where workers find them."""
    lora = files.get("lora_weights")
    if lora is not None:
        check_lora(lora, preset.shape)
    read_head(
        files["head_kernel"],
        files["head_bias"],
        hidden_dim=preset.shape.hidden_dim,
        classes=len(LABEL_COLUMNS),
    )
    return ModelSpec(
        preset=str(preset.path.resolve()),
        lora_weights=str(lora.resolve()) if lora is not None else None,
        head_kernel=str(files["head_kernel"].resolve()),
        head_bias=str(files["head_bias"].resolve()),
        classes=len(LABEL_COLUMNS),
        pooling=config.pooling,
        dtype=config.dtype,
        quantization=_quantization_to_do(config, preset),
        compilation_cache=str(cache_folder() / "xla"),
    )


def _quantization_to_do(config: RunConfig, preset: Preset) -> str | None:
    """Return what workers have to make of the preset's weights while they load them."""
    asked = None if config.quantization == "none" else config.quantization
    if preset.quantization is None:
        return asked
    if asked not in (None, preset.quantization):
        raise ConfigError(
            f"{preset.path} holds {preset.quantization} weights; take the float preset for another "
            f"quantization. Received: --quantization {asked}"
        )
    if config.lora_weights is not None:
        raise ConfigError(
            f"{preset.path} holds {preset.quantization} weights, into which no LoRA file can be "
            "merged; `run.py prepare` merges it before. Received: --lora-weights "
            f"{config.lora_weights}"
        )
    return None


def _quantization_report(
    config: RunConfig,
    preset: Preset,
    spec: ModelSpec,
    executor: "RayReplicas | InProcess",
    lengths: np.ndarray,
    probabilities: np.ndarray,
    progress: Progress,
) -> dict[str, Any] | None:
    """Return how far quantization moved the first rows, or what its preparation measured."""
    if preset.quantization is not None:
        return {"mode": preset.quantization, **preset.accuracy}
    if spec.quantization is None:
        return None
    progress.stage("the submission is written; comparing its first rows with float32")
    started = time.monotonic()
    batch = reference_batch(lengths, pooling=config.pooling, sequence_length=config.sequence_length)
    try:
        reference = executor.predict_in_float(batch)
    except WorkerError as error:
        # The submission stands; a worker without memory for this costs the figure alone.
        return {"mode": spec.quantization, "measured": f"it failed: {error}"}
    figures = compare(
        probabilities[: len(batch.rows)], reference, seconds=time.monotonic() - started
    )
    return {"mode": spec.quantization, **figures}


def cache_folder() -> Path:
    """Return the folder for the demo and for compiled programs, kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arena-runner"


def _open_executor(
    config: RunConfig, preset: Preset, strategy: Strategy | None, progress: Progress
) -> "RayReplicas | InProcess":
    if config.mode == "single":
        from runner.single import InProcess

        return InProcess(verbose=config.verbose, progress=progress)
    from runner.dispatch import RayReplicas

    return RayReplicas(
        num_workers=config.num_workers,
        verbose=config.verbose,
        progress=progress,
        strategy=strategy,
        group_size=config.members,
        family=preset.class_name,
    )


def _tokenize(
    texts: list[str], preset: Preset, sequence_length: int, on_progress: Callable[[int], None]
) -> tuple[TokenTable, float]:
    started = time.monotonic()
    tokens = tokenize(
        texts, preset.tokenizer, sequence_length=sequence_length, on_progress=on_progress
    )
    largest = int(tokens.values.max(initial=tokens.pad_id))
    if largest >= preset.shape.vocabulary_size:
        raise DataError(
            f"{preset.tokenizer.vocabulary} does not belong to the backbone: expected token ids "
            f"below {preset.shape.vocabulary_size}. Received: {largest}"
        )
    return tokens, time.monotonic() - started


def _in_background(work: Callable[[], T]) -> "Future[T]":
    """Run `work` in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def target() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True, name="tokenize").start()
    return future


def _finish_without_rows(
    config: RunConfig, started: float, seconds: dict[str, float]
) -> dict[str, Any]:
    """Write a header-only submission and a report of nothing; no worker starts."""
    write_submission(config.output, (), Merger((), len(LABEL_COLUMNS)).finish())
    seconds["total"] = time.monotonic() - started
    report = make_report(
        config,
        fingerprint="",
        rows=0,
        real_tokens=0,
        padded_tokens=0,
        model_flops=0.0,
        seconds=seconds,
        info=None,
        workers=[],
        faults=Faults(),
        plan=_describe(Plan((), (), 0)),
    )
    write_report(config.report_path, report)
    return report


def _fingerprint(
    config: RunConfig,
    files: dict[str, Path],
    preset: Preset,
    ids: Sequence[str],
    texts: Sequence[str],
    info: WorkerInfo | None,
) -> str:
    found = versions()
    lora = [files["lora_weights"]] if "lora_weights" in files else []
    return fingerprint(
        settings={
            "pooling": config.pooling,
            "sequence_length": config.sequence_length,
            "text_format": config.text_format,
            "dtype": info.dtype if info else config.dtype,
            "quantization": preset.quantization or config.quantization,
            "lora": bool(lora),
            "versions": {name: found.get(name) for name in ("jax", "keras", "keras-hub")},
        },
        files=[
            *preset.small_files,
            files["head_kernel"],
            files["head_bias"],
            *lora,
        ],
        weight_files=preset.weight_files,
        texts=(*ids, *texts),
    )


def _model_flops(preset: Preset, lengths: np.ndarray) -> float:
    """FLOPs that the real tokens need, padding left out."""
    shape = preset.shape
    per_token = float(lengths.sum()) * shape.flops_per_token
    return per_token + float((lengths.astype(float) ** 2).sum()) * shape.attention_flops(1)


def _describe(plan: Plan) -> dict[str, Any]:
    return {
        "batches": len(plan.batches),
        "predicted_padding": 1 - plan.real_tokens / plan.padded_tokens if plan.batches else None,
        "shapes": [asdict(shape) for shape in plan.shapes],
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] += time.monotonic() - started
