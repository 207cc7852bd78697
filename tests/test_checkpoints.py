"""Checkpoints: complete or not there, continued exactly, on other numbers of ranks, and what a run survives."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import prepare_data
import train_eagle3
from core import checkpoints, draft_files, ranks, run_record, server
from helpers import tiny, training
from helpers.starts import Starts
from helpers.training import timeless as rows

FLAGS = "--draft_global_batch_size", 4, "--total_steps", 12, "--log_steps", 3, "--eval_steps", 4
FLAGS = *FLAGS, "--save_steps", 5, "--save_interval", 99, "--draft_vocab_size", 200, "--learning_rate", 3e-3


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, prepared data, and a run that nothing disturbed."""
    folder = training.write_workspace(tmp_path_factory.mktemp("checkpoints"))
    train(folder, folder / "whole")
    return folder


def arguments(work, output, *flags):
    return training.arguments(work, output, *FLAGS, *flags)


def train(work, output, *flags):
    training.run(work, output, *FLAGS, *flags)


def contents(folder):
    """{file: its content} of a checkpoint, tensor by tensor, without what tells the time or the folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name} {key}": tensor for key, tensor in load_file(path).items()}
        elif path.suffix == ".pt":
            found |= flattened(name, torch.load(path, weights_only=False))
        elif path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            found |= flattened(name, {key: state[key] for key in state.keys() - {"seconds", "spent", "files", "flags"}})
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def flattened(name, value):
    if isinstance(value, dict):
        return {key: leaf for k, v in value.items() for key, leaf in flattened(f"{name} {k}", v).items()}
    if isinstance(value, list | tuple):
        return {key: leaf for k, v in enumerate(value) for key, leaf in flattened(f"{name} {k}", v).items()}
    return {name: value}


def different(a, b):
    """Names of what two folders' contents do not have in common, bit by bit."""
    a, b = contents(a), contents(b)

    def same(x, y):
        if torch.is_tensor(x) and torch.is_tensor(y):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and (isinstance(x, float | int | str | bytes | None) is False or x == y)

    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def at_step(monkeypatch, step, act):
    """Call act() when the training logs or counts step `step`."""
    original = train_eagle3.optimizer_step
    count = []

    def counted(*args, **options):
        result = original(*args, **options)
        count.append(1)
        if len(count) == step:
            act()
        return result

    monkeypatch.setattr(train_eagle3, "optimizer_step", counted)


