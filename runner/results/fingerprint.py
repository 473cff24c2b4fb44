"""Everything that changes an answer -> named parts and one hash over them.

Two runs whose fingerprints agree give the same answers, so one may go on from the other's rows.
Mode, workers, group size and batch sizes do not count: answers do not depend on them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Of a weight file its size and this much of its start and end are hashed: 18 GB would cost
# minutes, and other weights in a file of the same size differ in these parts too.
WEIGHT_SAMPLE_BYTES = 1 << 20
# Values of parts: so begins a hash of contents, and so a part that a run does without.
HASHED = "sha256:"
NONE = "none"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What decides an answer, by name: a setting as a person reads it, or a hash of contents."""

    parts: dict[str, str]

    @property
    def digest(self) -> str:
        """A SHA-256 in hex over the sorted parts."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    def differences(self, earlier: Mapping[str, str]) -> list[str]:
        """Say in plain words what differs from the parts of an earlier run; empty: nothing does."""
        names = [name for name in {**self.parts, **earlier} if self._differs(name, earlier)]
        if {"text format", "template"} & {*names} and "test set" in names:
            # Other texts follow from another format: the person need not look at the file.
            names.remove("test set")
        return [_difference(name, earlier.get(name), self.parts.get(name)) for name in names]

    def _differs(self, name: str, earlier: Mapping[str, str]) -> bool:
        return self.parts.get(name) != earlier.get(name)


def fingerprint(
    *,
    settings: Mapping[str, object],
    versions: Mapping[str, str],
    ids: Sequence[str],
    texts: Sequence[str],
    preset_files: Iterable[Path],
    weight_files: Iterable[Path],
    head_files: Iterable[Path],
    lora_file: Path | None,
) -> Fingerprint:
    """Return the fingerprint of a run.

    Args:
        settings: a part each, named after its key; `dtype` as it was decided, not `auto`.
        versions: a part each: package -> version.
        texts: as rendered, a row each. Ids and texts are hashed whole.
        preset_files, head_files, lora_file: hashed whole; their names do not count.
        weight_files: of each its size and its first and last `WEIGHT_SAMPLE_BYTES` are hashed.
    """
    parts = {name.replace("_", " "): str(value) for name, value in settings.items()}
    parts |= dict(versions)
    parts |= {
        "test set": _hash(
            text.encode("utf-8", errors="surrogatepass") for text in (str(len(ids)), *ids, *texts)
        ),
        "preset config and tokenizer": _hash(_digest(path) for path in preset_files),
        "weights": _hash(piece for path in weight_files for piece in _samples(path)),
        "LoRA file": NONE if lora_file is None else _hash([_digest(lora_file)]),
        "head": _hash(_digest(path) for path in head_files),
    }
    return Fingerprint(parts)


def _difference(name: str, before: str | None, now: str | None) -> str:
    before, now = before or NONE, now or NONE
    if before.startswith(HASHED) and now.startswith(HASHED):
        return f"the content of the {name} differs"
    before, now = ("given" if value.startswith(HASHED) else value for value in (before, now))
    return f"{name} was {before}, is {now}"


def _hash(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        # Length first, so that two pieces never read as one other piece.
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return HASHED + digest.hexdigest()


def _digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _samples(path: Path) -> list[bytes]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(WEIGHT_SAMPLE_BYTES)
        file.seek(max(0, size - WEIGHT_SAMPLE_BYTES))
        return [str(size).encode(), first, file.read(WEIGHT_SAMPLE_BYTES)]
