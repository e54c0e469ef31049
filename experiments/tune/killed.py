"""Search twice, kill the second search at random moments and start it again, and compare the two.

    python experiments/tune/killed.py --out searches

It kills the command and all that it started, Ray included, by SIGKILL.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
DEADLINE = 900.0  # seconds for a search to get somewhere


def begin(out: Path) -> subprocess.Popen:
    """``fedray tune`` with the search of this folder."""
    environment = {**os.environ, "TUNE_GLOBAL_CHECKPOINT_S": "1"}  # so that Tune's notes are hardly older than a kill
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedray", "tune", str(HERE / "small.yaml"), "--out", str(out)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def rounds(out: Path) -> int:
    """Rounds of all trials together."""
    return sum(len(path.read_bytes().splitlines()) for path in out.glob("*/run/metrics.jsonl"))


def kill(process: subprocess.Popen) -> None:
    """The command and all below it."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=DEADLINE)


def search(out: Path, moments: list[int]) -> int:
    """Search, and kill when so many rounds more have been run; how often that was done."""
    killed = 0
    for more in moments:
        before, process, deadline = rounds(out), begin(out), time.monotonic() + DEADLINE
        while process.poll() is None and rounds(out) < before + more:
            if time.monotonic() > deadline:
                kill(process)
                raise SystemExit(f"{out} does not get on; see {out.with_suffix('.log')}")
            time.sleep(0.05)
        if process.poll() is not None:
            break
        kill(process)
        killed += 1
    if begin(out).wait(DEADLINE):
        raise SystemExit(f"{out} failed; see {out.with_suffix('.log')}")
    return killed


def trials(out: Path) -> list[dict[str, str]]:
    """The lines of ``results.csv``."""
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def compare(left: Path, right: Path) -> dict[str, int]:
    """What trials of two searches have in common."""
    pairs = list(zip(trials(left), trials(right), strict=True))
    keys = [key for key in pairs[0][0] if "." in key or key == "cohort"]
    ended = [one["trial"] for one, other in pairs if min(one["round"], other["round"], key=int) == "27"]
    models = [[(out / name / "model.safetensors").read_bytes() for out in (left, right)] for name in ended]
    return {
        "trials": len(pairs),
        "same settings": sum(all(one[key] == other[key] for key in keys) for one, other in pairs),
        "same last round": sum(one["round"] == other["round"] for one, other in pairs),
        "stopped early": sum(int(one["round"]) < 27 for one, _ in pairs),
        "stopped early, killed": sum(int(other["round"]) < 27 for _, other in pairs),
        "finished in both": len(ended),
        "same bytes": sum(one == other for one, other in models),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(options.seed)
    began = time.monotonic()
    search(options.out / "undisturbed", [])
    seconds = time.monotonic() - began
    moments = [chance.randint(5, 40) for _ in range(options.kills)]
    killed = search(options.out / "killed", moments)
    found = compare(options.out / "undisturbed", options.out / "killed")
    print(json.dumps({**found, "killed": killed, "seconds, undisturbed": round(seconds, 1)}, indent=2))
