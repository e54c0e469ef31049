"""Synthetic data on their own: ``fedray generate`` for Python and the shell."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray import backends, config
from fedray.backends import Launcher
from fedray.data import Dataset
from fedray.errors import ConfigError
from fedray.options import options_of
from fedray.synthesis.prompts import PromptWriter, hit_rate, template
from fedray.synthesis.requests import of_classes
from fedray.synthesis.store import write_table
from fedray.synthesis.synthesize import Synthesis, Synthetic, synthesize

_SHARD = 2000  # samples of a file
_SHOWN = 10  # samples of each class on the sheet


@dataclass(frozen=True)
class Generation:
    """What is generated, of which classes, and where."""

    synthesis: Synthesis
    classes: tuple[str, ...]
    prompts: PromptWriter
    per_class: int
    launcher: Launcher


def generation(
    *,
    synthesis: Synthesis,
    data: Dataset | None = None,
    classes: list[str] | None = None,
    prompts: PromptWriter = template,
    volume: float = 1.0,
    per_class: int | None = None,
    backend: Launcher = backends.on_ray(),
) -> Generation:
    """The configuration of ``fedray generate``.

    Args:
        synthesis: How synthetic data come to be.
        data: A dataset, for its class names and its size.
        classes: Class names, instead of a dataset.
        prompts: What the generator is asked for, for each class.
        volume: Samples for each training example of the dataset, all classes alike.
        per_class: Samples of each class, instead of ``volume``.
        backend: Where the generators run.
    """
    if (data is None) == (classes is None):
        raise ValueError("give either data or classes, to say what is to be generated")
    names = tuple(classes) if data is None else data.classes  # type: ignore[arg-type]
    if per_class is None:
        if data is None:
            raise ValueError("per_class is missing; without data there is no size that volume could be a part of")
        per_class = round(volume * len(data.train["y"]) / len(names))
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; it must be >= 1")
    return Generation(synthesis, names, prompts, per_class, backend)


def generate(values: Mapping[str, Any], out: str | Path) -> tuple[Synthetic, float]:
    """Generate what a configuration says into a folder, and draw a sheet of samples.

    Args:
        values: A configuration of `generation`, or of an experiment whose algorithm is GPT-FL.
        out: The folder: parquet files (``data.name=hub data.path=FOLDER`` reads them), ``sheet.html``, ``about.json``.

    Returns:
        The samples, and the share of prompts that name their class.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another --out")
    made: Generation = config.call(generation, _own(values))
    book = made.prompts(made.classes)
    synthesis = made.synthesis
    counts = [made.per_class] * len(made.classes)
    requests = of_classes(book, counts, synthesis.synthesis_seed, synthesis.guidances or ())
    synthetic = synthesize(synthesis, requests, made.launcher.stream)
    out.mkdir(parents=True, exist_ok=True)
    _write(synthetic, made, out)
    hits = hit_rate(book, made.classes)
    about = {"generator": synthesis.generator.settings, "classes": made.classes, "prompt_hits": hits}
    (out / "about.json").write_text(json.dumps({**about, **synthetic.metrics}, indent=2) + "\n")
    (out / "sheet.html").write_text(sheet(synthetic, made.classes, synthesis.generator.media))
    return synthetic, hits


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an experiment's configuration that is about generation; any other configuration as it is."""
    if "algorithm" not in values:
        return dict(values)
    algorithm = values["algorithm"]
    if not isinstance(algorithm, Mapping) or algorithm.get("name") != "gpt_fl":
        raise ConfigError(
            "this experiment's algorithm is not gpt_fl, whose prompts follow from class names; "
            "give generate a configuration of its own (generator, classes, prompts, per_class)"
        )
    own = {name: value for name, value in algorithm.items() if name in options_of(generation)}
    further = {"backend": values["backend"]} if "backend" in values else {}
    return {**own, **further, "data": values["task"]["data"]}


def _write(synthetic: Synthetic, made: Generation, out: Path) -> None:
    pairs = [pair for pair in zip(synthetic.requests, synthetic.samples, strict=True) if pair[1] is not None]
    count = max(1, -(-len(pairs) // _SHARD))
    for shard in range(count):
        requests, samples = zip(*pairs[shard * _SHARD : (shard + 1) * _SHARD], strict=True)
        path = out / f"train-{shard:05d}-of-{count:05d}.parquet"
        write_table(path, made.synthesis.generator.media, requests, samples, made.classes)


def sheet(synthetic: Synthetic, classes: Sequence[str], media: str) -> str:
    """A page of the first samples of each class, self-contained; each says its prompt when it is pointed at."""
    rows = []
    for label, name in enumerate(classes):
        shown = [
            (request, sample)
            for request, sample in zip(synthetic.requests, synthetic.samples, strict=True)
            if request.label == label and sample is not None
        ][:_SHOWN]
        cells = "".join(_cell(sample, request.prompt, media) for request, sample in shown)
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    style = "img{width:64px;image-rendering:pixelated}th{text-align:right;font:14px sans-serif;padding:4px}"
    return f"<!doctype html><meta charset=utf-8><style>{style}</style><table>{''.join(rows)}</table>\n"


def _cell(sample: bytes, prompt: str, media: str) -> str:
    text, title = base64.b64encode(sample).decode(), html.escape(prompt, quote=True)
    if media == "audio":
        return f'<td title="{title}"><audio controls src="data:audio/wav;base64,{text}"></audio></td>'
    return f'<td><img alt="{title}" title="{title}" src="data:image/png;base64,{text}"></td>'
