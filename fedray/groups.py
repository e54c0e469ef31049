"""Many clients in one call: a group is a client whose tensors have a leading dimension.

Small models leave a processor idle between their kernels. The clients of a group therefore train together: their
params are stacked along a new first dimension (`fedray.stacked`), and the losses are summed, so that the gradients
separate by themselves. Tree arithmetic is elementwise, so a client update that consists of local training and tree
arithmetic does not change. Who trains with whom follows from the cohort, never from the workers.

Tensors of a group are stacked, shape (clients, ...). Numbers are numpy vectors, shape (clients,).
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedray.algorithm import Client, ClientResult
from fedray.dense import StepInBackward
from fedray.local_training import LocalResult, LocalTraining, num_examples, stepper
from fedray.stacked import StackedModel, unknown_layer
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
    """The cohort cut into groups of up to ``size`` clients of like cost, those with state apart from those without.

    The groups are of equal size, and beyond two a multiple of four in number, so that 2, 4 or 8 workers have as many.
    """
    if size == 1:
        return [[client] for client in cohort]
    cut: list[list[Client]] = []
    for kept in (False, True):
        alike = sorted((c for c in cohort if has_state(c) is kept), key=lambda client: (-client.cost, client.slot))
        count = -(-len(alike) // size)
        count = min(count if count <= 2 else -(-count // 4) * 4, len(alike))
        bounds = [len(alike) * k // max(count, 1) for k in range(count + 1)]
        cut += [alike[start:stop] for start, stop in itertools.pairwise(bounds)]
    return cut


def suggested_size(task: "Task", cohort: int) -> int:
    """How many clients to train in one call: a rule of the layers and sizes alone, so that it is no machine's guess.

    Models of matrix products, up to two million parameters, train half of the cohort at once, but at most 32 clients
    and two million parameters, which is what a processor's caches take; others train one client at a time.
    """
    model = task.model()
    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    count = sum(p.numel() for p in model.parameters())
    pays = count <= _LARGEST_MODEL and all(isinstance(module, _PAYS) for module in own)
    if not pays or obstacle(task, model) is not None:
        return 1
    return max(1, min(_LARGEST_GROUP, -(-cohort // 2), _LARGEST_MODEL // max(count, 1)))


def obstacle(task: "Task", model: torch.nn.Module) -> str | None:
    """Why clients of this task cannot train in one call, or None if they can."""
    reason = dependence(task, model)
    if reason is not None:
        return reason
    if task.augments:
        return "its examples are augmented at random"
    layer = unknown_layer(model)
    if layer is not None:
        return f"{layer} has params that cannot be stacked"
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{path} draws random numbers"
    return None if is_stackable(task, model) else "its examples, or its layers, are not independent of each other"


def dependence(task: "Task", model: torch.nn.Module) -> str | None:
    """Why the examples of a batch know of each other, or None if, as far as one can see, they don't."""
    if task.losses is None:
        return "its loss is not a mean over examples"
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.track_running_stats:
            return f"{path} keeps running statistics"
    return None


