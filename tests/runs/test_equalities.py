"""The contract's equalities: every run against the notebook's loop, to 1e-5."""

import random

import numpy as np
import pandas as pd
import pytest

from runner.preset.families import DECODER_POOLINGS
from tests.conftest import LENGTH, TOLERANCE

FLAGS = ("--sequence-length", str(LENGTH), "--max-tokens-per-batch", "512")


def ids_of(path):
    return pd.read_csv(path, dtype=str)["id"].tolist()


def difference(answer, expected):
    return np.abs(answer.probabilities - expected).max()


def test_the_reference_tells_rows_and_poolings_apart(models, reference, test_set):
    """Equality with it would mean little if all its answers were alike."""
    answers = reference(models["gemma2"])
    assert answers["lengths"].max() == LENGTH
    assert answers["lengths"].min() < LENGTH / 2
    assert answers["raw mean"].std(axis=0).min() > 0.02
    assert np.abs(answers["raw mean"] - answers["raw padded-mean"]).max() > 0.02
    assert np.abs(answers["raw mean"] - answers["raw last"]).max() > 0.02
    assert np.abs(answers["raw mean"] - answers["turns mean"]).max() > 0.02


@pytest.mark.parametrize("pooling", DECODER_POOLINGS)
def test_single_equals_the_notebook(models, reference, test_set, predict, pooling):
    model = models["gemma2"]
    flags = (*model.flags(), "--input", str(test_set), "--pooling", pooling, *FLAGS)
    answer = predict("--mode", "single", *flags)
    expected = reference(model)
    assert answer.ids == ids_of(test_set)
    assert difference(answer, expected[f"raw {pooling}"]) < TOLERANCE
    assert answer.report["tokens"]["real"] == expected["lengths"].sum()
    assert np.abs(answer.probabilities.sum(axis=1) - 1).max() < 1e-12
    assert answer.report["model"]["attention"] == "chunked"


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        *(("sharded", "mean"), ("kaggle", "padded-mean")),
        *(
            pytest.param(name, pooling, marks=pytest.mark.slow)
            for name, pooling in {
                "gemma1": "mean",
                "gemma3": "mean",
                "llama": "padded-mean",
                "llama3": "last",
                "mistral": "last",
                "qwen": "padded-mean",
                "qwen3": "mean",
            }.items()
        ),
    ],
)
def test_other_presets_equal_the_notebook(models, reference, test_set, predict, name, pooling):
    model = models[name]
    assert len(list(model.preset.glob("*.weights.h5"))) == (2 if name == "sharded" else 1)
    answer = predict(
        *("--mode", "single", *model.flags(), "--input", str(test_set)),
        *("--pooling", pooling, "--text-format", "turns", *FLAGS),
    )
    assert difference(answer, reference(model)[f"turns {pooling}"]) < TOLERANCE
    assert answer.report["model"]["attention"] == "chunked"


@pytest.mark.parametrize(
    ("workers", "pooling"),
    [
        *((2, "padded-mean"), (3, "mean")),
        pytest.param(1, "mean", marks=pytest.mark.slow),
        pytest.param(2, "last", marks=pytest.mark.slow),
    ],
)
def test_data_parallel_equals_the_notebook(models, reference, test_set, predict, workers, pooling):
    model = models["gemma2"]
    answer = predict(
        *("--mode", "data-parallel", "--num-workers", str(workers), *model.flags()),
        *("--input", str(test_set), "--pooling", pooling, *FLAGS),
    )
    assert answer.ids == ids_of(test_set)
    assert difference(answer, reference(model)[f"raw {pooling}"]) < TOLERANCE
    assert len(answer.report["workers"]) == workers
    assert sum(worker["rows"] for worker in answer.report["workers"]) == len(answer.ids)


@pytest.mark.slow
def test_shuffled_rows_get_the_same_answers(models, reference, test_set, predict, tmp_path):
    """Also batched == alone: a batch of one row each, in another order, on two workers."""
    table = pd.read_csv(test_set, dtype=str)
    order = random.Random(1).sample(range(len(table)), len(table))
    shuffled = tmp_path / "shuffled.csv"
    table.iloc[order].to_csv(shuffled, index=False)
    model = models["gemma2"]
    answer = predict(
        *("--num-workers", "2", *model.flags(), "--input", str(shuffled), "--pooling", "mean"),
        *("--sequence-length", str(LENGTH), "--max-tokens-per-batch", "1"),
    )
    assert answer.ids == table["id"].iloc[order].tolist()
    assert difference(answer, reference(model)["raw mean"][order]) < TOLERANCE
    assert answer.report["plan"]["batches"] == len(table)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precisions_stay_near_float32(models, reference, test_set, predict, dtype):
    model = models["gemma2"]
    answer = predict(
        *("--mode", "single", *model.flags(), "--input", str(test_set), "--pooling", "mean"),
        *("--dtype", dtype, *FLAGS),
    )
    assert answer.report["model"]["dtype"] == dtype
    # bfloat16 keeps 8 bits of mantissa, float16 eleven.
    bound = {"float16": 0.01, "bfloat16": 0.08}[dtype]
    assert 1e-7 < difference(answer, reference(model)["raw mean"]) < bound


@pytest.mark.slow
def test_arena_rows_in_data_parallel_equal_single(models, arena_rows, predict):
    flags = (*models["arena"].flags(), "--input", str(arena_rows), "--pooling", "mean")
    parallel = predict("--mode", "data-parallel", "--num-workers", "2", *flags)
    single = predict("--mode", "single", *flags)
    assert parallel.ids == single.ids == ids_of(arena_rows)
    assert difference(parallel, single.probabilities) < TOLERANCE
    assert np.isfinite(parallel.probabilities).all()
    report = parallel.report
    assert report["rows"] == {
        "total": 905, "predicted": 905, "resumed": 0, "shortened": 0, "filled": 0,
    }  # fmt: skip
    assert len(report["plan"]["shapes"]) <= 8
    assert 1 - report["tokens"]["real"] / report["tokens"]["padded"] < 0.03
    assert all(worker["rows"] > 100 for worker in report["workers"])
