"""Trainings of block drafts: however ranks share the work it is the same one, stopped or not, online or from disk."""

import json
import os
import re
import signal

import pytest
import torch

import prepare_hidden_states
import train_dflash
import train_eagle3
from core import draft_files
from helpers import tiny, training
from helpers.resuming import at_step, different
from helpers.training import refused, timeless, weights

FLAGS = (
    "--num_layers", 2, "--block_size", 4, "--mask_token_id", 3, "--max_anchors", 6, "--total_steps", 8,
    "--draft_global_batch_size", 8, "--log_steps", 1, "--learning_rate", 1e-3,
)  # fmt: skip
DSPARK = ("--algorithm", "dspark", "--markov_rank", 8, "--position_weights", "dpace")
WINDOW = ("--sliding_window", 16, "--loss", "lk_hybrid")
KINDS = {"dflash": (), "dspark": DSPARK, "window": WINDOW}
# (kind, ZeRO stage, flags) by the number of ranks
RUNS = {
    1: [("dflash", 1, ("--draft_micro_batch_size", 4)), ("dspark", 3, ("--gradient_checkpointing",))],
    2: [("dflash", 1, ("--tp_size", 2)), ("dspark", 2, ("--total_seq_len", 512)), ("window", 3, ())],
    4: [("dflash", 3, ("--tp_size", 2)), ("dspark", 1, ()), ("window", 2, ("--target_sharding", "zero3"))],
}  # fmt: skip


def command(folder, output, kind, *flags):
    argv = ["--target_model_path", folder / "target", "--data_path", folder / "data", "--output_dir", output]
    return [str(part) for part in (*argv, *FLAGS, *KINDS[kind], *flags)]


def train(folder, output, kind="dflash", *flags):
    train_dflash.main(train_dflash.parse_args(command(folder, output, kind, *flags)))
    return training.metrics(output)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = training.write_workspace(tmp_path_factory.mktemp("blocks"))
    for stage in range(1, 4):
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return folder


