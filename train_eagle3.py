"""Train an EAGLE-3 draft for a target model that is held in memory.

In:  a target (--target_model_path) and conversations: JSON Lines (--dataset_train_split, --dataset_validation_split),
     or a folder written by prepare_data.py (--data_path).
Out: output_dir/ with run.json, metrics.jsonl, step_XXXXXXXX/ (config.json, model.safetensors, trainer_state.json),
     `latest` (a link to the newest of them) and final/. A folder with a model.safetensors can be served as it is.

One device:     python train_eagle3.py --target_model_path M --dataset_train_split train.jsonl --output_dir out
Eight devices:  deepspeed --num_gpus 8 train_eagle3.py --target_model_path M --data_path prepared --output_dir out
Many nodes:     deepspeed --hostfile hosts train_eagle3.py ... ; torchrun and RANK/WORLD_SIZE/MASTER_* work as well
Tiny, no GPU:   bash examples/run_tiny_online.sh

The file reads in the order of training: the draft, the objective, the engine, the data, measuring, keeping, the loop.
Slots and steps: slot j of a document drafts x[j+2+i] at step i (0-based) from the token x[j+1+i] and, at step 0, the
target's hidden states at j, later its own output of the step before (EAGLE-3, arXiv 2503.01840).
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half
from transformers.utils.logging import disable_progress_bar

from build_vocab_mapping import build_mapping, load_mapping
from export_eagle3 import configure, num_auxiliary, read_draft, write_draft
from prepare_data import (
    boolean,
    epoch_order,
    fail,
    hash_tokenizer,
    load_tokenizer,
    normalise_argv,
    open_data,
    prepare,
    read_token_freq,
    step_rows,
    write_atomic,
)
from prepare_hidden_states import (
    load_target,
    on_first_rank,
    positions_of,
    read_sequences,
    read_target_config,
    resolve_target,
    start_distributed,
    teacher,
)  # fmt: skip

REPOSITORY = Path(__file__).resolve().parent
ALIASES = {  # other trainers' names of the same thing
    "verifier_name_or_path": "target_model_path", "train_data_path": "dataset_train_split",
    "eval_data_path": "dataset_validation_split", "draft_config": "draft_model_config", "epochs": "num_epochs",
    "training_batch_size": "batch_size", "lr": "learning_rate", "ttt_steps": "ttt_length", "max_steps": "total_steps",
    "draft_attn_impl": "attention_backend", "log_interval": "log_steps", "log_freq": "log_steps",
    "from_pretrained": "resume_from_checkpoint", "ckpt_dir": "resume_from_checkpoint",
    "output_model_path": "output_dir", "save_path": "output_dir", "logger": "report_to",
}  # fmt: skip

# ==================== The draft ======================================================================================


def target_ids(d2t):
    """Target ids [Vd] of the draft vocabulary, from the offsets d2t [Vd]."""
    return torch.arange(len(d2t), device=d2t.device) + d2t


def upcast(x):
    """x in fp32 at least: half-precision inputs are normalised and summed in fp32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension as Llama computes it: in fp32, rounded, then scaled."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = upcast(x)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class DraftAttention(nn.Module):
    """The four projections; what is attended to is decided by the caller's `attend`."""

    def __init__(self, config):
        super().__init__()
        size, self.head_dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(2 * size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, size, bias=False)

    def forward(self, x, cos, sin, attend):
        """x [T, 2H], cos and sin [T, D]; attend(q [A, T, D], k [G, T, D], v [G, T, D]) -> [A, T, D]. Returns [T, H]."""

        def heads(projection):
            return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

        q, k = (part * cos + rotate_half(part) * sin for part in (heads(self.q_proj), heads(self.k_proj)))
        return self.o_proj(attend(q, k, heads(self.v_proj)).transpose(0, 1).flatten(1))


class DraftMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, intermediate_size = config["hidden_size"], config["intermediate_size"]
        self.act = ACT2FN[config["hidden_act"]]
        self.gate_proj = nn.Linear(size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, size, bias=False)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """One Llama layer whose attention reads the token's embedding beside the feature."""

    def __init__(self, config):
        super().__init__()
        size, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = DraftMLP(config)
        self.norm_before_residual = config.get("norm_before_residual", False)

    def forward(self, embeds, feature, cos, sin, attend):
        """embeds, feature [T, H] -> hidden state [T, H]."""
        normed = self.hidden_norm(feature)
        residual = normed if self.norm_before_residual else feature
        x = torch.cat([self.input_layernorm(embeds), normed], dim=-1)  # this order: the serving engines split it so
        hidden = residual + self.self_attn(x, cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DraftModel(nn.Module):
    """The EAGLE-3 draft; its parameters carry the names of the checkpoint. Sizes: H hidden, Vd draft vocabulary.

    config: the flat config.json (export_eagle3.py). embedding [V, H]: the target's table, frozen; a plain attribute and
    not a parameter, because the target holds it already and it must reach neither the engine nor the checkpoint.
    """

    def __init__(self, config, embedding):
        super().__init__()
        self.config, self.embedding = config, embedding
        size, eps = config["hidden_size"], config["rms_norm_eps"]
        features = config.get("target_hidden_size", size)
        count = num_auxiliary(config)
        self.input_norm = RMSNorm(count * features, eps) if config.get("norm_before_fc") else None
        self.fc_norm = nn.ModuleList(RMSNorm(features, eps) for _ in range(count)) if config.get("fc_norm") else None
        self.fc = nn.Linear(count * features, size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config["draft_vocab_size"], bias=False)
        # Only the frequencies of transformers' rotary embedding are kept, and not as a buffer: DeepSpeed casts buffers
        # to bf16, whose 8 bits are an error of radians at long positions.
        rope = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
        sizes = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
        rotary = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=rope, **{name: config[name] for name in sizes}))
        self.frequencies, self.rotary_scale = rotary.inv_freq.clone(), rotary.attention_scaling

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
        """cos, sin [T, D] of positions [T]; formed in fp32 (float64 for a float64 draft), then rounded to dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        self.frequencies = self.frequencies.to(positions.device)  # a copy the first time, then nothing
        angles = positions[:, None].to(wide) * self.frequencies.to(wide)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.rotary_scale).to(dtype), (angles.sin() * self.rotary_scale).to(dtype)

    def step(self, tokens, feature, positions, attend):
        """One step: tokens [T] int64, feature [T, H], positions [T] -> the next feature [T, H] and logits [T, Vd]."""
        embeds = F.embedding(tokens, self.embedding).to(feature.dtype)
        hidden = self.midlayer(embeds, feature, *self.rotary(positions, feature.dtype), attend)
        normed = self.norm(hidden)
        return (normed if self.config.get("norm_output") else hidden), self.lm_head(normed)

    def forward(self, *args, **kwargs):
        """The objective; inside the module's forward because ZeRO-3 gathers the weights by its hooks."""
        return objective(self, *args, **kwargs)


