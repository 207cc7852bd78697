"""What all tests share."""

import os

import pytest

from core import run_record
from helpers import tiny


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """A run draws its curves only in tests that ask for this by a mark: drawing takes as long as a tiny training."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(run_record, "draw_curves", lambda runs: b"")


@pytest.fixture(autouse=True)
def no_launcher():
    """A process that a test starts has no launcher, though trainings in the tests' own process set its variables."""
    for name in tiny.LAUNCHERS_OWN:
        os.environ.pop(name, None)
