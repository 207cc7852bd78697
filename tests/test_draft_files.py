"""The draft checkpoint: round trips, foreign forms, every fault named, what the serving engines trip over."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import export_draft
from core import common, draft_config, draft_files
from helpers import written_drafts

CONFIG = written_drafts.CONFIG | {"rope_scaling": None, "draft_vocab_size": 12, "eos_token_id": [3, 4]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Eagle3Qwen3ForCausalLM"]}
# Every option that changes the tensors, on top of CONFIG.
VARIANTS = {
    "plain": {},
    "full vocabulary": {"draft_vocab_size": 40},
    "narrow draft": {"target_hidden_size": 20},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True, "norm_output": True},
    "four layers": draft_files.with_auxiliary_layers({}, [1, 2, 3, 5]),
    "own embeddings": {"embed_requires_grad": True},
    "vllm only": {"norm_before_residual": True},
    "float32": {"torch_dtype": "float32", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen3": QWEN3,
    "a window": draft_files.window_keys(8, [True]),
    "two layers": {"num_hidden_layers": 2},
    "three qwen3 layers with all norms and two windows": {
        **QWEN3, "num_hidden_layers": 3, "norm_before_fc": True, "fc_norm": True, "norm_output": True,
        **draft_files.window_keys(8, [True, False, True]),
    },
}  # fmt: skip
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
]  # fmt: skip
TARGET = {"target_model_path": "org/target", "target_architectures": ["LlamaForCausalLM"]}


def draft(**changes):
    """A whole draft with random weights: (config, tensors)."""
    config = {**CONFIG, **changes}
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, config["torch_dtype"])
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in draft_files.expected_tensors(config).items()
        if name not in ("d2t", "t2d")
    }
    if config["draft_vocab_size"] < config["vocab_size"]:
        ids = torch.randperm(config["vocab_size"], generator=generator)[: config["draft_vocab_size"]].sort().values
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill(0, ids, True)
    return config, tensors


def embeddings(config=CONFIG):
    return torch.randn(
        config["vocab_size"], config["hidden_size"], generator=torch.Generator().manual_seed(1)
    ).bfloat16()


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


def run(*argv):
    export_draft.main(export_draft.parse_args([str(word) for word in argv]))


NAMES = list(draft()[1])
ALL_NAMES = [
    (variant, name)
    for variant, changes in VARIANTS.items()
    for name in draft(**changes)[1]
    if "num_hidden_layers" not in changes  # of several layers see below: they have other names in a file
]


# ---------------------------------------------------------------------- what a draft consists of
def test_the_tensors_of_the_flat_form():
    assert draft_files.expected_tensors(CONFIG) == {
        "fc.weight": (16, 48),
        "midlayer.input_layernorm.weight": (16,),
        "midlayer.hidden_norm.weight": (16,),
        "midlayer.self_attn.q_proj.weight": (24, 32),
        "midlayer.self_attn.k_proj.weight": (12, 32),
        "midlayer.self_attn.v_proj.weight": (12, 32),
        "midlayer.self_attn.o_proj.weight": (16, 24),
        "midlayer.post_attention_layernorm.weight": (16,),
        "midlayer.mlp.gate_proj.weight": (24, 16),
        "midlayer.mlp.up_proj.weight": (24, 16),
        "midlayer.mlp.down_proj.weight": (16, 24),
        "norm.weight": (16,),
        "lm_head.weight": (12, 16),
        "d2t": (12,),
        "t2d": (40,),
    }


def test_what_options_add():
    def added(**changes):
        expected = draft_files.expected_tensors({**CONFIG, **changes})
        return {
            name: shape for name, shape in expected.items() if draft_files.expected_tensors(CONFIG).get(name) != shape
        }

    assert set(draft_files.expected_tensors(CONFIG)) - set(
        draft_files.expected_tensors({**CONFIG, "draft_vocab_size": 40})
    ) == {"d2t", "t2d"}
    assert added(norm_before_fc=True) == {"input_norm.weight": (48,)}
    assert added(fc_norm=True) == {f"fc_norm.{i}.weight": (16,) for i in range(3)}
    assert added(target_hidden_size=20) == {"fc.weight": (16, 60), "embed_tokens.weight": (40, 16)}
    assert added(target_hidden_size=16) == {}
    assert added(embed_requires_grad=True) == {"embed_tokens.weight": (40, 16)}
    assert added(**VARIANTS["four layers"]) == {"fc.weight": (16, 64)}
    assert added(**QWEN3) == {f"midlayer.self_attn.{name}_norm.weight": (6,) for name in "qk"}
    assert added(**VARIANTS["a window"]) == {}
    assert added(num_hidden_layers=2) == {
        "layers.1.hidden_norm.weight": (16,),
        "layers.1.self_attn.q_proj.weight": (24, 16),
        "layers.1.self_attn.k_proj.weight": (12, 16),
        "layers.1.self_attn.v_proj.weight": (12, 16),
        "layers.1.self_attn.o_proj.weight": (16, 24),
        "layers.1.post_attention_layernorm.weight": (16,),
        "layers.1.mlp.gate_proj.weight": (24, 16),
        "layers.1.mlp.up_proj.weight": (24, 16),
        "layers.1.mlp.down_proj.weight": (16, 24),
    }


def test_auxiliary_layers_are_written_twice_or_not_at_all():
    assert draft_files.with_auxiliary_layers(CONFIG, [2, 4, 5], [2, 4, 5]) == CONFIG
    assert draft_files.with_auxiliary_layers(draft_files.with_auxiliary_layers(CONFIG, [1, 2, 3, 4]), None) == CONFIG
    assert draft_files.auxiliary_layers(CONFIG) is None
    config = draft_files.with_auxiliary_layers(CONFIG, [1, 4, 6], [2, 4, 5])
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 4, 6]
    assert config["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [0, 3, 5], "use_aux_hidden_state": True}
    assert "num_aux_hidden_states" not in config and draft_files.check_config(config) == []
    assert draft_files.auxiliary_layers(config) == [1, 4, 6]
    assert draft_files.with_auxiliary_layers(CONFIG, [1, 4], [2, 4, 5])["num_aux_hidden_states"] == 2
    assert draft_files.auxiliary_layers({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 5]}}) == [1, 4, 6]


# ---------------------------------------------------------------------- round trips
@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_round_trip(variant, tmp_path):
    config, tensors = draft(**VARIANTS[variant])
    draft_files.write_draft(tmp_path / "d", config, tensors)
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["config.json", "model.safetensors"]
    assert draft_files.check_draft(tmp_path / "d") == []
    read_config, read_tensors = draft_files.read_draft(tmp_path / "d")
    assert read_config == config
    same(read_tensors, tensors)
    with safe_open(tmp_path / "d" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_to_speculators_to_flat(variant, tmp_path):
    config, tensors = draft(**VARIANTS[variant])
    draft_files.write_speculators(tmp_path / "s", config, tensors, embed_tokens=embeddings(), **TARGET)
    assert draft_files.check_draft(tmp_path / "s") == []
    written = load_file(tmp_path / "s" / "model.safetensors")
    assert "embed_tokens.weight" in written and not any("midlayer" in name for name in written)
    read_config, read_tensors = draft_files.read_draft(tmp_path / "s")
    assert read_config == config
    same(read_tensors, {"embed_tokens.weight": written["embed_tokens.weight"], **tensors})
    run(tmp_path / "s", "--format", "flat", "--output", tmp_path / "f")
    assert json.loads((tmp_path / "f" / "config.json").read_text()) == config
    same(load_file(tmp_path / "f" / "model.safetensors"), draft_files.as_written(config, tensors))


def test_floats_are_cast_and_the_rest_is_kept(tmp_path):
    config, tensors = draft()
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    draft_files.write_draft(tmp_path, config, wide)
    same(load_file(tmp_path / "model.safetensors"), tensors)


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    config, tensors = draft()
    tensors["midlayer.mlp.up_proj.weight"] = tensors["midlayer.mlp.gate_proj.weight"]
    tensors["midlayer.mlp.down_proj.weight"] = torch.nn.Parameter(tensors["midlayer.mlp.up_proj.weight"].T)
    draft_files.write_draft(tmp_path, config, tensors)
    same(draft_files.read_draft(tmp_path)[1], {name: tensor.detach() for name, tensor in tensors.items()})


# ---------------------------------------------------------------------- each fault by its name
@pytest.mark.parametrize(("variant", "name"), ALL_NAMES)
def test_each_tensor_removed_renamed_misshapen_or_not_a_number_is_named(variant, name, tmp_path, capsys):
    config, tensors = draft(**VARIANTS[variant])
    others, tensor = {key: tensor for key, tensor in tensors.items() if key != name}, tensors[name]
    floating = tensor.is_floating_point()
    dtype = torch.float16 if floating else torch.int32
    cases = [
        (others, f"{name} is missing"),
        ({**others, name + "s": tensor}, f"{name}s is not a tensor of this draft"),
        ({**others, name: tensor[:-1].contiguous()}, f"{name} has shape [{len(tensor) - 1}"),
        ({**others, name: tensor.to(dtype)}, f"{name} is {str(dtype)[6:]}, expected"),
    ]
    if floating:
        nan = tensor.clone()
        nan.view(-1)[1] = float("nan")
        cases.append(({**others, name: nan}, f"{name} has 1 of {tensor.numel()} values that are not finite"))
    for broken, message in cases:
        put(tmp_path / "old", config, broken)
        assert any(problem.startswith(message) for problem in draft_files.check_draft(tmp_path / "old"))
        if message == "t2d is missing":  # it follows from d2t
            same(draft_files.read_draft(tmp_path / "old")[1], tensors)
        elif message.startswith("embed_tokens.weight is float16"):  # as engines convert it
            assert draft_files.read_draft(tmp_path / "old")[1][name].dtype == tensor.dtype
        else:
            assert message in fails(capsys, draft_files.read_draft, tmp_path / "old")
        if not message.startswith(f"{name} is float16"):  # writing casts floats
            assert message in fails(capsys, draft_files.write_draft, tmp_path / "new", config, broken)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [*NAMES, "embed_tokens.weight"])
def test_each_fault_in_the_speculators_form_is_named_as_the_file_names_it(name, tmp_path, capsys):
    config, tensors = draft_files.to_speculators(*draft(), embed_tokens=embeddings(), **TARGET)
    name = name.replace("midlayer.", "layers.0.")
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    assert f"{name} is missing" in draft_files.check_draft(put(tmp_path, config, without))
    renamed = {**without, "x." + name: tensors[name]}
    assert f"x.{name} is not a tensor of this draft" in draft_files.check_draft(put(tmp_path, config, renamed))
    if tensors[name].is_floating_point():
        put(tmp_path, config, {**without, name: torch.full_like(tensors[name], float("inf"))})
        assert any(problem.startswith(f"{name} has ") for problem in draft_files.check_draft(tmp_path))
    if name not in ("embed_tokens.weight", "t2d"):  # another trainer may leave these out: they are known without
        assert f"{name} is missing" in fails(capsys, draft_files.read_draft, put(tmp_path, config, without))


NORMS = ["layers.1.input_layernorm.weight", "layers.1.hidden_norm.weight"]  # as vLLM reads it, as SGLang does


def test_several_layers_are_written_as_both_engines_read_them(tmp_path):
    config, tensors = draft(num_hidden_layers=3)
    draft_files.write_draft(tmp_path, config, tensors)
    written = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("midlayer") for name in written)
    assert torch.equal(written["layers.0.hidden_norm.weight"], tensors["midlayer.hidden_norm.weight"])
    for layer in ("layers.1.", "layers.2."):
        assert torch.equal(written[f"{layer}input_layernorm.weight"], written[f"{layer}hidden_norm.weight"])
    assert len(written) == len(tensors) + 2


@pytest.mark.parametrize("form", ["flat", "speculators"])
def test_each_fault_of_two_layers_is_named_as_the_file_names_it(form, tmp_path, capsys):
    config, tensors = draft(num_hidden_layers=2)
    written, table = draft_files.as_written(config, tensors), {}
    if form == "speculators":
        table = {"embed_tokens.weight": embeddings()}
        config, written = draft_files.to_speculators(config, tensors, embed_tokens=embeddings(), **TARGET)
    assert draft_files.check_draft(put(tmp_path, config, written)) == []
    for name, tensor in written.items():
        others = {key: part for key, part in written.items() if key != name}
        problems = draft_files.check_draft(put(tmp_path, config, others))
        assert len(problems) == 1 and problems[0].startswith(f"{name} is missing"), problems
        if name in NORMS:  # which the other name has
            same(draft_files.read_draft(tmp_path)[1], tensors | table)
        elif name not in ("t2d", "embed_tokens.weight"):
            assert f"{name} is missing" in fails(capsys, draft_files.read_draft, tmp_path)
        put(tmp_path, config, {**others, name: tensor[:-1].contiguous()})
        assert any(name in problem for problem in draft_files.check_draft(tmp_path)), name
    without = {key: part for key, part in written.items() if key not in NORMS}
    assert len(draft_files.check_draft(put(tmp_path, config, without))) == 2
    assert "layers.1.hidden_norm.weight is missing" in fails(capsys, draft_files.read_draft, tmp_path)


def test_a_norm_of_two_values_is_named(tmp_path, capsys):
    config, tensors = draft(num_hidden_layers=2)
    written = draft_files.as_written(config, tensors)
    written[NORMS[0]] = written[NORMS[0]] + 1
    problem = f"{NORMS[0]}, which vLLM reads, differs from {NORMS[1]}, which SGLang reads"
    assert draft_files.check_draft(put(tmp_path, config, written)) == [problem]
    assert problem in fails(capsys, draft_files.read_draft, tmp_path)


def test_a_mapping_that_is_none_is_named(tmp_path, capsys):
    config, tensors = draft()
    for name, wrong, message in (
        ("d2t", tensors["d2t"] + torch.arange(12), "outside the vocabulary of 40"),  # ids instead of offsets
        ("d2t", tensors["d2t"].flip(0), "d2t is not ascending"),
        ("t2d", ~tensors["t2d"], "t2d disagrees with d2t"),
    ):
        put(tmp_path, config, {**tensors, name: wrong})
        assert any(message in problem for problem in draft_files.check_draft(tmp_path)), message
        assert message in fails(capsys, draft_files.read_draft, tmp_path)
        assert message in fails(capsys, draft_files.write_draft, tmp_path / "new", config, {**tensors, name: wrong})


@pytest.mark.parametrize("key", draft_files.REQUIRED)
def test_each_key_that_is_missing_is_named(key, tmp_path, capsys):
    config, tensors = draft()
    config.pop(key)
    assert draft_files.check_config(config) == [f"{key} is missing"]
    assert draft_files.check_draft(put(tmp_path, config, tensors)) == [f"config.json: {key} is missing"]
    assert f"{key} is missing" in fails(capsys, draft_files.write_draft, tmp_path / "new", config, tensors)


CONFIG_FAULTS = [
    ("hidden_size", "16", "hidden_size is '16', not a positive integer"),
    ("head_dim", 5, "head_dim 5 is odd"),
    ("num_hidden_layers", 0, "num_hidden_layers is 0, not a positive integer"),
    ("num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ("attention_bias", True, "attention_bias is true, not false"),
    ("tie_word_embeddings", True, "tie_word_embeddings is true"),
    ("architectures", ["LlamaForCausalLM"], 'architectures is ["LlamaForCausalLM"]'),
    ("model_type", "qwen3", 'not ["Eagle3Qwen3ForCausalLM"], of qwen3'),
    ("model_type", ["qwen3"], 'model_type is ["qwen3"], not llama or qwen3'),
    ("draft_vocab_size", 41, "draft_vocab_size 41 is larger than vocab_size 40"),
    ("vocab_size", None, "vocab_size is None"),
    ("target_hidden_size", None, "target_hidden_size is None"),
    ("torch_dtype", "float64", "torch_dtype is 'float64'"),
    ("rope_theta", None, "rope_theta is None"),
    ("rope_scaling", {"factor": 2}, "rope_scaling is {'factor': 2}"),
    ("rope_scaling", "linear", "rope_scaling is 'linear'"),
    ("rope_scaling", {"type": "linear", "factor": 2}, "an object with a rope_type of default, linear, yarn, llama3"),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 2}, "rope_type of default, linear, yarn, llama3"),
    ("rope_scaling", {"rope_type": "linear"}, "factor is None, linear needs a positive number"),
    ("rope_scaling", {"rope_type": "linear", "factor": "2"}, "factor is '2', linear needs"),
    ("rms_norm_eps", 0, "rms_norm_eps is 0"),
    ("hidden_act", None, "hidden_act is None"),
    ("hidden_act", ["silu"], "hidden_act is ['silu']"),
    ("hidden_act", "sillu", "hidden_act is 'sillu', not the name of an activation"),
    ("mlp_bias", True, "mlp_bias is true, not false"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, not 1"),
    ("rope_scaling", {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}, "rotary_factor is 0.5, not 1"),
    ("num_aux_hidden_states", 4, "num_aux_hidden_states is 4 without"),
    ("fc_norm", "yes", "fc_norm is 'yes'"),
    ("eagle_config", [], "eagle_config is []"),
    ("eagle_aux_hidden_state_layer_ids", [2, "4", 5], "not a list of layer ids"),
]


@pytest.mark.parametrize(("key", "value", "message"), CONFIG_FAULTS)
def test_each_wrong_value_is_named(key, value, message):
    assert any(message in problem for problem in draft_files.check_config({**CONFIG, key: value}))


def test_each_number_that_a_rope_type_needs_is_named():
    named = set()
    for scaling in filter(None, SCALINGS):
        assert draft_files.check_config({**CONFIG, "rope_scaling": scaling, "mlp_bias": False}) == []
        for key in scaling.keys() - {"rope_type"}:
            without = {name: value for name, value in scaling.items() if name != key}
            problem = f"rope_scaling's {key} is None, {scaling['rope_type']} needs a positive number"
            assert draft_files.check_config({**CONFIG, "rope_scaling": without}) == [problem]
            named.add((scaling["rope_type"], key))
    assert len(named) == 1 + 2 + 4


# ---------------------------------------------------------------------- the configuration for a target
TEXT = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    dtype="bfloat16",
)


def test_a_derived_configuration_is_whole_for_every_rope_type():
    for scaling in [*SCALINGS, {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}]:
        rope = {"rope_type": "default", **(scaling or {}), "rope_theta": 5000.0}
        text = LlamaConfig(**{**TEXT.to_dict(), "rope_parameters": rope})
        config, layers = draft_config.configure(text, text)
        assert draft_files.check_config(config) == [] and layers == [2, 4, 5]
        assert config["rope_theta"] == 5000.0
        assert config["rope_scaling"] == (scaling if not scaling or scaling["factor"] else {**scaling, "factor": 4.0})


def test_the_draft_reaches_as_far_as_its_target():
    assert (
        draft_config.configure(TEXT, TEXT, {"max_position_embeddings": 128}, "draft.json")[0]["max_position_embeddings"]
        == 512
    )
    assert (
        draft_config.configure(TEXT, TEXT, {"max_position_embeddings": 999}, "draft.json")[0]["max_position_embeddings"]
        == 999
    )


def test_a_given_configuration_is_completed():
    given = {"num_attention_heads": 2, "head_dim": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = draft_config.configure(TEXT, TEXT, given, "draft.json")[0]
    assert config["head_dim"] == 8 and config["rope_theta"] == 10000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    given = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    config = draft_config.configure(TEXT, TEXT, given, "draft.json")[0]
    assert config["rope_theta"] == 7.0 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_a_given_configuration_that_cannot_be_trained_ends_with_one_line(capsys):
    for given, message in (
        ({"target_hidden_size": 20}, " was made for another target: its hidden_size is 20, this target's 16"),
        ({"hidden_size": 32}, " was made for another target: its hidden_size is 32, this target's 16"),
        ({"hidden_size": "16"}, "hidden_size is '16', not a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings is '512'"),
        ({"vocab_size": 41}, " was made for another target: its vocab_size is 41, this target's 40"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states 4 for the auxiliary layers [2, 4, 5]"),
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings is None"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling is {'rope_type': 'longrope'}"),
    ):
        error = fails(capsys, draft_config.configure, TEXT, TEXT, given, "draft.json")
        assert error.startswith("error: draft.json") and message in error, given


def test_a_whole_config_has_no_problem():
    for changes in VARIANTS.values():
        assert draft_files.check_config({**CONFIG, **changes}) == []


# ---------------------------------------------------------------------- what engines trip over
def test_auxiliary_layers_that_disagree_between_the_engines():
    config = draft_files.with_auxiliary_layers(CONFIG, [1, 4, 6])
    equal = {**config, "eagle_config": {**config["eagle_config"], "eagle_aux_hidden_state_layer_ids": [1, 4, 6]}}
    assert "auxiliary layers disagree" in draft_files.check_config(equal)[0]
    once = {key: value for key, value in config.items() if key != "eagle_config"}
    assert "SGLang reads eagle_config" in draft_files.check_config(once)[0]
    once = {key: value for key, value in config.items() if key != "eagle_aux_hidden_state_layer_ids"}
    assert "vLLM reads" in draft_files.check_config(once)[0]
    four = {k: v for k, v in VARIANTS["four layers"].items() if k != "num_aux_hidden_states"}
    assert "has 4 layers, num_aux_hidden_states says 3" in draft_files.check_config({**CONFIG, **four})[0]
    off = {**config, "eagle_config": {**config["eagle_config"], "use_aux_hidden_state": False}}
    assert "use_aux_hidden_state" in draft_files.check_config(off)[0]


def test_a_mapping_beside_the_full_vocabulary(tmp_path):
    config, tensors = draft(draft_vocab_size=40)
    tensors |= {"d2t": torch.zeros(40, dtype=torch.int64), "t2d": torch.ones(40, dtype=torch.bool)}
    problems = draft_files.check_draft(put(tmp_path, config, tensors))
    assert len(problems) == 2 and all("vLLM refuses" in problem for problem in problems)
    assert "d2t" not in draft_files.read_draft(tmp_path)[1]  # but the identity means the same as none


def test_biases_and_head_norms(tmp_path):
    config, tensors = draft()
    tensors["midlayer.self_attn.q_proj.bias"] = torch.zeros(24).bfloat16()
    tensors["midlayer.self_attn.q_norm.weight"] = torch.ones(6).bfloat16()
    problems = draft_files.check_draft(put(tmp_path, config, tensors))
    assert [problem.split()[0] for problem in sorted(problems)] == [
        "midlayer.self_attn.q_norm.weight",
        "midlayer.self_attn.q_proj.bias",
    ]


def test_the_speculators_form_says_how_many_states_fc_reads():
    """vLLM's Llama class looks for it among the layer's keys alone; it would make an fc for three."""
    config, tensors = draft(**VARIANTS["four layers"])
    spec, _ = draft_files.to_speculators(config, tensors, embed_tokens=embeddings(), **TARGET)
    assert spec["transformer_layer_config"]["num_aux_hidden_states"] == 4


def test_float16_overflow_is_not_written(tmp_path, capsys):
    config, tensors = draft(torch_dtype="float16")
    tensors["norm.weight"] = tensors["norm.weight"].float() + 1e6
    assert "norm.weight has 16 of 16 values that are not finite" in fails(
        capsys, draft_files.write_draft, tmp_path, config, tensors
    )


def test_the_speculators_config():
    config, tensors = draft(**draft_files.with_auxiliary_layers({}, [1, 4, 6]))
    spec, _ = draft_files.to_speculators(config, tensors, embed_tokens=embeddings(), tokens=7, **TARGET)
    layer, proposals = spec.pop("transformer_layer_config"), spec.pop("speculators_config")
    assert "model_type" not in spec and spec.pop("speculators_version")
    assert spec == {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 12,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    assert proposals == {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"proposal_type": "greedy", "speculative_tokens": 7, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        ],
        "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
    }
    assert layer["model_type"] == "llama" and layer["num_hidden_layers"] == 1


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"] if scaling else "default")
@pytest.mark.parametrize("keys", ["old", "new", "all"])
def test_transformer_layer_config_is_a_whole_llama_config_with_either_spelling_of_rope(scaling, keys):
    config, tensors = draft(rope_scaling=scaling)
    layer = draft_files.to_speculators(config, tensors, embed_tokens=embeddings(), **TARGET)[0][
        "transformer_layer_config"
    ]
    drop = {"old": ["rope_parameters"], "new": ["rope_theta", "rope_scaling"], "all": []}[keys]
    read = LlamaConfig(**copy.deepcopy({key: value for key, value in layer.items() if key not in drop}))
    rope = read.rope_parameters
    assert rope["rope_theta"] == 500000.0 and rope["rope_type"] == (scaling or {}).get("rope_type", "default")
    assert all(rope[key] == value for key, value in (scaling or {}).items())
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(read, key) == CONFIG[key]


def test_the_speculators_form_needs_the_embeddings(capsys):
    config, tensors = draft()
    assert "needs embed_tokens.weight" in fails(capsys, draft_files.to_speculators, config, tensors, **TARGET)
    wrong = embeddings()[:-1]
    error = fails(capsys, draft_files.to_speculators, config, tensors, embed_tokens=wrong, **TARGET)
    assert "embed_tokens.weight has shape [39, 16], expected [40, 16]" in error


# ---------------------------------------------------------------------- foreign drafts
def test_tensors_named_by_layers(tmp_path):
    config, tensors = draft()
    put(tmp_path, config, {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()})
    assert draft_files.read_draft(tmp_path)[0] == config
    same(draft_files.read_draft(tmp_path)[1], tensors)
    assert "midlayer" in draft_files.check_draft(tmp_path)[0]  # not the portable form


def test_shards(tmp_path, capsys):
    config, tensors = draft()
    names = list(tensors)
    put(tmp_path, config, {"x": torch.zeros(1)})
    (tmp_path / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(draft_files.read_draft(tmp_path)[1], tensors)
    assert draft_files.check_draft(tmp_path) == []
    for content in ("[]", "{", '{"weight_map": []}', '{"weight_map": {"fc.weight": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        assert "the weights cannot be read" in fails(capsys, draft_files.read_draft, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in fails(capsys, draft_files.read_draft, tmp_path)


def eagle_release(folder, **changes):
    """A draft as EAGLE's own trainer publishes it: pytorch_model.bin and a config without most of our keys."""
    config, tensors = draft(head_dim=4, **changes)
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    own = ("head_dim", "rope_theta", "rope_scaling", "attention_bias", "torch_dtype", "draft_vocab_size")
    config = {key: value for key, value in config.items() if key not in own}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    torch.save({**tensors, "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(2)}, folder / "pytorch_model.bin")
    return tensors


def test_eagles_own_release(tmp_path):
    tensors = eagle_release(tmp_path)
    config, read = draft_files.read_draft(tmp_path)
    same(read, tensors)
    assert draft_files.check_config(config) == []
    assert config["head_dim"] == 4 and config["draft_vocab_size"] == 12 and config["rope_theta"] == 10000.0
    assert config["torch_dtype"] == "float16" and config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert any(
        "is missing" in problem for problem in draft_files.check_draft(tmp_path)
    )  # as it stands it is not portable
    draft_files.write_draft(tmp_path / "flat", config, read)
    assert draft_files.check_draft(tmp_path / "flat") == []


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    eagle_release(tmp_path)
    torch.save({"fc.weight": Path("x")}, tmp_path / "pytorch_model.bin")
    assert "cannot be read" in fails(capsys, draft_files.read_draft, tmp_path)
    torch.save([torch.ones(1)], tmp_path / "pytorch_model.bin")
    assert "not a dictionary of tensors" in fails(capsys, draft_files.read_draft, tmp_path)


def test_a_config_that_names_another_dtype_than_all_tensors(tmp_path, capsys):
    config, tensors = draft()
    put(tmp_path, {**config, "torch_dtype": "float16"}, tensors)
    assert "fc.weight is bfloat16, expected float16" in draft_files.check_draft(tmp_path)
    assert draft_files.read_draft(tmp_path)[0] == config
    tensors["fc.weight"] = tensors["fc.weight"].float()  # one of several is a fault
    assert "fc.weight is float32" in fails(capsys, draft_files.read_draft, put(tmp_path, config, tensors))


def test_speculators_own_checkpoint(tmp_path):
    # It stores only what differs from LlamaConfig's defaults, and transformers 5's spelling of rope and dtype.
    config, tensors = draft(hidden_size=32, num_attention_heads=32, num_key_value_heads=32, head_dim=2, vocab_size=64)
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    layer = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 2,
        "vocab_size": 64, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
    }  # fmt: skip
    spec = {
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 12,
        "dtype": "bfloat16",
        "target_hidden_size": None,
        "transformer_layer_config": layer,
    }
    read, read_tensors = draft_files.read_draft(put(tmp_path, spec, tensors))
    assert draft_files.check_config(read) == [] and "target_hidden_size" not in read
    assert read["norm_before_residual"] is True  # vLLM's meaning of the absent key
    assert read["rope_theta"] == 500000.0 and read["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert read["rms_norm_eps"] == 1e-6 and read["num_attention_heads"] == 32 and read["torch_dtype"] == "bfloat16"
    assert len(read_tensors) == len(tensors)
    put(tmp_path, {**spec, "norm_before_residual": False}, tensors)
    assert "norm_before_residual" not in draft_files.read_draft(tmp_path)[0]


def test_auxiliary_layers_written_once_are_completed_and_never_guessed(tmp_path, capsys):
    config, tensors = draft()
    for once in (
        {"eagle_aux_hidden_state_layer_ids": [1, 4, 6]},
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 5], "use_aux_hidden_state": True}},
    ):
        assert draft_files.read_draft(put(tmp_path, {**config, **once}, tensors))[
            0
        ] == draft_files.with_auxiliary_layers(config, [1, 4, 6])
    empty = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [], "use_aux_hidden_state": True}}
    assert draft_files.read_draft(put(tmp_path, {**config, **empty}, tensors))[0] == config
    both = {**draft_files.with_auxiliary_layers({}, [1, 4, 6]), "eagle_aux_hidden_state_layer_ids": [2, 5, 7]}
    assert "disagree" in fails(capsys, draft_files.read_draft, put(tmp_path, {**config, **both}, tensors))
    off = {"eagle_config": {"use_aux_hidden_state": False}}
    assert "use_aux_hidden_state" in fails(capsys, draft_files.read_draft, put(tmp_path, {**config, **off}, tensors))