# ==================== The objective ==================================================================================


def supervised_slots(loss_mask, document_ids, steps):
    """Which slots are supervised at which step: slot j at step i iff x[j+1] ... x[j+2+i] all are the assistant's.

    loss_mask [T] (1 = produced by the assistant), document_ids [T]; returns bool [steps, T]. A chain starts behind a
    token that the target itself produced and ends with the reply; once dead it stays dead.
    """

    def ahead(n):
        """loss_mask n tokens further on, 0 beyond the document."""
        inside = torch.zeros_like(loss_mask, dtype=torch.bool)
        inside[: max(len(loss_mask) - n, 0)] = document_ids[n:] == document_ids[:-n]
        return inside & loss_mask.bool().roll(-n)

    alive, rows = ahead(1), []
    for i in range(steps):
        alive = alive & ahead(2 + i)
        rows.append(alive)
    return torch.stack(rows)


def dense_attention(q, keys, values, causal):
    """One softmax over the step-0 keys that `causal` allows and the slot's own keys of the later steps.

    q [A, T, D]; keys, values: one [G, T, D] per step so far; causal bool [T, T]. Returns [A, T, D].
    """
    repeat = q.shape[0] // keys[0].shape[0]
    keys, values = ([part.repeat_interleave(repeat, dim=0) for part in parts] for parts in (keys, values))
    scores = (q @ keys[0].transpose(1, 2)).masked_fill(~causal, -math.inf)  # [A, T, T]
    own = [(q * key).sum(-1, keepdim=True) for key in keys[1:]]  # [A, T, 1] each
    weights = upcast(torch.cat([scores, *own], dim=-1) * q.shape[-1] ** -0.5).softmax(dim=-1).to(q.dtype)
    output = weights[..., : q.shape[1]] @ values[0]
    for step, value in enumerate(values[1:]):
        output = output + weights[..., q.shape[1] + step, None] * value
    return output


def objective(draft, input_ids, position_ids, document_ids, auxiliary, teaching, supervised, d2t, decay):
    """The training-time test over concatenated documents, dense: every slot in every step.

    input_ids, position_ids, document_ids [T] int64; auxiliary [T, n·Ht]; teaching: what `teacher` returns for every
    token (logits [T, Vd], argmax [T], logsumexp [T]); supervised bool [K, T] (any rule; dead slots add nothing);
    d2t [Vd] int64 offsets; decay: the weight of step i is decay^i.
    Returns the loss summed over slots and steps (not yet divided by anything), the sums behind the metrics
    (float64 [K, 4]: cross-entropy, argmax correct, acceptance, count), and which predictions were right (bool [K, T]).
    """
    teacher_logits, teacher_argmax, teacher_logsumexp = teaching
    known = target_ids(d2t)
    drawn = torch.isin(teacher_argmax, known)  # elsewhere the draft cannot be right and learns nothing
    causal = (document_ids[:, None] == document_ids) & (position_ids[:, None] >= position_ids)
    feature = draft.features(auxiliary.to(draft.fc.weight.dtype))
    keys, values, loss, sums, correct = [], [], 0.0, [], []

    def attend(q, k, v):
        keys.append(k)
        values.append(v)
        return dense_attention(q, keys, values, causal)

    for i, live in enumerate(supervised):
        feature, logits = draft.step(input_ids.roll(-1 - i), feature, position_ids + i, attend)
        z, best, total = (part.roll(-1 - i, dims=0) for part in (teacher_logits, teacher_argmax, teacher_logsumexp))
        z, log_q = upcast(z), upcast(logits).log_softmax(dim=-1)
        entropy = -(z.softmax(dim=-1) * log_q).sum(dim=-1)
        entropy = torch.where(live & drawn.roll(-1 - i), entropy, 0.0).sum()
        loss = loss + decay**i * entropy
        with torch.no_grad():
            accepted = torch.minimum((z - upcast(total)[:, None]).exp(), log_q.exp()).sum(dim=-1)
            right = live & (known[logits.argmax(dim=-1)] == best)
            parts = (entropy, right.sum(), torch.where(live, accepted, 0.0).sum(), live.sum())
            sums.append(torch.stack([part.double() for part in parts]))
            correct.append(right)
    return loss, torch.stack(sums), torch.stack(correct)


