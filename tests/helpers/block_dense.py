"""The objective of block drafts in its plain dense form: what the product is timed against.

One attention with a mask over [context, all blocks], full logits of every prediction and teacher, plain autograd. It
shares no forward code with the trainer: it is written on the draft's weights and configuration alone (the rotary
angles excepted). DFlash with the cross-entropy and the decay weights.
"""

import math

import torch
import torch.nn.functional as F

from helpers.dense import rms_norm, rotate, teach, wide


def layer(config, w, hidden, context, turned, turned_context, hidden_pairs):
    """hidden [M, H] of all blocks, context [T, H]; hidden_pairs bool [M, T + M]: keys not seen -> [M, H]."""
    eps, dim = config["rms_norm_eps"], config["head_dim"]
    shared = config["num_attention_heads"] // config["num_key_value_heads"]

    def heads(name, x):
        return F.linear(x, w[f"self_attn.{name}_proj.weight"]).unflatten(-1, (-1, dim)).transpose(0, 1)

    def normed_heads(name, x, cos, sin):
        return rotate(rms_norm(heads(name, x), w[f"self_attn.{name}_norm.weight"], eps), cos, sin)

    x = rms_norm(hidden, w["input_layernorm.weight"], eps)
    q = normed_heads("q", x, *turned)
    k = torch.cat([normed_heads("k", context, *turned_context), normed_heads("k", x, *turned)], dim=1)
    v = torch.cat([heads("v", context), heads("v", x)], dim=1)
    k, v = (part.repeat_interleave(shared, dim=0) for part in (k, v))
    scores = (q * dim**-0.5 @ k.transpose(1, 2)).masked_fill(hidden_pairs, -math.inf)  # [A, M, T + M]
    mixed = scores.softmax(dim=-1, dtype=wide(q[:0]).dtype).to(q.dtype) @ v
    hidden = hidden + F.linear(mixed.transpose(0, 1).flatten(1), w["self_attn.o_proj.weight"])
    x = rms_norm(hidden, w["post_attention_layernorm.weight"], eps)
    gate = F.silu(F.linear(x, w["mlp.gate_proj.weight"])) * F.linear(x, w["mlp.up_proj.weight"])
    return hidden + F.linear(gate, w["mlp.down_proj.weight"])


def objective(draft, input_ids, position_ids, document_ids, auxiliary, last, head, anchors, d2t, gamma, mask_token):
    """The loss of blocks at `anchors` [N], all predictions of which count; the other arguments as of helpers.dense."""
    config, w = draft.config, dict(draft.named_parameters())
    size = config["block_size"]
    known = torch.arange(len(d2t), device=d2t.device) + d2t
    p, _, best = teach(last, head, known)  # of all tokens
    drawn = torch.isin(best, known)
    dtype = w["fc.weight"].dtype
    context = rms_norm(F.linear(auxiliary.to(dtype), w["fc.weight"]), w["hidden_norm.weight"], config["rms_norm_eps"])

    steps = torch.arange(size, device=anchors.device)
    tokens = torch.full((len(anchors), size), mask_token, device=anchors.device)
    tokens[:, 0] = input_ids[anchors]
    hidden = F.embedding(tokens.flatten(), draft.embedding).to(dtype)  # [M, H]
    block = torch.arange(len(anchors), device=anchors.device).repeat_interleave(size)  # [M]
    order = torch.arange(len(input_ids), device=anchors.device)
    of_block = anchors[block]
    unseen = (document_ids[of_block][:, None] != document_ids) | (order >= of_block[:, None])
    hidden_pairs = torch.cat([unseen, block[:, None] != block], dim=1)
    turned = draft.rotary((position_ids[anchors][:, None] + steps).flatten(), dtype)
    turned_context = draft.rotary(position_ids, dtype)
    for n in range(config["num_hidden_layers"]):
        prefix = f"layers.{n}."
        of_layer = {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
        hidden = layer(config, of_layer, hidden, context, turned, turned_context, hidden_pairs)

    logits = F.linear(rms_norm(hidden, w["norm.weight"], config["rms_norm_eps"]), draft.head.to(dtype))  # [M, Vd]
    log_q = logits.log_softmax(dim=-1, dtype=wide(logits[:0]).dtype).unflatten(0, (-1, size))[:, 1:]
    teachers = anchors[:, None] + steps[:-1]  # [N, P]
    weights = torch.exp(-steps[:-1] / gamma)
    losses = -(p[teachers] * log_q).sum(dim=-1) * drawn[teachers]
    return (weights * losses).sum()
