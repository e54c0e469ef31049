"""Every mistake in a configuration is one line that says what, where and what to do, before anything is made."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fedray import cli, config
from fedray.experiment import plan

YAML = """\
seed: 0
rounds: 5
cohort: 3
task:
  name: classification
  data: {name: digits}
  partition: {name: dirichlet, num_clients: 10, alpha: 0.5}
  model: {name: mlp, hidden: [8]}
algorithm: {name: fedprox, mu: 0.5, local_lr: 0.3, batch_size: 64}
backend: {name: serial, num_shares: 2}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def refused(capsys, tmp_path, *arguments: str) -> str:
    """The one line on stderr of a command that must leave nothing behind."""
    out = tmp_path / "out"
    assert cli.main(["run", *arguments, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert not out.exists(), "nothing is made before everything is checked"
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("fedray: ")
    return captured.err.removeprefix("fedray: ").rstrip()


# each line: what is typed after `fedray run FILE`, and what the message must say
MISTAKES = r"""
rouns=3 | the configuration has no option 'rouns'; did you mean 'rounds'?
task.modle=mlp | task (classification) has no option 'modle'; did you mean 'model'?
task.modle.name=mlp | task (classification) has no option 'modle'; did you mean 'model'?
task.partition.alhpa=1 | task.partition (dirichlet) has no option 'alhpa'; did you mean 'alpha'?
task.data.foo=1 | task.data (digits) has no option 'foo'; known: split_seed, test_fraction
algorithm.nuu=1 | algorithm (fedprox) has no option 'nuu'; known: aggregator, batch_size
algorithm.local=1 | algorithm (fedprox) has no option 'local'; did you mean 'local_lr'?
algorithm.local.local_lr=1 | algorithm (fedprox) has no option 'local'; did you mean 'local_lr'?
backend.num_sharse=1 | backend (serial) has no option 'num_sharse'; did you mean 'num_shares'?
a.b.c=1 | the configuration has no option 'a'; known: algorithm, backend
name=x | the configuration has no option 'name'; known: algorithm, backend
.rounds=1 | the configuration has no option ''; known: algorithm, backend
task..x=1 | task (classification) has no option ''; known: augment, batch_norm, data
rounds=abc | rounds is 'abc'; it must be a whole number
rounds=1.5 | rounds is 1.5; it must be a whole number
rounds=1e1 | rounds is 10.0; it must be a whole number
rounds=true | rounds is true; it must be a whole number
rounds=null | rounds is null; it must be a whole number
rounds= | rounds is null; it must be a whole number
rounds=[1] | rounds is [1]; it must be a whole number
rounds={a: 1} | rounds is {'a': 1}; it must be a whole number
rounds='3' | rounds is '3'; it must be a whole number
rounds.x=1 | rounds is {'x': 1}; it must be a whole number
task.partition.alpha=x | task.partition.alpha is 'x'; it must be a finite number
task.partition.alpha=.nan | task.partition.alpha is nan; it must be a finite number
task.partition.balanced=1 | task.partition.balanced is 1; it must be true or false
task.partition.balanced='yes' | task.partition.balanced is 'yes'; it must be true or false
backend.device=3 | backend.device is 3; it must be text
task.model.hidden=8 | task.model.hidden is 8; it must be a list, such as [8]
task.model.hidden=[8,x] | task.model.hidden[1] is 'x'; it must be a whole number
task.model.hidden.5=8 | the override 'task.model.hidden.5=8' cannot be read: list index out of range
algorithm.local_steps=none | algorithm.local_steps is 'none'; it must be a whole number
algorithm.local_optimizer=adma | algorithm.local_optimizer is 'adma'; did you mean 'adam'?
algorithm.weighting=3 | algorithm.weighting is 3; known: batches, examples, uniform
group=half | group is 'half'; it must be a whole number or auto
backend={name: ray, num_workers: 1.5} | backend.num_workers is 1.5; it must be a whole number or auto
task=3 | task is 3; it must be a mapping with a name, such as {name: classification}
task=[1] | task is [1]; it must be a mapping with a name, such as {name: classification}
task.data=null | task.data is null; it must be a mapping with a name, such as {name: digits}
task.data={digits: 1} | task.data has no name; known: cifar10, described
task.data.name=3 | task.data.name is 3; known: cifar10, described
algorithm.name= | algorithm.name is null; known: centralized
algorithm.aggregator.trim=0.1 | algorithm.aggregator has no name; known: krum, mean
sampler.replace=3 | sampler.replace is 3; it must be true or false
trackers=tensorboard | trackers is 'tensorboard'; it must be a list, such as [tensorboard]
trackers=[3] | trackers[0] is 3; it must be a mapping with a name, such as {name: tensorboard}
algorithm.name=fedporx | algorithm.name is 'fedporx'; did you mean 'fedprox'?
algorithm=fedporx | algorithm.name is 'fedporx'; did you mean 'fedprox'?
task=clasification | task.name is 'clasification'; did you mean 'classification'?
task.data=digit | task.data.name is 'digit'; did you mean 'digits'?
task.partition.name=dirichlt | task.partition.name is 'dirichlt'; did you mean 'dirichlet'?
task.model=mpl | task.model.name is 'mpl'; did you mean 'mlp'?
algorithm.aggregator=krumm | algorithm.aggregator.name is 'krumm'; did you mean 'krum'?
sampler=unifrom | sampler.name is 'unifrom'; did you mean 'uniform'?
backend=seriel | backend.name is 'seriel'; did you mean 'serial'?
trackers=[tensorbord] | trackers[0].name is 'tensorbord'; did you mean 'tensorboard'?
algorithm=no_such.algorithm | algorithm.name is 'no_such.algorithm', which needs the module 'no_such'; run fedray
algorithm=os.getcwdd | algorithm.name is 'os.getcwdd', but os has no getcwdd; did you mean 'getcwd'?
algorithm=os.sep | algorithm.name is 'os.sep', which is a str; it must be a function
algorithm=os.path | algorithm.name is 'os.path', which is a module; it must be a function
algorithm=.x | algorithm.name is '.x'; known: centralized
algorithm=x. | algorithm.name is 'x.'; known: centralized
algorithm=builtins.dict | builtins.dict has no signature to take options from
algorithm=platform.machine | algorithm: platform.machine returned a str; it must return a FederatedAlgorithm
task=platform.machine | task: platform.machine returned a str; it must return a Task
sampler=platform.machine | sampler: platform.machine cannot be called with what fedray supplies
task.data=npz | task.data (npz) lacks path; give task.data.path=...
task=classification | task (classification) lacks data, partition, model; give task.data=...
task.partition=iid | task.partition (iid) lacks num_clients; give task.partition.num_clients=...
rounds=0 | rounds is 0; it must be >= 1
cohort=0 | cohort is 0; it must be >= 1
cohort=11 | cohort is 11; there are only 10 clients
seed=-1 | seed is -1; it must be >= 0
evaluate_every=-1 | evaluate_every is -1; it must be >= 0
checkpoint_every=-1 | checkpoint_every is -1; it must be >= 0
keep_checkpoints=0 | keep_checkpoints is 0; it must be >= 1
group=0 | group is 0; it must be >= 1
task.data.test_fraction=1 | task.data.test_fraction is 1.0; it must be between 0 and 1, both excluded
task.partition.num_clients=0 | task.partition.num_clients is 0; it must be >= 1
task.partition.num_clients=5000 | task.partition.num_clients is 5000; digits has 1438 training examples, enough for 1438
task.partition.alpha=0 | task.partition.alpha is 0.0; it must be > 0
task.partition.alpha=-1 | task.partition.alpha is -1.0; it must be > 0
task.model.hidden=[8,0] | task.model.hidden is [8, 0]; every entry must be >= 1
task.model=lenet | task.model: input_shape is (1, 8, 8); lenet needs images of at least 12 x 12 pixels
algorithm.local_lr=-1 | algorithm.local_lr is -1.0; it must be > 0
algorithm.local_epochs=0 | algorithm.local_epochs is 0; it must be > 0
algorithm.batch_size=0 | algorithm.batch_size is 0; it must be > 0
algorithm.mu=-1 | algorithm.mu is -1.0; it must be >= 0
algorithm={name: scaffold, server_lr: 0} | algorithm.server_lr is 0.0; it must be > 0
algorithm={name: fednova, server_lr: -1} | algorithm.server_lr is -1.0; it must be > 0
algorithm={name: fedadam, server_lr: -1} | algorithm: lr is -1.0; it must be > 0
algorithm={name: fedadam, beta2: 1} | algorithm.beta2 is 1.0; it must be >= 0 and < 1
algorithm={name: feddyn, alpha: 0} | algorithm.alpha is 0.0; it must be > 0
algorithm={name: moon, temperature: 0} | algorithm.temperature is 0.0; it must be > 0
algorithm.aggregator={name: trimmed_mean, trim: 0.5} | algorithm.aggregator.trim is 0.5; it must be at least 0 and
algorithm.local_momentum=1 | algorithm.local_momentum is 1.0; it must be at least 0 and below 1
sampler=availability | sampler.probability is None and path is None; give one of them
sampler={name: availability, probability: 2} | sampler.probability is 2.0; it must be > 0 and <= 1
sampler={name: weighted, path: no.npy} | sampler: no.npy does not exist; give an .npy, .npz, .json or .csv file
backend.num_shares=0 | backend.num_shares is 0; it must be > 0
backend.device=tpuu | backend.device is 'tpuu'; it must be auto, cpu, cuda
backend={name: ray, num_workers: 0} | backend.num_workers is 0; it must be > 0
backend={name: ray, device: tpuu} | backend.device is 'tpuu'; it must be auto, cpu, cuda
backend={name: ray, num_workers: 2, clients_per_worker: 1} | backend.clients_per_worker is 1, num_workers is
task.data={name: mnist, path: no/folder} | task.data: no/folder is not a folder; put train-images-idx3-ubyte[.gz]
task.data={name: npz, path: no.npz} | task.data: no.npz does not exist; give an .npz file
rounds | the override 'rounds' is not key=value; for example rounds=50
=5 | the override '=5' is not key=value; for example rounds=50
rounds=${sede} | rounds cannot be resolved: Interpolation key 'sede' not found; give rounds=...
rounds=${ | the override 'rounds=${' cannot be read: no viable alternative at input '${'
rounds=${oc.env:NO_SUCH_VARIABLE_} | rounds cannot be resolved: KeyError raised while resolving interpolation
rounds=??? | rounds cannot be resolved: Missing mandatory value: rounds; give rounds=...
task={a: [ | the override 'task={a: [' cannot be read: while parsing a flow
"""
TABLE = [tuple(part.strip() for part in line.split(" | ")) for line in MISTAKES.strip().splitlines()]


@pytest.mark.parametrize(("override", "expected"), TABLE, ids=[override for override, _ in TABLE])
def test_a_mistaken_override_is_one_clear_line(file, tmp_path, capsys, override, expected):
    assert expected in refused(capsys, tmp_path, str(file), override)


FILES = [
    ("", "the configuration lacks task, algorithm, rounds, cohort; give task=..."),
    (YAML.replace("rounds: 5\n", ""), "the configuration lacks rounds; give rounds=..."),
    (YAML.replace("algorithm: {name: fedprox, mu", "algorithm: {mu"), "algorithm has no name; known: centralized"),
    (YAML.replace("{name: mlp, hidden: [8]}", "{mlp: {}}"), "task.model has no name; known: audio_conv_rnn"),
    (YAML + "cohrot: 3\n", "the configuration has no option 'cohrot'; did you mean 'cohort'?"),
    (YAML.replace("alpha: 0.5", "alpha: '0.5'"), "task.partition.alpha is '0.5'; it must be a finite number"),
    (YAML.replace("seed: 0", "seed: yes"), "seed is true; it must be a whole number"),
    (YAML.replace("seed: 0", "seed: ${nope}"), "seed cannot be resolved: Interpolation key 'nope' not found"),
    (YAML.replace("seed: 0", "seed: ???"), "seed cannot be resolved: Missing mandatory value: seed; give seed=..."),
    (YAML.replace("seed: 0", "seed: ${"), "cannot be read: no viable alternative at input '${'"),
    (YAML.replace("seed: 0", "1: 0"), "the configuration has no option 1; known: algorithm"),
    (YAML.replace("seed: 0", "seed: !!python/object/apply:os.getcwd []"), "cannot be read: could not determine"),
    (YAML + "seed: 1\n", "cannot be read: while constructing a mapping"),
    ("rounds: [", "cannot be read: while parsing a flow node"),
    ("a: b: c", "cannot be read: mapping values are not allowed in this context"),
    ("\tx: 1", "cannot be read: while scanning"),
    ("- 1\n- 2\n", "holds a list; a configuration is a mapping of keys to values"),
    ("3\n", "cannot be read: Invalid loaded object type: int"),
    ("\0", "cannot be read: unacceptable character"),
]


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_a_mistaken_file_is_one_clear_line(tmp_path, capsys, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    message = refused(capsys, tmp_path, str(path))
    assert expected in message
    assert "cannot be read" not in message or str(path) in message


def test_a_file_that_is_not_text_is_one_clear_line(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert f"{path} cannot be read" in refused(capsys, tmp_path, str(path))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("quikstart", "no such file, and no shipped experiment; did you mean 'quickstart'?"),
        ("no/such.yaml", "there is no configuration 'no/such.yaml': no such file, and no shipped experiment; known: "),
    ],
)
def test_a_configuration_that_does_not_exist_is_one_clear_line(tmp_path, capsys, source, expected):
    assert expected in refused(capsys, tmp_path, source)


def corrupt_npz(path: Path) -> None:
    path.write_bytes(b"PK\3\4" + bytes(40))


def nan_npz(path: Path) -> None:
    np.savez(path, x=np.full((20, 3), np.nan), y=np.arange(20) % 2)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [(corrupt_npz, "is truncated or corrupt"), (nan_npz, "inputs hold values that are not finite")],
)
def test_corrupt_data_is_one_clear_line(file, tmp_path, capsys, spoil, expected):
    path = tmp_path / "data.npz"
    spoil(path)
    message = refused(capsys, tmp_path, str(file), f"task.data={{name: npz, path: {path}}}")
    assert message.startswith("task.data: ")
    assert expected in message
    assert str(path) in message


def test_a_batch_norm_model_is_refused_before_anything_starts(file, tmp_path, capsys):
    message = refused(capsys, tmp_path, str(file), "task.model={name: resnet20, norm: batch}")
    assert "BatchNorm2d" in message
    assert "task.batch_norm=average" in message


def test_an_option_that_is_given_for_the_old_name_is_not_dropped_silently(file, tmp_path, capsys):
    message = refused(capsys, tmp_path, str(file), "algorithm.mu=1", "algorithm.name=fedavg")
    assert "algorithm (fedavg) has no option 'mu'" in message


# the user's own components, by dotted path from the current folder

OWN = """
from dataclasses import dataclass

import numpy as np
import torch

from fedray import Aggregator, FederatedAlgorithm, LocalTraining
from fedray.algorithms import fedavg
from fedray.aggregators import mean
from fedray.data import Dataset, Partition
from fedray.samplers import Selection


def algorithm(*, local: LocalTraining, momentum: float = 0.5, aggregator: Aggregator = mean()) -> FederatedAlgorithm:
    assert momentum == 0.25
    return fedavg(local=local, aggregator=aggregator)


def population_wide(num_clients: int, /, *, local: LocalTraining) -> FederatedAlgorithm:
    assert num_clients == 4
    return fedavg(local=local)


def data(n: int = 40) -> Dataset:
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    columns = {"x": x, "y": (x[:, 0] > 0).astype(np.int64)}
    return Dataset("mine", columns, columns, ("a", "b"), (0.0,), (1.0,))


def partition(data: Dataset, seed: int, /, *, num_clients: int) -> Partition:
    n = len(data.train["y"])
    return Partition(np.arange(n), np.linspace(0, n, num_clients + 1).astype(int))


class Net(torch.nn.Module):
    def __init__(self, input_shape: tuple[int, ...], num_classes: int, /, *, bias: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(input_shape[0], num_classes, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def sampler(population, cohort, rng, round, /, *, first: int = 0) -> Selection:
    return Selection(tuple(range(first, first + cohort)))


def forgot_the_slash(population, cohort, rng, round) -> Selection:
    return Selection((0,))


def takes_too_much(a, b, c, /, *, local: LocalTraining) -> FederatedAlgorithm:
    return fedavg(local=local)


def takes_anything(*args, **options):
    return None
"""

OWN_YAML = """
rounds: 1
cohort: 2
task:
  name: classification
  data: {name: own_parts.data, n: 50}
  partition: {name: own_parts.partition, num_clients: 4}
  model: {name: own_parts.Net, bias: false}
algorithm: {name: own_parts.algorithm, momentum: 0.25, local_lr: 0.5}
sampler: {name: own_parts.sampler, first: 1}
backend: serial
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "own_syntax.py").write_text("def f(:\n")
    (tmp_path / "own_raising.py").write_text("x = 1\nraise RuntimeError('no luck')\n")
    (tmp_path / "own_needing.py").write_text("import surely_not_installed\n")
    (tmp_path / "own.yaml").write_text(OWN_YAML)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_own_components_by_dotted_path_from_the_current_folder(own):
    made = plan(config.read(own / "own.yaml")).experiment
    assert list(made.task.sizes) == [12, 13, 12, 13]
    assert made.task.data.name == "mine"
    assert [name for name, _ in made.task.model().named_parameters()] == ["layer.weight"]
    assert made.sampler(made.population, 2, None, 1).clients == (1, 2)
    assert plan(config.read(own / "own.yaml", ["algorithm=own_parts.population_wide"]))


def test_changing_the_name_to_an_own_component_keeps_what_fits(own):
    (own / "prox.yaml").write_text(YAML)
    values = config.read(own / "prox.yaml", ["algorithm.name=own_parts.population_wide"])
    assert values["algorithm"] == {"name": "own_parts.population_wide", "local_lr": 0.3, "batch_size": 64}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "algorithm=own_partz.algorithm",
            "needs the module 'own_partz'; run fedray in the folder of own_partz.py",
        ),
        ("algorithm=own_parts.algoritm", "but own_parts has no algoritm; did you mean 'algorithm'?"),
        ("algorithm.momentun=1", "algorithm (own_parts.algorithm) has no option 'momentun'; did you mean 'momentum'?"),
        ("algorithm=own_syntax.f", "whose import raises SyntaxError: "),
        ("algorithm=own_raising.f", "whose import raises RuntimeError: no luck ("),
        ("algorithm=own_raising.f", "own_raising.py, line 2)"),
        ("algorithm=own_needing.f", "which needs the module 'surely_not_installed'; install it"),
        ("algorithm=own_parts.takes_too_much", "algorithm: own_parts.takes_too_much cannot be called with what fedray"),
        ("algorithm=own_parts.takes_anything", "returned a NoneType; it must return a FederatedAlgorithm"),
        (
            "sampler=own_parts.forgot_the_slash",
            "lacks population, cohort, rng, round; give sampler.population=... (or",
        ),
        ("task.partition.num_clients=3.5", "task.partition.num_clients is 3.5; it must be a whole number"),
        ("task.data=own_parts.Net", "task.data: own_parts.Net cannot be called with what fedray supplies"),
    ],
)
def test_mistakes_in_own_components_are_one_clear_line(own, capsys, override, expected):
    assert expected in refused(capsys, own, "own.yaml", override)
