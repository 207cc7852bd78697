"""What a rank's start and a step's plan take at many ranks and many rows, simulated by one process.

In:  nothing: lengths are drawn as chats have them, rows are made.
Out: two Markdown tables on stdout and, with --output, in a file.

    python benchmarks/scale.py
    python benchmarks/scale.py --ranks 8 4096 --rows 1000000 --output scale.md

"plan" is what a rank does before each optimizer step: which rows each rank reads, in which micro-batches (its own are
made). Sequences are those of a rank. Times are those of the processor, the least of several rounds. Memory is what the
start adds to a rank, each in a process of its own.
"""

import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core import common, dataloader

ROUNDS = 3
TOKENS = 16  # of a row that is made


def draw_lengths(count):
    """(lengths, work) as chats have them: a median of 400 tokens, at most 2,048, a part of them supervised."""
    random = np.random.default_rng(0)
    drawn = random.lognormal(6.0, 0.9, count)
    lengths = np.clip(drawn, 2, 2048).astype(np.int64)
    supervised = lengths * random.uniform(0.1, 1.0, count)
    return lengths, lengths + supervised.astype(np.int64)


def seconds_of(work):
    """The least processor time of several calls."""
    found = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def plan(ranks, sequences, total_seq_len):
    """Seconds that a rank plans a step."""
    lengths, work = draw_lengths(ranks * sequences)
    rows = np.random.default_rng(1).permutation(len(lengths))
    rank = ranks // 2

    def work_of_a_step():
        assigned = dataloader.assign(rows, lengths, work, ranks, sequences, total_seq_len)
        return assigned[rank]

    return seconds_of(work_of_a_step)


def write_rows(folder, count):
    """A prepared folder of `count` short rows, without what only a training compares."""
    from datasets import Dataset, DatasetDict

    offsets = np.arange(0, TOKENS * count + 1, TOKENS, dtype=np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.zeros(TOKENS * count, dtype=np.int32))
    mask = pa.ListArray.from_arrays(offsets, np.ones(TOKENS * count, dtype=np.uint8))
    length = np.full(count, TOKENS, dtype=np.int32)
    table = pa.table({"input_ids": ids, "loss_mask": mask, "length": length})
    splits = DatasetDict({"train": Dataset(table)})
    splits.save_to_disk(str(folder))
    (folder / "token_freq.pt").touch()
    files = dataloader.measure_files(folder)
    config = {"format_version": dataloader.FORMAT_VERSION, "files": files}
    common.write_sealed(folder / "data_config.json", config)


def start(folder, answer):
    """Put [seconds of opening, of the lengths, of the first order, MiB of memory] of a rank into a queue."""
    import datasets  # noqa: F401  (it is not what is measured)

    before = own_memory()
    times = [time.process_time()]
    data, _ = dataloader.open_data(folder)
    times.append(time.process_time())
    kept = dataloader.measure_rows(data["train"])
    times.append(time.process_time())
    order = dataloader.epoch_order(len(data["train"]), 0, 0)
    times.append(time.process_time())
    memory = own_memory() - before
    del kept, order
    answer.put([*np.diff(times).tolist(), memory / 2**20])


def own_memory():
    """Resident bytes of this process that it does not share, as it does mapped files."""
    info = psutil.Process().memory_info()
    return info.rss - info.shared


def start_alone(folder):
    """What `start` measures, in a new process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=start, args=[folder, answer])
    process.start()
    found = answer.get(timeout=600)
    process.join()
    return found


def plan_table(args):
    """Milliseconds of a step's plan."""
    lines = [["ranks x sequences", "ms", f"ms, total_seq_len {args.total_seq_len:,}"]]
    for ranks in args.ranks:
        for sequences in args.sequences:
            times = [plan(ranks, sequences, total) for total in (0, args.total_seq_len)]
            lines.append([f"{ranks:,} x {sequences}", *(f"{1000 * value:.1f}" for value in times)])
    return common.format_table(lines)


def start_table(args):
    """What the start of a rank takes."""
    lines = [["rows", "open, s", "lengths, s", "order of an epoch, s", "MiB of a rank"]]
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder, "data"), count)
            found = start_alone(Path(folder, "data"))
        lines.append([f"{count:,}", *(f"{value:.2f}" for value in found[:3]), f"{found[3]:.0f}"])
    return common.format_table(lines)


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    positive = common.at_least(int, 1)
    add("--ranks", type=positive, nargs="+", default=[8, 64, 256, 1024], help="in the first table")
    add("--sequences", type=positive, nargs="+", default=[1, 4, 32], help="of a rank in an optimizer step")
    add("--total_seq_len", type=common.at_least(int, 2048), default=8192, help="tokens, in the last column")
    add("--rows", type=positive, nargs="+", default=[10_000, 100_000, 1_000_000], help="in the second table")
    add("--output", help="file for the tables")
    return parser.parse_args(argv)


def main(args):
    machine = (
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}"
    )
    text = f"{machine}, {time.strftime('%Y-%m-%d')}\n\n{plan_table(args)}\n\n{start_table(args)}\n"
    print(text)
    if args.output:
        common.write_atomic(args.output, text)


if __name__ == "__main__":
    main(parse_args())
