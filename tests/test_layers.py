"""Imports run downwards only, rooms on one floor do not know each other, a library has one home.

From the syntax trees: imports within functions and those for type checkers count too.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The rooms of runner/ from the top. A room may import those of the floors below its own.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("api",),
    ("driver", "planner", "prepare"),
    ("demo",),
    ("executors", "report"),
    ("data", "model"),
    ("preset",),
    ("config", "telemetry", "results"),
    ("common",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Heavy libraries, and the only places that may name each.
HOMES = {
    "ray": ("runner/executors/ray/", "runner/model/process.py"),
    "jax": ("runner/model/",),
    "keras": ("runner/model/", "runner/demo.py", "sharding/mesh.py"),
    "keras_hub": ("runner/model/", "runner/demo.py"),
    "matplotlib": ("runner/report/",),
    "sqlite3": ("runner/results/",),
}


@cache
def sources(folder: str) -> dict[str, ast.Module]:
    """Return the path of each file and its tree."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


@cache
def imports(tree: ast.Module) -> set[str]:
    """Return every module that a file imports, and every name out of one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides which room it goes to"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """Return the room of `runner.room.file.name`; empty for the package itself and its version."""
    return next((part for part in module.split(".")[1:2] if not part.startswith("__v")), "")


def upward(path: str, tree: ast.Module) -> list[str]:
    """Return the imports of a file of runner/ that do not go down."""
    own = path.split("/")[1].removesuffix(".py")
    return [
        f"{path} imports {module}"
        for module in sorted(imports(tree))
        if module.split(".")[0] == "runner"
        and (other := room_of(module)) not in ("", own)
        and FLOOR_OF[own] >= FLOOR_OF[other]
    ]


def test_every_room_has_a_floor():
    rooms = {path.split("/")[1].removesuffix(".py") for path in sources("runner")}
    assert rooms - {"__init__"} == FLOOR_OF.keys()


def test_imports_run_downwards():
    # runner/__init__.py names what it hands on, and imports it when it is asked for.
    files = sources("runner")
    del files["runner/__init__.py"]
    assert [wrong for path, tree in files.items() for wrong in upward(path, tree)] == []


def test_sharding_knows_no_runner():
    for path, tree in sources("sharding").items():
        assert not any(module.split(".")[0] == "runner" for module in imports(tree)), path


def test_no_files_import_each_other_in_a_circle():
    files = sources("runner") | sources("sharding")
    names = {path.removesuffix(".py").replace("/", ".") for path in files}
    arrows = {}
    for path, tree in files.items():
        found = imports(tree)
        found |= {module.rpartition(".")[0] for module in found}
        arrows[path.removesuffix(".py").replace("/", ".")] = found & names
    arrows["runner.__init__"] = set()  # imports when it is asked
    while free := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert arrows == {}


@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_one_home(library):
    files = sources("runner") | sources("sharding")
    users = {
        path
        for path, tree in files.items()
        if any(module.split(".")[0] == library for module in imports(tree))
    }
    assert users, f"{library} is not used: take it out of the table"
    assert [path for path in sorted(users) if not path.startswith(HOMES[library])] == []


class TestTheTest:
    """It must show what it is for."""

    @pytest.mark.parametrize(
        ("path", "line"),
        [
            ("runner/common/files.py", "from runner.config import flags"),
            ("runner/data/inputs.py", "def f():\n    import runner.model.loading"),
            ("runner/preset/auto.py", "if TYPE_CHECKING:\n    from runner.report.facts import A"),
            ("runner/api.py", "from runner import cli"),
            ("runner/config/task.py", "import runner.results.table as table"),
        ],
    )
    def test_an_import_upwards_or_to_the_side_shows(self, path, line):
        assert len(upward(path, ast.parse(line))) == 1

    @pytest.mark.parametrize(
        ("path", "line"),
        [
            ("runner/config/parser.py", "from runner import __version__"),
            ("runner/config/parser.py", "from runner.config.flags import flag"),
            ("runner/cli.py", "from runner.driver.run import run"),
            ("runner/executors/ray/session.py", "import runner"),
            ("runner/report/page.py", "import sharding.kinds"),
        ],
    )
    def test_others_do_not(self, path, line):
        assert upward(path, ast.parse(line)) == []
