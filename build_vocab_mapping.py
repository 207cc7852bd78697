"""The draft vocabulary: which of the target's tokens the draft's head has a row for.

In:  token counts of the supervised tokens (token_freq.pt, written by prepare_data.py).
Out: d2t.npy  int64 [Vd]  offsets: target id = draft id + d2t[draft id], the target ids ascending
     t2d.npy  bool  [V]   True where a target token is in the draft vocabulary

    python build_vocab_mapping.py --token_freq_path prepared/token_freq.pt --draft_vocab_size 32000 \\
        --target_model_path meta-llama/Llama-3.1-8B-Instruct --output_path ./vocab_mapping

    python build_vocab_mapping.py --token_freq_path tiny/token_freq.pt --draft_vocab_size 256 \\
        --target_vocab_size 400 --output_path ./vocab_mapping
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from prepare_data import locate, read_token_freq
from read_conversations import fail, parse_flags, write_atomic


def target_ids(d2t):
    """Target ids [Vd] of the draft vocabulary, from the offsets d2t [Vd] (a tensor)."""
    return torch.arange(len(d2t), device=d2t.device) + d2t


def build_mapping(token_freq, draft_vocab_size, target_vocab_size):
    """(d2t int64 [Vd], t2d bool [V]) of the draft_vocab_size most frequent tokens of {token id: count}.

    Ties go to the lower id, and so does what is missing when fewer tokens occur than the draft has rows: an unused
    token is one with count 0. Ends the program if the sizes or the ids do not fit.
    """
    if not 0 < draft_vocab_size <= target_vocab_size:
        fail(f"draft_vocab_size {draft_vocab_size} must be at least 1 and at most {target_vocab_size}, the target's")
    ids, counts = (np.fromiter(column, np.int64) for column in (token_freq.keys(), token_freq.values()))
    wrong = ids[(ids < 0) | (ids >= target_vocab_size)]
    if len(wrong):
        fail(f"{len(wrong)} token ids of the counts are outside the target's vocabulary of {target_vocab_size} "
             f"(such as {wrong[0]}): the counts were made with another tokenizer")  # fmt: skip
    frequency = np.zeros(target_vocab_size, np.int64)
    frequency[ids] = counts
    by_count = np.argsort(-frequency, kind="stable")  # stable: equal counts stay in the order of their ids
    target_ids = np.sort(by_count[:draft_vocab_size])
    t2d = np.zeros(target_vocab_size, np.bool_)
    t2d[target_ids] = True
    return target_ids - np.arange(draft_vocab_size), t2d


def coverage(token_freq, t2d):
    """Share of the supervised tokens that are in the draft vocabulary; 1.0 where there are none."""
    total = sum(token_freq.values())
    return sum(count for token, count in token_freq.items() if t2d[token]) / total if total else 1.0


def mapping_problems(d2t, t2d):
    """What is wrong with a mapping, one line each, empty if it is whole: d2t [Vd] and t2d [V] as NumPy arrays."""
    problems = [
        f"{name} is {array.dtype} {list(array.shape)}, not {dtype} with one dimension"
        for name, array, dtype in (("d2t", d2t, "int64"), ("t2d", t2d, "bool"))
        if array.dtype != dtype or array.ndim != 1
    ]
    if problems:
        return problems
    target_ids = d2t + np.arange(len(d2t))
    outside = np.flatnonzero((target_ids < 0) | (target_ids >= len(t2d)))
    if len(outside):
        first = outside[0]
        problems.append(f"d2t[{first}] leads to token {target_ids[first]}, outside the vocabulary of {len(t2d)}")
    falling = np.flatnonzero(np.diff(target_ids) <= 0)
    if len(falling):
        first = falling[0] + 1
        pair = f"draft token {first} is target token {target_ids[first]}, the one before {target_ids[first - 1]}"
        problems.append(f"d2t is not ascending: {pair}")
    if not problems and not np.array_equal(np.flatnonzero(t2d), target_ids):
        different = np.setxor1d(np.flatnonzero(t2d), target_ids)
        problems.append(f"t2d disagrees with d2t on {len(different)} tokens, such as {different[0]}")
    return problems


def save_mapping(folder, d2t, t2d):
    """Write folder/d2t.npy and folder/t2d.npy, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("d2t", d2t), ("t2d", t2d)):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        write_atomic(folder / f"{name}.npy", buffer.getvalue())


