"""What is measured on pictures: adjectives for them, and the domains that these part a dataset into."""

from dataclasses import replace

import numpy as np

from fedray.data.dataset import Columns, Dataset

_DARK, _BRIGHT = 0.35, 0.65  # mean luminance of what is not black
_COLOURED = 0.08  # mean distance of the channels from their mean
_HUES = {"red": (1, 0, 0), "yellow": (1, 1, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "purple": (1, 0, 1)}


def describe(image: np.ndarray) -> list[str]:
    """Adjectives that hold for an image, measured on its pixels: how bright it is, and of which colour.

    Args:
        image: uint8 of shape (C, H, W), with one channel or three.

    >>> describe(np.full((1, 4, 4), 250, np.uint8)), describe(np.zeros((3, 4, 4), np.uint8))
    (['bright'], ['dark'])
    """
    pixels = image.reshape(len(image), -1).astype(np.float64) / 255
    seen = pixels[:, pixels.max(0) > 0.05]  # a black background says nothing about an object
    if seen.shape[1] == 0:
        return ["dark"]
    mean = seen.mean(1)
    luminance = mean.mean()
    words = ["dark" if luminance < _DARK else "bright" if luminance > _BRIGHT else "grey" if len(mean) == 1 else "soft"]
    tint = mean - luminance
    if np.abs(tint).mean() > _COLOURED:
        tints = {name: np.array(hue) - np.mean(hue) for name, hue in _HUES.items()}
        words.append(max(tints, key=lambda name: float(tint @ tints[name] / np.linalg.norm(tints[name]))))
    return words


def described(of: Dataset) -> Dataset:
    """Pictures with a further column ``domain``: how bright each is, as a prompt can say it.

    That is dark, grey or bright, of colour pictures dark, soft or bright: domains that are in the pictures themselves.

    Args:
        of: The pictures.
    """
    if of.train["x"].dtype != np.uint8 or of.train["x"].ndim != 4:
        raise ValueError(f"of is {of.name}, which has no pictures; their brightness is what is measured")

    def told(columns: Columns) -> Columns:
        return {**columns, "domain": np.array([describe(image)[0] for image in columns["x"]])}

    return replace(of, train=told(of.train), test=told(of.test))
