"""Trees of drafts: texts are the target's own, trees and passes those of a plain statement, samples the target's."""

from random import Random
from types import SimpleNamespace

import pytest
import torch
import transformers

from core import decoding, draft_trees, target_model, vocabulary
from helpers import drafts, tiny

torch.set_num_threads(1)  # the models are so small that threads only wait for each other
VOCABULARY = 24  # so few that random drafts are right now and then
SMALL = 8  # of which three tokens have few enough combinations for a chi-square test
SHAPE = draft_trees.Shape(topk=8, depth=3, size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = tiny.llama_config(vocab_size=VOCABULARY, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target(folder):
    return target_model.load(folder)


def prompts_of(lengths):
    return [ids.tolist() for ids in drafts.random_prompts(lengths, VOCABULARY)]


# ---------------------------------------------------------------------------- a plain statement
@torch.no_grad()
def plain_tree(draft, d2t, ids, auxiliary, shape):
    """{path of tokens below ids: score} of a dynamic tree, each path drafted anew as one chain."""
    known = vocabulary.target_ids(d2t)

    def children(path):
        walk = iter(path)
        logits = drafts.chain_logits(draft, ids, auxiliary, lambda rows: next(walk), len(path) + 1)[-1]
        best = logits.double().softmax(-1).sort(descending=True)
        return [(*path, int(known[i])) for i in best.indices[: shape.topk]], best.values[: shape.topk].tolist()

    scores = {(): 1.0}
    level = [()]
    for _ in range(shape.depth):
        found = {}
        for path in level:
            found |= {child: scores[path] * share for child, share in zip(*children(path), strict=True)}
        scores |= found
        level = sorted(found, key=found.get, reverse=True)[: shape.topk]
    del scores[()]
    return set(sorted(scores, key=scores.get, reverse=True)[: shape.size])


@torch.no_grad()
def plain_passes(target, draft, d2t, prompt, own, shape):
    """(accepted drafts of each pass, tree of each pass) on the way through the target's own text `own`."""
    text = torch.tensor(prompt + own)
    auxiliary, _ = target.hidden_states(text, [len(text)])
    known = len(prompt) + 1
    passes, trees = [], []
    while known < len(text):
        trees.append(plain_tree(draft, d2t, text[:known], auxiliary[: known - 1], shape))
        rest = text[known:].tolist()
        accepted = max(n for n in range(min(shape.depth, len(rest)) + 1) if not n or tuple(rest[:n]) in trees[-1])
        passes.append(accepted)
        known += accepted + 1
    return passes, trees


def paths_of(tree):
    """The paths of tokens to the nodes of a tree, without the root."""
    return {tuple(tree.tokens[node] for node in path.nonzero()[1:, 0]) for path in tree.paths()[1:]}


@pytest.mark.parametrize(
    ("shape", "seed"),
    [(None, 5), ("two qwen3 layers, 3.1's norms", 2), ("three layers, two windows, own table", 6)],
)
def test_texts_trees_and_passes_are_those_of_a_plain_statement(shape, seed, folder, target, monkeypatch):
    draft, d2t = drafts.random_draft(folder, target, 20, seed=seed, **drafts.SHAPES.get(shape, {}))
    grown, grow = [], draft_trees.grow
    monkeypatch.setattr(draft_trees, "grow", lambda *args: grown.append(grow(*args)) or grown[-1])
    accepted = []
    for prompt in prompts_of([1, 17]):
        grown.clear()
        own = drafts.own_greedy(target, prompt, 14)
        reply, passes = draft_trees.speculate(target, draft, d2t, prompt, SHAPE, 14, set())
        assert reply == own
        expected, trees = plain_passes(target, draft, d2t, prompt, own, SHAPE)
        assert passes == expected
        assert [paths_of(tree) for tree in grown] == trees
        assert all(len(tree.tokens) == SHAPE.size + 1 for tree in grown)
        accepted += passes
    assert {0, 1, 2} <= set(accepted), accepted


def test_a_tree_without_branches_is_the_chain(folder, target, monkeypatch):
    """Drafts, texts and passes."""
    draft, d2t = drafts.random_draft(folder, target, 20, seed=5)
    chains, propose, grow = [], decoding.CachedDraft.propose, draft_trees.grow
    trees = []
    monkeypatch.setattr(decoding.CachedDraft, "propose", lambda *args: chains.append(propose(*args)) or chains[-1])
    monkeypatch.setattr(draft_trees, "grow", lambda *args: trees.append(grow(*args)) or trees[-1])
    found = []
    for prompt in prompts_of([2, 30, 9]):
        chain = decoding.speculate(target, draft, d2t, prompt, 4, 20, {7})
        assert draft_trees.speculate(target, draft, d2t, prompt, draft_trees.Shape(1, 4, 4), 20, {7}) == chain
        found += chain[1]
    assert [tree.tokens[1:] for tree in trees] == [drafted for drafted, _ in chains]
    assert all(tree.parents == [-1, 0, 1, 2, 3] for tree in trees)
    assert max(found) > 0


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 6])
def test_drafts_behind_the_end_of_the_reply_are_not_counted(max_new_tokens, target, monkeypatch):
    prompt = prompts_of([5])[0]
    own = drafts.own_greedy(target, prompt, 12)

    def grow(cached, tokens, auxiliary, shape):
        """A chain of the text to come."""
        known = len(tokens) - len(prompt) + 1
        return draft_trees.Tree([tokens[-1], *own[known : known + 4]], [-1, 0, 1, 2, 3])

    monkeypatch.setattr(draft_trees, "grow", grow)
    reply, passes = draft_trees.speculate(target, *any_draft(target), prompt, None, max_new_tokens, set())
    assert reply == own[:max_new_tokens]
    assert sum(passes[:1]) == min(max_new_tokens - 1, 4)
    ended = draft_trees.speculate(target, *any_draft(target), prompt, None, 12, {own[2]})
    assert ended == (own[:3], [2])


