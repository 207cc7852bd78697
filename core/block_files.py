"""Block drafts, DFlash and DSpark: what their checkpoints consist of, their configuration and its checks, their forms.

A block draft proposes all tokens of a block in one pass (DFlash, arXiv 2602.06036; DSpark, 2607.05147). Its embedding
and, with the full vocabulary, its head are the target's and not in the file. core/draft_files.py reads and writes the
folders and comes here by the architecture. vLLM and SGLang read some keys differently: a config that would draft
otherwise in one of them has a problem here.
"""

import json

from core import common, draft_keys

# ==================== Constants ======================================================================================

ARCHITECTURES = {"dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel"}  # by algorithm

ALGORITHMS = {name: algorithm for algorithm, name in ARCHITECTURES.items()} | {"DSparkDraftModel": "dspark"}

DSPARK = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")

REQUIRED = (
    "architectures",
    "model_type",
    *draft_keys.SIZES,
    "rms_norm_eps",
    "rope_theta",  # 1e6 in vLLM where it is missing
    "torch_dtype",
    "layer_types",
    "block_size",  # 16 in SGLang where it is missing
)

COUNTS = ("block_size", "num_target_layers", "markov_rank", "target_hidden_size")

FIXED = {"model_type": "qwen3", "attention_bias": False, "hidden_act": "silu", "markov_head_type": "vanilla"}

# Of `draft_keys.NEUTRAL`, is_causal has a meaning here, and queries and keys are always normed.
OTHERS = ("is_causal", "parallel_drafting", "qk_norm", "use_qk_norm")
NEUTRAL = {key: value for key, value in draft_keys.NEUTRAL.items() if key not in OTHERS}
NEUTRAL |= {
    "is_neox_style": True, "rope_is_neox_style": True, "use_gemma_norm": False, "add_swa_attention_sink_bias": False,
    "attention_sink_bias": False,
}  # fmt: skip

NEUTRAL_DSPARK = {"sample_from_anchor": True, "dspark_bonus_anchor": False}  # another block has no token of the anchor

# The same of dflash_config: other kinds of block drafts.
NEUTRAL_NESTED = {
    "projector_type": None, "conv_kernel_size": 0, "conv_group_size": 0, "selector_rank": 0, "selector_top_k": 0,
    "output_multiplier": 1, "final_logit_softcapping": 0, "attention_sink_bias": False, "attention_value_scale": 1,
    "sample_from_anchor": False, "use_aux_hidden_state": True,
}  # fmt: skip

LEARNED_MASK = "mask_embedding.pt"  # a file in whose place the mask is a row of the target's table


# ==================== What a draft consists of =======================================================================


def algorithm(config):
    """ "dflash" or "dspark" of a draft's configuration in either form; None of another kind of draft."""
    kind = config.get("speculators_model_type")
    if kind:
        return kind if kind in ARCHITECTURES else None
    names = config.get("architectures") or [None]
    return ALGORITHMS.get(str(names[0])) if isinstance(names, list) else None


def is_block(config):
    return algorithm(config) is not None


def options(config):
    """The object that has mask_token_id and target_layer_ids: dflash_config of DFlash, all of the config of DSpark."""
    return config if algorithm(config) == "dspark" else config.get("dflash_config") or {}


def with_options(config, **values):
    """A copy of config with these keys in the place where its kind has them."""
    if algorithm(config) == "dspark":
        return {**config, **values}
    return {**config, "dflash_config": {**options(config), **values}}


def mask_token_id(config):
    """The row of the target's embedding that stands for a token which is not known yet."""
    return options(config)["mask_token_id"]


def auxiliary_layers(config):
    """The auxiliary layers in hidden_states indexing (0 = embeddings); the file has them lower by one."""
    return [layer + 1 for layer in options(config)["target_layer_ids"]]


def causal_layers(config):
    """Whether the slots of a block see earlier ones alone, a bool of each layer; as both engines compute it."""
    if config.get("is_causal") is not None:
        return [config["is_causal"]] * config["num_hidden_layers"]
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def drafted_tokens(config):
    """Tokens that a block drafts: DFlash's first slot, the anchor, drafts none; DSpark's drafts the next token."""
    return config["block_size"] - (algorithm(config) == "dflash")


