"""Train an EAGLE-3 draft for a target model: its hidden states are formed in memory, or read from a disk or a server.

In:  a target (--target_model_path) and conversations: JSON Lines (--dataset_train_split, --dataset_validation_split),
     or a folder written by prepare_data.py (--data_path).
Out: output_dir/ with run.json, metrics.jsonl, step_XXXXXXXX/ (complete checkpoints, see core/checkpoints.py), `latest`
     and `best` (links to two of them) and final/. A folder with a model.safetensors can be served as it is.

One device:     python train_eagle3.py --target_model_path M --dataset_train_split train.jsonl --output_dir out
Eight devices:  deepspeed --num_gpus 8 train_eagle3.py --target_model_path M --data_path prepared --output_dir out
Many nodes:     deepspeed --hostfile hosts train_eagle3.py ... ; torchrun and RANK/WORLD_SIZE/MASTER_* work as well
Tiny, no GPU:   bash examples/run_tiny_online.sh

The file reads in the order of training: the draft, the objective, the engine, the data, measuring, the loop.
Slots and steps: slot j of a document drafts x[j+2+i] at step i (0-based) from the token x[j+1+i] and, at step 0, the
target's hidden states at j, later its own output of the step before (EAGLE-3, arXiv 2503.01840).
"""

import contextlib
import copy
import datetime
import functools
import json
import math
import re
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaConfig, set_seed
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, rotate_half
from transformers.utils.logging import disable_progress_bar

import prepare_data
from core import (
    attention,
    checkpoints,
    common,
    dataloader,
    draft_files,
    foreign_flags,
    hidden_states,
    losses,
    optimization,
    ranks,
    run_record,
    server,
    slots,
    target_files,
    target_model,
    vocabulary,
)

REPOSITORY = Path(__file__).resolve().parent

QKV = ("q_proj", "k_proj", "v_proj")
LLAMA_KEYS = (  # of the draft's configuration, which transformers' layer reads
    "hidden_size", "intermediate_size", "hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "max_position_embeddings", "norm_before_residual",
)  # fmt: skip
RECOMPUTED = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in the draft is random


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
    """Logits or, with what `losses.head_loss` takes, the loss: ZeRO-3 gathers weights for a module's call only."""

    def forward(self, hidden, *teaching):
        if teaching:
            return losses.head_loss(hidden, self.weight, *teaching)
        return super().forward(hidden)


class DraftLayer(nn.Module):
    """One Llama layer whose attention reads the token's embedding beside the feature.

    What the embedding adds to q, k and v is the same in each ttt_step that reads the token: it is computed once a token
    (`token_parts`) and handed to every step. Sizes: H hidden, A heads, G key-value heads of D.
    """

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        eps = config.rms_norm_eps
        self.head_dim = config.head_dim
        queries = self.head_dim * config.num_attention_heads
        keys = self.head_dim * config.num_key_value_heads
        self.input_layernorm = nn.RMSNorm(size, eps)  # of the embedding
        self.hidden_norm = nn.RMSNorm(size, eps)  # of the feature
        self.self_attn = nn.ModuleDict({
            "q_proj": HalfLinear(2 * size, queries, bias=False),
            "k_proj": HalfLinear(2 * size, keys, bias=False),
            "v_proj": HalfLinear(2 * size, keys, bias=False),
            "o_proj": nn.Linear(queries, size, bias=False),
        })  # fmt: skip
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = LlamaMLP(config)
        self.norm_before_residual = getattr(config, "norm_before_residual", False)
        self.gradient_checkpointing = False

    def token_parts(self, embeds):
        """What embeddings [T, H] add to q [T, A·D], k and v [T, G·D]."""
        x = self.input_layernorm(embeds)
        return [self.self_attn[name](x, half=0) for name in QKV]

    def forward(self, parts, feature, cos, sin, attend, rows=None):
        """One ttt_step: hidden states [n, H] of the slots `rows` (int64 [n], None: all) of feature [T, H].

        parts: token parts of q [n, A·D], k and v [T, G·D]; cos, sin [T, D];
        attend(q [n, A, D], k [T, G, D], v [T, G, D]) -> [n, A, D] and anything, which is returned as well.
        """
        normed = self.hidden_norm(feature)

        def project(name, part, x):
            x = self.self_attn[name](x, half=1, base=part)
            return x.unflatten(-1, (-1, self.head_dim))

        k = rotate(project("k_proj", parts[1], normed), cos, sin)
        v = project("v_proj", parts[2], normed)
        if rows is not None:  # keys and values of all slots, queries of the live ones
            feature, normed, cos, sin = (x.index_select(0, rows) for x in (feature, normed, cos, sin))
        q = rotate(project("q_proj", parts[0], normed), cos, sin)

        mixed, keys = attend(q, k, v)
        residual = normed if self.norm_before_residual else feature
        hidden = residual + self.self_attn["o_proj"](mixed.flatten(1))
        if self.gradient_checkpointing:  # the caller recomputes all of the layer
            return hidden + self.normed_mlp(hidden), keys
        # Of the MLP only matrix products are kept for the backward pass; the activation, cheap and large, is recomputed.
        # ZeRO-3 may gather the weights again in the backward pass, an operation that a selective checkpoint refuses.
        selective = {} if hasattr(self.mlp.down_proj.weight, "ds_id") else {"context_fn": keep_products}
        return hidden + checkpoint(self.normed_mlp, hidden, **selective, **RECOMPUTED), keys

    def normed_mlp(self, hidden):
        return self.mlp(self.post_attention_layernorm(hidden))


