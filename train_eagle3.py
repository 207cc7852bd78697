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
import datetime
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
    conversation_files,
    dataloader,
    draft_files,
    foreign_flags,
    losses,
    optimization,
    ranks,
    run_record,
    server,
    setup,
    slots,
    states,
    target_files,
    target_model,
    vocabulary,
)

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
        self.self_attn = nn.ModuleDict()
        self.self_attn.q_proj = HalfLinear(2 * size, queries, bias=False)
        self.self_attn.k_proj = HalfLinear(2 * size, keys, bias=False)
        self.self_attn.v_proj = HalfLinear(2 * size, keys, bias=False)
        self.self_attn.o_proj = nn.Linear(queries, size, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = LlamaMLP(config)
        self.norm_before_residual = getattr(config, "norm_before_residual", False)
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
        parts,  # token parts of q [n, A·D], k and v [T, G·D]
        feature,  # [T, H]
        cos,  # [T, D]
        sin,
        attend,
        rows=None,  # int64 [n]: the slots that have a query; None: all
    ):
        """One ttt_step: hidden states [n, H] of the slots `rows`; keys and values are those of all slots.

        attend(q [n, A, D], k [T, G, D], v [T, G, D]) -> [n, A, D] and anything, which is returned as well.
        """
        q_part, k_part, v_part = parts
        linears = self.self_attn
        normed = self.hidden_norm(feature)
        k = self.heads(linears.k_proj(normed, half=1, base=k_part))
        v = self.heads(linears.v_proj(normed, half=1, base=v_part))
        k = rotate(k, cos, sin)
        if rows is not None:  # keys and values of all slots, queries of the live ones
            feature = feature.index_select(0, rows)
            normed = normed.index_select(0, rows)
            cos = cos.index_select(0, rows)
            sin = sin.index_select(0, rows)
        q = self.heads(linears.q_proj(normed, half=1, base=q_part))
        q = rotate(q, cos, sin)

        mixed, keys = attend(q, k, v)
        residual = normed if self.norm_before_residual else feature
        hidden = residual + linears.o_proj(mixed.flatten(1))
        if self.gradient_checkpointing:  # the caller recomputes all of the layer
            return hidden + self.normed_mlp(hidden), keys
        # Of the MLP only matrix products are kept for the backward pass: its activation, large, is cheap to recompute.
        # ZeRO-3 may gather the weights again in the backward pass, which a selective checkpoint refuses.
        options = dict(RECOMPUTED)
        if not hasattr(self.mlp.down_proj.weight, "ds_id"):
            options["context_fn"] = keep_products
        return hidden + checkpoint(self.normed_mlp, hidden, **options), keys

    def heads(self, x):
        """[T, heads · D] -> [T, heads, D]"""
        return x.unflatten(-1, (-1, self.head_dim))

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
        """The target's embeddings [T, H] of tokens [T], in the draft's dtype."""
        embeds = F.embedding(tokens, self.embedding)
        return embeds.to(self.fc.weight.dtype)

    def step(self, tokens, feature, positions, attend):
        """One ttt_step as served: tokens [T], feature [T, H], positions [T] -> next feature [T, H], logits [T, Vd].

        attend(q [T, A, D], k [T, G, D], v [T, G, D]) -> [T, A, D].
        """
        parts = self.midlayer.token_parts(self.embed(tokens))
        cos, sin = self.rotary(positions, feature.dtype)

        def attend_only(q, k, v):
            return attend(q, k, v), None

        hidden, _ = self.midlayer(parts, feature, cos, sin, attend_only)
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


def token_loss(logits, p, mass):
    """Soft cross-entropy -Σ p log q of each prediction: [N].

    logits [N, Vd] of the draft; p [N, Vd]: the target's distribution, renormalised over the draft vocabulary; mass [N]:
    the share of the target's probability that lies in it. All in fp32 at least. Autograd differentiates
    this function. On GPUs it is compiled as one graph: no .item(), no print, no boolean indexing.
    """
    log_q = logits.log_softmax(dim=-1)
    return -(p * log_q).sum(dim=-1)


