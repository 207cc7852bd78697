"""The budgets of the code, counted in tokens: how long a file and a function may be, and how dense a line.

Names, numbers, operators and strings count one each; comments and docstrings are free.
"""

import ast
import io
import tokenize

import pytest

from helpers import tiny

FOLDERS = (".", "core", "benchmarks", "examples")
FILES = [path for folder in FOLDERS for path in sorted((tiny.REPOSITORY / folder).glob("*.py"))]
NAMES = [str(path.relative_to(tiny.REPOSITORY)) for path in FILES]
TRAINER, FILE, FUNCTION = 6500, 5500, 600  # tokens at most
A_LINE, SHORT = 10.0, 500  # tokens a line on average, in files that are longer than SHORT tokens
COUNTED = {tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING}


def code_lines(source):
    """The line of each token that counts, in order."""
    free = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            free.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = [token.start[0] for token in tokens if token.type in COUNTED]
    return [line for line in lines if line not in free]


def functions(source):
    """(name, first line, last line) of every function and method."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, node.end_lineno


def above_budget(source, file_budget):
    """What is too much in a source, a line of text each."""
    lines = code_lines(source)
    found = []
    if len(lines) > file_budget:
        found.append(f"{len(lines)} tokens, budget {file_budget}")
    density = len(lines) / max(len(set(lines)), 1)
    if len(lines) > SHORT and density > A_LINE:
        found.append(f"{density:.1f} tokens a line, budget {A_LINE:.0f}")
    for name, first, last in functions(source):
        size = sum(first <= line <= last for line in lines)
        if size > FUNCTION:
            found.append(f"{name} has {size} tokens, budget {FUNCTION}")
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_functions_and_lines_are_within_their_budgets(path):
    budget = TRAINER if path.name.startswith("train_") else FILE
    assert above_budget(path.read_text(), budget) == []


def test_what_is_above_a_budget_is_found():
    call = "    x = f(1, 2)\n"  # 8 tokens
    assert len(code_lines('"""Free."""\n\ndef f():\n    """Free."""\n    # free\n' + call)) == 5 + 8
    assert above_budget("def f():\n" + call * 74, FILE) == []
    assert above_budget("def f():\n" + call * 75, FILE) == ["f has 605 tokens, budget 600"]
    assert above_budget("x = f(1, 2)\n" * 70, 500) == ["560 tokens, budget 500"]
    assert above_budget("x = f(1, 2, 3, 4)\n" * 60, FILE) == ["12.0 tokens a line, budget 10"]
    assert above_budget("x = f(1, 2, 3, 4)\n" * 40, FILE) == [], "a short file may be a table"


# --- imports ---


def imported(source):
    """Our own modules that a source imports: `core/NAME`, or the name of a command."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "core":
            yield from (f"core/{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.replace(".", "/")
        elif isinstance(node, ast.Import):
            yield from (alias.name.replace(".", "/") for alias in node.names)


def test_core_imports_no_command_and_nothing_in_a_circle():
    commands = {path.stem for path in tiny.REPOSITORY.glob("*.py")}
    sources = {f"core/{path.stem}": path.read_text() for path in (tiny.REPOSITORY / "core").glob("*.py")}
    graph = {name: set(imported(source)) for name, source in sources.items()}
    assert sum(map(len, graph.values())) > 50, "imports are found"
    for name, others in graph.items():
        assert not others & commands, f"{name} imports a command"
    ready = set()
    while rest := graph.keys() - ready:
        free = {name for name in rest if graph[name] & graph.keys() <= ready}
        assert free, f"a circle among {rest}"
        ready |= free


def test_modules_are_imported_and_not_their_names():
    """`from core import ranks`, so that `ranks.gather(...)` says where it lives."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("core."), f"{path.name}:{node.lineno}"
