"""The report: one HTML page that needs nothing but itself, for one run or for several beside each other."""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedray.clock import PHASES
from fedray.errors import DataError
from fedray.report import figures
from fedray.report.compare import (
    AXES,
    Curve,
    Group,
    best_accuracy,
    best_distance,
    curve,
    default_targets,
    difference_rows,
    final_number,
    group_by_seed,
    quantity,
    summary_rows,
    target_rows,
    total_seconds,
)
from fedray.report.markup import legend, page, section, table, text
from fedray.report.read import RunRecord, flat, read_run, scalars

_MAX_MULTIPLES = 36  # small pictures of what the algorithm reported
_MAX_SHEETS = 12  # of generated pictures
# elsewhere on the page
_TOLD = {"round", "train_loss", "test_loss", "test_accuracy", "clients_sampled", "seconds", "virtual_seconds"}
_IDLE = "A worker is idle while it waits for another or for the driver, whose broadcast and merge are counted apart."


def write_report(folders: Sequence[Path | str], out: Path | str, targets: Sequence[float] | None = None) -> Path:
    """Write the page about the runs in ``folders`` to ``out``, whole or not at all; the same runs give the same bytes.

    Args:
        folders: run folders, finished or not; several are drawn over each other, seeds of one config as a band.
        out: the HTML file.
        targets: test accuracies for the rounds-to-target table; without it, a few that suit the runs.

    Raises:
        DataError: a folder is no run folder, or one of its files is corrupt.
    """
    if not folders:
        raise DataError("a report needs at least one run folder; name the folders that `fedray run` has written")
    runs = [read_run(folder) for folder in folders]
    written = _one(runs[0]) if len(runs) == 1 else _several(runs, targets)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.write_text(written, encoding="utf-8")
    aside.replace(out)
    return out


def _one(run: RunRecord) -> str:
    group = Group(run.name, (run,))
    panels = {"loss": ("train_loss", "test_loss"), "accuracy and F1": ("test_accuracy", "macro_f1")}
    rows = [_row(title, [(_title(key), curve(group, key)) for key in keys], True) for title, keys in panels.items()]
    sections = [
        _headline(run),
        _notes(run),
        section("Curves", "".join(rows)),
        section("Classes", _classes(run)),
        section("Generated pictures", _pictures(run), _compared(run)),
        section("Who held what", _partition(run)),
        section("Where the time went", _phases(run)),
        section("What the workers did", _profile(run), _IDLE),
        _multiples([group], _TOLD | {"macro_f1"}),
        section("Configuration", _settings(run)),
    ]
    return page(run.name, _subtitle(run), sections)


def _several(runs: Sequence[RunRecord], targets: Sequence[float] | None) -> str:
    groups = group_by_seed(runs)
    members = [run for group in groups for run in group.runs]
    targets = default_targets(runs) if targets is None else targets
    labels = [group.label + (f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else "") for group in groups]
    rows = [
        _row(_title(key), [(label, curve(group, key)) for label, group in zip(labels, groups, strict=True)])
        for key in ("test_accuracy", "test_loss", "train_loss")
    ]
    seeds = "Of several seeds: mean ± sample standard deviation." if len(members) > len(groups) else ""
    band = " Several seeds of one configuration are one line, their mean, in a band from the lowest to the highest."
    partitions = {_partition(group.runs[0]): group.label for group in reversed(groups)}
    sections = [
        section("Results", table(summary_rows(groups)), seeds),
        section(
            "Cost of a target",
            table(target_rows(groups, targets)) if targets else "",
            "When the test accuracy first reached the target; megabytes are those up and down together.",
        ),
        "".join(_notes(run, run.name) for run in members),
        section("Curves", "".join(rows) and legend(labels) + "".join(rows), band.strip() if seeds else ""),
        section("What the configurations differ in", table(difference_rows(groups))),
        section("Generated pictures", _newest_pictures(members)),
        _multiples(groups, _TOLD),
        *(section(f"Who held what: {label}", picture) for picture, label in reversed(partitions.items()) if picture),
        section("Configurations", "".join(_settings(run, f" of {run.name}") for run in members)),
    ]
    return page(f"{len(runs)} runs beside each other", ", ".join(labels), sections)


