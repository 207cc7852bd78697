"""The target's attention over concatenated sequences against a plain statement, and what it allocates."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core import target_attention, target_model
from helpers import tiny

HEADS, KEY_HEADS, D = 4, 2, 8


def plainly(q, k, v, scale, window, softcap, sinks):
    """Head by head and query by query, in float64: [1, A, S, Dv]."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for head, at in itertools.product(range(q.shape[1]), range(q.shape[2])):
        group = head // (q.shape[1] // k.shape[1])
        first = max(at - window + 1, 0) if window else 0
        scores = (k[0, group, first : at + 1].double() @ q[0, head, at].double()) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (math.exp(sinks[head]) if sinks is not None else 0)
        out[0, head, at] = weights / total @ v[0, group, first : at + 1].double()
    return out


@pytest.mark.parametrize("width", [D, 5])  # of values; MLA's are narrower than its keys
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 23, 50])
def test_attention_equals_the_plain_statement(window, softcap, sinks, width, monkeypatch):
    monkeypatch.setattr(target_attention, "SCORES", 4 * 7 * 16)  # several chunks of queries
    lengths = [1, 23, 40]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, sum(lengths), D, generator=generator)
    k = torch.randn(1, KEY_HEADS, sum(lengths), D, generator=generator)
    v = torch.randn(1, KEY_HEADS, sum(lengths), width, generator=generator)
    sinks = torch.randn(HEADS, generator=generator) if sinks else None
    token = target_attention.LENGTHS.set(lengths)
    options = {"scaling": 0.7, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
    found, weights = target_attention.attend(None, q, k, v, None, **options)
    target_attention.LENGTHS.reset(token)
    assert weights is None and found.shape == (1, sum(lengths), HEADS, width)
    parts = [x.split(lengths, dim=2) for x in (q, k, v)]
    expected = [plainly(*part, 0.7, window, softcap, sinks) for part in zip(*parts, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected, dim=2).transpose(1, 2).float(), atol=2e-6, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.count = max(self.count, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


def test_a_forward_makes_nothing_of_tokens_by_tokens(tmp_path):
    target = target_model.load(tiny.write_target(tmp_path))
    lengths = [700, 900]
    ids = torch.arange(sum(lengths)) % 400
    for packs, expected in ((True, False), (False, True)):
        target.packs = packs
        with Largest() as largest:
            if packs:
                target.hidden_states(ids, lengths)
            else:  # the measurement can fail: transformers' own attention makes a mask for concatenated sequences
                positions = torch.cat([torch.arange(n) for n in lengths])[None]
                target.decoder(input_ids=ids[None], position_ids=positions, use_cache=False)
        assert (largest.count >= sum(lengths) ** 2) == expected


def test_the_family_has_its_own_attention_otherwise(tmp_path):
    target = target_model.load(tiny.write_target(tmp_path))
    before = target.decoder.config._attn_implementation
    with pytest.raises(RuntimeError), target_attention.each_alone(target.decoder, [3]):
        assert target.decoder.config._attn_implementation == target_attention.NAME
        raise RuntimeError
    assert target.decoder.config._attn_implementation == before != target_attention.NAME
