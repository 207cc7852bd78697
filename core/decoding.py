"""Speculative decoding of one conversation: the target and the draft with their caches, chains and blocks of drafts.

In:  a target_model.Target, a DraftModel with its mapping d2t, the prompt's token ids.
Out: the reply's token ids and the number of drafts that each pass of the target accepts.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from core import draft_files, vocabulary

# ==================== Target and draft with their caches =============================================================


class Snapshot(NamedTuple):
    """A target's cache before a feed, and the tokens of that feed."""

    cache: DynamicCache
    length: int
    tokens: list


class CachedTarget:
    """The target with its cache: feeds tokens, forgets rejected ones."""

    def __init__(self, target):
        self.target = target
        self.length = 0
        self.cache = DynamicCache(config=target.config)
        self.snapshot = None
        # The single state of linear attention cannot drop tokens: it is copied before each feed.
        self.copies = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.cache.layers)
        if not self.copies:  # sliding windows forget what a rejection must restore
            self.cache.activate_past_recording()

    @torch.no_grad()  # not inference mode: targets that ranks share fail in it
    def feed(self, tokens, last=0, positions=None, mask=None):
        """tokens (list of n ids) -> auxiliary hidden states [n, 3·Ht], fp32 logits of what follows each [n, V].

        last: logits of the last tokens only, because those of a long prompt would fill the memory (0 = all).
        positions [n], mask: of the nodes of a tree (core/draft_trees.py); none: the tokens follow one another.
        """
        device = self.target.embedding.device
        ids = torch.tensor([tokens], device=device)
        if positions is None:
            positions = torch.arange(self.length, self.length + len(tokens))
        if self.copies:
            self.snapshot = Snapshot(copy.deepcopy(self.cache), self.length, tokens)
        output = self.target.decoder(
            input_ids=ids,
            position_ids=positions[None].to(device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.length += len(tokens)
        hidden = output.last_hidden_state[0, -last:]
        return self.target.auxiliary(), self.target.head.logits(hidden)

    def forget(self, count):
        """Drop the last `count` tokens, all of them from the last feed."""
        if not count:
            return
        if self.copies:
            before = self.snapshot
            self.cache = before.cache
            self.length = before.length
            self.feed(before.tokens[:-count], last=1)
        else:
            self.cache.crop(-count)
            self.length -= count


class CachedDraft:
    """The draft with its cache. Slot j reads token x[j+1] and the target's hidden states at j (in a chain, its own)."""

    def __init__(self, draft, d2t):
        self.draft = draft
        self.target_ids = vocabulary.target_ids(d2t)
        self.windows = draft_files.windows(draft.config)
        self.cache = [None] * len(self.windows)  # of each layer: keys and values [slots, G, D]
        self.length = 0  # slots

    def _attend(self, layer, q, k, v):
        """Attention of n new slots, appended to the cache: each sees the cached slots and the new ones up to itself."""
        if self.cache[layer]:
            before_k, before_v = self.cache[layer]
            k = torch.cat([before_k, k])
            v = torch.cat([before_v, v])
        self.cache[layer] = (k, v)
        new = len(q)
        slots = len(k)
        mask = torch.ones(new, slots, dtype=torch.bool, device=q.device)
        mask = mask.tril(slots - new)
        if self.windows[layer]:
            mask = mask.triu(slots - new - self.windows[layer] + 1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return attended[0].transpose(0, 1)

    def _step(self, tokens, feature, first):
        device = feature.device
        ids = torch.tensor(tokens, device=device)
        positions = torch.arange(first, first + len(tokens), device=device)
        return self.draft.step(ids, feature, positions, self._attend)

    def read(self, tokens, auxiliary):
        """Add the slots of the text's next n tokens to the cache; returns features [n, H] and logits [n, Vd].

        tokens: the ids that entered the text since the last call. auxiliary [n, 3·Ht]: the target's hidden states one
        position before each.
        """
        feature = self.draft.features(auxiliary.to(self.draft.fc.weight.dtype))
        first = self.length
        self.length += len(tokens)
        return self._step(tokens, feature, first)

    @torch.inference_mode()
    def propose(self, tokens, auxiliary, count, choose):
        """A chain of `count` drafted tokens after the last of `tokens`.

        tokens, auxiliary: as `read` takes them. Their slots stay in the cache, those of the chain are dropped.
        choose(logits [Vd]) -> index into the draft vocabulary. Returns target ids [count] and logits [count, Vd].
        """
        feature, logits = self.read(tokens, auxiliary)
        kept = self.length
        drafted = []
        rows = []
        for position in range(count):
            rows.append(logits[-1].float())
            chosen = choose(rows[-1])
            drafted.append(int(self.target_ids[chosen]))
            if position + 1 < count:
                feature, logits = self._step(drafted[-1:], feature[-1:], kept + position)
        self.cache = [(k[:kept], v[:kept]) for k, v in self.cache]
        return drafted, torch.stack(rows)


class CachedBlockDraft:
    """A block draft with its cache: of each layer the keys and values of the context.

    The context is the text but for its last token, the anchor, whose hidden states the target has not computed yet.
    """

    def __init__(self, draft, d2t):
        self.draft = draft
        self.target_ids = vocabulary.target_ids(d2t)
        self.cache = [None] * len(draft.layers)  # keys and values [tokens, G, D]
        self.length = 0  # tokens

    def read(self, auxiliary):
        """Add the next n tokens to the context, by the target's auxiliary hidden states [n, A·H] at them."""
        context = self.draft.features(auxiliary.to(self.draft.fc.weight.dtype))
        positions = torch.arange(self.length, self.length + len(context), device=context.device)
        turned = self.draft.rotary(positions, context.dtype)
        for n, layer in enumerate(self.draft.layers):
            k, v = layer.read(context, *turned)
            if self.cache[n]:
                before_k, before_v = self.cache[n]
                k = torch.cat([before_k, k])
                v = torch.cat([before_v, v])
            self.cache[n] = (k, v)
        self.length += len(context)

    def visible(self, layer, size):
        """bool [size, length + size]: which tokens of the context and of their block the slots of a block see."""
        tokens = torch.arange(self.length + size, device=self.target_ids.device)
        slots = tokens[self.length :, None]
        window = self.draft.windows[layer]
        first = slots - window if window else -1
        seen = tokens > first
        seen = seen.expand(size, -1)
        if self.draft.causal[layer]:
            seen = seen & (tokens <= slots)
        return seen

    def run(self, anchor, size):
        """Normed states [P, H] of the predictions of a block: the anchor, a token id, and masks, `size` in all."""
        device = self.target_ids.device
        anchors = torch.tensor([anchor], device=device)
        hidden = self.draft.embed(anchors, size)[0]
        positions = torch.arange(self.length, self.length + size, device=device)
        turned = self.draft.rotary(positions, hidden.dtype)
        for n, layer in enumerate(self.draft.layers):

            def attend(q, k, v, n=n):
                before_k, before_v = self.cache[n]
                k = torch.cat([before_k, k])
                v = torch.cat([before_v, v])
                q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                mask = self.visible(n, size)
                attended = F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    mask,
                    enable_gqa=True,
                )
                return attended[0].transpose(0, 1)

            hidden = layer(hidden, *turned, attend)
        return self.draft.outputs(hidden[None])[0]

    @torch.inference_mode()
    def propose(self, tokens, auxiliary, count, choose):
        """`count` drafts behind the last of `tokens`, the anchor, from one block; arguments as of CachedDraft.propose.

        Nothing of the block stays in the cache. Returns target ids [count] and logits [count, Vd].
        """
        self.read(auxiliary)
        drafted = []
        rows = []
        before = tokens[-1]
        size = self.draft.block_of(count)
        outputs = self.run(before, size)
        for logits in self.draft.logits(outputs):
            corrected = self.draft.corrected(logits, before)
            rows.append(corrected.float())
            chosen = choose(rows[-1])
            before = int(self.target_ids[chosen])
            drafted.append(before)
        return drafted, torch.stack(rows)


def with_cache(draft, d2t):
    """The draft with its cache, of whichever kind it is."""
    if hasattr(draft, "block_size"):
        return CachedBlockDraft(draft, d2t)
    return CachedDraft(draft, d2t)


# ==================== Speculative decoding ===========================================================================


def greedy(logits):
    return int(logits.argmax())


def verify_greedy(drafted, _, target_logits):
    """The number of leading drafts that are the target's argmax, and the target's token after them."""
    own = target_logits.argmax(dim=-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == own[accepted]:
        accepted += 1
    return accepted, own[accepted]


def sampled(temperature, generator=None):
    """choose(logits [V]) -> a sample at this temperature."""

    def choose(logits):
        probabilities = (logits / temperature).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return choose


def sampling(temperature, generator, draft_ids, vocab_size):
    """(choose, verify) of lossless speculative sampling. draft_ids [Vd]: target ids of the draft vocabulary.

    A draft x is kept with probability min(1, p(x) / q(x)); the first rejected one is replaced by a sample of
    max(p - q, 0), normalised. Every token is then distributed as the target's own (arXiv 2211.17192, theorem 1).
    """

    choose = sampled(temperature, generator)

    def draw(probabilities):
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def verify(drafted, draft_logits, target_logits):
        p = (target_logits / temperature).softmax(dim=-1)  # [n + 1, V]
        if not drafted:
            return 0, draw(p[-1])
        own = (draft_logits / temperature).softmax(dim=-1)
        q = torch.zeros(len(drafted), vocab_size, device=p.device)
        q[:, draft_ids] = own
        for i, token in enumerate(drafted):
            chance = torch.rand((), generator=generator, device=p.device)
            if chance * q[i, token] < p[i, token]:
                continue
            rest = (p[i] - q[i]).clamp(min=0)
            if not rest.sum() > 0:
                rest = p[i]
            return i, draw(rest)
        return len(drafted), draw(p[-1])

    return choose, verify


def speculate(
    target,
    draft,
    d2t,
    prompt,
    count,
    max_new_tokens,
    eos_ids,
    choose=greedy,
    verify=verify_greedy,
):
    """Generate with chains of `count` drafts. Returns the new token ids and the number of drafts accepted in each pass.

    choose(logits [Vd]) picks a draft; verify(drafted, their logits [n, Vd], the target's logits [n + 1, V]) returns how
    many to accept and the target's token after them.
    """

    def run_pass(cached_target, cached_draft, tokens, auxiliary):
        drafted, draft_logits = cached_draft.propose(tokens, auxiliary, count, choose)
        auxiliary, logits = cached_target.feed([tokens[-1], *drafted])
        accepted, own = verify(drafted, draft_logits, logits)
        cached_target.forget(count - accepted)
        return drafted[:accepted], own, auxiliary[: accepted + 1]

    def choose_first(logits):
        _, own = verify([], None, logits[None])
        return own

    return reply_in_passes(target, draft, d2t, prompt, max_new_tokens, eos_ids, choose_first, run_pass)


def reply_in_passes(target, draft, d2t, prompt, max_new_tokens, eos_ids, choose_first, run_pass):
    """The new token ids, and the number of drafts accepted in each pass, which is one further forward of the target.

    choose_first(logits [V]): the reply's first token, the target's own. run_pass(cached target, cached draft, tokens
    that are new to the draft, auxiliary hidden states before each) returns the accepted drafts, the target's token
    after them, and the auxiliary hidden states before each of these. As in slots.acceptance_walk, drafts after the end
    of the reply (its end-of-turn token, or max_new_tokens) are not counted.
    """
    cached_target = CachedTarget(target)
    cached_draft = with_cache(draft, d2t)
    auxiliary, logits = cached_target.feed(prompt, last=1)
    first = choose_first(logits[-1])
    reply = [first]
    passes = []
    tokens = [*prompt[1:], first]  # of the draft's slots 0 .. len(prompt) - 1
    while len(reply) < max_new_tokens and reply[-1] not in eos_ids:
        accepted, own, auxiliary = run_pass(cached_target, cached_draft, tokens, auxiliary)
        tokens = [*accepted, own]
        left = max_new_tokens - len(reply)
        new = until_end(tokens[:left], eos_ids)
        reply += new
        counted = min(len(accepted), len(new))
        passes.append(counted)
    return reply, passes


def until_end(tokens, eos_ids):
    """The tokens up to the first one that ends a reply."""
    for number, token in enumerate(tokens, 1):
        if token in eos_ids:
            return tokens[:number]
    return tokens


def generate(target, prompt, max_new_tokens, eos_ids, choose=greedy):
    """The target without a draft, token by token with its cache. Returns the new token ids."""
    cached = CachedTarget(target)
    _, logits = cached.feed(prompt, last=1)
    first = choose(logits[-1])
    reply = [first]
    while len(reply) < max_new_tokens and reply[-1] not in eos_ids:
        _, logits = cached.feed(reply[-1:])
        reply.append(choose(logits[-1]))
    return reply
