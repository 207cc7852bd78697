"""Optimization: DeepSpeed's configuration and engine, parameter groups, the learning rate, one step, the average.

The loss of an optimizer step is divided by what its batches are normalised by (for EAGLE-3 the supervised slots of
step 0), counted over all micro-batches of all ranks. So the gradient depends neither on how sequences are cut into
micro-batches nor on the number of ranks.
"""

import contextlib
import json
import math
import sys
from collections import defaultdict

import torch
import torch.distributed as dist

from core import common, ranks

POSITIVE = common.at_least(int, 1)
NATURAL = common.at_least(int, 0)
NOT_NEGATIVE = common.at_least(float, 0)
NEWTON_SCHULZ_STEPS = 5  # of DeepSpeed's Muon
OUTER = ("embed_tokens.", "lm_head.", "markov_head.", "confidence_head.")  # matrices that Muon is not for

# ==================== Flags ==========================================================================================


def add_flags(parser):
    """The flags of the optimizer and the learning rate."""
    add = parser.add_argument_group("optimizer").add_argument
    matrices = "adamw, or muon for the matrices of fc and layers and adamw for the rest"
    adjust = (
        "rate of a matrix: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)) for updates of AdamW's size"
    )
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help=matrices)
    precision = "of the draft, bf16 with fp32 master weights; auto: bf16 on GPUs, fp32 on CPUs"
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=precision)
    add("--learning_rate", type=NOT_NEGATIVE, default=1e-4, help="peak")
    add("--weight_decay", type=NOT_NEGATIVE, default=0.01, help="of AdamW")
    add("--muon_lr", type=NOT_NEGATIVE, default=0.02, help="peak")
    add("--muon_momentum", type=NOT_NEGATIVE, default=0.95, help="Nesterov's")
    add("--muon_weight_decay", type=NOT_NEGATIVE, default=0.1, help="of Muon")
    add("--muon_ns_steps", type=POSITIVE, default=NEWTON_SCHULZ_STEPS, help="Newton-Schulz; DeepSpeed's Muon does 5")
    add("--muon_adjust_lr_fn", choices=("original", "match_rms_adamw"), default="match_rms_adamw", help=adjust)
    add("--ema_decay", type=NOT_NEGATIVE, default=0.0, help="of averaged weights: evaluated, saved; 0 = off")
    add("--max_grad_norm", type=NOT_NEGATIVE, default=0.5, help="global norm; 0 = no clipping")
    add("--warmup_ratio", type=NOT_NEGATIVE, default=0.015, help="share of the total steps")
    schedules = ("cosine", "linear", "constant")
    add("--scheduler_type", choices=schedules, default="cosine", help="learning rate after the warm-up")
    add("--scheduler_warmup_steps", type=NATURAL, help="optimizer steps; none: from warmup_ratio")
    add("--scheduler_total_steps", type=NATURAL, help="optimizer steps; none: the training's")
    add("--scheduler_num_cosine_cycles", type=NOT_NEGATIVE, default=0.5, help="0.5 = once down")


def check_flags(args, given):
    """End the program if flags of the optimizer contradict each other; given: names of flags that are no defaults."""
    muon = sorted(name for name in given if name.startswith("muon_"))
    if args.ema_decay >= 1 or args.muon_momentum >= 1:
        common.fail(f"ema_decay {args.ema_decay} and muon_momentum {args.muon_momentum} must be below 1")
    if args.optimizer != "muon" and muon:
        common.fail(f"{', '.join(muon)}: optimizer is {args.optimizer}: give --optimizer muon, or drop it")
    if args.optimizer != "muon":
        return
    if args.muon_ns_steps != NEWTON_SCHULZ_STEPS:
        common.fail(f"muon_ns_steps {args.muon_ns_steps}: DeepSpeed's Muon does {NEWTON_SCHULZ_STEPS}: drop it")
    if args.learning_rate == 0:
        common.fail("learning_rate 0 with optimizer muon: the schedule scales both rates, give one above 0")
    if "max_grad_norm" in given and args.max_grad_norm > 0:
        common.fail(
            f"max_grad_norm {args.max_grad_norm}: DeepSpeed would clip Muon's orthogonal updates, whose norm does not "
            "depend on the gradient: drop it"
        )
    if args.max_grad_norm > 0:
        print("optimizer muon: gradients are not clipped")


# ==================== The engine =====================================================================================


