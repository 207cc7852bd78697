"""Draw the curves of a run: loss, accuracy by step of the chain, and the acceptance length of the evaluations.

In:  metrics.jsonl of a run of train_eagle3.py. Out: a PNG.

    python examples/plot_curves.py output/metrics.jsonl curves.png
"""

import json
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main(metrics, picture):
    with open(metrics) as file:
        rows = [json.loads(line) for line in file]
    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    steps = [row["step"] for row in train]
    figure, (loss, accuracy) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    loss.plot(steps, [row["loss"] for row in train], label="training")
    loss.plot([row["step"] for row in validation], [row["loss"] for row in validation], "o", label="validation")
    loss.set(xlabel="optimizer step", ylabel="loss")
    for name in sorted(name for name in train[0] if name.startswith("acc_")):
        accuracy.plot(steps, [row[name] for row in train], label=name)
    accuracy.set(xlabel="optimizer step", ylabel="accuracy by step of the chain", ylim=(0, 1))
    if validation:
        figure.suptitle(f"acceptance length on validation text {validation[-1]['acceptance_length']:.2f}")
    for axes in (loss, accuracy):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:3])
