"""Trees of drafts: growing one as EAGLE-2 does, verifying it in one forward of the target, keeping the accepted path.

A dynamic tree (arXiv 2406.16858, section 4): a node's score is the product of the draft's probabilities along its path.
Of each level the `topk` best nodes are expanded into `topk` children each, `depth` levels deep; then the `size` best of
all nodes are verified together. A node never scores higher than its parent, so these form a tree.

EAGLE's own code counts one level fewer (its depth 7 makes 8 levels) and, as SGLang, the root among the drafts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import cache_utils

from core import block_files, common, decoding

KINDS = {"full_attention", "sliding_attention", "dummy"}  # layers whose cache can keep one path (dummy: has none)


class Shape(NamedTuple):
    """How a tree is grown."""

    topk: int
    depth: int  # levels of drafts
    size: int  # drafts that are verified


@dataclass
class Tree:
    """A root, the text's last token, and n drafts below it. Parents come before their children."""

    tokens: list  # target ids [n + 1]
    parents: list  # nodes [n + 1]; -1 for the root, node 0

    def paths(self):
        """bool [n + 1, n + 1]: which nodes lie on the path from the root to each node, itself included."""
        on_path = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            on_path[node] |= on_path[parent]
        return on_path


# ==================== Flags, and what a tree needs ===================================================================


def add_flags(add):
    """The flags of chains and trees; add: the add_argument of their group."""
    positive = common.at_least(int, 1)
    add("--tree", choices=("none", "dynamic"), default="none", help="none: a chain; dynamic: EAGLE-2's tree")
    add("--num_draft_tokens", type=positive, help="drafts a pass, no tree's root; none: 7, a block's all, a tree's 60")
    add("--topk", type=positive, help="of a tree: nodes expanded per level, and children of each; none: 10")
    add("--depth", type=positive, help="of a tree: levels of drafts; none: 7")


def fill_flags(args):
    """Fill in a tree's defaults; ends the program if a flag is given that --tree does not read."""
    is_tree = args.tree == "dynamic"
    for name in ("topk", "depth"):
        if getattr(args, name) and not is_tree:
            common.fail(f"{name} is of a tree, and a chain has num_draft_tokens alone: drop it, or give --tree dynamic")
    if is_tree:
        args.num_draft_tokens = args.num_draft_tokens or 60
        args.topk = args.topk or 10
        args.depth = args.depth or 7


def count_drafts(args, config):
    """Drafts a pass, as the flags ask for them, of a draft with this config; ends the program if it cannot make them.

    What a block draft was trained for is the most that it makes, and what it makes by default.
    """
    if not block_files.is_block(config):
        return args.num_draft_tokens or 7
    if args.tree != "none":
        common.fail(f"tree {args.tree}: a block draft makes one chain a pass: drop --tree")
    most = block_files.drafted_tokens(config)
    count = args.num_draft_tokens or most
    if count > most:
        common.fail(f"num_draft_tokens {count}: a block of {config['block_size']} drafts {most}: give at most {most}")
    return count


def shape_of(args):
    """The Shape that the flags ask for; None for a chain."""
    if args.tree == "none":
        return None
    return Shape(args.topk, args.depth, args.num_draft_tokens)


def nodes_of(topk, depth, draft_vocab_size):
    """The nodes that a tree is chosen from."""
    expanded = 1
    count = 0
    for _ in range(depth):
        children = expanded * min(topk, draft_vocab_size)
        count += children
        expanded = min(topk, children)
    return count


def check(shape, text_config, draft_vocab_size):
    """End the program if a tree has fewer nodes than asked for, or if the target's cache cannot keep one path of it."""
    nodes = nodes_of(shape.topk, shape.depth, draft_vocab_size)
    if shape.size > nodes:
        common.fail(
            f"num_draft_tokens {shape.size}: a tree of topk {shape.topk} and depth {shape.depth} has {nodes} nodes; "
            f"give at most {nodes}, or a larger topk or depth"
        )
    others = set(cache_utils.get_layer_types_and_kwargs(text_config)[0]) - KINDS
    if others:
        common.fail(
            f"tree dynamic: the target has {', '.join(sorted(others))} layers, whose cache cannot keep one path of a "
            "tree: drop --tree, chains work"
        )


