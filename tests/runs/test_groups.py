"""Model-parallel mode: equal to the notebook's loop, lighter in memory, and failing as one."""

import json
import re
import time

import numpy as np
import pandas as pd
import psutil
import pytest

from tests.conftest import LENGTH, TOLERANCE
from tests.runs.test_equalities import FLAGS, difference, ids_of

MODEL_PARALLEL = ("--mode", "model-parallel")


@pytest.mark.parametrize(
    ("strategy", "size", "workers", "name", "pooling"),
    [
        ("pipeline", 3, 3, "gemma2", "padded-mean"),
        pytest.param("pipeline", 2, 4, "gemma2", "mean", marks=pytest.mark.slow),
        ("tensor", 2, 2, "gemma1", "last"),
        pytest.param("tensor", 2, 4, "gemma2", "padded-mean", marks=pytest.mark.slow),
        pytest.param("pipeline", 2, 2, "gemma1", "mean", marks=pytest.mark.slow),
        pytest.param("pipeline", 2, 2, "mistral", "last", marks=pytest.mark.slow),
        pytest.param("pipeline", 2, 2, "gemma3", "mean", marks=pytest.mark.slow),
        pytest.param("pipeline", 2, 2, "qwen3", "padded-mean", marks=pytest.mark.slow),
        pytest.param("tensor", 2, 2, "llama", "mean", marks=pytest.mark.slow),
        pytest.param("tensor", 2, 2, "gemma3", "padded-mean", marks=pytest.mark.slow),
        pytest.param("tensor", 2, 2, "qwen", "mean", marks=pytest.mark.slow),
        pytest.param("tensor", 3, 3, "thirds", "mean", marks=pytest.mark.slow),
    ],
)
def test_groups_equal_the_notebook(
    models, reference, test_set, predict, strategy, size, workers, name, pooling
):
    model = models[name]
    answer = predict(
        *(*MODEL_PARALLEL, "--strategy", strategy, "--group-size", str(size)),
        *("--num-workers", str(workers), *model.flags(), "--input", str(test_set)),
        *("--pooling", pooling, *FLAGS),
    )
    assert answer.ids == ids_of(test_set)
    assert difference(answer, reference(model)[f"raw {pooling}"]) < TOLERANCE
    report = answer.report
    assert (report["mode"], report["strategy"]) == ("model-parallel", strategy)
    members = report["workers"]
    assert [(entry["replica"], entry["member"]) for entry in members] == [
        (number // size, number % size) for number in range(workers)
    ]
    for replica in range(workers // size):
        rows = {entry["rows"] for entry in members if entry["replica"] == replica}
        assert len(rows) == 1, "all members of a group have a part in each of its rows"
    assert sum(entry["rows"] for entry in members) == size * len(answer.ids)
    assert "strategy " + strategy in answer.stderr
    if (strategy, name) == ("tensor", "gemma1"):
        notes = [line for line in answer.stderr.splitlines() if "attention/key/kernel" in line]
        assert len(notes) == 1, "that one key/value head is not split is said once"


@pytest.mark.slow
def test_auto_says_which_and_why(models, reference, test_set, predict):
    model = models["gemma2"]
    flags = (*model.flags(), "--input", str(test_set), "--pooling", "mean", *FLAGS)
    answer = predict(*MODEL_PARALLEL, *flags)
    assert answer.report["strategy"] == "pipeline"
    assert "a large test set keeps every stage busy" in answer.report["group"]["why"]
    assert difference(answer, reference(model)["raw mean"]) < TOLERANCE
    stages = answer.report["group"]["stages"]
    assert [(stage["start"], stage["stop"]) for stage in stages] == [(0, 1), (1, 3)]
    shape = {"embedding": 600 * 48, "layer": 2 * 48 * 16 * 6 + 3 * 48 * 96}
    assert stages[0]["weight_bytes"] == 4 * (shape["embedding"] + shape["layer"])


@pytest.mark.slow
def test_half_precision_travels_between_stages(models, reference, test_set, predict):
    model = models["gemma2"]
    for strategy in ("pipeline", "tensor"):
        answer = predict(
            *(*MODEL_PARALLEL, "--strategy", strategy, *model.flags(), "--input", str(test_set)),
            *("--pooling", "mean", "--dtype", "bfloat16", *FLAGS),
        )
        assert 1e-7 < difference(answer, reference(model)["raw mean"]) < 0.08


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--strategy", "tensor", "--group-size", "3"], ["--strategy tensor", "Received", "3"]),
        (["--strategy", "pipeline", "--group-size", "4"], ["there are 3", "--group-size 4"]),
        (["--num-workers", "3"], ["whole groups of 2", "--num-workers 3"]),
        (["--group-size", "1"], ["at least two members", "--group-size 1"]),
        (["--mode", "data-parallel", "--strategy", "tensor"], ["--strategy is for --mode model"]),
        (["--mode", "single", "--group-size", "2"], ["--group-size is for --mode model"]),
    ],
    ids=lambda value: "-".join(value).strip("-")[:30],
)
def test_groups_that_cannot_be(cli, models, test_set, tmp_path, flags, parts):
    output = tmp_path / "s.csv"
    done = cli(*MODEL_PARALLEL, *models["gemma2"].flags(), *("--input", str(test_set)), *flags,
               *("--output", str(output)))  # fmt: skip
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for part in parts:
        assert part in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("strategy", "moment"),
    [
        pytest.param("tensor", ".load", marks=pytest.mark.slow),
        pytest.param("pipeline", ".load", marks=pytest.mark.slow),
        pytest.param("pipeline", ".predict", marks=pytest.mark.slow),
        pytest.param("tensor", ".predict", marks=pytest.mark.slow),
    ],
)
def test_a_killed_member_costs_only_unfinished_batches(
    start, models, arena_rows, predict, tmp_path, strategy, moment
):
    """Members of the group that is left would wait for the dead one for ever."""
    flags = [*models["arena"].flags(), "--input", str(arena_rows), "--pooling", "mean",
             "--sequence-length", "256"]  # fmt: skip
    output = tmp_path / "killed.csv"
    workers = ["--num-workers", "4" if strategy == "pipeline" else "2"]
    run = start(*MODEL_PARALLEL, *workers, "--strategy", strategy, *flags, "--output", output)
    name = {"pipeline": "PipelineStage", "tensor": "TensorMember"}[strategy]
    step = {".load": ".load", ".predict": ".begin" if strategy == "pipeline" else ".predict"}
    victims = run.wait_for_workers(step[moment], name=name)
    time.sleep(1 if moment == ".predict" else 0)
    victims[-1].kill()
    code, out, err = run.finish()
    assert code == 0, err
    assert len(re.findall(r"group \d died and is started again", err)) == 1
    assert "1 worker died; the run went on." in out
    report = json.loads((tmp_path / "killed.csv.report.json").read_text())
    assert report["faults"]["worker_deaths"] == 1
    assert report["faults"]["retried_batches"] <= 4
    restarts = [entry["restarts"] for entry in report["workers"]]
    assert sorted(restarts) == [0] * (len(restarts) - 2) + [1, 1]
    run.assert_nothing_is_left()
    calm = predict("--mode", "single", *flags)
    table = pd.read_csv(output, dtype={"id": str})
    assert table["id"].tolist() == calm.ids
    assert np.abs(table.iloc[:, 1:].to_numpy() - calm.probabilities).max() < TOLERANCE


