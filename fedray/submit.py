"""A run as a job of a Ray cluster: what is checked here, what travels, and the command that is run there.

The resolved configuration and the user's own modules become the job's working directory, and fedray itself travels
beside them, so that a job computes with exactly the code of the machine that it was submitted from.
"""

import ast
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import fedray
from fedray import config, experiment, storage
from fedray.errors import ConfigError, DataError
from fedray.report.read import flat
from fedray.runs import check_overrides, find, name_of

LIMIT = 512 * 2**20  # bytes that Ray takes of one working directory or module
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_LEFT = shutil.ignore_patterns("__pycache__", ".*")


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        id: Its name, when it was submitted, and something random.
        command: The command line of its driver, for a shell.
        folder: Its working directory, a temporary folder of this machine.
        packages: Folders beside it that are importable there.
        carried: What travels, in words.
        env: Environment variables; their values are for nobody's eyes.
        metadata: What `fedray jobs` shows of it.
        cpus: What its driver reserves.
        labels: Of the node that its driver runs on.
    """

    id: str
    command: str
    folder: Path
    packages: Sequence[Path]
    carried: Sequence[str]
    env: Mapping[str, str]
    metadata: Mapping[str, str]
    cpus: float | None = None
    labels: Mapping[str, str] | None = None


def prepare(
    source: str,
    overrides: Sequence[str],
    scratch: Path,
    out: str | None = None,
    resume: bool = False,
    env: Sequence[str] = (),
    installed: bool = False,
    check_data: bool = False,
    cpus: float | None = None,
    labels: Sequence[str] = (),
    python: str = "python",
) -> Job:
    """Check a run as far as that goes without its cluster, and gather what travels.

    Args:
        source: A YAML file or the name of a shipped experiment; the run folder or URI of a run to ``resume``.
        overrides: ``key=value`` each.
        scratch: An empty folder for what travels.
        out: The run folder, on the cluster: a URI, or an absolute path there.
        resume: Go on with a run.
        env: Names of variables of this process's environment that the job gets.
        installed: The cluster has fedray; do not send this one.
        check_data: Also build everything that the configuration names, data included, here.
        cpus: CPUs that the job's driver reserves.
        labels: ``key=value`` each, of the node for the driver.
        python: The interpreter on the cluster.

    Raises:
        ConfigError: a mistake in the configuration or the options; nothing was submitted.
    """
    variables = _variables(env)
    chosen = _labels(labels)
    values = _resumed(source, overrides) if resume else config.read(find(source), overrides)
    if resume:
        name = re.sub(r".*[/:]", "", source.rstrip("/")) or "run"
        check_overrides(overrides)
    else:
        name = name_of(find(source))
    if values is not None:
        if not resume:
            values = {**values, "backend": _on_the_cluster(values.get("backend"))}
        (experiment.plan if check_data else experiment.check)(values)
        _check_paths(values)
    id = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-')}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    out = source if resume else out or f"~/fedray-runs/{id}"
    _check_out(out, resume)
    command = [python, "-m", "fedray"]
    if resume:
        command += ["resume", out, *overrides]
        if not any(re.match(r"backend(\.name)?=", text) for text in overrides):
            command += ["backend.name=ray", "backend.address=auto"]
    else:
        command += ["run", "config.yaml", "--out", out]
        (scratch / "job").mkdir()
        (scratch / "job" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    (scratch / "job").mkdir(exist_ok=True)
    carried = [] if resume else ["config.yaml"]
    carried += _carry(_modules(values or {}), scratch / "job")
    packages = [] if installed else _ourselves(scratch / "packages")
    line = shlex.join(command).replace("'~/", "~/'")  # the shell there knows whose home is meant
    _check_secrets(variables, line, *(str(value) for _, value in flat(values or {})))
    told = {"fedray": _version(), "name": name, "out": out}
    carried += [f"fedray {_version()}"] if packages else []
    return Job(id, line, scratch / "job", packages, carried, variables, told, cpus, chosen)


def _resumed(run: str, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The configuration of a run; None if it cannot be read from here, as one in a folder of the cluster."""
    try:
        return config.read(storage.read(storage.place(run)).config, overrides)
    except DataError:
        if "://" in run:
            raise
        return None


def _on_the_cluster(backend: Any) -> Any:
    """The backend of a job: of Ray, the cluster that it is submitted to."""
    options = {"name": backend} if isinstance(backend, str) else backend or {"name": "ray"}
    if not isinstance(options, Mapping) or options.get("name") != "ray":
        return backend
    if options.get("address", "auto") not in ("auto", "local"):
        raise ConfigError(
            f"backend.address is {options['address']!r}, and a job runs on the cluster that it is submitted to; leave "
            "it out, and name the cluster with --address"
        )
    return {**options, "address": "auto"}


