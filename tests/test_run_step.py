"""The training step computes what the loss needs, and no more: the same numbers whatever the packing, the workers, the
recomputing and the ranks; and what it keeps, waits for and multiplies, as far as a CPU can count it.
"""

import contextlib
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import AuxOutput
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from helpers import tiny, training
from helpers.training import arguments, furthest, metrics, recorded_gradients, run, weights

sys.path.insert(0, str(tiny.REPOSITORY / "benchmarks"))  # it is not a package

import objective
import operations
import step

import train_eagle3
from core import attention, dataloader, optimization, states

ZERO = {name: str(tiny.REPOSITORY / "ds_configs" / f"{name}.json") for name in ("zero2", "zero3")}
EVERY = ("--total_steps", 4, "--draft_global_batch_size", 4, "--weight_decay", 0)  # so that only a gradient moves
ROWS, TOKENS, QUERIES = 1024, 512, 128  # of draft logits, teacher logits and attention scores at a time, at most


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, prepared conversations in data/, and in bare/ rows that mostly supervise no slot."""
    rows = tiny.conversations(14, 1) + tiny.conversations(3, 2)
    folder = training.write_workspace(tmp_path_factory.mktemp("step"), rows, validation=())
    tiny.write_jsonl(folder / "bare.jsonl", bare_rows())
    run(folder, folder / "initial", "--dry_run", "--dataset_train_split", folder / "bare.jsonl", data=False)
    (folder / "initial" / "data").rename(folder / "bare")
    return folder


def bare_rows():
    """Rows for optimizer steps of four: nobody has a slot; one row has; three have; the last step has one row alone.

    A single supervised token supervises no slot: the target itself produces it.
    """
    live = [0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1]
    rows = [None] * len(live)
    for place, number in enumerate(np.random.RandomState([0, 0]).permutation(len(live))):
        ids = torch.randint(5, 400, (20 + 5 * place,), generator=torch.Generator().manual_seed(place)).tolist()
        mask = [0] * 10 + [1] * (len(ids) - 10) if live[place] else [0] * (len(ids) - 1) + [1]
        rows[number] = {"input_ids": ids, "loss_mask": mask}
    return rows


def bare(work, output, *flags):
    return arguments(work, output, *EVERY, "--save_steps", 1, *flags, "--data_path", work / "bare", data=False)


def longest(work):
    """Tokens of the longest row of data/."""
    return dataloader.open_data(work / "data")[1]["splits"]["train"]["longest"]


def losses(rows):
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def ranks(work, tmp_path_factory):
    """A folder with what two ranks write, started once for all of these runs."""
    folder, budget = tmp_path_factory.mktemp("ranks"), longest(work)
    runs = {
        "plain": arguments(work, folder / "plain", *EVERY, "--deepspeed_config", ZERO["zero3"]),
        "recomputed": arguments(work, folder / "recomputed", *EVERY, "--deepspeed_config", ZERO["zero3"],
                                "--gradient_checkpointing"),
        "odd": arguments(work, folder / "odd", *EVERY, "--draft_global_batch_size", 3, "--total_seq_len", budget),
    }  # fmt: skip
    runs |= {name: bare(work, folder / name, "--deepspeed_config", path) for name, path in ZERO.items()}
    several = [argv + ["--dist_timeout", "1"] for argv in runs.values()]
    tiny.launch_many(2, several)
    return folder


# --- the same numbers however the work is dealt out ---


def test_a_token_budget_gives_the_gradients_of_one_sequence_at_a_time(work, tmp_path, monkeypatch):
    counts, optimizer_step = [], optimization.optimizer_step

    def counting(engine, batches, *rest):
        counts.append(len(batches))
        return optimizer_step(engine, batches, *rest)

    monkeypatch.setattr(optimization, "optimizer_step", counting)
    budgets, found = {"one": 0, "longest": longest(work), "larger": 5 * longest(work) // 2}, {}
    for name, budget in budgets.items():
        flags = *EVERY, "--total_steps", 5, "--total_seq_len", budget, "--batch_size", 3
        found[name] = recorded_gradients(work, tmp_path / name, monkeypatch, *flags)
    assert counts[:5] == [4, 4, 4, 4, 1]
    assert counts[5] < 4 and len(set(counts[5:9])) > 1 and sum(counts[10:]) < sum(counts[5:10]), "steps must differ"
    for name in ("longest", "larger"):
        assert losses(metrics(tmp_path / name)) == pytest.approx(losses(metrics(tmp_path / "one")), rel=1e-5)
        assert found[name].keys() == found["one"].keys()
        for tensor, gradient in found["one"].items():
            assert (found[name][tensor] - gradient).norm() < 1e-5 * gradient.norm(), (name, tensor)
        assert furthest(weights(tmp_path / name / "final"), weights(tmp_path / "one" / "final")) < 1e-4


@pytest.mark.slow
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
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


@pytest.mark.slow
def test_gradient_checkpointing_under_zero_3_on_two_ranks_changes_nothing(work, ranks):
    assert losses(metrics(ranks / "recomputed")) == pytest.approx(losses(metrics(ranks / "plain")), rel=1e-6)
    assert furthest(weights(ranks / "recomputed" / "final"), weights(ranks / "plain" / "final")) < 1e-5
    assert_all_moved(work, weights(ranks / "recomputed" / "final"))


def assert_all_moved(work, tensors):
    """Without weight decay a tensor stays as it was initialised unless it gets a gradient."""
    initial = weights(work / "initial" / "latest")
    assert len(tensors) == 13 and tensors.keys() == initial.keys()
    still = [name for name, tensor in tensors.items() if torch.equal(tensor, initial[name])]
    assert not still, f"without gradient: {still}"


# --- ranks and steps without anything to learn from ---


@pytest.mark.slow
def test_ranks_and_steps_without_a_supervised_slot(work, ranks, tmp_path):
    train_eagle3.main(train_eagle3.parse_args(bare(work, tmp_path / "one")))
    expected = losses(metrics(tmp_path / "one"))
    assert expected[0] == 0 and min(expected[1:]) > 0
    initial = weights(work / "initial" / "latest")
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
    return objective.make_case(args, objective.draft_config(args, columns), masks, steps)


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
    monkeypatch.setattr(attention, "MASKED_KERNEL", kernel)
    vocabulary, columns, heads = 801, 301, 4
    for times, steps in ((1, 4), (2, 4), (2, 1)):  # what is as wide as a vocabulary does not grow with the length
        lengths = [900 * times, 500 * times, 100 * times]
        masks = [objective.tail(n, share) for n, share in zip(lengths, (95, 60, 100), strict=True)]
        case = make_case(masks, steps, columns, f"--vocab_size={vocabulary}")
        tokens, scores = sum(lengths), QUERIES * heads * max(lengths)
        with Largest() as mode:
            objective.forward_backward(case, "product")
        largest = mode.elements
        assert max(largest.values()) <= scores < tokens**2 / 4
        assert kernel or max(largest.values()) > scores / 2, "the mode must see the scores"
        assert ROWS * columns / 2 <= largest[columns] <= ROWS * columns < case["supervised"].sum() * columns / 2
        assert TOKENS * vocabulary / 2 < largest[vocabulary] <= TOKENS * vocabulary < tokens * vocabulary / 2
        if times == 1:  # the dense form has what is looked for
            with Largest() as mode:
                objective.forward_backward(case, "dense")
            assert mode.elements[tokens] >= heads * tokens**2
            assert mode.elements[columns] >= tokens * columns and mode.elements[vocabulary] >= tokens * vocabulary


def peak(side, length, *flags):
    """MiB that one forward and backward adds at its peak; for a process in which nothing else has run."""
    sizes = ["--hidden_size=192", "--intermediate_size=512", "--num_attention_heads=6", "--num_key_value_heads=3"]
    sizes += ["--head_dim=32", "--vocab_size=600", "--shares=100"]
    args = step.parse_args(["--device=cpu", "--threads=1", *sizes, *flags])
    return (
        objective.memory_alone(args, objective.draft_config(args, 500), objective.tail(length, args.shares[0]), 5, side)
        / 2**20
    )


@pytest.fixture(scope="module")
def peaks():
    """MiB by what is measured, in a process of its own."""
    cases = {
        "short": ("product", 512), "long": ("product", 2048), "half": ("product", 2048, "--shares=50"),
        "recomputed": ("product", 2048, "--gradient_checkpointing"), "dense short": ("dense", 512),
        "dense long": ("dense", 2048),
    }  # fmt: skip
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return {name: alone.submit(peak, *case).result() for name, case in cases.items()}


@pytest.mark.slow
def test_peak_memory_grows_as_the_length_does(peaks):
    """At four times the length; the dense form's grows faster, which shows that it is the peak that is measured."""
    assert peaks["short"] > 40 and peaks["long"] < 4.6 * peaks["short"], peaks
    assert peaks["dense long"] > 6 * peaks["dense short"], peaks
    assert peaks["half"] < peaks["dense long"] / 4, peaks


