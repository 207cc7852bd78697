"""Train an EAGLE-3 draft for a target model: its hidden states are formed in memory, or read from a disk or a server.

In:  a target (--target_model_path) and conversations: JSON Lines (--dataset_train_split, --dataset_validation_split),
     or a folder written by prepare_data.py (--data_path).
Out: output_dir/ with run.json, metrics.jsonl, step_XXXXXXXX/ (complete checkpoints, see save_checkpoint.py), `latest`
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

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaConfig, set_seed
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, rotate_half
from transformers.utils.logging import disable_progress_bar

# isort: off
# (it would give every name a line of its own)
from build_vocab_mapping import choose_mapping, target_ids
from deal_batches import BLOCK, Plan, acceptance_walk, read_steps
from export_eagle3 import check_embedding, configure, num_auxiliary, read_draft
from prepare_data import TEMPLATES, hash_tokenizer, load_tokenizer, open_data, prepare, read_token_freq
from read_conversations import boolean, drop_foreign, fail, parse_flags, write_atomic
from prepare_hidden_states import SOURCE_FLAGS, ServerFailed, hash_target, open_target
from load_target import SHARING_FLAGS, check_heads, check_sharding, read_target_config, resolve_target
from record_run import TRACKERS, Record, metrics_line, run_settings, summary
from run_ranks import check_shared, noted_signals, on_each_node, on_first_rank, read_deepspeed_config, run_together
from run_ranks import start_distributed
from save_checkpoint import Progress, engine_kind, find_state, remove_rests, resume, save_step, write_final
# isort: on

REPOSITORY = Path(__file__).resolve().parent
# Of the MLP only matrix products are kept for the backward pass; the activation, cheap and large, is formed again.
KEEP_PRODUCTS = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
RECOMPUTED = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in the draft is random
QKV = ("q_proj", "k_proj", "v_proj")
MASKED_KERNEL = ("cpu",)  # devices with an attention kernel that takes any mask and returns the logsumexp
COMPARE_ROWS = 16  # of these, compared at a time: they stay in the cache of a CPU core
ALIASES = {  # other trainers' names of the same thing
    "verifier_name_or_path": "target_model_path", "train_data_path": "dataset_train_split",
    "eval_data_path": "dataset_validation_split", "draft_config": "draft_model_config", "epochs": "num_epochs",
    "training_batch_size": "batch_size", "lr": "learning_rate", "ttt_steps": "ttt_length", "max_steps": "total_steps",
    "draft_attn_impl": "attention_backend", "log_interval": "log_steps", "log_freq": "log_steps",
    "from_pretrained": "resume_from_checkpoint", "ckpt_dir": "resume_from_checkpoint",
    "train_hidden_states_path": "hidden_states_path", "output_model_path": "output_dir", "save_path": "output_dir",
    "logger": "report_to", "wandb_name": "run_name", "swanlab_name": "run_name", "mlflow_run_name": "run_name",
    "checkpoint_freq": "save_interval", "dataloader_num_workers": "num_workers",
}  # fmt: skip
INSTEAD = (  # other trainers' flags that this one lacks: see drop_foreign
    ("num_layers", "1", "the draft is one Llama layer"),
    ("draft_arch", "llama", "the draft is one Llama layer"),
    ("speculator_type", "eagle3", "the draft is one Llama layer"),
    ("draft_hidden_act", "silu", 'write "hidden_act" into the JSON of --draft_model_config'),
    ("sliding_window(_indices)?|mask_token_id|block_size|max_anchors|dflash_.*", "", "not of EAGLE-3, drop it"),
    ("norm_before_(residual|fc)|norm_output", "false", "write it into the JSON of --draft_model_config"),
    ("embed_requires_grad", "false", "the embedding stays frozen: serving takes the target's"),
    ("optimizer", "adamw", "the optimizer is AdamW, with --learning_rate and --weight_decay"),
    ("muon_.*", "", "the optimizer is AdamW, with --learning_rate and --weight_decay"),
    ("noise_std", r"0(\.0*)?", "no noise is added, drop it"),
    ("use_off_policy_tokens", "true", "later steps always read the data's tokens"),
    ("deterministic(_cuda)?", "false", "--seed fixes initialisation and order; kernels are as they are, drop it"),
    ("legacy_data", "false", "prepare the conversations with prepare_data.py"),
    ("data_format_version", "1", "prepare the conversations with prepare_data.py"),
    ("cache_(dir|key)|model_download_dir", "", "data are kept in output_dir/data, downloads in HF_HOME: drop it"),
    ("embedding_key", r"model\.embed_tokens\.weight", "the model's class knows it, drop it"),
    ("lm_head_key", r"lm_head\.weight", "the model's class knows it, drop it"),
    ("is_vlm", "false", "drafts are trained on text alone, drop it"),
    ("(min|max)_pixels", "", "drafts are trained on text alone, drop it"),
    ("is_preformatted", "true", 'rows of {"text": ...} are taken as they are'),
    ("train_only_last_turn", "false", "give it to prepare_data.py, and its folder as --data_path"),
    ("target_model_backend", "hf", "transformers runs the target, or vLLM at --vllm_endpoint: drop it"),
    ("sglang_.*", "", "transformers runs the target, or vLLM at --vllm_endpoint: drop it"),
    ("eval_hidden_states_path", "", "--hidden_states_path has those of the validation split too"),
    ("sp_(ulysses_|ring_)?size", "1", "sequences are not split: see Long sequences in the README"),
    ("profile|profile_record_shapes|verbose", "false", "benchmarks/step.py measures: drop it"),
    ("profile_(start_step|num_steps)", "", "benchmarks/step.py measures: drop it"),
    ("max_num_steps", "", "write --total_steps, and --scheduler_total_steps where the schedule is longer"),
    ("wandb", "false", "write --report_to wandb"),
    ("(wandb|swanlab|mlflow|trackio)_.*", "", "set the tracker's own variable: see Trackers in the README"),
)  # fmt: skip


# ==================== The draft ======================================================================================
def upcast(x):
    """x in fp32 at least: half-precision inputs are normalised and summed in fp32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HalfLinear(nn.Linear):
    """A projection of [embedding, feature] whose halves are applied one by one."""

    def forward(self, x, half, base=None):
        """W[:, half] x for x [T, H], half 0: of the embedding, 1: of the feature; base [T, out] is added."""
        weight = self.weight.chunk(2, dim=1)[half]
        return F.linear(x, weight) if base is None else torch.addmm(base, x, weight.T)


