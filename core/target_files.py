"""target_files."""

import contextlib
import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig

from core import common

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken"]


# ---------------------------------------------------------------------------- the target's files
def locate(path_or_hub_id, names, patterns=SMALL_FILES):
    """The folder with one of the named files: the one given, the nearest at most three levels below it, or a hub id's.

    So it finds a model somewhere inside and both of MLflow's layouts. A config.json counts if it is a model's.
    patterns: what is downloaded of a hub id. Ends with one line if no folder or several equally near ones have a file.
    """
    target, folder = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", target):
            common.fail(f"target model {target}: neither a folder nor a hub id such as org/name")
        folder = common.download(target, patterns)
    folder, found = folder.resolve(), []
    if (folder / "refs" / "main").is_file():  # an entry of the hub's cache
        folder = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    for depth in range(4):
        files = [file for name in names for file in folder.glob("*/" * depth + name) if file.is_file()]
        files = [file for file in files if file.name != "config.json" or b'"model_type"' in file.read_bytes()]
        found = found or sorted({file.parent for file in files})
    if {path.name for path in found} <= {"model", "config", "tokenizer"}:  # MLflow may keep such a file twice
        found = [path for path in found if path.name == "model"] or found
    if len(found) != 1:
        where = ", ".join(str(path.relative_to(folder)) for path in found)
        common.fail(
            f"target model {target}: {len(found)} folders with {' or '.join(names)} in it instead of one: {where}"
        )
    return found[0]


def load_tokenizer(target_model_path, trust_remote_code=False):
    """The target's fast tokenizer; a slow one has no character offsets, so the loss mask could not be exact."""
    from transformers import AutoTokenizer

    folder = locate(target_model_path, TOKENIZER_FILES)
    if (folder / "tiktoken.model").exists() and not (folder / "tokenizer.json").exists():
        common.fail(f"the tokenizer in {folder} is a tiktoken.model: add a tokenizer.json that was made of it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        common.fail(f"cannot load the tokenizer in {folder}: {error}")
    if not tokenizer.is_fast:
        common.fail(f"the tokenizer in {folder} is not a fast one: add its tokenizer.json")
    return tokenizer


def hash_tokenizer(tokenizer):
    """Hash of all that decides which tokens a conversation becomes, but for a date that a template may print."""
    return common.hash_of([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map])


MIN_TARGET_LAYERS = 7  # below that 2, L//2 and L-3 are not three distinct layers


def resolve_target(path_or_hub_id, weights=True):
    """The folder with config.json and weights of a snapshot, of the one model below a folder, of MLflow or a hub id.

    weights=False downloads only the small files of a hub id. Ends with one line if there is no such model.
    """
    model_dir = locate(path_or_hub_id, ["config.json"], SMALL_FILES + ["*.safetensors"] * weights)
    if weights and not any(model_dir.glob("*.safetensors")):  # on the hub there may be weights in the older format
        model_dir = locate(path_or_hub_id, ["config.json"], [*SMALL_FILES, "*.bin"])
    if model_dir.name == "config" and (model_dir.parent / "model").is_dir():
        return _link_together(model_dir, model_dir.parent / "model")
    return model_dir


def _link_together(*folders):
    """One folder of links in the hub's cache: transformers wants one folder, and the input may be mounted read-only."""
    files = {path.name: path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()}
    name = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    merged = Path(constants.HF_HOME) / "mlflow_models" / name
    merged.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        with contextlib.suppress(FileExistsError):  # another rank was faster
            (merged / name).symlink_to(path)
    return merged


def read_target_config(model_dir, trust_remote_code=False):
    """(text configuration, whole configuration) of a target folder; ends the program if it cannot train a draft."""
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        common.fail(f"target_model_path {model_dir}: its config.json cannot be read: {str(error).splitlines()[0]}")
    text = config.get_text_config()
    if text.num_hidden_layers < MIN_TARGET_LAYERS:
        common.fail(
            f"the target {model_dir} has {text.num_hidden_layers} layers; EAGLE-3 reads three distinct ones "
            f"(2, L//2, L-3), which needs at least {MIN_TARGET_LAYERS}"
        )
    return text, config


def default_layer_ids(num_layers):
    """The auxiliary layers 2, L//2, L-3 in hidden_states indexing (the default of SGLang and vLLM)."""
    return [2, num_layers // 2, num_layers - 3]


def read_target_tensor(model_dir, names):
    """The first tensor that a target's safetensors files hold under one of `names`, or behind a prefix; read alone."""
    model_dir = Path(model_dir)
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    elif (model_dir / "model.safetensors").exists():
        with safe_open(model_dir / "model.safetensors", "pt") as file:
            weight_map = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        common.fail(f"{model_dir} has neither model.safetensors nor model.safetensors.index.json")
    for name in names:
        found = [key for key in weight_map if key == name] or [key for key in weight_map if key.endswith(f".{name}")]
        if len(found) == 1:
            with safe_open(model_dir / weight_map[found[0]], "pt") as file:
                return file.get_tensor(found[0])
    common.fail(f"{model_dir} holds none of the tensors {', '.join(names)}")


SAMPLE = 2**20  # bytes of a weight file that are hashed, at its beginning, in its middle and at its end


def hash_target(model_dir):
    """Hash of a target's configuration and of samples of its weights: to read all of them takes minutes."""
    model_dir = Path(model_dir)
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in sorted([*model_dir.glob("*.safetensors"), *model_dir.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for at in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(at)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
