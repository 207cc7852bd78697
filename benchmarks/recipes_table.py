"""What recipes.py writes about finished trainings: table_BUDGET.md, .json and curves_BUDGET.png; loads no model.

A difference is claimed only where it is beyond the spread of the seeds: the two variants' seeds do not overlap, and the
means are further apart than twice the standard error of their difference, from the spread of seeds over all variants.
"""

import io
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from core import common

COLUMNS = (
    "variant",
    "seeds",
    "steps",
    "seconds",
    "rows a step",
    "acceptance length",
    "spread",
    "decoded",
)


@dataclass(frozen=True)
class Run:
    """A finished training: done.json, and what was measured of its draft."""

    variant: str
    seed: int
    done: dict
    walked: float | None = None  # acceptance length of the finished draft over all held-out replies
    walked_decoded: float | None = None  # the same over those that are decoded
    decoded: float | None = None  # acceptance length by real decoding

    @property
    def value(self):
        """Acceptance length: of the walk, or of the training's last evaluation where no walk was made yet."""
        return self.walked or self.curve()[1][-1]

    def curve(self):
        """(seconds, acceptance lengths) of the evaluations on the way."""
        rows = zip(self.done["rows"], self.done["seconds"], strict=True)
        points = [(seconds, row["acceptance_length"]) for row, seconds in rows if row["split"] == "validation"]
        return [seconds for seconds, _ in points], [value for _, value in points]

    def rows_a_step(self):
        """Live slots that an optimizer step computes on average, over all steps of all chains."""
        shares = []
        for row in self.done["rows"]:
            if row["split"] == "train":
                shares.append(sum(value for name, value in row.items() if name.startswith("live_")))
        return self.done["chains"] * statistics.mean(shares)


def read_json(path):
    """The content of a JSON file, {} without one."""
    return json.loads(path.read_text()) if path.exists() else {}


def read_runs(folder):
    """{variant: its runs by seed} of a budget's folder."""
    runs = {}
    for path in sorted(Path(folder).glob("*/seed_*/done.json")):
        place = path.parent
        run = Run(
            place.parent.name,
            int(place.name.removeprefix("seed_")),
            read_json(path),
            read_json(place / "walk.json").get("acceptance_length"),
            read_json(place / "walk_decoded.json").get("acceptance_length"),
            read_json(place / "decoded" / "evaluation.json").get("acceptance_length"),
        )
        runs.setdefault(run.variant, []).append(run)
    return runs


# ==================== Figures ========================================================================================


def seed_deviation(runs):
    """Standard deviation of a variant's seeds, pooled over all variants; None if each has one seed."""
    squares = 0.0
    freedom = 0
    for group in runs.values():
        values = [run.value for run in group]
        squares += sum((value - statistics.mean(values)) ** 2 for value in values)
        freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else None


def is_beyond_spread(values, others, deviation):
    """Whether two variants' seeds differ by more than chance: no overlap, and twice the standard error apart."""
    if min(len(values), len(others)) < 2:
        return False
    if min(values) <= max(others) and min(others) <= max(values):
        return False
    error = deviation * math.sqrt(1 / len(values) + 1 / len(others))
    return abs(statistics.mean(values) - statistics.mean(others)) > 2 * error


def mean_curve(group):
    """[(seconds, acceptance length)] of a variant: the means over its seeds, evaluation by evaluation."""
    curves = [run.curve() for run in group]
    count = min(len(seconds) for seconds, _ in curves)
    points = []
    for i in range(count):
        seconds = statistics.mean(curve[0][i] for curve in curves)
        value = statistics.mean(curve[1][i] for curve in curves)
        points.append((seconds, value))
    return points


def seconds_to_reach(group, value):
    """Training seconds after which the mean curve first reaches a value, between evaluations by a line; or None."""
    before = None
    for seconds, reached in mean_curve(group):
        if reached >= value:
            if before is None:
                return seconds
            share = (value - before[1]) / (reached - before[1])
            return before[0] + share * (seconds - before[0])
        before = (seconds, reached)
    return None


def compare(group, reference, deviation):
    """How a variant stands to a reference: gain in tokens per pass minus one, time to reach its final value."""
    values = [run.value for run in group]
    others = [run.value for run in reference]
    gained = statistics.mean(values) - 1
    base = statistics.mean(others) - 1
    return {
        "gain": gained / base - 1 if base > 0 else None,
        "claimed": is_beyond_spread(values, others, deviation or 0.0),
        "seconds_to_reach": seconds_to_reach(group, statistics.mean(others)),
        "seconds_of_reference": statistics.mean(run.done["seconds"][-1] for run in reference),
    }


