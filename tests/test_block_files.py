"""Checkpoints of block drafts: tensors, round trips, the forms of others, and every trap of the two engines."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

import export_draft
from core import block_files, draft_files
from helpers import written_drafts

DFLASH, DSPARK = written_drafts.DFLASH, written_drafts.DSPARK
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"sliding_window": 8, "layer_types": [SLIDING] * 2, "use_sliding_window": True}
MIXED = WINDOW | {"layer_types": [FULL, SLIDING]}
CAUSAL, FREE = {"is_causal": True}, {"is_causal": False}
VARIANTS = {
    "plain": {},
    "reduced vocabulary": {"draft_vocab_size": 12},
    "windows": WINDOW,
    "causal": CAUSAL,
    "windows without causality": WINDOW | FREE,
    "float32": {"torch_dtype": "float32", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "five of six layers": {"num_hidden_layers": 1, "layer_types": [FULL]},
}
TARGET = {"target_model_path": "org/target", "target_architectures": ["LlamaForCausalLM"]}


def draft(base=DFLASH, **changes):
    config = copy.deepcopy(base | changes)
    return config, written_drafts.random_tensors(config)


def nested(**changes):
    return {"dflash_config": DFLASH["dflash_config"] | changes}


def put(folder, config, tensors):
    """A draft folder written by hand, so that it may be broken."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def fails(capsys, function, *arguments, **named):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments, **named)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


# --- what a draft consists of ---


def test_the_tensors_by_hand():
    """H 16, heads 4 and 2 of 6, MLP 24, two layers, features of two target layers."""
    layer = {
        "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,),
        "self_attn.q_proj.weight": (24, 16), "self_attn.k_proj.weight": (12, 16),
        "self_attn.v_proj.weight": (12, 16), "self_attn.o_proj.weight": (16, 24),
        "self_attn.q_norm.weight": (6,), "self_attn.k_norm.weight": (6,),
        "mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24),
    }  # fmt: skip
    plain = {"fc.weight": (16, 32), "hidden_norm.weight": (16,), "norm.weight": (16,)}
    plain |= {f"layers.{n}.{name}": shape for n in (0, 1) for name, shape in layer.items()}
    assert draft_files.expected_tensors(DFLASH) == plain
    reduced = draft_files.expected_tensors(DFLASH | {"draft_vocab_size": 12})
    assert reduced == plain | {"lm_head.weight": (12, 16), "d2t": (12,), "t2d": (40,)}
    heads = {"markov_head.markov_w1.weight": (40, 5), "markov_head.markov_w2.weight": (40, 5)}
    confidence = {"confidence_head.proj.weight": (1, 21), "confidence_head.proj.bias": (1,)}
    assert draft_files.expected_tensors(DSPARK) == plain | heads | confidence
    hidden_alone = DSPARK | {"confidence_head_with_markov": False}
    assert draft_files.expected_tensors(hidden_alone)["confidence_head.proj.weight"] == (1, 16)
    assert draft_files.expected_tensors(DSPARK | {"enable_confidence_head": False}) == plain | heads
    assert draft_files.expected_tensors(DSPARK | {"draft_vocab_size": 12})["markov_head.markov_w2.weight"] == (12, 5)


def test_what_callers_ask_without_knowing_the_kind():
    for config in (DFLASH, DSPARK):
        assert draft_files.auxiliary_layers(config) == [2, 4]  # layer ids from 0, plus one
        assert draft_files.num_auxiliary(config) == 2
        assert draft_files.windows(config | MIXED) == [0, 8]
        assert not draft_files.needs_embedding(config)
        assert block_files.mask_token_id(config) == 39
    assert block_files.drafted_tokens(DFLASH) == 3
    assert block_files.drafted_tokens(DSPARK) == 4
    assert block_files.algorithm(DSPARK | {"architectures": ["DSparkDraftModel"]}) == "dspark"
    assert not block_files.is_block(written_drafts.CONFIG)