@pytest.mark.slow
def test_two_runs_at_once_do_not_meet(start, models, reference, test_set, tmp_path):
    """Each group has an address of its own, on loopback."""
    model = models["gemma2"]
    flags = [*model.flags(), "--input", test_set, "--pooling", "mean", *FLAGS]
    outputs = [tmp_path / "first.csv", tmp_path / "second.csv"]
    runs = [
        start(*MODEL_PARALLEL, "--strategy", "tensor", *flags, "--output", output)
        for output in outputs
    ]
    member = runs[0].wait_for_workers(".load", name="TensorMember")[0]
    listening: set[str] = set()
    while member.is_running() and runs[0].workers(".load", name="TensorMember"):
        for worker in runs[0].workers(name="TensorMember"):
            sockets = worker.net_connections("tcp")
            listening |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
        time.sleep(0.1)
    assert "127.0.0.1" in listening
    for run, output in zip(runs, outputs, strict=True):
        code, _, err = run.finish()
        assert code == 0, err
        table = pd.read_csv(output)
        expected = reference(model)["raw mean"]
        assert np.abs(table.iloc[:, 1:].to_numpy() - expected).max() < TOLERANCE


@pytest.mark.slow
def test_members_hold_their_part_of_the_memory(heavy, test_set, predict, tmp_path):
    """Peak resident memory beyond the imports, while loading too: at most 0.65 of single mode's."""

    def peaks(mode, *flags):
        answer = predict(
            *("--mode", mode, *flags, *heavy.flags(), "--input", str(test_set)),
            *("--pooling", "mean", "--sequence-length", str(LENGTH)),
            *("--max-tokens-per-batch", "256"),
            # Each compiles for itself: what the cache saves would blur the comparison.
            XDG_CACHE_HOME=str(tmp_path / f"cache{mode}{len(flags)}{flags[-1:]}"),
        )
        workers = answer.report["workers"]
        return answer, [w["peak_rss_bytes"] - w["rss_after_imports_bytes"] for w in workers]

    single, (alone,) = peaks("single")
    weights = single.report["workers"][0]["weight_bytes"]
    assert weights > 600e6
    assert alone > weights
    for strategy in ("pipeline", "tensor"):
        answer, members = peaks("model-parallel", "--strategy", strategy)
        held = [worker["weight_bytes"] for worker in answer.report["workers"]]
        assert sum(held) == pytest.approx(weights, rel=0.02)
        assert max(held) < 0.52 * weights
        print(strategy, [round(member / alone, 3) for member in members])
        assert max(members) <= 0.65 * alone
        assert difference(answer, single.probabilities) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pipeline", "tensor"])
def test_a_second_run_compiles_nothing(models, test_set, predict, tmp_path, strategy):
    flags = ("--mode", "model-parallel", "--strategy", strategy, "--input", str(test_set))
    model, cache = models["gemma2"].flags(), str(tmp_path / "cache")
    runs = [
        predict(*flags, *model, "--pooling", "mean", *FLAGS, XDG_CACHE_HOME=cache) for _ in "12"
    ]
    first, second = (
        [(worker["compiled_shapes"], worker["cached_shapes"]) for worker in run.report["workers"]]
        for run in runs
    )
    shapes = len(runs[0].report["plan"]["shapes"])
    assert shapes > 2
    assert first == [(shapes, 0)] * 2
    assert second == [(0, shapes)] * 2
