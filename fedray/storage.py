"""Run folders on shared or object storage: a run works in a scratch folder, and what changed is copied to its URI.

What is copied when makes every interruption harmless: a checkpoint's data, then its ``state.json``, which makes it one,
and what is no longer needed is removed last. At any moment, what is at the URI can be resumed.
"""

import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fedray.checkpoint import newest_round
from fedray.errors import ConfigError, DataError, FedrayError
from fedray.report import RunRecord, read_run

logger = logging.getLogger(__name__)

Place = str | Path  # of a run: a URI as text, or a local folder
Stamp = tuple[int, int]  # a file's size and when it changed, in nanoseconds

ATTEMPTS = 3  # how often a copy is tried at once, before the next checkpoint's turn
POLL = 0.5  # seconds between looks for a new checkpoint
_PASSES = 100  # how often the files may change while they are listed
_STATE = re.compile(r"checkpoints/\d+/state\.json")
_READ = ("config.yaml", "environment.json", "partition.npz", "metrics.jsonl", "evaluation.json")


def place(text: str | Path) -> Place:
    """A URI as it is, anything else as a path.

    >>> place("s3://bucket/runs/a"), place("runs/a").name
    ('s3://bucket/runs/a', 'a')
    """
    return text if isinstance(text, str) and "://" in text else Path(text)


def read(run: Place) -> RunRecord:
    """What a run folder says, of which only the small files are copied here if it is elsewhere.

    Raises:
        DataError: there is no run folder, or it cannot be read.
    """
    with copies([run]) as [folder]:
        return read_run(folder)


@contextmanager
def copies(runs: list[Place]) -> Iterator[list[Path]]:
    """Local folders with all that a report reads of these runs; those that are local stand for themselves."""
    with ExitStack() as stack:
        folders = []
        for number, run in enumerate(runs):
            if isinstance(run, Path):
                folders.append(run)
                continue
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedray-")))
            path = re.sub(r"[^\w./-]", "_", run.partition("://")[2]).strip("/").replace("..", "_")
            folder = scratch / str(number) / (path or "run")  # as its URI, by which a report tells runs apart
            Mirror(run, folder).fetch(_READ)
            folders.append(folder)
        yield folders


@contextmanager
def scratch(uri: str) -> Iterator["Mirror"]:
    """A scratch folder for a run whose copy is at a URI; it stays if it holds what could not be copied."""
    parent = Path(tempfile.mkdtemp(prefix="fedray-"))
    lost = False
    try:
        mirror = Mirror(uri, parent / (Path(uri.partition("://")[2]).name or "run"))
        try:
            yield mirror
        finally:
            lost = mirror.lost
    finally:
        if not lost:
            shutil.rmtree(parent, ignore_errors=True)


def copy(source: Place, target: Place) -> None:
    """Copy a run folder from or to storage; what the target has of the same run already is brought up to date.

    Raises:
        ConfigError: the target is neither empty nor of the same run.
        DataError: the source is no run folder, or it cannot be read.
        FedrayError: the target cannot be written.
    """
    with ExitStack() as stack:
        if isinstance(source, Path):
            read_run(source)
            folder = source
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedray-"))) / "run"
            Mirror(source, folder).fetch()
        there = Mirror(target if isinstance(target, str) else f"file://{target.absolute()}", folder)
        if there.files() and not there.of_the_same_run():
            raise ConfigError(f"{target} is not empty, and not of the same run; choose another folder")
        if not there.attempt():
            raise FedrayError(f"{target} cannot be written: {there.problem}")


