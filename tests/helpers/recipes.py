"""Recipes, run as they are."""

import subprocess

from helpers import tiny


def run(script, timeout, **environment):
    """Run an example with these variables, in the environment of the tests."""
    variables = tiny.environment(EAGLE3_VENV="none", **environment)
    command = ["bash", str(tiny.REPOSITORY / "examples" / script)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout
