"""How fast is this runner compared with other ways to do the job, on the same cores and rows?

Contenders are the notebook's eager loop, Keras `predict`, transformers on PyTorch, Ray Data, and
our modes: one file each in `rivals/`. Before a speed is reported, each contender's probabilities
are compared with the notebook's loop on the same rows. Rounds then alternate between contenders, so
that a drift of the machine's speed affects all of them. Load, compile and steady state are reported
separately. The ceiling is the fastest large float32 matmul of three libraries on the same cores in
the same run. The last line is one JSON object; a Markdown report with a plot goes to `results/`.

    python benchmarks/throughput.py                    # small, 64 rows, 3 rounds, batch sizes swept
    python benchmarks/throughput.py --quick            # 16 rows, 1 round, sizes as found before
    python benchmarks/throughput.py --device gpu --preset-shape gemma2_9b    # one process, JAX only
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHARED = ROOT.parent / "shared" / "data"
# The best of SWEPT on 2 cores of an AMD EPYC with AVX-512 BF16 (benchmarks/LOG.md).
TUNED: dict[str, dict[str, Any]] = {
    "notebook": {"batch_size": 4},
    "keras_predict": {"batch_size": 4},
    "transformers float32": {"tokens": 512},
    "transformers bfloat16": {"tokens": 512},
    "ray_data": {"batch_size": 4},
}
SWEPT: dict[str, list[dict[str, Any]]] = {
    "notebook": [{"batch_size": size} for size in (4, 8, 16)],
    "keras_predict": [{"batch_size": size} for size in (2, 4, 8, 16)],
    "transformers float32": [{"tokens": tokens} for tokens in (512, 1024, 2048, 4096)],
    "transformers bfloat16": [{"tokens": tokens} for tokens in (512, 1024, 2048, 4096)],
}
SWEPT_AS = {
    "notebook": "notebook",
    "keras_predict": "Keras predict",
    "transformers float32": "transformers float32, mean",
    "transformers bfloat16": "transformers bfloat16, mean",
}
# Contenders of `--quick`: each of ours starts twice, which takes time.
QUICK = (
    "notebook",
    "Keras predict",
    "ours, 2 workers",
    "transformers float32, mean",
    "transformers bfloat16, mean",
    "ours, 1 worker on 1 core, mean",
    "ours, 2 workers, mean",
    "ours, 2 workers, int8, mean",
)
# Tolerance for bfloat16, with 8 bits of mantissa, and int8.
ROUNDED = 0.1
DATA_PARALLEL = ("--mode", "data-parallel", "--num-workers")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to run a classifier over a table.")
    add = parser.add_argument
    add("--preset-shape", default="small", help="a key of shapes.SHAPES (default: small)")
    add("--rows", type=int, help="size of the random sample (default: 64, with --quick 16)")
    add("--rounds", type=int, help="rounds that count (default: 3, with --quick 1)")
    add("--sequence-length", type=int, default=512)
    add("--rows-from", type=Path, help="CSV (default: arena_dev.csv if present, else made up)")
    add("--quick", action="store_true", help="fewer contenders, no sweep")
    add("--no-sweep", action="store_true", help="use options that an earlier sweep found")
    add("--only", default="", help="only contenders whose names contain this text")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: one process, JAX alone")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results")
    add("--name", default="throughput", help="name of the files in --results")
    options = parser.parse_args()
    options.rows = options.rows or (16 if options.quick else 64)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main() -> None:
    options = parse_arguments()
    if options.device == "gpu":
        from runner.model.process import prepare_process
        from sharding.topology import WorkerSlot

        prepare_process(WorkerSlot(0, "auto"), verbose=False)
        from benchmarks.device import measure

        measure(options.preset_shape)
        return
    from benchmarks.harness import Measured, Running, matmul_peaks
    from benchmarks.tables import write_results
    from runner.common.machine import multiplies_bfloat16

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(folder, options)
        peaks = {
            "one core": matmul_peaks((first_cores()[0],)),
            "all cores": matmul_peaks(first_cores()),
        }
        print(f"float32 matmul peaks, GFLOP/s: {rounded(peaks)}", flush=True)
        references = {
            pooling: reference(pooling, job, folder) for pooling in ("padded-mean", "mean")
        }
        tuned = TUNED if options.quick or options.no_sweep else sweep(job, folder)
        running: list[Running] = []
        try:
            for contender in contenders(tuned, options.quick):
                if "bfloat16" in contender.name and not multiplies_bfloat16():
                    print(f"{contender.name}: left out, this processor cannot multiply bfloat16")
                elif options.only in contender.name:
                    running.append(Running(contender, job, folder))
                    running[-1].check(references[contender.pooling])
            for number in range(options.rounds):
                for one in running:
                    one.time()
                    spent = one.measured.steady_s[-1]
                    print(f"round {number + 1}: {one.contender.name}: {spent:.2f} s", flush=True)
        finally:
            for one in running:
                one.stop()
        measured: dict[str, Measured] = {one.contender.name: one.measured for one in running}
        write_results(
            options,
            contenders=[one.contender for one in running],
            measured=measured,
            peaks=peaks,
            lengths=np.load(job["tokens"])["lengths"],
            config=json.loads(Path(job["preset"], "config.json").read_text()),
            tuned=tuned,
        )


def contenders(tuned: dict[str, dict[str, Any]], quick: bool) -> list[Any]:
    """Return the contenders, some with the notebook's pooling, some with `mean`."""
    from benchmarks.harness import Contender

    def ours(name: str, pooling: str, *flags: str, **named: Any) -> Contender:
        return Contender(f"ours, {name}", "ours", {"flags": flags}, pooling, **named)

    padded, mean = "padded-mean", "mean"
    int8 = ("--quantization", "int8")
    found = [
        Contender("notebook", "notebook", tuned["notebook"], padded),
        Contender("Keras predict", "keras_predict", tuned["keras_predict"], padded),
        ours("2 workers", padded, *DATA_PARALLEL, "2"),
        ours("2 workers, int8", padded, *DATA_PARALLEL, "2", *int8, tolerance=ROUNDED),
    ]
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", ROUNDED)):
        options = tuned[f"transformers {dtype}"] | {"dtype": dtype}
        name = f"transformers {dtype}, mean"
        found.append(Contender(name, "transformers_torch", options, mean, tolerance))
    actors = len(first_cores())
    core = first_cores()[:1]
    found += [
        Contender("Ray Data, mean", "ray_data", tuned["ray_data"] | {"actors": actors}, mean),
        ours("1 worker on 1 core, mean", mean, *DATA_PARALLEL, "1", cores=core),
        ours("2 workers, mean", mean, *DATA_PARALLEL, "2"),
        ours("2 workers, int8, mean", mean, *DATA_PARALLEL, "2", *int8, tolerance=ROUNDED),
        ours(
            "2 workers, bfloat16, mean",
            mean,
            *(*DATA_PARALLEL, "2", "--dtype", "bfloat16"),
            tolerance=ROUNDED,
        ),
    ]
    groups = ("--mode", "model-parallel", "--strategy")
    more = [
        ours("single", padded, "--mode", "single"),
        Contender("Keras predict, mean", "keras_predict", tuned["keras_predict"], mean),
        ours("single, mean", mean, "--mode", "single"),
        ours("pipeline of 2, mean", mean, *groups, "pipeline"),
        ours("tensor, 2 slices, mean", mean, *groups, "tensor"),
    ]
    return [one for one in found if one.name in QUICK] if quick else found + more


