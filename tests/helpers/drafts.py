"""Random drafts of tiny targets, and what the target alone says."""

import torch
import transformers

import train_eagle3
from core import draft_config, draft_files, target_files, target_model
from helpers import dense

# Targets whose caches differ, by the class of their configuration; the windows are shorter than texts.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}),
    "gpt-oss": ("GptOssConfig", {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
}
ROPES = {
    "default": None,
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
}  # fmt: skip
SHAPES = {
    "two layers": {"num_hidden_layers": 2},
    "two qwen3 layers, 3.1's norms": {
        "num_hidden_layers": 2, "model_type": "qwen3", "fc_norm": True, "norm_output": True,
    },
    "a window": draft_files.window_keys(9, [True]),
    "three layers, two windows, own table": {
        "num_hidden_layers": 3, "embed_requires_grad": True, **draft_files.window_keys(12, [True, False, True]),
    },
}  # fmt: skip


def write_family(folder, family, vocab_size):
    """A random target of 8 layers of one of FAMILIES; returns it loaded."""
    name, options = FAMILIES[family]
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "vocab_size": vocab_size, "initializer_range": 0.3, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return target_model.load(folder)


def random_draft(folder, target, columns=None, rope="default", seed=0, **options):
    """(DraftModel, d2t) with weights so large that its drafts vary; columns: size of a draft vocabulary."""
    torch.manual_seed(seed)
    vocabulary = target.config.vocab_size
    ids = torch.randperm(vocabulary)[: columns or vocabulary].sort().values
    given = {"draft_vocab_size": len(ids), "rope_scaling": ROPES[rope], **options}
    config, _ = draft_config.configure(*target_files.read_target_config(folder), given)
    draft = train_eagle3.DraftModel(config, target.embedding)
    for parameter in draft.parameters():
        scale = 1.0 if parameter.dim() == 1 else 1.5 * parameter.shape[1] ** -0.5
        parameter.data = scale * torch.randn_like(parameter)
    return draft, ids - torch.arange(len(ids))


def save_draft(path, draft, d2t):
    tensors = {name: p.detach() for name, p in draft.named_parameters()}
    if len(d2t) < draft.config["vocab_size"]:
        tensors |= {"d2t": d2t, "t2d": torch.zeros(draft.config["vocab_size"], dtype=torch.bool)}
        tensors["t2d"][torch.arange(len(d2t)) + d2t] = True
    draft_files.write_draft(path, draft.config, tensors)
    return path


def random_prompts(lengths, vocabulary=300, seed=0):
    return torch.randint(5, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).split(lengths)


def own_greedy(target, prompt, max_new_tokens=40, eos_ids=()):
    """The reply that transformers' own greedy generation gives."""
    ids = torch.tensor([prompt])
    ends = {"eos_token_id": list(eos_ids) or None, "pad_token_id": 0}
    options = transformers.GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **ends)
    target.model.generation_config.eos_token_id = None  # else it would fill in what is None
    reply = target.model.generate(ids, generation_config=options, attention_mask=torch.ones_like(ids))
    return reply[0, len(prompt) :].tolist()


def chain_logits(draft, ids, auxiliary, drafted, count):
    """Logits [count, Vd] of a chain behind ids [n], by the training code's pieces: every slot in every step, no cache.

    auxiliary [n - 1, 3·Ht]. drafted: function of the chain's logits so far -> the next token of the chain.
    """
    slots = len(ids) - 1
    positions, hidden_pairs = torch.arange(slots), torch.ones(slots, slots, dtype=torch.bool).triu(1)
    windows = draft_files.windows(draft.config)
    keys, values, rows = [[] for _ in windows], [[] for _ in windows], []

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        keys[layer].append(k.repeat_interleave(len(q) // len(k), dim=0))
        values[layer].append(v.repeat_interleave(len(q) // len(v), dim=0))
        unseen = hidden_pairs
        if windows[layer]:  # which ends at the query's position: i further on than its slot
            unseen = unseen | (positions <= positions[:, None] + len(keys[layer]) - 1 - windows[layer])
        return dense.attention(q, keys[layer], values[layer], unseen).transpose(0, 1)

    tokens, feature = ids[1:], draft.features(auxiliary)
    for i in range(count):
        feature, logits = draft.step(tokens, feature, positions + i, attend)
        rows.append(logits[-1])
        if i + 1 < count:
            tokens = tokens.roll(-1)
            tokens[-1] = drafted(rows)
    return torch.stack(rows)


def p_value(counts, probabilities):
    """Chance of counts at least this far from probabilities (chi-square; cells of small expectation are joined)."""
    counts, expected = counts.double().flatten(), probabilities.double().flatten() * counts.sum()
    small = expected < 5
    pairs = [(counts[~small], expected[~small]), (counts[small].sum()[None], expected[small].sum()[None])]
    counts, expected = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))
