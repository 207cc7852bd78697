"""Time and peak memory of the training step, against a plain dense form of the same mathematics and against the floor.

In:  sizes; weights and inputs are random, nothing is read or downloaded (unless a --target_model_path is given).
Out: a Markdown table on stdout and, with --output, in a file.

    python benchmarks/step.py                       # the objective, forward and backward, over the grid of sizes
    python benchmarks/step.py objective --table --output table.md        # 1,024 tokens, K = 7, draft vocabulary 16,000
    python benchmarks/step.py objective --lengths 8192 --ttt_lengths 7 --draft_vocab_sizes 32000 --skip_dense
    python benchmarks/step.py prompt                # what longer prompts cost
    python benchmarks/step.py end_to_end            # whole optimizer steps: target, draft, optimizer, data

"dense" is tests/helpers/dense.py: every slot in every step, full logits, autograd. "product" is the draft of
train_eagle3.py. They run in turn, a round at a time, together with large matrix products of the draft's shapes; all
times are medians.

The floor is the time that the products which live slots need take at the measured rate of such matrix products.
Operations: a multiply-add counts 2; forward once, backward twice (fc once: its input needs no gradient). fc and step-0
keys and values once for every slot that a live slot sees; queries, attention over visible keys, output, MLP and head
for live slots; the target's head once for every token whose teacher is read. The halves of the query, key and value
weights that read the embedding count once a token, as it stays the same from step to step; the "naive" count has both
halves in every step. Peak memory is what the objective adds to weights, gradients and inputs.
"""

import argparse
import copy
import ctypes
import datetime
import itertools
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train_eagle3  # noqa: E402
from core import common, draft_files, ranks, slots, target_files, target_model  # noqa: E402
from helpers import dense  # noqa: E402  (neither the root nor tests/ is on the path of a script that lies here)

DECAY = 0.8
TABLE = {"shares": [100.0, 50.0, 15.0], "lengths": [1024], "ttt_lengths": [7], "draft_vocab_sizes": [16000]}
PRODUCT_ROWS = 2048  # rows of a timed matrix product at most: enough for the full rate, and its output fits memory
SCORES = 1 << 25  # attention scores of a timed product at most
PASSES = ("forward", "weight gradient", "input gradient")
COLUMNS = (
    "share %",
    "tokens",
    "K",
    "draft vocab",
    "dense s",
    "product s",
    "dense/product",
    "floor s",
    "product/floor",
    "dense MiB",
    "product MiB",
    "product/dense memory",
    "TFLOP",
    "naive TFLOP",
    "naive floor s",
)
MODEL_SIZES = {  # of the draft, by flag
    "hidden_size": 1024, "target_hidden_size": None, "intermediate_size": 2816, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
TARGETS = {  # random targets of end_to_end; cuda: the shape of Llama-3.1-8B
    "cpu": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096, "max_position_embeddings": 32768},
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072},
}  # fmt: skip

# ==================== Counting =======================================================================================


class Product(NamedTuple):
    """One kind of matrix product of the training step, summed over its steps."""

    name: str
    operations: int  # of its forward pass
    backward: int  # products of the same size in the backward pass: 2, 1 (no input gradient) or 0
    shape: tuple  # (batch, rows, in, out) of the product whose rate it is given


