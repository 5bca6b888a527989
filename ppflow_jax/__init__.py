"""ppflow_jax: Pyramidal Patchification Flow (arXiv 2506.23543) and SiT in JAX.

Conventions everywhere: arrays are NHWC, time `t` runs from 0 (noise) to 1 (data). `ppflow_jax.api`
has what notebooks and programs use; its names are here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppflow_jax.api import (
        Experiment,
        InputError,
        Model,
        Plan,
        Reading,
        RunError,
        Samples,
        evaluate,
        load,
    )

__all__ = [
    "Experiment",
    "InputError",
    "Model",
    "Plan",
    "Reading",
    "RunError",
    "Samples",
    "__version__",
    "evaluate",
    "load",
]


def __getattr__(name: str) -> Any:
    """Names of the API, imported when they are first used: commands start without them."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ppflow_jax")
    if name in __all__:
        from ppflow_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'ppflow_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
