"""The draft's configuration for a target: derived from the target's, with the keys that a file gives in their place.

A file is one of: a draft's config.json in the flat form (SpecForge's configs/*.json, EAGLE's releases, our own), one in
the speculators form, a plain Llama decoder's config.json. It is read from a path, from its folder, or from the hub.
"""

import difflib
import math

from core import block_files, common, draft_files, draft_keys, target_files

# Keys that are read. Nothing else goes into the config.json of a new draft.
READ = {
    *draft_files.REQUIRED, *draft_files.FLAGS, *draft_keys.NEUTRAL, "rope_scaling", "target_hidden_size",
    draft_files.AUXILIARY, "eagle_config", "num_aux_hidden_states", *draft_keys.WINDOW,
}  # fmt: skip

REMEDY = "The draft has Llama or Qwen3 layers without biases: write these values, or drop the keys"

# What `setup.prepare` reads of the kind of drafts that is trained.
DECISIVE = ("ttt_length", "freeze_head")  # flags that have to stay where a training is continued
FRESH = {"head_init": "random"}  # values that only a new draft can have

# Flags that are keys of the configuration, under this name there.
KEYS = {"num_layers": "num_hidden_layers", "draft_arch": "model_type", "draft_hidden_act": "hidden_act"}
KEYS |= {name: name for name in draft_files.FLAGS}

# ==================== Given ==========================================================================================


def read_file(flag, source):
    """The object of the configuration that `flag` names: a JSON file, its folder, or a hub id.

    Ends the program if there is none.
    """
    path = draft_files.locate(source, ("config.json",), flag)
    if path.is_dir():
        path = path / "config.json"
    raw, problem = draft_files.read_json(path)
    if problem:
        common.fail(f"{flag} {source}: {problem}")
    if draft_files.is_speculators(raw) and not isinstance(raw.get("transformer_layer_config"), dict):
        common.fail(f"{flag} {source}: transformer_layer_config is missing, which has the sizes of the layer")
    return raw


def read(flag, source):
    """The keys, in the flat form, of the configuration that `flag` names.

    Ends the program if it is not an EAGLE-3 draft's or a decoder's.
    """
    raw = read_file(flag, source)
    refuse_blocks(f"{flag} {source}", raw)
    kind = raw.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        common.fail(f"{flag} {source}: speculators_model_type is {kind!r}, not 'eagle3', which is what is trained here")
    if draft_files.is_speculators(raw):
        return draft_files.from_speculators(raw)
    return with_torch_dtype(raw) if is_eagle(raw) else of_decoder(raw)


def refuse_blocks(name, raw):
    """End the program if a configuration is a block draft's; name: of what has it."""
    algorithm = block_files.algorithm(raw)
    if algorithm:
        common.fail(f"{name} is of a {algorithm} draft: start train_dflash.py with --algorithm {algorithm}")


def is_eagle(raw):
    return any("eagle" in str(name).lower() for name in raw.get("architectures") or [])


def of_decoder(raw):
    """The keys of a complete model's configuration, of which a draft is some layers: neither its class nor its head."""
    given = with_torch_dtype(raw)
    given.pop("architectures", None)
    given.pop("tie_word_embeddings", None)
    return without_full_layers(given)  # these are the target's


def with_torch_dtype(raw):
    given = dict(raw)
    if "dtype" in given:  # transformers 5's name
        given.setdefault("torch_dtype", given.pop("dtype"))
    return given


def without_full_layers(given):
    """A copy of the given keys, without those of a window where layer_types name no layer with one."""
    kinds = given.get("layer_types")
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        return dict(given)
    return {key: value for key, value in given.items() if key not in draft_keys.WINDOW}


def name_unread(source, given, read=READ):
    """Print the given keys that nothing reads, with the key that may have been meant."""
    named = []
    for key in sorted(given.keys() - read):
        close = difflib.get_close_matches(key, read - given.keys(), n=1, cutoff=0.85)
        named.append(f"{key} (or {close[0]}?)" if close else key)
    if named:
        print(f"{source}: keys that nothing reads are left out: {', '.join(named)}")


