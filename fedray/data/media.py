"""Encoded images and sounds, decoded into one array per split."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedray.data.dataset import import_extra
from fedray.errors import DataError

# The cells of a column, as often as they are asked for: {"bytes": bytes | None, "path": str | None}, as the hub's
# image and audio columns are (a cell without bytes is a file).
Cells = Callable[[], Iterable[Mapping[str, Any]]]
ImageMode = Literal["auto", "RGB", "L"]

_GREY = {"1", "L", "LA"}
_COLOUR = {"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}


def decode_images(
    splits: Mapping[str, Cells], where: str, size: int | None, mode: ImageMode, crop: int | None = None
) -> dict[str, np.ndarray]:
    """Images as uint8 N×C×H×W per split, of one size and one number of channels throughout.

    Args:
        splits: the cells of each split.
        where: what messages call the data.
        size: side of the square to which each image is resized (bilinear, whatever its aspect); None: leave them.
        mode: "L" grey, "RGB" colour; "auto": grey if all are.
        crop: side of the square that is cut out of the middle of each image before that; None: the whole image.

    Raises:
        DataError: if an image cannot be read, or the sizes differ and ``size`` is None.
    """
    import_extra("PIL.Image", "hub", f"{where}: decoding images")
    images: dict[str, list[np.ndarray]] = {split: [] for split in splits}
    common: tuple[int, ...] | None = None
    for split, cells in splits.items():
        for i, cell in enumerate(cells()):
            name = f"{where} ({split}), image {i}"
            image = _decode_image(cell, name, size, mode, crop)
            common = common or image.shape[1:]
            if image.shape[1:] != common:
                (h, w), (h0, w0) = image.shape[1:], common
                raise DataError(f"{name} is {w}×{h}, others are {w0}×{h0}; give task.data.image_size=PIXELS")
            images[split].append(image)
    channels = max((len(image) for list_ in images.values() for image in list_), default=1)
    height, width = common or (1, 1)
    stacked = {}
    for split, list_ in images.items():
        stacked[split] = np.empty((len(list_), channels, height, width), np.uint8)
        for i in reversed(
            range(len(list_))
        ):  # each is freed as it is copied, so that the peak is one data set, not two
            stacked[split][i] = list_.pop()  # grey spreads over three channels
    return stacked


def decode_audio(
    splits: Mapping[str, Cells], where: str, sample_rate: int | None, seconds: float | None
) -> dict[str, np.ndarray]:
    """Sounds as float32 N×T per split: mono in [-1, 1], one sampling rate, one length.

    Args:
        splits: the cells of each split.
        where: what messages call the data.
        sample_rate: in hertz; clips of another rate are resampled. None: all must have the same.
        seconds: clips are cut or padded with silence at the end. None: all must have the same length.

    Raises:
        DataError: if a clip cannot be read, or rates or lengths differ and are not given.
    """
    soundfile = import_extra("soundfile", "hub", f"{where}: decoding audio")
    clips: dict[str, list[np.ndarray]] = {split: [] for split in splits}
    rates: set[int] = set()
    for split, cells in splits.items():
        for i, cell in enumerate(cells()):
            name = f"{where} ({split}), clip {i}"
            try:
                wave, rate = soundfile.read(io.BytesIO(_bytes(cell, name)), dtype="float32", always_2d=True)
            except (RuntimeError, TypeError) as error:
                raise DataError(f"{name}{_file(cell)} cannot be decoded: {error}") from error
            rates.add(rate)
            clips[split].append(_resample(wave.mean(axis=1), rate, sample_rate or rate))
    if sample_rate is None and len(rates) > 1:
        raise DataError(f"{where} has clips of {sorted(rates)} Hz; give task.data.sample_rate=HERTZ")
    lengths = {len(clip) for split in clips.values() for clip in split}
    rate = sample_rate or next(iter(rates), 1)
    if seconds is None and len(lengths) > 1:
        shortest, longest = min(lengths) / rate, max(lengths) / rate
        raise DataError(
            f"{where} has clips of {shortest:.2f} to {longest:.2f} seconds; give task.data.seconds=LENGTH to cut or pad"
        )
    length = next(iter(lengths), 1) if seconds is None else round(seconds * rate)
    waves = {split: np.zeros((len(list_), length), np.float32) for split, list_ in clips.items()}
    for split, list_ in clips.items():
        for row, clip in zip(waves[split], list_, strict=True):
            row[: len(clip)] = clip[:length]
    return waves


def read_sound(content: bytes, rate: int | None = None) -> np.ndarray:
    """An encoded sound as float32 of shape (T,): mono in [-1, 1], resampled to ``rate`` if that is given."""
    soundfile = import_extra("soundfile", "hub", "decoding audio")
    wave, own = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return _resample(wave.mean(axis=1), own, rate or own)


def _bytes(cell: Mapping[str, Any] | None, name: str) -> bytes:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise DataError(f"{name} is missing (null)")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: {cell['path']} cannot be read: {error.strerror or error}") from error


def _file(cell: Mapping[str, Any]) -> str:
    return f" ({cell['path']})" if cell["path"] else ""


def _decode_image(
    cell: Mapping[str, Any], name: str, size: int | None, mode: ImageMode, crop: int | None
) -> np.ndarray:
    """One image as uint8 C×H×W, upright; in mode "auto" C is 1 if it is grey, else 3."""
    from PIL import Image, ImageOps

    content = io.BytesIO(_bytes(cell, name))
    try:
        image: Image.Image = Image.open(content)
        if image.mode not in _GREY | _COLOUR:
            raise ValueError(f"mode {image.mode}; convert it to 8 bits per channel")
        if image.getexif():
            image = ImageOps.exif_transpose(image)
        wanted = mode if mode != "auto" else "L" if image.mode in _GREY else "RGB"
        image = image if image.mode == wanted else image.convert(wanted)
        if crop is not None:
            left, top = ((side - crop) // 2 for side in image.size)
            image = image.crop((left, top, left + crop, top + crop))
        image = image if size is None else image.resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}{_file(cell)} cannot be decoded: {error}") from error
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))


def _resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return wave
    from scipy.signal import resample_poly  # type: ignore[import-untyped]

    divisor = int(np.gcd(rate, wanted))
    return resample_poly(wave, wanted // divisor, rate // divisor).astype(np.float32)
