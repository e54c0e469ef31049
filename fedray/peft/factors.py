"""LoRA's factors among a model's params: by layer, of a rank, averaged by a rule, and in bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedray.peft.averaging import Averaging, Factors, Role, ideal, total
from fedray.peft.library import ADAPTER_NAME

Params = Mapping[str, torch.Tensor]
_BASE = ".base_layer.weight"


@dataclass(frozen=True)
class Layer:
    """A layer that LoRA adapts, W + s·B·A.

    Attributes:
        path: Its path in the model.
        scale: s.
        weight: W.
        transposed: Whether W is stored as (d_in, d_out), as in GPT-2.
    """

    path: str
    scale: float
    weight: torch.Tensor
    transposed: bool

    @property
    def base(self) -> str:
        """The name of W among the model's parameters."""
        return self.path + _BASE

    def name(self, role: Role) -> str:
        """The name of a factor among the params."""
        return f"{self.path}.lora_{role}.{ADAPTER_NAME}.weight"

    def factors(self, params: Params) -> Factors:
        """The layer's factors, in float64."""
        return Factors(params[self.name("A")].double(), params[self.name("B")].double())

    def named(self, factors: Factors) -> dict[str, torch.Tensor]:
        """The factors as params."""
        return {self.name("A"): factors.A.float(), self.name("B"): factors.B.float()}

    def plus(self, residual: Factors) -> torch.Tensor:
        """W and the residual: a new tensor."""
        product = residual.B @ residual.A
        return (self.weight.double() + (product.mT if self.transposed else product)).to(self.weight.dtype)


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a model that LoRA adapts, with copies of their frozen weights, on the CPU."""
    return [
        Layer(
            path,
            float(module.scaling[ADAPTER_NAME]),
            module.get_parameter("base_layer.weight").detach().cpu().clone(),
            bool(getattr(module, "fan_in_fan_out", False)),
        )
        for path, module in model.named_modules()
        if ADAPTER_NAME in getattr(module, "lora_A", {})
    ]


def merge(
    averaging: Averaging,
    layers: Sequence[Layer],
    params: Params,
    sent: Sequence[Params],
    p: Sequence[float],
    generator: torch.Generator,
) -> tuple[dict[str, torch.Tensor], int, dict[str, float]]:
    """What becomes of the layers by a rule.

    Args:
        averaging: The rule.
        layers: The layers.
        params: What the server had.
        sent: What clients sent, filled up to the shapes of ``params``; what they did not train is as the server had it.
        p: The clients' weights, which sum to one.
        generator: For factors that are drawn anew.

    Returns:
        The params that change; bytes of the changes of frozen weights, as float32 factors; and the distance to the mean
        of the clients' products s·B·A, of all layers together, in the Frobenius norm and relative to that mean's.
    """
    new: dict[str, torch.Tensor] = {}
    size, missed, wished = 0, 0.0, 0.0
    for layer in layers:
        factors = [layer.factors({**params, **each}) for each in sent]
        merged, mean = averaging.merge(factors, p, layer.scale, generator), ideal(factors, p, layer.scale)
        missing = total((1, mean), (-layer.scale, merged.factors))
        new |= layer.named(merged.factors)
        if merged.residual is not None:
            new[layer.base] = layer.plus(merged.residual)
            missing = total((1, missing), (-1, merged.residual))
            size += 4 * int(merged.residual.nonzero.sum()) * sum(layer.weight.shape)
        missed, wished = missed + missing.norm**2, wished + mean.norm**2
    return new, size, {"lora_error": missed**0.5, "lora_relative_error": (missed / (wished or 1.0)) ** 0.5}


def role(name: str) -> Role | None:
    """Which factor a param is; None for what is none."""
    return "A" if ".lora_A." in name else "B" if ".lora_B." in name else None


def is_base(name: str) -> bool:
    """Whether a name is that of a frozen weight under an adapter."""
    return name.endswith(_BASE)


def unwrapped(name: str, tuned: str) -> str:
    """The name that a frozen weight under an adapter has in the pre-trained module at ``tuned``, without the adapter.

    >>> unwrapped("features.trunk.layers.0.q_proj.base_layer.weight", "features")
    'layers.0.q_proj.weight'
    >>> unwrapped("trunk.transformer.h.0.attn.c_attn.base_layer.weight", "")
    'transformer.h.0.attn.c_attn.weight'
    """
    return name.removeprefix(f"{tuned}.trunk.".removeprefix(".")).removesuffix(_BASE) + ".weight"


def cut(params: Params, rank: int) -> dict[str, torch.Tensor]:
    """The params with at most the first ``rank`` components of every layer."""

    def one(name: str, p: torch.Tensor) -> torch.Tensor:
        return p[:rank] if role(name) == "A" else p[:, :rank] if role(name) == "B" else p

    return {name: one(name, p) for name, p in params.items()}


def filled(params: Params, like: Params) -> dict[str, torch.Tensor]:
    """The params with zeros for the components that ``like`` has beyond theirs."""

    def one(p: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        if p.shape == whole.shape:
            return p
        padded = torch.zeros_like(whole)
        padded[tuple(map(slice, p.shape))] = p
        return padded

    return {name: one(p, like[name]) for name, p in params.items()}


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
