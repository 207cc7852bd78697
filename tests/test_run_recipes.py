"""The comparison of recipes: its data, its trainings, what it keeps, and its table, recomputed from the metrics."""

import contextlib
import json
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import evaluate_draft
import prepare_data
import prepare_hidden_states
import train_eagle3
from helpers import tiny, training

sys.path.insert(0, str(tiny.REPOSITORY / "benchmarks"))  # it is not a package

import own_replies
import recipes
import recipes_table

COMMANDS = {
    "prepare_data.py": prepare_data,
    "prepare_hidden_states.py": prepare_hidden_states,
    "train_eagle3.py": train_eagle3,
    "evaluate_draft.py": evaluate_draft,
}
START, PACE = 100.0, {"short": 0.5, "long": 2.0}  # seconds that the trainings of the test seem to take


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target whose text a draft can learn in a few steps, conversations, and benchmark questions."""
    folder = tmp_path_factory.mktemp("recipes")
    weights = load_file(tiny.write_target(folder / "target") / "model.safetensors")
    weights["lm_head.weight"][20:24] *= 8  # it says little else than these four tokens
    save_file(weights, folder / "target" / "model.safetensors", {"format": "pt"})
    rows = tiny.conversations(12, 2)
    rows[3] = rows[2]  # a question that is there already
    rows[5]["conversations"][0]["content"] = "long " * 400
    tiny.write_jsonl(folder / "chats.jsonl", rows)
    tiny.write_jsonl(folder / "bench.jsonl", [{"turns": ["Why is it so?", "And then?"]}])
    return folder


def flags(folder, *more):
    given = {
        "target_model_path": folder / "target", "dataset": folder / "chats.jsonl", "heldout": folder / "bench.jsonl",
        "heldout_column": "turns", "heldout_rows": 2, "rows": 7, "max_new_tokens": 12, "max_prompt_tokens": 80,
        "generation_batch_size": 3, "batch": 6, "steps": 12, "evaluations": 3, "num_draft_tokens": 4, "decode": 3,
        "bf16": "false", "output": folder / "out",
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in given.items()]
    added = [
        "--add",
        "short: --ttt_length 2 --learning_rate 5e-3",
        "long: --ttt_length 4 --learning_rate 1e-2",
        "strange: --colour red",
    ]
    return recipes.parse_args([*argv, *added, "--seeds", "0", "1", "--references", "short", *map(str, more)])


class SameThread:
    """An executor that runs what it is given at once: trainings handle signals, which is for the main thread alone."""

    @staticmethod
    def ThreadPoolExecutor(jobs):
        return contextlib.nullcontext(SimpleNamespace(map=map))


class InProcess:
    """Commands run in the test's own process, as a start of each takes seconds; calls: their names."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(recipes, "run", self.run)
        monkeypatch.setattr(recipes, "watch", self.watch)
        monkeypatch.setattr(recipes, "concurrent", SimpleNamespace(futures=SameThread))

    def run(self, command, log):
        self.calls.append(command[0])
        script = COMMANDS[command[0]]
        script.main(script.parse_args(command[1:]))
        return ""

    def watch(self, command, log, metrics, until=None):
        """Each step seems to take PACE, an evaluation 7 seconds, the start START."""
        self.run(command, log)
        pace = PACE["short" if command[-4:-2] == ["--ttt_length", "2"] else "long"]
        marks = []
        evaluations = 0
        for row in training.metrics(metrics.parent):
            evaluations += row["split"] == "validation"
            marks.append(START + pace * row["step"] + 7 * evaluations)
        return 0, marks