def any_draft(target):
    """A draft that nothing reads."""
    return SimpleNamespace(config={"num_hidden_layers": 1}), torch.zeros(VOCABULARY, dtype=torch.int64)


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt-oss", "mistral"))
def test_rejected_branches_leave_no_trace_in_the_targets_cache(family, tmp_path, monkeypatch):
    """Trees that hold the true text in some branch, windows shorter than the text."""
    target = drafts.write_family(tmp_path, family, 300)
    draft_trees.check(SHAPE, target.config, 300)
    draft_trees.check_masks(target)
    states, depths, known, random = [], set(), 0, Random(0)

    def grow(cached, tokens, auxiliary, shape):
        """Four levels of three siblings below a random node; the true one is among them with probability 0.8."""
        nonlocal known
        states.append(auxiliary)
        known += len(tokens) if known else 1
        tree = draft_trees.Tree([tokens[-1]], [-1])
        true = 0
        for level in range(4):
            siblings = random.sample([token for token in range(300) if token != own[known + level]], 3)
            parent = random.randrange(len(tree.tokens))
            if true is not None:
                parent = true
                true = None
                if random.random() < 0.8:
                    at = random.randrange(3)
                    siblings[at] = own[known + level]
                    true = len(tree.tokens) + at
            tree.tokens += siblings
            tree.parents += [parent] * 3
        return tree

    monkeypatch.setattr(draft_trees, "grow", grow)
    for prompt in (ids.tolist() for ids in drafts.random_prompts([2, 25])):
        own = drafts.own_greedy(target, prompt, 60)
        states.clear()
        known = 0
        reply, passes = draft_trees.speculate(target, *any_draft(target), prompt, SHAPE, 50, set())
        assert reply == own[:50] and len(set(reply)) > 5
        depths.update(passes)
        found, text = torch.cat(states), torch.tensor(prompt + own)
        expected, _ = target.hidden_states(text, [len(text)])
        assert float((found - expected[: len(found)]).abs().max() / expected.abs().max()) < 1e-5
    assert depths == set(range(5))


