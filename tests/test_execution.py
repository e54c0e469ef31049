"""How clients are computed: compiled steps, memory formats, and what is refused."""

import copy
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from needs import needs_compiler
from problems import PROBLEMS, Exam, assert_same_bits, train
from torch import nn

from fedray import exact, runs
from fedray.aggregators import mean
from fedray.algorithm import Client, ClientResult
from fedray.backends import worker
from fedray.backends.ray.environment import prepare
from fedray.backends.serial import SerialBackend
from fedray.channels_last import laid_out, select
from fedray.errors import ConfigError, FedrayError
from fedray.execution import Execution
from fedray.experiment import plan
from fedray.groups import Group, member
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.models.classifier import Classifier
from fedray.trees import flatten

COMPILED = Execution(group=1, compile=True)


@needs_compiler
@pytest.mark.parametrize("size", [4, 64])  # batches that are not full, at the end or always
@pytest.mark.parametrize(
    ("optimizer", "training"),
    [
        ({}, {}),  # the program makes the step
        ({}, {"correction": 0.1, "only": ["head.weight"]}),
        ({"local_momentum": 0.5, "max_grad_norm": 1.0}, {"proximal": 0.1}),
    ],
)
def test_a_compiled_step_computes_what_the_plain_one_does_but_for_rounding(size, optimizer, training):
    task = PROBLEMS["blobs"]()
    plain, compiled = Learner(task, "cpu"), Learner(task, "cpu", COMPILED)
    local = LocalTraining(local_lr=0.2, batch_size=size, local_epochs=2, **optimizer)
    start = plain.params()
    if "correction" in training:
        training = {**training, "correction": {name: torch.full_like(p, 0.1) for name, p in start.items()}}
    for client in map(Client, range(3), range(3)):
        mine, its = (learner.train(start, client, local, **training) for learner in (compiled, plain))
        assert (mine.num_steps, mine.num_examples) == (its.num_steps, its.num_examples)
        assert mine.loss == pytest.approx(its.loss, rel=1e-5)
        for name, p in its.params.items():
            torch.testing.assert_close(mine.params[name], p, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_compiled_or_not_the_number_of_shares_changes_no_bit():
    exam = Exam("fedavg", "blobs")
    states = [
        train(exam.task(), exam.make(), SerialBackend(exam.task(), shares, execution=COMPILED))[-1].state
        for shares in (1, 3)
    ]
    assert_same_bits(*states)


@needs_compiler
def test_a_compiled_steps_dropout_follows_the_clients_seed():
    learner = Learner(PROBLEMS["images"](), "cpu", COMPILED)
    start, local = learner.params(), LocalTraining(local_lr=0.1, batch_size=4)
    first, other, again = (learner.train(start, Client(0, seed), local).params for seed in (1, 2, 1))
    assert_same_bits(first, again)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@needs_compiler
def test_a_compiled_step_reads_frozen_parameters_that_were_replaced():
    plain, compiled = (Learner(PROBLEMS["adapted"](), "cpu", way) for way in (Execution(group=1), COMPILED))
    own = plain.params()
    frozen = {name: p.detach() for name, p in plain.model.named_parameters() if not p.requires_grad and p.dim() == 2}
    elsewhere = {name: torch.empty(p.T.shape).T.copy_(-p) for name, p in frozen.items()}  # and in another layout
    for start in ({**own, **elsewhere}, own):
        mine, its = (learner.train(start, Client(0, 0), LocalTraining(local_lr=0.2)) for learner in (compiled, plain))
        for name, p in its.params.items():
            torch.testing.assert_close(mine.params[name], p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5])  # the program makes the step, or only computes gradients
def test_a_compiled_step_that_computes_something_else_is_found_out(momentum, monkeypatch):
    def miscompiled(program, *_: object, **__: object):
        return lambda *inputs: program(*inputs[:-1], 2 * inputs[-1])  # twice the learning rate, or all weights

    monkeypatch.setattr(torch._inductor, "standalone_compile", miscompiled)
    learner = Learner(PROBLEMS["blobs"](), "cpu", COMPILED)
    start = learner.params()
    with pytest.raises(FedrayError, match="computes something else; set compile=false"):
        learner.train(start, Client(0, 0), LocalTraining(local_momentum=momentum))
    assert_same_bits(learner.params(), start)


