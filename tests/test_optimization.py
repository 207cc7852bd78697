"""Muon through DeepSpeed against a plain statement of it, the average of the weights, flags of the optimizer."""

import itertools
import json
import math
import os
import shutil
import subprocess

import pytest
import safetensors.torch
import torch

from core import optimization
from helpers import muon, tiny, training
from helpers.resuming import different, stage
from helpers.training import metrics, timeless, weights


def orthogonal(matrix):
    """Five Newton-Schulz steps (Jordan, kellerjordan.github.io/posts/muon), written from the formula."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide - 4.7750 * (gram @ wide) + 2.0315 * (gram @ gram @ wide)
    return wide if x.shape[0] <= x.shape[1] else wide.T


def expected(adjust, world):
    """The weights after the steps of muon.SCHEDULE in float64, {name: tensor}."""
    found = {}
    for name, shape in muon.SHAPES.items():
        weight = muon.numbers(name, 0).double()
        mean = torch.zeros(shape, dtype=torch.float64)
        square = torch.zeros(shape, dtype=torch.float64)
        for step, share in enumerate(muon.SCHEDULE if name != muon.FROZEN else ()):
            batches = itertools.product(range(world), range(muon.MICRO_BATCHES))
            given = [muon.numbers(name, muon.seed_of(step, *batch)).double() for batch in batches]
            gradient = sum(given) / len(given)
            if len(shape) == 2 and name.startswith(("fc", "midlayer")):
                rate, momentum = share * muon.RATES["muon_lr"], muon.RATES["muon_momentum"]
                mean = momentum * mean + (1 - momentum) * gradient
                update = orthogonal((1 - momentum) * gradient + momentum * mean)  # Nesterov's
                rows, columns = shape
                factor = math.sqrt(max(1, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(shape))
                weight = weight * (1 - rate * muon.RATES["muon_weight_decay"]) - rate * factor * update
            else:
                rate = share * muon.RATES["learning_rate"]
                mean = 0.9 * mean + 0.1 * gradient
                square = 0.95 * square + 0.05 * gradient**2
                root = (square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                weight = weight * (1 - rate * muon.RATES["weight_decay"])
                weight = weight - rate * mean / (1 - 0.9 ** (step + 1)) / root
        found[name] = weight
    return found


CASES = {  # file of ds_configs, changed precision, muon_adjust_lr_fn
    "zero0": ("zero0", False, "match_rms_adamw"),
    "zero1": ("zero1", False, "match_rms_adamw"),
    "zero2": ("zero2", False, "match_rms_adamw"),
    "zero2_original": ("zero2", False, "original"),
    "zero2_offload": ("zero2_offload", False, "match_rms_adamw"),
    "zero3": ("zero3", False, "match_rms_adamw"),
    "zero3_offload": ("zero3_offload", False, "match_rms_adamw"),
    "zero1_bf16": ("zero1", True, "match_rms_adamw"),
    "zero2_bf16": ("zero2", True, "match_rms_adamw"),
    "zero3_bf16": ("zero3", True, "match_rms_adamw"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{ranks: folder with the weights of each case on that number of ranks}."""
    folder = tmp_path_factory.mktemp("muon")
    cases = {}
    for case, (name, bf16, adjust) in CASES.items():
        path = tiny.REPOSITORY / "ds_configs" / f"{name}.json"
        config = json.loads(path.read_text()) if name != "zero0" else {"zero_optimization": {"stage": 0}}
        config["bf16"] = {"enabled": bf16}
        path = folder / f"{case}.json"
        path.write_text(json.dumps(config))
        cases[case] = str(path), adjust
    one = folder / "1"
    two = folder / "2"
    one.mkdir()
    two.mkdir()
    script = tiny.REPOSITORY / "tests" / "helpers" / "muon.py"
    launch = ["torchrun", "--standalone", "--nproc_per_node", "2", script, json.dumps([cases, str(two)])]
    pipe = subprocess.PIPE
    with subprocess.Popen(launch, env=tiny.environment(), stdout=pipe, stderr=pipe, text=True) as process:
        muon.train(cases, one)
        _, printed = process.communicate(timeout=300)
        assert process.returncode == 0, printed[-4000:]
    return {1: one, 2: two}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_weights_after_three_steps_are_those_of_the_statement(trained, case, world):
    found = torch.load(trained[world] / f"{case}.pt")
    _, bf16, adjust = CASES[case]
    tolerance = 0.1 if bf16 else 1e-4  # gradients are rounded to bf16
    for name, weight in expected(adjust, world).items():
        before = muon.numbers(name, 0)
        moved = weight - before.double()
        start = before.bfloat16() if bf16 else before
        gap = (found[name].double() - start.double() - moved).norm()
        assert gap <= tolerance * moved.norm() + 1e-6, name


