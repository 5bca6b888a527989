"""Interpolation paths and what can be derived from one prediction.

The path is x_t = alpha(t) x1 + sigma(t) x0, with x0 noise, x1 data and t from 0 (noise) to 1
(data); the velocity is dx_t/dt = alpha'(t) x1 + sigma'(t) x0. Formulas: SiT (arXiv 2401.08740),
Sec. 2 and Appendix B. All functions take t of shape [b] and arrays [b, h, w, c], float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError

PREDICTIONS = ("velocity", "score", "noise")
WEIGHTINGS = ("none", "velocity", "likelihood")

Time = Float[Array, " b"]
Latent = Float[Array, "b h w c"]


@dataclass(frozen=True)
class Path:
    """alpha, sigma and their derivatives; `alpha_ratio` is alpha'/alpha, stable near t = 0."""

    name: str
    alpha: Callable[[Time], Time]
    d_alpha: Callable[[Time], Time]
    sigma: Callable[[Time], Time]
    d_sigma: Callable[[Time], Time]
    alpha_ratio: Callable[[Time], Time]


LINEAR = Path(
    "linear",
    alpha=lambda t: t,
    d_alpha=jnp.ones_like,
    sigma=lambda t: 1 - t,
    d_sigma=lambda t: -jnp.ones_like(t),
    alpha_ratio=lambda t: 1 / t,
)

GVP = Path(
    "gvp",
    alpha=lambda t: jnp.sin(t * jnp.pi / 2),
    d_alpha=lambda t: jnp.pi / 2 * jnp.cos(t * jnp.pi / 2),
    sigma=lambda t: jnp.cos(t * jnp.pi / 2),
    d_sigma=lambda t: -jnp.pi / 2 * jnp.sin(t * jnp.pi / 2),
    alpha_ratio=lambda t: jnp.pi / (2 * jnp.tan(t * jnp.pi / 2)),
)

# Variance preserving, linear beta from 0.1 to 20 (Score SDE, arXiv 2011.13456, Eq. 33).
_BETA_MIN, _BETA_MAX = 0.1, 20.0


def _log_alpha(t):
    return -0.25 * (1 - t) ** 2 * (_BETA_MAX - _BETA_MIN) - 0.5 * (1 - t) * _BETA_MIN


def _d_log_alpha(t):
    return 0.5 * (1 - t) * (_BETA_MAX - _BETA_MIN) + 0.5 * _BETA_MIN


def _vp_sigma(t):
    return jnp.sqrt(-jnp.expm1(2 * _log_alpha(t)))


VP = Path(
    "vp",
    alpha=lambda t: jnp.exp(_log_alpha(t)),
    d_alpha=lambda t: jnp.exp(_log_alpha(t)) * _d_log_alpha(t),
    sigma=_vp_sigma,
    d_sigma=lambda t: -jnp.exp(2 * _log_alpha(t)) * _d_log_alpha(t) / _vp_sigma(t),
    alpha_ratio=_d_log_alpha,
)

PATHS = {p.name: p for p in (LINEAR, GVP, VP)}


@dataclass(frozen=True)
class Flow:
    """What the network predicts along which path; stored inside every checkpoint.

    Attributes:
      shift: of the times that are drawn and stepped through, see `flow.times`; 1 is none.

    Raises:
      InputError: unknown path or prediction, or a shift that is not above 0.
    """

    path: str = "linear"
    prediction: str = "velocity"
    shift: float = 1.0

    def __post_init__(self):
        if self.path not in PATHS:
            raise InputError(f"unknown path {self.path!r}: one of {', '.join(PATHS)}")
        if self.prediction not in PREDICTIONS:
            raise InputError(
                f"unknown prediction {self.prediction!r}: one of {', '.join(PREDICTIONS)}"
            )
        if not 0 < self.shift < math.inf:
            raise InputError(f"the shift of times must be a number above 0, got {self.shift}")

    def to_json(self) -> dict[str, Any]:
        """Without a shift that is none."""
        values = asdict(self)
        return values if self.shift != 1 else {k: v for k, v in values.items() if k != "shift"}

    @property
    def interpolant(self) -> Path:
        return PATHS[self.path]

    def train_interval(self) -> tuple[float, float]:
        """Times drawn in training; the singular ends are left out as in SiT."""
        if self.path == "vp":
            return 0.0, 1 - 1e-5
        return (0.0, 1.0) if self.prediction == "velocity" else (1e-3, 1 - 1e-3)

    def sample_interval(self) -> tuple[float, float]:
        """Times integrated by an ODE solver."""
        if self.path == "vp":
            return 0.0, 1 - 1e-3
        return self.train_interval()


