"""A draft checkpoint, config.json and model.safetensors: what it consists of, its two forms, its checks.

The flat form is what vLLM and SGLang both load; vLLM also loads the speculators form. A foreign draft (SpecForge,
ModelOpt, EAGLE's own releases, speculators) is read into the flat form. The engines do not check what they load: vLLM
drafts junk where a tensor is missing, SGLang leaves it uninitialised and ignores unknown names. So every problem is
found here, and an incomplete draft is neither written nor read.
"""

import json
import os
import re
from errno import ENOENT
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core import block_files, common, draft_keys, target_files, vocabulary

# ==================== Constants ======================================================================================

ARCHITECTURES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}  # by model_type

EMBEDDING = draft_keys.EMBEDDING

MAPPING = draft_keys.MAPPING

AUXILIARY = "eagle_aux_hidden_state_layer_ids"

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")

REQUIRED = (
    "architectures",
    "model_type",
    *draft_keys.SIZES,
    "attention_bias",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
)

# The meaning of a key that a foreign draft's config leaves out: every engine reads it through transformers'
# LlamaConfig, and speculators stores only what differs from that. None of them changes what such a draft computes.
LLAMA_DEFAULTS = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# Names of the input embeddings [V, H] in the families' checkpoints.
EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "embed_tokens.weight",
    "model.tok_embeddings.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
)

ADDED = "the target's"  # metadata of a speculators form whose embedding table is not the draft's own

# ==================== What a draft consists of =======================================================================


def auxiliary_layers(config):
    """The auxiliary layers in hidden_states indexing (0 = embeddings), or None where the config leaves the default."""
    if block_files.is_block(config):
        return block_files.auxiliary_layers(config)
    if config.get(AUXILIARY):
        return list(config[AUXILIARY])
    nested = config.get("eagle_config") or {}
    if nested.get(AUXILIARY):
        return [layer + 1 for layer in nested[AUXILIARY]]
    return None


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
    """The number of auxiliary layers that the draft reads."""
    return config.get("num_aux_hidden_states") or len(auxiliary_layers(config) or range(3))


def needs_embedding(config):
    """Whether the draft has an embedding table of its own: another width than the target's, or a trained one."""
    if config.get("target_hidden_size", config["hidden_size"]) != config["hidden_size"]:
        return True
    return bool(config.get("embed_requires_grad"))


def architectures(config):
    """The value of this key that fits the model_type."""
    return [ARCHITECTURES.get(str(config.get("model_type")))]


def has_head_norms(config):
    """Whether queries and keys are normed per head."""
    return config.get("model_type") == "qwen3"


def window_keys(window, layers):
    """The keys with which these of a draft's layers (a bool each) see the last `window` positions alone."""
    kinds = ["sliding_attention" if is_sliding else "full_attention" for is_sliding in layers]
    return dict(zip(draft_keys.WINDOW, (window, kinds, True), strict=True))


def windows(config):
    """The window of each layer; 0: none."""
    return draft_keys.windows(config)


def expected_tensors(config):
    """{name: shape} of a draft with this (complete) config, by the names of the flat form: of one layer as written.

    Of several layers `as_written` has the names in a file.
    """
    if block_files.is_block(config):
        return block_files.expected_tensors(config)
    hidden = config["hidden_size"]
    inner = config["intermediate_size"]
    draft = config["draft_vocab_size"]
    vocab = config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    target_hidden = config.get("target_hidden_size", hidden)
    auxiliary = num_auxiliary(config)
    shapes = {
        "fc.weight": (hidden, auxiliary * target_hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft, hidden),
    }
    for n in range(config["num_hidden_layers"]):
        width = hidden if n else 2 * hidden
        layer = {
            "hidden_norm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, width),
            "self_attn.k_proj.weight": (key_value, width),
            "self_attn.v_proj.weight": (key_value, width),
            "self_attn.o_proj.weight": (hidden, query),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if has_head_norms(config):
            layer["self_attn.q_norm.weight"] = (config["head_dim"],)
            layer["self_attn.k_norm.weight"] = (config["head_dim"],)
        prefix = f"layers.{n}." if n else "midlayer."
        shapes |= {prefix + name: shape for name, shape in layer.items()}
    if config.get("norm_before_fc"):
        shapes["input_norm.weight"] = (auxiliary * target_hidden,)
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (target_hidden,) for i in range(auxiliary)}
    if needs_embedding(config):
        shapes[EMBEDDING] = (vocab, hidden)
    if draft < vocab:
        shapes |= {"d2t": (draft,), "t2d": (vocab,)}
    return shapes