@pytest.mark.slow
def test_gradient_checkpointing_lowers_the_peak(peaks):
    assert peaks["recomputed"] < 0.85 * peaks["long"], peaks


# --- waiting for the device ---

WAITING_OPERATIONS = {  # their result, or its size, is needed on the CPU before the program can go on
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_consecutive", "unique_dim",
    "equal", "bincount", "repeat_interleave",
}  # fmt: skip
WAITING_CALLS = ("tolist", "numpy", "__array__", "cpu")  # on a CPU no operation tells of them


class NoWaitingOperation(TorchDispatchMode):
    """Refuses operations, also those of the backward pass, that on a GPU make the program wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING_OPERATIONS or "output_size" in (kwargs or {}), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masked = any(index is not None and index.dtype == torch.bool for index in args[1])
            assert not masked, f"{name} with a mask"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting():
    """In here a program fails that would wait for a GPU."""
    with pytest.MonkeyPatch.context() as patch, NoWaitingOperation():
        for name in WAITING_CALLS:
            patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
        yield


def unwatched(call):
    """call without that watch: what other libraries do is not looked at."""

    def wrapper(*args, **kwargs):
        with _disable_current_modes():
            return call(*args, **kwargs)

    return wrapper


def flex_by_mask(q, k, v, block_mask, enable_gqa, return_aux):
    """FlexAttention has no backward on CPUs: its mask's rule for every pair, in plain torch."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    seen = block_mask.mask_mod(0, 0, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]))
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, AuxOutput(lse=scores.logsumexp(-1))


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa without a kernel", "flex_attention"])
def test_the_objective_never_waits_for_the_device(backend, checkpointing, monkeypatch):
    monkeypatch.setattr(attention, "flex_attention", flex_by_mask)
    if backend == "sdpa without a kernel":
        monkeypatch.setattr(attention, "MASKED_KERNEL", ())
    masks = [objective.tail(150, 90), objective.tail(40, 50), [0] * 9, [1, 1, 1, 0] * 10]
    case = make_case(masks, 4, 60, f"--attention_backend={backend.split()[0]}")
    case["draft"].midlayer.gradient_checkpointing = checkpointing == "true"
    with no_waiting():
        objective.forward_backward(case, "product")
    assert all(p.grad.norm() > 0 for p in case["draft"].parameters())