def test_stopped_by_a_signal_and_resumed_is_the_undisturbed_run(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(work, out)
    assert oct((out / "latest" / "model.safetensors").stat().st_mode)[-3:] == "644", "others may serve it"
    assert "stopped behind step 7 by SIGTERM: --resume continues" in capsys.readouterr().out
    assert (out / "latest").resolve().name == "step_00000007" and not (out / "final").exists()
    monkeypatch.undo()
    train(work, out, "--resume")
    assert rows(out) == rows(work / "whole")
    for name in ("step_00000010", "step_00000012", "final"):
        assert [x for x in different(out / name, work / "whole" / name) if "run.json" not in x] == [], name


@pytest.fixture(scope="module")
def starts():
    with Starts() as process:
        yield process


def same_run(a, b, names=("step_00000005", "step_00000010", "step_00000012", "final")):
    assert rows(a) == rows(b)
    for name in names:
        assert [x for x in different(a / name, b / name) if "run.json" not in x] == [], name


def readable(output):
    """Every folder that is called a checkpoint can be loaded."""
    for folder in Path(output).glob("step_*"):
        state = checkpoints.read_state(folder)
        assert state and not checkpoints.find_damage(folder, state) and draft_files.check_draft(folder) == [], folder
    for name in ("latest", "best"):
        if (output / name).is_symlink():
            assert (output / name / "config.json").exists(), name


def progress(output):
    """What of checkpoints is there, whole or being written."""
    return {path.name for pattern in (".step_*", "step_*") for path in Path(output).glob(pattern)}


def newest_step(output):
    return max((int(path.name[5:]) for path in Path(output).glob("step_*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills"), [(2, 20), (1, 2), (3, 2)])
def test_killed_again_and_again_and_resumed_is_the_undisturbed_run(work, starts, tmp_path, stage, kills):
    """kill -9 of both ranks at random moments, most of them while a checkpoint is written, as one is due every step."""
    random.seed(stage)
    flags = "--deepspeed_config", tiny.REPOSITORY / "ds_configs" / f"zero{stage}.json", "--save_steps", 1
    flags = *flags, "--total_steps", 120, "--save_total_limit", 4, "--num_workers", 1
    argv = [arguments(work, tmp_path / name, *flags, "--resume") for name in ("whole", "killed")]
    starts.run(argv[0], 2, tmp_path / "log")
    out, done, moments = tmp_path / "killed", 0, set()
    while done < kills:
        starts.start(argv[1], 2, tmp_path / "log")
        before, newest, end = progress(out), newest_step(out), time.monotonic() + 60
        late = random.random() < 0.8  # in training, or else at any moment of the start
        while late and progress(out) == before:
            assert time.monotonic() < end and not (out / "final").exists()
            time.sleep(0.005)
        end = time.monotonic() + random.uniform(0, 1.5 if late else 4)
        while time.monotonic() < end and newest_step(out) < newest + 3:  # on a fast machine, too, 20 kills fit in
            time.sleep(0.002)
        assert not (out / "final").exists(), "it was over before it was killed often enough: give it more steps"
        moments.add(max((path.name for path in out.glob("step_*")), default=""))
        starts.kill()
        assert starts.wait() == [-9, -9]
        readable(out)
        done += 1
    starts.run(argv[1], 2, tmp_path / "log")
    assert len(moments) > kills // 2, "the kills came at few different steps"
    same_run(out, tmp_path / "whole", [f"step_{step:08d}" for step in (117, 118, 119, 120)] + ["final"])


def stage(number):
    return "--deepspeed_config", tiny.REPOSITORY / "ds_configs" / f"zero{number}.json"


@pytest.mark.slow
def test_every_rank_ends_with_0_when_one_is_asked_to_stop(work, starts, tmp_path):
    """The other one was not asked. Workers that read ahead get the signal, too, as a launcher sends it to all."""
    whole, out, flags = tmp_path / "whole", tmp_path / "out", ("--save_steps", 1, "--num_workers", 1)
    starts.run(arguments(work, whole, *flags), 2, tmp_path / "log")
    for number, signal_ in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
        pids = starts.start(arguments(work, out, *flags, "--resume"), 2, tmp_path / "log")
        wait_until(lambda many=3 * number + 2: len(list(out.glob("step_*"))) >= many)
        os.killpg(pids[1], signal_)
        asked = max(int(path.name[5:]) for path in out.glob("step_*"))
        assert starts.wait() == [0, 0]
        (line,) = [x for x in (tmp_path / "log").read_text().splitlines() if x.startswith("stopped")][number:]
        stopped = int(line.split("behind step ")[1].split()[0])
        assert asked <= stopped <= asked + 2, "the step under way, behind the checkpoint that may be under way"
        assert (out / "latest").resolve().name == f"step_{stopped:08d}"
        readable(out)
    starts.run(arguments(work, out, *flags, "--resume"), 2, tmp_path / "log")
    same_run(out, whole)


def wait_until(fits, seconds=120):
    end = time.monotonic() + seconds
    while not fits():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(2, 2, 1), (3, 3, 3)], ids=["ZeRO 2, 2, 1", "ZeRO 3"])
def test_other_numbers_of_ranks_go_on_as_if_nothing_were(work, starts, tmp_path, stages):
    """2 ranks, then 1, then 4: the next losses and the order of sequences are those of the run that stayed."""
    flags = "--save_steps", 99, "--log_steps", 1, "--total_steps", 22
    starts.run(arguments(work, tmp_path / "whole", *flags, *stage(stages[0])), 2, tmp_path / "log")
    out = tmp_path / "out"
    for world, zero, until in zip((2, 1, 4), stages, (6, 12, 22), strict=True):
        steps = "--scheduler_total_steps", 22, "--scheduler_warmup_steps", 1, "--total_steps", until
        starts.run(arguments(work, out, *flags, *stage(zero), *steps, "--resume"), world, tmp_path / "log")
        assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    expected, found = ([row for row in rows(run) if row["split"] == "train"] for run in (tmp_path / "whole", out))
    assert [row["step"] for row in found] == list(range(1, 23))
    for a, b in zip(found, expected, strict=True):
        for name in a.keys() - {"split", "acc_0", "acc_1", "acc_2", "accept_0", "accept_1", "accept_2"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6 if name.startswith("loss") else 1e-4), (a["step"], name)
    whole, other = (load_file(run / "final" / "model.safetensors") for run in (tmp_path / "whole", out))
    assert all(torch.allclose(other[name], whole[name], rtol=1e-4, atol=1e-6) for name in whole)


