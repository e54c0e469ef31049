"""Data sets by name, but for those that need Hugging Face's `datasets` (see ``hub.py``)."""

import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from fedray.data.dataset import Columns, Dataset, encode_labels, make_dataset, split_columns, tidy_inputs
from fedray.data.idx import read_mnist_like
from fedray.errors import DataError

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_DIGITS = tuple("0123456789")


def digits(test_fraction: float = 0.2, split_seed: int = 0) -> Dataset:
    """Handwritten digits, 1,797 real 8×8 images that come with scikit-learn (needs no file).

    Pixels 0..16 are scaled so that 16 becomes 255. Source: Alpaydin and Kaynak, UCI repository, 1998 (its test part).

    Args:
        test_fraction: part of each class that is kept for testing.
        split_seed: seed of the split into train and test; the same for every run unless you change it.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    train, test = split_columns({"x": x, "y": bunch.target.astype(np.int64)}, test_fraction, split_seed, None, "digits")
    return make_dataset("digits", train, test, _DIGITS)


def fashion_mnist(path: str = "/usr/share/datasets/fashion-mnist") -> Dataset:
    """Fashion-MNIST, 60,000 + 10,000 grey 28×28 images of clothes, from a folder of idx files.

    Source: Xiao, Rasul and Vollgraf, arXiv:1708.07747, table 2 (class names).

    Args:
        path: folder of the four idx files, raw or gzipped; the default is where Debian's package puts them.
    """
    hint = "install it (apt-get install dataset-fashion-mnist), or give task.data.path=FOLDER_OF_THE_FOUR_IDX_FILES"
    return read_mnist_like("fashion_mnist", path, _FASHION, hint)


def mnist(path: str = "/usr/share/datasets/mnist") -> Dataset:
    """MNIST, 60,000 + 10,000 grey 28×28 images of handwritten digits, from a folder of idx files.

    Source: LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 86(11), 1998.

    Args:
        path: folder of the four idx files, raw or gzipped.
    """
    hint = "put train-images-idx3-ubyte[.gz] and the other three there, or give task.data.path=FOLDER"
    return read_mnist_like("mnist", path, _DIGITS, hint)


def subset(
    of: Dataset,
    train: int | None = None,
    test: int | None = None,
    per_class: int | None = None,
    test_from: Literal["test", "train"] = "test",
    seed: int = 0,
) -> Dataset:
    """A random part of another dataset, which keeps its normalisation; all clients' examples are drawn from the part.

    Args:
        of: The dataset that it is a part of.
        train: Training examples; None for all.
        test: Test examples; None for all.
        per_class: Training examples of each class (K-shot), instead of ``train``.
        test_from: What is tested on: test examples, or training examples outside of the part, to choose settings by.
        seed: Seed of the choice; the same for every run unless you change it.
    """
    if train is not None and per_class is not None:
        raise ValueError(f"per_class is {per_class}, and train is {train}; give one of the two")
    rng, held_out = np.random.default_rng(seed), test_from == "train"
    chosen: dict[str, np.ndarray] = {}
    for option, columns, count in (("train", of.train, train), ("test", of.test, None if held_out else test)):
        order = rng.permutation(len(columns["y"]))
        if count is not None and not 1 <= count <= len(order):
            raise ValueError(f"{option} is {count}; it must be between 1 and {len(order)}, all that {of.name} has")
        chosen[option] = np.sort(order[:count])
        if option == "train" and per_class is not None:
            chosen[option] = np.sort(_shots(columns["y"][order], order, per_class, of))
    if held_out:
        rest = np.setdiff1d(np.arange(len(of.train["y"])), chosen["train"])
        count = len(rest) if test is None else test
        if not 1 <= count <= len(rest):
            raise ValueError(f"test is {count}; {len(rest)} training examples of {of.name} are outside of the part")
        chosen["test"] = np.sort(np.random.default_rng([seed, 1]).permutation(rest)[:count])
    sources = {"train": of.train, "test": getattr(of, test_from)}
    parts = {split: {name: x[chosen[split]] for name, x in source.items()} for split, source in sources.items()}
    return replace(of, train=parts["train"], test=parts["test"])


def _shots(labels: np.ndarray, order: np.ndarray, count: int, of: Dataset) -> np.ndarray:
    least = int(np.bincount(labels, minlength=of.num_classes).min())
    if not 1 <= count <= least:
        raise ValueError(f"per_class is {count}; it must be between 1 and {least}, the smallest class of {of.name}")
    return np.concatenate([order[labels == label][:count] for label in range(of.num_classes)])


def public_split(
    of: Dataset, public: int, part: Literal["public", "private"] = "private", by: str | None = None, seed: int = 0
) -> Dataset:
    """A dataset whose training examples are parted: public ones, which a generator may see, and the clients' own.

    Both parts keep the test set and the normalisation of the whole.

    Args:
        of: The dataset that is parted.
        public: Training examples in the public part, drawn at random; with ``by``, so many values.
        part: Which part this is.
        by: A column; examples with the same value all fall into one part. None to part single examples.
        seed: Seed of the choice; the same for every run unless you change it.
    """
    if by is not None and by not in of.train:
        raise ValueError(f"by is {by!r}; {of.name} has the columns {', '.join(sorted(of.train))}")
    units = np.arange(len(of.train["y"])) if by is None else np.unique(of.train[by], return_inverse=True)[1]
    count = int(units.max()) + 1
    if not 1 <= public < count:
        raise ValueError(f"public is {public}; it must be between 1 and {count - 1}, so that both parts have examples")
    is_public = np.isin(units, np.random.default_rng(seed).permutation(count)[:public])
    chosen = np.flatnonzero(is_public == (part == "public"))
    return replace(of, train={name: column[chosen] for name, column in of.train.items()})


def npz(
    path: str,
    test_path: str | None = None,
    x: str = "x",
    label: str = "y",
    classes: str = "classes",
    layout: Literal["auto", "NCHW", "NHWC"] = "auto",
    test_fraction: float = 0.2,
    split_by: str | None = None,
    split_seed: int = 0,
) -> Dataset:
    """Your own arrays from a numpy .npz file: inputs, labels, and columns to partition by.

    The file holds arrays of equal length, ``x``, ``y`` and any others; or ``x_train``, ``y_train``, ``x_test``,
    ``y_test`` (and others so suffixed). uint8 inputs of three or four dimensions are images; all else becomes float32.

    Args:
        path: the .npz file.
        test_path: a second such file with the test examples; without it, part of the first is kept for testing.
        x: name of the array of inputs.
        label: name of the array of labels, whole numbers from 0 or text.
        classes: name of the array of class names, if the file has one.
        layout: where the channels of four-dimensional inputs stand; auto looks for the axis of size 1, 3 or 4.
        test_fraction: part of each class kept for testing, if the file has no test examples of its own.
        split_by: name of an array; examples with the same value all fall into train or all into test.
        split_seed: seed of the split into train and test.
    """
    source = Path(path).expanduser()
    arrays = _read_npz(source)
    names = [str(name) for name in arrays[classes]] if classes in arrays else None
    if test_path is not None:
        parts = {"train": arrays, "test": _read_npz(Path(test_path).expanduser())}
    elif f"{x}_train" in arrays:
        parts = {
            split: {k.removesuffix(f"_{split}"): v for k, v in arrays.items() if k.endswith(f"_{split}")}
            for split in ("train", "test")
        }
    else:
        parts = {"all": arrays}
    channels_last = None if layout == "auto" else layout == "NHWC"
    tables = {s: _table(part, x, label, channels_last, f"{source} ({s})") for s, part in parts.items()}
    shared = set.intersection(*(set(table) for table in tables.values()))
    tables = {split: {k: v for k, v in table.items() if k in shared} for split, table in tables.items()}
    codes, names_of = encode_labels({split: table["y"] for split, table in tables.items()}, str(source), names)
    for split, y in codes.items():
        tables[split]["y"] = y
    if "all" in tables:
        train, test = split_columns(tables["all"], test_fraction, split_seed, split_by, str(source))
    else:
        train, test = tables["train"], tables["test"]
    return make_dataset(source.stem, train, test, names_of)


def _read_npz(path: Path) -> Columns:
    """Every array of the file; nothing is ever unpickled."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; give an .npz file, e.g. task.data.path=FILE.npz")
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise DataError(
                f"{path} is a single .npy array; save inputs and labels with numpy.savez(path, x=..., y=...)"
            )
        with content:
            return {name: content[name] for name in content.files}
    except DataError:
        raise
    except ValueError as error:
        if "pickle" not in str(error):
            raise DataError(f"{path} is no readable .npz file ({error}); save it again") from error
        raise DataError(
            f"{path} holds pickled objects or is no .npz file; fedray never unpickles: save arrays with numpy.savez"
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError) as error:
        raise DataError(f"{path} is truncated or corrupt ({error}); save it again") from error


def _table(arrays: Columns, x: str, label: str, channels_last: bool | None, where: str) -> Columns:
    for option, name in (("x", x), ("label", label)):
        if name not in arrays:
            raise DataError(
                f"{where} has no array {name!r}; it has {', '.join(sorted(arrays))}: give task.data.{option}=NAME"
            )
    inputs = arrays[x]
    if inputs.shape[:1] != arrays[label].shape[:1]:
        raise DataError(
            f"{where}: {x!r} has shape {inputs.shape} but {label!r} {arrays[label].shape}; lengths must agree"
        )
    further = {
        name: column
        for name, column in arrays.items()
        if name not in (x, "x", "y") and column.shape == inputs.shape[:1] and column.dtype.kind in "buiU"
    }
    return {"x": tidy_inputs(inputs, where, channels_last), "y": arrays[label], **further}
