"""A random case of the objective, the time and the peak memory of its forward and backward.

step.py imports it, and starts it as a process of its own where a measurement needs one: for peak memory, and for
another checkout. `python benchmarks/objective.py CHECKOUT` answers requests on stdin, one line of JSON each.
"""

import argparse
import ctypes
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers import dense  # noqa: E402  (tests/ is not on the path of a script that lies here)

DECAY = 0.8
MODEL_SIZES = {  # of the draft, by flag
    "hidden_size": 1024, "target_hidden_size": None, "intermediate_size": 2816, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip

# ==================== Checkouts ======================================================================================


class Tree(NamedTuple):
    """What the benchmark calls of a checkout."""

    DraftModel: type
    Head: type
    supervised_slots: object
    positions_of: object
    plan_slots: object
    keep_freed_memory: object
    loss: object  # (draft, case) -> the objective's loss, summed over slots and steps


@functools.cache
def objective_flags():
    """The objective's last argument: flags, or the decay alone in older checkouts."""
    import train_eagle3

    if not hasattr(train_eagle3, "LOSSES"):
        return DECAY
    return train_eagle3.parse_args(["--target_model_path", "-", "--ttt_step_loss_decay", str(DECAY)])


def call_objective(draft, case):
    names = ("input_ids", "position_ids", "auxiliary", "last", "head", "plan", "d2t")
    return draft(*(case[name] for name in names), objective_flags())[0]


def core_tree():
    """A checkout whose commands share core/: this one."""
    import train_eagle3
    from core import ranks, slots, target_model

    return Tree(
        DraftModel=train_eagle3.DraftModel,
        Head=target_model.Head,
        supervised_slots=slots.supervised_slots,
        positions_of=slots.positions_of,
        plan_slots=slots.plan_slots,
        keep_freed_memory=ranks.keep_freed_memory,
        loss=call_objective,
    )


def flat_tree():
    """A checkout of the layout before core/, with all modules at the root."""
    import deal_batches
    import load_target
    import run_ranks

    import train_eagle3

    return Tree(
        DraftModel=train_eagle3.DraftModel,
        Head=load_target.Head,
        supervised_slots=deal_batches.supervised_slots,
        positions_of=deal_batches.positions_of,
        plan_slots=deal_batches.plan_slots,
        keep_freed_memory=run_ranks.keep_freed_memory,
        loss=call_objective,
    )


@functools.cache
def open_tree(folder):
    """Import a checkout's modules. A process can open one checkout only: their modules have the same names."""
    sys.path.insert(0, str(folder))
    return core_tree() if (Path(folder) / "core").is_dir() else flat_tree()


# ==================== Cases ==========================================================================================


def draft_config(args, columns):
    """The draft's flat configuration for the sizes of the flags; columns: its draft vocabulary."""
    return {
        **{name: getattr(args, name) for name in MODEL_SIZES},
        "target_hidden_size": args.target_hidden_size or args.hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 131072,
        "vocab_size": args.vocab_size or 2 * columns,
        "draft_vocab_size": columns,
    }


def tail(tokens, share):
    """The loss mask of one document whose last `share` per cent are supervised."""
    count = round(tokens * share / 100)
    return [0] * (tokens - count) + [1] * count


def documents_of(lengths):
    """The number of its document for every token, int64 [T], on the CPU."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def supervised_of(masks, steps, tree=None):
    """bool [K, T] of concatenated loss masks, on the CPU."""
    tree = tree or open_tree(ROOT)
    document_ids = documents_of([len(mask) for mask in masks])
    return tree.supervised_slots(torch.tensor(sum(masks, [])), document_ids, steps)


def place(plan, device):
    """The plan's tensors on a device; a part of it may be a dictionary of such parts."""
    if torch.is_tensor(plan):
        return plan.to(device)
    if isinstance(plan, dict):
        return {key: place(part, device) for key, part in plan.items()}
    if hasattr(plan, "_fields"):
        return type(plan)(*(place(part, device) for part in plan))
    return plan


def make_draft(args, config, embedding):
    """A draft with the backend of the flags, on their device and in their dtype."""
    draft = open_tree(args.tree).DraftModel(config, embedding).to(args.device, args.dtype)
    draft.attention_backend = args.attention_backend
    draft.midlayer.gradient_checkpointing = args.gradient_checkpointing
    return draft


def make_case(args, config, masks, steps):
    """A random draft and the arguments of both sides for documents with these loss masks (lists of 0 and 1)."""
    torch.manual_seed(0)
    tree = open_tree(args.tree)
    dtype = args.dtype
    device = args.device
    lengths = [len(mask) for mask in masks]
    tokens = sum(lengths)
    vocabulary = config["vocab_size"]
    columns = config["draft_vocab_size"]
    features = config["target_hidden_size"]
    draft_ids = torch.randperm(vocabulary)[:columns].sort().values
    weight = torch.randn(vocabulary, features) * features**-0.5
    weight[draft_ids] *= 4  # a real draft vocabulary holds almost every token that the target puts first
    supervised = supervised_of(masks, steps, tree)
    embedding = torch.randn(vocabulary, config["hidden_size"])
    draft = make_draft(args, config, embedding.to(device, dtype))
    return {
        "tree": tree,
        "draft": draft,
        "plan": place(tree.plan_slots(supervised, lengths), device),
        "input_ids": torch.randint(vocabulary, (tokens,)).to(device),
        "supervised": supervised.to(device),
        "position_ids": tree.positions_of(lengths).to(device),
        "document_ids": documents_of(lengths).to(device),
        "auxiliary": torch.randn(tokens, 3 * features).to(device, dtype),
        "last": torch.randn(tokens, features).to(device, dtype),
        "head": tree.Head(weight.to(device, dtype)),
        "d2t": (draft_ids - torch.arange(columns)).to(device),
    }


def loss_of(case, side):
    """The loss of a side: "product", the trainer's objective, or "dense", the plain form."""
    if side == "product":
        return case["tree"].loss(case["draft"], case)
    names = ("input_ids", "position_ids", "document_ids", "auxiliary", "last", "head", "supervised", "d2t")
    return dense.objective(case["draft"], *(case[name] for name in names), DECAY)[0]


def forward_backward(case, side):
    case["draft"].zero_grad(set_to_none=True)
    loss = loss_of(case, side)
    loss.backward()
    return loss


# ==================== Measuring ======================================================================================


def seconds(work, device):
    """Wall-clock seconds of work(), the device's included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def time_case(case, side):
    """Seconds of one forward and backward."""
    return seconds(lambda: forward_backward(case, side), case["input_ids"].device)


def proc_bytes(path, field):
    """A field of a file of /proc in bytes: MemAvailable, VmRSS (resident now), VmHWM (its highest value so far)."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memory(case, side):
    """peak_of the loss of a side."""
    return peak_of(lambda: loss_of(case, side), case["draft"], case["input_ids"].device)


def peak_of(loss, draft, device):
    """Bytes that one forward and backward adds at its peak to weights, gradients and inputs, which exist before.

    On the CPU it is read from the highest resident size of the process, so nothing else may have run in it.
    """
    for parameter in draft.parameters():
        parameter.grad = torch.empty_like(parameter).fill_(0)  # written to: untouched zeros are not resident yet
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss().backward()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is still resident would be reused uncounted
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here (Linux, proc(5))
    before = proc_bytes("/proc/self/status", "VmRSS")
    loss().backward()
    return proc_bytes("/proc/self/status", "VmHWM") - before


def memory_alone(args, config, mask, steps, side):
    """peak_memory in this process, in which nothing else has run."""
    torch.set_num_threads(args.threads)
    # Thread pools and their stacks; on a GPU what is compiled and chosen for these very sizes.
    warm = mask if args.device.type == "cuda" else tail(16, 100)
    forward_backward(make_case(args, config, [warm], steps), side)
    return peak_memory(make_case(args, config, [mask], steps), side)


# ==================== A process of its own ===========================================================================


class Worker:
    """A process that measures one checkout; a context manager, which ends it."""

    def __init__(self, tree):
        command = [sys.executable, __file__, str(tree)]
        self.tree = tree
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()

    def measure(self, what, args, config, mask, steps, side):
        """what: "seconds" or "loss" of one forward and backward, or "memory", its peak in bytes: first request only."""
        request = {
            "what": what,
            "args": {
                "threads": args.threads,
                "device": str(args.device),
                "dtype": str(args.dtype).removeprefix("torch."),
                "attention_backend": args.attention_backend,
                "gradient_checkpointing": args.gradient_checkpointing,
            },
            "case": {"config": config, "mask": mask, "steps": steps},
            "side": side,
        }
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that measures {self.tree} ended with code {self.process.wait()}")
        return json.loads(answer)


def serve(tree):
    """Answer the requests of a Worker until its end of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    known = None
    case = None
    for line in sys.stdin:
        request = json.loads(line)
        args = argparse.Namespace(**request["args"], tree=tree)
        args.device = torch.device(args.device)
        args.dtype = getattr(torch, args.dtype)
        inputs = request["case"]
        side = request["side"]
        if request["what"] != "memory" and (request["args"], inputs) != known:
            case = None  # before the next one takes its place
            torch.set_num_threads(args.threads)
            open_tree(tree).keep_freed_memory()  # as in training
            case = make_case(args, inputs["config"], [inputs["mask"]], inputs["steps"])
            known = (request["args"], inputs)
        if request["what"] == "memory":
            answer = memory_alone(args, inputs["config"], inputs["mask"], inputs["steps"], side)
        elif request["what"] == "loss":
            answer = forward_backward(case, side).item()
        else:
            answer = time_case(case, side)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
