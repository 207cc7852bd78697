"""What the objective has to compute: its matrix products, the time that they need at measured rates, and memory.

A multiply-add counts as 2 operations; forward once, backward twice (fc once: its input needs no gradient). fc and the
keys and values of step 0 count once per slot that a live slot sees; queries, attention over visible keys, output, MLP
and head once per live slot; the target's head once per token whose teacher is read. The halves of the query, key and
value weights that read the embedding count once per token, because their product is the same in each step of the
training-time test; the "naive" count has both halves in every step.
"""

import statistics
from typing import NamedTuple

import torch

PRODUCT_ROWS = 2048  # rows of a timed matrix product at most: enough for the full rate, and its output fits memory
SCORES = 1 << 25  # attention scores of a timed product at most
PASSES = ("forward", "weight gradient", "input gradient")


class Product(NamedTuple):
    """One kind of matrix product of the training step, summed over the steps of the training-time test."""

    name: str
    operations: int  # of its forward pass
    backward: int  # products of the same size in the backward pass: 2, 1 (no input gradient) or 0
    shape: tuple  # (batch, rows, in, out) of the product whose measured rate applies

    @property
    def passes(self):
        return PASSES[: 1 + self.backward]


class Counts(NamedTuple):
    """How many slots and tokens each product of a batch has."""

    live: int  # queries, over all steps
    seen: int  # slots whose step-0 key a live slot sees
    keys: int  # keys, over all steps
    read: int  # tokens whose embedding a query reads: those whose teacher is read
    keyed: int  # tokens whose embedding a key or a query reads
    pairs: int  # (query, visible key)
    rows: int  # live slots of a typical step


def count_slots(supervised, lengths):
    """Counts of documents of these lengths; supervised bool [K, T]."""
    counts = supervised.sum(dim=1).tolist()
    positions = torch.cat([torch.arange(length) for length in lengths])
    parts = []
    for part in supervised[0].split(lengths):
        later = part.flip(0).cumsum(0).flip(0)  # live slots from each slot on
        parts.append(later > 0)
    seen = torch.cat(parts)
    read = torch.zeros_like(seen)
    pairs = 0
    for i, live_slots in enumerate(supervised):
        read[1 + i :] |= live_slots[: len(live_slots) - 1 - i]
        pairs += int((positions[live_slots] + 1 + i).sum())
    keyed = read.clone()
    keyed[1:] |= seen[:-1]
    typical = int(statistics.median(counts))
    return Counts(
        live=sum(counts),
        seen=int(seen.sum()),
        keys=int(seen.sum()) + sum(counts[1:]),
        read=int(read.sum()),
        keyed=int(keyed.sum()),
        pairs=pairs,
        rows=max(min(typical, PRODUCT_ROWS), 1),
    )


def count_products(config, supervised, lengths, naive=False):
    """The products that live slots need, as a list of Product; supervised bool [K, T] over documents of these lengths.

    naive: the embedding halves of query, key and value weights once per step instead of once per token.
    """
    counts = count_slots(supervised, lengths)
    size = config["hidden_size"]
    inner = config["intermediate_size"]
    target_size = config.get("target_hidden_size") or size
    dim = config["head_dim"]
    heads = config["num_attention_heads"]
    query = heads * dim
    key = config["num_key_value_heads"] * dim
    auxiliary = config.get("num_aux_hidden_states", 3) * target_size
    width = 2 * size if naive else size
    products = []

    def add(name, count, fan_in, fan_out, backward=2, shape=None):
        shape = shape or (1, counts.rows, fan_in, fan_out)
        products.append(Product(name, 2 * count * fan_in * fan_out, backward, shape))

    query_shape = (1, counts.rows, size, query)
    key_shape = (1, counts.rows, size, key)
    add("fc", counts.seen, auxiliary, size, backward=1)
    add("q", counts.live, width, query, shape=query_shape)
    add("k, v", 2 * counts.keys, width, key, shape=key_shape)
    if not naive:
        add("q of embeddings", counts.read, size, query, shape=query_shape)
        add("k, v of embeddings", 2 * counts.keyed, size, key, shape=key_shape)
    # Scores and values, forward and backward, are six products of one size, whichever of the two is transposed.
    span = max(counts.pairs // max(counts.live, 1), 1)
    queries = max(min(counts.rows, SCORES // (heads * span)), 1)
    shape = (heads, queries, dim, span)
    add("attention", 2 * counts.pairs, dim, heads, shape=shape)
    add("o", counts.live, query, size)
    add("gate, up", 2 * counts.live, size, inner)
    add("down", counts.live, inner, size)
    add("head", counts.live, size, config["draft_vocab_size"])
    add("teacher", counts.read, target_size, config["vocab_size"], backward=0)
    return products


def total_operations(products):
    return sum(product.operations * (1 + product.backward) for product in products)


def floor_seconds(products, rates):
    """Seconds that the products take at measured rates {(shape, pass): operations per second}."""
    total = 0.0
    for product in products:
        for name in product.passes:
            total += product.operations / rates[product.shape, name]
    return total


def dense_memory(config, tokens, steps, dtype):
    """Bytes that the dense form needs in addition to its inputs, estimated from what autograd keeps.

    A step keeps the attention weights [A, T, T] (in half precision the fp32 softmax and its rounded copy), the draft's
    log-probabilities and the shifted teacher [T, Vd] in fp32, and activations; the peak adds three more tensors of
    scores or logits, and the head's gradient twice. Before the first step the teacher holds the full logits twice.
    Measured at 512 to 2,048 tokens on a CPU, it was between 13 % too low and 8 % too high.
    """
    scores = config["num_attention_heads"] * tokens**2
    columns = tokens * config["draft_vocab_size"]
    vocabulary = tokens * config["vocab_size"]
    size = config["hidden_size"]
    kept = scores * (4 if dtype == torch.float32 else 6) + 8 * columns
    kept += tokens * (18 * size + 4 * config["intermediate_size"]) * dtype.itemsize
    last = 4 * columns + 12 * max(scores, columns)
    last += 2 * size * config["draft_vocab_size"] * dtype.itemsize
    return max(steps * kept + last, 8 * vocabulary + 8 * columns)
