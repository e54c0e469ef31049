"""The same federated work on fedray, on plain PyTorch loops, on pfl-research and on Flower, side by side.

    python experiments/speed/speed.py --install            # once: pfl and Flower get environments of their own
    python experiments/speed/speed.py --work mlp cnn softmax --rounds 20 --repeat 3
    python experiments/speed/speed.py --work vit-bias text # bias tuning of a vision Transformer; a language model
    python experiments/speed/speed.py --scale              # cohorts of 40 to 1,000, populations of 100 to 100,000
    python experiments/speed/speed.py --sizes              # models of 10,000 to 100 million parameters
    python experiments/speed/speed.py --overhead           # a round whose clients do nothing
    python experiments/speed/speed.py --table              # nothing but the table of what is in --out

Exits with 1 if a contender failed, or reached another loss than the others.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from table import disagreements, table
from work import TRANSFORMERS, Work, prepare

HERE = Path(__file__).resolve().parent
DATA = HERE / ".data"  # normalised images, which the processes share
IMAGES = os.environ.get("FEDRAY_FMNIST", "/usr/share/datasets/fashion-mnist")
CONTENDERS = {  # the environment ("" is this one), and what to run in it with ``python -m``
    "floor1": ("", "contenders.floor 1"),
    "floor2": ("", "contenders.floor 2"),
    "floor1-compiled": ("", "contenders.floor 1 compile"),
    "floor2-compiled": ("", "contenders.floor 2 compile"),
    "floor2-channels-last": ("", "contenders.floor 2 channels_last"),
    "fedray": ("", "contenders.fedray"),
    "fedray-compiled": ("", "contenders.fedray compile=true"),
    "fedray1": ("", "contenders.fedray backend.num_workers=1"),
    "fedray-serial": ("", "contenders.fedray backend.name=serial"),
    "pfl1": ("pfl", "contenders.pfl"),
    "pfl2": ("pfl", "torch.distributed.run --standalone --nproc_per_node=2 -m contenders.pfl"),
    "flower": ("flower", "contenders.flower"),
}
PACKAGES = {"pfl": "pfl[pytorch]==0.6.0", "flower": "flwr[simulation]==1.41.0"}
DEFAULT = ["floor1", "floor2", "fedray", "pfl1", "pfl2", "flower"]

Record = dict[str, Any]


def main() -> None:
    options = parsed()
    if options.install:
        install(options.environments)
        return
    failed = [] if options.table else run(options)
    records = [json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))]
    records.sort(key=lambda record: list(CONTENDERS).index(record["contender"]))  # the floor first
    print(table(records))
    sys.exit("\n".join(failed + disagreements(records)) or 0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["mlp", "cnn", "softmax", *TRANSFORMERS]
    parser.add_argument("--work", nargs="+", default=known[:3], choices=known, help="default: mlp cnn softmax")
    parser.add_argument(
        "--contenders", nargs="+", default=DEFAULT, choices=CONTENDERS, help=f"default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3, help="processes that are timed; one more is for the memory")
    parser.add_argument("--population", type=int, nargs="+", default=[1000], help="clients")
    parser.add_argument("--cohort", type=int, nargs="+", default=[40], help="clients a round")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64], help="width of the mlp's hidden layer")
    parser.add_argument("--width", type=int, nargs="+", default=[64], help="width of vit-bias and text")
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--scale", action="store_true", help="the mlp with larger and larger cohorts and populations")
    preset.add_argument("--sizes", action="store_true", help="mlps of 10,000 to 100 million parameters")
    preset.add_argument("--overhead", action="store_true", help="models of 1 and 100 MB, clients that do nothing")
    preset.add_argument("--install", action="store_true", help="make the environments of pfl and Flower")
    preset.add_argument("--table", action="store_true", help="print the table of what is in --out")
    parser.add_argument("--out", type=absolute, default=HERE / "results", help="folder of the raw samples")
    parser.add_argument("--data", type=absolute, default=IMAGES, help="folder of Fashion-MNIST's four idx files")
    parser.add_argument("--environments", type=absolute, default=HERE / ".environments", help="folder of --install")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a process may take")
    return parser.parse_args()


def absolute(path: str) -> Path:
    return Path(path).absolute()


def works(options: argparse.Namespace) -> Iterator[Work]:
    """What the options ask for."""
    if options.scale:
        sizes = [(100, 40), (1000, 40), (100_000, 40), *((10_000, cohort) for cohort in (40, 100, 200, 400, 1000))]
        yield from (Work("mlp", 64, population, cohort, options.rounds) for population, cohort in sizes)
    elif options.sizes:  # ten thousand parameters, and ten times as many, and so on
        widths = [(12, 40), (126, 40), (1_258, 40), (12_579, 40), (125_786, 4)]
        yield from (Work("mlp", width, 1000, cohort, options.rounds) for width, cohort in widths)
    elif options.overhead:
        yield from (
            Work("padded", megabytes, 1000, cohort, options.rounds, 0) for megabytes in (1, 100) for cohort in (2, 40)
        )
    else:
        for model, population, cohort in product(options.work, options.population, options.cohort):
            widths = options.hidden if model == "mlp" else options.width if model in TRANSFORMERS else [0]
            yield from (Work(model, width, population, cohort, options.rounds) for width in widths)


def run(options: argparse.Namespace) -> list[str]:
    """Run everything in turn, and write a file of raw samples for each process; returns what failed."""
    prepare(options.data, DATA)
    options.out.mkdir(parents=True, exist_ok=True)
    contenders = [name for name in options.contenders if available(name, options.environments)]
    failed = []
    for repeat, work, name in product(range(options.repeat + 1), works(options), contenders):
        # reading the memory of Ray's processes takes a tenth of a second: the round times of repeat 0 are void
        reads_memory = repeat == 0
        busy = psutil.cpu_percent(interval=1)  # of others, before it starts
        log, result = watched(name, work, options, reads_memory)
        if not result:
            failed.append(f"{name} failed at {work}:\n{log[-2000:]}")
            print(failed[-1], file=sys.stderr)
            continue
        record = {"contender": name, "repeat": repeat, "work": asdict(work), "busy_percent_before": busy, **result}
        file = f"{work.model}-{work.size}-{work.cohort}-of-{work.population}-{name}-{repeat}.json"
        (options.out / file).write_text(json.dumps(record | {"machine": machine()}, indent=1) + "\n")
        said = f"{min(result['seconds']):.4f} s a round at best, the first one done after {result['startup']:.1f} s"
        print(f"{work}: {name}, repeat {repeat}: {said}", file=sys.stderr)
    return failed


def watched(name: str, work: Work, options: argparse.Namespace, reads_memory: bool) -> tuple[str, Record]:
    """Run a contender to its end; returns what it printed, and what it measured (nothing if it failed)."""
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder, "log"), Path(folder, "out")
        began = time.time()
        told = {"WORK": json.dumps(asdict(work)), "DATA": DATA, "SOURCE": options.data, "OUT": out, "BEGAN": began}
        paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))  # this script's own fedray
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "FLWR_HOME": str(Path(folder, "flower"))}
        environment = {**os.environ, **settings, **{f"SPEED_{key}": str(value) for key, value in told.items()}}
        command = [python(name, options.environments), "-m", *CONTENDERS[name][1].split()]
        with log.open("w") as output:
            process = psutil.Popen(command, cwd=HERE, env=environment, stdout=output, stderr=subprocess.STDOUT)
            peak = followed(process, began + options.limit, reads_memory)
        return log.read_text(), json.loads(out.read_text()) | {"peak_pss": peak} if out.exists() else {}


def followed(process: psutil.Popen, deadline: float, reads_memory: bool) -> int | None:
    """Wait for a process until the deadline, and read the largest memory of it and all its descendants, in bytes.

    It is the sum of proportional set sizes: a page that n processes share counts as 1/n of a page in each.
    """
    peak = 0
    while process.poll() is None:
        late = time.time() > deadline
        with suppress(psutil.Error):  # they may end at any time
            if late or reads_memory:
                family = [process, *process.children(recursive=True)]
                peak = max(peak, sum(map(proportional, family)))
                for member in family if late else ():
                    member.kill()
            process.wait(0.2)
    return peak if reads_memory else None


def proportional(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def machine() -> dict[str, Any]:
    """What the samples were taken on, in words."""
    packages = {name: metadata.version(name) for name in ("fedray", "ray", "torch")}
    return {"platform": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(), "versions": packages}


def python(contender: str, environments: Path) -> str:
    environment = CONTENDERS[contender][0]
    return str(environments / environment / "bin" / "python") if environment else sys.executable


def available(contender: str, environments: Path) -> bool:
    there = Path(python(contender, environments)).exists()
    if not there:
        print(f"{contender} is left out: it has no environment; --install makes one", file=sys.stderr)
    return there


def install(environments: Path) -> None:
    """Make the environments of those that are compared with, with the version of PyTorch that fedray has here."""
    torch = f"torch=={metadata.version('torch').partition('+')[0]}"
    for name, package in PACKAGES.items():
        subprocess.run([sys.executable, "-m", "venv", environments / name], check=True)
        for wanted in (torch, package):
            subprocess.run([environments / name / "bin" / "pip", "install", wanted], check=True)


if __name__ == "__main__":
    main()