def test_without_a_compiler_a_message_says_so(monkeypatch):
    def cannot(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "standalone_compile", cannot)
    learner = Learner(PROBLEMS["blobs"](), "cpu", COMPILED)
    with pytest.raises(
        FedrayError, match=r"cannot be compiled \(no compiler\); set compile=false, or see that there is"
    ):
        learner.train(learner.params(), Client(0, 0), LocalTraining())


TRAINING_IN_A_THREAD = """
import resource, threading, torch
from fedray.backends.worker import keep_freed_memory

def train():
    def step():
        for tensor in [torch.empty(size << 18) for size in (30, 20, 25)]:  # 75 MB in all
            tensor.zero_()

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

keep_freed_memory()
thread = threading.Thread(target=train)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries than glibc are left as they are")
def test_memory_that_a_workers_thread_frees_comes_back_without_page_faults(monkeypatch):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    prepare("local")
    ran = subprocess.run([sys.executable, "-c", TRAINING_IN_A_THREAD], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 50_000  # of 75 MB, forty times, 312,000 pages


def configuration(**values: object) -> dict[str, object]:
    data = {"name": "classification", "data": "digits", "partition": {"name": "iid", "num_clients": 4}, "model": "mlp"}
    return {"task": data, "algorithm": "fedavg", "rounds": 1, "cohort": 2, "backend": "serial", **values}


def test_what_the_rules_choose_is_written_down(tmp_path):
    made = runs.run(configuration(), out=tmp_path / "a")
    kept = runs.config.read(made.folder / "config.yaml")
    assert (kept["group"], kept["compile"], kept["channels_last"]) == (1, False, False)


def test_who_chooses_to_compile_chooses_clients_that_train_one_by_one():
    assert plan(configuration(cohort=4)).experiment.execution.group == 2
    assert plan(configuration(cohort=4, compile=True)).experiment.execution.group == 1


def test_where_the_channels_are_is_up_to_the_device():
    convolution, perceptron = nn.Sequential(nn.Conv2d(1, 4, 3)), nn.Sequential(nn.Linear(3, 2))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    by_rule, mixed = Execution(), Execution(precision="bfloat16")
    assert by_rule.puts_channels_last(convolution, cpu)
    assert mixed.puts_channels_last(convolution, gpu)
    assert not by_rule.puts_channels_last(convolution, gpu)
    assert not mixed.puts_channels_last(perceptron, cpu)
    assert by_rule.with_format(convolution, "cpu", "cuda").channels_last == "auto"
    assert mixed.with_format(convolution, "cpu", "cuda").channels_last is True
    assert Execution(channels_last=True).with_format(perceptron, "cpu", "cuda").channels_last is True


def batch_normed(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, num_classes))


def test_what_cannot_be_compiled_is_refused():
    values = configuration(compile=True)
    values["task"] = {**values["task"], "model": "test_execution.batch_normed", "batch_norm": "average"}
    with pytest.raises(ConfigError, match=r"compile is true.*1 keeps running statistics; set compile=false"):
        plan(values)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rows", [[1, 2], [4]])
def test_rows_of_images_keep_their_format(channels, rows):
    x, rows = torch.rand(5, channels, 6, 7), torch.tensor(rows)
    for each in (x, laid_out(x)):
        found = select(each, rows)
        assert torch.equal(found, x[rows])
        assert found.stride()[1:] == each.stride()[1:]


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2)])
@pytest.mark.parametrize("channels_last", [True, "auto"])
def test_where_the_channels_are_changes_nothing_but_rounding(channels_last, pool):
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), pool, nn.Flatten())
    task = replace(PROBLEMS["images"](), build=lambda: Classifier(copy.deepcopy(convolution), 16, 3))
    plain, other = (Learner(task, "cpu", Execution(1, channels_last=last)) for last in (False, channels_last))
    weight = next(p for p in other.model.parameters() if p.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    mine, its = (learner.train(plain.params(), Client(0, 0), LocalTraining()) for learner in (other, plain))
    for name, p in its.params.items():
        torch.testing.assert_close(mine.params[name], p, rtol=1e-4, atol=1e-6)
        assert mine.params[name].is_contiguous()


def test_mixed_precision_changes_no_more_than_bfloat16_rounds():
    task = PROBLEMS["blobs"]()
    plain, mixed = Learner(task, "cpu"), Learner(task, "cpu", Execution(group=1, precision="bfloat16"))
    local = LocalTraining(local_lr=0.2, batch_size=8)
    start = plain.params()
    its, mine = (learner.train(start, Client(0, 1), local) for learner in (plain, mixed))
    assert all(p.dtype == torch.float32 for p in mine.params.values())
    assert any(not torch.equal(mine.params[name], p) for name, p in its.params.items())
    x, y, z = map(flatten, (start, its.params, mine.params))
    assert (z - y).norm() < 0.02 * (y - x).norm()


def test_a_loss_of_an_algorithm_of_its_own_is_in_mixed_precision_too():
    seen = set()

    def loss(model, batch):
        outputs = model(batch["x"])
        seen.add(outputs.dtype)
        return outputs.square().mean()

    learner = Learner(PROBLEMS["blobs"](), "cpu", Execution(group=1, precision="bfloat16"))
    result = learner.train(learner.params(), Client(0, 1), LocalTraining(batch_size=8), loss=loss)
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in result.params.values())


@pytest.mark.parametrize("group", [1, 4])
def test_in_mixed_precision_the_number_of_shares_changes_no_bit(group):
    exam = Exam("scaffold", "images")
    execution = Execution(group=group, precision="bfloat16")
    states = [
        train(exam.task(), exam.make(), SerialBackend(exam.task(), shares, execution=execution))[-1].state
        for shares in (1, 3)
    ]
    assert_same_bits(*states)


def test_in_mixed_precision_a_group_trains_in_one_call_as_its_members_do():
    task = PROBLEMS["blobs"]()
    learner = Learner(task, "cpu", Execution(group=4, precision="bfloat16"))
    members, start = tuple(Client(k, 1) for k in range(3)), learner.params()
    for momentum in (0.0, 0.5):
        local = LocalTraining(local_lr=0.2, batch_size=8, local_momentum=momentum)
        together = learner.train(start, Group(members, None), local)
        for k, client in enumerate(members):
            alone = learner.train(start, client, local)
            x, y, z = map(flatten, (start, alone.params, member(together.params, k)))
            assert (z - y).norm() < 0.02 * (y - x).norm()


@pytest.mark.parametrize("fails", ["together", "alone"])
def test_who_trains_one_by_one_but_not_together_is_told_of(fails, caplog):
    def update(learner, broadcast, client):
        if fails == "alone" or isinstance(client, Group):
            raise TypeError("not like this")
        return ClientResult({"x": torch.ones(2)}, 1.0)

    job = worker.Job(update, mean(), keeps_state=False, drop_failures=True)
    worker._tell_of_slowness.cache_clear()
    for _ in range(2):
        partial, _, _ = worker.fold(Learner(PROBLEMS["blobs"](), "cpu"), job, {}, [[Client(0, 1), Client(1, 1)]])
    assert len(partial.failures) == (2 if fails == "alone" else 0)
    assert caplog.text.count("set group=1 (TypeError: not like this)") == (0 if fails == "alone" else 1)


def test_what_a_worker_hands_over_is_moved_whole():
    total = exact.add_term(None, {"x": torch.ones(2)}, 1)
    tree = {"sum": total, "pair": ClientResult(torch.ones(2), 1.0), "n": [(1,)]}
    moved = worker._to(tree, torch.device("meta"))
    assert moved["sum"].floats.total.device.type == moved["pair"].update.device.type == "meta"
    assert moved["sum"].layout == total.layout
    assert moved["n"] == [(1,)]
