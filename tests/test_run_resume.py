"""Runs that are stopped, killed or moved and then continued are the undisturbed run, on other numbers of ranks, too."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prepare_data
from core import common, draft_files
from helpers import tiny
from helpers.resuming import (
    arguments,
    at_step,
    different,
    readable,
    refused,
    same_run,
    spoil,
    stage,
    train,
    write_work,
)
from helpers.starts import Starts
from helpers.training import timeless as rows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, prepared data, and a run that nothing disturbed."""
    return write_work(tmp_path_factory.mktemp("work"))


def test_stopped_by_a_signal_and_resumed_is_the_undisturbed_run(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(work, out)
    assert oct((out / "latest" / "model.safetensors").stat().st_mode)[-3:] == "644", "others may serve it"
    assert "stopped after step 7 by SIGTERM: --resume continues" in capsys.readouterr().out
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


def progress(output):
    """What of checkpoints is there, whole or being written."""
    return {path.name for pattern in (".step_*", "step_*") for path in Path(output).glob(pattern)}


def newest_step(output):
    return max((int(path.name[5:]) for path in Path(output).glob("step_*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills", "steps"), [(2, 20, 120), (1, 2, 30), (3, 2, 30)])
def test_killed_again_and_again_and_resumed_is_the_undisturbed_run(work, starts, tmp_path, stage, kills, steps):
    """kill -9 of both ranks at random moments, most of them while a checkpoint is written, as one is due every step.

    It is written while the next step is trained.
    """
    random.seed(stage)
    flags = "--deepspeed_config", tiny.REPOSITORY / "ds_configs" / f"zero{stage}.json", "--save_steps", 1
    flags = *flags, "--total_steps", steps, "--save_total_limit", 4, "--num_workers", 1
    argv = [arguments(work, tmp_path / name, *flags, "--resume") for name in ("whole", "killed")]
    starts.run(argv[0], 2, tmp_path / "log")
    out, done, moments = tmp_path / "killed", 0, set()
    while done < kills:
        starts.start(argv[1], 2, tmp_path / "log")
        before, newest, end = progress(out), newest_step(out), time.monotonic() + 60
        late = kills < 5 or random.random() < 0.8  # in training, or else at any moment of the start
        further = kills < 5 or random.random() < 0.8  # behind a further checkpoint, or else while the first is written
        while late and (newest_step(out) == newest if further else progress(out) == before):
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
    same_run(out, tmp_path / "whole", [f"step_{step:08d}" for step in range(steps - 3, steps + 1)] + ["final"])


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
        stopped = int(line.split("after step ")[1].split()[0])
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


def test_what_cannot_be_continued_is_one_line(work, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(work / "whole", out, symlinks=True)
    assert "holds a run" in (line := refused(capsys, work, out)) and "--resume" in line
    for flag, value, before in (("seed", 1, 0), ("draft_global_batch_size", 8, 4), ("ttt_length", 2, 3)):
        line = refused(capsys, work, out, "--resume", f"--{flag}", value)
        assert f"{flag} {before}, not {value}" in line and "step_00000012" in line
    line = refused(capsys, work, out, "--resume", *stage(3))
    assert "ZeRO stage 2" in line and "deepspeed_config" in line and "stage 3" in line and "without --resume" in line
    line = refused(capsys, work, out, "--resume", *stage("2_offload"))
    assert "optimizer AdamW" in line and "DeepSpeedCPUAdam" in line
    line = refused(capsys, work, out, "--resume", "--precision", "bf16")
    assert "precision fp32" in line and "bf16" in line
    path = out / "step_00000012" / "trainer_state.json"
    state = common.read_sealed(path)
    engine = state["flags"]["engine"] | {"optimizer": "AdamW on nvme"}
    common.write_sealed(path, state | {"flags": state["flags"] | {"engine": engine}})
    assert "states on nvme, of which DeepSpeed restores only a part" in refused(capsys, work, out, "--resume")
    common.write_sealed(path, state)
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


def test_damaged_records_never_stop_a_training(work, tmp_path, capsys):
    """What can be read of them is kept; the checkpoints are what counts."""
    out = tmp_path / "out"
    shutil.copytree(work / "whole", out, symlinks=True, ignore=shutil.ignore_patterns("step_00000012", "final"))
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\xff\x00 garbage\n", *lines[3:]]))
    (out / "run.json").write_text('{"run_id": "abc", "ear')
    train(work, out, "--resume")
    said = capsys.readouterr().err
    assert "metrics.jsonl is damaged (line 3: " in said and f"{out / 'damaged_0_metrics.jsonl'}" in said
    assert f"{out / 'run.json'} cannot be read: earlier starts are not in the new one" in said
    assert rows(out) == [row for number, row in enumerate(rows(work / "whole")) if number != 2]
    assert [x for x in different(out / "final", work / "whole" / "final") if "run.json" not in x] == []


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


@pytest.mark.slow
def test_in_bf16_masters_and_weights_are_as_they_were(work, tmp_path, monkeypatch):
    flags = "--precision", "bf16"
    train(work, tmp_path / "whole", *flags)
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(work, tmp_path / "out", *flags)
    monkeypatch.undo()
    train(work, tmp_path / "out", *flags, "--resume")
    same_run(tmp_path / "out", tmp_path / "whole")
