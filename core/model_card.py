"""The model card of a draft: README.md with the metadata that the hub reads, of what is known about the draft alone.

What is known comes from the run that trained it (run.json, trainer_state.json, metrics.jsonl), from the prepared data
(data_config.json), from an evaluation (evaluation.json) and from the draft itself. A draft of somebody else has none
of the first three: its card is short. Folders of this machine are named by their last part.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch

from core import block_files, checkpoints, common, conversations, draft_files, run_record, serving

NAME = "README.md"
KINDS = {  # (article, name, paper) by algorithm
    "eagle3": ("an", "EAGLE-3", "https://arxiv.org/abs/2503.01840"),
    "dflash": ("a", "DFlash", "https://arxiv.org/abs/2602.06036"),
    "dspark": ("a", "DSpark", "https://arxiv.org/abs/2607.05147"),
}
CACHED = r"models--([^/]+)--([^/]+)/"  # in the path of a model in the hub's cache

# Flags that the card leaves out: they are about one machine or about logging and saving, or follow from the others.
LEFT_OUT = re.compile(
    r".*(path|dir|split|endpoint|config|timeout)|dataset.*|resume.*|no_resume.*|report_to|run_name|local_rank|dp_size|"
    r"target_sharding|num_workers|prefetch_factor|.*num_proc|save_.*|log_.*|eval_.*|max_retries|dry_run|"
    r"scheduler_(warmup|total)_steps|draft_accumulation_steps"
)


@dataclass
class Training:
    """What a run recorded about a draft."""

    settings: dict  # run.json
    flags: dict  # given and derived ones
    step: int
    seconds: float | None = None
    data: dict = field(default_factory=dict)  # data_config.json
    evaluation: dict = field(default_factory=dict)  # the row of metrics.jsonl at the draft's step


# ==================== What is known ==================================================================================


def read_json(path):
    """The object in a file, {} where there is no such file."""
    if not Path(path).is_file():
        return {}
    found, problem = draft_files.read_json(path)
    if problem:
        common.fail(problem)
    return found


def find_training(folder):
    """The Training of a draft folder that is a run's checkpoint or its `final`, else None."""
    folder = Path(folder).resolve()
    state = checkpoints.read_state(folder) or {}
    output = folder.parent
    settings = read_json((output if state else folder) / "run.json")
    if "flags" not in settings:
        return None
    flags = state.get("flags", settings["flags"])
    step = state.get("step", flags["total_steps"])
    training = Training(settings, flags, step, state.get("seconds"))
    if (output / "metrics.jsonl").exists():
        for row in run_record.read_metrics(output):
            if row["step"] == step and row["split"] == "validation":
                training.evaluation = row
            elif row["step"] == step and training.seconds is None:
                training.seconds = row["seconds"]
    data = read_json(Path(flags.get("data_path") or Path(flags["output_dir"]) / "data") / "data_config.json")
    if data.get("fingerprint") == settings["data_fingerprint"]:
        training.data = data
    return training


def check_evaluated(path, figures, tensors):
    """End the program if an evaluation measured another draft than the one with these tensors, where it is there."""
    given = figures.get("settings", {}).get("draft_model_path")
    if not given or not Path(given).exists():
        return
    evaluated = checkpoints.find_draft(given)
    other = draft_files.load(evaluated, strict=False).tensors or {}
    shared = [name for name in tensors if name in other]
    different = [name for name in shared if not torch.equal(other[name].to(tensors[name].dtype), tensors[name])]
    if different:
        common.fail(
            f"evaluation {path} is of {evaluated}, whose {different[0]} differs from this draft's: evaluate this one"
        )


def hub_id(name):
    """The hub id that a name means, or None: of a model or data set that is not a folder or file here."""
    name = str(name or "")
    if cached := re.search(CACHED, name):
        return "/".join(cached.groups())
    if Path(name).exists() or not re.fullmatch(common.HUB_ID, name):
        return None
    return None if re.search(r"\.(jsonl?|gz|parquet|csv|arrow)\Z", name) else name


def show(name):
    """A name for others: a hub id, or the last part of a path."""
    return hub_id(name) or Path(str(name)).name


def show_prompts(name):
    """Where the prompts of an evaluation come from, as the end of a phrase."""
    if not name:
        return ""
    data = read_json(Path(name) / "data_config.json").get("dataset")
    return f" of prepared rows of {show(data.get('validation') or data['train'])}" if data else f" of {show(name)}"


