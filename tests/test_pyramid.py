import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid


def test_text_form_is_width_by_height_and_round_trips():
    assert PPFLOW3.stages[1].patch == (2, 4)  # rows, columns
    assert PPFLOW3.grid(1, 32) == (16, 8)  # as in the paper
    for pyramid in (SIT, PPFLOW2, PPFLOW3, Pyramid.parse("8x8@0.125,1x2@0.3,1x1@1")):
        assert Pyramid.parse(str(pyramid)) == pyramid


def test_a_boundary_belongs_to_the_stage_on_its_left():
    after = np.nextafter(np.float32(0.5), np.float32(1))
    assert [PPFLOW3.stage_at(t) for t in (-1, 0, 0.5, after, 0.75, 0.76, 1, 1.4)] == [
        0, 0, 0, 1, 1, 2, 2, 2,
    ]  # fmt: skip
    # 0.1 is not a float32: the comparison is between float32 values
    assert Pyramid.parse("2x2@0.1,1x1@1").stage_at(np.float32(0.1)) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read"),
        ("2x2", "cannot read"),
        ("2x2@x", "cannot read"),
        ("2x2@0.5", "division of time"),
        ("2x2@0.5,1x1@0.5,1x1@1", "division of time"),
        ("2x2@0,1x1@1", "division of time"),
        ("0x2@1", "at least 1x1"),
    ],
)
def test_bad_text_is_refused_in_one_line(text, words):
    with pytest.raises(InputError, match=words) as error:
        Pyramid.parse(text)
    assert "\n" not in str(error.value)


def test_patch_must_divide_the_latent():
    with pytest.raises(InputError, match="12 is not divisible by the 8x8 patch"):
        Pyramid.parse("8x8@1").grid(0, 12)


def test_shares_are_the_durations():
    assert SIT.shares() == (1,)
    assert PPFLOW2.shares() == (1, 1)
    assert PPFLOW3.shares() == (2, 1, 1)
    assert Pyramid.parse("4x4@0.3,2x2@1").shares() == (3, 7)
