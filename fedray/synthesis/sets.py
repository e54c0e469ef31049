"""Generated sets, read back: labelled samples in the shape of the real data that they stand for."""

from typing import Literal

import numpy as np

from fedray.data import Dataset
from fedray.data.dataset import Columns
from fedray.data.hub import hub
from fedray.errors import DataError

Fit = Literal["resize", "crop"]


def read_set(path: str, data: Dataset, fit: Fit = "resize", sample_rate: int | None = None) -> Columns:
    """``x`` and ``y`` of all samples of a set, in its order, with shape and class numbers of a dataset.

    Args:
        path: What `fedray generate` wrote, or any labelled pictures or sounds that ``data.name=hub`` reads.
        data: The real data.
        fit: How pictures come to the size of the data: resized, or cut out of their middle.
        sample_rate: In hertz, of the data's sounds.

    Raises:
        DataError: the samples cannot be read, are of another kind, or have classes that the data have not.
    """
    rank = data.train["x"].ndim - 1
    if rank == 3:
        side = data.input_shape[1] if fit == "resize" and data.input_shape[1] == data.input_shape[2] else None
        made = hub(path, test_split="train", image_size=side, image_mode="L" if data.input_shape[0] == 1 else "RGB")
    elif rank == 1 and sample_rate is not None:
        made = hub(path, test_split="train", sample_rate=sample_rate, seconds=data.input_shape[0] / sample_rate)
    else:
        raise DataError(
            f"{data.name} has examples of shape {data.input_shape}; a set has pictures, or sounds, which need the "
            "sample_rate of the data"
        )
    x, y = made.train["x"], made.train["y"]  # nothing is kept for testing: what is measured is the whole set
    if fit == "crop" and x.ndim == 4:
        _, height, width = data.input_shape
        top, left = max(0, (x.shape[2] - height) // 2), max(0, (x.shape[3] - width) // 2)
        x = x[:, :, top : top + height, left : left + width]
    if x.shape[1:] != data.input_shape or x.dtype != data.train["x"].dtype:
        raise DataError(
            f"{path} has {x.dtype} samples of shape {x.shape[1:]}, but {data.name} has {data.train['x'].dtype} "
            f"of shape {data.input_shape}"
        )
    place = {name: label for label, name in enumerate(data.classes)}
    unknown = [name for label, name in enumerate(made.classes) if name not in place and (y == label).any()]
    if unknown:
        raise DataError(f"{path} has the classes {', '.join(unknown[:5])}; {data.name} has {', '.join(data.classes)}")
    numbers = np.array([place.get(name, -1) for name in made.classes])
    return {"x": np.ascontiguousarray(x), "y": numbers[y]}
