"""Settings of XLA that were measured to pay (docs/performance.md)."""

from __future__ import annotations

import os

import jaxlib.version

_YNN = "xla_cpu_experimental_ynn_fusion_type"


def configure() -> None:
    """To be called before the first device is used; what the user set in XLA_FLAGS stays.

    On CPU, XLA hands matrix products to YNNPACK by default. Eigen's are faster on the sizes of
    transformer blocks. XLA ends the process at a flag that it does not know, so the flag is set
    only for the versions that are known to have it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _YNN not in flags and jaxlib.version.__version_info__[:2] == (0, 10):
        os.environ["XLA_FLAGS"] = f"{flags} --{_YNN}=".strip()
