"""Checkpoints: a run's whole state in safetensors and JSON, complete or absent; nothing is ever unpickled.

``<run>/checkpoints/<round>/`` holds the server's tensors and ``state.json``; ``<run>/client_states/`` holds one file
for each client and the round in which it was written, so that a checkpoint writes only what changed since the last.
``state.json`` carries the SHA-256 of every file that the checkpoint consists of.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fedray.errors import DataError

logger = logging.getLogger(__name__)


_OF_A_RUN = (
    *("config.yaml", "environment.json", "partition.npz", "metrics.jsonl", "changes.jsonl"),
    *("evaluation.json", "model.safetensors", "report.html"),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        round: The last finished round.
        state: The server state.
        clients: Client id to (round, state): what every client keeps.
        progress: Further JSON values, such as the ledger's totals.
    """

    round: int
    state: Any
    clients: dict[int, tuple[int, Any]]
    progress: dict[str, Any]


def write(
    run: Path,
    round: int,
    state: Any,
    clients: Mapping[int, tuple[int, Any]],
    fetch: Callable[[Any], Any],
    progress: dict[str, Any],
    keep: int,
) -> None:
    """Write a checkpoint aside, rename it into place, then remove all but the newest ``keep``.

    Args:
        run: The run's folder.
        round: The last finished round.
        state: The server state; dataclasses, dicts, lists, tuples, tensors, numbers, text and None.
        clients: What the clients keep, as client id to (round, handle).
        fetch: A handle to the state itself.
        progress: Further JSON values.
        keep: How many checkpoints stay.
    """
    files = {}
    (run / "client_states").mkdir(exist_ok=True)
    known = _known_hashes(run)
    for client, (changed, handle) in sorted(clients.items()):
        name = f"client_states/{client}-{changed}.safetensors"
        if name not in known or not (run / name).exists():
            known[name] = _write_tree(run / name, fetch(handle), typed=False)
        files[str(client)] = {"file": name, "round": changed, "sha256": known[name]}
    final = run / "checkpoints" / f"{round:06d}"
    aside = final.with_name(f".{final.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    document = {
        "round": round,
        "server_sha256": _write_tree(aside / "server.safetensors", state),
        "clients": files,
        "progress": progress,
    }
    content = json.dumps(document)
    (aside / "state.json").write_text(json.dumps({"sha256": _sha256(content.encode()), "checkpoint": document}))
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _prune(run, keep)


def read_newest(run: Path, template: Any) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there are none; a damaged one is passed over with a warning.

    Args:
        run: The run's folder.
        template: A server state of the same algorithm, for its types.

    Raises:
        DataError: there are checkpoints, and none of them is whole.
    """
    folders = _folders(run)
    for folder in folders:
        try:
            return _read(run, folder, template)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("checkpoint %s is damaged (%s); trying the one before", folder, error)
    if folders:
        checkpoints = run / "checkpoints"
        raise DataError(f"no checkpoint in {checkpoints} can be read; remove that folder to start from the first round")
    return None


def newest_round(run: Path) -> int:
    """The round of the newest checkpoint, whole or not; 0 if there is none."""
    return max((int(folder.name) for folder in _folders(run)), default=0)


def _read(run: Path, folder: Path, template: Any) -> Checkpoint:
    document = _read_document(folder)
    state = _read_tree(folder / "server.safetensors", document["server_sha256"], template)
    clients = {}
    for client, entry in document["clients"].items():
        path = (run / entry["file"]).resolve()
        if path.parent != (run / "client_states").resolve():
            raise DataError(f"{folder / 'state.json'} names {entry['file']}, which is outside of the run's folder")
        clients[int(client)] = (int(entry["round"]), _read_tree(path, entry["sha256"], None))
    return Checkpoint(document["round"], state, clients, document["progress"])


def take_out(run: Path, round: int, out: Path) -> None:
    """Make a folder of what a run goes on from after ``round``, whose checkpoint is whole; links, where there can be.

    Args:
        run: The run's folder, in which nobody writes meanwhile.
        round: A round with a checkpoint.
        out: Where to; it is not there.
    """
    checkpoint = run / "checkpoints" / f"{round:06d}"
    states = [entry["file"] for entry in _read_document(checkpoint)["clients"].values()]
    of_it = [path.relative_to(run) for path in checkpoint.iterdir()]
    sheets = [path.relative_to(run) for path in run.glob("samples/*.png")]
    for name in (*of_it, *states, *sheets, *(name for name in _OF_A_RUN if (run / name).is_file())):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        _link(run / name, out / name)


def put_back(taken: Path | None, run: Path) -> None:
    """Make ``run`` what `take_out` took; without it, a run that has not begun. What others keep there stays."""
    for name in ("checkpoints", "client_states", "samples"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in _OF_A_RUN:
        (run / name).unlink(missing_ok=True)
    if taken is not None:
        shutil.copytree(taken, run, dirs_exist_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # not every file system can
        shutil.copyfile(source, target)


def forget_after(run: Path, round: int) -> None:
    """Remove what there is of rounds that will be run again: damaged checkpoints, and samples."""
    for folder in _folders(run):
        if int(folder.name) > round:
            shutil.rmtree(folder, ignore_errors=True)
    for sheet in run.glob("samples/*.png"):
        if sheet.stem.isdigit() and int(sheet.stem) > round:
            sheet.unlink()


def write_sheet(run: Path, round: int, pictures: bytes) -> None:
    """Keep what a model made in an evaluation: a PNG, ``samples/<round>.png``."""
    (run / "samples").mkdir(exist_ok=True)
    replace_file(run / "samples" / f"{round:06d}.png", pictures)


def write_params(path: Path, params: dict[str, torch.Tensor]) -> None:
    """A model's params as one safetensors file, written aside and renamed."""
    replace_file(path, save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in params.items()}))


