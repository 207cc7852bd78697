"""Families of targets: from a tiny random model of each, in its real form, to a checked draft, through every stage.

A family is a row of FAMILIES and a chat template, in templates/ or, if --chat_template has no name of its own for it,
in families/. What its draft has to be stands in the row as well.
"""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import build_vocab_mapping
import evaluate_draft
import export_draft
import prepare_data
import train_eagle3
from core import dataloader, draft_config, draft_files, target_model
from helpers import tiny
from helpers.families import (
    DEEPSEEK_ROPE,
    DENSE,
    FAMILIES,
    GEMMA_ROPE,
    LLAMA3_ROPE,
    SIZES,
    publish_in_mxfp4,
    write_target,
)

torch.set_num_threads(1)  # the models are so small that threads only wait for each other
DRAFT_VOCABULARY = 160
ALIKE = (  # slow: much as others are
    "qwen2",
    "smollm3",
    "olmo2",
    "cohere",
    "cohere2",
    "gemma2",
    "gemma3",
    "glm4 experts",
    "mixtral",
    "minimax",
    "qwen3 next",
    "mistral3 that sees",
    "qwen3 that sees",
)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in FAMILIES]
)
def made(request, tmp_path_factory):
    """(family, folder of its target, plain model of transformers, tokenizer)."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("target")
    return family, folder, *write_target(folder, family)


def test_hidden_states_and_logits_are_those_of_transformers(made):
    """Of two sequences behind one another; and the head, the norm and the table are found alone too."""
    _, folder, model, tokenizer = made
    target, parts = target_model.load(folder), torch.randint(1, len(tokenizer), (40,)).split([23, 17])
    assert target.layer_ids == [2, 4, 5]
    auxiliary, last = target.hidden_states(torch.cat(parts), [23, 17])
    for ids, found, final in zip(parts, auxiliary.split([23, 17]), last.split([23, 17]), strict=True):
        with torch.no_grad():
            output = model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        for index, states in zip(target.layer_ids, found.chunk(3, dim=-1), strict=True):
            torch.testing.assert_close(states, output.hidden_states[index][0], rtol=1e-4, atol=1e-4)
        logits = output.logits[0]
        torch.testing.assert_close(target.head.logits(final), logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))

    alone = target_model.load_head(folder, "cpu", target.layer_ids)
    assert torch.equal(alone.head.weight, target.head.weight)
    assert (alone.head.scale, alone.head.softcap) == (target.head.scale, target.head.softcap)
    assert torch.equal(alone.norm(last), target.decoder.norm(last))
    assert torch.equal(draft_files.read_embedding(folder), alone.embedding)
    assert torch.equal(alone.embedding, target.embedding)


# ---------------------------------------------------------------------------- the stages
def run(script, **flags):
    """A script's main with these flags, in this process."""
    return script.main(script.parse_args([part for name, value in flags.items() for part in (f"--{name}", str(value))]))


def test_stages(made, tmp_path, capsys):
    family, target, model, tokenizer = made
    chats = tiny.conversations(12, 2)
    tiny.write_jsonl(tmp_path / "chats.jsonl", chats)

    run(
        prepare_data,
        dataset=tmp_path / "chats.jsonl",
        target_model_path=target,
        chat_template=family.chat,
        output_path=tmp_path / "data",
        validation_ratio=0.2,
    )
    replies = {message["content"] for chat in chats for message in chat["conversations"][1::2]}
    for line in dataloader.open_data(tmp_path / "data")[0]["train"]:
        supervised = [tokenizer.decode(part) for part in runs(line["input_ids"], line["loss_mask"])]
        assert len(supervised) == 2
        for text in supervised:
            assert any(text.endswith(reply + end) for reply in replies for end in family.end), text
            assert "Question" not in text

    run(
        build_vocab_mapping,
        token_freq_path=tmp_path / "data" / "token_freq.pt",
        draft_vocab_size=DRAFT_VOCABULARY,
        target_model_path=target,
        output_path=tmp_path / "mapping",
    )
    draft = tmp_path / "draft"
    run(
        train_eagle3,
        target_model_path=target,
        data_path=tmp_path / "data",
        d2t_path=tmp_path / "mapping" / "d2t.npy",
        t2d_path=tmp_path / "mapping" / "t2d.npy",
        total_steps=2,
        ttt_length=2,
        draft_global_batch_size=4,
        log_steps=1,
        num_workers=0,
        output_dir=draft,
    )
    assert export_draft.check(draft / "final") == 0
    config = json.loads((draft / "final" / "config.json").read_text())
    assert tuple(config[key] for key in DENSE) == family.draft
    assert (config["rope_theta"], (config["rope_scaling"] or {}).get("rope_type")) == family.rope
    assert (config["hidden_size"], config["draft_vocab_size"]) == (64, DRAFT_VOCABULARY)
    assert config["vocab_size"] == len(tokenizer) + 7 and config["eos_token_id"] == tokenizer.eos_token_id

    # Every text drafted has to be the target's own greedy text, or this ends with exit code 1.
    run(
        evaluate_draft,
        target_model_path=target,
        draft_model_path=draft / "final",
        prompts=tmp_path / "data",
        num_prompts=2,
        max_new_tokens=24,
        num_draft_tokens=3,
        output=tmp_path / "evaluation",
    )
    assert "every text equals the target's own greedy text\n" in capsys.readouterr().out
    for line in (tmp_path / "evaluation" / "generations.jsonl").read_text().splitlines():
        ids, mask = (torch.tensor(json.loads(line)[key]) for key in ("input_ids", "loss_mask"))
        prompt = ids[mask == 0][None]
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}
        own = model.generate(prompt, use_cache=False, **options)[0]
        assert own.tolist() == ids.tolist()