def summarise(runs, references):
    """A row for each variant, the best first."""
    deviation = seed_deviation(runs)
    rows = []
    for name, group in runs.items():
        values = [run.value for run in group]
        slots = [run.rows_a_step() for run in group]
        decoded = [run for run in group if run.decoded is not None]
        rows.append(
            {
                "variant": name,
                "seeds": [run.seed for run in group],
                "values": values,
                "acceptance_length": statistics.mean(values),
                "spread": max(values) - min(values),
                "steps": statistics.mean(run.done["steps"] for run in group),
                "seconds": statistics.mean(run.done["seconds"][-1] for run in group),
                "rows_a_step": statistics.mean(slots),
                "decoded": [[run.decoded, run.walked_decoded] for run in decoded],
                "against": {
                    other: compare(group, runs[other], deviation)
                    for other in references
                    if other in runs and other != name
                },
                "flags": group[0].done["flags"],
                "curve": mean_curve(group),
                "commands": [run.done["command"] for run in group],
            }
        )
    return sorted(rows, key=lambda row: -row["acceptance_length"])


# ==================== Table and picture ==============================================================================


def against_cell(row, reference):
    """The gain over a reference in percent, in brackets if it is within the spread; and the time it took."""
    found = row["against"].get(reference)
    if not found or found["gain"] is None:
        return "-"
    gain = f"{found['gain']:+.0%}"
    if not found["claimed"]:
        gain = f"({gain})"
    if found["seconds_to_reach"] is None:
        return gain
    return f"{gain}, {found['seconds_to_reach'] / found['seconds_of_reference']:.2f}"


def table_lines(rows, references):
    """The table in Markdown."""
    header = [*COLUMNS, *(f"against {name}" for name in references)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        decoded = ", ".join(f"{real:.3f} (walk {walked:.3f})" for real, walked in row["decoded"])
        cells = [
            row["variant"],
            str(len(row["seeds"])),
            f"{row['steps']:,.0f}",
            f"{row['seconds']:.1f}",
            f"{row['rows_a_step']:,.0f}",
            f"{row['acceptance_length']:.3f}",
            f"{row['spread']:.3f}" if len(row["seeds"]) > 1 else "-",
            decoded or "-",
        ]
        lines.append(cells + [against_cell(row, name) for name in references])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def write(output, budget, runs, references, refused):
    """table_BUDGET.md, table_BUDGET.json, curves_BUDGET.png in the output folder; prints the table."""
    references = [name for name in references if name in runs]
    rows = summarise(runs, references)
    deviation = seed_deviation(runs)
    lines = table_lines(rows, references)
    about = "spread: largest minus least of the seeds"
    if deviation is not None:
        about += f"; standard deviation of seeds over all variants {deviation:.4f}"
    lines += ["", f"{about}."]
    lines.append("against: gain in tokens per pass minus one, (within the spread: not claimed), and the share of the")
    lines.append("reference's training time after which the variant reaches the reference's final value.")
    lines += [f"refused: {name}: {line}" for name, line in refused.items()]
    print("\n".join(lines))
    commands = [f"# {row['variant']}\n{command}" for row in rows for command in row["commands"]]
    text = "\n".join([*lines, "", "```", *commands, "```", ""])
    common.write_atomic(output / f"table_{budget}.md", text)
    content = {"rows": rows, "seed_deviation": deviation, "references": references, "refused": refused}
    common.write_atomic(output / f"table_{budget}.json", json.dumps(content, indent=2) + "\n")
    common.write_atomic(output / f"curves_{budget}.png", draw(runs))
    print(f"written to {output}/table_{budget}.md, .json and curves_{budget}.png")


def draw(runs):
    """PNG (bytes): acceptance length against seconds of training, a line for each variant, a band over its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for number, (name, group) in enumerate(runs.items()):
        points = mean_curve(group)
        seconds = [at for at, _ in points]
        values = [run.curve()[1][: len(points)] for run in group]
        low = [min(column) for column in zip(*values, strict=True)]
        high = [max(column) for column in zip(*values, strict=True)]
        style = "-" if number < 10 else "--"
        axes.plot(seconds, [value for _, value in points], style, color=f"C{number % 10}", marker=".", label=name)
        axes.fill_between(seconds, low, high, color=f"C{number % 10}", alpha=0.15)
    axes.set(xlabel="seconds of training", ylabel="acceptance length of held-out replies")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