def describe(config):
    """A line about the blocks."""
    causal = causal_layers(config)
    sees = "all of it"
    if all(causal):
        sees = "earlier ones alone"
    elif any(causal):
        sees = f"earlier ones alone in layers {[n for n, is_causal in enumerate(causal) if is_causal]}"
    slots = f"{config['block_size']} slots a block, which see {sees}"
    mask = f"mask token {mask_token_id(config)}"
    return f"{algorithm(config)}: {slots}; {drafted_tokens(config)} tokens drafted a pass; {mask}"


def expected_tensors(config):
    """{name: shape} of a block draft with this (complete) config."""
    hidden = config["hidden_size"]
    inner = config["intermediate_size"]
    draft = config["draft_vocab_size"]
    vocab = config["vocab_size"]
    size = config["head_dim"]
    query = config["num_attention_heads"] * size
    key_value = config["num_key_value_heads"] * size
    shapes = {
        "fc.weight": (hidden, len(auxiliary_layers(config)) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (size,),
        "self_attn.k_norm.weight": (size,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    if algorithm(config) == "dspark":
        shapes |= _dspark_tensors(config)
    if draft < vocab:
        shapes |= {"lm_head.weight": (draft, hidden), "d2t": (draft,), "t2d": (vocab,)}
    return shapes


def _dspark_tensors(config):
    """Those of DSpark's heads: the bias W2·W1[token before], and the chance that a drafted token is accepted."""
    rank = config["markov_rank"]
    shapes = {
        "markov_head.markov_w1.weight": (config["vocab_size"], rank),
        "markov_head.markov_w2.weight": (config["draft_vocab_size"], rank),
    }
    if config["enable_confidence_head"]:
        width = config["hidden_size"] + rank * config["confidence_head_with_markov"]
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return shapes


# ==================== Checks =========================================================================================


def check_config(config):
    """The problems of a flat config, one line each; empty if both engines draft alike with it."""
    required = REQUIRED
    neutral = NEUTRAL
    if algorithm(config) == "dspark":
        required = REQUIRED + DSPARK
        neutral = NEUTRAL | NEUTRAL_DSPARK
    problems = [f"{key} is missing" for key in required if key not in config]
    problems += draft_keys.size_problems(config, (*draft_keys.SIZES, *COUNTS))
    problems += draft_keys.value_problems(config, FIXED, neutral)
    problems += draft_keys.rope_problems(config.get("rope_scaling"))
    problems += _nested_problems(config)
    problems += _option_problems(config)
    for key in ("is_causal", "enable_confidence_head", "confidence_head_with_markov"):
        if type(config.get(key, False)) is not bool:
            problems.append(f"{key} is {config[key]!r}, not true or false")
    return problems or draft_keys.relation_problems(config) + _relation_problems(config)


def _nested_problems(config):
    """Those of dflash_config's further keys, of which SGLang does not read all."""
    nested = config.get("dflash_config", {})
    if not isinstance(nested, dict):
        return [f"dflash_config is {nested!r}, not an object"]
    problems = []
    for key, value in NEUTRAL_NESTED.items():
        if nested.get(key) not in (None, value):
            problems.append(f"dflash_config.{key} is {json.dumps(nested[key])}, not {json.dumps(value)}")
    if nested.get("causal") is not None and config.get("is_causal") is None:
        problems.append("dflash_config.causal is read by vLLM alone, for all layers: write is_causal at the top level")
    if nested.get("use_swa") or nested.get("swa_window_size"):
        problems.append("dflash_config.use_swa is read by vLLM alone: write layer_types and sliding_window")
    if "sliding_window_non_causal" in config:  # `from_speculators` leaves it where it is ambiguous
        value = json.dumps(config["sliding_window_non_causal"])
        problems.append(
            f"sliding_window_non_causal is {value} beside layer_types {json.dumps(config.get('layer_types'))}: what "
            "vLLM serves is not what speculators trains: write is_causal into transformer_layer_config"
        )
    return problems


def _option_problems(config):
    """Those of the mask and the auxiliary layers."""
    given = options(config)
    place = "" if given is config else "dflash_config."
    problems = []
    mask = given.get("mask_token_id")
    ids = given.get("target_layer_ids")
    if mask is None:
        problems.append(f"{place}mask_token_id is missing")
    elif type(mask) is not int or mask < 0:
        problems.append(f"{place}mask_token_id is {mask!r}, not a token id")
    if ids is None:
        problems.append(f"{place}target_layer_ids is missing")
    elif not draft_keys.is_layer_ids(ids, 0) or sorted(set(ids)) != ids:  # the engines concatenate in this order
        problems.append(f"{place}target_layer_ids is {ids!r}, not an ascending list of layer ids from 0")
    return problems


def _relation_problems(config):
    """The problems between values that are valid one by one."""
    problems = []
    block = config["block_size"]
    mask = mask_token_id(config)
    ids = options(config)["target_layer_ids"]
    count = config.get("num_target_layers")
    window = max(draft_keys.windows(config))
    if block < 2:
        problems.append("block_size is 1: a block has an anchor and at least one mask")
    if mask >= config["vocab_size"]:
        problems.append(f"mask_token_id {mask} is not a row of the embedding, which has {config['vocab_size']}")
    if count and ids[-1] >= count:
        problems.append(f"target_layer_ids {ids}: num_target_layers {count} has no layer {ids[-1]}")
    if 0 < window < block:  # a window that cuts a block means another thing in each attention kernel
        problems.append(f"sliding_window {window} is less than block_size {block}")
    width = config.get("target_hidden_size", config["hidden_size"])
    if width != config["hidden_size"]:
        problems.append(f"target_hidden_size {width} is not hidden_size {config['hidden_size']}, as SGLang needs it")
    return problems


# ==================== Reading ========================================================================================


def complete(raw, tensors):
    """The flat config of a flat config.json as both engines read it: what they fill in alike is filled in."""
    config = {key: value for key, value in raw.items() if value is not None or key.endswith("_token_id")}
    config = {"rope_scaling": None, **draft_keys.with_two_rope_keys(config)}
    dtype = config.pop("dtype", None) or draft_keys.common_dtype(tensors)
    if dtype:
        config.setdefault("torch_dtype", dtype)
    if "vocab_size" in config:
        config.setdefault("draft_vocab_size", config["vocab_size"])
    count = config.get("num_hidden_layers")
    if type(count) is int and not config.get("use_sliding_window"):
        config.setdefault("layer_types", ["full_attention"] * count)
    return config


def as_ours(config, tensors):
    """A completed config of somebody else in our spelling: every option in the place that both engines read."""
    kind = algorithm(config)
    nested = {**_object(config, "dflash_config"), **_object(config, "dspark_config")}
    config = {**config, **{key: nested.pop(key) for key in ("block_size", "num_target_layers") if nested.get(key)}}
    known = ("mask_token_id", "target_layer_ids")
    values = {key: config[key] for key in known if key in config}
    values |= {key: nested.pop(key) for key in known if nested.get(key) is not None}
    config = {key: value for key, value in config.items() if key not in ("dflash_config", "dspark_config", *known)}
    if nested.get("causal") is not None:
        config.setdefault("is_causal", nested.pop("causal"))
    if nested.pop("use_swa", False) and "sliding_attention" not in config.get("layer_types", []):
        config.setdefault("is_causal", False)
        config |= _sliding(config, nested.get("swa_window_size"))
    elif nested.get("swa_window_size") and "sliding_window" in config:
        config["sliding_window"] = nested["swa_window_size"]
    nested.pop("swa_window_size", None)
    config |= {"architectures": [ARCHITECTURES[kind]], "tie_word_embeddings": False}
    config = {"attention_bias": False, "hidden_act": "silu", **config}
    if kind == "dspark":
        config = {**nested, **config}
        return with_options(_complete_heads(config, tensors) if tensors else config, **values)
    return with_options({**config, "dflash_config": nested}, **values)


def _object(config, key):
    return config[key] if isinstance(config.get(key), dict) else {}


def _sliding(config, window):
    """The keys with which all layers have a window."""
    window = window or config.get("sliding_window")
    kinds = ["sliding_attention"] * config.get("num_hidden_layers", 1)
    return dict(zip(draft_keys.WINDOW, (window, kinds, True), strict=True))


def _complete_heads(config, tensors):
    """A copy of config with what the tensors say about DSpark's heads: engines differ in what a missing key means."""
    proj = tensors.get("confidence_head.proj.weight")
    found = {"markov_head_type": "vanilla", "enable_confidence_head": proj is not None}
    found["confidence_head_with_markov"] = proj is not None and proj.shape[-1] != config.get("hidden_size")
    return {**found, **config}


def rename(tensors):
    """The tensors of somebody else's draft by our names; an fp32 confidence head takes the dtype of the rest."""
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for name in ("confidence_head.proj.weight", "confidence_head.proj.bias"):
        if name in renamed and "fc.weight" in renamed:
            renamed[name] = renamed[name].to(renamed["fc.weight"].dtype)
    return renamed


# ==================== The speculators form ===========================================================================


def from_speculators(raw, tensors):
    """The flat config of a speculators config.json, as vLLM reads it.

    vLLM gives all layers of a DFlash draft one causality, by sliding_window_non_causal, and speculators trains full
    attention without it: where the two differ, the key stays in the config and is a problem there.
    """
    kind = algorithm(raw)
    layer = raw.get("transformer_layer_config")
    config = dict(layer) if isinstance(layer, dict) else {}
    for key in ("draft_vocab_size", "target_hidden_size", "block_size", *(DSPARK if kind == "dspark" else ())):
        if raw.get(key) is not None:
            config[key] = raw[key]
    for key in ("torch_dtype", "dtype"):
        if raw.get(key) is not None:
            config.setdefault(key, raw[key])
    config["architectures"] = [ARCHITECTURES[kind]]
    if isinstance(config.get("layer_types"), list) and "sliding_attention" in config["layer_types"]:
        config["use_sliding_window"] = True  # not read there, but of qwen3 in the flat form
    values = {}
    if raw.get("mask_token_id") is not None:
        values["mask_token_id"] = raw["mask_token_id"]
    layers = raw.get("aux_hidden_state_layer_ids")
    if draft_keys.is_layer_ids(layers, 1) and layers:
        values["target_layer_ids"] = [layer - 1 for layer in layers]
    elif layers is not None:
        values["target_layer_ids"] = layers  # which the checks name
    config = with_options(complete(config, tensors), **values)
    if kind == "dspark":
        if tensors:
            config = _complete_heads(config, tensors)
        if not raw.get("sample_from_anchor"):
            config["sample_from_anchor"] = False  # the default there, true in the flat form
    elif raw.get("sample_from_anchor"):
        config = with_options(config, sample_from_anchor=True)
    return config if config.get("is_causal") is not None else _with_causality(config, raw)


def _with_causality(config, raw):
    """A copy of the flat config with is_causal where the layers' kinds say another causality than raw does."""
    sliding = {kind == "sliding_attention" for kind in config.get("layer_types", [])}
    says = raw.get("sliding_window_non_causal", True)
    if algorithm(config) == "dspark":  # vLLM reads the kinds alone
        ambiguous = "sliding_window_non_causal" in raw and says and True in sliding
        return {**config, "sliding_window_non_causal": says} if ambiguous else config
    if not says and False in sliding:
        return {**config, "sliding_window_non_causal": says}
    return {**config, "is_causal": False} if says and True in sliding else config


def to_speculators(config, target_model_path, target_architectures, tokens):
    """The config of the speculators form of a flat draft; its tensors are the same. See draft_files.to_speculators.

    Ends the program if that form cannot say what the draft computes.
    """
    kind = algorithm(config)
    if len(set(draft_keys.windows(config))) > 1:
        common.fail(
            "the speculators form has one causality for all layers, and this draft has layers with and without a "
            "sliding window: serve it in the flat form"
        )
    most = drafted_tokens(config)
    if tokens > most:
        common.fail(f"speculative_tokens {tokens}: a block of {config['block_size']} drafts {most}")
    inside = options(config)
    outer = {"architectures", "draft_vocab_size", "dflash_config", "block_size", "target_hidden_size", *DSPARK}
    outer |= {"mask_token_id", "target_layer_ids"}
    speculators = {
        "architectures": config["architectures"],
        "speculators_model_type": kind,
        "speculators_version": draft_keys.SPECULATORS_VERSION,
        "draft_vocab_size": config["draft_vocab_size"],
        "block_size": config["block_size"],
        "aux_hidden_state_layer_ids": auxiliary_layers(config),
        "mask_token_id": inside["mask_token_id"],
        "sample_from_anchor": kind == "dspark",
        "sliding_window_non_causal": not causal_layers(config)[0],
        "tie_word_embeddings": False,
        "torch_dtype": config["torch_dtype"],
        "speculators_config": draft_keys.speculators_config(kind, tokens, target_model_path, target_architectures),
        "transformer_layer_config": draft_keys.speculators_layer(config, outer),
    }
    if kind == "dspark":
        speculators |= {key: config[key] for key in DSPARK}
    return speculators
