"""Check a draft checkpoint, convert it into the form that a serving engine loads, and publish it.

In:  a draft in the flat form (this project's, SpecForge's, ModelOpt's, EAGLE's own releases) or the speculators form.
Out: the flat form, which vLLM and SGLang both load, or the speculators form, which vLLM loads; beside it README.md, the
     model card; on the terminal the commands that serve it.

    python export_draft.py --check output/final
    python export_draft.py output/final --format speculators --output served \
        --target_model_path meta-llama/Llama-3.1-8B-Instruct
    python export_draft.py someone_elses_draft --format flat --output flat
    python export_draft.py output/best --format flat --output served --evaluation output/evaluation \
        --base_model meta-llama/Llama-3.1-8B-Instruct --push_to_hub my-org/my-draft
    python export_draft.py served --push_to_hub my-org/my-draft          # as it is, the card edited by hand
"""

import re
import sys
from pathlib import Path

import huggingface_hub
from safetensors import safe_open

from core import (
    block_files,
    checkpoints,
    common,
    draft_files,
    draft_keys,
    evaluations,
    model_card,
    serving,
    target_files,
)


def check(folder):
    """Print what a draft folder holds, or every problem on stderr; returns the exit code 0 or 1."""
    config, tensors, problems = draft_files.load(folder, strict=True)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    width = max(map(len, tensors))
    for name, tensor in sorted(tensors.items()):
        print(f"{name:<{width}}  {list(tensor.shape)!s:<18}  {draft_keys.dtype_name(tensor.dtype)}")
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if name not in draft_files.MAPPING)
    layers = draft_files.auxiliary_layers(config) or "default (2, L//2, L-3)"
    print(
        f"hidden {config['hidden_size']}, heads {config['num_attention_heads']}/{config['num_key_value_heads']} of "
        f"{config['head_dim']}, draft vocabulary {config['draft_vocab_size']:,} of {config['vocab_size']:,}, "
        f"positions {config['max_position_embeddings']:,}, rope theta {config['rope_theta']:g}, "
        f"{config['torch_dtype']}, auxiliary layers {layers}"
    )
    for note in serving.serving_notes(config):
        print(f"note: {note}")
    if block_files.is_block(config):
        print(block_files.describe(config))
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
    takes_table = draft_files.takes_table(config, tensors)
    model_dir = target_files.resolve_target(args.target_model_path, weights=takes_table)
    target_config, problem = common.read_object(model_dir / "config.json")
    if problem:
        common.fail(f"{model_dir / 'config.json'}: {problem}")
    draft_files.write_speculators(
        args.output,
        config,
        tensors,
        target_model_path=args.base_model or args.target_model_path,
        target_architectures=target_config.get("architectures") or [],
        embed_tokens=draft_files.read_embedding(model_dir) if takes_table else None,
        tokens=args.speculative_tokens,
    )


def write_card(args, folder, config, tensors, measured):
    """Write the model card, and print the commands that serve the draft."""
    training = model_card.find_training(folder)
    target = args.target_model_path or (training and training.flags["target_model_path"])
    is_flat = args.format == "flat"
    tokens = None if is_flat else args.speculative_tokens or draft_files.speculative_tokens(config)
    place = (args.push_to_hub, False) if args.push_to_hub else (Path(args.output).name, True)
    card = model_card.compose(
        (config, tensors),
        args.base_model or target,
        training,
        flags_given(training.flags) if training else {},
        measured,
        place,
        args.license,
        is_flat,
        tokens,
    )
    common.write_atomic(Path(args.output) / model_card.NAME, str(card))
    if not target:
        print("the commands that serve it need the target: --target_model_path")
        return
    commands = serving.serving_commands(args.output, config, target, args.tp_size, tokens, is_flat)
    if commands:
        print("serve it:")
    for command in commands.values():
        print(f"  {command}")


def flags_given(flags):
    """{flag: value} of a training's flags that differ from the trainer's defaults."""
    # slow, and of no use to a draft that they did not train
    if "algorithm" in flags:
        import train_dflash as trainer
    else:
        import train_eagle3 as trainer

    defaults = vars(trainer.parse_args(["--target_model_path", "target"]))
    return {name: flags[name] for name in defaults if name in flags and flags[name] != defaults[name]}


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
    measured = {path: evaluations.read_evaluation(path) for path in args.evaluation}
    config, tensors = read(args, folder)
    for path, figures in measured.items():
        model_card.check_evaluated(path, figures, tensors)
    if args.format == "flat":
        draft_files.write_draft(args.output, config, tensors)
    else:
        write_speculators(args, config, tensors)
    for note in serving.serving_notes(config):
        print(f"note: {note}")
    print(f"written to {args.output} ({args.format} form)")
    write_card(args, folder, config, tensors, list(measured.values()))
    if args.push_to_hub:
        push(args, args.output)


