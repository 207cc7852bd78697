"""foreign_flags."""

import argparse
import contextlib
import re
import sys

from core import common


def drop(argv, table, aliases=None):
    """argv, none: the program's own, without other trainers' flags that change nothing here; ends the program with one
    line about the others.

    table: rows (pattern of names without no_, pattern of values that change nothing, what to write instead). A pattern
    "true" or "false" stands for every spelling of it, and for the flag alone, with or without no_.
    """
    groups, kept, wrong = [], [], {}
    for word in common.normalise_argv(sys.argv[1:] if argv is None else argv, aliases):  # a flag and its values
        groups = [*groups, [word]] if word.startswith("--") or not groups else [*groups[:-1], [*groups[-1], word]]
    for group in groups:
        name, _, value = group[0].removeprefix("--").partition("=")
        value = " ".join(filter(None, [value, *group[1:]])).lower()
        known = table if group[0].startswith("--") else ()
        row = next((row for row in known if re.fullmatch(row[0], name.removeprefix("no_"))), None)
        if not row:
            kept += group
            continue
        if row[1] in ("true", "false"):
            with contextlib.suppress(argparse.ArgumentTypeError):
                value = str(common.boolean(value or "true") != name.startswith("no_")).lower()
        if not re.fullmatch(row[1], value) or not value:
            wrong.setdefault(row[2], []).append(f"--{name}")
    if wrong:
        common.fail("; ".join(f"{', '.join(names)}: {text}" for text, names in wrong.items()))
    return kept


OF_HIDDEN_STATES = (  # SpecForge's flags that this script lacks: see drop_foreign
    ("enable_aux_hidden_states", "true", "they are always written"),
    ("aux_hidden_states_layers", "", "write --target_layer_ids, which are higher by one"),
    (
        "chat_template|max_length|num_samples|train_only_last_turn",
        "",
        "prepare the conversations with prepare_data.py, which takes these, and give its folder as --data_path",
    ),
    ("build_dataset_num_proc", "", "prepare the conversations with prepare_data.py, where it is num_proc"),
    ("is_preformatted", "", 'prepare_data.py takes rows of {"text": ...} as they are'),
    ("cache_(dir|key)|model_download_dir", "", "downloads are kept in HF_HOME: drop it"),
    ("target_model_backend", "hf", "transformers runs the target: drop it"),
    ("sglang_.*", "", "transformers runs the target: drop it"),
)

ALIASES = {  # other trainers' names of the same thing
    "verifier_name_or_path": "target_model_path", "train_data_path": "dataset_train_split",
    "eval_data_path": "dataset_validation_split", "draft_config": "draft_model_config", "epochs": "num_epochs",
    "training_batch_size": "batch_size", "lr": "learning_rate", "ttt_steps": "ttt_length", "max_steps": "total_steps",
    "draft_attn_impl": "attention_backend", "log_interval": "log_steps", "log_freq": "log_steps",
    "from_pretrained": "resume_from_checkpoint", "ckpt_dir": "resume_from_checkpoint",
    "train_hidden_states_path": "hidden_states_path", "output_model_path": "output_dir", "save_path": "output_dir",
    "logger": "report_to", "wandb_name": "run_name", "swanlab_name": "run_name", "mlflow_run_name": "run_name",
    "checkpoint_freq": "save_interval", "dataloader_num_workers": "num_workers",
}  # fmt: skip

OF_TRAINERS = (  # other trainers' flags that this one lacks: see drop_foreign
    ("num_layers", "1", "the draft is one Llama layer"),
    ("draft_arch", "llama", "the draft is one Llama layer"),
    ("speculator_type", "eagle3", "the draft is one Llama layer"),
    ("draft_hidden_act", "silu", 'write "hidden_act" into the JSON of --draft_model_config'),
    ("sliding_window(_indices)?|mask_token_id|block_size|max_anchors|dflash_.*", "", "not of EAGLE-3, drop it"),
    ("norm_before_(residual|fc)|norm_output", "false", "write it into the JSON of --draft_model_config"),
    ("embed_requires_grad", "false", "the embedding stays frozen: serving takes the target's"),
    ("optimizer", "adamw", "the optimizer is AdamW, with --learning_rate and --weight_decay"),
    ("muon_.*", "", "the optimizer is AdamW, with --learning_rate and --weight_decay"),
    ("noise_std", r"0(\.0*)?", "no noise is added, drop it"),
    ("use_off_policy_tokens", "true", "later steps always read the data's tokens"),
    ("deterministic(_cuda)?", "false", "--seed fixes initialisation and order; kernels are as they are, drop it"),
    ("legacy_data", "false", "prepare the conversations with prepare_data.py"),
    ("data_format_version", "1", "prepare the conversations with prepare_data.py"),
    ("cache_(dir|key)|model_download_dir", "", "data are kept in output_dir/data, downloads in HF_HOME: drop it"),
    ("embedding_key", r"model\.embed_tokens\.weight", "the model's class knows it, drop it"),
    ("lm_head_key", r"lm_head\.weight", "the model's class knows it, drop it"),
    ("is_vlm", "false", "drafts are trained on text alone, drop it"),
    ("(min|max)_pixels", "", "drafts are trained on text alone, drop it"),
    ("is_preformatted", "true", 'rows of {"text": ...} are taken as they are'),
    ("train_only_last_turn", "false", "give it to prepare_data.py, and its folder as --data_path"),
    ("target_model_backend", "hf", "transformers runs the target, or vLLM at --vllm_endpoint: drop it"),
    ("sglang_.*", "", "transformers runs the target, or vLLM at --vllm_endpoint: drop it"),
    ("eval_hidden_states_path", "", "--hidden_states_path has those of the validation split too"),
    ("sp_(ulysses_|ring_)?size", "1", "sequences are not split: see Long sequences in the README"),
    ("profile|profile_record_shapes|verbose", "false", "benchmarks/step.py measures: drop it"),
    ("profile_(start_step|num_steps)", "", "benchmarks/step.py measures: drop it"),
    ("max_num_steps", "", "write --total_steps, and --scheduler_total_steps where the schedule is longer"),
    ("wandb", "false", "write --report_to wandb"),
    ("(wandb|swanlab|mlflow|trackio)_.*", "", "set the tracker's own variable: see Trackers in the README"),
)
