"""Train a DFlash or DSpark draft for a target model: all tokens of a block are drafted in one forward.

In:  a target (--target_model_path) and conversations: a data set (--dataset_train_split, --dataset_validation_split),
     or a folder written by prepare_data.py (--data_path).
Out: output_dir/ with run.json, metrics.jsonl, curves.png, step_XXXXXXXX/ (complete checkpoints, core/checkpoints.py),
     `latest` and `best` (links to two of them) and final/. A folder with a model.safetensors can be served as it is.

One device:     python train_dflash.py --target_model_path M --dataset_train_split train.jsonl --output_dir out
Eight devices:  deepspeed --num_gpus 8 train_dflash.py --target_model_path M --data_path prepared --output_dir out
DSpark:         python train_dflash.py --algorithm dspark --target_model_path M --data_path prepared --output_dir out
Tiny, no GPU:   bash examples/run_tiny_dflash.sh

Everything that research edits is in this file: the draft, the losses, the weights, the objective, evaluation, the loop,
the flags. A block is an anchor x[a] and masks behind it; it reads the target's hidden states of the tokens before a
(DFlash, arXiv 2602.06036). Prediction i is about x[a+1+i]; DFlash makes it at mask i, DSpark (arXiv 2607.05147) at
token i of the block, the anchor first, and corrects it by the token before.
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
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils.logging import disable_progress_bar

import train_eagle3
from core import (
    attention,
    block_config,
    block_files,
    blocks,
    checkpoints,
    common,
    dataloader,
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

FLOOR = 0.5  # of a survival in D-PACE

# ==================== The draft ======================================================================================


class DraftLayer(nn.Module):
    """One decoder layer: the tokens of a block attend to the context and to their block.

    Keys and values of the context come from the target's states by the same projections. Sizes: H hidden, A heads, G
    key-value heads of D.
    """

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        eps = config.rms_norm_eps
        self.head_dim = config.head_dim
        queries = self.head_dim * config.num_attention_heads
        keys = self.head_dim * config.num_key_value_heads
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = nn.ModuleDict()
        self.self_attn.q_proj = nn.Linear(size, queries, bias=False)
        self.self_attn.k_proj = nn.Linear(size, keys, bias=False)
        self.self_attn.v_proj = nn.Linear(size, keys, bias=False)
        self.self_attn.o_proj = nn.Linear(queries, size, bias=False)
        self.self_attn.q_norm = nn.RMSNorm(self.head_dim, eps)
        self.self_attn.k_norm = nn.RMSNorm(self.head_dim, eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = LlamaMLP(config)
        self.gradient_checkpointing = False

    def read(self, context, cos, sin):
        """Keys and values [T, G, D] of the context [T, H], which is normed already; cos, sin [T, D]."""
        k = self.project("k", context, cos, sin)
        v = self.heads("v", context)
        return k, v

    def forward(
        self,
        hidden,  # [n, H]: tokens of blocks
        cos,  # [n, D]
        sin,
        attend,
    ):
        """Hidden states [n, H] behind the layer. attend(q [n, A, D], k [n, G, D], v [n, G, D]) -> [n, A, D]."""
        normed = self.input_layernorm(hidden)
        q = self.project("q", normed, cos, sin)
        k = self.project("k", normed, cos, sin)
        v = self.heads("v", normed)
        mixed = attend(q, k, v)
        hidden = hidden + self.self_attn.o_proj(mixed.flatten(1))
        if self.gradient_checkpointing:  # the caller recomputes all of the layer
            return hidden + self.normed_mlp(hidden)
        options = dict(train_eagle3.RECOMPUTED)
        if not hasattr(self.mlp.down_proj.weight, "ds_id"):
            options["context_fn"] = train_eagle3.keep_products
        return hidden + checkpoint(self.normed_mlp, hidden, **options)

    def heads(self, name, x):
        """q, k or v [n, heads, D] of x [n, H]."""
        return self.self_attn[f"{name}_proj"](x).unflatten(-1, (-1, self.head_dim))

    def project(self, name, x, cos, sin):
        """q or k [n, heads, D]: normed per head and rotated."""
        normed = self.self_attn[f"{name}_norm"](self.heads(name, x))
        return train_eagle3.rotate(normed, cos, sin)

    def normed_mlp(self, hidden):
        return self.mlp(self.post_attention_layernorm(hidden))


class MarkovHead(nn.Module):
    """What the token before adds to the logits: W2 W1[token], of rank r."""

    def __init__(self, config):
        super().__init__()
        rank = config["markov_rank"]
        self.markov_w1 = nn.Embedding(config["vocab_size"], rank)
        self.markov_w2 = train_eagle3.DraftHead(rank, config["draft_vocab_size"], bias=False)


class Confidence(nn.Linear):
    """The logit [n] of the chance that a draft is accepted, of [hidden state, token before] [n, H + r], in fp32."""

    def forward(self, x):
        weight = attention.upcast(self.weight)
        x = x.to(weight.dtype, copy=True)  # the head overwrites x
        return F.linear(x, weight, attention.upcast(self.bias))[:, 0]


class DraftModel(nn.Module):
    """The block draft; its parameters carry the names of the checkpoint. Sizes: H hidden, B tokens of a block.

    config: the flat config.json (core/block_files.py). embedding [V, H] and head [Vd, H]: the target's, frozen; plain
    attributes and not parameters, because they must reach neither the engine nor the checkpoint.
    """

    def __init__(self, config, embedding, head):
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.head = head
        self.attention_backend = "sdpa"
        size = config["hidden_size"]
        eps = config["rms_norm_eps"]
        self.block_size = config["block_size"]
        self.predicts_at_anchor = block_files.algorithm(config) == "dspark"
        self.mask_token = block_files.mask_token_id(config)
        self.windows = draft_files.windows(config)  # one a layer
        self.causal = block_files.causal_layers(config)
        llama = train_eagle3.llama_config(config)
        self.fc = nn.Linear(draft_files.num_auxiliary(config) * size, size, bias=False)
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.layers = nn.ModuleList(DraftLayer(llama) for _ in self.windows)
        self.norm = nn.RMSNorm(size, eps)
        self.markov_head = None
        self.confidence_head = None
        if self.predicts_at_anchor:
            self.markov_head = MarkovHead(config)
            self.confidence_head = nn.ModuleDict({"proj": Confidence(size + config["markov_rank"], 1)})
        # Not a buffer: DeepSpeed casts buffers to bf16, whose 8 bits are an error of radians at long positions.
        rotary = LlamaRotaryEmbedding(llama)
        self.frequencies = rotary.inv_freq.clone()  # [D/2]
        self.rotary_scale = rotary.attention_scaling

    def initialise(self):
        """Matrices normal with 0.02, norms one; the token before adds nothing yet, and a draft's chance is one half."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if self.predicts_at_anchor:
            nn.init.zeros_(self.markov_head.markov_w2.weight)
            nn.init.zeros_(self.confidence_head.proj.weight)
            nn.init.zeros_(self.confidence_head.proj.bias)

    def num_predictions(self):
        """Of a block."""
        return self.block_size if self.predicts_at_anchor else self.block_size - 1

    def features(self, auxiliary):
        """The context [T, H] that all layers read, of auxiliary hidden states [T, n·H]."""
        return self.hidden_norm(self.fc(auxiliary))

    def rotary(self, positions, dtype):
        """cos, sin [n, D] of positions [n]; computed in fp32 (float64 for a float64 draft), then rounded to dtype."""
        return train_eagle3.DraftModel.rotary(self, positions, dtype)

    def embed(self, anchors, size):
        """Embeddings [N, size, H] of blocks: the anchor's [N], then masks; in the draft's dtype."""
        tokens = torch.full((len(anchors), size), self.mask_token, device=anchors.device)
        tokens[:, 0] = anchors
        return F.embedding(tokens, self.embedding).to(self.fc.weight.dtype)

    def block_of(self, count):
        """Tokens of a block that makes this number of predictions, as served."""
        return count if self.predicts_at_anchor else count + 1

    def logits(self, outputs):
        """Logits [P, Vd] of the normed states [P, H] of a block's predictions, as served: not corrected yet."""
        return F.linear(outputs, self.head)

    def corrected(self, logits, before):
        """Logits [Vd] of one prediction, as served; before: the token in front of it, an id."""
        if self.markov_head is None:
            return logits
        token = torch.tensor(before, device=logits.device)
        return logits + self.markov_head.markov_w2(self.markov_head.markov_w1(token))

    def outputs(self, hidden):
        """Normed states [N, P, H] of a block's predictions, of hidden states [N, B, H]."""
        first = 0 if self.predicts_at_anchor else 1
        return self.norm(hidden[:, first:])

    def forward(self, *args, **kwargs):
        """The objective; inside the module's forward because ZeRO-3 gathers the weights by its hooks."""
        return objective(self, *args, **kwargs)


