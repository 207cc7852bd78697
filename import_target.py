"""Import a target: copy it from the hub, or from another layout, into one Hugging Face folder.

In:  a hub id, a Hugging Face folder, a folder with one nested model, or an MLflow model.
Out: --output_path: configuration, weights and tokenizer in one folder.

    python import_target.py --target_model_path meta-llama/Llama-3.1-8B-Instruct --output_path models/llama3
"""

import shutil
from pathlib import Path

from core import common, target_files


def copy_target(path_or_hub_id, folder, trust_remote_code=False):
    """Copy the files that are read of a target into `folder`, whatever their layout was; returns their bytes.

    Ends the program if a draft cannot be trained for the target, as far as this shows without its weights in memory,
    or if the folder cannot be written.
    """
    folder = Path(folder)
    common.check_writable("output_path", folder)  # before anything is downloaded
    files = files_of(path_or_hub_id, trust_remote_code)
    check_apart(folder, files)
    for path in files:
        copy_file(path, folder)
    return sum(path.stat().st_size for path in files)


def check_apart(folder, files):
    """End the program if a target's files, or what they link to, are in `folder` already."""
    if not folder.exists():
        return
    places = {path.parent for path in files} | {path.resolve().parent for path in files}
    if any(folder.samefile(place) for place in places):
        common.fail(f"output_path {folder} holds the target itself: give another folder")


def copy_file(path, folder):
    """Copy a file into `folder`: a file of an earlier copy stays until the new one is complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with common.building(folder / path.name) as unfinished:
            shutil.copyfile(path, unfinished)  # without attributes, which mounted storage may not keep
    except OSError as error:
        common.fail(f"{path} cannot be copied into {folder}: {error.strerror}")


def files_of(path_or_hub_id, trust_remote_code=False):
    """The files that are read of a target, weights first; ends the program if a draft cannot be trained for it."""
    model_dir = target_files.resolve_target(path_or_hub_id)
    target_files.read_target_config(model_dir, trust_remote_code)
    target_files.load_tokenizer(path_or_hub_id, trust_remote_code)
    weights = [*model_dir.glob("*.safetensors")] or [*model_dir.glob("*.bin")]
    if not weights:
        common.fail(f"target model {path_or_hub_id}: no *.safetensors or *.bin in {model_dir}")
    files = small_files(model_dir)
    # The tokenizer may have a folder of its own, with a config.json that is not the model's.
    tokenizer = small_files(target_files.locate(path_or_hub_id, target_files.TOKENIZER_FILES))
    tokenizer.pop("config.json", None)
    return [*weights, *(files | tokenizer).values()]


def small_files(folder):
    """{name: path} of the files of a folder that are not weights."""
    return {path.name: path for pattern in target_files.SMALL_FILES for path in folder.glob(pattern)}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("--target_model_path", required=True, help="folder or hub id of the target")
    parser.add_argument("--output_path", required=True, help="folder to copy it to, as one Hugging Face folder")
    parser.add_argument("--trust_remote_code", action=common.Switch, help="run code that comes with the target")
    return parser.parse_args(argv)


def main(args):
    size = copy_target(args.target_model_path, args.output_path, args.trust_remote_code)
    print(f"copied {args.target_model_path}, {size / 1e9:.1f} GB, to {args.output_path}")


if __name__ == "__main__":
    main(parse_args())