class Mirror:
    """A local folder and its copy at a URI, which is brought up to date by copying the files that changed.

    ``lost`` says that the local folder holds what could not be copied, ``problem`` why the last attempt failed.

    Args:
        uri: Where the copy is, of any protocol that fsspec knows.
        folder: The local folder.
        pause: Seconds before a copy that failed is tried again; twice as many before the next time.

    Raises:
        ConfigError: the URI cannot be used.
    """

    def __init__(self, uri: str, folder: Path, pause: float = 1.0) -> None:
        self.uri, self.folder = uri.rstrip("/"), folder
        self.problem, self.lost = "", False
        self._fs, self._root = _open(uri)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pause = pause
        self._copied: dict[str, Stamp | None] = {}  # by name; None for what is there and was not compared
        self._closing = threading.Event()

    def files(self) -> list[str]:
        """The names of the files at the URI.

        Raises:
            DataError: they cannot be listed.
        """
        try:
            self._fs.invalidate_cache()  # others write there, too
            found = self._fs.find(self._root)
        except FileNotFoundError:
            return []
        except Exception as error:  # the protocols' errors share no base class
            raise DataError(f"{self.uri} cannot be read: {told(error)}") from None
        return sorted(name for path in found if (name := str(path)[len(self._root) :].lstrip("/")))

    def of_the_same_run(self) -> bool:
        """Whether the copy is an older one of this folder; the next update then removes what it has too much."""
        self._copied = {name: None for name in self.files() if name.startswith(("checkpoints/", "client_states/"))}
        mine = self.folder / "environment.json"  # which says when the run was started
        try:
            return mine.is_file() and mine.read_bytes() == self._fs.cat_file(self._at(mine.name))
        except Exception:  # as above
            return False

    def fetch(self, names: tuple[str, ...] | None = None) -> None:
        """Copy a run folder here: all of it, or the files of these names.

        Raises:
            DataError: there is no run folder, or it cannot be read.
        """
        there = self.files()
        if "config.yaml" not in there:
            reason = "it has no config.yaml" if there else "there is nothing"
            raise DataError(f"{self.uri} is no run folder: {reason}; name a folder that `fedray run` has written")
        whole = {name.rpartition("/")[0] for name in there if _STATE.fullmatch(name)}
        for name in there:
            self._copied[name] = None
            folder = name.rpartition("/")[0]
            if (
                (names and name not in names and not _sample(name))
                or _aside(name)
                or (_checkpoint(name) and folder not in whole)
            ):
                continue  # a checkpoint without its state.json is what an interrupted copy has left
            target = self.folder / name
            if not target.resolve().is_relative_to(self.folder.resolve()):
                raise DataError(f"{self.uri} has a file called {name!r}; it is no run folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fs.get_file(self._at(name), str(target))
            except Exception as error:  # as above
                raise DataError(f"{self.uri}/{name} cannot be read: {told(error)}") from None
            self._copied[name] = _stamp(target)

    def update(self) -> None:
        """Make the copy equal to the local folder; the errors are those of the protocol."""
        for _ in range(_PASSES):
            with suppress(_ChangedError):
                return self._update()
        raise OSError("checkpoints come and go faster than they can be listed; raise checkpoint_every")

    def _update(self) -> None:
        files = _files(self.folder)
        changed = [name for name, stamp in files.items() if self._copied.get(name) != stamp]
        with _held(self.folder, changed) as held:
            for name in sorted(changed, key=lambda name: (bool(_STATE.fullmatch(name)), name == "config.yaml", name)):
                self._copied[name] = None
                try:
                    self._put(held[name], self._at(name))
                except Exception as error:  # as above
                    raise OSError(f"{name}: {told(error)}") from None
                self._copied[name] = files[name]
        gone = self._copied.keys() - files.keys()
        for name in sorted(gone, key=lambda name: (not _STATE.fullmatch(name), name)):
            with suppress(FileNotFoundError):
                self._remove(self._at(name))
            del self._copied[name]

    def attempt(self) -> bool:
        """Try some times to bring the copy up to date; says whether it is, and if not, `problem` says why."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                self.update()
            except Exception as error:  # as above
                self.problem = told(error)
            else:
                self.problem = ""
                return True
        return False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Copy what is there now, each new checkpoint while the run goes on, and what is there in the end.

        Raises:
            ConfigError: nothing can be written there; before anything is run.
            FedrayError: the last copy failed, so that only the local folder is complete.
        """
        try:
            self.update()
        except Exception as error:  # as above
            raise ConfigError(f"{self.uri} cannot be written: {told(error)}; choose another --out") from None
        self.lost = True
        thread = threading.Thread(target=self._watch, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            if not self._complete(thread):
                logger.warning("%s", self._lost())
            raise
        if not self._complete(thread):
            raise FedrayError(f"the run is done, but {self._lost()}")

    def _complete(self, thread: threading.Thread) -> bool:
        self._closing.set()
        thread.join()
        self.lost = not self.attempt()
        return not self.lost

    def _watch(self) -> None:
        seen = newest_round(self.folder)
        while not self._closing.wait(POLL):
            newest = newest_round(self.folder)
            if newest != seen:
                seen = newest
                if not self.attempt():
                    logger.warning(
                        "%s could not be brought up to date (%s); it is tried again with the next checkpoint",
                        self.uri,
                        self.problem,
                    )

    def _lost(self) -> str:
        return (
            f"{self.uri} could not be brought up to date ({self.problem}): the whole run folder is only {self.folder}; "
            f"copy it with: fedray fetch {self.folder} {self.uri}"
        )

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _put(self, source: Path, target: str) -> None:
        if not isinstance(self._fs, LocalFileSystem):  # an object is there as a whole or not at all
            self._fs.put_file(str(source), target)
            return
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.part")
        shutil.copyfile(source, aside)
        aside.replace(path)

    def _remove(self, path: str) -> None:
        self._fs.rm_file(path)
        if isinstance(self._fs, LocalFileSystem):
            with suppress(OSError):  # of a folder that is not empty
                Path(path).parent.rmdir()


class _ChangedError(Exception):
    """A file was removed while it was to be copied."""


def told(error: BaseException) -> str:
    """An error of a storage on one line, without the secrets of this process's environment or of a signed address."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = re.sub(r"(://)[^/@\s]+@", r"\1", re.sub(r"(://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text))
    for name, value in os.environ.items():
        if len(value) >= 6 and re.search("KEY|SECRET|TOKEN|PASS|CREDENTIAL|SAS", name.upper()):
            text = text.replace(value, "***")
    return text[:300] if str(error) else type(error).__name__


def _open(uri: str) -> tuple[Any, str]:
    if re.match(r"\w+://[^/]*:[^/]*@", uri):
        raise ConfigError(
            "the URI holds a password; leave credentials to the environment, or to the storage's own files"
        )
    try:
        fs, root = fsspec.url_to_fs(uri)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}.get(uri.partition("://")[0])
        hint = f"pip install 'fedray[{extra}]'" if extra else "install it"
        raise ConfigError(f"{uri} needs a package that is not installed ({told(error)}); {hint}") from None
    except Exception as error:  # as above
        raise ConfigError(f"{uri} cannot be used: {told(error)}; s3://, gs:// and file:// are known") from None
    return fs, str(root)


def _files(folder: Path) -> dict[str, Stamp]:
    """The files of a run folder that is being written, of which each checkpoint is whole.

    Raises:
        _ChangedError: a checkpoint was removed meanwhile.
    """
    # the states first: what they stand for was there before them, and goes after them
    states = {path.relative_to(folder).as_posix(): _stamp(path) for path in folder.glob("checkpoints/*/state.json")}
    found: dict[str, Stamp] = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            name = path.relative_to(folder).as_posix()
            stamp = _stamp(path)
            if stamp and not _aside(name) and not _STATE.fullmatch(name):
                found[name] = stamp
    for name, stamp in states.items():
        if _aside(name):
            continue
        if not stamp or not (folder / name).exists() or f"{Path(name).parent}/server.safetensors" not in found:
            raise _ChangedError
        found[name] = stamp
    return {name: stamp for name, stamp in found.items() if not _checkpoint(name) or _state_of(name) in found}


@contextmanager
def _held(folder: Path, names: list[str]) -> Iterator[dict[str, Path]]:
    """Second names for these files, by which they can be read for a while although the run may remove them.

    Raises:
        _ChangedError: one of them has been removed already.
    """
    aside = folder / ".copied.part"
    shutil.rmtree(aside, ignore_errors=True)
    held: dict[str, Path] = {}
    try:
        for number, name in enumerate(names):
            held[name] = aside / str(number)
            try:
                aside.mkdir(exist_ok=True)
                os.link(folder / name, held[name])
            except FileNotFoundError:
                raise _ChangedError from None
            except OSError:  # a folder that is only read, or without links; then nothing is removed, or a copy fails
                held[name] = folder / name
        yield held
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _checkpoint(name: str) -> bool:
    return name.startswith("checkpoints/")


def _sample(name: str) -> bool:
    return name.startswith("samples/")


def _state_of(name: str) -> str:
    return f"{name.rpartition('/')[0]}/state.json"


def _aside(name: str) -> bool:
    return any(part.startswith(".") and part.endswith(".part") for part in name.split("/"))
