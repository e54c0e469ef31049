"""Texts as sequences of tokens: tokenizers, what is kept for testing, and the cut into equal lengths."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedray.data.dataset import Columns, Dataset, import_extra

Texts = Mapping[str, Sequence[str]]  # of each client, in order
_END = 0  # the token that ends a text, where the tokenizer has none of its own


@dataclass(frozen=True)
class Reading:
    """How texts become sequences of tokens; the options that all text data share.

    Args:
        tokenizer: bytes (of UTF-8), characters, or a tokenizer of Hugging Face: a local folder or a name on the hub.
        length: Tokens that a model sees at once; a sequence has one more, the last to be predicted.
        test_by: What is kept for testing: the end of every client's text (position), or all of some clients' (client).
        test_fraction: Part of every client's tokens, or of the clients, that is kept for testing.
        split_seed: Seed of the choice of the clients that are tested on.
    """

    tokenizer: str = "bytes"
    length: int = 64
    test_by: Literal["position", "client"] = "position"
    test_fraction: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length is {self.length}; it must be >= 1")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}; it must be between 0 and 1, both excluded")


@dataclass(frozen=True)
class Tokenizer:
    """A text to token ids in 0..vocabulary-1; ``end`` is put after each text (None: nothing)."""

    encode: Callable[[str], Sequence[int] | np.ndarray]
    vocabulary: int
    end: int | None = _END


def text_dataset(name: str, texts: Texts, reading: Reading, tests: Texts | None = None) -> Dataset:
    """Sequences of ``length + 1`` tokens; ``y`` says whose they are, and ``classes`` bear the clients' names.

    A client's texts are joined, each with its end, and cut: a sequence begins with the last token of the one before,
    so that every token but a client's first is predicted once. What is left over at the end is dropped, and so are
    clients with less than one sequence. No sequence has tokens of two clients, or of both train and test.

    Args:
        name: what reports call it.
        texts: who wrote what.
        reading: how it is read.
        tests: texts for testing, by clients of any names; None keeps a part of ``texts`` as ``reading`` says.

    Raises:
        ValueError: there is no sequence to train on, or none to test on.
    """
    tokenizer = _tokenizer(reading.tokenizer, [*texts.values(), *(tests or {}).values()])
    train = {client: _stream(tokenizer, parts) for client, parts in texts.items()}
    if tests is not None:
        test = {client: _stream(tokenizer, parts) for client, parts in tests.items()}
    elif reading.test_by == "client":
        chosen = _test_clients(list(train), reading)
        test = {client: train.pop(client) for client in chosen}
    else:
        kept = {client: len(stream) - int(len(stream) * reading.test_fraction) for client, stream in train.items()}
        test = {client: stream[kept[client] :] for client, stream in train.items()}
        train = {client: stream[: kept[client]] for client, stream in train.items()}
    names = tuple(dict.fromkeys([*texts, *test]))
    columns = {"train": _sequences(train, names, reading), "test": _sequences(test, names, reading)}
    for split, streams in (("train", train), ("test", test)):
        if len(columns[split]["x"]) == 0:
            longest = max(map(len, streams.values()), default=0)
            raise ValueError(
                f"length is {reading.length}, but the longest text to {split} on in {name} has {longest} tokens, and a "
                "sequence needs one more than its length: give a smaller length"
                + (" or a larger test_fraction" if split == "test" and tests is None else "")
            )
    return Dataset(name, columns["train"], columns["test"], names, vocabulary=tokenizer.vocabulary)


def _test_clients(clients: list[str], reading: Reading) -> list[str]:
    if len(clients) < 2:
        raise ValueError("test_by is client, but there is only one client; use position")
    count = min(max(1, round(len(clients) * reading.test_fraction)), len(clients) - 1)
    chosen = np.random.default_rng(reading.split_seed).permutation(len(clients))[:count]
    return [clients[i] for i in sorted(chosen)]


def _stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All tokens of a client."""
    dtype = np.uint8 if tokenizer.vocabulary <= 1 << 8 else np.int16 if tokenizer.vocabulary <= 1 << 15 else np.int32
    end = [] if tokenizer.end is None else [tokenizer.end]
    parts = [np.asarray(part, dtype) for text in texts for part in (tokenizer.encode(text), end)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _sequences(streams: Mapping[str, np.ndarray], names: Sequence[str], reading: Reading) -> Columns:
    place = {name: i for i, name in enumerate(names)}
    width = reading.length + 1
    blocks = {
        client: np.lib.stride_tricks.sliding_window_view(stream, width)[:: reading.length]
        for client, stream in streams.items()
        if len(stream) >= width
    }
    owners = [np.full(len(block), place[client], np.int64) for client, block in blocks.items()]
    if not blocks:
        return {"x": np.zeros((0, width), np.int32), "y": np.zeros(0, np.int64)}
    return {"x": np.concatenate(list(blocks.values())), "y": np.concatenate(owners)}


def _tokenizer(name: str, texts: Sequence[Sequence[str]]) -> Tokenizer:
    if name == "bytes":
        return Tokenizer(lambda text: np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8), 256)
    if name == "characters":
        known = sorted(set().union(*(text for parts in texts for text in parts)))
        place = {character: i for i, character in enumerate(known, start=1)}
        return Tokenizer(lambda text: [place[character] for character in text], len(known) + 1)
    return _hugging_face(name)


def _hugging_face(name: str) -> Tokenizer:
    transformers = import_extra("transformers", "language", f"the tokenizer {name}")
    try:
        made = transformers.AutoTokenizer.from_pretrained(name, local_files_only=Path(name).expanduser().exists())
    except Exception as error:  # whatever the library raises, the user needs the name and the library's words
        words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(
            f"tokenizer is {name!r}, which is neither bytes nor characters, and cannot be loaded from a local folder "
            f"or the hub ({words})"
        ) from error
    ends = (made.eos_token_id, made.sep_token_id, made.bos_token_id)
    end = next((token for token in ends if token is not None), None)
    # verbose=False: a text longer than the model's context is no mistake, it is cut later
    return Tokenizer(lambda text: made(text, add_special_tokens=False, verbose=False)["input_ids"], len(made), end)