def chain_lengths(correct):
    """n_j [T]: the number of leading steps that are all right, of correct [K, T] bool."""
    return correct.long().cumprod(dim=0).sum(dim=0)


def acceptance_walk(accepted, loss_mask):
    """Walk each reply of one document as serving does; returns the accepted drafts n_j of every pass of the target.

    accepted: n_j per slot, loss_mask: per token (sequences of int). The target itself produces the reply's first token;
    each pass accepts n_j drafts and adds one token of the target's own, so the walk moves on by n_j + 1 slots.
    """
    passes, length, start = [], len(loss_mask), 0
    while start < length:
        if not loss_mask[start]:
            start += 1
            continue
        end = start
        while end + 1 < length and loss_mask[end + 1]:
            end += 1
        slot = max(start - 1, 0)
        while slot + 2 <= end:
            passes.append(accepted[slot])
            slot += accepted[slot] + 1
        start = end + 1
    return passes


def metric_values(sums, chains, loss_weight_sum):
    """Metrics by name from sums [K, 4] and chains (sum of n_j), as floats. loss_weight_sum: decay^i per step."""
    counts = [max(row[3], 1.0) for row in sums]
    values = {"loss": sum(w * row[0] for w, row in zip(loss_weight_sum, sums, strict=True)) / counts[0]}
    for name, column in (("loss", 0), ("acc", 1), ("accept", 2)):
        values |= {f"{name}_{i}": row[column] / counts[i] for i, row in enumerate(sums)}
    return values | {"chain_length": 1 + chains / counts[0]}


# ==================== The engine =====================================================================================


def engine_config(args, device):
    """DeepSpeed's configuration: the file's, with what the flags decide filled in; a contradiction ends the program."""
    try:
        config = json.loads(Path(args.deepspeed_config).read_text())
    except (OSError, ValueError) as error:
        fail(f"deepspeed_config {args.deepspeed_config} cannot be read: {error}")
    if not isinstance(config, dict) or config.get("fp16", {}).get("enabled"):
        fail(f"deepspeed_config {args.deepspeed_config} must be a JSON object, and without fp16: bf16 is what trains")
    decided = {
        "train_micro_batch_size_per_gpu": ("draft_micro_batch_size", args.draft_micro_batch_size),
        "gradient_accumulation_steps": ("draft_accumulation_steps", args.draft_accumulation_steps),
        "train_batch_size": ("draft_global_batch_size", args.draft_global_batch_size),
        "gradient_clipping": ("max_grad_norm", args.max_grad_norm),
    }
    for key, (flag, value) in decided.items():
        if config.get(key, "auto") not in ("auto", value):
            fail(f"{args.deepspeed_config}: {key} {config[key]} contradicts {flag} {value}; remove it from the file")
        config[key] = value
    for key in {"optimizer", "scheduler"} & config.keys():
        fail(f"{args.deepspeed_config}: {key} is decided by the flags of train_eagle3.py; remove it from the file")
    half = config.setdefault("bf16", {})
    if half.get("enabled", "auto") == "auto":  # CPUs train in fp32 unless the file asks for bf16
        half["enabled"] = device.type == "cuda"
    config.setdefault("steps_per_print", sys.maxsize)
    return config


def build_engine(args, draft, device):
    """The DeepSpeed engine around the draft, with AdamW; the learning rate is set by the loop."""
    config = engine_config(args, device)
    options = {"lr": args.learning_rate, "betas": (0.9, 0.95), "weight_decay": args.weight_decay}
    parameters = [p for p in draft.parameters() if p.requires_grad]
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload == "none":
        optimizer = torch.optim.AdamW(parameters, fused=device.type == "cuda", **options)
    else:  # the states live in CPU memory: DeepSpeed's own AdamW steps them there with vector instructions
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    engine, *_ = deepspeed.initialize(model=draft.to(device), optimizer=optimizer, config=config)
    return engine


def learning_rate_at(step, args):
    """Learning rate of the optimizer step that follows `step` finished ones: linear warm-up, then the schedule."""
    if step < args.scheduler_warmup_steps:
        return args.learning_rate * (step + 1) / args.scheduler_warmup_steps
    rest = max(args.scheduler_total_steps - args.scheduler_warmup_steps, 1)
    share = min((step - args.scheduler_warmup_steps) / rest, 1.0)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - share,
        "cosine": 0.5 * (1.0 + math.cos(2.0 * math.pi * args.scheduler_num_cosine_cycles * share)),
    }[args.scheduler_type]
    return args.learning_rate * factor


# ==================== The data =======================================================================================


def objective_inputs(items, target, d2t, args):
    """The arguments of `objective` for one micro-batch, by name.

    An empty one becomes four unsupervised tokens: its gradient is zero, and the ranks stay in step.
    """
    if not items:
        weight = target.embedding
        nothing = torch.zeros(4, dtype=torch.int64, device=weight.device)
        states = weight.new_zeros(4, len(target.layer_ids) * weight.shape[1]), weight.new_zeros(4, weight.shape[1])
        items = [(nothing, nothing, *states)]
    lengths = [len(item[0]) for item in items]
    input_ids, loss_mask, auxiliary, last = (torch.cat(parts) for parts in zip(*items, strict=True))
    document_ids = torch.cat([torch.full_like(item[0], number) for number, item in enumerate(items)])
    return {
        "input_ids": input_ids,
        "position_ids": positions_of(lengths, input_ids.device),
        "document_ids": document_ids,
        "auxiliary": auxiliary,
        "teaching": teacher(last, target.head, target_ids(d2t)),
        "supervised": supervised_slots(loss_mask, document_ids, args.ttt_length),
        "d2t": d2t,
        "decay": args.ttt_step_loss_decay,
    }


