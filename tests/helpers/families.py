"""Families of targets, each in its real form: tiny random models, tokenizers and files as they are published.

A family is a row of FAMILIES and a chat template, in templates/ or, if --chat_template has no name of its own for it,
in families/. What its draft has to be stands in the row as well.
"""

import json
from collections import namedtuple
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from helpers import tiny

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
    (path,) = Path(__file__).resolve().parents[1].glob(f"*/{family.template}.jinja")
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
