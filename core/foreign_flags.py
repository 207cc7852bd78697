"""Other trainers' flags: what they are called here, which change nothing, and what to write instead of the others."""

import argparse
import contextlib
import os
import re
import sys
from typing import NamedTuple

from core import common


class Foreign(NamedTuple):
    """A flag of other trainers that does not exist here.

    names: pattern of its name, without a leading no_.
    harmless: pattern of the values that change nothing, so that the flag is dropped; "" if every value is refused.
        "true" and "false" stand for all their spellings, and for the flag without a value.
    instead: what to write, or why nothing is needed.
    """

    names: str
    harmless: str
    instead: str


def parse(parser, argv, table, aliases=None, values=None, recipes=None):
    """The flags of a command line that may be another trainer's.

    argv: None means the program's own. table: flags that do not exist here; those that change nothing are dropped, and
    the others end the program with one line. aliases: {another trainer's name: ours}. values: {flag: {another trainer's
    value: ours}}. recipes: {value of --recipe: {flag: its default}}. Errors name a flag as it is written on the command
    line.
    """
    words = common.normalise_argv(sys.argv[1:] if argv is None else argv)
    aliases = aliases or {}
    kept = []
    refused = {}  # {instead: flags}
    for group in group_by_flag(words):
        name, value = split_flag(group)
        ours = aliases.get(name, name)
        foreign = find_foreign(group[0], ours, table)
        if foreign is None:
            parser.written[ours] = name
            kept += translate(group, aliases, values or {})
        elif not is_harmless(foreign, name, value):
            refused.setdefault(foreign.instead, []).append(f"--{name}")
    if refused:
        common.fail("; ".join(f"{', '.join(flags)}: {instead}" for instead, flags in refused.items()))
    args = parser.parse_args(kept)
    if recipes and args.recipe:
        parser.set_defaults(**recipes[args.recipe])
        args = parser.parse_args(kept)
    return args


def translate(group, aliases, values):
    """A flag and its values with our names; rank 0 prints a line about a value that has another name here."""
    flag, *rest = common.normalise_argv(group, aliases)
    name, equals, value = flag.partition("=")
    ours = values.get(name.removeprefix("--"), {})
    replaced = [f"{word} is {ours[word]} here" for word in (value, *rest) if word in ours]
    if replaced and os.environ.get("RANK", "0") == "0":
        print(f"{name.removeprefix('--')}: {', '.join(replaced)}")
    return [name + equals + ours.get(value, value), *(ours.get(word, word) for word in rest)]


def group_by_flag(words):
    """[[flag, its values ...], ...] of a command line."""
    groups = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def split_flag(group):
    """(name, value) of a flag written as --name=value or as --name value ...; the value is "" if there is none."""
    name, _, value = group[0].removeprefix("--").partition("=")
    values = [value, *group[1:]]
    return name, " ".join(filter(None, values)).lower()


def find_foreign(word, name, table):
    """The first row of the table that names the flag, or None."""
    if not word.startswith("--"):
        return None
    for foreign in table:
        if re.fullmatch(foreign.names, name.removeprefix("no_")):
            return foreign
    return None


def is_harmless(foreign, name, value):
    """Does the flag with this value change nothing?"""
    if foreign.harmless in ("true", "false"):
        with contextlib.suppress(argparse.ArgumentTypeError):
            switched_on = common.boolean(value or "true") != name.startswith("no_")
            value = str(switched_on).lower()
    return bool(value and re.fullmatch(foreign.harmless, value))


PREPARE = "prepare the conversations with prepare_data.py"
BLOCKS = "train_eagle3.py trains EAGLE-3 drafts; for dflash and dspark start train_dflash.py with the same flags"
EAGLE3 = "of EAGLE-3 drafts, which train_eagle3.py trains: drop it"
PRECISION = "bf16 is what trains on GPUs, and fp32 on CPUs: see --precision"
TEXT_ALONE = "drafts are trained on text alone, drop it"
CLASS_KNOWS = "the model's class knows it, drop it"
MEASURED = "benchmarks/step.py measures: drop it"
RUNS_TARGET = "transformers runs the target, or vLLM at --vllm_endpoint: drop it"
WRITES_TARGET = "transformers runs the target: drop it"

OF_HIDDEN_STATES = (  # flags of SpecForge's script that prepare_hidden_states.py does not have
    Foreign("enable_aux_hidden_states", "true", "they are always written"),
    Foreign("aux_hidden_states_layers", "", "write --target_layer_ids, which are higher by one"),
    Foreign("chat_template|max_length|num_samples|train_only_last_turn", "",
            f"{PREPARE}, which takes these, and give its folder as --data_path"),
    Foreign("build_dataset_num_proc", "", f"{PREPARE}, where it is num_proc"),
    Foreign("is_preformatted", "", 'prepare_data.py takes rows of {"text": ...} as they are'),
    Foreign("cache_(dir|key)|model_download_dir", "", "downloads are kept in HF_HOME: drop it"),
    Foreign("target_model_backend", "hf", WRITES_TARGET),
    Foreign("sglang_.*", "", WRITES_TARGET),
)  # fmt: skip

