"""draft_files."""

import json
import math
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from core import common, target_files, vocabulary


def dense_layer(text, whole):
    """(intermediate size, heads, key-value heads, size of a head) of a plain layer that suits a target with these text
    and whole configurations: the sizes of its own layers where these are plain.

    Experts: what the family's dense layers have, else the experts that work on a token taken together. Latent attention
    (MLA) keeps one small vector a token for all heads; with as many heads, a plain layer would keep as much a token as
    all 61 layers of DeepSeek-V3. So heads of 128 that fill the hidden size, in 8 groups; their number is a power of
    two, so that the ranks of a server divide it.
    """

    def first(*names, default=None):
        values = (getattr(config, name, None) for config in (text, whole) for name in names)
        values = (max(value, default=None) if isinstance(value, list | tuple) else value for value in values)
        return next((value for value in values if value is not None), default)

    if getattr(text, "is_heterogeneous", False):  # Gemma 4's layers that see all have other heads than its sliding ones
        text = text.per_layer_config[0]
    heads, hidden = text.num_attention_heads, text.hidden_size
    inner, mixed = first("intermediate_size", "ffn_dim", "n_inner"), first("intermediate_size_mlp")
    expert, active = first("moe_intermediate_size", "expert_ffn_hidden_size"), first("num_experts_per_tok", default=0)
    if mixed:  # Llama 4's dense layers; intermediate_size is that of its experts
        inner = mixed
    elif inner and active and not expert:  # intermediate_size is that of the experts
        inner *= active
    elif not inner:
        inner = active * expert + first("shared_expert_intermediate_size", default=0) if expert else 4 * hidden
    if first("kv_lora_rank"):
        heads = 2 ** math.ceil(math.log2(max(hidden / 128, 1)))
        return inner, heads, min(8, heads), 128
    return inner, heads, first("num_key_value_heads", default=heads), first("head_dim", default=hidden // heads)


ARCHITECTURE = "LlamaForCausalLMEagle3"

DTYPES = ("bfloat16", "float16", "float32")

MAPPING = {"d2t": torch.int64, "t2d": torch.bool}

EMBEDDING = "embed_tokens.weight"

AUXILIARY = "eagle_aux_hidden_state_layer_ids"

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

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")

# What a draft has no choice in. More layers would be served differently by each engine, biases are dropped by SGLang,
# and a tied head would be the target's embeddings instead of the trained one.
FIXED = {
    "architectures": [ARCHITECTURE], "model_type": "llama", "num_hidden_layers": 1, "attention_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip

REQUIRED = (
    "architectures",
    "model_type",
    *SIZES,
    "attention_bias",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
)

# The meaning of a key that a foreign draft's config does not have: every engine reads it through transformers'
# LlamaConfig, and speculators stores only what differs from that. Nothing here changes what such a draft computes.
LLAMA_DEFAULTS = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# Where the families keep the input embeddings [V, H].
EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "embed_tokens.weight",
    "model.tok_embeddings.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
)

SPECULATORS_VERSION, ADDED = "0.5.0", "the target's"

# Rope types that all engines compute alike, and the numbers they need; a target's of another type becomes plain RoPE.
ROPE_TYPES = {
    "default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip

ROPE_OPTIONS = {"rope_type", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"}  # of yarn, read by all


def _derived_rope(text):
    """(rope_theta, rope_scaling or None) for the draft of a target whose text configuration this is."""
    rope = dict(getattr(text, "rope_parameters", None) or {})
    rope = dict(rope.get("full_attention", rope))  # some families keep one entry per kind of layer
    theta, kind = rope.pop("rope_theta", None) or 10000.0, rope.get("rope_type", "default")
    if kind == "default" or kind not in ROPE_TYPES:
        return theta, None
    # What else a family has there is about its own layers: shares of heads, sections of pictures, scales of queries.
    rope = {k: v for k, v in rope.items() if v is not None and k in {*ROPE_TYPES[kind], *ROPE_OPTIONS}}
    if kind != "linear":  # as transformers completes them
        original = rope.setdefault("original_max_position_embeddings", text.max_position_embeddings)
        rope.setdefault("factor", text.max_position_embeddings / original)
    return theta, rope


def derive_config(text, whole):
    """The draft's flat config.json for a target: the target's sizes, one Llama layer, the full vocabulary."""
    theta, scaling = _derived_rope(text)
    inner, heads, groups, head_dim = dense_layer(text, whole)

    def first(*names, default=None):
        values = (getattr(config, name, None) for config in (text, whole) for name in names)
        return next((value for value in values if value is not None), default)

    return {
        **FIXED,
        "hidden_size": text.hidden_size,
        "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim,
        "rms_norm_eps": first("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", default=1e-6),
        "hidden_act": "silu",
        "rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": text.max_position_embeddings,
        "vocab_size": text.vocab_size, "draft_vocab_size": text.vocab_size,
        "torch_dtype": str(first("dtype", default="bfloat16")).removeprefix("torch."),
        "bos_token_id": first("bos_token_id"), "eos_token_id": first("eos_token_id"),
    }  # fmt: skip


def configure(text, whole, given=None, source=None, layer_ids=None, draft_vocab_size=None):
    """(flat configuration, auxiliary layers) of a draft for a target with these text and whole configurations.

    given: what a file or a checkpoint, `source`, says; what it leaves open is derived. layer_ids and draft_vocab_size
    go before both. A draft that does not fit the target ends the program.
    """
    derived, given = derive_config(text, whole), _with_two_rope_keys(given or {})
    config, source = dict(derived), source or "the derived draft configuration"
    if "rope_theta" in given or "rope_scaling" in given:  # one unit: never half the target's and half the file's
        config |= {"rope_theta": given.get("rope_theta", 10000.0), "rope_scaling": given.get("rope_scaling")}
    config |= {key: value for key, value in given.items() if value is not None}
    if problems := _size_problems(config):  # what follows computes with them
        common.fail(f"{source}: {'; '.join(problems)}")
    if given.get("head_dim") is None and ("hidden_size" in given or "num_attention_heads" in given):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config |= {
        "torch_dtype": derived["torch_dtype"],
        "draft_vocab_size": draft_vocab_size or config["draft_vocab_size"],
        # The draft is served as far as the target is. Its rotary frequencies do not depend on this number.
        "max_position_embeddings": max(config["max_position_embeddings"], derived["max_position_embeddings"]),
    }
    sizes = {"hidden_size": config.get("target_hidden_size", config["hidden_size"]), "vocab_size": config["vocab_size"]}
    for key, size in sizes.items():
        if size != derived[key]:
            common.fail(f"{source} is another target's: its {key} is {size}, this target's {derived[key]}")
    if needs_embedding(config):
        asked = {k: config[k] for k in ("hidden_size", "target_hidden_size", "embed_requires_grad") if k in config}
        common.fail(f"{source}: {json.dumps(asked)[1:-1]}: training an embedding table is not available yet")
    if not 0 < config["draft_vocab_size"] <= config["vocab_size"]:
        common.fail(
            f"draft_vocab_size {config['draft_vocab_size']} is not within 1..{config['vocab_size']}, the target's"
        )
    default = target_files.default_layer_ids(text.num_hidden_layers)
    layers = layer_ids or auxiliary_layers(config) or default
    if not all(1 <= layer <= text.num_hidden_layers for layer in layers) or sorted(set(layers)) != layers:
        whose = "target_layer_ids" if layer_ids else f"{source}: auxiliary layers"
        common.fail(f"{whose} {layers}: they must ascend within 1..{text.num_hidden_layers}, the target's layers")
    if config.get("num_aux_hidden_states", len(layers)) != len(layers):
        common.fail(
            f"{source}: num_aux_hidden_states {config['num_aux_hidden_states']} for the auxiliary layers {layers}"
        )
    config = with_auxiliary_layers(config, layers, default)
    if problems := check_config(config):
        common.fail(f"{source}: {'; '.join(problems)}")
    return config, layers


def auxiliary_layers(config):
    """The auxiliary layers in hidden_states indexing (0 = embeddings), or None where the config leaves the default."""
    own, theirs = config.get(AUXILIARY), (config.get("eagle_config") or {}).get(AUXILIARY)
    return list(own) if own else [i + 1 for i in theirs] if theirs else None


def with_auxiliary_layers(config, layer_ids, default_ids=None):
    """A copy of config with the auxiliary layers (hidden_states indexing) in both spellings; in none if the default."""
    config = {k: v for k, v in config.items() if k not in (AUXILIARY, "eagle_config", "num_aux_hidden_states")}
    if layer_ids is None or (default_ids is not None and list(layer_ids) == list(default_ids)):
        return config
    config[AUXILIARY] = list(layer_ids)  # vLLM: indices into hidden_states
    config["eagle_config"] = {AUXILIARY: [i - 1 for i in layer_ids], "use_aux_hidden_state": True}  # SGLang: 0-based
    if len(layer_ids) != 3:
        config["num_aux_hidden_states"] = len(layer_ids)
    return config


def num_auxiliary(config):
    return config.get("num_aux_hidden_states") or len(auxiliary_layers(config) or range(3))


def _auxiliary_problems(config):
    nested = config.get("eagle_config", {})
    if not isinstance(nested, dict):
        return [f"eagle_config is {nested!r}, not an object"]
    problems = []
    if not nested.get("use_aux_hidden_state", True):
        problems.append("eagle_config.use_aux_hidden_state is false: the engines would leave out fc")
    own, theirs = config.get(AUXILIARY), nested.get(AUXILIARY)
    for name, ids, first in ((AUXILIARY, own, 1), (f"eagle_config.{AUXILIARY}", theirs, 0)):
        whole = isinstance(ids, list) and len(ids) > 0 and all(type(i) is int and i >= first for i in ids)
        if ids is not None and not whole:
            return [*problems, f"{name} is {ids!r}, not a list of layer ids from {first}"]
    if (own is None) != (theirs is None):
        missing = "SGLang reads eagle_config." if theirs is None else "vLLM reads the top level's "
        problems.append(f"auxiliary layers {own or theirs} are written once only: {missing}{AUXILIARY}")
    elif own is not None and theirs != [i - 1 for i in own]:
        needed = f"vLLM's {AUXILIARY} {own} needs SGLang's in eagle_config to be {[i - 1 for i in own]}"
        problems.append(f"auxiliary layers disagree: {needed}, which is {theirs}")
    count = config.get("num_aux_hidden_states", 3)
    if own is None and theirs is None and count != 3:
        problems.append(f"num_aux_hidden_states is {count} without {AUXILIARY}: the engines' default is 3 layers")
    if own is not None and len(own) != count:
        problems.append(f"{AUXILIARY} has {len(own)} layers, num_aux_hidden_states says {count}")
    return problems


def needs_embedding(config):
    """Whether the draft has an embedding table of its own: another width than the target's, or a trained one."""
    own_width = config.get("target_hidden_size", config["hidden_size"]) != config["hidden_size"]
    return own_width or bool(config.get("embed_requires_grad"))


def expected_tensors(config):
    """{name: shape} of the flat form of a draft with this (whole) config."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    draft, vocab = config["draft_vocab_size"], config["vocab_size"]
    query, key_value = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    target_hidden, auxiliary = config.get("target_hidden_size", hidden), num_auxiliary(config)
    shapes = {
        "fc.weight": (hidden, auxiliary * target_hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (query, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (key_value, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (key_value, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, query),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft, hidden),
    }
    if config.get("norm_before_fc"):
        shapes["input_norm.weight"] = (auxiliary * target_hidden,)
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (target_hidden,) for i in range(auxiliary)}
    if needs_embedding(config):
        shapes[EMBEDDING] = (vocab, hidden)
    if draft < vocab:
        shapes |= {"d2t": (draft,), "t2d": (vocab,)}
    return shapes


def _size_problems(config):
    keys = [key for key in (*SIZES, "target_hidden_size", "num_aux_hidden_states") if key in config]
    wrong = [key for key in keys if type(config[key]) is not int or config[key] <= 0]
    return [f"{key} is {config[key]!r}, not a positive integer" for key in wrong]


def _rope_problems(scaling):
    if scaling is None:
        return []
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        return [f"rope_scaling is {scaling!r}, not null or an object with a rope_type of {', '.join(ROPE_TYPES)}"]
    if scaling.get("partial_rotary_factor", 1) != 1:
        return [f"rope_scaling's partial_rotary_factor is {scaling['partial_rotary_factor']!r}, not 1: heads are whole"]
    values = {key: scaling.get(key) for key in ROPE_TYPES[kind]}
    wrong = {key: value for key, value in values.items() if not (type(value) in (int, float) and value > 0)}
    return [f"rope_scaling's {key} is {value!r}, {kind} needs a positive number" for key, value in wrong.items()]


def check_config(config):
    """What is wrong with a flat config, one line each; empty if both engines can read it."""
    problems = [f"{key} is missing" for key in REQUIRED if key not in config] + _size_problems(config)
    fixed = FIXED | {"mlp_bias": False, "partial_rotary_factor": 1}  # a draft's MLP has none, and whole heads turn
    problems += [f"{key} is {config[key]!r}, not {x!r}" for key, x in fixed.items() if config.get(key, x) != x]
    for key in ("rms_norm_eps", "rope_theta"):
        if key in config and not (type(config[key]) in (int, float) and config[key] > 0):
            problems.append(f"{key} is {config[key]!r}, not a positive number")
    problems += [f"{k} is {config[k]!r}, not true or false" for k in FLAGS if type(config.get(k, False)) is not bool]
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        problems.append(f"hidden_act is {activation!r}, not the name of an activation in transformers, such as silu")
    if config.get("torch_dtype", DTYPES[0]) not in DTYPES:
        problems.append(f"torch_dtype is {config['torch_dtype']!r}, not one of {', '.join(DTYPES)}")
    problems += _rope_problems(config.get("rope_scaling")) + _auxiliary_problems(config)
    if problems:
        return problems  # the relations below need the values
    draft, vocab = config["draft_vocab_size"], config["vocab_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if draft > vocab:
        problems.append(f"draft_vocab_size {draft} is larger than vocab_size {vocab}")
    if heads % groups:
        problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if config["head_dim"] % 2:
        problems.append(f"head_dim {config['head_dim']} is odd: rotary positions need pairs")
    return problems


def serving_notes(config):
    """What a whole draft cannot do in one of the engines, one line each."""
    notes = []
    if config.get("norm_before_residual"):
        notes.append("norm_before_residual: SGLang cannot serve this draft, vLLM can")
    if config["torch_dtype"] == "float32":
        notes.append("torch_dtype float32: SGLang serves it as float16 unless started with --dtype")
    if config["hidden_act"] != "silu":
        notes.append(f"hidden_act {config['hidden_act']}: the engines know silu only")
    return notes


def check_tensors(config, tensors):
    """What is wrong with the tensors (flat names) of a draft whose config is whole, one line each, by name."""
    expected = expected_tensors(config)
    shapes = {EMBEDDING: (config["vocab_size"], config["hidden_size"]), **expected}  # an embedding is never wrong
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            full = " (the draft has the full vocabulary: vLLM refuses a mapping)" if name in MAPPING else ""
            problems.append(f"{name} is not a tensor of this draft{full}")
            continue
        dtype = MAPPING.get(name) or getattr(torch, config["torch_dtype"])
        if tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shapes[name])}")
        if tensor.dtype != dtype:
            problems.append(f"{name} is {str(tensor.dtype)[6:]}, expected {str(dtype)[6:]}")
        if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
            problems.append(f"{name} has {bad} of {tensor.numel()} values that are not finite")
    if set(MAPPING) <= set(tensors) & set(expected):
        problems += vocabulary.mapping_problems(tensors["d2t"].numpy(), tensors["t2d"].numpy())
    return problems


def _read_config(folder):
    """(config.json as a dict, problems)."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        return {}, [f"config.json cannot be read: {error}"]
    return (config, []) if isinstance(config, dict) else ({}, ["config.json is not a JSON object"])


def _read_tensors(folder):
    """({name: tensor}, problems) of model.safetensors, else its shards, else EAGLE's own pytorch_model.bin."""
    index = folder / "model.safetensors.index.json"
    try:
        if (folder / "model.safetensors").exists():
            return load_file(folder / "model.safetensors"), []
        if index.exists():
            tensors = {}
            for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                tensors |= load_file(folder / shard)
            return tensors, []
        if (folder / "pytorch_model.bin").exists():
            tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
            if isinstance(tensors, dict) and all(isinstance(t, torch.Tensor) for t in tensors.values()):
                return tensors, []
            return {}, ["pytorch_model.bin is not a dictionary of tensors"]
    except Exception as error:  # a file of another kind, or a pickle that would run code, fails anywhere
        why = "it holds more than tensors" if "weights_only" in str(error) else str(error) or repr(error)
        return {}, [f"the weights cannot be read: {why.splitlines()[0]}"]
    return {}, ["model.safetensors is missing"]


def _with_two_rope_keys(config):
    """A copy of config with rope_theta and rope_scaling, whatever version of transformers wrote it."""
    config = dict(config)
    rope = config.pop("rope_parameters", None)  # transformers 5's name for both
    if isinstance(rope, dict):
        config = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope} | config
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and "type" in scaling:  # the older spelling, which the draft would not see
        config["rope_scaling"] = {"rope_type": scaling["type"]} | {k: v for k, v in scaling.items() if k != "type"}
    return config


def _complete(raw, tensors):
    """A foreign config in our form: what it leaves out is filled where that has one meaning only."""
    config = {k: v for k, v in raw.items() if v is not None or k.endswith("_token_id")}  # null = left out
    config = _with_two_rope_keys(config)
    config = {**LLAMA_DEFAULTS, **config, "architectures": [ARCHITECTURE]}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if all(type(config[key]) is int and config[key] > 0 for key in ("hidden_size", "num_attention_heads")):
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if "lm_head.weight" in tensors:
        config.setdefault("draft_vocab_size", len(tensors["lm_head.weight"]))
    if not any(name.startswith("layers.1.") for name in tensors):  # some releases keep their target's number
        config["num_hidden_layers"] = 1
    dtype = config.pop("dtype", None) or _common_dtype(tensors)  # dtype: transformers 5's name for torch_dtype
    if dtype:
        config.setdefault("torch_dtype", dtype)
    own, nested = config.get(AUXILIARY), config.get("eagle_config") or {}
    theirs = nested.get(AUXILIARY) if isinstance(nested, dict) else None
    if isinstance(nested, dict) and not own and not theirs and nested.get("use_aux_hidden_state", True):
        config = {key: value for key, value in config.items() if key not in (AUXILIARY, "eagle_config")}
    elif bool(own) != bool(theirs) and all(type(i) is int for i in own or theirs):
        both = with_auxiliary_layers({}, auxiliary_layers(config))  # written once: the other spelling follows from it
        config = {**both, **config, AUXILIARY: both[AUXILIARY], "eagle_config": {**both["eagle_config"], **nested}}
    return config


def _common_dtype(tensors):
    """The dtype that all floating tensors but the embedding table have ("bfloat16"), or None if there are several."""
    dtypes = {str(t.dtype)[6:] for name, t in tensors.items() if t.is_floating_point() and name != EMBEDDING}
    return dtypes.pop() if len(dtypes) == 1 else None


def _from_speculators(raw, tensors):
    """The flat config of a speculators config.json."""
    config = dict(raw.get("transformer_layer_config") or {})
    config |= {k: raw[k] for k in ("draft_vocab_size", "target_hidden_size", AUXILIARY) if raw.get(k) is not None}
    config |= {k: raw[k] for k in ("torch_dtype", "dtype") if raw.get(k) is not None and k not in config}
    flags = {"norm_before_residual": raw.get("norm_before_residual", True)}  # vLLM's reading of an absent key
    flags |= {key: raw[key] for key in FLAGS[1:] if raw.get(key)}
    return _complete({**config, **{key: value for key, value in flags.items() if value}}, tensors)


def _load(folder, strict):
    """(flat config, tensors by flat names, problems); config and tensors are None where they cannot be had.

    strict: the folder as an engine will read it. Otherwise as another trainer may have left it: keys and t2d are filled
    and what means nothing (rotary tables, the identity as a mapping) is left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None, None, [f"{folder} is not a folder"]
    raw, problems = _read_config(folder)
    tensors, more = _read_tensors(folder)
    if problems or more:
        return None, None, problems + more
    speculators = "speculators_model_type" in raw
    renamed = any(n.startswith("layers.0.") for n in tensors) and not any(n.startswith("midlayer.") for n in tensors)
    if renamed:
        tensors = {("midlayer." + n[9:] if n.startswith("layers.0.") else n): t for n, t in tensors.items()}
    if not strict:  # older releases keep the rotary table, which follows from the config
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    complete = _from_speculators if speculators else _complete
    config = raw if strict and not speculators else complete(raw, tensors)
    if strict and speculators and EMBEDDING not in tensors:
        problems.append(f"{EMBEDDING} is missing")
    if strict and renamed and not speculators:
        problems.append("the tensors are named layers.0.*; the flat form names them midlayer.*")
    bad_config = [f"config.json: {problem}" for problem in check_config(config)]
    if bad_config:
        return None, None, bad_config + problems
    if not strict:
        config, tensors = _as_ours(config, tensors)
    problems += check_tensors(config, tensors)
    if renamed and speculators:
        problems = [problem.replace("midlayer.", "layers.0.") for problem in problems]
    return config, tensors, problems


def _as_ours(config, tensors):
    """config and tensors of a foreign draft in our form; its predictions stay the same."""
    d2t, full = tensors.get("d2t"), config["draft_vocab_size"] == config["vocab_size"]
    if d2t is not None and "t2d" not in tensors and d2t.dtype == torch.int64:  # ModelOpt leaves it out: it follows
        tensors = {**tensors, "t2d": torch.isin(torch.arange(config["vocab_size"]), vocabulary.target_ids(d2t))}
    if full and set(MAPPING) <= set(tensors) and not tensors["d2t"].any() and tensors["t2d"].all():
        tensors = {name: tensor for name, tensor in tensors.items() if name not in MAPPING}
    # Engines convert while loading: a config that names another dtype than all tensors have is no fault of the weights,
    # nor is a table in the target's dtype beside weights in another.
    config = {key: value for key, value in config.items() if key != "auto_map"}  # code that does not come along
    config["torch_dtype"] = _common_dtype(tensors) or config["torch_dtype"]
    if EMBEDDING in tensors and not needs_embedding(config):
        tensors = {**tensors, EMBEDDING: tensors[EMBEDDING].to(getattr(torch, config["torch_dtype"]))}
    return config, tensors


def check_draft(folder):
    """Everything that is wrong with a draft folder (flat or speculators form) as it would be served; empty = whole."""
    return _load(folder, strict=True)[2]


def read_draft(folder, model_dir=None):
    """(flat config, {flat name: tensor}) of a draft folder, ours or foreign; ends the program if it is not whole.

    model_dir: the target's folder, if a table of other embeddings than the target's is to end the program too.
    """
    config, tensors, problems = _load(folder, strict=False)
    if problems:
        common.fail(f"the draft {folder} is not usable: {'; '.join(problems)}")
    if model_dir and EMBEDDING in tensors and not needs_embedding(config):
        check_embedding(folder, tensors, find_embedding(model_dir))
    return config, tensors


def _write(folder, config, tensors, **metadata):
    """Both files, so that a process killed at any moment leaves the old draft, no config.json, or the new draft."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"  # no engine looks for this name
    try:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        common.open_to_all(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        written = load_file(temporary)
        if different := [n for n, t in tensors.items() if n not in written or not torch.equal(written[n], t)]:
            common.fail(f"{folder}: the disk gave back other values than were written for {', '.join(different)}")
        (folder / "config.json").unlink(missing_ok=True)  # never an old config beside new weights
        os.replace(temporary, folder / "model.safetensors")
    finally:
        temporary.unlink(missing_ok=True)
    common.write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _cast(config, tensors):
    """Copies on the CPU in the config's dtype; copies, because safetensors refuses tensors that share memory."""
    dtype = getattr(torch, config["torch_dtype"])
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def _whole(config, tensors):
    """_cast of a draft's tensors; ends the program if they and the config are not exactly a whole draft."""
    problems = check_config(config)
    if not problems:
        tensors = _cast(config, tensors)
        problems = check_tensors(config, tensors)
    if problems:
        common.fail(f"no draft written, it is not whole: {'; '.join(problems)}")
    return tensors


def write_draft(folder, config, tensors):
    """Write the flat form: config.json last, floats in config["torch_dtype"]. Nothing is completed or left out.

    Ends the program, with nothing written, if config and tensors are not exactly a whole draft. The file is read back
    and compared before it takes its place.
    """
    _write(folder, config, _whole(config, tensors))


def to_speculators(config, tensors, target_model_path, target_architectures, embed_tokens=None, speculative_tokens=5):
    """(config, tensors) of the speculators form of a flat draft; ends the program if it is not whole.

    target_model_path and target_architectures (a list) name the target, embed_tokens [V, H] is its embedding table,
    used unless the draft has its own. speculative_tokens is what an engine drafts by default.
    """
    if EMBEDDING not in tensors:
        if embed_tokens is None:
            common.fail(f"the speculators form needs {EMBEDDING}: give the target's embeddings")
        tensors = {**tensors, EMBEDDING: embed_tokens}
    tensors = _whole(config, tensors)
    theirs = {*FLAGS, AUXILIARY, "architectures", "draft_vocab_size", "eagle_config", "num_aux_hidden_states"}
    layer = {key: value for key, value in config.items() if key not in theirs | {"target_hidden_size"}}
    # rope_theta and rope_scaling are read by transformers 4, rope_parameters by 5
    rope = config.get("rope_scaling") or {}
    layer["rope_parameters"] = {"rope_type": "default", **rope, "rope_theta": config["rope_theta"]}
    proposal = {"proposal_type": "greedy", "speculative_tokens": speculative_tokens}
    proposal |= {"verifier_accept_k": 1, "accept_tolerance": 0.0}
    speculators = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "draft_vocab_size": config["draft_vocab_size"],
        **{flag: bool(config.get(flag)) for flag in FLAGS},  # norm_before_residual always: absent would mean true
        "target_hidden_size": config.get("target_hidden_size"),
        AUXILIARY: auxiliary_layers(config),
        "tie_word_embeddings": False,
        "torch_dtype": config["torch_dtype"],
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy", "proposal_methods": [proposal],
            "verifier": {"name_or_path": str(target_model_path), "architectures": list(target_architectures)},
        },
        "transformer_layer_config": {**layer, "architectures": ["LlamaForCausalLM"]},
    }  # fmt: skip
    return speculators, {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def write_speculators(folder, config, tensors, **target):
    """Write the speculators form of a flat draft; target: the further arguments of to_speculators."""
    added = {} if EMBEDDING in tensors else {"embed_tokens": ADDED}  # so that the flat form can be had back
    _write(folder, *to_speculators(config, tensors, **target), **added)


def read_embedding(model_dir):
    """The input embeddings [V, Ht] of a target folder, read alone."""
    return target_files.read_target_tensor(model_dir, EMBEDDING_NAMES)


def find_embedding(model_dir):
    """read_embedding where that is possible, else None: for other names and files the target has to be loaded."""
    names = [name for path in Path(model_dir).glob("*.safetensors") for name in safe_open(path, "pt").keys()]  # noqa: SIM118
    return read_embedding(model_dir) if any(name.endswith(EMBEDDING_NAMES) for name in names) else None


def is_embedding(own, embedding):
    """Whether a draft's table [V, H] is `embedding`, the target's, as its trainer may have rounded it."""
    return torch.equal(own.cpu(), embedding.to("cpu", own.dtype))


def check_embedding(folder, tensors, embedding):
    """End the program if a draft's tensors hold a table of that shape that is not `embedding` [V, H], the target's."""
    own = tensors.get(EMBEDDING)
    if own is not None and embedding is not None and own.shape == embedding.shape and not is_embedding(own, embedding):
        common.fail(
            f"{folder} is another target's, or was trained with a table of its own, which is not available yet: its "
            f"{EMBEDDING} is not this target's; without that tensor it starts with this target's"
        )
