"""Installed packages -> the versions on which a run's numbers depend."""

import importlib.metadata
import platform
from collections.abc import Iterable

from runner import __version__

PACKAGES = ("jax", "keras", "keras-hub", "keras-nlp", "numpy", "pandas", "ray", "sentencepiece")


def versions() -> dict[str, str]:
    """Return the versions of this program, Python and `PACKAGES`, by name."""
    own = {"arena-runner": __version__, "python": platform.python_version()}
    return own | installed(PACKAGES)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each package that is installed, by name."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
