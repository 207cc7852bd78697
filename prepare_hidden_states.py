"""Write the hidden states that training reads of a target to disk, so that the draft is trained without the target.

In:  a target, and a folder written by prepare_data.py.
Out: a folder with index.json (target, layers, data; the rows of each shard and their checksums) and shards in
     safetensors. Per row SPLIT/NUMBER: input_ids, loss_mask, aux_hidden_states [n, 3·Ht] of the n tokens that are read,
     last_hidden_states [U, Ht] (after the final norm) of the U tokens that teach; fp8 with scales beside them.

One device:     python prepare_hidden_states.py --target_model_path M --data_path prepared --output_path hidden_states
Eight devices:  deepspeed --num_gpus 8 prepare_hidden_states.py --target_model_path M --data_path prepared \\
                    --output_path hidden_states --hidden_states_dtype fp8

Started again after an interruption, it continues where it stopped. train_eagle3.py --hidden_states_path reads it.
"""

import shutil
import sys

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from core import common, dataloader, foreign_flags, hidden_states, ranks, slots, target_files, target_model


def groups_of(lengths, batch_size):
    """Rows (split, number) that share a forward, batch_size of them, by length, the longest first; lengths: by split.

    They are the same whatever has been written, so that a row's last bits do not depend on interruptions.
    """
    rows = [(-length, split, number) for split in lengths for number, length in enumerate(lengths[split])]
    rows = [(split, number) for _, split, number in sorted(rows)]
    return [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]


def row_lengths(data):
    """{split: tokens of each row}"""
    return {split: part["length"][:] for split, part in data.items()}


def plan_writing(args, hidden_size, store, data):
    """The groups that are not written yet; prints what they will take, and ends the program if that is too much."""
    lengths = row_lengths(data)
    pending = []
    rows = []
    for group in groups_of(lengths, args.batch_size):
        missing = [(split, number) for split, number in group if f"{split}/{number}" not in store.rows]
        if missing:
            pending.append(group)
            rows += missing
    sizes = row_sizes(data, lengths, hidden_size, store)
    tensors = 4 if store.dtype.itemsize > 1 else 6  # of a row
    size = 110 * tensors * len(rows)  # names, shapes and places in the headers
    size += sum(sizes[split][number] for split, number in rows)
    tokens = sum(lengths[split][number] for split, number in rows)
    plain = 4 * 2 * hidden_size * tokens
    print(
        f"{len(rows):,} of {sum(map(len, data.values())):,} rows to write: {size / 1e9:.3f} GB, "
        f"{size / max(tokens, 1):,.0f} bytes a token ({size / max(plain, 1):.0%} of four layers of every token in "
        f"bfloat16)"
    )
    check_room("max_disk", args.max_disk, size / 1e9)
    check_room(f"the disk of {args.output_path}", shutil.disk_usage(args.output_path).free / 1e9, size / 1e9)
    return pending


def row_sizes(data, lengths, hidden_size, store):
    """{split: bytes that each row takes in the store}"""
    sizes = {}
    for split, part in data.items():
        counts, teachers = slots.measure_read(part)
        tokens = np.array(lengths[split])
        size = hidden_states.row_bytes(
            tokens,
            counts,
            teachers,
            hidden_size,
            store.layer_count,
            store.dtype,
        )
        sizes[split] = size.tolist()
    return sizes


def check_room(name, room, size):
    """End the program if `size` GB do not fit into `room` GB (None: no limit) of what the user knows as `name`."""
    if room is not None and size > room:
        common.fail(
            f"{name} has room for {room:.3f} GB, {size:.3f} GB are to be written: use --hidden_states_dtype fp8, fewer "
            "rows or another disk"
        )


def write_all(args, sharding, target, store, data, pending):
    """Run the target on all groups; returns the rows that are left out, as their states are not finite."""
    rank = dist.get_rank()
    copies = dist.get_world_size() // args.tp_size  # of the target
    writes = rank % args.tp_size == 0
    lengths = row_lengths(data)
    bad = []
    total = sum(lengths[split][number] for group in pending for split, number in group)
    with progress_bar(total) as bar:
        written = 0
        for at in range(0, len(pending), copies):
            together = pending[at : at + copies]  # a group for each copy
            copy = rank // args.tp_size
            group = together[copy] if copy < len(together) else []
            if not group and sharding != "zero3":  # there all ranks gather the layers in each forward
                continue
            states = run_group(target, data, group)
            for name, tensors in stored_rows(states, store) if writes else ():
                if store.add(name, tensors):
                    written += sum(tensor.nbytes for tensor in tensors.values())
                else:
                    bad.append(name)
            for part in together:
                bar.update(sum(lengths[split][number] for split, number in part))
            bar.set_postfix_str(f"{written / 1e9:.2f} GB by this rank", refresh=False)
        store.flush(wait=True)
    return [name for part in ranks.gather(bad) for name in part]


def progress_bar(total):
    """A bar over tokens, on rank 0; in a log file a line every 30 seconds."""
    interval = 0.1 if sys.stderr.isatty() else 30
    disable = dist.get_rank() > 0
    return tqdm(
        total=total,
        unit="tok",
        unit_scale=True,
        disable=disable,
        dynamic_ncols=True,
        mininterval=interval,
    )