def _headline(run: RunRecord) -> str:
    best, planned = best_accuracy(run), run.config.get("rounds")
    accuracy, macro_f1, loss = (final_number(run, key) for key in ("test_accuracy", "macro_f1", "test_loss"))
    up, down = (final_number(run, f"bytes_{way}_total") for way in ("up", "down"))
    done, sampled, seconds = final_number(run, "round"), final_number(run, "clients_sampled"), total_seconds(run)
    cards = []
    if accuracy is not None:
        cards.append(("test accuracy", quantity(accuracy, 4), f"best {best[0]:.4f}, round {best[1]}" if best else ""))
    if nearest := best_distance(run):
        newest = final_number(run, "frechet_distance")
        note = f"best {quantity(nearest[0], 4)}, round {nearest[1]}"
        cards.append(("Fréchet distance", "" if newest is None else quantity(newest, 4), note))
    if macro_f1 is not None:
        cards.append(("macro F1", quantity(macro_f1, 4), f"test loss {quantity(loss)}" if loss is not None else ""))
    if done is not None:
        cards.append(("rounds", quantity(done, 0), f"of {planned:,}" if isinstance(planned, int) else ""))
    if run.label_counts is not None:
        count = f"{sampled:.0f} in the last round" if sampled else ""
        cards.append(("clients", quantity(len(run.label_counts), 0), count))
    if up is not None and down is not None:
        ways = f"{quantity(up / 1e6)} up, {quantity(down / 1e6)} down"
        cards.append(("megabytes sent", quantity((up + down) / 1e6), ways))
    if seconds and done:
        cards.append(("seconds", quantity(seconds), f"{quantity(seconds / done)} a round"))
    items = (
        f'<div class="card"><dt>{text(name)}</dt><dd>{text(value)}</dd><p>{text(note)}</p></div>'
        for name, value, note in cards
    )
    return f'<dl class="cards">{"".join(items)}</dl>' if cards else ""


def _notes(run: RunRecord, name: str = "This run") -> str:
    """What a reader must know before trusting the numbers: unfinished, diverged, clients that failed."""
    notes = []
    done, planned = final_number(run, "round"), run.config.get("rounds")
    if done is None:
        notes.append("has no round yet; there is nothing to show but what it was given.")
    elif isinstance(planned, int) and done < planned:
        notes.append(f"stands at round {done:.0f} of {planned}; `fedray resume` goes on from its last checkpoint.")
    broken = {
        key: int(line.x["rounds"][~np.isfinite(line.y)][0])
        for key in ("train_loss", "test_loss")
        if not np.isfinite((line := curve(Group("", (run,)), key)).y).all()
    }
    if broken:
        first = min(broken, key=lambda key: broken[key])
        notes.append(f"diverged: its {_title(first)} is not a finite number in round {broken[first]}.")
    failed = sum(scalars(record).get("clients_failed", 0.0) for record in run.metrics)
    if failed:
        notes.append(f"lost {failed:.0f} client updates to failures.")
    return "".join(f'<p class="note">{text(name)} {text(note)}</p>' for note in notes)


def _row(title: str, lines: Sequence[tuple[str, Curve]], labelled: bool = False) -> str:
    """One number against rounds, megabytes and seconds; a line keeps its style when another one has no points."""
    kept = [(style, label, line) for style, (label, line) in enumerate(lines) if len(line.y)]
    drawn, styles = [line for _, _, line in kept], [style for style, _, _ in kept]
    axes = [axis for axis in AXES if any(line.x[axis].max() > 0 for line in drawn)] or (["rounds"] if drawn else [])
    if len(kept) == 1 and labelled:
        title = kept[0][1]
    pictures = "".join(f"<figure>{figures.curves_svg(drawn, axis, title, styles)}</figure>" for axis in axes)
    names = legend([label for label, _ in lines]) if labelled and len(kept) > 1 else ""
    return f'{names}<div class="grid">{pictures}</div>' if pictures else ""


def _multiples(groups: Sequence[Group], told: set[str]) -> str:
    """Every further number that the algorithm reported: a small picture, or a word if it never changed."""
    keys = dict.fromkeys(
        key for group in groups for run in group.runs for record in run.metrics for key in scalars(record)
    )
    pictures: list[str] = []
    constant: list[str] = []
    for key in keys:
        if key in told or key.startswith(("bytes_", "phases/", "profile/")):
            continue
        lines = [(group.label, curve(group, key)) for group in groups]
        values = {value for _, line in lines for value in line.y.tolist()}
        if len(values) == 1 and len(groups) == 1:
            constant.append(f"{_title(key)} {quantity(values.pop())}")
        elif len(values) > 1 and len(pictures) < _MAX_MULTIPLES:
            kept = [(style, line) for style, (_, line) in enumerate(lines) if len(line.y)]
            svg = figures.curves_svg([line for _, line in kept], "rounds", _title(key), [style for style, _ in kept])
            pictures.append(f"<figure>{svg}</figure>")
    body = f'<div class="grid small">{"".join(pictures)}</div>' if pictures else ""
    never = f"The same in every round: {', '.join(constant)}." if constant else ""
    return section("What else was measured", body or " " * bool(never), never)