def _variables(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if "=" in name:
            name = name.partition("=")[0]
            raise ConfigError(
                f"--env takes the name of a variable, for values on a command line can be read by others and stay in "
                f"the shell's history; export {name}, and give --env {name}"
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name}: there is no such variable in the environment; export {name} first")
    return {name: os.environ[name] for name in names}


def _labels(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if not re.fullmatch(r"[^=]+=.+", text):
            raise ConfigError(f"--label {text} is not key=value; for example --label ray.io/node-group=cpu")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


def _check_out(out: str, resume: bool) -> None:
    if "://" not in out and not out.startswith(("/", "~/")):
        option = "the run" if resume else "--out"
        raise ConfigError(
            f"{option} is {out!r}, and a job's own folder is removed when it ends; give an absolute path there, "
            "or a URI such as s3://bucket/folder"
        )


def _check_paths(values: Mapping[str, Any]) -> None:
    for key, value in flat(values):
        if _is_path(key) and isinstance(value, str) and not Path(value).is_absolute() and Path(value).exists():
            raise ConfigError(
                f"{key} is {value!r}, which is in this folder and does not travel with the job; give an absolute path "
                "that the cluster's nodes have"
            )


def _check_secrets(variables: Mapping[str, str], *texts: str) -> None:
    for name, value in variables.items():
        if len(value) >= 8 and any(value in text for text in texts):
            raise ConfigError(
                f"the value of {name} stands in the configuration or in --out, where all can read it; leave it to "
                f"the environment that --env {name} sets"
            )


def _is_path(key: str) -> bool:
    return key.rpartition(".")[2].endswith(("path", "dir", "folder"))


def _modules(values: Mapping[str, Any]) -> list[Path]:
    """Files and folders of the current folder that hold what the configuration names by dotted paths, or import it."""
    found: dict[Path, None] = {}
    names = {text for key, value in flat(values) if not _is_path(key) for text in _texts(value)}
    waiting = [place for name in sorted(names) if _DOTTED.fullmatch(name) for place in _here(name)]
    while waiting:
        place = waiting.pop()
        if place not in found:
            found[place] = None
            sources = sorted(place.rglob("*.py")) if place.is_dir() else [place]
            waiting += [other for source in sources for name in _imports(source) for other in _here(name)]
    return sorted(found)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _here(name: str) -> Iterator[Path]:
    top = Path(name.partition(".")[0])
    if top.is_dir() and next(top.rglob("*.py"), None) and top.resolve() != Path(fedray.__file__).parent:
        yield top
    elif top.with_suffix(".py").is_file():
        yield top.with_suffix(".py")


def _imports(source: Path) -> Iterator[str]:
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return  # what imports it says so
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _carry(modules: Sequence[Path], folder: Path) -> list[str]:
    """Copy the modules; returns them in words.

    Raises:
        ConfigError: they are more than Ray takes.
    """
    sizes = {place: _size(place) for place in modules}
    if sum(sizes.values()) > LIMIT:
        largest = max(sizes, key=lambda place: sizes[place])
        raise ConfigError(
            f"{_mib(sum(sizes.values()))} would travel with the job, of which {largest} {_mib(sizes[largest])}; "
            f"Ray takes {_mib(LIMIT)}: move its data out, to where the cluster's nodes can read them"
        )
    for place in modules:
        if place.is_dir():
            shutil.copytree(place, folder / place, ignore=_LEFT)
        else:
            shutil.copyfile(place, folder / place)
    return [f"{place}/" if place.is_dir() else str(place) for place in modules]


def _size(place: Path) -> int:
    if place.is_file():
        return place.stat().st_size
    total = 0
    for parent, folders, names in os.walk(place):
        left = _LEFT(parent, [*folders, *names])
        folders[:] = [name for name in folders if name not in left]
        total += sum(Path(parent, name).stat().st_size for name in names if name not in left)
    return total


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _ourselves(folder: Path) -> list[Path]:
    """Copies of this package, and of what says its version."""
    code, version = folder / "fedray", folder / f"fedray-{_version()}.dist-info"
    shutil.copytree(Path(fedray.__file__).parent, code, ignore=_LEFT)
    version.mkdir()
    (version / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fedray\nVersion: {_version()}\n")
    return [code, version]


def _version() -> str:
    try:
        return metadata.version("fedray")
    except metadata.PackageNotFoundError:
        return "unknown"
