"""What a model is, whatever its folder is called: a hash of its files."""

import hashlib
from functools import lru_cache
from pathlib import Path


@lru_cache
def fingerprint(path: str) -> str:
    """A hash of a model: of the bytes of a folder's files, wherever the folder is."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                for block in iter(lambda: content.read(1 << 20), b""):
                    digest.update(block)
    return digest.hexdigest()