def _classes(run: RunRecord) -> str:
    """Precision, recall, F1 and support of each class, beside the confusion matrix."""
    confusion = run.confusion
    if confusion is None or run.evaluation is None:
        return ""
    classes = [str(name) for name in run.evaluation.get("classes", run.classes)]
    classes += [str(index) for index in range(len(classes), len(confusion))]
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    rows = [["class", "precision", "recall", "F1", "support"]]
    for name, *values, count in zip(classes, precision, recall, f1, support, strict=True):
        rows.append([name, *(f"{value:.3f}" for value in values), f"{count:,}"])
    means = (f"{column.mean():.3f}" for column in (precision, recall, f1))
    rows.append(["mean over classes", *means, f"{support.sum():,}"])
    picture = f"<figure>{figures.confusion_svg(confusion, classes)}</figure>"
    return f'<div class="pair"><div class="tall">{table(rows)}</div>{picture}</div>'


def _pictures(run: RunRecord) -> str:
    """Samples of evaluations from the first to the newest."""
    rounds = sorted(run.samples)
    if len(rounds) > _MAX_SHEETS:
        rounds = [rounds[k * (len(rounds) - 1) // (_MAX_SHEETS - 1)] for k in range(_MAX_SHEETS)]
    return _sheets([(f"round {number}", run.samples[number]) for number in rounds])


def _newest_pictures(runs: Sequence[RunRecord]) -> str:
    """Samples of the newest evaluation of each run, as many as fit."""
    newest = [(run, max(run.samples)) for run in runs if run.samples][:_MAX_SHEETS]
    return _sheets([(f"{run.name}, round {number}", run.samples[number]) for run, number in newest])


def _sheets(sheets: Sequence[tuple[str, bytes]]) -> str:
    pictures = "".join(
        f'<figure><img alt="generated pictures" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
        for caption, content in sheets
    )
    return f'<div class="grid small">{pictures}</div>' if pictures else ""


def _compared(run: RunRecord) -> str:
    extractor = (run.evaluation or {}).get("extractor")
    return f"Always of the same noise. Distances are by: {extractor}." if extractor else ""


def _partition(run: RunRecord) -> str:
    counts = run.label_counts
    return "" if counts is None else f"<figure>{figures.partition_svg(counts, run.classes)}</figure>"


def _phases(run: RunRecord) -> str:
    total: dict[str, float] = {}
    for record in run.metrics:
        for name, seconds in _seconds(record, "phases").items():
            total[name] = total.get(name, 0.0) + seconds
    whole = sum(total.values())
    if not whole:
        return ""
    rows = (
        f'<tr><td>{text(name)}</td><td>{quantity(value)} s</td><td>{value / whole:.1%}</td><td class="bar">'
        f'<span style="width:{value / whole:.2%}"></span></td></tr>'
        for name, value in sorted(total.items(), key=lambda item: -item[1])
    )
    return f'<table class="phases">{"".join(rows)}</table>'


def _profile(run: RunRecord) -> str:
    """The workers' time, round by round, in the order in which a round goes; only of a run with ``profile: true``."""
    told = {record["round"]: _seconds(record, "profile") for record in run.metrics if record["round"]}
    names = [name for name in PHASES if any(name in seconds for seconds in told.values())]
    if not names:
        return ""
    parts = {name: np.array([seconds.get(name, 0.0) for seconds in told.values()]) for name in names}
    return f"<figure>{figures.shares_svg(np.array(list(told)), parts, 'worker-seconds')}</figure>"


def _seconds(record: Mapping[str, Any], key: str) -> dict[str, float]:
    """What stands under ``key`` in a record, as far as it is finite, by its title."""
    found = {
        name.removeprefix(f"{key}/"): value for name, value in scalars(record).items() if name.startswith(f"{key}/")
    }
    return {_title(name): value for name, value in found.items() if math.isfinite(value)}


def _settings(run: RunRecord, of: str = "") -> str:
    from omegaconf import OmegaConf

    blocks = {"configuration": OmegaConf.to_yaml(OmegaConf.create(run.config))}
    if run.environment:
        blocks["environment"] = json.dumps(run.environment, indent=2, ensure_ascii=False)
    return "".join(
        f"<details><summary>{text(name.capitalize() + of)}</summary><pre>{text(words)}</pre></details>"
        for name, words in blocks.items()
    )


def _subtitle(run: RunRecord) -> str:
    options = dict(flat(run.config))
    told = [options[key] for key in ("algorithm.name", "task.data.name", "task.model.name") if key in options]
    return ", ".join([*map(str, told), f"seed {options['seed']}"] if "seed" in options else map(str, told))


def _title(key: str) -> str:
    return key.replace("_", " ").replace("/", ", ").replace(" f1", " F1")
