"""The list of faults fits the package: `make mutants` would put in every one."""

from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS
from tests.mutants.run import ROOT, with_fault

pytestmark = pytest.mark.once


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.old[:40]}")
def test_a_fault_fits_its_file(fault):
    text = (ROOT / "lora_jax" / fault.file).read_text("utf-8")
    compile(with_fault(text, fault), fault.file, "exec")
    missing = [path for path in fault.tests.split() if not Path(ROOT, path).exists()]
    assert not missing
