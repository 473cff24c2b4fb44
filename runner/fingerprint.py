"""Everything that changes an answer -> one hash. Mode, workers and batch sizes do not count."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

# Of a weight file its size and this much of its start and end are hashed: 18 GB would cost
# minutes, and other weights in a file of the same size differ in these parts too.
WEIGHT_SAMPLE_BYTES = 1 << 20


def fingerprint(
    *,
    settings: Mapping[str, object],
    files: Iterable[Path],
    weight_files: Iterable[Path],
    texts: Iterable[str],
) -> str:
    """Return a SHA-256 in hex over settings, whole files, samples of weight files, and texts."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        _add(digest, path.read_bytes())
    for path in weight_files:
        size = path.stat().st_size
        _add(digest, str(size).encode())
        with open(path, "rb") as file:
            _add(digest, file.read(WEIGHT_SAMPLE_BYTES))
            file.seek(max(0, size - WEIGHT_SAMPLE_BYTES))
            _add(digest, file.read(WEIGHT_SAMPLE_BYTES))
    for text in texts:
        _add(digest, text.encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", data: bytes) -> None:
    """Length first, so that two pieces never read as one other piece."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