@pytest.mark.slow
def test_two_variants_and_two_seeds_in_one_go(folder, monkeypatch, capsys):
    processes = InProcess(monkeypatch)
    recipes.main(flags(folder))
    printed = capsys.readouterr().out
    assert processes.calls.count("train_eagle3.py") == 4 and processes.calls.count("evaluate_draft.py") == 2
    assert re.search(r"^refused by this trainer: strange: .*--colour", printed, re.M)

    # Every figure again, from what the runs wrote.
    training_rows = [json.loads(line) for line in (folder / "out" / "data" / "train.jsonl").read_text().splitlines()]
    table = json.loads((folder / "out" / "table_steps_12.json").read_text())
    rows = {row["variant"]: row for row in table["rows"]}
    assert list(rows) == sorted(rows, key=lambda name: -rows[name]["acceptance_length"]) and len(rows) == 2
    finals = {}
    for name, row in rows.items():
        runs = [folder / "out" / "runs" / "steps_12" / name / f"seed_{seed}" for seed in (0, 1)]
        curves = [[m for m in training.metrics(run) if m["split"] == "validation"] for run in runs]
        assert [[m["step"] for m in curve] for curve in curves] == [[4, 8, 12]] * 2
        finals[name] = [json.loads((run / "walk.json").read_text())["acceptance_length"] for run in runs]
        assert row["acceptance_length"] == pytest.approx(statistics.mean(finals[name]))
        assert row["spread"] == pytest.approx(max(finals[name]) - min(finals[name]))
        assert row["seconds"] == pytest.approx(12 * PACE[name]), "neither the start nor evaluations count"
        means = [statistics.mean(curve[i]["acceptance_length"] for curve in curves) for i in range(3)]
        assert [point[1] for point in row["curve"]] == pytest.approx(means)
        assert [point[0] for point in row["curve"]] == pytest.approx([PACE[name] * step for step in (4, 8, 12)])
        replies = [sum(row["loss_mask"]) for row in training_rows]
        steps = {"short": 2, "long": 4}[name]
        slots = [max(length - 1 - i, 0) for length in replies for i in range(steps)]
        assert row["rows_a_step"] == pytest.approx(sum(slots) / len(replies) * 6, rel=0.05)
        for run in runs:
            evaluation = run / "decoded" / "evaluation.json"
            assert evaluation.exists() == (run.name == "seed_0")
        real, walked = row["decoded"][0]
        assert real == pytest.approx(walked, abs=1e-9), "the walk is not what decoding accepts"
        assert walked == pytest.approx(finals[name][0]), "these are all held-out prompts"
        assert f"train_eagle3.py --target_model_path {folder / 'target'}" in row["commands"][0]
    assert min(sum(finals.values(), [])) > 1, "a case without any accepted draft shows too little"
    gain = (statistics.mean(finals["long"]) - 1) / (statistics.mean(finals["short"]) - 1) - 1
    assert rows["long"]["against"]["short"]["gain"] == pytest.approx(gain)
    cell = next(line for line in printed.splitlines() if line.startswith("| long")).split("|")[-2]
    claimed = rows["long"]["against"]["short"]["claimed"]
    assert f"{gain:+.0%}" in cell and cell.strip().startswith("(") != claimed
    assert (folder / "out" / "curves_steps_12.png").read_bytes().startswith(b"\x89PNG")

    # A second call repeats nothing; a third adds a seed.
    processes.calls.clear()
    recipes.main(flags(folder))
    assert processes.calls == []
    recipes.main(flags(folder, "--seeds", 0, 1, 2))
    assert processes.calls == ["train_eagle3.py"] * 2
    recipes.main(flags(folder, "--table"))
    assert len(processes.calls) == 2 and "| long | 3 |" in capsys.readouterr().out

    # Nothing is kept under another setting.
    for name, value in (("batch", 3), ("num_draft_tokens", 2), ("evaluations", 2), ("trainer_flags", "--loss kl")):
        error = tiny.fails(capsys, recipes.main, flags(folder, f"--{name}={value}"))
        assert f"steps_12 was made with another {name}: " in error
    assert "data was made with another rows: " in tiny.fails(capsys, recipes.main, flags(folder, "--rows=6"))
    assert len(processes.calls) == 2


@pytest.mark.parametrize(("steps", "evaluations", "evaluated"), [(119, 4, 4), (56, 5, 5), (7, 4, 4), (3, 4, 3)])
@pytest.mark.slow
def test_evaluations_do_not_count_whatever_the_number_of_steps(folder, monkeypatch, steps, evaluations, evaluated):
    InProcess(monkeypatch)
    args = flags(folder, "--steps", steps, "--evaluations", evaluations, "--batch", 1)
    recipes.write_data(args, folder / "out" / "data")
    place = folder / "out" / "runs" / f"steps_{steps}" / "short" / "seed_0"
    done = recipes.train_run(args, "short", "--ttt_length 2 --learning_rate 5e-3", place, steps, 0)
    assert done["seconds"] == pytest.approx([PACE["short"] * row["step"] for row in done["rows"]])
    assert sum(row["split"] == "validation" for row in done["rows"]) == evaluated
    assert [row["step"] for row in done["rows"][-2:]] == [steps, steps]
    with pytest.raises(recipes.Refused, match=f"evaluation at step {steps} "):
        recipes.training_seconds(done["rows"][:-2] + done["rows"][-1:], [])


