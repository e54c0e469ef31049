"""What is the same on a GPU, and what only a GPU shows.

``FEDRAY_TEST_GPU=1 pytest tests/test_gpu.py tests/test_laws.py`` examines the laws there, too.
"""

import functools
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from needs import needs_compiler
from problems import (
    BASIC,
    EXAMS,
    GROUPED,
    LOCAL,
    Exam,
    assert_same_bits,
    copy,
    exams,
    images,
    make,
    outcome,
    reference,
    train,
)
from tiny_models import stable_diffusion

from fedray.algorithm import Pool
from fedray.algorithms.fedavg import fedavg
from fedray.backends.serial import SerialBackend
from fedray.execution import Execution
from fedray.learner import Columns, Learner
from fedray.local_training import Gradients
from fedray.privacy import Mechanism, dp_sgd, fedpeft_noise
from fedray.recorded import RecordedStep
from fedray.synthesis.diffusion_models import diffusion
from fedray.synthesis.prompts import template
from fedray.synthesis.requests import of_classes
from fedray.trees import leaves

if not torch.cuda.is_available():
    pytest.skip("there is no GPU, or FEDRAY_TEST_GPU is not 1, without which none is used", allow_module_level=True)

# neither draws on the device, where other numbers come than on a CPU, nor decides by a comparison of rounded numbers
PLAIN = [
    exam
    for exam in [*BASIC, *GROUPED]
    if exam.problem in ("regression", "blobs", "adapted") and not exam.algorithm.startswith("dp_")
]


@exams(PLAIN)
def test_a_gpu_computes_what_a_cpu_does_but_for_rounding(exam: Exam):
    history = train(exam.task(), exam.make(), exam.backend(device="cpu"))
    for here, there in zip(reference(exam)[0], history, strict=True):
        torch.testing.assert_close(copy(here), copy(there.state), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mechanism", [dp_sgd(0.5, 1.0), fedpeft_noise(0.5, 5.0)])
@pytest.mark.parametrize("problem", ["blobs", "images"])  # whose examples' gradients come together, and one by one
def test_noise_is_that_of_a_cpu(mechanism: Mechanism, problem: str):
    task = Exam("dp_fedavg", problem).task()
    states = [
        [r.state.params for r in train(task, make("dp_fedavg", local=LOCAL, privacy=mechanism), backend)]
        for backend in (SerialBackend(task, device="cuda"), SerialBackend(task, device="cpu"))
    ]
    if problem == "blobs":
        torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
    else:  # with dropout, which draws on the device
        assert all(p.isfinite().all() for params in states[0] for p in params.values())


@exams(EXAMS)
def test_what_the_server_holds_is_on_the_cpu(exam: Exam):
    states, _, kept = reference(exam)
    for tree in (*(vars(state) for state in states), kept.committed):
        assert {leaf.device.type for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)} <= {"cpu"}


@exams([*BASIC, Exam("fedavg", "images"), Exam("scaffold", "images"), *GROUPED])
def test_workers_that_share_a_gpu_give_the_bytes_of_one_process(exam: Exam, ray_local: None):
    from fedray.backends.ray.backend import RayBackend
    from fedray.backends.ray.resources import Resources

    states, metrics, _ = reference(exam)
    half = Resources(num_workers=2, num_gpus=0.5, num_cpus=0.5)
    with closing(RayBackend(exam.task(), 7, half, Execution(exam.group))) as backend:
        assert {worker["device"] for worker in backend.probe()} == {"cuda"}
        found, found_metrics, _ = outcome(exam, backend)  # type: ignore[arg-type]
    assert found_metrics == metrics
    assert_same_bits([state.params for state in found], [state.params for state in states])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_compiler)])
def test_every_way_to_compute_comes_to_about_the_same(precision: str, compile: bool):
    exam = Exam("fedavg", "blobs")
    backend = SerialBackend(exam.task(), execution=Execution(1, compile=compile, precision=precision))  # type: ignore[arg-type]
    for here, there in zip(train(exam.task(), exam.make(), backend), reference(exam)[0], strict=True):
        torch.testing.assert_close(here.state.params, there.params, rtol=0.05, atol=0.02)


