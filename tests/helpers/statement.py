"""EAGLE-3 training stated slot by slot in float64, independent of the trainer's code: what the objective must equal.

Plain loops over documents, slots and steps; one query at a time; rotary frequencies by their published formulas.
"""

import math

import torch


def frequencies(config):
    """(inverse frequencies [D/2] float64, factor on cos and sin) of a flat draft configuration."""
    dim, theta = config["head_dim"], config["rope_theta"]
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    plain = [theta ** (-2 * d / dim) for d in range(dim // 2)]
    kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high, result = scaling["low_freq_factor"], scaling["high_freq_factor"], []
        for f in plain:
            turns = original * f / (2 * math.pi)  # how often this frequency turns within the original context
            if turns < low:
                result.append(f / factor)
            elif turns > high:
                result.append(f)
            else:
                share = (turns - low) / (high - low)
                result.append((1 - share) * f / factor + share * f)
        return result, 1.0
    assert kind == "yarn"

    def dimension(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(dimension(scaling.get("beta_slow", 1))), dim - 1)
    result = []
    for d, f in enumerate(plain):
        ramp = min(max((d - first) / max(last - first, 0.001), 0), 1)
        result.append(ramp * f / factor + (1 - ramp) * f)
    return result, 0.1 * math.log(factor) + 1.0


def rms(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x, position, freqs, scale):
    """x [heads, D] at one position: the first half of D is the real part, the second the imaginary."""
    angle = torch.tensor([position * f for f in freqs], dtype=x.dtype)
    real, imaginary = x.chunk(2, dim=-1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


def supervised(loss_mask, slot, step):
    """eagle3: slot j is supervised at step i iff l[j+1], ..., l[j+2+i] are all 1 (and inside the document)."""
    wanted = range(slot + 1, slot + 2 + step + 1)
    return all(t < len(loss_mask) and loss_mask[t] == 1 for t in wanted)


def run(config, weights, embedding, documents, draft_ids, steps, decay):
    """The whole statement. weights: name -> float64 tensor; documents: dicts with ids, mask,
    auxiliary [S, n·Ht], logits [S, V].

    Returns loss (summed over slots, steps weighted, not normalised), sums [K][cross-entropy, correct, accept, count],
    and per document the number n_j of leading correct steps of every slot.
    """
    eps, dim = config["rms_norm_eps"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    freqs, scale = frequencies(config)
    layer = {name.removeprefix("midlayer."): w for name, w in weights.items() if name.startswith("midlayer.")}
    sums, loss, accepted = [[0.0] * 4 for _ in range(steps)], 0.0, []

    def project(token, feature, position):
        x = torch.cat(
            [
                rms(embedding[token], layer["input_layernorm.weight"], eps),
                rms(feature, layer["hidden_norm.weight"], eps),
            ]
        )
        q, k, v = ((layer[f"self_attn.{n}_proj.weight"] @ x).view(-1, dim) for n in "qkv")
        return rotate(q, position, freqs, scale), rotate(k, position, freqs, scale), v

    def first_feature(a):
        """fc of one position's auxiliary hidden states [n·Ht], behind the norms that the configuration asks for."""
        if config.get("norm_before_fc"):
            a = rms(a, weights["input_norm.weight"], eps)
        if config.get("fc_norm"):
            layers, norms = config.get("num_aux_hidden_states", 3), []
            size = len(a) // layers
            for n in range(layers):
                norms.append(rms(a[n * size : (n + 1) * size], weights[f"fc_norm.{n}.weight"], eps))
            a = torch.cat(norms)
        return weights["fc.weight"] @ a

    for document in documents:
        ids, mask, last = document["ids"], document["mask"], len(document["ids"]) - 1
        features = [first_feature(a) for a in document["auxiliary"]]
        first = [project(ids[j + 1], features[j], j) for j in range(last)]
        accepted.append([0] * len(ids))
        for j in range(last):
            feature, own, alive = features[j], [], True
            for i in range(steps):
                if not supervised(mask, j, i):
                    break
                q, k, v = project(ids[j + 1 + i], feature, j + i)
                if i > 0:
                    own.append((k, v))
                seen = [part[1:] for part in first[: j + 1]] + own
                mixed = []
                for head in range(heads):
                    group = head // (heads // kv_heads)
                    scores = torch.stack([q[head] @ key[group] for key, _ in seen]) / math.sqrt(dim)
                    mixed.append(sum(p * value[group] for p, (_, value) in zip(scores.softmax(0), seen, strict=True)))
                residual = feature
                if config.get("norm_before_residual"):
                    residual = rms(feature, layer["hidden_norm.weight"], eps)
                hidden = residual + layer["self_attn.o_proj.weight"] @ torch.cat(mixed)
                x = rms(hidden, layer["post_attention_layernorm.weight"], eps)
                gate = layer["mlp.gate_proj.weight"] @ x
                up = layer["mlp.up_proj.weight"] @ x
                hidden = hidden + layer["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
                normed = rms(hidden, weights["norm.weight"], eps)
                logits = weights["lm_head.weight"] @ normed
                z = document["logits"][j + 1 + i]
                best, q_draft = int(z.argmax()), logits.softmax(-1)
                sums[i][3] += 1
                if best in draft_ids:
                    entropy = -(z[draft_ids].softmax(-1) * q_draft.log()).sum()
                    loss = loss + decay**i * entropy
                    sums[i][0] += float(entropy.detach())
                right = draft_ids[int(logits.argmax())] == best
                sums[i][1] += right
                sums[i][2] += float(torch.minimum(z.softmax(-1)[draft_ids], q_draft.detach()).sum())
                alive = alive and right
                accepted[-1][j] += alive
                feature = normed if config.get("norm_output") else hidden
    return loss, sums, accepted
