"""A compiled training step: one fused program for the loss of a batch and its gradients."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from fedray.errors import FedrayError
from fedray.precision import InBfloat16
from fedray.trees import Params

if TYPE_CHECKING:
    from fedray.learner import Columns, LossFunction, Task

Program = Callable[..., list[torch.Tensor]]


class CompiledStep:
    """Mean loss and gradients of batches of one size, as programs of PyTorch's compiler.

    Smaller batches are filled up with examples that count nothing, so there is one program and its bits do not
    depend on which sizes came first. PyTorch keeps compiled code on disk, for the next process and the next run.

    ``torch.compile`` would look at the whole model again before every step, to see whether its program still holds,
    which takes a twentieth of a small model's step. Here every tensor of the model is an argument of the program,
    and nothing else of a scratch model changes while it trains.

    Args:
        task: Whose loss; a mean over examples that do not know of each other.
        model: A scratch model; its parameters are read at every call.
        params: Those that are trained, by name.
        size: Examples of a batch.
    """

    def __init__(self, task: "Task", model: torch.nn.Module, params: Params, size: int) -> None:
        assert task.losses is not None  # or compiling would have been refused
        self._task, self._model, self._params, self._size = task, model, params, size
        # a scratch model keeps these for good: what they hold changes, as does the storage of frozen ones
        self._held = dict([*model.named_parameters(), *model.named_buffers()])
        self._losses = _Losses(task.losses, model)
        self._programs: dict[tuple[Any, ...], Program] = {}  # by what the tensors look like
        self._weights: dict[int, torch.Tensor] = {}  # of the examples of a batch, by how many count

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a batch, filled up to its size."""
        return rows if len(rows) == self._size else rows[torch.arange(self._size) % len(rows)]

    def __call__(self, batch: "Columns", count: int, lr: torch.Tensor | None = None) -> tuple[torch.Tensor, list[Any]]:
        """The mean loss of the first ``count`` examples of a batch that is filled up, and its gradients.

        Args:
            batch: The batch.
            count: How many of its examples count.
            lr: With a learning rate, steps are made, and there are no gradients (None for each).

        Raises:
            FedrayError: the step cannot be compiled, or not rightly.
        """
        if count not in self._weights:
            device = next(iter(batch.values())).device
            self._weights[count] = torch.arange(self._size, device=device).lt(count) / count
        inputs = [*self._held.values(), *batch.values(), self._weights[count], *([] if lr is None else [lr])]
        looks = tuple((x.shape, x.stride(), x.dtype) for x in inputs)  # a learning rate makes it longer
        if looks not in self._programs:
            program = _compiled(self._program(list(batch)), inputs)
            self._check(program, inputs, {name: column[:count] for name, column in batch.items()}, lr)
            self._programs[looks] = program
        with torch.no_grad():
            loss, *gradients = self._programs[looks](*inputs)
        return loss, gradients if lr is None else [None] * len(self._params)

    def _program(self, columns: list[str]) -> Program:
        """A function of the model's tensors, a batch's columns, its weights and, if steps are made, a learning rate."""

        def program(*inputs: torch.Tensor) -> list[torch.Tensor]:
            held, rest = dict(zip(self._held, inputs, strict=False)), inputs[len(self._held) :]
            batch, weights, *lr = dict(zip(columns, rest, strict=False)), *rest[len(columns) :]
            trained = {name: held[name].detach().requires_grad_() for name in self._params}
            tensors = {f"model.{name}": x for name, x in {**held, **trained}.items()}
            with torch.enable_grad():
                loss = functional_call(self._losses, tensors, (batch, weights))
                gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
            if not lr:
                return [loss.detach(), *gradients]
            for name, gradient in zip(trained, gradients, strict=True):
                held[name].sub_(lr[0] * gradient)
            return [loss.detach()]

        return program

    def _check(self, program: Program, inputs: list[torch.Tensor], batch: "Columns", lr: torch.Tensor | None) -> None:
        """Compare with what the model itself computes, if it draws no random numbers."""
        if any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in self._model.modules()):
            return
        params = list(self._params.values())
        expected = self._task.loss(self._model, batch)
        plain = [expected.detach(), *torch.autograd.grad(expected, params, materialize_grads=True)]
        with torch.no_grad():
            copies = {id(p): p.clone() for p in params}
            loss, *gradients = program(*(copies.get(id(x), x) for x in inputs))
            if lr is not None:
                gradients = [(p - copies[id(p)]) / lr for p in params]
            rounding = [0.0, *(0.0 if lr is None else 1e-6 * p.norm() / lr for p in params)]
            tolerance = 0.1 if isinstance(self._task, InBfloat16) else 0.01
            whole = torch.stack([each.norm() for each in plain]).norm()  # a bias may have a gradient of rounding alone
            off = [
                (a - b).norm() > tolerance * (b.norm() + 0.1 * whole) + c
                for a, b, c in zip([loss, *gradients], plain, rounding, strict=True)
            ]
        if any(off):
            raise FedrayError("compiled, this model's training step computes something else; set compile=false")


def _compiled(program: Program, inputs: list[Any]) -> Program:
    """A program for inputs that look like these.

    Raises:
        FedrayError: there is none.
    """
    import torch._inductor  # takes seconds
    from torch.fx.experimental.proxy_tensor import make_fx

    # on a CPU all of it is C++, since a small model's step is short beside what calls from Python take
    options = {"config_patches": {"cpp_wrapper": inputs[0].device.type == "cpu"}}
    try:
        with torch.no_grad():
            graph = make_fx(program, tracing_mode="fake")(*inputs)
            found: Program = torch._inductor.standalone_compile(
                graph, inputs, dynamic_shapes="from_example_inputs", options=options
            )
    except Exception as error:
        raise FedrayError(
            f"this model's training step cannot be compiled ({' '.join(str(error).split())[:300]}); "
            "set compile=false, or see that there is a C++ compiler (g++ or clang++)"
        ) from error
    return found


class _Losses(torch.nn.Module):
    def __init__(self, losses: "LossFunction", model: torch.nn.Module) -> None:
        super().__init__()
        self.losses, self.model = losses, model

    def forward(self, batch: "Columns", weights: torch.Tensor) -> torch.Tensor:
        return (self.losses(self.model, batch).view(len(weights), -1).mean(1) * weights).sum()
