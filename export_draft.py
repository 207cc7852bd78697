"""The draft checkpoint: config.json + model.safetensors, written, read and checked for completeness.

In:  a draft in the flat form (ours, SpecForge's, ModelOpt's, EAGLE's own releases) or in the speculators form.
Out: the flat form, which vLLM and SGLang both load, or the speculators form, which vLLM loads.

The engines do not check: vLLM runs with an absent tensor and drafts junk, SGLang leaves it uninitialised and ignores
names that it does not know. So nothing is written or read here that is not whole.

    python export_draft.py --check output/final
    python export_draft.py output/final --format speculators --output served \
        --target_model_path meta-llama/Llama-3.1-8B-Instruct
    python export_draft.py someone_elses_draft --format flat --output flat
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors import safe_open

from core import common, draft_files, target_files


def parse_args(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = common.fail  # one line, without the usage
    parser.add_argument("checkpoint", nargs="?", help="folder of the draft")
    parser.add_argument("--check", nargs="?", const="", metavar="FOLDER", help="check only; exit code 1 if not whole")
    export = parser.add_argument_group("export")
    export.add_argument("--format", choices=("flat", "speculators"), help="flat: vLLM and SGLang; speculators: vLLM")
    export.add_argument("--output", help="folder to write")
    target = "folder or hub id of the target; needed for speculators; flat: a table that is its own is left out"
    tokens = "tokens an engine drafts, speculators (default: %(default)s)"
    export.add_argument("--target_model_path", help=target)
    export.add_argument("--speculative_tokens", type=int, default=5, help=tokens)
    return parser.parse_args(common.normalise_argv(sys.argv[1:] if argv is None else argv))


def check(folder):
    """Print what a draft folder holds, or every problem on stderr; returns the exit code 0 or 1."""
    config, tensors, problems = draft_files._load(folder, strict=True)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    width = max(map(len, tensors))
    for name, tensor in sorted(tensors.items()):
        print(f"{name:<{width}}  {list(tensor.shape)!s:<18}  {str(tensor.dtype)[6:]}")
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


def _has_targets_table(args, tensors):
    """Whether the embedding table of the draft to export was added to it, or is the target's if that is given."""
    path = Path(args.checkpoint) / "model.safetensors"
    if path.exists() and (safe_open(path, "pt").metadata() or {}).get("embed_tokens") == draft_files.ADDED:
        return True
    given = args.target_model_path
    return bool(given) and draft_files.is_embedding(
        tensors[draft_files.EMBEDDING], draft_files.read_embedding(target_files.resolve_target(given))
    )


def export(args):
    if not (args.checkpoint and args.format and args.output):
        common.fail("give a checkpoint folder, --format flat|speculators and --output FOLDER; or --check FOLDER")
    if Path(args.output).resolve() == Path(args.checkpoint).resolve():
        common.fail(f"--output {args.output} is the checkpoint itself: choose another folder")
    if args.format == "speculators" and not args.target_model_path:
        common.fail(
            "--format speculators needs --target_model_path: the form names the target and holds its embeddings"
        )
    if args.speculative_tokens < 1:
        common.fail(f"--speculative_tokens {args.speculative_tokens} must be at least 1")
    config, tensors = draft_files.read_draft(args.checkpoint)
    if (
        draft_files.EMBEDDING in tensors
        and not draft_files.needs_embedding(config)
        and _has_targets_table(args, tensors)
    ):
        del tensors[draft_files.EMBEDDING]
    if args.format == "flat":
        draft_files.write_draft(args.output, config, tensors)
    else:
        own = draft_files.EMBEDDING in tensors
        model_dir = target_files.resolve_target(args.target_model_path, weights=not own)
        architectures = json.loads((model_dir / "config.json").read_text()).get("architectures") or []
        embedding = None if own else draft_files.read_embedding(model_dir)
        draft_files.write_speculators(
            args.output,
            config,
            tensors,
            target_model_path=args.target_model_path,
            target_architectures=architectures,
            embed_tokens=embedding,
            speculative_tokens=args.speculative_tokens,
        )
    for note in draft_files.serving_notes(config):
        print(f"note: {note}")
    print(f"written to {args.output} ({args.format} form)")


def main(args):
    if args.check is None:
        export(args)
        return
    folder = args.check or args.checkpoint
    if not folder or not Path(folder).is_dir():
        common.fail(f"--check {folder or ''}: no such folder" if folder else "--check needs a folder")
    sys.exit(check(folder))


if __name__ == "__main__":
    main(parse_args())