def check_masks(target):
    """End the program if a loaded target does not follow the mask and the positions of a tree."""
    tree = Tree([1, 2, 3, 4, 5], [-1, 0, 0, 1, 2])
    text = list(range(6, 14))
    apart = []
    try:
        cached = decoding.CachedTarget(target)
        cached.feed(text, last=1)
        _, logits = feed(cached, tree)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:  # of the family's own code
        problem = str(error).strip().partition("\n")[0]
        common.fail(f"tree dynamic: model_type {target.config.model_type} takes no mask of a tree: {problem}")
    for node, path in enumerate(tree.paths()):
        tokens = [tree.tokens[other] for other in path.nonzero()]
        cached = decoding.CachedTarget(target)
        _, alone = cached.feed(text + tokens, last=1)
        gap = (logits[node] - alone[0]).norm() / alone.norm()
        apart.append(gap)
    # The median, because rounding may send single tokens to other experts.
    tolerance = 1e-4 if target.embedding.dtype == torch.float32 else 5e-2
    if not torch.stack(apart).median() < tolerance:
        common.fail(
            f"tree dynamic: model_type {target.config.model_type} does not follow the mask of a tree: drop --tree, "
            "chains work"
        )


def sglang_flags(args):
    """{SGLang's flag: value} that serves what these flags measure; its num_draft_tokens counts the root, too.

    For a chain it sets num_draft_tokens to num_steps + 1 itself.
    """
    return {
        "--speculative-num-steps": args.depth or args.num_draft_tokens,
        "--speculative-eagle-topk": args.topk or 1,
        "--speculative-num-draft-tokens": args.num_draft_tokens + 1,
    }


# ==================== Growing a tree =================================================================================


class Nodes:
    """All nodes of a growing tree, level by level; number 0 is the root."""

    def __init__(self, device):
        root = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids = root  # [nodes] indices into the draft vocabulary
        self.parents = root - 1  # [nodes]
        self.scores = root.float()  # [nodes] log of the product of the probabilities along the path

    def add_children(self, parents, logits, topk):
        """The `topk` likeliest children of the nodes `parents` [m], whose drafts have logits [m, Vd].

        Returns the numbers of the best `topk` of all these children.
        """
        log_q = logits.float().log_softmax(dim=-1)
        width = min(topk, log_q.shape[1])
        steps, ids = log_q.topk(width, dim=-1)  # [m, width]
        scores = self.scores[parents, None] + steps
        scores = scores.flatten()
        first = len(self.ids)
        self.ids = torch.cat([self.ids, ids.flatten()])
        self.parents = torch.cat([self.parents, parents.repeat_interleave(width)])
        self.scores = torch.cat([self.scores, scores])
        best = scores.topk(min(topk, len(scores)))
        return first + best.indices

    def best(self, size, root, target_ids):
        """The Tree of the `size` best nodes; root: its token. Of equal scores the parent's counts as the better one."""
        order = self.scores.sort(descending=True, stable=True).indices
        order = order[: size + 1].sort().values
        tokens = target_ids[self.ids[order]].tolist()
        tokens[0] = root
        place = {-1: -1}
        for new, old in enumerate(order.tolist()):
            place[old] = new
        parents = [place[parent] for parent in self.parents[order].tolist()]
        return Tree(tokens, parents)


@torch.inference_mode()
def grow(cached, tokens, auxiliary, shape):
    """The Tree of drafts after the last of `tokens`, which is its root.

    cached: a decoding.CachedDraft; tokens and auxiliary [n, 3·Ht] as in its `propose`. Their slots stay in its cache,
    those of the tree are dropped. As in a chain, a slot sees all slots of the text, and of the tree its own path.
    """
    feature, logits = cached.read(tokens, auxiliary)
    kept = cached.length
    text = list(cached.cache)
    device = feature.device
    nodes = Nodes(device)
    expanded = torch.zeros(1, dtype=torch.int64, device=device)  # the root, whose slot is the text's last
    feature = feature[-1:]
    logits = logits[-1:]
    seen = torch.ones(1, kept, dtype=torch.bool, device=device)  # by each expanded node, of the slots so far
    positions = torch.arange(kept, device=device)  # of these slots
    for level in range(shape.depth):
        best = nodes.add_children(expanded, logits, shape.topk)
        if level + 1 == shape.depth:
            break
        parents = nodes.parents[best]
        rows = (parents[:, None] == expanded).long().argmax(dim=1)  # of the parents among `expanded`
        expanded = best
        own = torch.eye(len(best), dtype=torch.bool, device=device)
        seen = torch.cat([seen[rows], own], dim=1)
        place = torch.full((len(best),), kept + level, device=device)
        positions = torch.cat([positions, place])
        tokens_of = cached.target_ids[nodes.ids[best]]
        attend = attention_to(cached, seen, positions)
        feature, logits = cached.draft.step(tokens_of, feature[rows], place, attend)
    cached.cache = text
    return nodes.best(shape.size, tokens[-1], cached.target_ids)