def count_products(config, supervised, lengths, naive=False):
    """The products that live slots need, as a list of Product; supervised bool [K, T] over documents of these lengths.

    naive: the embedding halves of query, key and value weights once a step instead of once a token.
    """
    size, inner, target_size = config["hidden_size"], config["intermediate_size"], config.get("target_hidden_size")
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    target_size, wide = target_size or size, 2 * size if naive else size
    positions, counts = slots.positions_of(lengths), supervised.sum(dim=1).tolist()
    live, rows = sum(counts), max(min(int(statistics.median(counts)), PRODUCT_ROWS), 1)
    # Slots whose step-0 keys a live slot sees; tokens that live slots put in; tokens whose key and value are needed.
    seen = torch.cat([part.flip(0).cumsum(0).flip(0) > 0 for part in supervised[0].split(lengths)])
    put_in = torch.zeros_like(seen)
    for i, live_slots in enumerate(supervised):
        put_in[1 + i :] |= live_slots[: len(live_slots) - 1 - i]
    keyed = put_in.clone()
    keyed[1:] |= seen[:-1]
    keys, read = int(seen.sum()) + live - counts[0], int(put_in.sum())
    pairs = sum(int((positions[live_slots] + 1 + i).sum()) for i, live_slots in enumerate(supervised))
    products = []

    def add(name, count, fan_in, fan_out, backward=2, shape=None):
        shape = shape or (1, rows, fan_in, fan_out)
        products.append(Product(name, 2 * count * fan_in * fan_out, backward, shape))

    q_shape, kv_shape = (1, rows, size, heads * dim), (1, rows, size, kv_heads * dim)
    add("fc", int(seen.sum()), config.get("num_aux_hidden_states", 3) * target_size, size, backward=1)
    add("q", live, wide, heads * dim, shape=q_shape)
    add("k, v", 2 * keys, wide, kv_heads * dim, shape=kv_shape)
    if not naive:
        add("q of embeddings", read, size, heads * dim, shape=q_shape)
        add("k, v of embeddings", 2 * int(keyed.sum()), size, kv_heads * dim, shape=kv_shape)
    # Scores and values, forward and backward, are six products of one size, whichever of the two is transposed.
    span = max(pairs // max(live, 1), 1)
    queries = max(min(rows, SCORES // (heads * span)), 1)
    add("attention", 2 * pairs, dim, heads, shape=(heads, queries, dim, span))
    add("o", live, heads * dim, size)
    add("gate, up", 2 * live, size, inner)
    add("down", live, inner, size)
    add("head", live, size, config["draft_vocab_size"])
    add("teacher", read, target_size, config["vocab_size"], backward=0)
    return products


def total_operations(products):
    return sum(product.operations * (1 + product.backward) for product in products)


def floor_seconds(products, rates):
    """Seconds that the products take at measured rates {(shape, pass): operations per second}."""
    kinds = [(product, name) for product in products for name in PASSES[: 1 + product.backward]]
    return sum(product.operations / rates[product.shape, name] for product, name in kinds)


def dense_memory(config, tokens, steps, dtype):
    """Bytes that the dense form needs above its inputs, estimated from what autograd keeps.

    A step keeps the attention weights [A, T, T] (in half precision the fp32 softmax and its rounded copy), the draft's
    log-probabilities and the shifted teacher [T, Vd] in fp32, and activations; at the peak come three more tensors of
    scores or logits, and the head's gradient twice. Before the first step the teacher holds the full logits twice.
    Measured at 512 to 2,048 tokens on a CPU, it was between 13 % too low and 8 % too high.
    """
    scores, size = config["num_attention_heads"] * tokens**2, config["hidden_size"]
    columns, vocabulary = tokens * config["draft_vocab_size"], tokens * config["vocab_size"]
    kept = scores * (4 if dtype == torch.float32 else 6) + 8 * columns
    kept += tokens * (18 * size + 4 * config["intermediate_size"]) * dtype.itemsize
    last = 4 * columns + 12 * max(scores, columns) + 2 * size * config["draft_vocab_size"] * dtype.itemsize
    return max(steps * kept + last, 8 * vocabulary + 8 * columns)


# ==================== Measuring ======================================================================================


def seconds(work, device):
    """Wall-clock seconds of work(), the device's included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def matrix_rate(shape, name, dtype, device):
    """Operations per second of a product of this shape, warm: the mean over as many as take 30 ms (5 ms on a GPU).

    The layouts are those of a linear layer: x W^T forward, g W for the input's gradient, g^T x for the weight's. Its
    output is there before: fresh pages of memory cost time of their own.
    """
    batch, rows, fan_in, fan_out = shape
    sizes = (batch, rows, fan_in), (batch, fan_out, fan_in), (batch, rows, fan_out)
    x, w, g = (torch.rand(size, dtype=dtype, device=device) for size in sizes)
    a, b = {"forward": (x, w.mT), "input gradient": (g, w), "weight gradient": (g.mT, x)}[name]
    multiply, a, b = (torch.mm, a[0], b[0]) if batch == 1 else (torch.bmm, a, b)
    out = multiply(a, b)
    once = seconds(lambda: multiply(a, b, out=out), device)
    repeats = max(int((0.005 if device.type == "cuda" else 0.03) / once), 1)
    took = seconds(lambda: [multiply(a, b, out=out) for _ in range(repeats)], device)
    return 2 * batch * rows * fan_in * fan_out * repeats / took


def proc_bytes(path, field):
    """A field of a file of /proc in bytes: MemAvailable, VmRSS (resident now), VmHWM (its highest value so far)."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memory(case, side):
    """Bytes that one forward and backward adds at its peak to weights, gradients and inputs, which are there before.

    On the CPU the highest resident size of the process tells, so nothing else may have run in it: it is a fresh one.
    """
    device = case["input_ids"].device
    for parameter in case["draft"].parameters():
        parameter.grad = torch.empty_like(parameter).fill_(0)  # written to: untouched zeros are not resident yet
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss_of(case, side).backward()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is still resident would be used again uncounted
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here (Linux, proc(5))
    before = proc_bytes("/proc/self/status", "VmRSS")
    loss_of(case, side).backward()
    return proc_bytes("/proc/self/status", "VmHWM") - before


def memory_alone(args, config, mask, steps, side):
    """peak_memory in a process of its own."""
    torch.set_num_threads(args.threads)
    forward_backward(make_case(args, config, [tail(16, 100)], steps), side)  # thread pools and their stacks
    return peak_memory(make_case(args, config, [mask], steps), side)


def draft_config(args, columns):
    """The draft's flat configuration for the sizes of the flags; columns: its draft vocabulary."""
    return {name: getattr(args, name) for name in MODEL_SIZES} | {
        "target_hidden_size": args.target_hidden_size or args.hidden_size, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": None, "max_position_embeddings": 131072,
        "vocab_size": args.vocab_size or 2 * columns, "draft_vocab_size": columns,
    }  # fmt: skip


def documents_of(lengths):
    """The number of its document for every token, int64 [T], on the CPU."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def supervised_of(masks, steps):
    """bool [K, T] of loss masks behind one another, on the CPU."""
    return slots.supervised_slots(torch.tensor(sum(masks, [])), documents_of([len(mask) for mask in masks]), steps)


def place(plan, device):
    """The plan's tensors on a device."""
    return type(plan)(*(x.to(device) if torch.is_tensor(x) else x for x in plan))


def make_case(args, config, masks, steps):
    """A random draft and the arguments of both sides for documents with these loss masks (lists of 0 and 1)."""
    torch.manual_seed(0)
    dtype, device, lengths = args.dtype, args.device, [len(mask) for mask in masks]
    vocabulary, columns, features = config["vocab_size"], config["draft_vocab_size"], config["target_hidden_size"]
    draft_ids = torch.randperm(vocabulary)[:columns].sort().values
    weight = torch.randn(vocabulary, features) * features**-0.5
    weight[draft_ids] *= 4  # a real draft vocabulary holds almost every token that the target puts first
    document_ids, supervised = documents_of(lengths), supervised_of(masks, steps)
    embedding = torch.randn(vocabulary, config["hidden_size"]).to(device, dtype)
    draft = train_eagle3.DraftModel(config, embedding).to(device, dtype)
    draft.attention_backend, draft.midlayer.gradient_checkpointing = args.attention_backend, args.gradient_checkpointing
    return {
        "draft": draft, "plan": place(slots.plan_slots(supervised, lengths), device),
        "input_ids": torch.randint(vocabulary, (sum(lengths),)).to(device), "supervised": supervised.to(device),
        "position_ids": slots.positions_of(lengths).to(device), "document_ids": document_ids.to(device),
        "auxiliary": torch.randn(sum(lengths), 3 * features).to(device, dtype),
        "last": torch.randn(sum(lengths), features).to(device, dtype),
        "head": target_model.Head(weight.to(device, dtype)),
        "d2t": (draft_ids - torch.arange(columns)).to(device),
    }  # fmt: skip


SIDES = {  # what each is called with, the step's weight decay aside
    "dense": ("input_ids", "position_ids", "document_ids", "auxiliary", "last", "head", "supervised", "d2t"),
    "product": ("input_ids", "position_ids", "auxiliary", "last", "head", "plan", "d2t"),
}


def loss_of(case, side):
    call = partial(dense.objective, case["draft"]) if side == "dense" else case["draft"]
    return call(*(case[name] for name in SIDES[side]), DECAY)[0]


def forward_backward(case, side):
    case["draft"].zero_grad(set_to_none=True)
    loss_of(case, side).backward()


def tail(tokens, share):
    """The loss mask of one document whose last `share` per cent are supervised."""
    count = round(tokens * share / 100)
    return [0] * (tokens - count) + [1] * count


# ==================== The objective ==================================================================================


def time_in_turn(works, products, args):
    """Run `works` {name: call} and the products in turn: median seconds, median rates {(shape, pass)}, all seconds."""
    kinds = {(product.shape, name) for product in products for name in PASSES[: 1 + product.backward]}
    taken, rates = {name: [] for name in works}, {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for name, work in works.items():
            taken[name].append(seconds(work, args.device))
        for shape, name in sorted(kinds):
            rates[shape, name].append(matrix_rate(shape, name, args.dtype, args.device))
    medians = ({key: statistics.median(values) for key, values in table.items()} for table in (taken, rates))
    return *medians, taken


def measure(args, share, length, steps, columns):
    """One row of the table as {column: value}; what was left out is None."""
    config, cuda = draft_config(args, columns), args.device.type == "cuda"
    needed = dense_memory(config, length, steps, args.dtype)
    fits = 0.9 * (torch.cuda.mem_get_info()[0] if cuda else proc_bytes("/proc/meminfo", "MemAvailable"))
    sides = ["product"] if args.skip_dense or needed >= fits else ["dense", "product"]
    case = make_case(args, config, [tail(length, share)], steps)
    small = case if cuda else make_case(args, config, [tail(min(length, 64), 100)], steps)
    for side in sides:  # thread pools; on a GPU also what is compiled and chosen for these very sizes
        forward_backward(small, side)
    counts = [count_products(config, case["supervised"].cpu(), [length], naive) for naive in (False, True)]
    works = {side: partial(forward_backward, case, side) for side in sides}
    medians, rates, _ = time_in_turn(works, counts[0], args)
    memory = {side: peak_memory(case, side) for side in sides} if cuda and not args.skip_memory else {}
    del case, small, works
    torch.cuda.empty_cache()  # for the next row; does nothing without a GPU
    for side in () if cuda or args.skip_memory else sides:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            memory[side] = alone.submit(memory_alone, args, config, tail(length, share), steps, side).result()
    row = {"share %": share, "tokens": length, "K": steps, "draft vocab": columns}
    row["dense s"] = None if needed < fits else f"needs {needed / 2**30:.1f} GiB"
    row |= {f"{side} s": value for side, value in medians.items()}
    row |= {f"{side} MiB": value / 2**20 for side, value in memory.items()}
    for name, products in zip(("", "naive "), counts, strict=True):
        row |= {f"{name}floor s": floor_seconds(products, rates), f"{name}TFLOP": total_operations(products) / 1e12}
    row["product/floor"] = row["product s"] / row["floor s"]
    if "dense" in sides:
        row["dense/product"] = row["dense s"] / row["product s"]
    if "dense" in memory:
        row["product/dense memory"] = memory["product"] / memory["dense"]
    return row


def put(args, *lines):
    """Append lines to the report, as soon as they are known: a stopped run keeps what it has measured."""
    print(*lines, sep="\n", flush=True)
    if args.output:
        with Path(args.output).open("a") as file:
            print(*lines, sep="\n", file=file)


def cells(values):
    """A row of a table: three digits for what was measured, a dash for what was not."""
    texts = []
    for value in values:
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        texts.append("-" if value is None else str(value))
    return f"| {' | '.join(texts)} |"


def put_header(args, columns, note):
    """Processor, threads, versions and date in one line; a note; the head of a table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    if args.device.type == "cuda":
        name = f"{torch.cuda.get_device_name(args.device)} (CUDA {torch.version.cuda})"
    line = (
        f"{name}, {args.threads} CPU threads, {str(args.dtype).removeprefix('torch.')}, {args.attention_backend}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today()}, "
        f"medians of {args.rounds} rounds  "
    )
    put(args, line, note, "", cells(columns), f"|{' ---: |' * len(columns)}")


def run_objective(args):
    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in (*MODEL_SIZES, "vocab_size") if getattr(args, name))
    put_header(args, COLUMNS, f"Draft: {sizes}. One sequence, its tail supervised; forward and backward.")
    grid = itertools.product(args.draft_vocab_sizes, args.ttt_lengths, args.lengths, args.shares)
    for columns, steps, length, share in grid:
        put(args, cells(map(measure(args, share, length, steps, columns).get, COLUMNS)))


def run_prompt(args):
    """Time of the draft before and after doubling the unsupervised prompt of every conversation."""
    steps, config = args.ttt_lengths[-1], draft_config(args, args.draft_vocab_sizes[-1])
    cases = {}
    for prompt in (args.prompt_length, 2 * args.prompt_length):
        masks = [[0] * prompt + [1] * args.reply_length] * args.conversations
        cases[prompt] = make_case(args, config, masks, steps)
        forward_backward(cases[prompt], "product")
    works = {prompt: partial(forward_backward, case, "product") for prompt, case in cases.items()}
    medians, _, taken = time_in_turn(works, [], args)
    columns = ("conversations", "prompt tokens", "reply tokens", "K", "product s", "fastest s", "slowest s", "ratio")
    put_header(args, columns, "Doubling the unsupervised prompt of every conversation; the draft alone.")
    for prompt, median in medians.items():
        times = median, min(taken[prompt]), max(taken[prompt]), median / medians[args.prompt_length]
        put(args, cells((args.conversations, prompt, args.reply_length, steps, *times)))


# ==================== Whole steps ====================================================================================

PHASES = ("data", "target", "draft", "optimizer")
END_COLUMNS = (
    "share %",
    "tokens a step",
    "K",
    "step s",
    "tokens/s",
    *(f"{phase} %" for phase in PHASES),
    "useful TFLOP a step",
    "TFLOP/s",
    "matrix TFLOP/s",
    "utilisation",
    "peak MiB",
)


def make_training(args):
    """Target, draft, d2t, and update(): the optimizer's step from the draft's gradients, on fp32 master weights."""
    if args.target_model_path:
        target = target_model.load(target_files.resolve_target(args.target_model_path), args.device, args.dtype)
    else:
        config = LlamaConfig(**TARGETS[args.device.type], tie_word_embeddings=False)
        with args.device:  # random weights are made where they are used
            model = AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval().requires_grad_(False)
        head, embedding = model.get_output_embeddings().weight.detach(), model.get_input_embeddings().weight.detach()
        target = target_model.Target(
            model, config, target_model.Head(head), embedding, target_files.default_layer_ids(config.num_hidden_layers)
        )
    vocabulary = len(target.embedding)
    columns = min(args.draft_vocab_sizes[-1], vocabulary)
    config, _ = draft_files.configure(target.config, target.config, draft_vocab_size=columns)
    draft = train_eagle3.DraftModel(config, target.embedding).to(args.device, args.dtype)
    draft.attention_backend, draft.midlayer.gradient_checkpointing = args.attention_backend, args.gradient_checkpointing
    d2t = (torch.randperm(vocabulary)[:columns].sort().values - torch.arange(columns)).to(args.device)
    weights = list(draft.parameters())
    masters = [weight.detach().float().clone() for weight in weights]  # fp32, as DeepSpeed keeps them
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), fused=args.device.type == "cuda")

    def update():
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    return target, draft, d2t, update


def draw_batches(target, tokens, share, count):
    """`count` micro-batches of random conversations, each (input ids, loss masks) as lists, like rows of a data set.

    A batch fills a budget of tokens with sequences of an eighth of it at most, so its length varies too.
    """
    generator, longest, batches = torch.Generator().manual_seed(0), max(tokens // 8, 8), []
    for _ in range(count):
        lengths = []
        while sum(lengths) <= tokens - longest:
            lengths.append(max(int(longest * float(torch.rand((), generator=generator)) ** 2), 8))
        rows = [torch.randint(len(target.embedding), (n,), generator=generator).tolist() for n in lengths]
        batches.append((rows, [tail(n, share) for n in lengths]))
    return batches


def time_steps(args, training, batches):
    """Seconds of one optimizer step on each of these batches: in all, and by phase.

    On a GPU the phases are read from events on its own time line, so that nothing waits between them: "data" is then
    for how long the GPU had nothing to do before the target's forward.
    """
    (target, draft, d2t, update), device, cuda, marks = training, args.device, args.device.type == "cuda", []

    def mark():
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()

    def steps():
        mark()
        for rows, masks in batches:
            lengths, supervised = [len(row) for row in rows], supervised_of(masks, args.ttt_lengths[-1])
            count, plan = max(int(supervised[0].sum()), 1), place(slots.plan_slots(supervised, lengths), device)
            input_ids, positions = torch.tensor(sum(rows, []), device=device), slots.positions_of(lengths).to(device)
            mark()
            auxiliary, last = target.hidden_states(input_ids, lengths)
            mark()
            loss = draft(input_ids, positions, auxiliary, last, target.head, plan, d2t, DECAY)[0]
            (loss / count).backward()
            mark()
            update()
            mark()

    total = seconds(steps, device)
    spans = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in itertools.pairwise(marks)]
    return total, *(sum(spans[n :: len(PHASES)]) for n in range(len(PHASES)))


def measure_steps(args, training, tokens, share):
    """One row of the end-to-end table: medians over the rounds, each of `--steps` optimizer steps."""
    target, draft, *_ = training
    batches, steps = draw_batches(target, tokens, share, args.steps), args.ttt_lengths[-1]
    size = 8192 if args.device.type == "cuda" else 2048  # of the square product whose rate is the yardstick
    time_steps(args, training, batches)  # all lengths once: compiled, chosen and allocated
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    rounds = []
    for _ in range(args.rounds):
        rate = matrix_rate((1, size, size, size), "forward", args.dtype, args.device)
        rounds.append((rate, *time_steps(args, training, batches)))
    rate, total, *spans = (statistics.median(values) for values in zip(*rounds, strict=True))
    parameters, seen, useful = sum(p.numel() for p in target.decoder.layers.parameters()), 0, 0
    for rows, masks in batches:  # useful: what live slots need, and the target's layers for every token
        lengths = [len(row) for row in rows]
        seen += sum(lengths)
        useful += total_operations(count_products(draft.config, supervised_of(masks, steps), lengths))
    useful += 2 * parameters * seen
    row = {"share %": share, "tokens a step": seen // args.steps, "K": steps, "step s": total / args.steps}
    row |= {"tokens/s": seen / total, "useful TFLOP a step": useful / args.steps / 1e12}
    row |= {f"{name} %": 100 * span / total for name, span in zip(PHASES, spans, strict=True)}
    row |= {"TFLOP/s": useful / total / 1e12, "matrix TFLOP/s": rate / 1e12, "utilisation": useful / total / rate}
    if args.device.type == "cuda":
        row["peak MiB"] = torch.cuda.max_memory_allocated(args.device) / 2**20
    return row


def compare_with_dense(args):
    """Report how far both sides in args.dtype are from the dense form in fp32 on the same rounded weights."""
    case = make_case(args, draft_config(args, 2048), [tail(n, 60) for n in (300, 7, 129)], 4)
    plain, results = copy.deepcopy(case), []
    plain["draft"].float().embedding = plain["draft"].embedding.float()
    plain["head"].weight = plain["head"].weight.float()
    plain |= {name: plain[name].float() for name in ("auxiliary", "last")}
    for inputs, side in ((plain, "dense"), (case, "dense"), (case, "product")):
        inputs["draft"].zero_grad()
        loss = loss_of(inputs, side)
        loss.backward()
        results.append([x.double() for x in (loss.detach(), *(p.grad for p in inputs["draft"].parameters()))])
    for side, found in zip(("dense", "product"), results[1:], strict=True):
        loss, *gaps = (float((a - b).norm() / b.norm()) for a, b in zip(found, results[0], strict=True))
        put(args, f"{side} in {args.dtype} against dense in fp32: loss {loss:.2g}, worst gradient {max(gaps):.2g}  ")


def run_end_to_end(args):
    training, cuda = make_training(args), args.device.type == "cuda"
    target = training[0]
    name = args.target_model_path or f"random, {target.config.num_hidden_layers} layers of {target.config.hidden_size}"
    put_header(
        args,
        END_COLUMNS,
        f"Target: {name}, {len(target.embedding)} tokens; draft vocabulary "
        f"{training[1].config['draft_vocab_size']}; packed sequences of varied lengths, their tails supervised. "
        "Data: forming and moving a batch, no prefetching.",
    )
    sizes = [(args.total_seq_len, share) for share in args.shares]
    for tokens, share in sizes + [(tokens, args.shares[0]) for tokens in (2048, 8192, 32768) if cuda]:
        put(args, cells(map(measure_steps(args, training, tokens, share).get, END_COLUMNS)))
    compiled = torch._dynamo.utils.counters["stats"]
    graphs = compiled["unique_graphs"]
    time_steps(args, training, draw_batches(target, 3 * args.total_seq_len // 4, 40, 8))
    put(args, "", f"Graphs compiled: {graphs} before 8 batches of new lengths, {compiled['unique_graphs']} after.  ")
    compare_with_dense(args)


# ==================== Command line ===================================================================================

MODES = {"objective": run_objective, "prompt": run_prompt, "end_to_end": run_end_to_end}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("mode", nargs="?", default="objective", choices=MODES, help="what to time (default: objective)")
    add("--output", help="file to write the report to as well (default: stdout alone)")
    add("--rounds", type=int, default=3, help="rounds in which the sides take turns; medians of them (default: 3)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    add(
        "--attention_backend",
        default="auto",
        choices=("auto", "sdpa", "flex_attention"),
        help="of the product (default: sdpa, on a GPU flex_attention)",
    )
    add("--gradient_checkpointing", action="store_true", help="the product recomputes the layer in its backward pass")
    add = parser.add_argument_group("sizes, a list giving a grid").add_argument
    add("--shares", type=float, nargs="+", default=TABLE["shares"], help="supervised per cent (default: 100 50 15)")
    add("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens (objective; default: 512 2048 8192)")
    add("--ttt_lengths", type=int, nargs="+", default=[3, 7], help="steps K; other modes take the last (default: 3 7)")
    add(
        "--draft_vocab_sizes",
        type=int,
        nargs="+",
        default=[16000, 32000],
        help="draft vocabularies; other modes take the last (default: 16000 32000)",
    )
    add("--vocab_size", type=int, help="full vocabulary (default: twice the draft vocabulary)")
    add("--table", action="store_true", help="instead: 1,024 tokens, K 7, draft vocabulary 16000, all shares")
    add("--skip_dense", action="store_true", help="time the product alone, for sizes that dense takes too long for")
    add("--skip_memory", action="store_true", help="do not measure memory (on a CPU it takes a process a side)")
    for name, default in MODEL_SIZES.items():
        add(f"--{name}", type=int, default=default, help=f"of the draft (default: {default or 'hidden_size'})")
    add = parser.add_argument_group("prompt").add_argument
    add("--conversations", type=int, default=4, help="packed behind one another (default: 4)")
    add("--prompt_length", type=int, default=256, help="tokens, before doubling (default: 256)")
    add("--reply_length", type=int, default=256, help="supervised tokens (default: 256)")
    add = parser.add_argument_group("end_to_end").add_argument
    add("--target_model_path", help="folder or hub id (default: random, on a GPU of Llama-3.1-8B's shape)")
    add("--total_seq_len", type=int, help="tokens a step at most (default: 2048, on a GPU 16384)")
    add("--steps", type=int, default=5, help="optimizer steps a round (default: 5)")
    parser.error = common.fail
    args = parser.parse_args(argv)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(default if args.device == "auto" else args.device)
    cuda = args.device.type == "cuda"
    args.dtype = getattr(torch, ("bfloat16" if cuda else "float32") if args.dtype == "auto" else args.dtype)
    if args.attention_backend == "auto":
        args.attention_backend = "flex_attention" if cuda else "sdpa"
    args.total_seq_len = args.total_seq_len or (16384 if cuda else 2048)
    vars(args).update(TABLE if args.table else {})
    return args


def main(args):
    torch.set_num_threads(args.threads)
    ranks.keep_freed_memory()  # as in training
    if args.output:
        Path(args.output).write_text("")
    MODES[args.mode](args)


if __name__ == "__main__":
    main(parse_args())
