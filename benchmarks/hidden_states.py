"""What hidden states take on the disk, and how long a training waits for them.

In:  sizes (the states are random), or the command line of a training from the disk.
Out: Markdown on stdout.

    python benchmarks/hidden_states.py size                       # bytes per token, at the sizes of an 8B target
    python benchmarks/hidden_states.py wait --target_model_path M --data_path prepared --hidden_states_path states \\
        --on_missing raise --output_dir output                    # any flag of train_eagle3.py; deepspeed works too

size: one conversation, its tail supervised, written as prepare_hidden_states.py does. The bytes of the file, header
included, per token, and their share of the plain layout: four layers of every token in bfloat16.
wait: a training whose files were read once before, so that they are in the page cache. The mean time that a step waits
for its batches against the median duration of steps, on rank 0, without the first ones, in which workers start.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_eagle3
from core import common, dataloader, hidden_states, ranks

AUXILIARY = 3  # layers of the plain layout, beside the last
BLOCK = 2**24  # bytes read at a time

# ==================== Size ===========================================================================================


def run_size(args):
    plain = (AUXILIARY + 1) * torch.bfloat16.itemsize * args.hidden_size
    print(f"Bytes per token, hidden size {args.hidden_size}, {args.tokens} tokens a conversation; plain: {plain:,}\n")
    print_row("supervised", *args.dtypes)
    print("|---" * (1 + len(args.dtypes)) + "|")
    for share in args.shares:
        cells = []
        for dtype in args.dtypes:
            size = file_size(args.tokens, share, args.hidden_size, dtype) / args.tokens
            cells.append(f"{size:,.0f} ({size / plain:.1%})")
        print_row(f"{share:g} %", *cells)


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def file_size(tokens, share, hidden_size, dtype):
    """Bytes of a shard with one row, of which the last `share` per cent are supervised."""
    input_ids = torch.arange(tokens)
    loss_mask = input_ids >= round(tokens * (1 - share / 100))
    auxiliary = torch.randn(tokens, AUXILIARY * hidden_size)
    last = torch.randn(tokens, hidden_size)
    row = hidden_states.to_stored(input_ids, loss_mask, auxiliary, last, hidden_states.DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        hidden_states.write_shard(Path(folder), number=0, rank=0, rows={"train/0": row})
        (path,) = Path(folder).glob("*.safetensors")
        return path.stat().st_size


# ==================== Waiting ========================================================================================


class Step(NamedTuple):
    """Seconds of an optimizer step."""

    waited: float  # for its batches
    total: float  # until the next one asks for its batches: logging and saving are included


class Clock:
    """dataloader.read_steps with a clock around what it yields."""

    def __init__(self):
        self.steps = []
        self.read_steps = dataloader.read_steps

    def __call__(self, *inputs, name="train", **options):
        reader = self.read_steps(*inputs, name=name, **options)
        while True:
            started = time.perf_counter()
            batches = next(reader, None)
            if batches is None:
                return
            waited = time.perf_counter() - started
            yield batches
            if name == "train":
                total = time.perf_counter() - started
                self.steps.append(Step(waited, total))


def run_wait(args, argv):
    """Run a training with a clock around its batches."""
    flags = train_eagle3.parse_args(argv)
    if not flags.hidden_states_path:
        common.fail("wait is about a training from the disk: give --hidden_states_path")
    read_files(flags.hidden_states_path)
    clock = Clock()
    dataloader.read_steps = clock

    def measure(flags):
        train_eagle3.main(flags)
        report(clock.steps, args.skip)

    ranks.run_watched(measure, flags)


def read_files(folder):
    """Read a store's files once, so that they are in the page cache."""
    size = 0
    started = time.perf_counter()
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                size += len(block)
    seconds = time.perf_counter() - started
    print(f"{size / 1e9:.3f} GB in the page cache, read in {seconds:.1f} s")


def report(steps, skip):
    """Print on rank 0 how long the steps after the first `skip` waited."""
    kept = steps[skip:]
    if not kept:
        common.fail(f"{len(steps)} steps, of which {skip} are left out: train for longer or lower --skip")
    if dist.get_rank() != 0:
        return
    waits = [1e3 * step.waited for step in kept]
    mean = statistics.mean(waits)
    typical = 1e3 * statistics.median(step.total for step in kept)  # some steps include an evaluation
    print(
        f"data waiting: {mean / typical:.2%} of a step; {len(kept)} steps of {typical:.0f} ms, waiting {mean:.1f} ms "
        f"on average and {max(waits):.1f} at most"
    )


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    """(arguments, the training's command line)"""
    parser = common.Parser(__doc__)
    parser.add_argument("mode", choices=("size", "wait"), help="what to measure")
    add = parser.add_argument_group("size").add_argument
    dtypes = list(hidden_states.DTYPES)
    add("--hidden_size", type=int, default=4096, help="of the target")
    add("--tokens", type=int, default=2048, help="of a conversation")
    add("--shares", type=float, nargs="+", default=[100, 50, 15], help="supervised per cent")
    add("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="of the store")
    add = parser.add_argument_group("wait, with any flag of train_eagle3.py").add_argument
    add("--skip", type=int, default=10, help="first steps that are left out")
    args, rest = parser.parse_known_args(argv)
    if rest and args.mode == "size":
        common.fail(f"unknown: {' '.join(rest)}")
    return args, rest


def main(args, rest):
    if args.mode == "size":
        run_size(args)
    else:
        run_wait(args, rest)


if __name__ == "__main__":
    main(*parse_args())