def first_cores() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0)))


def make_job(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write rows, preset and token ids; return the job that every contender gets."""
    test_set = folder / "test.csv"
    write_rows(test_set, options.rows_from, options.rows)
    model = folder / "model"
    vocabulary = SHARED / "gemma_tokenizer.model"
    if not vocabulary.is_file() or options.preset_shape == "tiny":
        from runner.demo import SEED, make_rows, train_tokenizer

        vocabulary = folder / "vocabulary.spm"
        texts = [" ".join(cells) for _, *cells in make_rows(300, SEED)]
        train_tokenizer(vocabulary, texts)
    run_module("benchmarks.shapes", options.preset_shape, vocabulary, model)
    tokens = folder / "tokens.npz"
    length = str(options.sequence_length)
    run_module("benchmarks.rivals.tokens", model / "preset", test_set, length, tokens)
    return {
        "preset": str(model / "preset"),
        "lora_weights": str(model / "model.lora.h5"),
        "head_kernel": str(model / "head_kernel.npy"),
        "head_bias": str(model / "head_bias.npy"),
        "test_set": str(test_set),
        "tokens": str(tokens),
        "length": options.sequence_length,
    }


def write_rows(path: Path, source: Path | None, count: int) -> None:
    """Write a seeded random sample of real rows; if there are none, generated rows."""
    import pandas as pd

    from runner.demo import SEED, make_rows, write_test_set

    source = source or SHARED / "arena_dev.csv"
    if not source.is_file():
        write_test_set(path, make_rows(count, SEED))
        return
    table = pd.read_csv(source, dtype=str, keep_default_na=False)
    table.sample(min(count, len(table)), random_state=0).to_csv(path, index=False)


def run_module(*command: object) -> None:
    environment = os.environ | {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=environment,
        check=True,
        stderr=subprocess.DEVNULL,
    )


def reference(pooling: str, job: dict[str, Any], folder: Path) -> np.ndarray:
    """Return the probabilities of a plain eager Keras loop."""
    from benchmarks.harness import Contender, Running

    one = Running(
        Contender(f"reference {pooling}", "notebook", TUNED["notebook"], pooling), job, folder
    )
    try:
        return one.predict()[0]
    finally:
        one.stop()


def sweep(job: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Return each rival's fastest options, found on a quarter of the rows."""
    from benchmarks.harness import Running
    from runner.common.machine import multiplies_bfloat16

    tokens = np.load(job["tokens"])
    part = slice(0, max(8, len(tokens["lengths"]) // 4))
    np.savez(folder / "some.npz", **{name: tokens[name][part] for name in tokens})
    some = job | {"tokens": str(folder / "some.npz")}
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for key, choices in SWEPT.items():
        if "bfloat16" in key and not multiplies_bfloat16():
            continue
        like = next(one for one in contenders(TUNED, False) if one.name == SWEPT_AS[key])
        for choice in choices:
            one = Running(replace(like, options=like.options | choice), some, folder)
            one.predict()
            seconds = min(one.predict()[1]["steady_s"] for _ in range(2))
            one.stop()
            print(f"sweep: {key} {choice}: {seconds:.2f} s", flush=True)
            if key not in best or seconds < best[key][0]:
                best[key] = seconds, choice
    found = {key: choice for key, (_, choice) in best.items()}
    return TUNED | found | {"ray_data": found["keras_predict"]}


def rounded(peaks: dict[str, dict[str, float]]) -> dict[str, dict[str, int]]:
    return {
        cores: {library: round(rate / 1e9) for library, rate in rates.items()}
        for cores, rates in peaks.items()
    }


if __name__ == "__main__":
    main()
