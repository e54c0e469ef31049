"""What a generator is asked for, sample by sample: a request says everything that a sample depends on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from fedray.seeds import seed_for
from fedray.synthesis.prompts import Prompt


@dataclass(frozen=True)
class Request:
    """One sample that is wanted.

    Attributes:
        prompt: The text.
        negative: What is not wanted.
        label: The class that it will stand for; the generator does not see it, unless it knows nothing but classes.
        seed: Of the sample's noise.
        guidance: Scale of classifier-free guidance; None for the generator's own.
    """

    prompt: str
    negative: str
    label: int
    seed: int
    guidance: float | None = None


def of_classes(
    book: Sequence[Sequence[Prompt]], counts: Sequence[int], seed: int, guidance: Sequence[float] = ()
) -> list[Request]:
    """So many samples of each class, each with a prompt of its class (and a guidance) drawn at random.

    The first n samples of a class are the same whatever the count, so a larger set contains a smaller one.
    """
    requests = []
    for label, (prompts, count) in enumerate(zip(book, counts, strict=True)):
        for number in range(count):
            draw = np.random.default_rng(seed_for(seed, "prompt", label, number))
            prompt = prompts[int(draw.integers(len(prompts)))]
            scale = float(guidance[int(draw.integers(len(guidance)))]) if guidance else None
            noise = seed_for(seed, "sample", label, number)
            requests.append(Request(prompt.text, prompt.negative, label, noise, scale))
    return requests


def of_prompts(
    prompts: Sequence[tuple[str, int]], each: int, seed: int, negative: str = "", guidance: Sequence[float] = ()
) -> list[Request]:
    """So many samples of each prompt with its label; whose prompt it was makes no difference.

    A prompt that stands there twice gives twice as many, all different.
    """
    requests, seen = [], dict[tuple[str, int], int]()
    for text, label in sorted(prompts, key=lambda prompt: (prompt[1], prompt[0])):
        for _ in range(each):
            number = seen[text, label] = seen.get((text, label), -1) + 1
            draw = np.random.default_rng(seed_for(seed, "guidance", text, label, number))
            scale = float(guidance[int(draw.integers(len(guidance)))]) if guidance else None
            requests.append(Request(text, negative, label, seed_for(seed, "sample", text, label, number), scale))
    return requests


def batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """The requests in batches of one class each: they depend on the requests, and not on who makes them."""
    for _, alike in groupby(requests, key=lambda request: request.label):
        members = list(alike)
        for start in range(0, len(members), size):
            yield members[start : start + size]
