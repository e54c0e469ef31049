"""The idx files of MNIST and of the data sets made in its image."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from fedray.data.dataset import Dataset, make_dataset
from fedray.errors import DataError

_UBYTE = 0x08
_SPLITS = {"train": "train", "test": "t10k"}


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file, raw or gzipped (told by its content, not its name).

    The header is 0, 0, type, number of dimensions, then each size as a big-endian int32 (LeCun's MNIST page).

    Raises:
        DataError: naming the file, if it cannot be read, is no such file, or is not exactly as long as it says.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions:
                raise DataError(f"{path} is truncated: it ends within its header; fetch it again")
            if header[:4] != bytes((0, 0, _UBYTE, dimensions)):
                expected = bytes((0, 0, _UBYTE, dimensions)).hex()
                raise DataError(
                    f"{path} has the wrong magic number {header[:4].hex()} (expected {expected}: idx, unsigned bytes, "
                    f"{dimensions} dimensions); is it another file, or corrupt?"
                )
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", dimensions, offset=4))
            size = int(np.prod(shape, dtype=object))
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or corrupt ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) != size:
        problem = "is truncated" if len(content) < size else "is longer than its header says"
        raise DataError(f"{path} {problem}: its header announces {shape}, {size} bytes; fetch it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_mnist_like(name: str, path: str, classes: tuple[str, ...], hint: str) -> Dataset:
    """The four idx files of a folder as a ``Dataset``; ``hint`` says how to get them if they are not there."""
    folder = Path(path).expanduser()
    splits = {split: _read_split(folder, prefix, len(classes), hint) for split, prefix in _SPLITS.items()}
    return make_dataset(name, splits["train"], splits["test"], classes)


def _read_split(folder: Path, prefix: str, num_classes: int, hint: str) -> dict[str, np.ndarray]:
    x_path, y_path = (_find(folder, prefix, kind, hint) for kind in ("images-idx3", "labels-idx1"))
    x, y = read_idx(x_path, 3), read_idx(y_path, 1)
    if len(x) != len(y):
        raise DataError(
            f"{x_path} holds {len(x)} images but {y_path} holds {len(y)} labels; they do not belong together"
        )
    if len(y) and y.max() >= num_classes:
        raise DataError(f"{y_path} holds a label {y.max()}; labels must be 0..{num_classes - 1}")
    return {"x": x[:, None], "y": y.astype(np.int64)}


def _find(folder: Path, prefix: str, kind: str, hint: str) -> Path:
    for separator in "-.":
        for ending in ("", ".gz"):
            path = folder / f"{prefix}-{kind.replace('-', separator)}-ubyte{ending}"
            if path.is_file():
                return path
    problem = f"has no {prefix}-{kind}-ubyte[.gz]" if folder.is_dir() else "is not a folder"
    raise DataError(f"{folder} {problem}; {hint}")