def alone(work, kind):
    """The output of a run of this kind on one rank that nothing disturbed."""
    output = work / "one" / kind
    if not output.exists():
        rows = train(work, output, kind, "--deepspeed_config", work / "zero2.json")
        assert rows[-1]["split"] == "validation" and rows[-1]["acceptance_length"] >= 1
    return output


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RUNS)
def test_any_number_of_ranks_and_any_zero_stage_give_the_same_training(work, ranks, tmp_path):
    outputs = [tmp_path / str(number) for number in range(len(RUNS[ranks]))]
    several = [
        command(work, output, kind, *flags, "--deepspeed_config", work / f"zero{stage}.json", "--dist_timeout", 2)
        for output, (kind, stage, flags) in zip(outputs, RUNS[ranks], strict=True)
    ]
    tiny.launch_many(ranks, several, "train_dflash")
    for output, (kind, stage, flags) in zip(outputs, RUNS[ranks], strict=True):
        rows, expected = training.metrics(output), training.metrics(alone(work, kind))
        for key in expected[-1].keys() - {"split", "seconds"}:
            values = [[row[key] for row in part if row["split"] == "validation"] for part in (rows, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-7), (kind, stage, flags, key)
        found, wanted = weights(output / "final"), weights(alone(work, kind) / "final")
        assert training.furthest(found, wanted) < 1e-5, (kind, stage, flags)


@pytest.mark.parametrize("kind", [pytest.param("dflash", marks=pytest.mark.slow), "dspark"])
def test_stopped_and_resumed_is_the_undisturbed_run(work, tmp_path, monkeypatch, kind):
    """Anchors are drawn by the epoch and the row: the run has two epochs and stops in the second."""
    flags = ("--deepspeed_config", work / "zero2.json")
    expected = timeless(alone(work, kind))
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(work, tmp_path, kind, *flags)
    assert (tmp_path / "latest").resolve().name == "step_00000005"
    monkeypatch.undo()
    train(work, tmp_path, kind, *flags, "--resume", "--num_workers", 0)
    assert timeless(tmp_path) == expected
    found = different(tmp_path / "final", alone(work, kind) / "final")
    assert [name for name in found if "run.json" not in name] == []


@pytest.mark.slow
def test_hidden_states_from_disk_give_the_same_training(work, tmp_path):
    """The store of a draft with these auxiliary layers, which prepare_hidden_states.py writes."""
    layers = ["--target_layer_ids", "2", "6"]
    argv = ["--target_model_path", work / "target", "--data_path", work / "data", "--output_path", tmp_path / "states"]
    argv = [str(part) for part in (*argv, *layers, "--hidden_states_dtype", "float32")]
    prepare_hidden_states.main(prepare_hidden_states.parse_args(argv))
    flags = ("--deepspeed_config", work / "zero2.json", "--on_missing", "raise")
    rows = train(work, tmp_path / "out", "dspark", *flags, "--hidden_states_path", tmp_path / "states")
    for found, expected in zip(rows, training.metrics(alone(work, "dspark")), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert training.furthest(weights(tmp_path / "out" / "final"), weights(alone(work, "dspark") / "final")) < 1e-5


@pytest.mark.parametrize("kind", ["dspark", pytest.param("window", marks=pytest.mark.slow)])
def test_a_training_leaves_a_draft_that_can_be_served_and_continued(work, tmp_path, kind):
    """Without a step the continued draft is the one that was there; a reduced vocabulary keeps the target's rows."""
    first = alone(work, kind) / "final"
    assert draft_files.check_draft(first) == []
    flags = ("--deepspeed_config", work / "zero2.json", "--resume_from_checkpoint", first)
    train(work, tmp_path, kind, *flags, "--dry_run")
    before, after = weights(first), weights(tmp_path / "latest")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_reduced_vocabulary_trains_and_keeps_the_targets_rows(work, tmp_path):
    train(work, tmp_path, "dspark", "--draft_vocab_size", 200, "--total_steps", 1, "--num_workers", 0)
    assert draft_files.check_draft(tmp_path / "final") == []
    tensors = weights(tmp_path / "final")
    head = weights(work / "target")["lm_head.weight"]
    assert torch.equal(tensors["lm_head.weight"], head[tensors["t2d"]])


@pytest.mark.slow
def test_muon_trains_the_matrices_of_the_layers(work, tmp_path):
    rows = train(work, tmp_path, "dspark", "--optimizer", "muon", "--total_steps", 12)
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize(("kind", "needed"), [("dflash", 505), ("dspark", 506)])
def test_blocks_that_no_reply_holds_are_one_line(work, tmp_path, capfd, kind, needed):
    """Before a model loads: a training on nothing would look like one that has learned all."""
    train(work, tmp_path / "some", kind, "--block_size", 60, "--dry_run")
    assert re.search(
        r"\d+ of 22 rows have no reply with 6[01] tokens in a row: they teach nothing", capfd.readouterr().out
    )
    error = refused(capfd, train, work, tmp_path / "out", kind, "--block_size", 505)
    assert f"none of 22 rows has {needed} supervised tokens in a row" in error


def test_wrong_flags_are_one_line(work, tmp_path, capfd):
    def call(*flags):
        return refused(capfd, train, work, tmp_path / "out", "dflash", *flags)

    assert "sliding_window 4 is not more than block_size 4" in call("--sliding_window", 4)
    assert "markov_rank is dspark's" in call("--markov_rank", 4)


def loop_lines(module):
    """The lines of a trainer's loop, without blanks and comments."""
    import inspect

    source = inspect.getsource(module.train)
    return [line.strip() for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_both_loops_are_the_same_but_for_the_plan_of_a_batch():
    one, other = loop_lines(train_eagle3), loop_lines(train_dflash)
    assert len(one) == len(other)
    differ = [(a, b.replace("train_eagle3.", "")) for a, b in zip(one, other, strict=True) if a != b]
    assert [(a, b) for a, b in differ if a != b] == [
        (
            "batch_of(args, draft_files.windows(engine.module.config), trains=True),",
            "batch_of(args, engine.module, trains=True),",
        )
    ]
