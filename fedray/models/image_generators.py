"""Networks from noise to pictures."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from fedray.models.classifier import positive
from fedray.models.discriminators import Discriminator, Gan
from fedray.models.masked import Masking, mask


class ResNetG(nn.Module):
    """GFMN's ResNet generator (dos Santos et al., 2019), as PRISM uses it at 32×32.

    A transposed convolution to 4×4, then residual blocks that halve the channels and double the size. BatchNorm uses
    the statistics of the batch, in evaluation too, as the released code does. Convolutions have no biases.

    Args:
        channels: Channels of a picture.
        width: Channels before the last convolution; 64 in the paper.
        latent: Length of the noise; 128 in the paper.
        blocks: Residual blocks; 3 for pictures of 32×32.
    """

    def __init__(self, channels: int, width: int = 64, latent: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.latent = latent
        widths = [width * 2**k for k in range(blocks, -1, -1)]
        self.first = nn.ConvTranspose2d(latent, widths[0], 4, bias=False)
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in pairwise(widths)))
        self.last = nn.Sequential(
            _norm(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.Tanh()
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Pictures (N, C, H, W) in -1..1 of noise (N, latent)."""
        return self.last(self.blocks(self.first(z[:, :, None, None])))


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _norm(before),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            _norm(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )
        self.skip = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.Upsample(scale_factor=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.skip(x)


def released_bytes(model: ResNetG, alpha: float = 0.0) -> int:
    """What the paper's tables count for an upload: a byte for each entry of a mask, four for each score.

    The released code registers the convolutions of a block twice, and counts them so; of its 20 tensors the last
    ``alpha`` are scores.
    """
    sizes = [model.first.weight.numel()]
    for block in model.blocks.children():
        sizes += 2 * [p.numel() for p in block.parameters() if p.dim() == 4]
    sizes += [p.numel() for p in model.last.parameters() if p.dim() == 4]
    scores = int(alpha * len(sizes))
    return sum(sizes[: len(sizes) - scores]) + 4 * sum(sizes[len(sizes) - scores :])


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)


def resnet_generator(shape: tuple[int, ...], /, width: int = 64, latent: int = 128) -> nn.Module:
    """GFMN's and PRISM's ResNet generator, trained as it is.

    Args:
        shape: (C, H, W) of a picture; H = W is 4 times a power of two.
        width: Channels before the last convolution.
        latent: Length of the noise.
    """
    side = shape[-1]
    blocks = (side // 4).bit_length() - 1
    if len(shape) != 3 or shape[1] != side or side != 4 * 2**blocks or blocks < 1:
        raise ValueError(f"size is {shape[1:]}; this generator makes squares of 8, 16, 32, 64 ... pixels")
    return ResNetG(shape[0], positive("width", width), positive("latent", latent), blocks)


def masked_resnet_generator(
    shape: tuple[int, ...], /, masking: Masking = Masking(), width: int = 64, latent: int = 128
) -> nn.Module:
    """PRISM's generator: the same with frozen random weights, of which a mask is learnt.

    Args:
        shape: (C, H, W) of a picture; H = W is 4 times a power of two.
        masking: How it is masked.
        width: Channels before the last convolution.
        latent: Length of the noise.
    """
    return mask(resnet_generator(shape, width, latent), masking)


def resnet_gan(
    shape: tuple[int, ...], /, width: int = 64, latent: int = 128, discriminator_width: int = 64
) -> nn.Module:
    """The ResNet generator with a discriminator beside it (DCGAN's, without BatchNorm), for GANs.

    Args:
        shape: (C, H, W) of a picture; H = W is 4 times a power of two.
        width: The generator's channels before the last convolution.
        latent: Length of the noise.
        discriminator_width: The discriminator's channels after the first convolution.
    """
    generator = resnet_generator(shape, width, latent)
    blocks = (shape[-1] // 4).bit_length() - 1
    return Gan(generator, Discriminator(shape[0], positive("discriminator_width", discriminator_width), blocks))


IMAGE_GENERATORS: dict[str, Callable[..., nn.Module]] = {
    "resnet_generator": resnet_generator,
    "masked_resnet_generator": masked_resnet_generator,
    "resnet_gan": resnet_gan,
}