def engine_config(args, micro_batch_size, accumulation_steps):
    """DeepSpeed's configuration: the JSON file of deepspeed_config, completed by what flags decide.

    Ends the program if the file contradicts a flag, or asks for what this trainer does not do.
    """
    path = args.deepspeed_config
    config = read_config(path)
    max_grad_norm = args.max_grad_norm
    if args.optimizer == "muon":
        prepare_for_muon(path, config)
        max_grad_norm = 0.0
    batch_size = micro_batch_size * accumulation_steps * dist.get_world_size()

    def decide(key, flag, value):
        if config.get(key, "auto") not in ("auto", value):
            common.fail(f"{path}: {key} {config[key]} contradicts {flag} {value}; remove it from the file")
        config[key] = value

    decide("train_micro_batch_size_per_gpu", "draft_micro_batch_size", micro_batch_size)
    decide("gradient_accumulation_steps", "draft_accumulation_steps", accumulation_steps)
    decide("train_batch_size", "draft_global_batch_size", batch_size)
    decide("gradient_clipping", "max_grad_norm", max_grad_norm)
    bf16 = config.setdefault("bf16", {})
    if args.precision != "auto":
        enabled = args.precision == "bf16"
        if bf16.get("enabled", "auto") not in ("auto", enabled):
            common.fail(
                f"{path}: bf16 {bf16['enabled']} contradicts precision {args.precision}; remove it from the file"
            )
        bf16["enabled"] = enabled
    if bf16.get("enabled", "auto") == "auto":
        bf16["enabled"] = torch.cuda.is_available()
    config.setdefault("steps_per_print", sys.maxsize)
    config.setdefault("timers", {"throughput": {"enabled": False}})  # it would wait for the device in each micro-batch
    return config


def read_config(path):
    """A JSON file of DeepSpeed's configuration; ends the program if it asks for what this trainer does not do."""
    config, problem = common.read_object(path)
    if problem:
        common.fail(f"deepspeed_config {path}: {problem}")

    def section(name, where=config):
        """An object in the configuration, {} if it is not there."""
        found = where.get(name, {})
        if not isinstance(found, dict):
            common.fail(f"{path}: {name} is {json.dumps(found)}, it must be an object")
        return found

    if section("fp16").get("enabled"):
        common.fail(f"deepspeed_config {path} must be without fp16: bf16 is what trains")
    section("bf16")
    for key in {"optimizer", "scheduler"} & config.keys():
        common.fail(f"{path}: {key} is decided by the flags of train_eagle3.py; remove it from the file")
    zero = section("zero_optimization")
    stage = zero.get("stage")
    if stage not in (None, 0, 1, 2, 3):
        common.fail(f"{path}: stage of zero_optimization is {json.dumps(stage)}, it must be 0, 1, 2 or 3")
    for name in ("offload_optimizer", "offload_param"):
        part = section(name, zero)
        if part.get("device") == "nvme":
            if stage != 3:
                common.fail(f"{path}: {name} on nvme needs ZeRO stage 3, the file says {stage}")
            ranks.check_disk(f"{path}: nvme_path of {name},", part.get("nvme_path"))
    return config


def prepare_for_muon(path, config):
    """Add to DeepSpeed's configuration what its Muon needs; ends the program if it has no right Muon for the rest."""
    zero = config.get("zero_optimization", {})
    if offload_device(config) == "nvme":
        common.fail(f"{path}: optimizer muon does not train with its states on nvme: give offload_optimizer to cpu")
    if offload_device(config) == "cpu":
        config["zero_force_ds_cpu_optimizer"] = False  # Muon with DeepSpeedCPUAdam is none of its own
    # Stage 3 orthogonalizes full gradients; in bf16, stage 2 of 0.19.8 would lose those of AdamW's parameters that are
    # reduced right before one of Muon's.
    zero["reduce_scatter"] = False


def offload_device(config):
    """Where the optimizer's states are: "none" (on the rank's device), "cpu" or "nvme"."""
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {})
    return offload.get("device", "none")


def parameter_groups(draft, args):
    """The optimizer's groups. Each has a multiplier of the schedule's learning rate."""
    named = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    matrices = []
    if args.optimizer == "muon":
        matrices = [name for name, p in named.items() if p.dim() == 2 and not name.startswith(OUTER)]
    for name, parameter in draft.named_parameters():
        parameter.use_muon = name in matrices  # read by DeepSpeed
    rest = [p for p in named.values() if not p.use_muon]
    groups = [{"params": rest, "weight_decay": args.weight_decay, "lr_multiplier": 1.0}]
    return groups + muon_groups([named[name] for name in matrices], args)


