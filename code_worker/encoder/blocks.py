"""The encoder's layers, with timm's names for their weights.

timm itself draws fresh weights: importing its models takes longer than everything else that a process loads.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from code_worker.encoder.vit import VitConfig

__all__ = ["Block", "VisionTransformer"]


class Attention(nn.Module):
    """Multi-head self-attention: `(n, tokens, width)` to the same shape."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Every token looks at every token."""
        n, count, width = tokens.shape
        # Queries, keys and values side by side, each then (n, heads, tokens, numbers of a head).
        parts = self.qkv(tokens).reshape(n, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, count, width)
        return cast("Tensor", self.proj(mixed))

    def of_first(self, tokens: Tensor) -> Tensor:
        """The same for the first token alone: `(n, tokens, width)` to `(n, width)`."""
        n, count, width = tokens.shape
        heads, weight, bias = self.num_heads, self.qkv.weight, cast("Tensor | None", self.qkv.bias)
        query = F.linear(tokens[:, :1], weight[:width], None if bias is None else bias[:width])
        key_value = F.linear(tokens, weight[width:], None if bias is None else bias[width:])
        key, value = key_value.reshape(n, count, 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        query = query.reshape(n, 1, heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value).reshape(n, width)
        return cast("Tensor", self.proj(mixed))


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(…, width)` to the same shape."""
        return cast("Tensor", self.fc2(F.gelu(self.fc1(tokens))))


class Block(nn.Module):
    """A pre-norm block (Dosovitskiy et al., arXiv 2010.11929): attention, then MLP, each added to what came in."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(n, tokens, width)` to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return cast("Tensor", tokens + self.mlp(self.norm2(tokens)))

    def first(self, tokens: Tensor) -> Tensor:
        """The block's output for the first token alone, `(n, width)`, from all `(n, tokens, width)` inputs."""
        token = tokens[:, 0] + self.attn.of_first(self.norm1(tokens))
        return cast("Tensor", token + self.mlp(self.norm2(token)))


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: `(n, 3, size, size)` to `(n, patches, width)`."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patches row by row."""
        return cast("Tensor", self.proj(pixels)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The whole network as it is trained; its state is the one that timm's class of this name has.

    Its weights are to be loaded: what it begins with is not what timm would draw.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """`(n, 3, size, size)` to `(n, width)`: the CLS token after the final LayerNorm."""
        patches = self.patch_embed(pixels)
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed
        return cast("Tensor", self.norm(self.blocks(tokens))[:, 0])
