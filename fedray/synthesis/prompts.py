"""Prompts: what a generator is asked for, for each class.

A writer is a function of the class names (GPT-FL, Zhang et al., 2023, step 1): the server knows nothing else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedray.errors import ConfigError, DataError
from fedray.seeds import seed_for
from fedray.synthesis.fingerprints import fingerprint


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and what is not wanted."""

    text: str
    negative: str = ""


PromptWriter = Callable[[Sequence[str]], list[list[Prompt]]]  # of class names: the prompts of each

Style = Literal["real", "sketch", "quickdraw", "painting", "infograph", "clipart"]
STYLES: dict[str, Prompt] = {  # FGL's prompts for DomainNet's six domains (Zhang et al., 2023, released code)
    "real": Prompt(
        "{}, real world images, high resolution, only one object in the picture", "low quality, low resolution"
    ),
    "sketch": Prompt("{}, Sketch drawing with only one object in the picture", "low quality, low resolution"),
    "quickdraw": Prompt("a black and white drawing of {}", "colorful, painting"),
    "painting": Prompt(
        "{}, painting with only one object in the picture, high resolution", "low quality, low resolution"
    ),
    "infograph": Prompt(
        "{}, infograph images with only one object in the picture, including text descriptions of the object's "
        "components.",
        "low quality, low resolution",
    ),
    "clipart": Prompt("{}, clippart, cartoon style, single object.", "low quality, low resolution"),
}


def template(
    classes: Sequence[str],
    /,
    templates: list[str] | None = None,
    names: list[str] | None = None,
    negative: str = "",
) -> list[list[Prompt]]:
    """Fixed sentences with the name of the class in them.

    Args:
        classes: The class names.
        templates: Sentences with {} for the name; None for "a photo of a {}".
        names: What prompts call the classes, in their order; None for the class names.
        negative: What no picture should be.
    """
    sentences = ["a photo of a {}"] if templates is None else templates
    for sentence in sentences:
        if "{}" not in sentence:
            raise ValueError(f"templates has {sentence!r}, which has no {{}} for the name of the class")
    if names is not None and len(names) != len(classes):
        raise ValueError(f"names has {len(names)} entries, but there are {len(classes)} classes: {', '.join(classes)}")
    return [[Prompt(sentence.replace("{}", name), negative) for sentence in sentences] for name in names or classes]


def styled(classes: Sequence[str], /, styles: list[Style]) -> list[list[Prompt]]:
    """Every class in several styles: those that FGL has for the domains of DomainNet.

    Args:
        classes: The class names.
        styles: Which styles.
    """
    chosen = [STYLES[style] for style in styles]
    return [[Prompt(style.text.replace("{}", name), style.negative) for style in chosen] for name in classes]


def listed(classes: Sequence[str], /, path: str, negative: str = "") -> list[list[Prompt]]:
    """Prompts from a JSON file, ``{class: [prompt, ...]}``, such as GPT-FL's 200 a class.

    Args:
        classes: The class names.
        path: The file.
        negative: What no picture should be.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text())
        prompts = [[Prompt(str(text), negative) for text in found[name]] for name in classes]
    except KeyError as error:
        raise DataError(f"{path} has no prompts for the class {error.args[0]!r}; it has {', '.join(found)}") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as {{class: [prompt, ...]}} in JSON ({error})") from error
    empty = [name for name, texts in zip(classes, prompts, strict=True) if not texts]
    if empty:
        raise DataError(f"{path} has an empty list for {', '.join(empty)}; give at least one prompt a class")
    return prompts


def expanded(
    classes: Sequence[str],
    /,
    path: str,
    count: int = 200,
    instruction: str = "{}",
    max_tokens: int = 40,
    temperature: float = 1.0,
    negative: str = "",
    seed: int = 0,
    cache: str = "~/.cache/fedray/prompts",
) -> list[list[Prompt]]:
    """Class names expanded to sentences by a language model (GPT-FL's T5 fine-tuned on CommonGen, or any chat model).

    As in the released code, sentences are sampled, doubles are dropped, and nothing checks that a sentence is about its
    class: the share that names it is reported (``prompt_hits``).

    Args:
        classes: The class names.
        path: A text-generation or text-to-text model of transformers: hub id or local folder.
        count: Sentences a class; fewer if the model repeats itself.
        instruction: What the model is given, with {} for the name of the class.
        max_tokens: Length of a sentence.
        temperature: Of the sampling.
        negative: What no picture should be.
        seed: Seed of the sampling.
        cache: Folder of what was written, for this run and others.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be >= 1")
    local = Path(path).expanduser().is_dir()
    asked = [list(classes), fingerprint(path) if local else path, count, instruction, max_tokens, temperature, seed]
    file = Path(cache).expanduser() / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:40]}.json"
    if not file.is_file():
        texts = _expand(classes, _writer(path, max_tokens, temperature), count, instruction, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(texts))
        half.replace(file)
    return [[Prompt(text, negative) for text in sentences] for sentences in json.loads(file.read_text())]


def _expand(
    classes: Sequence[str], write: Callable[[str, int, int], list[str]], count: int, instruction: str, seed: int
) -> list[list[str]]:
    books = []
    for name in classes:
        sentences: dict[str, None] = {}
        for attempt in range(4):  # a model that repeats itself is asked a few times, not for ever
            more = write(instruction.replace("{}", name), count + 50, seed_for(seed, "expand", name, attempt))
            sentences |= dict.fromkeys(text for text in more if text)
            if len(sentences) >= count:
                break
        books.append(list(sentences)[:count] or [name])
    return books


def _writer(path: str, max_tokens: int, temperature: float) -> Callable[[str, int, int], list[str]]:
    try:
        import torch
        import transformers
    except ImportError:
        hint = "pip install 'fedray[synthesis]'"
        raise ConfigError(f"expanding prompts needs the package transformers: {hint}") from None
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        config = transformers.AutoConfig.from_pretrained(path)
        kind: Any = (
            transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be loaded as a language model: {' '.join(str(error).split())}") from error
    from fedray.hardware import device_of

    device = device_of("auto")
    model.to(device)
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def write(text: str, count: int, seed: int) -> list[str]:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        given = tokenizer(text, return_tensors="pt").to(device)
        found = []
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, count, 50):
                out = model.generate(
                    **given,
                    do_sample=True,
                    temperature=temperature,
                    max_new_tokens=max_tokens,
                    num_return_sequences=min(50, count - start),
                    pad_token_id=filler,
                )
                new = out if config.is_encoder_decoder else out[:, given.input_ids.shape[1] :]
                found += tokenizer.batch_decode(new, skip_special_tokens=True)
        return [" ".join(sentence.split()) for sentence in found]

    return write


def hit_rate(book: Sequence[Sequence[Prompt]], classes: Sequence[str]) -> float:
    """The share of prompts that name their class, in any case; the mean over classes.

    >>> hit_rate([[Prompt("a Dog runs"), Prompt("a cat")]], ["dog"])
    0.5
    """
    shares = [
        sum(name.lower() in prompt.text.lower() for prompt in prompts) / len(prompts)
        for name, prompts in zip(classes, book, strict=True)
    ]
    return sum(shares) / len(shares)


PROMPTS: dict[str, Callable[..., Any]] = {
    "template": template,
    "styled": styled,
    "listed": listed,
    "expanded": expanded,
}
