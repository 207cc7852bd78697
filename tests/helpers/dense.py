"""The training-time test in its plain dense form: what the product must equal, and what it is timed against.

Every slot in every step, whole-sequence matrix products, one softmax over the causal scores and the own-slot columns,
full logits a step, plain autograd. It shares no forward code with the trainer: it is written on the draft's weights and
configuration alone (the rotary angles excepted).
"""

import math

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN


def wide(x):
    """x in fp32 at least: norms and softmaxes of half-precision values are formed in fp32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight, eps):
    """As Llama computes it: normalised in fp32, rounded, then scaled."""
    return weight * F.rms_norm(wide(x), x.shape[-1:], eps=eps).to(x.dtype)


def rotate(x, cos, sin):
    """x [heads, T, D] turned by the angles behind cos, sin [T, D]: first half real part, second half imaginary."""
    real, imaginary = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-imaginary, real], dim=-1) * sin


def first_features(config, w, auxiliary):
    """fc of the auxiliary hidden states [T, n·Ht], behind the norms that the configuration asks for -> [T, H]."""
    eps = config["rms_norm_eps"]
    if config.get("norm_before_fc"):
        auxiliary = rms_norm(auxiliary, w["input_norm.weight"], eps)
    if config.get("fc_norm"):
        layers = config.get("num_aux_hidden_states", 3)
        normed = [rms_norm(chunk, w[f"fc_norm.{n}.weight"], eps) for n, chunk in enumerate(auxiliary.chunk(layers, -1))]
        auxiliary = torch.cat(normed, dim=-1)
    return F.linear(auxiliary, w["fc.weight"])


def attention(q, keys, values, hidden_pairs):
    """q [A, T, D]; keys, values: one [A, T, D] a step so far; hidden_pairs bool [T, T]: step-0 keys not seen."""
    length = q.shape[1]
    q = q * q.shape[-1] ** -0.5
    scores = (q @ keys[0].transpose(1, 2)).masked_fill(hidden_pairs, -math.inf)  # [A, T, T]
    own = [(q * key).sum(-1, keepdim=True) for key in keys[1:]]  # [A, T, 1] each
    weights = torch.cat([scores, *own], dim=-1).softmax(dim=-1, dtype=wide(q[:0]).dtype).to(q.dtype)
    output = weights[..., :length] @ values[0]
    for n, value in enumerate(values[1:]):
        output = output + weights[..., length + n, None] * value
    return output


def layer(config, w, embeds, feature, cos, sin, keys, values, hidden_pairs):
    """One draft layer: embeds, feature [T, H] -> hidden state [T, H]; adds this step's keys and values to the lists."""
    eps, heads, kv_heads = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    normed = rms_norm(feature, w["midlayer.hidden_norm.weight"], eps)
    residual = normed if config.get("norm_before_residual") else feature
    x = torch.cat([rms_norm(embeds, w["midlayer.input_layernorm.weight"], eps), normed], dim=-1)
    q, k, v = (
        F.linear(x, w[f"midlayer.self_attn.{name}_proj.weight"]).unflatten(-1, (-1, config["head_dim"])).transpose(0, 1)
        for name in "qkv"
    )
    keys.append(rotate(k, cos, sin).repeat_interleave(heads // kv_heads, dim=0))
    values.append(v.repeat_interleave(heads // kv_heads, dim=0))
    mixed = attention(rotate(q, cos, sin), keys, values, hidden_pairs).transpose(0, 1).flatten(1)
    hidden = residual + F.linear(mixed, w["midlayer.self_attn.o_proj.weight"])
    x = rms_norm(hidden, w["midlayer.post_attention_layernorm.weight"], eps)
    gate = ACT2FN[config["hidden_act"]](F.linear(x, w["midlayer.mlp.gate_proj.weight"]))
    return hidden + F.linear(gate * F.linear(x, w["midlayer.mlp.up_proj.weight"]), w["midlayer.mlp.down_proj.weight"])


@torch.no_grad()
def teach(last, head, known):
    """From the target's last hidden states [T, Ht] and full logits [T, V]: what it says about each next token.

    Returns the softmax over the draft vocabulary `known` [T, Vd], the share of the whole probability that falls on it
    [T], the argmax over the full vocabulary [T] (the lowest id among equals).
    """
    logits = wide(F.linear(last.to(head.weight.dtype), head.weight, head.bias)) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    drafted = logits[:, known]
    share = (drafted.logsumexp(dim=-1) - logits.logsumexp(dim=-1)).exp()
    return drafted.softmax(dim=-1), share, logits.argmax(dim=-1)


def objective(draft, input_ids, position_ids, document_ids, auxiliary, last, head, supervised, d2t, decay):
    """The loss of one packed batch, the sums behind the metrics and the correct predictions.

    draft: its parameters by their checkpoint names, `config`, `embedding` [V, H] and rotary() are read. input_ids,
    position_ids, document_ids [T] int64; auxiliary [T, n·Ht]; last [T, Ht]: the target's last hidden states; head: its
    output head (core/target_model.py); supervised bool [K, T]; d2t [Vd] int64 offsets; step i weighs decay^i.
    Returns the loss summed over slots and steps (differentiable), float64 [K, 4] (cross-entropy, argmax correct,
    acceptance, count) and bool [K, T].
    """
    config, w, eps = draft.config, dict(draft.named_parameters()), draft.config["rms_norm_eps"]
    known = torch.arange(len(d2t), device=d2t.device) + d2t
    teacher, share, best = teach(last, head, known)
    drawn = torch.isin(best, known)  # elsewhere the draft cannot be right and learns nothing
    order = torch.arange(len(input_ids), device=input_ids.device)
    hidden_pairs = (document_ids[:, None] != document_ids) | (order[:, None] < order)
    feature = first_features(config, w, auxiliary.to(w["fc.weight"].dtype))
    keys, values, loss, sums, correct = [], [], 0.0, [], []
    for i, live in enumerate(supervised):
        embeds = F.embedding(input_ids.roll(-1 - i), draft.embedding).to(feature.dtype)
        cos, sin = draft.rotary(position_ids + i, feature.dtype)
        hidden = layer(config, w, embeds, feature, cos, sin, keys, values, hidden_pairs)
        normed = rms_norm(hidden, w["norm.weight"], eps)
        feature = normed if config.get("norm_output") else hidden
        logits = F.linear(normed, w["lm_head.weight"])  # [T, Vd]
        log_q = logits.log_softmax(dim=-1, dtype=wide(logits[:0]).dtype)
        p, p_share, p_best, p_drawn = (part.roll(-1 - i, dims=0) for part in (teacher, share, best, drawn))
        entropy = torch.where(live & p_drawn, -(p * log_q).sum(dim=-1), 0.0).sum()
        loss = loss + decay**i * entropy
        with torch.no_grad():
            accepted = torch.minimum(p * p_share[:, None], log_q.exp()).sum(dim=-1)
            right = live & (known[logits.argmax(dim=-1)] == p_best)
            parts = (entropy, right.sum(), torch.where(live, accepted, 0.0).sum(), live.sum())
            sums.append(torch.stack([part.double() for part in parts]))
            correct.append(right)
    return loss, torch.stack(sums), torch.stack(correct)
