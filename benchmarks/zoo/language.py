"""Language models over token ids; logits come as [N, vocabulary, T], classes second."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention, causal or over a memory; ``fused`` calls torch's own kernel."""

    def __init__(
        self, width: int, heads: int, *, causal: bool, rotary: bool = False, fused: bool = False
    ) -> None:
        super().__init__()
        bias = not rotary
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in "qkv")
        self.out = nn.Linear(width, width, bias=bias)
        self.heads, self.causal, self.rotary, self.fused = heads, causal, rotary, fused

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """[N, T, D], and a memory [N, S, D] -> [N, T, D]."""
        source = x if memory is None else memory
        q, k, v = self._split(self.q(x)), self._split(self.k(source)), self._split(self.v(source))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            y = self._attend(q, k, v)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            size = q.shape[2]
            ahead = torch.ones(size, size, device=q.device).tril() == 0
            scores = scores.masked_fill(ahead, -1e4)
        return scores.softmax(-1) @ v


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of [N, heads, T, d]."""
    half = x.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, device=x.device).to(x.dtype) / half)
    angle = torch.arange(x.shape[2], device=x.device).to(x.dtype)[:, None] * rate
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Gpt(nn.Module):
    """GPT-2's block (Radford et al. 2019): LayerNorm first, GELU, learned positions."""

    def __init__(
        self,
        vocabulary: int = 256,
        width: int = 64,
        layers: int = 2,
        length: int = 32,
        *,
        tied: bool = False,
        fused: bool = False,
        dropout: float = 0.0,
        tanh: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(
            GptBlock(width, fused=fused, dropout=dropout, tanh=tanh) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [N, T] -> logits [N, vocabulary, T]."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x)).transpose(1, 2)
        return y


class GptBlock(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, *, fused: bool, dropout: float, tanh: bool) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4, causal=True, fused=fused)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.act = nn.GELU(approximate="tanh" if tanh else "none")

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] -> the same."""
        x = x + self.dropout(self.attention(self.n1(x)))
        y: Tensor = x + self.dropout(self.down(self.act(self.up(self.n2(x)))))
        return y


class RmsNorm(nn.Module):
    """Zhang & Sennrich 2019, in elementary operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> the same."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Llama(nn.Module):
    """Llama's block (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU."""

    def __init__(
        self,
        vocabulary: int = 256,
        width: int = 64,
        layers: int = 2,
        *,
        fused: bool = False,
        native_norm: bool = False,
    ) -> None:
        super().__init__()
        norm = (lambda: nn.RMSNorm(width, eps=1e-6)) if native_norm else (lambda: RmsNorm(width))
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "n1": norm(),
                    "attention": Attention(width, 4, causal=True, rotary=True, fused=fused),
                    "n2": norm(),
                    "gate": nn.Linear(width, 8 * width // 3, bias=False),
                    "up": nn.Linear(width, 8 * width // 3, bias=False),
                    "down": nn.Linear(8 * width // 3, width, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = norm(), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [N, T] -> logits [N, vocabulary, T]."""
        x = self.tokens(ids)
        for b in self.blocks:
            x = x + b["attention"](b["n1"](x))
            h = b["n2"](x)
            x = x + b["down"](F.silu(b["gate"](h)) * b["up"](h))
        y: Tensor = self.head(self.norm(x)).transpose(1, 2)
        return y


class EncoderDecoder(nn.Module):
    """A translator of one block each: the decoder looks at the encoder's output."""

    def __init__(self, vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(vocabulary, width) for _ in "st")
        self.read = Attention(width, 4, causal=False)
        self.write = Attention(width, 4, causal=True)
        self.cross = Attention(width, 4, causal=False)
        self.n1, self.n2, self.n3, self.n4 = (nn.LayerNorm(width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Token ids [N, S] and [N, T] -> logits [N, vocabulary, T]."""
        s = self.source(source)
        memory = self.n1(s + self.read(s))
        x = self.target(target)
        x = self.n2(x + self.write(x))
        x = self.n3(x + self.cross(x, memory))
        x = self.n4(x + self.down(F.relu(self.up(x))))
        y: Tensor = self.head(x).transpose(1, 2)
        return y


class LoraLinear(nn.Module):
    """A frozen layer and a trained low-rank addition to it (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = self.base(x) + (x @ self.a.t() @ self.b.t()) * 2.0
        return y


def lora_gpt(layers: int = 2) -> nn.Module:
    """A GPT whose weights are frozen; queries and values have low-rank additions."""
    model = Gpt(layers=layers)
    for param in model.parameters():
        param.requires_grad_(False)
    for block in model.blocks:
        for name in "qv":
            setattr(block.attention, name, LoraLinear(getattr(block.attention, name)))
    return model