# ---------------------------------------------------------------------------- what has no trees
@pytest.mark.parametrize(
    ("config", "kind"),
    [(transformers.Qwen3NextConfig, "linear_attention"), (transformers.Llama4TextConfig, "chunked_attention")],
)
def test_a_target_whose_cache_cannot_keep_a_path_is_refused(config, kind, capsys):
    line = tiny.fails(capsys, draft_trees.check, SHAPE, config(), 300)
    assert f"the target has {kind} layers" in line and "drop --tree, chains work" in line


def test_a_target_that_ignores_the_mask_is_refused(target, capsys, monkeypatch):
    draft_trees.check_masks(target)
    decoder = target.decoder
    monkeypatch.setattr(target, "decoder", lambda attention_mask, **others: decoder(**others))
    assert "model_type llama does not follow the mask of a tree" in tiny.fails(capsys, draft_trees.check_masks, target)


# ---------------------------------------------------------------------------- sampling
def accept_as_if_sampled(table):
    """A wrong rule: candidates tried with the draft's q, as if they were samples of it and not its likeliest tokens."""

    def verify(tree, logits, choose):
        path = [0]
        while True:
            node = path[-1]
            p = logits[node].softmax(-1)
            q = table[tree.tokens[node]].softmax(-1)
            for child in (n for n, parent in enumerate(tree.parents) if parent == node):
                token = tree.tokens[child]
                if torch.rand(()) * q[token] < p[token]:
                    path.append(child)
                    break
                p = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
            else:
                return path[1:], int(torch.multinomial(p, 1))

    return verify


def test_sampling_with_trees_is_lossless_and_another_rule_is_not(monkeypatch):
    """Markov chains in place of models: the next token hangs on the last one only, so all is exact."""
    torch.manual_seed(0)
    size = 5
    chain = 1.5 * torch.randn(size, size)
    table = 2 * torch.randn(size, size)

    class Target:
        def __init__(self, *_):
            pass

        def feed(self, tokens, last=0):
            return torch.zeros(len(tokens), 1), chain[tokens][-last:]

    class Draft:
        cache, length, target_ids = [], 0, torch.arange(size)

        def __init__(self, *_):
            self.draft = SimpleNamespace(step=lambda ids, feature, *_: (feature, table[ids]))

        def read(self, tokens, auxiliary):
            return torch.zeros(len(tokens), 1), table[tokens]

    monkeypatch.setattr(decoding, "CachedTarget", Target)
    monkeypatch.setattr(decoding, "CachedDraft", Draft)
    monkeypatch.setattr(draft_trees, "feed", lambda cached, tree: Target().feed(tree.tokens))
    monkeypatch.setattr(draft_trees, "keep", lambda *_: None)
    p = chain.softmax(-1)
    exact = p[0][:, None, None] * p[:, :, None] * p[None]  # of the first three tokens behind token 0

    def observed(runs):
        counts = torch.zeros(size, size, size)
        depths = set()
        for _ in range(runs):
            shape = draft_trees.Shape(2, 2, 4)
            reply, passes = draft_trees.speculate(None, None, None, [0], shape, 3, set(), decoding.sampled(1.0))
            counts[tuple(reply)] += 1
            depths.update(passes)
        return counts, depths

    counts, depths = observed(2500)
    assert depths == {0, 1, 2}
    assert drafts.p_value(counts, exact) > 1e-3
    monkeypatch.setattr(draft_trees, "verify", accept_as_if_sampled(table))
    assert drafts.p_value(observed(2500)[0], exact) < 1e-6


