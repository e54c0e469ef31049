"""Commands that deal with other places: jobs of a cluster, and run folders on storage."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.errors import ConfigError, FedrayError

if TYPE_CHECKING:
    from fedray.backends.ray.jobs import Jobs, Listed


def add_commands(commands: Any) -> None:
    """Add their parsers to those of the command line."""
    job = commands.add_parser("submit", help="run an experiment as a job of a Ray cluster")
    job.add_argument("config", help="a YAML file, or a shipped experiment's name; with --resume, the run folder")
    job.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="options on top of the file")
    job.add_argument("--address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)")
    job.add_argument("--out", metavar="DIR", help="the run folder there, or a URI (default: ~/fedray-runs/<job>)")
    job.add_argument("--resume", action="store_true", help="go on with a run instead")
    job.add_argument("--follow", action="store_true", help="print the job's log until it ends")
    job.add_argument("--env", action="append", default=[], metavar="NAME", help="a variable that the job gets")
    job.add_argument("--installed", action="store_true", help="use the fedray that the cluster has")
    job.add_argument("--check-data", action="store_true", help="read the data and build the model here first")
    job.add_argument("--entrypoint-cpus", type=float, metavar="N", help="CPUs that the job's driver reserves")
    job.add_argument("--label", action="append", default=[], metavar="key=value", help="of the driver's node")
    job.add_argument("--python", default="python", help="the interpreter there (default: python)")
    job.set_defaults(command=submit)

    listing = commands.add_parser("jobs", help="what was submitted: list, status, logs, stop")
    listing.add_argument("action", nargs="?", choices=["list", "status", "logs", "stop"], default="list")
    listing.add_argument("id", nargs="?", metavar="ID", help="the job, as `fedray jobs` lists it")
    listing.add_argument("--follow", action="store_true", help="logs: go on until the job ends")
    listing.add_argument("--address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)")
    listing.set_defaults(command=jobs)

    copying = commands.add_parser("fetch", help="copy a run folder from or to storage")
    copying.add_argument("source", type=place, metavar="FROM", help="a run folder, or its URI")
    copying.add_argument("target", type=place, metavar="TO", help="a folder or URI; empty, or an older copy of the run")
    copying.set_defaults(command=fetch)


def place(text: str) -> str | Path:
    """A run folder as an argument: a path, or a URI as it is."""
    return text if "://" in text else Path(text)  # as `fedray.storage.place`, which loads more


def local(text: str) -> Path:
    """A folder as an argument of a command that works on this machine only."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no local folder; `fedray fetch` copies run folders from there")
    return Path(text)


def submit(options: argparse.Namespace) -> None:
    """``fedray submit``."""
    import tempfile

    from fedray.submit import prepare

    with tempfile.TemporaryDirectory(prefix="fedray-job-") as scratch:
        job = prepare(
            options.config,
            options.overrides,
            Path(scratch),
            out=options.out,
            resume=options.resume,
            env=options.env,
            installed=options.installed,
            check_data=options.check_data,
            cpus=options.entrypoint_cpus,
            labels=options.label,
            python=options.python,
        )
        cluster = _jobs(options.address)
        id = cluster.submit(job)
    print(f"job: {id}\nsent: {', '.join(job.carried) or 'nothing'}\nrun folder: {job.metadata['out']}", flush=True)
    if options.follow:
        _follow(cluster, id)
    else:
        print(f"follow it with: fedray jobs logs {id} --follow")


def jobs(options: argparse.Namespace) -> None:
    """``fedray jobs``."""
    if options.action != "list" and options.id is None:
        raise ConfigError(f"which job? fedray jobs {options.action} ID; `fedray jobs` lists them")
    cluster = _jobs(options.address)
    if options.action == "list":
        print(_table(cluster.all()))
    elif options.action == "status":
        job = cluster.find(options.id)
        print(f"{job.status}{'' if job.exit_code is None else f' (exit code {job.exit_code})'}: {job.message}")
        print(f"run folder: {job.out}")
    elif options.action == "stop":
        print(cluster.stop(options.id).status)
    elif options.follow:
        _follow(cluster, options.id)
    else:
        print(cluster.logs(options.id), end="")


def fetch(options: argparse.Namespace) -> None:
    """``fedray fetch``."""
    from fedray.storage import copy

    copy(options.source, options.target)
    print(f"copied to {options.target}")


def _jobs(address: str | None) -> "Jobs":
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray sends its token only if it is told to
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from fedray.backends.ray.jobs import Jobs

    return Jobs(address)


def _follow(cluster: "Jobs", id: str) -> None:
    def write(text: str) -> None:
        print(text, end="", flush=True)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        job = cluster.follow(id, write, tell)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the job goes on; stop it with: fedray jobs stop {id}") from None
    if job.status != "SUCCEEDED":
        raise FedrayError(f"job {id} is {job.status}: {job.message}")


def _table(found: "list[Listed]") -> str:
    rows = [("job", "status", "submitted", "fedray", "run folder")]
    for job in found:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
        rows.append((job.id, job.status, started, job.version, job.out))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) if found else "no job of fedray's"
