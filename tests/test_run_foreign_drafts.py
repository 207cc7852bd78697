"""Drafts of other trainers, in the layouts that these publish: what training starts from, and what comes out again.

The files are written here by hand, tensor by tensor, and not with export_draft.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export_draft
from core import draft_files, states, vocabulary
from helpers import tiny
from helpers.training import refused, run

HIDDEN, INNER, HEADS, GROUPS, VOCABULARY, DRAFT, LAYERS = 64, 80, 4, 2, 400, 150, 8  # of the drafts and their target
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
TIMES = ("seconds", "tokens_per_second")  # of metrics.jsonl, which no two runs share
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with target (bfloat16, Llama 3's RoPE), full (float32), other (another bfloat16 one) and data."""
    folder = tmp_path_factory.mktemp("foreign")
    tiny.write_target(folder / "full", rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    tiny.write_target(folder / "another", seed=1)
    for source, name in (("full", "target"), ("another", "other")):
        shutil.copytree(folder / source, folder / name)
        tensors = load_file(folder / source / "model.safetensors")
        save_file({k: t.to(HALF) for k, t in tensors.items()}, folder / name / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    tiny.write_jsonl(folder / "train.jsonl", tiny.conversations(12))
    tiny.write_jsonl(folder / "validation.jsonl", tiny.conversations(3))
    run(
        folder,
        folder / "first",
        "--dry_run",
        "--dataset_train_split",
        folder / "train.jsonl",
        "--dataset_validation_split",
        folder / "validation.jsonl",
        data=False,
    )
    (folder / "first" / "data").rename(folder / "data")
    return folder


# --- the layouts ---


def weights(dtype=HALF, seed=0, vocabulary=DRAFT, layers=3, hidden=HIDDEN, features=HIDDEN):
    """Random weights of a draft under the names of EAGLE's files, with a mapping to tokens that are drawn, too."""
    generator = torch.Generator().manual_seed(seed)
    width = hidden // HEADS * GROUPS
    shapes = {
        "midlayer.self_attn.q_proj.weight": (hidden, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (width, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (width, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, hidden),
        "midlayer.mlp.gate_proj.weight": (INNER, hidden),
        "midlayer.mlp.up_proj.weight": (INNER, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, INNER),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "fc.weight": (hidden, layers * features),
        "lm_head.weight": (vocabulary, hidden),
    }
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = {name: (t + ("norm" in name)).to(dtype) for name, t in tensors.items()}
    ids = torch.randperm(VOCABULARY, generator=generator)[:vocabulary].sort().values
    tensors["d2t"] = ids - torch.arange(vocabulary)
    tensors["t2d"] = torch.tensor([i in ids.tolist() for i in range(VOCABULARY)])
    return tensors


def put(folder, config, tensors):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def eagle(folder, work, dtype=torch.float16):
    """EAGLE's trainer: save_16bit_model beside a config copied by hand, here one that keeps its target's layers."""
    tensors = weights(dtype)
    config = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 4, "hidden_act": "silu",
        "hidden_size": HIDDEN, "initializer_range": 0.02, "intermediate_size": INNER, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": 40,
        "pad_token_id": 0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.1", "use_cache": True, "vocab_size": VOCABULARY, "draft_vocab_size": DRAFT,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({**tensors, "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / "pytorch_model.bin")
    return tensors, {"rope_theta": 10000.0, "rope_scaling": None}


SPECFORGE = {
    "architectures": ["LlamaForCausalLMEagle3"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "draft_vocab_size": DRAFT, "eos_token_id": 4, "head_dim": HIDDEN // HEADS, "hidden_act": "silu",
    "hidden_size": HIDDEN, "initializer_range": 0.02, "intermediate_size": INNER, "max_position_embeddings": 2048,
    "max_window_layers": 36, "mlp_bias": False, "model_type": "llama", "num_attention_heads": HEADS,
    "num_hidden_layers": 1, "num_key_value_heads": GROUPS, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.53.2", "use_cache": True, "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}  # fmt: skip


def specforge(folder, work):
    """SpecForge under transformers 4: save_pretrained without the embeddings, its own auxiliary layers for SGLang."""
    nested = {"eagle_aux_hidden_state_layer_ids": [0, 2, 6], "use_aux_hidden_state": True}
    tensors = weights()
    put(folder, {**SPECFORGE, "eagle_config": nested, "auto_map": {"AutoModel": "modeling.Draft"}}, tensors)
    return tensors, {"rope_theta": 1e6, "eagle_config": nested, "eagle_aux_hidden_state_layer_ids": [1, 3, 7]}


def specforge_normed(folder, work):
    """SpecForge's EAGLE-3.1 under transformers 5 (its names for dtype and RoPE), with four layers and their norms."""
    config = {k: v for k, v in SPECFORGE.items() if k not in ("torch_dtype", "rope_theta", "rope_scaling")}
    ids = [1, 3, 4, 6]
    config |= {"fc_norm": True, "norm_output": True, "num_aux_hidden_states": 4, "dtype": "bfloat16",
               "rope_parameters": {**LLAMA3, "rope_theta": 1000000.0},
               "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True}}  # fmt: skip
    tensors = weights(layers=4)
    tensors |= {f"fc_norm.{i}.weight": torch.full((HIDDEN,), 1 + i / 8).to(HALF) for i in range(4)}
    put(folder, config, tensors)
    return tensors, {"fc_norm": True, "norm_output": True, "num_aux_hidden_states": 4, "rope_scaling": LLAMA3,
                     "eagle_aux_hidden_state_layer_ids": [i + 1 for i in ids]}  # fmt: skip


def specforge_full(folder, work):
    """The full vocabulary, with the identity that SpecForge keeps as buffers, and with the target's embeddings."""
    tensors = weights(vocabulary=VOCABULARY)
    table = load_file(work / "target" / "model.safetensors")["model.embed_tokens.weight"]
    put(folder, {**SPECFORGE, "draft_vocab_size": None}, {**tensors, "embed_tokens.weight": table})
    return {k: t for k, t in tensors.items() if k not in ("d2t", "t2d")}, {"draft_vocab_size": VOCABULARY}


def modelopt(folder, work):
    """ModelOpt: layers.0, the offsets alone; its layers happen to be the default ones."""
    tensors = weights()
    nested = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True, "use_last_layernorm": True,
              "use_input_layernorm_in_first_layer": True, "use_mtp_layernorm": False}  # fmt: skip
    stored = {k.replace("midlayer.", "layers.0."): t for k, t in tensors.items() if k != "t2d"}
    put(folder, {**SPECFORGE, "eagle_config": nested}, stored)
    return tensors, {"rope_theta": 1e6}


def speculators(folder, work):
    """speculators: what differs from LlamaConfig's defaults, norms, layers by hidden_states, the target's embeddings.

    The embeddings are in the target's dtype and the weights in float32, as a converted draft may have them.
    """
    tensors = weights(torch.float32)
    tensors["input_norm.weight"] = torch.linspace(0.5, 1.5, 3 * HIDDEN)
    config = {
        "architectures": ["Eagle3Speculator"], "auto_map": {"": "config.Eagle3SpeculatorConfig"},
        "draft_vocab_size": DRAFT, "dtype": "float32", "eagle_aux_hidden_state_layer_ids": [2, 5, 8],
        "embed_requires_grad": False, "norm_before_fc": True, "norm_before_residual": True,
        "has_no_defaults_at_init": False,
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "proposal_methods": [{"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3,
                                  "verifier_accept_k": 1}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "org/target"},
        },
        "speculators_model_type": "eagle3", "speculators_version": "0.3.0", "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "bos_token_id": 0, "eos_token_id": 4, "head_dim": HIDDEN // HEADS, "hidden_size": HIDDEN,
            "intermediate_size": INNER, "model_type": "llama", "num_attention_heads": HEADS, "num_hidden_layers": 1,
            "num_key_value_heads": GROUPS, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "vocab_size": VOCABULARY,
        },
        "transformers_version": "5.0.0",
    }  # fmt: skip
    table = load_file(work / "target" / "model.safetensors")["model.embed_tokens.weight"]
    stored = {k.replace("midlayer.", "layers.0."): t for k, t in tensors.items()}
    put(folder, config, {**stored, "embed_tokens.weight": table})
    return tensors, {"norm_before_residual": True, "norm_before_fc": True, "rope_theta": 500000.0,
                     "eagle_aux_hidden_state_layer_ids": [2, 5, 8]}  # fmt: skip


LAYOUTS = (eagle, specforge, specforge_normed, specforge_full, modelopt, speculators)


@pytest.fixture(scope="module")
def drafts(work):
    """{layout: (folder, tensors that training has to start from, what its configuration has to say)}"""
    return {make: (work / make.__name__, *make(work / make.__name__, work)) for make in LAYOUTS}


def same(left, right, dtype=None):
    """Whether two drafts are equal bit by bit, floats of right rounded to dtype if given."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name].to(dtype) if dtype and right[name].is_floating_point() else right[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


def read(folder):
    """(config.json, tensors) of a draft folder, plainly."""
    folder = Path(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def export(*argv):
    export_draft.main(export_draft.parse_args([str(word) for word in argv]))


# --- what training starts from ---


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda make: make.__name__)
def test_training_starts_from_every_layout_as_it_is(layout, work, drafts, tmp_path, capsys):
    """No step trained: the same tensors in the target's dtype, mapping, layers, norms and RoPE; and out again."""
    folder, tensors, says = drafts[layout]
    mapping = vocabulary.build_mapping(dict.fromkeys(range(300, VOCABULARY), 1), DRAFT, VOCABULARY)
    vocabulary.save_mapping(tmp_path / "mapping", *mapping)
    new = [f"--{name}_path={tmp_path / 'mapping' / name}.npy" for name in ("d2t", "t2d")] * ("d2t" in tensors)
    run(work, tmp_path / "out", "--dry_run", "--resume_from_checkpoint", folder, *new)
    assert ("the vocabulary mapping of" in capsys.readouterr().out) == bool(new)
    started = tmp_path / "out" / "step_00000000"
    assert draft_files.check_draft(started) == []
    config, found = read(started)
    same(found, tensors, HALF)
    assert {key: config.get(key) for key in says} == says and config["torch_dtype"] == "bfloat16"
    assert config["num_hidden_layers"] == 1 and "auto_map" not in config
    if layout in (eagle, modelopt, specforge_full):  # the engines' default, so not written
        assert not {"eagle_config", "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"} & config.keys()

    target = ("--target_model_path", work / "target")
    export(started, "--format", "speculators", "--output", tmp_path / "speculators", *target)
    export(tmp_path / "speculators", "--format", "flat", "--output", tmp_path / "flat")
    assert read(tmp_path / "flat")[0] == config
    same(read(tmp_path / "flat")[1], found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda make: make.__name__)
def test_export_there_and_back_loses_nothing(layout, work, drafts, tmp_path):
    """Foreign → speculators → flat and foreign → flat: the draft's own bits in the draft's own dtype."""
    folder, tensors, says = drafts[layout]
    target = ("--target_model_path", work / "target")
    export(folder, "--format", "speculators", "--output", tmp_path / "speculators", *target)
    export(tmp_path / "speculators", "--format", "flat", "--output", tmp_path / "back")
    export(folder, "--format", "flat", "--output", tmp_path / "flat", *target)
    for name in ("back", "flat"):
        assert draft_files.check_draft(tmp_path / name) == []
        config, found = read(tmp_path / name)
        same(found, tensors)
        assert {key: config.get(key) for key in says} == says
    table = load_file(work / "target" / "model.safetensors")["model.embed_tokens.weight"]
    served = read(tmp_path / "speculators")[1]["embed_tokens.weight"]
    assert torch.equal(served, table.to(served.dtype))


def test_a_table_that_is_not_the_targets_is_kept_by_every_export(work, drafts, tmp_path, capsys):
    """Flat → speculators → flat with embeddings that no target has; only the target's own are left out."""
    folder, tensors, _ = drafts[specforge]
    table = torch.randn(VOCABULARY, HIDDEN).to(HALF)
    put(tmp_path / "own", read(folder)[0], {**tensors, "embed_tokens.weight": table})
    target = ("--target_model_path", work / "target")
    export(tmp_path / "own", "--format", "speculators", "--output", tmp_path / "speculators", *target)
    for name, flags in (("plain", ()), ("beside the target", target)):
        export(tmp_path / "speculators", "--format", "flat", "--output", tmp_path / name, *flags)
        same(read(tmp_path / name)[1], {**tensors, "embed_tokens.weight": table})


@pytest.mark.parametrize("layout", [eagle, speculators], ids=lambda make: make.__name__)
def test_a_draft_in_another_dtype_than_the_target(layout, work, drafts, tmp_path):
    """float16 weights for a float32 target, float32 ones for it: the values stay, bit by bit."""
    folder, tensors, _ = drafts[layout]
    if layout is speculators:  # with the float32 target's embeddings
        config, stored = read(folder)
        table = load_file(work / "full" / "model.safetensors")["model.embed_tokens.weight"]
        folder = tmp_path / "draft"
        put(folder, config, {**stored, "embed_tokens.weight": table})
    flags = ("--target_model_path", work / "full", "--dry_run", "--resume_from_checkpoint", folder)
    run(work, tmp_path / "out", *flags)
    config, found = read(tmp_path / "out" / "step_00000000")
    same(found, tensors, torch.float32)
    assert config["torch_dtype"] == "float32"


def test_what_the_configuration_of_a_foreign_draft_says_is_computed(work, drafts, tmp_path):
    """The same weights under other norms, layers and rotary positions have other losses; the same have the same."""
    losses = {}
    folder, _, _ = drafts[speculators]
    changes = {
        "as it is": {},
        "again": {"speculators_version": "9"},
        "norm_before_residual": {"norm_before_residual": False},
        "layers": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8]},
        "norm_output": {"norm_output": True},
        "rope": {"transformer_layer_config": {"rope_parameters": {"rope_theta": 10.0, "rope_type": "default"}}},
    }
    for name, change in changes.items():
        config, tensors = read(folder)
        layer = config["transformer_layer_config"] | change.pop("transformer_layer_config", {})
        put(tmp_path / name, {**config, **change, "transformer_layer_config": layer}, tensors)
        rows = run(work, tmp_path / f"{name}.out", "--total_steps", 1, "--resume_from_checkpoint", tmp_path / name)
        losses[name] = rows[0]["loss"]
    assert losses["as it is"] == losses.pop("again") and len(set(losses.values())) == len(losses), losses


