"""Import a target: copy or convert it from the hub, or from another form, into one Hugging Face folder.

In:  a hub id, a Hugging Face folder, a folder with one nested model, an MLflow model; a GGUF file, which is dequantised
     (package gguf); an adapter such as LoRA's, which is merged into its base model (package peft).
Out: --output_path: configuration, weights and tokenizer in one folder.

    python import_target.py --target_model_path meta-llama/Llama-3.1-8B-Instruct --output_path models/llama3
    python import_target.py --target_model_path model-Q8_0.gguf --output_path models/mine \\
        --base_model_path org/model     # whose tokenizer is taken, rather than one made of the GGUF file
    python import_target.py --target_model_path my-lora --output_path models/mine
"""

import filecmp
import importlib.util
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from core import claims, common, target_files, target_model

# ==================== Copying ========================================================================================


def copy_target(path_or_hub_id, folder, trust_remote_code=False):
    """Copy the files that are read of a target into `folder`, whatever their layout was; returns their bytes.

    Ends the program if a draft cannot be trained for the target, as far as this shows without its weights in memory,
    or if the folder cannot be written.
    """
    folder = Path(folder)
    common.check_writable("output_path", folder)
    files = files_of(path_or_hub_id, trust_remote_code)
    with claims.only_writer("output_path", folder):
        check_apart(folder, files)
        for name, path in files.items():
            copy_file(path, folder / name)
    return sum(path.stat().st_size for path in files.values())


def check_apart(folder, files):
    """End the program if `folder` holds a target's files, or what they link to, or another target's weights."""
    if not folder.exists():
        return
    places = {path.parent for path in files.values()} | {path.resolve().parent for path in files.values()}
    if any(folder.samefile(place) for place in places):
        common.fail(f"output_path {folder} holds the target itself: give another folder")
    others = sorted(name for name in target_files.WEIGHT_FILES if name not in files and (folder / name).exists())
    others += [name for name, path in files.items() if (folder / name).exists() and not is_copy(path, folder / name)]
    if others:
        common.fail(f"output_path {folder} holds another target's {others[0]}: give another folder, or remove it")


def is_copy(path, other):
    """Whether a file of a target has the content of another one; of large ones, the header and samples of tensors."""
    if path.stat().st_size != other.stat().st_size:
        return False
    if path.suffix == ".safetensors":
        return target_files.sample_tensors(path) == target_files.sample_tensors(other)
    return filecmp.cmp(path, other, shallow=False)


def copy_file(path, copy):
    """Copy a file under its name once the copy is complete."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with common.building(copy) as unfinished:
            shutil.copyfile(path, unfinished)  # without attributes, which mounted storage may not keep
    except OSError as error:
        common.fail(f"{path} cannot be copied into {copy.parent}: {error.strerror}")


def files_of(path_or_hub_id, trust_remote_code=False):
    """{name in one folder: path} of what is read of a target, weights first.

    Ends the program if a draft cannot be trained for it.
    """
    model_dir = target_files.resolve_target(path_or_hub_id)
    _, config = target_files.read_target_config(model_dir, trust_remote_code)
    target_files.load_tokenizer(path_or_hub_id, trust_remote_code)
    target_model.check_names(model_dir, config, trust_remote_code)
    weights = {path.name: path for path in target_files.weight_files(model_dir)}
    # The tokenizer may have a folder of its own, with a config.json that is not the model's.
    tokenizer = small_files(target_files.locate(path_or_hub_id, target_files.TOKENIZER_FILES))
    tokenizer.pop("config.json", None)
    files = weights | small_files(model_dir) | tokenizer
    files.pop(target_files.ADAPTER, None)  # left by an adapter that was merged
    return files


def small_files(folder):
    """{name: path} of the files of a folder that are not weights, and of the tokenizer's templates with names."""
    paths = [path for pattern in target_files.SMALL_FILES for path in folder.glob(pattern)]
    paths += folder.glob(f"{target_files.TEMPLATES_FOLDER}/*.jinja")
    return {str(path.relative_to(folder)): path for path in paths}


