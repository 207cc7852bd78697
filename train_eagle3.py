"""Train an EAGLE-3 draft for a target model, whose hidden states are computed in memory or read from disk or a server.

In:  a target (--target_model_path) and conversations: a data set (--dataset_train_split, --dataset_validation_split),
     or a folder written by prepare_data.py (--data_path).
Out: output_dir/ with run.json, metrics.jsonl, curves.png, step_XXXXXXXX/ (complete checkpoints, core/checkpoints.py),
     `latest` and `best` (links to two of them) and final/. A folder with a model.safetensors can be served as it is.

One device:     python train_eagle3.py --target_model_path M --dataset_train_split train.jsonl --output_dir out
Eight devices:  deepspeed --num_gpus 8 train_eagle3.py --target_model_path M --data_path prepared --output_dir out
Many nodes:     deepspeed --hostfile hosts train_eagle3.py ... ; torchrun and RANK/WORLD_SIZE/MASTER_* work as well
Tiny, no GPU:   bash examples/run_tiny_online.sh

Everything that research edits is in this file: the draft, the loss, the metrics, the objective, evaluation, the loop,
the flags. Slot j of a document drafts x[j+2+i] at ttt_step i (0-based) from the token x[j+1+i] and, at step 0, the
target's hidden states at j, later its own output of the step before (EAGLE-3, arXiv 2503.01840).
"""

import contextlib
import copy
import gc
import sys
import time
import warnings
from pathlib import Path

gc.disable()  # imports take a quarter less time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, rotate_half
from transformers.utils.logging import disable_progress_bar

import prepare_data
from core import (
    attention,
    checkpoints,
    common,
    conversation_files,
    dataloader,
    draft_config,
    draft_files,
    foreign_flags,
    losses,
    optimization,
    ranks,
    run_record,
    server,
    serving,
    setup,
    slots,
    states,
    target_files,
    target_model,
    vocabulary,
)

gc.freeze()
gc.enable()

LLAMA_KEYS = (  # of the draft's configuration, which transformers' layer reads
    "hidden_size", "intermediate_size", "hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "max_position_embeddings", "norm_before_residual",
)  # fmt: skip
RECOMPUTED = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in the draft is random

# Types of flags
POSITIVE = common.at_least(int, 1)
NATURAL = common.at_least(int, 0)
NOT_NEGATIVE = common.at_least(float, 0)


# ==================== The draft ======================================================================================


class HalfLinear(nn.Linear):
    """A projection of [embedding, feature] whose halves are applied one by one."""

    def forward(self, x, half, base=None):
        """W[:, half] x for x [T, H], half 0: of the embedding, 1: of the feature; base [T, out] is added."""
        weight = self.weight.chunk(2, dim=1)[half]
        if base is None:
            return F.linear(x, weight)
        return torch.addmm(base, x, weight.T)


class DraftHead(nn.Linear):
    """Logits, or what a function makes of the weight: ZeRO-3 gathers weights for a module's call only."""

    def forward(self, hidden, function=F.linear, *args):
        """function(hidden, weight, *args)"""
        return function(hidden, self.weight, *args)


