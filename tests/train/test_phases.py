"""Terms of the loss with leaves of their own, and the phases of a run."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.terms import Phase, parse_phases
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.models.stack import Taps
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems import registry
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.program import make_program
from ppflow_jax.train.state import init_state
from ppflow_jax.train.step import make_train_step

MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=1, width=16, depth=2, heads=2, num_classes=10)


@dataclass(frozen=True)
class Reads:
    """A linear map of pooled tokens against a field of the batch."""

    layer: int = 1
    name: str = "reads"
    fields: tuple[str, ...] = ("wanted",)

    @property
    def taps(self) -> Taps:
        return Taps(h=(self.layer,))

    def init(self, model, key):
        return {"kernel": 0.1 * jax.random.normal(key, (model.width, 3))}

    def __call__(self, own, out, view):
        assert out.taps[f"h/{self.layer}"].shape[1] == view.grid[0] * view.grid[1]
        read = jnp.mean(out.taps[f"h/{self.layer}"], axis=1) @ own["kernel"]
        return jnp.sum(jnp.square(read - view.batch["wanted"]), axis=-1)


OBJECTIVE = FlowObjective(PPFLOW2, Flow(), 10, terms=(Reads(),))
BATCH = {
    "x": jax.random.normal(jax.random.key(3), (8, 8, 8, 1)),
    "label": jnp.arange(8),
    "wanted": jax.random.normal(jax.random.key(4), (8, 3)),
}
TX = optax.adamw(1e-2, weight_decay=0.1)


@pytest.fixture(scope="module")
def state():
    fresh = init_state(MODEL, TX, jax.random.key(0), OBJECTIVE)
    noisy = jax.tree.map(lambda leaf: leaf + 0.1, fresh["params"])
    return fresh | {"params": noisy}


def step(weights, **options):
    made = make_train_step(OBJECTIVE, make_apply(MODEL), TX, ema=0.9, weights=weights, **options)
    return jax.jit(made)


def test_own_leaves_are_trained_and_neither_averaged_nor_sampled(state):
    assert state["params"]["terms"]["reads"]["kernel"].shape == (16, 3)
    assert "terms" not in state["ema"]
    new, metrics = step({"reads": 0.5})(state, BATCH, jax.random.key(1))
    assert np.any(new["params"]["terms"]["reads"]["kernel"] != 0)
    moved = new["params"]["terms"]["reads"]["kernel"] != state["params"]["terms"]["reads"]["kernel"]
    assert np.all(moved) and "terms" not in new["ema"] and metrics["reads"] > 0


def test_the_term_adds_its_weight_to_what_is_minimised(state):
    draws = OBJECTIVE.draw(jax.random.key(1), BATCH)
    apply = make_apply(MODEL)
    value = lambda w: OBJECTIVE.loss(apply, state["params"], {}, BATCH, draws, {"reads": w})
    (total, metrics), (twice, _), (none, off) = value(0.5), value(1.0), value(0.0)
    assert total == pytest.approx(float(metrics["loss"] + 0.5 * metrics["reads"]), rel=1e-6)
    assert twice - total == pytest.approx(float(0.5 * metrics["reads"]), rel=1e-4)
    assert none == pytest.approx(float(metrics["loss"]), rel=1e-6) and "reads" not in off


def test_an_idle_term_and_its_moments_stay_as_they_are(state):
    busy, _ = step({"reads": 0.5})(state, BATCH, jax.random.key(1))
    idle, _ = step({})(busy, {k: BATCH[k] for k in ("x", "label")}, jax.random.key(1))
    adam = lambda s: [s["opt_state"][0].mu["terms"], s["opt_state"][0].nu["terms"]]
    same = lambda a, b: jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert np.any(adam(busy)[0]["reads"]["kernel"] != 0)
    assert same(adam(busy), adam(idle)) and same(busy["params"]["terms"], idle["params"]["terms"])
    assert not same(busy["params"]["blocks"], idle["params"]["blocks"])


def test_a_step_without_the_term_moves_the_network_as_one_that_never_had_it(state):
    plain = {"params": {k: v for k, v in state["params"].items() if k != "terms"}}
    plain = state | plain | {"opt_state": TX.init(plain["params"])}
    objective = FlowObjective(PPFLOW2, Flow(), 10)
    never = jax.jit(make_train_step(objective, make_apply(MODEL), TX, ema=0.9))
    batch = {k: BATCH[k] for k in ("x", "label")}
    one, _ = step({})(state, batch, jax.random.key(1))
    other, _ = never(plain, batch, jax.random.key(1))
    for name, leaf in other["params"].items():
        jax.tree.map(np.testing.assert_array_equal, one["params"][name], leaf)
    jax.tree.map(np.testing.assert_array_equal, one["ema"], other["ema"])


def test_microbatches_have_their_own_fields(state):
    whole, all_at_once = step({"reads": 0.5})(state, BATCH, jax.random.key(1))
    parts, in_two = step({"reads": 0.5}, accumulate=2)(state, BATCH, jax.random.key(1))
    assert all_at_once["reads"] == pytest.approx(float(in_two["reads"]), rel=1e-5)
    adam = lambda s: s["opt_state"][0].mu["terms"]["reads"]["kernel"]
    np.testing.assert_allclose(adam(parts), adam(whole), rtol=1e-4, atol=1e-6)


def test_a_phase_takes_no_more_of_a_batch_than_it_needs(monkeypatch):
    monkeypatch.setitem(registry.TERMS, "reads", Reads)
    config = digits.get_config()
    config.model.update(dict(width=16, depth=2, heads=2))
    config.data.batch_size, config.flow.terms = 8, ("reads:layer=2",)
    config.train.phases, config.data.fields = ((3, {"reads": 0.5}), (6, {})), ("wanted",)
    program = make_program(Experiment.from_config(config), make_mesh(devices=jax.devices()[:1]))
    first, second = program.steps
    assert [program.step(n) for n in (0, 2, 3, 5, 9)] == [first, first, second, second, second]
    assert first.fields == ("wanted",) and second.fields == ()
    frozen = jax.eval_shape(lambda: jax.random.key(0)), {}
    shapes = jax.eval_shape(lambda: BATCH)
    plain = {k: shapes[k] for k in ("x", "label")}
    texts = [
        each.run.lower(program.abstract, batch, *frozen).as_text()
        for each, batch in ((first, shapes), (second, plain))
    ]
    products = [[line for line in t.splitlines() if "dot_general" in line] for t in texts]
    assert [any("x3xf32" in line for line in lines) for lines in products] == [True, False]


def test_phases_of_a_configuration():
    none = parse_phases((), 10, {"balance": 0.01}, ())
    assert none == (Phase(10, (("balance", 0.01),)),)
    two = parse_phases(((3, {"a": 1}), (9, {"balance": 0})), 9, {"balance": 0.01}, ("a",))
    assert [phase.active for phase in two] == [{"balance": 0.01, "a": 1.0}, {}]


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ((), ("a",), "no weight to a"),
        (((3, {}),), ("a",), "no weight to a"),
        (((3, {"a": 1}), (3, {})), ("a",), "one after another"),
        (((0, {"a": 1}),), ("a",), "one after another"),
        (((3, {"b": 1}),), ("a",), "no term b; there are a"),
        (((3, {"b": 1}),), (), "config.flow.terms"),
        (((3, {"a": -1}),), ("a",), "at least 0"),
        (((3, {"a": float("nan")}),), ("a",), "at least 0"),
        ((3, {"a": 1}), ("a",), "until_step"),
        ((("x", {"a": 1}),), ("a",), "until_step"),
    ],
)
def test_bad_phases(values, names, message):
    with pytest.raises(InputError, match=message):
        parse_phases(values, 9, {}, names)


def test_a_term_that_there_is_not():
    config = digits.get_config()
    config.flow.terms = ("nothing:layer=2",)
    with pytest.raises(InputError, match="unknown term 'nothing'"):
        Experiment.from_config(config)
