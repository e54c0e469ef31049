"""Run folders at URIs: whatever is interrupted, what is there can be resumed, and comes to the same bytes."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import _registry
from serial_runs import CONFIG, model, without_page

import fedray
from fedray import checkpoint, cli, runs, storage
from fedray.errors import ConfigError, DataError, FedrayError
from fedray.report import read_metrics
from fedray.storage import Mirror

SMALL = {**CONFIG, "rounds": 4, "checkpoint_every": 1, "keep_checkpoints": 1}
DEADLINE = 120


class Killed(BaseException):
    """So that nobody catches it."""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No pauses between attempts, no page, nothing left in memory, and scratch folders where the test's are."""
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path_factory.mktemp("scratch")))
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    with without_page():
        yield
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in an ordinary folder."""
    with without_page():
        return runs.run(SMALL, out=tmp_path_factory.mktemp("local") / "run").folder


@pytest.fixture(params=["memory", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://runs/a" if request.param == "memory" else f"file://{tmp_path}/remote/a"


def contents(uri: str) -> dict[str, bytes]:
    """The files at a URI."""
    fs, root = fsspec.url_to_fs(uri)
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def lines(data: bytes) -> int:
    return len(data.decode().splitlines())


@contextlib.contextmanager
def right_after_each_checkpoint() -> Iterator[None]:
    """Copy in the thread that writes checkpoints, instead of beside it: always the same order of events."""
    mirrors: list[Mirror] = []
    made, write = Mirror.__init__, checkpoint.write

    def remember(self: Mirror, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        mirrors.append(self)

    def write_and_copy(*arguments: Any) -> None:
        write(*arguments)
        mirrors[-1].update()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "__init__", remember)
        patch.setattr(Mirror, "_watch", lambda self: None)
        patch.setattr(checkpoint, "write", write_and_copy)
        yield


@contextlib.contextmanager
def dying(after: int) -> Iterator[Callable[[], int]]:
    """Nothing is copied or removed any more after so many times; what was in hand is left half done."""
    put, remove, count = Mirror._put, Mirror._remove, itertools.count()
    died = 0

    def alive() -> bool:
        nonlocal died
        died += (died > 0) or (next(count) >= after)
        return not died

    def dying_put(self: Mirror, source: Path, target: str) -> None:
        if alive():
            return put(self, source, target)
        if died == 1 and self.uri.startswith("file://"):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).with_name(f".{Path(target).name}.part").write_bytes(source.read_bytes()[:-1])
        raise Killed

    def dying_remove(self: Mirror, path: str) -> None:
        if not alive():
            raise Killed
        remove(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "_put", dying_put)
        patch.setattr(Mirror, "_remove", dying_remove)
        yield lambda: died


# what is there in the end


def test_a_run_at_a_uri_leaves_there_what_a_local_one_leaves(uri, local, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    done = runs.run(SMALL, out=uri)
    found = contents(uri)
    assert found.keys() == names(local)
    assert found["model.safetensors"] == model(local)
    assert (done.folder, done.final["test_accuracy"]) == (uri, runs.Run(local, True).final["test_accuracy"])
    assert not list(tmp_path.glob("fedray-*")), "the scratch folder stays"


def test_more_rounds_later_equal_more_rounds_at_once(uri, local):
    runs.run({**SMALL, "rounds": 2}, out=uri)
    assert runs.resume(uri, ["rounds=4"]).finished
    assert contents(uri)["model.safetensors"] == model(local)
    assert contents(uri).keys() == names(local)
    with pytest.raises(ConfigError, match=rf"rounds is 3; {uri} has already done 4"):
        runs.resume(uri, ["rounds=3"])


# interruptions


def test_killed_between_any_two_copies_a_run_resumes_to_the_same_bytes(uri, local, tmp_path):
    begun = None
    for after in itertools.count():
        here = f"{uri}-{after}"
        with right_after_each_checkpoint(), dying(after) as died, contextlib.suppress(Killed):
            runs.run(SMALL, out=here)
        if not died():
            break
        if "config.yaml" not in contents(here):
            assert begun is None, "what could be resumed no longer can"
            with pytest.raises(DataError, match="is no run folder"):
                runs.resume(here)
            continue
        begun = after if begun is None else begun
        found = checkpoint_rounds(here)
        assert runs.resume(here).finished
        assert contents(here)["model.safetensors"] == model(local), f"after {after}, from {found}"
        left = contents(here).keys() - names(local)  # of a run that had nothing left to do but its last files
        assert left == set() or found[-1] == SMALL["rounds"]
        assert names(local) <= contents(here).keys()
    assert begun is not None
    assert after > 20, "too few copies to have been between any two"


def checkpoint_rounds(uri: str) -> list[int]:
    return sorted(int(name.split("/")[1]) for name in contents(uri) if name.endswith("/state.json"))


def test_the_newest_checkpoint_that_is_there_as_a_whole_is_gone_on_from(uri, local, caplog):
    """Of an interrupted copy, files of a newer one may be there: they are no damaged checkpoint."""
    with right_after_each_checkpoint(), dying(after=26), contextlib.suppress(Killed):
        runs.run(SMALL, out=uri)
    fs, root = fsspec.url_to_fs(uri)
    newest = max(checkpoint_rounds(uri))
    fs.makedirs(f"{root}/checkpoints/{newest + 1:06d}", exist_ok=True)
    fs.pipe_file(f"{root}/checkpoints/{newest + 1:06d}/server.safetensors", b"the begin")
    assert runs.resume(uri).finished
    assert "damaged" not in caplog.text
    assert contents(uri)["model.safetensors"] == model(local)


def command(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fedray", *arguments],
        env={**os.environ, "TMPDIR": str(storage.tempfile.gettempdir())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_process_killed_for_good_leaves_a_run_that_resumes(tmp_path):
    options = ["algorithm.name=scaffold", "task.partition.num_clients=10", "cohort=4", "backend.name=serial"]
    there = tmp_path / "remote"
    process = command("run", "quickstart", *options, "rounds=2000", "checkpoint_every=2", "--out", f"file://{there}")
    deadline = time.monotonic() + DEADLINE
    while checkpoint.newest_round(there) < 2:
        assert time.monotonic() < deadline, "no checkpoint is copied"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
            pytest.fail(f"the run ended: {process.stdout.read()}")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    done = checkpoint.newest_round(there)
    assert 2 <= done < 2000
    assert runs.resume(f"file://{there}", [f"rounds={done + 2}"]).finished
    fedray.run("quickstart", [*options, f"rounds={done + 2}"], tmp_path / "unbroken")
    assert model(there) == model(tmp_path / "unbroken")
    assert [record["round"] for record in read_metrics(there / "metrics.jsonl")] == list(range(done + 3))


def test_an_interrupted_run_names_its_uri(uri, monkeypatch):
    monkeypatch.setattr(runs, "_signals", lambda place: contextlib.nullcontext(Stop(3)))
    with pytest.raises(runs.Interrupted, match=f"go on with: fedray resume {uri}"):
        runs.run(SMALL, out=uri)
    assert checkpoint_rounds(uri) == [3]


class Stop:
    """Says stop once it has been asked often enough."""

    def __init__(self, after: int) -> None:
        self.asked = itertools.count()
        self.after = after

    def is_set(self) -> bool:
        return next(self.asked) >= self.after


# a storage that fails


@contextlib.contextmanager
def failing(wrong: Callable[[int, str], bool]) -> Iterator[None]:
    """Copies fail if ``wrong(number of the copy, where to)``."""
    put, count = Mirror._put, itertools.count(1)

    def failing_put(self: Mirror, source: Path, target: str) -> None:
        if wrong(next(count), target):
            raise ConnectionError("the line is dead")
        put(self, source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "_put", failing_put)
        yield


@contextlib.contextmanager
def attempted_after_each_checkpoint() -> Iterator[None]:
    """The mirror's own way to go on, at a moment that is always the same."""
    watch, write = Mirror._watch, checkpoint.write
    mirrors: list[Mirror] = []

    def write_and_watch(*arguments: Any) -> None:
        before = checkpoint.newest_round(mirrors[-1].folder)
        write(*arguments)
        looks = iter([before])
        with pytest.MonkeyPatch.context() as patch:
            waits = iter([False, True])
            patch.setattr(mirrors[-1], "_closing", type("Closing", (), {"wait": lambda _, __: next(waits)})())
            newest = checkpoint.newest_round
            patch.setattr(storage, "newest_round", lambda folder: next(looks, None) or newest(folder))
            watch(mirrors[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "_watch", lambda self: mirrors.append(self))
        patch.setattr(checkpoint, "write", write_and_watch)
        yield


def test_a_failure_that_passes_is_not_worth_a_word(uri, local, caplog):
    with failing(lambda number, _: number in (7, 8, 30)), attempted_after_each_checkpoint():
        runs.run(SMALL, out=uri)
    assert contents(uri)["model.safetensors"] == model(local)
    assert caplog.text == ""


def test_a_failure_that_stays_warns_with_what_and_where_and_the_next_checkpoint_tries_again(uri, local, caplog):
    with failing(lambda _, target: "000002" in target), attempted_after_each_checkpoint():
        runs.run(SMALL, out=uri)
    [warning] = [message for message in caplog.messages if "brought up to date" in message]
    assert warning == (
        f"{uri} could not be brought up to date (OSError: checkpoints/000002/server.safetensors: ConnectionError: "
        "the line is dead); it is tried again with the next checkpoint"
    )
    assert contents(uri)["model.safetensors"] == model(local)


def test_a_run_whose_last_copy_fails_ends_with_exit_1_and_says_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    uri = f"file://{tmp_path}/remote"
    arguments = ["run", "quickstart", "rounds=2", "backend.name=serial", "--out", uri]
    with failing(lambda _, target: target.endswith("model.safetensors")):
        assert cli.main(arguments) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    [folder] = tmp_path.glob("fedray-*/remote")
    assert message == (
        f"fedray: the run is done, but {uri} could not be brought up to date (OSError: model.safetensors: "
        f"ConnectionError: the line is dead): the whole run folder is only {folder}; "
        f"copy it with: fedray fetch {folder} {uri}"
    )
    assert cli.main(message.partition("fedray fetch")[2].join(["fetch", ""]).split()) == 0
    assert names(tmp_path / "remote") == names(folder)
    assert model(tmp_path / "remote") == model(folder)


def test_a_client_that_raises_names_the_uri_and_what_was_done_is_there(uri, monkeypatch):
    def fail(*_: Any) -> None:
        raise FedrayError("nothing works")

    monkeypatch.setattr("fedray.training.evaluate", fail)
    with pytest.raises(FedrayError, match="nothing works") as raised:
        runs.run(SMALL, out=uri)
    [note] = raised.value.__notes__
    assert note == f"the run is in {uri}; once the cause is mended, go on with: fedray resume {uri}"
    assert "config.yaml" in contents(uri)


# while it is written


@pytest.fixture
def mirror(uri: str, local: Path, tmp_path: Path) -> Mirror:
    shutil.copytree(local, tmp_path / "run")
    return Mirror(uri, tmp_path / "run")


def test_only_what_changed_is_copied(mirror, uri, monkeypatch):
    mirror.update()
    copied: list[str] = []
    put = Mirror._put
    monkeypatch.setattr(Mirror, "_put", lambda self, a, b: (copied.append(Path(b).name), put(self, a, b)))
    with (mirror.folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
    (mirror.folder / "report.html").unlink()
    mirror.update()
    assert copied == ["metrics.jsonl"]
    assert contents(uri).keys() == names(mirror.folder)


def test_the_order_is_data_then_the_configuration_then_states(mirror, monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(Mirror, "_put", lambda self, a, b: order.append(Path(b).name))
    mirror.update()
    assert order[-2:] == ["config.yaml", "state.json"]
    assert len(order) == len(names(mirror.folder))


def next_checkpoint(mirror: Mirror) -> None:
    """What `keep_checkpoints: 1` does: the next one is there, and this one's files are removed."""
    [old] = (mirror.folder / "checkpoints").iterdir()
    shutil.copytree(old, old.with_name("000005"))
    shutil.rmtree(old)
    for path in (mirror.folder / "client_states").iterdir():
        path.unlink()


def test_a_checkpoint_that_is_removed_while_it_is_copied_is_copied_as_a_whole(mirror, uri, monkeypatch):
    before, put, done = names(mirror.folder), Mirror._put, []

    def remove_first(self: Mirror, source: Path, target: str) -> None:
        if not done:
            done.append(next_checkpoint(self))
        put(self, source, target)

    monkeypatch.setattr(Mirror, "_put", remove_first)
    mirror.update()
    assert contents(uri).keys() == before
    assert names(mirror.folder) != before
    mirror.update()
    assert contents(uri).keys() == names(mirror.folder)
    assert checkpoint_rounds(uri) == [5]


@pytest.mark.parametrize("moment", ["walk", "link"])
def test_a_checkpoint_that_is_removed_while_it_is_listed_is_not_copied_in_parts(moment, mirror, uri, monkeypatch):
    done: list[None] = []
    original = getattr(os, moment)

    def remove_first(*arguments: Any) -> Any:
        if not done:
            done.append(next_checkpoint(mirror))
        return original(*arguments)

    monkeypatch.setattr(storage.os, moment, remove_first)
    mirror.update()
    assert done
    assert checkpoint_rounds(uri) == [5]
    assert contents(uri).keys() == names(mirror.folder)


def test_a_folder_without_links_is_copied_all_the_same(mirror, uri, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(storage.os, "link", refuse)
    mirror.update()
    assert contents(uri).keys() == names(mirror.folder)


def test_files_that_come_and_go_without_end_are_an_error_that_says_what_to_change(mirror, monkeypatch):
    def vanish(folder: Path) -> dict[str, Any]:
        raise storage._ChangedError

    monkeypatch.setattr(storage, "_files", vanish)
    assert not mirror.attempt()
    assert "raise checkpoint_every" in mirror.problem


def test_a_checkpoint_is_listed_as_a_whole_or_not_at_all(mirror):
    folder = mirror.folder / "checkpoints" / "000009"
    folder.mkdir()
    (folder / "server.safetensors").write_bytes(b"no state yet")
    (mirror.folder / "checkpoints" / ".000010.part").mkdir()
    (mirror.folder / "checkpoints" / ".000010.part" / "state.json").write_text("{}")
    assert {name for name in storage._files(mirror.folder) if name.startswith("checkpoints")} == {
        "checkpoints/000004/server.safetensors",
        "checkpoints/000004/state.json",
    }


# copies, and reports


def test_a_run_is_fetched_and_an_older_copy_of_it_is_brought_up_to_date(uri, local, tmp_path, capsys):
    runs.run({**SMALL, "rounds": 2}, out=uri)
    assert cli.main(["fetch", uri, str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out == f"copied to {tmp_path / 'here'}\n"
    runs.resume(uri, ["rounds=4"])
    assert cli.main(["fetch", uri, str(tmp_path / "here")]) == 0
    assert names(tmp_path / "here") == names(local)
    assert model(tmp_path / "here") == model(local)
    assert cli.main(["fetch", str(local), str(tmp_path / "here")]) == 2
    assert "here is not empty, and not of the same run; choose another folder" in capsys.readouterr().err


def test_a_report_reads_runs_at_uris_and_only_their_small_files(uri, local, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    runs.run(SMALL, out=uri)
    read: list[str] = []
    fetch = Mirror.fetch
    monkeypatch.setattr(Mirror, "fetch", lambda self, wanted: (fetch(self, wanted), read.extend(names(self.folder))))
    monkeypatch.setattr("fedray.report.write_report", lambda folders, out, targets: out)
    assert cli.main(["report", uri, str(local)]) == 0
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if line.startswith(("a ", "run "))]) >= 2
    assert "report: report.html" in shown
    assert set(read) == {"config.yaml", "environment.json", "partition.npz", "metrics.jsonl", "evaluation.json"}


def test_samples_of_a_generator_are_among_what_a_report_reads(uri, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("rounds: 2\n")
    checkpoint.write_sheet(tmp_path / "run", 2, b"a picture")
    storage.copy(tmp_path / "run", uri)
    assert storage.read(uri).samples == {2: b"a picture"}


# mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("resume memory://nothing", "memory://nothing is no run folder: there is nothing; name a folder that"),
        ("report memory://nothing", "memory://nothing is no run folder: there is nothing"),
        ("fetch memory://nothing x", "memory://nothing is no run folder: there is nothing"),
        ("run quickstart --out nonsense://a", "nonsense://a cannot be used: ValueError: Protocol not known: nonsense"),
        ("run quickstart --out ftp://me:hush@host/a", "the URI holds a password; leave credentials to the environment"),
        ("run quickstart --out file:///proc/nowhere", "file:///proc/nowhere cannot be written: OSError: "),
        ("sweep quickstart seed=1,2 --out memory://a", "memory://a is no local folder; `fedray fetch` copies"),
        ("export memory://a b", "memory://a is no local folder; `fedray fetch` copies run folders from there"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments.split(), *(["backend.name=serial"] if arguments.startswith("run") else [])]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fedray: ")
    assert expected in message
    assert message.count("\n") == 1
    assert "hush" not in message


def test_a_uri_that_is_not_empty_is_refused_before_anything_is_run(uri):
    runs.run({**SMALL, "rounds": 1}, out=uri)
    before = contents(uri)
    with pytest.raises(ConfigError, match=f"{uri} is not empty; choose another --out, or go on with: fedray resume"):
        runs.run(SMALL, out=uri)
    assert contents(uri) == before


def test_a_storage_whose_package_is_missing_says_which_extra_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # what was imported before
    with pytest.raises(ConfigError, match=r"needs a package that is not installed .*pip install 'fedray\[s3\]'"):
        storage._open("s3://bucket/a")


def test_a_file_that_would_leave_the_folder_is_refused(tmp_path, monkeypatch):
    mirror = Mirror("memory://runs/a", tmp_path / "run")
    monkeypatch.setattr(mirror, "files", lambda: ["config.yaml", "../outside"])
    fsspec.filesystem("memory").pipe_file("/runs/a/config.yaml", b"rounds: 1")
    with pytest.raises(DataError, match=r"has a file called '\.\./outside'; it is no run folder"):
        mirror.fetch()


def test_no_secret_is_told(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("HARMLESS", "plain-text")
    error = OSError("hush-hush did not open https://me:pw@host/a?sig=abc with plain-text")
    assert storage.told(error) == "OSError: *** did not open https://host/a with plain-text"
    assert "hush" in os.environ["AWS_SECRET_ACCESS_KEY"]