# ==================== The loss =======================================================================================


def ce_and_distance(logits, p, mass):
    """DSpark's: 0.1 cross-entropy + 0.9 ‖p - q‖₁, which is twice the total variation (arXiv 2607.05147)."""
    cross_entropy = train_eagle3.cross_entropy(logits, p, mass)
    return 0.1 * cross_entropy + 0.9 * 2 * train_eagle3.total_variation(logits, p, mass)


LOSSES = train_eagle3.LOSSES | {"ce_l1": ce_and_distance}  # --loss
OWN_LOSS = {"dflash": "ce", "dspark": "ce_l1"}  # where none is given


def token_metrics(logits, p, mass, best, draft_ids):
    """What is logged of each prediction: {name: [N]}, as in train_eagle3.py; and "top", the draft's probability of the
    target's most likely token, by which D-PACE weighs.
    """
    column = torch.searchsorted(draft_ids, best).clamp(max=len(draft_ids) - 1)
    known = draft_ids[column] == best
    top = logits.softmax(dim=-1).gather(1, column[:, None])[:, 0]
    return train_eagle3.token_metrics(logits, p, mass, best, draft_ids) | {"top": top * known}


def decay_weights(count, gamma, dtype, device):
    """exp(-i / gamma) of each prediction i: [count]."""
    steps = torch.arange(count, dtype=dtype, device=device)
    return torch.exp(-steps / gamma)