def token_metrics(logits, p, mass, best, draft_ids):
    """What is logged of each prediction: {name: [N]}. Each becomes NAME_0 ... NAME_{K-1} in metrics.jsonl.

    Arguments as in token_loss; best [N]: the target's argmax over its full vocabulary; draft_ids [Vd]: target ids of
    the draft vocabulary. "acc" is also what chain lengths are counted by.
    """
    q = logits.softmax(dim=-1)
    p_full = p * mass[:, None]  # not renormalised: the rest is rejected for certain
    predicted = draft_ids[logits.argmax(dim=-1)]
    return {
        "acc": predicted == best,
        "accept": torch.minimum(p_full, q).sum(dim=-1),  # the share that speculative sampling accepts
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
    decay,  # step i weighs decay^i
):
    """The training-time test over concatenated documents, for live slots only.

    Keys of later steps are seen by their own slot alone. So at step 0 an unsupervised slot matters by its key and value
    only, and later not at all: losses and gradients are those of computing every slot in every step.

    Returns the loss summed over slots and steps (not yet divided by anything); the sums of each step, {name: float64
    [K]}, of "loss", the metrics, and the number of "slots"; and which predictions are right (bool [K, T]).
    """
    layer = draft.midlayer
    dtype = draft.fc.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    live_slots = plan.live.split(plan.counts)  # K tensors [n_i]
    keeps = plan.keep.split(plan.counts)
    tokens = layer.token_parts(draft.embed(input_ids))  # q [T, A·D], k and v [T, G·D]
    feature = draft.features(auxiliary.to(dtype))  # [T, H]
    keys = Keys()
    outputs = []
    weights = []
    for i, live in enumerate(live_slots):
        if i > 0 and len(live) < len(feature):  # some chains have ended
            feature = feature.index_select(0, keeps[i])
            keys = keys.select(keeps[i])
        arguments = (draft, plan, position_ids, i, tokens, feature, keys)
        if layer.gradient_checkpointing:
            hidden, keys = checkpoint(ttt_step, *arguments, **RECOMPUTED)
        else:
            hidden, keys = ttt_step(*arguments)  # [n_i, H]
        del arguments  # the keys before these
        normed = draft.norm(hidden)
        outputs.append(normed)  # [n_i, H]
        weights.append(torch.full_like(live, decay**i, dtype=wide))  # [n_i]
        feature = draft.next_feature(hidden, normed)

    hidden = torch.cat(outputs)  # [R, H]
    outputs.clear()  # twice the memory otherwise
    weights = torch.cat(weights)  # [R]
    teacher = losses.Teacher(head, last, vocabulary.target_ids(d2t))
    loss, values = draft.lm_head(hidden, weights, teacher, plan, token_loss, token_metrics)

    sums = {name: losses.sums_of_steps(value, plan.counts) for name, value in values.items()}
    sums["slots"] = torch.stack([sums["loss"].new_full((), count) for count in plan.counts])
    correct = input_ids.new_zeros(len(live_slots), len(input_ids), dtype=torch.bool)
    rights = values["acc"].split(plan.counts)
    for row, live, right in zip(correct, live_slots, rights, strict=True):
        row[live] = right > 0
    return loss, sums, correct


class Keys(NamedTuple):
    """Keys and values that slots attend to."""

    first: tuple = ()  # step 0's, of all slots: k, v [T, G, D]
    own: tuple = ()  # the live slots' own of steps 1 to i: k, v [n, G, i, D]

    def select(self, places):
        """The Keys of the slots at these places [n'] among the live ones."""
        own = tuple(x.index_select(0, places) for x in self.own)
        return Keys(self.first, own)

    def add(self, k, v):
        """The Keys with those [n, G, D] that the live slots add in a further step."""
        k = k[:, :, None]
        v = v[:, :, None]
        if self.own:
            before_k, before_v = self.own
            k = torch.cat([before_k, k], dim=2)
            v = torch.cat([before_v, v], dim=2)
        return Keys(self.first, (k, v))


