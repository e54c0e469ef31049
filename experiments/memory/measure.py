"""Follow the memory of a run: the proportional set size of all its processes together, Ray's included.

    python experiments/memory/measure.py OUT.csv run experiments/memory/run.yaml [key=value ...] --out RUN

Proportional memory counts a page that n processes share as 1/n of a page in each, so the sum is what the run takes.
"""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

MEGABYTE = 1e6


def proportional(root: psutil.Process) -> tuple[float, int]:
    """MB of a process and all its descendants, and how many they are."""
    total, count = 0.0, 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss / MEGABYTE
            count += 1
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return total, count


def last_round(folder: Path) -> int:
    try:
        return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["round"])
    except (OSError, ValueError, IndexError):
        return -1


def main() -> None:
    out, *arguments = sys.argv[1:]
    folder = Path(arguments[arguments.index("--out") + 1])
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "fedray", *arguments])
    root, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        memory, count = proportional(root)
        samples.append((round(time.monotonic() - began, 2), last_round(folder), round(memory, 1), count))
        time.sleep(0.5)
    with Path(out).open("w", newline="") as file:
        csv.writer(file).writerows([("seconds", "round", "pss_mb", "processes"), *samples])
    last = max(at for _, at, _, _ in samples)
    training = [(at, memory) for _, at, memory, _ in samples if 1 <= at < last]
    early = [memory for at, memory in training if at <= last // 3]
    late = [memory for at, memory in training if at > 2 * last // 3]
    print(
        f"peak {max(memory for _, _, memory, _ in samples):.0f} MB, first third of the rounds "
        f"{sum(early) / len(early):.0f} MB, last third {sum(late) / len(late):.0f} MB"
    )
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
