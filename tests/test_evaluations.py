"""Evaluations side by side: tables, what their settings differ in, the picture, and what cannot be compared."""

import json
import time
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

import compare_runs
from core import evaluations
from helpers import tiny

SETTINGS = {"target_model_path": "org/target", "prompts": "mt_bench", "num_draft_tokens": 3, "temperature": 0.0}
FULL = {
    "acceptance_length": 2.25,
    "accepted_by_position": [0.75, 0.375, 0.125],
    "by_category": {
        "writing": {
            "acceptance_length": 2.0,
            "accepted_by_position": [0.6, 0.3, 0.1],
            "passes": 30,
            "prompts": 2,
        },
        "math": {
            "acceptance_length": 2.75,
            "accepted_by_position": [0.9, 0.6, 0.25],
            "passes": 10,
            "prompts": 1,
        },
    },
    "passes": 40,
    "prompts": 3,
    "tokens_per_second_with_draft": 90.5,
    "tokens_per_second_without": 45.25,
    "speedup": 2.0,
    "settings": SETTINGS,
}
# Of a server, without a second one: no speedup, other categories, fewer drafted tokens.
SERVED = {
    "acceptance_length": 1.5,
    "accepted_by_position": [0.5, 0.0],
    "by_category": {"math": {"acceptance_length": 1.5, "accepted_by_position": [0.5, 0.0], "passes": 9, "prompts": 1}},
    "tokens_per_second_with_draft": 300.0,
    "settings": SETTINGS | {"num_draft_tokens": 2},
}


def write(folder, figures):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(figures))
    return folder


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """compare(paths) in a folder with the evaluations a and b: (lines of the tables, as cells; other lines)."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", FULL)
    write(tmp_path / "b", SERVED)

    def call(*paths):
        compare_runs.main(compare_runs.parse_args(list(paths)))
        lines = capsys.readouterr().out.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        return cells, [line for line in lines if not line.startswith("|")]

    return call


def test_evaluations_are_rows_and_what_one_does_not_have_is_a_dash(compare):
    (header, rule, *rows), others = compare("a", "b/evaluation.json")
    assert set("".join(rule)) == {"-"}
    assert header == [
        "evaluation", "prompts", "passes", "acceptance_length", "writing", "math", "accepted 1", "accepted 2",
        "accepted 3", "tokens/s with draft", "tokens/s without", "speedup",
    ]  # fmt: skip
    assert rows == [
        ["a", "3", "40", "2.250", "2.000", "2.750", "0.750", "0.375", "0.125", "90.500", "45.250", "2.000"],
        ["b/evaluation.json", "-", "-", "1.500", "-", "1.500", "0.500", "0.000", "-", "300.000", "-", "-"],
    ]
    assert others == [
        "the evaluations differ in their settings: num_draft_tokens 3 (a), 2 (b/evaluation.json)",
        "written to comparison/comparison.json and evaluations.png",
    ]


def test_speed_of_a_server_by_requests_at_a_time(compare, tmp_path):
    """By hand: 0.25 s are 250 ms; the second level was measured without a baseline."""
    first = {
        "concurrency": 1,
        "tokens_per_second_with_draft": 30.0,
        "tokens_per_second_without": 20.0,
        "speedup": 1.5,
        "seconds_to_first_token": {"median": 0.25, "p90": 1.0},
        "seconds_per_token": {"median": 0.004, "p90": 1.0},
    }
    second = {"concurrency": 4, "tokens_per_second_with_draft": 50.0, "seconds_per_token": None}
    write(tmp_path / "b", SERVED | {"by_concurrency": [first, second]})
    cells, _ = compare("a", "b")
    at = [row[0] for row in cells].index("requests at a time")
    assert cells[at][1:] == [
        "tokens/s with draft", "tokens/s without", "speedup", "ms to first token", "ms per token",
    ]  # fmt: skip
    assert cells[at + 2 :] == [
        ["b at 1", "30.000", "20.000", "1.500", "250.000", "4.000"],
        ["b at 4", "50.000", "-", "-", "-", "-"],
    ]


def test_what_is_written(compare, tmp_path):
    compare("a", "b")
    written = tmp_path / "comparison"
    assert sorted(path.name for path in written.iterdir()) == ["comparison.json", "evaluations.png"]
    assert (written / "evaluations.png").read_bytes().startswith(b"\x89PNG")
    table = json.loads((written / "comparison.json").read_text())
    assert table["a"]["math"] == 2.75 and table["b"]["speedup"] is None


def test_settings_are_told_once_each_and_a_missing_one_differs_from_none():
    """By hand: three evaluations, two prompts, one temperature, one that does not know its target."""
    settings = [SETTINGS, SETTINGS | {"prompts": "humaneval"}, {"prompts": "mt_bench", "temperature": 0.0}]
    figures = {name: FULL | {"settings": given} for name, given in zip("abc", settings, strict=True)}
    assert evaluations.find_differences(figures) == "prompts mt_bench (a c), humaneval (b)"
    assert evaluations.find_differences({"a": FULL, "b": FULL}) == ""
    all_prompts = [FULL | {"settings": SETTINGS | {"num_prompts": number}} for number in (None, 16)]
    assert evaluations.find_differences(dict(zip("ab", all_prompts, strict=True))) == "num_prompts None (a), 16 (b)"


def test_trainings_and_evaluations_have_a_table_each(compare, tmp_path):
    """A training's folder that holds an evaluation as well is the training."""
    write(tmp_path / "run", FULL)
    row = {"split": "train", "step": 4, "loss": 1.5}
    tiny.write_jsonl(tmp_path / "run" / "metrics.jsonl", [row])
    cells, others = compare("a", "run")
    assert [line[0] for line in cells if not line[0].startswith("-")] == ["run", "run", "evaluation", "a"]
    assert others == ["", "written to comparison/comparison.json and comparison.png, evaluations.png"]
    assert set(json.loads((tmp_path / "comparison" / "comparison.json").read_text())) == {"a", "run"}


