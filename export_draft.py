"""Check a draft checkpoint, or convert it into the form that a serving engine loads.

In:  a draft in the flat form (this project's, SpecForge's, ModelOpt's, EAGLE's own releases) or the speculators form.
Out: the flat form, which vLLM and SGLang both load, or the speculators form, which vLLM loads.

    python export_draft.py --check output/final
    python export_draft.py output/final --format speculators --output served \
        --target_model_path meta-llama/Llama-3.1-8B-Instruct
    python export_draft.py someone_elses_draft --format flat --output flat
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open

from core import checkpoints, common, draft_files, target_files


def check(folder):
    """Print what a draft folder holds, or every problem on stderr; returns the exit code 0 or 1."""
    config, tensors, problems = draft_files.load(folder, strict=True)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    width = max(map(len, tensors))
    for name, tensor in sorted(tensors.items()):
        print(f"{name:<{width}}  {list(tensor.shape)!s:<18}  {draft_files.dtype_name(tensor.dtype)}")
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if name not in draft_files.MAPPING)
    layers = draft_files.auxiliary_layers(config) or "default (2, L//2, L-3)"
    print(
        f"hidden {config['hidden_size']}, heads {config['num_attention_heads']}/{config['num_key_value_heads']} of "
        f"{config['head_dim']}, draft vocabulary {config['draft_vocab_size']:,} of {config['vocab_size']:,}, "
        f"positions {config['max_position_embeddings']:,}, rope theta {config['rope_theta']:g}, "
        f"{config['torch_dtype']}, auxiliary layers {layers}"
    )
    for note in draft_files.serving_notes(config):
        print(f"note: {note}")
    print(f"complete: {len(tensors)} tensors, {parameters:,} parameters")
    return 0


def _has_targets_table(args, folder, tensors):
    """Whether the embedding table of the draft to export was added to it, or equals that of the given target."""
    path = Path(folder) / "model.safetensors"
    if path.exists():
        metadata = safe_open(path, "pt").metadata() or {}
        if metadata.get("embed_tokens") == draft_files.ADDED:
            return True
    if not args.target_model_path:
        return False
    embedding = draft_files.read_embedding(target_files.resolve_target(args.target_model_path))
    return draft_files.is_embedding(tensors[draft_files.EMBEDDING], embedding)


def read(args, folder):
    """(flat config, tensors) of the draft to export, without a table that is the target's."""
    config, tensors = draft_files.read_draft(folder)
    if draft_files.EMBEDDING not in tensors or draft_files.needs_embedding(config):
        return config, tensors
    if _has_targets_table(args, folder, tensors):
        del tensors[draft_files.EMBEDDING]
    return config, tensors


def write_speculators(args, config, tensors):
    own_table = draft_files.EMBEDDING in tensors
    model_dir = target_files.resolve_target(args.target_model_path, weights=not own_table)
    target_config = json.loads((model_dir / "config.json").read_text())
    draft_files.write_speculators(
        args.output,
        config,
        tensors,
        target_model_path=args.target_model_path,
        target_architectures=target_config.get("architectures") or [],
        embed_tokens=None if own_table else draft_files.read_embedding(model_dir),
        speculative_tokens=args.speculative_tokens,
    )


def export(args):
    if not (args.checkpoint and args.format and args.output):
        common.fail("give a checkpoint folder, --format flat|speculators and --output FOLDER; or --check FOLDER")
    folder = checkpoints.find_draft(args.checkpoint)
    if Path(args.output).resolve() in (Path(folder).resolve(), Path(args.checkpoint).resolve()):
        common.fail(f"--output {args.output} is the checkpoint itself: choose another folder")
    if args.format == "speculators" and not args.target_model_path:
        common.fail(
            "--format speculators needs --target_model_path: the form names the target and holds its embeddings"
        )
    common.check_writable("output", args.output)
    config, tensors = read(args, folder)
    if args.format == "flat":
        draft_files.write_draft(args.output, config, tensors)
    else:
        write_speculators(args, config, tensors)
    for note in draft_files.serving_notes(config):
        print(f"note: {note}")
    print(f"written to {args.output} ({args.format} form)")


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="folder of the draft, or a run's output folder")
    parser.add_argument("--check", nargs="?", const="", metavar="FOLDER", help="check only; exit code 1 if incomplete")
    add = parser.add_argument_group("export").add_argument
    add("--format", choices=("flat", "speculators"), help="flat: vLLM and SGLang; speculators: vLLM")
    add("--output", help="folder to write")
    add(
        "--target_model_path",
        help="folder or hub id of the target; required for speculators; flat: a table equal to its own is left out",
    )
    add(
        "--speculative_tokens",
        type=common.at_least(int, 1),
        default=5,
        help="tokens that an engine drafts by default; speculators form",
    )
    args = parser.parse_args(argv)
    if args.check is not None and (args.format or args.output or (args.check and args.checkpoint)):
        common.fail("--check reads one folder and writes nothing: drop it, or the rest")
    if args.format == "flat" and args.speculative_tokens != parser.get_default("speculative_tokens"):
        common.fail("--speculative_tokens is kept in the speculators form alone: drop it")
    return args


def main(args):
    if args.check is None:
        export(args)
        return
    folder = args.check or args.checkpoint
    if not folder:
        common.fail("--check needs a folder")
    draft = checkpoints.find_draft(folder)
    if not Path(draft).is_dir():
        common.fail(f"--check {folder}: no such folder")
    sys.exit(check(draft))


if __name__ == "__main__":
    main(parse_args())