def first_norms(config):
    """[(as vLLM reads it, as SGLang does)]: the names of the first norm of each layer behind the first.

    The same vector is written under both: an engine leaves what it does not find at ones, without a word.
    """
    numbers = range(1, config["num_hidden_layers"])
    return [(f"layers.{n}.input_layernorm.weight", f"layers.{n}.hidden_norm.weight") for n in numbers]


def as_written(config, tensors):
    """A draft's tensors by their names in the flat form: of several layers the first is layers.0 as well."""
    if config["num_hidden_layers"] == 1 or block_files.is_block(config):
        return tensors
    written = {re.sub(r"\Amidlayer\.", "layers.0.", name): tensor for name, tensor in tensors.items()}
    for vllm, sglang in first_norms(config):
        if sglang in written:
            written[vllm] = written[sglang].clone()  # safetensors refuses tensors that share memory
    return written


# ==================== Checks =========================================================================================


def layer_problems(config):
    """The problems of a config's auxiliary layers, place by place."""
    nested = config.get("eagle_config", {})
    if not isinstance(nested, dict):
        return [f"eagle_config is {nested!r}, not an object"]
    problems = []
    if not nested.get("use_aux_hidden_state", True):
        problems.append("eagle_config.use_aux_hidden_state is false: the engines would leave out fc")
    ids = config.get(AUXILIARY)
    nested_ids = nested.get(AUXILIARY)
    if not draft_keys.is_layer_ids(ids, 1):
        problems.append(f"{AUXILIARY} is {ids!r}, not a list of layer ids from 1")
    if not draft_keys.is_layer_ids(nested_ids, 0):
        problems.append(f"eagle_config.{AUXILIARY} is {nested_ids!r}, not a list of layer ids from 0")
    return problems


def _auxiliary_problems(config):
    """Those between the two places as well: each engine reads one of them."""
    problems = layer_problems(config)
    if problems:
        return problems
    ids = config.get(AUXILIARY)
    nested_ids = config.get("eagle_config", {}).get(AUXILIARY)
    count = config.get("num_aux_hidden_states", 3)
    if ids is None and nested_ids is None:
        if count != 3:
            problems.append(f"num_aux_hidden_states is {count} without {AUXILIARY}: the engines' default is 3 layers")
        return problems
    written_once = f"auxiliary layers {ids or nested_ids} are written in one place only"
    if ids is None:
        return [*problems, f"{written_once}: vLLM reads the top level's {AUXILIARY}"]
    if nested_ids is None:
        problems.append(f"{written_once}: SGLang reads eagle_config.{AUXILIARY}")
    elif nested_ids != [i - 1 for i in ids]:
        needed = f"vLLM's {AUXILIARY} {ids} needs SGLang's in eagle_config to be {[i - 1 for i in ids]}"
        problems.append(f"auxiliary layers disagree: {needed}, which is {nested_ids}")
    if len(ids) != count:
        problems.append(f"{AUXILIARY} has {len(ids)} layers, num_aux_hidden_states says {count}")
    return problems