def name_replaced(source, given, config, keys):
    """Print the given values in whose place the target's, or a flag's, are used; keys: those that flags have."""
    replaced = []
    for key in ("torch_dtype", "max_position_embeddings", "draft_vocab_size", *keys, *draft_keys.WINDOW):
        value = given.get(key)
        if value is not None and value != config.get(key, value):
            replaced.append(f"{key} {value} -> {config[key]}")
    if replaced:
        print(f"{source}: replaced by what the target or a flag says: {', '.join(replaced)}")


# ==================== Flags ==========================================================================================


def add_flags(add):
    """The flags that shape a new draft; add: the add_argument of their group."""
    positive = common.at_least(int, 1)
    natural = common.at_least(int, 0)
    kinds = tuple(draft_files.ARCHITECTURES)
    add("--num_layers", type=positive, help="layers of the draft; none: draft_model_config's, or 1")
    add("--draft_arch", choices=kinds, help="kind of its layers; qwen3 norms queries and keys, vLLM only; none: llama")
    add("--draft_hidden_act", help="activation of its MLP; None: the target's; none: silu, which alone engines serve")
    add("--sliding_window", type=positive, help="positions that a layer sees; none: all")
    add("--sliding_window_indices", type=natural, nargs="+", help="layers with the window, from 0; none: all")
    add("--norm_before_residual", action=common.Switch, default=None, help="the residual is normed; vLLM only")
    add("--norm_before_fc", action=common.Switch, default=None, help="norm the concatenated target states")
    add("--fc_norm", action=common.Switch, default=None, help="norm the target states of each layer")
    add("--norm_output", action=common.Switch, default=None, help="the next ttt_step reads the normed output")
    add("--embed_requires_grad", action=common.Switch, default=None, help="train an embedding table; vLLM only")
    add("--head_init", choices=("target", "random"), default="target", help="the draft's head at the start")
    add("--freeze_head", action=common.Switch, help="the head stays as it starts")


def check_flags(args, default):
    """End the program if flags of EAGLE-3's drafts contradict each other; default: {flag: its default}."""
    if args.sliding_window_indices and not args.sliding_window:
        common.fail("sliding_window_indices are the layers that have the sliding_window: give that too")
    if args.chain_sampling and args.step_weights != default["step_weights"]:
        remedy = common.without(args, "chain_sampling")
        common.fail(f"chain_sampling takes the place of step_weights survival: drop one of them, or {remedy}")
    replaces_decay = args.chain_sampling or args.step_weights == "survival"
    if replaces_decay and args.ttt_step_loss_decay != default["ttt_step_loss_decay"]:
        remedy = f", or {common.without(args, 'chain_sampling')}" if args.chain_sampling else ""
        common.fail(f"ttt_step_loss_decay: chain_sampling and step_weights survival take its place: drop it{remedy}")


def with_flags(given, args, text_config):
    """The given keys of a new draft, with those that flags name in their place; text_config: the target's."""
    given = without_full_layers(given) if args.num_layers else dict(given)
    for flag, key in KEYS.items():
        value = getattr(args, flag)
        if value is not None:
            given[key] = value
    if args.draft_arch:
        given.pop("architectures", None)
    if args.draft_hidden_act == "None":
        names = ("hidden_act", "hidden_activation", "activation_function")
        given["hidden_act"] = first_of((text_config,), *names, default="silu")
    if args.sliding_window:
        layers = range(given.get("num_hidden_layers") or 1)
        chosen = args.sliding_window_indices or layers
        if not set(chosen) <= set(layers):
            common.fail(f"sliding_window_indices {list(chosen)}: the draft has the layers {list(layers)}")
        given |= draft_files.window_keys(args.sliding_window, [n in chosen for n in layers])
    return given


