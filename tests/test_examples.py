"""The examples, run as they are: their shell scripts from start to end."""

import json
import os
import subprocess

import pytest
import tiny
import torch

from deal_batches import acceptance_walk, plan_slots, supervised_slots
from evaluate_eagle3 import load_draft
from export_eagle3 import check_draft, read_draft
from share_target import load_target
from train_eagle3 import chain_lengths

pytestmark = pytest.mark.slow


def run(script, timeout, **environment):
    """Run an example with these variables, in the environment of the tests."""
    variables = {**os.environ, "EAGLE3_VENV": "none", **{name: str(value) for name, value in environment.items()}}
    command = ["bash", str(tiny.REPOSITORY / "examples" / script)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_tiny_run_trains_a_draft_that_is_accepted(tmp_path):
    """Acceptance length at least 2.0 after training and at most 1.1 before, on prompts that were not trained on."""
    output = tmp_path / "tiny"
    printed = run("run_tiny_online.sh", 2400, OUTPUT=output)
    before, after = (
        json.loads((output / f"evaluation_{name}" / "evaluation.json").read_text()) for name in ("before", "after")
    )
    assert before["acceptance_length"] <= 1.1
    assert after["acceptance_length"] >= 2.0
    assert after["passes"] < before["passes"] and after["settings"]["num_draft_tokens"] == 7
    assert f"acceptance length after training: {after['acceptance_length']:.3f}" in printed
    assert "every text equals the target's own greedy text" in printed
    assert check_draft(output / "draft" / "final") == []
    for picture in ("curves.png", "evaluation_after/acceptance.png"):
        data = (output / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000, picture
    rows = [json.loads(line) for line in (output / "draft" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    assert train[-1]["loss"] < 0.85 * train[0]["loss"] and train[-1]["chain_length"] > train[0]["chain_length"]

    # What the training code computes on the target's own texts is what was measured, pass by pass.
    config, tensors = read_draft(output / "draft" / "final")
    target = load_target(output / "target")
    draft, d2t = load_draft(config, tensors, target)
    for line in (output / "evaluation_after" / "generations.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"])
        auxiliary, last = target.hidden_states(ids, [len(ids)])
        plan = plan_slots(supervised_slots(mask, torch.zeros_like(ids), 7), [len(ids)])
        with torch.no_grad():
            _, _, correct = draft(ids, torch.arange(len(ids)), auxiliary, last, target.head, plan, d2t, 0.8)
        assert acceptance_walk(chain_lengths(correct).tolist(), mask.tolist()) == row["passes"]


def test_llama3_recipe_with_a_small_target(tmp_path):
    """The real recipe, with its paths and sizes overridden by variables."""
    tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(40, 2))
    printed = run(
        "run_llama3_online.sh", 900, OUTPUT=tmp_path / "out", TARGET=tmp_path / "target", NUM_GPUS=2,
        DATASET=tmp_path / "chats.jsonl", DRAFT_VOCAB_SIZE=200, VALIDATION_RATIO=0.1, NUM_EPOCHS=1, TTT_LENGTH=3,
        NUM_PROMPTS=2, MAX_NEW_TOKENS=12, LOG_STEPS=1, OMP_NUM_THREADS=1,
    )  # fmt: skip
    assert "ranks       world 2 = dp 2 x tp 1" in printed and "complete: " in printed
    assert check_draft(tmp_path / "out" / "draft" / "final") == []
    assert (tmp_path / "out" / "evaluation" / "acceptance.png").exists()
    config = json.loads((tmp_path / "out" / "draft" / "final" / "config.json").read_text())
    assert config["draft_vocab_size"] == 200


def test_deepspeed_launcher_ends_with_one_line_and_an_error(tmp_path):
    """Two ranks of which one has no data, through the launcher that the examples use."""
    tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "one.jsonl", tiny.conversations(1))
    result = subprocess.run(
        ["deepspeed", "--num_gpus", "2", str(tiny.REPOSITORY / "train_eagle3.py"), "--target_model_path",
         str(tmp_path / "target"), "--dataset_train_split", str(tmp_path / "one.jsonl"), "--output_dir",
         str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "training sequences for 2 ranks" in line]
    assert len(lines) == 1 and lines[0].startswith("error: 1 training sequences")