@exams(BASIC)
def test_recorded_steps_have_the_bits_of_steps(exam: Exam):
    as_it_is = SerialBackend(exam.task(), execution=Execution(1, cuda_graphs=False))
    states, metrics, _ = reference(exam)
    found, found_metrics, _ = outcome(exam, as_it_is)
    assert found_metrics == metrics
    assert_same_bits(found, states)


Loss = Callable[[torch.Tensor], torch.Tensor]


def linear(*more: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), *more).cuda()


def losses(model: torch.nn.Module, loss: Loss, recorded: bool) -> tuple[list[float], int]:
    """The losses of nine batches, and how often they were computed and not replayed."""
    calls = 0

    def compute(batch: Columns) -> tuple[torch.Tensor, Gradients]:
        nonlocal calls
        calls += 1
        found = loss(model(batch["x"]))
        return found.detach(), torch.autograd.grad(found, list(model.parameters()))

    step = RecordedStep(compute, list(model.parameters()), model) if recorded else compute
    draw = torch.Generator().manual_seed(0)
    torch.cuda.manual_seed(0)
    return [step({"x": torch.randn(4, 3, generator=draw).cuda()})[0].item() for _ in range(9)], calls


def test_a_step_that_was_recorded_is_not_computed_again():
    found, calls = losses(linear(), lambda y: y.square().mean(), recorded=True)
    assert calls < 9
    assert found == losses(linear(), lambda y: y.square().mean(), recorded=False)[0]
    assert len(set(found)) == 9


def waits(y: torch.Tensor) -> torch.Tensor:
    return y.mean() * y.detach().abs().mean().item()


@pytest.mark.parametrize(
    ("layers", "loss"),
    [
        ([], waits),
        ([torch.nn.Dropout(0.5)], torch.mean),  # draws
        ([torch.nn.BatchNorm1d(5)], torch.amax),  # writes into what it keeps
    ],
)
def test_what_cannot_be_recorded_is_computed_as_it_is(layers: list[torch.nn.Module], loss: Loss):
    models = linear(*deepcopy(layers)), linear(*deepcopy(layers))
    found, calls = losses(models[0], loss, recorded=True)
    assert calls >= 9
    assert found == losses(models[1], loss, recorded=False)[0]
    assert_same_bits(models[0].state_dict(), models[1].state_dict())


def test_channels_last_is_a_matter_of_rounding():
    task, algorithm = images(), fedavg(local=LOCAL)
    last, first = (
        Learner(task, execution=Execution(1, channels_last=channels_last)) for channels_last in (True, False)
    )
    params = algorithm.init(last.params()).params
    assert last.test(params)["test_loss"] == pytest.approx(first.test(params)["test_loss"], rel=1e-3)


def test_generators_that_share_a_gpu_make_the_samples_of_one(tmp_path: Path, ray_local: None):
    from fedray.backends import on_ray

    generator = diffusion(str(stable_diffusion(tmp_path)), steps=2, size=8, batch_size=2)
    requests = of_classes(template(["cat", "dog"]), [4, 4], 0)
    batches = [requests[start : start + 2] for start in range(0, 8, 2)]
    alone = [generator.load("cuda")(batch) for batch in batches]
    streamed = dict(on_ray(address="auto", num_gpus=0).stream(generator.load, batches, Pool(2, 0.5, 0.5)))
    assert [streamed[number] for number in range(4)] == alone
    assert len({sample for batch in alone for sample in batch}) == 8


def test_a_batch_for_which_there_is_no_memory_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers import StableDiffusionPipeline

    generator = diffusion(str(stable_diffusion(tmp_path)), steps=1, size=8, batch_size=4)
    requests = of_classes(template(["cat"]), [4], 0)
    expected = [generator.load("cuda")([request]) for request in requests]
    run, tried = StableDiffusionPipeline.__call__, []

    @functools.wraps(run)
    def hungry(self: StableDiffusionPipeline, *args: object, prompt: list[str], **options: object) -> object:
        tried.append(len(prompt))
        each = torch.cuda.mem_get_info()[1] // 3  # of all that the device has: three pictures are too many
        taken = [torch.empty(each, dtype=torch.uint8, device="cuda") for _ in prompt]
        del taken
        return run(self, *args, prompt=prompt, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", hungry)
    made = generator.load("cuda")(requests)
    assert len(made) == 4
    assert max(tried) == 4
    assert min(tried) < 4
    assert len(set(made)) == len({sample for [sample] in expected}) == 4
