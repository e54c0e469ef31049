"""Networks that tell real pictures from generated ones, and generators beside them."""

from itertools import pairwise

import torch
from torch import nn


class Discriminator(nn.Module):
    """DCGAN's discriminator (Radford, Metz and Chintala, 2016), without BatchNorm.

    Strided 4×4 convolutions halve the size and double the channels down to 4×4, where a linear layer gives one logit.
    No example is normalised by others, so that the gradient of an example depends on it alone.

    Args:
        channels: Channels of a picture.
        width: Channels after the first convolution.
        blocks: Convolutions; 3 for pictures of 32×32.
    """

    def __init__(self, channels: int, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        widths = [channels, *(width * 2**k for k in range(blocks))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N,) of being real, of pictures (N, C, H, W) in -1..1."""
        return self.layers(x)[:, 0]


class Gan(nn.Module):
    """A generator and its discriminator (Goodfellow et al., 2014); as a function it is the generator.

    Args:
        generator: From noise (N, latent) to pictures; has ``latent``.
        discriminator: From pictures to logits (N,).
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    @property
    def latent(self) -> int:
        """The length of the generator's noise."""
        return int(self.generator.latent)  # type: ignore[arg-type]

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Pictures of noise."""
        return self.generator(z)
