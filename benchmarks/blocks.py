"""Time and peak memory of the training step of a DFlash draft, against a plain dense form and against the floor.

In:  sizes; weights and inputs are random, nothing is read or downloaded.
Out: a Markdown table on stdout and, with --output, in a file.

    python benchmarks/blocks.py                                # 1,024 tokens, 128 blocks of 8, 3 layers of 1,024
    python benchmarks/blocks.py --lengths 8192 --skip_dense --dtype bfloat16

"dense" is tests/helpers/block_dense.py: a mask over the context and all blocks, full logits, autograd. "product" is the
objective of train_dflash.py. They run in turn, a round at a time, together with large matrix products of the draft's
shapes; times are medians. The floor is the time that the products which the blocks need take at the measured rates.
Peak memory is what the objective adds to weights, gradients and inputs, in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import objective  # noqa: E402  (neither the root nor tests/ is on the path of a script that lies here)
import operations  # noqa: E402
import step  # noqa: E402

import train_dflash  # noqa: E402
from core import block_files, common, ranks, slots, target_model  # noqa: E402
from helpers import block_dense  # noqa: E402

COLUMNS = (
    "share %",
    "tokens",
    "blocks",
    "dense s",
    "product s",
    "dense/product",
    "floor s",
    "product/floor",
    "dense MiB",
    "product MiB",
    "product/dense memory",
    "TFLOP",
)
GAMMA = 4.0
SHARES = [100.0, 50.0, 15.0]
SIZES = {"vocab_size": 16000, "num_layers": 3, "block_size": 8, "max_anchors": 128}

# ==================== A case =========================================================================================


def draft_config(args):
    """The flat configuration of a DFlash draft for the sizes of the flags."""
    return {
        **{name: getattr(args, name) for name in objective.MODEL_SIZES if name != "target_hidden_size"},
        "architectures": [block_files.ARCHITECTURES["dflash"]],
        "model_type": "qwen3",
        "num_hidden_layers": args.num_layers,
        "block_size": args.block_size,
        "layer_types": ["full_attention"] * args.num_layers,
        "dflash_config": {"mask_token_id": 0, "target_layer_ids": list(range(args.num_layers))},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 131072,
        "vocab_size": args.vocab_size,
        "draft_vocab_size": args.vocab_size,
    }


def make_case(args, length, share):
    """A random draft and the arguments of both sides for a document whose last `share` per cent are supervised."""
    torch.manual_seed(0)
    config = draft_config(args)
    size = config["hidden_size"]
    place = {"device": args.device, "dtype": args.dtype}
    weight = torch.randn(args.vocab_size, size) * size**-0.5
    weight = weight.to(**place)
    embedding = torch.randn(args.vocab_size, size)
    draft = train_dflash.DraftModel(config, embedding.to(**place), weight)
    draft = draft.to(**place)
    draft.attention_backend = args.attention_backend
    argv = ["--target_model_path", "-"]
    argv += ["--max_anchors", str(args.max_anchors)]
    argv += ["--dflash_decay_gamma", str(GAMMA)]
    flags = train_dflash.parse_args(argv)
    mask = torch.tensor(objective.tail(length, share))
    tokens = torch.randint(args.vocab_size, (length,))
    collate = train_dflash.batch_of(flags, draft, trains=True)
    batch = collate([(0, tokens, mask)], 0)
    auxiliary = torch.randn(length, args.num_layers * size)
    last = torch.randn(length, size)
    batch.states = (auxiliary.to(args.dtype), last.to(args.dtype))
    return {
        "draft": draft,
        "batch": batch.to(args.device),
        "head": target_model.Head(weight),
        "d2t": torch.zeros(args.vocab_size, dtype=torch.int64, device=args.device),
        "flags": flags,
    }


def loss_of(case, side):
    """The loss of a side: "product", the trainer's objective, or "dense", the plain form."""
    draft = case["draft"]
    batch = case["batch"]
    inputs = (batch.input_ids, batch.position_ids)
    states = (*batch.states, case["head"])
    if side == "product":
        loss, _, _ = draft(*inputs, *states, batch.plan, case["d2t"], case["flags"])
        return loss
    documents = slots.documents_of(batch.lengths)
    documents = documents.to(batch.input_ids.device)
    anchors = batch.plan.slots + 1
    options = (anchors, case["d2t"], GAMMA, draft.mask_token)
    return block_dense.objective(draft, *inputs, documents, *states, *options)


def forward_backward(case, side):
    case["draft"].zero_grad(set_to_none=True)
    loss = loss_of(case, side)
    loss.backward()
    return loss


# ==================== What it takes ==================================================================================


