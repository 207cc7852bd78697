"""Compare trainings side by side, by what they wrote of themselves; no model is loaded.

In:  output folders of trainings, or their metrics.jsonl.
Out: a table on the terminal; a folder with comparison.png (the curves of all runs) and comparison.json.

    python compare_runs.py output/a output/b --output compared
"""

import argparse
import json
import statistics
import sys

from core import common, run_record


def describe_run(rows):
    """{column: value} of a training's rows, None where it has none. The best is the least loss, the most of others."""
    values = {"steps": max(row["step"] for row in rows)}
    hours, rates = (
        run_record.curve(rows, "train", "seconds")[1],
        run_record.curve(rows, "train", "tokens_per_second")[1],
    )
    values["hours"] = hours[-1] / 3600 if hours else None
    values["tokens/s"] = statistics.median(rates) if rates else None
    for split, name in (
        ("train", "loss"), ("train", "acc_0"), ("train", "chain_length"), ("validation", "loss"),
        ("validation", "acceptance_length"),
    ):  # fmt: skip
        steps, line = run_record.curve(rows, split, name)
        best = (min if name == "loss" else max)(line, default=None)
        title = f"validation {name}" if (split, name) == ("validation", "loss") else name
        values |= {title: line[-1] if line else None, f"best {title}": best}
    return values | {"at step": steps[line.index(best)] if line else None}


def compare(paths, output):
    """Print a table of trainings, by their folders or metrics.jsonl, and write comparison.json and .png into output."""
    runs = {path: run_record.read_metrics(path) for path in paths}
    for path in (path for path, rows in runs.items() if not rows):
        common.fail(f"{path} has no rows in its metrics.jsonl")
    table = {path: describe_run(rows) for path, rows in runs.items()}
    lines = [["run", *next(iter(table.values()))]]
    for path, values in table.items():
        texts = (
            "-" if x is None else f"{x:.0f}" if name in ("steps", "tokens/s", "at step") else f"{x:.3f}"
            for name, x in values.items()
        )
        lines.append([path, *texts])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for first, *others in lines:
        cells = [first.ljust(widths[0])] + [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print(f"| {' | '.join(cells)} |")
    output = common.open_output(output)
    common.write_atomic(output / "comparison.json", json.dumps(table, indent=2) + "\n")
    try:
        common.write_atomic(output / "comparison.png", run_record.draw_curves(runs))
    except ImportError as error:
        common.fail(f"no picture without matplotlib: {error}")
    print(f"written to {output / 'comparison.json'} and comparison.png")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = common.fail
    parser.add_argument("runs", nargs="+", help="output folders of trainings, or their metrics.jsonl")
    parser.add_argument("--output", default="comparison", help="folder to write (default: %(default)s)")
    return parser.parse_args(common.normalise_argv(sys.argv[1:] if argv is None else argv))


def main(args):
    compare(args.runs, args.output)


if __name__ == "__main__":
    main(parse_args())
