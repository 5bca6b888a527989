"""Wrappers are removed wherever they stand, and one model of a file is chosen or asked for."""

from __future__ import annotations

import itertools
import random

import jaxtyping
import pytest

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.convert.autoencoder_keys import key_table as autoencoder_table
from ppflow_jax.convert.inception_keys import key_table as inception_table
from ppflow_jax.convert.keys import key_table, position_names
from ppflow_jax.convert.names import Wanted, choose
from ppflow_jax.errors import InputError
from ppflow_jax.metrics.inception import Inception, InceptionConfig
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2

WRAPPERS = (
    *("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "model"),
    *("net", "ema_model", "first_stage_model", "vae"),
)
SEQUENCES = [s for n in (1, 2, 3) for s in itertools.product(WRAPPERS, repeat=n)]
MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=4, width=64, depth=2, heads=4, num_classes=10)
SIT = [entry.torch for entry in key_table(MODEL)] + list(position_names(MODEL))


def autoencoder(kind, naming):
    config = AutoencoderKLConfig(block_out_channels=(32, 64), layers_per_block=1)
    params = Autoencoder(config if kind == "vae" else TAESDConfig(width=8)).abstract_params()
    return [names[naming] for names in autoencoder_table(kind, params).values()]


@pytest.fixture(scope="module")
def families():
    """Every name of every model that is known, in all namings."""
    inception = inception_table(Inception(InceptionConfig()).abstract_params()).values()
    graph = inception_table(Inception(InceptionConfig(scale=False, logits=False)).abstract_params())
    tiny = autoencoder("taesd", "taesd")
    half = [n.removeprefix("decoder.") for n in tiny if n.startswith("decoder.")]
    return [
        ("sit", SIT),
        *(("vae", autoencoder("vae", n)) for n in ("diffusers", "legacy", "compvis")),
        *(("taesd", names) for names in (tiny, half, autoencoder("taesd", "diffusers"))),
        ("inception", [names["pytorch_fid"] for names in inception]),
        ("inception", [names["graph"] for names in graph.values()]),
    ]


def named(names, wanted=None):
    choice = choose(names, wanted or Wanted())
    return choice, {names[index]: name for index, name in choice.names}


def prefixed(prefix, names=SIT):
    return [f"{prefix}.{name}" for name in names]


def test_models_without_wrappers_keep_their_names(families):
    for family, names in families:
        choice, found = named(names)
        assert choice.family == family and not choice.left_out and not choice.prefix.strip("net")
        assert found == {name: name for name in names}


