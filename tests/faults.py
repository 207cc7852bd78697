"""Injects faults and hostile input of many kinds, and prints what became of each as a table.

    python tests/faults.py            # all rows of cases/faults.txt: ten minutes
    python tests/faults.py F1 F2      # some of them

Each row names the tests that inject a fault and check the right end: the training goes on with the same numbers, or
ends with one line that names the cause. A row whose tests were all skipped, as where no disk can be mounted, says so.
Exit code 1 if one of them fails.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from core import common  # noqa: E402  (the root is not on the path of a script that lies here)

RANK = {"wrong": 0, "right": 1, "skipped": 2}  # of several outcomes the first counts


def read_rows(chosen=()):
    """[(fault, what is injected, tests)] of cases/faults.txt."""
    lines = (HERE / "cases" / "faults.txt").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line and not line.startswith("#")]
    unknown = set(chosen) - {fault for fault, _, _ in rows}
    if unknown:
        common.fail(f"{', '.join(sorted(unknown))}: no such fault in cases/faults.txt")
    return [(fault, what, tests.split()) for fault, what, tests in rows if not chosen or fault in chosen]


def run(names):
    """{(file, function): outcomes} of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "", f"--junitxml={report}"]
        subprocess.run([*command, *(f"tests/{name}" for name in names)], cwd=HERE.parent, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {}
    for case in cases:
        name = f"{case.get('classname').rpartition('.')[2]}.py::{case.get('name').partition('[')[0]}"
        kinds = {child.tag for child in case}
        outcome = "wrong" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "right"
        outcomes.setdefault(name, []).append(outcome)
    return outcomes


def main(chosen):
    rows = read_rows(chosen)
    outcomes = run(sorted({test for _, _, tests in rows for test in tests}))
    lines = [["fault", "injected", "cases", "outcome"]]
    counts = Counter()
    for fault, what, tests in rows:
        found = [outcome for test in tests for outcome in outcomes.get(test, ["wrong"])]
        outcome = min(found, key=RANK.get)
        counts[outcome] += len(found)
        lines.append([fault, what, str(len(found)), outcome])
    print(common.format_table(lines))
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
