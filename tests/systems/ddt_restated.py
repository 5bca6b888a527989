"""DiT^DH again, in NumPy and float64, from the formulas of the paper and on PyTorch's names."""

from __future__ import annotations

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


class Restated:
    """Tensors by name; RMSNorm, SwiGLU, one stage of a pyramid with patches of `patch` pixels.

    `unit` is the side of the smallest patch, `width` the encoder's, `heads` of encoder and head.
    """

    def __init__(self, tensors, *, heads, depths, patch, unit, suffix, level):
        self.w = {name: np.float64(value) for name, value in tensors.items()}
        self.heads, self.depths, self.patch, self.unit = heads, depths, patch, unit
        self.suffix, self.level = suffix, level

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * self.w[f"{name}.weight"]

    def patches(self, name, x):
        """Of one image [c, h, w]; a coarse patch has its finest ones' pixels as channels."""
        kernel, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        (c, height, width), p, u = x.shape, self.patch, self.unit
        rows = []
        for top in range(0, height, p):
            for left in range(0, width, p):
                block = x[:, top : top + p, left : left + p]
                cut = block.reshape(c, u, p // u, u, p // u)  # channel, (p, i), (q, j)
                cut = cut.transpose(0, 2, 4, 1, 3).reshape(-1, u, u)
                rows.append(np.einsum("dcpq,cpq->d", kernel, cut) + bias)
        return np.array(rows)

    def turn(self, x, side):
        """x [n, e] of one head."""
        half = x.shape[1] // 2
        out = np.empty_like(x)
        for token in range(len(x)):
            places = (token // side * self.patch / self.unit, token % side * self.patch / self.unit)
            for axis, place in enumerate(places):
                for k in range(half // 2):
                    w, i = place * 10000.0 ** (-2 * k / half), axis * half + 2 * k
                    a, b = x[token, i], x[token, i + 1]
                    out[token, i] = a * np.cos(w) - b * np.sin(w)
                    out[token, i + 1] = b * np.cos(w) + a * np.sin(w)
        return out

    def attention(self, name, x, heads, side):
        q, k, v = np.split(self.linear(f"{name}.qkv", x), 3, axis=-1)
        found = []
        for cut in np.split(np.arange(x.shape[1]), heads):
            one, two = (self.turn(a[:, cut], side) for a in (q, k))
            scores = one @ two.T / np.sqrt(len(cut))
            p = np.exp(scores - scores.max(-1, keepdims=True))
            found.append(p / p.sum(-1, keepdims=True) @ v[:, cut])
        return self.linear(f"{name}.proj", np.concatenate(found, -1))

    def block(self, i, x, c, heads, side):
        name = f"blocks.{i}"
        a1, a2, a3, a4, a5, a6 = np.split(
            self.linear(f"{name}.adaLN_modulation.1", silu(c)), 6, axis=-1
        )
        h = self.norm(f"{name}.norm1", x) * (1 + a2) + a1
        x = x + a3 * self.attention(f"{name}.attn", h, heads, side)
        one, two = np.split(
            self.linear(f"{name}.mlp.w12", self.norm(f"{name}.norm2", x) * (1 + a5) + a4), 2, -1
        )
        return x + a6 * self.linear(f"{name}.mlp.w3", silu(one) * two)

    def __call__(self, x, t, y, positions):
        """Velocity towards noise of one image [c, h, w] at noise time t."""
        side = x.shape[-1] // self.patch
        angle = 2 * np.pi * t * self.w["t_embedder.W"]
        features = np.concatenate([np.sin(angle), np.cos(angle)])
        time = self.linear("t_embedder.mlp.2", silu(self.linear("t_embedder.mlp.0", features)))
        if self.level is not None:
            time = time + self.w["level_embedder.embedding_table.weight"][self.level]
        c = silu(time + self.w["y_embedder.embedding_table.weight"][y])
        s = self.patches(f"s_embedder.proj{self.suffix}", x) + positions
        for i in range(self.depths[0]):
            s = self.block(i, s, c, self.heads[0], side)
        s = self.linear("s_projector", silu(time + s))
        h = self.patches(f"x_embedder.proj{self.suffix}", x)
        for i in range(self.depths[1]):
            h = self.block(self.depths[0] + i, h, s, self.heads[1], side)
        shift, scale = np.split(self.linear("final_layer.adaLN_modulation.1", silu(s)), 2, axis=-1)
        h = self.norm("final_layer.norm_final", h) * (1 + scale) + shift
        out, p, u = self.linear(f"final_layer.linear{self.suffix}", h), self.patch, self.unit
        out = out.reshape(side, side, u, u, -1, p // u, p // u)  # rows, columns, p, q, o, i, j
        return out.transpose(4, 0, 2, 5, 1, 3, 6).reshape(-1, side * p, side * p)
