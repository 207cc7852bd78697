"""The examples, run as they are: their shell scripts from start to end."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import evaluate_draft
import train_eagle3
from core import dataloader, draft_files, slots, target_model
from helpers import tiny
from helpers.families import FAMILIES, publish_in_mxfp4, write_target
from helpers.recipes import run

pytestmark = pytest.mark.slow


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
            _, _, correct = draft(ids, torch.arange(len(ids)), auxiliary, last, target.head, plan, d2t, 0.8)
        assert slots.acceptance_walk(train_eagle3.chain_lengths(correct).tolist(), mask.tolist()) == row["passes"]


def test_llama3_recipe_with_a_small_target(tmp_path):
    """The real recipe, with its paths and sizes overridden by variables."""
    tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(40, 2))
    printed = run(
        "run_llama3_online.sh",
        900,
        OUTPUT=tmp_path / "out",
        TARGET=tmp_path / "target",
        NUM_GPUS=2,
        DATASET=tmp_path / "chats.jsonl",
        DRAFT_VOCAB_SIZE=200,
        VALIDATION_RATIO=0.1,
        NUM_EPOCHS=1,
        TTT_LENGTH=3,
        NUM_PROMPTS=2,
        MAX_NEW_TOKENS=12,
        LOG_STEPS=1,
        OMP_NUM_THREADS=1,
    )
    assert "ranks       world 2 = dp 2 x tp 1" in printed and "complete: " in printed
    assert draft_files.check_draft(tmp_path / "out" / "draft" / "final") == []
    assert (tmp_path / "out" / "evaluation" / "acceptance.png").exists()
    config = json.loads((tmp_path / "out" / "draft" / "final" / "config.json").read_text())
    assert config["draft_vocab_size"] == 200


SMALL = {
    "DRAFT_VOCAB_SIZE": 200, "VALIDATION_RATIO": 0.1, "NUM_EPOCHS": 1, "TTT_LENGTH": 3, "LOG_STEPS": 1,
    "GLOBAL_BATCH": 8, "REPORT_TO": "none", "OMP_NUM_THREADS": 1,
}  # fmt: skip
# Stands in for pdsh, which runs a command on hosts (-w a,b) with %n for the host's number: here on this machine.
PDSH = """#!/bin/bash
shift 3; IFS=, read -ra hosts <<<"$2"; shift 2
for i in "${!hosts[@]}"; do command=$*; bash -c "${command//%n/$i}" & done
wait -n && wait -n
"""
# And for ssh, which the launcher asks whether the first host is there, and for its address.
SSH = """#!/bin/bash
echo 127.0.0.1
"""


def tells_acceptance(folder, printed):
    """Whether the training said what it measured on the validation rows."""
    rows = [json.loads(line) for line in (folder / "draft" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["split"] == "validation"]
    end = f"acceptance_length {row['acceptance_length']:.3f}"
    start = f"evaluation at step {row['step']} | "
    return sum(line.startswith(start) and line.endswith(end) for line in printed.splitlines()) == 1


@pytest.mark.parametrize("ssh", [True, False])
def test_multinode_recipe_with_a_small_target(tmp_path, ssh):
    """Two nodes with a rank each, both on this machine: started from the first, and on each by hand."""
    tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(40, 2))
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    (tmp_path / "bin").mkdir()
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    given = SMALL | {
        "OUTPUT": tmp_path / "out", "TARGET": tmp_path / "target", "DATASET": tmp_path / "chats.jsonl",
        "HOSTFILE": tmp_path / "hosts", "MASTER_PORT": tiny.free_port(), "TP_SIZE": 2, "DIST_TIMEOUT": 5,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    if ssh:
        printed = run("run_llama3_70b_multinode.sh", 600, **given)
    else:
        by_hand = given | {"NO_SSH": 1, "MASTER_ADDR": "127.0.0.1"}
        with ThreadPoolExecutor() as nodes:
            both = [nodes.submit(run, "run_llama3_70b_multinode.sh", 600, NODE_RANK=i, **by_hand) for i in (1, 0)]
        other, printed = (node.result() for node in both)
        assert "waiting for" in other and "=== 1. data" not in other and "=== 4." not in other
    assert "ranks       world 2 = dp 1 x tp 2" in printed and "tensor parallel over 2" in printed
    assert "complete: " in printed and tells_acceptance(tmp_path / "out", printed)
    assert draft_files.check_draft(tmp_path / "out" / "draft" / "final") == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"HOSTFILE": "nowhere"}, "no hostfile nowhere"),
        ({"NO_SSH": 1}, "needs MASTER_ADDR"),
        ({"NO_SSH": 1, "MASTER_ADDR": "127.0.0.1", "NODE_RANK": 1, "WAIT_MINUTES": 0}, "within 0 minutes"),
    ],
)
def test_multinode_recipe_says_what_is_missing(tmp_path, given, expected):
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    given = {"HOSTFILE": tmp_path / "hosts", "OUTPUT": tmp_path / "out", "EAGLE3_VENV": "none"} | given
    result = subprocess.run(
        ["bash", str(tiny.REPOSITORY / "examples" / "run_llama3_70b_multinode.sh")],
        capture_output=True,
        text=True,
        env=tiny.environment(**given),
        timeout=60,
        check=False,
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ") and expected in result.stderr, result.stderr


def test_single_gpu_recipe_with_a_small_target(tmp_path):
    """One CPU rank, the target's weights in CPU memory, and one forward of it an optimizer step."""
    tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(40, 2))
    printed = run(
        "run_llama3_70b_single_gpu.sh",
        600,
        OUTPUT=tmp_path / "out",
        TARGET=tmp_path / "target",
        DATASET=tmp_path / "chats.jsonl",
        **SMALL,
    )
    assert "(zero3, in CPU memory)" in printed and "as 8 sequences of" in printed and "target forward 8" in printed
    assert "complete: " in printed and tells_acceptance(tmp_path / "out", printed)
    assert draft_files.check_draft(tmp_path / "out" / "draft" / "final") == []


