"""Two minutes of soak.py, of which `python tests/soak.py --minutes 30` is the long form; the table of faults.py."""

import re

import pytest

import faults
import soak
from helpers import tiny


@pytest.mark.slow
def test_two_minutes_of_everything(tmp_path):
    counts = soak.soak(tmp_path, minutes=2, seed=0)
    assert sum(count for name, count in counts.items() if "lives" in name) >= 1 and len(counts) > 3


def test_each_fault_of_the_table_has_its_tests():
    """cases/faults.txt names tests that exist."""
    known = set()
    for path in tiny.REPOSITORY.glob("tests/test_*.py"):
        known |= {f"{path.name}::{name}" for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    rows = faults.read_rows()
    assert len(rows) > 30 and {test for _, _, tests in rows for test in tests} <= known
    assert [fault for fault, _, _ in faults.read_rows(["F4"])] == ["F4"]
