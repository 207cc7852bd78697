"""The configuration of a block draft for a target: flags, files, the mask, auxiliary layers, a continued training."""

import json

import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, Qwen3Config

import train_eagle3
from core import (
    block_config,
    block_files,
    common,
    draft_files,
    optimization,
    ranks,
    setup,
    states,
    target_files,
    target_model,
)
from helpers import tiny, written_drafts

FULL, SLIDING = "full_attention", "sliding_attention"


def parse(*argv):
    """The flags that a trainer of block drafts has, without EAGLE-3's own."""
    parser = common.Parser("")
    add = parser.add_argument_group("draft").add_argument
    train_eagle3.add_data_flags(add)
    target_model.add_sharing_flags(parser)
    states.add_source_flags(parser)
    optimization.add_flags(parser)
    setup.add_batch_flags(add)
    setup.add_run_flags(add)
    block_config.add_flags(add)
    for name in ("draft_model_config", "token_freq_path", "d2t_path", "t2d_path", "draft_vocab_size"):
        add(f"--{name}", type=int if name == "draft_vocab_size" else str)
    add("--target_layer_ids", type=int, nargs="+")
    add("--dry_run", action=common.Switch)
    add("--position_weights", default="decay")
    add("--dflash_decay_gamma", type=float, default=4.0)
    args = parser.parse_args(["--target_model_path", "M", *map(str, argv)])
    args.report_to = []
    return args


@pytest.fixture(scope="module")
def target(work):
    """(folder, text configuration, configuration): 8 layers, vocabulary 400."""
    return work / "target", *target_files.read_target_config(work / "target")


def configure(target, *argv, checkpoint=None, mask=7):
    """(flat configuration, auxiliary layers) of a command line; mask: given as well, as all rows have a token."""
    given = [] if mask is None else ["--mask_token_id", mask]
    args = parse(*given, *argv)
    block_config.check_flags(args, vars(parse()))
    found = block_config.configure_draft(args, *target, checkpoint, None if checkpoint else args.draft_model_config)
    block_config.check_shape(args, found[0])
    setup.say_notes(found[0], target[1])
    assert draft_files.check_config(found[0]) == []
    return found