# (script, family of its target, variables beside SMALL, what it prints, what the supervised text has; DeepSeek's prompt
# opens the thought)
RECIPES = [
    ("run_qwen3_8b_online.sh", "qwen3", {"CHAT_TEMPLATE": "qwen3-thinking"}, "world 2 = dp 2", "<think>\nBecause "),
    ("run_qwen3_30b_a3b_online.sh", "qwen3 experts", {"TP_SIZE": 2}, "tensor parallel over 2", "<|im_end|>"),
    ("run_gpt_oss_20b_online.sh", "gpt-oss", {}, "target forward 1", "<|channel|>analysis<|message|>Because "),
    ("run_deepseek_r1_distill_online.sh", "r1 llama", {}, "world 2 = dp 2 x tp 1", ".\n</think>\n\n"),
]
R1 = {"r1 llama": FAMILIES["llama"]._replace(tokens=FAMILIES["deepseek"].tokens, template="deepseek-r1-distill")}


@pytest.mark.parametrize(
    ("script", "name", "variables", "expected", "supervised"), RECIPES, ids=[" ".join(row[:2]) for row in RECIPES]
)
def test_recipe_of_a_family_with_a_small_target(script, name, variables, expected, supervised, tmp_path):
    _, tokenizer = write_target(tmp_path / "target", (FAMILIES | R1)[name])
    if name == "gpt-oss":
        publish_in_mxfp4(tmp_path / "target")
    chats = tiny.conversations(40)
    for i, chat in enumerate(chats):
        chat["conversations"][-1]["reasoning_content"] = f"Because {i}."
    tiny.write_jsonl(tmp_path / "chats.jsonl", chats)
    printed = run(
        script,
        900,
        OUTPUT=tmp_path / "out",
        TARGET=tmp_path / "target",
        DATASET=tmp_path / "chats.jsonl",
        NUM_GPUS=2,
        NUM_PROMPTS=2,
        MAX_NEW_TOKENS=12,
        **SMALL,
        **variables,
    )
    assert expected in printed and "complete: " in printed and tells_acceptance(tmp_path / "out", printed)
    assert draft_files.check_draft(tmp_path / "out" / "draft" / "final") == []
    assert (tmp_path / "out" / "evaluation" / "acceptance.png").exists()
    for row in dataloader.open_data(tmp_path / "out" / "data")[0]["train"]:
        text = tokenizer.decode(torch.tensor(row["input_ids"])[torch.tensor(row["loss_mask"]) == 1])
        assert supervised in text and "Question" not in text


def test_deepspeed_launcher_ends_with_one_line_and_an_error(tmp_path):
    """Two ranks of which one has no data, through the launcher that the examples use."""
    tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "one.jsonl", tiny.conversations(1))
    result = subprocess.run(
        [
            "deepspeed",
            "--num_gpus",
            "2",
            "--master_port",
            str(tiny.free_port()),
            str(tiny.REPOSITORY / "train_eagle3.py"),
            "--target_model_path",
            str(tmp_path / "target"),
            "--dataset_train_split",
            str(tmp_path / "one.jsonl"),
            "--output_dir",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "training sequences for 2 ranks" in line]
    assert len(lines) == 1 and lines[0].startswith("error: 1 training sequences")
