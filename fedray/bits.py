"""Binary masks as vectors of bits, and on their way as packed bytes: a bit a weight, and no more."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from fedray.aggregators import Aggregator
from fedray.algorithm import Client, ClientResult
from fedray.data.dataset import import_extra
from fedray.seeds import seed_for
from fedray.trees import Params

Share = Literal["weights", "tensors", "released"]


def flat(params: Params) -> torch.Tensor:
    """All tensors as one vector on the CPU, in their order; an empty one of none."""
    return torch.cat([p.detach().cpu().flatten() for p in params.values()]) if params else torch.zeros(0)


def shaped(vector: torch.Tensor, like: Mapping[str, torch.Tensor]) -> Params:
    """A vector cut into tensors of the shapes of ``like``, the first ones, as far as it goes."""
    cut, start = {}, 0
    for name, tensor in like.items():
        if start + tensor.numel() > len(vector):
            break
        cut[name] = vector[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return cut


def split(params: Params, share: float, of: Share = "weights") -> tuple[Params, Params]:
    """The first tensors, until they are this share of the whole, and the others.

    Args:
        params: All.
        share: In 0..1.
        of: What it is a share of: numbers, tensors, or the entries that PRISM's released code has of its generator. It
            registers the convolutions of a block twice, and the later of the two counts.
    """
    sizes = [p.numel() for p in params.values()] if of == "weights" else [1] * len(params)
    if of == "released":
        blocks, odd = divmod(len(params) - 2, 3)
        if odd or blocks < 1:
            raise ValueError("alpha_of is released, which needs the masked_resnet_generator; choose weights or tensors")
        sizes = [4, *([1, 1, 4] * blocks)[:-1], 1, 1]  # how far it is to the entry of the next
    left, first = round(share * sum(sizes), 6), {}
    for (name, p), size in zip(params.items(), sizes, strict=True):
        if left > 0:
            first[name], left = p, left - size
    return first, {name: p for name, p in params.items() if name not in first}


def draw(theta: torch.Tensor, seed: int) -> torch.Tensor:
    """A mask (bool) whose bits are true with the probabilities ``theta``."""
    return torch.rand(theta.shape, generator=torch.Generator().manual_seed(seed)) < theta


def final_mask(theta: Params) -> torch.Tensor:
    """The one mask (bool) of a trained model, whose weights are kept with these probabilities; always the same."""
    return draw(flat(theta), seed_for("final mask"))


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Bits (bool) as bytes, eight in each; the last is filled up with zeros."""
    return torch.from_numpy(np.packbits(bits.numpy()))


def unpack(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The first ``size`` bits of packed bytes, as uint8."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=size))


def code(bits: torch.Tensor, theta: torch.Tensor) -> bytes:
    """Bits in as few bytes as a range coder needs which knows that they are true with probabilities ``theta``."""
    stream, model, p = _coder(theta)
    encoder = stream.queue.RangeEncoder()
    encoder.encode(bits.numpy().astype(np.int32), model, p)
    return encoder.get_compressed().tobytes()


def decode(coded: bytes, theta: torch.Tensor) -> torch.Tensor:
    """The bits again, from the same ``theta``."""
    stream, model, p = _coder(theta)
    decoder = stream.queue.RangeDecoder(np.frombuffer(coded, np.uint32))
    return torch.from_numpy(decoder.decode(model, p).astype(bool))


def coded_bits(bits: torch.Tensor, theta: torch.Tensor) -> float:
    """Bits a bit of a mask that is coded, decoded again, and compared."""
    coded = code(bits, theta)
    if not torch.equal(decode(coded, theta), bits):
        raise ValueError("a mask that was coded is not what is decoded")
    return 8 * len(coded) / max(1, len(bits))


def _coder(theta: torch.Tensor) -> tuple[Any, Any, np.ndarray]:
    stream = import_extra("constriction", "masks", "coding masks").stream
    return stream, stream.model.Bernoulli(), theta.double().clamp(0.01, 0.99).numpy()


def unpacking(inner: Aggregator, size: int) -> Aggregator:
    """An aggregation of updates ``{"masks": [packed, ...], "scores": ...}`` as ``{"ones": ..., "scores": ...}``.

    ``ones`` counts, of each bit, the masks of a client that have it. Bytes are sent, and unpacked where they are added.
    """

    def accumulate(acc: Any, client: Client, result: ClientResult) -> Any:
        ones = sum(unpack(packed, size).to(torch.int32) for packed in result.update["masks"])
        update = {"ones": ones, "scores": {name: s.cpu() for name, s in result.update["scores"].items()}}
        return inner.accumulate(acc, client, replace(result, update=update))

    return replace(inner, accumulate=accumulate)


def distance(a: torch.Tensor, b: torch.Tensor, kind: Literal["hamming", "cosine"] = "hamming") -> float:
    """The share of bits that differ, or one minus the cosine of the two vectors of zeros and ones.

    >>> a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
    >>> distance(a, b)
    0.25
    """
    if kind == "cosine":
        return float(1 - (a & b).sum() / (a.sum() * b.sum()).sqrt().clamp_min(1))
    return float((a != b).float().mean()) if len(a) else 0.0


def described(bits: torch.Tensor) -> dict[str, float]:
    """The share of ones in a mask, and the bits that a bit of it is worth.

    >>> described(torch.tensor([True, False, True, False]))
    {'mask_density': 0.5, 'mask_entropy': 1.0}
    """
    p = density(bits)
    return {"mask_density": p, "mask_entropy": -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)}


def estimated_bits(bits: torch.Tensor) -> dict[str, float]:
    """Bits that an ideal coder takes for a bit of a mask whose number of ones it is told, as FedPM counts.

    >>> estimated_bits(torch.tensor([True, False] * 8))
    {'estimated_bits': 1.25}
    """
    n = max(1, len(bits))
    return {"estimated_bits": described(bits)["mask_entropy"] + math.log2(n) / n}


def density(bits: torch.Tensor) -> float:
    """The share of ones."""
    return float(bits.float().mean()) if len(bits) else 0.0


def check(**options: tuple[float, ...]) -> None:
    """Raise a ValueError for the first option, (value, least, most), that is out of its range."""
    for name, (value, least, *most) in options.items():
        if value < least or (most and value > most[0]):
            raise ValueError(f"{name} is {value}; it must be {f'in {least}..{most[0]}' if most else f'>= {least}'}")
