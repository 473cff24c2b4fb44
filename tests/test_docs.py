"""Every command and script of the pages runs, and every name and link in them exists.

They run in a folder like a reader's: this repository, and files with the names that the pages use.
The model is the demo's under the name `gemma2_9b`; for commands that only plan, it is the real
config of Gemma 2 9B. Nothing is fetched: pip builds and installs only this project, into a separate
folder, and `make` finds a virtual environment in place.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import chart
from benchmarks.shapes import SHAPES
from runner.config.run_config import make_config
from runner.demo import ensure_demo, make_rows, train_tokenizer, write_test_set
from runner.telemetry.progress import Progress
from tests.conftest import ROOT, copy_project, environment, make_programs
from tests.support.pages import (
    Command,
    inline_code,
    links,
    read_blocks,
    read_commands,
    stray_commands,
)

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ROWS = 12
LONGEST_S = 600
# How many commands of a page no test runs; the page gives the reason beside each.
NOT_RUN = {
    "CONTRIBUTING.md": 3,
    "docs/clusters.md": 3,
    "docs/models.md": 3,
    "docs/performance.md": 3,
}
# The first line of a block that is a file: `# run.toml`.
TOML_NAME = re.compile(r"# ([\w-]+\.toml)")
FOLDERS = "runner|sharding|tests|benchmarks|docs|examples"


@pytest.fixture(scope="module")
def reader(tmp_path_factory, cache):
    """Make a folder like a reader's; return it and a function that runs a shell line in it."""

    def make(*, model: bool):
        folder = copy_project(tmp_path_factory.mktemp("reader") / "arena-runner")
        write_test_set(folder / "test.csv", make_rows(ROWS, seed=3))
        _save_model(folder, cache) if model else _save_config(folder)
        programs = make_programs(folder / ".venv" / "bin", folder)
        for mark in (".installed", ".installed-test", ".installed-bench"):
            (folder / ".venv" / mark).touch()
        env = environment(
            cache,
            PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
            # `make test` runs everything except the tests themselves.
            PYTEST_ADDOPTS="--collect-only -p no:cacheprovider",
            PIP_NO_INDEX="1",
            PIP_NO_DEPS="1",
            PIP_NO_BUILD_ISOLATION="0",  # which means: without
            PIP_TARGET=str(folder.parent / "installed"),
            PIP_DISABLE_PIP_VERSION_CHECK="1",
        )

        def run(line: str, where: str) -> str:
            with subprocess.Popen(
                ["bash", "-c", line], cwd=folder, env=env, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            ) as shell:  # fmt: skip
                try:
                    printed, _ = shell.communicate(timeout=LONGEST_S)
                except BaseException:
                    os.killpg(shell.pid, signal.SIGKILL)  # and all that the shell has started
                    raise
            assert shell.returncode == 0, f"{where}: {line}\n{printed}"
            return printed

        return folder, run

    return make


def _save_config(folder: Path) -> None:
    """Write what a plan needs of Gemma 2 9B: its config and a tokenizer, and a head of zeros."""
    preset = folder / "gemma2_9b"
    (preset / "assets" / "tokenizer").mkdir(parents=True)
    texts = [text for row in make_rows(60, seed=5) for text in row[1:]]
    train_tokenizer(preset / "assets" / "tokenizer" / "vocabulary.spm", texts, 600)
    config = {
        "module": "keras_hub.src.models.gemma.gemma_backbone",
        "class_name": "GemmaBackbone",
        "config": {"vocabulary_size": 256_000, **SHAPES["gemma2_9b"]},
    }
    (preset / "config.json").write_text(json.dumps(config))
    (preset / "tokenizer.json").write_text(json.dumps({"class_name": "GemmaTokenizer"}))
    np.save(folder / "head_kernel.npy", np.zeros((3584, 3), np.float32))
    np.save(folder / "head_bias.npy", np.zeros(3, np.float32))


def _save_model(folder: Path, cache: Path) -> None:
    with Progress() as progress:
        files = ensure_demo(cache / "arena-runner", progress).model_files
    shutil.copytree(files["preset"], folder / "gemma2_9b")
    shutil.copy(files["lora_weights"], folder / "model.lora.h5")
    for name in ("head_kernel", "head_bias"):
        shutil.copy(files[name], folder / f"{name}.npy")


def commands_of(page: Path) -> list[Command]:
    return [
        command
        for block in read_blocks(page)
        if block.language == "console"
        for command in read_commands(block)
    ]


@pytest.fixture(scope="module")
def plans(reader):
    return reader(model=False)[1]


def cheap_commands():
    return [command for page in PAGES for command in commands_of(page) if command.is_cheap]


@pytest.mark.parametrize("command", cheap_commands(), ids=lambda command: command.where)
def test_plans_and_help_run(plans, command):
    assert plans(command.text, command.where)


