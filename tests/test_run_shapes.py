"""Drafts of other shapes than one Llama layer: trained, stopped and continued, on two ranks, read as a start."""

import json

import pytest
import torch

import export_draft
from core import draft_files
from helpers.resuming import arguments, check_continued, refused, stage, train, write_work
from helpers.starts import Starts
from helpers.training import furthest, weights

SHAPE = "--num_layers", 2, "--draft_arch", "qwen3", "--sliding_window", 24, "--sliding_window_indices", 1
SHAPE = *SHAPE, "--fc_norm", "--norm_output", "--embed_requires_grad", "--freeze_head", "--gradient_checkpointing"
FEW = *SHAPE, "--total_steps", 4, "--save_steps", 2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, prepared data, and in shaped/ a run of a draft with all of SHAPE."""
    folder = tmp_path_factory.mktemp("work")
    write_work(folder)
    train(folder, folder / "shaped", *FEW)
    return folder


def test_a_stopped_run_is_continued_bit_by_bit(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    check_continued(monkeypatch, work, out, work / "shaped", *FEW)
    line = refused(capsys, work, out, *FEW, "--freeze_head", "false", "--resume")
    assert "was trained with freeze_head True, not False" in line
    line = refused(capsys, work, out, *FEW, "--norm_output", "false", "--resume")
    assert "norm_output False, there True: drop them" in line


def test_what_is_trained_is_saved_and_what_is_frozen_stays(work, tmp_path, capsys):
    train(work, tmp_path / "dry", *FEW, "--dry_run")
    before, after = (weights(folder) for folder in (tmp_path / "dry" / "step_00000000", work / "shaped" / "final"))
    stays = {name for name in before if torch.equal(before[name], after[name])}
    assert stays == {"lm_head.weight", "d2t", "t2d"}
    target = weights(work / "target")
    ids = torch.arange(len(before["d2t"])) + before["d2t"]
    assert torch.equal(before["lm_head.weight"], target["lm_head.weight"][ids])
    assert torch.equal(before["embed_tokens.weight"], target["model.embed_tokens.weight"])
    assert {"layers.0.self_attn.q_norm.weight", "layers.1.self_attn.k_norm.weight"} <= before.keys()
    capsys.readouterr()
    assert export_draft.check(work / "shaped" / "final") == 0
    printed = capsys.readouterr().out
    assert "note: model_type qwen3: SGLang" in printed and "note: layer_types mixes" in printed


def test_the_weights_of_a_shaped_draft_are_a_start(work, tmp_path, capsys):
    start = work / "shaped" / "final"
    train(work, tmp_path / "again", "--resume_from_checkpoint", start, "--dry_run")
    assert furthest(weights(tmp_path / "again" / "step_00000000"), weights(start)) == 0
    line = refused(capsys, work, tmp_path / "no", "--resume_from_checkpoint", start, "--head_init", "random")
    assert "brings its own: drop it" in line


def test_a_draft_narrower_than_its_target_trains_a_table_of_its_own(work, tmp_path):
    keys = {"hidden_size": 32, "target_hidden_size": 64, "head_dim": 8, "intermediate_size": 48}
    (tmp_path / "draft.json").write_text(json.dumps(keys))
    flags = "--draft_model_config", tmp_path / "draft.json", "--total_steps", 1, "--head_init", "random"
    train(work, tmp_path / "out", *flags)
    assert draft_files.check_draft(tmp_path / "out" / "final") == []
    assert weights(tmp_path / "out" / "final")["embed_tokens.weight"].shape == (400, 32)


@pytest.mark.slow
def test_two_ranks_under_zero_3_train_the_same_weights(work, tmp_path):
    with Starts() as starts:
        starts.run(arguments(work, tmp_path / "out", *FEW, *stage(3)), 2, tmp_path / "log")
    assert furthest(weights(tmp_path / "out" / "final"), weights(work / "shaped" / "final")) < 1e-5
