"""evaluation.json, the figures that evaluate_draft.py --output writes: read, compared and drawn.

Those of a server have the same keys, but not all of them: what an evaluation does not have is None in a table.
"""

import datetime
import io
from pathlib import Path

from core import common, draft_files

NAME = "evaluation.json"

# Settings with which two evaluations measure different things.
DECISIVE = (
    "target_model_path", "prompts", "prompt_split", "num_prompts", "chat_template", "num_draft_tokens",
    "max_new_tokens", "temperature", "tree", "topk", "depth",
)  # fmt: skip

SPEEDS = {
    "tokens/s with draft": "tokens_per_second_with_draft",
    "tokens/s without": "tokens_per_second_without",
    "speedup": "speedup",
}


def find_evaluation(path):
    """The evaluation.json that a path means, a file or its folder, or None if it means something else."""
    path = Path(path)
    if path.is_dir():
        path = path / NAME
    return path if path.is_file() and path.suffix == ".json" else None


def read_evaluation(path):
    """The figures at a path, with the date on which they were written; ends the program if there are none."""
    file = find_evaluation(path)
    if not file:
        common.fail(f"{path}: no {NAME} is there, which evaluate_draft.py --output writes")
    figures, problem = draft_files.read_json(file)
    if problem:
        common.fail(f"{path}: {problem}")
    shares = figures.get("accepted_by_position")
    if not isinstance(figures.get("acceptance_length"), float) or not isinstance(shares, list):
        common.fail(f"{file} has no acceptance_length and accepted_by_position: evaluate_draft.py --output writes it")
    written = datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC)
    return {"date": f"{written:%Y-%m-%d}"} | figures


def categories_of(evaluations):
    """The names of all categories of evaluations {path: figures}, in the order in which they come."""
    names = [name for figures in evaluations.values() for name in figures.get("by_category") or {}]
    return list(dict.fromkeys(names))


def describe(evaluations):
    """{path: {column: value}}, None where an evaluation has none; the columns are the same for all."""
    positions = max(len(figures["accepted_by_position"]) for figures in evaluations.values())
    table = {}
    for path, figures in evaluations.items():
        columns = {name: figures.get(name) for name in ("prompts", "passes", "acceptance_length")}
        by_category = figures.get("by_category") or {}
        for name in categories_of(evaluations):
            columns[name] = by_category.get(name, {}).get("acceptance_length")
        shares = figures["accepted_by_position"]
        for position in range(positions):
            columns[f"accepted {position + 1}"] = shares[position] if position < len(shares) else None
        columns |= {title: figures.get(key) for title, key in SPEEDS.items()}
        table[path] = columns
    return table


def find_differences(evaluations):
    """What decisive settings differ in, as a line; "" if none does. A setting that one does not have differs not."""
    found = []
    for name in DECISIVE:
        paths = {}  # by value
        for path, figures in evaluations.items():
            value = (figures.get("settings") or {}).get(name)
            if value is not None:
                paths.setdefault(str(value), []).append(path)
        if len(paths) > 1:
            found.append(f"{name} " + ", ".join(f"{value} ({' '.join(which)})" for value, which in paths.items()))
    return "; ".join(found)


# ==================== The picture ====================================================================================


def draw_bars(axis, names, groups, title):
    """Bars side by side of groups {label: [value of each name, or None]}."""
    width = 0.8 / len(groups)
    for number, (label, values) in enumerate(groups.items()):
        places = [i - 0.4 + width * (number + 0.5) for i in range(len(names))]
        heights = [float("nan") if value is None else value for value in values]  # no bar
        axis.bar(places, heights, width, color=f"C{number % 10}", label=label)
    axis.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0)
    axis.set_ylabel(title)
    axis.grid(alpha=0.3, axis="y")


def draw_evaluations(evaluations):
    """PNG (bytes) of evaluations {path: figures}: acceptance by position and category, and tokens/s."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    by_position, by_category, speed, legend = figure.subplots(2, 2).flat
    for number, (path, figures) in enumerate(evaluations.items()):
        shares = figures["accepted_by_position"]
        by_position.plot(range(1, len(shares) + 1), shares, "o-", color=f"C{number % 10}", label=path)
    by_position.set(xlabel="position in the chain", ylabel="share of passes that accept the draft", ylim=(0, 1))
    by_position.grid(alpha=0.3)
    table = describe(evaluations)
    lengths = ["acceptance_length", *categories_of(evaluations)]
    names = ["all", *lengths[1:]]
    groups = {path: [columns[name] for name in lengths] for path, columns in table.items()}
    draw_bars(by_category, names, groups, "acceptance length")
    titles = list(SPEEDS)[:2]
    groups = {path: [columns[title] for title in titles] for path, columns in table.items()}
    draw_bars(speed, titles, groups, "tokens/s")
    legend.axis("off")
    legend.legend(*by_position.get_legend_handles_labels(), loc="center")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