def check_config(config):
    """The problems of a flat config, one line each; empty if both engines can read it."""
    if block_files.is_block(config):
        return block_files.check_config(config)
    problems = [f"{key} is missing" for key in REQUIRED if key not in config]
    problems += draft_keys.size_problems(config)
    problems += _value_problems(config)
    problems += draft_keys.rope_problems(config.get("rope_scaling"))
    problems += _auxiliary_problems(config)
    return problems or draft_keys.relation_problems(config)


def _value_problems(config):
    problems = draft_keys.value_problems(config) + _kind_problems(config)
    for key in FLAGS:
        if type(config.get(key, False)) is not bool:
            problems.append(f"{key} is {config[key]!r}, not true or false")
    return problems


def _kind_problems(config):
    """Those of model_type, and of architectures, which has to fit."""
    kind = config.get("model_type", "llama")
    if str(kind) not in ARCHITECTURES:
        return [f"model_type is {json.dumps(kind)}, not {' or '.join(ARCHITECTURES)}"]
    expected = architectures({"model_type": kind})
    if config.get("architectures", expected) != expected:
        return [f"architectures is {json.dumps(config['architectures'])}, not {json.dumps(expected)}, of {kind}"]
    return []


def check_tensors(config, tensors):
    """The problems of a draft's tensors (flat names), one line each, by name; its config is complete."""
    expected = expected_tensors(config)
    shapes = {EMBEDDING: (config["vocab_size"], config["hidden_size"]), **expected}  # an embedding is always allowed
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            why = {"lm_head.weight": " (with the full vocabulary a block draft has its target's head)"}.get(name, "")
            if name in MAPPING:
                why = " (the draft has the full vocabulary: vLLM refuses a mapping)"
            problems.append(f"{name} is not a tensor of this draft{why}")
            continue
        dtype = MAPPING.get(name) or getattr(torch, config["torch_dtype"])
        if tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shapes[name])}")
        if tensor.dtype != dtype:
            problems.append(f"{name} is {draft_keys.dtype_name(tensor.dtype)}, expected {draft_keys.dtype_name(dtype)}")
        if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
            problems.append(f"{name} has {bad} of {tensor.numel()} values that are not finite")
    if set(MAPPING) <= set(tensors) & set(expected):
        problems += vocabulary.mapping_problems(tensors["d2t"].numpy(), tensors["t2d"].numpy())
    return problems


# ==================== Reading ========================================================================================


class Loaded(NamedTuple):
    """A draft folder as read; config and tensors are None where a problem leaves none."""

    config: dict | None  # flat
    tensors: dict | None  # by flat names
    problems: list[str]


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

# What a folder with a config.json alone does not hold: weights under another name, or a part of them.
OTHER_WEIGHTS = ("*.safetensors*", "*.bin*", "*.pt", "*.pth", "*.ckpt", "*.part", "*.incomplete")


def locate(source, patterns=("config.json", *WEIGHTS, *OTHER_WEIGHTS), flag="the draft"):
    """The path `source`, or the folder of a hub id with the files that match; ends the program if it is neither."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(common.HUB_ID, str(source)):
        common.fail(f"{flag} {source}: neither a file or folder here nor a hub id such as org/name")
    return common.download(str(source), list(patterns), flag=flag)


def has_weights(source):
    """Whether a draft's folder, or hub id, has weights beside its config.json, and not that file alone.

    Ends the program if there are other files of weights, which would not be read.
    """
    folder = locate(source)
    if folder.name == "config.json":
        folder = folder.parent
    if any((folder / name).exists() for name in WEIGHTS):
        return True
    others = sorted({path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)})
    if others:
        common.fail(
            f"the draft {source} has {', '.join(others[:3])}, but no {', '.join(WEIGHTS)}: copy or download it again; "
            "or give its config.json as draft_model_config, for fresh weights"
        )
    return False


def read_json(path):
    """(object, "") of a JSON file, or ({}, the problem with it)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows puts a mark at the beginning
    except OSError as error:
        return {}, f"{path.name} is missing" if error.errno == ENOENT else f"{path.name}: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return {}, f"{path.name} is not JSON, which has no comments and no commas before a bracket: {error}"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} is not a JSON object")


