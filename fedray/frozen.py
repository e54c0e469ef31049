"""Activations of a frozen backbone, computed once an example: training starts where something trained begins."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedray.sharing import once

if TYPE_CHECKING:
    from fedray.learner import Columns, Task

_ROOM = 1 << 30  # bytes of activations that are kept; whoever was met longest ago makes room
_BLOCK = 256  # examples that pass the backbone at a time
_PASSED = "passed"  # a column of those that have
_SAME_IN_TRAINING = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.Identity, nn.Flatten, nn.ReLU, nn.GELU)

Rest = Callable[[nn.Module], nn.Module]  # a model to what of it comes after the activations


def past_frozen(task: "Task", model: nn.Module) -> "tuple[Task, nn.Module]":
    """A task and its model, or, where the model's first part is frozen, the same from there on, with activations for x.

    That needs a model that is ``head(features(x))``, a first part that is no different in training than in evaluation,
    and examples that are not augmented. The parameters keep their names.
    """
    if [name for name, _ in model.named_children()] != ["features", "head"] or task.augments:
        return task, model
    if all(p.requires_grad for p in model.get_submodule("features").parameters()):  # as of most models
        return task, model
    device = next(model.parameters()).device
    with torch.no_grad():
        x = task.prepare({n: column.to(device) for n, column in task.test_examples(0, 1).items()}, None)["x"]
    found = _parts(model.train(), x)
    if found is None:
        return task, model
    first, rest = found
    on_activations = OnActivations(task, first.eval(), rest, device)
    left = on_activations.model().to(device).eval()
    with torch.no_grad():  # a trial: whether the model is what its parts say
        same = torch.equal(model.eval()(x), left(first(x)))
    return (on_activations, left) if same else (task, model)


def _parts(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Rest] | None:
    """What is frozen from the input on, and what comes after it; None if there is nothing, or not always the same."""
    features: Any = model.get_submodule("features")
    if not any(p.requires_grad for p in features.parameters()):
        return (features, lambda whole: Head(whole.get_submodule("head"))) if _is_fixed(features, []) else None
    from fedray.peft.parts import Tuned, blocks_of  # not for models that are trained as a whole
    from fedray.peft.prefix import Prefix, cut, fixed_blocks

    if not isinstance(features, Tuned):
        return None
    count = fixed_blocks(features, x)
    if count == 0 or not _is_fixed(features.trunk, blocks_of(features.trunk)[count:]):
        return None

    def rest(whole: Any) -> nn.Module:
        cut(whole.features, count)
        return whole

    return Prefix(features, count), rest


class Head(nn.Module):
    """A model's head, under its name in the model.

    Args:
        head: Representations to outputs.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = nn.Identity(), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of representations (N, d)."""
        return self.head(x)


class OnActivations:
    """A task whose inputs have passed the frozen part of its model; all else is the task's own.

    Activations are computed when a client is met for the first time, in blocks of a fixed size, so that their bits
    depend on nothing else.

    Args:
        task: The task.
        first: The frozen part, in evaluation mode.
        rest: The task's model to the part that comes after it.
        device: Where ``first`` is, and activations are to be.
    """

    def __init__(self, task: "Task", first: nn.Module, rest: Rest, device: torch.device) -> None:
        self._task, self._first, self._rest, self._device = task, first, rest, device
        self._known = once("activations", device, _Known, of=task)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def model(self) -> nn.Module:
        """The part after the frozen one, with its initial parameters."""
        return self._rest(self._task.model())

    def examples(self, client: int) -> "Columns":
        """The training examples of one client, with activations for ``x``."""
        return self._known.get(client) or self._keep(client, self._task.examples(client))

    def test_examples(self, start: int, stop: int) -> "Columns":
        """A slice of the test examples, with activations for ``x``."""
        return self._known.get((start, stop)) or self._keep((start, stop), self._task.test_examples(start, stop))

    def prepare(self, examples: "Columns", generator: torch.Generator | None) -> "Columns":
        """Our own examples as they are; those from elsewhere, such as synthetic ones, pass the frozen part first."""
        return examples if _PASSED in examples else self._passed(examples)

    def _passed(self, examples: "Columns") -> "Columns":
        blocks = []
        with torch.no_grad():
            for start in range(0, len(examples["x"]), _BLOCK):
                block = {name: column[start : start + _BLOCK].to(self._device) for name, column in examples.items()}
                blocks.append(self._first(self._task.prepare(block, None)["x"]))
        moved = {name: column.to(self._device) for name, column in examples.items() if name != "x"}
        passed = torch.ones(len(examples["x"]), dtype=torch.bool, device=self._device)
        return {**moved, "x": torch.cat(blocks), _PASSED: passed}

    def _keep(self, key: Any, examples: "Columns") -> "Columns":
        return self._known.keep(key, self._passed(examples))


class _Known:
    """Activations of a task's examples by whose they are; whoever was met longest ago makes room."""

    def __init__(self) -> None:
        self._columns: OrderedDict[Any, Columns] = OrderedDict()
        self._size = 0

    def get(self, key: Any) -> "Columns | None":
        return self._columns.get(key)

    def keep(self, key: Any, columns: "Columns") -> "Columns":
        self._columns[key] = columns
        self._size += columns["x"].nbytes
        while self._size > _ROOM and len(self._columns) > 1:
            self._size -= self._columns.popitem(last=False)[1]["x"].nbytes
        return columns


def _is_fixed(part: nn.Module, without: Iterable[nn.Module]) -> bool:
    """Whether a module computes the same in training as in evaluation, but for some modules in it."""
    others = {module for each in without for module in each.modules()}
    leaves = [module for module in part.modules() if not list(module.children()) and module not in others]
    return all(not module.training or isinstance(module, _SAME_IN_TRAINING) for module in leaves)
