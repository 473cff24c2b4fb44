"""Model files of the driver -> the same files on another machine, found there or sent in pieces.

Both ends, as plain code: `parcels` and `pieces` on the driver's machine, `Receiver` on the other.
Does not know Ray: `nodes.py` carries what one end makes to the other.

A parcel is named by what is in it, so whatever was sent once is found by later runs. It appears at
its place by a rename, when it is whole.
"""

import hashlib
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from runner.common.errors import DataError, WorkerError
from runner.common.records import ModelSpec
from runner.common.units import mb
from runner.preset.reader import read_preset

PIECE_BYTES = 32 << 20
# A file is known by its size and so many samples of its content, evenly spread, the first and last
# bytes among them: to read 18 GB at every start would take minutes. Up to 64 MiB that is all of it.
SAMPLE_BYTES, MOST_SAMPLES = 1 << 20, 64
# What no run has used for so long is removed, and what was begun and not finished.
KEPT_S, UNFINISHED_KEPT_S = 14 * 86400.0, 86400.0
UNFINISHED = ".part-"
# Fields of a ModelSpec that name files besides the preset.
FILES = ("lora_weights", "head_kernel", "head_bias")
# Environment variable: `always` sends what could be read at its path as well, to have it on the
# disks of nodes whose shared file system is slow.
SHIP = "ARENA_RUNNER_SHIP"


@dataclass(frozen=True, slots=True)
class Parcel:
    """Files that belong together: a preset, or one file.

    field: of the ModelSpec that names them. root: the folder they lie in, on the driver's machine.
    names: of the files, relative to it. identities: one a file. target: what the field names,
    relative to the root.
    """

    field: str
    root: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    identities: tuple[str, ...]
    target: str

    @property
    def digest(self) -> str:
        """The name of the folder that holds it on other machines."""
        pairs = "".join(map("{}\0{}\0".format, self.names, self.identities))
        return hashlib.sha256(pairs.encode("utf-8", errors="surrogateescape")).hexdigest()[:32]

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of one file of a parcel: uint8 (bytes,)."""

    name: str
    offset: int
    content: np.ndarray
    checksum: int


def parcels(spec: ModelSpec) -> tuple[Parcel, ...]:
    """Return all that the workers of a run read from disk.

    Raises:
        DataError: the preset names files outside its folder.
    """
    preset = read_preset(Path(spec.preset))
    # Beside the weights that are read there may be others, such as a whole task's.
    names = {*preset.small_files, *preset.weight_files, *preset.path.glob("*.json")}
    if preset.classifier is not None:
        names.update(preset.classifier.files)
    found = [_parcel("preset", preset.path, sorted(names), ".")]
    for field in FILES:
        path = getattr(spec, field)
        if path is not None:
            found.append(_parcel(field, Path(path).parent, [Path(path)], Path(path).name))
    return tuple(found)


def pieces(parcel: Parcel) -> Iterator[Piece]:
    """Read a parcel in pieces; an empty file is one empty piece."""
    for name, size in zip(parcel.names, parcel.sizes, strict=True):
        with open(Path(parcel.root, name), "rb") as file:
            for offset in range(0, max(1, size), PIECE_BYTES):
                content = np.frombuffer(file.read(PIECE_BYTES), dtype=np.uint8)
                yield Piece(name, offset, content, zlib.crc32(content.data))


class Receiver:
    """The machine that needs the files. Its folder is the owner's alone.

    Args:
        folder: for what is received, kept between runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Path] = {}

    def find(self, parcel: Parcel, *, even_here: bool) -> str | None:
        """Return the path of a parcel's target on this machine, None if it has to be sent.

        Args:
            even_here: whether to send what lies at its own path, as on a shared file system.
        """
        if not even_here and _is_at(Path(parcel.root), parcel):
            return str(Path(parcel.root, parcel.target))
        kept = self._folder / parcel.digest
        if not _is_at(kept, parcel):
            return None
        os.utime(kept)
        return str(kept / parcel.target)

    def begin(self, parcel: Parcel) -> None:
        """Make room for a parcel.

        Raises:
            WorkerError: the disk has no room for it.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()
        free = shutil.disk_usage(self._folder).free
        if free < parcel.bytes:
            raise WorkerError(
                f"{self._folder} has no room for {parcel.field}: expected {mb(parcel.bytes)}. "
                f"Received: {mb(free)} free"
            )
        self._open[parcel.digest] = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self._folder))

    def write(self, digest: str, piece: Piece) -> None:
        """Write a piece of a parcel that was begun.

        Raises:
            WorkerError: it is not as it was sent.
        """
        if zlib.crc32(piece.content.data) != piece.checksum:
            raise WorkerError(f"{piece.name} was damaged on its way at byte {piece.offset:,}.")
        path = self._open[digest] / piece.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "xb") as file:
            file.seek(piece.offset)
            file.write(piece.content.data)

    def finish(self, parcel: Parcel) -> str:
        """Put a parcel in its place; return the path of its target.

        Raises:
            WorkerError: it is not what was announced; the files changed while they were sent.
        """
        part, kept = self._open.pop(parcel.digest), self._folder / parcel.digest
        if not _is_at(part, parcel):
            shutil.rmtree(part, ignore_errors=True)
            raise WorkerError(
                f"{Path(parcel.root, parcel.target)} changed while it was sent: expected files "
                "that stay as they are during a run."
            )
        try:
            part.rename(kept)
        except OSError:
            # Another run brought the same, or something damaged it since.
            if not _is_at(kept, parcel):
                shutil.rmtree(kept, ignore_errors=True)
                part.rename(kept)
        shutil.rmtree(part, ignore_errors=True)
        return str(kept / parcel.target)

    def _sweep(self) -> None:
        """Remove what was not used for long, and what was begun and never finished."""
        for path in self._folder.iterdir():
            most = UNFINISHED_KEPT_S if path.name.startswith(UNFINISHED) else KEPT_S
            try:
                if time.time() - path.stat().st_mtime > most:
                    shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue


def at(spec: ModelSpec, paths: dict[str, str], compilation_cache: str) -> ModelSpec:
    """Return a spec with the paths of another machine: field -> path."""
    return replace(spec, **paths, compilation_cache=compilation_cache)  # type: ignore[arg-type]


def identity(path: Path) -> str:
    """Return a hash of a file's size and samples of its content.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for start in _samples(size):
            digest.update(_read(file, start))
    return digest.hexdigest()