def muon_groups(matrices, args):
    """Groups of the matrices [rows, columns] that Muon trains.

    DeepSpeed's Muon scales an orthogonal update by sqrt(max(1, rows / columns)). Times 0.2 sqrt(columns) that is
    0.2 sqrt(max(rows, columns)), with which the update's root mean square is about AdamW's (Moonlight, arXiv
    2502.16982): so matrices of a width share a group. The decay is muon_lr times muon_weight_decay either way.
    """
    by_width = defaultdict(list)
    for matrix in matrices:
        width = matrix.shape[1] if args.muon_adjust_lr_fn == "match_rms_adamw" else 0
        by_width[width].append(matrix)
    groups = []
    for width, members in by_width.items():
        factor = 0.2 * math.sqrt(width) if width else 1.0
        group = {"params": members, "use_muon": True, "momentum": args.muon_momentum}
        group["weight_decay"] = args.muon_weight_decay / factor
        group["lr_multiplier"] = factor * args.muon_lr / args.learning_rate
        groups.append(group)
    return groups


def build_engine(draft, groups, config, device):
    """The DeepSpeed engine around the draft, with AdamW over these parameter groups, and Muon where they say so."""
    import deepspeed  # here and below: it is slow, and commands that train nothing do without it

    options = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8}  # the loop sets the learning rate
    if offload_device(config) == "none":
        adamw = torch.optim.AdamW
        kind = {"fused": device.type == "cuda"}
    else:  # the states are in CPU memory: DeepSpeed's own AdamW steps them there with vector instructions
        adamw = deepspeed.ops.adam.DeepSpeedCPUAdam
        kind = {"adamw_mode": True}
    if any("use_muon" in group for group in groups):
        optimizer = build_muon(groups, options, adamw, kind, device, config["bf16"]["enabled"])
    else:
        optimizer = adamw(groups, **options, **kind)
    engine, *_ = deepspeed.initialize(model=draft.to(device), optimizer=optimizer, config=config)
    engine.optimizer.check_grad_overflow = True  # steps that are not finite are skipped, in fp32 too
    return engine


def build_muon(groups, options, adamw, kind, device, in_bf16):
    """DeepSpeed's Muon, which leaves groups without `use_muon` to AdamW of this class and these options.

    in_bf16: whether the draft is trained in bf16; then CPUs orthogonalize in bf16 too, in two thirds of the time.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # slow

    if device.type == "cpu":
        torch.compiler.set_stance("force_eager")  # compiling each shape takes seconds there, and gains nothing
    method = "standard" if in_bf16 and device.type == "cpu" else "gram"
    for group in groups:
        group.setdefault("use_muon", False)
        group.update({"lr": 0.0, "ns_method": method} if group["use_muon"] else options)
    return MuonWithAuxAdam(groups, adam_optimizer=adamw, adam_optimizer_kwargs=options | kind)


def gradient_norm(engine):
    """Global norm of the gradient; None where DeepSpeed does not know it: under ZeRO stage 0, and with Muon."""
    if any(group.get("use_muon") for group in engine.optimizer.param_groups):
        return None  # it would be that of the orthogonal updates
    return engine.get_global_grad_norm()


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


# ==================== The average of the weights =====================================================================


def update_average(average, engine, decay, step):
    """Add the weights after optimizer step `step` to their average {name: fp32 tensor}, on every rank.

    It is the mean over steps 1 to `step` in which step s weighs decay^(step - s): there is no weight of the start.
    """
    share = (1 - decay) / (1 - decay**step)
    for name, parameter in trained(engine):
        with gathered(engine, parameter):
            weight = parameter.detach().float()
            if name not in average:
                average[name] = weight.clone()
            average[name].lerp_(weight, share)


@contextlib.contextmanager
def averaged(engine, average):
    """Within it the draft has the averaged weights, afterwards its own to the bit; nothing happens without average."""
    own = exchange(engine, average)
    try:
        yield
    finally:
        exchange(engine, own)


def exchange(engine, tensors):
    """Put tensors {name: tensor} into the draft; returns those that were there."""
    before = {}
    for name, parameter in trained(engine):
        if name not in tensors:
            continue
        with gathered(engine, parameter, modifier_rank=0):
            before[name] = parameter.detach().clone()
            parameter.data.copy_(tensors[name])
    return before


def trained(engine):
    """(name, parameter) of what the optimizer trains."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def gathered(engine, parameter, **options):
    """Within it every rank has the full tensor of a parameter, under ZeRO-3 too."""
    import deepspeed

    enabled = engine.zero_optimization_stage() == 3
    return deepspeed.zero.GatheredParameters(parameter, enabled=enabled, **options)
