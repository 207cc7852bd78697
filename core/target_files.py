"""A target's files: locating them in any layout, tokenizer, configuration, headers and single tensors, hashes.

Accepted as a target: a Hugging Face folder, a folder with one nested model, an entry of the hub's cache, MLflow's
layouts, a hub id.
"""

import contextlib
import hashlib
import json
import operator
import re
import zipfile
from pathlib import Path

from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from core import common

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken"]  # everything but the weights

MAX_DEPTH = 3  # levels below the given folder that are searched

MIN_TARGET_LAYERS = 7  # below that 2, L//2 and L-3 are not three distinct layers

TEMPLATES_FOLDER = "additional_chat_templates"  # beside a tokenizer: its templates with names, such as tool_use

ADAPTER = "adapter_config.json"

# {file in a folder that holds no Hugging Face model: what it tells}
OTHER_FORMS = {
    ADAPTER: "an adapter's: merge it by import_target.py first",
    "*.gguf": "a GGUF file: make a folder of it by import_target.py first",
    "params.json": "of Meta's or Mistral's own format: take the model's Hugging Face form",
    "zero_to_fp32.*": "of a DeepSpeed checkpoint: run it there first, and give the folder that it writes",
}

# The files of weights, in the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

FINGERPRINT = "samples-2:"  # begins a target's fingerprint: change it whenever the same target would get another one

HEADER_BYTES = 2**27  # of a safetensors file at most, as the library has it
SAMPLE = 256  # bytes that are hashed at the beginning, in the middle and at the end of each tensor

# ==================== Locating =======================================================================================


def locate(path_or_hub_id, names, patterns=SMALL_FILES):
    """The nearest folder that has one of the named files: the given one, one below it, or that of a hub id.

    A config.json counts only if it is a model's. patterns: the files of a hub id that are downloaded. Ends the program
    if no folder has such a file, or several on the same level.
    """
    folder = open_folder(path_or_hub_id, patterns)
    found = nearest_folders(folder, names)
    if not found:
        check_other_forms(folder)
    if len(found) != 1:
        where = ", ".join(str(path.relative_to(folder)) for path in found)
        wanted = " or ".join(names)
        common.fail(f"target model {path_or_hub_id}: {len(found)} folders with {wanted} in it instead of one: {where}")
    return found[0]


def open_folder(path_or_hub_id, patterns):
    """The folder itself, or that of a hub id's files that match; ends the program if it is neither."""
    target = str(path_or_hub_id)
    folder = Path(path_or_hub_id).expanduser()
    if not folder.is_dir():
        is_hub_id = re.fullmatch(common.HUB_ID, target)
        if folder.suffix == ".gguf":
            common.fail(f"target model {target} is a GGUF file: make a folder of it by import_target.py first")
        if folder.exists() or not is_hub_id:
            common.fail(f"target model {target}: neither a folder nor a hub id such as org/name")
        folder = common.download(target, patterns)
    folder = folder.resolve()
    current = folder / "refs" / "main"
    if current.is_file():  # an entry of the hub's cache
        folder = folder / "snapshots" / current.read_text().strip()
    return folder


def check_other_forms(folder):
    """End the program if a folder holds a model in a form other than Hugging Face's, and name the remedy."""
    for pattern, what in OTHER_FORMS.items():
        found = next(folder.glob(pattern), None)
        if found:
            common.fail(f"target model {folder} is not a Hugging Face model: {found.name} is {what}")


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
        if (folder / TEMPLATES_FOLDER).is_dir():
            files[TEMPLATES_FOLDER] = folder / TEMPLATES_FOLDER
    key = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    merged = Path(constants.HF_HOME) / "mlflow_models" / key
    try:
        merged.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            with contextlib.suppress(FileExistsError):  # another rank was faster
                (merged / name).symlink_to(path)
    except OSError as error:
        common.fail(f"HF_HOME, where the files of a target are linked together in {merged}: {error}")
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
    except Exception as error:  # of several libraries, for files of another kind
        common.fail(f"cannot load the tokenizer in {folder}: {common.first_line(error)}")
    if not tokenizer.is_fast:
        common.fail(f"the tokenizer in {folder} is not a fast one: add its tokenizer.json")
    return tokenizer


def read_target_config(model_dir, trust_remote_code=False):
    """(text_config, config) of a target; ends the program if a draft cannot be trained for it."""
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except Exception as error:  # of several libraries
        problem = common.first_line(error)
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
    """{name of a tensor: name of its file}; ends the program without complete safetensors files."""
    files = {}
    for path in weight_files(model_dir):
        if path.suffix != ".safetensors":
            common.fail(f"{model_dir} has neither model.safetensors nor model.safetensors.index.json")
        files |= dict.fromkeys(read_header(path), path.name)
    return files


