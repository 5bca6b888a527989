"""Which programs suit the devices: the one place that asks what these are.

Models and training take the answers as settings that name no device, so that every program can be
had, and is tested, on any.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ppflow_jax.console import say
from ppflow_jax.errors import InputError

ATTENTIONS = ("auto", "xla", "deferred", "cudnn", "splash")
KERNELS = ("cudnn", "splash")  # without forward-mode derivatives
_MADE_FOR = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}
_RENAMED = {"pallas": "splash"}  # what earlier versions called it
CUDNN_HEAD = 128  # the widest; 256 from Hopper on, which no model here needs


@dataclass(frozen=True)
class Programs:
    """How a network is computed, not what: the numbers are equal but for rounding.

    Attributes:
      attention: one of `ATTENTIONS`, but not auto (see `models.attention`).
      rows: in every product the tokens of all images are rows of one matrix. XLA on CPU then
        transposes fewer copies of them in the backward pass; on TPU it would move up to 1.7 times
        the bytes.
      experts: of a mixture of experts, see `systems.experts`.
      unrolled: blocks run one after another, not in a scan (see `models.network.unstacked`).
    """

    attention: str = "xla"
    rows: bool = False
    unrolled: bool = False
    experts: str = "ragged"

    @property
    def step_options(self) -> dict[str, bool | str] | None:
        """The compiler's, for a training step.

        The barriers between unrolled blocks must outlive the pass of XLA on CPU that drops them
        before it fuses: every block would then sum up anew the gradients of all blocks after it.
        """
        return {"xla_disable_hlo_passes": "cse_barrier_expander"} if self.unrolled else None


def for_passes(
    attention: str = "auto",
    dtype: DTypeLike = jnp.float32,
    *,
    head: int = 64,
    mesh: Mesh | None = None,
) -> Programs:
    """For forward passes in `dtype` with heads of width `head`.

    They run on the devices of `mesh`; None: on JAX's default ones. What `auto` is, see
    `auto_attention`.

    Raises:
      InputError: an unknown attention, or one that the devices or `dtype` do not have.
    """
    if attention in _RENAMED:
        raise InputError(f"attention {attention} is now {_RENAMED[attention]}: give that, or auto")
    if attention not in ATTENTIONS:
        raise InputError(f"unknown attention {attention!r}: one of {', '.join(ATTENTIONS)}")
    kind = _kind(mesh)
    needed, device = _MADE_FOR.get(attention, (kind, ""))
    if kind != needed:
        raise InputError(f"attention {attention} needs {device}, and this is {kind}: choose auto")
    if attention == "cudnn" and jnp.dtype(dtype) != jnp.bfloat16:
        raise InputError("attention cudnn needs dtype bfloat16: choose that, or attention xla")
    if attention == "auto":
        attention, _ = auto_attention(kind, dtype, head)
    if kind == "cpu":
        return Programs(attention, rows=True, experts="blocks")
    return Programs(attention)


def for_training(
    attention: str = "auto",
    dtype: DTypeLike = jnp.float32,
    *,
    remat: str = "none",
    head: int = 64,
    mesh: Mesh | None = None,
    forward_mode: bool = False,
) -> Programs:
    """As `for_passes`, for training steps with the remat policy `remat`.

    With `forward_mode` derivatives are taken by forward mode too, which the kernels of attention
    do not have: `auto` is then none of them.

    One CPU is faster with unrolled blocks, though not with remat, which XLA undoes there outside of
    a scan. Several stand in for accelerators, and run their program.

    Raises:
      InputError: see `for_passes`; a kernel with `forward_mode`.
    """
    if forward_mode and attention in KERNELS:
        raise InputError(
            f"attention {attention} has no forward-mode derivative, which the objective takes: "
            "choose auto or xla"
        )
    if forward_mode and attention == "auto" and _kind(mesh) != "cpu":
        attention = "xla"
    alone = mesh is None or mesh.size == 1
    unrolled = _kind(mesh) == "cpu" and alone and remat == "none"
    return replace(for_passes(attention, dtype, head=head, mesh=mesh), unrolled=unrolled)


def _kind(mesh: Mesh | None) -> str:
    """cpu, gpu or tpu."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def auto_attention(kind: str, dtype: DTypeLike, head: int) -> tuple[str, str]:
    """Which program `auto` is on devices of a kind (cpu, gpu, tpu), and why.

    `deferred` on CPU, `splash` on TPU, `cudnn` on GPU in bfloat16 with heads that it takes, if a
    small call of it succeeds there; else `xla`. Calls that the program does not take are `xla` one
    by one, see `models.attention.attend`.
    """
    if kind == "cpu":
        return "deferred", "XLA on CPU makes one parallel program of it"
    if kind == "tpu":
        return "splash", "it writes no scores to memory"
    if kind != "gpu":
        return "xla", f"no other program is for {kind}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return "xla", f"cuDNN's takes bfloat16, and this is {jnp.dtype(dtype)}"
    if not cudnn_takes(head):
        return "xla", f"cuDNN's takes heads of 8, 16, ... {CUDNN_HEAD}, and these have {head}"
    if failure := _cudnn_failure(head):
        return "xla", f"cuDNN's fails here: {failure}"
    return "cudnn", "a small call of it and its gradient succeeded"


def cudnn_takes(head: int, tokens: int = 2) -> bool:
    """Whether cuDNN has attention for these shapes, with its gradient.

    Heads are a multiple of 8 wide (jax-ml/jax#24607), and the gradient needs an even number of
    tokens.
    """
    return head % 8 == 0 and head <= CUDNN_HEAD and tokens % 2 == 0


@functools.cache
def _cudnn_failure(head: int) -> str:
    """Why a small call of cuDNN's attention and its gradient fails, which a line then says; empty
    if it succeeds.

    A process tries it once for every width of heads that it meets. It fails before Ampere (sm80),
    and where the libraries do not fit each other, as in jax-ml/jax#32430.
    """
    q = jnp.ones((1, 64, 1, head), jnp.bfloat16)
    try:
        jax.block_until_ready(jax.grad(_cudnn_sum)(q))
    except Exception as e:  # cuDNN, XLA and JAX each have their own for what they lack
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        if jax.process_index() == 0:
            say(f"attention by XLA, because cuDNN's fails here: {reason}")
        return reason
    return ""


def _cudnn_sum(q: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.dot_product_attention(q, q, q, implementation="cudnn"))
