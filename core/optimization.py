"""Optimization: DeepSpeed's configuration and engine, parameter groups, the learning rate, one optimizer step.

The loss of an optimizer step is divided by what its batches are normalised by (for EAGLE-3 the supervised slots of
step 0), counted over all micro-batches of all ranks. So the gradient depends neither on how sequences are cut into
micro-batches nor on the number of ranks.
"""

import json
import math
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from core import common, ranks

POSITIVE = common.at_least(int, 1)
NATURAL = common.at_least(int, 0)
NOT_NEGATIVE = common.at_least(float, 0)

# ==================== Flags ==========================================================================================


def add_flags(parser):
    """The flags of the optimizer and the learning rate."""
    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=NOT_NEGATIVE, default=1e-4, help="peak")
    add("--weight_decay", type=NOT_NEGATIVE, default=0.01, help="of AdamW")
    add("--max_grad_norm", type=NOT_NEGATIVE, default=0.5, help="global norm; 0 = no clipping")
    add("--warmup_ratio", type=NOT_NEGATIVE, default=0.015, help="share of the total steps")
    schedules = ("cosine", "linear", "constant")
    add("--scheduler_type", choices=schedules, default="cosine", help="learning rate after the warm-up")
    add("--scheduler_warmup_steps", type=NATURAL, help="optimizer steps; none: from warmup_ratio")
    add("--scheduler_total_steps", type=NATURAL, help="optimizer steps; none: the training's")
    add("--scheduler_num_cosine_cycles", type=NOT_NEGATIVE, default=0.5, help="0.5 = once down")


# ==================== The engine =====================================================================================


def engine_config(path, micro_batch_size, accumulation_steps, max_grad_norm):
    """DeepSpeed's configuration: the JSON file at `path`, completed by what flags decide.

    Ends the program if the file contradicts a flag, or asks for what this trainer does not do.
    """
    config = read_config(path)
    batch_size = micro_batch_size * accumulation_steps * dist.get_world_size()

    def decide(key, flag, value):
        if config.get(key, "auto") not in ("auto", value):
            common.fail(f"{path}: {key} {config[key]} contradicts {flag} {value}; remove it from the file")
        config[key] = value

    decide("train_micro_batch_size_per_gpu", "draft_micro_batch_size", micro_batch_size)
    decide("gradient_accumulation_steps", "draft_accumulation_steps", accumulation_steps)
    decide("train_batch_size", "draft_global_batch_size", batch_size)
    decide("gradient_clipping", "max_grad_norm", max_grad_norm)
    precision = config.setdefault("bf16", {})
    if precision.get("enabled", "auto") == "auto":  # CPUs train in fp32 unless the file asks for bf16
        precision["enabled"] = torch.cuda.is_available()
    config.setdefault("steps_per_print", sys.maxsize)
    config.setdefault("timers", {"throughput": {"enabled": False}})  # it would wait for the device in each micro-batch
    return config


def read_config(path):
    """A JSON file of DeepSpeed's configuration; ends the program if it asks for what this trainer does not do."""
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        common.fail(f"deepspeed_config {path} cannot be read: {error.strerror}")
    except ValueError as error:
        common.fail(f"deepspeed_config {path} is not JSON: {error}")
    if not isinstance(config, dict) or config.get("fp16", {}).get("enabled"):
        common.fail(f"deepspeed_config {path} must be a JSON object, and without fp16: bf16 is what trains")
    for key in {"optimizer", "scheduler"} & config.keys():
        common.fail(f"{path}: {key} is decided by the flags of train_eagle3.py; remove it from the file")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage")
    for name in ("offload_optimizer", "offload_param"):
        part = zero.get(name, {})
        if part.get("device") == "nvme":
            if stage != 3:
                common.fail(f"{path}: {name} on nvme needs ZeRO stage 3, the file says {stage}")
            ranks.check_disk(f"{path}: nvme_path of {name},", part.get("nvme_path"))
    return config


def offload_device(config):
    """Where the optimizer's states are: "none" (on the rank's device), "cpu" or "nvme"."""
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {})
    return offload.get("device", "none")


def parameter_groups(draft, weight_decay):
    """The optimizer's groups. Each has a multiplier of the schedule's learning rate."""
    parameters = [p for p in draft.parameters() if p.requires_grad]
    return [{"params": parameters, "weight_decay": weight_decay, "lr_multiplier": 1.0}]