class DraftHead(nn.Linear):
    """Logits, or if given what `HeadLoss` takes, the loss. A module's call, as ZeRO-3 gathers weights for such."""

    def forward(self, hidden, *teaching):
        return HeadLoss.apply(hidden, self.weight, *teaching) if teaching else super().forward(hidden)


class DraftLayer(nn.Module):
    """One Llama layer whose attention reads the token's embedding beside the feature.

    What the embedding adds to q, k and v is the same in each step that reads the token: it is formed once a token
    (`token_parts`) and handed to every step.
    """

    def __init__(self, config):
        super().__init__()
        size, eps, self.head_dim = config.hidden_size, config.rms_norm_eps, config.head_dim
        widths = [self.head_dim * n for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        self.input_layernorm, self.hidden_norm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        linears = {name: HalfLinear(2 * size, width, bias=False) for name, width in zip(QKV, widths, strict=True)}
        self.self_attn = nn.ModuleDict(linears | {"o_proj": nn.Linear(widths[0], size, bias=False)})
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(size, eps), LlamaMLP(config)
        self.norm_before_residual, self.gradient_checkpointing = getattr(config, "norm_before_residual", False), False

    def token_parts(self, embeds):
        """What embeddings [T, H] add to q [T, A·D], k and v [T, G·D]."""
        x = self.input_layernorm(embeds)
        return [self.self_attn[name](x, half=0) for name in QKV]

    def forward(self, parts, feature, cos, sin, attend, rows=None):
        """Hidden states [n, H] of the slots `rows` (int64 [n], None: all) of feature [T, H]; keys and values for all.

        parts: token parts of q [n, A·D], k and v [T, G·D]; cos, sin [T, D];
        attend(q [n, A, D], k [T, G, D], v [T, G, D]) -> [n, A, D].
        """
        normed = self.hidden_norm(feature)

        def project(i):
            x = self.self_attn[QKV[i]](normed, half=1, base=parts[i]).unflatten(-1, (-1, self.head_dim))
            return x * cos[:, None] + rotate_half(x) * sin[:, None] if i < 2 else x

        k, v = project(1), project(2)
        if rows is not None:
            feature, normed, cos, sin = (x.index_select(0, rows) for x in (feature, normed, cos, sin))
        mixed = self.self_attn["o_proj"](attend(project(0), k, v).flatten(1))
        hidden = (normed if self.norm_before_residual else feature) + mixed
        mlp = lambda x: self.mlp(self.post_attention_layernorm(x))  # noqa: E731 (what is recomputed as a whole)
        if self.gradient_checkpointing:  # all of the layer is formed again
            return hidden + mlp(hidden)
        # ZeRO-3 may gather the weights anew in the backward pass, an operation that a selective checkpoint refuses.
        selective = {} if hasattr(self.mlp.down_proj.weight, "ds_id") else {"context_fn": KEEP_PRODUCTS}
        return hidden + checkpoint(mlp, hidden, **selective, **RECOMPUTED)


class DraftModel(nn.Module):
    """The EAGLE-3 draft; its parameters carry the names of the checkpoint. Sizes: H hidden, Vd draft vocabulary.

    config: the flat config.json (export_eagle3.py). embedding [V, H]: the target's table, frozen; a plain attribute and
    not a parameter, because the target holds it already and it must reach neither the engine nor the checkpoint.
    """

    def __init__(self, config, embedding):
        super().__init__()
        self.config, self.embedding = config, embedding
        self.attention_backend = "sdpa"
        size, eps = config["hidden_size"], config["rms_norm_eps"]
        features = config.get("target_hidden_size", size)
        count = num_auxiliary(config)
        self.input_norm = nn.RMSNorm(count * features, eps) if config.get("norm_before_fc") else None
        self.fc_norm = nn.ModuleList(nn.RMSNorm(features, eps) for _ in range(count)) if config.get("fc_norm") else None
        self.fc = nn.Linear(count * features, size, bias=False)
        rope = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
        names = ("hidden_size", "intermediate_size", "hidden_act", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "rms_norm_eps", "max_position_embeddings")  # fmt: skip
        sizes = {name: config[name] for name in (*names, "norm_before_residual") if name in config}
        llama = LlamaConfig(rope_parameters=rope, **sizes)
        self.midlayer = DraftLayer(llama)
        self.norm = nn.RMSNorm(size, eps)
        self.lm_head = DraftHead(size, config["draft_vocab_size"], bias=False)
        # Only the frequencies of transformers' rotary embedding are kept, and not as a buffer: DeepSpeed casts buffers
        # to bf16, whose 8 bits are an error of radians at long positions.
        rotary = LlamaRotaryEmbedding(llama)
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
        parts = self.midlayer.token_parts(F.embedding(tokens, self.embedding).to(feature.dtype))
        hidden = self.midlayer(parts, feature, *self.rotary(positions, feature.dtype), attend)
        normed = self.norm(hidden)
        return (normed if self.config.get("norm_output") else hidden), self.lm_head(normed)

    def forward(self, *args, **kwargs):
        """The objective; inside the module's forward because ZeRO-3 gathers the weights by its hooks."""
        return objective(self, *args, **kwargs)


# ==================== The objective ==================================================================================
def attend_keys(q, k, v, mask):
    """softmax(q k^T / sqrt(D) + mask) v and its logsumexp; q [1, G, N, D], k and v [1, G, M, D], mask [1, 1, N, M]."""
    if q.device.type in MASKED_KERNEL:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    scores = upcast(q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + mask
    return scores.softmax(-1).to(q.dtype) @ v, scores.logsumexp(-1)


def attend_keys_backward(grad, q, k, v, out, lse, mask):
    """Gradients of q, k and v if these keys are part of a softmax with the whole output `out` and logsumexp `lse`."""
    if q.device.type in MASKED_KERNEL:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask)
    scale = q.shape[-1] ** -0.5
    weights = (upcast(q @ k.transpose(2, 3)) * scale + mask - lse[..., None]).exp()
    delta = (upcast(grad) * out).sum(-1, keepdim=True)
    scores = ((upcast(grad @ v.transpose(2, 3)) - delta) * weights * scale).to(q.dtype)
    return scores @ k, scores.transpose(2, 3) @ q, weights.to(q.dtype).transpose(2, 3) @ grad


def merge_own(q, out, lse, own):
    """Attention over step-0 keys (out [n, A, D], lse [n, A]) and the slot's own keys as one softmax, and its logsumexp.

    own: keys [n, G, i, D] and values [n, G, i, D] of i later steps.
    """
    groups = own[0].shape[1]
    scores = upcast(q.unflatten(1, (groups, -1)) @ own[0].transpose(2, 3)).flatten(1, 2) * q.shape[-1] ** -0.5
    whole = torch.logaddexp(lse, scores.logsumexp(-1))
    weights = (scores - whole[..., None]).exp().to(q.dtype).unflatten(1, (groups, -1))
    out = out * (lse - whole).exp()[..., None].to(q.dtype) + (weights @ own[1]).flatten(1, 2)
    return out, whole


class SlotAttention(torch.autograd.Function):
    """One softmax over the step-0 keys up to the slot in its document and over the slot's own keys of later steps.

    q [n, A, D]; k, v [T, G, D]; live [n]: the slots; own: keys and values of i later steps, [n, G, i, D] each. Chunk by
    chunk of queries, nothing of n x T is kept. In the backward pass a part of a softmax needs no more than the whole's
    output and logsumexp (ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def chunks(q, k, v, live, spans):
        """Per span its queries' slice, its keys' slice, q and k and v [1, G, ., D], and the mask."""
        groups = k.shape[1]
        for first, end, key, stop in spans:
            hidden = torch.arange(key, stop, device=live.device) > live[first:end, None]
            mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf).repeat(q.shape[1] // groups, 1)
            parts = [SlotAttention.grouped(q[first:end], groups)] + [x[None, key:stop].transpose(1, 2) for x in (k, v)]
            yield slice(first, end), slice(key, stop), parts, mask[None, None]

    @staticmethod
    def grouped(x, groups):
        """[N, A, ...] -> [1, G, A/G · N, ...]: the heads that share a key head are further queries of it."""
        return x.unflatten(1, (groups, -1)).movedim(0, 2).flatten(1, 2)[None]

    @staticmethod
    def ungrouped(x, queries):
        """[1, G, A/G · N, ...] -> [N, A, ...]"""
        return x[0].unflatten(1, (-1, queries.stop - queries.start)).movedim(2, 0).flatten(1, 2)

    @staticmethod
    def forward(ctx, q, k, v, live, spans, *own):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for queries, _, parts, mask in SlotAttention.chunks(q, k, v, live, spans):
            out[queries], lse[queries] = (SlotAttention.ungrouped(x, queries) for x in attend_keys(*parts, mask))
        if own:
            out, lse = merge_own(q, out, lse, own)
        ctx.save_for_backward(q, k, v, live, out, lse, *own)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, live, out, lse, *own = ctx.saved_tensors
        groups, scale = k.shape[1], q.shape[-1] ** -0.5
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=upcast(x[:0]).dtype) for x in (k, v))
        for queries, keys, parts, mask in SlotAttention.chunks(q, k, v, live, ctx.spans):
            whole = [SlotAttention.grouped(x[queries], groups) for x in (grad, out, lse)]
            parts = attend_keys_backward(whole[0], *parts, *whole[1:], mask)
            dq[queries] = SlotAttention.ungrouped(parts[0], queries)
            dk[keys] += parts[1][0].transpose(0, 1)
            dv[keys] += parts[2][0].transpose(0, 1)
        if own:
            delta = (upcast(grad) * out).sum(-1, keepdim=True)
            q, grad, delta, lse = (x.unflatten(1, (groups, -1)) for x in (q, grad, delta, lse[..., None]))
            weights = (upcast(q @ own[0].transpose(2, 3)) * scale - lse).exp()
            scores = ((upcast(grad @ own[1].transpose(2, 3)) - delta) * weights * scale).to(q.dtype)
            dq += (scores @ own[0]).flatten(1, 2)
            own = scores.transpose(2, 3) @ q, weights.to(q.dtype).transpose(2, 3) @ grad
        return dq, dk.to(q.dtype), dv.to(q.dtype), None, None, *own


compiled = functools.cache(functools.partial(torch.compile, dynamic=True, fullgraph=True))


def flex_slots(q, k, v, own, live, begin, blocks):
    """What SlotAttention computes, with FlexAttention's kernel for the step-0 keys; n > 0.

    begin [n]: the first token of each slot's document; blocks: of the plan. Queries and keys are rounded up to whole
    blocks, and to two of them, so that no length is special and none has the kernel compiled anew.
    """
    count, rows = len(q), torch.arange(max(-(-len(q) // BLOCK), 2) * BLOCK, device=q.device).clamp(max=len(q) - 1)
    live, begin = live[rows], begin[rows]
    missing = max(-len(k) % BLOCK, 2 * BLOCK - len(k))
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, missing)).transpose(0, 1)[None] for x in (k, v))
    first, full, full_end, end = blocks[:, None, None, rows[::BLOCK] // BLOCK, None].int()  # [1, 1, query blocks, 1]
    at = torch.arange(keys.shape[2] // BLOCK, device=q.device, dtype=torch.int32)
    partial = torch.where(at < full - first, first + at, at + full_end - full + first)
    mask = BlockMask.from_kv_blocks(
        (full - first + end - full_end)[..., 0], partial.clamp(max=len(at) - 1),
        (full_end - full)[..., 0], (full + at).clamp(max=len(at) - 1), BLOCK_SIZE=BLOCK,
        seq_lengths=(len(rows), keys.shape[2]), mask_mod=lambda b, h, q, key: (begin[q] <= key) & (key <= live[q]),
    )  # fmt: skip
    attend = compiled(flex_attention) if q.device.type == "cuda" else flex_attention
    queries = q.index_select(0, rows).transpose(0, 1)[None]
    out, aux = attend(queries, keys, values, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    out, lse = out[0].transpose(0, 1)[:count], aux.lse[0].transpose(0, 1)[:count]
    return merge_own(q, out, lse, own)[0] if own else out


def compare(logits, p, mass):
    """A draft's logits against its teacher: both [N, Vd]; p over the draft vocabulary, mass [N]: its share of all.

    Returns cross-entropy, argmax and acceptance (sum of min(p, q)), [N] each, and the first one's gradient, q - p.
    """
    best, index = logits.max(dim=-1)
    q = logits.softmax(dim=-1)
    total = best - q.gather(1, index[:, None])[:, 0].log()
    entropy = total - torch.linalg.vecdot(p, logits)
    return entropy, index, torch.minimum(p * mass[:, None], q).sum(dim=-1), q - p


class HeadLoss(torch.autograd.Function):
    """Head, softmax, soft cross-entropy and metrics chunk by chunk; gradients are formed at once, no logits kept."""

    @staticmethod
    def forward(ctx, hidden, weight, last, head, plan, known, factors):
        """hidden [R, H]: normed outputs of the plan's rows; weight [Vd, H]: the draft's head; last [T, Ht], head: the
        target's; known [Vd]: target ids of the draft vocabulary; factors [R]: the weight of each row's step.
        Returns the weighted sum of the cross-entropies and [R, 3]: cross-entropy, right, acceptance.
        """
        wide, cuda = torch.promote_types(hidden.dtype, torch.float32), hidden.device.type == "cuda"
        values = hidden.new_empty(len(hidden), 3, dtype=wide)
        draws = torch.zeros(len(head.weight), dtype=torch.bool, device=hidden.device).index_fill_(0, known, True)
        hidden = hidden.detach()  # its gradient takes its place, row by row: the caller has no use for it any more
        learns = ctx.needs_input_grad[0]  # not while evaluating
        ctx.grads = hidden, torch.zeros_like(weight, dtype=wide) if learns else None
        logits = hidden.new_empty(max((stop - row for *_, row, stop in plan.chunks), default=0), len(weight))
        work, most = (compiled(compare), len(logits)) if cuda else (compare, COMPARE_ROWS)
        for first, end, row, stop in plan.chunks:
            rows, places = plan.order[row:stop], plan.places[row:stop] - first
            p, mass, best = head.teach(last[plan.teachers[first:end]], known)
            x, best = hidden[rows], best[places]
            drawn = draws[best]  # elsewhere the draft cannot be right and learns nothing
            chunk = torch.mm(x, weight.T, out=logits[: stop - row])
            for at in range(0, stop - row, most):
                part = slice(at, min(at + most, stop - row))
                of = places[part]
                entropy, index, accept, grad = work(chunk[part].to(wide), p.index_select(0, of), mass[of])
                entropy, right = torch.where(drawn[part], entropy, 0.0), known[index] == best[part]
                values[rows[part]] = torch.stack([entropy, right.to(wide), accept], dim=-1)
                chunk[part] = grad
            if learns:
                scale = (factors[rows] * drawn)[:, None].to(x.dtype)
                hidden[rows] = (chunk @ weight).mul_(scale)
                if wide == x.dtype:
                    ctx.grads[1].addmm_(chunk.T, x.mul_(scale))
                else:  # added up in fp32
                    ctx.grads[1].add_(chunk.T @ x.mul_(scale))
        ctx.mark_non_differentiable(values)
        return (values[:, 0] * factors).sum(), values

    @staticmethod
    def backward(ctx, grad, _):
        (hidden, weight), ctx.grads = ctx.grads, None  # or autograd would copy what is still referred to here
        return hidden.mul_(grad), weight.mul_(grad).to(hidden.dtype), None, None, None, None, None


def objective(draft, input_ids, position_ids, auxiliary, last, head, plan, d2t, decay):
    """The training-time test over concatenated documents, for live slots only.

    Later steps' keys are seen by their own slot alone. So at step 0 an unsupervised slot matters by its key and value
    only, and later not at all: losses and gradients are those of computing every slot in every step.
    input_ids, position_ids [T] int64; auxiliary [T, n·Ht], last [T, Ht] and head: the target's; plan: of `plan_slots`;
    d2t [Vd] int64 offsets; decay: the weight of step i is decay^i.
    Returns the loss summed over slots and steps (not yet divided by anything), the sums behind the metrics
    (float64 [K, 4]: cross-entropy, argmax correct, acceptance, count), and which predictions were right (bool [K, T]).
    """
    layer, dtype = draft.midlayer, draft.fc.weight.dtype
    lives, keeps = plan.live.split(plan.counts), plan.keep.split(plan.counts)
    blocks = plan.blocks.split([-(-n // BLOCK) for n in plan.counts], dim=1)
    tokens = layer.token_parts(F.embedding(input_ids, draft.embedding).to(dtype))

    def run(i, parts, feature, first, own):
        """Step i: hidden states, and keys and values: at step 0 of all slots (later given as `first`), after that the
        live slots' own of steps 1 to i (given as `own` without the last)."""
        live, state = lives[i], []

        def attend(q, k, v):
            if i == 0:
                state[:] = k, v
            else:
                new = k[:, :, None], v[:, :, None]  # [n, G, 1, D]
                state[:] = [torch.cat(pair, dim=2) for pair in zip(own, new, strict=True)] if own else new
            pairs = (k, v, ()) if i == 0 else (*first, state)
            if draft.attention_backend == "flex_attention" and len(live):
                return flex_slots(q, *pairs, live, live - position_ids[live], blocks[i])
            return SlotAttention.apply(q, *pairs[:2], live, plan.spans[i], *pairs[2])

        rotary = draft.rotary(position_ids[live] + i if i else position_ids, dtype)
        return layer(parts, feature, *rotary, attend, None if i else live), *state

    wrapped = functools.partial(checkpoint, **RECOMPUTED) if layer.gradient_checkpointing else lambda f, *x: f(*x)
    feature, first, own, outputs = draft.features(auxiliary.to(dtype)), (), (), []
    for i, live in enumerate(lives):
        if i and len(live) < len(feature):
            feature, *own = (x.index_select(0, keeps[i]) for x in (feature, *own))
        parts = [x.index_select(0, live + 1 + i) if i or x is tokens[0] else x.roll(-1, dims=0) for x in tokens]
        hidden, *state = wrapped(run, i, parts, feature, first, own)
        first, own = (first, state) if i else (state, ())
        outputs.append(draft.norm(hidden))
        feature = outputs[-1] if draft.config.get("norm_output") else hidden

    factors = [torch.full_like(live, decay**i, dtype=upcast(feature).dtype) for i, live in enumerate(lives)]
    hidden = torch.cat(outputs)
    outputs.clear()  # twice the memory otherwise
    loss, values = draft.lm_head(hidden, last, head, plan, target_ids(d2t), torch.cat(factors))
    parts = values.split(plan.counts)
    sums = torch.stack([F.pad(part.double().sum(0), (0, 1), value=len(part)) for part in parts])
    correct = torch.zeros(len(parts), len(input_ids), dtype=torch.bool, device=input_ids.device)
    for row, live, part in zip(correct, lives, parts, strict=True):
        row[live] = part[:, 1] > 0
    return loss, sums, correct


def chain_lengths(correct):
    """n_j [T]: the number of leading steps that are all right, of correct [K, T] bool."""
    return correct.long().cumprod(dim=0).sum(dim=0)


def metric_values(sums, chains, loss_weight_sum):
    """Metrics by name from sums [K, 4] and chains (sum of n_j), as floats. loss_weight_sum: decay^i per step."""
    counts = [max(row[3], 1.0) for row in sums]
    values = {"loss": sum(w * row[0] for w, row in zip(loss_weight_sum, sums, strict=True)) / counts[0]}
    for name, column in (("loss", 0), ("acc", 1), ("accept", 2)):
        values |= {f"{name}_{i}": row[column] / counts[i] for i, row in enumerate(sums)}
    return values | {"chain_length": 1 + chains / counts[0]}


# ==================== The engine =====================================================================================
def engine_config(args, device):
    """DeepSpeed's configuration: the file's, with what the flags decide filled in."""
    micro, accumulated = args.draft_micro_batch_size, args.draft_accumulation_steps
    return read_deepspeed_config(args.deepspeed_config, {
        "train_micro_batch_size_per_gpu": ("draft_micro_batch_size", micro),
        "gradient_accumulation_steps": ("draft_accumulation_steps", accumulated),
        "train_batch_size": ("draft_global_batch_size", micro * accumulated * dist.get_world_size()),
        "gradient_clipping": ("max_grad_norm", args.max_grad_norm),
    }, device)  # fmt: skip


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
    engine.optimizer.check_grad_overflow = True  # steps that are not finite are left out, in fp32 too
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
def run_objective(draft, target, batches, d2t, args):
    """Yield what the draft's objective returns for each of this rank's micro-batches."""
    for batch, (auxiliary, last) in zip(batches, target.states(batches), strict=True):
        ids, positions, plan = batch["input_ids"], batch["position_ids"], Plan(*(batch[name] for name in Plan._fields))
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
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (mine, [batch["rows"] for batch in batches]))
    if any(rows for rows, _ in every):
        return ", ".join(f"the loss of rank {rank} in rows {rows}" for rank, (rows, _) in enumerate(every) if rows)
    return "the gradient, " + ", ".join(f"rank {rank} had rows {rows}" for rank, (_, rows) in enumerate(every))


