"""However a target is shared, a rank holds no more of it than the arithmetic allows: its tensors are counted. Under
zero3 its states are bit for bit those of a target that nobody shares."""

import gc
import json
import sys

import pytest
import torch
import transformers

from helpers import tiny

sys.path.insert(0, str(tiny.REPOSITORY / "benchmarks"))  # it is not a package

import target as benchmark

COUNT_MEMORY = tiny.REPOSITORY / "tests" / "helpers" / "count_memory.py"
KIB = 1024
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
# fp32, from the sizes above. A layer: q and o 128 x 128, k and v 64 x 128; the MLP 3 x 256 x 128, or with experts
# 4 x 3 x 64 x 128 and a router of 4 x 128. Norms (128 each) and the router are a few KiB that no rank shares out.
ENDS = 4 * 512 * 128  # embedding table, and as much for the head
LAYERS = 8 * 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
TINY_PARTS = 40 * KIB
CASES = {  # ranks: (target, how it is shared, bytes that a rank may hold)
    2: [
        ("llama", {}, LAYERS + 2 * ENDS),
        ("llama", {"sharding": "tp", "tp_size": 2}, LAYERS / 2 + 2 * ENDS + 2 * ENDS / 2),
        ("moe", {"sharding": "tp", "tp_size": 2}, LAYERS / 2 + 2 * ENDS + 2 * ENDS / 2),
        ("llama", {"sharding": "zero3"}, LAYERS / 2 + 2 * ENDS),
        ("llama", {"sharding": "zero3", "offload": "cpu"}, LAYERS / 2 + 2 * ENDS),
        ("moe", {"sharding": "zero3"}, LAYERS / 2 + 2 * ENDS),
    ],
    4: [
        # Two copies: FSDP's wrappers keep the head's share gathered once more, and nothing else.
        ("llama", {"sharding": "tp", "tp_size": 2}, LAYERS / 2 + 2 * ENDS + 3 * ENDS / 2),
        ("moe", {"sharding": "tp", "tp_size": 4}, LAYERS / 4 + 2 * ENDS + 2 * ENDS / 4),
        ("moe", {"sharding": "zero3"}, LAYERS / 4 + 2 * ENDS),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    configs = {"llama": transformers.LlamaConfig(**SIZES), "moe": transformers.Qwen3MoeConfig(**SIZES, **experts)}
    for name, config in configs.items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        model.bfloat16().save_pretrained(folder / f"{name}_bf16")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_share_and_no_more(folder, ranks):
    result = tiny.on_ranks(ranks, COUNT_MEMORY, folder, json.dumps(CASES[ranks]))
    assert result.returncode == 0, result.stderr[-4000:]
    for rank, found in enumerate(json.loads((folder / "counted.json").read_text())):
        for (name, way, allowed), (held, still, most, *states) in zip(CASES[ranks], found, strict=True):
            case = f"{name} {way}, rank {rank} of {ranks}: {held / KIB:.0f} of {allowed / KIB:.0f} KiB"
            assert allowed - TINY_PARTS < held < allowed + TINY_PARTS, case
            assert still < TINY_PARTS, f"{case}; after a forward {still / KIB:.0f} KiB are still gathered"
            assert states == ([[0, 48 * 4 * 128]] if way.get("sharding") == "zero3" else []), case
            assert most < 2 * LAYERS / 8 + TINY_PARTS, f"{case}; in a forward {most / KIB:.0f} KiB are gathered"


@pytest.mark.parametrize(
    ("way", "rest", "forward", "moved"),
    [
        ({}, LAYERS + 2 * ENDS, 0, 0),
        ({"sharding": "tp", "tp_size": 4}, LAYERS / 4 + 2.5 * ENDS, 0, 17 * 100 * 128 * 4 * 2 * 3 / 4),
        ({"sharding": "zero3"}, LAYERS / 4 + 2 * ENDS, 3 * LAYERS / 8, LAYERS * 3 / 4),
        # In memory: five buffers for a quarter of the table, the largest tensor; shares below 1 MiB, here all.
        ({"sharding": "zero3", "offload": "nvme"}, LAYERS / 4 + (2 + 5 / 4) * ENDS, 3 * LAYERS / 8, LAYERS),
    ],
)
def test_computed_bytes_are_those_of_the_sizes(folder, way, rest, forward, moved):
    found = benchmark.computed_bytes(folder / "llama", 4, 100, **way)
    assert found == pytest.approx((rest, rest + forward, moved), rel=1e-2, abs=1)


def test_a_place_in_memory_counts_once(monkeypatch):
    # Compiled code of other tests leaves tensors without a place behind.
    objects = gc.get_objects
    old = objects()  # kept, or something new could get the identity of one
    known = {id(x) for x in old}
    monkeypatch.setattr(gc, "get_objects", lambda: [x for x in objects() if id(x) not in known])
    before = sum(benchmark.live_bytes())
    x = torch.zeros(1000)
    views = [x[:600], x[400:], x.view(10, 100)[:, :50]]
    assert sum(benchmark.live_bytes()) - before == 4000
    del x, views
    freed = torch.zeros(1000)
    freed.untyped_storage().resize_(0)
    assert sum(benchmark.live_bytes()) == before
