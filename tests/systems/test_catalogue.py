"""docs/systems.md says what there is, and everything it names exists."""

from dataclasses import fields

import pytest

from ppflow_jax.systems import registry
from ppflow_jax.systems.catalogue import SYSTEMS, page
from tests.pages import ROOT


def test_the_page_is_the_written_one():
    written = (ROOT / "docs/systems.md").read_text()
    assert written == page(), "run: python -m ppflow_jax.systems > docs/systems.md"


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_what_a_row_names_exists(system):
    for path in (f"ppflow_jax/{system.file}", f"docs/{system.page}", system.test):
        assert (ROOT / path).is_file(), path
    assert all(getattr(system, field.name) for field in fields(system))
    assert all(part.replace(".", "").isdigit() for part in system.papers)


def test_everything_that_configurations_name_has_a_row():
    files = {system.file for system in SYSTEMS}
    tables = (*registry.KINDS.values(), registry.TERMS, registry.OBJECTIVES)
    kinds = [kind for table in tables for kind in table.values()]
    homes = {k.__module__.replace("ppflow_jax.", "", 1).replace(".", "/") + ".py" for k in kinds}
    assert {home for home in homes if home.startswith("systems/")} <= files
