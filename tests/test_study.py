"""Budgets and verdicts of the study (study/)."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.settings import same_settings, spread
from configs import digits
from ppflow_jax.errors import InputError
from ppflow_jax.train.validate import EVALUATIONS
from study.rows import ROWS, Claim, configured, training_cost, ways_of
from study.table import Line, beside_plans, collect, interval, judged

BETTER = Claim("", ("a", "one"), ("b", "one"))
ALIKE = Claim("", ("a", "one"), ("b", "one"), margin=0.05)


def lines(**fids):
    return [Line(name, "one", 1.0, 1.0, None, {"fid": values}) for name, values in fids.items()]


@pytest.mark.parametrize(
    ("claim", "ours", "theirs", "verdict"),
    [
        (BETTER, [9.0, 9.1, 9.2], [10.0, 10.1, 10.2], "held"),
        (BETTER, [11.0, 11.1, 11.2], [10.0, 10.1, 10.2], "did not hold"),
        (BETTER, [9.0, 11.0, 10.0], [10.0, 10.1, 10.2], "undecided"),
        (BETTER, [9.0, 9.1], [10.0, 10.1], "undecided"),  # two seeds give no interval
        (ALIKE, [10.3, 10.4, 10.5], [10.0, 10.1, 10.2], "held"),
        (BETTER, [10.3, 10.4, 10.5], [10.0, 10.1, 10.2], "did not hold"),
        (ALIKE, [10.7, 10.8, 10.95], [10.0, 10.1, 10.2], "did not hold"),
        (ALIKE, [10.2, 10.9, 10.7], [10.0, 10.1, 10.2], "undecided"),
        (BETTER, [10.0, 10.1, 10.2], [10.0, 10.1, 10.2], "undecided"),  # equal is not better
    ],
)
def test_verdicts(claim, ours, theirs, verdict):
    found = judged(claim, lines(a=ours, b=theirs))
    assert found is not None and found[1] == verdict, found


def test_a_claim_about_a_row_that_was_not_run_is_left_out():
    assert judged(BETTER, lines(a=[1.0])) is None


def test_rows_beside_tuned_plans():
    assert beside_plans(lines(levels2=[6.0, 6.1, 6.2], dydit=[5.0, 5.1, 5.2])) == []
    plain = Line("levels2", "tuned8", 0.6, 0.3, None, {"fid": [5.0, 5.5, 6.0]}, "a plan")
    found = beside_plans([*lines(levels2=[6.0, 6.1, 6.2], dydit=[5.5, 6.5, 7.5]), plain])
    assert "| row |" in found[-4] and found[-4].endswith("| difference to 2 levels |")
    assert found[-2] == "| 2 levels | a plan | 60.0% | 30.0% | 5.50 ± 0.50 |  |"
    assert found[-1].endswith("| 6.50 ± 1.00 | +1.00, +0.16 to +1.84 |")  # 2.92 * 0.5 / sqrt(3)


def test_costs_of_fitted_plans_are_means_over_seeds(tmp_path):
    ways = {name: ways_of(ROWS[name], 2.0, [8]) for name in ("sit", "levels2")}
    for seed, fitted in enumerate((20, 40)):
        for name, keys in ways.items():
            folder = tmp_path / str(seed) / name
            (folder / EVALUATIONS).mkdir(parents=True)
            (folder / "cost.json").write_text('{"training_flops": 7}')
            for key in keys:
                flops = fitted if key == "tuned8" else 100
                found = {"metrics": {"fid": seed, "kid": 0}, "samples": {"card": {"flops": flops}}}
                (folder / EVALUATIONS / f"{key}.json").write_text(json.dumps(found))
    found = {(one.row, one.guidance): one for one in collect(tmp_path, ways, 2, {})[0]}
    assert found["levels2", "tuned8"].sampling == pytest.approx(0.3)
    assert found["levels2", "one"].sampling == 1 and found["sit", "one"].metrics["fid"] == [0, 1]


def test_how_rows_are_sampled():
    names = ("levels3", "sit", "dydit", "guided")
    ways = {name: ways_of(ROWS[name], 2.0, [8, 5]) for name in names}
    assert list(ways["levels3"]) == list(ways["sit"]) == ["one", "stages", "tuned8", "tuned5"]
    assert [way.tuned for way in ways["sit"].values()] == [0, 0, 8, 5]
    assert ways["levels3"]["stages"].scales == (1.0, 2.0, 2.0)
    assert ways["sit"]["stages"].interval == (0.5, 1.0)
    assert list(ways["dydit"]) == ["one", "stages"]  # sampled with --accelerate
    assert list(ways["guided"]) == ["one", "stages"]  # told the scale


def test_the_range_over_seeds_is_shown_where_they_differ():
    assert spread([2.0], ".1f") == spread([2.0, 2.0], ".1f") == "2.0"
    assert spread([1.0, 2.0, 3.0], ".2f") == "2.00 (1.00 to 3.00)"
    assert spread([2.0, 2.01], ".1f") == "2.0 (2.0 to 2.0)"


def test_interval_is_students():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert high - 2 == pytest.approx(2.919986 / 3**0.5, rel=1e-5)  # t(0.95, 2 degrees of freedom)


def test_budgets():
    base = digits.get_config()
    cost = {name: training_cost(configured(base, row, 0)) for name, row in ROWS.items()}
    equal = dict(levels2_flops="sit", levels3_flops="sit", moe1="longer", moe2="longer")
    for name, other in equal.items():
        assert cost[name] == pytest.approx(cost[other], rel=3e-3), name
    for name, other in dict(ddt="sit", ddt2="levels2").items():  # alike, by their sizes
        assert cost[name] == pytest.approx(cost[other], rel=0.05), name
    assert cost["expand2"] == pytest.approx(0.1 * cost["levels2"])
    for row in ROWS.values():
        config = configured(base, row, 3)
        assert config.seed == 3 and config.model.pyramid == row.pyramid
        if not row.costs_as and not row.starts_from and not row.teacher:
            assert config.train.steps == base.train.steps  # equal in samples seen
    assert cost["dico"] == pytest.approx(cost["sit"], rel=0.04)
    assert configured(base, ROWS["clear"], 0).train.ema == pytest.approx(0.98)
    assert configured(base, ROWS["expand3"], 0).train.ema == pytest.approx(0.9)
    assert base.model.pyramid == "4x4@0.5,2x2@1"


def test_kept_runs_are_of_the_same_settings(tmp_path, monkeypatch):
    config = digits.get_config()

    class Flags(dict):
        pass

    given = Flags(num=SimpleNamespace(value=8))
    given.config = config
    monkeypatch.setattr("benchmarks.settings.flags", SimpleNamespace(FLAGS=given))
    same_settings(tmp_path, "num")
    kept = json.loads((tmp_path / "settings.json").read_text())
    del kept["config"]["model"]["mixer"]  # as of a time before there was one
    (tmp_path / "settings.json").write_text(json.dumps(kept))
    same_settings(tmp_path, "num")
    config.model.mixer = "linfusion"
    with pytest.raises(InputError, match=r"another config\.model\.mixer"):
        same_settings(tmp_path, "num")
    config.model.mixer = "attention"
    given["num"] = SimpleNamespace(value=9)
    with pytest.raises(InputError, match="another num"):
        same_settings(tmp_path, "num")
    given["num"] = SimpleNamespace(value=8)
    (tmp_path / "settings.json").write_text(json.dumps(kept | {"size": 32}))
    with pytest.raises(InputError, match="runs with size"):
        same_settings(tmp_path, "num")
