"""The page of model families has the table that docs/families.py makes."""

import importlib.util

from tests.support.places import ROOT

FILE = ROOT / "docs" / "families.py"


def test_the_table_is_that_of_the_registry_and_the_recorded_answers():
    spec = importlib.util.spec_from_file_location("families_page", FILE)
    assert spec is not None and spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    assert families.START + families.table() + families.END in families.PAGE.read_text("utf-8"), (
        "run `python docs/families.py`"
    )