def _read_tensors(folder):
    """({name: tensor}, problems) of model.safetensors, else its shards, else EAGLE's own pytorch_model.bin."""
    index = folder / "model.safetensors.index.json"
    pickled = folder / "pytorch_model.bin"
    try:
        if (folder / "model.safetensors").exists():
            return load_file(folder / "model.safetensors"), []
        if index.exists():
            tensors = {}
            for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                tensors |= load_file(common.below(folder, shard))
            return tensors, []
        if pickled.exists():
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
            if isinstance(tensors, dict) and all(isinstance(t, torch.Tensor) for t in tensors.values()):
                return tensors, []
            return {}, ["pytorch_model.bin is not a dictionary of tensors"]
    except Exception as error:  # a file of another kind, or a pickle that would run code, fails anywhere
        why = "it holds more than tensors" if "weights_only" in str(error) else str(error) or repr(error)
        return {}, [f"the weights cannot be read: {why.splitlines()[0]}"]
    return {}, ["model.safetensors is missing"]


def _complete(raw, tensors):
    """The flat config of a foreign config: what it leaves out is filled in where that has one meaning only."""
    config = {k: v for k, v in raw.items() if v is not None or k.endswith("_token_id")}  # null = left out
    config = {**LLAMA_DEFAULTS, **draft_keys.with_two_rope_keys(config)}
    config["architectures"] = architectures(config)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if all(type(config[key]) is int and config[key] > 0 for key in ("hidden_size", "num_attention_heads")):
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if "lm_head.weight" in tensors:
        config.setdefault("draft_vocab_size", len(tensors["lm_head.weight"]))
    if tensors and not any(name.startswith("layers.1.") for name in tensors):  # some keep their target's number
        config["num_hidden_layers"] = 1
    config.setdefault("num_hidden_layers", 1)
    dtype = config.pop("dtype", None)  # transformers 5's name for torch_dtype
    dtype = dtype or draft_keys.common_dtype(tensors)
    if dtype:
        config.setdefault("torch_dtype", dtype)
    return _complete_auxiliary(config)


def _complete_auxiliary(config):
    """A copy of config in which auxiliary layers stand in both places or in none; a contradiction stays."""
    nested = config.get("eagle_config") or {}
    if not isinstance(nested, dict):
        return config
    ids = config.get(AUXILIARY)
    nested_ids = nested.get(AUXILIARY)
    if not ids and not nested_ids and nested.get("use_aux_hidden_state", True):
        return {key: value for key, value in config.items() if key not in (AUXILIARY, "eagle_config")}
    if bool(ids) != bool(nested_ids) and all(type(i) is int for i in ids or nested_ids):
        both = with_auxiliary_layers({}, auxiliary_layers(config))
        return {
            **both,
            **config,
            AUXILIARY: both[AUXILIARY],
            "eagle_config": {**both["eagle_config"], **nested},
        }
    return config


def is_speculators(raw):
    return "speculators_model_type" in raw or "transformer_layer_config" in raw


def from_speculators(raw, tensors=None):
    """The flat config of a speculators config.json, for a draft with these tensors {name: tensor}, or new ones."""
    layer = raw.get("transformer_layer_config")
    config = dict(layer) if isinstance(layer, dict) else {}
    for key in ("draft_vocab_size", "target_hidden_size", AUXILIARY):
        if raw.get(key) is not None:
            config[key] = raw[key]
    for key in ("torch_dtype", "dtype"):
        if raw.get(key) is not None:
            config.setdefault(key, raw[key])
    flags = {"norm_before_residual": True, **raw}  # vLLM's reading of an absent key
    config |= {key: flags[key] for key in FLAGS if flags.get(key)}
    if "sliding_attention" in (config.get("layer_types") or []):
        config["use_sliding_window"] = True  # not read there, but of qwen3 in the flat form
    return _complete(config, tensors or {})