class DraftLayer(nn.Module):
    """One decoder layer. The first reads the token's embedding beside the feature, the others their input alone.

    What the embedding adds to q, k and v is the same in each ttt_step that reads the token: it is computed once a token
    (`token_parts`) and handed to every step. Sizes: H hidden, A heads, G key-value heads of D.
    """

    def __init__(self, config, is_first, window, head_norms):
        """config: transformers' LlamaConfig; window: 0 = full attention; head_norms: q and k are normed per head."""
        super().__init__()
        size = config.hidden_size
        eps = config.rms_norm_eps
        self.window = window
        self.head_dim = config.head_dim
        queries = self.head_dim * config.num_attention_heads
        keys = self.head_dim * config.num_key_value_heads
        projection = HalfLinear if is_first else nn.Linear
        width = 2 * size if is_first else size
        if is_first:
            self.input_layernorm = nn.RMSNorm(size, eps)  # of the embedding
        self.hidden_norm = nn.RMSNorm(size, eps)  # of the feature
        self.self_attn = nn.ModuleDict()
        self.self_attn.q_proj = projection(width, queries, bias=False)
        self.self_attn.k_proj = projection(width, keys, bias=False)
        self.self_attn.v_proj = projection(width, keys, bias=False)
        self.self_attn.o_proj = nn.Linear(queries, size, bias=False)
        if head_norms:
            self.self_attn.q_norm = nn.RMSNorm(self.head_dim, eps)
            self.self_attn.k_norm = nn.RMSNorm(self.head_dim, eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = LlamaMLP(config)
        self.norm_before_residual = is_first and getattr(config, "norm_before_residual", False)  # as vLLM serves it
        self.gradient_checkpointing = False

    def token_parts(self, embeds):
        """What embeddings [T, H] add to q [T, A·D], k and v [T, G·D]."""
        x = self.input_layernorm(embeds)
        q = self.self_attn.q_proj(x, half=0)
        k = self.self_attn.k_proj(x, half=0)
        v = self.self_attn.v_proj(x, half=0)
        return q, k, v

    def forward(
        self,
        parts,  # token parts of q [n, A·D], k and v [T, G·D]; None of a further layer
        feature,  # [T, H]
        cos,  # [T, D]
        sin,
        attend,
        rows=None,  # int64 [n]: the slots that have a query; None: all
    ):
        """One ttt_step: hidden states [n, H] of the slots `rows`; keys and values are those of all slots.

        attend(q [n, A, D], k [T, G, D], v [T, G, D]) -> [n, A, D] and anything, which is returned as well.
        """
        q_part, k_part, v_part = parts or (None, None, None)
        normed = self.hidden_norm(feature)
        k = self.project("k", normed, k_part)
        v = self.project("v", normed, v_part)
        k = rotate(k, cos, sin)
        if rows is not None:  # keys and values of all slots, queries of the live ones
            feature = feature.index_select(0, rows)
            normed = normed.index_select(0, rows)
            cos = cos.index_select(0, rows)
            sin = sin.index_select(0, rows)
        q = self.project("q", normed, q_part)
        q = rotate(q, cos, sin)

        mixed, keys = attend(q, k, v)
        residual = normed if self.norm_before_residual else feature
        hidden = residual + self.self_attn.o_proj(mixed.flatten(1))
        if self.gradient_checkpointing:  # the caller recomputes all of the layer
            return hidden + self.normed_mlp(hidden), keys
        # Of the MLP only matrix products are kept for the backward pass: its activation, large, is cheap to recompute.
        # ZeRO-3 may gather the weights again in the backward pass, which a selective checkpoint refuses.
        options = dict(RECOMPUTED)
        if not hasattr(self.mlp.down_proj.weight, "ds_id"):
            options["context_fn"] = keep_products
        return hidden + checkpoint(self.normed_mlp, hidden, **options), keys

    def project(self, name, normed, part):
        """q, k or v [T, heads, D] of normed features [T, H] and, in the first layer, their token parts."""
        linear = self.self_attn[f"{name}_proj"]
        x = linear(normed) if part is None else linear(normed, half=1, base=part)
        x = x.unflatten(-1, (-1, self.head_dim))
        if f"{name}_norm" in self.self_attn:
            x = self.self_attn[f"{name}_norm"](x)
        return x

    def normed_mlp(self, hidden):
        return self.mlp(self.post_attention_layernorm(hidden))


def rotate(x, cos, sin):
    """x [T, heads, D] turned by the angles behind cos, sin [T, D]."""
    cos = cos[:, None]
    sin = sin[:, None]
    return x * cos + rotate_half(x) * sin


def keep_products():
    """Of a checkpointed region matrix products are kept, all else is recomputed."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


class DraftModel(nn.Module):
    """The EAGLE-3 draft; its parameters carry the names of the checkpoint. Sizes: H hidden, Vd draft vocabulary.

    config: the flat config.json (core/draft_files.py). embedding [V, Ht]: the target's table, frozen; a plain attribute
    and not a parameter, because the target holds it already and it must reach neither the engine nor the checkpoint.
    A draft that needs one has its own, a parameter.
    """

    def __init__(self, config, embedding):
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.attention_backend = "sdpa"
        size = config["hidden_size"]
        eps = config["rms_norm_eps"]
        target_size = config.get("target_hidden_size", size)
        count = draft_files.num_auxiliary(config)  # auxiliary layers
        llama = llama_config(config)
        self.input_norm = None
        self.fc_norm = None
        if config.get("norm_before_fc"):
            self.input_norm = nn.RMSNorm(count * target_size, eps)
        if config.get("fc_norm"):
            self.fc_norm = nn.ModuleList(nn.RMSNorm(target_size, eps) for _ in range(count))
        self.fc = nn.Linear(count * target_size, size, bias=False)
        self.embed_tokens = None
        if draft_files.needs_embedding(config):
            self.embed_tokens = nn.Embedding(config["vocab_size"], size)
        windows = draft_files.windows(config)  # one a layer
        head_norms = draft_files.has_head_norms(config)
        self.midlayer = DraftLayer(llama, True, windows[0], head_norms)
        self.layers = nn.ModuleDict()  # further ones
        for n, window in enumerate(windows[1:], 1):
            self.layers[str(n)] = DraftLayer(llama, False, window, head_norms)
        self.norm = nn.RMSNorm(size, eps)
        self.lm_head = DraftHead(size, config["draft_vocab_size"], bias=False)
        # Only the frequencies of transformers' rotary embedding are kept, and not as a buffer: DeepSpeed casts buffers
        # to bf16, whose 8 bits are an error of radians at long positions.
        rotary = LlamaRotaryEmbedding(llama)
        self.frequencies = rotary.inv_freq.clone()  # [D/2]
        self.rotary_scale = rotary.attention_scaling

    def initialise(self, head_rows=None):
        """Matrices normal with 0.02, norms one; where sizes allow it, the head is the target's own rows [Vd, Ht] of
        its vocabulary, and a table of its own the target's."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if head_rows is not None and head_rows.shape == self.lm_head.weight.shape:
            self.lm_head.weight.data.copy_(head_rows)
        if self.embed_tokens and self.embedding.shape == self.embed_tokens.weight.shape:
            self.embed_tokens.weight.data.copy_(self.embedding)

    def all_layers(self):
        return [self.midlayer, *self.layers.values()]

    def features(self, auxiliary):
        """Auxiliary hidden states [T, n·Ht] -> features of step 0 [T, H]."""
        if self.input_norm is not None:
            auxiliary = self.input_norm(auxiliary)
        if self.fc_norm is not None:
            layers = auxiliary.chunk(len(self.fc_norm), dim=-1)  # [T, Ht] each
            normed = [norm(layer) for norm, layer in zip(self.fc_norm, layers, strict=True)]
            auxiliary = torch.cat(normed, dim=-1)
        return self.fc(auxiliary)

    def rotary(self, positions, dtype):
        """cos, sin [T, D] of positions [T]; computed in fp32 (float64 for a float64 draft), then rounded to dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        self.frequencies = self.frequencies.to(positions.device)  # a copy the first time, then nothing
        positions = positions[:, None].to(wide)
        angles = positions * self.frequencies.to(wide)
        angles = torch.cat([angles, angles], dim=-1)
        cos = angles.cos() * self.rotary_scale
        sin = angles.sin() * self.rotary_scale
        return cos.to(dtype), sin.to(dtype)

    def embed(self, tokens):
        """Embeddings [T, H] of tokens [T], the draft's own or the target's, in the draft's dtype."""
        embeds = self.embed_tokens(tokens) if self.embed_tokens else F.embedding(tokens, self.embedding)
        return embeds.to(self.fc.weight.dtype)

    def step(self, tokens, feature, positions, attend):
        """One ttt_step as served: tokens [T], feature [T, H], positions [T] -> next feature [T, H], logits [T, Vd].

        attend(layer's number, q [T, A, D], k [T, G, D], v [T, G, D]) -> [T, A, D].
        """
        parts = self.midlayer.token_parts(self.embed(tokens))
        cos, sin = self.rotary(positions, feature.dtype)
        hidden = feature
        for n, layer in enumerate(self.all_layers()):

            def attend_only(q, k, v, n=n):
                return attend(n, q, k, v), None

            hidden, _ = layer(parts, hidden, cos, sin, attend_only)
            parts = None
        normed = self.norm(hidden)
        return self.next_feature(hidden, normed), self.lm_head(normed)

    def next_feature(self, hidden, normed):
        """What the next ttt_step reads as its feature."""
        return normed if self.config.get("norm_output") else hidden

    def forward(self, *args, **kwargs):
        """The objective; inside the module's forward because ZeRO-3 gathers the weights by its hooks."""
        return objective(self, *args, **kwargs)


def llama_config(config):
    """transformers' configuration of the draft's layer, from the flat config.json."""
    rope = {"rope_type": "default"}
    rope |= config.get("rope_scaling") or {}
    rope["rope_theta"] = config["rope_theta"]
    sizes = {name: config[name] for name in LLAMA_KEYS if name in config}
    return LlamaConfig(rope_parameters=rope, **sizes)


# ==================== The loss =======================================================================================


# A token loss takes logits [N, Vd] of the draft; p [N, Vd]: the target's distribution, renormalised over the draft
# vocabulary; mass [N]: the share of the target's probability that lies in it; all in fp32 at least. It returns [N].
# Autograd differentiates it. On GPUs it is compiled as one graph: no .item(), no print, no boolean indexing.


def cross_entropy(logits, p, mass):
    """-Σ p log q."""
    log_q = logits.log_softmax(dim=-1)
    return -(p * log_q).sum(dim=-1)


def divergence(logits, p, mass):
    """KL(p || q): the cross-entropy without the entropy of p, which has no gradient; zero for a perfect draft."""
    return cross_entropy(logits, p, mass) - torch.special.entr(p).sum(dim=-1)


def acceptance(logits, p, mass):
    """Σ min(p, q), p not renormalised: the share that speculative sampling accepts (arXiv 2211.17192)."""
    p_full = p * mass[:, None]  # the rest is rejected for certain
    return torch.minimum(p_full, logits.softmax(dim=-1)).sum(dim=-1)


def total_variation(logits, p, mass):
    """1 - acceptance."""
    return 1 - acceptance(logits, p, mass)


def lk(logits, p, mass):
    """-log acceptance (LK, arXiv 2602.23881)."""
    return -acceptance(logits, p, mass).clamp(min=1e-5).log()


def lk_hybrid(logits, p, mass):
    """The divergence first, total variation the more is accepted (LK, arXiv 2602.23881, η = 3)."""
    accepted = acceptance(logits, p, mass)
    share = torch.exp(-3 * accepted.detach())
    return share * divergence(logits, p, mass) + (1 - share) * (1 - accepted)


LOSSES = {  # --loss
    "ce": cross_entropy,
    "kl": divergence,
    "tv": total_variation,
    "lk": lk,
    "lk_hybrid": lk_hybrid,
}


def token_metrics(logits, p, mass, best, draft_ids):
    """What is logged of each prediction: {name: [N]}. Each becomes NAME_0 ... NAME_{K-1} in metrics.jsonl.

    Arguments as of a token loss; best [N]: the target's argmax over its full vocabulary; draft_ids [Vd]: target ids of
    the draft vocabulary. "acc" is also what chain lengths are counted by.
    """
    predicted = draft_ids[logits.argmax(dim=-1)]
    return {
        "acc": predicted == best,
        "accept": acceptance(logits, p, mass),
    }


def objective(
    draft,
    input_ids,  # [T] int64
    position_ids,  # [T], restarting with each document
    auxiliary,  # [T, n·Ht]: the target's hidden states after n layers
    last,  # [T, Ht]: and after its final norm
    head,  # target_model.Head
    plan,  # slots.Plan
    d2t,  # [Vd] int64 offsets
    args,  # flags: loss, ttt_step_loss_decay, use_off_policy_tokens
):
    """The training-time test over concatenated documents, for live slots only.

    Keys of later steps are seen by their own slot alone. So at step 0 an unsupervised slot matters by its key and value
    only, and later not at all: losses and gradients are those of computing every slot in every step. A plan with
    `chains` has one step; its acceptances decide which slots the next plan has, or what they weigh.

    Returns the loss summed over slots and steps (not yet divided by anything); the sums of each step, {name: float64
    [K]}, of "loss", the metrics, and the number of "slots"; and which predictions are right (bool [K, T]).
    """
    dtype = draft.fc.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    teacher = losses.Teacher(head, last, vocabulary.target_ids(d2t))
    tokens = draft.midlayer.token_parts(draft.embed(input_ids))  # q [T, A·D], k and v [T, G·D]
    feature = draft.features(auxiliary.to(dtype))  # [T, H]
    keys = [attention.Keys() for _ in draft.all_layers()]
    own = None  # [n]: the tokens that the live slots drafted, where these are read
    survival = torch.ones(plan.counts[0], dtype=wide, device=feature.device)
    total = 0.0
    found = []
    while plan is not None:  # one plan of all steps, or one of each step
        outputs = []
        weights = []
        live_slots = plan.live.split(plan.counts)
        keeps = plan.keep.split(plan.counts)
        for entry, live in enumerate(live_slots):
            i = plan.first + entry
            if i > 0 and len(live) < len(feature):  # some chains have ended
                feature = feature.index_select(0, keeps[entry])
                keys = [seen.select(keeps[entry]) for seen in keys]
                own = own if own is None else own[keeps[entry]]
            arguments = (draft, plan, position_ids, entry, tokens, own, feature, keys)
            if draft.midlayer.gradient_checkpointing:
                hidden, keys = checkpoint(ttt_step, *arguments, **RECOMPUTED)
            else:
                hidden, keys = ttt_step(*arguments)  # [n_i, H]
            del arguments  # the keys before these
            normed = draft.norm(hidden)
            outputs.append(normed)  # [n_i, H]
            weight = args.ttt_step_loss_decay**i if plan.chains is None else 1.0
            weights.append(torch.full_like(live, weight, dtype=wide))  # [n_i]
            feature = draft.next_feature(hidden, normed)
            if not args.use_off_policy_tokens and i + 1 < args.ttt_length:
                own = teacher.draft_ids[draft.lm_head(normed.detach(), losses.best_columns)]

        hidden = torch.cat(outputs)  # [R, H]
        outputs.clear()  # twice the memory otherwise
        weights = torch.cat(weights)  # [R]
        if plan.chains and plan.chains.draws is None:
            weights = weights * survival
        if plan.weights is not None:
            weights = weights * plan.weights[plan.live].to(wide)
        functions = (LOSSES[args.loss], token_metrics)
        loss, values = draft.lm_head(hidden, losses.head_loss, weights, teacher, plan, *functions)
        total = total + loss
        found.append((plan, values))
        if plan.chains:
            survival = survival * values["accept"]
        plan, survival = slots.plan_next(plan, survival)
    return total, *sum_metrics(found, total, len(input_ids))


def sum_metrics(found, total, length):
    """(sums, correct) as objective returns them; found: [(Plan, {name: [R]})], total: the loss."""
    counts = [count for plan, _ in found for count in plan.counts]
    values = {name: torch.cat([part[name] for _, part in found]) for name in found[0][1]}
    sums = {name: losses.sums_of_steps(value, counts) for name, value in values.items()}
    sums["slots"] = torch.stack([sums["loss"].new_full((), count) for count in counts])
    sums["total"] = total.detach().double()
    live = torch.cat([plan.live for plan, _ in found]).split(counts)
    correct = torch.zeros(len(counts), length, dtype=torch.bool, device=total.device)
    for row, at, right in zip(correct, live, values["acc"].split(counts), strict=True):
        row[at] = right > 0
    return sums, correct


def ttt_step(
    draft,
    plan,
    position_ids,
    entry,  # the step's in the plan
    tokens,  # token parts of q [T, A·D], k and v [T, G·D]
    own,  # None, or the tokens [n_i] that the live slots read in the place of the data's
    feature,  # at step 0 [T, H] of all slots, later [n_i, H] of the live ones
    keys,  # [Keys of each layer]
):
    """A step of the training-time test: hidden states [n_i, H] of its live slots, and the Keys with those it adds."""
    i = plan.first + entry
    live = plan.live.split(plan.counts)[entry]  # [n_i]
    positions = position_ids if i == 0 else position_ids[live] + i
    cos, sin = draft.rotary(positions, feature.dtype)
    layers = draft.all_layers()
    parts = None
    found = []
    for n, layer in enumerate(layers):
        view = plan.views[layer.window]
        rows = live if i == 0 else None  # step 0 has keys and values of all slots
        queries = slots.Queries(i, entry, live)
        if i == 0 and n + 1 < len(layers):  # and the outputs of all slots are the next layer's keys
            rows = None
            queries = slots.Queries(i, -1, torch.arange(len(feature), device=live.device))
        if n == 0 and own is None:
            parts = read_tokens(tokens, queries)
        elif n == 0:
            parts = layer.token_parts(draft.embed(own))

        def attend(q, k, v, n=n, view=view, queries=queries):
            """q [n, A, D], the k and v that the step adds -> [n, A, D] and the Keys with them."""
            seen = keys[n].add(k, v) if i > 0 else attention.Keys(first=(k, v))
            return attention.attend_slots(draft.attention_backend, view, position_ids, queries, q, seen), seen

        feature, seen = layer(parts, feature, cos, sin, attend, rows)
        found.append(seen)
        parts = None
    return feature, found


def read_tokens(tokens, queries):
    """Token parts of the tokens that queries read: q's, k's and v's; at step 0 k and v are those of all slots."""
    q, k, v = tokens
    read = queries.slots + 1 + queries.step
    if queries.step == 0:
        read = read.clamp(max=len(q) - 1)  # the last slot reads nothing, and nothing sees it
        return q.index_select(0, read), k.roll(-1, dims=0), v.roll(-1, dims=0)
    return [x.index_select(0, read) for x in tokens]


def chain_lengths(correct):
    """n_j [T]: the number of leading ttt_steps that are all right, of correct [K, T] bool."""
    alive = correct.long().cumprod(dim=0)
    return alive.sum(dim=0)


def metric_values(sums):
    """Metrics by name, as floats, from sums over slots {"loss": [K], "acc": [K], ..., "slots": [K], "total", "chains"}.

    live_i is the share of the chains that are live at step i.
    """
    steps = dict(sums)
    counts = [max(count, 1.0) for count in steps["slots"]]
    values = {"loss": steps.pop("total") / max(steps.pop("normaliser"), 1.0)}
    values["chain_length"] = 1 + steps.pop("chains") / counts[0]
    live = steps.pop("slots")
    for i, count in enumerate(live):
        values[f"live_{i}"] = count / counts[0]
    for name, totals in steps.items():
        for i, total in enumerate(totals):
            values[f"{name}_{i}"] = total / counts[i]
    return values


# ==================== Batches ========================================================================================


def batch_of(args, windows=(0,), trains=False):
    """The `collate` of dataloader.read_steps: rows of a micro-batch -> Batch with its plan of slots.

    windows: of each layer of the draft. Evaluation runs all steps of all chains, and weighs them by decay^i.
    """

    def collate(rows, epoch):
        fields = dataloader.concatenate(rows, epoch)
        lengths = fields["lengths"]
        supervised = slots.supervised_slots(fields["loss_mask"], slots.documents_of(lengths), args.ttt_length)
        every = supervised[0]
        if trains and args.max_chains:
            draws = dataloader.draw(args.seed, epoch, fields["rows"], lengths, stream=1)
            supervised = supervised & slots.choose_slots(every, lengths, args.max_chains, draws)
        if trains and (args.chain_sampling or args.step_weights == "survival"):
            draws = dataloader.draw(args.seed, epoch, fields["rows"], lengths) if args.chain_sampling else None
            plan = slots.plan_chains(supervised, lengths, windows, draws)
        else:
            plan = slots.plan_slots(supervised, lengths, windows)
        normaliser = plan.counts[0]
        if args.loss_average == "sequences" or args.max_chains:
            weights, normaliser = slots.weigh_slots(every, supervised[0], lengths, args.loss_average)
            plan = plan._replace(weights=weights)
        return dataloader.Batch(**fields, plan=plan, normaliser=normaliser)

    return collate


def run_draft(draft, batch, states, target, d2t, args):
    """The objective of one micro-batch: loss sum, {name: sums}, and the accepted drafts n_j of each slot [T]."""
    auxiliary, last = states
    if args.noise_std and draft.training:
        auxiliary = dataloader.add_noise(auxiliary, batch, args.seed, args.noise_std)
    loss, sums, correct = draft(
        batch.input_ids,
        batch.position_ids,
        auxiliary,
        last,
        target.head,
        batch.plan,
        d2t,
        args,
    )
    accepted = chain_lengths(correct)
    sums["chains"] = accepted.sum().double()
    sums["normaliser"] = sums["chains"].new_full((), batch.normaliser)
    return loss, sums, accepted


# ==================== Evaluation =====================================================================================


@torch.no_grad()
def evaluate(engine, source, data, d2t, args):
    """Metrics of the validation rows over all ranks, or None where no row has a slot with hidden states.

    acceptance_length is from walking every reply as serving does.
    """
    engine.eval()
    device = engine.device
    sums = {"tokens": torch.zeros((), dtype=torch.float64, device=device)}
    sums["passes"] = torch.zeros_like(sums["tokens"])
    steps = dataloader.read_steps(
        data,
        source,
        batch_of(args, draft_files.windows(engine.module.config)),
        device,
        name="validation",
        global_batch_size=args.batch_size * dist.get_world_size(),
        micro_batch_size=args.batch_size,
        **loader_options(args),
    )
    with contextlib.closing(steps):
        for batches in steps:
            for batch, states in zip(batches, source.states(batches), strict=True):
                _, found, accepted = run_draft(engine.module, batch, states, source.target, d2t, args)
                optimization.add_sums(sums, found)
                passes = slots.walk_replies(accepted, batch.loss_mask, batch.lengths)
                sums["tokens"] += sum(passes) + len(passes)
                sums["passes"] += len(passes)
    engine.train()
    sums = optimization.reduce_sums(sums)
    tokens = sums.pop("tokens")
    passes = sums.pop("passes")
    if not sums["slots"][0]:  # on_missing leaves rows out
        return None
    values = metric_values(sums)
    return values | {"acceptance_length": tokens / max(passes, 1.0), "passes": int(passes)}


# ==================== The loop =======================================================================================


def train(args, run, engine, source, data, d2t, record, progress, saver):
    """Every optimizer step of every epoch; then logging, evaluating and saving where they are due.

    Returns whether the training is finished: False if a signal asked it to stop.
    """

    def forward(draft, batch, states):
        loss, sums, _ = run_draft(draft, batch, states, source.target, d2t, args)
        return loss, sums

    start = time.monotonic() - progress.seconds
    if progress.evaluation_due:  # it was interrupted
        evaluate_now(args, run, engine, source, data, d2t, record, progress)
    steps = dataloader.read_steps(
        data["train"],
        source,
        batch_of(args, draft_files.windows(engine.module.config), trains=True),
        engine.device,
        range(progress.step, run.total_steps),
        global_batch_size=args.draft_global_batch_size,
        micro_batch_size=run.draft_micro_batch_size,
        total_seq_len=args.total_seq_len,
        **loader_options(args),
    )
    mark = time.monotonic()
    last_good = progress
    with ranks.stop_signals() as signals, contextlib.closing(steps):
        for step, batches in enumerate(steps, progress.step + 1):
            # --- one optimizer step ---
            rate = optimization.learning_rate_at(step - 1, args, run)
            optimization.set_learning_rate(engine, rate)
            sums, problem = optimization.optimizer_step(engine, batches, source.states(batches), forward)
            if problem and not progress.bad:
                last_good = copy.deepcopy(progress)
            norm = None if problem else optimization.gradient_norm(engine)
            progress.count(batches, sums, problem, norm)
            if args.ema_decay and not problem:
                optimization.update_average(progress.average, engine, args.ema_decay, step)
            if problem:
                record.line(f"step {step} is left out, it is not finite: {problem}")
            stop, too_old, writing = ranks.any_rank(engine.device, signals, saver.is_due(), saver.is_writing())
            now = time.monotonic()  # the ranks have met, so the device has finished the step
            progress.step = step
            progress.seconds = now - start
            progress.spent += now - mark
            if progress.bad == args.max_bad_steps:
                record.end_badly(progress.bad, saver.save(last_good))
            record.advance()

            # --- what is due ---
            last = step == run.total_steps
            save_due = stop or too_old or run.is_due(step, args.save_interval, args.save_steps)
            evaluation_due = "validation" in data and run.is_due(step, args.eval_interval, args.eval_steps)
            if evaluation_due or not writing:
                saver.finish()

            # --- log: the values cover all steps since the last line ---
            if last or step % args.log_steps == 0:
                run_record.log_steps(record, run, progress, rate, metric_values)

            # --- evaluate and save: never a skipped step, --resume tries those again ---
            if evaluation_due:
                best = evaluate_now(args, run, engine, source, data, d2t, record, progress)
                if best and not progress.bad and (save_due or args.save_best):
                    progress.best = best
                    save_due = True
            if save_due:
                saver.begin(last_good if progress.bad else progress)

            # --- stop ---
            if stop and not last:
                saver.finish()
                record.line(f"stopped after step {step} by {(signals or ['a signal'])[0]}: --resume continues")
                return False
            mark = time.monotonic()  # tokens/s is about training
    saver.finish()
    return True


def loader_options(args):
    return {"seed": args.seed, "num_workers": args.num_workers, "prefetch_factor": args.prefetch_factor}


def evaluate_now(args, run, engine, source, data, d2t, record, progress):
    """Evaluate, write a row and a line; returns [value, step, metric, loss] if it is the best so far, else None."""
    progress.evaluation_due = True  # until it is done: a server may fail
    with optimization.averaged(engine, progress.average):
        values = evaluate(engine, source, data["validation"], d2t, args)
    progress.evaluation_due = False
    if values is None:
        record.line(f"evaluation at step {progress.step}: no validation row has a slot with hidden states")
        return None
    record.row("validation", progress.step, progress.step / run.steps_per_epoch, values)
    record.line(
        f"evaluation at step {progress.step} | {run_record.metrics_line(values)} | "
        f"acceptance_length {values['acceptance_length']:.3f}"
    )
    return checkpoints.better(values, progress.best, progress.step, args.best_metric)


# ==================== Flags ==========================================================================================


RECIPES = {  # --recipe: its flags where none are given; benchmarks/recipes.py measures them
    "best": {"optimizer": "muon", "fc_norm": True, "norm_output": True, "freeze_head": True, "chain_sampling": True},
}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add_data_flags(parser.add_argument_group("target and data").add_argument)
    target_model.add_sharing_flags(parser)
    states.add_source_flags(parser)
    add_draft_flags(parser.add_argument_group("draft").add_argument)
    add_objective_flags(parser.add_argument_group("objective").add_argument)
    optimization.add_flags(parser)
    setup.add_batch_flags(parser.add_argument_group("length and batches").add_argument)
    setup.add_run_flags(parser.add_argument_group("run").add_argument)
    foreign = (foreign_flags.OF_TRAINERS, foreign_flags.ALIASES, foreign_flags.VALUES)
    args = foreign_flags.parse(parser, argv, *foreign, RECIPES)
    return run_record.complete_flags(args)


def add_data_flags(add):
    add("--target_model_path", required=True, help="folder or hub id; a folder may hold one nested or MLflow model")
    add("--dataset_train_split", help="conversations, see prepare_data.py --dataset; prepared into output_dir/data")
    add("--dataset_validation_split", help="the same, for evaluation; none: no evaluation")
    conversation_files.add_preparation_flags(add)
    add("--data_path", help="folder written by prepare_data.py, instead of the two above")
    add("--chat_template", help=f"{', '.join(prepare_data.TEMPLATES)}, or auto; none: as prepare_data.py")
    add("--max_length", type=common.at_least(int, 2), default=2048, help="tokens; longer conversations are truncated")
    add("--build_dataset_num_proc", type=POSITIVE, default=96, help="processes, at most one a core")
    add("--trust_remote_code", action=common.Switch, help="run code that comes with the target")


def add_draft_flags(add):
    add("--recipe", choices=list(RECIPES), help="a set of flags, each may be given otherwise; see docs/recipes.md")
    add("--draft_model_config", help="JSON of the draft; none: derived from the target")
    add("--draft_vocab_size", type=POSITIVE, help="tokens it can propose; none: the mapping's, or all")
    add("--token_freq_path", help="token counts to choose them by; none: the prepared data's token_freq.pt")
    add("--d2t_path", help="mapping of build_vocab_mapping.py, with t2d_path; none: built from the counts")
    add("--t2d_path", help="the other half of the mapping")
    draft_config.add_flags(add)
    add("--target_layer_ids", type=int, nargs="+", help="auxiliary layers, i = after i layers; none: 2 L//2 L-3")
    backends = ("flex_attention", "sdpa")
    add("--attention_backend", choices=backends, default=backends[0], help="flex on GPUs only; same numbers")
    add("--dry_run", action=common.Switch, help="save the initial draft as step_00000000, and exit; needs no data")


def add_objective_flags(add):
    add("--ttt_length", type=POSITIVE, default=7, help="steps K of the training-time test")
    add("--loss", choices=list(LOSSES), default="ce", help="of a prediction; lk and tv: for sampling")
    add("--ttt_step_loss_decay", type=NOT_NEGATIVE, default=0.8, help="step i weighs this to the power of i")
    weights = ("decay", "survival")
    add("--step_weights", choices=weights, default=weights[0], help="survival: the chance that serving gets there")
    add("--max_chains", type=POSITIVE, help="of a sequence in an epoch, drawn anew; none: one at each of its slots")
    add("--chain_sampling", action=common.Switch, help="a chain goes on with that chance, instead of the weight")
    averages = ("tokens", "sequences")
    add("--loss_average", choices=averages, default=averages[0], help="what counts the same in an optimizer step")
    add(
        "--use_off_policy_tokens",
        action=common.Switch,
        default=True,
        help="later steps read the data's tokens; false: the draft's own",
    )
    add("--noise_std", type=NOT_NEGATIVE, default=0.0, help="uniform noise on the auxiliary states: +- this")


# ==================== Main ===========================================================================================


def prepare_conversations(args):
    """Prepare the conversations of the flags; returns the folder."""
    folder = str(Path(args.output_dir) / "data")
    prepare_data.prepare(
        args.dataset_train_split,
        folder,
        args.target_model_path,
        validation_dataset=args.dataset_validation_split,
        chat_template=args.chat_template or prepare_data.Options.chat_template,
        max_length=args.max_length,
        num_proc=args.build_dataset_num_proc,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
        **conversation_files.read_flags(args),
    )
    return folder


def build_draft(args, config, target, d2t, checkpoint):
    """The draft, initialised from the seed or with a checkpoint's weights."""
    checkpoints.seed_generators(args.seed)
    draft = DraftModel(config, target.embedding)
    draft.attention_backend = args.attention_backend
    if target.embedding.device.type == "cpu":  # FlexAttention has no backward pass there
        draft.attention_backend = "sdpa"
    for layer in draft.all_layers():
        layer.gradient_checkpointing = args.gradient_checkpointing
    draft.initialise(target.head.weight[vocabulary.target_ids(d2t)] if args.head_init == "target" else None)
    draft.lm_head.requires_grad_(not args.freeze_head)
    if checkpoint:
        draft.load_state_dict(draft_files.read_parameters(checkpoint, target.embedding))
    # What a checkpoint can hold, so that continuing from a dry run is the same.
    return draft.to(target.embedding.dtype).float()


def main(args):
    with setup.deterministic(args.deterministic):
        device = ranks.start_distributed(args.dist_timeout, args.local_rank)
        with ranks.only_writer("output_dir", args.output_dir):
            start(args, device)


def start(args, device):
    """Prepare, load, and train or save the draft of a dry run."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, every step
    if dist.get_rank() != 0 or not sys.stderr.isatty():
        disable_progress_bar()
    recipe = ["--recipe", args.recipe] if args.recipe else []
    default = vars(parse_args(["--target_model_path", args.target_model_path, *recipe]))
    prepared = ranks.on_first_rank(lambda: setup.prepare(args, default, prepare_conversations, draft_config))
    run, deepspeed_config, config, layers, data_folder, d2t, state = prepared
    ranks.check_shared("output_dir", args.output_dir)
    data, data_config = dataloader.open_data(data_folder)
    model_dir = ranks.on_each_node(lambda: target_files.resolve_target(args.target_model_path))

    # --- target, draft, engine ---
    source = states.open_source(args, run.target_sharding, model_dir, device, layers, data, data_config)
    target = source.target
    config["torch_dtype"] = str(target.embedding.dtype).removeprefix("torch.")
    draft = build_draft(args, config, target, d2t.to(target.embedding.device), run.resume_from_checkpoint)
    flags = run.flags(args)
    step = state["step"] if state else 0
    settings = run_record.begin(__file__, flags, data_config, step)
    if dist.get_rank() == 0 and data_folder:
        covered = vocabulary.coverage_of(Path(data_folder) / "token_freq.pt", d2t)
        found = (layers, draft, target, data, data_config, covered, f"ttt_length {args.ttt_length}")
        print(run_record.summary(args, run, config, *found, RECIPES))
    groups = optimization.parameter_groups(draft, args)
    engine = optimization.build_engine(draft, groups, deepspeed_config, device)
    d2t = d2t.to(device)
    progress = checkpoints.Progress()
    if state:
        progress = checkpoints.resume(engine, run.resume_from_checkpoint, state, flags)

    # --- how it is saved ---
    def write_draft(folder, tensors):
        draft_files.write_draft(folder, config, vocabulary.with_mapping(tensors, d2t, config["vocab_size"]))

    if args.dry_run:
        folder = checkpoints.Saver(engine, flags, progress, write_draft).save(progress)
        if not folder:
            sys.exit(2)
        if dist.get_rank() == 0:
            print(f"saved {folder}: start from it with --resume_from_checkpoint {args.output_dir}")
        return
    record = run_record.Record(args, settings, run.total_steps)
    saver = checkpoints.Saver(engine, flags, progress, write_draft, record)

    # --- the training ---
    if state:
        record.line(f"resumed     {run.resume_from_checkpoint}")
    final = Path(args.output_dir) / "final"
    try:
        if train(args, run, engine, source, data, d2t, record, progress, saver):
            checkpoints.write_final(engine, final, {"run.json": run_record.as_text(settings)}, progress, write_draft)
            record.line(f"finished {progress.step} steps in {progress.seconds:.0f} s: {final}")
            serving.print_advice(record, args, progress, config)
    except server.ServerFailed as error:
        folder = saver.save(progress)
        record.close(2)
        ranks.fail_together(f"{error}; the draft is saved in {folder}" if folder else error)
    record.close()


if __name__ == "__main__":
    ranks.run_watched(main, parse_args())
