"""Many clients in one call: a group is a client whose tensors have a leading dimension.

Small models leave a processor idle between their kernels. The clients of a group therefore train together: their
params are stacked along a new first dimension, the forward pass is vmapped over it, and the losses are summed, so
that the gradients separate by themselves. Tree arithmetic is elementwise, so a client update that consists of local
training and tree arithmetic does not change. Who trains with whom follows from the cohort, never from the workers.

Tensors of a group are stacked, shape (clients, ...). Numbers are numpy vectors, shape (clients,).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.func import functional_call, vmap

from fedray.algorithm import Client, ClientResult
from fedray.local_training import LocalResult, LocalTraining, stepper
from fedray.trees import Params, Tree, tree_map

if TYPE_CHECKING:
    from fedray.learner import Columns, Learner, Task

_LARGEST_MODEL = 2_000_000  # parameters; beyond, one client alone keeps a processor busy
_LARGEST_GROUP = 32
_PAYS = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding)  # grouped convolutions are slower than one by one


@dataclass(frozen=True)
class Group:
    """Some clients of a cohort that train in one call; an algorithm meets it in a `Client`'s place.

    Attributes:
        members: The clients.
        state: What they kept, stacked; or None, as of all of them.
    """

    members: tuple[Client, ...]
    state: Tree | None

    @property
    def round(self) -> int:
        """The round, 1-based."""
        return self.members[0].round


def units(cohort: Sequence[Client], size: int, has_state: Callable[[Client], bool]) -> list[list[Client]]:
    """The cohort cut into groups of up to ``size`` clients of like cost, those with state apart from those without."""
    ordered = sorted(cohort, key=lambda client: (has_state(client), -client.cost, client.slot))
    cut: list[list[Client]] = []
    for client in ordered:
        if not cut or len(cut[-1]) == size or has_state(cut[-1][0]) != has_state(client):
            cut.append([])
        cut[-1].append(client)
    return cut


def suggested_size(task: "Task", cohort: int) -> int:
    """How many clients to train in one call: a rule of the layers and sizes alone, so that it is no machine's guess.

    Models of matrix products, up to two million parameters, train a quarter of the cohort at once (at most 32), so
    that four workers have a group each; others one client at a time.
    """
    model = task.model()
    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    small = sum(p.numel() for p in model.parameters()) <= _LARGEST_MODEL
    pays = small and all(isinstance(module, _PAYS) for module in own) and obstacle(task, model) is None
    return max(1, min(_LARGEST_GROUP, -(-cohort // 4))) if pays else 1


def obstacle(task: "Task", model: torch.nn.Module) -> str | None:
    """Why clients of this task cannot train in one call, or None if they can."""
    if not task.weighted_loss:
        return "its loss does not take a weight for each example"
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{path} draws random numbers"
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.track_running_stats:
            return f"{path} keeps running statistics"
    return None


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of single clients as one of a group."""
    return tree_map(
        lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], torch.Tensor) else np.array(leaves), *trees
    )


def unstack(result: ClientResult, count: int) -> Iterator[ClientResult]:
    """A group's result as its members'."""
    for k in range(count):
        yield ClientResult(
            member(result.update, k),
            float(np.broadcast_to(result.weight, count)[k]),
            member(result.metrics, k),
            None if result.state is None else member(result.state, k, keep=True),
        )


def member(tree: Tree, k: int, keep: bool = False) -> Tree:
    """One client's part of a group's tree: a view, or a copy to keep."""

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x[k].clone() if keep else x[k]  # a view would keep the whole group's tensor alive
        return float(x[k]) if isinstance(x, np.ndarray) else x

    return tree_map(leaf, tree)


def train(
    learner: "Learner",
    start: Params,
    group: Group,
    local: LocalTraining,
    correction: Params | None = None,
    proximal: float = 0.0,
) -> LocalResult:
    """`Learner.train` for a group; ``start`` and ``correction`` may be stacked, or the same for all.

    Members make as many steps as they would alone; one that is done waits for the others.
    """
    names, count = list(learner.shapes), len(group.members)
    whole = [start[name].to(learner.device).expand(count, *shape) for name, shape in learner.shapes.items()]
    params = [p.clone().requires_grad_() for p in whole]
    step = stepper(params, names, start, local, group.round, correction, proximal, stacked=True)
    examples = [learner.task.examples(client.id) for client in group.members]
    module = _TaskLoss(learner.task, learner.fresh().train())
    num_steps, num_seen = np.zeros(count, int), np.zeros(count, int)
    total_loss = torch.zeros(count, device=learner.device)

    def loss(params: list[torch.Tensor], batch: "Columns") -> torch.Tensor:
        named = {f"model.{name}": p for name, p in zip(names, params, strict=True)}
        return functional_call(module, named, (batch,))

    for batch, sizes in _batches(learner, examples, group, local):
        losses = vmap(loss)(params, batch)
        gradients = torch.autograd.grad(losses.sum(), params, materialize_grads=True)
        held = torch.from_numpy(sizes).to(learner.device, torch.float32)
        with torch.no_grad():
            step(gradients, None if (sizes > 0).all() else held.sign())
            total_loss += losses.detach() * held
        num_steps += sizes > 0
        num_seen += sizes
    trained = {name: p.detach() for name, p in zip(names, params, strict=True)}
    num_examples = np.array([len(next(iter(columns.values()))) for columns in examples])
    return LocalResult(trained, num_steps, num_examples, total_loss.cpu().numpy().astype(float) / num_seen)


class _TaskLoss(torch.nn.Module):
    def __init__(self, task: "Task", model: torch.nn.Module) -> None:
        super().__init__()
        self._task, self.model = task, model

    def forward(self, batch: "Columns") -> torch.Tensor:
        return self._task.loss(self.model, batch)


def _batches(
    learner: "Learner", examples: "list[Columns]", group: Group, local: LocalTraining
) -> "Iterator[tuple[Columns, np.ndarray]]":
    """Batches of all members, shape (clients, batch_size, ...) with a ``weight``, and how much of each is real."""
    together = {name: torch.cat([columns[name] for columns in examples]) for name in examples[0]}
    lengths = [len(next(iter(columns.values()))) for columns in examples]
    firsts = np.cumsum([0, *lengths[:-1]])
    orders = [
        local.batches(length, torch.Generator().manual_seed(client.seed))
        for length, client in zip(lengths, group.members, strict=True)
    ]
    width = min(local.batch_size, max(lengths))
    while True:
        chosen = [next(order, None) for order in orders]
        sizes = np.array([0 if rows is None else len(rows) for rows in chosen])
        if not sizes.any():
            return
        index = torch.from_numpy(firsts)[:, None].repeat(1, width)  # filled up with examples of one's own
        weight = torch.zeros(len(chosen), width)
        for k, rows in enumerate(chosen):
            if rows is not None:
                index[k, : len(rows)] = rows + firsts[k]
                weight[k, : len(rows)] = 1 / len(rows)
        ready = learner.prepare({name: column[index.view(-1)] for name, column in together.items()})
        batch = {name: column.view(len(chosen), width, *column.shape[1:]) for name, column in ready.items()}
        yield {**batch, "weight": weight.to(learner.device)}, sizes
