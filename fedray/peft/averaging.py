"""What becomes of LoRA's factors: B·A is bilinear, so the mean of the products is not the product of the means.

Client k trains W + s·B_k·A_k. With weights p_k that sum to one, an average should come to

    W + s·Σ_k p_k B_k A_k,

and a rule says what of it the next factors hold, and what goes into the frozen W. Rules see one layer at a time, in
float64, and never a matrix of its size: a product stays in its factors.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

Role = str  # "A" or "B"


@dataclass(frozen=True)
class Factors:
    """A matrix B·A of low rank, such as a layer's update.

    Attributes:
        A: Shape (r, d_in).
        B: Shape (d_out, r).
    """

    A: torch.Tensor
    B: torch.Tensor

    @property
    def nonzero(self) -> torch.Tensor:
        """Which of the r components are not zero; those of another's lower rank are."""
        return self.A.any(1) & self.B.any(0)

    @property
    def norm(self) -> float:
        """The Frobenius norm of B·A, from matrices of its rank: orthogonal factors do not change it."""
        r_b, r_a = (torch.linalg.qr(factor, mode="r").R for factor in (self.B, self.A.mT))
        return float((r_b @ r_a.mT).norm())


@dataclass(frozen=True)
class Merged:
    """What becomes of a layer.

    Attributes:
        factors: The next factors.
        residual: What is added to the frozen weight, the scale included; None for nothing.
    """

    factors: Factors
    residual: Factors | None = None


Merge = Callable[[Sequence[Factors], Sequence[float], float, torch.Generator], Merged]


@dataclass(frozen=True)
class Averaging:
    """A rule.

    Attributes:
        merge: ``(clients' factors, weights p, scale s, generator)`` to what becomes of a layer. Factors of a lower rank
            than the layer's come filled up with zeros.
        trained: The factors that clients train and send in a round (1-based).
        sent: The factors that the server sends; what is drawn from a seed that everybody knows is not.
        secure: Whether sums of tensors of equal shapes are all that the server needs, as secure aggregation gives it.
    """

    merge: Merge
    trained: Callable[[int], Collection[Role]] = lambda _: "AB"
    sent: Collection[Role] = "AB"
    secure: bool = True


def total(*terms: tuple[float, Factors]) -> Factors:
    """Σ c_j B_j A_j of pairs (c_j, factors), as factors side by side."""
    return Factors(torch.cat([f.A for _, f in terms]), torch.cat([c * f.B for c, f in terms], 1))


def ideal(clients: Sequence[Factors], p: Sequence[float], s: float) -> Factors:
    """s·Σ p_k B_k A_k: what an average should come to."""
    return total(*((s * weight, f) for weight, f in zip(p, clients, strict=True)))


def weighted(tensors: Sequence[torch.Tensor], p: Sequence[float]) -> torch.Tensor:
    """Σ p_k x_k, in float64."""
    return torch.stack([weight * x.double() for weight, x in zip(p, tensors, strict=True)]).sum(0)


def fedit() -> Averaging:
    """The mean of each factor (FedIT, Zhang et al., 2024): simple, secure, and not the mean of the products.

    With clients of different ranks it is zero padding, the baseline of HetLoRA (Cho et al., 2024).
    """
    return Averaging(_means)


def ffa() -> Averaging:
    """A stays as it was drawn, B is averaged (FFA-LoRA, Sun et al., 2024): exact, secure, half the traffic."""
    return Averaging(_means, trained=lambda _: "B", sent="B")


def rolora() -> Averaging:
    """B in odd rounds, A in even ones (RoLoRA, Chen et al., 2025): exact, secure, half the traffic."""
    return Averaging(_means, trained=lambda t: "B" if t % 2 else "A")


def fedex() -> Averaging:
    """The mean of each factor, and its error into the frozen weight (FedEx-LoRA, Singhal et al., 2024): exact."""

    def merge(clients: Sequence[Factors], p: Sequence[float], s: float, _: torch.Generator) -> Merged:
        mean, last = _mean(clients, p), clients[-1]
        # Σ p_k B_k A_k − B̄Ā = Σ p_k (B_k − B̄)(A_k − A_K), because Σ p_k (B_k − B̄) is zero: K − 1 terms
        apart = [Factors(f.A - last.A, f.B - mean.B) for f in clients[:-1]]
        return Merged(mean, ideal(apart, p[:-1], s) if apart else None)

    return Averaging(merge, secure=False)


def flora() -> Averaging:
    """All products into the frozen weight, and new factors every round (FLoRA, Wang et al., 2024): exact."""

    def merge(clients: Sequence[Factors], p: Sequence[float], s: float, generator: torch.Generator) -> Merged:
        rank, width = clients[0].A.shape
        drawn = torch.rand(rank, width, generator=generator, dtype=torch.float64)
        new = Factors((2 * drawn - 1) / width**0.5, torch.zeros_like(clients[0].B))  # as peft draws them
        return Merged(new, ideal(clients, p, s))

    return Averaging(merge, sent="", secure=False)


def flexlora() -> Averaging:
    """The best factors of the layer's rank for the mean of the products (FlexLoRA, Bai et al., 2024).

    A truncated singular value decomposition; a client of rank r_k gets the first r_k components, its own best.
    """

    def merge(clients: Sequence[Factors], p: Sequence[float], s: float, _: torch.Generator) -> Merged:
        whole, rank = ideal(clients, p, 1.0), clients[0].A.shape[0]
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(whole.B), torch.linalg.qr(whole.A.mT)
        u, sigma, v = torch.linalg.svd(r_b @ r_a.mT)  # as small as the ranks together
        root = sigma[:rank].sqrt()
        found = Factors(root[:, None] * (v[: len(root)] @ q_a.mT), q_b @ u[:, : len(root)] * root)
        lacking = rank - len(root)  # a layer may be narrower than its rank
        return Merged(Factors(pad(found.A, (0, 0, 0, lacking)), pad(found.B, (0, lacking))))

    return Averaging(merge, secure=False)


def _mean(clients: Sequence[Factors], p: Sequence[float]) -> Factors:
    return Factors(weighted([f.A for f in clients], p), weighted([f.B for f in clients], p))


def _means(clients: Sequence[Factors], p: Sequence[float], _s: float, _g: torch.Generator) -> Merged:
    return Merged(_mean(clients, p))


AVERAGINGS: Mapping[str, Callable[..., Averaging]] = {
    "fedit": fedit,
    "ffa": ffa,
    "rolora": rolora,
    "fedex": fedex,
    "flora": flora,
    "flexlora": flexlora,
}
