"""What a client says about its examples: the prompts that FGL's clients send (Zhang, Qi and Zhao, 2023)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedray.data.dataset import Dataset
from fedray.data.domains import describe
from fedray.errors import ConfigError, DataError
from fedray.synthesis.prompts import STYLES

Captioner = Callable[[Dataset, np.ndarray], list[str]]  # of a dataset and rows of its training examples: one for each
ClientPrompts = Callable[[Dataset, np.ndarray], list[tuple[str, int]]]  # likewise: prompts, each with its label


def measured(data: Dataset, rows: np.ndarray, /) -> list[str]:
    """Adjectives measured on the pixels (brightness, colour): for where no captioning model is at hand.

    Args:
        data: The dataset.
        rows: Which training examples.
    """
    if data.train["x"].dtype != np.uint8:
        raise ConfigError(f"measured describes images; {data.name} has none: use the captioner column")
    return [" ".join(describe(image)) for image in data.train["x"][rows]]


def column(data: Dataset, rows: np.ndarray, /, column: str) -> list[str]:
    """The dataset's own captions.

    Args:
        data: The dataset.
        rows: Which training examples.
        column: Where they stand.
    """
    if column not in data.train:
        raise ConfigError(f"column is {column!r}; {data.name} has the columns {', '.join(sorted(data.train))}")
    return [str(value) for value in data.train[column][rows]]


def captioning(data: Dataset, rows: np.ndarray, /, path: str, max_tokens: int = 20, batch_size: int = 32) -> list[str]:
    """Captions by an image-to-text model of transformers, such as BLIP or BLIP-2 (FGL uses Salesforce/blip2-opt-2.7b).

    Args:
        data: The dataset.
        rows: Which training examples.
        path: Hub id or local folder.
        max_tokens: Length of a caption.
        batch_size: Images of a call.
    """
    try:
        import torch
        import transformers
        from PIL import Image
    except ImportError:
        hint = "pip install 'fedray[synthesis]'"
        raise ConfigError(f"captioning needs the packages transformers and pillow: {hint}") from None
    try:
        processor: Any = transformers.AutoProcessor.from_pretrained(path)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be loaded as a captioning model: {' '.join(str(error).split())}") from error
    from fedray.hardware import device_of

    device = device_of("auto")
    model.to(device)
    captions: list[str] = []
    for start in range(0, len(rows), batch_size):
        pixels = data.train["x"][rows[start : start + batch_size]]
        grey = pixels.shape[1] == 1
        images = [Image.fromarray(image[0] if grey else np.moveaxis(image, 0, -1)).convert("RGB") for image in pixels]
        with torch.no_grad():
            out = model.generate(**processor(images=images, return_tensors="pt").to(device), max_new_tokens=max_tokens)
        captions += [" ".join(text.split()) for text in processor.batch_decode(out, skip_special_tokens=True)]
    return captions


def class_level(
    data: Dataset, rows: np.ndarray, /, template: str = "A photo of {}", by: str | None = None
) -> list[tuple[str, int]]:
    """One prompt for each class that a client has (with ``by``, for each class and value of a column).

    Args:
        data: The dataset.
        rows: The client's examples.
        template: A sentence with {} for the class; with ``by``, also with {by} for the value.
        by: A column, such as the domain.
    """
    if "{}" not in template or (by is not None and "{by}" not in template):
        raise ConfigError(f"template is {template!r}; it must have {{}}{' and {by}' if by else ''} in it")
    return _said(data, rows, by, lambda value: template.replace("{by}", value))


def domain_level(
    data: Dataset, rows: np.ndarray, /, template: str = "a {by} picture of {}", by: str = "domain"
) -> list[tuple[str, int]]:
    """One prompt for each class and domain that a client has, in FGL's own words for the six domains of DomainNet.

    Args:
        data: The dataset.
        rows: The client's examples.
        template: A sentence with {} for the class and {by} for the domain, for other domains than those six.
        by: The column of the domains.
    """
    if "{}" not in template or "{by}" not in template:
        raise ConfigError(f"template is {template!r}; it must have {{}} and {{by}} in it")
    styles = {name: style.text for name, style in STYLES.items()}
    return _said(data, rows, by, lambda value: styles.get(value, template.replace("{by}", value)))


def _said(data: Dataset, rows: np.ndarray, by: str | None, sentence: Callable[[str], str]) -> list[tuple[str, int]]:
    """A sentence for each class, and value of a column, that there is; each with its label."""
    if by is not None and by not in data.train:
        raise ConfigError(f"by is {by!r}; {data.name} has the columns {', '.join(sorted(data.train))}")
    labels = data.train["y"][rows].tolist()
    values = [""] * len(labels) if by is None else [str(value) for value in data.train[by][rows]]
    return [
        (sentence(value).replace("{}", data.classes[label]), label)
        for label, value in sorted(set(zip(labels, values, strict=True)))
    ]


def instance_level(
    data: Dataset, rows: np.ndarray, /, captioner: Captioner = measured, template: str = "{}, {caption}"
) -> list[tuple[str, int]]:
    """One prompt for each example: its class and its caption.

    FGL's template is "{}, {caption}, real world images, high resolution." with captions by BLIP-2.

    Args:
        data: The dataset.
        rows: The client's examples.
        captioner: Who describes an example.
        template: A sentence with {} for the class and {caption}.
    """
    if "{}" not in template or "{caption}" not in template:
        raise ConfigError(f"template is {template!r}; it must have {{}} and {{caption}} in it")
    labels = data.train["y"][rows].tolist()
    return [
        (template.replace("{caption}", caption).replace("{}", data.classes[label]), label)
        for label, caption in zip(labels, captioner(data, rows), strict=True)
    ]


CAPTIONERS: dict[str, Callable[..., Any]] = {"measured": measured, "column": column, "captioning": captioning}
CLIENT_PROMPTS: dict[str, Callable[..., Any]] = {
    "class_level": class_level,
    "domain_level": domain_level,
    "instance_level": instance_level,
}