def ttt_step(
    draft,
    plan,
    position_ids,
    i,
    tokens,  # token parts of q [T, A·D], k and v [T, G·D]
    feature,  # at step 0 [T, H] of all slots, later [n_i, H] of the live ones
    keys,
):
    """Step i of the training-time test: hidden states [n_i, H] of its live slots, and the Keys with those it adds."""
    live = plan.live.split(plan.counts)[i]  # [n_i]
    read = live + 1 + i  # the token that each live slot reads
    if i == 0:  # all slots have keys and values
        q, k, v = tokens
        q = q.index_select(0, read)
        k = k.roll(-1, dims=0)
        v = v.roll(-1, dims=0)
        parts = (q, k, v)
        positions = position_ids
        rows = live
    else:
        parts = [x.index_select(0, read) for x in tokens]
        positions = position_ids[live] + i
        rows = None

    def attend(q, k, v):
        """q [n_i, A, D], the k and v that the step adds -> [n_i, A, D] and the Keys with them."""
        seen = keys.add(k, v) if i > 0 else Keys(first=(k, v))
        mixed = attend_slots(draft.attention_backend, plan, position_ids, i, live, q, seen)
        return mixed, seen

    cos, sin = draft.rotary(positions, feature.dtype)
    return draft.midlayer(parts, feature, cos, sin, attend, rows)


def attend_slots(backend, plan, position_ids, i, live, q, keys):
    """Attention [n_i, A, D] of step i's queries q over the step-0 keys up to their slot, and over the slot's own."""
    k, v = keys.first
    if backend == "flex_attention" and len(live) > 0:
        begin = live - position_ids[live]  # the first token of each slot's document
        sizes = [slots.block_count(count) for count in plan.counts]
        blocks = plan.blocks.split(sizes, dim=1)[i]
        return attention.flex_slots(q, k, v, keys.own, live, begin, blocks)
    spans = plan.spans[i]
    return attention.SlotAttention.apply(q, k, v, live, spans, *keys.own)


def chain_lengths(correct):
    """n_j [T]: the number of leading ttt_steps that are all right, of correct [K, T] bool."""
    alive = correct.long().cumprod(dim=0)
    return alive.sum(dim=0)


def metric_values(sums, decay):
    """Metrics by name, as floats, from sums over slots {"loss": [K], "acc": [K], ..., "slots": [K], "chains"}."""
    steps = dict(sums)
    chains = steps.pop("chains")
    counts = [max(count, 1.0) for count in steps.pop("slots")]
    loss = sum(decay**i * total for i, total in enumerate(steps["loss"]))
    values = {"loss": loss / counts[0]}
    for name, totals in steps.items():
        for i, total in enumerate(totals):
            values[f"{name}_{i}"] = total / counts[i]
    values["chain_length"] = 1 + chains / counts[0]
    return values


# ==================== Batches ========================================================================================


def batch_of(ttt_length):
    """The `collate` of dataloader.read_steps: rows of a micro-batch -> Batch with its plan of slots."""

    def collate(rows):
        fields = dataloader.concatenate(rows)
        lengths = fields["lengths"]
        supervised = slots.supervised_slots(fields["loss_mask"], slots.documents_of(lengths), ttt_length)
        plan = slots.plan_slots(supervised, lengths)
        return dataloader.Batch(**fields, plan=plan, normaliser=plan.counts[0])

    return collate


def run_draft(draft, batch, states, target, d2t, decay):
    """The objective of one micro-batch: loss sum, {name: sums}, and the accepted drafts n_j of each slot [T]."""
    auxiliary, last = states
    loss, sums, correct = draft(
        batch.input_ids,
        batch.position_ids,
        auxiliary,
        last,
        target.head,
        batch.plan,
        d2t,
        decay,
    )
    accepted = chain_lengths(correct)
    sums["chains"] = accepted.sum().double()
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
        batch_of(args.ttt_length),
        device,
        name="validation",
        global_batch_size=args.batch_size * dist.get_world_size(),
        micro_batch_size=args.batch_size,
        **loader_options(args),
    )
    with contextlib.closing(steps):
        for batches in steps:
            for batch, states in zip(batches, source.states(batches), strict=True):
                _, found, accepted = run_draft(
                    engine.module, batch, states, source.target, d2t, args.ttt_step_loss_decay
                )
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
    values = metric_values(sums, args.ttt_step_loss_decay)
    return values | {"acceptance_length": tokens / max(passes, 1.0), "passes": int(passes)}


# ==================== The loop =======================================================================================