def weight_files(model_dir):
    """The files that transformers reads a target's weights from, sorted; ends the program if one is not there."""
    model_dir = Path(model_dir)
    paths = [model_dir / name for name in WEIGHT_FILES]
    first = next((path for path in paths if path.exists() or path.is_symlink()), None)  # the link may lead nowhere
    if first is None:
        check_other_forms(model_dir)
        there = ", ".join(
            sorted(path.name for path in model_dir.glob("*.*") if path.suffix in (".safetensors", ".bin"))
        )
        common.fail(
            f"{model_dir} has neither model.safetensors nor pytorch_model.bin, nor the index of either, but "
            f"{there or 'no weights'}"
        )
    files = [first]
    if first.suffix == ".json":
        try:
            names = sorted(set(json.loads(first.read_text())["weight_map"].values()))
            files = [common.below(model_dir, name) for name in names]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            common.fail(f"{first} is not an index of weights: {type(error).__name__}: {error}")
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        common.fail(
            f"{first} names {len(missing)} of {len(files)} files that are not there, such as {missing[0]}: download "
            "the target again"
        )
    for path in files:
        try:
            start = path.open("rb").read(30)
        except OSError as error:
            common.fail(f"{path} cannot be read: {error.strerror}")
        if start.startswith(b"version https://git-lfs"):
            common.fail(f"{path} is only a pointer of git LFS, not the weights: run `git lfs pull` there")
    return files


def read_header(path):
    """{name: {dtype, shape, data_offsets from the beginning of the file}} of a safetensors file's tensors.

    Ends the program if the file is not complete.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(start - 8)) if start <= min(size, HEADER_BYTES) else {}
            header.pop("__metadata__", None)
            for tensor in header.values():
                first, end = map(operator.index, tensor["data_offsets"])
                if not 0 <= first <= end or not tensor.keys() >= {"dtype", "shape"}:
                    raise ValueError
                tensor["data_offsets"] = [start + first, start + end]
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            header = {}
    if not header:
        common.fail(f"{path} of {size:,} bytes is not a safetensors file: download or copy it again")
    end = max(tensor["data_offsets"][1] for tensor in header.values())
    if end != size:
        common.fail(f"{path} has {size:,} bytes, by its header {end:,}: it is cut off; download or copy it again")
    return header


def read_headers(model_dir):
    """The headers of all of a target's safetensors files in one dictionary; empty for weights in the older format."""
    headers = [read_header(path) for path in weight_files(model_dir) if path.suffix == ".safetensors"]
    return {name: tensor for header in headers for name, tensor in header.items()}


# ==================== Hashes =========================================================================================


def hash_tokenizer(tokenizer):
    """Hash of everything that decides a conversation's tokens, except a date that a template may print."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return common.hash_of(parts)


def hash_target(model_dir):
    """Fingerprint of a target: of its configuration, and of samples of each tensor, as reading all takes minutes.

    It does not depend on where the files lie, when they were written, or how tensors are divided among safetensors
    files. It notices any change of names, shapes, dtypes, or of a complete matrix; not one of single values.
    """
    model_dir = Path(model_dir)
    samples = {}
    for path in weight_files(model_dir):
        samples |= sample_tensors(path) if path.suffix == ".safetensors" else sample_archive(path)
    config = (model_dir / "config.json").read_bytes()
    return FINGERPRINT + common.hash_of([hashlib.sha256(config).hexdigest(), samples])


def sample_tensors(path):
    """{name: [dtype, shape, hash of samples]} of a safetensors file's tensors."""
    samples = {}
    with path.open("rb") as file:
        for name, tensor in read_header(path).items():
            start, end = tensor["data_offsets"]
            digest = hashlib.sha256()
            for place in sample_places(start, end):
                file.seek(place)
                digest.update(file.read(min(SAMPLE, end - place)))
            samples[name] = [tensor["dtype"], tensor["shape"], digest.hexdigest()]
    return samples


def sample_places(start, end):
    """Where samples of the bytes [start, end) begin: at the beginning, in the middle, at the end."""
    last = max(end - SAMPLE, start)
    return sorted({start, (start + last) // 2, last})


def sample_archive(path):
    """{part: what tells its content} of a file of weights in PyTorch's format.

    Since PyTorch 1.6 it is a zip archive, which has a checksum of each tensor; older files are hashed completely.
    """
    if not zipfile.is_zipfile(path):
        return {path.name: common.hash_file(path)}
    with zipfile.ZipFile(path) as archive:
        return {f"{path.name}/{part.filename}": [part.file_size, part.CRC] for part in archive.infolist()}


def check_version(path, fingerprint, remedy):
    """End the program if what is at `path` has a target's fingerprint of an earlier version."""
    if isinstance(fingerprint, str) and not fingerprint.startswith(FINGERPRINT):
        common.fail(f"{path} was written by an earlier version: {remedy}")
