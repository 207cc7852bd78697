"""Families of targets: from a tiny random model of each, in its real form, to a checked draft, through every stage.

A family is a row of FAMILIES and a chat template, in templates/ or, if --chat_template has no name of its own for it,
in families/. What its draft has to be stands in the row as well.
"""

import json
from collections import namedtuple
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import build_vocab_mapping
import evaluate_draft
import export_draft
import prepare_data
import train_eagle3
from core import dataloader, draft_files, target_model

torch.set_num_threads(1)  # the models are so small that threads only wait for each other
DRAFT_VOCABULARY = 160
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
NARROW, TIED = {"head_dim": None}, {"tie_word_embeddings": True}  # None: left out, the family decides
EXPERTS = {"num_experts_per_tok": 3, "num_local_experts": 4}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "head_dim": None, "num_key_value_heads": 4, "moe_intermediate_size": 40, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
GRANITE_SCALES = {
    "logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 128}
DEEPSEEK_ROPE = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 256,
}  # fmt: skip
QWEN_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 4, 4]}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA2 = {
    "query_pre_attn_scalar": 24, "sliding_window": 16, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
GEMMA3 = {"query_pre_attn_scalar": 24, "sliding_window": 16, "rope_parameters": GEMMA_ROPE}
# Two kinds of layers that differ in the size of their heads; no embeddings of their own for the layers.
GEMMA4 = {"sliding_window": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
SIGHT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_SIGHT = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
LLAMA4_SIGHT = {**SIGHT, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}

LLAMA3 = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA4 = ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>"]
CHATML = [None, "<|im_end|>", "<|im_start|>", "<|endoftext|>"]
HARMONY = ["<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]"]
GEMMA = ["<bos>", "<end_of_turn>", "<start_of_turn>", "<eos>"]
PHI3 = ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
GRANITE = [None, "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"]
GLM = ["[gMASK]", "<|user|>", "<sop>", "<|assistant|>", "<|system|>", "<|observation|>"]
COHERE = ["<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
MINIMAX = ["]~!b[", "[e~[", "]~b]"]

# config: of transformers, with `options` beside SIZES; a wrapper's text_config gets them, `sight` is its vision_config.
# tokens: the first token, the one that ends, others. cut: how tokenizers of the family cut text, into bytes or into
# pieces that carry the blank before a word. template: its file; chat: its name for prepare_data.py. end: what
# may close a reply. draft: the derived intermediate size, heads, key-value heads and size of a head; rope: its theta
# and type.
Family = namedtuple("Family", "config options tokens cut template chat end draft rope sight")
DENSE = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
OWN, PLAIN = (96, 4, 2, 24), (10000.0, None)


def row(config, options, tokens, template, chat="auto", end=None, cut="bytes", draft=OWN, rope=PLAIN, sight=None):
    return Family(config, options, tokens, cut, template, chat, end or (tokens[1],), draft, rope, sight)


FAMILIES = {
    # dense
    "llama": row("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}, LLAMA3, "llama3", "llama3", rope=(5e5, "llama3")),
    "mistral": row("MistralConfig", {"sliding_window": 16}, MISTRAL, "mistral", cut="pieces"),
    "qwen2": row("Qwen2Config", NARROW, CHATML, "chatml", "qwen", draft=(96, 4, 2, 16)),
    "qwen3": row("Qwen3Config", TIED, CHATML, "qwen3", "qwen"),
    "smollm3": row("SmolLM3Config", TIED, CHATML, "chatml", "qwen", rope=(2e6, None)),
    "phi3": row("Phi3Config", {**NARROW, "rope_parameters": LONGROPE}, PHI3, "phi3", end=("<|end|>",), cut="pieces",
                draft=(96, 4, 2, 16)),
    "granite": row("GraniteConfig", {**NARROW, **TIED, **GRANITE_SCALES}, GRANITE, "granite", draft=(96, 4, 2, 16)),
    "glm4": row("Glm4Config", {}, GLM, "glm", "glm"),
    "olmo2": row("Olmo2Config", NARROW, ["<|endoftext|>", "<|endoftext|>"], "olmo2", draft=(96, 4, 2, 16)),
    "cohere": row("CohereConfig", {**NARROW, **TIED, "logit_scale": 0.0625, "rope_parameters": {"rope_theta": 8e6}},
                  COHERE, "cohere", draft=(96, 4, 2, 16), rope=(8e6, None)),
    "cohere2": row("Cohere2Config", {**TIED, "logit_scale": 0.25, "sliding_window": 16}, COHERE, "cohere"),
    "gemma2": row("Gemma2Config", {**TIED, **GEMMA2}, GEMMA, "gemma-3", cut="pieces"),
    "gemma3": row("Gemma3TextConfig", {**TIED, **GEMMA3}, GEMMA, "gemma-3", cut="pieces", rope=(1e6, "linear")),
    "gemma4": row("Gemma4TextConfig", {**TIED, **GEMMA4}, GEMMA, "gemma-3", cut="pieces", rope=(1e6, None)),
    "qwen3.5": row("Qwen3_5TextConfig", LINEAR, CHATML, "qwen3", "qwen"),
    # experts: where a dense size stands beside theirs it is the draft's, else those of a token count together
    "qwen3 experts": row("Qwen3MoeConfig", {**EXPERTS, "moe_intermediate_size": 40}, CHATML, "qwen3", "qwen"),
    "glm4 experts": row("Glm4MoeConfig", {**EXPERTS, "moe_intermediate_size": 40, "first_k_dense_replace": 1}, GLM,
                        "glm", "glm"),
    "qwen3 next": row("Qwen3NextConfig", {**LINEAR, **EXPERTS, "moe_intermediate_size": 40, "num_experts": 4}, CHATML,
                      "qwen3", "qwen"),
    "mixtral": row("MixtralConfig", {"num_experts_per_tok": 2, "num_local_experts": 4}, MISTRAL, "mistral",
                   cut="pieces", draft=(192, 4, 2, 24), rope=(1e6, None)),
    "gpt-oss": row("GptOssConfig", {**EXPERTS, "sliding_window": 16, "rope_parameters": YARN}, HARMONY, "gpt-oss",
                   "gpt-oss", end=("<|return|>", "<|end|>"), draft=(288, 4, 2, 24), rope=(150000.0, "yarn")),
    "minimax": row("MiniMaxM2Config", EXPERTS, MINIMAX, "minimax", draft=(288, 4, 2, 24), rope=(5e6, None)),
    # latent attention: heads of 128 that fill the hidden size of 64
    "deepseek": row("DeepseekV3Config", {**EXPERTS, **LATENT, "rope_parameters": DEEPSEEK_ROPE}, DEEPSEEK,
                    "deepseek-r1-distill", "deepseek-r1-distill", draft=(96, 1, 1, 128), rope=(150000.0, "yarn")),
    # language models inside ones that see
    "gemma3 that sees": row("Gemma3Config", GEMMA3, GEMMA, "gemma-3", cut="pieces", rope=(1e6, "linear"), sight=SIGHT),
    "mistral3 that sees": row("Mistral3Config", {"model_type": "mistral"}, MISTRAL, "mistral", cut="pieces",
                              sight=SIGHT),
    "qwen3 that sees": row("Qwen3VLConfig", {"rope_parameters": QWEN_ROPE}, CHATML, "chatml", "qwen", rope=(5e6, None),
                           sight=QWEN_SIGHT),
    "llama4 that sees": row("Llama4Config", {"intermediate_size_mlp": 80, "num_local_experts": 2}, LLAMA4, "llama4",
                            draft=(80, 4, 2, 24), rope=(5e5, None), sight=LLAMA4_SIGHT),
}  # fmt: skip
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


# ---------------------------------------------------------------------------- a target of a family
def pieces_tokenizer(tokens):
    """Cuts text as SentencePiece does: a blank belongs to the word behind it, unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", *tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(tiny.TEXTS, trainer)
    # Bytes are no special tokens: only the trainer needed them.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def write_tokenizer(folder, family):
    """The family's tokenizer with its chat template in `folder`; returns it."""
    tokens = [token for token in dict.fromkeys(family.tokens) if token]
    bos, eos = family.tokens[:2]
    (path,) = Path(__file__).parent.glob(f"*/{family.template}.jinja")
    template = path.read_text().rstrip("\n")
    if family.cut == "bytes":
        tokenizer = tiny.tokenizer(400, special_tokens=tokens, chat_template=template, bos_token=bos, eos_token=eos)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces_tokenizer(tokens), bos_token=bos, eos_token=eos)
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_target(folder, family):
    """A tiny random target of the family in `folder`, its norms random too, so that leaving one out shows."""
    tokenizer = write_tokenizer(folder, family)
    options = {**SIZES, **family.options, "vocab_size": len(tokenizer) + 7, "pad_token_id": 0}  # more rows than tokens
    options |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {key: value for key, value in options.items() if value is not None}
    if family.sight:
        options = {"text_config": options, "vision_config": family.sight}
    kind = AutoModelForImageTextToText if family.sight else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(getattr(transformers, family.config)(**options))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return kind.from_pretrained(folder).eval(), tokenizer


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
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def publish_in_mxfp4(folder):
    """Give a gpt-oss target the form of the hub's: experts of 4 bits, 32 values with one exponent, two in a byte.

    Returns the values that the experts then have, {name: [experts, in, out] bfloat16}.
    """
    tensors, values = load_file(folder / "model.safetensors"), {}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for name in [
        name for name in tensors if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj")
    ]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 125, (experts, outputs, inputs // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = torch.tensor(FP4)[torch.stack([blocks & 15, blocks >> 4], dim=-1).long()].flatten(-2)
        scaled = numbers * 2.0 ** (scales.float() - 127)[..., None]
        values[name] = scaled.flatten(-2).transpose(1, 2).bfloat16().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}}
    (folder / "config.json").write_text(json.dumps(config))
    return values


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
    config, _ = draft_files.configure(whole.get_text_config(), whole)
    assert tuple(config[key] for key in DENSE) == dense
    assert (config["rope_scaling"] or {}).get("rope_type") == rope
    assert config["hidden_size"] == options.get("text_config", options)["hidden_size"]
    # A server's ranks, 2, 4 or 8, divide the heads, and 2 the groups, wherever they divide the target's.
    assert all(config["num_attention_heads"] % ranks == 0 for ranks in (2, 4, 8))
    assert config["num_key_value_heads"] % 2 == 0


def test_what_a_family_says_of_its_own_layers_stays_out_of_the_drafts_rope():
    rope = {**DEEPSEEK_ROPE, "beta_fast": 32, "truncate": None, "partial_rotary_factor": 0.5, "attention_factor": 1.5}
    rope |= {"mrope_section": [4, 4, 4], "llama_4_scaling_beta": 0.1}
    text = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    kept = {"rope_type", "factor", "original_max_position_embeddings", "mscale", "mscale_all_dim", "beta_fast"}
    config, _ = draft_files.configure(text, text)
    assert config["rope_scaling"] == {key: rope[key] for key in kept} and config["rope_theta"] == 150000.0
