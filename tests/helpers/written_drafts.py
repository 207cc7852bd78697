"""Small drafts with random weights, without a target and a training: EAGLE-3's, DFlash's and DSpark's."""

import torch

from core import draft_files

CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_theta": 500000.0,
    "max_position_embeddings": 512,
    "vocab_size": 40,
    "draft_vocab_size": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 3,
}
# By hand: fc 16 x 48, four norms of 16, q 24 x 32, k and v 12 x 32, o 16 x 24, three of the MLP 16 x 24, head 40 x 16.
PARAMETERS = 768 + 4 * 16 + 768 + 2 * 384 + 384 + 3 * 384 + 640

DFLASH = CONFIG | {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 2, "num_target_layers": 6,
    "block_size": 4, "layer_types": ["full_attention"] * 2, "rope_scaling": None,
    "dflash_config": {"mask_token_id": 39, "target_layer_ids": [1, 3]},
}  # fmt: skip
DSPARK = {key: value for key, value in DFLASH.items() if key != "dflash_config"} | {
    "architectures": ["Qwen3DSparkModel"], "mask_token_id": 39, "target_layer_ids": [1, 3], "markov_rank": 5,
    "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True,
}  # fmt: skip


def random_tensors(config, seed=0):
    """All tensors of a draft, in the config's dtype; a reduced vocabulary is a random one."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])
    shapes = draft_files.expected_tensors(config)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if "d2t" in tensors:
        ids = torch.randperm(config["vocab_size"], generator=generator)[: config["draft_vocab_size"]].sort().values
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill(0, ids, True)
    return tensors


def write(folder, seed=0, base=CONFIG, **changes):
    """A complete draft in a new folder, in the flat form."""
    config = base | changes
    draft_files.write_draft(folder, config, random_tensors(config, seed))
    return folder
