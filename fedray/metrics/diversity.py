"""Gradient diversity (Yin et al., 2018) and its neighbours: how far the updates of a cohort point into one direction.

GD = Σ_i ‖g_i‖² / ‖Σ_i g_i‖², over what clients send: 1/n if all n updates are equal, 1 if they are orthogonal to each
other, more if they cancel. GPT-FL (Zhang et al., 2023) looks at it round by round, from random and synthetic starts.
Long updates outweigh short ones in it; the mean cosine of all pairs, (‖Σ_i g_i/‖g_i‖‖² − n) / (n (n − 1)), sees
directions alone.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from fedray import exact
from fedray.aggregators import Aggregator
from fedray.algorithm import Client, ClientResult
from fedray.trees import leaves, squared_norm


def with_squares(inner: Aggregator) -> Aggregator:
    """Another aggregation, beside the diversity of the updates: ``(aggregate, metrics)``; {} where no tensor is sent.

    The metrics are ``gradient_diversity``; ``update_norm``, the root of the mean of ‖g_i‖²; ``mean_update_norm``, of
    their mean; and ``update_cosine``, the mean cosine of all pairs (updates of zeros left out). Clients count alike,
    whatever their weights. Sums are exact, so that any split of the cohort gives the same bits.
    """

    def accumulate(acc: Any, client: Client, result: ClientResult) -> Any:
        whole, squares, total, count = acc
        sent = {str(n): x.double() for n, x in enumerate(_tensors(result.update))}
        square = squared_norm(sent) if sent else 0.0
        if sent:
            flat = torch.cat([x.flatten() for x in sent.values()])
            unit = flat / math.sqrt(square) if square else flat
            total = exact.add_term(total, {"sent": flat, "unit": unit, "moved": float(square > 0)}, 1)
        return inner.accumulate(whole, client, result), squares + Fraction(square), total, count + bool(sent)

    def merge(left: Any, right: Any) -> Any:
        whole = inner.merge(left[0], right[0])
        return whole, left[1] + right[1], exact.merge(left[2], right[2]), left[3] + right[3]

    def report(acc: Any) -> Any:
        whole, squares, total, count = acc
        if not count:
            return inner.report(whole), {}
        sums = exact.value(total)
        together, moved = squared_norm({"sent": sums["sent"]}), sums["moved"]
        found = {"update_norm": math.sqrt(float(squares) / count), "mean_update_norm": math.sqrt(together) / count}
        if together:
            found["gradient_diversity"] = float(squares) / together
        if moved > 1:
            found["update_cosine"] = (squared_norm({"unit": sums["unit"]}) - moved) / (moved * (moved - 1))
        return inner.report(whole), found

    return replace(
        inner,
        zero=lambda: (inner.zero(), Fraction(0), None, 0),
        accumulate=accumulate,
        merge=merge,
        report=report,
        together=None,
    )


def _tensors(update: Any) -> Iterator[torch.Tensor]:
    if isinstance(update, list | tuple):
        for part in update:
            yield from _tensors(part)
    else:
        yield from (x for x in leaves(update) if isinstance(x, torch.Tensor) and x.is_floating_point())
