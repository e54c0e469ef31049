"""The value that holds a data set, and what its loaders share: checking, tidying, splitting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedray.errors import DataError

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples as plain arrays, so that one copy in shared memory serves every worker.

    Clients hold positions in ``train``; ``test`` is the server's. All arrays are C-contiguous and read-only.

    Attributes:
        name: what reports call it.
        train: columns of equal length. ``x`` is uint8 of shape N×C×H×W (images), float32 of shape N×..., or of text
            whole numbers of shape N×L (token ids); ``y`` is int64 of shape N, a position in ``classes``; any further
            column (speaker, domain, writer: numpy strings or whole numbers) is there to partition by.
        test: the same columns for the test examples.
        classes: the name of each class; of text to continue, of each author.
        mean: per channel (axis 1 of ``x``), or a single value for all; of ``x/255`` where ``x`` is uint8; () of text.
        std: likewise, never 0. A task normalises with ``(x - mean) / std``.
        vocabulary: how many token ids there are, of text; 0 of everything else.

    Raises:
        DataError: if a column lacks, or has another type, shape or length than said here.
    """

    name: str
    train: Columns
    test: Columns
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    vocabulary: int = 0

    def __post_init__(self) -> None:
        if set(self.train) != set(self.test):
            raise DataError(f"{self.name}: train has columns {sorted(self.train)}, test has {sorted(self.test)}")
        for split in ("train", "test"):
            columns = getattr(self, split)
            _check(f"{self.name} ({split})", columns, len(self.classes), self.vocabulary)
            object.__setattr__(self, split, {name: _read_only(column) for name, column in columns.items()})
        if self.train["x"].shape[1:] != self.test["x"].shape[1:] or self.train["x"].dtype != self.test["x"].dtype:
            described = " and ".join(f"{s['x'].dtype} {s['x'].shape[1:]}" for s in (self.train, self.test))
            raise DataError(f"{self.name}: examples of train and test differ: {described}")
        wanted = (0,) if self.vocabulary else (1, self.train["x"].shape[1])
        if len(self.mean) != len(self.std) or len(self.mean) not in wanted:
            raise DataError(f"{self.name}: {len(self.mean)} means and {len(self.std)} stds for x {self.input_shape}")

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example: (C, H, W) of an image, (D,) of a feature vector, (L,) of a sequence of tokens."""
        return self.train["x"].shape[1:]


def _check(where: str, columns: Columns, num_classes: int, vocabulary: int) -> None:
    for name in ("x", "y"):
        if name not in columns:
            raise DataError(f"{where} has no column {name!r}; it has {sorted(columns)}")
    x, y = columns["x"], columns["y"]
    if len(x) == 0:
        raise DataError(f"{where} has no examples")
    if vocabulary:
        if x.dtype.kind not in "iu" or x.ndim != 2:
            raise DataError(f"{where}: x is {x.dtype} {x.shape}; tokens must be whole numbers N×L")
        if x.min() < 0 or x.max() >= vocabulary:
            wrong = int(x.min()) if x.min() < 0 else int(x.max())
            raise DataError(f"{where}: there is a token {wrong}; tokens must be 0..{vocabulary - 1}")
    elif not ((x.dtype == np.uint8 and x.ndim == 4) or (x.dtype == np.float32 and x.ndim >= 2)):
        raise DataError(f"{where}: x is {x.dtype} {x.shape}; it must be uint8 N×C×H×W or float32 N×...")
    if y.dtype != np.int64 or y.ndim != 1:
        raise DataError(f"{where}: y is {y.dtype} {y.shape}; it must be int64 N")
    for name, column in columns.items():
        if len(column) != len(x):
            raise DataError(f"{where}: column {name!r} has {len(column)} values for {len(x)} examples")
    if y.min() < 0 or y.max() >= num_classes:
        wrong = int(y.min()) if y.min() < 0 else int(y.max())
        raise DataError(f"{where}: there is a label {wrong}; labels must be 0..{num_classes - 1}")


def _read_only(array: np.ndarray) -> np.ndarray:
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def make_dataset(
    name: str, train: Columns, test: Columns, classes: Sequence[str], *, per_channel: bool = True
) -> Dataset:
    """A ``Dataset`` whose mean and std are measured on ``train`` (one pair for everything unless ``per_channel``)."""
    mean, std = moments(train["x"], per_channel)
    return Dataset(name, train, test, tuple(classes), mean, std)


def moments(x: np.ndarray, per_channel: bool = True) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std along axis 1 of ``x`` (uint8 in units of x/255); a constant channel's std counts as 1.

    >>> moments(np.array([[0, 2], [2, 2]], np.float32))
    ((1.0, 2.0), (1.0, 1.0))
    """
    axes = tuple(a for a in range(x.ndim) if a != 1 or not per_channel)
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    count = x.size // (x.shape[1] if per_channel else 1)
    rows = max(1, (1 << 20) * len(x) // x.size)  # about a million values at a time: never a float copy of the whole
    blocks = [slice(i, i + rows) for i in range(0, len(x), rows)]
    mean = np.sum([x[b].sum(axis=axes, dtype=np.float64, keepdims=True) for b in blocks], axis=0) / count
    square = np.sum([np.square(x[b] - mean).sum(axis=axes) for b in blocks], axis=0) / count
    std = np.sqrt(square) / scale
    return (
        tuple(float(m) for m in np.ravel(mean / scale)),
        tuple(float(s) if s > 0 else 1.0 for s in np.ravel(std)),
    )


def tidy_inputs(x: np.ndarray, where: str, channels_last: bool | None = None) -> np.ndarray:
    """Inputs as a ``Dataset`` wants them: uint8 images N×C×H×W, everything else float32.

    A three-dimensional ``x`` gains a channel. ``channels_last=None`` guesses: it is so if the last axis has 1, 3 or 4
    entries and axis 1 has not.
    """
    if x.dtype.kind not in "buif":
        raise DataError(f"{where}: inputs are {x.dtype}; they must be numbers")
    if x.ndim < 2 or x.size == 0:
        raise DataError(f"{where}: inputs have shape {x.shape}; the first axis counts examples, none may be empty")
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4:
        if channels_last is None:
            channels_last = x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)
        x = x.transpose(0, 3, 1, 2) if channels_last else x
    if x.dtype == np.uint8 and x.ndim == 4:
        return np.ascontiguousarray(x)
    x = np.ascontiguousarray(x, dtype=np.float32)
    if not np.isfinite(x).all():
        raise DataError(f"{where}: inputs hold values that are not finite (NaN or infinite)")
    return x


