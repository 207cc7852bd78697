"""How a draft is served: by which engines and commands, and which checkpoint of a finished training."""

import json
import shlex
from pathlib import Path

from core import block_files, checkpoints, draft_files, run_record

TOKENS = 3  # drafted a pass in the commands; longer chains pay where more drafts are accepted


def drafted_tokens(config):
    """Tokens drafted a pass in the commands: of a block all that it was trained for."""
    return block_files.drafted_tokens(config) if block_files.is_block(config) else TOKENS


def find_engines(config):
    """({engine: flags that it needs for this draft}, notes, a line each) of a complete flat config.

    An engine that cannot serve the draft as it was trained is left out, and a note says why.
    """
    if block_files.is_block(config):
        return find_block_engines(config)
    flags = {"vLLM": [], "SGLang": []}
    notes = []

    def leave_out(note, *engines):
        notes.append(note)
        for engine in engines:
            flags.pop(engine, None)

    if config["torch_dtype"] == "float32":
        notes.append("torch_dtype float32: SGLang serves it as float16 unless started with --dtype")
        flags["SGLang"] += ["--dtype", "float32"]
    of_layers = set(draft_files.windows(config))
    window = max(of_layers)
    if len(of_layers) > 1:
        flags["vLLM"].append("--disable-hybrid-kv-cache-manager")
        leave_out(
            "layer_types mixes full and sliding attention: SGLang cannot serve this draft, vLLM's V1 runner needs "
            "--disable-hybrid-kv-cache-manager",
            "SGLang",
        )
    elif window:  # the query is not a part of SGLang's window
        notes.append(f"sliding_window {window}: SGLang needs --speculative-draft-window-size {window - 1}")
        flags["SGLang"] += ["--speculative-draft-window-size", str(window - 1)]
    if config.get("norm_before_residual"):
        leave_out("norm_before_residual: SGLang cannot serve this draft, vLLM can", "SGLang")
    if draft_files.has_head_norms(config):
        leave_out("model_type qwen3: SGLang has no such draft and cannot serve this one, vLLM can", "SGLang")
    has_targets_width = config.get("target_hidden_size", config["hidden_size"]) == config["hidden_size"]
    if config.get("embed_requires_grad") and has_targets_width:
        leave_out(
            "embed_requires_grad: SGLang puts the target's table in the place of the draft's, vLLM does not", "SGLang"
        )
    if draft_files.num_auxiliary(config) == 1 and has_targets_width:
        leave_out(
            "one auxiliary layer as wide as the draft: SGLang leaves out fc and cannot serve this draft", "SGLang"
        )
    if config["hidden_act"] != "silu":
        note = f"hidden_act {config['hidden_act']}: the engines know silu only and do not start with this draft"
        leave_out(note, "vLLM", "SGLang")
    return flags, notes


def find_block_engines(config):
    """`find_engines` of a block draft."""
    flags = {"vLLM": [], "SGLang": []}
    notes = []
    if config["torch_dtype"] == "float32":
        notes.append("torch_dtype float32: SGLang serves it as float16 unless started with --dtype")
        flags["SGLang"] += ["--dtype", "float32"]
    if config["draft_vocab_size"] < config["vocab_size"]:
        notes.append("draft_vocab_size: SGLang drafts with the target's head and cannot serve this draft, vLLM can")
        flags.pop("SGLang")
    if len(set(draft_files.windows(config))) > 1:
        notes.append("layer_types mixes full and sliding attention: vLLM needs its V2 runner, the default on GPUs")
    if block_files.algorithm(config) == "dspark":
        notes.append("DSpark: vLLM needs its V2 runner, the default on GPUs")
    if not all(block_files.causal_layers(config)):
        tokens = block_files.drafted_tokens(config)
        notes.append(f"slots of a block see the masks behind them: an engine has to draft {tokens} tokens a pass")
    return flags, notes


def serving_notes(config):
    """What a complete draft cannot do in one of the engines, one line each."""
    return find_engines(config)[1]


def serving_commands(folder, config, target, tp_size=1, tokens=None, is_flat=True):
    """{engine: command line} of the engines that can serve a draft.

    folder, target: what the engine loads, a folder or a hub id. config: flat. tp_size: GPUs that share the target.
    tokens: drafted a pass; none: `drafted_tokens`. is_flat: SGLang does not read the speculators form.
    """
    flags, _ = find_engines(config)
    tokens = tokens or drafted_tokens(config)
    commands = {}
    if "vLLM" in flags:
        words = ["vllm", "serve", str(target)]
        if tp_size > 1:
            words += ["--tensor-parallel-size", str(tp_size)]
        method = block_files.algorithm(config) or "eagle3"
        speculative = {"method": method, "model": str(folder), "num_speculative_tokens": tokens}
        words += ["--speculative-config", json.dumps(speculative), *flags["vLLM"]]
        commands["vLLM"] = shlex.join(words)
    if "SGLang" in flags and is_flat:
        words = ["python", "-m", "sglang.launch_server", "--model-path", str(target)]
        if tp_size > 1:
            words += ["--tp-size", str(tp_size)]
        words += sglang_flags(folder, config, tokens) + flags["SGLang"]
        commands["SGLang"] = shlex.join(words)
    return commands


def sglang_flags(folder, config, tokens):
    """SGLang's flags for `tokens` drafted a pass: it counts the tokens that are verified, one more."""
    algorithm = (block_files.algorithm(config) or "eagle3").upper()
    words = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(folder)]
    if not block_files.is_block(config):
        words += ["--speculative-num-steps", str(tokens), "--speculative-eagle-topk", "1"]
    return [*words, "--speculative-num-draft-tokens", str(tokens + 1)]


# ==================== The checkpoint of a training ===================================================================


def choose_checkpoint(output_dir, best, metric):
    """(folder of a finished training that is to be served, why).

    best: [value, step, metric, loss] of the best saved checkpoint, or None. metric: --best_metric.
    """
    output = Path(output_dir)
    metric = best[2] if best else metric
    steps, values = run_record.curve(run_record.read_metrics(output), "validation", metric)
    if not steps:
        return output / "final", "the last step, as no validation rows say which one is the best"
    if not best:
        return output / "final", "the last step, as no evaluation was finite"
    step = best[1]
    value = float(f"{best[0]:.9g}")  # as metrics.jsonl has it
    why = f"the best checkpoint by {metric}, {value:.3f} at step {step}"
    why += ", the last" if step == steps[-1] else f", against {values[-1]:.3f} at the last, {steps[-1]}"
    top = min(values) if metric == "loss" else max(values)
    if top != value:
        why += f"; step {steps[values.index(top)]} had {top:.3f} and was not saved, which --save_best does"
    folder = checkpoints.follow(output / "best")
    return folder if folder.is_dir() else checkpoints.step_folder(output, step), why


def print_advice(record, args, progress, config):
    """The last lines of a finished training: which checkpoint to serve, why, and the commands that do so.

    A checkpoint also holds the training's state, which an engine may take for weights: it is exported first.
    """
    if not record.is_main:
        return
    folder, why = choose_checkpoint(args.output_dir, progress.best, args.best_metric)
    record.line(f"serve {folder}: {why}")
    if folder.name != "final":
        served = Path(args.output_dir) / "served"
        command = ["python", "export_draft.py", str(folder), "--format", "flat", "--output", str(served)]
        record.line(f"  {shlex.join(command)}")
        folder = served
    for command in serving_commands(folder, config, args.target_model_path, args.tp_size).values():
        record.line(f"  {command}")
