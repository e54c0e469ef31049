"""The cache of what was generated: a file a batch, named by everything that the batch depends on."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedray.data.dataset import import_extra
from fedray.errors import DataError
from fedray.synthesis.requests import Request

logger = logging.getLogger(__name__)

Sample = bytes | None  # an encoded picture (PNG) or sound (WAV); None if the generator withheld it


def key(settings: Mapping[str, Any], batch: Sequence[Request]) -> str:
    """The name of a batch: a hash of the generator's settings (its weights' hash among them) and of the requests."""
    asked = [{name: value for name, value in asdict(request).items() if name != "label"} for request in batch]
    if settings.get("sees") == "label":
        asked = [{**one, "label": request.label} for one, request in zip(asked, batch, strict=True)]
    return hashlib.sha256(json.dumps([settings, asked], sort_keys=True).encode()).hexdigest()[:40]


class Store:
    """Batches in a folder; files appear whole or not at all, so that several processes may share it.

    Args:
        folder: Made when the first batch is kept.
        media: ``image`` or ``audio``: what the samples are.
    """

    def __init__(self, folder: str | Path, media: str) -> None:
        self._folder, self._media = Path(folder).expanduser(), media
        import_extra("pyarrow.parquet", "synthesis", "keeping what was generated")

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def read(self, name: str) -> list[Sample] | None:
        """The samples of a batch; None if it is not there, or no longer whole."""
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]

        try:
            column = parquet.read_table(self._path(name), columns=[self._media])[self._media]
        except FileNotFoundError:
            return None
        except (OSError, pyarrow.ArrowException, KeyError) as error:
            logger.warning("%s is damaged (%s) and will be generated again", self._path(name), error)
            return None
        return [cell["bytes"] for cell in column.to_pylist()]

    def keep(self, name: str, batch: Sequence[Request], samples: Sequence[Sample]) -> None:
        """Keep a batch.

        Raises:
            DataError: the folder cannot be written to.
        """
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            half = path.with_name(f"{path.name}.{os.getpid()}")
            write_table(half, self._media, batch, samples)
            half.replace(path)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror or error}); choose another cache") from error

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.parquet"


def write_table(
    path: Path,
    media: str,
    batch: Sequence[Request],
    samples: Sequence[Sample],
    classes: Sequence[str] | None = None,
) -> None:
    """A parquet file of samples and what was asked for, laid out as the hub's (``data.name=hub`` reads it).

    Withheld samples are null; with ``classes``, labels are written too.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    columns: dict[str, Any] = {
        media: pyarrow.array(
            [{"bytes": sample, "path": None} for sample in samples],
            pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        )
    }
    features: dict[str, Any] = {media: {"_type": media.title()}}
    if classes is not None:
        columns["label"] = pyarrow.array([request.label for request in batch], pyarrow.int64())
        features["label"] = {"names": list(classes), "_type": "ClassLabel"}
    for name, kind in (("prompt", "string"), ("negative", "string"), ("seed", "int64"), ("guidance", "float64")):
        columns[name] = pyarrow.array([getattr(request, name) for request in batch], getattr(pyarrow, kind)())
        features[name] = {"dtype": kind, "_type": "Value"}
    about = json.dumps({"info": {"features": features}})
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": about})
    content = io.BytesIO()
    parquet.write_table(table, content)
    path.write_bytes(content.getvalue())