def run_group(target, data, group):
    """[(name, input_ids, loss_mask, auxiliary, last)] of a group's rows, of one forward; an empty group runs it too."""
    rows = [data[split][number] for split, number in group]
    input_ids = [torch.tensor(row["input_ids"]) for row in rows] or [torch.zeros(4, dtype=torch.int64)]
    lengths = [len(ids) for ids in input_ids]
    tokens = torch.cat(input_ids).to(target.embedding.device)
    auxiliary, last = target.hidden_states(tokens, lengths)
    names = [f"{split}/{number}" for split, number in group]
    masks = [torch.tensor(row["loss_mask"]) for row in rows]
    return zip(
        names,
        input_ids,
        masks,
        auxiliary.split(lengths),
        last.split(lengths),
        strict=False,
    )


def stored_rows(states, store):
    """(name, tensors as in the store) of the rows of run_group that the store does not have yet."""
    for name, *parts in states:
        if name not in store.rows:  # else its group was interrupted
            yield name, hidden_states.to_stored(*parts, store.dtype)


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument_group("target and data").add_argument
    add("--target_model_path", required=True, help="folder or hub id; a folder may hold one nested or MLflow model")
    add("--data_path", required=True, help="folder written by prepare_data.py")
    add("--target_layer_ids", type=int, nargs="+", help="auxiliary layers, i = after i layers; none: 2 L//2 L-3")
    add("--trust_remote_code", action=common.Switch, help="run code that comes with the target")
    target_model.add_sharing_flags(parser)
    add = parser.add_argument_group("what is written").add_argument
    dtypes = list(hidden_states.DTYPES)
    add("--output_path", required=True, help="folder to write, or to continue")
    add("--hidden_states_dtype", choices=dtypes, default="bfloat16", help="fp8: e4m3 with a scale per token and layer")
    add("--max_disk", type=common.at_least(float, 0), help="GB that this start may write; none: what the disk has")
    add("--dist_timeout", type=common.above_zero, default=20, help="minutes a collective may take")
    add("--local_rank", type=int, default=-1, help="set by the launcher; -1 = from LOCAL_RANK")
    args = foreign_flags.parse(parser, argv, foreign_flags.OF_HIDDEN_STATES)
    if args.data_path.endswith((".json", ".jsonl")):
        common.fail(f"data_path {args.data_path} is a file: give the folder that prepare_data.py makes of it")
    return args


def prepare(args, sharding):
    """On rank 0, before the target loads: (auxiliary layers, settings of the store, groups that are not written)."""
    common.check_writable("output_path", args.output_path)
    data, data_config = dataloader.open_data(args.data_path)
    model_dir = target_files.resolve_target(args.target_model_path)
    config, full_config = target_files.read_target_config(model_dir, args.trust_remote_code)
    target_model.check_heads(config, args.tp_size)
    target_model.check_weights(model_dir, full_config, args.trust_remote_code)
    tokenizer = target_files.load_tokenizer(args.target_model_path, args.trust_remote_code)
    if data_config["ingredients"]["tokenizer"] != target_files.hash_tokenizer(tokenizer):
        common.fail(f"{args.data_path} was prepared with another tokenizer or chat template than the target's")
    dataloader.check_tokens(args.data_path, data, data_config, config.vocab_size)
    layers = args.target_layer_ids or target_files.default_layer_ids(config.num_hidden_layers)
    settings = hidden_states.store_settings(model_dir, layers, data_config)
    store = hidden_states.Store(args.output_path, settings, create=args.hidden_states_dtype)
    dtype = store.index["dtype"]
    if dtype != args.hidden_states_dtype:
        common.fail(f"{args.output_path} is written in {dtype}: give --hidden_states_dtype {dtype}, or another folder")
    store.remove_leftovers()
    return layers, settings, plan_writing(args, config.hidden_size, store, data)


def main(args):
    device = ranks.start_distributed(args.dist_timeout, args.local_rank)
    with ranks.only_writer("output_path", args.output_path):
        start(args, device)


def start(args, device):
    """Plan, load the target, and write what is missing."""
    sharding = ranks.on_first_rank(lambda: target_model.resolve_sharding(args, dist.get_world_size()))
    layers, settings, pending = ranks.on_first_rank(lambda: prepare(args, sharding))
    data, _ = dataloader.open_data(args.data_path)
    store = hidden_states.Store(args.output_path, settings)
    model_dir = ranks.on_each_node(lambda: target_files.resolve_target(args.target_model_path))
    target = target_model.load_as_asked(args, sharding, model_dir, device, layers) if pending else None
    try:
        bad = write_all(args, sharding, target, store, data, pending)
        if dist.get_rank() == 0:
            store.write_index()
    except OSError as error:
        common.fail(f"{error}; what has been written stays: make room and start again")
    if dist.get_rank() == 0:
        size = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
        print(f"{args.output_path}: {len(store.rows):,} rows, {size / 1e9:.3f} GB, {len(bad)} rows left out")
        if bad and args.batch_size > 1:  # attention gives nan x 0 to the other rows of a forward
            print("rows that shared a forward with a bad one may be good: start again with --batch_size 1 to see")


if __name__ == "__main__":
    ranks.run_watched(main, parse_args())
