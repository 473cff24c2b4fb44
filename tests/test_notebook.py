"""examples/kaggle.ipynb, run cell by cell where /kaggle/input is a folder of small files."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from runner.demo import ensure_demo, make_rows, write_test_set
from runner.telemetry.progress import Progress
from tests.conftest import ROOT, copy_project, environment, make_programs

NOTEBOOK = ROOT / "examples" / "kaggle.ipynb"
ROWS = 24


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_whole_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    for cell in cells:
        ast.parse(cell.source)


def test_its_flags_are_the_commands(notebook, flags_there_are):
    cells = {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}
    of_pip = cells.pop("install")
    assert "arena-runner" in of_pip
    flags = set(re.findall(r"--[a-z][a-z-]+", "\n".join(cells.values())))
    assert {"--plan", "--time-limit"} <= flags <= flags_there_are


@pytest.fixture
def demo(tmp_path, cache, cli) -> Path:
    """Files of the demo, laid out as Kaggle lays out what is attached."""
    with Progress() as progress:
        files = ensure_demo(cache / "arena-runner", progress).model_files
    folder = tmp_path / "input"
    (folder / "lmsys-chatbot-arena").mkdir(parents=True)
    write_test_set(folder / "lmsys-chatbot-arena" / "test.csv", make_rows(ROWS, seed=3))
    (folder / "arena-training").mkdir()
    for name in ("lora_weights", "head_kernel", "head_bias"):
        shutil.copy(files[name], folder / "arena-training")
    shutil.copytree(files["preset"], folder / "gemma2" / "keras" / "gemma2_instruct_9b_en" / "1")
    return folder


def build_wheel(folder: Path, source: Path) -> None:
    """What `pip wheel` leaves of this project, without what it needs."""
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    command = [sys.executable, "-m", "pip", "wheel", *offline, copy_project(source)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("prepared", [True, False], ids=["int8 a card", "pipeline"])
def test_it_runs_from_the_plan_to_the_submission(notebook, demo, cli, cache, tmp_path, prepared):
    from nbclient import NotebookClient

    if prepared:
        preset = demo / "gemma2" / "keras" / "gemma2_instruct_9b_en" / "1"
        lora = demo / "arena-training" / "model.lora.h5"
        flags = ("--preset", preset, "--lora-weights", lora, "--output", demo / "arena-gemma2-int8")
        done = cli("prepare", *map(str, flags), timeout=600)
        assert done.returncode == 0, done.stderr
        build_wheel(demo / "arena-runner-wheels", tmp_path / "source")
    work = tmp_path / "working"
    work.mkdir()
    programs = make_programs(tmp_path / "bin", ROOT)
    env = environment(
        cache,
        ARENA_DEMO=str(demo),
        PATH=f"{programs}:{os.environ['PATH']}",
        # Where there are wheels, ours alone is installed, into a folder aside.
        PIP_NO_DEPS="1",
        PIP_TARGET=str(tmp_path / "installed"),
    )
    # Where it is set, the kernel takes no output of the processes that a cell starts.
    env.pop("PYTEST_CURRENT_TEST")
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute(env=env)
    printed = {cell.id: str(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}
    assert "NVIDIA T4" in printed["plan"]
    assert f"{ROWS} rows -> submission.csv" in printed["run"]
    mode = "data-parallel" if prepared else "model-parallel"
    assert f"--mode {mode}" in printed["job"]
    assert (tmp_path / "installed" / "runner" / "cli.py").is_file() == prepared
    assert (work / "submission.csv").read_text().count("\n") == ROWS + 1