def causal_in_vllm(config, layer):
    """qwen3_dflash.py of vLLM 0.32: is_causal, then dflash_config.causal, then the kind of the layer."""
    if config.get("is_causal") is not None:
        return config["is_causal"]
    if config.get("dflash_config", {}).get("causal") is not None:
        return config["dflash_config"]["causal"]
    return config["layer_types"][layer] == SLIDING


def causal_in_sglang(config, layer):
    """models/dflash.py of SGLang 0.5.23: is_causal, then the kind of the layer."""
    return config.get("is_causal", config["layer_types"][layer] == SLIDING)


@pytest.mark.parametrize("base", [DFLASH, DSPARK], ids=["dflash", "dspark"])
@pytest.mark.parametrize("changes", [{}, WINDOW, MIXED, CAUSAL, WINDOW | FREE, MIXED | CAUSAL, MIXED | FREE])
def test_both_engines_compute_the_causality_of_the_config(base, changes):
    config = base | changes
    assert draft_files.check_config(config) == []
    found = block_files.causal_layers(config)
    assert found == [causal_in_vllm(config, n) for n in (0, 1)] == [causal_in_sglang(config, n) for n in (0, 1)]


def test_a_causality_that_one_engine_reads_is_a_problem():
    config = DFLASH | nested(causal=True)
    assert causal_in_vllm(config, 0) != causal_in_sglang(config, 0)
    assert "write is_causal" in draft_files.check_config(config)[0]
    assert draft_files.check_config(config | CAUSAL) == []  # both read that first


# --- round trips ---


@pytest.mark.parametrize("base", [DFLASH, DSPARK], ids=["dflash", "dspark"])
@pytest.mark.parametrize("variant", [*VARIANTS, "mixed"])
def test_flat_round_trip(base, variant, tmp_path):
    config, tensors = draft(base, **VARIANTS.get(variant, MIXED))
    draft_files.write_draft(tmp_path, config, tensors)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert draft_files.check_draft(tmp_path) == []
    for strict in (True, False):
        read = draft_files.load(tmp_path, strict)
        assert read.config == config
        same(read.tensors, tensors)
    parameters = draft_files.read_parameters(tmp_path, torch.zeros(40, 16))
    assert parameters.keys() == tensors.keys() - {"d2t", "t2d"}


