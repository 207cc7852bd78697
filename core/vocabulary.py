"""The draft vocabulary: token counts, the mapping d2t and t2d, its file and its checks.

Vd: tokens of the draft vocabulary, V: tokens of the target's. Draft token i is target token i + d2t[i].
"""

import io
from pathlib import Path

import numpy as np
import torch

from core import common


def read_token_freq(path):
    """{token id: count} of a token_freq.pt; ends the program if the file holds anything else."""
    try:
        counts = {int(i): int(n) for i, n in torch.load(path, map_location="cpu", weights_only=True).items()}
    except OSError as error:
        reason = error.strerror or error
        common.fail(f"token counts {path}: {reason}; prepare_data.py writes token_freq.pt into the folder of its data")
    except Exception as error:  # a file of another kind fails anywhere in the unpickler
        common.fail(
            f"token counts {path}: not a plain dict {{token id: count}} in a file of torch ({type(error).__name__})"
        )
    if not counts or min(*counts, *counts.values()) < 0 or max(*counts, *counts.values()) >= 2**53:
        common.fail(f"token counts {path}: none in it, or a token id or count that is negative or above 2**53")
    return counts


def target_ids(d2t):
    """Target ids [Vd] of the draft vocabulary, from the offsets d2t [Vd] (a tensor)."""
    return torch.arange(len(d2t), device=d2t.device) + d2t


def with_mapping(tensors, d2t, vocab_size):
    """A draft's tensors with d2t [Vd] and t2d [V], unless its vocabulary is the target's."""
    if len(d2t) == vocab_size:
        return tensors
    d2t = d2t.cpu()
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids(d2t)] = True
    return tensors | {"d2t": d2t, "t2d": t2d}


def coverage_of(path, d2t):
    """Share of the supervised tokens counted in the file `path` that are in the draft vocabulary."""
    counts = read_token_freq(path)
    return sum(counts.get(token, 0) for token in target_ids(d2t).tolist()) / sum(counts.values())


def build_mapping(token_freq, draft_vocab_size, target_vocab_size):
    """(d2t int64 [Vd], t2d bool [V]) of the draft_vocab_size most frequent tokens of {token id: count}.

    Ties go to the lower id. If fewer tokens occur than the draft has rows, the lowest unused ids fill it: they count 0.
    Ends the program if the sizes or the ids do not fit.
    """
    if not 0 < draft_vocab_size <= target_vocab_size:
        common.fail(
            f"draft_vocab_size {draft_vocab_size} must be at least 1 and at most {target_vocab_size}, the target's"
        )
    ids = np.fromiter(token_freq.keys(), np.int64)
    counts = np.fromiter(token_freq.values(), np.int64)
    outside = ids[(ids < 0) | (ids >= target_vocab_size)]
    if len(outside):
        common.fail(
            f"{len(outside)} token ids of the counts are outside the target's vocabulary of {target_vocab_size} "
            f"(such as {outside[0]}): the counts were made with another tokenizer"
        )
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
    if not total:
        return 1.0
    covered = sum(count for token, count in token_freq.items() if t2d[token])
    return covered / total


def mapping_problems(d2t, t2d):
    """The problems of a mapping, one line each; empty if it is sound. d2t [Vd] and t2d [V] are NumPy arrays."""
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
        common.write_atomic(folder / f"{name}.npy", buffer.getvalue())


def load_mapping(d2t_path, t2d_path, target_vocab_size=None):
    """(d2t int64 [Vd], t2d bool [V]) from two .npy files; ends the program if they do not fit together."""
    arrays = []
    for path in (d2t_path, t2d_path):
        try:
            arrays.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
            common.fail(f"the vocabulary mapping {path} cannot be read: {common.first_line(error)}")
        if not isinstance(arrays[-1], np.ndarray):
            common.fail(f"the vocabulary mapping {path} is not one array: give the .npy of build_vocab_mapping.py")
    d2t, t2d = arrays
    problems = mapping_problems(d2t, t2d)
    if target_vocab_size is not None and not problems and len(t2d) != target_vocab_size:
        problems = [f"t2d has {len(t2d)} tokens, the target's vocabulary {target_vocab_size}"]
    if problems:
        common.fail(f"the vocabulary mapping {d2t_path}, {t2d_path} is inconsistent: {'; '.join(problems)}")
    return d2t, t2d


def choose_mapping(draft_vocab_size, target_vocab_size, token_freq_path, d2t_path=None, t2d_path=None):
    """d2t, int64 [Vd] tensor: from the files, if given, else from the token counts; zeros for the full vocabulary."""
    if d2t_path:
        d2t, _ = load_mapping(d2t_path, t2d_path, target_vocab_size)
        if draft_vocab_size not in (target_vocab_size, len(d2t)):
            common.fail(f"draft_vocab_size {draft_vocab_size}, but {d2t_path} has {len(d2t)} entries")
    elif draft_vocab_size < target_vocab_size:
        d2t, _ = build_mapping(read_token_freq(token_freq_path), draft_vocab_size, target_vocab_size)
    else:
        d2t = np.zeros(target_vocab_size, dtype=np.int64)
    return torch.from_numpy(d2t)
