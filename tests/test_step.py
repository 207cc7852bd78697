"""The training step computes what the loss needs, and no more: the same numbers whatever the packing, the workers, the
recomputing and the ranks; and what it keeps, waits for and multiplies, as far as a CPU can count it.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import tiny
import torch
from test_train_eagle3 import arguments, furthest, recorded_gradients, run, weights
from torch.nn.attention.flex_attention import AuxOutput
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

sys.path.insert(0, str(tiny.REPOSITORY / "benchmarks"))  # it is not a package

import step

import train_eagle3
from prepare_data import epoch_order, open_data

ZERO = {name: str(tiny.REPOSITORY / "ds_configs" / f"{name}.json") for name in ("zero2", "zero3")}
EVERY = ("--total_steps", 4, "--draft_global_batch_size", 4, "--weight_decay", 0)  # so that only a gradient moves
ROWS, TOKENS, QUERIES = 1024, 512, 128  # of draft logits, teacher logits and attention scores at a time, at most


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, prepared conversations in data/, and in bare/ rows most of which supervise no slot."""
    folder = tmp_path_factory.mktemp("step")
    tiny.write_target(folder / "target")
    tiny.write_jsonl(folder / "train.jsonl", tiny.conversations(14, 1) + tiny.conversations(3, 4))
    tiny.write_jsonl(folder / "bare.jsonl", bare_rows())
    for name, out in (("train", "data"), ("bare", "bare")):
        run(folder, folder / "initial" / name, "--dry_run", "--dataset_train_split", folder / f"{name}.jsonl", data=False)
        (folder / "initial" / name / "data").rename(folder / out)
    return folder


def bare_rows():
    """Rows for optimizer steps of four: nobody has a slot; one row has; three have; the last step has one row alone.

    A single supervised token supervises no slot: the target itself produces it.
    """
    live = [0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1]
    rows = [None] * len(live)
    for place, number in enumerate(epoch_order(len(live), 0, 0)):
        ids = torch.randint(5, 400, (20 + 5 * place,), generator=torch.Generator().manual_seed(place)).tolist()
        mask = [0] * 10 + [1] * (len(ids) - 10) if live[place] else [0] * (len(ids) - 1) + [1]
        rows[number] = {"input_ids": ids, "loss_mask": mask}
    return rows


def bare(work, output, *flags):
    return arguments(work, output, *EVERY, "--save_steps", 1, *flags, "--data_path", work / "bare", data=False)


def longest(work):
    """Tokens of the longest row of data/."""
    return open_data(work / "data")[1]["splits"]["train"]["longest"]


def metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def losses(rows):
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def ranks(work, tmp_path_factory):
    """A folder with what two ranks write, started once for all of these runs."""
    folder, budget = tmp_path_factory.mktemp("ranks"), longest(work)
    runs = {
        "plain": arguments(work, folder / "plain", *EVERY, "--deepspeed_config", ZERO["zero3"]),
        "recomputed": arguments(
            work, folder / "recomputed", *EVERY, "--gradient_checkpointing", "--deepspeed_config", ZERO["zero3"]
        ),
        "odd": arguments(work, folder / "odd", *EVERY, "--draft_global_batch_size", 3, "--total_seq_len", budget),
    }
    runs |= {name: bare(work, folder / name, "--deepspeed_config", path) for name, path in ZERO.items()}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    several = [argv + ["--dist_timeout", "1"] for argv in runs.values()]
    result = subprocess.run(
        [*launch, Path(__file__).with_name("launch_many.py"), json.dumps(several)],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"exit {[[0] * len(runs)] * 2}" in result.stdout.splitlines()
    return folder


# --- the same numbers however the work is dealt out ---


def test_a_token_budget_gives_the_gradients_of_one_sequence_at_a_time(work, tmp_path, monkeypatch):
    counts, optimizer_step = [], train_eagle3.optimizer_step

    def counting(engine, target, batches, *rest):
        counts.append(len(batches))
        return optimizer_step(engine, target, batches, *rest)

    monkeypatch.setattr(train_eagle3, "optimizer_step", counting)
    budgets, found = {"one": 0, "longest": longest(work), "larger": 5 * longest(work) // 2}, {}
    for name, budget in budgets.items():
        flags = *EVERY, "--total_steps", 5, "--total_seq_len", budget, "--batch_size", 3
        found[name] = recorded_gradients(work, tmp_path / name, monkeypatch, *flags)
    assert counts[:5] == [4, 4, 4, 4, 1]
    assert 1 < len(set(counts[5:10])) and 1 < sum(counts[10:]) < sum(counts[5:10]) < 17, "steps must differ in number"
    for name in ("longest", "larger"):
        assert losses(metrics(tmp_path / name)) == pytest.approx(losses(metrics(tmp_path / "one")), rel=1e-5)
        assert found[name].keys() == found["one"].keys()
        for tensor, gradient in found["one"].items():
            assert (found[name][tensor] - gradient).norm() < 1e-5 * gradient.norm(), (name, tensor)
        assert furthest(weights(tmp_path / name / "final"), weights(tmp_path / "one" / "final")) < 1e-4


def test_with_a_token_budget_a_step_of_three_sequences_goes_to_two_ranks(work, ranks, tmp_path):
    expected = run(work, tmp_path / "one", *EVERY, "--draft_global_batch_size", 3)
    assert losses(metrics(ranks / "odd")) == pytest.approx(losses(expected), rel=1e-5)
    assert furthest(weights(ranks / "odd" / "final"), weights(tmp_path / "one" / "final")) < 1e-4


def test_too_small_a_token_budget_is_one_line_with_both_numbers(work, tmp_path, capfd):
    tokens = longest(work)
    with pytest.raises(SystemExit) as stopped:
        run(work, tmp_path / "out", "--total_seq_len", tokens - 1)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and f"total_seq_len {tokens - 1} " in line and f" {tokens} tokens" in line
    assert not (tmp_path / "out").exists()


def test_any_number_of_workers_gives_the_same_run_to_the_last_bit(work, tmp_path):
    for name, budget in (("rows", 0), ("tokens", longest(work))):
        runs = []
        for workers in (0, 3):
            flags = "--num_workers", workers, "--prefetch_factor", 2, "--total_seq_len", budget, "--total_steps", 7
            rows = run(work, tmp_path / f"{name}{workers}", *EVERY, *flags)
            runs.append([{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows])
        assert runs[0] == runs[1]
        assert len(set(losses(runs[0]))) == 7, "steps that read the same rows show nothing"


# --- recomputing the layer ---


def test_gradient_checkpointing_recomputes_the_layer_and_changes_nothing(work, tmp_path, monkeypatch):
    calls, forward = [], train_eagle3.DraftLayer.forward

    def counting(*args, **options):
        calls.append(torch.is_grad_enabled())
        return forward(*args, **options)

    monkeypatch.setattr(train_eagle3.DraftLayer, "forward", counting)
    (tmp_path / "zero0.json").write_text("{}")
    for name, path in (("zero0", tmp_path / "zero0.json"), ("zero2", ZERO["zero2"])):
        rows, counts = [], []
        for flag in ("false", "true"):
            calls.clear()
            flags = *EVERY, "--gradient_checkpointing", flag, "--deepspeed_config", path
            rows.append(run(work, tmp_path / f"{name}{flag}", *flags))
            counts.append(sum(calls))
        assert counts[1] == 2 * counts[0] > 0, "with gradients, the layer runs once or, to be recomputed, twice"
        assert losses(rows[1]) == pytest.approx(losses(rows[0]), rel=1e-6)
        plain, recomputed = (weights(tmp_path / f"{name}{flag}" / "final") for flag in ("false", "true"))
        assert furthest(recomputed, plain) < 1e-5
        assert_all_moved(work, recomputed)


def test_gradient_checkpointing_under_zero_3_on_two_ranks_changes_nothing(work, ranks):
    assert losses(metrics(ranks / "recomputed")) == pytest.approx(losses(metrics(ranks / "plain")), rel=1e-6)
    assert furthest(weights(ranks / "recomputed" / "final"), weights(ranks / "plain" / "final")) < 1e-5
    assert_all_moved(work, weights(ranks / "recomputed" / "final"))


def assert_all_moved(work, tensors):
    """Without weight decay a tensor stays as it was initialised unless it gets a gradient."""
    initial = weights(work / "initial" / "train" / "latest")
    assert len(tensors) == 13 and tensors.keys() == initial.keys()
    still = [name for name, tensor in tensors.items() if torch.equal(tensor, initial[name])]
    assert not still, f"without gradient: {still}"


# --- ranks and steps without anything to learn from ---


def test_ranks_and_steps_without_a_supervised_slot(work, ranks, tmp_path):
    train_eagle3.main(train_eagle3.parse_args(bare(work, tmp_path / "one")))
    expected = losses(metrics(tmp_path / "one"))
    assert expected[0] == 0 and min(expected[1:]) > 0
    initial = weights(work / "initial" / "bare" / "latest")
    for output in (tmp_path / "one", ranks / "zero2", ranks / "zero3"):
        assert losses(metrics(output)) == pytest.approx(expected, rel=1e-5)
        values = [value for row in metrics(output) for value in row.values() if isinstance(value, float)]
        assert torch.tensor(values).isfinite().all()
        assert furthest(weights(output / "step_00000001"), initial) == 0, "nobody had a slot: nothing to learn from"
        for number in (2, 3, 4):
            tensors = weights(output / f"step_{number:08d}")
            assert all(tensor.isfinite().all() for tensor in tensors.values())
            assert furthest(tensors, weights(tmp_path / "one" / f"step_{number:08d}")) < 1e-4
            assert furthest(tensors, weights(output / f"step_{number - 1:08d}")) > 1e-5, "and else there was"


# --- memory ---


def make_case(masks, steps, columns, *flags):
    """A draft with random weights and both sides' arguments, for documents with these loss masks."""
    sizes = ["--hidden_size=32", "--intermediate_size=64", "--num_attention_heads=4", "--num_key_value_heads=2"]
    args = step.parse_args(["--device=cpu", "--threads=1", "--head_dim=8", *sizes, *flags])
    return step.make_case(args, step.draft_config(args, columns), masks, steps)


class Largest(TorchDispatchMode):
    """By their last size, the largest tensors that any operation returns; in elements, of the whole storage."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dim():
                size = x.untyped_storage().nbytes() // x.itemsize
                self.elements[x.shape[-1]] = max(size, self.elements.get(x.shape[-1], 0))
        return result


@pytest.mark.parametrize("kernel", [("cpu",), ()], ids=["kernel", "plain"])
def test_nothing_of_tokens_times_tokens_or_tokens_times_vocabulary_exists(kernel, monkeypatch):
    monkeypatch.setattr(train_eagle3, "MASKED_KERNEL", kernel)
    vocabulary, columns, heads, seen = 1600, 700, 4, []
    for times in (1, 2):
        lengths = [900 * times, 500 * times, 100 * times]
        masks = [step.tail(n, share) for n, share in zip(lengths, (95, 60, 100), strict=True)]
        case = make_case(masks, 4, columns, f"--vocab_size={vocabulary}")
        tokens, rows = sum(lengths), int(case["supervised"].sum())
        largest = {}
        for side in ("product", "dense")[: 3 - times]:
            with Largest() as mode:
                step.forward_backward(case, side)
            largest[side] = mode.elements
        if times == 1:  # the other form shows that the mode sees such tensors
            dense = largest["dense"]
            assert dense[tokens] >= heads * tokens**2 and dense[vocabulary] >= tokens * vocabulary
            assert dense[columns] >= tokens * columns
        product = largest["product"]
        assert max(product.values()) <= max(QUERIES * heads * max(lengths), ROWS * columns, TOKENS * vocabulary)
        assert max(product.values()) < tokens**2 and rows > 2 * ROWS and tokens > 2 * TOKENS
        assert ROWS * columns / 2 < product[columns] <= ROWS * columns
        assert TOKENS * vocabulary / 2 < product[vocabulary] <= TOKENS * vocabulary
        seen.append((product[columns], product[vocabulary]))
    assert seen[1][0] <= ROWS * columns and seen[1][1] <= TOKENS * vocabulary


def peak(side, length, *flags):
    """MiB that one forward and backward adds at its peak; the process should be a fresh one, but may measure several."""
    sizes = ["--hidden_size=192", "--intermediate_size=384", "--num_attention_heads=6", "--num_key_value_heads=3"]
    args = step.parse_args(["--device=cpu", "--threads=1", "--head_dim=32", "--vocab_size=600", *sizes, *flags])
    mask = step.tail(length, 100)
    return step.memory_alone(args, step.draft_config(args, 500), mask, 4, side) / 2**20


def test_peak_memory_grows_as_the_length_does():
    """At four times the length; the dense form's grows faster, which shows that it is the peak that is measured."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        work = (("product", 768), ("dense", 768), ("product", 3072), ("dense", 3072))
        mebibytes = [alone.submit(peak, *one).result() for one in work]
        recomputed = alone.submit(peak, "product", 3072, "--gradient_checkpointing").result()
    print(mebibytes, recomputed)
