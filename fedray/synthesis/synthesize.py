"""Synthesis: requests to samples, by a pool of generators and from the cache; and samples to training examples."""

import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedray.algorithm import Make, Metrics, Pool
from fedray.errors import DataError
from fedray.synthesis.generator import Generator
from fedray.synthesis.requests import Request, batches
from fedray.synthesis.store import Sample, Store, key

logger = logging.getLogger(__name__)

Stream = Callable[[Make, Sequence[Any], Pool | None], Iterator[tuple[int, Any]]]

_SAY_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Synthesis:
    """How synthetic data come to be.

    Args:
        generator: What generates.
        guidances: Scales of classifier-free guidance, one drawn for each sample (GPT-FL: 1 to 5); None for the
            generator's own.
        synthesis_seed: Seed of prompts, guidance and noise; the same for every run unless you change it, so that
            the runs of a study share one set.
        fit: How pictures come to the size of the data: resized, or cut out of their middle.
        sample_rate: In hertz, of the data's sounds; None if it is the generator's.
        cache: Folder of what was generated, for this run and others.
        actors: Actors that generate, beside the workers; None to let the workers do it.
        actor_cpus: CPUs that each of them reserves.
        actor_gpus: GPUs that each of them reserves, fractions allowed.
    """

    generator: Generator
    guidances: list[float] | None = None
    synthesis_seed: int = 0
    fit: Literal["resize", "crop"] = "resize"
    sample_rate: int | None = None
    cache: str = "~/.cache/fedray/synthesis"
    actors: int | None = None
    actor_cpus: float = 1.0
    actor_gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ValueError(f"actors is {self.actors}; it must be >= 1, or null for the workers")

    @property
    def pool(self) -> Pool | None:
        """Who generates; None for the workers."""
        return None if self.actors is None else Pool(self.actors, self.actor_cpus, self.actor_gpus)

    @property
    def store(self) -> Store:
        """The cache."""
        return Store(self.cache, self.generator.media)


@dataclass(frozen=True)
class Synthetic:
    """Samples with what was asked for, in that order.

    Attributes:
        requests: What was asked for.
        samples: Encoded pictures or sounds; None where the generator withheld one.
        metrics: How many there are, and how many were withheld.
    """

    requests: list[Request]
    samples: list[Sample]
    metrics: Metrics


def synthesize(synthesis: Synthesis, requests: Sequence[Request], stream: Stream) -> Synthetic:
    """Samples for all requests; what the cache has is not generated again.

    A batch is kept as soon as it is there, so whoever is interrupted goes on where it was. The set depends on the
    requests and the generator, not on the actors.
    """
    began, store, generator = time.perf_counter(), synthesis.store, synthesis.generator
    cut = list(batches(requests, generator.batch))
    names = [key(generator.settings, batch) for batch in cut]
    missing = [number for number, name in enumerate(names) if name not in store]
    generated, said = 0, began
    wanted = sum(len(cut[number]) for number in missing)
    coming = stream(generator.load, [cut[number] for number in missing], synthesis.pool) if missing else ()
    for place, samples in coming:
        number = missing[place]
        store.keep(names[number], cut[number], samples)
        generated += len(samples)
        now = time.perf_counter()
        if now - said > _SAY_EVERY:
            said, pace = now, generated / (now - began)
            left = (wanted - generated) / pace
            logger.info("synthesis: %d of %d samples, %.1f a second, %.0f s left", generated, wanted, pace, left)
    samples = []
    for name, batch in zip(names, cut, strict=True):
        found = store.read(name)
        if found is None or len(found) != len(batch):
            [(_, found)] = stream(generator.load, [batch], synthesis.pool)
            store.keep(name, batch, found)
            generated += len(found)
        samples += found
    withheld = sum(sample is None for sample in samples)
    if withheld:
        logger.warning("synthesis: the generator withheld %d of %d samples as unsafe", withheld, len(samples))
    seconds = time.perf_counter() - began
    logger.info("synthesis: %d samples, %d of them new, in %.1f s", len(samples), generated, seconds)
    metrics = {"synthetic_samples": float(len(samples) - withheld), "withheld": float(withheld)}
    return Synthetic([request for batch in cut for request in batch], samples, metrics)


def examples(synthetic: Synthetic, shape: Sequence[int], synthesis: Synthesis) -> dict[str, np.ndarray]:
    """The samples as training examples, ``x`` and ``y``, of the shape of the real ones.

    Args:
        synthetic: The samples.
        shape: (C, H, W) of pictures, which become uint8; (T,) of sounds, which become float32.
        synthesis: How they are made to fit.

    Raises:
        DataError: the data have another shape, or nothing is left.
    """
    kept = [(sample, request.label) for request, sample in zip(synthetic.requests, synthetic.samples, strict=True)]
    pairs = [(sample, label) for sample, label in kept if sample is not None]
    if not pairs:
        raise DataError("the generator withheld every sample; nothing is left to train on")
    media = synthesis.generator.media
    if len(shape) != (3 if media == "image" else 1):
        raise DataError(f"the generator makes {media}s, but an example has shape {tuple(shape)}; choose another one")
    if media == "image":
        x = np.stack([_picture(sample, shape, synthesis.fit) for sample, _ in pairs])
    else:
        x = np.stack([_sound(sample, shape[0], synthesis.sample_rate) for sample, _ in pairs])
    return {"x": x, "y": np.array([label for _, label in pairs], np.int64)}


def _picture(sample: bytes, shape: Sequence[int], fit: str) -> np.ndarray:
    from PIL import Image

    channels, height, width = shape
    image = Image.open(io.BytesIO(sample)).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        if fit == "resize":
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        else:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _sound(sample: bytes, length: int, rate: int | None) -> np.ndarray:
    from fedray.data.media import read_sound

    sound = np.zeros(length, np.float32)
    found = read_sound(sample, rate)[:length]
    sound[: len(found)] = found
    return sound