# ==================== Converting =====================================================================================


def find_gguf(given):
    """The GGUF file that is given, or that a folder without a configuration holds; None if there is none."""
    path = Path(given).expanduser()
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if not files or (path / "config.json").exists():
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        common.fail(f"target model {given} holds {len(files)} GGUF files: give the path of one of them: {names}")
    if not files[0].is_file():
        common.fail(f"target model {given} does not exist")
    if re.search(r"-\d+-of-\d+\.gguf$", files[0].name):
        common.fail(f"{files[0]} is a part of a split model: join the parts by `llama-gguf-split --merge` first")
    return files[0]


def read_gguf(path):
    """(model, tokenizer) of a GGUF file, dequantised to bfloat16."""
    need("gguf", f"{path} is a GGUF file")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # of several libraries, for whatever a broken file makes of their own code
        problem = str(error).strip().splitlines() or [""]
        common.fail(f"{path} cannot be read as GGUF: {type(error).__name__}: {problem[0]}")
    target_model.check_complete(path, model, info)
    return model, tokenizer


def find_adapter(given):
    """The folder of an adapter that is given; None if it is none, or what is left of one that was merged."""
    path = Path(given).expanduser()
    if path.exists() and not path.is_dir():
        return None
    folder = target_files.open_folder(given, [*target_files.SMALL_FILES, "adapter_model.*"])
    has_weights = not path.exists() or any((folder / name).exists() for name in target_files.WEIGHT_FILES)
    if not (folder / target_files.ADAPTER).is_file() or (has_weights and not any(folder.glob("adapter_model.*"))):
        return None
    return folder


