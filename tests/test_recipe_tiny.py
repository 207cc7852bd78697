"""The recipe of a tiny target, as it is: training raises the acceptance length, and both ways to measure it agree."""

import json

import pytest
import torch

import evaluate_draft
import train_eagle3
from core import draft_files, slots, target_model
from helpers import training
from helpers.recipes import run


@pytest.mark.slow
def test_tiny_run_trains_a_draft_that_is_accepted(tmp_path):
    """Acceptance length at least 2.0 after training and at most 1.1 before, on prompts that were not trained on.

    With half of the steps of the target, which take long beside other tests.
    """
    output = tmp_path / "tiny"
    printed = run("run_tiny_online.sh", 2400, OUTPUT=output, TARGET_STEPS=250, NUM_PROMPTS=8)
    before, after = (
        json.loads((output / f"evaluation_{name}" / "evaluation.json").read_text()) for name in ("before", "after")
    )
    assert before["acceptance_length"] <= 1.1
    assert after["acceptance_length"] >= 2.0
    assert after["passes"] < before["passes"] and after["settings"]["num_draft_tokens"] == 7
    assert f"acceptance length after training: {after['acceptance_length']:.3f}" in printed
    assert "every text equals the target's own greedy text" in printed
    assert draft_files.check_draft(output / "draft" / "final") == []
    for picture in ("draft/curves.png", "evaluation_after/acceptance.png"):
        data = (output / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000, picture
    rows = [json.loads(line) for line in (output / "draft" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    assert train[-1]["loss"] < 0.85 * train[0]["loss"] and train[-1]["chain_length"] > train[0]["chain_length"]

    # What the training code computes on the target's own texts is what was measured, pass by pass.
    config, tensors = draft_files.read_draft(output / "draft" / "final")
    target = target_model.load(output / "target")
    draft, d2t = evaluate_draft.load_draft(config, tensors, target)
    for line in (output / "evaluation_after" / "generations.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"])
        auxiliary, last = target.hidden_states(ids, [len(ids)])
        plan = slots.plan_slots(slots.supervised_slots(mask, torch.zeros_like(ids), 7), [len(ids)])
        with torch.no_grad():
            _, _, correct = draft(
                ids, torch.arange(len(ids)), auxiliary, last, target.head, plan, d2t, training.flags()
            )
        assert slots.acceptance_walk(train_eagle3.chain_lengths(correct).tolist(), mask.tolist()) == row["passes"]


@pytest.mark.slow
def test_tiny_run_of_a_block_draft(tmp_path):
    """With few steps: every stage runs. The other recipes of block drafts train DFlash."""
    output = tmp_path / "tiny"
    small = {"TARGET_STEPS": 20, "NUM_PROMPTS": 2, "MAX_LENGTH": 128}
    flags = ("--algorithm", "dspark", "--total_steps", "12")
    printed = run("run_tiny_dflash.sh", 2400, *flags, OUTPUT=output, **small)
    assert "every text equals the target's own greedy text" in printed
    assert draft_files.check_draft(output / "draft" / "final") == []