@pytest.mark.pictures
def test_the_picture_shows_positions_categories_and_speed(monkeypatch):
    bars, lines = [], []
    bar, plot = Axes.bar, Axes.plot

    def recorded_bar(axes, places, heights, *args, **options):
        bars.append((options["label"], heights))
        return bar(axes, places, heights, *args, **options)

    def recorded_plot(axes, x, y, *args, **options):
        lines.append((options["label"], list(x), y))
        return plot(axes, x, y, *args, **options)

    monkeypatch.setattr(Axes, "bar", recorded_bar)
    monkeypatch.setattr(Axes, "plot", recorded_plot)
    assert evaluations.draw_evaluations({"a": FULL, "b": SERVED}).startswith(b"\x89PNG")
    assert lines == [("a", [1, 2, 3], [0.75, 0.375, 0.125]), ("b", [1, 2], [0.5, 0.0])]
    drawn = [(label, [None if height != height else height for height in heights]) for label, heights in bars]
    assert drawn == [
        ("a", [2.25, 2.0, 2.75]), ("b", [1.5, None, 1.5]), ("a", [90.5, 45.25]), ("b", [300.0, None])
    ]  # fmt: skip


def test_where_and_when_an_evaluation_was_measured(monkeypatch):
    """The processor as Linux names it, or a GPU; the date as the clock has it."""
    origin = evaluations.describe_origin(torch.device("cpu"))
    assert origin["date"] == time.strftime("%Y-%m-%d")
    name, threads, version = origin["machine"].rsplit(", ", 2)
    assert (threads, version) == (f"{torch.get_num_threads()} threads", f"torch {torch.__version__}")
    cpus = Path("/proc/cpuinfo")
    assert f": {name}\n" in cpus.read_text() if cpus.exists() and "model name" in cpus.read_text() else name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert evaluations.describe_origin(torch.device("cuda"))["machine"] == f"NVIDIA H200, torch {torch.__version__}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "evaluation.json is not JSON"),
        ("[]", "evaluation.json is not a JSON object"),
        ("{}", "evaluation.json has no acceptance_length"),
        ('{"acceptance_length": 1.5}', "and accepted_by_position"),
    ],
)
def test_what_is_no_evaluation_is_one_line(tmp_path, monkeypatch, capsys, content, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "evaluation.json").write_text(content)
    assert expected in tiny.fails(capsys, lambda: compare_runs.main(compare_runs.parse_args(["a"])))
    assert not (tmp_path / "comparison").exists()