@pytest.mark.slow
def test_accumulated_metrics_survive_another_number_of_ranks(work, starts, tmp_path):
    """Stopped between two lines of the log by two ranks, continued by one: the line covers all its steps."""
    flags = "--save_steps", 4, "--total_steps", 6, "--log_steps", 6, "--eval_steps", 0
    starts.run(arguments(work, tmp_path / "whole", *flags), 2, tmp_path / "log")
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out, symlinks=True)
    for name in ("step_00000006", "final"):
        shutil.rmtree(out / name)
    train(work, out, *flags, "--resume")
    (a,), (b,) = ([row for row in rows(run) if row["split"] == "train"] for run in (out, tmp_path / "whole"))
    assert a.pop("split") == b.pop("split") and a == pytest.approx(b, rel=1e-5) and a["step"] == 6
    spoil(out / "step_00000006")
    with pytest.raises(SystemExit):
        train(work, out, *flags, "--resume", *stage(3))


def spoil(folder):
    """A byte of its largest file is another one."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refused(capsys, work, output, *flags):
    """The one line with which the training ends before its first step."""
    return training.refused(capsys, train, work, output, *flags)


def test_what_cannot_be_continued_is_one_line(work, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(work / "whole", out, symlinks=True)
    assert "holds a run" in (line := refused(capsys, work, out)) and "--resume" in line
    assert "holds a run" in refused(capsys, work, out, "--resume", "--no_resume_from_checkpoint")
    for flag, value, before in (("seed", 1, 0), ("draft_global_batch_size", 8, 4), ("ttt_length", 2, 3)):
        line = refused(capsys, work, out, "--resume", f"--{flag}", value)
        assert f"{flag} {before}, not {value}" in line and "step_00000012" in line
    line = refused(capsys, work, out, "--resume", *stage(3))
    assert "ZeRO stage 2" in line and "deepspeed_config" in line and "stage 3" in line and "without --resume" in line
    line = refused(capsys, work, out, "--resume", *stage("2_offload"))
    assert "optimizer AdamW" in line and "DeepSpeedCPUAdam" in line
    (tmp_path / "bf16.json").write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    line = refused(capsys, work, out, "--resume", "--deepspeed_config", tmp_path / "bf16.json")
    assert "precision fp32" in line and "bf16" in line
    path = out / "step_00000012" / "trainer_state.json"
    before = path.read_text()
    path.write_text(before.replace('"optimizer": "AdamW"', '"optimizer": "AdamW on nvme"'))
    assert "states on nvme, of which DeepSpeed restores only a part" in refused(capsys, work, out, "--resume")
    path.write_text(before)
    tiny.write_jsonl(tmp_path / "other.jsonl", tiny.conversations(9, 1))
    prepare_data.prepare(
        tmp_path / "other.jsonl", tmp_path / "other", work / "target", chat_template="llama3", num_proc=1
    )
    assert "another data than" in refused(capsys, work, out, "--resume", "--data_path", tmp_path / "other")
    tiny.write_target(tmp_path / "target", seed=1)
    line = refused(capsys, work, out, "--resume", "--target_model_path", tmp_path / "target")
    assert f"another target than {tmp_path / 'target'}" in line
    state = json.loads((out / "step_00000012" / "trainer_state.json").read_text())
    assert state["step"] == 12 and rows(out) == rows(work / "whole"), "nothing was touched"


def test_the_newest_whole_checkpoint_is_found_whatever_lies_around(work, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(work / "whole", out, symlinks=True)
    spoil(out / "step_00000012")  # on the disk, later
    (out / "latest").unlink()
    (out / "latest").symlink_to("step_00000005")  # a process was killed before it made the next one
    (out / "step_00000099").mkdir()  # somebody's
    shutil.copytree(out / "step_00000010", out / ".step_00000011.building")  # or while it wrote this
    (out / "step_00000099" / "notes.txt").write_text("mine")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 13, "lo')  # so was this one
    train(work, out, "--resume")
    said = capsys.readouterr()
    assert (
        "step_00000099 is not a complete checkpoint, it is passed over: trainer_state.json cannot be read" in said.err
    )
    assert "step_00000012 is not a complete checkpoint" in said.err and "is not as it was written" in said.err
    assert "step_00000010" in said.out and not list(out.glob(".*.building"))
    assert (out / "step_00000099" / "notes.txt").read_text() == "mine"
    assert (out / "latest").resolve().name == "step_00000012" and (out / "damaged_0_step_00000012").exists()
    same_run(out, work / "whole")
    assert rows(out) == rows(work / "whole")


def test_resume_elsewhere_and_resume_without_anything(work, tmp_path, capsys):
    """resume_from_checkpoint is where to go on if output_dir has nothing; with neither, the training starts anew."""
    shutil.copytree(work / "whole", tmp_path / "a", ignore=shutil.ignore_patterns("step_00000012", "final", "latest"))
    train(work, tmp_path / "b", "--resume", "--resume_from_checkpoint", tmp_path / "a" / "step_00000010")
    assert rows(tmp_path / "b") == rows(work / "whole"), "those up to the checkpoint come along"
    before, now = (json.loads((folder / "run.json").read_text()) for folder in (work / "whole", tmp_path / "b"))
    assert now["run_id"] == before["run_id"] and before.pop("earlier_starts") == []
    assert now["earlier_starts"] == [before]
    assert [x for x in different(tmp_path / "b" / "final", work / "whole" / "final") if "run.json" not in x] == []
    train(work, tmp_path / "c", "--resume")
    assert "has no complete checkpoint, the training starts from the beginning" in capsys.readouterr().err
    assert rows(tmp_path / "c") == rows(work / "whole")
    train(work, tmp_path / "c", "--resume")  # it is finished: nothing happens to it
    same_run(tmp_path / "c", work / "whole")
    settings = json.loads((tmp_path / "c" / "run.json").read_text())
    assert settings["starts_behind_step"] == 12 and len(settings["earlier_starts"]) == 1
    assert settings["run_id"] == settings["earlier_starts"][0]["run_id"]


def test_a_run_in_a_new_folder_goes_on_there(work, tmp_path):
    """Its own record counts from then on; that of another run, which left no checkpoint, does not. It has a name of its
    own, as the run went on where it was.
    """
    x, at = tmp_path / "x", ("--resume", "--resume_from_checkpoint", work / "whole" / "step_00000005")
    x.mkdir()
    (x / "run.json").write_text('{"run_id": "of another"}')
    (x / "metrics.jsonl").write_text('{"split": "train", "step": 1, "loss": 99.0}\n')
    for total in (7, 12):
        train(work, x, *at, "--total_steps", total, "--scheduler_total_steps", 12)
    settings = json.loads((x / "run.json").read_text())
    names = [start["run_id"] for start in (*settings["earlier_starts"], settings)]
    assert names[0] == json.loads((work / "whole" / "run.json").read_text())["run_id"]
    assert names[1] == names[2] and names[1] not in (names[0], "of another") and rows(x)[-1]["step"] == 12
    assert [start["starts_behind_step"] for start in settings["earlier_starts"]] == [0, 5]
    last = [row for row in rows(work / "whole") if row["step"] <= 5]
    assert rows(x)[: len(last)] == last and [row["step"] for row in rows(x)] == sorted(row["step"] for row in rows(x))


def test_continuing_a_dry_run_equals_starting_without(work, tmp_path):
    out = tmp_path / "out"
    train(work, out, "--dry_run")
    assert draft_files.check_draft(out / "step_00000000") == [] and not (out / "metrics.jsonl").exists()
    train(work, out, "--resume")
    same_run(out, work / "whole")


def test_a_longer_training_goes_on_where_the_shorter_one_ended(work, tmp_path, capsys):
    """Its final folder is replaced; flags that differ are named."""
    out = tmp_path / "out"
    shutil.copytree(work / "whole", out, symlinks=True)
    before = load_file(out / "final" / "model.safetensors")
    train(work, out, "--resume", "--total_steps", 14, "--learning_rate", 0.001)
    said = capsys.readouterr().out
    assert "learning_rate 0.003 -> 0.001" in said and "total_steps 12 -> 14" in said
    assert [row["step"] for row in rows(out)][-2:] == [14, 14]
    after = load_file(out / "final" / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_limit_keeps_the_newest_the_best_and_what_is_not_ours(work, tmp_path, monkeypatch):
    """acceptance_length is best at step 4; loss at its least in the end."""
    out, values = tmp_path / "out", iter([1.5, 2.5, 2.0, 1.0, 2.25, 1.75])
    evaluate = train_eagle3.evaluate
    monkeypatch.setattr(train_eagle3, "evaluate", lambda *args: {**evaluate(*args), "acceptance_length": next(values)})
    flags = "--eval_steps", 2, "--save_steps", 3, "--save_total_limit", 2, "--save_best"
    at_step(monkeypatch, 8, lambda: (out / "step_00000006" / "notes.txt").write_text("mine"))
    train(work, out, *flags)
    names = sorted(path.name for path in out.glob("step_*"))
    # saved: 2 (best), 3, 4 (best), 6, 9, 12
    assert names == ["step_00000004", "step_00000006", "step_00000009", "step_00000012"]
    assert (out / "best").resolve().name == "step_00000004" and (out / "latest").resolve().name == "step_00000012"
    assert (out / "step_00000006" / "notes.txt").read_text() == "mine"
    state = checkpoints.read_state(out / "step_00000012")
    assert state["best"] == [2.5, 4, "acceptance_length"]
    readable(out)


def test_best_by_loss_needs_a_checkpoint_that_is_due_unless_save_best_is_given(work, tmp_path):
    train(work, tmp_path / "out", "--best_metric", "loss", "--save_steps", 6)
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "out") if row["split"] == "validation"}
    saved = {step: losses[step] for step in (6, 12)}
    assert (tmp_path / "out" / "best").resolve().name == f"step_{min(saved, key=saved.get):08d}"


def test_checkpoints_by_the_clock(work, tmp_path, monkeypatch):
    """Every `save_minutes`, counted from the last checkpoint of any kind."""
    now = [0.0]
    monkeypatch.setattr(train_eagle3.time, "monotonic", lambda: now[0])
    original = train_eagle3.optimizer_step

    def slowly(*args):
        now[0] += 61
        return original(*args)

    monkeypatch.setattr(train_eagle3, "optimizer_step", slowly)
    train(work, tmp_path / "out", "--save_steps", 0, "--save_minutes", 3)
    assert sorted(path.name[-2:] for path in (tmp_path / "out").glob("step_*")) == ["03", "06", "09", "12"]


def poisoned(monkeypatch, steps, row=None):
    """The loss of these optimizer steps is not a number, of a micro-batch with this row only or of all."""
    original, count = train_eagle3.run_objective, []

    def run_objective(draft, target, batches, d2t, args):
        count.append(1) if draft.training else None
        for batch, (loss, sums, correct) in zip(batches, original(draft, target, batches, d2t, args), strict=True):
            bad = draft.training and len(count) in steps and (row is None or row in batch["rows"])
            yield loss * float("nan") if bad else loss, sums, correct

    monkeypatch.setattr(train_eagle3, "run_objective", run_objective)


@pytest.mark.parametrize(
    "number", [2, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 3, "2_offload", "2_offload bf16"))]
)
def test_step_that_is_not_finite_is_left_out(work, tmp_path, monkeypatch, capsys, number):
    """Weights and optimizer do not move, the metrics leave the step out; the rest goes on."""
    poisoned(monkeypatch, range(1, 7), row=3)  # it comes once in the first epoch
    original, moved = train_eagle3.optimizer_step, []

    def watched(engine, *args):
        before = [x.clone() for x in engine.module.state_dict().values()]
        result = original(engine, *args)
        after = engine.module.state_dict().values()
        moved.append(not all(torch.equal(x, y) for x, y in zip(before, after, strict=True)))
        return result

    monkeypatch.setattr(train_eagle3, "optimizer_step", watched)
    if "bf16" in str(number):
        config = json.loads((tiny.REPOSITORY / "ds_configs" / f"zero{number[:9]}.json").read_text())
        (tmp_path / "zero.json").write_text(json.dumps(config | {"bf16": {"enabled": True}}))
        flags = "--deepspeed_config", tmp_path / "zero.json"
    else:
        flags = stage(number)
    train(work, tmp_path / "out", *flags, "--log_steps", 1)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "is left out" in line]
    assert "it is not finite: the loss of rank 0 in rows [[3]]" in line
    step = int(line.split()[1])
    assert [number for number, moves in enumerate(moved, 1) if not moves] == [step]
    found = [row for row in rows(tmp_path / "out") if row["split"] == "train"]
    assert all(value == value for row in found for value in row.values())
    assert [row["step"] for row in found if row["grad_norm"] is None] == [step]
    assert [row["step"] for row in found] == list(range(1, 13)) and found[step - 1]["loss_0"] == 0
    tensors = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert all(x.isfinite().all() for x in tensors.values())


@pytest.mark.parametrize("save_steps", [1, 99])
def test_too_many_in_a_row_stop_with_the_last_good_state(work, tmp_path, monkeypatch, capsys, save_steps):
    out = tmp_path / "out"
    poisoned(monkeypatch, range(5, 99))
    line = refused(capsys, work, out, "--max_bad_steps", 3, "--save_steps", save_steps)
    assert "3 steps in a row are not finite" in line and "step_00000004" in line
    assert max(path.name for path in out.glob("step_*")) == "step_00000004"
    assert not multiprocessing.active_children(), "what reads ahead outlives signals, so it has to be ended"
    monkeypatch.undo()
    train(work, out, "--resume")
    assert rows(out) == rows(work / "whole")
    assert [x for x in different(out / "final", work / "whole" / "final") if "run.json" not in x] == []


@pytest.mark.slow
def test_in_bf16_masters_and_weights_are_as_they_were(work, tmp_path, monkeypatch):
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    (tmp_path / "bf16.json").write_text(json.dumps(config))
    flags = "--deepspeed_config", tmp_path / "bf16.json"
    train(work, tmp_path / "whole", *flags)
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(work, tmp_path / "out", *flags)
    monkeypatch.undo()
    train(work, tmp_path / "out", *flags, "--resume")
    same_run(tmp_path / "out", tmp_path / "whole")


def test_storage_without_symbolic_links(work, tmp_path, monkeypatch):
    """Files with the checkpoint's name instead; the limit and resuming work."""

    def refuse(*args, **options):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    out = tmp_path / "out"
    train(work, out, "--save_total_limit", 1, "--save_steps", 4, "--total_steps", 8, "--scheduler_total_steps", 12)
    assert (out / "latest").read_text() == "step_00000008"
    best = (out / "best").read_text()
    assert {path.name for path in out.glob("step_*")} == {"step_00000008", best}
    train(work, out, "--resume")
    assert (out / "latest").read_text() == "step_00000012"


