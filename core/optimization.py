"""optimization."""

import math

import deepspeed
import torch
import torch.distributed as dist

from core import ranks


def engine_config(args, device):
    """DeepSpeed's configuration: the file's, with what the flags decide filled in."""
    micro, accumulated = args.draft_micro_batch_size, args.draft_accumulation_steps
    return ranks.read_deepspeed_config(
        args.deepspeed_config,
        {
            "train_micro_batch_size_per_gpu": ("draft_micro_batch_size", micro),
            "gradient_accumulation_steps": ("draft_accumulation_steps", accumulated),
            "train_batch_size": ("draft_global_batch_size", micro * accumulated * dist.get_world_size()),
            "gradient_clipping": ("max_grad_norm", args.max_grad_norm),
        },
        device,
    )


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
