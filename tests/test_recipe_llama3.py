"""The Llama recipes with small targets: online on one node, on one GPU, and on several nodes."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from core import draft_files
from helpers import tiny, training
from helpers.recipes import SMALL, run, tells_acceptance

pytestmark = pytest.mark.slow


def test_llama3_recipe_with_a_small_target(tmp_path):
    """The real recipe, with its paths and sizes overridden by variables."""
    tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(40, 2))
    out = tmp_path / "out"
    variables = {
        "OUTPUT": out, "TARGET": tmp_path / "target", "NUM_GPUS": 2, "DATASET": tmp_path / "chats.jsonl",
        "DRAFT_VOCAB_SIZE": 200, "VALIDATION_RATIO": 0.1, "NUM_EPOCHS": 1, "TTT_LENGTH": 3, "MAX_NEW_TOKENS": 12,
        "LOG_STEPS": 1, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    printed = run("run_llama3_online.sh", 900, NUM_PROMPTS=2, **variables)
    assert "ranks       world 2 = dp 2 x tp 1" in printed and "complete: " in printed
    assert draft_files.check_draft(out / "draft" / "final") == []
    assert (out / "evaluation" / "acceptance.png").exists()
    config = json.loads((out / "draft" / "final" / "config.json").read_text())
    assert config["draft_vocab_size"] == 200

    # What is served is the best checkpoint, also where storage keeps its name in a file instead of a link.
    best = (out / "draft" / "best").resolve()
    assert training.furthest(training.weights(out / "served"), training.weights(best)) == 0
    assert {path.name for path in (out / "served").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    # The training and the export say how to serve it, the card what was measured.
    assert f"\nserve {out / 'draft' / 'best'}: the best checkpoint by acceptance_length, " in printed
    commands = printed.split("serve it:\n")[1].splitlines()
    assert len(commands) == 2 and all(f"{out / 'served'}" in line for line in commands)
    length = json.loads((out / "evaluation" / "evaluation.json").read_text())["acceptance_length"]
    card = (out / "served" / "README.md").read_text()
    assert f" {length:.3f} " in card and "trained on: chats.jsonl, " in card and str(tmp_path) not in card
    (out / "draft" / "best").unlink()
    (out / "draft" / "best").write_text(best.name)
    (out / "served" / "model.safetensors").unlink()
    printed = run("run_llama3_online.sh", 300, STAGES=4, NUM_PROMPTS=0, **variables)
    assert "=== 3." not in printed and "complete: " in printed
    assert training.furthest(training.weights(out / "served"), training.weights(best)) == 0


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