def _samples(size: int) -> list[int]:
    """Where samples begin: all of a small file, else evenly spread from its start to its end."""
    if size <= SAMPLE_BYTES * MOST_SAMPLES:
        return list(range(0, size, SAMPLE_BYTES))
    last = size - SAMPLE_BYTES
    return [last * number // (MOST_SAMPLES - 1) for number in range(MOST_SAMPLES)]


def _read(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.read(SAMPLE_BYTES)


def _parcel(field: str, root: Path, files: list[Path], target: str) -> Parcel:
    names = tuple(os.path.relpath(path, root) for path in files)
    for name in names:
        # On another machine it would be written to wherever that is.
        if name.startswith(os.pardir):
            raise DataError(
                f"{root} must hold its own files to be sent to other machines. Received: {name}"
            )
    return Parcel(
        field=field,
        root=str(root),
        names=names,
        sizes=tuple(path.stat().st_size for path in files),
        identities=tuple(map(identity, files)),
        target=target,
    )


def _is_at(root: Path, parcel: Parcel) -> bool:
    """Whether all files of a parcel lie under a folder."""
    try:
        return all(
            os.path.getsize(root / name) == size
            for name, size in zip(parcel.names, parcel.sizes, strict=True)
        ) and all(
            identity(root / name) == known
            for name, known in zip(parcel.names, parcel.identities, strict=True)
        )
    except OSError:
        return False