def optimizer_step(engine, target, sequences, d2t, args):
    """One optimizer step on this rank's sequences. Returns metric sums [K, 4], the sum of chain lengths, tokens read.

    The loss is divided by the supervised step-0 slots of the whole step (all micro-batches, all ranks), so the gradient
    does not depend on how sequences are dealt out. DeepSpeed averages over ranks and micro-batches: hence the factors.
    """
    masks = [mask for _, mask in sequences]
    slots = sum(supervised_slots(mask, torch.zeros_like(mask), 1).sum() for mask in masks)
    total = torch.as_tensor(slots, dtype=torch.float64, device=engine.device).clone()
    dist.all_reduce(total)
    scale = dist.get_world_size() * args.draft_accumulation_steps / total.clamp(min=1)
    sums, chains, states = 0.0, 0.0, target.states(sequences, args.batch_size)
    for _ in range(args.draft_accumulation_steps):
        items = list(itertools.islice(states, args.draft_micro_batch_size))
        loss, part, correct = engine(**objective_inputs(items, target, d2t, args))
        engine.backward(loss * scale.to(loss.dtype))
        engine.step()
        sums, chains = sums + part, chains + chain_lengths(correct).sum().double()
    return sums, chains, sum(len(mask) for mask in masks)


# ==================== Measuring ======================================================================================


@torch.no_grad()
def evaluate(engine, target, data, d2t, args):
    """Metrics of the validation rows over all ranks; acceptance_length from walking every reply as serving does."""
    engine.eval()
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = list(range(rank, len(data), world))
    sums, chains, walk = 0.0, 0.0, torch.zeros(2, dtype=torch.float64, device=engine.device)
    for start in range(0, math.ceil(len(data) / world), args.batch_size):  # as often on every rank: ZeRO-3 gathers
        sequences = read_sequences(data, rows[start : start + args.batch_size], engine.device)
        items = list(target.states(sequences, args.batch_size))
        _, part, correct = engine.module(**objective_inputs(items, target, d2t, args))
        accepted = chain_lengths(correct)
        sums, chains = sums + part, chains + accepted.sum().double()
        offset = 0
        for ids, mask, *_ in items:
            passes = acceptance_walk(accepted[offset : offset + len(ids)].tolist(), mask.tolist())
            walk += torch.tensor([sum(passes) + len(passes), len(passes)], dtype=torch.float64, device=engine.device)
            offset += len(ids)
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


def open_swanlab(args, settings):
    import swanlab

    run = swanlab.init(project="eagle3", name=args.run_name, log_dir=args.log_dir, config=settings)
    return lambda values, step: run.log(values, step=step), run.finish