def rotate(x, cos, sin):
    """x [T, heads, D] turned by the angles behind cos, sin [T, D]."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def keep_products():
    """Of a checkpointed region matrix products are kept, all else is recomputed."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


class DraftModel(nn.Module):
    """The EAGLE-3 draft; its parameters carry the names of the checkpoint. Sizes: H hidden, Vd draft vocabulary.

    config: the flat config.json (core/draft_files.py). embedding [V, H]: the target's table, frozen; a plain attribute
    and not a parameter, because the target holds it already and it must reach neither the engine nor the checkpoint.
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
        self.midlayer = DraftLayer(llama)
        self.norm = nn.RMSNorm(size, eps)
        self.lm_head = DraftHead(size, config["draft_vocab_size"], bias=False)
        # Only the frequencies of transformers' rotary embedding are kept, and not as a buffer: DeepSpeed casts buffers
        # to bf16, whose 8 bits are an error of radians at long positions.
        rotary = LlamaRotaryEmbedding(llama)
        self.frequencies = rotary.inv_freq.clone()  # [D/2]
        self.rotary_scale = rotary.attention_scaling

    def initialise(self, head_rows):
        """Linear layers normal with 0.02, norms one, the head the target's own rows [Vd, H] if the sizes allow it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if head_rows.shape == self.lm_head.weight.shape:
            self.lm_head.weight.data.copy_(head_rows)

    def features(self, auxiliary):
        """Auxiliary hidden states [T, n·Ht] -> features of step 0 [T, H]."""
        if self.input_norm is not None:
            auxiliary = self.input_norm(auxiliary)
        if self.fc_norm is not None:
            chunks = auxiliary.chunk(len(self.fc_norm), dim=-1)
            auxiliary = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        return self.fc(auxiliary)

    def rotary(self, positions, dtype):
        """cos, sin [T, D] of positions [T]; computed in fp32 (float64 for a float64 draft), then rounded to dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        self.frequencies = self.frequencies.to(positions.device)  # a copy the first time, then nothing
        angles = positions[:, None].to(wide) * self.frequencies.to(wide)
        angles = torch.cat([angles, angles], dim=-1)
        cos = angles.cos() * self.rotary_scale
        sin = angles.sin() * self.rotary_scale
        return cos.to(dtype), sin.to(dtype)

    def embed(self, tokens):
        """The target's embeddings [T, H] of tokens [T], in the draft's dtype."""
        return F.embedding(tokens, self.embedding).to(self.fc.weight.dtype)

    def step(self, tokens, feature, positions, attend):
        """One ttt_step as served: tokens [T], feature [T, H], positions [T] -> next feature [T, H], logits [T, Vd]."""
        parts = self.midlayer.token_parts(self.embed(tokens))
        cos, sin = self.rotary(positions, feature.dtype)
        hidden, _ = self.midlayer(parts, feature, cos, sin, attend)
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
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    sizes = {name: config[name] for name in LLAMA_KEYS if name in config}
    return LlamaConfig(rope_parameters=rope, **sizes)


# ==================== The loss =======================================================================================


def token_loss(logits, p, mass):
    """Soft cross-entropy -Σ p log q of each prediction: [N].

    logits [N, Vd] of the draft; p [N, Vd]: the target's distribution, renormalised over the draft vocabulary; mass [N]:
    the share of the target's probability that lies in it. All in fp32 at least. Autograd differentiates this function.
    """
    return -(p * logits.log_softmax(dim=-1)).sum(dim=-1)


def token_metrics(logits, p, mass, best, draft_ids):
    """What is logged of each prediction: {name: [N]}. Each becomes NAME_0 ... NAME_{K-1} in metrics.jsonl.

    Arguments as in token_loss; best [N]: the target's argmax over its full vocabulary; draft_ids [Vd]: target ids of
    the draft vocabulary. "acc" is also what chain lengths are counted by.
    """
    q = logits.softmax(dim=-1)
    return {
        "acc": draft_ids[logits.argmax(dim=-1)] == best,
        "accept": torch.minimum(p * mass[:, None], q).sum(dim=-1),  # the share that speculative sampling accepts
    }


def objective(draft, input_ids, position_ids, auxiliary, last, head, plan, d2t, decay):
    """The training-time test over concatenated documents, for live slots only.

    Keys of later steps are seen by their own slot alone. So at step 0 an unsupervised slot matters by its key and value
    only, and later not at all: losses and gradients are those of computing every slot in every step.

    input_ids, position_ids [T] int64; auxiliary [T, n·Ht], last [T, Ht] and head: the target's; plan: slots.Plan; d2t
    [Vd] int64 offsets; decay: step i weighs decay^i.
    Returns the loss summed over slots and steps (not yet divided by anything); the sums of each step, {name: float64
    [K]}, of "loss", the metrics, and the number of "slots"; and which predictions are right (bool [K, T]).
    """
    dtype = draft.fc.weight.dtype
    live_slots = plan.live.split(plan.counts)  # K tensors [n_i]
    keeps = plan.keep.split(plan.counts)
    tokens = draft.midlayer.token_parts(draft.embed(input_ids))  # q [T, A·D], k and v [T, G·D]
    feature = draft.features(auxiliary.to(dtype))  # [T, H]
    keys = Keys()
    outputs = []
    for i, live in enumerate(live_slots):
        if i > 0 and len(live) < len(feature):  # chains that ended
            feature = feature.index_select(0, keeps[i])
            keys = keys._replace(own=[x.index_select(0, keeps[i]) for x in keys.own])
        if draft.midlayer.gradient_checkpointing:
            hidden, keys = checkpoint(ttt_step, draft, plan, position_ids, i, tokens, feature, keys, **RECOMPUTED)
        else:
            hidden, keys = ttt_step(draft, plan, position_ids, i, tokens, feature, keys)
        outputs.append(draft.norm(hidden))  # [n_i, H]
        feature = draft.next_feature(hidden, outputs[-1])

    wide = torch.promote_types(dtype, torch.float32)
    weights = [torch.full_like(live, decay**i, dtype=wide) for i, live in enumerate(live_slots)]
    hidden = torch.cat(outputs)  # [R, H]
    outputs.clear()  # twice the memory otherwise
    teacher = losses.Teacher(head, last, vocabulary.target_ids(d2t))
    loss, values = draft.lm_head(hidden, torch.cat(weights), teacher, plan, token_loss, token_metrics)

    sums = {name: step_sums(value, plan.counts) for name, value in values.items()}
    sums["slots"] = torch.stack([sums["loss"].new_full((), count) for count in plan.counts])
    correct = torch.zeros(len(live_slots), len(input_ids), dtype=torch.bool, device=input_ids.device)
    for row, live, right in zip(correct, live_slots, values["acc"].split(plan.counts), strict=True):
        row[live] = right > 0
    return loss, sums, correct


class Keys(NamedTuple):
    """Keys and values that the slots of a ttt_step see, beside those that the step adds."""

    first: tuple = ()  # step 0's of all slots: k, v [T, G, D]
    own: tuple = ()  # the live slots' own of steps 1 to i - 1: k, v [n, G, i - 1, D]


def ttt_step(draft, plan, position_ids, i, tokens, feature, keys):
    """Step i of the training-time test: hidden states [n_i, H] of its live slots, and the Keys with those it adds.

    tokens: token parts of q, k, v by token; feature: at step 0 [T, H] of all slots, later [n_i, H] of the live ones.
    """
    live = plan.live.split(plan.counts)[i]  # [n_i]
    read = live + 1 + i  # the token that each live slot reads
    q, k, v = tokens
    if i == 0:  # all slots have keys and values
        parts = (q.index_select(0, read), k.roll(-1, dims=0), v.roll(-1, dims=0))
        positions = position_ids
    else:
        parts = [x.index_select(0, read) for x in tokens]
        positions = position_ids[live] + i

    def attend(q, k, v):
        """q [n_i, A, D], the k and v that the step adds -> [n_i, A, D] and the Keys with them."""
        if i == 0:
            seen = Keys(first=(k, v))
        else:
            new = (k[:, :, None], v[:, :, None])  # [n_i, G, 1, D]
            if keys.own:
                new = [torch.cat(pair, dim=2) for pair in zip(keys.own, new, strict=True)]
            seen = Keys(keys.first, new)
        if draft.attention_backend == "flex_attention" and len(live) > 0:
            begin = live - position_ids[live]  # the first token of each slot's document
            blocks = plan.blocks.split([slots.block_count(n) for n in plan.counts], dim=1)[i]
            return attention.flex_slots(q, *seen.first, seen.own, live, begin, blocks), seen
        return attention.SlotAttention.apply(q, *seen.first, live, plan.spans[i], *seen.own), seen

    cos, sin = draft.rotary(positions, feature.dtype)
    return draft.midlayer(parts, feature, cos, sin, attend, live if i == 0 else None)


def step_sums(values, counts):
    """Sums [K] in float64 of values [R]: counts[0] rows of step 0, then counts[1] of step 1, and so on."""
    return torch.stack([part.double().sum() for part in values.split(counts)])


def chain_lengths(correct):
    """n_j [T]: the number of leading ttt_steps that are all right, of correct [K, T] bool."""
    return correct.long().cumprod(dim=0).sum(dim=0)


def metric_values(sums, decay):
    """Metrics by name, as floats, from sums over slots {"loss": [K], "acc": [K], ..., "slots": [K], "chains": number}."""
    sums = dict(sums)
    counts = [max(count, 1.0) for count in sums.pop("slots")]
    chains = sums.pop("chains")
    values = {"loss": sum(decay**i * loss for i, loss in enumerate(sums["loss"])) / counts[0]}
    for name, steps in sums.items():
        for i, total in enumerate(steps):
            values[f"{name}_{i}"] = total / counts[i]
    values["chain_length"] = 1 + chains / counts[0]
    return values


# ==================== The data =======================================================================================
def run_objective(draft, target, batches, d2t, args):
    """Yield what the draft's objective returns for each of this rank's micro-batches."""
    for batch, (auxiliary, last) in zip(batches, target.states(batches), strict=True):
        ids, positions, plan = (
            batch["input_ids"],
            batch["position_ids"],
            slots.Plan(*(batch[name] for name in slots.Plan._fields)),
        )
        yield draft(ids, positions, auxiliary, last, target.head, plan, d2t, args.ttt_step_loss_decay)


def optimizer_step(engine, target, batches, d2t, args):
    """One optimizer step on this rank's micro-batches.

    Returns metric sums [K, 4], the sum of chain lengths, and "" or, if a gradient was not finite and the step was left
    out, where that comes from.

    The loss is divided by the supervised step-0 slots of the whole step (all micro-batches, all ranks), so the gradient
    does not depend on how sequences are dealt out. DeepSpeed averages over ranks and micro-batches: hence the factors.
    """
    slots = sum(batch["counts"][0] for batch in batches)
    total = torch.full((), slots, dtype=torch.float64, device=engine.device)
    dist.all_reduce(total)
    scale = dist.get_world_size() * engine.gradient_accumulation_steps() / total.clamp(min=1)
    sums, chains, losses, skipped = 0.0, 0.0, [], False
    for number, (loss, part, correct) in enumerate(run_objective(engine, target, batches, d2t, args), 1):
        engine.set_gradient_accumulation_boundary(number == len(batches))  # steps differ in their number
        engine.backward(loss * scale.to(loss.dtype))
        if number == len(batches) and engine.zero_optimization_stage() == 0:  # there DeepSpeed does not look
            skipped = not all(p.grad.isfinite().all() for p in engine.module.parameters() if p.grad is not None)
        engine.zero_grad() if skipped else engine.step()
        losses.append(loss.detach())
        sums, chains = sums + part, chains + chain_lengths(correct).sum().double()
    if not (skipped or getattr(engine.optimizer, "overflow", False)):
        return sums, chains, ""
    if getattr(engine.optimizer, "cpu_offload", False):
        engine.optimizer.averaged_gradients = {}  # ZeRO-2 with offload would add to them in the next step
    return sums, chains, blame(batches, losses)


def blame(batches, losses):
    """Which rows of which rank gave a loss that is not finite, from every rank's micro-batches and their losses."""
    mine = [batch["rows"] for batch, loss in zip(batches, losses, strict=True) if not loss.isfinite()]
    every = ranks.gather((mine, [batch["rows"] for batch in batches]))
    if any(rows for rows, _ in every):
        return ", ".join(f"the loss of rank {rank} in rows {rows}" for rank, (rows, _) in enumerate(every) if rows)
    return "the gradient, " + ", ".join(f"rank {rank} had rows {rows}" for rank, (_, rows) in enumerate(every))