def test_evaluation_that_a_server_interrupted_is_made_up_for(work, tmp_path, monkeypatch):
    """The checkpoint is of the step behind which it was due."""
    out, evaluate, count = tmp_path / "out", train_eagle3.evaluate, []

    def fails(*args):
        count.append(1)
        if len(count) == 2:
            raise server.ServerFailed("the server is gone")
        return evaluate(*args)

    monkeypatch.setattr(train_eagle3, "evaluate", fails)
    with pytest.raises(SystemExit):
        train(work, out)
    assert (out / "latest").resolve().name == "step_00000006"
    train(work, out, "--resume")
    assert rows(out) == rows(work / "whole")


def test_best_is_what_could_be_saved_and_of_one_metric(work, tmp_path, monkeypatch):
    out, values = tmp_path / "out", iter([1.5, 3.0, 2.0, 2.5, 1.0, 1.25, 1.0, 1.0])
    evaluate, write = train_eagle3.evaluate, checkpoints.write_checkpoint
    monkeypatch.setattr(train_eagle3, "evaluate", lambda *args: evaluate(*args) | {"acceptance_length": next(values)})
    monkeypatch.setattr(
        checkpoints,
        "write_checkpoint",
        lambda engine, d2t, folder, *rest: "no" if folder.name[-2:] == "04" else write(engine, d2t, folder, *rest),
    )
    flags = "--eval_steps", 2, "--save_steps", 2
    train(work, out, *flags)
    assert (out / "best").resolve().name == "step_00000008"
    assert checkpoints.read_state(out / "step_00000012")["best"] == [2.5, 8, "acceptance_length"]
    train(work, out, *flags, "--resume", "--total_steps", 14, "--best_metric", "loss")
    assert checkpoints.read_state(out / "step_00000014")["best"][1:] == [14, "loss"]