def load(folder, strict):
    """What a draft folder holds, and its problems.

    strict: as an engine will read it. Otherwise as another trainer may have left it: missing keys and t2d are filled
    in, and what has no meaning (rotary tables, the identity as a mapping) is left out.
    """
    folder = locate(folder)
    if not folder.is_dir():
        return Loaded(None, None, [f"{folder} is not a folder"])
    raw, problem = read_json(folder / "config.json")
    problems = [problem] if problem else []
    tensors, unreadable = _read_tensors(folder)
    problems += unreadable
    if problems:
        return Loaded(None, None, problems)
    if block_files.is_block(raw):
        return _load_block(folder, raw, tensors, strict)
    nested = is_speculators(raw)
    renamed = any(n.startswith("layers.0.") for n in tensors) and not any(n.startswith("midlayer.") for n in tensors)
    several = any(n.startswith("layers.1.") for n in tensors)
    if renamed:
        tensors = {re.sub(r"\Alayers\.0\.", "midlayer.", name): tensor for name, tensor in tensors.items()}
    if not strict:  # older releases keep the rotary table, which follows from the config
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if nested:
        config = from_speculators(raw, tensors)
    elif strict:
        config = raw
    else:
        config = _complete(raw, tensors)
    if strict and nested and EMBEDDING not in tensors:
        problems.append(f"{EMBEDDING} is missing")
    if strict and renamed and not nested and not several:
        problems.append("the tensors are named layers.0.*; the flat form names them midlayer.*")
    if config_problems := check_config(config):
        return Loaded(None, None, [f"config.json: {problem}" for problem in config_problems] + problems)
    norm_problems = _merge_first_norms(config, tensors, strict)
    if not strict:
        config, tensors = _as_ours(config, tensors)
    problems += check_tensors(config, tensors) + norm_problems
    if renamed and (nested or several):  # named as the file names them
        problems = [problem.replace("midlayer.", "layers.0.") for problem in problems]
    return Loaded(config, tensors, problems)


def _load_block(folder, raw, tensors, strict):
    """`load` of a block draft with this config.json and these tensors."""
    read = block_files.from_speculators if is_speculators(raw) else block_files.complete
    if not strict:
        tensors = block_files.rename(tensors)
    config = read(raw, tensors)
    if not strict:
        config = block_files.as_ours(config, tensors)
    if problems := check_config(config):
        return Loaded(None, None, [f"config.json: {problem}" for problem in problems])
    if (folder / block_files.LEARNED_MASK).exists():
        problems.append(f"{block_files.LEARNED_MASK}: a mask of its own is not trained here, nor served alike")
    if not strict:
        config, tensors = _as_ours(config, tensors)
    return Loaded(config, tensors, problems + check_tensors(config, tensors))


def _merge_first_norms(config, tensors, strict):
    """Keep the first norm of further layers under one name; the problems of the two names in a file."""
    problems = []
    for vllm, sglang in first_norms(config):
        names = [name for name in (vllm, sglang) if name in tensors]
        pair = [tensors.pop(name) for name in names]
        if len(pair) == 2 and not torch.equal(*pair):
            problems.append(f"{vllm}, which vLLM reads, differs from {sglang}, which SGLang reads")
        elif strict and vllm not in names:
            problems.append(f"{vllm} is missing: vLLM would leave this norm at ones")
        elif strict and sglang not in names:
            problems.append(f"{sglang} is missing: SGLang would leave this norm at ones")
        if pair:
            tensors[sglang] = pair[0]
    return problems