# ==================== Measuring ======================================================================================
@torch.no_grad()
def evaluate(engine, target, data, d2t, args):
    """Metrics of the validation rows over all ranks; acceptance_length from walking every reply as serving does."""
    engine.eval()
    sums, chains, walk = 0.0, 0.0, torch.zeros(2, dtype=torch.float64, device=engine.device)
    sizes = {"global_batch_size": args.batch_size * dist.get_world_size(), "micro_batch_size": args.batch_size}
    with contextlib.closing(read_steps(data, args, target, engine.device, name="validation", **sizes)) as steps:
        for batches in steps:
            results = run_objective(engine.module, target, batches, d2t, args)
            for batch, (_, part, correct) in zip(batches, results, strict=True):
                accepted = chain_lengths(correct)
                sums, chains = sums + part, chains + accepted.sum().double()
                documents = (x.split(batch["lengths"]) for x in (accepted, batch["loss_mask"]))
                for drafts, mask in zip(*documents, strict=True):
                    passes = acceptance_walk(drafts.tolist(), mask.tolist())
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


# ==================== The loop =======================================================================================
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
            fail(message)
    check_sharding(args, world)
    if args.total_seq_len:
        args.draft_micro_batch_size = 1  # for the arithmetic of DeepSpeed, which knows no budget of tokens
    micro, batch = args.draft_micro_batch_size * world, args.draft_global_batch_size
    if batch % micro and not args.total_seq_len:
        fits = [n for n in (batch // micro * micro, -(-batch // micro) * micro) if n]
        fail(f"draft_global_batch_size {batch} is not a multiple of draft_micro_batch_size "
             f"{args.draft_micro_batch_size} x {world} ranks = {micro}; nearest that fit: "
             f"{' or '.join(map(str, fits))}")  # fmt: skip
    if args.draft_accumulation_steps not in (None, -(-batch // micro)):
        print(f"draft_accumulation_steps {args.draft_accumulation_steps} is replaced by {-(-batch // micro)}")
    args.draft_accumulation_steps = -(-batch // micro)


def draft_config_for(args, model_dir):
    """(flat configuration, auxiliary layers) of the draft: derived, a file's, or a checkpoint's, for this target."""
    given, source = {}, args.resume_from_checkpoint or args.draft_model_config
    if args.resume_from_checkpoint:
        given, _ = read_draft(source, model_dir)
        if len(args.target_layer_ids or ()) not in (0, num_auxiliary(given)):
            fail(f"target_layer_ids {args.target_layer_ids}: {source} reads {num_auxiliary(given)} layers")
    elif source:
        try:
            given = dict(json.loads(Path(source).read_text()))
        except (OSError, ValueError, TypeError) as error:
            fail(f"draft_model_config {source} is not a file with a JSON object: {error}")
    text, whole = read_target_config(model_dir, args.trust_remote_code)
    check_heads(text, args.tp_size)
    size = None if args.resume_from_checkpoint else args.draft_vocab_size  # a checkpoint's mapping decides
    return configure(text, whole, given, source, args.target_layer_ids, size)


def prepare_run(args, world):
    """Everything that can go wrong before a model loads, on rank 0. Returns what all ranks need to go on."""
    check_flags(args, world)
    args.engine = engine_kind(engine_config(args, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    state = find_state(args)
    if "nvme" in args.engine["optimizer"]:
        print("optimizer states on nvme: DeepSpeed restores only a part of them, this training cannot be resumed")
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
    longest = {split: part["longest"] for split, part in data_config["splits"].items()}
    tokenizer = hash_tokenizer(load_tokenizer(args.target_model_path, args.trust_remote_code))
    if data_config["ingredients"]["tokenizer"] != tokenizer:
        fail(f"{folder} was prepared with another tokenizer or chat template than the target's: prepare it again")
    if (most := max(longest.values())) > args.max_length:
        fail(f"{folder} has rows of {most} tokens, max_length is {args.max_length}: give --max_length {most}")
    if 0 < args.total_seq_len < longest["train"]:
        fail(f"total_seq_len {args.total_seq_len} is less than the {longest['train']} tokens of a row of {folder}")
    if len(data["train"]) < world:
        fail(f"{len(data['train'])} training sequences for {world} ranks: a rank would have none")
    if args.resume_from_checkpoint:
        d2t = read_draft(args.resume_from_checkpoint)[1].get("d2t", torch.zeros(config["vocab_size"], dtype=torch.long))
        if args.d2t_path or args.token_freq_path or args.draft_vocab_size not in (None, len(d2t)):
            print(f"the vocabulary mapping of {args.resume_from_checkpoint} ({len(d2t)} tokens) is kept")
    else:
        files = args.token_freq_path or Path(folder) / "token_freq.pt", args.d2t_path, args.t2d_path
        d2t = choose_mapping(config["draft_vocab_size"], config["vocab_size"], *files)
    config["draft_vocab_size"] = len(d2t)
    args.steps_per_epoch = math.ceil(len(data["train"]) / args.draft_global_batch_size)
    if args.total_steps <= 0:
        args.total_steps = args.num_epochs * args.steps_per_epoch
    if args.scheduler_warmup_steps is None:
        args.scheduler_warmup_steps = math.ceil(args.warmup_ratio * args.total_steps)
    args.scheduler_total_steps = args.scheduler_total_steps or args.total_steps
    if args.scheduler_warmup_steps > args.scheduler_total_steps:
        fail(f"warm-up of {args.scheduler_warmup_steps} steps in a schedule of {args.scheduler_total_steps} steps")
    args.fingerprints = {"data": data_config["fingerprint"], "target": hash_target(model_dir)}
    for name, value in args.fingerprints.items() if state else ():
        if state["flags"]["fingerprints"][name] != value:
            given = {"data": folder, "target": model_dir}[name]
            fail(f"{args.resume_from_checkpoint} was trained with another {name} than {given}: give the same, or start "
                 "from its weights without --resume")  # fmt: skip
    ignored = {"resume", "resume_from_checkpoint", "output_dir", "local_rank", "build_dataset_num_proc", "engine"}
    changed = [f"{name} {old} -> {getattr(args, name)}" for name, old in (state or {"flags": {}})["flags"].items()
               if name not in ignored and old != getattr(args, name, old)]  # fmt: skip
    if changed:
        print(f"flags that differ from those of {args.resume_from_checkpoint}: {', '.join(changed)}")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    remove_rests(args.output_dir)
    return args, config, layers, folder, d2t, state


def build_draft(args, config, target, d2t):
    """The draft, initialised from the seed or with a checkpoint's weights."""
    set_seed(args.seed)
    draft = DraftModel(config, target.embedding)
    draft.attention_backend, draft.midlayer.gradient_checkpointing = args.attention_backend, args.gradient_checkpointing
    if args.attention_backend == "flex_attention" and target.embedding.device.type == "cpu":
        draft.attention_backend = "sdpa"
    draft.initialise(target.head.weight[target_ids(d2t)])
    if args.resume_from_checkpoint:
        tensors = read_draft(args.resume_from_checkpoint)[1]
        check_embedding(args.resume_from_checkpoint, tensors, target.embedding)
        draft.load_state_dict({n: t for n, t in tensors.items() if n not in ("embed_tokens.weight", "d2t", "t2d")})
    return draft.to(target.embedding.dtype).float()  # what a checkpoint can hold: continuing from a dry run is the same


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
    steps = read_steps(
        data["train"], args, target, engine.device, range(progress.step, args.total_steps),
        total_seq_len=args.total_seq_len, global_batch_size=args.draft_global_batch_size,
        micro_batch_size=args.draft_micro_batch_size,
    )  # fmt: skip
    with noted_signals() as asked, contextlib.closing(steps):
        for step, batches in enumerate(steps, progress.step + 1):
            # --- one optimizer step; then all ranks find out together whether to stop and to save ---
            rate = learning_rate_at(step - 1, args)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            sums, chains, wrong = optimizer_step(engine, target, batches, d2t, args)
            if wrong:
                good = good if progress.bad else copy.deepcopy(progress)
                progress.bad += 1
                record.line(f"step {step} is left out, it is not finite: {wrong}")
            else:
                progress.bad = 0
                progress.sums, progress.chains = progress.sums + sums, progress.chains + chains
                progress.tokens += sum(len(batch["input_ids"]) for batch in batches)
                progress.norms.append(engine.get_global_grad_norm())
            old = record.first and 0 < 60 * args.save_minutes < time.monotonic() - saved
            votes = torch.tensor([len(asked), old], dtype=torch.float32, device=engine.device)
            dist.all_reduce(votes)
            stop, old = votes.tolist()
            progress.step, progress.seconds = step, time.monotonic() - started
            progress.spent += time.monotonic() - mark
            if progress.bad == args.max_bad_steps:
                folder = save_step(engine, d2t, args, good, record)
                message = (
                    f"{progress.bad} steps in a row are not finite, the last good state is {folder or 'not saved'}"
                )
                record.close(2)
                on_first_rank(functools.partial(fail, f"{message}: look at the rows named above"))
            if record.first:
                record.bar.update()
            last = step == args.total_steps

            # --- log: the values cover all steps since the last line ---
            if step % args.log_steps == 0 or last:
                log(args, record, progress, rate)
                progress.restart(args.ttt_length, engine.device)

            # --- evaluate and save: by epochs, by steps, by time, and always at the end ---
            whole = 0 if step % args.steps_per_epoch else step // args.steps_per_epoch  # epochs finished, 0 within one
            before = progress.best
            due_now = last or stop or old or due(whole, args.save_interval) or due(step, args.save_steps)
            if "validation" in data and (last or due(whole, args.eval_interval) or due(step, args.eval_steps)):
                best = evaluate_now(engine, target, data["validation"], d2t, args, record, progress)
                if best and not progress.bad and (due_now or args.save_best):
                    progress.best, due_now = best, True
            if due_now:  # never after a step that was left out: --resume tries those again
                folder = save_step(engine, d2t, args, good if progress.bad else progress, record)
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
    record.line(f"evaluation at step {progress.step} | {metrics_line(values, args.ttt_length)} | "
                f"acceptance_length {values['acceptance_length']:.3f}")  # fmt: skip
    value, sign, best = values[args.best_metric], -1 if args.best_metric == "loss" else 1, progress.best
    better = not best or best[2] != args.best_metric or sign * value > sign * best[0]
    return [value, progress.step, args.best_metric] if better and math.isfinite(value) else None


def log(args, record, progress, rate):
    """A row and a line about the steps since the last ones."""
    step, total = progress.step, args.total_steps
    values = reduced_metrics(progress.sums, progress.chains, args, progress.tokens.reshape(1))
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
        f"step {step}/{total} {step / total:.0%} | {metrics_line(values, args.ttt_length)} | lr {rate:.2e} | "
        f"grad_norm {norm} | {values['tokens_per_second']:.0f} tokens/s | left {left}"
    )


# (name, type, default, help, least value if any): see parse_flags
FLAGS = {
    "target and data": [
        ("target_model_path", str, ..., "folder or hub id; a folder may hold one nested model or an MLflow model"),
        ("dataset_train_split", str, None, "JSON Lines of conversations; prepared into output_dir/data"),
        ("dataset_validation_split", str, None, "the same, for evaluation; none: no evaluation"),
        ("data_path", str, None, "folder written by prepare_data.py, instead of the two above"),
        ("chat_template", str, "llama3", f"{', '.join(TEMPLATES)} or auto, which finds it out"),
        ("max_length", int, 2048, "tokens; longer conversations are cut at the right", 2),
        ("build_dataset_num_proc", int, 96, "processes that tokenise, at most the cores available", 1),
        ("trust_remote_code", boolean, False, "run code that comes with the target"),
    ],
    "how ranks share the target": SHARING_FLAGS,
    "hidden states on disk": SOURCE_FLAGS,
    "draft": [
        ("draft_model_config", str, None, "JSON of the draft; none: derived from the target"),
        ("draft_vocab_size", int, None, "tokens that the draft can propose; none: the mapping's, or all", 1),
        ("token_freq_path", str, None, "token counts to choose them by; none: the prepared data's token_freq.pt"),
        ("d2t_path", str, None, "mapping of build_vocab_mapping.py, with t2d_path; none: built from the counts"),
        ("t2d_path", str, None, "the other half of the mapping"),
        ("target_layer_ids", [int], None, "auxiliary layers, i = after i layers; none: 2 L//2 L-3"),
        ("attention_backend", ("flex_attention", "sdpa"), "flex_attention", "the former on GPUs only; same numbers"),
        ("dry_run", boolean, False, "initialise the draft, save it as step_00000000, and exit"),
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
        ("gradient_checkpointing", boolean, False, "recompute the draft's layer in the backward pass, to save memory"),
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
        ("save_best", boolean, False, "save whenever the evaluation is the best so far; `best` links to it"),
        ("best_metric", ("acceptance_length", "loss"), "acceptance_length", "of the validation split"),
        ("max_bad_steps", int, 10, "steps in a row whose gradient is not finite, which end the training", 1),
        ("resume", boolean, False, "go on from the newest complete checkpoint of output_dir, if there is one"),
        ("resume_from_checkpoint", str, None, "with resume: if output_dir has none; without: draft to start from"),
        ("no_resume_from_checkpoint", boolean, False, "start anew, even with resume"),
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
    args = parse_flags(__doc__, FLAGS, drop_foreign(argv, INSTEAD, ALIASES))
    args.report_to = [name for name in args.report_to.split(",") if name not in ("", "none")]
    unknown = [name for name in args.report_to if name not in TRACKERS]
    if unknown:
        fail(f"report_to {','.join(unknown)}: choose from none, {', '.join(TRACKERS)}")
    args.log_dir = args.log_dir or str(Path(args.output_dir) / "logs")
    return args


def main(args):
    device, world = start_distributed(args.dist_timeout, args.local_rank), dist.get_world_size()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, every step
    if dist.get_rank() != 0 or not sys.stderr.isatty():
        disable_progress_bar()
    args, config, layers, data_folder, d2t, state = on_first_rank(lambda: prepare_run(args, world))
    check_shared("output_dir", args.output_dir)
    data, data_config = open_data(data_folder)
    model_dir = on_each_node(lambda: resolve_target(args.target_model_path))

    target = open_target(args, model_dir, device, layers, data, data_config)
    config["torch_dtype"] = str(target.embedding.dtype).removeprefix("torch.")
    draft = build_draft(args, config, target, d2t.to(target.embedding.device))

    settings = run_settings(args, data_config, state["step"] if state else 0)
    if dist.get_rank() == 0:
        counts = read_token_freq(Path(data_folder) / "token_freq.pt")
        share = sum(counts.get(token, 0) for token in target_ids(d2t).tolist()) / sum(counts.values())
        print(summary(args, config, layers, draft, target, data, data_config, share))
        write_atomic(Path(args.output_dir) / "run.json", json.dumps(settings, indent=2) + "\n")

    engine, d2t = build_engine(args, draft, device), d2t.to(device)
    progress = resume(engine, args, state) if state else Progress()
    if not state:
        progress.restart(args.ttt_length, device)
    if args.dry_run:
        if not save_step(engine, d2t, args, progress):
            sys.exit(2)
        return
    record, output_dir = Record(args, settings), Path(args.output_dir)
    if state:
        record.line(f"resumed     {args.resume_from_checkpoint}")
    try:
        if train(args, engine, target, data, d2t, record, progress):
            write_final(engine, d2t, output_dir / "final", {"run.json": json.dumps(settings, indent=2) + "\n"})
            record.line(f"finished {progress.step} steps in {progress.seconds:.0f} s: {output_dir / 'final'}")
    except ServerFailed as error:
        folder = save_step(engine, d2t, args, progress, record)
        record.close(2)
        on_first_rank(functools.partial(fail, f"{error}; the draft is saved in {folder}" if folder else error))
    record.close()


if __name__ == "__main__":
    run_together(main, parse_args())