@pytest.fixture
def small_disk(tmp_path):
    with tiny.small_disk(tmp_path / "disk", 20 * 1024) as disk:
        yield disk


def test_full_disk_while_saving_costs_that_checkpoint_alone(work, tmp_path, small_disk, monkeypatch, capsys):
    """A real full file system from step 6 to step 11, then there is room again: metrics have no gap either."""
    disk, resize = small_disk
    out, original, count = disk / "out", train_eagle3.optimizer_step, []

    def used():
        return shutil.disk_usage(disk).used // 1024

    def fill(*args):
        count.append(1)
        if len(count) == 6:
            resize(used() + 400)  # less than a checkpoint takes
        if len(count) == 8:
            resize(used())  # nothing at all
        if len(count) == 11:
            resize(20 * 1024)
        return original(*args)

    monkeypatch.setattr(train_eagle3, "optimizer_step", fill)
    train(work, out, "--save_steps", 1, "--save_interval", 99)
    said = capsys.readouterr()
    assert sorted(path.name[-2:] for path in out.glob("step_*")) == ["01", "02", "03", "04", "05", "11", "12"]
    for step in range(6, 11):
        assert f"no checkpoint at step {step}, what was saved before stays" in said.err
    assert "No space left" in said.err
    assert not list(out.glob(".*")) and rows(out) == rows(work / "whole")
    readable(out)
    assert [x for x in different(out / "step_00000012", work / "whole" / "step_00000012") if "best" not in x] == []


