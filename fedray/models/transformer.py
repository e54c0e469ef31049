"""Language models: ``LANGUAGE_MODELS[name](vocabulary, length, **options)`` maps token ids to logits.

Of token ids (N, L), L at most ``length``, the logits are (N, L, V): at each place those of the next token, whatever
stands behind. V is at least ``vocabulary``.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fedray.models.classifier import positive


def transformer(
    vocabulary: int,
    length: int,
    /,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """A small causal Transformer with layer norm before each part; 137,216 parameters on 64 bytes.

    Decoder-only, learned positions, GELU and four times the width within the blocks; normal initial weights of
    deviation 0.02, in the last layer of each part divided by √(2·depth) (Radford et al. 2019, section 2.3).

    Args:
        width: of the representation of a token.
        depth: number of blocks.
        heads: of attention; must divide the width.
        dropout: probability; clients of a model with dropout train one at a time.
    """
    for name, value in (("width", width), ("depth", depth), ("heads", heads)):
        positive(name, value)
    if width % heads:
        raise ValueError(f"heads is {heads}; it must divide {width}, the width")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    return Transformer(vocabulary, length, width, depth, heads, dropout)


class Transformer(nn.Module):
    """Embedded tokens and positions, blocks, a norm, and a linear ``head``; see `transformer`."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("attention.out.weight", "after.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (N, L, vocabulary) of token ids (N, L)."""
        count, length = tokens.shape
        places = torch.arange(length, device=tokens.device).repeat(count, 1)  # a row a sequence, as of every layer
        embedded = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.blocks(self.dropout(embedded))))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _CausalAttention(width, heads)
        self.norm2, self.before, self.after = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.after(F.gelu(self.before(self.norm2(x)))))


class _CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(x).view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(count, length, width))
