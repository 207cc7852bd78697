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


ACTIVATIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}


def window_of(config, n):
    """How many of the last positions, its own among them, a query of layer n sees; no config.json limits it more."""
    kinds = config.get("layer_types")
    return config["sliding_window"] if kinds and kinds[n] == "sliding_attention" else 10**9


class Layer:
    """Layer n: the first reads [embedding, feature], the others their input alone."""

    def __init__(self, config, weights, n):
        prefix = f"layers.{n}." if n else "midlayer."
        self.w = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        self.config, self.n, self.window = config, n, window_of(config, n)
        self.freqs = frequencies(config)

    def project(self, embedded, feature, position):
        """q [A, D], k and v [G, D] of one token at one position."""
        eps, dim = self.config["rms_norm_eps"], self.config["head_dim"]
        x = rms(feature, self.w["hidden_norm.weight"], eps)
        if self.n == 0:
            x = torch.cat([rms(embedded, self.w["input_layernorm.weight"], eps), x])
        q, k, v = ((self.w[f"self_attn.{name}_proj.weight"] @ x).view(-1, dim) for name in "qkv")
        if self.config.get("model_type") == "qwen3":
            q = torch.stack([rms(head, self.w["self_attn.q_norm.weight"], eps) for head in q])
            k = torch.stack([rms(head, self.w["self_attn.k_norm.weight"], eps) for head in k])
        return rotate(q, position, *self.freqs), rotate(k, position, *self.freqs), v

    def output(self, feature, q, position, keys):
        """Hidden state [H] of one query; keys: [(position, k, v)] of all tokens up to it."""
        config, eps = self.config, self.config["rms_norm_eps"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        seen = [(k, v) for at, k, v in keys if position - self.window < at <= position]
        mixed = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = torch.stack([q[head] @ k[group] for k, _ in seen]) / math.sqrt(config["head_dim"])
            mixed.append(sum(p * v[group] for p, (_, v) in zip(scores.softmax(0), seen, strict=True)))
        residual = feature
        if config.get("norm_before_residual") and self.n == 0:
            residual = rms(feature, self.w["hidden_norm.weight"], eps)
        hidden = residual + self.w["self_attn.o_proj.weight"] @ torch.cat(mixed)
        x = rms(hidden, self.w["post_attention_layernorm.weight"], eps)
        gate = ACTIVATIONS[config["hidden_act"]](self.w["mlp.gate_proj.weight"] @ x)
        return hidden + self.w["mlp.down_proj.weight"] @ (gate * (self.w["mlp.up_proj.weight"] @ x))


def token_loss(kind, p, q):
    """A loss of one prediction; p [Vd]: the target's probabilities, which do not add up to 1, q [Vd]: the draft's."""
    renormalised = p / p.sum()
    divergence = sum(a * (a.log() - b.log()) for a, b in zip(renormalised, q, strict=True))
    accepted = sum(min(a, b) for a, b in zip(p, q, strict=True))
    if kind == "ce":
        return -(renormalised * q.log()).sum()
    if kind == "kl":
        return divergence
    if kind == "tv":
        return 1 - accepted
    if kind == "lk":
        return -accepted.log()
    assert kind == "lk_hybrid"
    share = math.exp(-3 * accepted.item())
    return share * divergence + (1 - share) * (1 - accepted)


def run(
    config,
    weights,
    embedding,
    documents,
    draft_ids,
    steps,
    decay,
    kind="ce",
    survival_weights=False,
    own_tokens=False,
    by_sequence=False,
):
    """The whole statement. weights: name -> float64 tensor; documents: dicts with ids, mask,
    auxiliary [S, n·Ht], logits [S, V]. kind: of loss; survival_weights: a step weighs the product of the acceptances
    of the chain before; own_tokens: later steps read what the draft would draft;
    by_sequence: the slots of a document share a weight of 1.

    Returns loss (summed over slots, steps weighted, not normalised), sums [K][loss, correct, accept, count], per
    document the number n_j of leading correct steps of every slot, and the sum [K] of survivals over slots.
    """
    eps = config["rms_norm_eps"]
    layers = [Layer(config, weights, n) for n in range(config.get("num_hidden_layers", 1))]
    embedding = weights.get("embed_tokens.weight", embedding)
    sums, loss, accepted, survivals = [[0.0] * 4 for _ in range(steps)], 0.0, [], [0.0] * steps

    def first_feature(a):
        """fc of one position's auxiliary hidden states [n·Ht], behind the norms that the configuration asks for."""
        if config.get("norm_before_fc"):
            a = rms(a, weights["input_norm.weight"], eps)
        if config.get("fc_norm"):
            chunks, norms = config.get("num_aux_hidden_states", 3), []
            size = len(a) // chunks
            for n in range(chunks):
                norms.append(rms(a[n * size : (n + 1) * size], weights[f"fc_norm.{n}.weight"], eps))
            a = torch.cat(norms)
        return weights["fc.weight"] @ a

    for document in documents:
        ids, mask, last = document["ids"], document["mask"], len(document["ids"]) - 1
        inputs = [first_feature(a) for a in document["auxiliary"]][:last]
        first = []  # of each layer: what each slot adds at step 0, and reads
        for layer in layers:
            parts = [layer.project(embedding[ids[j + 1]], inputs[j], j) for j in range(last)]
            keys = [(j, k, v) for j, (_, k, v) in enumerate(parts)]
            first.append((parts, keys, inputs))
            if layer is not layers[-1]:
                inputs = [layer.output(inputs[j], parts[j][0], j, keys) for j in range(last)]
        accepted.append([0] * len(ids))
        share = 1 / max(sum(supervised(mask, j, 0) for j in range(last)), 1) if by_sequence else 1.0
        for j in range(last):
            feature, own, alive, token, survival = None, [[] for _ in layers], True, ids[j + 1], 1.0
            for i in range(steps):
                if not supervised(mask, j, i):
                    break
                hidden = feature
                for n, layer in enumerate(layers):
                    parts, keys, inputs = first[n]
                    if i == 0:
                        hidden, q = inputs[j], parts[j][0]
                    else:
                        q, k, v = layer.project(embedding[token], hidden, j + i)
                        own[n].append((j + i, k, v))
                    hidden = layer.output(hidden, q, j + i, keys[: j + 1] + own[n])
                normed = rms(hidden, weights["norm.weight"], eps)
                logits = weights["lm_head.weight"] @ normed
                z = document["logits"][j + 1 + i]
                best, q_draft, p = int(z.argmax()), logits.softmax(-1), z.softmax(-1)[draft_ids]
                sums[i][3] += 1
                survivals[i] += survival
                if best in draft_ids:
                    value = token_loss(kind, p, q_draft)
                    loss = loss + share * (survival if survival_weights else decay**i) * value
                    sums[i][0] += float(value.detach())
                drafted = draft_ids[int(logits.argmax())]
                right = drafted == best
                sums[i][1] += right
                acceptance = float(torch.minimum(p, q_draft.detach()).sum())
                sums[i][2] += acceptance
                survival *= acceptance
                token = drafted if own_tokens else ids[min(j + 2 + i, last)]
                alive = alive and right
                accepted[-1][j] += alive
                feature = normed if config.get("norm_output") else hidden
    return loss, sums, accepted, survivals