@torch.no_grad()
def evaluate(engine, target, data, d2t, args):
    """Metrics of the validation rows over all ranks; acceptance_length from walking every reply as serving does."""
    engine.eval()
    sums, chains, walk = 0.0, 0.0, torch.zeros(2, dtype=torch.float64, device=engine.device)
    sizes = {"global_batch_size": args.batch_size * dist.get_world_size(), "micro_batch_size": args.batch_size}
    with contextlib.closing(
        dataloader.read_steps(data, args, target, engine.device, name="validation", **sizes)
    ) as steps:
        for batches in steps:
            results = run_objective(engine.module, target, batches, d2t, args)
            for batch, (_, part, correct) in zip(batches, results, strict=True):
                accepted = chain_lengths(correct)
                sums, chains = sums + part, chains + accepted.sum().double()
                documents = (x.split(batch["lengths"]) for x in (accepted, batch["loss_mask"]))
                for drafts, mask in zip(*documents, strict=True):
                    passes = slots.acceptance_walk(drafts.tolist(), mask.tolist())
                    walk += torch.tensor([sum(passes) + len(passes), len(passes)]).to(walk)
    engine.train()
    values = reduced_metrics(sums, chains, args, walk)
    tokens, passes = values.pop("extra")
    return values | {"acceptance_length": tokens / max(passes, 1.0), "passes": int(passes)}