def replace_file(path: Path, data: bytes) -> None:
    """Write a file aside and rename it into place, so that it is there as a whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(data)
    aside.replace(path)


def read_params(path: Path) -> dict[str, torch.Tensor]:
    """The params of ``write_params``."""
    return load(path.read_bytes())


def _write_tree(path: Path, tree: Any, typed: bool = True) -> str:
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _encode(tree, tensors, typed)
    # an unused tensor would be lost in a file without any, and safetensors' metadata must be text
    data = save(tensors or {"": torch.zeros(0)}, metadata={"tree": json.dumps(skeleton)})
    replace_file(path, data)
    return _sha256(data)


def _read_tree(path: Path, sha256: str, template: Any) -> Any:
    data = path.read_bytes()
    if _sha256(data) != sha256:
        raise ValueError(f"{path} does not have the checksum that was recorded for it")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return _decode(json.loads(header["__metadata__"]["tree"]), load(data), template)


def _encode(tree: Any, tensors: dict[str, torch.Tensor], typed: bool) -> Any:
    if isinstance(tree, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = tree.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    if typed and dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {"fields": {f.name: _encode(getattr(tree, f.name), tensors, typed) for f in dataclasses.fields(tree)}}
    if isinstance(tree, dict):
        if not all(isinstance(key, str) for key in tree):
            raise TypeError(f"a state has a dict with the keys {list(tree)[:5]}; only text can be a key")
        return {"dict": {key: _encode(value, tensors, typed) for key, value in tree.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_encode(value, tensors, typed) for value in tree]}
    raise TypeError(
        f"a state holds a {type(tree).__name__}, which cannot be checkpointed; "
        "use tensors, numbers, text, None, and dicts, lists, tuples or (on the server) dataclasses of them"
    )


def _decode(node: dict[str, Any], tensors: dict[str, torch.Tensor], template: Any) -> Any:
    [(kind, content)] = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        inner = template if isinstance(template, dict) else {}
        return {key: _decode(value, tensors, inner.get(key)) for key, value in content.items()}
    if kind == "fields":
        if not dataclasses.is_dataclass(template) or isinstance(template, type):
            raise TypeError("the checkpoint holds a dataclass where the algorithm has none; was the algorithm changed?")
        values = {key: _decode(value, tensors, getattr(template, key, None)) for key, value in content.items()}
        return type(template)(**values)
    models = template if isinstance(template, list | tuple) and len(template) == len(content) else [None] * len(content)
    items = [_decode(value, tensors, model) for value, model in zip(content, models, strict=True)]
    return tuple(items) if kind == "tuple" else items


def _read_document(folder: Path) -> dict[str, Any]:
    stored = json.loads((folder / "state.json").read_text())
    if _sha256(json.dumps(stored["checkpoint"]).encode()) != stored["sha256"]:
        raise ValueError(f"{folder / 'state.json'} does not have its own checksum")
    return stored["checkpoint"]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _folders(run: Path) -> list[Path]:
    """The checkpoints, newest first."""
    found = [p for p in (run / "checkpoints").glob("[0-9]*") if p.is_dir() and p.name.isdigit()]
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def _known_hashes(run: Path) -> dict[str, str]:
    """Checksums of the client files that some checkpoint refers to, and which therefore are whole."""
    known: dict[str, str] = {}
    for folder in _folders(run):
        try:
            entries = _read_document(folder)["clients"].values()
        except (OSError, ValueError, KeyError, TypeError):
            continue
        known |= {entry["file"]: entry["sha256"] for entry in entries}
    return known


def _prune(run: Path, keep: int) -> None:
    for folder in _folders(run)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in (run / "checkpoints").glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    wanted = _known_hashes(run)
    for path in (run / "client_states").iterdir():
        if f"client_states/{path.name}" not in wanted:
            path.unlink()
