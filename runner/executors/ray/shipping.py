"""Model files of the driver -> the same files on another machine, found there or sent in pieces.

`parcels` and `pieces` run on the driver's machine, `Receiver` on the other. Does not know Ray:
`keepers.py` carries the pieces.

A parcel is named after its content, so later runs find what was sent once. It appears in its place
by a rename, once it is complete.
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

import numpy as np

from runner.common.errors import DataError, WorkerError
from runner.common.records import ModelSpec
from runner.common.units import mb
from runner.preset.reader import read_preset

PIECE_BYTES = 32 << 20
# A file is identified by its size and by samples of its content, evenly spread from its first byte
# to its last: reading 18 GB at every start would take minutes. Up to 64 MiB the samples are all.
SAMPLE_BYTES, MOST_SAMPLES = 1 << 20, 64
# Parcels that no run has used for this long are removed, and so are unfinished ones.
KEPT_S, UNFINISHED_KEPT_S = 14 * 86400.0, 86400.0
UNFINISHED = ".part-"
# Fields of a ModelSpec that name files besides the preset.
FILES = ("lora_weights", "head_kernel", "head_bias")
# Environment variable: `always` also sends files that nodes can read at their own paths, for nodes
# whose shared file system is slow.
SHIP = "ARENA_RUNNER_SHIP"


@dataclass(frozen=True, slots=True)
class Parcel:
    """Files that belong together: a preset, or one file.

    field: of the ModelSpec, which names them. root: their folder on the driver's machine. names: of
    the files, relative to the root. identities: one a file. target: the path that the field names,
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
        """The name of its folder on other machines."""
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
    """Return all files that the workers of a run read.

    Raises:
        DataError: the preset names files outside its folder.
    """
    preset = read_preset(Path(spec.preset))
    # Not all weights: there may be others, such as those of a whole task.
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
    """Yield a parcel in pieces; an empty file is one empty piece."""
    for name, size in zip(parcel.names, parcel.sizes, strict=True):
        with open(Path(parcel.root, name), "rb") as file:
            for offset in range(0, max(1, size), PIECE_BYTES):
                content = np.frombuffer(file.read(PIECE_BYTES), dtype=np.uint8)
                yield Piece(name, offset, content, zlib.crc32(content.data))


class Receiver:
    """Receives files on the machine that needs them.

    Args:
        folder: for received files, kept between runs; only its owner can enter it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Path] = {}

    def find(self, parcel: Parcel, *, even_here: bool) -> str | None:
        """Return the path of a parcel's target on this machine, None if it must be sent.

        Args:
            even_here: send it even if its files are at their own paths, as on a shared file system.
        """
        if not even_here and _is_at(Path(parcel.root), parcel):
            return str(Path(parcel.root, parcel.target))
        kept = self._folder / parcel.digest
        if not _is_at(kept, parcel):
            return None
        os.utime(kept)
        return str(kept / parcel.target)

    def begin(self, parcel: Parcel) -> None:
        """Make a folder for a parcel.

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
        """Write a piece of a parcel.

        Raises:
            WorkerError: it was damaged on its way.
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
            WorkerError: the files changed while they were sent.
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
            # Another run has put the same there, or it is damaged.
            if not _is_at(kept, parcel):
                shutil.rmtree(kept, ignore_errors=True)
                part.rename(kept)
        shutil.rmtree(part, ignore_errors=True)
        return str(kept / parcel.target)

    def _sweep(self) -> None:
        """Remove parcels that have not been used for long, and unfinished ones."""
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
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _samples(size: int) -> list[int]:
    """Return where samples begin: all of a small file, else evenly spread."""
    if size <= SAMPLE_BYTES * MOST_SAMPLES:
        return list(range(0, size, SAMPLE_BYTES))
    last = size - SAMPLE_BYTES
    return [last * number // (MOST_SAMPLES - 1) for number in range(MOST_SAMPLES)]


def _parcel(field: str, root: Path, files: list[Path], target: str) -> Parcel:
    names = tuple(os.path.relpath(path, root) for path in files)
    for name in names:
        # On the other machine this would be outside the parcel's folder.
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
    """Return whether a folder holds all files of a parcel."""
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
