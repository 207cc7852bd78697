"""Time and peak memory of the training step, against a plain dense form of the same mathematics and against the floor.

In:  sizes; weights and inputs are random, nothing is read or downloaded (unless a --target_model_path is given).
Out: a Markdown table on stdout and, with --output, in a file.

    python benchmarks/step.py                       # the objective, forward and backward, over the grid of sizes
    python benchmarks/step.py objective --table --output table.md        # 1,024 tokens, K = 7, draft vocabulary 16,000
    python benchmarks/step.py objective --lengths 8192 --ttt_lengths 7 --draft_vocab_sizes 32000 --skip_dense
    python benchmarks/step.py objective --table --rounds 5 --other ../before    # against another checkout
    python benchmarks/step.py prompt                # what longer prompts cost
    python benchmarks/step.py end_to_end            # complete optimizer steps: target, draft, optimizer, data

"dense" is tests/helpers/dense.py: every slot in every step, full logits, autograd. "product" is the draft of
train_eagle3.py. They run in turn, a round at a time, together with large matrix products of the draft's shapes; all
times are medians. The floor is the time that the products which live slots need take at the measured rate of such
matrix products; operations.py counts them. Peak memory is what the objective adds to weights, gradients and inputs.

With --other, the objective of this checkout and of another one are measured in turn, each in a process of its own,
rounds alternating, in float32 and bfloat16 unless a --dtype is given.
"""

import argparse
import copy
import datetime
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import objective  # noqa: E402  (the root is not on the path of a script that lies here)
import operations  # noqa: E402

from core import common, draft_config, draft_keys, ranks, slots, target_files, target_model  # noqa: E402

TABLE = {
    "shares": [100.0, 50.0, 15.0],
    "lengths": [1024],
    "ttt_lengths": [7],
    "draft_vocab_sizes": [16000],
}
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
OTHER_COLUMNS = (
    "dtype",
    "share %",
    "tokens",
    "K",
    "draft vocab",
    "this s",
    "other s",
    "this/other",
    "this MiB",
    "other MiB",
    "memory this/other",
    "loss difference",
)
PROMPT_COLUMNS = (
    "conversations",
    "prompt tokens",
    "reply tokens",
    "K",
    "product s",
    "fastest s",
    "slowest s",
    "ratio",
)
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
TARGETS = {  # random targets of end_to_end; cuda: the shape of Llama-3.1-8B
    "cpu": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096, "max_position_embeddings": 32768},
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072},
}  # fmt: skip

# ==================== Measuring ======================================================================================


def matrix_rate(shape, name, dtype, device):
    """Operations per second of a product of this shape, warm: the mean over as many as take 30 ms (5 ms on a GPU).

    The layouts are those of a linear layer: x W^T forward, g W for the input's gradient, g^T x for the weight's. The
    output is allocated before: fresh pages of memory cost time of their own.
    """
    batch, rows, fan_in, fan_out = shape
    x = torch.rand(batch, rows, fan_in, dtype=dtype, device=device)
    w = torch.rand(batch, fan_out, fan_in, dtype=dtype, device=device)
    g = torch.rand(batch, rows, fan_out, dtype=dtype, device=device)
    factors = {
        "forward": (x, w.mT),
        "input gradient": (g, w),
        "weight gradient": (g.mT, x),
    }
    a, b = factors[name]
    multiply = torch.bmm
    if batch == 1:
        multiply = torch.mm
        a = a[0]
        b = b[0]
    out = multiply(a, b)

    def work(repeats=1):
        for _ in range(repeats):
            multiply(a, b, out=out)

    once = objective.seconds(work, device)
    budget = 0.005 if device.type == "cuda" else 0.03
    repeats = max(int(budget / once), 1)
    took = objective.seconds(lambda: work(repeats), device)
    return 2 * batch * rows * fan_in * fan_out * repeats / took


