"""Turn conversations into tokens and a loss mask: the data set that every later stage reads."""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np

FORMAT_VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken")
HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")


# ---------------------------------------------------------------------------- conventions that all scripts share
def fail(message) -> NoReturn:
    """Report an error that the user can mend: one line on stderr, exit code 2, no traceback."""
    print("error: " + " ".join(str(message).split("\n")), file=sys.stderr, flush=True)
    raise SystemExit(2)


def normalise_argv(argv, aliases=None):
    """Kebab-case flags to snake_case, then other trainers' names (aliases: {alias: name}); values stay untouched."""
    aliases, words = aliases or {}, []
    for position, word in enumerate(argv):
        if word == "--":
            return words + list(argv[position:])
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            word = "--" + aliases.get(name, name) + equals + value
        words.append(word)
    return words


def boolean(text):
    """argparse type of flags that take a value or none; for `type=boolean, nargs="?", const=True, default=False`."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def write_atomic(path, data):
    """Write bytes or str so that a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def hash_file(path):
    """sha256 of the content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------- the target's folder and tokenizer
def resolve_target(path_or_hub_id, weights=True):
    """(model folder, tokenizer folder) of a local snapshot, a folder with one nested model, an MLflow model or a hub id.

    weights=False downloads only the small files of a hub id. Ends with one line if there is no such model.
    """
    name, folder = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return _resolve_folder(folder.resolve())
    if folder.exists() or not HUB_ID.fullmatch(name):
        fail(f"target model {name}: neither a folder nor a hub id such as org/name")
    import huggingface_hub

    patterns = SMALL_FILES + (("*.safetensors",) if weights else ())
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as error:  # the hub client raises errors of several libraries; each means that there is no model
        fail(f"target model {name}: no such folder, and the hub does not deliver it ({type(error).__name__}: {error})")
    return _resolve_folder(Path(folder))


def _is_model(folder):
    if (folder / "MLmodel").is_file():
        return True
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _resolve_folder(folder):
    if (folder / "MLmodel").is_file():
        model = next((folder / sub for sub in ("data/model", "model") if (folder / sub).is_dir()), None)
        if model is None:
            fail(f"MLflow model {folder}: neither data/model nor model in it")
        return _with_config(model, folder / "data" / "config"), _tokenizer_folder(model)
    if (folder / "config.json").is_file():
        return folder, _tokenizer_folder(folder)
    if (folder / "snapshots").is_dir():  # an entry of the hub's cache: refs/main names the commit
        reference = folder / "refs" / "main"
        commits = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
        if reference.is_file() and (folder / "snapshots" / reference.read_text().strip()).is_dir():
            commits = [folder / "snapshots" / reference.read_text().strip()]
        if len(commits) != 1:
            fail(f"{folder}: {len(commits)} snapshots and no refs/main that chooses one")
        return _resolve_folder(commits[0])
    found, level = [], [folder]
    for _ in range(3):
        level = sorted(path for parent in level for path in parent.iterdir() if path.is_dir())
        found += [path for path in level if _is_model(path)]
        level = [path for path in level if path not in found]
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:4])
        fail(f"{folder}: no config.json in it and {len(found)} models below it, exactly one is needed {names}".strip())
    return _resolve_folder(found[0])


def _tokenizer_folder(model):
    """The model's own folder, or the separate one in which MLflow keeps the tokenizer."""
    for folder in (model, model.parent / "tokenizer", model.parent / "components" / "tokenizer"):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    fail(f"{model}: no tokenizer in it (looked for {', '.join(TOKENIZER_FILES)}) nor in a tokenizer folder beside it")


def _with_config(model, config):
    """The model's folder, or a folder of links in the hub's cache if MLflow keeps config.json apart from the weights.

    transformers wants both in one folder, and the input may be mounted read-only.
    """
    if (model / "config.json").is_file() or not (config / "config.json").is_file():
        return model
    from huggingface_hub.constants import HF_HOME

    files = {path.name: path for folder in (config, model) for path in sorted(folder.iterdir()) if path.is_file()}
    merged = Path(HF_HOME) / "mlflow_models" / hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    merged.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if not (merged / name).is_symlink():
            link = merged / f".{name}.{os.getpid()}"
            link.symlink_to(path)
            link.replace(merged / name)
    return merged


def load_tokenizer(tokenizer_dir, trust_remote_code=False):
    """The fast tokenizer of the folder; a slow one has no character offsets, so the loss mask could not be exact."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        fail(f"cannot load the tokenizer in {tokenizer_dir}: {error}")
    if not tokenizer.is_fast:
        fail(f"the tokenizer in {tokenizer_dir} is not a fast one: add its tokenizer.json")
    return tokenizer


# ---------------------------------------------------------------------------- reading what this script wrote
def open_data(folder):
    """(DatasetDict, data_config) of a prepared folder; columns input_ids int32, loss_mask uint8, length int32."""
    from datasets import DatasetDict

    folder = Path(folder)
    for name in ("data_config.json", "dataset_dict.json", "token_freq.pt", "train"):
        if not (folder / name).exists():
            fail(f"{folder} is not a complete prepared data set: {name} is missing; run prepare_data.py again")
    config = json.loads((folder / "data_config.json").read_text())
    if config.get("format_version") != FORMAT_VERSION:
        version = config.get("format_version")
        fail(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}: run prepare_data.py again")
    return DatasetDict.load_from_disk(str(folder)), config


def read_token_freq(path):
    """{token id: count} from a file written by torch.save: a dict, or a 1-D tensor indexed by token id."""
    import pickle

    import torch

    if not Path(path).is_file():
        fail(f"token counts {path}: no such file")
    try:
        counts = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        fail(f"token counts {path}: not a file of plain tensors or numbers ({str(error).splitlines()[0][:200]})")
    if isinstance(counts, torch.Tensor) and counts.dim() == 1:
        counts = {i: count for i, count in enumerate(counts.tolist()) if count}
    if not isinstance(counts, dict) or not counts:
        fail(f"token counts {path}: neither a dict {{token id: count}} with entries nor a 1-D tensor")
    counts = {int(token): int(count) for token, count in counts.items()}
    if min(counts) < 0 or min(counts.values()) < 0:
        fail(f"token counts {path}: negative token id or count")
    return counts


def epoch_order(num_rows, seed, epoch):
    """Permutation of the rows in one epoch, int64 [num_rows]; the same on every rank and machine.

    RandomState because NumPy promises that its stream never changes, so a run resumed years later sees the same order.
    """
    return np.random.RandomState([seed % 2**32, epoch]).permutation(num_rows).astype(np.int64)


def step_rows(order, step, global_batch_size, rank, world_size):
    """Rows that one rank trains on in one optimizer step of the epoch; the last batch may be short, nothing is dropped."""
    batch = order[step * global_batch_size : (step + 1) * global_batch_size]
    return [int(row) for row in batch[rank::world_size]]