def dpace_weights(top, valid):
    """D-PACE (arXiv 2605.18810): Σ_{k>=i} Π_{l<=k} r_l of each prediction i, over those that count.

    top [N, P]: the draft's probability of the right token, of which r is a mean with one; valid bool [N, P].
    """
    survival = (1 - FLOOR) * top + FLOOR
    survival = torch.where(valid, survival, 1.0).cumprod(dim=1)
    reached = survival * valid
    return reached.flip(1).cumsum(dim=1).flip(1) * valid


def objective(
    draft,
    input_ids,  # [T] int64
    position_ids,  # [T], restarting with each document
    auxiliary,  # [T, n·H]: the target's hidden states after n layers
    last,  # [T, H]: and after its final norm
    head,  # target_model.Head
    plan,  # blocks.Plan
    d2t,  # [Vd] int64 offsets
    args,  # flags: loss, position_weights, dflash_decay_gamma
):
    """Blocks behind the slots of the plan, over concatenated documents.

    Returns the loss summed over predictions (not yet divided by anything); the sums of each prediction of a block,
    {name: float64 [P]}, of "loss", the metrics, and the number of "slots"; and which are right (bool [P, T]).
    """
    dtype = draft.fc.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    context = draft.features(auxiliary.to(dtype))  # [T, H]
    hidden = draft.embed(input_ids[plan.slots + 1], draft.block_size)  # [N, B, H]
    hidden = run_layers(draft, plan, position_ids, context, hidden)
    outputs = draft.outputs(hidden).flatten(0, 1)  # [R, H]
    del hidden

    count = plan.valid.shape[1]
    weights = decay_weights(count, args.dflash_decay_gamma, wide, outputs.device)
    weights = (weights * plan.valid).flatten()  # [R]
    weigh = None
    if args.position_weights == "dpace":
        weights = plan.valid.flatten().to(wide)

        def weigh(values, row):
            """Of whole blocks from row `row` on."""
            top = values["top"].view(-1, count)
            return dpace_weights(top, plan.valid[row // count :][: len(top)]).flatten()

    teacher = losses.Teacher(head, last, vocabulary.target_ids(d2t))
    options = (weights, teacher, plan, LOSSES[args.loss], token_metrics)
    draft.head = draft.head.to(dtype)  # a copy the first time, then nothing
    if draft.markov_head is None:
        loss, values = losses.head_loss(outputs, draft.head, *options, weigh=weigh)
    else:
        before = (
            plan.slots[:, None] + 1 + torch.arange(count, device=outputs.device)
        )  # the token before each prediction
        before = input_ids[before.clamp(max=len(input_ids) - 1)].flatten()
        outputs = torch.cat([outputs, draft.markov_head.markov_w1(before)], dim=1)  # [R, H + r]
        confidence = draft.confidence_head.proj(outputs)  # [R]
        loss, values = draft.markov_head.markov_w2(outputs, markov_loss, draft.head, *options, weigh)
        accept = values["accept"].to(confidence.dtype)
        errors = F.binary_cross_entropy_with_logits(confidence, accept, reduction="none")
        if weigh:
            weights = weights * weigh(values, 0)
        loss = loss + (weights * errors).sum()
    return loss, *sum_metrics(plan, values, loss, len(input_ids))


def markov_loss(outputs, markov_w2, head, *arguments):
    """losses.head_loss with a head of two parts: [head, markov_w2]."""
    *options, weigh = arguments
    return losses.head_loss(outputs, head, *options, further=markov_w2, weigh=weigh)


def run_layers(draft, plan, position_ids, context, hidden):
    """Hidden states [N, B, H] of blocks behind all layers; context [T, H], hidden [N, B, H] their embeddings."""
    size = draft.block_size
    shape = (len(plan.slots), size)
    steps = torch.arange(1, size + 1, device=context.device)
    positions = (position_ids[plan.slots][:, None] + steps).flatten()  # [N · B]
    turned = draft.rotary(positions, context.dtype)
    turned_context = draft.rotary(position_ids, context.dtype)
    hidden = hidden.flatten(0, 1)
    for layer, window, is_causal in zip(draft.layers, draft.windows, draft.causal, strict=True):
        view = plan.views[window]

        def run_layer(hidden, context, layer=layer, view=view, is_causal=is_causal):
            keys = layer.read(context, *turned_context)

            def attend(q, k, v):
                q = q.unflatten(0, shape)
                own = (k.unflatten(0, shape), v.unflatten(0, shape))
                backend = draft.attention_backend
                mixed = attention.attend_blocks(backend, view, is_causal, position_ids, plan.slots, q, keys, own)
                return mixed.flatten(0, 1)

            return layer(hidden, *turned, attend)

        if layer.gradient_checkpointing:
            hidden = checkpoint(run_layer, hidden, context, **train_eagle3.RECOMPUTED)
        else:
            hidden = run_layer(hidden, context)
    return hidden.unflatten(0, shape)


def sum_metrics(plan, values, total, length):
    """(sums, correct) as objective returns them; values {name: [R]}, total: the loss."""
    sums = {}
    for name, value in values.items():
        by_block = value.view(plan.valid.shape).double() * plan.valid
        sums[name] = by_block.sum(dim=0)
    sums["slots"] = plan.valid.sum(dim=0).double()
    sums["total"] = total.detach().double()
    correct = torch.zeros(plan.valid.shape[1], length, dtype=torch.bool, device=total.device)
    right = (values["acc"].view(plan.valid.shape) > 0) & plan.valid
    correct[:, plan.slots] = right.T
    return sums, correct


# ==================== Batches ========================================================================================


def batch_of(args, draft, trains=False):
    """The `collate` of dataloader.read_steps: rows of a micro-batch -> Batch with its plan of blocks.

    Training has at most max_anchors complete blocks of each sequence, drawn anew in each epoch; evaluation a block at
    each token of a reply whose next one is known.
    """
    windows = draft.windows
    size = draft.block_size
    count = draft.num_predictions()

    def collate(rows, epoch):
        fields = dataloader.concatenate(rows, epoch)
        lengths = fields["lengths"]
        supervised = slots.supervised_slots(fields["loss_mask"], slots.documents_of(lengths), count)
        chosen = supervised[0]
        if trains:
            draws = dataloader.draw(args.seed, epoch, fields["rows"], lengths)
            chosen = slots.choose_slots(supervised[-1], lengths, args.max_anchors, draws)
        plan = blocks.plan_blocks(supervised, chosen, lengths, windows, size)
        return dataloader.Batch(**fields, plan=plan, normaliser=int(plan.valid.sum()))

    return collate


def run_draft(draft, batch, states, target, d2t, args):
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
        args,
    )
    accepted = train_eagle3.chain_lengths(correct)
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
        batch_of(args, engine.module),
        device,
        name="validation",
        global_batch_size=args.batch_size * dist.get_world_size(),
        micro_batch_size=args.batch_size,
        **train_eagle3.loader_options(args),
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
    values = train_eagle3.metric_values(sums)
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
        batch_of(args, engine.module, trains=True),
        engine.device,
        range(progress.step, run.total_steps),
        global_batch_size=args.draft_global_batch_size,
        micro_batch_size=run.draft_micro_batch_size,
        total_seq_len=args.total_seq_len,
        **train_eagle3.loader_options(args),
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
                run_record.log_steps(record, run, progress, rate, train_eagle3.metric_values)

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


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    train_eagle3.add_data_flags(parser.add_argument_group("target and data").add_argument)
    target_model.add_sharing_flags(parser)
    states.add_source_flags(parser)
    add_draft_flags(parser.add_argument_group("draft").add_argument)
    add_objective_flags(parser.add_argument_group("objective").add_argument)
    optimization.add_flags(parser)
    setup.add_batch_flags(parser.add_argument_group("length and batches").add_argument)
    setup.add_run_flags(parser.add_argument_group("run").add_argument)
    foreign = (foreign_flags.OF_BLOCK_TRAINERS, foreign_flags.BLOCK_ALIASES, foreign_flags.VALUES)
    args = foreign_flags.parse(parser, argv, *foreign)
    args.loss = args.loss or OWN_LOSS[args.algorithm]
    return run_record.complete_flags(args)


def add_draft_flags(add):
    add("--draft_model_config", help="JSON of the draft; none: derived from the target")
    add("--draft_vocab_size", type=train_eagle3.POSITIVE, help="tokens it can propose, vLLM only; none: all")
    add("--token_freq_path", help="token counts to choose them by; none: the prepared data's token_freq.pt")
    add("--d2t_path", help="mapping of build_vocab_mapping.py, with t2d_path; none: built from the counts")
    add("--t2d_path", help="the other half of the mapping")
    block_config.add_flags(add)
    add("--target_layer_ids", type=int, nargs="+", help="auxiliary layers, i = after i layers; none: spread evenly")
    backends = ("flex_attention", "sdpa")
    add("--attention_backend", choices=backends, default=backends[0], help="flex on GPUs only; same numbers")
    add("--dry_run", action=common.Switch, help="save the initial draft as step_00000000, and exit; needs no data")


def add_objective_flags(add):
    add("--loss", choices=list(LOSSES), help="of a prediction; none: ce, of DSpark ce_l1; lk and tv: for sampling")
    add("--max_anchors", type=train_eagle3.POSITIVE, default=512, help="blocks of a sequence in an epoch")
    weights = ("decay", "dpace")
    add("--position_weights", choices=weights, default=weights[0], help="dpace: by the chance that serving gets there")
    add("--dflash_decay_gamma", type=common.above_zero, default=4.0, help="decay: prediction i weighs exp(-i / gamma)")


# ==================== Main ===========================================================================================


def build_draft(args, config, target, d2t, checkpoint):
    """The draft, initialised from the seed or with a checkpoint's weights."""
    checkpoints.seed_generators(args.seed)
    draft = DraftModel(config, target.embedding, target.head.weight[vocabulary.target_ids(d2t)])
    draft.attention_backend = args.attention_backend
    if target.embedding.device.type == "cpu":  # FlexAttention has no backward pass there
        draft.attention_backend = "sdpa"
    for layer in draft.layers:
        layer.gradient_checkpointing = args.gradient_checkpointing
    draft.initialise()
    if checkpoint:
        parameters = draft_files.read_parameters(checkpoint, target.embedding)
        parameters.pop("lm_head.weight", None)  # the target's rows
        draft.load_state_dict(parameters)
    # What a checkpoint can hold, so that continuing from a dry run is the same.
    return draft.to(target.embedding.dtype).float()


def draft_writer(config, draft, d2t):
    """write_draft(folder, tensors) of what is served; a reduced vocabulary has the target's rows as its head."""
    head = {}
    if config["draft_vocab_size"] < config["vocab_size"]:
        head["lm_head.weight"] = draft.head

    def write_draft(folder, tensors):
        tensors = vocabulary.with_mapping(tensors | head, d2t, config["vocab_size"])
        draft_files.write_draft(folder, config, tensors)

    return write_draft


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
    prepared = ranks.on_first_rank(
        lambda: setup.prepare(args, default, train_eagle3.prepare_conversations, block_config)
    )
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
        found = (layers, draft, target, data, data_config, covered, f"blocks of {draft.block_size}")
        print(run_record.summary(args, run, config, *found))
    groups = optimization.parameter_groups(draft, args)
    engine = optimization.build_engine(draft, groups, deepspeed_config, device)
    d2t = d2t.to(device)
    progress = checkpoints.Progress()
    if state:
        progress = checkpoints.resume(engine, run.resume_from_checkpoint, state, flags)

    # --- how it is saved ---
    write_draft = draft_writer(config, draft, d2t)
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
