"""Everything that determines an answer -> named parts and one hash over them.

Two runs with equal fingerprints give the same answers, so one can resume from the other's rows.
Mode, workers, group size and batch sizes are not part of it: answers do not depend on them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A weight file's hash covers its size and this much of its start and end. Hashing 18 GB would take
# minutes, and different weights of the same size differ in these parts too.
WEIGHT_SAMPLE_BYTES = 1 << 20
# The prefix of parts that are hashes of contents, and the value of parts that a run does not have.
HASHED = "sha256:"
NONE = "none"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What determines an answer, by name: readable settings and hashes of contents."""

    parts: dict[str, str]

    @property
    def digest(self) -> str:
        """The SHA-256 of the sorted parts, in hex."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    def differences(self, earlier: Mapping[str, str]) -> list[str]:
        """Return a phrase for each difference from the parts of an earlier run."""
        names = [
            name for name in {**self.parts, **earlier} if self.parts.get(name) != earlier.get(name)
        ]
        if {"text format", "template"} & {*names} and "test set" in names:
            # A new format explains the new texts: the user need not look at the file.
            names.remove("test set")
        return [_difference(name, earlier.get(name), self.parts.get(name)) for name in names]


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
        settings: each is a part named after its key; `dtype` is the resolved one, not `auto`.
        versions: package -> version; each is a part.
        ids, texts: one of each per row, texts as rendered; hashed completely.
        preset_files, head_files, lora_file: hashed completely, without their names.
        weight_files: the size and the first and last `WEIGHT_SAMPLE_BYTES` of each are hashed.
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
        # Hash the length first, so that the same bytes cut into other pieces hash differently.
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
