"""The pictures that a run is judged by while it is trained, the same as `evaluate --checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.devices.exchange import EXPERT
from ppflow_jax.devices.layout import Layout
from ppflow_jax.devices.memory import device_memory
from ppflow_jax.devices.sharding import AXES, layout, replicated
from ppflow_jax.devices.zero import Whole
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.images import MICROBATCH, Generator
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params, abstract_params, make_apply


class RunPictures:
    """Image k has the noise of (seed, k), and the label and conditions of row k of `told`.

    In float32 at highest precision, however the model is trained. Between meshes of other sizes
    the last bits of the samples differ, and so a few pictures by one grey level.
    """

    def __init__(
        self, decoder: Decoder, config: SamplerConfig, *, told: Cond, seed: int, mesh: Mesh
    ):
        """
        Args:
          decoder: makes the pictures; its card is that of the model.
          mesh: of the parameters that will be given. Those that `fsdp` splits are gathered once for
            all pictures, if they fit.
        """
        card = decoder.card
        self.count, self.seed, self.told = len(jax.tree.leaves(told)[0]), seed, told
        mesh, self._gather = _gathered(card.model, mesh)
        cut = mesh.size > mesh.shape["data"]
        apply = make_apply(card.model, layout=layout(mesh, card.model.rules) if cut else Layout())
        sampler = make_plan(card, config).sampler(apply)
        microbatch = min(MICROBATCH, self.count)
        self._generator = Generator(sampler, decoder, microbatch=microbatch, mesh=mesh)

    def __call__(
        self, params: Params, done: Callable[[int], Any] = lambda images: None
    ) -> UInt8[np.ndarray, "n h w c"]:
        """The pictures of `params`; `done` is told how many more there are after every group.

        All processes of the mesh call this at once, and get the same.

        Raises:
          RunError: an image is not finite.
        """
        params, parts = self._gather(params), []
        ids = np.arange(self.count)
        for images in self._generator(params, ids, self.told, seed=self.seed):
            parts.append(images.pictures)
            done(len(images.ids))
        return np.concatenate(parts)


def _gathered(model: ModelConfig, mesh: Mesh) -> tuple[Mesh, Callable[[Params], Params]]:
    """The mesh to sample on, and what brings parameters from `mesh` to it."""
    whole = Whole(mesh, model.rules, jnp.float32)
    alone = mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1 or EXPERT in mesh.shape
    if alone or not whole.fits_beside(abstract_params(model), device_memory()):
        return mesh, lambda params: params
    flat = Mesh(mesh.devices.reshape(-1, 1, 1), AXES, axis_types=mesh.axis_types)
    return flat, jax.jit(lambda params: params, out_shardings=replicated(flat))
