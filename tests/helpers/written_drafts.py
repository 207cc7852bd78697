"""Small drafts with random weights, without a target and a training."""

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


def write(folder, seed=0, **changes):
    """A complete draft in a new folder, in the flat form."""
    config = CONFIG | changes
    generator = torch.Generator().manual_seed(seed)
    shapes = draft_files.expected_tensors(config)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    draft_files.write_draft(folder, config, tensors)
    return folder