def attention_to(cached, seen, positions):
    """attend(layer, q, k, v) of new slots: they see those of the slots so far that `seen` [new, slots] says.

    positions [slots]: where the windows of the draft's layers end.
    """

    def attend(layer, q, k, v):
        before_k, before_v = cached.cache[layer]
        k = torch.cat([before_k, k])
        v = torch.cat([before_v, v])
        cached.cache[layer] = (k, v)
        mask = seen
        if window := cached.windows[layer]:
            mask = mask & (positions > positions[-1] - window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return mixed[0].transpose(0, 1)

    return attend


# ==================== The target's pass over a tree ==================================================================


@torch.no_grad()
def feed(cached, tree):
    """A decoding.CachedTarget reads a tree -> auxiliary hidden states [n + 1, 3·Ht], logits [n + 1, V] of what follows.

    A node sees the cached tokens and its own path, at the position that its depth gives.
    """
    on_path = tree.paths()
    positions = cached.length + on_path.sum(dim=1) - 1  # [n + 1]
    mask = masks(cached, on_path, positions)
    return cached.feed(tree.tokens, positions=positions, mask=mask)


def masks(cached, on_path, positions):
    """Additive attention masks [1, 1, n + 1, cached + n + 1], {kind of layer: mask}, or one where all are of one kind.

    on_path bool [n + 1, n + 1], positions [n + 1]: of the nodes.
    """
    embedding = cached.target.embedding
    count = len(on_path)
    found = {}
    kinds, _ = cache_utils.get_layer_types_and_kwargs(cached.target.config)
    for kind, layer in zip(kinds, cached.cache.layers, strict=True):
        if kind in found or kind == "dummy":
            continue
        length, first = layer.get_mask_sizes(count)
        text = torch.arange(first, first + length - count)
        places = torch.cat([text, positions])
        of_text = torch.ones(count, len(text), dtype=torch.bool)
        seen = torch.cat([of_text, on_path], dim=1)
        if layer.is_sliding:
            seen &= places > positions[:, None] - layer.sliding_window
        mask = torch.zeros(1, 1, *seen.shape, dtype=embedding.dtype)
        mask[:, :, ~seen] = torch.finfo(embedding.dtype).min
        found[kind] = mask.to(embedding.device)
    if len(found) > 1:
        return found
    return found.popitem()[1]


@torch.no_grad()
def keep(cached, tree, path):
    """Of the tree that was fed last the cache keeps the root and the nodes `path`, in this order."""
    count = len(tree.tokens)
    device = cached.target.embedding.device
    kept = torch.tensor([0, *path], device=device)
    for layer in cached.cache.layers:
        if layer.keys is not None:
            for states in (layer.keys, layer.values):  # [1, G, slots, D]
                nodes = states[:, :, states.shape[2] - count :]
                nodes[:, :, : len(kept)] = nodes[:, :, kept]
    cached.forget(count - len(kept))


def verify(tree, logits, choose):
    """The accepted nodes, a path from the root, and the target's own token after them. logits [n + 1, V].

    choose(logits [V]) is the target's own choice. A draft is accepted if the target chooses its token. At a temperature
    above 0 this keeps the target's distribution: each token is a sample of it. It is what EAGLE-2's code does, whose
    drafts are the likeliest ones and not samples: a draft x is tried with q(x) = 1, accepted with probability p(x), and
    else p(x) is set to 0 and p normalised before the next sibling. Then x is accepted with its own p, and no sibling
    with what is left of p. (Its q in place of 1, as for sampled drafts in arXiv 2305.09781, would change the texts.)
    """
    children = {}
    for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True)):
        children[parent, token] = node
    path = []
    node = 0
    while True:
        own = choose(logits[node])
        node = children.get((node, own))
        if node is None:
            return path, own
        path.append(node)


def speculate(target, draft, d2t, prompt, shape, max_new_tokens, eos_ids, choose=decoding.greedy):
    """decoding.speculate with trees: the new token ids and the number of drafts accepted in each pass.

    choose(logits [V]) -> a token: the target's own choice.
    """

    def run_pass(cached_target, cached_draft, tokens, auxiliary):
        tree = grow(cached_draft, tokens, auxiliary, shape)
        auxiliary, logits = feed(cached_target, tree)
        path, own = verify(tree, logits, choose)
        keep(cached_target, tree, path)
        return [tree.tokens[node] for node in path], own, auxiliary[[0, *path]]

    return decoding.reply_in_passes(target, draft, d2t, prompt, max_new_tokens, eos_ids, choose, run_pass)
