"""One configuration for everything that makes sampling cheaper, and its text form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from ppflow_jax.errors import InputError
from ppflow_jax.flow.multistep import MULTISTEP
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import ADAPTIVE, SamplerConfig, Segment
from ppflow_jax.flow.segments import segments_of
from ppflow_jax.flow.solvers import JUMPS
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.feedback import refuse
from ppflow_jax.models.network import Params
from ppflow_jax.models.parts import FullAttention
from ppflow_jax.systems.dydit import DyDiT
from ppflow_jax.systems.dydit_widths import WidthConfig, narrowed
from ppflow_jax.systems.fewer_experts import ExpertsConfig, with_experts
from ppflow_jax.systems.forecast import ForecastConfig, forecasted
from ppflow_jax.systems.mixture_of_blocks import MobConfig, without_left_out
from ppflow_jax.systems.ras import RasConfig, regional
from ppflow_jax.systems.rettention import RettentionConfig, sparse
from ppflow_jax.systems.sdtm import MergeConfig, merged


@dataclass(frozen=True)
class AccelerateConfig:
    """What is added to the pyramid; the default adds nothing.

    A scale of 1 is never evaluated with the null class, with or without this.

    Attributes:
      guidance: guide only in these times, low < t <= high, instead of the sampler's interval.
      forecast: forecasting of features.
      merge: merging of tokens, in other stages than forecasts.
      ras: steps that compute a part of the tokens, in other stages than these.
      rettention: steps of sparse attention, in other stages than these.
      width: slices of the weights where routers switch off the rest, in other stages than these.
      experts: another number of experts than was trained, in other stages than these.
      mob: without the blocks that a router leaves out, in other stages than these.
    """

    guidance: tuple[float, float] | None = None
    forecast: ForecastConfig | None = None
    merge: MergeConfig | None = None
    ras: RasConfig | None = None
    rettention: RettentionConfig | None = None
    width: WidthConfig | None = None
    experts: ExpertsConfig | None = None
    mob: MobConfig | None = None

    @classmethod
    def parse(cls, text: str) -> AccelerateConfig:
        """What `"forecast.interval=1/4,forecast.order=2"` adds; a preset in front adds nothing.

        Values for each stage are joined by `/`, ranges by `-`. `forecast=none`, `merge=none` and
        so on switch off; `merge=sdtm` or a field of `MergeConfig`, as `merge.ratio`, adds merging.

        Raises:
          InputError: an unknown key or preset, or a value that cannot be read.
        """
        first, *rest = text.replace(" ", "").split(",")
        pairs = [first, *rest]
        if "=" not in first:
            if first not in PRESETS:
                raise InputError(
                    f"unknown preset {first!r}: one of {', '.join(PRESETS)}, or key=value pairs"
                )
            pairs = rest
        changes: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        guidance, known = None, {k: v for part in _PARTS for k, v in _keys(part).items()}
        for pair in pairs:
            key, _, value = pair.partition("=")
            try:
                if key == "guidance":
                    guidance = _pair(float)(value)
                    continue
                part, name, read = known[key]
                changes[part][name] = read(value)
            except KeyError:
                raise InputError(_unknown(pair, text, known)) from None
            except ValueError as e:
                raise InputError(
                    f"cannot read {pair!r}: {e}; write e.g. forecast.interval=4, "
                    "forecast.interval=1/4 (one for each stage), forecast.blocks=4-8, "
                    "guidance=0.2-1, merge.stages=0/1"
                ) from e
        return cls(guidance, **{name: _part(name, changes[name]) for name in _PARTS})


# The field with the part's own name switches it on: forecast=taylor.
_PARTS: dict[str, type] = {
    "forecast": ForecastConfig,
    "merge": MergeConfig,
    "ras": RasConfig,
    "rettention": RettentionConfig,
    "width": WidthConfig,
    "experts": ExpertsConfig,
    "mob": MobConfig,
}

# How many times fewer steps, by AB2 in place of a solver that is no multistep rule: at equal time
# this had the lowest error of all that needs no plan (docs/accelerate.md).
PRESETS = {"exact": 1, "balanced": 2, "fast": 3}
PRESET_SOLVER = "ab2"


def with_preset(config: SamplerConfig, text: str, model: ModelConfig) -> SamplerConfig:
    """The configuration under the preset that a text for `AccelerateConfig.parse` begins with.

    Raises:
      InputError: an adaptive or stochastic solver, or one of jumps.
    """
    fewer = PRESETS.get(text.replace(" ", "").partition(",")[0], 1)
    if fewer == 1:
        return config
    if config.solver in (ADAPTIVE, *JUMPS) or config.stochastic:
        raise InputError(
            f"presets take fewer steps by {PRESET_SOLVER}, in place of an ODE solver of fixed "
            f"steps: choose one, as heun, not {config.solver}"
        )
    solver = config.solver if config.solver in MULTISTEP else PRESET_SOLVER
    steps = max(len(model.pyramid), round(config.steps / fewer))
    return replace(config, solver=solver, steps=steps)


def _part(name: str, changes: dict[str, Any]) -> Any:
    """Of `_PARTS`, if anything of it is asked for."""
    if changes.get(name) == "none":
        if len(changes) > 1:
            raise InputError(f"{name}=none with {', '.join(k for k in changes if k != name)}")
        return None
    return _PARTS[name](**changes) if changes else None


def _keys(part: str) -> dict[str, tuple[str, str, Callable[[str], Any]]]:
    """Key in the text -> (part, field, how its text is read)."""
    return {
        part if f.name == part else f"{part}.{f.name.removeprefix(f'{part}_')}": (
            *(part, f.name),
            _READERS[str(f.type)],
        )
        for f in fields(_PARTS[part])
    }


def _unknown(pair: str, text: str, known: dict[str, tuple]) -> str:
    """What to write instead of a key that there is not."""
    now = {name: key for key, (_, name, _) in reversed(known.items())}
    if pair.partition("=")[0] in now:
        pairs = (p.partition("=") for p in text.replace(" ", "").split(","))
        new = ",".join(now.get(key, key) + equals + value for key, equals, value in pairs)
        return f"keys have their part in front: write {new}"
    return f"cannot read {pair!r}: keys are guidance, {', '.join(known)}"


def _pair(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def pair(text: str) -> tuple:
        low, dash, high = text.partition("-")
        if not dash:
            raise ValueError("a range is two numbers, LOW-HIGH")
        return read(low), read(high)

    return pair


def _each(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: tuple(read(part) for part in text.split("/"))


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false is expected")
    return text == "true"


_READERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": _bool,
    "tuple[int, ...]": _each(int),
    "tuple[float, ...]": _each(float),
    "tuple[tuple[int, int], ...]": _each(_pair(int)),
}


def accelerated(
    config: SamplerConfig,
    model: ModelConfig,
    flow: Flow,
    accelerate: AccelerateConfig,
    params: Params | None = None,
) -> tuple[Segment, ...]:
    """The plan of `config` with everything of `accelerate` in it, for `Sampler(segments=...)`.

    Args:
      params: of the model, for what depends on them: width.

    Raises:
      InputError: a combination that is not possible, and why.
    """
    if accelerate.guidance is not None:
        config = replace(config, cfg_interval=accelerate.guidance)
    segments = list(segments_of(config, model, flow))
    forecast, merge = accelerate.forecast, accelerate.merge
    parts = [name for name in _PARTS if getattr(accelerate, name) is not None]
    if not parts:
        return tuple(segments)
    _check_together(config, model, accelerate, parts)
    if forecast is not None:
        if forecast.forecast == "adams" and config.solver != "euler":
            raise InputError(
                f"forecast=adams is a multistep rule in place of the solver's own, not on top of "
                f"{config.solver}: choose euler"
            )
        segments = forecasted(segments, model, forecast)
    if merge is not None:
        segments = merged(segments, model, merge)
    if accelerate.ras is not None:
        segments = regional(segments, model, accelerate.ras)
    if accelerate.rettention is not None:
        segments = sparse(segments, model, accelerate.rettention)
    if accelerate.width is not None:
        segments = narrowed(segments, model, accelerate.width, config.solver, params)
    if accelerate.experts is not None:
        segments = with_experts(segments, model, accelerate.experts)
    if accelerate.mob is not None:
        segments = without_left_out(segments, model, accelerate.mob)
    return tuple(segments)


def _check_together(
    config: SamplerConfig, model: ModelConfig, accelerate: AccelerateConfig, parts: list[str]
) -> None:
    """
    Raises:
      InputError: a solver or blocks that one of `parts` is not for.
    """
    if config.solver == ADAPTIVE:
        raise InputError(
            f"{ADAPTIVE} chooses its own steps, so no schedule of full steps can be made for it: "
            f"choose euler or heun with {parts[0]}"
        )
    before = [name for name in parts if name not in ("width", "experts", "mob")]  # earlier values
    if config.stochastic and before:
        raise InputError(
            f"{config.solver} adds noise at every step, which breaks the smoothness that values "
            f"taken from earlier steps rest on: choose euler or heun with {before[0]}"
        )
    if config.solver in JUMPS and (late := [name for name in before if name != "merge"]):
        raise InputError(
            f"{config.solver} evaluates another average at every step, and {late[0]} takes values "
            f"of earlier steps: leave {late[0]} out of --accelerate"
        )
    _check_trunk(parts[0], model)
    inside = [name for name in before if name != "forecast"]  # of blocks
    if inside:
        _check_blocks(inside[0], model)
    forecast = accelerate.forecast
    if set(parts) - {"forecast", "experts"} or (forecast and forecast.place != "velocity"):
        refuse(model)


def _check_trunk(name: str, model: ModelConfig) -> None:
    """
    Raises:
      InputError: a network that is no transformer.
    """
    if model.network is not None and not model.has_trunk:
        raise InputError(
            f"{name} works on the transformer's blocks, which {model.network.kind} does not "
            f"have: leave {name} out of --accelerate"
        )


def _check_blocks(name: str, model: ModelConfig) -> None:
    """
    Raises:
      InputError: blocks whose inside the part `name` cannot compute otherwise.
    """
    block = model.block
    if not isinstance(block.mixer, FullAttention):
        raise InputError(
            f"{name} is for full attention, not for {block.mixer}: leave it out of --accelerate"
        )
    if isinstance(block.wrap, DyDiT):
        raise InputError(
            f"{name} takes blocks apart whose routers decide what is computed: leave it out of "
            "--accelerate, or give width=1 in its place"
        )
    if name == "merge" and block.wrap is not None:
        raise InputError(
            f"token merging takes blocks apart that {block.wrap.kind} stands around: leave merge "
            "out of --accelerate"
        )