def train(args, run, engine, source, data, d2t, record, progress, save):
    """Every optimizer step of every epoch; then logging, evaluating and saving where they are due.

    save(progress) writes a complete checkpoint and returns its folder, or None.
    Returns whether the training is finished: False if a signal asked it to stop.
    """

    def forward(draft, batch, states):
        loss, sums, _ = run_draft(draft, batch, states, source.target, d2t, args.ttt_step_loss_decay)
        return loss, sums

    start = time.monotonic() - progress.seconds
    if progress.evaluation_due:  # it was interrupted
        evaluate_now(args, run, engine, source, data, d2t, record, progress)
    steps = dataloader.read_steps(
        data["train"],
        source,
        batch_of(args.ttt_length),
        engine.device,
        range(progress.step, run.total_steps),
        global_batch_size=args.draft_global_batch_size,
        micro_batch_size=run.draft_micro_batch_size,
        total_seq_len=args.total_seq_len,
        **loader_options(args),
    )
    mark = saved_at = time.monotonic()
    last_good = progress
    with ranks.stop_signals() as signals, contextlib.closing(steps):
        for step, batches in enumerate(steps, progress.step + 1):
            # --- one optimizer step ---
            rate = optimization.learning_rate_at(step - 1, args, run)
            optimization.set_learning_rate(engine, rate)
            sums, problem = optimization.optimizer_step(engine, batches, source.states(batches), forward)
            if problem and not progress.bad:
                last_good = copy.deepcopy(progress)
            count_step(progress, engine, batches, sums, problem)
            if args.ema_decay and not problem:
                optimization.update_average(progress.average, engine, args.ema_decay, step)
            if problem:
                record.line(f"step {step} is left out, it is not finite: {problem}")
            too_old = 0 < 60 * args.save_minutes < time.monotonic() - saved_at
            stop, too_old = ranks.any_rank(engine.device, signals, too_old)
            now = time.monotonic()  # the ranks have met, so the device has finished the step
            progress.step = step
            progress.seconds = now - start
            progress.spent += now - mark
            if progress.bad == args.max_bad_steps:
                end_badly(record, progress.bad, save(last_good))
            record.advance()

            # --- what is due ---
            last = step == run.total_steps
            save_due = stop or too_old or is_due(run, step, args.save_interval, args.save_steps)
            evaluation_due = "validation" in data and is_due(run, step, args.eval_interval, args.eval_steps)

            # --- log: the values cover all steps since the last line ---
            if last or step % args.log_steps == 0:
                log(args, run, record, progress, rate)

            # --- evaluate and save: never a skipped step, --resume tries those again ---
            best_before = progress.best
            if evaluation_due:
                best = evaluate_now(args, run, engine, source, data, d2t, record, progress)
                if best and not progress.bad and (save_due or args.save_best):
                    progress.best = best
                    save_due = True
            if save_due:
                folder = save(last_good if progress.bad else progress)
                saved_at = time.monotonic()
                if not folder:
                    progress.best = best_before
                record.line(f"saved {folder}" if folder else "the training goes on")

            # --- stop ---
            if stop and not last:
                record.line(f"stopped after step {step} by {(signals or ['a signal'])[0]}: --resume continues")
                return False
            mark = time.monotonic()  # tokens/s is about training
    return True


def loader_options(args):
    return {"seed": args.seed, "num_workers": args.num_workers, "prefetch_factor": args.prefetch_factor}


def count_step(progress, engine, batches, sums, problem):
    """Count an optimizer step in the Progress: its sums, tokens and gradient norm, or that it is skipped."""
    tokens = sum(len(batch.input_ids) for batch in batches)
    sums["tokens"] = torch.full((), tokens, dtype=torch.float64, device=engine.device)
    if problem:
        progress.bad += 1
        sums = {name: torch.zeros_like(value) for name, value in sums.items()}
    else:
        progress.bad = 0
        progress.norms.append(optimization.gradient_norm(engine))
    progress.add(sums)


def is_due(run, step, epochs, steps):
    """Whether something is due after `step`: at the end, every `epochs` epochs, every `steps` steps (0 = never)."""
    if step == run.total_steps or step % (epochs * run.steps_per_epoch) == 0:
        return True
    return steps > 0 and step % steps == 0


def end_badly(record, count, folder):
    """End the program after `count` skipped steps in a row; folder: the checkpoint of the last good state, or None."""
    record.close(2)
    ranks.fail_together(
        f"{count} steps in a row are not finite, the last good state is {folder or 'not saved'}: look at the rows "
        "named above"
    )


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