def refused(capsys, target, *argv, **options):
    with pytest.raises(SystemExit) as stop:
        configure(target, *argv, **options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


# --- derived ---


def test_the_derived_configuration(target, capsys):
    config, layers = configure(target)
    text = target[1]
    assert layers == [2, 3, 4, 5, 6]  # round(1 + i (8 - 4) / 4) + 1
    assert config["dflash_config"] == {"mask_token_id": 7, "target_layer_ids": [1, 2, 3, 4, 5]}
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert config["layer_types"] == [FULL] * 5 and config["block_size"] == 8 and config["num_target_layers"] == 8
    assert config["hidden_size"] == text.hidden_size and config["rope_theta"] == text.rope_parameters["rope_theta"]
    assert config["draft_vocab_size"] == config["vocab_size"] == text.vocab_size
    assert not {"is_causal", "sliding_window", "use_sliding_window", "markov_rank"} & config.keys()
    assert "mask_token_id 7: as given" in capsys.readouterr().out


def test_the_derived_configuration_of_dspark(target):
    config, layers = configure(target, "--algorithm", "dspark", "--num_layers", 2)
    assert config["architectures"] == ["Qwen3DSparkModel"] and layers == [2, 6]
    assert config["target_layer_ids"] == [1, 5] and config["mask_token_id"] == 7
    heads = {"markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True}
    assert heads.items() <= config.items() and config["confidence_head_with_markov"]
    assert "dflash_config" not in config


@pytest.mark.parametrize(
    ("flags", "causal", "windows", "key"),
    [
        ([], False, 0, None),
        (["--sliding_window", 16], True, 16, None),  # what both engines make of sliding_attention
        (["--causal_blocks"], True, 0, True),
        (["--causal_blocks", "false"], False, 0, None),
        (["--sliding_window", 16, "--causal_blocks"], True, 16, None),
        (["--sliding_window", 16, "--causal_blocks", "false"], False, 16, False),
    ],
)
def test_windows_and_causality(target, flags, causal, windows, key):
    config, _ = configure(target, "--num_layers", 2, *flags)
    assert block_files.causal_layers(config) == [causal] * 2
    assert draft_files.windows(config) == [windows] * 2
    assert config.get("is_causal") is key  # written only where the kinds of the layers say otherwise
    assert ("use_sliding_window" in config) == bool(windows)


@pytest.mark.parametrize(
    ("count", "layers", "expected"),
    [
        (36, 5, [2, 10, 18, 26, 34]),  # Qwen3-8B's release: 1, 9, 17, 25, 33 from 0
        (32, 5, [2, 9, 16, 23, 30]),
        (28, 1, [15]),
        (28, 6, [2, 7, 12, 16, 21, 26]),  # round(1 + 24 i / 5) = 1, 5.8, 10.6, 15.4, 20.2, 25
        (8, 5, [2, 3, 4, 5, 6]),
        (2, 1, [2]),
    ],
)
def test_the_default_auxiliary_layers(count, layers, expected):
    assert block_config.default_target_layers(count, layers) == expected


def test_a_target_without_that_many_layers(capsys):
    with pytest.raises(SystemExit):
        block_config.default_target_layers(6, 5)
    error = capsys.readouterr().err
    assert "a target of 6 layers" in error and "--target_layer_ids within 1..6, or --num_layers 3" in error
    assert block_config.default_target_layers(6, 3) == [2, 3, 4]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--markov_rank", 4], "markov_rank is dspark's: drop it, or give --algorithm dspark"),
        (["--num_layers", 8], "num_hidden_layers 8: a draft has fewer layers than its target, here 8"),
        (["--num_layers", 6], "num_layers 6: a target of 8 layers"),
        (["--target_layer_ids", 3, 2], "target_layer_ids [3, 2]: they must ascend within 1..8"),
        (["--target_layer_ids", 3, 9], "they must ascend within 1..8"),
        (["--mask_token_id", 400], "mask_token_id 400 is not a row of the embedding, which has 400"),
        (["--sliding_window", 4], "sliding_window 4 is less than block_size 8"),
        (["--draft_vocab_size", 401], "draft_vocab_size 401 is not within 1..400"),
        (["--block_size", 600, "--max_length", 512], "block_size 600 needs 601 tokens, max_length is 512"),
        (["--position_weights", "dpace", "--dflash_decay_gamma", 5], "dflash_decay_gamma is of position_weights decay"),
    ],
)
def test_what_cannot_be_trained_is_one_line(target, capsys, flags, expected):
    assert expected in refused(capsys, target, *flags)


def test_any_number_of_auxiliary_layers(target):
    config, layers = configure(target, "--num_layers", 2, "--target_layer_ids", 1, 4, 8)
    assert layers == [1, 4, 8] and config["dflash_config"]["target_layer_ids"] == [0, 3, 7]
    assert draft_files.expected_tensors(config)["fc.weight"][1] == 3 * config["hidden_size"]


def test_the_context_of_the_target_is_the_drafts():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    text = LlamaConfig(**tiny.llama_config().to_dict() | {"rope_parameters": rope, "max_position_embeddings": 512})
    given = block_config.with_flags({}, parse("--num_layers", 2, "--mask_token_id", 1))
    config, _ = block_config.configure(text, text, given, "a draft")
    assert config["rope_theta"] == 5e5 and config["max_position_embeddings"] == 512
    assert {"rope_type": "llama3", "factor": 8.0}.items() <= config["rope_scaling"].items()
    assert Qwen3Config(**config).rope_parameters["factor"] == 8.0  # as the engines read it


# --- the mask ---


class Tokens:
    """A tokenizer with these tokens, by id."""

    def __init__(self, *tokens, pad=None):
        self.tokens = tokens
        self.bos_token_id = 0
        self.eos_token_id = 1
        self.pad_token_id = tokens.index(pad) if pad else None
        self.unk_token_id = None
        self.chat_template = "<s>[INST]"
        special = [i for i, token in enumerate(tokens) if token[0] in "<["]
        self.added_tokens_decoder = {i: AddedToken(tokens[i], special=True) for i in special}

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, i):
        return self.tokens[i]


