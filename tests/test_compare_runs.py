"""The curves of a run and the comparison of several: what is drawn and printed is what metrics.jsonl says."""

import json
import sys
from types import SimpleNamespace

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

import compare_runs
import train_eagle3
from core import run_record

pytestmark = pytest.mark.pictures


def rows_of(steps, shift=0.0, validated=(), acc=3):
    rows = []
    for step in steps:
        values = {"loss": 5 / step + shift, "chain_length": 1 + step / 10, "lr": 0.1 / step, "grad_norm": None}
        values |= {f"acc_{i}": (0.1 + shift / 10) * step / (i + 1) for i in range(acc)}
        values |= {"tokens_per_second": 100.0 + 10 * (step % 3), "seconds": 36.0 * step}
        rows.append({"split": "train", "step": step, "epoch": step / 4, **values})
        if step in validated:
            values = {"loss": 6 / step + shift, "acceptance_length": 1 + abs(3 - step) / 4, "passes": 9}
            rows.append({"split": "validation", "step": step, "epoch": step / 4, **values})
    return rows


def write_run(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """[(label of the y axis, label of the line, its colour, [(x, y)])] of what is drawn."""
    found, plot = [], Axes.plot

    def recorded(axes, x, y, *style, **options):
        lines = plot(axes, x, y, *style, **options)
        found.append((axes, options.get("label"), options.get("color"), list(zip(x, y, strict=True))))
        return lines

    monkeypatch.setattr(Axes, "plot", recorded)
    return lambda: [(axes.get_ylabel(), *rest) for axes, *rest in found]


def points(rows, split, name):
    return [(row["step"], row[name]) for row in rows if row["split"] == split]


def test_one_run_has_its_loss_accuracies_acceptance_rate_and_speed(drawn, tmp_path):
    rows = rows_of(range(1, 7), validated=(2, 4, 6), acc=12)
    (tmp_path / "x.png").write_bytes(run_record.draw_curves({"run": rows}))
    pixels = imread(tmp_path / "x.png")
    assert pixels.shape[:2] == (960, 1800) and all(part.min() < 0.9 for part in pixels[:, :, :3].transpose(2, 0, 1))
    expected = {
        ("loss", "training"): points(rows, "train", "loss"),
        ("loss", "validation"): points(rows, "validation", "loss"),
        ("acceptance length", "of the validation rows"): points(rows, "validation", "acceptance_length"),
        ("acceptance length", "chain length in training"): points(rows, "train", "chain_length"),
        ("learning rate", ""): points(rows, "train", "lr"),
        ("tokens/s", ""): points(rows, "train", "tokens_per_second"),
    } | {("accuracy by step of the chain", f"acc_{i}"): points(rows, "train", f"acc_{i}") for i in range(12)}
    assert {(title, label): line for title, label, _, line in drawn()} == expected
    assert [label for title, label, *_ in drawn() if title.startswith("accuracy")] == [f"acc_{i}" for i in range(12)]


def test_several_runs_differ_by_colour_and_are_named_once(drawn):
    runs = {"a": rows_of([1, 2, 3]), "b": rows_of([2, 4], 0.5, (4,)), "c": rows_of([5])}
    assert run_record.draw_curves(runs).startswith(b"\x89PNG")
    losses = [(colour, line) for title, label, colour, line in drawn() if title == "loss" and line]
    drawn_as = [("C0", "a", "train"), ("C1", "b", "train"), ("C1", "b", "validation"), ("C2", "c", "train")]
    assert losses == [(colour, points(runs[name], split, "loss")) for colour, name, split in drawn_as]
    accuracies = [(colour, line) for title, _, colour, line in drawn() if title.startswith("accuracy") and line]
    assert accuracies[:2] == [("C0", points(runs["a"], "train", name)) for name in ("acc_0", "acc_2")]
    assert [label for title, label, *_ in drawn() if title == ""] == ["a", "b", "c"]


def record(folder):
    if not train_eagle3.dist.is_initialized():
        train_eagle3.dist.init_process_group("gloo", rank=0, world_size=1, store=train_eagle3.dist.HashStore())
    return run_record.Record(SimpleNamespace(output_dir=folder, report_to=[]), {"starts_behind_step": 0}, 9)


def test_a_run_leaves_its_curves(drawn, tmp_path):
    run = record(tmp_path)
    for step in (1, 2):
        run.row("train", step, step / 2, {"loss": 1 / step, "acc_0": step / 4})
    run.close()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert ("loss", "training", "C0", [(1, 1.0), (2, 0.5)]) in drawn()


@pytest.mark.parametrize("absent", [False, True])
def test_a_picture_that_cannot_be_drawn_costs_nothing(tmp_path, monkeypatch, capsys, absent):
    if absent:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        monkeypatch.setattr(run_record, "draw_curves", lambda runs: 1 / 0)
    run = record(tmp_path)
    run.row("train", 1, 1.0, {"loss": 1.0})
    run.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"] and run_record.read_metrics(tmp_path)[0][
        "loss"
    ] == 1
    assert "curves.png is not drawn: " in capsys.readouterr().err


