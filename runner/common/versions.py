"""The versions of what a run's numbers depend on."""

import importlib.metadata
import platform

from runner import __version__

PACKAGES = ("jax", "keras", "keras-hub", "keras-nlp", "numpy", "pandas", "ray", "sentencepiece")


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    found = {"arena-runner": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