@pytest.mark.parametrize(
    ("tokenizer", "rows", "mask", "why"),
    [
        (Tokens("<s>", "</s>", "a"), 6, 3, "the first unused row of the embedding, which has 6"),
        (Tokens("<s>", "</s>", "<|MASK|>", "a"), 6, 2, "<|MASK|>"),  # SGLang compares the id of this name
        (Tokens("<s>", "</s>", "a", "<|reserved_special_token_1|>", "<|reserved_special_token_0|>"), 5, 3, "reserved"),
        (Tokens("<s>", "</s>", "<|fim_pad|>", "[unused0]"), 4, 3, "[unused0]"),
        (Tokens("<s>", "</s>", "<|fim_pad|>", "[unused0]", pad="[unused0]"), 4, 2, "<|fim_pad|>"),
        (Tokens("<s>", "</s>", "<repo>", "<file>", "[INST]"), 5, 3, "<file>, which the chat template does not have"),
    ],
)
def test_the_mask_is_found(tokenizer, rows, mask, why):
    found, said = block_config.find_mask_token(tokenizer, rows)
    assert found == mask and why in said


def test_a_tokenizer_without_a_mask(capsys):
    with pytest.raises(SystemExit):
        block_config.find_mask_token(Tokens("<s>", "</s>", "[INST]", "a"), 4)
    assert "give --mask_token_id, the id of a token within 0..3" in capsys.readouterr().err


def test_the_mask_is_said(work, target, capsys):
    folder, text, _ = target
    padded = LlamaConfig(**text.to_dict() | {"vocab_size": 448})
    config, _ = configure((folder, padded, padded), "--num_layers", 2, mask=None)
    tokens = target_files.load_tokenizer(folder).get_vocab()
    assert block_files.mask_token_id(config) == max(tokens.values()) + 1 == 400
    assert "mask_token_id 400: the first unused row of the embedding, which has 448" in capsys.readouterr().out
    config, _ = configure(target, "--num_layers", 2, mask=None)
    assert block_files.mask_token_id(config) == tokens["<|end_of_text|>"]


# --- given ---


def test_a_configuration_of_others(target, tmp_path):
    """z-lab's keys; sizes of the file, vocabulary and length of the target."""
    text = target[1]
    keys = {
        "architectures": ["DFlashDraftModel"], "block_size": 4, "num_hidden_layers": 2, "num_target_layers": 8,
        "dflash_config": {"mask_token_id": 9, "target_layer_ids": [1, 6]}, "layer_types": [FULL] * 2,
        "intermediate_size": 72, "model_type": "qwen3", "hidden_size": text.hidden_size, "dtype": "float16",
        "vocab_size": 400, "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": True,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys))
    config, layers = configure(target, "--draft_model_config", path, mask=None)
    assert layers == [2, 7] and config["intermediate_size"] == 72 and config["block_size"] == 4
    assert block_files.mask_token_id(config) == 9 and config["rope_theta"] == text.rope_parameters["rope_theta"]
    config, layers = configure(target, "--draft_model_config", path, "--block_size", 6, mask=3)
    assert (config["block_size"], block_files.mask_token_id(config)) == (6, 3)


def test_a_decoder_of_the_target_gives_its_sizes(target, tmp_path):
    path = tmp_path / "config.json"
    layer = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "tie_word_embeddings": 1,
    }
    path.write_text(json.dumps({**layer, "intermediate_size": 72}))
    config, layers = configure(target, "--draft_model_config", path)
    assert config["num_hidden_layers"] == 3 and layers == [2, 4, 6] and config["intermediate_size"] == 72


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"architectures": ["Qwen3DSparkModel"]}, "is of a dspark draft: give --algorithm dspark"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "is of a draft of another kind, eagle3"),
        ({"speculators_model_type": "eagle3", "transformer_layer_config": {}}, "another kind, eagle3"),
        ({"speculators_model_type": "dflash"}, "transformer_layer_config is missing"),
        ({"architectures": ["DFlashDraftModel"], "hidden_size": 17}, "was made for another target"),
        ({"architectures": ["DFlashDraftModel"], "attention_bias": True}, "attention_bias is true, not false"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"target_layer_ids": ["1"]}}, "target_layer_ids"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"projector_type": "domino"}}, "projector_type"),
        ({"architectures": ["DFlash2DraftModel"]}, "another kind, ['DFlash2DraftModel']"),
        ({"architectures": ["DFlashDraftModel"], "num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"architectures": ["DFlashDraftModel"], "num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"dflash_config": [3]}, "dflash_config is [3], not a JSON object"),
        ({"speculators_model_type": "dflash", "transformer_layer_config": {"layer_types": 5}}, "layer_types is 5"),
        (
            {
                "speculators_model_type": "dflash",
                "transformer_layer_config": {"num_hidden_layers": 2},
                "aux_hidden_state_layer_ids": ["a"],
            },
            "layer_ids",
        ),
    ],
)
def test_a_configuration_that_is_refused(target, tmp_path, capsys, keys, expected):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys))
    assert expected in refused(capsys, target, "--draft_model_config", path)