def runs(ids, mask):
    """The token ids of each run of ones in the mask."""
    cuts = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True) if mask[a]]


# ---------------------------------------------------------------------------- forms of files
def test_gpt_oss_as_it_is_published(tmp_path):
    write_target(tmp_path, FAMILIES["gpt-oss"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    values = publish_in_mxfp4(tmp_path)
    assert len(values) == 2 * 8
    plain.load_state_dict(plain.state_dict() | values)
    target, ids = target_model.load(tmp_path), torch.arange(1, 30)
    assert target.embedding.dtype == torch.bfloat16
    auxiliary, last = target.hidden_states(ids, [len(ids)])
    with torch.no_grad():
        output = plain(input_ids=ids[None], output_hidden_states=True, use_cache=False)
    assert torch.equal(auxiliary, torch.cat([output.hidden_states[i][0] for i in (2, 4, 5)], dim=-1))
    assert torch.equal(last, output.hidden_states[-1][0])


def test_a_wrapper_that_leaves_out_its_familys_defaults(tmp_path, capsys):
    """As the files of Gemma 3, which say neither the size of the vocabulary nor the number of heads."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    wrapper = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    assert build_vocab_mapping.read_vocab_size(tmp_path) == transformers.Gemma3TextConfig().vocab_size == 262208
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    with pytest.raises(SystemExit):
        build_vocab_mapping.read_vocab_size(tmp_path)
    assert "has no vocab_size: give --target_vocab_size" in capsys.readouterr().err


def test_a_family_with_several_states_a_token_is_refused(tmp_path, capsys):
    """Gemma 3n's layers pass on several copies of the residual stream."""
    options = {"laurel_rank": 8, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "altup_num_inputs": 2}
    options |= {"activation_sparsity_pattern": [0.0] * 8, "vocab_size": 97, "vocab_size_per_layer_input": 97}
    options |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    AutoModelForCausalLM.from_config(transformers.Gemma3nTextConfig(**SIZES, **options)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        target_model.load(tmp_path)
    assert stop.value.code == 2
    assert "the layers of model_type gemma3n_text give several states a token" in capsys.readouterr().err


# ---------------------------------------------------------------------------- drafts for targets of real sizes
# hub id: (configuration class, what the model's config.json says, DENSE of the draft, its rope type). Written down by
# hand; where the sizes are in the file they are the draft's too, but for experts and latent attention.
REAL = {
    "meta-llama/Llama-3.1-8B-Instruct": ("LlamaConfig", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}}, (14336, 32, 8, 128), "llama3"),
    "Qwen/Qwen3-8B": ("Qwen3Config", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128}, (12288, 32, 8, 128), None),
    "Qwen/Qwen3-30B-A3B": ("Qwen3MoeConfig", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}, (6144, 32, 4, 128), None),
    "openai/gpt-oss-20b": ("GptOssConfig", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_experts_per_tok": 4, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64}, (11520, 64, 8, 64), "yarn"),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("MixtralConfig", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_experts_per_tok": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8}, (28672, 32, 8, 128), None),
    "deepseek-ai/DeepSeek-V3": ("DeepseekV3Config", {
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_experts_per_tok": 8,
        "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "v_head_dim": 128}, (18432, 64, 8, 128), None),
    "google/gemma-3-27b-it": ("Gemma3Config", {"text_config": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128, "rope_parameters": GEMMA_ROPE}}, (21504, 32, 16, 128), "linear"),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": ("Mistral3Config", {"text_config": {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128}}, (32768, 32, 8, 128), None),
    "microsoft/phi-4": ("Phi3Config", {
        "hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40, "num_key_value_heads": 10},
        (17920, 40, 10, 128), None),
    # Experts without a dense size in the file: those of a token and the one that all share.
    "Qwen/Qwen3.5 with experts": ("Qwen3_5MoeTextConfig", {
        "hidden_size": 2048, "moe_intermediate_size": 512, "num_experts_per_tok": 8,
        "shared_expert_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256},
        (4608, 16, 2, 256), None),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_draft_of_a_real_target(name):
    kind, options, dense, rope = REAL[name]
    whole = getattr(transformers, kind)(**options)
    config, _ = draft_config.configure(whole.get_text_config(), whole)
    assert tuple(config[key] for key in DENSE) == dense
    assert (config["rope_scaling"] or {}).get("rope_type") == rope
    assert config["hidden_size"] == options.get("text_config", options)["hidden_size"]
    # A server's ranks, 2, 4 or 8, divide the heads, and 2 the groups, wherever they divide the target's.
    assert all(config["num_attention_heads"] % ranks == 0 for ranks in (2, 4, 8))
    assert config["num_key_value_heads"] % 2 == 0


def test_what_a_family_says_of_its_own_layers_stays_out_of_the_drafts_rope():
    rope = {
        **DEEPSEEK_ROPE,
        "beta_fast": 32,
        "truncate": None,
        "partial_rotary_factor": 0.5,
        "attention_factor": 1.5,
    }
    rope |= {"mrope_section": [4, 4, 4], "llama_4_scaling_beta": 0.1}
    text = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    kept = {"rope_type", "factor", "original_max_position_embeddings", "mscale", "mscale_all_dim", "beta_fast"}
    config, _ = draft_config.configure(text, text)
    assert config["rope_scaling"] == {key: rope[key] for key in kept} and config["rope_theta"] == 150000.0