def hub_datasets(training):
    """Hub ids of the data that a draft was trained on, without repeats."""
    found = []
    for name in training.data.get("dataset", {}).values():
        preset = conversations.PRESETS.get(name)
        found += preset.hub if preset else filter(None, [hub_id(name)])
    return list(dict.fromkeys(found))


# ==================== The card =======================================================================================


def metadata(target, training, engines, algorithm, license=None):
    """The hub's metadata.

    library_name is the engine's, because without one the hub takes a folder with a config.json for a model of
    transformers. None of the hub's relations to a base model (adapter, merge, quantized, finetune) is a draft's.
    """
    return huggingface_hub.ModelCardData(
        base_model=hub_id(target),
        datasets=(hub_datasets(training) if training else None) or None,
        library_name="vllm" if "vLLM" in engines else None,
        license=license,
        pipeline_tag="text-generation",
        tags=[algorithm, "speculative-decoding", "draft-model", *(engine.lower() for engine in engines)],
    )


def serving_lines(commands, notes, stands_for):
    """stands_for: {word in the commands: what a reader writes in its place}."""
    lines = ["## Serving", ""]
    for engine, command in commands.items():
        lines += [f"{engine}:", "", "```bash", command, "```", ""]
    if not commands:
        lines += ["Neither vLLM nor SGLang can serve this draft as it is.", ""]
    for word, meaning in stands_for.items():
        lines += [f"`{word}` stands for {meaning}.", ""]
    return lines + [f"- {note}" for note in notes] + [""] * bool(notes)


def draft_lines(config, tensors):
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if name not in draft_files.MAPPING)
    layers = draft_files.auxiliary_layers(config) or "2, L//2 and L-3 of its L layers, the engines' default"
    count = config["num_hidden_layers"]
    return [
        "## Draft",
        "",
        f"- {count} decoder layer{'s' * (count > 1)} ({config['model_type']}), hidden size {config['hidden_size']:,}, "
        f"{parameters:,} parameters in {config['torch_dtype']}",
        f"- drafts {config['draft_vocab_size']:,} of the target's {config['vocab_size']:,} tokens",
        f"- reads the target's hidden states behind layers {layers}",
        *([f"- {block_files.describe(config)}"] if block_files.is_block(config) else []),
        "",
    ]


def acceptance_row(name, figures, count):
    """A row of the table with `count` positions."""
    shares = [f"{share:.3f}" for share in figures["accepted_by_position"]]
    shares += ["-"] * (count - len(shares))
    return [name, str(figures.get("prompts", "-")), f"{figures['acceptance_length']:.3f}", *shares]


def acceptance_lines(figures):
    """The table of an evaluation, and how it was measured."""
    settings = figures.get("settings", {})
    count = len(figures["accepted_by_position"])
    rows = [["category", "replies", "acceptance length", *map(str, range(1, count + 1))]]
    for name, part in (figures.get("by_category") or {}).items():
        rows.append(acceptance_row(name, part, count))
    rows.append(acceptance_row(f"**all**{show_prompts(settings.get('prompts'))}", figures, count))
    how = []
    if settings.get("num_draft_tokens"):
        how.append(f"{settings['num_draft_tokens']} tokens drafted a pass")
    if settings.get("tree") == "dynamic":
        how.append(f"as a tree of the {settings['topk']} best tokens of each node, {settings['depth']} levels deep")
    how += ["by the counters of a running engine"] if settings.get("server") else []
    if "temperature" in settings:
        greedy = settings["temperature"] == 0
        how.append("greedy" if greedy else f"temperature {settings['temperature']}")
    if settings.get("max_new_tokens"):
        how.append(f"replies of up to {settings['max_new_tokens']} tokens")
    if figures.get("passes"):
        how.append(f"{figures['passes']:,} passes of the target")
    if figures.get("speedup"):
        fast = f"{figures['tokens_per_second_with_draft']:.1f} tokens/s with the draft"
        slow = f"{figures['tokens_per_second_without']:.1f} without"
        how.append(f"{fast}, {slow}: {figures['speedup']:.2f} times")
    how += [f"on {figures['machine']}"] if figures.get("machine") else []
    return [common.format_table(rows), "", f"Measured on {figures['date']}: {', '.join(how)}.", ""]


