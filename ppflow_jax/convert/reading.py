"""A SiT or PPFlow file as a model in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.load import load_state
from ppflow_jax.convert.source import Source
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, Pyramid
from ppflow_jax.systems.expand import expand, expanded_config

PYRAMIDS = {"ppflow2": PPFLOW2, "ppflow3": PPFLOW3}


@dataclass(frozen=True)
class Reading:
    """What a file does not say, or is to be read as.

    Attributes:
      pyramid: `ppflow2`, `ppflow3` or as 4x4@0.5,2x2@1; expands a one-stage model.
      seed: of the level table when expanding.
      heads: where the width is not that of a public model.
      latent_size: where the file has no positions.
      ffn: where the defaults of a mixture of experts are not its settings.
      mixer: where it is not full attention.
      network: where names and shapes do not tell all of a network that is not PPFlow's.
      path, prediction: None takes them from the file's arguments, or those of public weights.
      space: `latents` or `pixels`.
      dtype: of the parameters; None keeps that of each tensor.
    """

    pyramid: str | None = None
    seed: int = 0
    heads: int | None = None
    latent_size: int | None = None
    ffn: str | None = None
    mixer: str | None = None
    network: str | None = None
    path: str | None = None
    prediction: str | None = None
    space: str = "latents"
    dtype: str | None = None

    @property
    def stages(self) -> Pyramid | None:
        """
        Raises:
          InputError: no pyramid.
        """
        text = self.pyramid
        return (PYRAMIDS.get(text) or Pyramid.parse(text)) if text else None

    def flow(self, source: Source, config: ModelConfig) -> Flow:
        """
        Raises:
          InputError: a path along which the network does not predict.
        """
        flow = Flow() if config.network is None else Flow(**config.network.flow(config))
        path = self.path or source.argument("path_type") or flow.path
        prediction = self.prediction or source.argument("prediction") or flow.prediction
        if config.network is not None:
            config.network.check_path(path)
        return replace(flow, path=path, prediction=prediction)

    def config(self, source: Source, kind: str) -> ModelConfig:
        """Architecture of the file, before it is expanded.

        Raises:
          InputError: see `find_config`, `expanded_config`.
        """
        config = find_config(
            source.state,
            kind,
            pyramid=self.stages,
            heads=self.heads,
            latent_size=self.latent_size,
            ffn=self.ffn,
            mixer=self.mixer,
            network=self.network,
        )
        if self.expands(config):
            expanded_config(config, self.stages)  # before anything is read
        return config

    def expands(self, config: ModelConfig) -> bool:
        return self.stages is not None and self.stages != config.pyramid


@dataclass(frozen=True)
class FileModel:
    """A model of a file; `positions` and `drift` as in `load.Loaded`."""

    card: Card
    params: Params
    positions: dict[int, np.ndarray]
    drift: float


def read_model(
    source: Source, kind: str, reading: Reading, on_tensor: Callable[[], object] = lambda: None
) -> FileModel:
    """The model of a `sit` or `ppflow` file, NumPy arrays in the dtypes of the file.

    Raises:
      InputError: see `find_config`, `load_state`, `expand`.
    """
    config = reading.config(source, kind)
    flow = reading.flow(source, config)
    dtype = np.dtype(reading.dtype) if reading.dtype else None
    loaded = load_state(config, source.state, dtype=dtype, on_tensor=on_tensor)
    params, positions = loaded.params, loaded.positions
    if reading.expands(config):
        config, params = expand(config, params, reading.stages, reading.seed)
        positions = {}
    card = Card(config, flow, reading.space)
    return FileModel(card, params, positions, loaded.drift)