def count_products(config, plan, tokens):
    """The matrix products that the blocks of a plan need, as a list of operations.Product.

    fc, keys and values of the context once per token up to the last anchor; the head at each prediction.
    """
    size = config["hidden_size"]
    inner = config["intermediate_size"]
    layers = config["num_hidden_layers"]
    dim = config["head_dim"]
    heads = config["num_attention_heads"]
    query = heads * dim
    key = config["num_key_value_heads"] * dim
    width = config["block_size"]
    queries = len(plan.slots) * width
    seen = min(int(plan.slots[-1]) + 1, tokens)
    context = int((plan.slots + 1).sum())
    pairs = width * (context + queries)
    rows = max(min(queries, operations.PRODUCT_ROWS), 1)
    products = []

    def add(name, count, fan_in, fan_out, backward=2, shape=None):
        shape = shape or (1, rows, fan_in, fan_out)
        products.append(operations.Product(name, 2 * count * fan_in * fan_out, backward, shape))

    add("fc", seen, layers * size, size, backward=1)
    add("q", layers * queries, size, query)
    add("k, v", 2 * layers * (seen + queries), size, key)
    span = max(pairs // max(queries, 1), 1)
    at_once = operations.SCORES // (heads * span)
    at_once = max(min(rows, at_once), 1)
    shape = (heads, at_once, dim, span)
    add("attention", 2 * layers * pairs, dim, heads, shape=shape)
    add("o", layers * queries, query, size)
    add("gate, up", 2 * layers * queries, size, inner)
    add("down", layers * queries, inner, size)
    add("head", plan.valid.numel(), size, config["draft_vocab_size"], backward=1)  # it is frozen
    add("teacher", len(plan.teachers), size, config["vocab_size"], backward=0)
    return products


def time_in_turn(case, sides, products, args):
    """(median seconds by side, median rates {(shape, pass)}): both sides and the products, round by round."""
    kinds = sorted({(product.shape, name) for product in products for name in product.passes})
    taken = {side: [] for side in sides}
    rates = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for side in sides:

            def work(side=side):
                forward_backward(case, side)

            taken[side].append(objective.seconds(work, args.device))
        for shape, name in kinds:
            rate = step.matrix_rate(shape, name, args.dtype, args.device)
            rates[shape, name].append(rate)
    return step.medians(taken), step.medians(rates)


def memory_alone(args, length, share, side):
    """Bytes that a forward and backward adds at its peak; nothing else has run in this process."""
    forward_backward(make_case(args, 4 * args.block_size, 100), side)
    case = make_case(args, length, share)
    return objective.peak_of(lambda: loss_of(case, side), case["draft"], args.device)


def memory_of(args, length, share, side):
    """memory_alone in a new process, in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", json.dumps([length, share, side])]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(printed.split()[-1]) / 2**20


def measure(args, length, share):
    """One row of the table as {column: value}."""
    case = make_case(args, length, share)
    plan = case["batch"].plan
    sides = ["product"] if args.skip_dense else ["dense", "product"]
    for side in sides:
        forward_backward(case, side)
    products = count_products(case["draft"].config, plan, length)
    seconds, rates = time_in_turn(case, sides, products, args)
    row = {"share %": share, "tokens": length, "blocks": len(plan.slots)}
    row |= {f"{side} s": value for side, value in seconds.items()}
    row["floor s"] = operations.floor_seconds(products, rates)
    row["product/floor"] = row["product s"] / row["floor s"]
    row["TFLOP"] = operations.total_operations(products) / 1e12
    if not args.skip_memory:
        row |= {f"{side} MiB": memory_of(args, length, share, side) for side in sides}
    if "dense" in sides:
        row["dense/product"] = row["dense s"] / row["product s"]
    if "dense MiB" in row:
        row["product/dense memory"] = row["product MiB"] / row["dense MiB"]
    return row


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    positive = common.at_least(int, 1)
    sizes = objective.MODEL_SIZES | SIZES
    for name, value in sizes.items():
        if value:
            add(f"--{name}", type=positive, default=value)
    add("--shares", type=float, nargs="+", default=SHARES, help="per cent of the tokens supervised")
    add("--lengths", type=positive, nargs="+", default=[1024])
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device")
    add("--attention_backend", choices=("flex_attention", "sdpa"), help="none: flex on GPUs")
    add("--threads", type=positive, default=1)
    add("--rounds", type=positive, default=3)
    add("--skip_dense", action=common.Switch)
    add("--skip_memory", action=common.Switch)
    add("--output", help="file that the table is added to")
    add("--memory_of", help="of the process that measures memory")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    args.device = torch.device(args.device or ("cuda" if cuda else "cpu"))
    if not args.attention_backend:
        args.attention_backend = "flex_attention" if args.device.type == "cuda" else "sdpa"
    args.dtype = getattr(torch, args.dtype)
    args.dtypes = [args.dtype]
    return args


def main(args):
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_alone(args, *json.loads(args.memory_of)))
        return
    ranks.keep_freed_memory()  # as in training
    names = ("hidden_size", "intermediate_size", "num_layers", "block_size", "vocab_size")
    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in names)
    step.put_header(args, COLUMNS, f"Draft: {sizes}. One sequence, its tail supervised; forward and backward.")
    for length in args.lengths:
        for share in args.shares:
            step.put_row(args, COLUMNS, measure(args, length, share))


if __name__ == "__main__":
    main(parse_args())
