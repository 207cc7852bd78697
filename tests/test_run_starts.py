"""Starts as people make them: launchers, drafts named by folders of earlier runs, outputs, two starts in one folder."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import export_draft
import prepare_data
import train_eagle3
from core import checkpoints, claims, common, ranks, target_model
from helpers import tiny, training
from helpers.commands import SCRIPTS
from helpers.resuming import spoil

TABLES = Path(__file__).parent / "starts"
COMMANDS = {script.__name__: script for script in SCRIPTS}


def table(name):
    """The rows of a table, each a list of cells."""
    lines = (TABLES / name).read_text().splitlines()
    return [[cell.strip() for cell in line.split(" | ")] for line in lines if line and not line.startswith("#")]


# ==================== Launchers ======================================================================================


@pytest.fixture(scope="module")
def taken():
    """A port at which another program listens."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(("variables", "expected"), table("variables.txt"))
def test_variables_of_a_launcher(variables, expected, taken, tmp_path, monkeypatch, capsys):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_")) or name in tiny.LAUNCHERS_OWN:
            monkeypatch.delenv(name)
    for variable in variables.format(taken=taken).split():
        monkeypatch.setenv(*variable.split("=", 1))
    if expected in ("alone", "joins"):
        ranks.check_variables()
        assert ("RANK" in os.environ) == (expected == "joins")
        return
    if "MASTER_PORT={taken}" in variables:  # in a process that is in no group yet
        monkeypatch.setattr("deepspeed.init_distributed", join)
    argv = ["--target_model_path", "M", "--data_path", "D", "--output_dir", str(tmp_path / "out")]
    args = train_eagle3.parse_args(argv)
    line = training.refused(capsys, train_eagle3.main, args)
    assert line.startswith(expected.format(taken=taken))
    assert not (tmp_path / "out").exists()


def join(*args, **options):
    """What torch does first, with what it raises."""
    torch.distributed.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 1, is_master=True)


# ==================== Drafts =========================================================================================


@pytest.fixture(scope="module")
def runs(work, tmp_path_factory):
    """The folders of drafts.txt."""
    folder = tmp_path_factory.mktemp("runs")
    flags = "--total_steps", 2, "--save_steps", 1, "--eval_steps", 99, "--eval_interval", 99, "--learning_rate", 0.01
    training.run(work, folder / "run", *flags)
    training.run(work, folder / "dry", "--dry_run")
    checkpoints.link_newest(folder / "run" / "step_00000002", [0, 1, "loss"])
    for name in ("stopped", "damaged", "files"):
        shutil.copytree(folder / "run", folder / name, symlinks=True)
    shutil.copytree(folder / "run", folder / "copied")
    shutil.rmtree(folder / "stopped" / "final")
    shutil.rmtree(folder / "damaged" / "final")
    spoil(folder / "damaged" / "step_00000002")
    for name in ("latest", "best"):
        target = (folder / "files" / name).readlink()
        (folder / "files" / name).unlink()
        (folder / "files" / name).write_text(str(target))
    (folder / "link_to_run").symlink_to("run")
    (folder / "empty").mkdir()
    (folder / "files" / "nameless").write_text("\n")
    return folder


