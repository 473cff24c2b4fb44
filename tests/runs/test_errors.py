"""Each mistake a person can make, through `run.py` as a process: exit code, message, no traces."""

import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT, Model

GOOD_ROW = ("1", '["p"]', '["a"]', '["b"]')
COLUMNS = ["id", "prompt", "response_a", "response_b"]


@pytest.fixture
def work(tmp_path):
    """An empty folder for the output; whatever is in it afterwards was written by the run."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "good.csv"
    pd.DataFrame([GOOD_ROW], columns=COLUMNS).to_csv(path, index=False)
    return path


@pytest.fixture
def refuse(cli, work):
    """Run, and expect exit code 2, one or two lines that hold `parts`, and nothing written."""

    def run(flags, *parts, output=None, **extra):
        done = cli(*map(str, flags), "--output", str(output or work / "submission.csv"), **extra)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        lines = done.stderr.strip().splitlines()
        while lines[0].startswith("["):
            lines.pop(0)  # progress of a run that had to load before it could know
        assert 1 <= len(lines) <= 2, done.stderr
        assert lines[0].startswith("error: ")
        assert "Traceback" not in done.stderr
        for part in parts:
            assert str(part) in done.stderr
        assert list(work.iterdir()) == []

    return run


def csv_of(folder, text, name="test.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


HEADER = "id,prompt,response_a,response_b\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("id,prompt,response_a\n1,p,a\n", ["response_b is missing", "id, prompt, response_a"]),
        ("id,prompt,prompt,response_a,response_b\n1,p,q,a,b\n", ["prompt is repeated"]),
        (HEADER + "7,p,a,b\n8,p,a,b\n7,p,a,b\n", ["'7'", "rows 1 and 3"]),
        (HEADER + "7,p,a,b\n,p,a,b\n", ["empty id in row 2"]),
        ("", ["is empty", "header"]),
        (HEADER.encode() + b"1,caf\xe9,a,b\n", ["UTF-8", "0xe9", "line 2"]),
        (HEADER + '1,"p,a,b\n', ["is not a well-formed CSV"]),
        (HEADER + "1,p,a,b,c,d\n", ["is not a well-formed CSV"]),
        (HEADER.encode() + b"\xed\xa0\x80,p,a,b\n", ["valid Unicode", "row 1"]),
    ],
    ids=lambda value: value[0][:20].replace(" ", "-") if isinstance(value, list) else "",
)
def test_bad_test_sets(refuse, models, tmp_path, text, parts):
    path = csv_of(tmp_path, text)
    refuse([*models["gemma2"].flags(), "--input", path], path, *parts)


def test_a_cell_that_is_no_list_of_turns(refuse, models, tmp_path):
    path = csv_of(tmp_path, HEADER + '5,"[""p""]","[""a""]","[""b""]"\n6,"[""p""]",plain,"[]"\n')
    refuse(
        [*models["gemma2"].flags(), "--input", path, "--text-format", "turns"],
        *("Row 2 (id 6), column response_a", "'plain'"),
    )


def test_bad_parquet(refuse, models, tmp_path):
    flags = models["gemma2"].flags()
    refuse(
        [*flags, "--input", csv_of(tmp_path, "x", "bad.parquet")], "is not a readable Parquet file"
    )
    path = tmp_path / "floats.parquet"
    pd.DataFrame([(1.5, "p", "a", "b")], columns=COLUMNS).to_parquet(path)
    refuse([*flags, "--input", path], "column id must hold text or whole numbers", "double")
    pd.DataFrame([GOOD_ROW[:3]], columns=COLUMNS[:3]).to_parquet(path)
    refuse([*flags, "--input", path], "response_b is missing")


def test_files_that_are_missing(refuse, models, rows, tmp_path):
    model, absent = models["gemma2"], tmp_path / "absent"
    refuse([*model.flags(), "--input", absent], "--input", absent)
    flags = [*model.flags(), "--input", rows]
    for flag in ("--preset", "--lora-weights", "--head-kernel", "--head-bias"):
        changed = list(flags)
        changed[changed.index(flag) + 1] = absent
        refuse(changed, flag, absent)
    refuse(["--preset", model.preset, "--input", rows], "--head-kernel", "--head-bias", "alone")
    refuse(["--head-bias", absent, "--input", rows], "--head-bias needs --preset")


def test_heads_that_do_not_fit(refuse, models, rows, tmp_path):
    model = models["gemma2"]

    def flags(kernel, bias):
        np.save(tmp_path / "k.npy", kernel, allow_pickle=True)
        np.save(tmp_path / "b.npy", bias, allow_pickle=True)
        head = ["--head-kernel", tmp_path / "k.npy", "--head-bias", tmp_path / "b.npy"]
        return ["--preset", model.preset, *head, "--input", rows]

    good = np.zeros((48, 3), "float32"), np.zeros(3, "float32")
    refuse(flags(np.zeros((64, 3)), good[1]), "--head-kernel", "(48, 3)", "(64, 3)")
    refuse(flags(np.zeros((48, 2)), good[1]), "--head-kernel", "(48, 3)", "(48, 2)")
    refuse(flags(good[0], np.zeros(4)), "--head-bias", "(3,)", "(4,)")
    refuse(flags(np.full((48, 3), np.nan), good[1]), "--head-kernel", "finite", "NaN")
    refuse(flags(np.array([[object()]]), good[1]), "--head-kernel", "plain .npy array")
    refuse(flags(np.full((48, 3), "x"), good[1]), "--head-kernel", "numbers")


def test_lora_of_another_rank_or_backbone(refuse, models, rows, tmp_path):
    def flags(name):
        model = models["gemma2"]
        changed = [*model.flags(), "--input", rows]
        changed[changed.index("--lora-weights") + 1] = tmp_path / name
        return changed

    shutil.copy(models["llama"].folder / "model.lora.h5", tmp_path / "llama.lora.h5")
    refuse(flags("llama.lora.h5"), "another backbone", "6 in all", "Received: 4")

    own = models["gemma2"].folder / "model.lora.h5"
    shutil.copy(own, tmp_path / "rank.lora.h5")
    with h5py.File(tmp_path / "rank.lora.h5", "r+") as file:
        file["lora/vars/rank"][()] = 8
    refuse(flags("rank.lora.h5"), "same rank everywhere: expected 8", "shape")

    def rewrite(name, change):
        shutil.copy(own, tmp_path / name)
        with h5py.File(tmp_path / name, "r+") as file:
            for group in [group for key, group in file["lora"].items() if key != "vars"]:
                array = group["vars/lora_kernel_a"][()]
                del group["vars/lora_kernel_a"]
                group["vars/lora_kernel_a"] = change(array)

    rewrite("hidden.lora.h5", lambda array: array[:, :32])
    refuse(flags("hidden.lora.h5"), "another backbone", "hidden size 48")
    # Only the worker that merges sees that a kernel has too few heads.
    rewrite("heads.lora.h5", lambda array: array[:1])
    for mode in ("single", "data-parallel"):
        refuse([*flags("heads.lora.h5"), "--mode", mode], "another backbone", "attention")

    (tmp_path / "cut.lora.h5").write_bytes(own.read_bytes()[:3000])
    refuse(flags("cut.lora.h5"), "not a LoRA file")
    csv_of(tmp_path, "not h5", "text.lora.h5")
    refuse(flags("text.lora.h5"), "not a LoRA file")


def test_bad_presets(refuse, models, rows, tmp_path):
    def damaged(name, change, source="gemma2"):
        folder = tmp_path / name
        shutil.copytree(models[source].folder, folder)
        change(folder / "preset")
        return ["--mode", "single", *Model(folder).flags(), "--input", rows]

    def edit(path, **values):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | values))

    def set_config(preset, **values):
        content = json.loads((preset / "config.json").read_text())
        edit(preset / "config.json", config=content["config"] | values)

    def set_class(preset, **values):
        edit(preset / "config.json", **values)

    refuse(
        damaged("image", lambda preset: set_class(preset, class_name="ResNetBackbone")),
        *("text backbone", "'ResNetBackbone'"),
    )
    refuse(damaged("other", lambda preset: set_class(preset, module="os")), "module='os'")
    refuse(damaged("json", lambda preset: (preset / "config.json").write_text("{")), "JSON")
    for name in ("config.json", "tokenizer.json", "assets/tokenizer/vocabulary.spm"):
        refuse(damaged(name[:4], lambda preset, name=name: (preset / name).unlink()), name)
    refuse(damaged("none", lambda preset: (preset / "model.weights.h5").unlink()), "has no weights")

    def cut(preset):
        weights = preset / "model.weights.h5"
        weights.write_bytes(weights.read_bytes()[:50_000])

    refuse(damaged("cut", cut), "model.weights.h5", "damaged or truncated")

    def lose_a_part(preset):
        sorted(preset.glob("*_0*.weights.h5"))[0].unlink()

    refuse(damaged("part", lose_a_part, "sharded"), "is missing a part of its weights")
    parallel = ["--mode", "data-parallel"]
    # Weights of another size, and a config that asks for code: both are seen while loading.
    refuse(
        damaged("size", lambda preset: set_config(preset, num_key_value_heads=4)),
        *(
            "weights whose shape differs from its config",
            "attention/key/kernel of shape (4, 48, 16)",
        ),
    )
    code = {"class_name": "__lambda__", "config": {"value": "4wA="}}
    refuse(
        damaged("code", lambda preset: set_config(preset, layer_norm_epsilon=code)),
        "does not load as a preset",
    )
    refuse(
        # In another process than the one that loads, which would find another fault first.
        [*damaged("ids", lambda preset: set_config(preset, vocabulary_size=20)), *parallel],
        *("does not belong to the backbone", "below 20"),
    )


def test_outputs_that_cannot_be_written(refuse, models, rows, tmp_path, work):
    flags = [*models["gemma2"].flags(), "--input", rows]
    refuse(flags, "--output", "folder that exists", output=tmp_path / "absent" / "s.csv")
    refuse(flags, "--output", "a folder", output=work)
    refuse(flags, "--output", "a writable folder", output="/proc/s.csv")
    refuse([*flags, "--report", tmp_path / "absent" / "r.json"], "--report", "folder that exists")
    refuse(flags, "must be different files", output=rows)
    refuse(flags, ".jsonl", output=work / "s.json")


def test_bad_flags(refuse, models, rows, tmp_path):
    flags = [*models["gemma2"].flags(), "--input", rows]
    refuse([*flags, "--sped", "9"], "--sped", "--help")
    refuse(
        [*flags, "--mode", "fastest"], "--mode", "data-parallel, model-parallel, single", "fastest"
    )
    refuse([*flags, "--pooling", "max"], "--pooling", "padded-mean")
    refuse([*flags, "--sequence-length", "0"], "--sequence-length", "at least 1")
    refuse([*flags, "--sequence-length", "long"], "--sequence-length", "long")
    refuse([*flags, "--num-workers", "-1"], "--num-workers", "-1")
    refuse([*flags, "--num-workers", "2", "--mode", "single"], "--mode single", "--num-workers 2")
    refuse([*flags, "--config", tmp_path / "absent.toml"], "--config", "absent.toml")
    path = csv_of(tmp_path, "sequence-lenght = 5\n", "run.toml")
    refuse([*flags, "--config", path], "unknown key", "sequence-lenght")
    path = csv_of(tmp_path, "sequence-length = 'x'\n", "run.toml")
    refuse([*flags, "--config", path], "--sequence-length", "x")


def test_more_workers_than_devices(refuse, models, rows):
    flags = [*models["gemma2"].flags(), "--input", rows, "--num-workers", "2"]
    refuse(flags, "a gpu of its own and 0 were found", "--num-workers 2", JAX_PLATFORMS="cuda")
    refuse(flags, "cpu, cuda or tpu", "JAX_PLATFORMS=rocm", JAX_PLATFORMS="rocm")


def test_help_reads_well(cli):
    done = cli("--help")
    assert done.returncode == 0
    for flag in ("--mode", "--preset", "--pooling", "--num-workers", "--config", "--verbose"):
        assert flag in done.stdout
    assert (ROOT / "run.py").is_file()
