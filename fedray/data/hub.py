"""Hub-style data sets through Hugging Face's `datasets`: a name on the hub, or a local folder or file."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedray.data.dataset import (
    Columns,
    Dataset,
    encode_labels,
    import_extra,
    make_dataset,
    split_columns,
    tidy_inputs,
)
from fedray.data.media import ImageMode, decode_audio, decode_images
from fedray.errors import DataError

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_SOUNDS = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".au"}
_LONG_TEXT = 256  # characters; a longer text is content, not something to partition by


def cifar10(path: str = "uoft-cs/cifar10", image_size: int | None = None) -> Dataset:
    """CIFAR-10, 50,000 + 10,000 colour 32×32 images of ten classes, from the hub or a local folder.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        path: name on the hub, or a folder with train.parquet and test.parquet.
        image_size: side in pixels to resize to; null leaves 32.
    """
    data = hub(path, image_size=image_size, image_mode="RGB")
    if data.num_classes != len(_CIFAR10):
        raise DataError(f"{path} is not CIFAR-10: it has {data.num_classes} classes; use data.name=hub for other data")
    return replace(data, name="cifar10", classes=_CIFAR10)


def hub(
    path: str,
    subset: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    x: str | None = None,
    label: str | None = None,
    columns: list[str] | None = None,
    image_size: int | None = None,
    image_mode: ImageMode = "auto",
    image_crop: int | None = None,
    sample_rate: int | None = None,
    seconds: float | None = None,
    test_fraction: float = 0.2,
    split_by: str | None = None,
    split_seed: int = 0,
) -> Dataset:
    """Any data set of Hugging Face's hub, or a local folder of parquet files, images or sounds (offline).

    Local folders are laid out as on the hub: train.parquet and test.parquet; CLASS/*.png or train/CLASS/*.png; the
    same with sounds. Inputs may be images, sounds, or lists of numbers of equal length.

    Args:
        path: name on the hub, or a local folder or parquet file.
        subset: name of the configuration on the hub, if there are several.
        train_split: split to train on.
        test_split: split to test on; null takes "test" if there is one, else cuts off part of the train split.
        x: column of the inputs; null takes the image or audio column, or else the only column of lists.
        label: column of the labels; null takes "label", or else the only column of classes.
        columns: further columns to keep, to partition by; null keeps whole numbers and short texts.
        image_size: side in pixels to which images are resized; needed if they differ in size.
        image_mode: L for grey, RGB for colour; auto is grey if all images are.
        image_crop: side in pixels of the square that is cut out of the middle of each image before it is resized.
        sample_rate: in hertz, to which sounds are resampled; needed if they differ.
        seconds: length to which sounds are cut or padded; needed if they differ.
        test_fraction: part of each class kept for testing, if there is no test split.
        split_by: column; examples with the same value all fall into train or all into test.
        split_seed: seed of the split into train and test.
    """
    for option, value in (
        *(("image_size", image_size), ("image_crop", image_crop)),
        *(("sample_rate", sample_rate), ("seconds", seconds)),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{option} is {value}; it must be > 0")
    with load(path, subset) as splits:
        if test_split is None and "test" in splits and train_split != "test":
            test_split = "test"
        wanted = {"train": train_split} if test_split is None else {"train": train_split, "test": test_split}
        for option, split in wanted.items():
            if split not in splits:
                raise DataError(f"{path} has no split {split!r} ({option}_split); it has {', '.join(sorted(splits))}")
        tables = {part: splits[split] for part, split in wanted.items()}
        features = tables["train"].features
        x_name, kind = _input_column(features, x, path)
        y_name = _label_column(features, label, path)
        inputs = _inputs(tables, x_name, kind, path, image_size, image_mode, image_crop, sample_rate, seconds)
        labels = {part: _column(table, y_name, path) for part, table in tables.items()}
        y, classes = encode_labels(labels, path, getattr(features[y_name], "names", None))
        further = _further(tables, columns, {x_name, y_name, "x", "y"}, path)
    parts: dict[str, Columns] = {part: {"x": inputs[part], "y": y[part], **further[part]} for part in tables}
    if "test" not in parts:
        parts["train"], parts["test"] = split_columns(parts["train"], test_fraction, split_seed, split_by, path)
    local = Path(path).expanduser()
    name = local.stem if local.is_file() else local.resolve().name
    return make_dataset(name, parts["train"], parts["test"], classes, per_channel=kind != "Audio")


@contextmanager
def load(path: str, subset: str | None = None) -> Iterator[Mapping[str, Any]]:
    """The splits by name. Local files are prepared in a temporary folder (their arrays are copied out of it), so that
    nothing is left behind and no outdated copy is found; what comes from the hub is kept in the hub's own cache."""
    datasets = import_extra("datasets", "hub", f"{path}: reading hub-style data")
    local = Path(path).expanduser()
    if not local.exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1 or local.suffix in _FORMATS):
        raise DataError(
            f"{path} does not exist; give a folder, a parquet file, or a name on the hub (task.data.path=...)"
        )
    if local.is_file() and local.suffix not in _FORMATS:
        raise DataError(f"{path} is a {local.suffix or 'nameless'} file; hub reads {', '.join(_FORMATS)}, or a folder")
    bars = datasets.is_progress_bar_enabled()
    with tempfile.TemporaryDirectory(prefix="fedray-", ignore_cleanup_errors=True) as cache:
        try:
            datasets.disable_progress_bars()
            if local.is_file():
                splits = datasets.load_dataset(
                    _FORMATS[local.suffix], data_files=str(local.absolute()), cache_dir=cache
                )
            elif local.is_dir():
                splits = _sound_folder(local) or datasets.load_dataset(str(local.absolute()), subset, cache_dir=cache)
            else:
                splits = datasets.load_dataset(path, subset)
        except Exception as error:  # whatever the library raises, the user needs the path and the library's words
            cause = error.__cause__ or error
            words = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
            if local.exists():
                raise DataError(f"{path} cannot be read as a data set ({words}); is it empty or corrupt?") from error
            raise DataError(
                f"{path} is no local folder or file, and the hub has no such data set or is unreachable or offline "
                f"({words}); give a local folder with task.data.path=FOLDER"
            ) from error
        finally:
            if bars:
                datasets.enable_progress_bars()
        yield splits


def _sound_folder(folder: Path) -> dict[str, Any] | None:
    """The splits in CLASS/* or SPLIT/CLASS/*, if they are of sounds, which the library needs torchcodec to list."""
    import datasets
    import pyarrow  # type: ignore[import-untyped]

    files = sorted(file.absolute() for file in folder.rglob("*") if file.suffix.lower() in _SOUNDS)
    depths = {len(file.relative_to(folder.absolute()).parts) for file in files}
    if depths not in ({2}, {3}):
        return None
    classes = sorted({file.parent.name for file in files})
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.ClassLabel(names=classes)})
    rows: dict[str, list[Path]] = {}
    for file in files:
        rows.setdefault(file.parent.parent.name if depths == {3} else "train", []).append(file)
    splits = {}
    for split, members in rows.items():
        cells = [{"bytes": None, "path": str(file)} for file in members]
        labels = [classes.index(file.parent.name) for file in members]
        table = pyarrow.Table.from_pydict({"audio": cells, "label": labels}, schema=features.arrow_schema)
        splits[split] = datasets.Dataset(table)
    return splits


def _input_column(features: Mapping[str, Any], name: str | None, path: str) -> tuple[str, str]:
    """The column of inputs, and "Image", "Audio" or "numbers"."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    if name is None:
        for wanted in ({"Image"}, {"Audio"}, {"List", "LargeList", "Sequence", "Array2D", "Array3D"}):
            if found := [column for column, kind in kinds.items() if kind in wanted]:
                if len(found) > 1:
                    raise DataError(
                        f"{path} has several columns for inputs: {', '.join(found)}; choose with task.data.x"
                    )
                name = found[0]
                break
        else:
            raise DataError(
                f"{path} has no column of images, sounds or lists among {', '.join(kinds)}; set task.data.x"
            )
    if name not in kinds:
        raise ValueError(f"x is {name!r}; {path} has the columns {', '.join(kinds)}")
    return name, kinds[name] if kinds[name] in ("Image", "Audio") else "numbers"


def _label_column(features: Mapping[str, Any], name: str | None, path: str) -> str:
    if name is None:
        found = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        if "label" in features:
            return "label"
        if len(found) != 1:
            problem = f"several columns of classes: {', '.join(found)}" if found else "no column of classes"
            raise DataError(f"{path} has {problem}; choose with task.data.label among {', '.join(features)}")
        return found[0]
    if name not in features:
        raise ValueError(f"label is {name!r}; {path} has the columns {', '.join(features)}")
    return name


def _inputs(
    tables: Mapping[str, Any],
    name: str,
    kind: str,
    path: str,
    image_size: int | None,
    image_mode: ImageMode,
    image_crop: int | None,
    sample_rate: int | None,
    seconds: float | None,
) -> dict[str, np.ndarray]:
    if kind == "numbers":
        rows = {part: table.with_format("numpy")[:][name] for part, table in tables.items()}
        if any(array.dtype == object for array in rows.values()):
            raise DataError(f"{path}: the lists in column {name!r} differ in length; fedray needs equal lengths")
        return {part: tidy_inputs(array, f"{path} ({part})") for part, array in rows.items()}

    def cells(
        table: Any,
    ) -> Any:  # as Arrow, the library decodes nothing; a thousand at a time, to copy no column whole
        batches = table.select_columns([name]).with_format("arrow").iter(batch_size=1000)
        return (cell for batch in batches for cell in batch[name].to_pylist())

    splits = {part: lambda table=table: cells(table) for part, table in tables.items()}
    if kind == "Image":
        return decode_images(splits, path, image_size, image_mode, image_crop)
    return decode_audio(splits, path, sample_rate, seconds)


def values(table: Any, name: str, path: str) -> list[Any]:
    """A column as a list; none of its values may be missing."""
    column = table.select_columns([name]).with_format("arrow")[:][name]
    if column.null_count:
        raise DataError(f"{path}: column {name!r} has {column.null_count} missing values (null)")
    return column.to_pylist()


def _column(table: Any, name: str, path: str) -> np.ndarray:
    """A column of whole numbers or texts as a numpy array."""
    cells = values(table, name, path)
    return np.array(cells) if cells else np.zeros(0, np.int64)


def _further(tables: Mapping[str, Any], wanted: list[str] | None, taken: set[str], path: str) -> dict[str, Columns]:
    """Columns to partition by: those wanted, or all of whole numbers and short texts that are complete."""
    features = tables["train"].features
    names = [n for n, f in features.items() if n not in taken and _partitions(f)] if wanted is None else wanted
    kept: dict[str, Columns] = {part: {} for part in tables}
    for name in names:
        if name not in features or name in taken:
            raise ValueError(f"columns names {name!r}; {path} has further {', '.join(set(features) - taken) or 'none'}")
        try:
            found = {part: _column(table, name, path) for part, table in tables.items()}
        except (DataError, KeyError):
            if wanted is not None:
                raise
            continue
        if wanted is None and any(c.dtype.kind == "U" and c.dtype.itemsize > 4 * _LONG_TEXT for c in found.values()):
            continue
        class_names = getattr(features[name], "names", None)
        for part, column in found.items():
            kept[part][name] = column if class_names is None else np.array(class_names)[column]
    return kept


def _partitions(feature: Any) -> bool:
    kind = str(getattr(feature, "dtype", ""))
    return kind.startswith(("int", "uint", "bool", "string", "large_string"))