def check_continued(args, text_config, checkpoint, config):
    """End the program if flags say another draft than the checkpoint's, whose configuration this is."""
    there = {**dict.fromkeys(draft_files.FLAGS, False), **config}
    asked = with_flags({"num_hidden_layers": config["num_hidden_layers"]}, args, text_config)
    asked.pop("use_sliding_window", None)  # a Llama's windows do without it, and a Qwen3's are not without it
    differ = {key: value for key, value in asked.items() if value != there.get(key)}
    if differ:
        values = ", ".join(f"{key} {value}, there {there.get(key)}" for key, value in differ.items())
        on = [key for key in differ if key in draft_files.FLAGS and differ[key]]
        remedy = f", or {common.without(args, *on)}" if on else ""
        common.fail(f"flags do not say the draft of {checkpoint}: {values}: drop them{remedy}")


# ==================== Derived ========================================================================================


def first_of(configs, *names, default=None):
    """The first attribute that is not None, config by config, name by name."""
    values = (getattr(config, name, None) for config in configs for name in names)
    return next((value for value in values if value is not None), default)


def dense_layer(text_config, config):
    """Sizes of a plain layer that suits a target: the sizes of its own layers where these are plain.

    Latent attention (MLA) keeps one small vector per token for all heads: with as many heads, a plain layer would cache
    as much per token as all 61 layers of DeepSeek-V3. Such a target gets heads of 128 that fill the hidden size, in 8
    groups; their number is a power of two, so that the ranks of a server divide it.
    """
    if getattr(text_config, "is_heterogeneous", False):  # Gemma 4: full and sliding attention differ in their heads
        text_config = text_config.per_layer_config[0]

    def size(*names, default=None):
        value = first_of((text_config, config), *names, default=default)
        return max(value, default=default) if isinstance(value, list | tuple) else value

    hidden_size = text_config.hidden_size
    if size("kv_lora_rank"):
        heads = 2 ** math.ceil(math.log2(max(hidden_size / 128, 1)))
        groups = min(8, heads)
        head_dim = 128
    else:
        heads = text_config.num_attention_heads
        groups = size("num_key_value_heads", default=heads)
        head_dim = size("head_dim", default=hidden_size // heads)
    return {
        "intermediate_size": _dense_intermediate_size(size) or 4 * hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


def _dense_intermediate_size(size):
    """That of the family's dense layers, else the experts that work on one token taken together; None if unknown."""
    dense = size("intermediate_size_mlp")  # Llama 4, whose intermediate_size is that of its experts
    if dense:
        return dense
    plain = size("intermediate_size", "ffn_dim", "n_inner")
    expert = size("moe_intermediate_size", "expert_ffn_hidden_size")
    active = size("num_experts_per_tok", default=0)
    if plain and active and not expert:  # intermediate_size is that of the experts
        return plain * active
    if plain:
        return plain
    if expert:
        return active * expert + size("shared_expert_intermediate_size", default=0)
    return None


def _derived_rope(text_config):
    """(rope_theta, rope_scaling or None) of the draft for a target with this text configuration."""
    rope = dict(getattr(text_config, "rope_parameters", None) or {})
    rope = dict(rope.get("full_attention", rope))  # some families keep one entry per kind of layer
    theta = rope.pop("rope_theta", None) or 10000.0
    kind = rope.get("rope_type", "default")
    if kind == "default" or kind not in draft_keys.ROPE_TYPES:
        return theta, None
    # A family's other keys concern its own layers: shares of heads, sections of pictures, scales of queries.
    known = {*draft_keys.ROPE_TYPES[kind], *draft_keys.ROPE_OPTIONS}
    rope = {key: value for key, value in rope.items() if value is not None and key in known}
    if kind != "linear":  # as transformers completes them
        positions = text_config.max_position_embeddings
        original = rope.setdefault("original_max_position_embeddings", positions)
        rope.setdefault("factor", positions / original)
    return theta, rope


def derive_config(text_config, config):
    """The draft's flat config.json for a target: the target's sizes, one Llama layer, the full vocabulary."""
    theta, scaling = _derived_rope(text_config)
    configs = (text_config, config)
    dtype = first_of(configs, "dtype", default="bfloat16")
    return {
        **draft_keys.FIXED,
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": text_config.hidden_size,
        **dense_layer(text_config, config),
        "rms_norm_eps": first_of(configs, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", default=1e-6),
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": text_config.max_position_embeddings,
        "vocab_size": text_config.vocab_size,
        "draft_vocab_size": text_config.vocab_size,
        "torch_dtype": draft_keys.dtype_name(dtype),
        "bos_token_id": first_of(configs, "bos_token_id"),
        "eos_token_id": first_of(configs, "eos_token_id"),
    }


def configure(text_config, config, given=None, source=None, layer_ids=None, draft_vocab_size=None):
    """(flat configuration, auxiliary layers) of a draft for a target with these configurations.

    given: keys from a file or a checkpoint named `source`; the others are derived. layer_ids and draft_vocab_size
    override both. Ends the program if the draft does not fit the target, or if no engine computes what it asks for.
    """
    derived = derive_config(text_config, config)
    source = source or "the derived draft configuration"
    given = draft_keys.with_two_rope_keys(given or {})
    name_unread(source, given)
    draft_config = merge(derived, {key: value for key, value in given.items() if key in READ}, source)
    if draft_vocab_size:
        draft_config["draft_vocab_size"] = draft_vocab_size
    draft_config = {"architectures": draft_files.architectures(draft_config), **draft_config}
    check_sizes(source, draft_config, text_config, draft_vocab_size)
    layers = _choose_layers(draft_config, text_config.num_hidden_layers, source, layer_ids)
    default = target_files.default_layer_ids(text_config.num_hidden_layers)
    draft_config = draft_files.with_auxiliary_layers(draft_config, layers, default)
    check_complete(source, draft_config)
    for key in draft_keys.NEUTRAL:
        draft_config.pop(key, None)
    if not any(draft_files.windows(draft_config)):
        for key in draft_keys.WINDOW:
            draft_config.pop(key, None)
    return draft_config, layers


def merge(derived, given, source):
    """The derived configuration with the given keys in their place."""
    config = dict(derived)
    theta = given.get("rope_theta")
    if theta is not None or "rope_scaling" in given:  # one unit: never half from the target, half from the file
        config["rope_theta"] = 10000.0 if theta is None else theta
        config["rope_scaling"] = given.get("rope_scaling")
    config |= {key: value for key, value in given.items() if value is not None}
    if problems := draft_keys.size_problems(config) + draft_files.layer_problems(config):  # what follows computes
        common.fail(f"{source}: {'; '.join(problems)}")
    if given.get("head_dim") is None and ("hidden_size" in given or "num_attention_heads" in given):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config["torch_dtype"] = derived["torch_dtype"]
    # The draft is served as far as the target is. Its rotary frequencies do not depend on this number.
    positions = "max_position_embeddings"
    config[positions] = max(config[positions], derived[positions])
    return config


def check_complete(source, config):
    """End the program if the engines do not compute what a configuration asks for."""
    problems = draft_files.check_config(config)
    if problems:
        of_layers = draft_keys.FIXED.keys() | draft_keys.NEUTRAL.keys()
        remedy = f". {REMEDY}" if any(problem.split()[0] in of_layers for problem in problems) else ""
        common.fail(f"{source}: {'; '.join(problems)}{remedy}")


def check_sizes(source, config, text_config, draft_vocab_size):
    """End the program if a draft does not fit its target; draft_vocab_size: of the flag, or None."""
    check_target(source, config, text_config)
    count = config["num_hidden_layers"]
    most = text_config.num_hidden_layers
    if count >= max(most, 2):
        common.fail(f"{source}: num_hidden_layers {count}: a draft has fewer layers than its target, here {most}")
    columns = config["draft_vocab_size"]
    rows = config["vocab_size"]
    if not 0 < columns <= rows:
        named = "" if draft_vocab_size else f"{source}: "
        common.fail(f"{named}draft_vocab_size {columns} is not within 1..{rows}, the target's")


def check_target(source, config, text_config):
    """End the program if a draft with this configuration does not belong to a target with this text configuration."""
    hidden_size = config.get("target_hidden_size", config["hidden_size"])
    for key, size in {"hidden_size": hidden_size, "vocab_size": config["vocab_size"]}.items():
        expected = getattr(text_config, key)
        if size != expected:
            common.fail(f"{source} was made for another target: its {key} is {size}, this target's {expected}")


def _choose_layers(config, num_layers, source, layer_ids):
    """The auxiliary layers: of the flag, else of the configuration, else the default; ends the program if invalid."""
    layers = layer_ids or draft_files.auxiliary_layers(config) or target_files.default_layer_ids(num_layers)
    check_layers("target_layer_ids" if layer_ids else f"{source}: auxiliary layers", layers, num_layers)
    count = config.get("num_aux_hidden_states", len(layers))
    if count != len(layers):
        common.fail(f"{source}: num_aux_hidden_states {count} for the auxiliary layers {layers}")
    return layers


def check_layers(name, layers, num_layers):
    """End the program if auxiliary layers (hidden_states indexing) are not the target's; name: of what says them."""
    if not all(1 <= layer <= num_layers for layer in layers) or sorted(set(layers)) != layers:
        common.fail(f"{name} {layers}: they must ascend within 1..{num_layers}, the target's layers")


# ==================== Of a training ==================================================================================


def configure_draft(args, model_dir, text_config, target_config, checkpoint, source):
    """(flat configuration, auxiliary layers) of the draft: a checkpoint's, that of a file, or the derived one.

    checkpoint, source: of `setup.draft_source`.
    """

    def complete(given, source, vocab_size):
        return configure(text_config, target_config, given, source, args.target_layer_ids, vocab_size)

    if not checkpoint:
        flag = "draft_model_config" if source == args.draft_model_config else "resume_from_checkpoint"
        given = read(flag, source) if source else {}
        shaped = with_flags(given, args, text_config)
        configured, layers = complete(shaped, source, args.draft_vocab_size)
        name_replaced(source, given, configured, KEYS.values())
        check_new_head(args, configured)
        return configured, layers
    given, _ = draft_files.read_draft(checkpoint, model_dir)
    refuse_blocks(f"the draft {checkpoint}", given)
    count = draft_files.num_auxiliary(given)
    if args.target_layer_ids and len(args.target_layer_ids) != count:
        common.fail(f"target_layer_ids {args.target_layer_ids}: {checkpoint} reads {count} layers")
    configured, layers = complete(given, checkpoint, None)  # a checkpoint's mapping decides
    check_continued(args, text_config, checkpoint, configured)
    if args.draft_model_config:  # the command line of a training that is continued
        path = args.draft_model_config
        again = with_flags(read("draft_model_config", path), args, text_config)
        again, _ = complete(again, path, None)
        check_same_draft(path, again, checkpoint, configured)
    return configured, layers


def check_new_head(args, config):
    """End the program if the head of a new draft would stay random."""
    width = config.get("target_hidden_size", config["hidden_size"])
    reason = ""
    if args.head_init == "random":
        reason = "head_init is random"
    elif width != config["hidden_size"]:
        reason = f"hidden_size {config['hidden_size']} is not the target's {width}, so the head starts random"
    if args.freeze_head and reason:
        common.fail(f"freeze_head: {reason}: drop it, or {common.without(args, 'freeze_head')}")


def check_shape(args, config):
    """End the program if a chain outgrows the draft's window."""
    window = max(draft_files.windows(config))
    if 0 < window < args.ttt_length:
        common.fail(f"sliding_window {window} is less than ttt_length {args.ttt_length}: a chain would leave its slot")


def predictions(config):
    """Of a slot that can be trained, at least: a chain may be short."""
    return 1


def check_same_draft(path, config, checkpoint, continued):
    """End the program if the draft_model_config at `path` is not the configuration of the checkpoint's draft.

    config, continued: the flat configurations of the two; their vocabularies may differ.
    """
    differ = [
        f"{key} {config.get(key)}, there {continued.get(key)}"
        for key in config.keys() | continued.keys()
        if key != "draft_vocab_size" and config.get(key) != continued.get(key)
    ]
    if differ:
        common.fail(
            f"draft_model_config {path} is not the draft of {checkpoint}, which is continued: "
            f"{', '.join(sorted(differ))}: drop it"
        )