def time_in_turn(works, products, args):
    """Run `works` {name: (case, side)} and the products in turn: all seconds by name, median rates {(shape, pass)}."""
    kinds = sorted({(product.shape, name) for product in products for name in product.passes})
    taken = {name: [] for name in works}
    rates = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for name, (case, side) in works.items():
            taken[name].append(objective.time_case(case, side))
        for shape, name in kinds:
            rates[shape, name].append(matrix_rate(shape, name, args.dtype, args.device))
    return taken, medians(rates)


def medians(table):
    return {key: statistics.median(values) for key, values in table.items()}


def memory_of(args, tree, *case):
    """peak_memory in a new process, in MiB; case: draft configuration, loss mask, steps, side."""
    with objective.Worker(tree) as worker:
        return worker.measure("memory", args, *case) / 2**20


# ==================== Reporting ======================================================================================


def put(args, *lines):
    """Append lines to the report as soon as they are known: a stopped run keeps what it has measured."""
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


def put_row(args, columns, row):
    put(args, cells(row.get(column) for column in columns))


def dtype_names(args):
    return ", ".join(draft_keys.dtype_name(dtype) for dtype in args.dtypes)


def put_header(args, columns, note):
    """Processor, threads, versions and date in one line; a note; the head of a table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    if args.device.type == "cuda":
        name = f"{torch.cuda.get_device_name(args.device)} (CUDA {torch.version.cuda})"
    line = (
        f"{name}, {args.threads} CPU threads, {dtype_names(args)}, {args.attention_backend}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today()}, "
        f"medians of {args.rounds} rounds  "
    )
    put(args, line, note, "", cells(columns), f"|{' ---: |' * len(columns)}")


# ==================== The objective ==================================================================================


def measure(args, share, length, steps, columns):
    """One row of the table as {column: value}; what was left out is None."""
    config = objective.draft_config(args, columns)
    cuda = args.device.type == "cuda"
    mask = objective.tail(length, share)
    needed = operations.dense_memory(config, length, steps, args.dtype)
    free = torch.cuda.mem_get_info()[0] if cuda else objective.proc_bytes("/proc/meminfo", "MemAvailable")
    fits = needed < 0.9 * free
    sides = ["dense", "product"] if fits and not args.skip_dense else ["product"]
    case = objective.make_case(args, config, [mask], steps)
    warm = case  # what a GPU compiles and chooses for these very sizes
    if not cuda:  # thread pools
        short = objective.tail(min(length, 64), 100)
        warm = objective.make_case(args, config, [short], steps)
    for side in sides:
        objective.forward_backward(warm, side)
    supervised = case["supervised"].cpu()
    strict = operations.count_products(config, supervised, [length])
    naive = operations.count_products(config, supervised, [length], naive=True)
    taken, rates = time_in_turn({side: (case, side) for side in sides}, strict, args)
    del case, warm
    torch.cuda.empty_cache()  # for the next row; does nothing without a GPU
    row = {"share %": share, "tokens": length, "K": steps, "draft vocab": columns}
    row["dense s"] = None if fits else f"needs {needed / 2**30:.1f} GiB"
    row |= {f"{side} s": value for side, value in medians(taken).items()}
    row["floor s"] = operations.floor_seconds(strict, rates)
    row["TFLOP"] = operations.total_operations(strict) / 1e12
    row["naive floor s"] = operations.floor_seconds(naive, rates)
    row["naive TFLOP"] = operations.total_operations(naive) / 1e12
    row["product/floor"] = row["product s"] / row["floor s"]
    if not args.skip_memory:
        for side in sides:
            row[f"{side} MiB"] = memory_of(args, ROOT, config, mask, steps, side)
    if "dense" in sides:
        row["dense/product"] = row["dense s"] / row["product s"]
    if "dense MiB" in row:
        row["product/dense memory"] = row["product MiB"] / row["dense MiB"]
    return row


def sizes_of(args):
    """Every (draft vocabulary, steps, tokens, supervised share) of the grid."""
    return itertools.product(args.draft_vocab_sizes, args.ttt_lengths, args.lengths, args.shares)


def describe_draft(args):
    names = (*objective.MODEL_SIZES, "vocab_size")
    return ", ".join(f"{name} {getattr(args, name)}" for name in names if getattr(args, name))


def run_objective(args):
    if args.other:
        run_other(args)
        return
    note = f"Draft: {describe_draft(args)}. One sequence, its tail supervised; forward and backward."
    put_header(args, COLUMNS, note)
    for columns, steps, length, share in sizes_of(args):
        put_row(args, COLUMNS, measure(args, share, length, steps, columns))


def measure_pair(args, workers, config, mask, steps):
    """The columns of one case that are measured, for workers {name: Worker}."""
    case = (config, mask, steps, "product")
    losses = {}
    for name, worker in workers.items():  # the warm-up too
        losses[name] = worker.measure("loss", args, *case)
    taken = {name: [] for name in workers}
    for number in range(args.rounds):
        order = list(workers)
        if number % 2:  # neither is always the first of a round
            order.reverse()
        for name in order:
            taken[name].append(workers[name].measure("seconds", args, *case))
    row = {f"{name} s": value for name, value in medians(taken).items()}
    row["this/other"] = row["this s"] / row["other s"]
    row["loss difference"] = abs(losses["this"] / losses["other"] - 1)
    if not args.skip_memory:
        for name, worker in workers.items():
            row[f"{name} MiB"] = memory_of(args, worker.tree, *case)
        row["memory this/other"] = row["this MiB"] / row["other MiB"]
    return row


def run_other(args):
    """The objective of this checkout and of --other in turn."""
    note = f"Draft: {describe_draft(args)}. One sequence, its tail supervised; this: {ROOT}, other: {args.other}."
    put_header(args, OTHER_COLUMNS, note)
    with objective.Worker(ROOT) as this, objective.Worker(args.other) as other:
        for dtype in args.dtypes:
            args = argparse.Namespace(**{**vars(args), "dtype": dtype})
            for columns, steps, length, share in sizes_of(args):
                row = {"dtype": draft_keys.dtype_name(dtype)}
                row |= {"share %": share, "tokens": length, "K": steps, "draft vocab": columns}
                config = objective.draft_config(args, columns)
                mask = objective.tail(length, share)
                row |= measure_pair(args, {"this": this, "other": other}, config, mask, steps)
                put_row(args, OTHER_COLUMNS, row)


def run_prompt(args):
    """Time of the draft before and after doubling the unsupervised prompt of every conversation."""
    steps = args.ttt_lengths[-1]
    config = objective.draft_config(args, args.draft_vocab_sizes[-1])
    works = {}
    for prompt in (args.prompt_length, 2 * args.prompt_length):
        masks = [[0] * prompt + [1] * args.reply_length] * args.conversations
        case = objective.make_case(args, config, masks, steps)
        objective.forward_backward(case, "product")
        works[prompt] = (case, "product")
    taken, _ = time_in_turn(works, [], args)
    put_header(args, PROMPT_COLUMNS, "Doubling the unsupervised prompt of every conversation; the draft alone.")
    first = statistics.median(taken[args.prompt_length])
    for prompt, times in taken.items():
        median = statistics.median(times)
        sizes = (args.conversations, prompt, args.reply_length, steps)
        put(args, cells((*sizes, median, min(times), max(times), median / first)))


# ==================== Complete steps =================================================================================


class Training:
    """A target, a draft, and the optimizer's step on fp32 master weights, as DeepSpeed keeps them."""

    def __init__(self, args):
        self.target = load_target(args)
        vocabulary = len(self.target.embedding)
        columns = min(args.draft_vocab_sizes[-1], vocabulary)
        text_config = self.target.config
        config, _ = draft_config.configure(text_config, text_config, draft_vocab_size=columns)
        self.draft = objective.make_draft(args, config, self.target.embedding)
        draft_ids = torch.randperm(vocabulary)[:columns].sort().values
        self.d2t = (draft_ids - torch.arange(columns)).to(args.device)
        self.weights = list(self.draft.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=1e-4,
            betas=(0.9, 0.95),
            fused=args.device.type == "cuda",
        )

    def update(self):
        """The optimizer's step, from the draft's gradients."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def load_target(args):
    if args.target_model_path:
        return target_model.load(target_files.resolve_target(args.target_model_path), args.device, args.dtype)
    config = LlamaConfig(**TARGETS[args.device.type], tie_word_embeddings=False)
    with args.device:  # random weights are made where they are used
        model = AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval().requires_grad_(False)
    head = target_model.Head(model.get_output_embeddings().weight.detach())
    embedding = model.get_input_embeddings().weight.detach()
    layer_ids = target_files.default_layer_ids(config.num_hidden_layers)
    return target_model.Target(model, config, head, embedding, layer_ids, packs=True)


def draw_batches(target, tokens, share, count):
    """`count` micro-batches of random conversations, each (input ids, loss masks) as lists, like rows of a data set.

    A batch fills a budget of tokens with sequences of an eighth of it at most, so its length varies too.
    """
    generator = torch.Generator().manual_seed(0)
    longest = max(tokens // 8, 8)
    batches = []
    for _ in range(count):
        lengths = []
        while sum(lengths) <= tokens - longest:
            share_of_longest = float(torch.rand((), generator=generator)) ** 2
            lengths.append(max(int(longest * share_of_longest), 8))
        rows = []
        for length in lengths:
            ids = torch.randint(len(target.embedding), (length,), generator=generator)
            rows.append(ids.tolist())
        batches.append((rows, [objective.tail(n, share) for n in lengths]))
    return batches


class Clock:
    """Marks between phases. On a GPU they are events on its own time line, so that nothing waits between phases."""

    def __init__(self, cuda):
        self.cuda = cuda
        self.marks = []

    def mark(self):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self):
        """Seconds between the marks."""
        pairs = itertools.pairwise(self.marks)
        if self.cuda:
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def run_step(args, training, clock, rows, masks):
    """One optimizer step on one micro-batch, marking the end of each phase."""
    lengths = [len(row) for row in rows]
    supervised = objective.supervised_of(masks, args.ttt_lengths[-1])
    case = {
        "plan": objective.place(slots.plan_slots(supervised, lengths), args.device),
        "input_ids": torch.tensor(sum(rows, []), device=args.device),
        "position_ids": slots.positions_of(lengths).to(args.device),
        "head": training.target.head,
        "d2t": training.d2t,
    }
    clock.mark()
    case["auxiliary"], case["last"] = training.target.hidden_states(case["input_ids"], lengths)
    clock.mark()
    loss = objective.open_tree(ROOT).loss(training.draft, case)
    loss = loss / max(int(supervised[0].sum()), 1)
    loss.backward()
    clock.mark()
    training.update()
    clock.mark()


def time_steps(args, training, batches):
    """Seconds of one optimizer step on each of these batches: in all, and by phase.

    On a GPU "data" is for how long it had nothing to do before the target's forward.
    """
    clock = Clock(args.device.type == "cuda")

    def steps():
        clock.mark()
        for rows, masks in batches:
            run_step(args, training, clock, rows, masks)

    total = objective.seconds(steps, args.device)
    spans = torch.tensor(clock.spans()).view(-1, len(PHASES))
    return total, *spans.sum(dim=0).tolist()


def useful_operations(args, training, batches):
    """What live slots need, and the target's layers for every token."""
    layers = training.target.decoder.layers
    parameters = sum(parameter.numel() for parameter in layers.parameters())
    useful = 0
    for rows, masks in batches:
        lengths = [len(row) for row in rows]
        supervised = objective.supervised_of(masks, args.ttt_lengths[-1])
        products = operations.count_products(training.draft.config, supervised, lengths)
        useful += operations.total_operations(products) + 2 * parameters * sum(lengths)
    return useful