def _as_ours(config, tensors):
    """config and tensors of a foreign draft in the flat form; its predictions stay the same."""
    tensors = dict(tensors)
    d2t = tensors.get("d2t")
    if d2t is not None and "t2d" not in tensors and d2t.dtype == torch.int64:  # ModelOpt leaves it out: it follows
        tensors["t2d"] = torch.isin(torch.arange(config["vocab_size"]), vocabulary.target_ids(d2t))
    is_full = config["draft_vocab_size"] == config["vocab_size"]
    if is_full and set(MAPPING) <= set(tensors) and not tensors["d2t"].any() and tensors["t2d"].all():
        tensors = {name: tensor for name, tensor in tensors.items() if name not in MAPPING}
    # Engines convert while loading: a config that names another dtype than all tensors have is not a problem of the
    # weights, nor is a table in the target's dtype beside weights in another.
    config = {key: value for key, value in config.items() if key != "auto_map"}  # code that is not copied
    config["torch_dtype"] = draft_keys.common_dtype(tensors) or config["torch_dtype"]
    if EMBEDDING in tensors:
        tensors[EMBEDDING] = tensors[EMBEDDING].to(getattr(torch, config["torch_dtype"]))
    return config, tensors


def check_draft(folder):
    """Every problem of a draft folder (flat or speculators form) as it would be served; empty = complete."""
    return load(folder, strict=True).problems


def read_draft(folder, model_dir=None):
    """(flat config, {flat name: tensor}) of a draft folder, ours or foreign; ends the program if it is incomplete.

    model_dir: the target's folder; with it, an embedding table that is not the target's ends the program too.
    """
    config, tensors, problems = load(folder, strict=False)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        common.fail(f"the draft {folder} is not usable: {'; '.join(problems[:3])}{more}")
    if model_dir and EMBEDDING in tensors and not needs_embedding(config):
        check_embedding(folder, tensors, find_embedding(model_dir))
    return config, tensors


# ==================== Writing ========================================================================================


def _write(folder, config, tensors, **metadata):
    """Write both files so that a process killed at any moment leaves the old draft, no config.json, or the new one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"  # no engine looks for this name
    try:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        common.open_to_all(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        written = load_file(temporary)
        if different := [n for n, t in tensors.items() if n not in written or not torch.equal(written[n], t)]:
            common.fail(f"{folder}: the disk returned other values than were written for {', '.join(different)}")
        (folder / "config.json").unlink(missing_ok=True)  # never an old config beside new weights
        os.replace(temporary, folder / "model.safetensors")
    finally:
        temporary.unlink(missing_ok=True)
    common.write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _cast(config, tensors):
    """Copies on the CPU in the config's dtype; copies, because safetensors refuses tensors that share memory."""
    copies = {}
    for name, tensor in tensors.items():
        dtype = getattr(torch, config["torch_dtype"]) if tensor.is_floating_point() else tensor.dtype
        copies[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    return copies


def _cast_complete(config, tensors):
    """_cast of a draft's tensors; ends the program unless config and tensors are exactly a complete draft."""
    problems = check_config(config)
    if not problems:
        tensors = _cast(config, tensors)
        problems = check_tensors(config, tensors)
    if problems:
        common.fail(f"no draft written: {'; '.join(problems)}")
    return tensors


def write_draft(folder, config, tensors):
    """Write the flat form: config.json last, floats in config["torch_dtype"]. Nothing is filled in or left out.

    Ends the program, with nothing written, unless config and tensors are exactly a complete draft. The file is read
    back and compared before it replaces the old one.
    """
    tensors = _cast_complete(config, tensors)
    _write(folder, config, as_written(config, tensors))


def to_speculators(config, tensors, target_model_path, target_architectures, embed_tokens=None, tokens=None):
    """(config, tensors) of the speculators form of a flat draft; ends the program if it is incomplete.

    target_model_path and target_architectures (a list) name the target. embed_tokens [V, H] is its embedding table,
    used where `takes_table`. tokens: what an engine drafts by default; none: `speculative_tokens`.
    """
    tokens = tokens or speculative_tokens(config)
    if block_files.is_block(config):
        tensors = _cast_complete(config, tensors)
        return block_files.to_speculators(config, target_model_path, target_architectures, tokens), tensors
    if takes_table(config, tensors):
        if embed_tokens is None:
            common.fail(f"the speculators form needs {EMBEDDING}: pass the target's embeddings")
        tensors = {**tensors, EMBEDDING: embed_tokens}
    tensors = _cast_complete(config, tensors)
    outer = {*FLAGS, AUXILIARY, "architectures", "draft_vocab_size", "eagle_config", "target_hidden_size"}
    speculators = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": draft_keys.SPECULATORS_VERSION,
        "draft_vocab_size": config["draft_vocab_size"],
        **{flag: bool(config.get(flag)) for flag in FLAGS},  # norm_before_residual always: absent would mean true
        "target_hidden_size": config.get("target_hidden_size"),
        AUXILIARY: auxiliary_layers(config),
        "tie_word_embeddings": False,
        "torch_dtype": config["torch_dtype"],
        "speculators_config": draft_keys.speculators_config("eagle3", tokens, target_model_path, target_architectures),
        "transformer_layer_config": draft_keys.speculators_layer(config, outer),  # vLLM counts auxiliary states there
    }
    tensors = as_written(config, tensors)
    return speculators, {re.sub(r"\Amidlayer\.", "layers.0.", name): tensor for name, tensor in tensors.items()}