def test_rows_of_the_metrics_wait_for_room(work, tmp_path, small_disk, capsys):
    disk, resize = small_disk
    resize(8)
    record = run_record.Record(SimpleNamespace(output_dir=disk, report_to=[], total_steps=9), {"starts_behind_step": 0})
    for step in range(100):
        record.row("train", step, 0.1 * step, {"loss": step / 7, "text": "x" * 100})
    assert "No space left on device; the rows are kept in memory" in capsys.readouterr().err
    assert "No space left" in record.keep()
    lines = (disk / "metrics.jsonl").read_text().splitlines()
    assert 10 < len(lines) < 60 and [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    resize(100)
    assert record.keep() == ""
    assert [row["step"] for row in rows(disk)] == list(range(100))
    record.close()


def test_folder_that_a_node_does_not_see_is_named(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks.os.path, "exists", lambda path: False)
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "node-b")
    with pytest.raises(SystemExit):
        ranks.check_shared("output_dir", tmp_path, patience=0.1)
    line = capsys.readouterr().err
    assert f"output_dir {tmp_path} is another folder on node-b" in line and not list(tmp_path.iterdir())


def test_folder_whose_files_appear_late_is_shared(tmp_path, monkeypatch):
    """As on mounted storage, where another node sees a file once it is closed, or when its cache runs out."""
    seen, exists = [], os.path.exists

    def late(path):
        seen.append(path)
        handles = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        closed = path not in [os.readlink(handle) for handle in handles if exists(handle)]
        return len(seen) > 3 and closed and exists(path)

    monkeypatch.setattr(ranks.os.path, "exists", late)
    ranks.check_shared("output_dir", tmp_path)
    assert len(seen) == 4 and not list(tmp_path.iterdir())
