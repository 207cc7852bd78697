"""What all tests share."""

import os
import time
from types import SimpleNamespace

import pytest

from core import run_record, server
from helpers import tiny, training


def pytest_collection_modifyitems(items):
    """The longest test comes first: another process runs the rest meanwhile."""
    items.sort(key=lambda item: item.path.stem != "test_recipe_tiny")


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A tiny target and prepared conversations, which no test changes. A file that needs others has a `work` itself."""
    return training.write_workspace(tmp_path_factory.mktemp("work"))


@pytest.fixture
def waits(monkeypatch):
    """The seconds that requests to a server wait before they are repeated, noted and not waited."""
    waited = []

    def sleep(seconds):
        if seconds < 1:
            time.sleep(seconds)
        else:
            waited.append(seconds)

    # Other threads of this process go on sleeping.
    monkeypatch.setattr(server, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    return waited


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
