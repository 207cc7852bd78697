"""The diffs of docs/changing.md: each applies to this tree, and what it says comes true when it runs."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest

from helpers import families, tiny
from helpers.training import arguments, metrics, weights

PAGE = (tiny.REPOSITORY / "docs" / "changing.md").read_text()
DIFFS = dict(re.findall(r"^## (.*?)$.*?```diff\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
RATE = 1e-2
MEASURED = ("--total_steps", 4, "--draft_global_batch_size", 4, "--learning_rate", RATE, "--scheduler_type", "constant",
            "--warmup_ratio", 0, "--save_steps", 1, "--weight_decay", 0)  # fmt: skip
RUNS = """
import json, sys
import prepare_data, train_eagle3
for argv in json.loads(sys.argv[1]):
    train_eagle3.main(train_eagle3.parse_args(argv))
prepare_data.main(prepare_data.parse_args(json.loads(sys.argv[2])))
"""


def apply(tree, diff, *flags):
    done = subprocess.run(["git", "apply", *flags], cwd=tree, input=diff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def copy_tree(folder):
    for name in ("core", "ds_configs"):
        shutil.copytree(tiny.REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in tiny.REPOSITORY.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def test_there_is_a_diff_for_each_change_and_each_applies_alone(tmp_path):
    assert len(DIFFS) == 5
    tree = copy_tree(tmp_path)
    for diff in DIFFS.values():
        apply(tree, diff, "--check")


@pytest.fixture(scope="module")
def changed(work, tmp_path_factory):
    """A folder with what a copy of this tree with all of the diffs has trained and prepared, in one process."""
    folder = tmp_path_factory.mktemp("changed")
    tree = folder / "tree"
    tree.mkdir()
    copy_tree(tree)
    for diff in DIFFS.values():
        apply(tree, diff)
    families.write_tokenizer(folder / "tokenizer", families.FAMILIES["olmo2"])
    tiny.write_jsonl(folder / "chats.jsonl", tiny.conversations(3, 2))
    runs = [
        arguments(work, folder / "plain", *MEASURED),
        arguments(work, folder / "hellinger", *MEASURED, "--loss", "hellinger"),
        arguments(work, folder / "root", *MEASURED, "--scheduler_type", "root"),
    ]
    prepare = ["--dataset", folder / "chats.jsonl", "--target_model_path", folder / "tokenizer", "--num_proc", 1]
    prepare += ["--output_path", folder / "data", "--chat_template", "olmo2", "--max_length", 512]
    command = [sys.executable, "-c", RUNS, json.dumps(runs), json.dumps([str(word) for word in prepare])]
    done = subprocess.run(command, cwd=tree, env=tiny.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_another_loss_is_trained(changed):
    """It is at most the total variation, and zero where the teacher's token is outside the vocabulary."""
    for row in metrics(changed / "hellinger"):
        assert all(0 < row[f"loss_{i}"] <= 1 - row[f"accept_{i}"] for i in range(3))
    first, *_, last = [row["loss"] for row in metrics(changed / "hellinger") if row["split"] == "train"]
    assert last < first


def test_another_metric_is_logged(changed):
    for row in metrics(changed / "plain"):
        assert all(0 < row[f"entropy_{i}"] <= math.log(400) for i in range(3))


def test_another_group_has_its_multiplier_of_the_learning_rate(changed):
    """AdamW's first step moves every number by the rate, however small its gradient is."""
    first = weights(changed / "plain" / "step_00000001")
    for name, tensor in first.items():
        if tensor.dim() == 1:  # norms, which start at one
            assert float((tensor - 1).abs().max()) == pytest.approx(0.1 * RATE, rel=0.01), name
    second = weights(changed / "plain" / "step_00000002")
    moved = (second["fc.weight"] - first["fc.weight"]).abs().max()
    assert 0.3 * RATE < float(moved) < 3 * RATE


def test_another_chat_template_is_known(changed):
    config = json.loads((changed / "data" / "data_config.json").read_text())
    assert config["splits"]["train"]["rows"] == 3 and config["splits"]["train"]["supervised_tokens"] > 0


def test_another_schedule_is_followed(changed):
    rates = [row["lr"] for row in metrics(changed / "root") if row["split"] == "train"]
    assert rates == pytest.approx([RATE * (1 - math.sqrt(step / 4)) for step in range(4)])
