"""Rows that cannot be used: counted by cause, listed in rejected.jsonl, and the line that ends a preparation.

In:  rejected rows {"file", "line", "cause", "detail"}.
Out: rejected.jsonl; one line with the first row of each cause.
"""

import json
from collections import Counter

from core import common, conversations

BEYOND = "no reply within max_length"

# Causes that are no fault of a row or its reader: counted apart, and not against the limit.
APART = (BEYOND, conversations.UNANSWERED, conversations.UNTRAINED)


def count(rejected):
    """{cause: number of rows} of the causes that count against the limit, and of those that do not."""
    causes = Counter(row["cause"] for row in rejected)
    apart = {cause: causes.pop(cause) for cause in APART if cause in causes}
    return causes, apart


def describe(rejected):
    """The counts as text."""
    causes, apart = count(rejected)
    text = f"rejected: {dict(causes) or 'none'}"
    return f"{text}; left out as well: {apart}" if apart else text


def write(path, rejected):
    """Write the rows as JSON Lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rejected]
    common.write_atomic(path, "".join(lines))


def check(source, kept, rejected, limit, path):
    """End the program if no row of a source is kept, or the share of rejected ones is above the limit.

    The line shows the first row of each cause; all of them are written to path.
    """
    causes, apart = count(rejected)
    total = kept + len(rejected)
    faulty = causes.total()
    if kept and faulty <= limit * total:
        return
    problem = f"none of {total} rows can be used"
    if kept:
        problem = f"{faulty} of {total} rows rejected ({faulty / total:.1%}, max_rejected_ratio {limit:g})"
    shown = [describe_cause(source, rejected, *counted) for counted in [*causes.most_common(), *apart.items()]]
    remedy = f"all are listed in {path}"
    if kept:
        remedy += "; a higher --max_rejected_ratio leaves them out"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, rejected)
    common.fail(f"{source.name}: {problem}: {', '.join(shown)}; {remedy}")


def describe_cause(source, rejected, cause, number):
    """The number of rows, the cause, and the first row with its detail; its file if the source has several."""
    first = next(row for row in rejected if row["cause"] == cause)
    where = f"line {first['line']}"
    if len(source.files) > 1:
        where += f" of {first['file']}"
    if first["detail"]:
        where += f": {first['detail']}"
    return f"{number} {cause} (first: {where})"
