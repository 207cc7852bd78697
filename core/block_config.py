"""The configuration of a block draft for a target: derived from the target's, with a file's keys and flags on top.

A file is a DFlash or DSpark draft's config.json (z-lab's, SpecForge's, speculators', our own) or a plain decoder's.
"""

import re

from core import block_files, common, draft_config, draft_files, draft_keys, target_files

# What `setup.prepare` reads of the kind of drafts that is trained.
DECISIVE = ("algorithm", "max_anchors")  # flags that have to stay where a training is continued
FRESH = {}  # values that only a new draft can have

# Keys that are read. Nothing else goes into the config.json of a new draft.
READ = {
    *block_files.REQUIRED, *block_files.FIXED, *block_files.NEUTRAL, *block_files.NEUTRAL_DSPARK, *block_files.COUNTS,
    *block_files.DSPARK, *draft_keys.WINDOW, "tie_word_embeddings", "bos_token_id", "eos_token_id", "rope_scaling",
    "is_causal", "dflash_config", "mask_token_id", "target_layer_ids", "sliding_window_non_causal",
}  # fmt: skip

DEFAULTS = {"num_hidden_layers": 5, "block_size": 8}
DSPARK_DEFAULTS = {
    "markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}  # fmt: skip

# Flags that are keys of the configuration, under this name there.
KEYS = {"num_layers": "num_hidden_layers", "block_size": "block_size", "markov_rank": "markov_rank"}

SGLANGS_MASK = "<|MASK|>"  # a token of this name is the mask in SGLang, which compares its id

# Tokens that families reserve, in this order, for an embedding without an unused row.
RESERVED = (
    r"<mask>|\[MASK\]|<\|mask\|>",
    r"<\|reserved_special_token_\d+\|>|<\|reserved_\d+\|>|<SPECIAL_\d+>",
    r"<unused_?\d+>|\[unused_?\d+\]|<reserved_?\d+>|<\|extra_\d+\|>",
    r"<\|fim_pad\|>|<fim_pad>",
)


# ==================== Flags ==========================================================================================


def add_flags(add):
    """The flags that shape a new draft; add: the add_argument of their group."""
    positive = common.at_least(int, 1)
    kinds = tuple(block_files.ARCHITECTURES)
    add("--algorithm", choices=kinds, default=kinds[0], help="dspark: the token before corrects logits")
    add("--num_layers", type=positive, help="layers of the draft; none: draft_model_config's, or 5")
    size = "slots of a block, the anchor and masks; none: draft_model_config's, or 8"
    add("--block_size", type=common.at_least(int, 2), help=size)
    mask = "row of the target's embedding that stands for unknown tokens; none: found out, and said"
    add("--mask_token_id", type=common.at_least(int, 0), help=mask)
    add("--sliding_window", type=positive, help="positions that a layer sees; none: all")
    causal = "a slot sees the earlier ones of its block alone; none: with a sliding window, as engines read it"
    add("--causal_blocks", action=common.Switch, default=None, help=causal)
    add("--markov_rank", type=positive, help="of dspark's bias; none: draft_model_config's, or 256")


def check_flags(args, default):
    """End the program if flags of block drafts contradict each other; default: {flag: its default}."""
    if args.markov_rank and args.algorithm != "dspark":
        common.fail(f"markov_rank is dspark's: drop it, or give --algorithm dspark instead of {args.algorithm}")
    if args.position_weights != "decay" and args.dflash_decay_gamma != default["dflash_decay_gamma"]:
        common.fail(f"dflash_decay_gamma is of position_weights decay, not {args.position_weights}: drop one of them")


def with_flags(given, args):
    """The given keys of a new draft, with those that flags name in their place, and the defaults of others."""
    given = DEFAULTS | draft_config.without_full_layers(given)
    if args.algorithm == "dspark":
        given = DSPARK_DEFAULTS | given
    for flag, key in KEYS.items():
        value = getattr(args, flag)
        if value is not None:
            given[key] = value
    given["architectures"] = [block_files.ARCHITECTURES[args.algorithm]]
    count = given["num_hidden_layers"]
    if args.sliding_window:
        given |= draft_files.window_keys(args.sliding_window, [True] * count)
    given.setdefault("layer_types", ["full_attention"] * count)
    if args.causal_blocks is not None:
        given["is_causal"] = args.causal_blocks
    if args.mask_token_id is not None:
        given = block_files.with_options(given, mask_token_id=args.mask_token_id)
    return given


# ==================== Given ==========================================================================================


def read(flag, source, algorithm):
    """The keys, in the flat form, of the configuration that `flag` names; ends the program if it is of another kind."""
    raw = draft_config.read_file(flag, source)
    check_algorithm(f"{flag} {source}", raw, algorithm)
    check_types(f"{flag} {source}", raw)
    if draft_files.is_speculators(raw):
        return block_files.from_speculators(raw, {})
    if block_files.is_block(raw):
        return block_files.as_ours(block_files.complete(raw, {}), {})
    return draft_config.of_decoder(raw)


def check_types(name, raw):
    """End the program if what is counted with in a configuration is of another type."""
    for part in (raw, raw.get("transformer_layer_config")):
        if not isinstance(part, dict):
            continue
        count = part.get("num_hidden_layers", 1)
        if type(count) is not int or count < 1:
            common.fail(f"{name}: num_hidden_layers is {count!r}, not a number of layers")
        for key, kind in (("layer_types", list), ("dflash_config", dict)):
            if not isinstance(part.get(key) or kind(), kind):
                common.fail(f"{name}: {key} is {part[key]!r}, not a {'list' if kind is list else 'JSON object'}")


def check_algorithm(name, raw, algorithm):
    """End the program if a configuration is of another kind of drafts than is trained; name: of what has it."""
    found = block_files.algorithm(raw)
    architectures = str(raw.get("architectures"))
    if not found and re.search("dflash|dspark", architectures, re.IGNORECASE):
        common.fail(f"{name} is of a draft of another kind, {architectures}, which train_dflash.py does not train")
    if found and found != algorithm:
        common.fail(f"{name} is of a {found} draft: give --algorithm {found}, or another one")
    if not found and (draft_config.is_eagle(raw) or draft_files.is_speculators(raw)):
        kind = raw.get("speculators_model_type", "eagle3")
        common.fail(f"{name} is of a draft of another kind, {kind}, which train_dflash.py does not train")


# ==================== Derived ========================================================================================


def default_target_layers(num_target_layers, num_layers):
    """The auxiliary layers (hidden_states indexing) of a draft of num_layers layers, by the rule of DFlash's releases.

    From the second layer to the one before the last two, evenly. Ends the program if they would not be distinct.
    """
    if num_layers == 1:
        return [num_target_layers // 2 + 1]
    span = num_target_layers - 4
    if span < num_layers - 1:
        common.fail(
            f"num_layers {num_layers}: a target of {num_target_layers} layers has fewer between its first and its last "
            f"two: give --target_layer_ids within 1..{num_target_layers}, or --num_layers {max(span + 1, 1)}"
        )
    return [round(1 + i * span / (num_layers - 1)) + 1 for i in range(num_layers)]


def find_mask_token(tokenizer, rows):
    """(token id, why it is the one) of the mask for a target whose embedding has this number of rows.

    The first row past the tokenizer's own ids, which no text has; else a token that is reserved; else a special token
    that conversations do without. Ends the program if there is none of them.
    """
    tokens = tokenizer.get_vocab()
    if SGLANGS_MASK in tokens:
        return tokens[SGLANGS_MASK], f"the token {SGLANGS_MASK}"
    free = max(tokens.values()) + 1
    if free < rows:
        return free, f"the first unused row of the embedding, which has {rows:,}"
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    for pattern in RESERVED:
        ids = {i for token, i in tokens.items() if re.fullmatch(pattern, token)} - own
        if ids:
            return min(ids), f"the token {tokenizer.convert_ids_to_tokens(min(ids))}, which texts do not have"
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.items()
    specials = {i for i, token in added if token.special and token.content not in template} - own
    if specials:
        name = tokenizer.convert_ids_to_tokens(max(specials))
        return max(specials), f"the special token {name}, which the chat template does not have"
    common.fail(
        "no row of the embedding is unused, and no token of the tokenizer is free: give --mask_token_id, the id of "
        f"a token within 0..{rows - 1} that no text has"
    )


def configure(text_config, config, given, source, layer_ids=None, draft_vocab_size=None):
    """(flat configuration, auxiliary layers) of a block draft for a target with these configurations.

    given: its keys, with a mask, from a file or a checkpoint named `source`; the sizes that are missing are derived.
    layer_ids and draft_vocab_size override both. Ends the program if the draft does not fit the target, or if the
    engines do not compute what it asks for.
    """
    derived = {**draft_config.derive_config(text_config, config), "model_type": "qwen3"}
    given = draft_keys.with_two_rope_keys(given)
    if given.get("rope_theta") is None and given.get("rope_scaling") is None:
        given.pop("rope_scaling", None)  # the target's: one unit
    draft_config.name_unread(source, given, READ)
    kept = {key: value for key, value in given.items() if key in READ}
    merged = {"architectures": given["architectures"], **draft_config.merge(derived, kept, source)}
    merged["num_target_layers"] = text_config.num_hidden_layers
    if draft_vocab_size:
        merged["draft_vocab_size"] = draft_vocab_size
    draft_config.check_sizes(source, merged, text_config, draft_vocab_size)
    layers = _choose_layers(merged, text_config.num_hidden_layers, source, layer_ids)
    merged = block_files.with_options(merged, target_layer_ids=[layer - 1 for layer in layers])
    draft_config.check_complete(source, merged)
    for key in (*block_files.NEUTRAL, *block_files.NEUTRAL_DSPARK, "target_hidden_size"):
        merged.pop(key, None)
    if not any(draft_files.windows(merged)):
        merged.pop("sliding_window", None)
        merged.pop("use_sliding_window", None)
    without = {key: value for key, value in merged.items() if key != "is_causal"}
    if block_files.causal_layers(without) == block_files.causal_layers(merged):
        merged = without  # the kinds of the layers say it
    return dict(sorted(merged.items())), layers  # a draft that is continued has the same file


def _choose_layers(config, num_layers, source, layer_ids):
    """The auxiliary layers: of the flag, else of the configuration, else the default; ends the program if invalid."""
    given = block_files.options(config).get("target_layer_ids")
    if not layer_ids and not draft_keys.is_layer_ids(given, 0):
        common.fail(f"{source}: target_layer_ids is {given!r}, not a list of layer ids from 0")
    if layer_ids:
        layers = list(layer_ids)
    elif given:
        layers = block_files.auxiliary_layers(config)
    else:
        layers = default_target_layers(num_layers, config["num_hidden_layers"])
    draft_config.check_layers("target_layer_ids" if layer_ids else f"{source}: auxiliary layers", layers, num_layers)
    return layers


# ==================== Of a training ==================================================================================


def configure_draft(args, model_dir, text_config, target_config, checkpoint, source):
    """(flat configuration, auxiliary layers) of the draft: a checkpoint's, that of a file, or the derived one.

    checkpoint, source: of `setup.draft_source`. Prints the mask's token id, and why it is that one.
    """

    def complete(given, source, vocab_size):
        name = source or "the derived draft configuration"
        return configure(text_config, target_config, given, name, args.target_layer_ids, vocab_size)

    def shaped(flag, source):
        given = read(flag, source, args.algorithm) if source else {}
        return given, with_mask(with_flags(given, args), args, model_dir, text_config)

    if not checkpoint:
        flag = "draft_model_config" if source == args.draft_model_config else "resume_from_checkpoint"
        given, keys = shaped(flag, source)
        configured, layers = complete(keys, source, args.draft_vocab_size)
        draft_config.name_replaced(source, given, configured, KEYS.values())
        return configured, layers
    given, _ = draft_files.read_draft(checkpoint, model_dir)
    check_algorithm(f"the draft {checkpoint}", given, args.algorithm)
    count = draft_files.num_auxiliary(given)
    if args.target_layer_ids and len(args.target_layer_ids) != count:
        common.fail(f"target_layer_ids {args.target_layer_ids}: {checkpoint} reads {count} layers")
    configured, layers = complete(given, checkpoint, None)  # a checkpoint's mapping decides
    check_continued(args, checkpoint, configured)
    print(f"mask_token_id {block_files.mask_token_id(configured)}: as {checkpoint} has it")
    if args.draft_model_config:  # the command line of a training that is continued
        path = args.draft_model_config
        again, _ = complete(shaped("draft_model_config", path)[1], path, None)
        draft_config.check_same_draft(path, again, checkpoint, configured)
    return configured, layers


def with_mask(given, args, model_dir, text_config):
    """The given keys with a mask's token id, which is printed: the one that is given, or one that is found."""
    mask = block_files.options(given).get("mask_token_id")
    why = "as given"
    if mask is None:
        tokenizer = target_files.load_tokenizer(model_dir, args.trust_remote_code)
        mask, why = find_mask_token(tokenizer, text_config.vocab_size)
    print(f"mask_token_id {mask}: {why}")
    return block_files.with_options(given, mask_token_id=mask)


def check_continued(args, checkpoint, config):
    """End the program if flags say another draft than the checkpoint's, whose configuration this is."""
    there = {key: config.get(key) for key in KEYS.values()}
    there["mask_token_id"] = block_files.mask_token_id(config)
    there["sliding_window"] = max(draft_files.windows(config))
    there["causal_blocks"] = all(block_files.causal_layers(config))
    asked = {KEYS.get(flag, flag): getattr(args, flag) for flag in (*KEYS, *there) if flag in vars(args)}
    differ = [f"{key} {value}, there {there[key]}" for key, value in asked.items() if value not in (None, there[key])]
    if differ:
        common.fail(f"flags do not say the draft of {checkpoint}: {', '.join(differ)}: drop them")


def predictions(config):
    """Of a slot that can be trained: a block is trained as a whole."""
    return block_files.drafted_tokens(config)


def check_shape(args, config):
    """End the program if no row holds a block, or if a slot of a block does not see the token before its anchor."""
    window = max(draft_files.windows(config))
    if 0 < window <= config["block_size"]:
        common.fail(f"sliding_window {window} is not more than block_size {config['block_size']}: give a larger one")
    needed = predictions(config) + 2  # the token before the anchor, the anchor, and what is predicted
    if needed > args.max_length:
        size = config["block_size"]
        common.fail(f"a block of block_size {size} needs {needed} tokens, max_length is {args.max_length}")
    for key in ("enable_confidence_head", "confidence_head_with_markov"):
        if block_files.algorithm(config) == "dspark" and not config[key]:
            common.fail(f"the draft's configuration has {key} false: DSpark is trained here with its confidence head")