def is_stackable(task: "Task", model: torch.nn.Module) -> bool:
    """A trial: whether two clients with unlike params have the same losses and gradients together as one by one."""
    draw = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def near(p: torch.Tensor) -> torch.Tensor:
        return p.detach() + 0.1 * torch.randn(p.shape, generator=draw).to(p.device)

    params = {name: torch.stack([near(p), near(p)]).requires_grad_() for name, p in trained.items()}
    device = next(model.parameters()).device
    examples = task.test_examples(0, min(6, task.num_test_examples))
    rows = torch.arange(6) % num_examples(examples)
    batch = task.prepare({name: column[rows].to(device) for name, column in examples.items()}, None)
    losses = task.losses
    assert losses is not None
    alone = []
    for part, mine in enumerate((slice(0, 3), slice(3, 6))):
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(params[name][part])
        loss = losses(model.train(), {name: column[mine] for name, column in batch.items()})
        gradients = torch.autograd.grad(loss.sum(), list(trained.values()), materialize_grads=True)
        alone.append([loss.detach(), *gradients])
    try:
        together = StackedModel(model.train()).run(params, losses, batch)
        gradients = torch.autograd.grad(together.sum(), list(params.values()), materialize_grads=True)
    except (RuntimeError, ValueError):
        return False
    found = [together.detach().view(2, 3), *gradients]
    return all(torch.allclose(torch.stack(pair), own, 1e-2, 1e-4) for *pair, own in zip(*alone, found, strict=True))


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of single clients as one of a group."""
    return tree_map(
        lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], torch.Tensor) else np.array(leaves), *trees
    )


def unstack(result: ClientResult, count: int) -> Iterator[ClientResult]:
    """A group's result as its members'."""
    weights = np.broadcast_to(result.weight, count)
    for k, state in enumerate(states(result, count)):
        yield ClientResult(member(result.update, k), float(weights[k]), member(result.metrics, k), state)


def states(result: ClientResult, count: int) -> list[Tree | None]:
    """What each member keeps of a group's result."""
    return [None if result.state is None else member(result.state, k, keep=True) for k in range(count)]


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
    only: Collection[str] | None = None,
) -> LocalResult:
    """`Learner.train` for a group; ``start`` and ``correction`` may be stacked, or the same for all.

    Members make as many steps as they would alone; one that is done waits for the others.
    """
    count = len(group.members)
    learner.freeze(start)
    params = {
        name: start[name].to(learner.device).expand(count, *shape).clone().requires_grad_(only is None or name in only)
        for name, shape in learner.shapes.items()
    }
    moving = {name: p for name, p in params.items() if p.requires_grad}
    model, leaves = learner.stacked(), list(moving.values())
    lr = local.lr(group.round) if local.is_plain_sgd and not proximal else None
    step = stepper(leaves, moving, start, local, group.round, correction, proximal, stacked=True)
    num_steps, num_seen = np.zeros(count, int), np.zeros(count, int)
    total_loss = torch.zeros(count, device=learner.device)
    losses = learner.task.losses
    assert losses is not None  # or the task would not be grouped
    lengths, batches = _batches(learner, group, local)
    for batch, weight, sizes in batches:
        early = StepInBackward()
        each = model.run(params, losses, batch, early)
        own = (each.view(count, -1) * weight).sum(1)
        gradients = early.grad(own.sum(), leaves, lr)
        held = torch.from_numpy(sizes).to(learner.device, torch.float32, non_blocking=True)
        with torch.no_grad():
            step(gradients, None if (sizes > 0).all() else held.sign())
            total_loss += own.detach() * held
        num_steps += sizes > 0
        num_seen += sizes
    trained = {name: p.detach() for name, p in params.items()}
    return LocalResult(trained, num_steps, lengths, total_loss.cpu().numpy().astype(float) / num_seen)


def _batches(
    learner: "Learner", group: Group, local: LocalTraining
) -> "tuple[np.ndarray, Iterator[tuple[Columns, torch.Tensor, np.ndarray]]]":
    """How many examples each member has, and batches of all of them: examples (clients·n, ...), weights, real sizes.

    The weights, (clients, n), make means of what is real; the rest of a batch is filled up with examples of one's own.
    """
    examples = [learner.task.examples(client.id) for client in group.members]
    lengths = np.array([num_examples(columns) for columns in examples])
    orders = [
        [rows.numpy() for rows in local.batches(length, torch.Generator().manual_seed(client.seed))]
        for length, client in zip(lengths.tolist(), group.members, strict=True)
    ]
    sizes = np.zeros((max(map(len, orders)), len(orders)), int)
    for k, order in enumerate(orders):
        sizes[: len(order), k] = [len(rows) for rows in order]
    real = np.arange(sizes.max()) < sizes.T[..., None]  # (clients, steps, n)
    index = np.zeros(real.shape, int)
    index[real] = np.concatenate(list(itertools.chain.from_iterable(orders)))
    index += (lengths.cumsum() - lengths)[:, None, None]
    rows = torch.from_numpy(index.swapaxes(0, 1).reshape(len(sizes), -1))
    # at once, for a GPU would be waited for each time
    weights = torch.from_numpy((real / np.maximum(sizes.T, 1)[..., None]).astype(np.float32)).to(learner.device)
    together = learner.ready({name: torch.cat([columns[name] for columns in examples]) for name in examples[0]})
    return lengths, zip(map(together, rows), weights.unbind(1), sizes, strict=True)
