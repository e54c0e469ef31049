"""What is submitted, and the mistakes that are found before anything is; without a cluster."""

import functools
import os
import shlex
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from serial_runs import CONFIG, without_page

from fedray import cli, commands, experiment, runs, submit
from fedray.backends.ray.resources import Resources
from fedray.catalogue import KINDS
from fedray.errors import ConfigError

MINE = """\
from helpers.deep import word

def my_task(seed, /, path: str = 'x', size: int = 3):
    raise ValueError(word)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The user's folder: a configuration, a module, a package that it imports, and things that stay."""
    folder = tmp_path / "digits"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    made = {**CONFIG, "task": {"name": "mine.my_task"}}
    (folder / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(made)))
    (folder / "mine.py").write_text(MINE)
    (folder / "unused.py").write_text("")
    (folder / "helpers" / "__pycache__").mkdir(parents=True)
    (folder / "helpers" / "__init__.py").write_text("")
    (folder / "helpers" / "deep.py").write_text("import lonely\nword = lonely.word\n")
    (folder / "helpers" / "__pycache__" / "deep.pyc").write_bytes(b"0")
    (folder / "lonely.py").write_text("word = 'no data here'\n")
    return folder


@pytest.fixture
def scratch(tmp_path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def prepare(scratch: Path, source: str = "run.yaml", overrides: tuple[str, ...] = (), **options) -> submit.Job:
    return submit.prepare(source, overrides, scratch, **{"out": "s3://bucket/a", **options})


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# what travels


def test_the_configuration_and_the_users_modules_travel_with_what_they_import(here, scratch):
    job = prepare(scratch, overrides=("rounds=7", "backend=ray"))
    assert names(job.folder) == {"config.yaml", "mine.py", "helpers/__init__.py", "helpers/deep.py", "lonely.py"}
    assert list(job.carried[:-1]) == ["config.yaml", "helpers/", "lonely.py", "mine.py"]
    made = OmegaConf.to_container(OmegaConf.load(job.folder / "config.yaml"))
    assert (made["rounds"], made["backend"]) == (7, {"name": "ray", "address": "auto"})
    assert shlex.split(job.command) == ["python", "-m", "fedray", "run", "config.yaml", "--out", "s3://bucket/a"]


def test_fedray_itself_travels_with_its_version_unless_the_cluster_has_it(here, scratch, tmp_path):
    code, version = prepare(scratch).packages
    ours = Path(submit.__file__).parent
    assert {path.name for path in code.glob("*.py")} == {path.name for path in ours.glob("*.py")}
    assert (code / "cli.py").read_bytes() == (ours / "cli.py").read_bytes()
    assert not list(code.rglob("*.pyc"))
    assert f"Version: {submit._version()}\n" in (version / "METADATA").read_text()
    (tmp_path / "other").mkdir()
    job = prepare(tmp_path / "other", installed=True)
    assert job.packages == []
    assert not [text for text in job.carried if "fedray" in text]


def test_a_job_is_called_by_its_configuration(here, scratch):
    job = prepare(scratch)
    assert job.id.startswith("digits-")
    assert job.metadata == {"fedray": submit._version(), "name": "digits", "out": "s3://bucket/a"}


def test_without_a_place_the_run_is_in_the_home_of_the_cluster(here, scratch):
    job = prepare(scratch, out=None)
    assert job.metadata["out"] == f"~/fedray-runs/{job.id}"
    shown = subprocess.run(["sh", "-c", f"echo {job.command}"], env={"HOME": "/there"}, capture_output=True, text=True)
    assert shown.stdout.endswith(f" --out /there/fedray-runs/{job.id}\n")


@pytest.mark.parametrize("name", ["serial", "ray"])
def test_a_backend_without_a_cluster_stays(name, here, scratch):
    job = prepare(scratch, overrides=(f"backend={name}",))
    made = OmegaConf.to_container(OmegaConf.load(job.folder / "config.yaml"))
    assert made["backend"] == ("serial" if name == "serial" else {"name": "ray", "address": "auto"})


def test_a_run_is_resumed_with_the_modules_that_its_configuration_names(here, scratch, tmp_path, monkeypatch):
    with without_page():
        there = runs.run({**CONFIG, "rounds": 1, "backend": "serial"}, out=f"file://{tmp_path}/there").folder
    made = OmegaConf.load(tmp_path / "there" / "config.yaml")
    made.task.model = "mine.my_task"
    OmegaConf.save(made, tmp_path / "there" / "config.yaml")
    job = prepare(scratch, str(there), ("rounds=3",), resume=True)
    assert shlex.split(job.command) == [
        *f"python -m fedray resume {there} rounds=3".split(),
        *("backend.name=ray", "backend.address=auto"),
    ]
    assert "mine.py" in names(job.folder)
    assert job.metadata["out"] == there
    (tmp_path / "other").mkdir()
    serial = prepare(tmp_path / "other", "/of/the/cluster", ("backend=serial",), resume=True)
    assert shlex.split(serial.command) == ["python", "-m", "fedray", "resume", "/of/the/cluster", "backend=serial"]


def test_secrets_are_taken_from_the_environment_and_stand_nowhere_else(here, scratch, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hush-hush-hush")
    job = prepare(scratch, env=["MY_TOKEN"])
    assert job.env == {"MY_TOKEN": "hush-hush-hush"}
    texts = [job.command, *job.carried, *job.metadata.values(), job.id]
    assert "hush" not in " ".join(texts)
    assert not [path for path in scratch.rglob("*") if path.is_file() and b"hush-hush-hush" in path.read_bytes()]


# mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("submit nothing.yaml", "there is no configuration 'nothing.yaml'"),
        ("submit run.yaml rouns=3", "the configuration has no option 'rouns'; did you mean 'rounds'?"),
        ("submit run.yaml rounds=0", "rounds is 0; it must be >= 1"),
        ("submit run.yaml task.size=big", "task.size is 'big'; it must be a whole number"),
        ("submit run.yaml task.name=mine.nothing", "but mine has no nothing; known: my_task, word"),
        ("submit run.yaml algorithm.local_lr=-1", "algorithm.local_lr is -1"),
        ("submit run.yaml backend.num_cpus=0", "backend.num_cpus is 0"),
        ("submit run.yaml backend.address=head:6379", "backend.address is 'head:6379', and a job runs on the cluster"),
        ("submit run.yaml task.path=helpers", "task.path is 'helpers', which is in this folder and does not travel"),
        ("submit run.yaml --check-data", "task: no data here"),
        ("submit run.yaml --out runs/a", "--out is 'runs/a', and a job's own folder is removed when it ends; give an"),
        ("submit run.yaml --env NOT_SET", "--env NOT_SET: there is no such variable in the environment; export"),
        ("submit run.yaml --env MY_TOKEN=hush-hush", "--env takes the name of a variable, for values on a command"),
        ("submit run.yaml --out s3://hush-hush/a --env MY_TOKEN", "the value of MY_TOKEN stands in the configuration"),
        ("submit run.yaml --label gpu", "--label gpu is not key=value; for example --label"),
        ("submit runs/a --resume", "the run is 'runs/a', and a job's own folder is removed when it ends; give an"),
        ("submit /a seed=3 --resume", "the override 'seed=3' would make it another run"),
        ("submit memory://none --resume", "memory://none is no run folder: there is nothing"),
        ("submit run.yaml", "no cluster is named; give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS"),
        ("jobs", "no cluster is named; give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS"),
        ("jobs status", "which job? fedray jobs status ID; `fedray jobs` lists them"),
        ("jobs nonsense", "invalid choice: 'nonsense'"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(arguments, expected, here, monkeypatch, capsys):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MY_TOKEN", "hush-hush")
    backend = ["backend=ray"] if arguments.startswith("submit run.yaml") else []
    assert cli.main([*arguments.split(), *backend]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.startswith("fedray: ")
    assert message.count("\n") == 1
    assert "hush-hush" not in message


def test_what_is_more_than_ray_takes_is_refused_before_it_is_copied(here, scratch):
    with (here / "helpers" / "large.bin").open("wb") as file:
        file.truncate(submit.LIMIT)
    expected = r"512 MiB would travel with the job, of which helpers 512 MiB; Ray takes 512 MiB: move its data out"
    with pytest.raises(ConfigError, match=expected):
        prepare(scratch)
    assert names(scratch) == {"job/config.yaml"}


def test_a_cluster_that_is_not_there_is_one_line(here, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert cli.main(["jobs", "--address", address]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"fedray: there is no Ray cluster at {address} (")
    assert "is its dashboard running, and within reach?" in message
    assert message.count("\n") == 1


# a configuration is checked without its data


@pytest.mark.parametrize("name", runs.shipped())
def test_every_shipped_experiment_passes_the_check_without_its_data(name, here):
    path = runs.find(name)
    values = submit.config.read(path)
    experiment.check(values)


def test_the_check_reads_no_data_and_builds_no_model(monkeypatch):
    called: list[str] = []
    for kind in ("datasets", "models", "tasks"):
        registry = submit.config.catalogue.components(kind)
        for name in registry:
            monkeypatch.setitem(registry, name, spied(registry[name], called))
    experiment.check(CONFIG)
    assert called == []
    experiment.plan(CONFIG)
    assert "digits" in called
    assert set(KINDS) > {"datasets", "models", "tasks"}


def spied(function, called):
    @functools.wraps(function)
    def call(*arguments, **options):
        called.append(function.__name__)
        return function(*arguments, **options)

    return call


# what a cluster has for a run


def test_workers_are_as_many_as_the_cluster_has_room_for_beside_others():
    cluster = [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}]
    assert Resources(num_gpus=0).resolve(cluster, 20, free={"CPU": 7}).num_workers == 7
    assert Resources().resolve(cluster, 20, free={"CPU": 8, "GPU": 1}).num_workers == 1
    assert Resources(num_gpus=0).resolve(cluster, 20, free={}).num_workers == 1  # and waits
    assert Resources(num_gpus=0, num_workers=8).resolve(cluster, 20, free={"CPU": 1}).num_workers == 8


def test_a_token_in_the_environment_turns_token_authentication_on(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    monkeypatch.setattr("fedray.backends.ray.jobs.Jobs", lambda address: SimpleNamespace(address=address))
    assert commands._jobs("http://host").address == "http://host"
    assert os.environ["RAY_AUTH_MODE"] == "token"
