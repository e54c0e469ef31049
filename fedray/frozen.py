"""Features of a frozen backbone, computed once an example: what training a head alone comes down to."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fedray.learner import Columns, Task

_ROOM = 1 << 30  # bytes of features that are kept; whoever was met longest ago makes room
_BLOCK = 256  # examples that pass the backbone at a time
_PASSED = "passed"  # a column of those that have
_SAME_IN_TRAINING = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.Identity, nn.Flatten, nn.ReLU, nn.GELU)


def head_only(task: "Task", model: nn.Module) -> "tuple[Task, nn.Module]":
    """A task and its model, or, if nothing but the model's head is trained, the same with features for examples.

    That needs a model that is ``head(features(x))`` with frozen features that are no different in training than in
    evaluation, and examples that are not augmented. The parameters keep their names.
    """
    if [name for name, _ in model.named_children()] != ["features", "head"] or task.augments:
        return task, model
    features, head = model.get_submodule("features"), model.get_submodule("head")
    if not _is_fixed(features.train()):
        return task, model
    on_features = OnFeatures(task, features.eval())
    with torch.no_grad():  # a trial: whether the model is what its parts say
        device = next(features.parameters()).device
        x = task.prepare({n: column.to(device) for n, column in task.test_examples(0, 1).items()}, None)["x"]
        same = torch.equal(model.eval()(x), head(features(x)))
    return (on_features, Head(head)) if same else (task, model)


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


class OnFeatures:
    """A task whose inputs have passed a frozen backbone; all else is the task's own.

    Features are computed when a client is met for the first time, in blocks of a fixed size, so that their bits
    depend on nothing else.

    Args:
        task: The task.
        features: The backbone, in evaluation mode, on the device where features are to be.
    """

    def __init__(self, task: "Task", features: nn.Module) -> None:
        self._task, self._features = task, features
        self._known: OrderedDict[Any, Columns] = OrderedDict()
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def model(self) -> nn.Module:
        """The head alone, with its initial parameters."""
        return Head(self._task.model().get_submodule("head"))

    def examples(self, client: int) -> "Columns":
        """The training examples of one client, with features for ``x``."""
        return self._known.get(client) or self._keep(client, self._task.examples(client))

    def test_examples(self, start: int, stop: int) -> "Columns":
        """A slice of the test examples, with features for ``x``."""
        return self._known.get((start, stop)) or self._keep((start, stop), self._task.test_examples(start, stop))

    def prepare(self, examples: "Columns", generator: torch.Generator | None) -> "Columns":
        """Our own examples as they are; those from elsewhere, such as synthetic ones, pass the backbone first."""
        return examples if _PASSED in examples else self._passed(examples)

    def _passed(self, examples: "Columns") -> "Columns":
        device = next(self._features.parameters()).device
        blocks = []
        with torch.no_grad():
            for start in range(0, len(examples["x"]), _BLOCK):
                block = {name: column[start : start + _BLOCK].to(device) for name, column in examples.items()}
                blocks.append(self._features(self._task.prepare(block, None)["x"]))
        moved = {name: column.to(device) for name, column in examples.items() if name != "x"}
        passed = torch.ones(len(examples["x"]), dtype=torch.bool, device=device)
        return {**moved, "x": torch.cat(blocks), _PASSED: passed}

    def _keep(self, key: Any, examples: "Columns") -> "Columns":
        known = self._passed(examples)
        self._known[key] = known
        self._size += known["x"].nbytes
        while self._size > _ROOM and len(self._known) > 1:
            self._size -= self._known.popitem(last=False)[1]["x"].nbytes
        return known


def _is_fixed(features: nn.Module) -> bool:
    leaves = [module for module in features.modules() if not list(module.children())]
    parameters = list(features.parameters())
    return (
        bool(parameters)
        and not any(p.requires_grad for p in parameters)
        and all(not module.training or isinstance(module, _SAME_IN_TRAINING) for module in leaves)
    )
