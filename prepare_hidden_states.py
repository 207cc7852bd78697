"""Write the hidden states that training reads of a target to disk, so that the draft is trained without the target.

In:  a target, and a folder written by prepare_data.py.
Out: a folder with index.json (of which target, layers and data; the rows of each shard and their checksums) and shards
     of safetensors. Per row SPLIT/NUMBER: input_ids, loss_mask, aux_hidden_states [n, 3·Ht] of the n tokens that are
     read, last_hidden_states [U, Ht] (after the final norm) of the U tokens that teach; fp8 with scales beside them.

One device:     python prepare_hidden_states.py --target_model_path M --data_path prepared --output_path hidden_states
Eight devices:  deepspeed --num_gpus 8 prepare_hidden_states.py --target_model_path M --data_path prepared \
                    --output_path hidden_states --hidden_states_dtype fp8

Started again after an interruption it goes on where it stopped. train_eagle3.py --hidden_states_path reads the folder.
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


def plan_writing(args, config, store, data):
    """The groups that are not written yet; prints what they will take, and ends the program if that is too much."""
    layers, done, lengths, sizes = len(store.index["layers"]), store.rows, row_lengths(data), {}
    for split, part in data.items():
        read = np.array(lengths[split]), *slots.measure_read(part)
        sizes[split] = hidden_states.row_bytes(*read, config.hidden_size, layers, store.dtype).tolist()
    pending = [group for group in groups_of(lengths, args.batch_size) if any(f"{s}/{n}" not in done for s, n in group)]
    rows = [(split, number) for group in pending for split, number in group if f"{split}/{number}" not in done]
    header = 110 * (4 if store.dtype.itemsize > 1 else 6) * len(rows)  # names, shapes and places of the tensors
    tokens, size = (sum(of[split][number] for split, number in rows) for of in (lengths, sizes))
    size += header
    plain = 4 * 2 * config.hidden_size * tokens
    print(
        f"{len(rows):,} of {sum(map(len, data.values())):,} rows to write: {size / 1e9:.3f} GB, "
        f"{size / max(tokens, 1):,.0f} bytes a token ({size / max(plain, 1):.0%} of four layers of every token in "
        f"bfloat16)"
    )
    free = shutil.disk_usage(args.output_path).free / 1e9
    for name, room in (("max_disk", args.max_disk), (f"the disk of {args.output_path}", free)):
        if room is not None and size / 1e9 > room:
            common.fail(
                f"{name} has room for {room:.3f} GB, {size / 1e9:.3f} GB are to be written: use "
                "--hidden_states_dtype fp8, fewer rows or another disk"
            )
    return pending


def write_all(args, target, store, data, pending):
    """Run the target on all groups; rows whose states are not finite are reported and left out."""
    rank, world = dist.get_rank(), dist.get_world_size()
    copies, writes, tokens = world // args.tp_size, rank % args.tp_size == 0, row_lengths(data)
    total = sum(tokens[split][number] for group in pending for split, number in group)
    bar = tqdm(
        total=total,
        unit="tok",
        unit_scale=True,
        disable=rank > 0,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    bad, written = [], 0
    with bar:  # closed, or the line of an error stands behind it
        for at in range(0, len(pending), copies):
            group = pending[at : at + copies][rank // args.tp_size : rank // args.tp_size + 1]
            rows = [(f"{split}/{number}", data[split][number]) for part in group for split, number in part]
            if not rows and args.target_sharding != "zero3":  # there all ranks gather the layers in each forward
                continue
            ids = [torch.tensor(row["input_ids"]) for _, row in rows] or [torch.zeros(4, dtype=torch.int64)]
            lengths = [len(x) for x in ids]
            states = target.hidden_states(torch.cat(ids).to(target.embedding.device), lengths)
            sequences = zip(rows if writes else (), ids, *(x.split(lengths) for x in states), strict=False)
            for (name, row), *parts in sequences:
                if name in store.rows:  # its group was interrupted
                    continue
                tensors = hidden_states.to_stored(parts[0], torch.tensor(row["loss_mask"]), *parts[1:], store.dtype)
                if store.add(name, tensors):
                    written += sum(tensor.nbytes for tensor in tensors.values())
                else:
                    bad.append(name)
            passed = [row for part in pending[at : at + copies] for row in part]
            bar.update(sum(tokens[split][number] for split, number in passed))
            bar.set_postfix_str(f"{written / 1e9:.2f} GB by this rank", refresh=False)
        store.flush(wait=True)
    return [name for part in ranks.gather(bad) for name in part]


# (name, type, default, help, least value if any): see read_conversations.parse_flags
FLAGS = {
    "target and data": [
        ("target_model_path", str, ..., "folder or hub id; a folder may hold one nested model or an MLflow model"),
        ("data_path", str, ..., "folder written by prepare_data.py"),
        ("target_layer_ids", [int], None, "auxiliary layers, i = after i layers; none: 2 L//2 L-3"),
        ("trust_remote_code", common.boolean, False, "run code that comes with the target"),
    ],
    "how ranks share the target": target_model.SHARING_FLAGS,
    "what is written": [
        ("output_path", str, ..., "folder to write, or to go on with"),
        ("hidden_states_dtype", tuple(hidden_states.DTYPES), "bfloat16", "fp8: e4m3 with a scale per token and layer"),
        ("max_disk", float, None, "GB that this start may write; none: what the disk has", 0),
        ("dist_timeout", float, 20, "minutes a collective may take", 0),
        ("local_rank", int, -1, "set by the launcher; -1 = from LOCAL_RANK"),
    ],
}


def parse_args(argv=None):
    args = common.parse_flags(__doc__, FLAGS, foreign_flags.drop(argv, foreign_flags.OF_HIDDEN_STATES))
    if args.data_path.endswith((".json", ".jsonl")):
        common.fail(f"data_path {args.data_path} is a file: give the folder that prepare_data.py makes of it")
    return args


def main(args):
    device, world = ranks.start_distributed(args.dist_timeout, args.local_rank), dist.get_world_size()

    def prepare():
        target_model.check_sharding(args, world)
        data, data_config = dataloader.open_data(args.data_path)
        model_dir = target_files.resolve_target(args.target_model_path)
        config, _ = target_files.read_target_config(model_dir, args.trust_remote_code)
        target_model.check_heads(config, args.tp_size)
        tokenizer = target_files.hash_tokenizer(
            target_files.load_tokenizer(args.target_model_path, args.trust_remote_code)
        )
        if data_config["ingredients"]["tokenizer"] != tokenizer:
            common.fail(f"{args.data_path} was prepared with another tokenizer or chat template than the target's")
        layers = args.target_layer_ids or target_files.default_layer_ids(config.num_hidden_layers)
        settings = hidden_states.store_settings(model_dir, layers, data_config)
        store = hidden_states.Store(args.output_path, settings, create=args.hidden_states_dtype)
        if store.dtype != hidden_states.DTYPES[args.hidden_states_dtype]:
            common.fail(
                f"{args.output_path} is written in {store.index['dtype']}: give --hidden_states_dtype "
                f"{store.index['dtype']}, or another folder"
            )
        store.remove_rests()
        return args, layers, settings, plan_writing(args, config, store, data)

    args, layers, settings, pending = ranks.on_first_rank(prepare)
    data, _ = dataloader.open_data(args.data_path)
    store = hidden_states.Store(args.output_path, settings)
    model_dir = ranks.on_each_node(lambda: target_files.resolve_target(args.target_model_path))
    target = target_model.load_as_asked(args, model_dir, device, layers) if pending else None
    try:
        bad = write_all(args, target, store, data, pending)
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
