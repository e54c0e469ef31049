"""The command line: parse, call, print."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedray.commands import add_commands, local, place
from fedray.errors import ConfigError, DataError, FedrayError

DONE, FAILED, USERS_MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("fedray").setLevel(logging.INFO)
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        options.command(options)
        sys.stdout.flush()
    except (ConfigError, DataError) as error:
        print(f"fedray: {' '.join(str(error).split())}", file=sys.stderr)
        return USERS_MISTAKE
    except KeyboardInterrupt as error:
        print(f"fedray: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except FedrayError as error:
        print(f"fedray: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever read our output has seen enough; what is left must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="fedray", description="Federated learning, simulated on Ray clusters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment", description="Run an experiment.")
    run.add_argument("config", nargs="?", default="quickstart", help="a YAML file, or a shipped experiment's name")
    run.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options on top of the file, such as rounds=50"
    )
    run.add_argument("--out", type=place, metavar="DIR", help="the run folder, or a URI (default: runs/<name>-<time>)")
    run.set_defaults(command=_run)

    resume = commands.add_parser("resume", help="go on with an interrupted run, or with more rounds")
    resume.add_argument("run", type=place, metavar="RUN", help="the run folder, or its URI")
    resume.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="rounds=..., backend....=..., trackers=..."
    )
    resume.set_defaults(command=_resume)

    sweep = commands.add_parser("sweep", help="run a grid of trials, many at once, and compare them")
    sweep.add_argument("config", help="a YAML file, or a shipped experiment's name")
    sweep.add_argument("axes", nargs="*", metavar="key=v1,v2", help="values of an option; seed=0..4 for a range")
    sweep.add_argument("--file", metavar="FILE", help="a CSV or YAML list of settings, each combined with the values")
    sweep.add_argument(
        "--out", type=local, required=True, metavar="DIR", help="the sweep's folder; it goes on if there"
    )
    sweep.add_argument("--zip", action="store_true", help="values in step, instead of all combinations")
    sweep.add_argument("--random", type=int, metavar="N", help="so many trials of the grid, drawn at random")
    sweep.add_argument("--retries", type=int, default=1, help="how often a failed trial is tried again (default: 1)")
    sweep.add_argument("--metric", default="test_accuracy", help="what the table shows (default: test_accuracy)")
    sweep.add_argument("--target", type=float, action="append", help="accuracy for rounds-to-target; may be repeated")
    sweep.set_defaults(command=_sweep)

    add_commands(commands)
    tune = commands.add_parser("tune", help="search for good options with Ray Tune")
    tune.add_argument("config", help="a YAML file, or a shipped experiment's name")
    tune.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options on top, such as tune.trials=9"
    )
    tune.add_argument(
        "--space", action="append", default=[], metavar="key=DISTRIBUTION", help="such as cohort='randint(5,20)'"
    )
    tune.add_argument("--out", required=True, metavar="DIR", help="the search's folder; it goes on if there")
    tune.add_argument("--address", help="an existing cluster (default: the configuration's backend.address)")
    tune.set_defaults(command=_tune)

    calibrate = commands.add_parser("calibrate", help="find the fastest way to compute clients on this machine")
    calibrate.add_argument("config", help="a YAML file, or a shipped experiment's name")
    calibrate.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="options on top of the file")
    calibrate.set_defaults(command=_calibrate)

    report = commands.add_parser("report", help="compare runs, and write a page about them")
    report.add_argument("runs", type=place, nargs="+", metavar="RUN", help="run folders, or their URIs")
    report.add_argument("--out", type=Path, metavar="PAGE", help="the page (default: report.html)")
    report.add_argument("--target", type=float, action="append", help="accuracy for rounds-to-target; may be repeated")
    report.set_defaults(command=_report)

    generate = commands.add_parser("generate", help="generate synthetic data, and draw a sheet of samples")
    generate.add_argument("config", help="a YAML file, or a shipped experiment's name")
    generate.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="options on top of the file")
    generate.add_argument("--out", type=local, required=True, metavar="DIR", help="where to; made if it is not there")
    generate.set_defaults(command=_generate)

    quality = commands.add_parser("quality", help="measure a generated set against real data")
    quality.add_argument("samples", metavar="SET", help="what `fedray generate` wrote, or any labelled folder")
    quality.add_argument("config", help="a YAML file, or a shipped experiment's name: the real data, and the model")
    quality.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as extractor=inception")
    quality.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON (default: SET/quality.json)")
    quality.set_defaults(command=_quality)

    export = commands.add_parser("export", help="save a run's LoRA or IA3 in peft's own format, or its mask")
    export.add_argument("run", type=local, metavar="RUN", help="the run folder")
    export.add_argument("folder", type=Path, metavar="FOLDER", help="where to; made if it is not there")
    export.set_defaults(command=_export)

    attack = commands.add_parser("attack", help="what a run gives away: members, copies, prompts")
    attack.add_argument("kind", choices=["lira", "neighbours", "prompts"])
    attack.add_argument("run", type=local, metavar="RUN", help="the run folder")
    attack.add_argument("--samples", type=Path, metavar="DIR", help="neighbours: what `fedray generate` wrote")
    attack.add_argument("--tokenizer", metavar="PATH", help="prompts: whose tokens are counted")
    attack.add_argument("--shadows", type=int, default=16, help="lira: shadow models (default: 16)")
    attack.add_argument("--examples", type=int, default=2000, help="lira: examples that are judged (default: 2000)")
    attack.add_argument("--epochs", type=int, default=20, help="lira: epochs of a shadow model (default: 20)")
    attack.add_argument("--lr", type=float, default=0.05, help="lira: learning rate of a shadow model (default: 0.05)")
    attack.add_argument("--seed", type=int, default=0, help="lira: of the choice of examples and shadows (default: 0)")
    attack.add_argument("--offline", action="store_true", help="lira: compare with unseen examples only")
    attack.set_defaults(command=_attack)

    listing = commands.add_parser("list", help="what can be named in a configuration")
    listing.add_argument("kind", nargs="?", help="algorithms, datasets, partitions, models, aggregators ...")
    listing.set_defaults(command=_list)

    show = commands.add_parser("show", help="the options of a component, from its signature")
    show.add_argument("name", metavar="NAME", help="a component's name, or `config` for the top level")
    show.set_defaults(command=_show)

    command = commands.choices.get(arguments[0]) if arguments else None
    # `run quickstart --out DIR rounds=3`: options may stand between the others, which subparsers alone don't allow
    return command.parse_intermixed_args(arguments[1:]) if command else parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    from fedray.runs import run

    source, overrides = options.config, options.overrides
    if "=" in source:  # `fedray run rounds=5` means the quickstart
        source, overrides = "quickstart", [source, *overrides]
    _finish(run(source, overrides, options.out).folder)


def _resume(options: argparse.Namespace) -> None:
    from fedray.runs import resume

    _finish(resume(options.run, options.overrides).folder)


def _sweep(options: argparse.Namespace) -> None:
    from fedray.sweep import failed, rows_of, sweep, table

    if not options.axes and options.file is None:
        raise ConfigError("there is nothing to vary; give key=value,value ... or --file")
    tell = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    given = options.axes, options.out, options.zip, options.random, options.retries
    rows = [{}] if options.file is None else rows_of(options.file)
    found = sweep(options.config, *given, tell, options.target, rows)
    print(table(found, options.metric))
    print(f"results: {options.out / 'results.csv'}\nreport: {options.out / 'report.html'}")
    if (error := failed(found)) is not None:
        raise error


def _tune(options: argparse.Namespace) -> None:
    from fedray.sweep import failed
    from fedray.tune import changed, tune

    found = tune(options.config, options.overrides, options.out, options.space, options.address)
    print(found.table())
    if found.ranked:
        best = found.ranked[0]
        made = "as it ended, after changes that its changes.jsonl lists" if changed(best) else "again"
        print(f"best: {best.trial.folder}\n{made}: {found.command(best)}")
    print(f"results: {found.out / 'results.csv'}\nreport: {found.out / 'report.html'}")
    if (error := failed(found.outcomes)) is not None:
        raise error


def _calibrate(options: argparse.Namespace) -> None:
    from fedray import config
    from fedray.calibrate import calibrate
    from fedray.runs import find

    values = config.read(find(options.config), options.overrides)
    found = calibrate(values, lambda way: print(f"timing {way}", file=sys.stderr))
    print(found.table())
    if found.proposal == found.configured:
        print("nothing is worth a change")
    else:
        print("proposed:", " ".join(["fedray", "run", options.config, *options.overrides, found.proposal.settings]))


def _finish(folder: str | Path) -> None:
    from fedray.storage import read

    final = read(folder).final
    shown = {"test_accuracy": "accuracy", "test_loss": "loss", "macro_f1": "macro-F1", "perplexity": "perplexity"}
    figures = "  ".join(f"{label} {final[key]:.4f}" for key, label in shown.items() if key in final)
    print(f"{figures}\nreport: {folder}/report.html")


def _report(options: argparse.Namespace) -> None:
    from fedray.report import comparison, read_run, write_report
    from fedray.storage import copies

    [first, *others] = options.runs
    out = options.out or (first / "report.html" if not others and isinstance(first, Path) else Path("report.html"))
    with copies(options.runs) as folders:
        print(comparison([read_run(folder) for folder in folders], options.target))
        try:
            print(f"report: {write_report(folders, out, options.target)}")
        except OSError as error:
            raise DataError(f"{out} cannot be written ({error.strerror}); choose another --out") from error


def _generate(options: argparse.Namespace) -> None:
    from fedray import config
    from fedray.generate import generate
    from fedray.runs import find

    synthetic, hits = generate(config.read(find(options.config), options.overrides), options.out)
    print(f"{synthetic.metrics['synthetic_samples']:.0f} samples, {hits:.0%} of the prompts name their class")
    print(f"sheet: {options.out / 'sheet.html'}")


def _quality(options: argparse.Namespace) -> None:
    from fedray import config
    from fedray.quality import quality, table
    from fedray.runs import find

    out = options.out or Path(options.samples) / "quality.json"
    print(table(quality(options.samples, config.read(find(options.config), options.overrides), out)))
    print(f"figures: {out}")


def _export(options: argparse.Namespace) -> None:
    from fedray.export import export

    print(f"saved: {export(options.run, options.folder)}")


def _attack(options: argparse.Namespace) -> None:
    from fedray import attack
    from fedray.local_training import LocalTraining

    if options.kind == "lira":
        local = LocalTraining(local_lr=options.lr, local_epochs=options.epochs, local_momentum=0.9)
        kind = "offline" if options.offline else "online"
        tell = lambda text: print(text, file=sys.stderr)  # noqa: E731
        found = attack.lira(options.run, options.shadows, options.examples, local, kind, options.seed, tell)
        print(f"AUC {found.auc:.3f} ± {found.auc_error:.3f} (0.5 is chance)")
        print(f"balanced accuracy {found.balanced_accuracy:.3f} (0.5 is chance)")
        print("  ".join(f"TPR {tpr:.4f} at FPR {rate:g}" for rate, tpr in found.tpr_at.items()))
        print(f"page: {options.run / 'lira.html'}\nfigures: {options.run / 'lira.json'}")
    elif options.kind == "neighbours":
        if options.samples is None:
            raise ConfigError("neighbours needs --samples DIR, a folder that `fedray generate` wrote")
        near = attack.neighbours(options.run, options.samples)
        print(
            f"{near.closer:.2%} of {len(near.distance)} samples are nearer to a private example than 99% of the test's"
        )
        for place in near.distance.argsort()[:10]:
            print(f"sample {place}: private example {near.nearest[place]} at {near.distance[place]:.4g}")
        print(f"page: {options.run / 'neighbours.html'}\nfigures: {options.run / 'neighbours.json'}")
    else:
        for one in attack.prompts(options.run, options.tokenizer):
            tokens = f", {one['tokens']} tokens" if "tokens" in one else ""
            classes = ", ".join(one["classes"])
            print(f"client {one['client']}: {one['prompts']} prompts, {one['bytes']} bytes{tokens}: {classes}")
        print(f"figures: {options.run / 'prompts.json'}")


def _list(options: argparse.Namespace) -> None:
    from fedray.catalogue import KINDS
    from fedray.config import nearest

    kinds = [*KINDS, "experiments"]
    if options.kind is not None and options.kind not in kinds:
        raise ConfigError(f"there is no kind {options.kind!r}; {nearest(options.kind, kinds)}")
    for kind in [options.kind] if options.kind else kinds:
        print(f"{kind}:")
        for name, line in _lines(kind).items():
            print(f"  {name:<20} {line}")


def _lines(kind: str) -> Mapping[str, Any]:
    from fedray.catalogue import components
    from fedray.options import summary
    from fedray.runs import shipped

    return shipped() if kind == "experiments" else {name: summary(made) for name, made in components(kind).items()}


def _show(options: argparse.Namespace) -> None:
    from fedray.catalogue import KINDS, components, top_level
    from fedray.config import nearest
    from fedray.options import options_of, summary, type_name, written
    from fedray.search import Tuning

    everything = [(kind, name, made) for kind in KINDS for name, made in components(kind).items()]
    everything += [("configuration", "config", top_level()), ("configuration", "tune", Tuning)]
    found = [entry for entry in everything if entry[1] == options.name]
    if not found:
        names = [name for _, name, _ in everything]
        raise ConfigError(f"there is no component {options.name!r}; {nearest(options.name, names)}")
    for kind, name, component in found:
        print(f"{name} ({kind}): {summary(component)}")
        for option in options_of(component).values():
            default = "required" if option.required else f"default {written(option.default)}"
            print(f"  {option.name:<20} {type_name(option.annotation)}, {default}\n      {option.doc}")