def test_metrics_whose_last_line_was_cut_off_are_read(tmp_path):
    folder = write_run(tmp_path / "a", rows_of([1, 2]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "ste')
    assert run_record.read_metrics(folder) == run_record.read_metrics(folder / "metrics.jsonl") == rows_of([1, 2])


# --- several trainings ---


def compare(*argv):
    compare_runs.main(compare_runs.parse_args(list(map(str, argv))))


def test_compared_runs_are_in_one_table_and_one_picture(drawn, tmp_path, capsys):
    a = write_run(tmp_path / "a", rows_of([1, 2, 3, 4], validated=(1, 2, 3, 4)))
    b = write_run(tmp_path / "longer", rows_of([10, 20], 1.0))
    compare(a, b / "metrics.jsonl", "--output", tmp_path / "out")
    head, rule, *lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in
                          capsys.readouterr().out.splitlines() if line.startswith("|")]  # fmt: skip
    assert set("".join(rule)) == {"-"} and [line[0] for line in lines] == [str(a), str(b / "metrics.jsonl")]
    first, second = (dict(zip(head, line, strict=True)) for line in lines)
    # By hand: losses 5, 2.5, 1.667, 1.25; acceptance 1.5, 1.25, 1, 1.25; rates 110, 120, 100, 110; 36 s a step.
    assert first == {
        "run": str(a), "steps": "4", "hours": "0.040", "tokens/s": "110", "loss": "1.250", "best loss": "1.250",
        "acc_0": "0.400", "best acc_0": "0.400", "chain_length": "1.400", "best chain_length": "1.400",
        "validation loss": "1.500", "best validation loss": "1.500", "acceptance_length": "1.250",
        "best acceptance_length": "1.500", "at step": "1",
    }  # fmt: skip
    assert second | {"run": ""} == dict.fromkeys(head, "-") | {
        "run": "", "steps": "20", "hours": "0.200", "tokens/s": "115", "loss": "1.250", "best loss": "1.250",
        "acc_0": "4.000", "best acc_0": "4.000", "chain_length": "3.000", "best chain_length": "3.000",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.json", "comparison.png"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())[str(a)]["best acceptance_length"] == 1.5
    assert len([line for title, _, _, line in drawn() if title == "loss" and line]) == 3


def test_a_comparison_without_a_folder_is_drawn_into_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", rows_of([1, 2]))
    compare("a")
    assert (tmp_path / "comparison" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == "written to comparison/comparison.json and comparison.png"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nowhere"], "nowhere cannot be read"),
        (["empty"], "empty has no rows"),
        (["broken"], "metrics.jsonl cannot be read"),
        ([], "the following arguments are required: runs"),
        (["list"], "line 2 is not a row"),
        (["stepless"], "line 1 is not a row"),
        (["fine", "--output", "fine/metrics.jsonl"], "a file is in the way"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, monkeypatch, capsys, argv, expected):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "empty", [])
    write_run(tmp_path / "fine", rows_of([1]))
    write_run(tmp_path / "list", [*rows_of([1]), [1]])
    write_run(tmp_path / "stepless", [{"split": "train", "loss": 1.0}])
    write_run(tmp_path / "broken", []).joinpath("metrics.jsonl").write_text("{\n")
    with pytest.raises(SystemExit) as stopped:
        compare(*argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and expected in line
    assert not (tmp_path / "comparison").exists()
