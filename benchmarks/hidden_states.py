"""What hidden states take on the disk, and how long a training waits for them.

In:  sizes (the states are random), or the command line of a training from the disk.
Out: Markdown on stdout.

    python benchmarks/hidden_states.py size                       # bytes a token, at the sizes of an 8B target
    python benchmarks/hidden_states.py wait --target_model_path M --data_path prepared --hidden_states_path states \\
        --on_missing raise --output_dir output                    # any flag of train_eagle3.py; deepspeed works too

size: one conversation, its tail supervised, written as prepare_hidden_states.py does; bytes of the file, its header
included, per token, and against the plain layout: three auxiliary layers and the last of every token in bfloat16.
wait: a training whose files were read once before, so that they are in the page cache; the mean time in which a step
asked for its batches against the median of whole steps, on rank 0. In the first steps, left out, workers start.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_eagle3
from core import common, dataloader, hidden_states, ranks

BLOCK = 2**24  # bytes read at a time


def file_size(tokens, share, hidden_size, dtype):
    """Bytes of a shard with one row of which `share` per cent, the tail, are supervised."""
    ids, mask = torch.arange(tokens), torch.arange(tokens) >= round(tokens * (1 - share / 100))
    states = torch.randn(tokens, 3 * hidden_size), torch.randn(tokens, hidden_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.safetensors"
        hidden_states.write_shard(
            path, {"train/0": hidden_states.to_stored(ids, mask, *states, hidden_states.DTYPES[dtype])}
        )
        return path.stat().st_size


def run_size(args):
    plain = 4 * 2 * args.hidden_size
    print(f"Bytes a token, hidden size {args.hidden_size}, {args.tokens} tokens a conversation; plain: {plain:,}\n")
    print("| supervised |" + "".join(f" {dtype} |" for dtype in args.dtypes))
    print("|---" * (1 + len(args.dtypes)) + "|")
    for share in args.shares:
        sizes = [file_size(args.tokens, share, args.hidden_size, dtype) / args.tokens for dtype in args.dtypes]
        print(f"| {share:g} % |" + "".join(f" {size:,.0f} ({size / plain:.1%}) |" for size in sizes), flush=True)


def run_wait(args, argv):
    """Train with a clock around what hands out the batches."""
    spans, read_steps, flags = [], dataloader.read_steps, train_eagle3.parse_args(argv)
    if not flags.hidden_states_path:
        common.fail("wait is about a training from the disk: give --hidden_states_path")
    size, started = 0, time.perf_counter()
    for path in Path(flags.hidden_states_path).glob("*.safetensors"):
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                size += len(block)
    print(f"{size / 1e9:.3f} GB in the page cache, read in {time.perf_counter() - started:.1f} s")

    def timed(data, *rest, name="train", **options):
        steps = read_steps(data, *rest, name=name, **options)
        while True:
            begin = time.perf_counter()
            batches = next(steps, None)
            if batches is None:
                return
            waited = time.perf_counter() - begin
            yield batches
            if name == "train":  # until the next one is asked for; logging and saving lie between as well
                spans.append((waited, time.perf_counter() - begin))

    dataloader.read_steps = timed
    ranks.run_watched(measure, (flags, spans, args.skip))


def measure(given):
    flags, spans, skip = given
    train_eagle3.main(flags)
    kept = spans[skip:]
    if not kept:
        common.fail(f"{len(spans)} steps, of which {skip} are left out: train for longer or lower --skip")
    if dist.get_rank() == 0:
        waits, steps = zip(*kept, strict=True)
        typical = statistics.median(steps)  # some have an evaluation behind them
        print(
            f"data waiting: {statistics.mean(waits) / typical:.2%} of a step; {len(steps)} steps of "
            f"{1e3 * typical:.0f} ms, waiting {1e3 * statistics.mean(waits):.1f} ms on average and "
            f"{1e3 * max(waits):.1f} at most"
        )


def parse_args(argv=None):
    """(arguments, the training's command line)"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("mode", choices=("size", "wait"), help="what to measure")
    add = parser.add_argument_group("size").add_argument
    add("--hidden_size", type=int, default=4096, help="of the target (default: 4096)")
    add("--tokens", type=int, default=2048, help="of a conversation (default: 2048)")
    add("--shares", type=float, nargs="+", default=[100, 50, 15], help="supervised per cent (default: 100 50 15)")
    add(
        "--dtypes",
        nargs="+",
        choices=hidden_states.DTYPES,
        default=list(hidden_states.DTYPES),
        help="of the store (default: all)",
    )
    add = parser.add_argument_group("wait, with any flag of train_eagle3.py").add_argument
    add("--skip", type=int, default=10, help="first steps that are left out (default: 10)")
    parser.error = common.fail
    args, rest = parser.parse_known_args(argv)
    if rest and args.mode == "size":
        common.fail(f"unknown: {' '.join(rest)}")
    return args, rest


def main(args, rest):
    run_size(args) if args.mode == "size" else run_wait(args, rest)


if __name__ == "__main__":
    main(*parse_args())