def test_the_replies_are_the_targets_own(folder, monkeypatch):
    """Held out: the benchmark's first question and the first two conversations; trained on: the next seven."""
    InProcess(monkeypatch)
    args = flags(folder)
    recipes.write_data(args, folder / "out" / "data")
    tokenizer = recipes.target_files.load_tokenizer(folder / "target", False)
    target = recipes.transformers.AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    rows = {}
    for split in ("validation", "train"):
        rows[split] = [json.loads(line) for line in (folder / "out/data" / f"{split}.jsonl").read_text().splitlines()]
    prompts = {split: [prompt_of(row) for row in part] for split, part in rows.items()}
    texts = {split: [tokenizer.decode(prompt) for prompt in part] for split, part in prompts.items()}
    numbers = {
        split: sorted(re.findall(r"Question (\d+)\.0", " ".join(part)), key=int) for split, part in texts.items()
    }
    assert numbers == {"validation": ["0", "1"], "train": ["2", "4", "6", "7", "8", "9", "10"]}
    assert any("Why is it so?" in text for text in texts["validation"]) and "And then?" not in str(texts)
    for row, prompt in zip(rows["validation"] + rows["train"], prompts["validation"] + prompts["train"], strict=True):
        ids = recipes.torch.tensor([prompt])
        alone = target.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=4, pad_token_id=4)[0].tolist()
        assert row["input_ids"] == alone


def prompt_of(row):
    return row["input_ids"][: row["loss_mask"].index(1)]


def test_generation_continues_where_it_stopped(tmp_path):
    path = tmp_path / "train.jsonl"
    finished = {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}
    path.write_text(json.dumps(finished) + "\n" + '{"input_ids": [1, 7, 9], "loss_ma')
    batches = own_replies.pending_batches(path, [[1, 2], [1, 7], [5] * 300, [6]], batch_size=2)
    assert batches == [[[6], [1, 7]], [[5] * 300]]
    assert path.read_text() == json.dumps(finished) + "\n"


# --- the budget of seconds ---


BURN = """
import json, sys, time
from pathlib import Path
path = Path(sys.argv[1])
for step in range(1, 4):
    begin = time.process_time()
    while time.process_time() < begin + 0.2:
        pass
    time.sleep(0.3)
    with path.open("a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
time.sleep(0.3)
print("error: all is lost\\nmore")
sys.exit(2)
"""


def test_seconds_are_those_of_the_processor(tmp_path):
    script = tmp_path / "burn.py"
    script.write_text(BURN)
    metrics = tmp_path / "metrics.jsonl"
    code, marks = recipes.watch([str(script), str(metrics)], tmp_path / "log", metrics)
    assert code == 2 and recipes.last_line(tmp_path / "log") == "all is lost"
    assert [later - mark for mark, later in zip(marks, marks[1:], strict=False)] == pytest.approx([0.2, 0.2], abs=0.1)
    metrics.unlink()
    _, marks = recipes.watch([str(script), str(metrics)], tmp_path / "log", metrics, until=1)
    assert len(marks) == 1 and len(metrics.read_text().splitlines()) < 3, "it was not ended"


