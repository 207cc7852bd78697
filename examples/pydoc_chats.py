"""Write conversations about Python's standard library: questions by name, the docstrings as answers.

In:  the sources of the running Python, parsed and never imported; no download.
Out: --output_path: JSON Lines with rows {"id", "conversations"}, about 4,000 of them.

    python examples/pydoc_chats.py --output_path pydoc.jsonl
"""

import argparse
import ast
import functools
import json
import re
import sys
import sysconfig
from pathlib import Path

# Suites of tests, and programs that act on import or open windows: their docstrings explain nothing.
NOT_DOCUMENTED = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "__main__", "idle_test", "lib2to3"}
KINDS = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}


@functools.cache
def pydoc_lines():
    """Rows on the running Python's standard library: a question by name, the docstring as the answer.

    The first four docstrings of a class make one conversation.
    """
    library, seen, lines = Path(sysconfig.get_path("stdlib")), set(), []

    def turns(name, node):
        kind, short, doc = KINDS[type(node)], name.rpartition(".")[2], ast.get_docstring(node) or ""
        if short.startswith("_") or len(doc) < 20 or doc in seen:  # private, hardly documented, or said already
            return []
        seen.add(doc)
        answer = f"{short}({ast.unparse(node.args)})\n\n{doc}" if kind == "function" else f"{kind} {name}\n\n{doc}"
        question = ("What does the {} {} do?", "Explain the {} {}.", "What is the {} {} for?")[len(name) % 3]
        return [{"role": "user", "content": question.format(kind, name)}, {"role": "assistant", "content": answer}]

    for module in sorted(sys.stdlib_module_names - NOT_DOCUMENTED):
        for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
            parts = path.relative_to(library).with_suffix("").parts
            module_name = ".".join(parts).removesuffix(".__init__")
            if not path.is_file() or NOT_DOCUMENTED & set(parts) or re.search(r"(^|\.)_", module_name):
                continue
            tree = ast.parse(path.read_bytes())
            topics = {f"{module_name}.{node.name}": node for node in tree.body if type(node) in KINDS}
            for name, node in ({module_name: tree} | topics).items():
                messages = turns(name, node)
                for method in node.body if type(node) is ast.ClassDef else []:
                    messages += turns(f"{name}.{method.name}", method) if type(method) in KINDS else []
                for start in [0, *range(8, len(messages), 2)] if messages else []:
                    row = {"id": f"pydoc {name}", "conversations": messages[start : start + 2 if start else 8]}
                    lines.append(json.dumps(row).encode())
    return lines


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_path", required=True, help="JSON Lines file to write")
    return parser.parse_args(argv)


def main(args):
    rows = pydoc_lines()
    Path(args.output_path).write_bytes(b"".join(row + b"\n" for row in rows))
    print(f"{args.output_path}: {len(rows):,} conversations about Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main(parse_args())