def build_engine(draft, groups, config, device):
    """The DeepSpeed engine around the draft, with AdamW over these parameter groups."""
    options = {"lr": 0.0, "betas": (0.9, 0.95)}  # the loop sets the learning rate
    if offload_device(config) == "none":
        optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda", **options)
    else:  # the states are in CPU memory: DeepSpeed's own AdamW steps them there with vector instructions
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    engine, *_ = deepspeed.initialize(model=draft.to(device), optimizer=optimizer, config=config)
    engine.optimizer.check_grad_overflow = True  # steps that are not finite are skipped, in fp32 too
    return engine


# ==================== The learning rate ==============================================================================


def learning_rate_at(step, args, run):
    """Learning rate of the optimizer step that follows `step` finished ones: linear warm-up, then the schedule."""
    warmup = run.scheduler_warmup_steps
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(run.scheduler_total_steps - warmup, 1)
    share = min(share, 1.0)
    if args.scheduler_type == "constant":
        return args.learning_rate
    if args.scheduler_type == "linear":
        return args.learning_rate * (1.0 - share)
    angle = 2.0 * math.pi * args.scheduler_num_cosine_cycles * share
    return args.learning_rate * (0.5 * (1.0 + math.cos(angle)))


def set_learning_rate(engine, rate):
    """Set each parameter group's learning rate: the schedule's times the group's multiplier."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


# ==================== One step =======================================================================================


def optimizer_step(engine, batches, states, forward):
    """One optimizer step on this rank's micro-batches.

    states: yields what belongs to each batch. forward(engine, batch, state) -> loss summed over what the batch is
    normalised by, and sums {name: tensor} for the metrics.
    Returns the sums over the batches, and "" or, if a gradient was not finite and the step was skipped, its source.
    """
    normaliser = sum(batch.normaliser for batch in batches)
    total = torch.full((), normaliser, dtype=torch.float64, device=engine.device)
    dist.all_reduce(total)
    # DeepSpeed averages over ranks and micro-batches; the loss is to be divided by the total alone.
    averaged = dist.get_world_size() * engine.gradient_accumulation_steps()
    scale = averaged / total.clamp(min=1)
    sums = {}
    losses = []
    skipped = False
    for number, (batch, state) in enumerate(zip(batches, states, strict=True), 1):
        loss, found = forward(engine, batch, state)
        is_last = number == len(batches)
        engine.set_gradient_accumulation_boundary(is_last)  # steps differ in their number of batches
        engine.backward(loss * scale.to(loss.dtype))
        if is_last and engine.zero_optimization_stage() == 0:  # which does not check gradients itself
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            skipped = not all(gradient.isfinite().all() for gradient in gradients)
        if skipped:
            engine.zero_grad()
        else:
            engine.step()
        losses.append(loss.detach())
        add_sums(sums, found)
    if not (skipped or getattr(engine.optimizer, "overflow", False)):
        return sums, ""
    if getattr(engine.optimizer, "cpu_offload", False):
        engine.optimizer.averaged_gradients = {}  # ZeRO-2 with offload would add to them in the next step
    return sums, find_source(batches, losses)


def find_source(batches, losses):
    """Which rows of which rank gave a loss that is not finite, from every rank's micro-batches and their losses."""
    rows = [batch.rows for batch in batches]
    bad = [batch.rows for batch, loss in zip(batches, losses, strict=True) if not loss.isfinite()]
    gathered = ranks.gather((bad, rows))
    found = []
    read = []
    for rank, (bad, rows) in enumerate(gathered):
        read.append(f"rank {rank} had rows {rows}")
        if bad:
            found.append(f"the loss of rank {rank} in rows {bad}")
    if found:
        return ", ".join(found)
    return f"the gradient, {', '.join(read)}"


def add_sums(total, sums):
    """total += sums, name by name."""
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value


def reduce_sums(sums):
    """Sums over all ranks as floats, {name: number or list}, from this rank's {name: float64 tensor}."""
    flat = torch.cat([value.flatten() for value in sums.values()])
    dist.all_reduce(flat)
    flat = flat.cpu()  # the one synchronisation with the device
    parts = flat.split([value.numel() for value in sums.values()])
    reduced = {}
    for (name, value), part in zip(sums.items(), parts, strict=True):
        reduced[name] = part.view(value.shape).tolist()
    return reduced
