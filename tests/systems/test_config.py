import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.accelerate import PRESETS, AccelerateConfig, accelerated, with_preset
from ppflow_jax.systems.forecast import ForecastConfig
from ppflow_jax.systems.sdtm import MergeConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exact", AccelerateConfig()),
        ("forecast=newton", AccelerateConfig(forecast=ForecastConfig("newton"))),
        (
            "forecast.interval=1/4, forecast.order=1, guidance=0.25-1",
            AccelerateConfig((0.25, 1.0), ForecastConfig(order=1, interval=(1, 4))),
        ),
        (
            "forecast.place=blocks,forecast.blocks=14-28/0-14,forecast.order=0",
            AccelerateConfig(
                forecast=ForecastConfig(order=0, place="blocks", blocks=((14, 28), (0, 14)))
            ),
        ),
        ("fast,forecast=none", AccelerateConfig()),
        (
            "merge=tome,merge.frequency=-0.05,merge.stages=0/1,merge.proportional=true",
            AccelerateConfig(
                merge=MergeConfig("tome", frequency=-0.05, proportional=True, merge_stages=(0, 1))
            ),
        ),
        ("balanced,forecast.interval=7", AccelerateConfig(forecast=ForecastConfig(interval=(7,)))),
    ],
)
def test_text_is_read(text, expected):
    assert AccelerateConfig.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("warp", "unknown preset 'warp': one of exact, balanced, fast"),
        ("", "unknown preset"),
        ("speed=3", "keys are guidance, forecast, forecast.order"),
        ("fast,interval=3,merge_stages=1", "write fast,forecast.interval=3,merge.stages=1$"),
        ("ratio=0.2,forecast.order=1", "write merge.ratio=0.2,forecast.order=1$"),
        ("forecast.interval=often", "cannot read 'forecast.interval=often'"),
        ("forecast.blocks=3", "LOW-HIGH"),
        ("forecast.order=9", "0 to 8"),
        ("forecast.interval=0", "at least 1"),
        ("forecast=chebyshev", "unknown forecast"),
        ("forecast.schedule=random", "unknown schedule"),
        ("forecast.place=blocks", "a range of blocks"),
        ("forecast.blocks=1-2", "only then"),
        ("forecast=adams", "forecast.place=velocity"),
        ("forecast.centre=1", "centre"),
        ("forecast=none,forecast.order=2", "with order"),
        ("merge.ratio=0.2,merge=none", "with ratio"),
        ("merge.proportional=yes", "true or false"),
    ],
)
def test_bad_text_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        AccelerateConfig.parse(text)


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("exact", 50, ("heun", 50)),
        ("forecast.interval=3", 50, ("heun", 50)),
        ("balanced", 50, ("ab2", 25)),
        ("fast, merge.ratio=0.2", 50, ("ab2", 17)),
        ("fast", 2, ("ab2", 2)),  # a step for every stage
    ],
)
def test_presets_take_fewer_steps_of_ab2(text, steps, expected):
    model = ModelConfig(PPFLOW2, 32, 4, **SIZES["XL"], num_classes=1000)
    config = with_preset(SamplerConfig("heun", steps, cfg=(1.0, 2.0)), text, model)
    assert (config.solver, config.steps) == expected and config.cfg == (1.0, 2.0)


def test_presets_keep_a_solver_of_one_evaluation_a_step():
    model = ModelConfig(PPFLOW2, 32, 4, **SIZES["XL"], num_classes=1000)
    config = with_preset(SamplerConfig("unipc2", 50), "fast", model)
    assert (config.solver, config.steps) == ("unipc2", 17)


@pytest.mark.parametrize("solver", ["dopri5", "sde-euler"])
def test_presets_refuse_solvers_that_they_cannot_stand_for(solver):
    model = ModelConfig(PPFLOW2, 32, 4, **SIZES["XL"], num_classes=1000)
    with pytest.raises(InputError, match=f"as heun, not {solver}"):
        with_preset(SamplerConfig(solver, 50), "fast", model)


def test_cost_of_the_presets():
    def cost(pyramid, text, cfg):
        model = ModelConfig(pyramid, 32, 4, **SIZES["XL"], num_classes=1000)
        config = with_preset(SamplerConfig("euler", 50, cfg=cfg), text, model)
        segments = accelerated(config, model, Flow(), AccelerateConfig.parse(text))
        return sampling_flops(model, segments)

    sit = cost(SIT, "exact", (1.5,))
    shares = [cost(PPFLOW2, text, (1.0, 1.5)) / sit for text in PRESETS]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(0.561, abs=0.005)
    # 7 + 7 full steps of 25 + 25, the first half unguided: 15.7% before the gates
    taylor = cost(PPFLOW2, "forecast.interval=4,forecast.order=0", (1.0, 1.5)) / sit
    assert taylor == pytest.approx(0.157, abs=0.005)
    guided_late = cost(PPFLOW2, "guidance=0.75-1", (1.5,)) / sit
    assert guided_late == pytest.approx((0.243 / 2 + 1.5 / 2) / 2, abs=0.01)