# --- a dry run is the first step of the run ---


@pytest.mark.parametrize("engine", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", [None, speculators], ids=["fresh", "foreign"])
def test_continuing_from_a_dry_run_equals_starting_without_one(engine, start, work, drafts, tmp_path):
    """Metrics and weights bit by bit, though the dry run's draft is saved in bfloat16 and training holds float32."""
    config = {"bf16": {"enabled": engine == "bf16"}, "zero_optimization": {"stage": 2}}
    (tmp_path / "engine.json").write_text(json.dumps(config))
    flags = ["--deepspeed_config", tmp_path / "engine.json", "--total_steps", 3, "--learning_rate", "1e-2"]
    first = ["--resume_from_checkpoint", drafts[start][0]] if start else ["--draft_vocab_size", DRAFT]
    run(work, tmp_path / "dry", *flags, *first, "--dry_run")
    direct = run(work, tmp_path / "direct", *flags, *first)
    continued = run(
        work, tmp_path / "continued", *flags, "--resume_from_checkpoint", tmp_path / "dry" / "step_00000000"
    )
    assert len(direct) == 5 and direct[0]["loss"] != direct[2]["loss"]
    plain = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows] for rows in (direct, continued)]
    assert plain[0] == plain[1]
    (config, tensors), (again, found) = read(tmp_path / "direct" / "final"), read(tmp_path / "continued" / "final")
    same(found, tensors)
    assert again == config and config["torch_dtype"] == "bfloat16"
    assert not torch.equal(found["fc.weight"], read(tmp_path / "dry" / "step_00000000")[1]["fc.weight"])


