"""What all tests share."""

import pytest

import record_run


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """A run draws its curves only in tests that ask for this by a mark: drawing takes as long as a tiny training."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(record_run, "draw_curves", lambda runs: b"")
