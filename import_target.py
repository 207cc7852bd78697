"""Import a target: copy it from the hub, or out of another layout, into one Hugging Face folder.

In:  a hub id, a Hugging Face folder, a folder with one nested model, or an MLflow model.
Out: --output_path: configuration, weights and tokenizer in one folder.

    python import_target.py --target_model_path meta-llama/Llama-3.1-8B-Instruct --output_path models/llama3
"""

import os
import shutil
from pathlib import Path

from core import common, target_files


def copy_target(path_or_hub_id, folder, trust_remote_code=False):
    """Copy what is read of a target into `folder`, as one Hugging Face folder whatever its layout was; returns bytes.

    Ends with one line if it cannot train a draft, as far as this is seen without loading its weights, or if the folder
    cannot take it.
    """
    folder = Path(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):  # before anything is downloaded
        common.fail(f"output_path {folder} cannot be a folder: {there} is none, or not one to write in")
    files = files_of(path_or_hub_id, trust_remote_code)
    places = {place for path in files for place in (path.parent, path.resolve().parent)}
    if folder.exists() and any(folder.samefile(place) for place in places):
        common.fail(f"output_path {folder} holds the target itself: give another folder")
    for path in files:
        building = folder / f".{path.name}.building"  # a file of an earlier copy stays until the new one is whole
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, building)  # not its attributes, which mounted storage may not keep
            building.rename(folder / path.name)
        except OSError as error:
            building.unlink(missing_ok=True)
            common.fail(f"{path} cannot be copied into {folder}: {error.strerror}")
    return sum(path.stat().st_size for path in files)


def files_of(path_or_hub_id, trust_remote_code=False):
    """The files that are read of a target, the weights first; ends with one line if it cannot train a draft."""
    model_dir = target_files.resolve_target(path_or_hub_id)
    target_files.read_target_config(model_dir, trust_remote_code)
    target_files.load_tokenizer(path_or_hub_id, trust_remote_code)
    weights = [*model_dir.glob("*.safetensors")] or [*model_dir.glob("*.bin")]
    if not weights:
        common.fail(f"target model {path_or_hub_id}: no *.safetensors or *.bin in {model_dir}")
    files = {path.name: path for pattern in target_files.SMALL_FILES for path in model_dir.glob(pattern)}
    for pattern in target_files.SMALL_FILES:  # the tokenizer may have a folder of its own
        found = {
            path.name: path for path in target_files.locate(path_or_hub_id, target_files.TOKENIZER_FILES).glob(pattern)
        }
        files |= {name: path for name, path in found.items() if name != "config.json"}
    return [*weights, *files.values()]


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