# --- in the trainer ---

FLAGS = ("--draft_global_batch_size", 4, "--draft_vocab_size", 200, "--learning_rate", 3e-3, "--save_steps", 1,
         "--save_interval", 99, "--scheduler_total_steps", 4, "--eval_steps", 2)  # fmt: skip
MUON = (*FLAGS, "--optimizer", "muon", "--muon_lr", 3e-3, "--ema_decay", 0.75)
DECAY = 0.75


def unlike(one, other, name):
    """What differs between two runs' folders of this name, bit by bit."""
    assert (one / name).exists()
    return [x for x in different(one / name, other / name) if "run.json" not in x]


@pytest.fixture(scope="module")
def runs(work, tmp_path_factory):
    """Runs of four steps: adamw; averaged, the same with an average; muon, with both."""
    folder = tmp_path_factory.mktemp("runs")
    training.run(work, folder / "adamw", *FLAGS, "--total_steps", 4)
    training.run(work, folder / "averaged", *FLAGS, "--total_steps", 4, "--ema_decay", DECAY)
    training.run(work, folder / "muon", *MUON, "--total_steps", 4)
    return folder


slow = pytest.mark.slow


@pytest.mark.parametrize("number", [2, *(pytest.param(number, marks=slow) for number in (0, 1, 3))])
def test_muon_and_the_average_resume_bit_by_bit(work, runs, tmp_path, number):
    where = ("--deepspeed_config", tmp_path / "zero0.json") if number == 0 else stage(number)
    (tmp_path / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    whole = runs / "muon"
    if number != 2:
        whole = tmp_path / "whole"
        training.run(work, whole, *MUON, *where, "--total_steps", 4)
        losses = [[row["loss"] for row in metrics(run)] for run in (whole, runs / "muon")]
        assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert training.furthest(weights(whole / "final"), weights(runs / "muon" / "final")) < 1e-5
    training.run(work, tmp_path / "out", *MUON, *where, "--total_steps", 2)
    training.run(work, tmp_path / "out", *MUON, *where, "--total_steps", 4, "--resume")
    assert unlike(tmp_path / "out", whole, "step_00000004") == []
    assert unlike(tmp_path / "out", whole, "final") == []
    assert timeless(tmp_path / "out") == timeless(whole)


def test_muon_moves_what_it_is_for(runs):
    """In the first step embedding, head and norms move by AdamW's rate, the matrices of fc and the layer do not."""
    other = weights(runs / "muon" / "step_00000001")
    for name, tensor in weights(runs / "adamw" / "step_00000001").items():
        by_muon = name.startswith(("fc.", "midlayer.")) and tensor.dim() == 2
        gap = (tensor.float() - other[name].float()).abs().mean()  # AdamW's rate is 0.003
        assert gap > 1e-3 if by_muon else gap < 1e-4, name


def test_the_average_is_saved_and_the_weights_are_trained(runs):
    """Step s of t weighs decay^(t - s); the training itself is the one without an average."""
    plain, averaged = runs / "adamw", runs / "averaged"
    steps = [weights(plain / f"step_{step:08d}") for step in range(1, 5)]
    for last in (1, 2, 4):
        found = weights(averaged / f"step_{last:08d}")
        shares = [DECAY ** (last - step) for step in range(1, last + 1)]
        for name, tensor in found.items():
            pairs = zip(shares, steps[:last], strict=True)
            mean = sum(share * step[name].double() for share, step in pairs) / sum(shares)
            assert torch.allclose(tensor.double(), mean, rtol=1e-5, atol=1e-7), name
    assert training.furthest(weights(averaged / "final"), found) == 0
    trained = [[row["loss"] for row in metrics(run) if row["split"] == "train"] for run in (plain, averaged)]
    assert trained[0] == trained[1]


def test_what_is_evaluated_is_the_average(work, runs, tmp_path):
    """The saved draft, evaluated after a step that leaves it as it is, has the loss that the training said."""
    still = ("--learning_rate", 0, "--total_steps", 1, "--resume_from_checkpoint")
    training.run(work, tmp_path, *FLAGS, *still, runs / "averaged" / "step_00000002")
    (again,) = [row["loss"] for row in metrics(tmp_path) if row["split"] == "validation"]
    said, _ = [row["loss"] for row in metrics(runs / "averaged") if row["split"] == "validation"]
    plain, _ = [row["loss"] for row in metrics(runs / "adamw") if row["split"] == "validation"]
    assert again == pytest.approx(said, rel=1e-6) and plain != pytest.approx(said, rel=1e-4)


def test_flags_of_a_start_count_and_not_those_of_the_checkpoint(work, runs, tmp_path, capsys):
    """A rate of zero leaves the weights; a training without an average that continues one with it has none."""
    shutil.copytree(runs / "muon" / "step_00000002", tmp_path / "step_00000002")
    still = ("--muon_lr", 0, "--learning_rate", 1e-30, "--ema_decay", 0, "--total_steps", 3, "--resume")
    training.run(work, tmp_path, *MUON, *still)
    assert "ema_decay 0.75 -> 0.0" in capsys.readouterr().out
    assert training.furthest(weights(tmp_path / "final"), weights(runs / "muon" / "final")) > 1e-4
    training.run(work, tmp_path, *MUON, *still, "--total_steps", 4)
    assert training.furthest(weights(tmp_path / "final"), weights(tmp_path / "step_00000003")) == 0
    held = safetensors.torch.load_file(tmp_path / "step_00000003" / "deepspeed" / "ranks.safetensors")
    assert not [name for name in held if name.startswith("same.")]


@slow
def test_two_ranks_train_and_resume_the_same(work, runs, tmp_path, capfd):
    """Muon resumes on its number of ranks, without ZeRO on any; so does AdamW, and an average."""
    two = tmp_path / "two"
    shutil.copytree(runs / "averaged" / "step_00000002", tmp_path / "moved" / "step_00000002")
    shutil.copytree(runs / "muon" / "step_00000002", tmp_path / "one" / "step_00000002")
    (tmp_path / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    zero0 = (*MUON, "--deepspeed_config", tmp_path / "zero0.json")
    training.run(work, tmp_path / "zero0", *zero0, "--total_steps", 2)
    starts = [(tmp_path / "zero0", *zero0, "--total_steps", 4, "--resume")]
    for number in (1, 2, 3):
        folder = two / str(number)
        starts.append((folder, *MUON, *stage(number), "--total_steps", 4))
        starts.append((folder / "again", *MUON, *stage(number), "--total_steps", 2))
        starts.append((folder / "again", *MUON, *stage(number), "--total_steps", 4, "--resume"))
    starts.append((tmp_path / "moved", *FLAGS, "--ema_decay", DECAY, "--total_steps", 4, "--resume"))
    starts.append((tmp_path / "one", *MUON, "--total_steps", 4, "--resume"))
    given = [training.arguments(work, *start) for start in starts]
    launch = ["torchrun", "--standalone", "--nproc_per_node", "2", tiny.LAUNCH_MANY, json.dumps(given)]
    done = subprocess.run(launch, env=tiny.environment(), capture_output=True, text=True, check=False)
    codes = [0] * (len(given) - 1) + [2]
    assert f"exit {[codes, codes]}" in done.stdout.splitlines(), done.stderr[-4000:]
    assert "on 1 ranks, not stage 2 on 2: DeepSpeed does not convert Muon's momentum" in done.stderr
    for number in (1, 2, 3):
        folder = two / str(number)
        assert training.furthest(weights(folder / "final"), weights(runs / "muon" / "final")) < 1e-5
        assert unlike(folder / "again", folder, "step_00000004") == []
        assert unlike(folder / "again", folder, "final") == []
    assert training.furthest(weights(tmp_path / "zero0" / "final"), weights(runs / "muon" / "final")) < 1e-5
    assert training.furthest(weights(tmp_path / "moved" / "final"), weights(runs / "averaged" / "final")) < 1e-5


REFUSED = [
    ("--muon_lr 0.01", "muon_lr: optimizer is adamw: give --optimizer muon, or drop it"),
    ("--muon_momentum 1", "muon_momentum 1.0 must be below 1"),
    ("--ema_decay 1", "ema_decay 1.0"),
    ("--optimizer muon --muon_ns_steps 6", "muon_ns_steps 6: DeepSpeed's Muon does 5: drop it"),
    ("--optimizer muon --max_grad_norm 1", "max_grad_norm 1.0: DeepSpeed would clip Muon's orthogonal updates"),
    ("--optimizer muon --learning_rate 0", "learning_rate 0 with optimizer muon"),
]


@pytest.mark.parametrize(("flags", "line"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(work, tmp_path, capsys, flags, line):
    assert line in training.refused(capsys, training.run, work, tmp_path / "out", *flags.split())


def test_muon_with_states_on_a_disk_is_refused(capsys):
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    line = training.refused(capsys, optimization.prepare_for_muon, "disk.json", config)
    assert line.startswith("disk.json: optimizer muon does not train with its states on nvme")


CHANGED = [  # run that is continued, flags, line
    ("adamw", MUON, "was trained with optimizer AdamW, this start means Muon with AdamW: give the same"),
    ("muon", (*MUON, "--muon_adjust_lr_fn", "original"), "with muon_adjust_lr_fn match_rms_adamw, not original: it"),
    ("adamw", (*FLAGS, "--ema_decay", DECAY), "has no average of its 2 steps: give --ema_decay 0, or start from its"),
]


@pytest.mark.parametrize(("run", "flags", "says"), CHANGED)
def test_another_optimizer_is_not_continued(work, runs, tmp_path, capsys, run, flags, says):
    shutil.copytree(runs / run / "step_00000002", tmp_path / "step_00000002")
    line = training.refused(capsys, training.run, work, tmp_path, *flags, "--total_steps", 4, "--resume")
    assert says in line


def test_deterministic_kernels_are_asked_for(work, runs, tmp_path, monkeypatch, capsys):
    """On CPUs the numbers are the same; a kernel that does not exist ends the training with a line."""
    seen = []
    step = optimization.optimizer_step

    def optimizer_step(*args):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        if len(seen) == 5:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set\nmore")
        return step(*args)

    monkeypatch.setattr(optimization, "optimizer_step", optimizer_step)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    training.run(work, tmp_path / "a", *FLAGS, "--total_steps", 4, "--deterministic")
    assert seen == [(True, ":4096:8")] * 4 and not torch.are_deterministic_algorithms_enabled()
    assert unlike(tmp_path / "a", runs / "adamw", "final") == []
    line = training.refused(capsys, training.run, work, tmp_path / "b", *FLAGS, "--total_steps", 4, "--deterministic")
    assert line.startswith("deterministic: cumsum_cuda_kernel does not have") and line.endswith(": drop the flag")
