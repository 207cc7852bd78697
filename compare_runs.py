"""Compare trainings and evaluations side by side, by the figures that they wrote; loads no model.

In:  output folders of trainings, or their metrics.jsonl; folders of evaluations, or their evaluation.json.
Out: a table of each kind on the terminal; a folder with comparison.json (both tables), comparison.png (the curves of
     the trainings) and evaluations.png (acceptance by position and category, tokens/s).

    python compare_runs.py output/a output/b --output compared
    python compare_runs.py output/evaluation_a output/evaluation_b --output compared
"""

import json
import statistics
from pathlib import Path

from core import common, evaluations, run_record

WHOLE_NUMBERS = ("steps", "tokens/s", "at step", "prompts", "passes")


def last_and_best(rows, split, name):
    """(last, best, step of the best) of a metric, None where a run has none. The best loss is the least."""
    steps, values = run_record.curve(rows, split, name)
    if not values:
        return None, None, None
    best = min(values) if name == "loss" else max(values)
    return values[-1], best, steps[values.index(best)]


def describe_run(rows):
    """{column: value} of a training's rows, None where it has none."""
    _, seconds = run_record.curve(rows, "train", "seconds")
    _, rates = run_record.curve(rows, "train", "tokens_per_second")
    columns = {
        "steps": max(row["step"] for row in rows),
        "hours": seconds[-1] / 3600 if seconds else None,
        "tokens/s": statistics.median(rates) if rates else None,
    }
    for name in ("loss", "acc_0", "chain_length"):
        last, best, _ = last_and_best(rows, "train", name)
        columns[name] = last
        columns[f"best {name}"] = best
    last, best, _ = last_and_best(rows, "validation", "loss")
    columns["validation loss"] = last
    columns["best validation loss"] = best
    last, best, step = last_and_best(rows, "validation", "acceptance_length")
    columns["acceptance_length"] = last
    columns["best acceptance_length"] = best
    columns["at step"] = step
    return columns


def format_value(column, value):
    if value is None:
        return "-"
    return f"{value:.0f}" if column in WHOLE_NUMBERS else f"{value:.3f}"


def print_table(kind, table):
    """Print {path: {column: value}} in Markdown; kind: header of the paths."""
    lines = [[kind, *next(iter(table.values()))]]
    for path, columns in table.items():
        values = [format_value(column, value) for column, value in columns.items()]
        lines.append([path, *values])
    print(common.format_table(lines))


def read_trainings(paths):
    """{path: rows of its metrics.jsonl}"""
    runs = {path: run_record.read_metrics(path) for path in paths}
    for path, rows in runs.items():
        if not rows:
            common.fail(f"{path} has no rows in its metrics.jsonl")
    return runs


def is_evaluation(path):
    """Whether a path means an evaluation; a folder that has a training's metrics.jsonl as well means the training."""
    return not (Path(path) / "metrics.jsonl").is_file() and evaluations.find_evaluation(path) is not None


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="output folders of trainings and evaluations, or their files")
    parser.add_argument("--output", default="comparison", help="folder to write")
    return parser.parse_args(argv)


def main(args):
    runs = read_trainings([path for path in args.runs if not is_evaluation(path)])
    measured = {path: evaluations.read_evaluation(path) for path in args.runs if is_evaluation(path)}
    table = {}
    pictures = {}
    if runs:
        described = {path: describe_run(rows) for path, rows in runs.items()}
        print_table("run", described)
        table |= described
        pictures["comparison.png"] = (run_record.draw_curves, runs)
    if runs and measured:
        print()
    if measured:
        described = evaluations.describe(measured)
        print_table("evaluation", described)
        table |= described
        if served := evaluations.describe_concurrency(measured):
            print()
            print_table("requests at a time", served)
            table |= served
        pictures["evaluations.png"] = (evaluations.draw_evaluations, measured)
        if differences := evaluations.find_differences(measured):
            print(f"the evaluations differ in their settings: {differences}")
    output = common.open_output(args.output)
    common.write_atomic(output / "comparison.json", json.dumps(table, indent=2) + "\n")
    try:
        for name, (draw, given) in pictures.items():
            common.write_atomic(output / name, draw(given))
    except ImportError as error:
        common.fail(f"no picture without matplotlib: {error}")
    print(f"written to {output / 'comparison.json'} and {', '.join(pictures)}")


if __name__ == "__main__":
    main(parse_args())