class Replay:
    """In place of a cache: the calls so far. What a real one answers behind the same calls is computed once."""

    memory = {}

    def __init__(self, make, *models):
        self.make = lambda: make(*models)
        self.calls = []
        self.keys = (make.__name__,)

    def ask(self, key, call, lasting=True):
        """call(real cache) behind the calls so far; lasting: it is one of them from now on."""
        keys = (*self.keys, key)
        calls = [*self.calls, call]
        if keys not in self.memory:
            real = self.make()
            self.memory[keys] = [call(real) for call in calls][-1]
        if lasting:
            self.keys, self.calls = keys, calls
        return self.memory[keys]

    def feed(self, tokens, last=0):
        return self.ask(("feed", *tokens), lambda real: real.feed(tokens, last))

    def forget(self, count):
        self.ask(("forget", count), lambda real: real.forget(count))

    def propose(self, tokens, auxiliary, count, choose):
        """Each draft is chosen anew from the logits behind those before it."""
        picked, rows = [], []
        for length in range(1, count + 1):
            walk = iter([*picked, 0])
            arguments = (tokens, auxiliary, length, lambda _, walk=walk: next(walk))
            key = ("propose", *tokens, "then", *picked)
            drafted, logits = self.ask(key, lambda real, given=arguments: real.propose(*given), lasting=False)
            rows.append(logits[-1])
            picked.append(choose(rows[-1]))
            ids = [*drafted[:-1], self.make().target_ids[picked[-1]]]
        self.ask(("proposed", *tokens), lambda real: real.propose(tokens, auxiliary, 1, decoding.greedy))
        return [int(token) for token in ids], torch.stack(rows)


@pytest.fixture
def replayed(monkeypatch):
    """Caches whose answers are remembered, in this module's decoding.speculate and draft_trees.speculate."""
    target, draft = decoding.CachedTarget, decoding.CachedDraft
    monkeypatch.setattr(Replay, "memory", {})
    monkeypatch.setattr(decoding, "CachedTarget", lambda *models: Replay(target, *models))
    monkeypatch.setattr(decoding, "CachedDraft", lambda *models: Replay(draft, *models))

    def patch(name, key_of):
        function = getattr(draft_trees, name)

        def asked(cached, *args):
            return cached.ask((name, *key_of(*args)), lambda real: function(real, *args))

        monkeypatch.setattr(draft_trees, name, asked)

    patch("grow", lambda tokens, auxiliary, shape: tokens)
    patch("feed", lambda tree: tree.tokens)  # which the text before it determines
    patch("keep", lambda tree, path: path)


@pytest.mark.parametrize(
    ("form", "temperature", "runs"),
    [
        ("tree", 0.7, 400),
        pytest.param("chain", 1.0, 20_000, marks=pytest.mark.slow),
        pytest.param("tree", 1.0, 20_000, marks=pytest.mark.slow),
    ],
)
def test_samples_of_models_are_the_targets(form, temperature, runs, tmp_path, replayed):
    """The first three tokens together; the first is the target's own, the second and third are drafted."""
    options = {"vocab_size": SMALL, "hidden_size": 32, "initializer_range": 0.12, "eos_token_id": 1}
    torch.manual_seed(2)
    transformers.LlamaForCausalLM(tiny.llama_config(**options)).save_pretrained(tmp_path)
    target = target_model.load(tmp_path)
    draft, d2t = drafts.random_draft(tmp_path, target, columns=6)
    prompt = [3, 4, 5]
    texts = torch.tensor([[*prompt, a, b] for a in range(SMALL) for b in range(SMALL)])
    with torch.inference_mode():
        p = (target.model(texts).logits[:, 2:] / temperature).softmax(-1).double().view(SMALL, SMALL, 3, SMALL)
    exact = p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]  # [first, second, third]
    generator = torch.Generator().manual_seed(0)
    rules = decoding.sampling(temperature, generator, vocabulary.target_ids(d2t), SMALL)
    shape = draft_trees.Shape(3, 2, 8)
    counts, accepted = torch.zeros(SMALL, SMALL, SMALL), 0
    for _ in range(runs):
        if form == "tree":
            reply, passes = draft_trees.speculate(target, draft, d2t, prompt, shape, 3, set(), rules[0])
        else:
            reply, passes = decoding.speculate(target, draft, d2t, prompt, 1, 3, set(), *rules)
        counts[tuple(reply)] += 1
        accepted += sum(passes)
    assert accepted > runs / 20
    for at in range(3):
        rest = [axis for axis in range(3) if axis != at]
        assert drafts.p_value(counts.sum(rest), exact.sum(rest)) > 1e-3
        assert drafts.p_value(counts.sum(at), exact.sum(at)) > 1e-3
    if runs * exact.max() > 10:
        assert drafts.p_value(counts, exact) > 1e-3