def test_an_optimizer_step_never_waits_for_the_device(work, tmp_path, monkeypatch):
    """Apart from what transformers does in the target's layers and DeepSpeed in the backward pass and the update."""
    optimizer_step, seen = optimization.optimizer_step, []

    opened = []

    def watched(engine, batches, *rest):
        seen.append(len(batches))
        (source,) = opened
        with monkeypatch.context() as patch, no_waiting():
            for owner, name in ((source.target.decoder, "forward"), (engine, "backward"), (engine, "step")):
                patch.setattr(owner, name, unwatched(getattr(owner, name)))
            return optimizer_step(engine, batches, *rest)

    open_source = states.open_source
    monkeypatch.setattr(states, "open_source", lambda *args: opened.append(open_source(*args)) or opened[0])
    monkeypatch.setattr(optimization, "optimizer_step", watched)
    run(work, tmp_path / "out", *EVERY, "--draft_micro_batch_size", 2)
    assert seen == [2] * 4


def test_the_watch_notices_what_waits():
    x = torch.arange(4.0)
    for wait in (
        lambda: x[0].item(), lambda: x.tolist(), lambda: bool(x[0]), lambda: int(x[0]), lambda: float(x[0]),
        lambda: range(9)[x.long()[1]], lambda: x.nonzero(), lambda: x[x > 1], lambda: x.masked_select(x > 1),
        lambda: x.unique(), lambda: x.numpy(), lambda: np.asarray(x), lambda: x.cpu(), lambda: torch.where(x > 1),
        lambda: x.repeat_interleave(x.long()), lambda: x.index_put((x > 1,), x[0]),
    ):  # fmt: skip
        with pytest.raises((AssertionError, pytest.fail.Exception)), no_waiting():
            wait()


# --- work ---


def executed_operations(case, side):
    """Floating-point operations of the matrix products of forward and backward."""

    def in_place(base, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        objective.forward_backward(case, side)
    return counter.get_total_flops()


def test_only_what_the_loss_needs_is_multiplied(monkeypatch):
    """Doubling the prompts adds little, and few supervised tokens are little work; for the dense form neither holds."""
    monkeypatch.setattr(attention, "MASKED_KERNEL", ())  # the kernel's products are not counted
    sizes, done = ["--hidden_size=64", "--intermediate_size=256", "--head_dim=16", "--vocab_size=4000"], []
    for masks in ([objective.tail(128, 50)] * 4, [[0] * 64 + objective.tail(128, 50)] * 4, [objective.tail(512, 15)]):
        case = make_case(masks, 7, 2000, *sizes)
        lengths = [len(mask) for mask in masks]
        needed = operations.total_operations(
            operations.count_products(case["draft"].config, case["supervised"], lengths)
        )
        done.append({side: executed_operations(case, side) for side in ("product", "dense")})
        assert needed <= done[-1]["product"] < 1.1 * needed, "less would be a count that misses something"
    short, long, few = done
    assert long["product"] < 1.1 * short["product"] and long["dense"] > 1.5 * short["dense"]
    assert few["product"] < few["dense"] / 4