def test_null_keys_of_a_foreign_draft(tmp_path):
    config, tensors = draft()
    put(tmp_path, {**config, "target_hidden_size": None}, tensors)
    assert draft_files.check_draft(tmp_path) == ["config.json: target_hidden_size is None, not a positive integer"]
    assert draft_files.read_draft(tmp_path)[0] == config


def test_the_older_spelling_of_a_rope_type(tmp_path, capsys):
    config, tensors = draft(rope_scaling={"rope_type": "linear", "factor": 2.0})
    put(tmp_path, {**config, "rope_scaling": {"type": "linear", "factor": 2.0}}, tensors)
    assert "rope_scaling is" in draft_files.check_draft(tmp_path)[0]
    assert draft_files.read_draft(tmp_path)[0] == config
    put(tmp_path, {**config, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, tensors)
    assert "'dynamic'" in fails(capsys, draft_files.read_draft, tmp_path)


def test_the_newer_spelling_of_rope_beside_half_of_the_older_one(tmp_path):
    config, tensors = draft(rope_scaling={"rope_type": "linear", "factor": 2.0})
    rope = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}}
    for key in ("rope_scaling", "rope_theta"):
        kept = {name: value for name, value in config.items() if name != key}
        assert draft_files.read_draft(put(tmp_path, {**kept, **rope}, tensors))[0] == config
        assert draft_files.read_draft(put(tmp_path, {**kept, key: None, **rope}, tensors))[0] == config