def load_mapping(d2t_path, t2d_path, target_vocab_size=None):
    """(d2t int64 [Vd], t2d bool [V]) from two .npy files; ends the program if they are not one whole mapping."""
    arrays = []
    for path in (d2t_path, t2d_path):
        try:
            arrays.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            fail(f"the vocabulary mapping {path} cannot be read: {str(error).splitlines()[0]}")
    d2t, t2d = arrays
    problems = mapping_problems(d2t, t2d)
    if target_vocab_size is not None and not problems and len(t2d) != target_vocab_size:
        problems = [f"t2d has {len(t2d)} tokens, the target's vocabulary {target_vocab_size}"]
    if problems:
        fail(f"the vocabulary mapping {d2t_path}, {t2d_path} is not whole: {'; '.join(problems)}")
    return d2t, t2d


def choose_mapping(draft_vocab_size, target_vocab_size, token_freq_path, d2t_path=None, t2d_path=None):
    """d2t, int64 [Vd] tensor: of the files, if given; else of the token counts; all zeros for the full vocabulary."""
    if d2t_path:
        d2t, _ = load_mapping(d2t_path, t2d_path, target_vocab_size)
        if draft_vocab_size not in (target_vocab_size, len(d2t)):
            fail(f"draft_vocab_size {draft_vocab_size}, but {d2t_path} has {len(d2t)} entries")
    elif draft_vocab_size < target_vocab_size:
        d2t, _ = build_mapping(read_token_freq(token_freq_path), draft_vocab_size, target_vocab_size)
    else:
        d2t = np.zeros(target_vocab_size, dtype=np.int64)
    return torch.from_numpy(d2t)


def read_vocab_size(target_model_path):
    """The target's vocabulary size by its config.json: the rows of its head, maybe more than its tokenizer has."""
    path = locate(target_model_path, ["config.json"]) / "config.json"
    config = json.loads(path.read_text())
    size = config.get("text_config", config).get("vocab_size", config.get("vocab_size"))
    if size is None:  # Gemma 3's files leave out what is their family's default
        from transformers import AutoConfig

        with contextlib.suppress(OSError, ValueError, KeyError):
            config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
            size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        fail(f"{path} has no vocab_size: give --target_vocab_size")
    return size


FLAGS = {
    "the draft vocabulary": [
        ("token_freq_path", str, "./token_freq.pt", "counts of the supervised tokens"),
        ("draft_vocab_size", int, 32000, "tokens of the draft vocabulary", 1),
        ("target_vocab_size", int, None, "tokens of the target's vocabulary; none: give target_model_path", 1),
        ("target_model_path", str, None, "folder or hub id of the target, whose config.json has the size"),
        ("output_path", str, "./vocab_mapping", "folder for d2t.npy and t2d.npy"),
    ]
}


def parse_args(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    if (args.target_vocab_size is None) == (args.target_model_path is None):
        fail("give one of --target_vocab_size and --target_model_path")
    return args


def main(args):
    token_freq = read_token_freq(args.token_freq_path)
    target_vocab_size = args.target_vocab_size
    if target_vocab_size is None:
        target_vocab_size = read_vocab_size(args.target_model_path)
    d2t, t2d = build_mapping(token_freq, args.draft_vocab_size, target_vocab_size)
    save_mapping(args.output_path, d2t, t2d)
    print(f"draft vocabulary: {len(d2t):,} of {len(t2d):,} tokens, "
          f"{coverage(token_freq, t2d):.3%} of {sum(token_freq.values()):,} supervised tokens covered")  # fmt: skip
    unused = len(d2t) - sum(count > 0 and bool(t2d[token]) for token, count in token_freq.items())
    if unused:
        print(f"{unused:,} tokens of the draft vocabulary never occur: filled with the lowest unused ids")
    print(f"written to {Path(args.output_path) / 'd2t.npy'} and t2d.npy")


if __name__ == "__main__":
    main(parse_args())
