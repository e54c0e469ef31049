"""Arithmetic on trees: nested dicts whose leaves are tensors or numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

Tree = Any  # a tensor, a number, or a dict of trees
Params = dict[str, torch.Tensor]  # what is trained and communicated, by parameter name
Number = Any  # a float; of a group of clients, a numpy vector with an entry for each


def tree_map(fn: Callable, first: Tree, *rest: Tree) -> Tree:
    """Apply ``fn`` leaf by leaf; the trees must have the same keys.

    >>> tree_map(lambda a, b: a + b, {"w": 1, "b": {"c": 2}}, {"w": 10, "b": {"c": 20}})
    {'w': 11, 'b': {'c': 22}}
    """
    if not isinstance(first, dict):
        return fn(first, *rest)
    for tree in rest:
        if tree.keys() != first.keys():
            odd = sorted(set(first) ^ set(tree))
            raise ValueError(f"the trees differ in {odd}; both must have the same keys")
    return {name: tree_map(fn, first[name], *(tree[name] for tree in rest)) for name in first}


def leaves(tree: Tree) -> Iterator[Any]:
    """Every leaf, depth first in insertion order.

    >>> list(leaves({"w": 1, "b": {"c": 2}}))
    [1, 2]
    """
    if isinstance(tree, dict):
        for branch in tree.values():
            yield from leaves(branch)
    else:
        yield tree


def add(a: Tree, b: Tree) -> Tree:
    """``a + b``, leaf by leaf."""
    return tree_map(lambda x, y: x + y, a, b)


def subtract(a: Tree, b: Tree) -> Tree:
    """``a - b``, leaf by leaf."""
    return tree_map(lambda x, y: x - y, a, b)


def scale(a: Tree, factor: Number) -> Tree:
    """``factor * a``, leaf by leaf; a vector scales the first dimension of every leaf.

    >>> scale({"w": torch.ones(2, 3)}, np.array([1.0, 2.0]))["w"].sum(1)
    tensor([3., 6.])
    """
    if not isinstance(factor, np.ndarray):
        return tree_map(lambda x: x * factor, a)
    vector = torch.from_numpy(factor)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x * vector.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))

    return tree_map(rows, a)


def zeros_like(a: Tree) -> Tree:
    """Zeros in the shape of ``a``."""
    return tree_map(torch.zeros_like, a)


def flatten(a: Tree) -> torch.Tensor:
    """One vector of every leaf, in insertion order."""
    return torch.cat([torch.as_tensor(leaf).reshape(-1) for leaf in leaves(a)])


def squared_norm(a: Tree) -> float:
    """The squared Euclidean norm of all leaves together, summed in float64."""
    return sum(float(leaf.double().square().sum()) for leaf in leaves(a))