def log(args, run, record, progress, rate):
    """A row and a line about the steps since the last ones."""
    step = progress.step
    sums = optimization.reduce_sums(progress.sums)
    tokens = sums.pop("tokens")
    norms = [float(norm) for norm in progress.norms if norm is not None]
    values = metric_values(sums, args.ttt_step_loss_decay) | {
        "lr": rate,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "tokens_per_second": tokens / progress.spent,
        "seconds": progress.seconds,
    }
    progress.restart()
    record.row("train", step, step / run.steps_per_epoch, values)
    left = datetime.timedelta(seconds=round(progress.seconds / step * (run.total_steps - step)))
    norm = f"{values['grad_norm']:.3f}" if norms else "-"
    record.line(
        f"step {step}/{run.total_steps} {step / run.total_steps:.0%} | {run_record.metrics_line(values)} | "
        f"lr {rate:.2e} | grad_norm {norm} | {values['tokens_per_second']:.0f} tokens/s | left {left}"
    )


# ==================== Flags ==========================================================================================


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
    args = foreign_flags.parse(parser, argv, *foreign)
    args.report_to = [name for name in args.report_to.split(",") if name not in ("", "none")]
    unknown = [name for name in args.report_to if name not in run_record.TRACKERS]
    if unknown:
        common.fail(f"report_to {','.join(unknown)}: choose from none, {', '.join(run_record.TRACKERS)}")
    args.log_dir = args.log_dir or str(Path(args.output_dir) / "logs")
    return args


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
    add("--draft_model_config", help="JSON of the draft; none: derived from the target")
    add("--draft_vocab_size", type=POSITIVE, help="tokens it can propose; none: the mapping's, or all")
    add("--token_freq_path", help="token counts to choose them by; none: the prepared data's token_freq.pt")
    add("--d2t_path", help="mapping of build_vocab_mapping.py, with t2d_path; none: built from the counts")
    add("--t2d_path", help="the other half of the mapping")
    add("--target_layer_ids", type=int, nargs="+", help="auxiliary layers, i = after i layers; none: 2 L//2 L-3")
    backends = ("flex_attention", "sdpa")
    add("--attention_backend", choices=backends, default=backends[0], help="flex on GPUs only; same numbers")
    add("--dry_run", action=common.Switch, help="save the initial draft as step_00000000, and exit; needs no data")


def add_objective_flags(add):
    add("--ttt_length", type=POSITIVE, default=7, help="steps K of the training-time test")
    add("--ttt_step_loss_decay", type=NOT_NEGATIVE, default=0.8, help="step i weighs this to the power of i")


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
    set_seed(args.seed)
    draft = DraftModel(config, target.embedding)
    draft.attention_backend = args.attention_backend
    if target.embedding.device.type == "cpu":  # FlexAttention has no backward pass there
        draft.attention_backend = "sdpa"
    draft.midlayer.gradient_checkpointing = args.gradient_checkpointing
    draft.initialise(target.head.weight[vocabulary.target_ids(d2t)])
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
    default = vars(parse_args(["--target_model_path", args.target_model_path]))
    prepared = ranks.on_first_rank(lambda: setup.prepare(args, default, prepare_conversations))
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
        print(run_record.summary(args, run, config, layers, draft, target, data, data_config, covered))
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
        folder = checkpoints.save_step(engine, flags, progress, write_draft)
        if not folder:
            sys.exit(2)
        if dist.get_rank() == 0:
            print(f"saved {folder}: start from it with --resume_from_checkpoint {args.output_dir}")
        return
    record = run_record.Record(args, settings, run.total_steps)

    def save(progress):
        return checkpoints.save_step(engine, flags, progress, write_draft, record)

    # --- the training ---
    if state:
        record.line(f"resumed     {run.resume_from_checkpoint}")
    final = Path(args.output_dir) / "final"
    try:
        if train(args, run, engine, source, data, d2t, record, progress, save):
            checkpoints.write_final(engine, final, {"run.json": run_record.as_text(settings)}, progress, write_draft)
            record.line(f"finished {progress.step} steps in {progress.seconds:.0f} s: {final}")
    except server.ServerFailed as error:
        folder = save(progress)
        record.close(2)
        ranks.fail_together(f"{error}; the draft is saved in {folder}" if folder else error)
    record.close()


if __name__ == "__main__":
    ranks.run_watched(main, parse_args())
