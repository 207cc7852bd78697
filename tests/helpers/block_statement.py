"""DFlash and DSpark training stated block by block and slot by slot in float64, independent of the trainer's code.

Plain loops over anchors, slots, heads and keys. A block behind anchor a: x[a] and masks at the positions from a on. Its
slots see the context before a, made of the target's states by the same projections, and their own block.
"""

import math

import torch

from helpers.statement import frequencies, rms, rotate, token_loss, window_of

FLOOR = 0.5  # D-PACE's alpha


def project(config, w, name, x, position, freqs):
    """Heads [heads, D] of a vector: q and k are normed per head and turned, v is neither."""
    heads = (w[f"self_attn.{name}_proj.weight"] @ x).view(-1, config["head_dim"])
    if name == "v":
        return heads
    norm = w[f"self_attn.{name}_norm.weight"]
    heads = torch.stack([rms(head, norm, config["rms_norm_eps"]) for head in heads])
    return rotate(heads, position, *freqs)


def attend(config, q, keys):
    """One query [A, D] over keys [(k [G, D], v [G, D])]: [A · D]."""
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    mixed = []
    for head, query in enumerate(q):
        group = head // shared
        scores = torch.stack([query @ k[group] for k, _ in keys]) / math.sqrt(config["head_dim"])
        mixed.append(sum(p * v[group] for p, (_, v) in zip(scores.softmax(0), keys, strict=True)))
    return torch.cat(mixed)


def block(config, weights, embedding, context, anchor_token, anchor, mask_token, causal):
    """Hidden states behind the final norm of the slots of a block whose anchor stands at position `anchor`."""
    eps = config["rms_norm_eps"]
    size = config["block_size"]
    freqs = frequencies(config)
    hidden = [embedding[anchor_token]] + [embedding[mask_token]] * (size - 1)
    for n in range(config["num_hidden_layers"]):
        prefix = f"layers.{n}."
        w = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        window = window_of(config, n)
        seen = [(t, project(config, w, "k", context[t], t, freqs), project(config, w, "v", context[t], t, freqs))
                for t in range(anchor)]  # fmt: skip
        normed = [rms(x, w["input_layernorm.weight"], eps) for x in hidden]
        own = [(anchor + s, project(config, w, "k", x, anchor + s, freqs), project(config, w, "v", x, 0, freqs))
               for s, x in enumerate(normed)]  # fmt: skip
        after = []
        for s, x in enumerate(hidden):
            at = anchor + s
            q = project(config, w, "q", normed[s], at, freqs)
            keys = [(k, v) for t, k, v in seen if t > at - window]
            keys += [(k, v) for t, k, v in own if t <= at or not causal[n]]
            x = x + w["self_attn.o_proj.weight"] @ attend(config, q, keys)
            y = rms(x, w["post_attention_layernorm.weight"], eps)
            gate = w["mlp.gate_proj.weight"] @ y
            gate = gate / (1 + (-gate).exp())
            after.append(x + w["mlp.down_proj.weight"] @ (gate * (w["mlp.up_proj.weight"] @ y)))
        hidden = after
    return [rms(x, weights["norm.weight"], eps) for x in hidden]


def position_weights(kind, gamma, tops):
    """Of the predictions of a block that count; tops: the draft's probability of the target's best token at each."""
    if kind == "decay":
        return [math.exp(-i / gamma) for i in range(len(tops))]
    survivals = []
    survival = 1.0
    for top in tops:
        survival *= (1 - FLOOR) * top + FLOOR
        survivals.append(survival)
    return [sum(survivals[i:]) for i in range(len(tops))]


def prediction_loss(kind, p, q):
    """statement.token_loss, and DSpark's: a tenth of the cross-entropy, nine tenths of the L1 distance."""
    if kind != "ce_l1":
        return token_loss(kind, p, q)
    outside = 1 - p.sum()  # what the draft cannot propose is a part of the distance
    distance = sum((a - b).abs() for a, b in zip(p, q, strict=True)) + outside
    return 0.1 * token_loss("ce", p, q) + 0.9 * distance


def run(config, weights, embedding, head, documents, draft_ids, anchors, causal, mask_token, is_dspark, kind, gamma,
        loss_kind):  # fmt: skip
    """The whole statement. weights: name -> float64 tensor; head [Vd, H]: the target's rows of the draft vocabulary;
    documents: dicts with ids, mask, auxiliary [S, n·H], logits [S, V]; anchors: of each document the positions of its
    blocks; kind: of position weights; mask_token, causal (a bool a layer): of the draft.

    Returns the loss (summed, not normalised), the sums [P][loss, correct, accept, top, count], and {(document, anchor):
    number of leading right predictions}.
    """
    size = config["block_size"]
    count = size if is_dspark else size - 1
    loss = 0.0
    sums = [[0.0] * 5 for _ in range(count)]
    accepted = {}
    for number, document in enumerate(documents):
        ids, mask = document["ids"].tolist(), document["mask"].tolist()
        context = [rms(weights["fc.weight"] @ a, weights["hidden_norm.weight"], config["rms_norm_eps"])
                   for a in document["auxiliary"]]  # fmt: skip
        for a in anchors[number]:
            outputs = block(config, weights, embedding, context, ids[a], a, mask_token, causal)
            found = []
            for i in range(count):
                if a + i + 1 >= len(ids) or not all(mask[a : a + i + 2]):
                    break
                h = outputs[i] if is_dspark else outputs[i + 1]
                logits = head @ h
                if is_dspark:
                    before = weights["markov_head.markov_w1.weight"][ids[a + i]]
                    logits = logits + weights["markov_head.markov_w2.weight"] @ before
                    confidence = weights["confidence_head.proj.weight"][0] @ torch.cat([h, before])
                    confidence = (confidence + weights["confidence_head.proj.bias"][0]).sigmoid()
                z = document["logits"][a + i]
                best, q, p = int(z.argmax()), logits.softmax(-1), z.softmax(-1)[draft_ids]
                acceptance = float(torch.minimum(p, q.detach()).sum())
                top = float(q[draft_ids.index(best)].detach()) if best in draft_ids else 0.0
                value = prediction_loss(loss_kind, p, q) if best in draft_ids else torch.zeros((), dtype=p.dtype)
                right = draft_ids[int(logits.argmax())] == best
                extra = 0.0
                if is_dspark:
                    extra = -(acceptance * confidence.log() + (1 - acceptance) * (1 - confidence).log())
                found.append((value, extra, top, right, acceptance))
            tops = [top for _, _, top, _, _ in found]
            leading = 0
            for i, weight in enumerate(position_weights(kind, gamma, tops)):
                value, extra, top, right, acceptance = found[i]
                loss = loss + weight * (value + extra)
                for column, x in enumerate((float(value.detach()), right, acceptance, top, 1)):
                    sums[i][column] += x
                leading += leading == i and right
            accepted[number, a] = leading
    return loss, sums, accepted