# --- refused, and why ---


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def layers(*ids):
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(ids), "use_aux_hidden_state": True}}


def unfit(work):
    """{name: (changes of SpecForge's configuration, tensors, words of the reason)} of drafts not for this target."""
    whole, ones = weights(), torch.ones(HIDDEN // HEADS).to(HALF)
    table = load_file(work / "other" / "model.safetensors")["model.embed_tokens.weight"]
    offsets = whole["d2t"]
    return {
        "hidden size": ({"hidden_size": 32, "head_dim": 8}, weights(hidden=32, features=32),
                        "was made for another target: its hidden_size is 32, this target's 64"),
        "its target's hidden size": ({"target_hidden_size": 96}, weights(features=96) | {
            "embed_tokens.weight": torch.ones(VOCABULARY, HIDDEN).to(HALF)}, "its hidden_size is 96, this target's 64"),
        "vocabulary": ({"vocab_size": 500}, {**whole, "t2d": torch.cat([whole["t2d"], torch.zeros(100) > 0])},
                       "was made for another target: its vocab_size is 500, this target's 400"),
        "embeddings": ({}, {**whole, "embed_tokens.weight": table}, "its embed_tokens.weight is not this target's"),
        "layers": (layers(1, 3, 8), whole, "auxiliary layers [2, 4, 9]: they must ascend within 1..8"),
        "order of layers": (layers(6, 1, 3), whole, "auxiliary layers [7, 2, 4]: they must ascend"),
        "number of layers": (layers(1, 3), whole, "fc.weight has shape [64, 192], expected [64, 128]"),
        "no fc": ({}, without(whole, "fc.weight"), "fc.weight is missing"),
        "no norms": ({"fc_norm": True}, whole, "fc_norm.0.weight is missing"),
        "norms of layers": ({}, {**whole, "fc_norm.0.weight": torch.ones(HIDDEN)}, "fc_norm.0.weight is not a tensor"),
        "norms of heads": ({}, {**whole, "midlayer.self_attn.q_norm.weight": ones}, "q_norm.weight is not a tensor of"),
        "two layers": ({"num_hidden_layers": 2}, {**whole, "layers.1.norm.weight": ones},
                       "layers.1.hidden_norm.weight is missing"),
        "half heads turn": ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
                            whole, "partial_rotary_factor is 0.5"),
        "ids for offsets": ({}, {**whole, "d2t": offsets + torch.arange(DRAFT)}, "outside the vocabulary of 400"),
        "mapping beyond": ({}, {"d2t": offsets + 400, **without(whole, "d2t", "t2d")}, "outside the vocabulary of 400"),
    }  # fmt: skip


