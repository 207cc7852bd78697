"""A small draft whose gradients are given numbers, trained by Muon: muon.py [cases, folder] on each rank.

cases: {name: [DeepSpeed's configuration, muon_adjust_lr_fn]}. The weights of each go to folder/NAME.pt.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core import optimization, ranks

WIDTH = 12
INNER = 20
SHAPES = {  # fc, a layer, and what is beside them
    "fc.weight": (WIDTH, 3 * WIDTH), "midlayer.q_proj.weight": (16, 2 * WIDTH), "midlayer.o_proj.weight": (WIDTH, 16),
    "midlayer.up_proj.weight": (INNER, WIDTH), "midlayer.down_proj.weight": (WIDTH, INNER),
    "midlayer.norm.weight": (WIDTH,), "midlayer.frozen.weight": (4, 4), "lm_head.weight": (24, WIDTH),
    "embed_tokens.weight": (30, WIDTH),
}  # fmt: skip
FROZEN = "midlayer.frozen.weight"
RATES = {"learning_rate": 3e-3, "weight_decay": 0.1, "muon_lr": 0.02, "muon_momentum": 0.9, "muon_weight_decay": 0.2}
SCHEDULE = (1.0, 0.5, 0.25)  # shares of the peak rates, step by step
MICRO_BATCHES = 2


def numbers(name, seed):
    generator = torch.Generator().manual_seed(seed + 1000 * list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def seed_of(step, rank, micro):
    """Of the gradients of a micro-batch; 0 is that of the first weights."""
    return 1 + 100 * step + 10 * rank + micro


class Part(nn.Module):
    """One tensor of the draft. Its gradient is numbers(name, seed)."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(numbers(name, 0), requires_grad=name != FROZEN)

    def forward(self, seed):
        return (self.weight * numbers(self.name, seed).to(self.weight.dtype)).sum()


class Draft(nn.Module):
    def __init__(self):
        super().__init__()
        self.midlayer = nn.Module()
        for name in SHAPES:
            path, _, last = name.removesuffix(".weight").rpartition(".")
            self.get_submodule(path).add_module(last, Part(name))

    def forward(self, seed):
        return sum(part(seed) for part in self.modules() if isinstance(part, Part))


def train(cases, folder):
    device = ranks.start_distributed(5, -1)
    for case, (path, adjust) in cases.items():
        given = {"deepspeed_config": path, "precision": "auto", "max_grad_norm": 0.5, "muon_adjust_lr_fn": adjust}
        args = Namespace(optimizer="muon", **given, **RATES)
        config = optimization.engine_config(args, 1, MICRO_BATCHES)
        draft = Draft()
        engine = optimization.build_engine(draft, optimization.parameter_groups(draft, args), config, device)
        for step, share in enumerate(SCHEDULE):
            optimization.set_learning_rate(engine, RATES["learning_rate"] * share)
            for micro in range(MICRO_BATCHES):
                engine.set_gradient_accumulation_boundary(micro == MICRO_BATCHES - 1)
                engine.backward(engine(seed_of(step, dist.get_rank(), micro)))
                engine.step()
        tensors = {}
        for name, parameter in engine.module.named_parameters():
            master = safe_get_full_fp32_param(parameter)  # none for what is frozen, and under stage 0
            with optimization.gathered(engine, parameter):
                tensors[name] = (parameter.detach() if master is None else master).clone()
        if dist.get_rank() == 0:
            torch.save(tensors, Path(folder) / f"{case}.pt")


if __name__ == "__main__":
    train(*json.loads(sys.argv[1]))
