"""SiT and PPFlow in PyTorch, compact: what JAX is measured against. Needs torch.

The names of the parameters are those of the public state dicts, so `convert.keys.to_torch` fills
the network. A patch is one matrix product on its pixels, in the order of those weights (see
`convert.keys`). Attention is `scaled_dot_product_attention` and nothing in a forward pass depends
on data, so that `torch.compile(fullgraph=True)` takes all of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ppflow_jax.convert.keys import position_values, to_torch
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import FREQUENCIES
from ppflow_jax.models.network import Params


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN; shift and scale are [b, 1, d], or [b, n, d] where samples share a row."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (c h e) -> c b h n e", c=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(out, "b h n e -> b n (h e)"))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.attn = _Attention(width, config.heads)
        self.mlp = _Mlp(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = self.adaLN_modulation(c).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attn(_modulated(x, shift1, scale1), mask)
        return x + gate2 * self.mlp(_modulated(x, shift2, scale2))


class _Final(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor, linear: nn.Linear) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return linear(_modulated(x, shift, scale))


class _Empty(nn.Module):
    """A name in the state dict."""


class TorchPPFlow(nn.Module):
    """The network of a `ModelConfig`; latents are [b, c, h, w]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, last = config.width, config.pyramid.stages[-1].patch
        out_channels = config.channels * (2 if config.learn_sigma else 1)
        self.factors, self.packs = [], []
        self.x_embedder, self.final_layer = _Empty(), _Final(config)
        areas = [s.patch[0] * s.patch[1] for s in config.pyramid.stages]
        for stage, (ph, pw) in enumerate(s.patch for s in config.pyramid.stages):
            suffix = self._suffix(stage)
            self.factors.append(dict(p=last[0], q=last[1], i=ph // last[0], j=pw // last[1]))
            self.packs.append(areas[stage] // areas[-1])
            channels = config.channels * self.packs[-1]
            conv = nn.Conv2d(channels, width, last, stride=last)
            setattr(self.x_embedder, f"proj{suffix}", conv)
            linear = nn.Linear(width, areas[stage] * out_channels)
            setattr(self.final_layer, f"linear{suffix}", linear)
            position = torch.from_numpy(position_values(config, stage))
            self.register_buffer(f"positions{stage}", position, persistent=False)
        self.t_embedder, self.y_embedder = _Empty(), _Empty()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.y_embedder.embedding_table = nn.Embedding(config.num_classes + 1, width)
        if len(config.pyramid) > 1:
            self.level_embedder = _Empty()
            self.level_embedder.embedding_table = nn.Embedding(len(config.pyramid), width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))

    def fill(self, params: Params) -> TorchPPFlow:
        """Takes our parameters."""
        state = to_torch(self.config, params)
        self.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
        return self

    def forward(self, x: Tensor, t: Tensor, y: Tensor, stage: int) -> Tensor:
        """Prediction of one stage at its own token count, with the shape of x."""
        h, c = self._tokens(x, stage), self._condition(t, y, stage)[:, None]
        for block in self.blocks:
            h = block(h, c)
        return self._prediction(h, c, stage)

    def packed(
        self, xs: tuple[Tensor, ...], ts: tuple[Tensor, ...], ys: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Predictions of all stages in one pass, as the public code trains.

        Every row has the token count of the last stage and holds several samples of a coarser
        one, token by token in turn. A mask, 1 on the diagonal blocks and else 0, is added to the
        logits: it does not keep samples apart, so the predictions differ from `forward`. It is
        here for the time it takes, and agrees with the public code's own numbers.
        """
        hs, cs, masks = [], [], []
        for stage, (x, t, y) in enumerate(zip(xs, ts, ys)):
            pack, h = self.packs[stage], self._tokens(x, stage)
            tokens = h.shape[1]
            hs.append(rearrange(h, "(b k) n d -> b (n k) d", k=pack))
            c = self._condition(t, y, stage)
            cs.append(repeat(c, "(b k) d -> b (n k) d", k=pack, n=tokens))
            block = torch.arange(tokens * pack, device=x.device) // tokens
            mask = (block[:, None] == block[None]).to(h.dtype)
            masks.append(mask.expand(len(hs[-1]), 1, -1, -1))
        h, c, mask = torch.cat(hs), torch.cat(cs), torch.cat(masks)
        for block in self.blocks:
            h = block(h, c, mask)
        sizes, out = [len(part) for part in hs], []
        for stage, parts in enumerate(zip(h.split(sizes), c.split(sizes))):
            pack = self.packs[stage]
            own = [rearrange(part, "b (n k) d -> (b k) n d", k=pack) for part in parts]
            out.append(self._prediction(*own, stage))
        return tuple(out)

    def _tokens(self, x: Tensor, stage: int) -> Tensor:
        conv = getattr(self.x_embedder, f"proj{self._suffix(stage)}")
        layout = "b c (r p i) (s q j) -> b (r s) (c i j p q)"
        pixels = rearrange(x, layout, **self.factors[stage])
        h = F.linear(pixels, conv.weight.flatten(1), conv.bias)
        return h + getattr(self, f"positions{stage}")

    def _prediction(self, h: Tensor, c: Tensor, stage: int) -> Tensor:
        rows, cols = self.config.pyramid.grid(stage, self.config.latent_size)
        out = self.final_layer(h, c, getattr(self.final_layer, f"linear{self._suffix(stage)}"))
        layout = "b (r s) (p q o i j) -> b o (r p i) (s q j)"
        out = rearrange(out, layout, r=rows, s=cols, **self.factors[stage])
        return out[:, : self.config.channels]

    def _condition(self, t: Tensor, y: Tensor, stage: int) -> Tensor:
        steps = torch.arange(FREQUENCIES, device=t.device, dtype=torch.float32)
        angles = t[:, None] * torch.exp(-math.log(10000.0) * steps / FREQUENCIES)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        c = self.t_embedder.mlp(features) + self.y_embedder.embedding_table(y)
        if len(self.config.pyramid) > 1:
            c = c + self.level_embedder.embedding_table.weight[stage]
        return c

    def _suffix(self, stage: int) -> str:
        return "" if stage == len(self.config.pyramid) - 1 else str(stage + 1)