def expand(t: Time) -> Float[Array, "b 1 1 1"]:
    return t[:, None, None, None]


def interpolate(path: Path, x0: Latent, x1: Latent, t: Time) -> tuple[Latent, Latent]:
    """x_t and its velocity."""
    xt = expand(path.alpha(t)) * x1 + expand(path.sigma(t)) * x0
    velocity = expand(path.d_alpha(t)) * x1 + expand(path.d_sigma(t)) * x0
    return xt, velocity


def score_coefficient(path: Path, t: Time) -> Time:
    """w in velocity = (alpha'/alpha) x + w score."""
    return path.alpha_ratio(t) * path.sigma(t) ** 2 - path.sigma(t) * path.d_sigma(t)


def velocity_from(flow: Flow, prediction: Latent, x: Latent, t: Time) -> Latent:
    """Velocity of the probability flow ODE from the network's prediction."""
    if flow.prediction == "velocity":
        return prediction
    path = flow.interpolant
    score = score_from(flow, prediction, x, t)
    return expand(path.alpha_ratio(t)) * x + expand(score_coefficient(path, t)) * score


def score_from(flow: Flow, prediction: Latent, x: Latent, t: Time) -> Latent:
    """Score (gradient of log density of x_t) from the network's prediction."""
    path = flow.interpolant
    if flow.prediction == "score":
        return prediction
    if flow.prediction == "noise":
        return -prediction / expand(path.sigma(t))
    # velocity = (a'/a) x + w score, multiplied by a/a', which is finite at t = 0
    inverse_ratio = path.alpha(t) / path.d_alpha(t)
    variance = path.sigma(t) ** 2 - inverse_ratio * path.d_sigma(t) * path.sigma(t)
    return (expand(inverse_ratio) * prediction - x) / expand(variance)


def clean_from(flow: Flow, velocity: Latent, x: Latent, t: Time) -> Latent:
    """Clean latent x1 of x = alpha x1 + sigma x0 that moves with this velocity."""
    path = flow.interpolant
    alpha, d_alpha, sigma, d_sigma = (
        expand(f(t)) for f in (path.alpha, path.d_alpha, path.sigma, path.d_sigma)
    )
    return (d_sigma * x - sigma * velocity) / (alpha * d_sigma - d_alpha * sigma)


def residual(
    flow: Flow, weighting: str, x0: Latent, velocity: Latent, prediction: Latent, t: Time
) -> Latent:
    """Weighted residual whose square is the training loss (SiT, Sec. 2 and Appendix B).

    velocity: v - v*; score: sigma s + x0; noise: e - x0; the last two times a weight in t:
    `none` 1, `velocity` w/sigma, `likelihood` sqrt(w)/sigma, with w of `score_coefficient`.
    """
    if flow.prediction == "velocity":
        return prediction - velocity
    path = flow.interpolant
    sigma = path.sigma(t)
    if flow.prediction == "score":
        error = expand(sigma) * prediction + x0
    else:
        error = prediction - x0
    if weighting == "velocity":
        error = error * expand(score_coefficient(path, t) / sigma)
    elif weighting == "likelihood":
        error = error * expand(jnp.sqrt(score_coefficient(path, t)) / sigma)
    return error
