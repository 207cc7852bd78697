"""The keys of a draft's config.json that all kinds of drafts have: their meaning, their checks, their spellings."""

import json

import torch
from transformers.activations import ACT2FN

# ==================== Constants ======================================================================================

DTYPES = ("bfloat16", "float16", "float32")

MAPPING = {"d2t": torch.int64, "t2d": torch.bool}

EMBEDDING = "embed_tokens.weight"

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "vocab_size",
    "draft_vocab_size",
)

# Keys with one allowed value. SGLang drops biases, and a tied head would be the target's embeddings instead of the
# trained one.
FIXED = {"attention_bias": False, "tie_word_embeddings": False}

# Keys of a sliding window. vLLM reads layer_types, and sliding_window for the layers that have it; of a qwen3 draft
# transformers drops sliding_window unless use_sliding_window is true.
WINDOW = ("sliding_window", "layer_types", "use_sliding_window")

# Keys with which an engine computes another layer, and the values that change nothing; null never does.
NEUTRAL = {
    "mlp_bias": False, "qkv_bias": False, "bias": False, "partial_rotary_factor": 1, "is_causal": True,
    "qk_norm": False, "use_qk_norm": False, "clip_qkv": None, "attention_chunk_size": None,
    "attn_temperature_tuning": False,
    "attention_multiplier": None, "query_pre_attn_scalar": None, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "residual_multiplier": 1, "embedding_multiplier": 1, "logits_scaling": 1,
    "logit_scale": 1, "quantization_config": None, "parallel_drafting": False,
}  # fmt: skip

