"""Counts in each rank what a shared target holds: count_memory.py FOLDER [[target, how it is shared, ...], ...]

Writes FOLDER/counted.json: by rank and case the bytes held, those of layers that are still gathered after a forward,
the most that were gathered in one, and under zero3 how many values differ from those of a target that nobody shares.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import target as benchmark  # noqa: E402  (neither the root nor benchmarks/ is on the path of a script that lies here)

from core import ranks, target_model  # noqa: E402


def count(folder, cases):
    """In a rank: what is held after two forwards in each case: bytes of tensors, and of layers that are still whole."""
    device = ranks.start_distributed(2)
    found = []
    for name, way, _ in cases:
        before = sum(benchmark.live_bytes())
        target = target_model.load(Path(folder) / name, device, **way)
        for _ in range(2):
            target.hidden_states(torch.arange(48), [32, 16])
        still = [p for p in target.decoder.parameters() if hasattr(p, "ds_id") and p.ds_status.name != "NOT_AVAILABLE"]
        held, most = sum(benchmark.live_bytes()) - before, []
        for layer in target.decoder.layers:  # what is gathered while it runs
            layer.register_forward_hook(lambda *_, seen=most, all=target: seen.append(gathered(all)))
        target.hidden_states(torch.arange(48), [32, 16])
        found.append([held, sum(p.numel() * p.itemsize for p in still), max(most)])
        del target, still, most, layer
        benchmark.gc.collect()
        if way.get("sharding") == "zero3":
            found[-1].append(differing(folder, f"{name}_bf16", device, way))
    every = [None] * benchmark.dist.get_world_size()
    benchmark.dist.all_gather_object(every, found)
    if benchmark.dist.get_rank() == 0:
        (Path(folder) / "counted.json").write_text(json.dumps(every))
    benchmark.dist.destroy_process_group()


def differing(folder, name, device, way):
    """In a rank: values of a text's states that differ between a shared target and one that is its own, of how many."""
    ids = torch.arange(48) * 10 % 512
    several = [target_model.load(Path(folder) / name, device, **given) for given in (way, {})]
    shared, own = (torch.cat(target.hidden_states(ids, [32, 16]), dim=-1) for target in several)
    assert {shared.dtype, own.dtype, several[0].head.weight.dtype} == {torch.bfloat16} and own.std() > 0.1
    return int((shared != own).sum()), shared.numel()


def gathered(target):
    """Bytes of the layers that are whole now although ranks share them out."""
    several = (p for p in target.decoder.layers.parameters() if hasattr(p, "ds_id"))
    return sum(p.numel() * p.itemsize for p in several if p.ds_status.name != "NOT_AVAILABLE")


if __name__ == "__main__":
    count(sys.argv[1], json.loads(sys.argv[2]))
