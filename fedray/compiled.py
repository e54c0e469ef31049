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
        trained: Its trained parameters by name.
        size: Examples of a batch.
    """

    def __init__(self, task: "Task", model: torch.nn.Module, trained: Params, size: int) -> None:
        assert task.losses is not None  # or compiling would have been refused
        self._task, self._model, self._trained, self._size = task, model, trained, size
        self._losses = _Losses(task.losses, model)
        self._programs: dict[tuple[Any, ...], Program] = {}  # by what the tensors look like
        self._weights: dict[int, torch.Tensor] = {}  # of the examples of a batch, by how many count

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a batch, filled up to its size."""
        return rows if len(rows) == self._size else rows[torch.arange(self._size) % len(rows)]

    def __call__(self, batch: "Columns", count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The mean loss and the gradients, by name, of the first ``count`` examples of a batch that is filled up.

        Raises:
            FedrayError: the step cannot be compiled, or not rightly.
        """
        if count not in self._weights:
            device = next(iter(batch.values())).device
            self._weights[count] = torch.arange(self._size, device=device).lt(count) / count
        held = dict([*self._model.named_parameters(), *self._model.named_buffers()])
        inputs = [*held.values(), *batch.values(), self._weights[count]]
        looks = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        is_new = looks not in self._programs
        if is_new:
            self._programs[looks] = _compiled(self._program(list(held), list(batch)), inputs)
        with torch.no_grad():
            loss, *gradients = self._programs[looks](*inputs)
        if is_new:
            self._check({name: column[:count] for name, column in batch.items()}, [loss, *gradients])
        return loss, dict(zip(self._trained, gradients, strict=True))

    def _program(self, names: list[str], columns: list[str]) -> Program:
        """The loss and the gradients, as a function of the model's tensors, a batch's columns and its weights."""

        def program(*inputs: torch.Tensor) -> list[torch.Tensor]:
            held, (*batch, weights) = dict(zip(names, inputs, strict=False)), inputs[len(names) :]
            trained = {name: held[name].detach().requires_grad_() for name in self._trained}
            tensors = {f"model.{name}": x for name, x in {**held, **trained}.items()}
            with torch.enable_grad():
                loss = functional_call(self._losses, tensors, (dict(zip(columns, batch, strict=True)), weights))
                gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
            return [loss.detach(), *gradients]

        return program

    def _check(self, batch: "Columns", found: list[torch.Tensor]) -> None:
        """Once, compare with what the model itself computes, if it draws no random numbers."""
        model = self._model
        if any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
            return
        loss = self._task.loss(model, batch)
        plain = [loss.detach(), *torch.autograd.grad(loss, list(self._trained.values()), materialize_grads=True)]
        tolerance = 0.1 if isinstance(self._task, InBfloat16) else 0.01
        whole = torch.stack([each.norm() for each in plain]).norm()  # a bias may have a gradient of rounding alone
        off = [(a - b).norm() > tolerance * (b.norm() + 0.1 * whole) for a, b in zip(found, plain, strict=True)]
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
        graph = make_fx(program, tracing_mode="fake")(*inputs)
        with torch.no_grad():
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