# Rope types that all engines compute alike, and the numbers they need. A target with another type gets a draft with
# plain RoPE.
ROPE_TYPES = {
    "default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip

SPECULATORS_VERSION = "0.5.0"

ROPE_OPTIONS = {"rope_type", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"}  # yarn's


# ==================== Their meaning ==================================================================================


def windows(config):
    """The window of each layer; 0: none."""
    kinds = config.get("layer_types") or ["full_attention"] * config.get("num_hidden_layers", 1)
    return [config["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds]


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def common_dtype(tensors):
    """The dtype that all floating tensors but the embedding table have ("bfloat16"), or None if there are several."""
    floating = [tensor for name, tensor in tensors.items() if tensor.is_floating_point() and name != EMBEDDING]
    dtypes = {dtype_name(tensor.dtype) for tensor in floating}
    return dtypes.pop() if len(dtypes) == 1 else None


# ==================== Checks =========================================================================================


def is_positive(value):
    return type(value) in (int, float) and value > 0


def size_problems(config, keys=(*SIZES, "target_hidden_size", "num_aux_hidden_states")):
    problems = []
    for key in keys:
        if key in config and (type(config[key]) is not int or config[key] <= 0):
            problems.append(f"{key} is {config[key]!r}, not a positive integer")
    return problems


def rope_problems(scaling):
    if scaling is None:
        return []
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        return [f"rope_scaling is {scaling!r}, not null or an object with a rope_type of {', '.join(ROPE_TYPES)}"]
    partial = scaling.get("partial_rotary_factor", 1)
    if partial != 1:
        return [f"rope_scaling's partial_rotary_factor is {partial!r}, not 1: a draft rotates complete heads"]
    known = {*ROPE_TYPES[kind], *ROPE_OPTIONS, "partial_rotary_factor"}
    unknown = [key for key, value in scaling.items() if key not in known and value is not None]
    if unknown:
        return [f"rope_scaling's {', '.join(unknown)}: the engines do not all compute them in {kind}"]
    values = {key: scaling.get(key) for key in ROPE_TYPES[kind]}
    return [
        f"rope_scaling's {key} is {value!r}, {kind} needs a positive number"
        for key, value in values.items()
        if not is_positive(value)
    ]


def is_layer_ids(ids, first):
    """Whether ids are a list of layer ids from `first` on; None is one that is left out."""
    if ids is None:
        return True
    return isinstance(ids, list) and len(ids) > 0 and all(type(i) is int and i >= first for i in ids)


def value_problems(config, fixed=FIXED, neutral=NEUTRAL):
    """The problems of single values that every kind of draft has."""
    problems = []
    for key, value in fixed.items():
        if config.get(key, value) != value:
            problems.append(f"{key} is {json.dumps(config[key])}, not {json.dumps(value)}")
    problems += window_problems(config)
    for key, value in neutral.items():
        if config.get(key) not in (None, value):
            problems.append(f"{key} is {json.dumps(config[key])}, not {json.dumps(value)}")
    for key in ("rms_norm_eps", "rope_theta"):
        if key in config and not is_positive(config[key]):
            problems.append(f"{key} is {config[key]!r}, not a positive number")
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        problems.append(f"hidden_act is {activation!r}, not the name of an activation in transformers, such as silu")
    if config.get("torch_dtype", DTYPES[0]) not in DTYPES:
        problems.append(f"torch_dtype is {config['torch_dtype']!r}, not one of {', '.join(DTYPES)}")
    return problems


def window_problems(config):
    """Those of the keys of a sliding window: the engines have to understand the same by them."""
    window, kinds, is_used = (config.get(key) for key in WINDOW)
    count = config.get("num_hidden_layers", 1)
    known = ("full_attention", "sliding_attention")
    if kinds is None and window is not None and is_used is not False:
        return [f"sliding_window is {window}, not null, without layer_types, which says what layers have it"]
    if kinds is None:
        return ["use_sliding_window is true, without sliding_window"] if is_used else []
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds) or len(kinds) != count:
        return [f"layer_types is {json.dumps(kinds)}, not a list of {' or '.join(known)}, one for each layer: {count}"]
    if "sliding_attention" not in kinds:
        return []
    if type(window) is not int or window <= 0:
        return [f"sliding_window is {window!r}, not a positive integer"]
    if config.get("model_type") == "qwen3" and is_used is not True:
        return [f"use_sliding_window is {json.dumps(is_used)}, not true: vLLM would leave out the window of qwen3"]
    return []


def relation_problems(config):
    """The problems between values that are valid one by one."""
    problems = []
    draft = config["draft_vocab_size"]
    vocab = config["vocab_size"]
    heads = config["num_attention_heads"]
    groups = config["num_key_value_heads"]
    if draft > vocab:
        problems.append(f"draft_vocab_size {draft} is larger than vocab_size {vocab}")
    if heads % groups:
        problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if config["head_dim"] % 2:
        problems.append(f"head_dim {config['head_dim']} is odd: rotary positions need pairs")
    return problems


# ==================== Spellings ======================================================================================


def with_two_rope_keys(config):
    """A copy of config with rope_theta and rope_scaling, whatever version of transformers wrote it."""
    config = dict(config)
    rope = config.pop("rope_parameters", None)  # transformers 5's name for both
    if isinstance(rope, dict):
        config = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope} | config
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict):
        scaling = dict(scaling)
        theta = scaling.pop("rope_theta", None)
        if theta is not None:
            config.setdefault("rope_theta", theta)
        kind = scaling.pop("type", None)  # the older spelling, which the draft would not see
        config["rope_scaling"] = scaling if kind is None else {"rope_type": kind} | scaling
    return config


def speculators_layer(config, outer):
    """transformer_layer_config of the speculators form: a flat config without the keys that stand outside of it."""
    layer = {key: value for key, value in config.items() if key not in outer}
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters
    rope = config.get("rope_scaling") or {}
    layer["rope_parameters"] = {"rope_type": "default", **rope, "rope_theta": config["rope_theta"]}
    layer["architectures"] = [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[config["model_type"]]]
    return layer


def speculators_config(algorithm, tokens, target_model_path, target_architectures):
    """speculators_config of that form: tokens that are drafted by default, and the target."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "algorithm": algorithm,
        "default_proposal_method": "greedy",
        "proposal_methods": [proposal],
        "verifier": {"name_or_path": str(target_model_path), "architectures": list(target_architectures)},
    }