@pytest.mark.parametrize("base", [DFLASH, DSPARK], ids=["dflash", "dspark"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_to_speculators_to_flat(base, variant, tmp_path):
    config, tensors = draft(base, **VARIANTS[variant])
    draft_files.write_speculators(tmp_path, config, tensors, **TARGET)
    assert draft_files.check_draft(tmp_path) == []
    read, again = draft_files.read_draft(tmp_path)
    same(again, tensors)
    added = {"rope_scaling": config["rope_scaling"]}
    assert config | added == {key: read[key] for key in config | added}
    assert block_files.causal_layers(read) == block_files.causal_layers(config)
    draft_files.write_draft(tmp_path / "flat", read, again)
    assert draft_files.check_draft(tmp_path / "flat") == []


def test_the_speculators_config_of_dflash():
    config, tensors = draft()
    written, same_tensors = draft_files.to_speculators(config, tensors, **TARGET)
    same(same_tensors, tensors)  # neither an embedding nor a head
    layer = written.pop("transformer_layer_config")
    assert written == {
        "architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash", "speculators_version": "0.5.0",
        "draft_vocab_size": 40, "block_size": 4, "aux_hidden_state_layer_ids": [2, 4], "mask_token_id": 39,
        "sample_from_anchor": False, "sliding_window_non_causal": True, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "speculators_config": {
            "algorithm": "dflash", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1,
                                  "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
    }  # fmt: skip
    assert layer["model_type"] == "qwen3" and layer["layer_types"] == [FULL] * 2
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert not {"dflash_config", "block_size", "draft_vocab_size"} & layer.keys()


def test_the_speculators_config_of_dspark():
    written, _ = draft_files.to_speculators(*draft(DSPARK), **TARGET)
    assert written["sample_from_anchor"] is True  # absent means false there, and true in the flat form
    assert written["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert {key: written[key] for key in block_files.DSPARK} == {key: DSPARK[key] for key in block_files.DSPARK}


def vllms_config(raw):
    """What update_dflash of vLLM 0.32 makes of a speculators config.json."""
    return raw["transformer_layer_config"] | {
        "dflash_config": {
            "mask_token_id": raw["mask_token_id"],
            "target_layer_ids": [layer - 1 for layer in raw["aux_hidden_state_layer_ids"]],
            "causal": not raw.get("sliding_window_non_causal", True),
        }
    }


@pytest.mark.parametrize("changes", [{}, WINDOW, CAUSAL, FREE, WINDOW | CAUSAL, WINDOW | FREE])
def test_vllm_computes_the_same_causality_from_the_speculators_form(changes):
    config, tensors = draft(**changes)
    written, _ = draft_files.to_speculators(config, tensors, **TARGET)
    served = vllms_config(written)
    assert [causal_in_vllm(served, n) for n in (0, 1)] == block_files.causal_layers(config)
    assert served["dflash_config"]["target_layer_ids"] == config["dflash_config"]["target_layer_ids"]


@pytest.mark.parametrize("changes", [MIXED, MIXED | CAUSAL])
def test_the_speculators_form_never_mixes_kinds(changes, capsys):
    config, tensors = draft(**changes)
    assert "serve it in the flat form" in fails(capsys, draft_files.to_speculators, config, tensors, **TARGET)


def test_the_speculators_form_drafts_a_block_at_most(capsys):
    config, tensors = draft()
    written, _ = draft_files.to_speculators(config, tensors, tokens=2, **TARGET)
    assert written["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 2
    error = fails(capsys, draft_files.to_speculators, config, tensors, tokens=4, **TARGET)
    assert "speculative_tokens 4: a block of 4 drafts 3" in error


# --- traps ---

WRONG = [
    (DFLASH, {"model_type": "llama"}, 'model_type is "llama", not "qwen3"'),
    (DFLASH, {"attention_bias": True}, "attention_bias is true, not false"),
    (DFLASH, {"hidden_act": "gelu"}, 'hidden_act is "gelu", not "silu"'),
    (DFLASH, {"target_hidden_size": 20}, "target_hidden_size 20 is not hidden_size 16"),
    (DFLASH, {"block_size": 1}, "block_size is 1"),
    (DFLASH, {"block_size": "4"}, "block_size is '4', not a positive integer"),
    (DFLASH, {"num_target_layers": 3}, "num_target_layers 3 has no layer 3"),
    (DFLASH, {"layer_types": [FULL]}, "layer_types is"),
    (DFLASH, {"layer_types": [SLIDING] * 2}, "sliding_window is None, not a positive integer"),
    (DFLASH, WINDOW | {"use_sliding_window": False}, "use_sliding_window is false, not true"),
    (DFLASH, WINDOW | {"sliding_window": 3}, "sliding_window 3 is less than block_size 4"),
    (DFLASH, {"is_causal": 1}, "is_causal is 1, not true or false"),
    (DFLASH, {"is_neox_style": False}, "is_neox_style is false, not true"),
    (DFLASH, {"rope_theta": 0}, "rope_theta is 0, not a positive number"),
    (DFLASH, {"draft_vocab_size": 41}, "draft_vocab_size 41 is larger than vocab_size 40"),
    (DFLASH, {"dflash_config": []}, "dflash_config is [], not an object"),
    (DFLASH, nested(mask_token_id=None), "dflash_config.mask_token_id is missing"),
    (DFLASH, nested(mask_token_id=40), "mask_token_id 40 is not a row of the embedding, which has 40"),
    (DFLASH, nested(mask_token_id="<m>"), "dflash_config.mask_token_id is '<m>', not a token id"),
    (DFLASH, nested(target_layer_ids=None), "dflash_config.target_layer_ids is missing"),
    (DFLASH, nested(target_layer_ids=[3, 1]), "not an ascending list of layer ids"),
    (DFLASH, nested(target_layer_ids=[1, 1]), "not an ascending list of layer ids"),
    (DFLASH, nested(target_layer_ids=[-1, 1]), "not an ascending list of layer ids"),
    (DFLASH, nested(use_swa=True), "dflash_config.use_swa is read by vLLM alone"),
    (DFLASH, nested(sample_from_anchor=True), "dflash_config.sample_from_anchor is true, not false"),
    (DFLASH, nested(projector_type="domino"), 'dflash_config.projector_type is "domino", not null'),
    (DFLASH, nested(conv_kernel_size=2), "dflash_config.conv_kernel_size is 2, not 0"),
    (DFLASH, nested(attention_sink_bias=True), "dflash_config.attention_sink_bias is true, not false"),
    (DSPARK, {"mask_token_id": 40}, "mask_token_id 40 is not a row"),
    (DSPARK, {"markov_rank": 0}, "markov_rank is 0, not a positive integer"),
    (DSPARK, {"markov_head_type": "gated"}, 'markov_head_type is "gated", not "vanilla"'),
    (DSPARK, {"sample_from_anchor": False}, "sample_from_anchor is false, not true"),
    (DSPARK, {"dspark_bonus_anchor": True}, "dspark_bonus_anchor is true, not false"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "problem"), WRONG, ids=[problem for _, _, problem in WRONG])
def test_each_wrong_value_is_named(base, changes, problem, tmp_path, capsys):
    config = base | changes
    assert [line for line in draft_files.check_config(config) if problem in line], draft_files.check_config(config)
    error = fails(capsys, draft_files.write_draft, tmp_path / "draft", config, written_drafts.random_tensors(base))
    assert problem in error and not (tmp_path / "draft").exists()


@pytest.mark.parametrize("base", [DFLASH, DSPARK], ids=["dflash", "dspark"])
def test_each_key_that_is_missing_is_named(base, tmp_path):
    tensors = written_drafts.random_tensors(base)
    follows = {"draft_vocab_size", "torch_dtype", "layer_types"}  # from the others, alike in both engines
    for key in {*block_files.REQUIRED, "markov_rank", "markov_head_type"} & base.keys() - {"architectures"}:
        config = {name: value for name, value in base.items() if name != key}
        problems = draft_files.check_draft(put(tmp_path / key, config, tensors))
        assert (problems == []) == (key in follows), (key, problems)
        assert key in follows or any(f"config.json: {key} is missing" in line for line in problems)


@pytest.mark.parametrize("base", [DFLASH, DSPARK], ids=["dflash", "dspark"])
def test_each_tensor_that_is_missing_or_too_much_is_named(base, tmp_path):
    config, tensors = draft(base, draft_vocab_size=12)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        assert f"{name} is missing" in draft_files.check_draft(put(tmp_path / "one", config, rest))
    more = {**tensors, "mask_hidden": torch.zeros(1)}  # vLLM ends with an assertion
    assert draft_files.check_draft(put(tmp_path / "two", config, more)) == ["mask_hidden is not a tensor of this draft"]


def test_a_head_of_its_own_beside_the_full_vocabulary(tmp_path):
    """SGLang would not read it."""
    config, tensors = draft()
    tensors["lm_head.weight"] = torch.zeros(40, 16, dtype=torch.bfloat16)
    (problem,) = draft_files.check_draft(put(tmp_path, config, tensors))
    assert "with the full vocabulary a block draft has its target's head" in problem


def test_a_mask_of_its_own(tmp_path, capsys):
    written_drafts.write(tmp_path, base=DFLASH)
    (tmp_path / "mask_embedding.pt").write_bytes(b"")
    assert "mask_embedding.pt" in fails(capsys, draft_files.read_draft, tmp_path)


def test_a_table_of_another_target(tmp_path, capsys):
    config, tensors = draft()
    table = torch.randn(40, 16).bfloat16()
    put(tmp_path, config, {**tensors, "embed_tokens.weight": table})
    assert draft_files.check_draft(tmp_path) == []  # vLLM reads it, SGLang takes the target's
    assert draft_files.read_parameters(tmp_path, table).keys() == tensors.keys()
    assert "made for another target" in fails(capsys, draft_files.read_parameters, tmp_path, table + 1)


# --- drafts of others ---

ZLAB = {  # the keys of z-lab's and SpecForge's releases
    "architectures": ["DFlashDraftModel"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "block_size": 4, "bos_token_id": 0,
    "dflash_config": {"mask_token_id": 39, "target_layer_ids": [1, 3]}, "dtype": "bfloat16", "eos_token_id": 3,
    "head_dim": 6, "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 24,
    "layer_types": [FULL] * 2, "max_position_embeddings": 512, "max_window_layers": 2, "model_type": "qwen3",
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_target_layers": 6,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "sliding_window": None,
    "tie_word_embeddings": True, "transformers_version": "4.57.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 40,
}  # fmt: skip


def test_a_release_of_z_lab(tmp_path):
    _, tensors = draft()
    put(tmp_path, ZLAB, tensors)
    assert draft_files.check_draft(tmp_path) == []
    config, read = draft_files.read_draft(tmp_path)
    same(read, tensors)
    assert {key: config.get(key) for key in DFLASH} == DFLASH
    draft_files.write_draft(tmp_path / "again", config, read)


def test_options_that_vllm_alone_reads_are_spelled_for_both(tmp_path):
    """A window of XiaomiMiMo's kind, and one causality for all layers."""
    _, tensors = draft()
    swa = {"mask_token_id": 39, "target_layer_ids": [1, 3], "use_swa": True, "swa_window_size": 8}
    config, _ = draft_files.read_draft(put(tmp_path / "swa", ZLAB | {"dflash_config": swa}, tensors))
    assert draft_files.windows(config) == [8, 8]
    assert block_files.causal_layers(config) == [False, False]  # as qwen3_dflash.py says of use_swa
    causal = {"mask_token_id": 39, "target_layer_ids": [1, 3], "causal": True}
    config, _ = draft_files.read_draft(put(tmp_path / "causal", ZLAB | {"dflash_config": causal}, tensors))
    assert block_files.causal_layers(config) == [True, True]
    assert "causal" not in config["dflash_config"]


def test_a_dspark_release(tmp_path):
    """With nested options, an fp32 confidence head, prefixed names, and without the keys that tensors answer."""
    config, tensors = draft(DSPARK)
    options = ("mask_token_id", "target_layer_ids", "markov_rank")
    foreign = {key: value for key, value in config.items() if key not in (*options, *block_files.DSPARK)}
    foreign |= {"architectures": ["DSparkDraftModel"], "dspark_config": {key: config[key] for key in options}}
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    for name in ("model.confidence_head.proj.weight", "model.confidence_head.proj.bias"):
        renamed[name] = renamed[name].float()
    read, again = draft_files.read_draft(put(tmp_path, foreign, renamed))
    same(again, tensors)
    assert {key: read.get(key) for key in config} == config


SPECULATORS = {
    "architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash", "block_size": 4, "mask_token_id": 39,
    "aux_hidden_state_layer_ids": [2, 4], "draft_vocab_size": 12, "max_anchors": 512,
    "transformer_layer_config": {key: ZLAB[key] for key in ZLAB if key not in ("architectures", "dflash_config")},
}  # fmt: skip


def speculators(**changes):
    raw = copy.deepcopy(SPECULATORS)
    for key in ("layer_types", "sliding_window", "is_causal"):
        if key in changes:
            raw["transformer_layer_config"][key] = changes.pop(key)
    return raw | changes


@pytest.mark.parametrize(
    ("changes", "causal"),
    [
        ({}, [False, False]),  # absent: not causal, in vLLM and in speculators
        ({"sliding_window_non_causal": True}, [False, False]),
        ({"layer_types": [SLIDING] * 2, "sliding_window": 8}, [False, False]),
        ({"layer_types": [SLIDING] * 2, "sliding_window": 8, "sliding_window_non_causal": False}, [True, True]),
        ({"layer_types": [FULL, SLIDING], "sliding_window": 8, "sliding_window_non_causal": True}, [False, False]),
        ({"sliding_window_non_causal": False, "is_causal": True}, [True, True]),
    ],
)
def test_a_draft_of_speculators_is_read_as_it_was_trained_and_is_served(changes, causal, tmp_path):
    _, tensors = draft(draft_vocab_size=12)
    raw = speculators(**changes)
    assert [causal_in_vllm(vllms_config(raw), n) for n in (0, 1)] == causal
    read, again = draft_files.read_draft(put(tmp_path, raw, tensors))
    same(again, tensors)
    assert block_files.causal_layers(read) == causal
    assert draft_files.auxiliary_layers(read) == [2, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window_non_causal": False},  # the default that speculators saves, of full layers as well
        {"layer_types": [FULL, SLIDING], "sliding_window": 8, "sliding_window_non_causal": False},
    ],
)
def test_a_draft_of_speculators_that_vllm_serves_with_another_mask_is_refused(changes, tmp_path, capsys):
    _, tensors = draft(draft_vocab_size=12)
    put(tmp_path, speculators(**changes), tensors)
    assert "write is_causal into transformer_layer_config" in fails(capsys, draft_files.read_draft, tmp_path)
    assert len(draft_files.check_draft(tmp_path)) == 1


@pytest.mark.parametrize("key", ["mask_token_id", "aux_hidden_state_layer_ids", "block_size"])
def test_what_the_speculators_form_needs(key, tmp_path):
    _, tensors = draft(draft_vocab_size=12)
    raw = {name: value for name, value in SPECULATORS.items() if name != key}
    raw["transformer_layer_config"] = {k: v for k, v in raw["transformer_layer_config"].items() if k != "block_size"}
    (problem,) = draft_files.check_draft(put(tmp_path, raw, tensors))
    assert key.removeprefix("aux_hidden_state_").removesuffix("_ids") in problem and "is missing" in problem


def test_dspark_of_speculators_with_an_anchor_that_drafts_nothing(tmp_path, capsys):
    """sample_from_anchor is false there unless it is written."""
    config, tensors = draft(DSPARK)
    raw, _ = draft_files.to_speculators(config, tensors, **TARGET)
    put(tmp_path, raw | {"sample_from_anchor": None}, tensors)
    assert "sample_from_anchor is false, not true" in fails(capsys, draft_files.read_draft, tmp_path)


# --- on the command line ---


def run(*argv):
    export_draft.main(export_draft.parse_args([str(word) for word in argv]))


@pytest.fixture
def target(tmp_path):
    """A folder of a target without weights: nothing of them is needed."""
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_check(tmp_path, capsys):
    draft = written_drafts.write(tmp_path / "draft", base=DSPARK, draft_vocab_size=12)
    with pytest.raises(SystemExit) as stop:
        run("--check", draft)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "auxiliary layers [2, 4]" in out and "complete: 32 tensors" in out
    assert "dspark: 4 slots a block, which see all of it; 4 tokens drafted a pass; mask token 39" in out
    assert "note: draft_vocab_size: SGLang" in out


@pytest.mark.parametrize(("base", "kind"), [(DFLASH, "DFlash"), (DSPARK, "DSpark")])
def test_export_there_and_back(base, kind, tmp_path, target):
    draft = written_drafts.write(tmp_path / "draft", base=base, **CAUSAL)
    spec, flat = tmp_path / "spec", tmp_path / "flat"
    run(draft, "--format", "speculators", "--output", spec, "--target_model_path", target)
    written = json.loads((spec / "config.json").read_text())
    assert written["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
    run(spec, "--format", "flat", "--output", flat, "--target_model_path", target)
    config, tensors = draft_files.read_draft(flat)
    assert config == {**base, **CAUSAL}
    same(tensors, draft_files.read_draft(draft)[1])
    card = (flat / "README.md").read_text()
    tokens = block_files.drafted_tokens(base)
    assert f"# {kind} draft for target" in card and f"is a [{kind}](https://arxiv.org" in " ".join(card.split())
    assert f"- {kind.lower()}\n" in card and f'"num_speculative_tokens": {tokens}' in card
    assert "which see earlier ones alone" in card