def test_steps_follow_from_a_budget_of_seconds(tmp_path, monkeypatch):
    """The pilot's pace is 0.5 s a step; then a step takes 0.75 s: a first run of 20 steps misses 10 s, 13 are right."""
    trained = []

    def watch(command, log, metrics, until=None):
        if until:
            return -9, [30.0, 30.0 + 0.5 * recipes.PILOT_STEPS / 2]
        steps = int(command[command.index("--total_steps") + 1])
        trained.append(steps)
        rows = [{"split": "train", "step": step, "live_0": 1, "live_1": 0.5} for step in (2, 4, steps)]
        rows.append({"split": "validation", "step": steps, "acceptance_length": 1.5})
        tiny.write_jsonl(metrics, rows)
        return 0, [20 + 0.75 * step for step in (2, 4, steps)] + [90.0]

    monkeypatch.setattr(recipes, "watch", watch)
    monkeypatch.setattr(recipes, "count_chains", lambda trainer_args: 4)
    argv = ["--target_model_path", "none", "--dataset", "none", "--output", tmp_path, "--seconds", 10]
    args = recipes.parse_args(list(map(str, argv)))
    for seed in (0, 1, 0):
        assert recipes.train_variant(args, "ours", "--learning_rate 1", seed) == ""
    assert trained == [20, 13, 13]
    runs = recipes_table.read_runs(recipes.budget_folder(args))
    assert [run.done["steps"] for run in runs["ours"]] == [13, 13] and runs["ours"][0].rows_a_step() == 6
    assert runs["ours"][0].done["seconds"] == pytest.approx([1.5, 3.0, 9.75, 9.75])
    with pytest.raises(SystemExit):
        recipes.train_variant(args, "ours", "--learning_rate 2", 0)


# --- the table ---


@pytest.mark.parametrize(
    ("values", "others", "claimed"),
    [
        ([1.30, 1.31, 1.32], [1.20, 1.21, 1.22], True),
        ([1.30, 1.31, 1.32], [1.20, 1.21, 1.305], False),  # they overlap
        ([1.225, 1.231, 1.232], [1.20, 1.21, 1.22], False),  # less than twice the standard error, 0.0204
        ([1.5], [1.20, 1.21, 1.22], False),  # one seed shows no spread
    ],
)
def test_a_difference_within_the_spread_is_not_claimed(values, others, claimed):
    assert recipes_table.is_beyond_spread(values, others, 0.0125) is claimed


def test_the_time_to_a_value_lies_between_evaluations():
    def run(seconds, values):
        rows = [{"split": "validation", "step": i, "acceptance_length": value} for i, value in enumerate(values)]
        return recipes_table.Run("a", 0, {"rows": rows, "seconds": seconds})

    group = [run([10, 20, 30], [1.1, 1.2, 1.4]), run([12, 22, 32], [1.1, 1.2, 1.2])]
    assert recipes_table.mean_curve(group) == [(11, 1.1), (21, 1.2), (31, pytest.approx(1.3))]
    assert recipes_table.seconds_to_reach(group, 1.25) == pytest.approx(26)
    assert recipes_table.seconds_to_reach(group, 1.0) == 11 and recipes_table.seconds_to_reach(group, 1.4) is None


def test_wrong_flags_are_one_line(capsys):
    given = ["--target_model_path", "none", "--dataset", "none"]
    for more, words in (
        ([], "either steps or seconds"),
        (["--steps", "1", "--seconds", "2"], "either steps or seconds"),
        (["--steps", "1", "--variants", "ours", "worst"], "variants worst: known are ours"),
        (["--steps", "1", "--add", "no flags"], 'write "NAME: flags'),
    ):
        assert words in tiny.fails(capsys, lambda argv: recipes.choose_variants(recipes.parse_args(argv)), given + more)


def test_each_variant_is_a_command_line():
    """A variant has no flag twice, and none that the comparison sets for all."""
    args = recipes.parse_args(["--target_model_path", "none", "--dataset", "none", "--steps", "1"])
    for name, text in recipes.VARIANTS.items():
        command = recipes.trainer_command(args, text, Path("none"), 1, 0)
        names = [word for word in command if word.startswith("--")]
        repeated = {flag for flag in names if names.count(flag) > 1} - {"--learning_rate"}
        assert not repeated, f"{name}: {repeated}"


@pytest.mark.slow
def test_each_variant_trains(folder, monkeypatch):
    """Two steps of each on the tiny target, with bf16 as by default: none is refused."""
    processes = InProcess(monkeypatch)
    args = flags(folder, "--steps", 2, "--bf16", "true", "--seeds", 0, "--variants", *recipes.VARIANTS)
    recipes.write_data(args, folder / "out" / "data")
    assert list(recipes.train_all(args, recipes.choose_variants(args))) == ["strange"]
    assert processes.calls.count("train_eagle3.py") == len(recipes.VARIANTS) + 2