def test_a_draft_for_another_target_is_refused_before_the_target_is_loaded(work, drafts, tmp_path, capfd, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr(states, "open_source", loaded)
    config, tensors = read(drafts[speculators][0])
    table = load_file(work / "other" / "model.safetensors")["model.embed_tokens.weight"]
    cases = {name: ({**SPECFORGE, **change}, *rest) for name, (change, *rest) in unfit(work).items()}
    cases["speculators' embeddings"] = config, {**tensors, "embed_tokens.weight": table}, cases["embeddings"][2]
    cases["speculators without fc"] = config, without(tensors, "fc.weight"), "fc.weight is missing"
    for name, (config, tensors, reason) in cases.items():
        put(tmp_path / name, config, tensors)
        line = refused(capfd, run, work, tmp_path / "out", "--resume_from_checkpoint", tmp_path / name)
        assert str(tmp_path / name) in line and reason in line, (name, line)
    assert not (tmp_path / "out").exists()


def test_other_embeddings_are_refused_too_where_only_the_loaded_target_has_them(work, drafts, tmp_path, capfd):
    """A target in the older format, whose files are not looked into: its own table passes, another's does not."""
    shutil.copytree(work / "target", tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(work / "target" / "model.safetensors"), tmp_path / "target" / "pytorch_model.bin")
    flags = ("--target_model_path", tmp_path / "target", "--dry_run", "--resume_from_checkpoint")
    run(work, tmp_path / "out", *flags, drafts[specforge_full][0])
    assert draft_files.check_draft(tmp_path / "out" / "step_00000000") == []
    table = load_file(work / "other" / "model.safetensors")["model.embed_tokens.weight"]
    put(tmp_path / "draft", SPECFORGE, {**weights(), "embed_tokens.weight": table})
    line = refused(capfd, run, work, tmp_path / "again", *flags, tmp_path / "draft")
    assert "its embed_tokens.weight is not this target's" in line