def test_folders_that_are_no_draft(tmp_path, capsys):
    assert "absent: neither a file or folder" in fails(capsys, draft_files.check_draft, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in draft_files.check_draft(tmp_path / "file")[0]
    (tmp_path / "config.json").write_text("{")
    assert [problem.split()[0] for problem in draft_files.check_draft(tmp_path)] == ["config.json", "model.safetensors"]
    (tmp_path / "config.json").write_text("[]")
    assert "not a JSON object" in draft_files.check_draft(tmp_path)[0]
    put(tmp_path, *draft())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-9])
    assert "the weights cannot be read" in draft_files.check_draft(tmp_path)[0]
    assert "the weights cannot be read" in fails(capsys, draft_files.read_draft, tmp_path)


# ---------------------------------------------------------------------- atomic writing
def test_a_write_that_breaks_off_leaves_the_old_draft_or_no_config(tmp_path, monkeypatch):
    config, tensors = draft()
    draft_files.write_draft(tmp_path, config, tensors)
    new = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    def broken(*arguments, **named):
        raise OSError("no space left on device")

    for module, name in ((draft_files, "save_file"), (draft_files.os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(OSError, match="no space"):
                draft_files.write_draft(tmp_path, config, new)
        same(draft_files.read_draft(tmp_path)[1], tensors)
    with monkeypatch.context() as patch:
        patch.setattr(common, "write_atomic", broken)
        with pytest.raises(OSError, match="no space"):
            draft_files.write_draft(tmp_path, config, new)
    assert "config.json" in draft_files.check_draft(tmp_path)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_read_back_is_compared(tmp_path, monkeypatch, capsys):
    config, tensors = draft()
    monkeypatch.setattr(draft_files, "load_file", lambda path: {n: t for n, t in tensors.items() if n != "fc.weight"})
    assert "other values than were written for fc.weight" in fails(
        capsys, draft_files.write_draft, tmp_path, config, tensors
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- command line
def test_check_on_the_command_line(tmp_path):
    def check(*argv):
        script = Path(export_draft.__file__)
        return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, cwd=tmp_path)

    draft_files.write_draft(tmp_path / "d", *draft())
    done = check("--check", "d")
    assert done.returncode == 0 and done.stderr == ""
    assert "complete: 15 tensors, 4,096 parameters" in done.stdout and "midlayer.self_attn.q_proj.weight" in done.stdout
    config, tensors = draft()
    tensors.pop("fc.weight")
    tensors["norm.weight"][3] = float("nan")
    put(tmp_path / "d", config, tensors)
    done = check("d", "--check")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == ["fc.weight is missing", "norm.weight has 1 of 16 values that are not finite"]


def test_check_in_the_speculators_form_and_notes(tmp_path, capsys):
    config, tensors = draft(norm_before_residual=True)
    draft_files.write_speculators(tmp_path / "s", config, tensors, embed_tokens=embeddings(), **TARGET)
    with pytest.raises(SystemExit) as stop:
        run("--check", tmp_path / "s")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "complete: 16 tensors" in out and "note: norm_before_residual" in out


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A folder of a target; its embeddings are handed out without reading weights."""
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(draft_files, "read_embedding", lambda model_dir: embeddings())
    return folder


def test_export_there_and_back(tmp_path, target, capsys):
    config, tensors = draft(**draft_files.with_auxiliary_layers({}, [1, 4, 6]))
    draft_files.write_draft(tmp_path / "d", config, tensors)
    options = ["--target-model-path", target, "--speculative-tokens=3"]
    run(tmp_path / "d", "--format", "speculators", "--output", tmp_path / "s", *options)
    assert "speculators form" in capsys.readouterr().out
    spec = json.loads((tmp_path / "s" / "config.json").read_text())
    assert spec["speculators_config"]["verifier"] == {
        "name_or_path": str(target),
        "architectures": ["LlamaForCausalLM"],
    }
    assert spec["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert torch.equal(load_file(tmp_path / "s" / "model.safetensors")["embed_tokens.weight"], embeddings())
    run(tmp_path / "s", "--format", "flat", "--output", tmp_path / "f")
    assert draft_files.check_draft(tmp_path / "f") == []
    assert json.loads((tmp_path / "f" / "config.json").read_text()) == {**config, "eos_token_id": [3, 4]}
    same(load_file(tmp_path / "f" / "model.safetensors"), tensors)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_embeddings_are_read_from_the_target(sharded, tmp_path):
    file = "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
    save_file({"model.embed_tokens.weight": embeddings(), "lm_head.weight": torch.ones(2)}, tmp_path / file)
    if sharded:
        index = {"weight_map": {"model.embed_tokens.weight": file, "lm_head.weight": file}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(draft_files.read_embedding(tmp_path), embeddings())


def test_usage_errors(tmp_path, target, capsys):
    draft_files.write_draft(tmp_path / "d", *draft())
    folder, output = tmp_path / "d", tmp_path / "o"
    assert "--format" in fails(capsys, run, folder)
    assert "--output" in fails(capsys, run, folder, "--format", "flat")
    assert "itself" in fails(capsys, run, folder, "--format", "flat", "--output", folder)
    assert "--target_model_path" in fails(capsys, run, folder, "--format", "speculators", "--output", output)
    few = ["--target_model_path", target, "--speculative_tokens", 0]
    assert "at least 1" in fails(capsys, run, folder, "--format", "speculators", "--output", output, *few)
    assert "no_draft" in fails(capsys, run, tmp_path / "no_draft", "--format", "flat", "--output", output)
    assert "no_draft" in fails(capsys, run, "--check", tmp_path / "no_draft")
    assert "needs a folder" in fails(capsys, run, "--check")
    assert "--format" in fails(capsys, run, folder, "--format", "gguf")
    assert "--unknown" in fails(capsys, run, folder, "--unknown")
    assert not output.exists()