@pytest.mark.parametrize("key", ["enable_confidence_head", "confidence_head_with_markov"])
def test_dspark_without_its_confidence_is_refused(target, key, capsys):
    """The trainer always has it; the first checkpoint would not be complete."""
    args = parse("--algorithm", "dspark", "--num_layers", 2)
    config, _ = configure(target, "--algorithm", "dspark", "--num_layers", 2)
    block_config.check_shape(args, config)
    with pytest.raises(SystemExit):
        block_config.check_shape(args, {**config, key: False})
    assert f"has {key} false" in capsys.readouterr().err


def test_eagle3_refuses_block_drafts(target, tmp_path, capsys):
    """Their configurations and their weights."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["DFlashDraftModel"]}))
    weights = written_drafts.write(tmp_path / "draft", base=written_drafts.DSPARK)
    args = train_eagle3.parse_args(["--target_model_path", "M", "--draft_model_config", str(path)])
    for checkpoint, source, algorithm in ((None, str(path), "dflash"), (weights, None, "dspark")):
        with pytest.raises(SystemExit):
            train_eagle3.draft_config.configure_draft(args, *target, checkpoint, source)
        assert f"start train_dflash.py with --algorithm {algorithm}" in capsys.readouterr().err


# --- a training that is continued ---


@pytest.fixture(scope="module")
def checkpoint(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    config, _ = configure(target, "--num_layers", 2, "--block_size", 4)
    config = config | {"torch_dtype": "float32"}
    draft_files.write_draft(folder, config, written_drafts.random_tensors(config))
    return folder


def test_a_checkpoint_keeps_its_configuration(target, checkpoint, capsys):
    config, layers = configure(target, checkpoint=checkpoint)
    there = json.loads((checkpoint / "config.json").read_text())
    assert config == there and layers == [2, 6]
    assert f"as {checkpoint} has it" in capsys.readouterr().out
    assert configure(target, "--num_layers", 2, "--block_size", 4, checkpoint=checkpoint)[0] == config
    assert configure(target, "--draft_model_config", checkpoint, checkpoint=checkpoint)[0] == config


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--algorithm", "dspark"], "is of a dflash draft: give --algorithm dflash"),
        (["--num_layers", 3], "num_hidden_layers 3, there 2: drop them"),
        (["--block_size", 8], "block_size 8, there 4: drop them"),
        (["--mask_token_id", 1], "mask_token_id 1, there"),
        (["--sliding_window", 16], "sliding_window 16, there 0"),
        (["--causal_blocks"], "causal_blocks True, there False"),
        (["--target_layer_ids", 1, 2, 3], "reads 2 layers"),
    ],
)
def test_flags_that_are_not_the_checkpoints(target, checkpoint, capsys, flags, expected):
    assert expected in refused(capsys, target, *flags, checkpoint=checkpoint)


# --- all of it ---


def test_a_trainer_is_prepared_without_flags_of_eagle3(work, tmp_path, capsys):
    ranks.start_distributed(20)
    argv = ["--target_model_path", work / "target", "--data_path", work / "data", "--output_dir", tmp_path / "out"]
    args = parse(*argv, "--num_layers", 2, "--mask_token_id", 7, "--draft_vocab_size", 150)
    default = vars(parse("--target_model_path", work / "target"))
    prepared = setup.prepare(args, default, None, block_config)
    assert prepared.layers == [2, 6] and len(prepared.d2t) == 150
    assert prepared.draft_config["draft_vocab_size"] == 150
    tensors = draft_files.expected_tensors(prepared.draft_config)
    assert tensors["lm_head.weight"] == (150, prepared.draft_config["hidden_size"]) and torch.is_tensor(prepared.d2t)
    assert "SGLang" in capsys.readouterr().out  # which has no reduced vocabulary