def measure_steps(args, training, tokens, share):
    """One row of the end-to-end table: medians over the rounds, each of `--steps` optimizer steps."""
    batches = draw_batches(training.target, tokens, share, args.steps)
    cuda = args.device.type == "cuda"
    size = 8192 if cuda else 2048  # of the square product whose rate is the yardstick
    time_steps(args, training, batches)  # all lengths once: compiled, chosen and allocated
    if cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    rounds = []
    for _ in range(args.rounds):
        rate = matrix_rate((1, size, size, size), "forward", args.dtype, args.device)
        rounds.append((rate, *time_steps(args, training, batches)))
    rate, total, *spans = (statistics.median(values) for values in zip(*rounds, strict=True))
    seen = sum(len(row) for rows, _ in batches for row in rows)
    useful = useful_operations(args, training, batches)
    row = {
        "share %": share,
        "tokens a step": seen // args.steps,
        "K": args.ttt_lengths[-1],
        "step s": total / args.steps,
        "tokens/s": seen / total,
        "useful TFLOP a step": useful / args.steps / 1e12,
        "TFLOP/s": useful / total / 1e12,
        "matrix TFLOP/s": rate / 1e12,
        "utilisation": useful / total / rate,
    }
    for name, span in zip(PHASES, spans, strict=True):
        row[f"{name} %"] = 100 * span / total
    if cuda:
        row["peak MiB"] = torch.cuda.max_memory_allocated(args.device) / 2**20
    return row