def data_lines(training):
    data = training.data
    if not data:
        return [f"- data: prepared rows with fingerprint {training.settings['data_fingerprint'][:12]}"]
    lines = []
    for split, part in data["splits"].items():
        name = show(data["dataset"].get(split) or data["dataset"]["train"])
        lines.append(
            f"- {'validation' if split == 'validation' else 'trained on'}: {name}, {part['rows']:,} conversations, "
            f"{part['tokens']:,} tokens, {part['supervised_tokens']:,} of them of the assistant"
        )
    if data["ingredients"].get("regenerate"):
        lines.append("- the assistant's replies are the target's own: they were regenerated")
    return lines


def duration(seconds):
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def training_lines(training, given, tokens):
    """given: {flag: value} that differs from the trainer's defaults; tokens: drafted a pass in its evaluations."""
    settings = training.settings
    flags = training.flags
    ranks = settings["world_size"]
    time = f"; {duration(training.seconds)} up to this step" if training.seconds else ""
    steps = f"{training.step:,} optimizer steps of {flags['draft_global_batch_size']} conversations"
    lines = [
        "## Training",
        "",
        *data_lines(training),
        f"- {steps} ({training.step / flags['steps_per_epoch']:.2f} epochs), checkpoint of step {training.step:,} of "
        f"{flags['total_steps']:,}",
        f"- {ranks} rank{'s' * (ranks > 1)} on {settings['device']}, started {settings['started'][:10]}{time}",
    ]
    if "acceptance_length" in training.evaluation:
        lines.append(
            f"- validation rows at this step: acceptance length {training.evaluation['acceptance_length']:.3f}, as "
            f"greedy decoding with {tokens} drafted tokens accepts on their replies"
        )
    versions = [f"{name} {settings['versions'][name]}" for name in ("python", "torch", "deepspeed", "transformers")]
    lines.append(f"- {', '.join(versions)}")
    words = []
    for name, value in given.items():
        if not LEFT_OUT.fullmatch(name):
            words.append(f"--{name} {str(value).lower() if isinstance(value, bool) else value}")
    if words:
        lines += ["", "Flags of the trainer that differ from its defaults:", "", "```", " ".join(words), "```"]
    return [*lines, ""]


def compose(draft, target, training, given, evaluations, place, license=None, is_flat=True, tokens=None):
    """The ModelCard of draft = (flat config, tensors).

    target: hub id or path, None if it is not known. training: a Training or None; given: its flags that differ from
    the defaults. evaluations: what read_evaluation returned. place: (name of the draft's folder or hub id, whether it
    is a folder). tokens: drafted a pass in the commands; none: as `serving_commands`.
    """
    config, tensors = draft
    folder, is_local = place
    stands_for = {folder: "the folder with this file, or the hub id that it gets"} if is_local else {}
    name = show(target) if target else "its target"
    if not hub_id(target):
        stands_for[show(target or "TARGET")] = "the target"
    commands = serving.serving_commands(folder, config, show(target or "TARGET"), tokens=tokens, is_flat=is_flat)
    algorithm = block_files.algorithm(config) or "eagle3"
    article, kind, paper = KINDS[algorithm]
    data = metadata(target, training, commands, algorithm, license)
    link = f"[{name}](https://huggingface.co/{name})" if hub_id(target) else name
    lines = [
        f"# {kind} draft for {name}" if target else f"# {kind} draft",
        "",
        f"A draft for speculative decoding: it proposes tokens, and {link} verifies several of them in one pass. It is "
        f"{article} [{kind}]({paper}) head: it reads the target's hidden states and is of no use without them.",
        "",
        *serving_lines(commands, serving.serving_notes(config), stands_for if commands else {}),
    ]
    if evaluations:
        lines += ["## Acceptance", ""]
        lines += ["The acceptance length is the number of tokens per pass of the target; the numbered columns are the"]
        lines += ["shares of passes that accept the drafted token at that position.", ""]
    for figures in evaluations:
        lines += acceptance_lines(figures)
    lines += draft_lines(config, tensors)
    if training:
        drafted = block_files.drafted_tokens(config) if algorithm != "eagle3" else training.flags["ttt_length"]
        lines += training_lines(training, given, drafted)
    return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n")
