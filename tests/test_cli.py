"""The command line: what it prints, how quickly, and that a mistake is one line and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import fedray
from fedray import cli
from fedray import runs as runs_module
from fedray.catalogue import KINDS, components
from fedray.errors import ClientError, FedrayError

CONFIG = """\
rounds: 2
cohort: 2
task:
  name: classification
  data: digits
  partition: {name: iid, num_clients: 4}
  model: softmax
algorithm: {name: fedavg, batch_size: 64}
backend: serial
"""


@pytest.fixture
def started(monkeypatch) -> list[SimpleNamespace]:
    """What `fedray run` and `fedray resume` would start."""
    calls: list[SimpleNamespace] = []

    def start(*arguments):
        calls.append(SimpleNamespace(arguments=arguments))
        raise KeyboardInterrupt("started")

    monkeypatch.setattr(runs_module, "run", start)
    monkeypatch.setattr(runs_module, "resume", start)
    return calls


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two run folders, made from the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "mine.yaml").write_text(CONFIG)
    for name, seed in (("a", 0), ("b", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs_module, "write_report", lambda _, out: out.write_text("a page"))
            assert cli.main(["run", str(folder / "mine.yaml"), "--out", str(folder / name), f"seed={seed}"]) == 0
    return folder / "a", folder / "b"


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    root = str(Path(fedray.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, **options)


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fedray: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("fedray: ").rstrip("\n")


# help, and what it costs


def test_help_is_quick_for_it_loads_nothing_heavy():
    done = python("-X", "importtime", "-m", "fedray", "--help", timeout=60)
    assert done.returncode == 0
    for command in ("run", "resume", "report", "list", "show"):
        assert f"\n    {command} " in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in loaded
    assert not loaded & {"torch", "ray", "numpy", "omegaconf", "matplotlib", "rich", "sklearn", "pandas", "yaml"}
    assert len(loaded) < 150, sorted(loaded)


def test_importing_the_package_loads_nothing_heavy():
    done = python("-c", "import sys, fedray; print(*sys.modules)", timeout=60)
    assert "fedray" in done.stdout.split()
    assert not {"torch", "ray", "numpy", "omegaconf"} & set(done.stdout.split())


@pytest.mark.parametrize("command", ["run", "resume", "report", "list", "show"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: fedray {command} " in capsys.readouterr().out


# what is typed


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("run", ("quickstart", [], None)),
        ("run quickstart", ("quickstart", [], None)),
        ("run rounds=3", ("quickstart", ["rounds=3"], None)),
        ("run rounds=3 cohort=2", ("quickstart", ["rounds=3", "cohort=2"], None)),
        ("run a.yaml rounds=3 cohort=2", ("a.yaml", ["rounds=3", "cohort=2"], None)),
        ("run a.yaml --out d rounds=3", ("a.yaml", ["rounds=3"], Path("d"))),
        ("run a.yaml rounds=3 --out d", ("a.yaml", ["rounds=3"], Path("d"))),
        ("run a.yaml rounds=3 --out=d cohort=2", ("a.yaml", ["rounds=3", "cohort=2"], Path("d"))),
        ("run --out d a.yaml rounds=3", ("a.yaml", ["rounds=3"], Path("d"))),
        ("run --out d rounds=3", ("quickstart", ["rounds=3"], Path("d"))),
        ("run --out d", ("quickstart", [], Path("d"))),
        ("resume d", (Path("d"), [])),
        ("resume d rounds=3 backend=serial", (Path("d"), ["rounds=3", "backend=serial"])),
    ],
)
def test_options_may_stand_anywhere(started, typed, meant):
    assert cli.main(typed.split()) == 130
    assert started[0].arguments == meant


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", "the following arguments are required: COMMAND; see fedray --help"),
        ("rnu", "invalid choice: 'rnu'"),
        ("--nonsense", "required: COMMAND; see fedray --help"),
        ("run --nonsense", "unrecognized arguments: --nonsense; see fedray run --help"),
        ("run quickstart --out", "argument --out: expected one argument; see fedray run --help"),
        ("resume", "the following arguments are required: RUN; see fedray resume --help"),
        ("resume d --out e", "unrecognized arguments: --out"),
        (
            "resume no/such/run",
            "no/such/run is no run folder: there is no such folder; name a folder that `fedray run` has",
        ),
        ("report", "the following arguments are required: RUN; see fedray report --help"),
        ("report no/such/run", "no/such/run is no run folder: there is no such folder"),
        ("report a --target high", "argument --target: invalid float value: 'high'; see fedray report --help"),
        ("list model", "there is no kind 'model'; did you mean 'models'?"),
        ("list colours", "there is no kind 'colours'; known: aggregators, algorithms"),
        ("list models datasets", "unrecognized arguments: datasets; see fedray list --help"),
        ("show", "the following arguments are required: NAME; see fedray show --help"),
        ("show fedprx", "there is no component 'fedprx'; did you mean 'fedprox'?"),
        (
            "run no/such.yaml",
            "there is no configuration 'no/such.yaml': no such file, and no shipped experiment; known: ",
        ),
        ("run quickstart rounds", "the override 'rounds' is not key=value; for example rounds=50"),
    ],
)
def test_a_mistyped_command_is_one_clear_line(capsys, typed, expected):
    assert cli.main(typed.split()) == 2
    assert expected in one_line(capsys)


def test_a_mistake_ends_a_process_with_2_and_no_traceback():
    done = python("-m", "fedray", "rnu", timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fedray: argument COMMAND: invalid choice: 'rnu'")
    assert done.stderr.count("\n") == 1


# what is raised


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (FedrayError("no luck"), 1, "fedray: no luck\nthe run is in runs/a\n"),
        (
            ClientError("client 3 failed in round 1:\nTraceback"),
            1,
            "fedray: client 3 failed in round 1:\nTraceback\nthe run is in runs/a\n",
        ),
        (KeyboardInterrupt(), 130, "fedray: interrupted\n"),
    ],
)
def test_what_goes_wrong_later_has_its_own_exit_code(monkeypatch, capsys, error, code, printed):
    def fail(*_):
        error.add_note("the run is in runs/a")
        raise error

    monkeypatch.setattr(runs_module, "run", fail)
    assert cli.main(["run"]) == code
    assert capsys.readouterr().err == printed


def test_a_message_of_several_lines_becomes_one(monkeypatch, capsys):
    def fail(*_):
        raise fedray.errors.ConfigError("one\n  two")

    monkeypatch.setattr(runs_module, "run", fail)
    assert cli.main(["run"]) == 2
    assert one_line(capsys) == "one two"


def test_a_client_that_raises_is_named_with_its_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_clumsy.py").write_text(
        "from dataclasses import replace\n"
        "from fedray.aggregators import Aggregator, mean\n"
        "def clumsy() -> Aggregator:\n"
        "    def accumulate(acc, client, result):\n"
        "        raise RuntimeError('oops')\n"
        "    return replace(mean(), accumulate=accumulate)\n"
    )
    (tmp_path / "mine.yaml").write_text(CONFIG)
    assert cli.main(["run", "mine.yaml", "--out", "run", "algorithm.aggregator=own_clumsy.clumsy"]) == 1
    error = capsys.readouterr().err
    assert "failed in round 1" in error
    assert "RuntimeError: oops" in error
    assert error.endswith("the run is in run; once the cause is mended, go on with: fedray resume run\n")


def test_a_cohort_that_is_too_small_for_the_aggregator_is_one_clear_line(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    assert cli.main(["run", str(path), "--out", str(tmp_path / "a"), "algorithm.aggregator=krum"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "fedray: num_byzantine is 1 in a cohort of 2; Krum needs at least 5 clients a round"


def test_a_reader_that_has_seen_enough_is_no_error():
    done = python(
        "-c",
        "import os, sys, fedray.cli as cli\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "cli._list = lambda options: print('x' * 100_000)\n"
        "sys.exit(cli.main(['list']))",
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


# what is printed


def test_a_run_ends_with_its_figures_and_its_page(runs, capsys):
    assert cli.main(["resume", str(runs[0])]) == 0
    last = capsys.readouterr().out.splitlines()
    assert last[0].startswith("accuracy 0.")
    assert "loss " in last[0]
    assert "macro-F1 " in last[0]
    assert last[1] == f"report: {runs[0] / 'report.html'}"


def test_a_report_compares_runs_and_writes_a_page(runs, tmp_path, capsys):
    page = tmp_path / "below" / "page.html"
    arguments = ["report", str(runs[0]), "--out", str(page), "--target", "0.01", str(runs[1]), "--target", "0.99"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"report: {page}\n")
    assert page.read_text(encoding="utf-8").startswith("<!")


def test_a_page_that_cannot_be_written_is_one_clear_line(runs, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sys.modules["fedray.report"], "write_report", full)
    assert cli.main(["report", str(runs[0]), "--out", str(tmp_path / "page.html")]) == 2
    assert (
        capsys.readouterr().err
        == f"fedray: {tmp_path / 'page.html'} cannot be written (Permission denied); choose another --out\n"
    )


def test_list_names_everything_in_one_line_each(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip(":") for line in lines if not line.startswith(" ")] == [*KINDS, "experiments"]
    names = {line.split()[0] for line in lines if line.startswith("  ")}
    assert names >= {name for kind in KINDS for name in components(kind)} | {"quickstart"}
    assert max(map(len, lines)) < 150


@pytest.mark.parametrize("kind", [*KINDS, "experiments"])
def test_list_of_a_kind_names_that_kind_only(kind, capsys):
    assert cli.main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{kind}:"
    assert all(line.startswith("  ") and len(line.split()) > 1 for line in lines[1:])
    if kind != "experiments":
        assert [line.split()[0] for line in lines[1:]] == list(components(kind))


@pytest.mark.parametrize("name", sorted({name for kind in KINDS for name in components(kind)}))
def test_show_prints_every_component(name, capsys):
    assert cli.main(["show", name]) == 0
    assert capsys.readouterr().out.startswith(f"{name} (")


def test_show_prints_the_shared_options_flat_with_types_defaults_and_doc(capsys):
    assert cli.main(["show", "fedavg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fedavg (algorithms): Federated averaging (McMahan et al., 2017)."
    assert lines[1:3] == ["  local_lr             float, default 0.1", "      Learning rate of the clients."]
    shown = [line.split(None, 1) for line in lines[1::2]]
    types = {name: text for name, text in shown}  # noqa: C416
    assert types["local_steps"] == "int or null, default null"
    assert types["local_optimizer"] == "sgd or adam or adamw, default sgd"
    assert types["shuffle"] == "bool, default true"
    assert types["aggregator"].startswith("one of aggregators, default ")
    assert "local" not in types


def test_show_config_prints_the_top_level(capsys):
    assert cli.main(["show", "config"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("config (configuration): ")
    assert "\n  rounds               int, required\n      Rounds of training.\n" in printed
    assert "\n  task                 one of tasks, required\n" in printed
    assert "\n  trackers             list of trackers or null, default null\n" in printed