def reduced_metrics(sums, chains, args, extra):
    """Metrics over all ranks from per-rank sums; `extra` (1-D tensor) is summed along and returned under that name."""
    flat = torch.cat([sums.flatten(), chains.reshape(1), extra.to(sums)])
    dist.all_reduce(flat)
    flat = flat.tolist()  # the one synchronisation with the device
    count = sums.numel()
    table = [flat[4 * i : 4 * i + 4] for i in range(count // 4)]
    weights = [args.ttt_step_loss_decay**i for i in range(len(table))]
    return metric_values(table, flat[count], weights) | {"extra": flat[count + 1 :]}


def check_flags(args, world):
    """Fill in what follows from the flags and end the program on what cannot be; needs no file and no model."""
    output, validation = Path(args.output_dir), args.dataset_validation_split
    held = [path.name for path in output.glob("*") if re.fullmatch(r"metrics.jsonl|final|step_\d+", path.name)]
    for wrong, message in (
        (bool(args.d2t_path) != bool(args.t2d_path), "d2t_path and t2d_path belong together: give both or neither"),
        (bool(args.data_path) == bool(args.dataset_train_split),
         "give either dataset_train_split (JSON Lines) or data_path (a folder written by prepare_data.py)"),
        (args.data_path and validation, "data_path brings its own validation split: drop dataset_validation_split"),
        (held and (not args.resume or args.no_resume_from_checkpoint),
         f"output_dir {output} holds a run ({', '.join(sorted(held)[:3])}): continue it with --resume, give another "
         "one or remove it"),
        (output.is_file(), f"output_dir {output} is a file"),
    ):  # fmt: skip
        if wrong:
            common.fail(message)
    target_model.check_sharding(args, world)
    if args.total_seq_len:
        args.draft_micro_batch_size = 1  # for the arithmetic of DeepSpeed, which knows no budget of tokens
    micro, batch = args.draft_micro_batch_size * world, args.draft_global_batch_size
    if batch % micro and not args.total_seq_len:
        fits = [n for n in (batch // micro * micro, -(-batch // micro) * micro) if n]
        common.fail(
            f"draft_global_batch_size {batch} is not a multiple of draft_micro_batch_size "
            f"{args.draft_micro_batch_size} x {world} ranks = {micro}; nearest that fit: "
            f"{' or '.join(map(str, fits))}"
        )
    if args.draft_accumulation_steps not in (None, -(-batch // micro)):
        print(f"draft_accumulation_steps {args.draft_accumulation_steps} is replaced by {-(-batch // micro)}")
    args.draft_accumulation_steps = -(-batch // micro)


def draft_config_for(args, model_dir):
    """(flat configuration, auxiliary layers) of the draft: derived, a file's, or a checkpoint's, for this target."""
    given, source = {}, args.resume_from_checkpoint or args.draft_model_config
    if args.resume_from_checkpoint:
        given, _ = draft_files.read_draft(source, model_dir)
        if len(args.target_layer_ids or ()) not in (0, draft_files.num_auxiliary(given)):
            common.fail(
                f"target_layer_ids {args.target_layer_ids}: {source} reads {draft_files.num_auxiliary(given)} layers"
            )
    elif source:
        try:
            given = dict(json.loads(Path(source).read_text()))
        except (OSError, ValueError, TypeError) as error:
            common.fail(f"draft_model_config {source} is not a file with a JSON object: {error}")
    text, whole = target_files.read_target_config(model_dir, args.trust_remote_code)
    target_model.check_heads(text, args.tp_size)
    size = None if args.resume_from_checkpoint else args.draft_vocab_size  # a checkpoint's mapping decides
    return draft_files.configure(text, whole, given, source, args.target_layer_ids, size)


def prepare_run(args, world):
    """Everything that can go wrong before a model loads, on rank 0. Returns what all ranks need to go on."""
    check_flags(args, world)
    args.engine = checkpoints.engine_kind(
        optimization.engine_config(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    )
    folder, state = checkpoints.find_state(args, args.engine, ("seed", "draft_global_batch_size", "ttt_length"))
    if state:
        args.resume_from_checkpoint = str(folder)
    if "nvme" in args.engine["optimizer"]:
        print("optimizer states on nvme: DeepSpeed restores only a part of them, this training cannot be resumed")
    for name in (
        "dataset_train_split", "dataset_validation_split", "data_path", "token_freq_path", "d2t_path", "t2d_path",
    ):  # fmt: skip
        path = getattr(args, name)
        if path and not Path(path).exists():
            common.fail(f"{name} {path} does not exist")
    model_dir = target_files.resolve_target(args.target_model_path)
    config, layers = draft_config_for(args, model_dir)
    folder = args.data_path
    if not folder:
        folder = str(Path(args.output_dir) / "data")
        prepare_data.prepare(
            args.dataset_train_split,
            folder,
            args.target_model_path,
            validation_dataset=args.dataset_validation_split,
            chat_template=args.chat_template,
            max_length=args.max_length,
            num_proc=args.build_dataset_num_proc,
            seed=args.seed,
            trust_remote_code=args.trust_remote_code,
        )
    data, data_config = dataloader.open_data(folder)
    longest = {split: part["longest"] for split, part in data_config["splits"].items()}
    tokenizer = target_files.hash_tokenizer(target_files.load_tokenizer(args.target_model_path, args.trust_remote_code))
    if data_config["ingredients"]["tokenizer"] != tokenizer:
        common.fail(
            f"{folder} was prepared with another tokenizer or chat template than the target's: prepare it again"
        )
    if (most := max(longest.values())) > args.max_length:
        common.fail(f"{folder} has rows of {most} tokens, max_length is {args.max_length}: give --max_length {most}")
    if 0 < args.total_seq_len < longest["train"]:
        common.fail(
            f"total_seq_len {args.total_seq_len} is less than the {longest['train']} tokens of a row of {folder}"
        )
    if len(data["train"]) < world:
        common.fail(f"{len(data['train'])} training sequences for {world} ranks: a rank would have none")
    if args.resume_from_checkpoint:
        d2t = draft_files.read_draft(args.resume_from_checkpoint)[1].get(
            "d2t", torch.zeros(config["vocab_size"], dtype=torch.long)
        )
        if args.d2t_path or args.token_freq_path or args.draft_vocab_size not in (None, len(d2t)):
            print(f"the vocabulary mapping of {args.resume_from_checkpoint} ({len(d2t)} tokens) is kept")
    else:
        files = args.token_freq_path or Path(folder) / "token_freq.pt", args.d2t_path, args.t2d_path
        d2t = vocabulary.choose_mapping(config["draft_vocab_size"], config["vocab_size"], *files)
    config["draft_vocab_size"] = len(d2t)
    args.steps_per_epoch = math.ceil(len(data["train"]) / args.draft_global_batch_size)
    if args.total_steps <= 0:
        args.total_steps = args.num_epochs * args.steps_per_epoch
    if args.scheduler_warmup_steps is None:
        args.scheduler_warmup_steps = math.ceil(args.warmup_ratio * args.total_steps)
    args.scheduler_total_steps = args.scheduler_total_steps or args.total_steps
    if args.scheduler_warmup_steps > args.scheduler_total_steps:
        common.fail(
            f"warm-up of {args.scheduler_warmup_steps} steps in a schedule of {args.scheduler_total_steps} steps"
        )
    args.fingerprints = {"data": data_config["fingerprint"], "target": target_files.hash_target(model_dir)}
    for name, value in args.fingerprints.items() if state else ():
        if state["flags"]["fingerprints"][name] != value:
            given = {"data": folder, "target": model_dir}[name]
            common.fail(
                f"{args.resume_from_checkpoint} was trained with another {name} than {given}: give the same, or start "
                "from its weights without --resume"
            )
    ignored = {"resume", "resume_from_checkpoint", "output_dir", "local_rank", "build_dataset_num_proc", "engine"}
    changed = [f"{name} {old} -> {getattr(args, name)}" for name, old in (state or {"flags": {}})["flags"].items()
               if name not in ignored and old != getattr(args, name, old)]  # fmt: skip
    if changed:
        print(f"flags that differ from those of {args.resume_from_checkpoint}: {', '.join(changed)}")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    checkpoints.remove_leftovers(args.output_dir)
    return args, config, layers, folder, d2t, state


def build_draft(args, config, target, d2t):
    """The draft, initialised from the seed or with a checkpoint's weights."""
    set_seed(args.seed)
    draft = DraftModel(config, target.embedding)
    draft.attention_backend, draft.midlayer.gradient_checkpointing = args.attention_backend, args.gradient_checkpointing
    if args.attention_backend == "flex_attention" and target.embedding.device.type == "cpu":
        draft.attention_backend = "sdpa"
    draft.initialise(target.head.weight[vocabulary.target_ids(d2t)])
    if args.resume_from_checkpoint:
        tensors = draft_files.read_draft(args.resume_from_checkpoint)[1]
        draft_files.check_embedding(args.resume_from_checkpoint, tensors, target.embedding)
        draft.load_state_dict({n: t for n, t in tensors.items() if n not in ("embed_tokens.weight", "d2t", "t2d")})
    return draft.to(target.embedding.dtype).float()  # what a checkpoint can hold: continuing from a dry run is the same


def draft_writer(draft, d2t):
    """The function that writes the draft's full tensors and its vocabulary mapping into a folder, on rank 0."""

    def write_draft(folder, tensors):
        vocab_size = draft.config["vocab_size"]
        if draft.config["draft_vocab_size"] < vocab_size:
            t2d = torch.zeros(vocab_size, dtype=torch.bool)
            t2d[vocabulary.target_ids(d2t.cpu())] = True
            tensors = tensors | {"d2t": d2t.cpu(), "t2d": t2d}
        draft_files.write_draft(folder, draft.config, tensors)

    return write_draft


def save(engine, d2t, args, progress, record=None):
    """Write a checkpoint of this step. Returns its folder, or None if it cannot be written."""
    return checkpoints.save_step(engine, vars(args), progress, draft_writer(engine.module, d2t), record)


def due(count, interval):
    """Whether something that happens every `interval` (0 = never) happens at `count` (0 = not yet)."""
    return bool(count and interval and count % interval == 0)


def train(args, engine, target, data, d2t, record, progress):
    """The loop: every optimizer step of every epoch; then logging, evaluating and saving where they are due.

    Returns whether the training is finished: False if a signal asked it to stop.
    """
    started, good = time.monotonic() - progress.seconds, progress
    mark = saved = time.monotonic()
    if progress.evaluation_due:  # it was interrupted
        evaluate_now(engine, target, data["validation"], d2t, args, record, progress)
    steps = dataloader.read_steps(
        data["train"],
        args,
        target,
        engine.device,
        range(progress.step, args.total_steps),
        total_seq_len=args.total_seq_len,
        global_batch_size=args.draft_global_batch_size,
        micro_batch_size=args.draft_micro_batch_size,
    )
    with ranks.stop_signals() as asked, contextlib.closing(steps):
        for step, batches in enumerate(steps, progress.step + 1):
            # --- one optimizer step; then all ranks find out together whether to stop and to save ---
            rate = optimization.learning_rate_at(step - 1, args)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            sums, chains, wrong = optimizer_step(engine, target, batches, d2t, args)
            tokens = torch.tensor(sum(len(batch["input_ids"]) for batch in batches), dtype=torch.float64)
            parts = {"sums": sums, "chains": chains, "tokens": tokens}
            if wrong:
                good = good if progress.bad else copy.deepcopy(progress)
                progress.bad += 1
                progress.add({name: torch.zeros_like(part) for name, part in parts.items()})
                record.line(f"step {step} is left out, it is not finite: {wrong}")
            else:
                progress.bad = 0
                progress.add(parts)
                progress.norms.append(engine.get_global_grad_norm())
            old = record.is_main and 0 < 60 * args.save_minutes < time.monotonic() - saved
            votes = torch.tensor([len(asked), old], dtype=torch.float32, device=engine.device)
            dist.all_reduce(votes)
            stop, old = votes.tolist()
            progress.step, progress.seconds = step, time.monotonic() - started
            progress.spent += time.monotonic() - mark
            if progress.bad == args.max_bad_steps:
                folder = save(engine, d2t, args, good, record)
                message = (
                    f"{progress.bad} steps in a row are not finite, the last good state is {folder or 'not saved'}"
                )
                record.close(2)
                ranks.fail_together(f"{message}: look at the rows named above")
            if record.is_main:
                record.bar.update()
            last = step == args.total_steps

            # --- log: the values cover all steps since the last line ---
            if step % args.log_steps == 0 or last:
                log(args, record, progress, rate)
                progress.restart()

            # --- evaluate and save: by epochs, by steps, by time, and always at the end ---
            whole = 0 if step % args.steps_per_epoch else step // args.steps_per_epoch  # epochs finished, 0 within one
            before = progress.best
            due_now = last or stop or old or due(whole, args.save_interval) or due(step, args.save_steps)
            if "validation" in data and (last or due(whole, args.eval_interval) or due(step, args.eval_steps)):
                best = evaluate_now(engine, target, data["validation"], d2t, args, record, progress)
                if best and not progress.bad and (due_now or args.save_best):
                    progress.best, due_now = best, True
            if due_now:  # never after a step that was left out: --resume tries those again
                folder = save(engine, d2t, args, good if progress.bad else progress, record)
                progress.best, saved = progress.best if folder else before, time.monotonic()
                record.line(f"saved {folder}" if folder else "the training goes on")
            if stop and not last:
                record.line(f"stopped behind step {step} by {asked[0] if asked else 'a signal'}: --resume continues")
                return False
            mark = time.monotonic()  # tokens/s is about training
    return True


def evaluate_now(engine, target, data, d2t, args, record, progress):
    """Evaluate, write a row and a line; returns [value, step, metric] if it is the best so far, else None."""
    progress.evaluation_due = True  # until it is done: a server may fail
    values = evaluate(engine, target, data, d2t, args)
    progress.evaluation_due = False
    record.row("validation", progress.step, progress.step / args.steps_per_epoch, values)
    record.line(
        f"evaluation at step {progress.step} | {run_record.metrics_line(values, args.ttt_length)} | "
        f"acceptance_length {values['acceptance_length']:.3f}"
    )
    value, sign, best = values[args.best_metric], -1 if args.best_metric == "loss" else 1, progress.best
    better = not best or best[2] != args.best_metric or sign * value > sign * best[0]
    return [value, progress.step, args.best_metric] if better and math.isfinite(value) else None


def log(args, record, progress, rate):
    """A row and a line about the steps since the last ones."""
    step, total = progress.step, args.total_steps
    sums = progress.sums
    values = reduced_metrics(sums["sums"], sums["chains"], args, sums["tokens"].reshape(1))
    norms = [float(norm) for norm in progress.norms if norm is not None]  # ZeRO stage 0 reports none
    values |= {
        "lr": rate,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "tokens_per_second": values.pop("extra")[0] / progress.spent,
        "seconds": progress.seconds,
    }
    record.row("train", step, step / args.steps_per_epoch, values)
    left = datetime.timedelta(seconds=round(progress.seconds / step * (total - step)))
    norm = "-" if values["grad_norm"] is None else f"{values['grad_norm']:.3f}"
    record.line(
        f"step {step}/{total} {step / total:.0%} | {run_record.metrics_line(values, args.ttt_length)} | "
        f"lr {rate:.2e} | grad_norm {norm} | {values['tokens_per_second']:.0f} tokens/s | left {left}"
    )


# (name, type, default, help, least value if any): see parse_flags
FLAGS = {
    "target and data": [
        ("target_model_path", str, ..., "folder or hub id; a folder may hold one nested model or an MLflow model"),
        ("dataset_train_split", str, None, "JSON Lines of conversations; prepared into output_dir/data"),
        ("dataset_validation_split", str, None, "the same, for evaluation; none: no evaluation"),
        ("data_path", str, None, "folder written by prepare_data.py, instead of the two above"),
        ("chat_template", str, "llama3", f"{', '.join(prepare_data.TEMPLATES)} or auto, which finds it out"),
        ("max_length", int, 2048, "tokens; longer conversations are cut at the right", 2),
        ("build_dataset_num_proc", int, 96, "processes that tokenise, at most the cores available", 1),
        ("trust_remote_code", common.boolean, False, "run code that comes with the target"),
    ],
    "how ranks share the target": target_model.SHARING_FLAGS,
    "hidden states on disk": hidden_states.SOURCE_FLAGS,
    "draft": [
        ("draft_model_config", str, None, "JSON of the draft; none: derived from the target"),
        ("draft_vocab_size", int, None, "tokens that the draft can propose; none: the mapping's, or all", 1),
        ("token_freq_path", str, None, "token counts to choose them by; none: the prepared data's token_freq.pt"),
        ("d2t_path", str, None, "mapping of build_vocab_mapping.py, with t2d_path; none: built from the counts"),
        ("t2d_path", str, None, "the other half of the mapping"),
        ("target_layer_ids", [int], None, "auxiliary layers, i = after i layers; none: 2 L//2 L-3"),
        ("attention_backend", ("flex_attention", "sdpa"), "flex_attention", "the former on GPUs only; same numbers"),
        ("dry_run", common.boolean, False, "initialise the draft, save it as step_00000000, and exit"),
    ],
    "objective and optimizer": [
        ("ttt_length", int, 7, "steps K of the training-time test", 1),
        ("ttt_step_loss_decay", float, 0.8, "the weight of step i is this to the power of i", 0),
        ("learning_rate", float, 1e-4, "peak", 0),
        ("weight_decay", float, 0.01, "of AdamW", 0),
        ("max_grad_norm", float, 0.5, "global norm; 0 = no clipping", 0),
        ("warmup_ratio", float, 0.015, "share of the total steps", 0),
        ("scheduler_type", ("cosine", "linear", "constant"), "cosine", "learning rate after the warm-up"),
        ("scheduler_warmup_steps", int, None, "optimizer steps; none: from warmup_ratio", 0),
        ("scheduler_total_steps", int, None, "optimizer steps until the schedule ends; none: with the training", 0),
        ("scheduler_num_cosine_cycles", float, 0.5, "0.5 = once down", 0),
    ],
    "length and batches": [
        ("num_epochs", int, 2, "passes over the data", 1),
        ("total_steps", int, -1, "optimizer steps; positive: instead of num_epochs, the data repeats"),
        ("draft_global_batch_size", int, 8, "sequences per optimizer step, all ranks", 1),
        ("draft_micro_batch_size", int, 1, "sequences per rank in one forward of the draft", 1),
        ("total_seq_len", int, 0, "tokens of a micro-batch, instead of draft_micro_batch_size: what fits; 0 = off", 0),
        ("draft_accumulation_steps", int, None, "derived: global / (micro x ranks); another value is replaced"),
        ("num_workers", int, 2, "processes per rank that read ahead; 0 = none", 0),
        ("prefetch_factor", int, 4, "optimizer steps that each of them reads ahead", 1),
        (
            "gradient_checkpointing",
            common.boolean,
            False,
            "recompute the draft's layer in the backward pass, to save memory",
        ),
    ],
    "run": [
        ("output_dir", str, "./output", "where everything is written"),
        ("log_steps", int, 50, "optimizer steps between two log lines", 1),
        ("eval_interval", int, 1, "epochs; the end is always evaluated", 1),
        ("save_interval", int, 1, "epochs; the end is always saved", 1),
        ("eval_steps", int, 0, "optimizer steps; 0 = by epoch only", 0),
        ("save_steps", int, 0, "optimizer steps; 0 = by epoch only", 0),
        ("save_minutes", float, 0, "minutes between two checkpoints; 0 = by epoch and steps only", 0),
        ("save_total_limit", int, 0, "newest checkpoints that are kept, beside the best one; 0 = all", 0),
        ("save_best", common.boolean, False, "save whenever the evaluation is the best so far; `best` links to it"),
        ("best_metric", ("acceptance_length", "loss"), "acceptance_length", "of the validation split"),
        ("max_bad_steps", int, 10, "steps in a row whose gradient is not finite, which end the training", 1),
        ("resume", common.boolean, False, "go on from the newest complete checkpoint of output_dir, if there is one"),
        ("resume_from_checkpoint", str, None, "with resume: if output_dir has none; without: draft to start from"),
        ("no_resume_from_checkpoint", common.boolean, False, "start anew, even with resume"),
        ("report_to", str, "none", "none, swanlab, wandb, tensorboard, mlflow, trackio; several by comma"),
        ("run_name", str, None, "name of the run in the trackers; none: theirs"),
        ("log_dir", str, None, "folder of the trackers' files; none: output_dir/logs"),
        ("seed", int, 0, "of initialisation and data order"),
        ("dist_timeout", float, 20, "minutes a collective may take; preparing conversations on the fly counts too", 0),
        ("deepspeed_config", str, str(REPOSITORY / "ds_configs" / "zero2.json"), "ZeRO, precision, offload"),
        ("local_rank", int, -1, "set by the launcher; -1 = from LOCAL_RANK"),
    ],
}


def parse_args(argv=None):
    args = common.parse_flags(
        __doc__, FLAGS, foreign_flags.drop(argv, foreign_flags.OF_TRAINERS, foreign_flags.ALIASES)
    )
    args.report_to = [name for name in args.report_to.split(",") if name not in ("", "none")]
    unknown = [name for name in args.report_to if name not in run_record.TRACKERS]
    if unknown:
        common.fail(f"report_to {','.join(unknown)}: choose from none, {', '.join(run_record.TRACKERS)}")
    args.log_dir = args.log_dir or str(Path(args.output_dir) / "logs")
    return args


def main(args):
    device, world = ranks.start_distributed(args.dist_timeout, args.local_rank), dist.get_world_size()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, every step
    if dist.get_rank() != 0 or not sys.stderr.isatty():
        disable_progress_bar()
    args, config, layers, data_folder, d2t, state = ranks.on_first_rank(lambda: prepare_run(args, world))
    ranks.check_shared("output_dir", args.output_dir)
    data, data_config = dataloader.open_data(data_folder)
    model_dir = ranks.on_each_node(lambda: target_files.resolve_target(args.target_model_path))

    target = hidden_states.open_target(args, model_dir, device, layers, data, data_config)
    config["torch_dtype"] = str(target.embedding.dtype).removeprefix("torch.")
    draft = build_draft(args, config, target, d2t.to(target.embedding.device))

    first_step = state["step"] if state else 0
    source = ranks.on_first_rank(lambda: run_record.edited_source(__file__, first_step))
    settings = run_record.run_settings(args, data_config, first_step, source)
    if dist.get_rank() == 0:
        for name, text in source.items():
            common.write_atomic(Path(args.output_dir) / name, text)
        counts = vocabulary.read_token_freq(Path(data_folder) / "token_freq.pt")
        share = sum(counts.get(token, 0) for token in vocabulary.target_ids(d2t).tolist()) / sum(counts.values())
        print(run_record.summary(args, config, layers, draft, target, data, data_config, share))
        common.write_atomic(Path(args.output_dir) / "run.json", json.dumps(settings, indent=2) + "\n")

    engine, d2t = optimization.build_engine(args, draft, device), d2t.to(device)
    progress = checkpoints.Progress()
    if state:
        progress = checkpoints.resume(engine, args.resume_from_checkpoint, state, vars(args))
    if args.dry_run:
        if not save(engine, d2t, args, progress):
            sys.exit(2)
        return
    record, output_dir = run_record.Record(args, settings), Path(args.output_dir)
    if state:
        record.line(f"resumed     {args.resume_from_checkpoint}")
    try:
        if train(args, engine, target, data, d2t, record, progress):
            checkpoints.write_final(
                engine,
                output_dir / "final",
                {"run.json": json.dumps(settings, indent=2) + "\n"},
                draft_writer(engine.module, d2t),
            )
            record.line(f"finished {progress.step} steps in {progress.seconds:.0f} s: {output_dir / 'final'}")
    except server.ServerFailed as error:
        folder = save(engine, d2t, args, progress, record)
        record.close(2)
        ranks.fail_together(f"{error}; the draft is saved in {folder}" if folder else error)
    record.close()


if __name__ == "__main__":
    ranks.run_watched(main, parse_args())