def names_with(*languages: str) -> list[str]:
    """Return the pages that have blocks of these languages."""
    found = {name: {block.language for block in read_blocks(ROOT / name)} for name in NAMES}
    return [name for name in NAMES if found[name] & set(languages)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", names_with("console", "python"))
def test_every_command_and_script_runs(reader, name):
    """In the order of the page, in one folder. A TOML block with a name is written to that file."""
    folder, run = reader(model=True)
    for block in read_blocks(ROOT / name):
        if block.language == "console":
            for command in read_commands(block):
                if command.why_not_run is None:
                    run(command.text, command.where)
        elif block.language == "toml" and (named := TOML_NAME.fullmatch(block.lines[0])):
            (folder / named[1]).write_text("\n".join(block.lines) + "\n")
        elif block.language == "python":
            (folder / "script.py").write_text("\n".join(block.lines) + "\n")
            run("python script.py", str(block))


@pytest.mark.parametrize("name", names_with("toml"))
def test_toml_is_what_the_config_takes(name, tmp_path):
    for block in read_blocks(ROOT / name):
        if block.language == "toml":
            (tmp_path / "run.toml").write_text("\n".join(block.lines))
            # A plan needs no head. Preset and input are named, so that they are not the demo's.
            named = {"preset": tmp_path, "input": tmp_path / "rows.csv"}
            make_config({"plan": True, **named}, tmp_path / "run.toml")


@pytest.mark.parametrize("name", NAMES)
def test_no_command_stands_where_no_test_runs_it(name):
    assert stray_commands(ROOT / name) == []


def test_the_commands_that_are_not_run_are_these():
    not_run = {name: [c for c in commands_of(ROOT / name) if c.why_not_run] for name in NAMES}
    assert {name: len(found) for name, found in not_run.items() if found} == NOT_RUN


@pytest.mark.parametrize("name", NAMES)
def test_flags_files_and_targets_in_the_text_exist(name, flags_there_are):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for line, code in inline_code(ROOT / name):
        words = code.split()
        if words[0] == "make" and len(words) == 2 and words[1] not in targets:
            wrong.append((line, code))
        of_others = words[0] in ("pip", "ray", "pytest") or "benchmarks/" in code
        if not of_others and set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)) - flags_there_are:
            wrong.append((line, code))
        path = words[1] if words[0] == "python" and len(words) > 1 else words[0]
        if re.fullmatch(rf"({FOLDERS})/[\w./-]+\.\w+", path) and not (ROOT / path).exists():
            wrong.append((line, code))
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in links(ROOT / name):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_the_chart_is_drawn_from_its_result():
    assert chart.CHART.read_text() == chart.draw(json.loads(chart.RESULT.read_text()))


def test_the_tree_of_the_architecture_is_that_of_the_folders():
    """Each room of runner/ has one phrase."""
    page = ROOT / "docs" / "architecture.md"
    tree = next(block for block in read_blocks(page) if "runner/" in block.lines)
    rooms = [re.match(r"  ((?:\w+(?:/|\.py) +)+)\S", line) for line in tree.lines]
    listed = [name for room in rooms if room for name in room[1].split()]
    there = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "runner").iterdir()
        if not path.name.startswith("__") or path.name == "__main__.py"
    ]
    assert Counter(listed) == Counter(there)


class TestReading:
    """The reading itself: each mistake in a page must be found."""

    @pytest.fixture
    def page(self, tmp_path):
        def write(text: str) -> Path:
            (tmp_path / "page.md").write_text(text)
            return tmp_path / "page.md"

        return write

    @pytest.mark.parametrize(
        "text",
        [
            "```bash\nls\n```",
            "```sh\nls\n```",
            "```\npython run.py --plan\n```",
            "```text\npython run.py --plan\n```",
            "```text\n$ ls\n```",
            "```text\nmake demo\n```",
            "```text\npip install arena-runner\n```",
            "```console\nls\n```",
            "~~~shell\nls\n~~~",
            "    arena-runner --plan",
            "    make test",
            "$ ls",
        ],
    )
    def test_a_command_outside_a_console_block_is_found(self, page, text):
        assert stray_commands(page(f"Words.\n\n{text}\n"))

    @pytest.mark.parametrize(
        "text",
        [
            "```console\n$ ls\nfile\n```",
            "```text\nrunner/\n  cli.py   flags\nmake of it what you like\n```",
            "Make this so.\nmake this so",
            "```python\nprint(1)\n```",
        ],
    )
    def test_what_is_no_command_is_left_alone(self, page, text):
        assert stray_commands(page(f"Words.\n\n{text}\n")) == []

    def test_lines_that_go_on_are_one_command(self, page):
        text = (
            "```console\n$ python run.py \\\n    --plan\nout\n$ ls  # not run by the tests: no\n```"
        )
        assert [(c.text, c.why_not_run, c.is_cheap) for c in commands_of(page(text))] == [
            ("python run.py --plan", None, True),
            ("ls", "no", False),
        ]

    def test_a_block_without_an_end_is_an_error(self, page):
        with pytest.raises(ValueError, match="does not end"):
            read_blocks(page("```console\n$ ls\n"))