def encode_labels(
    labels: Mapping[str, np.ndarray], where: str, classes: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels of each split as int64 positions in one tuple of class names.

    Text becomes the sorted distinct values (or positions in ``classes``); whole numbers stay what they are, and their
    classes are called by their numbers unless ``classes`` names them.
    """
    kinds = {column.dtype.kind for column in labels.values()}
    if any(column.ndim != 1 for column in labels.values()) or not (kinds <= set("buiU")):
        described = ", ".join(f"{column.dtype} {column.shape}" for column in labels.values())
        raise DataError(f"{where}: labels are {described}; they must be one whole number or text per example")
    if kinds == {"U"}:
        names = np.unique(np.concatenate(list(labels.values()))) if classes is None else np.asarray(classes)
        place = {str(name): i for i, name in enumerate(names)}
        try:
            codes = {s: np.array([place[str(v)] for v in column], np.int64) for s, column in labels.items()}
        except KeyError as error:
            raise DataError(f"{where}: label {error.args[0]!r} is not among the classes {list(place)[:20]}") from None
        return codes, tuple(place)
    if "U" in kinds:
        raise DataError(f"{where}: labels are text in one split and numbers in another")
    codes = {split: column.astype(np.int64) for split, column in labels.items()}
    if classes is None:
        top = max((int(c.max()) for c in codes.values() if len(c)), default=0)
        if top >= 1_000_000:
            raise DataError(f"{where}: there is a label {top}; whole-number labels must be 0, 1, 2 ... without gaps")
        classes = [str(k) for k in range(top + 1)]
    return codes, tuple(str(name) for name in classes)


def split_by_class(
    y: np.ndarray, test_fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A seeded split, stratified by class: ascending positions of the train and of the test examples.

    ``groups`` gives each example a group that must not be torn apart (all drawings of one emoji); a group then counts
    as one unit of its first example's class. A class of one unit is trained on.

    Raises:
        ValueError: if ``test_fraction`` is not in (0, 1), or leaves either side empty.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; it must be between 0 and 1, both excluded")
    if groups is None:
        unit, first = np.arange(len(y)), np.arange(len(y))
    else:
        _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
    label = y[first]
    order = np.random.default_rng(seed).permutation(len(label))
    is_test = np.zeros(len(label), bool)
    for k in np.unique(label):
        members = order[label[order] == k]
        is_test[members[: min(int(len(members) * test_fraction + 0.5), len(members) - 1)]] = True
    mask = is_test[unit]
    if not mask.any():
        raise ValueError(f"test_fraction is {test_fraction}; it leaves no test example of {len(y)}: give a larger one")
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def split_columns(
    columns: Columns, test_fraction: float, seed: int, split_by: str | None, where: str
) -> tuple[Columns, Columns]:
    """Columns cut into train and test by ``split_by_class``, whole groups of column ``split_by`` if one is named."""
    if split_by is not None and split_by not in columns:
        raise ValueError(f"split_by is {split_by!r}; {where} has the columns {sorted(set(columns) - {'x', 'y'})}")
    train, test = split_by_class(columns["y"], test_fraction, seed, columns[split_by] if split_by else None)
    return {k: v[train] for k, v in columns.items()}, {k: v[test] for k, v in columns.items()}


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """The module, or a ``DataError`` that says which extra to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{purpose} needs the package {module!r}: pip install 'fedray[{extra}]'") from None
