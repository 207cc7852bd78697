"""A target's files: locating them in any layout, tokenizer, configuration, single tensors, hashes.

Accepted as a target: a Hugging Face folder, a folder with one nested model, an entry of the hub's cache, MLflow's
layouts, a hub id.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from core import common

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken"]  # everything but the weights

MAX_DEPTH = 3  # levels below the given folder that are searched

MIN_TARGET_LAYERS = 7  # below that 2, L//2 and L-3 are not three distinct layers

SAMPLE = 2**20  # bytes of a weight file that are hashed at its beginning, in its middle and at its end

# ==================== Locating =======================================================================================


def locate(path_or_hub_id, names, patterns=SMALL_FILES):
    """The nearest folder that has one of the named files: the given one, one below it, or that of a hub id.

    A config.json counts only if it is a model's. patterns: the files of a hub id that are downloaded. Ends the program
    if no folder has such a file, or several on the same level.
    """
    target = str(path_or_hub_id)
    folder = Path(path_or_hub_id).expanduser()
    if not folder.is_dir():
        is_hub_id = re.fullmatch(common.HUB_ID, target)
        if folder.exists() or not is_hub_id:
            common.fail(f"target model {target}: neither a folder nor a hub id such as org/name")
        folder = common.download(target, patterns)
    folder = folder.resolve()
    current = folder / "refs" / "main"
    if current.is_file():  # an entry of the hub's cache
        folder = folder / "snapshots" / current.read_text().strip()
    found = nearest_folders(folder, names)
    if len(found) != 1:
        where = ", ".join(str(path.relative_to(folder)) for path in found)
        wanted = " or ".join(names)
        common.fail(f"target model {target}: {len(found)} folders with {wanted} in it instead of one: {where}")
    return found[0]


def nearest_folders(folder, names):
    """The folders with one of the named files, on the first level that has any."""
    for depth in range(MAX_DEPTH + 1):
        level = "*/" * depth
        files = [file for name in names for file in folder.glob(level + name)]
        found = sorted({file.parent for file in files if belongs_to_a_model(file)})
        models = [path for path in found if path.name == "model"]
        in_mlflow = all(path.name in ("model", "config", "tokenizer") for path in found)
        if models and in_mlflow:  # MLflow may keep such a file twice
            return models
        if found:
            return found
    return []


def belongs_to_a_model(path):
    """Whether a file can be a model's or a tokenizer's: any but a config.json of something else."""
    return path.is_file() and (path.name != "config.json" or b'"model_type"' in path.read_bytes())


def resolve_target(path_or_hub_id, weights=True):
    """The folder that has both a target's config.json and its weights.

    weights=False downloads only the small files of a hub id. Ends the program if there is no such model.
    """
    patterns = SMALL_FILES + ["*.safetensors"] if weights else SMALL_FILES
    model_dir = locate(path_or_hub_id, ["config.json"], patterns)
    if weights and not any(model_dir.glob("*.safetensors")):  # the hub may have them in the older format
        model_dir = locate(path_or_hub_id, ["config.json"], [*SMALL_FILES, "*.bin"])
    weights_dir = model_dir.parent / "model"
    if model_dir.name == "config" and weights_dir.is_dir():
        return link_together(model_dir, weights_dir)
    return model_dir


def link_together(*folders):
    """One folder of links to the files of several, as transformers reads one folder.

    It is in the hub's cache, because the target itself may be mounted read-only.
    """
    files = {}
    for folder in folders:
        files |= {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    key = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    merged = Path(constants.HF_HOME) / "mlflow_models" / key
    merged.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        with contextlib.suppress(FileExistsError):  # another rank was faster
            (merged / name).symlink_to(path)
    return merged


# ==================== Reading ========================================================================================


def load_tokenizer(target_model_path, trust_remote_code=False):
    """The target's fast tokenizer: a slow one has no character offsets, which an exact loss mask needs.

    Ends the program if there is none.
    """
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


def read_target_config(model_dir, trust_remote_code=False):
    """(text_config, config) of a target; ends the program if a draft cannot be trained for it."""
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        problem = str(error).splitlines()[0]
        common.fail(f"target_model_path {model_dir}: its config.json cannot be read: {problem}")
    text_config = config.get_text_config()
    if text_config.num_hidden_layers < MIN_TARGET_LAYERS:
        common.fail(
            f"the target {model_dir} has {text_config.num_hidden_layers} layers; EAGLE-3 reads three distinct ones "
            f"(2, L//2, L-3), which needs at least {MIN_TARGET_LAYERS}"
        )
    return text_config, config


def default_layer_ids(num_layers):
    """The auxiliary layers 2, L//2, L-3, as indices into hidden_states: the default of SGLang and vLLM."""
    return [2, num_layers // 2, num_layers - 3]


def read_target_tensor(model_dir, names):
    """The first tensor of `names` that the target's safetensors files have, alone or with a prefix, on the CPU.

    Reads no other tensor. Ends the program if there is none.
    """
    model_dir = Path(model_dir)
    files = files_of_tensors(model_dir)
    for name in names:
        found = [key for key in files if key == name]
        if not found:
            found = [key for key in files if key.endswith(f".{name}")]
        if len(found) == 1:
            with safe_open(model_dir / files[found[0]], "pt") as file:
                return file.get_tensor(found[0])
    common.fail(f"{model_dir} holds none of the tensors {', '.join(names)}")


def files_of_tensors(model_dir):
    """{name of a tensor: name of its file}; ends the program without safetensors files."""
    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    if index.exists():
        return json.loads(index.read_text())["weight_map"]
    if not single.exists():
        common.fail(f"{model_dir} has neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single.name)


# ==================== Hashes =========================================================================================


def hash_tokenizer(tokenizer):
    """Hash of everything that decides a conversation's tokens, except a date that a template may print."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return common.hash_of(parts)


def hash_target(model_dir):
    """Hash of a target's configuration and of samples of its weights: reading all of them takes minutes."""
    model_dir = Path(model_dir)
    config = (model_dir / "config.json").read_bytes()
    digest = hashlib.sha256(config)
    for path in sorted([*model_dir.glob("*.safetensors"), *model_dir.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