@pytest.fixture
def fast(monkeypatch):
    """Without the checks of types, which are nearly all of the time: other tests have them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_every_sequence_of_wrappers_before_names(families, fast):
    for family, names in families:
        sequences = SEQUENCES if family == "sit" else SEQUENCES[:: len(SEQUENCES) // 40]
        for sequence in sequences:
            theirs = prefixed(".".join(sequence), names)
            choice, found = named(theirs)
            assert choice.family == family, sequence
            assert found == dict(zip(theirs, names)), sequence


def test_every_sequence_of_wrappers_inside_names(fast):
    for k, sequence in enumerate(SEQUENCES):
        theirs = []
        for name in SIT:
            parts = name.split(".")
            at = 1 + k % max(len(parts) - 1, 1)
            theirs.append(".".join((*parts[:at], *sequence, *parts[at:])))
        theirs = [n if n.split(".")[0] != "pos_embed" else s for n, s in zip(theirs, SIT)]
        assert named(theirs)[1] == dict(zip(theirs, SIT)), sequence


def test_every_layer_wrapped_and_the_whole_wrapped_again():
    theirs = [
        "module._fsdp_wrapped_module."
        + name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod.")
        .replace("blocks.1.", "blocks.module.1.")
        .replace("attn.", "attn._fsdp_wrapped_module.")
        for name in SIT
    ]
    choice, found = named(theirs)
    assert list(found.values()) == SIT
    assert set(choice.removed) == {
        *("module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"),
    }


def test_only_some_names_wrapped():
    theirs = [f"module.{name}" if k % 3 else name for k, name in enumerate(SIT)]
    assert list(named(theirs)[1].values()) == SIT
    theirs = [f"{'model.net' if k % 3 else 'net.model'}.{name}" for k, name in enumerate(SIT)]
    assert list(named(theirs)[1].values()) == SIT


def test_every_name_wrapped_in_its_own_way():
    rng = random.Random(0)
    theirs = []
    for name in SIT:
        parts = [rng.choices(WRAPPERS, k=rng.randrange(4))]
        parts += [[part, *rng.choices(WRAPPERS, k=rng.randrange(2))] for part in name.split(".")]
        theirs.append(".".join(p for group in parts for p in group))
    assert list(named(theirs)[1].values()) == SIT


def test_absurdly_long_names_are_left_out_at_once():
    names = [*prefixed("model"), ".".join("a" * 10**6)]
    assert list(named(names)[1].values()) == SIT


@pytest.mark.parametrize(
    "prefix",
    [
        *("model_state_dict", "ema_state_dict", "state_dict", "ema_model", "net", "params"),
        *("module", "ema", "model", "state.model", "state_dict.ema_model.module", "a.b.c.d"),
        *("weights.generator", "0.model", "model.diffusion_model", "pl_module.denoiser"),
    ],
)
def test_entries(prefix):
    beside = ["opt.state.0.exp_avg", "n_averaged", "extra.table"]
    choice, found = named(prefixed(prefix) + beside)
    assert list(found.values()) == SIT and choice.prefix == prefix
    assert choice.left_out == {"opt": 1, "n_averaged": 1, "extra": 1}


@pytest.mark.parametrize(
    ("ema", "live"),
    [
        *(("ema", "model"), ("model_ema", "model"), ("ema_state_dict", "model_state_dict")),
        *(("state_dict.ema", "state_dict.model"), ("ema_0999", "net"), ("model.ema", "model")),
        *(("ema.ema_model", "ema.online_model"), ("ema_model.module", "model.module")),
        *(("state_dict_ema", "state_dict"), ("net_ema", "net"), ("ema1", "module")),
    ],
)
def test_the_ema_is_preferred(ema, live):
    names = prefixed(live) + prefixed(ema)
    assert named(names)[0].prefix == ema and named(names[::-1])[0].prefix == ema
    choice, found = named(names, Wanted(weights="model"))
    assert choice.prefix == live and list(found.values()) == SIT
    assert sum(choice.left_out.values()) == len(SIT)
    for entry in (ema, live):
        if not ema.startswith(f"{entry}."):
            assert named(names, Wanted(entry=entry))[0].prefix == entry


def test_bare_weights_beside_an_ema():
    names = SIT + prefixed("ema") + ["ema.n_averaged", "step"]
    choice, found = named(names)
    assert choice.prefix == "ema" and list(found.values()) == SIT
    choice, found = named(names, Wanted(prefix=""))
    assert list(found) == SIT and choice.left_out == {"ema": len(SIT) + 1, "step": 1}


@pytest.mark.parametrize(
    ("names", "wanted", "words"),
    [
        (prefixed("model") + prefixed("net"), {}, "--entry=model or --entry=net"),
        (prefixed("teacher") + SIT, {}, "--prefix= (nothing) or --entry=teacher"),
        (prefixed("ema1") + prefixed("ema2"), {}, "a sit in ema1 and a sit in ema2"),
        (prefixed("model"), {"weights": "ema"}, "no 'ema' weights, it has a sit in model"),
        (prefixed("ema"), {"weights": "model"}, "no 'model' weights, it has a sit in ema"),
        (prefixed("model"), {"entry": "ema"}, "begins with 'ema'"),
        (prefixed("model"), {"prefix": "net"}, "the file has model"),
        (prefixed("model"), {"prefix": ""}, "is none of SiT"),
        (prefixed("model"), {"family": "vae"}, "has no vae, it has a sit in model"),
        (["bert.q.w", "fc.x"], {}, "none of SiT, PPFlow, DiCo, AutoencoderKL, TAESD, Inception"),
    ],
)
def test_what_cannot_be_chosen(names, wanted, words):
    with pytest.raises(InputError) as error:
        choose(names, Wanted(**wanted))
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_sit_and_a_vae_together(families):
    vae = prefixed("first_stage_model", families[1][1])
    names = prefixed("model.diffusion_model") + vae + ["model_ema.decay", "logvar"]
    with pytest.raises(InputError, match=r"a vae in first_stage_model and a sit in .* --kind=sit"):
        choose(names, Wanted())
    for family, prefix, count in (
        ("sit", "model.diffusion_model", len(SIT)),
        ("vae", "first_stage_model", len(vae)),
    ):
        choice, found = named(names, Wanted(family=family))
        assert (choice.prefix, len(found)) == (prefix, count)
        assert sum(choice.left_out.values()) == len(names) - count


def test_optimizer_states_are_no_models():
    names = [*SIT, *prefixed("optimizer.exp_avg"), *prefixed("opt.state"), *prefixed("grads")]
    choice, found = named(names)
    assert list(found) == SIT and set(choice.left_out) == {"optimizer", "opt", "grads"}


def test_add_ons_are_left_out_and_other_keys_are_not():
    more = ["projectors.0.0.weight", "projector.bias", "ap_head.linear.weight", "head.weight"]
    choice, found = named(prefixed("model", [*SIT, *more, "blocks.0.attn.q_norm.weight"]))
    assert choice.left_out == {"model.projectors": 1, "model.projector": 1, "model.ap_head": 1}
    assert list(found.values())[-2:] == ["head.weight", "blocks.0.attn.q_norm.weight"]


def test_a_vision_transformer_of_the_same_names_is_no_sit():
    encoder = [n for n in prefixed("encoder") if ".blocks." in n] + ["encoder.pos_embed"]
    choice, found = named([*SIT, *encoder])
    assert list(found.values()) == [*SIT, *encoder]  # and loading says that these are too many
    choice, found = named(prefixed("model") + encoder)
    assert list(found.values()) == SIT and choice.left_out == {"encoder": len(encoder)}


def test_a_broken_model_is_found_so_that_what_is_missing_can_be_said():
    names = [n for n in prefixed("ema.module") if "final_layer" not in n]
    assert len(named(names)[1]) == len(names)
