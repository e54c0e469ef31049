"""What a generator is: requests in, encoded samples out; one shape for pictures and sounds."""

import io
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedray.synthesis.requests import Request
from fedray.synthesis.store import Sample

Generate = Callable[[Sequence[Request]], list[Sample]]


@dataclass(frozen=True)
class Generator:
    """A generator that is not loaded yet.

    Attributes:
        settings: Everything that its samples depend on beside the requests, as JSON values; the cache is keyed by them.
        load: A device to the generator proper, which takes up to ``batch`` requests at a time.
        batch: Requests of a call. Larger ones are faster on a GPU; rounding may depend on it.
        media: What it makes.
    """

    settings: dict[str, Any]
    load: Callable[[str], Generate]
    batch: int
    media: Literal["image", "audio"] = "image"


def png(image: np.ndarray) -> bytes:
    """A picture of shape (H, W, C), values 0..1, as PNG."""
    from PIL import Image

    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(content, "PNG")
    return content.getvalue()


def wav(sound: np.ndarray, rate: int) -> bytes:
    """A sound, values -1..1, as 16-bit WAV."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return content.getvalue()