ALIASES = {  # {another trainer's name: ours}
    "verifier_name_or_path": "target_model_path", "model_name_or_path": "target_model_path",
    "basepath": "target_model_path", "trainpath": "dataset_train_split", "testpath": "dataset_validation_split",
    "configpath": "draft_model_config", "savedir": "output_dir", "train_data_path": "dataset_train_split",
    "eval_data_path": "dataset_validation_split", "draft_config": "draft_model_config", "epochs": "num_epochs",
    "training_batch_size": "batch_size", "lr": "learning_rate", "ttt_steps": "ttt_length", "max_steps": "total_steps",
    "draft_attn_impl": "attention_backend", "log_interval": "log_steps", "log_freq": "log_steps",
    "from_pretrained": "resume_from_checkpoint", "ckpt_dir": "resume_from_checkpoint",
    "train_hidden_states_path": "hidden_states_path", "output_model_path": "output_dir", "save_path": "output_dir",
    "logger": "report_to", "wandb_name": "run_name", "swanlab_name": "run_name", "mlflow_run_name": "run_name",
    "per_device_train_batch_size": "draft_micro_batch_size", "num_train_epochs": "num_epochs",
    "warmup_steps": "scheduler_warmup_steps", "lr_scheduler_type": "scheduler_type", "logging_steps": "log_steps",
    "checkpoint_freq": "save_interval", "dataloader_num_workers": "num_workers",
    "no_norm_before_residual": "norm_before_residual=false", "no_embed_requires_grad": "embed_requires_grad=false",
    "no_use_off_policy_tokens": "use_off_policy_tokens=false", "deterministic_cuda": "deterministic",
}  # fmt: skip

VALUES = {  # {flag: {another trainer's value: ours, which computes the same}}
    "attention_backend": {"simple_flex_attention": "flex_attention", "eager": "sdpa"},
}

OF_TRAINERS = (  # flags of other trainers that train_eagle3.py does not have
    Foreign("speculator_type", "eagle3", BLOCKS),
    Foreign("mask_token_id|block_size|max_anchors|dflash_.*", "", BLOCKS),
    Foreign("legacy_data", "false", PREPARE),
    Foreign("data_format_version", "1", PREPARE),
    Foreign("cache_(dir|key)|model_download_dir", "",
            "data are kept in output_dir/data, downloads in HF_HOME: drop it"),
    Foreign("embedding_key", r"model\.embed_tokens\.weight", CLASS_KNOWS),
    Foreign("lm_head_key", r"lm_head\.weight", CLASS_KNOWS),
    Foreign("is_vlm", "false", TEXT_ALONE),
    Foreign("(min|max)_pixels", "", TEXT_ALONE),
    Foreign("is_preformatted", "true", 'rows of {"text": ...} are taken as they are'),
    Foreign("train_only_last_turn", "false", "give it to prepare_data.py, and its folder as --data_path"),
    Foreign("target_model_backend", "hf", RUNS_TARGET),
    Foreign("sglang_.*", "", RUNS_TARGET),
    Foreign("eval_hidden_states_path", "", "--hidden_states_path has those of the validation split too"),
    Foreign("sp_(ulysses_|ring_)?size", "1", "sequences are not split: see docs/performance.md"),
    Foreign("profile|profile_record_shapes|verbose", "false", MEASURED),
    Foreign("profile_(start_step|num_steps)", "", MEASURED),
    Foreign("bf16", "true", PRECISION),
    Foreign("fp16|tf32", "false", PRECISION),
    Foreign("deepspeed", "true", "write --deepspeed_config"),
    Foreign("gradient_accumulation_steps", "",
            "write --draft_global_batch_size: batch x accumulation x ranks, and accumulation follows"),
    Foreign("max_num_steps", "", "write --total_steps, and --scheduler_total_steps where the schedule is longer"),
    Foreign("wandb", "false", "write --report_to wandb"),
    Foreign("(wandb|swanlab|mlflow|trackio)_.*", "", "set the tracker's own variable: see docs/metrics.md"),
)  # fmt: skip

BLOCK_ALIASES = {**ALIASES, "speculator_type": "algorithm"}

OF_BLOCK_TRAINERS = (  # the same of train_dflash.py
    Foreign("draft_arch", "qwen3", "the layers of a block draft are Qwen3's: drop it"),
    Foreign("draft_hidden_act", "silu|none", "the engines know silu alone: drop it"),
    Foreign("(norm_before_(residual|fc)|fc_norm|norm_output|embed_requires_grad)(=false)?", "false", EAGLE3),
    Foreign("ttt_.*|use_off_policy_tokens(=false)?|sliding_window_indices", "", EAGLE3),
    Foreign("head_init|freeze_head|step_weights|chain_sampling|max_chains|noise_std|recipe", "", EAGLE3),
    *(foreign for foreign in OF_TRAINERS if foreign.instead != BLOCKS),
)  # fmt: skip
