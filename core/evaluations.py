"""evaluation.json, the figures that evaluate_draft.py --output writes: read, compared and drawn.

Those of a server have the same keys, but not all of them: what an evaluation does not have is None in a table.
"""

import datetime
import io
import platform
from pathlib import Path

import torch

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

WAITING = {"ms to first token": "seconds_to_first_token", "ms per token": "seconds_per_token"}  # medians


def describe_origin(device):
    """{"date", "machine"} of an evaluation that ends now, on this torch.device of this machine."""
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {"date": f"{datetime.date.today()}", "machine": f"{machine}, torch {torch.__version__}"}


def cpu_name():
    """The model of the CPU where Linux knows it, else its architecture."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.machine()


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


def categories_of(measured):
    """The names of all categories of evaluations {path: figures}, in the order in which they come."""
    names = {}
    for figures in measured.values():
        names |= dict.fromkeys(figures.get("by_category") or {})
    return list(names)


def describe(measured):
    """{path: {column: value}} of evaluations {path: figures}, None where one has none; all have the same columns."""
    positions = max(len(figures["accepted_by_position"]) for figures in measured.values())
    table = {}
    for path, figures in measured.items():
        columns = {}
        for name in ("prompts", "passes", "acceptance_length"):
            columns[name] = figures.get(name)
        by_category = figures.get("by_category") or {}
        for name in categories_of(measured):
            columns[name] = by_category.get(name, {}).get("acceptance_length")
        shares = figures["accepted_by_position"]
        for position in range(positions):
            share = shares[position] if position < len(shares) else None
            columns[f"accepted {position + 1}"] = share
        for title, key in SPEEDS.items():
            columns[title] = figures.get(key)
        table[path] = columns
    return table


def describe_concurrency(measured):
    """{path and requests at a time: {column: value}} of the evaluations of servers among {path: figures}."""
    table = {}
    for path, figures in measured.items():
        for level in figures.get("by_concurrency") or ():
            columns = {title: level.get(key) for title, key in SPEEDS.items()}
            for title, key in WAITING.items():
                columns[title] = 1000 * level[key]["median"] if level.get(key) else None
            table[f"{path} at {level['concurrency']}"] = columns
    return table


def find_differences(measured):
    """The decisive settings that are not equal, in one line; "" if all are.

    A setting that an evaluation does not have is none that differs.
    """
    found = []
    for name in DECISIVE:
        paths = {}  # by value
        for path, figures in measured.items():
            settings = figures.get("settings", {})
            if name in settings:
                paths.setdefault(str(settings[name]), []).append(path)
        if len(paths) > 1:
            parts = [f"{value} ({' '.join(which)})" for value, which in paths.items()]
            found.append(f"{name} {', '.join(parts)}")
    return "; ".join(found)


# ==================== The picture ====================================================================================


def draw_bars(axis, names, groups, title):
    """Bars side by side of groups {label: [value of each name, or None]}."""
    width = 0.8 / len(groups)
    for number, (label, values) in enumerate(groups.items()):
        first = width * (number + 0.5) - 0.4
        places = [first + i for i in range(len(names))]
        heights = [float("nan") if value is None else value for value in values]  # no bar
        axis.bar(places, heights, width, color=f"C{number % 10}", label=label)
    axis.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0)
    axis.set_ylabel(title)
    axis.grid(alpha=0.3, axis="y")


def draw_evaluations(measured):
    """PNG (bytes) of evaluations {path: figures}: acceptance by position and by category, and tokens/s."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    by_position, by_category, speed, legend = figure.subplots(2, 2).flat
    for number, (path, figures) in enumerate(measured.items()):
        shares = figures["accepted_by_position"]
        positions = range(1, len(shares) + 1)
        by_position.plot(positions, shares, "o-", color=f"C{number % 10}", label=path)
    by_position.set(xlabel="position", ylabel="share of passes that accept the draft", ylim=(0, 1))
    by_position.grid(alpha=0.3)
    table = describe(measured)
    names = ["acceptance_length", *categories_of(measured)]
    lengths = {path: [columns[name] for name in names] for path, columns in table.items()}
    draw_bars(by_category, ["all", *names[1:]], lengths, "acceptance length")
    names = ["tokens/s with draft", "tokens/s without"]
    speeds = {path: [columns[name] for name in names] for path, columns in table.items()}
    draw_bars(speed, names, speeds, "tokens/s")
    legend.axis("off")
    legend.legend(*by_position.get_legend_handles_labels(), loc="center")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