# ==================== The hub ========================================================================================


def check_push(args):
    """End the program if an upload cannot begin: a name that the hub does not take, no token, no network wanted."""
    name = args.push_to_hub
    problem = "" if re.fullmatch(common.HUB_ID, name) else "not of the form ORG/NAME"
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError as error:
        problem = str(error)
    if problem:
        common.fail(f"push_to_hub {name} is no name of a repository: {problem}")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        common.fail(f"push_to_hub {name}: HF_HUB_OFFLINE is set, unset it")
    if not huggingface_hub.get_token():
        common.fail(f"push_to_hub {name}: no token: run `hf auth login`, or set HF_TOKEN to one with write access")


def push(args, folder):
    """Upload the draft in a folder and its card, nothing else that may be there."""
    name = args.push_to_hub
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=args.private or None, exist_ok=True)
        is_refused = args.private and not api.model_info(name).private
        if not is_refused:
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                allow_patterns=[model_card.NAME, "config.json", "model.safetensors"],
                commit_message="Upload a draft",
            )
    except Exception as error:  # of several libraries; each means that the files are not on the hub
        status = getattr(getattr(error, "response", None), "status_code", None)
        reasons = {
            401: "the hub does not accept the token: run `hf auth login`, or set HF_TOKEN",
            403: f"the token may not write there: take one with write access to {name.split('/')[0]}",
        }
        reason = reasons.get(status, f"the hub fails with {type(error).__name__}: {error}")
        common.fail(f"push_to_hub {name}: {reason}; the draft is complete in {folder}")
    if is_refused:
        common.fail(f"push_to_hub {name} exists and is public: make it private on the hub first, or drop --private")
    print(f"uploaded to {url}")


def push_as_it_is(args):
    """Upload an exported folder, whose card may have been edited."""
    folder = Path(args.checkpoint)
    if problems := draft_files.check_draft(folder):
        common.fail(f"push_to_hub: {folder} is not a complete draft: {problems[0]}")
    if not (folder / model_card.NAME).exists():
        common.fail(f"push_to_hub: {folder} has no {model_card.NAME}, the model card: --format and --output write it")
    push(args, folder)


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
        help="tokens that an engine drafts by default, in the speculators form; none: 5, or a complete block",
    )
    tp_size = "GPUs that share the target, in the commands that serve it"
    add("--tp_size", type=common.at_least(int, 1), default=1, help=tp_size)
    add = parser.add_argument_group("model card and upload").add_argument
    evaluation = "folders of evaluate_draft.py --output, whose figures the card shows"
    add("--evaluation", nargs="+", default=[], help=evaluation)
    add(
        "--base_model",
        help="hub id of the target, for others; none: target_model_path or that of the run, if it is one",
    )
    add("--license", help="of the draft, as the hub names it, such as apache-2.0")
    push_to_hub = "ORG/NAME: upload the exported folder; without --format and --output the given one as it is"
    add("--push_to_hub", help=push_to_hub)
    add("--private", action=common.Switch, help="create a private repository")
    args = parser.parse_args(argv)
    others = args.format or args.output or args.push_to_hub
    if args.check is not None and (others or (args.check and args.checkpoint)):
        common.fail("--check reads one folder and writes nothing: drop it, or the rest")
    if args.format == "flat" and args.speculative_tokens != parser.get_default("speculative_tokens"):
        common.fail("--speculative_tokens is kept in the speculators form alone: drop it")
    if args.private and not args.push_to_hub:
        common.fail("--private is about the repository of --push_to_hub: give that, or drop it")
    if not args.format and (args.evaluation or args.base_model or args.license):
        common.fail("--evaluation, --base_model and --license are for the model card of an export: give --format")
    return args


def main(args):
    if args.push_to_hub:
        check_push(args)
    if args.check is None:
        if args.push_to_hub and args.checkpoint and not (args.format or args.output):
            push_as_it_is(args)
        else:
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
