"""Hashes of dataset files' contents; they replace the commit for local files."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mllm_shapx.errors import DatasetError

_CHUNK = 1 << 20


def hash_of(files: Iterable[Iterable[bytes]]) -> str:
    """Return `content:` and 40 hex digits of the hash over the pieces of files, in order."""
    total = hashlib.blake2b(digest_size=20)
    for pieces in files:
        of_file = hashlib.blake2b(digest_size=20)
        for piece in pieces:
            of_file.update(piece)
        total.update(of_file.digest())
    return f"content:{total.hexdigest()}"


def read_pieces(path: Path, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes of a file at `(offset, length)`, in small pieces.

    Raises:
        DatasetError: When the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for offset, length in places:
                file.seek(offset)
                left = length
                while left > 0 and (piece := file.read(min(left, _CHUNK))):
                    left -= len(piece)
                    yield piece
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
