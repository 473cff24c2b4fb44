"""What is given to others: a wheel that works away from this folder, an sdist that holds it all."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import runner
from tests.conftest import ROOT, copy_project, environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert runner.__version__ == PROJECT["version"]
    assert titles[0].split()[0] == PROJECT["version"]


def test_the_licence_is_named_and_there():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Build as `make build` does, into another folder: the sdist, and the wheel from the sdist."""
    target = tmp_path_factory.mktemp("dist")
    project = copy_project(tmp_path_factory.mktemp("source") / "arena-runner")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, project)
    return target


def _run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _sources() -> set[str]:
    """Every file of the two packages but what Python leaves there."""
    return {
        str(path.relative_to(ROOT))
        for folder in ("runner", "sharding")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"arena_runner-{runner.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"arena_runner-{runner.__version__}.dist-info"
    assert {name for name in names if not name.startswith(about)} == _sources()
    assert f"{about}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_sdist_holds_what_the_pages_speak_of(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    wanted = {"run.py", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"}
    wanted |= {
        str(path.relative_to(ROOT))
        for folder in ("docs", "examples", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted | _sources() <= names


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(built, cache, tmp_path):
    """In a fresh environment, which finds this one's libraries but not its arena-runner."""
    (wheel,) = built.glob("*.whl")
    venv, work = tmp_path / "venv", tmp_path / "elsewhere"
    work.mkdir()
    _run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    env = environment(cache)
    _run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, env=env)
    site = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    # A path alone: what .pth files there say, such as of an editable install, is not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = venv / "bin" / "arena-runner"
    assert "--time-limit" in _run(command, "--help", env=env, cwd=work)
    where = _run(python, "-c", "import runner; print(runner.__file__)", env=env, cwd=work)
    assert Path(where.strip()).is_relative_to(venv)
    _run(command, "--mode", "data-parallel", env=env, cwd=work)
    assert (work / "submission.csv").read_text().count("\n") == 601