@pytest.mark.parametrize(("path", "draft", "step"), table("drafts.txt"))
def test_draft_that_a_path_means(path, draft, step, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    if draft.startswith("refused: "):
        args = export_draft.parse_args([path, "--format", "flat", "--output", "nowhere"])
        assert draft.removeprefix("refused: ") in training.refused(capsys, export_draft.main, args)
    else:
        found = checkpoints.find_draft(path)
        assert training.furthest(training.weights(found), training.weights(draft)) == 0
        assert Path(found).resolve() == Path(draft).resolve()
        with pytest.raises(SystemExit) as stop:
            export_draft.main(export_draft.parse_args(["--check", path]))
        assert stop.value.code == 0
    engine = {"precision": "fp32", "optimizer": "AdamW", "zero_stage": 2}
    args = SimpleNamespace(
        resume=True, no_resume_from_checkpoint=False, resume_from_checkpoint=path, output_dir="nothing"
    )
    if step == "refused":
        training.refused(capsys, checkpoints.find_start, args, engine, ())
        return
    folder, state = checkpoints.find_start(args, engine, ())
    assert str(state["step"] if state else "none") == step and not Path("nothing").exists()
    if state:
        assert checkpoints.read_state(folder) == state


def test_every_command_takes_the_folder_of_a_run(work, runs, tmp_path, capsys):
    train = work, tmp_path / "out", "--total_steps", 1, "--learning_rate", 0
    training.run(*train, "--resume_from_checkpoint", runs / "run")
    a, b = (training.weights(folder / "final") for folder in (tmp_path / "out", runs / "run"))
    assert training.furthest(a, b) == 0
    training.run(work, tmp_path / "resumed", "--total_steps", 3, "--resume", "--resume_from_checkpoint", runs / "run")
    assert [row["step"] for row in training.timeless(tmp_path / "resumed") if row["split"] == "train"] == [1, 2, 3]
    evaluation = f"--target_model_path {work / 'target'} --draft_model_path {runs / 'run'}"
    evaluation += f" --prompts {work / 'validation.jsonl'} --num_prompts 1 --max_new_tokens 2"
    command = COMMANDS["evaluate_draft"]
    command.main(command.parse_args(evaluation.split()))
    assert f"the draft is {runs / 'run' / 'final'}" in capsys.readouterr().out


def test_a_hub_id_and_a_missing_folder_stay_as_they_are():
    assert checkpoints.find_draft("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B") == "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"


def test_checkpoint_counts_only_as_it_was_written_and_with_all_its_parts(runs, tmp_path, capsys):
    """Otherwise the one before is taken: a changed state file, another folder's state, an incomplete list of files."""
    engine = {"precision": "fp32", "optimizer": "AdamW", "zero_stage": 2}
    whole = runs / "stopped" / "step_00000002"
    state = checkpoints.read_state(whole)
    text = (whole / "trainer_state.json").read_text()
    cases = {
        "another digit": (text.replace('"step": 2', '"step": 3'), "is not as it was written"),
        "another letter": (text.replace('"best"', '"bost"'), "is not as it was written"),
        "no hash": (json.dumps(state), "is not as it was written"),
        "half": (text[: len(text) // 2], "cannot be read"),
        "nested": ("[" * 100_000, "cannot be read"),
        "step of another folder": (state | {"step": 1}, "trainer_state.json is of step 1"),
    }
    for name, what in (
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        (checkpoints.RANKS, checkpoints.RANKS),
        ("deepspeed/mp_rank_00_model_states.pt", "DeepSpeed's states of the model"),
        ("deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt", "the optimizer's states of rank 0"),
    ):
        files = {key: value for key, value in state["files"].items() if key != name}
        assert len(files) == len(state["files"]) - 1, f"{name} is written"
        cases[name] = (state | {"files": files}, f"it lacks {what}")
    cases["more ranks"] = (state | {"world_size": 2}, "it lacks the optimizer's states of rank 1")
    for name, (written, problem) in cases.items():
        out = tmp_path / name.replace("/", "_")
        shutil.copytree(runs / "stopped", out, symlinks=True)
        folder = out / "step_00000002"
        if isinstance(written, str):
            (folder / "trainer_state.json").write_text(written)
        else:
            common.write_sealed(folder / "trainer_state.json", written)
        args = SimpleNamespace(
            resume=True, no_resume_from_checkpoint=False, resume_from_checkpoint=None, output_dir=str(out)
        )
        found, _ = checkpoints.find_start(args, engine, ())
        said = capsys.readouterr().err
        assert Path(found).name == "step_00000001" and f"{folder} is not a complete checkpoint" in said, name
        assert problem in said, name


def test_copy_with_folders_in_the_place_of_links_is_continued(work, runs, tmp_path, capsys):
    """As scp -r, rsync -L and object stores make it."""
    shutil.copytree(runs / "stopped", tmp_path / "out", symlinks=False)
    training.run(work, tmp_path / "out", "--resume", "--total_steps", 3)
    latest = tmp_path / "out" / "latest"
    assert latest.is_symlink() and latest.resolve().name == "step_00000003"
    copied = tmp_path / "out" / "copied_0_latest"
    assert (copied / "trainer_state.json").exists() and not list((tmp_path / "out").glob(".*.building"))
    assert f"{latest} is a folder, not a link: renamed to {copied}" in capsys.readouterr().err
    assert checkpoints.find_draft(copied) == str(copied)


def test_fewer_steps_than_the_checkpoint_has_are_noticed(work, runs, tmp_path, capsys):
    shutil.copytree(runs / "stopped", tmp_path / "out", symlinks=True)
    training.run(work, tmp_path / "out", "--resume", "--total_steps", 1)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'step_00000002'} has 2 steps, total_steps is 1: nothing is left to train" in said


# ==================== Dry runs and new starts ========================================================================


def test_dry_run_without_data_then_from_pretrained(work, tmp_path, monkeypatch, capsys):
    """The example of speculators' page: a draft, then a training from it; both in the folder that the user named."""
    monkeypatch.chdir(tmp_path)
    given = ["--verifier-name-or-path", str(work / "target"), "--draft-vocab-size", "200", "--ttt-steps", "3"]
    counts = ["--token-freq-path", str(work / "data" / "token_freq.pt")]
    dry = [*given, *counts, "--save-path", "./draft_init", "--dry-run"]
    train_eagle3.main(train_eagle3.parse_args(dry))
    assert "saved draft_init/step_00000000: start from it with --resume_from_checkpoint ./draft_init" in (
        capsys.readouterr().out
    )
    more = ["--from-pretrained", "./draft_init", "--data-path", str(work / "data"), "--max-steps", "1", "--lr", "0"]
    train_eagle3.main(train_eagle3.parse_args([*given, *more, "--save-path", "checkpoints"]))
    initial = training.weights("draft_init/step_00000000")
    assert training.furthest(training.weights("checkpoints/final"), initial) == 0
    same = training.weights(tmp_path / direct(work, tmp_path) / "step_00000000")
    assert training.furthest(same, initial) == 0, "data change nothing in a dry run"

    # into the same folder: another dry run, and a training from it
    train_eagle3.main(train_eagle3.parse_args([*dry, "--seed", "1"]))
    (aside,) = Path("draft_init").glob("earlier_*")
    assert f"is now in {aside}" in capsys.readouterr().out
    assert training.furthest(training.weights(aside / "step_00000000"), initial) == 0
    seed = training.weights("draft_init/step_00000000")
    assert training.furthest(seed, initial) > 0
    train_eagle3.main(train_eagle3.parse_args([*given, *more, "--save-path", "draft_init"]))
    assert training.furthest(training.weights("draft_init/final"), seed) == 0
    assert not Path("draft_init/step_00000000").exists(), "it would be continued with --resume"


def direct(work, tmp_path):
    training.run(work, tmp_path / "direct", "--dry_run", "--draft_vocab_size", 200)
    return "direct"


def test_a_dry_run_without_data_is_continued_with_data(work, tmp_path):
    given = ["--target_model_path", work / "target", "--ttt_length", training.STEPS, "--output_dir", tmp_path / "out"]
    train_eagle3.main(train_eagle3.parse_args([*map(str, given), "--dry_run", "--scheduler_warmup_steps", "50"]))
    resumed = training.run(work, tmp_path / "out", "--resume", "--total_steps", 1)
    assert [row["loss"] for row in resumed] == [
        row["loss"] for row in training.run(work, tmp_path / "whole", "--total_steps", 1)
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--total_steps 1", "give either dataset_train_split"),
        ("--dry_run --draft_vocab_size 200", "draft_vocab_size 200 of 400 without data: give token_freq_path"),
        ("--dry_run --hidden_states_path H", "hidden_states_path belongs to data"),
        ("--dry_run --vllm_endpoint http://localhost:1/v1", "vllm_endpoint belongs to data"),
    ],
)
def test_what_needs_data_is_said(work, tmp_path, capsys, flags, words):
    line = training.refused(capsys, training.run, work, tmp_path / "out", *flags.split(), data=False)
    assert words in line and not (tmp_path / "out").exists()


def test_new_start_moves_the_earlier_run_aside(work, runs, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(runs / "run", out, symlinks=True)
    (out / "notes.txt").write_text("mine")
    (out / "data").mkdir()
    before = {path.name: path.resolve().name for path in out.iterdir()}
    line = training.refused(capsys, training.run, work, out, "--total_steps", 1)
    assert "holds a run (final, metrics.jsonl, step_00000001)" in line
    assert "move it aside with --no_resume_from_checkpoint" in line
    line = training.refused(capsys, training.run, work, out, "--no_resume_from_checkpoint", "--tp_size", 3)
    assert {path.name: path.resolve().name for path in out.iterdir()} == before, f"moved for nothing: {line}"
    for flags in (["--no-resume-from-checkpoint"], ["--no-resume-from-checkpoint", "--resume"]):
        capsys.readouterr()
        rows = training.run(work, out, "--total_steps", 1, *flags)
        assert [row["step"] for row in rows if row["split"] == "train"] == [1]
        assert re.search(rf"what an earlier run wrote in {out} is now in {out}/earlier_\d+", capsys.readouterr().out)
    first, second = sorted(out.glob("earlier_*"))
    moved = {path.name: path.resolve().name for path in first.iterdir()}
    assert moved == {name: end for name, end in before.items() if name not in ("notes.txt", "data")}
    assert training.furthest(training.weights(first / "latest"), training.weights(runs / "run" / "latest")) == 0
    assert (second / "step_00000001").exists() and (out / "notes.txt").read_text() == "mine"


def test_new_start_from_the_weights_of_the_run_that_it_moves_aside(work, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "run", "out", symlinks=True)
    flags = "--total_steps", 1, "--learning_rate", 0, "--no_resume_from_checkpoint", "--resume_from_checkpoint"
    training.run(work, "out", *flags, "./out/../out")
    assert training.furthest(training.weights("out/final"), training.weights(runs / "run" / "final")) == 0


@pytest.mark.parametrize(("output", "draft", "found"), table("aside.txt"))
def test_draft_in_what_is_moved_aside(output, draft, found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("out/step_00000001", "out/step_00000002", "out/data", "elsewhere/final"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text(folder)
    Path("link").symlink_to("out")
    Path("out/latest").symlink_to("step_00000002")
    Path("out/final").symlink_to("../elsewhere/final")
    draft = draft.format(here=tmp_path)
    holds = Path(draft, "config.json").read_text() if Path(draft).exists() else None
    moved = checkpoints.move_aside(output.format(here=tmp_path), draft)
    assert re.sub("earlier_[0-9_]+", "earlier", moved) == found.format(here=tmp_path)
    assert holds is None or Path(moved, "config.json").read_text() == holds
    line = training.refused(capsys, checkpoints.find_draft, "out")
    assert "nor an output folder with a complete checkpoint; an earlier run is in out/earlier_" in line


# ==================== Outputs ========================================================================================


OUTPUTS = table("outputs.txt")
NO_PLACES = {  # by kind; root cannot write there either
    "a file": "{folder}/file",
    "below a file": "{folder}/file/a/b",
    "no such disk": "/proc/nothing/can/be/made/here",
    "a name that is too long": "{folder}/" + 300 * "x",
}


def check_output(command, flag, words, place, work, runs, monkeypatch, capsys):
    """A command refuses a place with one line, before it loads a target or renders conversations."""
    for name in ("load", "load_as_asked", "load_head"):
        monkeypatch.setattr(target_model, name, lambda *args, **options: pytest.fail("the target is loaded"))
    monkeypatch.setattr(prepare_data, "build", lambda *args: pytest.fail("the conversations are rendered"))
    counts = work / "data" / "token_freq.pt"
    inputs = {"target": work / "target", "data": work / "data", "chats": work / "train.jsonl", "counts": counts}
    argv = words.format(**inputs, run=runs / "run").replace("OUTPUT", str(place)).split()
    script = COMMANDS[command]
    line = training.refused(capsys, lambda: script.main(script.parse_args(argv)))
    assert flag in line and str(Path(place).parent) in line
    assert "cannot be written: " in line


@pytest.mark.parametrize(("command", "flag", "words"), OUTPUTS)
def test_output_that_cannot_be_written(command, flag, words, work, runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    for place in NO_PLACES.values():
        check_output(command, flag, words, place.format(folder=tmp_path), work, runs, monkeypatch, capsys)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    """A file system that can only be read, and a full one."""
    folder = tmp_path_factory.mktemp("disks")
    with tiny.small_disk(folder / "read", 64) as (read, _), tiny.small_disk(folder / "full", 64) as (full, _):
        subprocess.run(["mount", "-o", "remount,ro", str(read)], check=True)
        with contextlib.suppress(OSError), (full / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield read, full


@pytest.mark.parametrize(("command", "flag", "words"), OUTPUTS)
def test_output_on_a_disk_that_takes_nothing(command, flag, words, work, runs, disks, monkeypatch, capsys):
    for disk in disks:
        before = list(disk.iterdir())
        check_output(command, flag, words, disk / "new", work, runs, monkeypatch, capsys)
        assert list(disk.iterdir()) == before


def test_folder_behind_a_link_is_written(work, tmp_path):
    """As where the data are to lie on a larger disk; the link stays."""
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    argv = f"--target_model_path {work / 'target'} --dataset {work / 'train.jsonl'} --num_proc 1 --output_path"
    for length in (512, 256):
        words = [*argv.split(), str(tmp_path / "link" / "data"), "--max_length", str(length)]
        prepare_data.main(prepare_data.parse_args(words))
    (tmp_path / "again").symlink_to(tmp_path / "large" / "data")
    prepare_data.main(prepare_data.parse_args([*argv.split(), str(tmp_path / "again"), "--max_length", "128"]))
    config = json.loads((tmp_path / "large" / "data" / "data_config.json").read_text())
    assert config["ingredients"]["max_length"] == 128 and (tmp_path / "again").is_symlink()


def test_home_is_found_where_the_shell_leaves_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train_eagle3.parse_args(["--target_model_path=~/target", "--data_path", "~/data", "--output_dir=~/out"])
    assert [args.target_model_path, args.data_path, args.output_dir] == [
        str(tmp_path / name) for name in ("target", "data", "out")
    ]


# ==================== Two starts in one folder =======================================================================


def test_second_start_is_refused_while_the_first_one_lives(work, tmp_path, capsys):
    out = tmp_path / "out"
    with tiny.other_writer(out) as first:
        for flags in ([], ["--resume"], ["--no_resume_from_checkpoint"], ["--dry_run"]):
            line = training.refused(capsys, training.run, work, out, "--total_steps", 1, *flags)
            assert line == (
                f"output_dir {out}: another process writes there (host {socket.gethostname()}, pid {first.pid}): "
                "wait for it to end, or give another folder"
            )
        assert [path.name for path in out.iterdir()] == [".writer"]
        first.kill()
        first.wait()
        training.run(work, out, "--total_steps", 1)  # at once
    assert not (out / ".writer").exists()


@pytest.mark.parametrize("command", ["prepare_data", "prepare_hidden_states"])
def test_two_that_prepare_into_one_folder(command, work, tmp_path, capsys):
    words = next(words for name, _, words in OUTPUTS if name == command)
    out = tmp_path / "out"
    inputs = {"target": work / "target", "data": work / "data", "chats": work / "train.jsonl"}
    argv = [word.replace("OUTPUT", str(out)) for word in words.format(**inputs).split()]
    script = COMMANDS[command]
    claim = (tmp_path, ".out.preparing") if command == "prepare_data" else (out,)
    with tiny.other_writer(*claim) as first:
        line = training.refused(capsys, script.main, script.parse_args(argv))
        assert f"host {socket.gethostname()}, pid {first.pid}): wait for it to end" in line
        assert not out.exists() or [path.name for path in out.iterdir()] == [".writer"]
    script.main(script.parse_args(argv))
    assert out.exists() and not list(tmp_path.glob(".*")) and not list(out.glob(".*"))


@pytest.fixture
def without_locks(monkeypatch):
    """Storage that other machines write too and that has no locks."""
    monkeypatch.setattr(claims, "file_system", lambda path: "fuse.storage")
    monkeypatch.setattr(claims, "try_lock", lambda file: None)
    monkeypatch.setattr(claims, "PATIENCE", 2)
    monkeypatch.setattr(claims, "BEAT", 0.2)


def claim(folder):
    with claims.only_writer("output_dir", folder):
        return json.loads((folder / ".writer").read_text())


def test_storage_without_locks(without_locks, tmp_path, capsys):
    """On the same host the process decides."""
    with tiny.other_writer(tmp_path) as first:
        line = training.refused(capsys, claim, tmp_path)
        assert f"host {socket.gethostname()}, pid {first.pid}" in line
        first.kill()
        first.wait()
    assert claim(tmp_path)["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_number_of_a_process_that_another_one_has(without_locks, tmp_path):
    """As in a container that is started again, where each process has the number of its predecessor."""
    entry = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time() - 3600, "beat": 0}
    (tmp_path / ".writer").write_text(json.dumps(entry))
    assert claim(tmp_path)["started"] > entry["started"]


@pytest.mark.parametrize("end", ["lives", "ends", "is dead"])
def test_writer_on_another_host(without_locks, end, tmp_path, capsys):
    path = tmp_path / ".writer"
    entry = {"host": "node-b", "pid": 7, "started": 0, "beat": 0}
    path.write_text(json.dumps(entry).ljust(claims.SIZE))
    ended = threading.Event()

    def other():
        with path.open("r+b", buffering=0) as file:
            while end == "lives" and not ended.wait(0.1):
                entry["beat"] += 1
                claims.write(file, entry)
        if end == "ends":
            time.sleep(0.5)
            path.unlink()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        if end == "lives":
            assert "host node-b, pid 7" in training.refused(capsys, claim, tmp_path)
        else:
            assert claim(tmp_path)["pid"] == os.getpid()
            assert "was claimed by host node-b, pid 7: looking for 2 s" in capsys.readouterr().err
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(("host", "drops", "taken"), [("b", True, True), ("b", False, False), ("", True, True)])
def test_storage_that_keeps_the_lock_of_a_dead_writer(without_locks, host, drops, taken, tmp_path, monkeypatch, capsys):
    """On another host, or on this one: it is waited for, but not without end."""
    answers = [False, False, True]  # of try_lock, the last one from then on
    monkeypatch.setattr(claims, "try_lock", lambda file: answers.pop(0) if answers[1:] else drops)
    monkeypatch.setattr(claims, "PATIENCE", 1)
    monkeypatch.setattr(claims, "LOCK_PATIENCE", 3)
    entry = {"host": host or socket.gethostname(), "pid": 2**22 + 1, "started": 0, "beat": 0}
    (tmp_path / ".writer").write_text(json.dumps(entry).ljust(claims.SIZE))
    if taken:
        assert claim(tmp_path)["pid"] == os.getpid() and not list(tmp_path.iterdir())
    else:
        assert f"host b, pid {entry['pid']}): wait for it to end" in training.refused(capsys, claim, tmp_path)


def test_storage_that_gives_files_new_numbers(without_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda a, b: False)
    assert claim(tmp_path)["pid"] == os.getpid() and not list(tmp_path.iterdir())


def test_a_claim_beats_where_other_machines_write(without_locks, tmp_path):
    with claims.only_writer("output_dir", tmp_path):
        time.sleep(1)
        entry = json.loads((tmp_path / ".writer").read_text())
    assert entry["beat"] >= 2 and not list(tmp_path.iterdir())


def test_two_that_claim_at_once_without_locks(without_locks, tmp_path, monkeypatch, capsys):
    """The one that is overwritten sees it."""
    entry = {"host": "node-b", "pid": 7, "started": 0, "beat": 0}

    def overwritten(seconds):
        (tmp_path / ".writer").write_text(json.dumps(entry).ljust(claims.SIZE))

    monkeypatch.setattr(claims.time, "sleep", overwritten)
    assert "host node-b, pid 7" in training.refused(capsys, claim, tmp_path)
    assert json.loads((tmp_path / ".writer").read_text()) == entry


def test_other_ranks_do_not_claim(monkeypatch, tmp_path):
    """A rank that starts late finds its own rank 0 in the folder."""
    monkeypatch.setattr(ranks, "on_first_rank", lambda work: None)
    with tiny.other_writer(tmp_path), ranks.only_writer("output_dir", tmp_path):
        pass
