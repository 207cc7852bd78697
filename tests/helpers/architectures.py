"""Tiny random models without tokenizers, one of each architecture that the target's code treats in its own way."""

import torch
from transformers import AutoModelForCausalLM

LAYERS, VOCABULARY = 8, 97
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
# name: (configuration class, its own options, expected (logit scale, soft cap), are sequences packed?)
FAMILIES = {
    "llama": ("LlamaConfig", {"head_dim": 8}, (1.0, None), True),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}, (1.0, None), True),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, (1.0, None), True),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                                    "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}, (1.0, 5.0), True),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}, (1.0, None), True),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                                      "attention_multiplier": 0.3}, (0.125, None), True),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}, (0.0625, None), True),
    "phi": ("PhiConfig", {}, (1.0, None), True),  # a bias on the head
    "qwen3 experts": ("Qwen3MoeConfig", dict(**EXPERTS, num_experts=4, moe_intermediate_size=16), (1.0, None), True),
    "mistral": ("MistralConfig", {"head_dim": 8, "sliding_window": 6}, (1.0, None), True),
    "gpt-oss": ("GptOssConfig", dict(**EXPERTS, num_local_experts=4, sliding_window=6), (1.0, None), True),  # sinks
    "deepseek": ("DeepseekV3Config", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                                      "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
                                      "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                                      "num_key_value_heads": 4, "first_k_dense_replace": 2}, (1.0, None), True),  # MLA
    # These keep to their own attention.
    "llama 4": ("Llama4TextConfig", {"head_dim": 8, "attention_chunk_size": 6, "intermediate_size_mlp": 48,
                                     "num_local_experts": 2, "num_experts_per_tok": 1}, (1.0, None), False),  # chunks
    "qwen3-next": ("Qwen3NextConfig", dict(**EXPERTS, num_experts=4, moe_intermediate_size=16,
                                           shared_expert_intermediate_size=16, linear_num_key_heads=2,
                                           linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8),
                   (1.0, None), False),  # linear attention
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, (1.0, None), True),
}  # fmt: skip


def write_model(folder, config, seed=0, **options):
    """A random model in `folder` whose norms and biases are random too, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder, **options)
    return folder