def open_tensorboard(args, settings):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(Path(args.log_dir) / (args.run_name or "tensorboard")))
    writer.add_text("settings", "```\n" + json.dumps(settings, indent=2) + "\n```")

    def log(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


TRACKERS = {"swanlab": open_swanlab, "tensorboard": open_tensorboard}


class Record:
    """Where measured values go on rank 0: metrics.jsonl, the trackers, the terminal. Elsewhere it does nothing."""

    def __init__(self, args, settings):
        self.first = dist.get_rank() == 0
        if not self.first:
            return
        self.file = (Path(args.output_dir) / "metrics.jsonl").open("w")
        self.trackers = {}
        for name in args.report_to:
            self.trackers[name] = self.attempt(name, TRACKERS[name], args, settings)
        self.bar = tqdm(total=args.total_steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def attempt(self, name, work, *args):
        """Foreign code and accounts must not cost the training: a tracker that fails is reported and left out."""
        try:
            return work(*args)
        except Exception as error:
            print(f"{name} fails, training goes on without it: {error}", file=sys.stderr)
            self.trackers[name] = None

    def row(self, split, step, epoch, values):
        if not self.first:
            return
        values = {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in values.items()}
        self.file.write(json.dumps({"split": split, "step": step, "epoch": round(epoch, 6), **values}) + "\n")
        self.file.flush()
        values = {f"{split}/{name}": value for name, value in values.items() if value is not None}
        for name in [name for name, tracker in self.trackers.items() if tracker]:
            self.attempt(name, self.trackers[name][0], values, step)

    def line(self, text):
        if self.first:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        if self.first:
            self.bar.close()
            self.file.close()
            for name in [name for name, tracker in self.trackers.items() if tracker]:
                self.attempt(name, self.trackers[name][1])


def metrics_line(values, steps):
    """The part of a printed line that training and evaluation share."""
    accuracy = " ".join(f"{values[f'acc_{i}']:.3f}" for i in range(steps))
    return f"loss {values['loss']:.4f} | acc {accuracy} | chain_length {values['chain_length']:.3f}"


# ==================== Keeping ========================================================================================


def draft_tensors(engine, d2t):
    """The checkpoint's tensors on rank 0 (CPU), an empty dict elsewhere; under ZeRO-3 all ranks take part."""
    draft = engine.module
    with deepspeed.zero.GatheredParameters(list(draft.parameters()), enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() != 0:
            return {}
        tensors = {name: p.detach().to("cpu", copy=True) for name, p in draft.named_parameters()}
    vocabulary = draft.config["vocab_size"]
    if draft.config["draft_vocab_size"] < vocabulary:
        tensors |= {"d2t": d2t.cpu(), "t2d": torch.zeros(vocabulary, dtype=torch.bool)}
        tensors["t2d"][target_ids(tensors["d2t"])] = True
    return tensors


def save(engine, d2t, folder, files, link=None):
    """A draft checkpoint that is visible only when whole, with further files {name: text}. All ranks call it.

    link: name of a symbolic link beside it that is to point to it.
    """
    tensors = draft_tensors(engine, d2t)
    if dist.get_rank() == 0:
        building = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        write_draft(building, engine.module.config, tensors)
        for name, text in files.items():
            write_atomic(building / name, text)
        building.rename(folder)
        if link:
            new = folder.with_name(f".{link}.building")
            new.unlink(missing_ok=True)
            new.symlink_to(folder.name)
            new.replace(folder.with_name(link))
    dist.barrier()


def save_step(engine, d2t, args, step, epoch):
    """output_dir/step_XXXXXXXX, the newest of which `latest` points to. Returns its path."""
    folder = Path(args.output_dir) / f"step_{step:08d}"
    state = json.dumps({"step": step, "epoch": epoch}, indent=2) + "\n"
    save(engine, d2t, folder, {"trainer_state.json": state}, link="latest")
    return folder


def run_settings(args, data_config):
    """run.json: what was run, with what, on what."""
    packages = ("torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors", "accelerate")
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return {
        "argv": sys.argv,
        "flags": vars(args),
        "versions": {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages},
        "git_commit": git.stdout.strip() if git else None,
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "data_fingerprint": data_config["fingerprint"],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# ==================== The loop =======================================================================================


def check_flags(args, world):
    """Fill in what follows from the flags and end the program on what cannot be; needs no file and no model."""
    for name in (
        "num_epochs", "batch_size", "max_length", "ttt_length", "draft_global_batch_size", "draft_micro_batch_size",
        "log_steps", "eval_interval", "save_interval", "build_dataset_num_proc",
    ):  # fmt: skip
        if getattr(args, name) < 1:
            fail(f"{name} is {getattr(args, name)}; it must be at least 1")
    for name in (
        "eval_steps", "save_steps", "max_grad_norm", "weight_decay", "warmup_ratio", "learning_rate", "dist_timeout",
        "ttt_step_loss_decay", "scheduler_warmup_steps", "scheduler_total_steps", "scheduler_num_cosine_cycles",
    ):  # fmt: skip
        if (getattr(args, name) or 0) < 0:
            fail(f"{name} is {getattr(args, name)}; it must not be negative")
    output, validation = Path(args.output_dir), args.dataset_validation_split
    held = [path.name for path in output.glob("*") if re.fullmatch(r"metrics.jsonl|final|step_\d+", path.name)]
    for wrong, message in (
        (args.tp_size != 1, f"tp_size {args.tp_size}: a tensor-parallel target is not available yet; use tp_size 1"),
        (args.resume, "resume is not available yet; resume_from_checkpoint alone starts from a draft's weights"),
        (bool(args.d2t_path) != bool(args.t2d_path), "d2t_path and t2d_path belong together: give both or neither"),
        (bool(args.data_path) == bool(args.dataset_train_split),
         "give either dataset_train_split (JSON Lines) or data_path (a folder written by prepare_data.py)"),
        (args.data_path and validation, "data_path brings its own validation split: drop dataset_validation_split"),
        (held, f"output_dir {output} holds a run ({', '.join(sorted(held)[:3])}): give another one or remove it"),
        (output.is_file(), f"output_dir {output} is a file"),
        (args.draft_vocab_size == 0, "draft_vocab_size is 0; leave it out for the full vocabulary"),
    ):  # fmt: skip
        if wrong:
            fail(message)
    if args.dp_size not in (None, world):
        print(f"dp_size {args.dp_size} is replaced by {world} (world size / tp_size)")
    args.dp_size = world
    micro, batch = args.draft_micro_batch_size * world, args.draft_global_batch_size
    if batch % micro:
        fits = [n for n in (batch // micro * micro, -(-batch // micro) * micro) if n]
        fail(f"draft_global_batch_size {batch} is not a multiple of draft_micro_batch_size "
             f"{args.draft_micro_batch_size} x {world} ranks = {micro}; nearest that fit: "
             f"{' or '.join(map(str, fits))}")  # fmt: skip
    if args.draft_accumulation_steps not in (None, batch // micro):
        print(f"draft_accumulation_steps {args.draft_accumulation_steps} is replaced by {batch} / {micro}")
    args.draft_accumulation_steps = batch // micro


def draft_config_for(args, model_dir):
    """(flat configuration, auxiliary layers) of the draft: derived, a file's, or a checkpoint's, for this target."""
    given, source = {}, args.resume_from_checkpoint or args.draft_model_config
    if args.resume_from_checkpoint:
        given, _ = read_draft(source)
        if len(args.target_layer_ids or ()) not in (0, num_auxiliary(given)):
            fail(f"target_layer_ids {args.target_layer_ids}: {source} reads {num_auxiliary(given)} layers")
    elif source:
        try:
            given = dict(json.loads(Path(source).read_text()))
        except (OSError, ValueError, TypeError) as error:
            fail(f"draft_model_config {source} is not a file with a JSON object: {error}")
    text, whole = read_target_config(model_dir, args.trust_remote_code)
    size = None if args.resume_from_checkpoint else args.draft_vocab_size  # a checkpoint's mapping decides
    return configure(text, whole, given, source, args.target_layer_ids, size)


def prepare_run(args, world):
    """Everything that can go wrong before a model loads, on rank 0. Returns what all ranks need to go on."""
    check_flags(args, world)
    engine_config(args, torch.device("cpu"))
    for name in (
        "dataset_train_split", "dataset_validation_split", "data_path", "token_freq_path", "d2t_path", "t2d_path",
    ):  # fmt: skip
        path = getattr(args, name)
        if path and not Path(path).exists():
            fail(f"{name} {path} does not exist")
    model_dir = resolve_target(args.target_model_path)
    config, layers = draft_config_for(args, model_dir)
    folder = args.data_path
    if not folder:
        folder = str(Path(args.output_dir) / "data")
        prepare(
            args.dataset_train_split, folder, args.target_model_path, validation_dataset=args.dataset_validation_split,
            chat_template=args.chat_template, max_length=args.max_length, num_proc=args.build_dataset_num_proc,
            seed=args.seed, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
    data, data_config = open_data(folder)
    longest = max(part["longest"] for part in data_config["splits"].values())
    tokenizer = hash_tokenizer(load_tokenizer(args.target_model_path, args.trust_remote_code))
    if data_config["ingredients"]["tokenizer"] != tokenizer:
        fail(f"{folder} was prepared with another tokenizer or chat template than the target's: prepare it again")
    if longest > args.max_length:
        fail(f"{folder} has rows of {longest} tokens, max_length is {args.max_length}: give --max_length {longest}")
    if len(data["train"]) < world:
        fail(f"{len(data['train'])} training sequences for {world} ranks: a rank would have none")
    d2t, config = vocabulary_mapping(args, config, folder)
    set_schedule(args, len(data["train"]))
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return args, config, layers, folder, d2t


def set_schedule(args, rows):
    """Fill in the optimizer steps of an epoch, of the training, of its warm-up and of its schedule."""
    args.steps_per_epoch = math.ceil(rows / args.draft_global_batch_size)
    if args.total_steps <= 0:
        args.total_steps = args.num_epochs * args.steps_per_epoch
    if args.scheduler_warmup_steps is None:
        args.scheduler_warmup_steps = math.ceil(args.warmup_ratio * args.total_steps)
    args.scheduler_total_steps = args.scheduler_total_steps or args.total_steps
    if args.scheduler_warmup_steps > args.scheduler_total_steps:
        fail(f"warm-up of {args.scheduler_warmup_steps} steps in a schedule of {args.scheduler_total_steps} steps")


def vocabulary_mapping(args, config, data_folder):
    """(d2t [Vd] int64, config): a checkpoint's own mapping first, then the files given, then built from the counts."""
    vocabulary, counts = config["vocab_size"], args.token_freq_path or str(Path(data_folder) / "token_freq.pt")
    if args.resume_from_checkpoint:
        d2t = read_draft(args.resume_from_checkpoint)[1].get("d2t", torch.zeros(vocabulary, dtype=torch.int64))
        if args.d2t_path or args.token_freq_path or args.draft_vocab_size not in (None, len(d2t)):
            print(f"the vocabulary mapping of {args.resume_from_checkpoint} ({len(d2t)} tokens) is kept")
    elif args.d2t_path:
        d2t = torch.from_numpy(load_mapping(args.d2t_path, args.t2d_path, vocabulary)[0])
        if config["draft_vocab_size"] not in (vocabulary, len(d2t)):
            fail(f"draft_vocab_size {config['draft_vocab_size']}, but {args.d2t_path} has {len(d2t)} entries")
    elif config["draft_vocab_size"] < vocabulary:
        d2t = torch.from_numpy(build_mapping(read_token_freq(counts), config["draft_vocab_size"], vocabulary)[0])
    else:
        d2t = torch.zeros(vocabulary, dtype=torch.int64)
    return d2t, config | {"draft_vocab_size": len(d2t)}


def build_draft(args, config, target, d2t):
    """The draft, initialised from the seed or with a checkpoint's weights."""
    torch.manual_seed(args.seed)
    draft = DraftModel(config, target.embedding)
    draft.initialise(target.head.weight[target_ids(d2t)])
    if args.resume_from_checkpoint:
        tensors = read_draft(args.resume_from_checkpoint)[1]
        own = tensors.pop("embed_tokens.weight", target.embedding.cpu())
        if not torch.equal(own.to(target.embedding.dtype), target.embedding.cpu()):
            fail(f"{args.resume_from_checkpoint} has an embedding table of its own: training it is not available yet")
        draft.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")})
    return draft


def summary(args, config, layers, draft, data, data_config, share):
    """The lines printed once at the start: what was derived, and from what."""
    world = dist.get_world_size()
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    rows = {split: len(part) for split, part in data.items()}
    return "\n".join([
        f"ranks       world {world} = dp {args.dp_size} x tp {args.tp_size}, {torch.get_num_threads()} threads each",
        f"data        {rows}, fingerprint {data_config['fingerprint'][:12]}",
        f"batch       {args.draft_global_batch_size} sequences a step = {args.draft_micro_batch_size} x "
        f"{args.draft_accumulation_steps} accumulated x {world} ranks; target forward {args.batch_size} sequences",
        f"steps       {args.steps_per_epoch} an epoch, {args.total_steps} in all, "
        f"warm-up {args.scheduler_warmup_steps}, {args.scheduler_type} to step {args.scheduler_total_steps}",
        f"draft       {trained:,} parameters trained, ttt_length {args.ttt_length}, auxiliary layers {layers}",
        f"vocabulary  {config['draft_vocab_size']} of {config['vocab_size']} tokens, {share:.2%} of those supervised",
    ])  # fmt: skip


def due(count, interval):
    """Whether something that happens every `interval` (0 = never) happens at `count` (0 = not yet)."""
    return bool(count and interval and count % interval == 0)


def train(args, engine, target, data, d2t, record):
    """The loop: every optimizer step of every epoch; then logging, evaluating and saving where they are due."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, output_dir = len(data["train"]), Path(args.output_dir)
    steps_per_epoch = args.steps_per_epoch
    step, started = 0, time.monotonic()
    since, tokens, norms, pending = started, 0, [], None

    while step < args.total_steps:
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0:
            order = epoch_order(rows, args.seed, epoch)

        # --- one optimizer step ---
        mine = step_rows(order, index, args.draft_global_batch_size, rank, world)
        sequences = read_sequences(data["train"], mine, engine.device)
        rate = learning_rate_at(step, args)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        sums, chains, count = optimizer_step(engine, target, sequences, d2t, args)
        pending = (sums, chains) if pending is None else (pending[0] + sums, pending[1] + chains)
        tokens += count
        norms.append(engine.get_global_grad_norm())
        step += 1
        if record.first:
            record.bar.update()
        at, last = step / steps_per_epoch, step == args.total_steps

        # --- log: the values cover all steps since the last line ---
        if step % args.log_steps == 0 or last:
            values = reduced_metrics(*pending, args, torch.tensor([tokens]))
            now = time.monotonic()
            norms = [float(norm) for norm in norms if norm is not None]  # ZeRO stage 0 reports none
            values |= {
                "lr": rate,
                "grad_norm": sum(norms) / len(norms) if norms else None,
                "tokens_per_second": values.pop("extra")[0] / (now - since),
                "seconds": now - started,
            }
            record.row("train", step, at, values)
            left = datetime.timedelta(seconds=round((now - started) / step * (args.total_steps - step)))
            norm = "-" if values["grad_norm"] is None else f"{values['grad_norm']:.3f}"
            record.line(
                f"step {step}/{args.total_steps} {step / args.total_steps:.0%} | "
                f"{metrics_line(values, args.ttt_length)} | lr {rate:.2e} | grad_norm {norm} | "
                f"{values['tokens_per_second']:.0f} tokens/s | left {left}"
            )
            since, tokens, norms, pending = time.monotonic(), 0, [], None

        # --- evaluate and save: by epochs, by steps, and always at the end ---
        whole = epoch + 1 if index + 1 == steps_per_epoch else 0  # epochs finished with this step, 0 within one
        paused = time.monotonic()
        if "validation" in data and (last or due(whole, args.eval_interval) or due(step, args.eval_steps)):
            values = evaluate(engine, target, data["validation"], d2t, args)
            record.row("validation", step, at, values)
            record.line(f"evaluation at step {step} | {metrics_line(values, args.ttt_length)} | "
                        f"acceptance_length {values['acceptance_length']:.3f}")  # fmt: skip
        if last or due(whole, args.save_interval) or due(step, args.save_steps):
            record.line(f"saved {save_step(engine, d2t, args, step, at)}")
        since += time.monotonic() - paused  # tokens/s is about training
    save(engine, d2t, output_dir / "final", {"run.json": (output_dir / "run.json").read_text()})
    record.line(f"finished {step} steps in {time.monotonic() - started:.0f} s: {output_dir / 'final'}")


# (name, type, default, help): a tuple of strings are choices, [int] takes several values, ... means required.
FLAGS = {
    "target and data": [
        ("target_model_path", str, ..., "folder or hub id; a folder may hold one nested model or an MLflow model"),
        ("dataset_train_split", str, None, "JSON Lines of conversations; prepared into output_dir/data"),
        ("dataset_validation_split", str, None, "the same, for evaluation; none: no evaluation"),
        ("data_path", str, None, "folder written by prepare_data.py, instead of the two above"),
        ("chat_template", str, "llama3", "llama3, qwen, gpt-oss, deepseek-r1-distill, or auto = the tokenizer's own"),
        ("max_length", int, 2048, "tokens; longer conversations are cut at the right"),
        ("build_dataset_num_proc", int, 96, "processes that tokenise, at most the cores available"),
        ("trust_remote_code", boolean, False, "run code that comes with the target"),
    ],
    "draft": [
        ("draft_model_config", str, None, "JSON of the draft; none: derived from the target"),
        ("draft_vocab_size", int, None, "tokens that the draft can propose; none: the mapping's, or all"),
        ("token_freq_path", str, None, "token counts to choose them by; none: the prepared data's token_freq.pt"),
        ("d2t_path", str, None, "mapping of build_vocab_mapping.py, with t2d_path; none: built from the counts"),
        ("t2d_path", str, None, "the other half of the mapping"),
        ("target_layer_ids", [int], None, "auxiliary layers, i = after i layers; none: 2 L//2 L-3"),
        ("attention_backend", ("flex_attention", "sdpa"), "flex_attention", "this version computes both densely"),
        ("dry_run", boolean, False, "initialise the draft, save it as step_00000000, and exit"),
    ],
    "objective and optimizer": [
        ("ttt_length", int, 7, "steps K of the training-time test"),
        ("ttt_step_loss_decay", float, 0.8, "the weight of step i is this to the power of i"),
        ("learning_rate", float, 1e-4, "peak"),
        ("weight_decay", float, 0.01, "of AdamW"),
        ("max_grad_norm", float, 0.5, "global norm; 0 = no clipping"),
        ("warmup_ratio", float, 0.015, "share of the total steps"),
        ("scheduler_type", ("cosine", "linear", "constant"), "cosine", "learning rate after the warm-up"),
        ("scheduler_warmup_steps", int, None, "optimizer steps; none: from warmup_ratio"),
        ("scheduler_total_steps", int, None, "optimizer steps until the schedule ends; none: with the training"),
        ("scheduler_num_cosine_cycles", float, 0.5, "0.5 = once down"),
    ],
    "length and batches": [
        ("num_epochs", int, 2, "passes over the data"),
        ("total_steps", int, -1, "optimizer steps; positive: instead of num_epochs, the data repeats"),
        ("batch_size", int, 2, "sequences per rank in one forward of the target, and in evaluation"),
        ("draft_global_batch_size", int, 8, "sequences per optimizer step, all ranks"),
        ("draft_micro_batch_size", int, 1, "sequences per rank in one forward of the draft"),
        ("draft_accumulation_steps", int, None, "derived: global / (micro x ranks); another value is replaced"),
        ("tp_size", int, 1, "ranks that share one copy of the target; more than 1 is not available yet"),
        ("dp_size", int, None, "derived: ranks / tp_size; another value is replaced"),
    ],
    "run": [
        ("output_dir", str, "./output", "where everything is written"),
        ("log_steps", int, 50, "optimizer steps between two log lines"),
        ("eval_interval", int, 1, "epochs; the end is always evaluated"),
        ("save_interval", int, 1, "epochs; the end is always saved"),
        ("eval_steps", int, 0, "optimizer steps; 0 = by epoch only"),
        ("save_steps", int, 0, "optimizer steps; 0 = by epoch only"),
        ("resume", boolean, False, "continue the newest checkpoint of output_dir; not available yet"),
        ("resume_from_checkpoint", str, None, "draft whose weights and vocabulary mapping to start from"),
        ("report_to", str, "none", "none, swanlab, tensorboard; several by comma"),
        ("run_name", str, None, "name of the run in the trackers; none: theirs"),
        ("log_dir", str, None, "folder of the trackers' files; none: output_dir/logs"),
        ("seed", int, 0, "of initialisation and data order"),
        ("dist_timeout", float, 20, "minutes a collective may take; preparing conversations on the fly counts too"),
        ("deepspeed_config", str, str(REPOSITORY / "ds_configs" / "zero2.json"), "ZeRO, precision, offload"),
        ("local_rank", int, -1, "set by the launcher; -1 = from LOCAL_RANK"),
    ],
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in rows:
            if default is ...:
                options = {"required": True, "help": f"{text} (required)"}
            else:
                shown = "none" if default is None else Path(default).name if name == "deepspeed_config" else default
                options = {"default": default, "help": f"{text} (default: {shown})"}
            if isinstance(kind, tuple):
                options["choices"] = kind
            elif isinstance(kind, list):
                options |= {"type": kind[0], "nargs": "+"}
            else:
                options |= {"type": kind} | ({"nargs": "?", "const": True} if kind is boolean else {})
            group.add_argument(f"--{name}", **options)
    parser.error = fail
    args = parser.parse_args(normalise_argv(sys.argv[1:] if argv is None else argv, ALIASES))
    args.report_to = [name for name in args.report_to.split(",") if name not in ("", "none")]
    unknown = [name for name in args.report_to if name not in TRACKERS]
    if unknown:
        parser.error(f"report_to {','.join(unknown)}: choose from none, {', '.join(TRACKERS)}")
    args.log_dir = args.log_dir or str(Path(args.output_dir) / "logs")
    return args


def main(args):
    device, world = start_distributed(args.dist_timeout, args.local_rank), dist.get_world_size()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, every step
    if dist.get_rank() != 0 or not sys.stderr.isatty():
        disable_progress_bar()
    args, config, layers, data_folder, d2t = on_first_rank(lambda: prepare_run(args, world))
    data, data_config = open_data(data_folder)
    for turn in (True, False):  # the first rank of a node downloads what the others then find there
        if turn == (os.environ["LOCAL_RANK"] == "0"):
            model_dir = resolve_target(args.target_model_path)
        dist.barrier()

    target = load_target(model_dir, device, layer_ids=layers, trust_remote_code=args.trust_remote_code)
    config["torch_dtype"] = str(target.embedding.dtype).removeprefix("torch.")
    draft = build_draft(args, config, target, d2t.to(target.embedding.device))

    settings = run_settings(args, data_config)
    if dist.get_rank() == 0:
        counts = read_token_freq(Path(data_folder) / "token_freq.pt")
        share = sum(counts.get(token, 0) for token in target_ids(d2t).tolist()) / sum(counts.values())
        print(summary(args, config, layers, draft, data, data_config, share))
        print(f"attention   dense in this version; {args.attention_backend} gives the same numbers", flush=True)
        write_atomic(Path(args.output_dir) / "run.json", json.dumps(settings, indent=2) + "\n")

    engine, d2t = build_engine(args, draft, device), d2t.to(device)
    if args.dry_run:
        save_step(engine, d2t, args, 0, 0)
    else:
        record = Record(args, settings)
        train(args, engine, target, data, d2t, record)
        record.close()


if __name__ == "__main__":
    main(parse_args())
    dist.destroy_process_group()