def merge_adapter(folder, base_model_path, trust_remote_code):
    """(model, tokenizer) of an adapter, merged into its base model; the tokenizer is the adapter's if it has one."""
    need("peft", f"{folder} is an adapter")
    import peft

    try:
        given = peft.PeftConfig.from_peft_type(**json.loads((folder / target_files.ADAPTER).read_text()))
        tensors = peft.utils.load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # of several libraries
        common.fail(f"the adapter {folder} cannot be read: {type(error).__name__}: {error}")
    if given.is_prompt_learning:
        common.fail(f"the adapter {folder} is of peft_type {given.peft_type.value}: it cannot be merged into weights")
    if not base_model_path and any((folder / name).exists() for name in target_files.WEIGHT_FILES):
        common.fail(f"{folder} has both weights and an adapter: give the adapter's base by --base_model_path")
    base = base_model_path or given.base_model_name_or_path
    if not base:
        common.fail(f"{folder / target_files.ADAPTER} names no base model: give it by --base_model_path")
    model = read_base(base, trust_remote_code)
    rows = [len(tensor) for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
    if rows and rows[0] != len(model.get_input_embeddings().weight):  # tokens were added before it was trained
        model.resize_token_embeddings(rows[0], mean_resizing=False)
    try:
        merged = peft.get_peft_model(model, given)
        result = merged.load_adapter(str(folder), merged.active_adapter)
        # peft may save a trained table twice, and reads it under the shorter name.
        twice = [name for name in tensors if name.replace(".modules_to_save", "") in tensors.keys() - {name}]
        unused = set(result.unexpected_keys) - set(twice)
        if unused or result.missing_keys:
            names = target_model.list_names([*unused, *result.missing_keys])
            raise ValueError(f"these tensors have no counterpart: {names}")
        merged = merged.merge_and_unload(safe_merge=True)  # which looks for NaN
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        problem = str(error).strip().splitlines()[0]
        common.fail(f"the adapter {folder} cannot be merged into its base {base}: {problem}")
    has_tokenizer = any((folder / name).exists() for name in target_files.TOKENIZER_FILES)
    tokenizer = target_files.load_tokenizer(folder if has_tokenizer else base, trust_remote_code)
    return merged, tokenizer


def read_base(base, trust_remote_code):
    """The model that an adapter changes, in the dtype that it was saved in."""
    model_dir = target_files.resolve_target(base)
    _, config = target_files.read_target_config(model_dir, trust_remote_code)
    if target_model.quantisation(config):
        common.fail(f"the adapter's base {base} is quantised: give the unquantised model by --base_model_path")
    target_model.check_weights(model_dir, config, trust_remote_code)
    options = {"device_map": {"": "cpu"}, "dtype": "auto"}
    return target_model.read_model(model_dir, config, "none", None, trust_remote_code, options)


def need(package, why):
    """End the program where a package that few targets need is not installed."""
    if importlib.util.find_spec(package) is None:
        common.fail(f"{why}, which needs the package {package}: pip install {package}")


def check_empty(folder):
    """End the program if `folder` has anything in it: a converted target is renamed to it."""
    if folder.exists() and any(folder.iterdir()):
        common.fail(f"output_path {folder} is not empty: give another folder, or remove it")


def save(model, tokenizer, folder, trust_remote_code):
    """Write a converted target; the folder gets its name when it is complete. Returns the weights' bytes."""
    target_model.check_finite(folder, model)
    if folder.exists():
        folder.rmdir()
    with common.building(folder) as unfinished:
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        except (OSError, SafetensorError) as error:
            common.fail(f"{folder} cannot be written: {error}")
        files = files_of(unfinished, trust_remote_code)
        for path in files.values():
            common.open_to_all(path)
        return sum(path.stat().st_size for path in files.values())


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--target_model_path", help="folder or hub id of the target or an adapter, or a GGUF file (required)")
    add("--output_path", required=True, help="folder to write, as one Hugging Face folder")
    add("--base_model_path", help="model that an adapter changes, none: as it says; or with a GGUF file's tokenizer")
    add("--trust_remote_code", action=common.Switch, help="run code that comes with the target")
    args = parser.parse_args(argv)
    if not args.target_model_path:
        inputs = "huggingface_id, pytorch_model_path or mlflow_model_path"
        common.fail(f"no model is given: --target_model_path, which is one of the component's inputs {inputs}")
    return args


def main(args):
    given = args.target_model_path
    folder = Path(args.output_path)
    common.check_writable("output_path", folder)  # before anything is downloaded
    gguf = find_gguf(given)
    adapter = None if gguf else find_adapter(given)
    if gguf or adapter:
        with claims.only_writer(f"output_path {folder.name} in", folder.absolute().parent, f".{folder.name}.importing"):
            convert(given, gguf, adapter, folder, args)
        return
    if args.base_model_path:
        common.fail(f"base_model_path belongs to an adapter or a GGUF file, which {given} is not: drop it")
    size = copy_target(given, folder, args.trust_remote_code)
    print(f"copied {given}, {size / 1e9:.1f} GB, to {folder}")


def convert(given, gguf, adapter, folder, args):
    """Write the target that a GGUF file is, or that an adapter makes of its base, into an empty folder."""
    check_empty(folder)
    if gguf:
        model, tokenizer = read_gguf(gguf)
        if args.base_model_path:
            tokenizer = target_files.load_tokenizer(args.base_model_path, args.trust_remote_code)
        else:
            print("the tokenizer is made of the GGUF file: the original one, by --base_model_path, is surer")
        size = save(model, tokenizer, folder, args.trust_remote_code)
        print(f"dequantised {given} to bfloat16, {size / 1e9:.1f} GB, to {folder}")
    else:
        model, tokenizer = merge_adapter(adapter, args.base_model_path, args.trust_remote_code)
        size = save(model, tokenizer, folder, args.trust_remote_code)
        print(f"merged {given}, {size / 1e9:.1f} GB, to {folder}")


if __name__ == "__main__":
    main(parse_args())
