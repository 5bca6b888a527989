import pytest

from ppflow_jax.console import table


def test_names_begin_at_the_left_and_numbers_end_at_the_right():
    rows = [("model", "ms"), ("SiT", "10.5"), ("2 levels", "6.25")]
    assert table(rows).splitlines() == ["model       ms", "SiT       10.5", "2 levels  6.25"]
    assert table(rows, left=()).splitlines()[1] == "     SiT  10.5"


def test_lines_do_not_end_in_blanks():
    assert table([("a", "b"), ("longer", "")], left=(0, 1)) == "a       b\nlonger"


def test_a_row_that_lacks_a_cell_is_a_mistake():
    with pytest.raises(ValueError):
        table([("a", "b"), ("c",)])
