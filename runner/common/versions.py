"""Installed packages -> the versions on which a run's numbers depend."""

import importlib.metadata
import platform

from runner import __version__

PACKAGES = ("jax", "keras", "keras-hub", "keras-nlp", "numpy", "pandas", "ray", "sentencepiece")


def versions() -> dict[str, str]:
    """Return name -> version of this program, Python and those of `PACKAGES` that are there."""
    found = {"arena-runner": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
