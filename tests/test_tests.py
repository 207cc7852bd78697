"""The tests' own house: what they share is in helpers/, and each file's name says what it is about."""

import ast
from pathlib import Path

from helpers import tiny

FOLDER = Path(__file__).parent
# Properties of the repository itself, which no module and no run has alone.
OWN = {"docs", "safe_loading", "style", "tests", "benchmarks", "setup", "soak"}
PROGRAMS = {"soak.py", "faults.py"}  # that people run


def imported(path):
    """Modules that a file imports, by their first name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


def test_no_test_file_imports_another():
    for path in FOLDER.rglob("*.py"):
        others = [name for name in imported(path) if name.startswith(("test_", "conftest"))]
        assert not others, f"{path.name} imports {others}: what tests share is in helpers/"


def test_files_are_named_after_a_module_a_property_of_runs_or_a_recipe():
    modules = [path.stem for folder in ("", "core") for path in (tiny.REPOSITORY / folder).glob("*.py")]
    for path in FOLDER.glob("test_*.py"):
        name = path.stem.removeprefix("test_")
        known = name in OWN or name.startswith(("run_", "recipe_", *modules))
        assert known, f"{path.name}: name it test_<module>, test_run_<property> or test_recipe_<name>"
    others = {path.name for path in FOLDER.glob("*.py") if not path.stem.startswith(("test_", "conftest"))}
    assert others == PROGRAMS
