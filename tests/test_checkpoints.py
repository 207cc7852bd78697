"""Checkpoints: complete or not there, which ones are kept, and what a run survives."""

import json
import multiprocessing
import shlex
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_eagle3
from core import checkpoints, optimization, run_record, server
from helpers import tiny
from helpers.resuming import (
    at_step,
    different,
    readable,
    refused,
    spoil,
    train,
    write_work,
)
from helpers.training import timeless as rows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, prepared data, and a run that nothing disturbed."""
    return write_work(tmp_path_factory.mktemp("work"))


def test_limit_keeps_the_newest_the_best_and_what_is_not_ours(work, tmp_path, monkeypatch, capsys):
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
    assert state["best"][:3] == [2.5, 4, "acceptance_length"]
    readable(out)
    end = capsys.readouterr().out.split(f": {out / 'final'}\n")[1].splitlines()  # behind "finished 12 steps"
    assert end[0] == (
        f"serve {out / 'best'}: the best checkpoint by acceptance_length, 2.500 at step 4, against 1.750 at the last, "
        "12"
    )
    export = ["python", "export_draft.py", str(out / "best"), "--format", "flat", "--output", str(out / "served")]
    assert shlex.split(end[1]) == export
    assert [line.split()[:3] for line in end[2:]] == [
        ["vllm", "serve", str(work / "target")],
        ["python", "-m", "sglang.launch_server"],
    ]
    assert all(str(out / "served") in line for line in end[2:])


def test_best_by_loss_needs_a_checkpoint_that_is_due_unless_save_best_is_given(work, tmp_path):
    train(work, tmp_path / "out", "--best_metric", "loss", "--save_steps", 6)
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "out") if row["split"] == "validation"}
    saved = {step: losses[step] for step in (6, 12)}
    assert (tmp_path / "out" / "best").resolve().name == f"step_{min(saved, key=saved.get):08d}"


def test_checkpoints_by_the_clock(work, tmp_path, monkeypatch):
    """Every `save_minutes`, counted from the last checkpoint of any kind."""
    now = [0.0]
    monkeypatch.setattr(train_eagle3.time, "monotonic", lambda: now[0])
    original = optimization.optimizer_step

    def slowly(*args):
        now[0] += 61
        return original(*args)

    monkeypatch.setattr(optimization, "optimizer_step", slowly)
    train(work, tmp_path / "out", "--save_steps", 0, "--save_minutes", 3)
    assert sorted(path.name[-2:] for path in (tmp_path / "out").glob("step_*")) == ["03", "06", "09", "12"]


@pytest.mark.parametrize("rank", [0, 1])
def test_problem_of_one_rank_is_told_to_all(rank, tmp_path, monkeypatch):
    """A disk that is full on rank 0 alone: rank 1 waits for its word, so every rank takes part in every exchange."""
    told = []
    monkeypatch.setattr(checkpoints.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(checkpoints.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoints.ranks, "on_first_rank", lambda act: act())
    monkeypatch.setattr(checkpoints.ranks, "gather", lambda value: [value])
    monkeypatch.setattr(checkpoints, "first_problem", lambda problem: told.append(problem) or problem)
    saving = checkpoints.Saving.__new__(checkpoints.Saving)
    saving.is_there, saving.thread, saving.measured, saving.problem = False, threading.Thread(), {}, ""
    saving.folder, saving.state = tmp_path / "step_00000001", {}
    saving.building = tmp_path / ".step_00000001.building"
    saving.building.mkdir()  # without deepspeed/, which rank 0 flushes
    problem = saving.publish()
    assert told == ["", problem] and ("cannot be written" in problem) == (rank == 0)


def poisoned(monkeypatch, steps, row=None):
    """The loss of these optimizer steps is not a number, of a micro-batch with this row only or of all."""
    original = train_eagle3.run_draft
    step = optimization.optimizer_step
    count = []

    def optimizer_step(*args):
        count.append(1)
        return step(*args)

    def run_draft(draft, batch, *args):
        loss, sums, accepted = original(draft, batch, *args)
        if draft.training and len(count) in steps and (row is None or row in batch.rows):
            loss = loss * float("nan")
        return loss, sums, accepted

    monkeypatch.setattr(optimization, "optimizer_step", optimizer_step)
    monkeypatch.setattr(train_eagle3, "run_draft", run_draft)


LEFT_OUT = (1, 3, "2_offload", "2_offload bf16", "1 muon", "3 muon", "2_offload muon", "2 muon bf16")


@pytest.mark.parametrize("number", [2, "2 muon", *(pytest.param(x, marks=pytest.mark.slow) for x in LEFT_OUT)])
def test_step_that_is_not_finite_is_left_out(work, tmp_path, monkeypatch, capsys, number):
    """Weights and optimizer do not move, the metrics leave the step out; the rest goes on."""
    poisoned(monkeypatch, range(1, 7), row=3)  # it comes once in the first epoch
    original, moved = optimization.optimizer_step, []

    def watched(engine, *args):
        before = [x.clone() for x in engine.module.state_dict().values()]
        result = original(engine, *args)
        after = engine.module.state_dict().values()
        moved.append(not all(torch.equal(x, y) for x, y in zip(before, after, strict=True)))
        return result

    monkeypatch.setattr(optimization, "optimizer_step", watched)
    name, *changes = str(number).split()
    config = json.loads((tiny.REPOSITORY / "ds_configs" / f"zero{name}.json").read_text())
    (tmp_path / "zero.json").write_text(json.dumps(config | {"bf16": {"enabled": "bf16" in changes}}))
    flags = ["--deepspeed_config", tmp_path / "zero.json"]
    flags += ["--optimizer", "muon"] if "muon" in changes else []
    train(work, tmp_path / "out", *flags, "--log_steps", 1)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "is left out" in line]
    assert "it is not finite: the loss of rank 0 in rows [[3]]" in line
    step = int(line.split()[1])
    assert [number for number, moves in enumerate(moved, 1) if not moves] == [step]
    found = [row for row in rows(tmp_path / "out") if row["split"] == "train"]
    assert all(value == value for row in found for value in row.values())
    without_norm = range(1, 13) if "muon" in changes else [step]
    assert [row["step"] for row in found if row["grad_norm"] is None] == list(without_norm)
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


def test_the_limit_does_not_count_a_damaged_checkpoint_of_a_later_step(work, tmp_path):
    """It was passed over: what is saved behind an earlier one stays, though its number is lower."""
    out = tmp_path / "out"
    train(work, out, "--save_steps", 4, "--total_steps", 8, "--scheduler_total_steps", 12)
    spoil(out / "step_00000008")
    flags = ("--save_total_limit", 1, "--save_steps", 1, "--total_steps", 7, "--scheduler_total_steps", 12)
    train(work, out, *flags, "--resume")
    assert {path.name for path in out.glob("step_*")} >= {"step_00000007", "step_00000008"}
    assert (out / "latest").resolve().name == "step_00000007" and (out / "latest").exists()
    assert not (out / "step_00000006").exists()


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError(), SystemExit(2)])
def test_whatever_ends_the_writing_costs_a_checkpoint_and_not_the_training(work, tmp_path, monkeypatch, capfd, error):
    write = checkpoints.write_tensors
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 1:
            raise error
        write(*args)

    monkeypatch.setattr(checkpoints, "write_tensors", fails)
    train(work, tmp_path / "out", "--save_steps", 3, "--total_steps", 6, "--scheduler_total_steps", 12)
    assert [path.name for path in (tmp_path / "out").glob("step_*")] == ["step_00000006"]
    assert "no checkpoint at step 3, what was saved before stays: " in capfd.readouterr().err


def test_resuming_without_a_complete_checkpoint_moves_the_earlier_run_aside(work, tmp_path):
    out = tmp_path / "out"
    train(work, out, "--total_steps", 4, "--scheduler_total_steps", 12)
    before = (out / "metrics.jsonl").read_text()
    for folder in out.glob("step_*"):
        spoil(folder)
    train(work, out, "--total_steps", 4, "--scheduler_total_steps", 12, "--resume")
    (aside,) = out.glob("earlier_*")
    assert (aside / "metrics.jsonl").read_text() == before and (aside / "final").exists()


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
    evaluate, publish = train_eagle3.evaluate, checkpoints.Saving.publish
    monkeypatch.setattr(train_eagle3, "evaluate", lambda *args: evaluate(*args) | {"acceptance_length": next(values)})
    monkeypatch.setattr(
        checkpoints.Saving, "publish", lambda saving: publish(saving) if saving.folder.name[-2:] != "04" else "no"
    )
    flags = "--eval_steps", 2, "--save_steps", 2
    train(work, out, *flags)
    assert (out / "best").resolve().name == "step_00000008"
    assert checkpoints.read_state(out / "step_00000012")["best"][:3] == [2.5, 8, "acceptance_length"]
    train(work, out, *flags, "--resume", "--total_steps", 14, "--best_metric", "loss")
    assert checkpoints.read_state(out / "step_00000014")["best"][1:3] == [14, "loss"]


def cases(name):
    """Rows of a file of tests/cases/."""
    lines = (Path(__file__).parent / "cases" / name).read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(("metric", "evaluations", "expected"), cases("best.txt"))
def test_the_best_evaluation(metric, evaluations, expected):
    best = None
    for step, evaluation in enumerate(evaluations.split(), 1):
        acceptance_length, loss = map(float, evaluation.split("/"))
        values = {"acceptance_length": acceptance_length, "loss": loss}
        best = checkpoints.better(values, best, step, metric) or best
    assert str(best[1] if best else "none") == expected


def test_a_best_one_of_an_older_version_has_no_loss():
    values = {"acceptance_length": 2.0, "loss": 3.0}
    assert checkpoints.better(values, [2.5, 4, "acceptance_length"], 8, "acceptance_length") is None
    assert checkpoints.better(values, [2.0, 4, "acceptance_length"], 8, "acceptance_length")[1] == 8
    assert checkpoints.better(values, [2.0, 4, "loss"], 8, "loss") is None


@pytest.fixture
def small_disk(tmp_path):
    with tiny.small_disk(tmp_path / "disk", 20 * 1024) as disk:
        yield disk


def test_full_disk_while_saving_costs_that_checkpoint_alone(work, tmp_path, small_disk, monkeypatch, capsys):
    """A real full file system from step 6 to step 11, then there is room again: metrics have no gap either."""
    disk, resize = small_disk
    out, original, count = disk / "out", optimization.optimizer_step, []

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

    begin = checkpoints.Saver.begin

    def begin_and_write(saver, progress):  # before the disk changes
        begin(saver, progress)
        if saver.is_writing():
            saver.saving.thread.join()

    monkeypatch.setattr(checkpoints.Saver, "begin", begin_and_write)
    monkeypatch.setattr(optimization, "optimizer_step", fill)
    train(work, out, "--save_steps", 1, "--save_interval", 99)
    said = capsys.readouterr()
    assert sorted(path.name[-2:] for path in out.glob("step_*")) == ["01", "02", "03", "04", "05", "11", "12"]
    for step in range(6, 11):
        assert f"no checkpoint at step {step}, what was saved before stays" in said.err
    assert "cannot be written, 0.000 GB are free: " in said.err
    assert not list(out.glob(".*")) and rows(out) == rows(work / "whole")
    readable(out)
    assert [x for x in different(out / "step_00000012", work / "whole" / "step_00000012") if "best" not in x] == []


def test_rows_of_the_metrics_wait_for_room(work, tmp_path, small_disk, capsys):
    disk, resize = small_disk
    resize(8)
    record = run_record.Record(SimpleNamespace(output_dir=disk, report_to=[]), {"starts_behind_step": 0}, 9)
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


def test_a_conversion_of_shards_that_does_not_end_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "CONVERSION", 0.01)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    shards = tmp_path / "deepspeed"
    error = tiny.fails(capsys, checkpoints.convert_shards, shards, tmp_path / "universal" / "deepspeed")
    assert f"{shards} cannot be converted for 2 ranks: DeepSpeed's ds_to_universal has not ended" in error
