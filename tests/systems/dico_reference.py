"""DiCo's network written down once more: NumPy, float64, by the names of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

LEVELS = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
_erf = np.vectorize(math.erf)


def gelu(x):
    return x * (1 + _erf(x / math.sqrt(2))) / 2


def silu(x):
    return x / (1 + np.exp(-x))


class Network:
    """Of a state dict; images [b, c, h, w]."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.state = {name: np.float64(value) for name, value in state.items()}

    def conv(self, name, x, *, depthwise=False):
        kernel = self.state[f"{name}.weight"]
        pad = kernel.shape[-1] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        rows, cols = x.shape[2:]
        out = 0.0
        for i, j in np.ndindex(kernel.shape[2:]):
            part = padded[:, :, i : i + rows, j : j + cols]
            if depthwise:
                out = out + part * kernel[:, 0, i, j][:, None, None]
            else:
                out = out + np.einsum("bchw,oc->bohw", part, kernel[:, :, i, j])
        bias = self.state.get(f"{name}.bias")
        return out if bias is None else out + bias[:, None, None]

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def told(self, k, n, y):
        frequencies = 10000.0 ** (-np.arange(128) / 128)
        angles = n[:, None] * frequencies
        features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        hidden = silu(self.linear(f"t_embedder_{k + 1}.mlp.0", features))
        table = self.state[f"y_embedder.embedding_table_{k}.weight"]
        return self.linear(f"t_embedder_{k + 1}.mlp.2", hidden) + table[y]

    def modulation(self, name, c, parts):
        values = self.linear(f"{name}.adaLN_modulation.1", silu(c))
        return [v[:, :, None, None] for v in np.split(values, parts, axis=1)]

    def block(self, name, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(name, c, 6)
        a = self.conv(f"{name}.conv1", norm(x) * (1 + scale1) + shift1)
        a = gelu(self.conv(f"{name}.conv2", a, depthwise=True))
        gate = self.conv(f"{name}.ca.1", a.mean(axis=(2, 3), keepdims=True))
        x = x + gate1 * self.conv(f"{name}.conv3", a / (1 + np.exp(-gate)))
        b = gelu(self.conv(f"{name}.conv4", norm(x) * (1 + scale2) + shift2))
        return x + gate2 * self.conv(f"{name}.conv5", b)

    def level(self, name, x, c):
        for i in range(len({k.split(".")[1] for k in self.state if k.startswith(f"{name}.")})):
            x = self.block(f"{name}.{i}", x, c)
        return x

    def down(self, name, x):
        x = self.conv(f"{name}.body.0", x)
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(b, 4 * c, h // 2, w // 2)

    def up(self, name, x):
        x = self.conv(f"{name}.body.0", x)
        b, c, h, w = x.shape
        x = x.reshape(b, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(b, c // 4, 2 * h, 2 * w)

    def __call__(self, x, n, y):
        c1, c2, c3 = (self.told(k, n, y) for k in range(3))
        first = self.level(LEVELS[0], self.conv("x_embedder.proj", x), c1)
        second = self.level(LEVELS[1], self.down("down1_2", first), c2)
        x = self.up("up3_2", self.level(LEVELS[2], self.down("down2_3", second), c3))
        x = self.conv("reduce_chan_level2", np.concatenate([x, second], axis=1))
        x = self.up("up2_1", self.level(LEVELS[3], x, c2))
        x = self.conv("reduce_chan_level1", np.concatenate([x, first], axis=1))
        x = self.level(LEVELS[4], x, c2)
        shift, scale = self.modulation("final_layer", c2, 2)
        return self.conv("final_layer.out_proj", norm(x) * (1 + scale) + shift)


def norm(x):
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