def speculative_tokens(config):
    """Tokens that an engine drafts a pass with the speculators form, unless it is told otherwise."""
    return block_files.drafted_tokens(config) if block_files.is_block(config) else 5


def takes_table(config, tensors):
    """Whether the speculators form of this flat draft gets the target's embedding table."""
    return EMBEDDING not in tensors and not block_files.is_block(config)


def write_speculators(folder, config, tensors, **target):
    """Write the speculators form of a flat draft; target: the further arguments of to_speculators."""
    metadata = {"embed_tokens": ADDED} if takes_table(config, tensors) else {}  # an export to the flat form drops it
    config, tensors = to_speculators(config, tensors, **target)
    _write(folder, config, tensors, **metadata)


# ==================== The target's embeddings ========================================================================


def read_embedding(model_dir):
    """The input embeddings [V, Ht] of a target folder; no other tensor is read."""
    return target_files.read_target_tensor(model_dir, EMBEDDING_NAMES)


def find_embedding(model_dir):
    """read_embedding where that is possible, else None: for other names and files the target has to be loaded."""
    for path in Path(model_dir).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if any(name.endswith(EMBEDDING_NAMES) for name in file.keys()):  # noqa: SIM118
                return read_embedding(model_dir)
    return None


def is_embedding(own, embedding):
    """Whether a draft's table [V, H] is `embedding`, the target's, as its trainer may have rounded it."""
    return torch.equal(own.cpu(), embedding.to("cpu", own.dtype))


def read_parameters(folder, embedding):
    """{name: tensor} of the trained parameters of a draft for the target whose embedding table [V, H] this is.

    Ends the program if the draft is not complete or belongs to another target.
    """
    config, tensors = read_draft(folder)
    if not needs_embedding(config):
        check_embedding(folder, tensors, embedding)
        tensors.pop(EMBEDDING, None)
    return {name: tensor for name, tensor in tensors.items() if name not in MAPPING}


def check_embedding(folder, tensors, embedding):
    """End the program if a draft's tensors hold a table of that shape that is not `embedding` [V, H], the target's."""
    own = tensors.get(EMBEDDING)
    if own is None or embedding is None or own.shape != embedding.shape or is_embedding(own, embedding):
        return
    common.fail(
        f"{folder} was made for another target, or with a trained embedding table: its {EMBEDDING} is not this "
        "target's; without that tensor the draft starts from this target's, and with embed_requires_grad true in its "
        "config.json from its own"
    )