def loss_and_gradients(case, side):
    case["draft"].zero_grad()
    loss = objective.loss_of(case, side)
    loss.backward()
    gradients = [weight.grad for weight in case["draft"].parameters()]
    return [x.double() for x in (loss.detach(), *gradients)]


def relative_gap(found, expected):
    return float((found - expected).norm() / expected.norm())


def compare_with_dense(args):
    """Report how far both sides in args.dtype are from the dense form in fp32 on the same rounded weights."""
    masks = [objective.tail(length, 60) for length in (300, 7, 129)]
    case = objective.make_case(args, objective.draft_config(args, 2048), masks, 4)
    exact = copy.deepcopy(case)
    exact["draft"].float().embedding = exact["draft"].embedding.float()
    exact["head"].weight = exact["head"].weight.float()
    exact["auxiliary"] = exact["auxiliary"].float()
    exact["last"] = exact["last"].float()
    expected = loss_and_gradients(exact, "dense")
    for side in ("dense", "product"):
        found = loss_and_gradients(case, side)
        loss, *gaps = map(relative_gap, found, expected)
        put(args, f"{side} in {args.dtype} against dense in fp32: loss {loss:.2g}, worst gradient {max(gaps):.2g}  ")


def run_end_to_end(args):
    training = Training(args)
    target = training.target
    name = args.target_model_path or f"random, {target.config.num_hidden_layers} layers of {target.config.hidden_size}"
    note = (
        f"Target: {name}, {len(target.embedding)} tokens; draft vocabulary "
        f"{training.draft.config['draft_vocab_size']}; packed sequences of varied lengths, their tails supervised. "
        "Data: forming and moving a batch, no prefetching."
    )
    put_header(args, END_COLUMNS, note)
    args.total_seq_len = args.total_seq_len or (16384 if args.device.type == "cuda" else 2048)
    sizes = [(args.total_seq_len, share) for share in args.shares]
    if args.device.type == "cuda":
        sizes += [(tokens, args.shares[0]) for tokens in (2048, 8192, 32768)]
    for tokens, share in sizes:
        put_row(args, END_COLUMNS, measure_steps(args, training, tokens, share))
    compiled = torch._dynamo.utils.counters["stats"]
    graphs = compiled["unique_graphs"]
    time_steps(args, training, draw_batches(target, 3 * args.total_seq_len // 4, 40, 8))
    put(args, "", f"Graphs compiled: {graphs} before 8 batches of new lengths, {compiled['unique_graphs']} after.  ")
    compare_with_dense(args)


# ==================== Command line ===================================================================================

MODES = {"objective": run_objective, "prompt": run_prompt, "end_to_end": run_end_to_end}


def add_measuring_flags(parser):
    add = parser.add_argument
    add("mode", nargs="?", default="objective", choices=MODES, help="what to time (default: objective)")
    add("--output", help="file to write the report to as well; none: stdout only")
    add("--rounds", type=int, default=3, help="rounds in which the sides take turns; medians of them")
    add("--other", help="another checkout, whose objective is measured in turn with this one's")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: float32, on a GPU bfloat16")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    backends = ("auto", "sdpa", "flex_attention")
    add("--attention_backend", default="auto", choices=backends, help="auto: sdpa, on a GPU flex_attention")
    add("--gradient_checkpointing", action="store_true", help="the product recomputes the layer in its backward pass")


def add_size_flags(parser):
    add = parser.add_argument_group("sizes, a list giving a grid").add_argument
    add("--shares", type=float, nargs="+", default=TABLE["shares"], help="supervised per cent")
    add("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens of the objective")
    add("--ttt_lengths", type=int, nargs="+", default=[3, 7], help="steps K; other modes take the last")
    columns = [16000, 32000]
    add("--draft_vocab_sizes", type=int, nargs="+", default=columns, help="other modes take the last")
    add("--vocab_size", type=int, help="full vocabulary; none: twice the draft vocabulary")
    add("--table", action="store_true", help="instead: 1,024 tokens, K 7, draft vocabulary 16000, all shares")
    add("--skip_dense", action="store_true", help="time the product alone, for sizes that dense takes too long for")
    add("--skip_memory", action="store_true", help="do not measure memory, which takes a process per side")
    for name, default in objective.MODEL_SIZES.items():
        add(f"--{name}", type=int, default=default, help="of the draft" if default else "none: hidden_size")


def make_parser(description):
    """A parser of the flags that say what is measured, and on which sizes."""
    parser = common.Parser(description)
    add_measuring_flags(parser)
    add_size_flags(parser)
    parser.set_defaults(tree=ROOT, target_model_path=None)
    return parser


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument_group("prompt").add_argument
    add("--conversations", type=int, default=4, help="concatenated conversations")
    add("--prompt_length", type=int, default=256, help="tokens, before doubling")
    add("--reply_length", type=int, default=256, help="supervised tokens")
    add = parser.add_argument_group("end_to_end").add_argument
    add("--target_model_path", help="folder or hub id; none: random, on a GPU of Llama-3.1-8B's shape")
    add("--total_seq_len", type=int, help="tokens per step at most; none: 2048, on a GPU 16384")
    add("--steps", type=int, default=5, help="optimizer steps per round")
    return resolve(parser.parse_args(argv))


def resolve(args):
    """Replace every "auto", and check --other."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(args.device)
    cuda = args.device.type == "cuda"
    if args.dtype == "auto":
        args.dtypes = [torch.bfloat16 if cuda else torch.float32]
        if args.other:
            args.dtypes = [torch.float32, torch.bfloat16]
    else:
        args.dtypes = [getattr(torch, args.dtype)]
    args.dtype = args.dtypes[0]
    if args.attention_backend == "auto":
        args.attention_backend = "flex_attention" if cuda else "sdpa"
    if args.table:
        vars(args).update(TABLE)
    if args.other:
        args.other = Path(args.other).resolve()
        if args.mode != "objective":
            common.fail(f"--other measures the objective, not {args.mode}")
        if not (args.other / "train_eagle3.py").exists():
            common.fail(f"--other {args.other} is not a checkout: it has no train_eagle3.py")
    return args


def main(args):
    torch.set_num_threads(args.threads)
    ranks.keep_freed_memory()  # as in training
    if args.output:
        Path(args.output).write_text("")
    MODES[args.mode](args)


if __name__ == "__main__":
    main(parse_args())
