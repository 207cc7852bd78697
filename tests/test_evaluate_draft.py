"""Speculative decoding: drafts as in training, texts as the target's own, passes as the training code counts them."""

import itertools
import json
import struct
from types import SimpleNamespace

import pytest
import torch
import transformers

import evaluate_draft
import prepare_data
import train_eagle3
from core import dataloader, decoding, draft_files, prompts, slots, target_files, target_model, vocabulary
from helpers import tiny, training
from helpers.chat_templates import family_tokenizer
from helpers.drafts import (
    ROPES,
    SHAPES,
    chain_logits,
    own_greedy,
    p_value,
    random_draft,
    random_prompts,
    save_draft,
    write_family,
)

torch.set_num_threads(1)  # the models are so small that threads only wait for each other
VOCABULARY, COUNT, NEW_TOKENS = 300, 4, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_target(tmp_path_factory.mktemp("target"), vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def target(folder):
    return target_model.load(folder)


def objective_inputs(target, d2t, texts, steps, draft=None):
    """The objective's arguments for [(prompt, reply)], and the loss masks; draft: if it has layers or windows."""
    lengths = [len(prompt) + len(reply) for prompt, reply in texts]
    ids = torch.tensor([i for prompt, reply in texts for i in prompt + reply])
    masks = [[0] * len(prompt) + [1] * len(reply) for prompt, reply in texts]
    auxiliary, last = target.hidden_states(ids, lengths)
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    supervised = slots.supervised_slots(torch.tensor(sum(masks, [])), document_ids, steps)
    windows = draft_files.windows(draft.config) if draft else (0,)
    return {
        "input_ids": ids,
        "position_ids": slots.positions_of(lengths),
        "auxiliary": auxiliary,
        "last": last,
        "head": target.head,
        "plan": slots.plan_slots(supervised, lengths, windows),
        "d2t": d2t,
        "args": training.flags(),
    }, masks


@pytest.fixture(scope="module")
def trained(folder, target):
    """A draft that is right now and then: (DraftModel, d2t, texts seen, texts not seen, ids that end a reply).

    texts: [(prompt, reply)] with the target's own greedy replies, some ended by a token and some by their length.
    """
    asked = [p.tolist() for p in random_prompts([3, 20, 1, 9, 40, 5, 12, 30, 7, 2])]
    replies = [own_greedy(target, p) for p in asked]
    # The two ids that end most replies early without ending all.
    ends = {i: sum(i in r[1:] for r in replies) for i in {i for r in replies for i in r[8:]}}
    eos_ids = sorted((i for i in ends if all(i not in r[:4] for r in replies)), key=lambda i: (-ends[i], i))[:2]
    texts = [(p, own_greedy(target, p, eos_ids=eos_ids)) for p in asked]
    draft, d2t = random_draft(folder, target, columns=200)
    # The draft vocabulary leaves out tokens of the text, but not all that end it.
    ids = sorted({*eos_ids, *range(0, VOCABULARY, 7), *[i for _, r in texts for i in r if i % 11]})
    d2t = torch.tensor(ids) - torch.arange(len(ids))
    draft = train_eagle3.DraftModel(draft.config | {"draft_vocab_size": len(ids)}, target.embedding)
    draft.initialise(target.head.weight[torch.tensor(ids)])
    inputs, _ = objective_inputs(target, d2t, texts[:-2], COUNT)
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = train_eagle3.objective(draft, **inputs)[0] / inputs["plan"].counts[0]
        loss.backward()
        optimizer.step()
    return draft.eval(), d2t, texts[:-2], texts[-2:], set(eos_ids)


# ---------------------------------------------------------------------------- drafts
def dense_chain(draft, d2t, ids, auxiliary, count):
    """Target ids [count] and logits [count, Vd] that the training code's pieces draft behind ids [n]."""
    known = vocabulary.target_ids(d2t)
    rows = chain_logits(draft, ids, auxiliary, lambda rows: known[rows[-1].argmax()], count)
    return known[rows.argmax(dim=-1)].tolist(), rows


@pytest.mark.parametrize("columns", [None, 90])
@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_every_drafted_chain_equals_the_training_codes(rope, columns, folder, target, monkeypatch):
    compare_chains(*random_draft(folder, target, columns, rope), target, monkeypatch)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_drafted_chain_of_another_shape_equals_the_training_codes(shape, folder, target, monkeypatch, tmp_path):
    """As read back from the written folder, in both forms."""
    draft, d2t = random_draft(folder, target, 90, **SHAPES[shape])
    config, tensors = draft_files.read_draft(save_draft(tmp_path / "flat", draft, d2t))
    compare_chains(*evaluate_draft.load_draft(config, tensors, target), target, monkeypatch)
    named = {"target_model_path": "org/target", "target_architectures": ["LlamaForCausalLM"]}
    draft_files.write_speculators(tmp_path / "nested", config, tensors, embed_tokens=target.embedding, **named)
    again, same = draft_files.read_draft(tmp_path / "nested")
    same = {name: tensor for name, tensor in same.items() if name in tensors}
    assert again == config and same.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in same.items())
    assert not draft_files.check_draft(tmp_path / "flat") and not draft_files.check_draft(tmp_path / "nested")


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_objective_predicts_what_a_saved_draft_drafts(shape, folder, target, tmp_path):
    """A text that goes on as drafted, and a teacher that expects just that: every prediction of the chain is right."""
    draft, d2t = random_draft(folder, target, **SHAPES[shape])
    saved = draft_files.read_draft(save_draft(tmp_path, draft, d2t))
    loaded = evaluate_draft.load_draft(*saved, target)
    size = target.config.vocab_size
    seen = set()
    for prompt in (p.tolist() for p in random_prompts([40, 12, 25, 18])):
        auxiliary, _ = target.hidden_states(torch.tensor(prompt), [len(prompt)])
        cached = decoding.CachedDraft(*loaded)
        drafted, _ = cached.propose(prompt[1:], auxiliary[:-1], COUNT, decoding.greedy)
        seen.update(drafted)
        for right in (COUNT, 2):  # drafts that the text and the teacher follow
            text = prompt + drafted[:right] + [(token + 1) % size for token in drafted[right:]]
            ids = torch.tensor(text)
            inputs, _ = objective_inputs(target, d2t, [(prompt[:-1], text[len(prompt) - 1 :])], COUNT, draft)
            inputs["last"] = torch.eye(size)[ids.roll(-1)]
            inputs["head"] = target_model.Head(torch.eye(size))
            _, _, correct = train_eagle3.objective(draft, **inputs)
            assert correct[: right + 1, len(prompt) - 2].tolist() == [True] * right + [False] * (right < COUNT)
    assert len(seen) > 2, "one token again and again shows too little"


def compare_chains(draft, d2t, target, monkeypatch):
    """Tokens and logits of every chain that a speculative decoding drafts are those of the training code's pieces."""
    calls, propose = [], decoding.CachedDraft.propose

    def recorded(self, tokens, auxiliary, count, choose):
        drafted, rows = propose(self, tokens, auxiliary, count, choose)
        calls.append((tokens, drafted, rows))
        return drafted, rows

    monkeypatch.setattr(decoding.CachedDraft, "propose", recorded)
    seen = set()
    for prompt in (p.tolist() for p in random_prompts([1, 2, 17, 400])):
        calls.clear()
        decoding.speculate(target, draft, d2t, prompt, COUNT, 16, set())
        text = torch.tensor(prompt[:1] + [token for tokens, _, _ in calls for token in tokens])
        auxiliary, _ = target.hidden_states(text, [len(text)])
        known = 1
        for tokens, drafted, rows in calls:
            known += len(tokens)
            expected, logits = dense_chain(draft, d2t, text[:known], auxiliary[: known - 1], COUNT)
            assert drafted == expected
            assert float((rows - logits).abs().max() / logits.abs().max()) < 5e-5
            seen.update(drafted)
        assert known > len(prompt) + 10
    assert len(seen) > 30, "drafts that hardly vary show too little"


@torch.no_grad()
def test_drafts_hang_on_the_rope_type(folder, target):
    """The comparison above can fail: another rope type changes the drafts."""
    chains = []
    for rope in ROPES:
        draft, d2t = random_draft(folder, target, None, rope)
        ids = random_prompts([60])[0]
        chains.append(dense_chain(draft, d2t, ids, target.hidden_states(ids[:-1], [59])[0], COUNT)[1])
    assert float((chains[0] - chains[1]).abs().max() / chains[0].abs().max()) > 1e-3


# ---------------------------------------------------------------------------- greedy text and passes
def test_greedy_text_is_the_targets_and_passes_are_those_of_the_training_code(trained, target):
    draft, d2t, seen, unseen, eos_ids = trained
    ends, walked = set(), []
    for texts in (seen, unseen):
        inputs, masks = objective_inputs(target, d2t, texts, COUNT)
        with torch.no_grad():
            accepted = train_eagle3.chain_lengths(train_eagle3.objective(draft, **inputs)[2]).split(
                [len(mask) for mask in masks]
            )
        for (prompt, own), n, mask in zip(texts, accepted, masks, strict=True):
            reply, passes = decoding.speculate(target, draft, d2t, prompt, COUNT, NEW_TOKENS, eos_ids)
            assert reply == own
            assert passes == slots.acceptance_walk(n.tolist(), mask)
            assert 1 + sum(n + 1 for n in passes) >= len(reply)
            ends.add(("token" if reply[-1] in eos_ids else "length", passes[-1] > 0))
            walked += passes if texts is seen else []
    assert {how for how, _ in ends} == {"token", "length"}
    assert ("token", True) in ends, "no reply's end was drafted"
    assert set(walked) == set(range(COUNT + 1)), "passes of every length belong to the case"
    assert 1 + sum(walked) / len(walked) > 1.5


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
def test_any_number_of_tokens_and_drafts(max_new_tokens, trained, target):
    draft, d2t, texts, _, _ = trained
    prompt, own = max(texts, key=lambda text: len(text[1]))
    own = own[:max_new_tokens]
    for count in (1, 2, 9):
        inputs, masks = objective_inputs(target, d2t, [(prompt, own)], count)
        with torch.no_grad():
            n = train_eagle3.chain_lengths(train_eagle3.objective(draft, **inputs)[2]).tolist()
        reply, passes = decoding.speculate(target, draft, d2t, prompt, count, max_new_tokens, set())
        assert (reply, passes) == (own, slots.acceptance_walk(n, masks[0]))
        assert decoding.generate(target, prompt, max_new_tokens, set()) == own


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt-oss", "granite"))
def test_rejected_drafts_leave_no_trace_in_the_targets_cache(family, tmp_path, monkeypatch):
    """Drafts that are right by chance, windows shorter than the text: text and hidden states as without drafts."""
    target = write_family(tmp_path, family, VOCABULARY)
    states, lengths = [], set()
    random = torch.Generator().manual_seed(0)

    class Oracle:
        """Drafts the true text, each token with probability 0.7."""

        def __init__(self, *_):
            self.known = 0

        def propose(self, tokens, auxiliary, count, choose):
            assert len(tokens) == len(auxiliary)
            states.append(auxiliary)
            self.known += len(tokens) if self.known else 1
            right = torch.rand(count, generator=random) < 0.7
            return [own[self.known + i] if yes else 3 for i, yes in enumerate(right)], torch.zeros(count, 1)

    monkeypatch.setattr(decoding, "CachedDraft", Oracle)
    for prompt in (p.tolist() for p in random_prompts([2, 25])):
        own = own_greedy(target, prompt, 60)
        states.clear()
        reply, passes = decoding.speculate(target, None, None, prompt, COUNT, 50, set())
        assert reply == own[:50] and len(set(reply)) > 5
        lengths.update(passes)
        found, text = torch.cat(states), torch.tensor(prompt + own)
        expected, _ = target.hidden_states(text, [len(text)])
        assert float((found - expected[: len(found)]).abs().max() / expected.abs().max()) < 1e-5
    assert lengths == set(range(COUNT + 1))
    with torch.inference_mode():  # scale and soft cap do not show in greedy text
        logits = target.model(text[None]).logits[0]
    assert (
        float((decoding.CachedTarget(target).feed(text.tolist())[1] - logits).abs().max() / logits.abs().max()) < 1e-5
    )


def test_a_long_prompts_logits_are_formed_for_its_last_token_only(target, monkeypatch):
    rows, logits = [], decoding.CachedTarget.feed
    monkeypatch.setattr(decoding.CachedTarget, "feed", lambda *a, **k: rows.append(logits(*a, **k)) or rows[-1])
    decoding.generate(target, list(range(50)), 3, set())
    assert [(len(auxiliary), len(z)) for auxiliary, z in rows] == [(50, 1), (1, 1), (1, 1)]


# ---------------------------------------------------------------------------- sampling
def wrong_rules(ids, generator):
    """Rules of verification at temperature 1 that change the distribution, by name."""

    def draw(logits):
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    def accept_always(drafted, draft_logits, target_logits):
        return len(drafted), draw(target_logits[-1])

    def redraw_from_the_target(drafted, draft_logits, target_logits):
        """The right acceptance, but a rejected draft replaced by a sample of p instead of max(p - q, 0)."""
        for i, token in enumerate(drafted):
            q = draft_logits[i].softmax(-1)[ids.tolist().index(token)]
            if torch.rand((), generator=generator) * q >= target_logits[i].softmax(-1)[token]:
                return i, draw(target_logits[i])
        return len(drafted), draw(target_logits[-1])

    return {"accept always": accept_always, "redraw from the target": redraw_from_the_target}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_is_lossless(temperature, monkeypatch):
    """speculate() on Markov chains in place of models: the next token hangs on the last one only, so all is exact."""
    torch.manual_seed(0)
    size, ids = 5, torch.tensor([0, 2, 3])  # 1 and 4 cannot be drafted
    chain, drafts = 1.5 * torch.randn(size, size), 2 * torch.randn(size, len(ids))
    drafts[2] = chain[2, ids]  # drafts of every quality: here nearly right

    class Target:
        def __init__(self, *_):
            self.length = 0

        def feed(self, tokens, last=0):
            return torch.zeros(len(tokens), 1), chain[tokens][-last:]

        def forget(self, count):
            pass

    class Draft(Target):
        def propose(self, tokens, auxiliary, count, choose):
            drafted, rows, token = [], [], tokens[-1]
            for _ in range(count):
                rows.append(drafts[token])
                token = int(ids[choose(rows[-1])])
                drafted.append(token)
            return drafted, torch.stack(rows)

    monkeypatch.setattr(decoding, "CachedTarget", Target)
    monkeypatch.setattr(decoding, "CachedDraft", Draft)
    p = (chain / temperature).softmax(-1)
    exact = p[0][:, None, None] * p[:, :, None] * p[None]  # of the first three tokens behind token 0

    def observed(choose, verify, runs):
        counts = torch.zeros(size, size, size)
        accepted = set()
        for _ in range(runs):
            reply, passes = decoding.speculate(None, None, None, [0], 3, 3, set(), choose, verify)
            counts[tuple(reply)] += 1
            accepted.update(passes)
        return counts, accepted

    generator = torch.Generator().manual_seed(0)
    choose, verify = decoding.sampling(temperature, generator, ids, size)
    counts, accepted = observed(choose, verify, 6000)
    assert accepted == {0, 1, 2}
    assert p_value(counts, exact) > 1e-3
    if temperature == 1.0:
        for name, wrong in wrong_rules(ids, generator).items():
            assert p_value(observed(choose, wrong, 6000)[0], exact) < 1e-6, name


def test_sampling_keeps_a_draft_that_equals_the_target_and_drops_what_it_never_says():
    choose, verify = decoding.sampling(0.5, torch.Generator().manual_seed(0), torch.arange(4), 4)
    z = torch.randn(3, 4)
    for _ in range(50):
        drafted = [choose(z[0]), choose(z[1])]
        assert verify(drafted, z[:2], z)[0] == 2
    never = z.clone()
    never[:, 3] = -torch.inf
    for _ in range(50):
        accepted, own = verify([3, 1], z[:2], never)
        assert accepted == 0 and own != 3


# ---------------------------------------------------------------------------- measuring
def test_a_wrong_text_is_reported(trained, target, monkeypatch, capsys):
    draft, d2t, texts, _, _ = trained
    lengths = []

    verify_greedy, speculate = decoding.verify_greedy, decoding.speculate

    def wrong(drafted, rows, logits):
        accepted, own = verify_greedy(drafted, rows, logits)
        lengths.append(accepted + 1)
        if len(lengths) > 4 and accepted < len(drafted):  # keep a draft that the target would not say
            return accepted + 1, int(logits[accepted + 1].argmax())
        return accepted, own

    args = evaluate_draft.parse_args(
        ["--target_model_path", "t", "--prompts", "p", "--max_new_tokens", "40", "--num_draft_tokens", "7"]
    )
    asked = [prompts.Prompt(prompt) for prompt, _ in texts]
    assert len(evaluate_draft.measure(target, draft, d2t, asked[:2], args, set())) == 2

    def spoilt(*arguments):
        lengths.clear()
        return speculate(*arguments)

    monkeypatch.setattr(decoding, "verify_greedy", wrong)
    monkeypatch.setattr(decoding, "speculate", spoilt)
    with pytest.raises(SystemExit) as stop:
        evaluate_draft.measure(target, draft, d2t, asked, args, set())
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip()
    at = next(sum(lengths[:i]) - 1 for i in range(5, len(lengths) + 1) if lengths[i - 1] <= 4)
    assert line.startswith("error: prompt 0: ") and f"at token {at}: " in line


class Scripted:
    """In place of a CachedTarget: these logits, whatever is fed."""

    logits = None

    def __init__(self, target):
        pass

    def feed(self, tokens, last=0):
        return None, self.logits.expand(last or len(tokens), -1)


def test_rounding_is_among_the_most_likely_tokens_of_a_half_precision_target(monkeypatch):
    monkeypatch.setattr(decoding, "CachedTarget", Scripted)

    def judged(dtype, reply, alone, at=1):
        return evaluate_draft.find_wrong(SimpleNamespace(embedding=torch.zeros(1, dtype=dtype)), [0], reply, alone, at)

    half = torch.bfloat16
    monkeypatch.setattr(Scripted, "logits", torch.tensor([9.9, 10.0, 9.8, 9.0]))
    assert judged(half, [5, 0], [5, 1]) == (None, 1) and judged(torch.float16, [5, 1], [5, 0]) == (None, 0)
    assert judged(torch.float32, [5, 0], [5, 1])[0] == 1
    assert judged(half, [5, 3], [5, 1])[0] == 1  # 10 % apart
    assert judged(half, [5, 1], [5, 3])[0] == 1
    assert judged(half, [5], [5, 1])[0] == 1  # one ends, the other goes on
    assert judged(half, [5, 2], [5, 1]) == judged(half, [5, 2], [5, 0]) == (None, 1)  # a third token between the two
    assert judged(half, [5, 2, 1, 0], [5, 0, 1, 1]) == (None, 2)
    assert judged(half, [5, 2, 1, 3, 0, 3], [5, 0, 1, 1])[0] == 3  # wrong behind a tie
    assert judged(half, [5, 0] + [1] * 150 + [3], [5, 1])[0] == 152
    monkeypatch.setattr(Scripted, "logits", torch.tensor([25.375, 25.375, 25.25, 24.0]))
    for a, b in itertools.permutations(range(3), 2):  # a tie of three, as SmolLM2 has it
        assert judged(half, [5, a], [5, b]) == (None, int(a == 2))
        assert judged(half, [5, 3], [5, b])[0] == 1
    monkeypatch.setattr(Scripted, "logits", torch.tensor([1.0, torch.nan]))
    assert judged(half, [5, 0], [5, 1])[0] == judged(half, [5, 1], [5, 0])[0] == 1


def test_a_text_is_judged_by_the_logits_of_each_of_its_tokens(target):
    text = torch.cat(random_prompts([20, 150])).tolist()
    with torch.inference_mode():
        logits = target.model(torch.tensor([text])).logits[0]
    expected = [(float(z.max() - z[token]) / float(z.abs().max())) for z, token in zip(logits, text[1:], strict=False)]
    for start in (0, 1, 70, 149):
        found = evaluate_draft.shortfalls(target, text[:20], text[20:], start)
        assert found.tolist() == pytest.approx(expected[19 + start :], abs=1e-4)


def test_a_half_precision_target_leaves_its_own_text_but_a_wrong_token_behind_is_found(tmp_path, monkeypatch, capsys):
    """Perfect drafts for a random bf16 target; then one token, behind a tie, that the target would not say."""
    torch.manual_seed(0)
    config = tiny.llama_config(vocab_size=VOCABULARY, initializer_range=0.1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    target = target_model.load(tmp_path)
    asked = [prompts.Prompt(p.tolist()) for p in random_prompts([20] * 6)]
    args = ["--target_model_path", "t", "--prompts", "p", "--max_new_tokens", "100", "--num_draft_tokens", "7"]
    args = evaluate_draft.parse_args(args)
    owns = {tuple(prompt.ids): decoding.generate(target, prompt.ids, 100 + COUNT, set()) for prompt in asked}

    class Perfect:
        """Drafts `own`, the text as the target alone has it."""

        def __init__(self, own, _):
            self.own = own + [0] * 9
            self.known = 0

        def propose(self, tokens, auxiliary, count, choose):
            self.known += len(tokens) if self.known else 1
            return self.own[self.known : self.known + count], torch.zeros(count, 1)

    speculate = decoding.speculate

    def drafted(target, draft, d2t, prompt, *others):
        return speculate(target, owns[tuple(prompt)], d2t, prompt, *others)

    monkeypatch.setattr(decoding, "CachedDraft", Perfect)
    monkeypatch.setattr(decoding, "speculate", drafted)
    rows = evaluate_draft.measure(target, None, None, asked, args, set())
    figures = evaluate_draft.summarise(rows, args)
    assert figures["texts_parted_by_rounding"] > 0 and figures["rounding_ties"] <= 0.05 * figures["new_tokens"]
    number, at = next((i, r["parted_by_rounding_at"]) for i, r in enumerate(rows) if "parted_by_rounding_at" in r)
    assert at < 99

    def spoilt(target, draft, d2t, prompt, *others):
        reply, passes = drafted(target, draft, d2t, prompt, *others)
        if len(reply) == 100 and prompt == asked[number].ids:
            reply[-1] = int(decoding.CachedTarget(target).feed(prompt + reply[:-1], last=1)[1][-1].argmin())
        return reply, passes

    monkeypatch.setattr(decoding, "speculate", spoilt)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate_draft.measure(target, None, None, asked, args, set())
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and line.startswith(f"error: prompt {number}: ") and "\n" not in line
    assert f"at token {at} by rounding, but goes on at token 99 with [" in line


@pytest.mark.parametrize(
    ("count", "tokens", "ties", "ends"),
    [(8, 50, 2, None), (8, 50, 4, (12, 150)), (8, 50, 6, (6, 50)), (3, 2, 1, None), (9, 2, 1, (4, 8))],
)
def test_ties_of_rounding_are_few(count, tokens, ties, ends, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_draft, "find_wrong", lambda *_: (None, ties))
    monkeypatch.setattr(decoding, "generate", lambda *_: [1] * tokens)
    monkeypatch.setattr(decoding, "speculate", lambda *_: ([2] * tokens, [1]))
    args = evaluate_draft.parse_args(["--target_model_path", "t", "--prompts", "p", "--num_draft_tokens", "7"])
    target = SimpleNamespace(embedding=torch.zeros(1))
    if ends:
        with pytest.raises(SystemExit) as stop:
            evaluate_draft.measure(target, None, None, [prompts.Prompt([0])] * count, args, set())
        line = capsys.readouterr().err
        assert stop.value.code == 1 and line.count("\n") == 1
        assert f"{ends[0]} of {ends[1]} drafted tokens" in line and "too many for rounding" in line
    else:
        rows = evaluate_draft.measure(target, None, None, [prompts.Prompt([0])] * count, args, set())
        figures = evaluate_draft.summarise(rows, args)
        assert (figures["texts_parted_by_rounding"], figures["rounding_ties"]) == (count, count * ties)


def test_summary_is_made_of_sums():
    rows = [
        {"passes": [2, 0, 1], "loss_mask": [0, 1, 1, 1], "tokens_alone": 3, "category": "math", "turn": 1},
        {"passes": [3], "loss_mask": [1, 1, 1, 1, 1], "tokens_alone": 5, "category": None, "turn": 1},
        {"passes": [], "loss_mask": [0, 1], "tokens_alone": 1, "category": "math", "turn": 1},
    ]
    for row in rows:
        row |= {"seconds": 1.0, "seconds_alone": 2.0}
    figures = evaluate_draft.summarise(rows, SimpleNamespace(num_draft_tokens=3, depth=None, topk=None))
    assert figures["acceptance_length"] == 1 + 6 / 4
    assert figures["accepted_by_position"] == [3 / 4, 2 / 4, 1 / 4]
    assert (figures["passes"], figures["prompts"], figures["new_tokens"]) == (4, 3, 9)
    assert (figures["tokens_per_second_with_draft"], figures["speedup"]) == (3.0, 2.0)
    math = {"acceptance_length": 2.0, "accepted_by_position": [2 / 3, 1 / 3, 0.0], "passes": 3, "prompts": 2}
    none = {"acceptance_length": 4.0, "accepted_by_position": [1.0, 1.0, 1.0], "passes": 1, "prompts": 1}
    assert figures["by_category"] == {"math": math, "none": none}
    assert figures["by_turn"] == {}  # there is only one


# ---------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def paths(folder, trained, tmp_path_factory):
    """--target_model_path, --draft_model_path and --prompts as the user gives them."""
    root = tmp_path_factory.mktemp("evaluation")
    save_draft(root / "draft", *trained[:2])
    rows = [{"prompt": "A generator is"}, *tiny.conversations(2, turns=2)]
    tiny.write_jsonl(root / "prompts.jsonl", rows)
    return {"target_model_path": folder, "draft_model_path": root / "draft", "prompts": root / "prompts.jsonl"}


def run(paths, **options):
    evaluate_draft.main(
        evaluate_draft.parse_args(
            [word for name, value in {**paths, **options}.items() for word in (f"--{name}", str(value))]
        )
    )


def test_command_line(paths, tmp_path, capsys, target):
    run(paths, num_draft_tokens=3, max_new_tokens=12, output=tmp_path / "out")
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "torch" in figures["machine"] and figures["date"].count("-") == 2
    assert (
        f"acceptance_length {figures['acceptance_length']:.3f} over {figures['passes']} passes of 3 prompts" in printed
    )
    assert "tokens/s" in printed and "greedy text" in printed
    assert len(figures["accepted_by_position"]) == 3 and figures["settings"]["max_new_tokens"] == 12
    rows = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").open()]
    tokenizer = tiny.tokenizer(VOCABULARY)
    conversation = tiny.conversations(1, turns=2)[0]["conversations"][:-1]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    asked = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A generator is", text)]
    for row, prompt in zip(rows, asked, strict=False):
        own = own_greedy(target, prompt, 12, {4})
        assert row["input_ids"] == prompt + own
        assert row["loss_mask"] == [0] * len(prompt) + [1] * len(own)
        assert row["reply"] == tokenizer.decode(own)
    assert figures["passes"] == sum(len(row["passes"]) for row in rows)
    image = (tmp_path / "out" / "acceptance.png").read_bytes()
    width, height = struct.unpack(">II", image[16:24])
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and width > 400 < height * 2 and len(image) > 3000

    prepare_data.prepare(
        tmp_path / "out" / "generations.jsonl", tmp_path / "data", paths["target_model_path"], num_proc=1
    )
    data = dataloader.open_data(tmp_path / "data")[0]["train"]
    assert [(row["input_ids"], row["loss_mask"]) for row in data] == [
        (row["input_ids"], row["loss_mask"]) for row in rows
    ]
    run({**paths, "prompts": tmp_path / "data"}, num_draft_tokens=2, max_new_tokens=5, num_prompts=2, temperature=0.8)
    assert "of 2 prompts" in capsys.readouterr().out

    run(paths, tree="dynamic", topk=3, depth=4, num_draft_tokens=9, max_new_tokens=12, output=tmp_path / "tree")
    printed = capsys.readouterr().out
    assert (
        "SGLang serves this with --speculative-num-steps 4 --speculative-eagle-topk 3 "
        "--speculative-num-draft-tokens 10\n"
    ) in printed
    tree = json.loads((tmp_path / "tree" / "evaluation.json").read_text())
    assert len(tree["accepted_by_position"]) == 4 and tree["new_tokens"] == figures["new_tokens"]
    assert tree["sglang_flags"]["--speculative-num-draft-tokens"] == 10
    assert figures["sglang_flags"] == {
        "--speculative-num-steps": 3, "--speculative-eagle-topk": 1, "--speculative-num-draft-tokens": 4,
    }  # fmt: skip


def edited(draft, path, **changes):
    """A copy of a draft with other sizes in a whole checkpoint."""
    config, tensors = draft_files.read_draft(draft)
    config |= changes
    if "vocab_size" in changes:
        tensors["t2d"] = torch.nn.functional.pad(tensors["t2d"], (0, changes["vocab_size"] - len(tensors["t2d"])))
    draft_files.write_draft(path, config, tensors)
    return path


def test_bad_input_is_refused_before_the_weights_load(paths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(target_model, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "cut.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": \n')
    (tmp_path / "list.jsonl").write_text('["prompt"]\n')
    (tmp_path / "turn.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Hello"}]}\n')
    tiny.write_jsonl(tmp_path / "bench.jsonl", [{"question_id": 81, "category": "writing", "question": "Hello"}] * 80)
    (tmp_path / "bare.jsonl").write_text('{"prompt": ""}\n')
    other_vocabulary = edited(paths["draft_model_path"], tmp_path / "other", vocab_size=VOCABULARY + 8)
    torch.manual_seed(0)
    wide = tiny.write_target(tmp_path / "wide", vocab_size=VOCABULARY, hidden_size=32)
    shallow = tmp_path / "shallow"
    shallow.mkdir()
    config = json.loads((paths["target_model_path"] / "config.json").read_text()) | {"num_hidden_layers": 6}
    (shallow / "config.json").write_text(json.dumps(config))
    tiny.tokenizer(VOCABULARY).save_pretrained(shallow)
    tiny.tokenizer(VOCABULARY + 20).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps(config))
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    prepare_data.prepare(rows, tmp_path / "data", tmp_path / "tokenizer", num_proc=1)
    for options, words in (
        ({"prompts": tmp_path / "absent.jsonl"}, "absent.jsonl: no such file or folder"),
        ({"prompts": tmp_path / "file"}, "is empty: no row in it"),
        ({"prompts": tmp_path / "cut.jsonl"}, "line 2 of"),
        ({"prompts": tmp_path / "list.jsonl"}, "line 1 of"),
        ({"prompts": tmp_path / "turn.jsonl"}, "has no prompts, or an empty one"),
        (
            {"prompts": tmp_path / "bench.jsonl"},
            f"line 1 of {tmp_path}/bench.jsonl is not a prompt: unknown form: fields question_id, category, question: "
            "name the one of the questions by --prompt_column",
        ),
        ({"prompts": tmp_path / "bare.jsonl"}, "an empty one"),
        ({"draft_model_path": tmp_path}, "is neither a draft"),
        ({"draft_model_path": other_vocabulary}, f"vocab_size is {VOCABULARY + 8}, this target's {VOCABULARY}"),
        ({"target_model_path": wide}, "hidden_size is 64, this target's 32"),
        ({"target_model_path": shallow}, "has 6 layers"),
        ({"target_model_path": tmp_path / "nothing"}, "nothing"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"tp_size": 2}, "tp_size 2 does not divide the 1 ranks"),
        ({"target_sharding": "tp"}, "target_sharding tp contradicts tp_size 1"),
        ({"depth": 3}, "depth is of a tree, and a chain has num_draft_tokens alone: drop it, or give --tree dynamic"),
        (
            {"tree": "dynamic", "topk": 3, "depth": 2},
            "num_draft_tokens 60: a tree of topk 3 and depth 2 has 12 nodes; give at most 12",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_prompts": 0}, "num_prompts is 0"),
        ({"temperature": -1}, "temperature is -1.0; it must be at least 0"),
        ({"prompts": tmp_path / "data"}, "prepared with another tokenizer"),
        ({"output": tmp_path / "file"}, "file cannot be written: a file is in the way"),
        ({"output": tmp_path / "file" / "out"}, "out cannot be written: a file is in the way"),
        ({"seed": "x"}, "--seed"),
        ({"unknown": 1}, "--unknown"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run({**paths, **options})
        line = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert line.startswith("error: ") and "\n" not in line and words in line, (options, line)


@pytest.mark.parametrize(
    ("name", "end"),
    [("auto", "assistant\n"), ("qwen3-thinking", "assistant\n"), ("qwen3-instruct", "<think>\n\n</think>\n\n")],
)
def test_chat_template_switches_the_thinking_of_the_prompts(paths, tmp_path, monkeypatch, name, end):
    """A target that answers at once is measured as it is served: behind the empty thought."""
    tokenizer = tiny.tokenizer(VOCABULARY)
    tokenizer.chat_template = (tiny.REPOSITORY / "tests" / "templates" / "qwen3.jinja").read_text()
    seen, read_prompts = [], prompts.read_prompts
    monkeypatch.setattr(target_files, "load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(prompts, "read_prompts", lambda *args, **flags: seen.extend(read_prompts(*args)) or seen)
    monkeypatch.setattr(evaluate_draft, "measure", lambda *args: (_ for _ in ()).throw(InterruptedError))
    tiny.write_jsonl(tmp_path / "prompts.jsonl", tiny.conversations(2))
    with pytest.raises(InterruptedError):
        run(paths, prompts=tmp_path / "prompts.jsonl", chat_template=name)
    assert len(seen) == 2 and all(tokenizer.decode(prompt.ids).endswith(end) for prompt in seen)


def test_prompts_of_prepared_data_are_before_the_last_reply(folder, tmp_path):
    """As for JSON Lines: the earlier replies are part of the prompt."""
    path = tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(3, turns=2))
    prepare_data.prepare(path, tmp_path / "data", folder, num_proc=1)
    tokenizer = tiny.tokenizer(VOCABULARY)
    found = prompts.read_prompts(tmp_path / "data", tokenizer)
    chats = prompts.read_prompts(path, tokenizer)
    assert [prompt.ids for prompt in found] == [prompt.ids for prompt in chats] and len(found) == 3


def test_a_row_that_ends_with_a_question_is_a_prompt(tmp_path, capsys):
    question = {"role": "user", "content": "Why?"}
    reply = {"role": "assistant", "content": "So."}
    called = [question, {"role": "assistant", "tool_calls": [{"name": "look"}]}, {"role": "tool", "content": "out"}]
    tokenizer = family_tokenizer("qwen")
    for turns in ([question], [question, reply, question], called):
        path = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"messages": [*turns, reply]}, {"messages": turns}])
        complete, open_ended = prompts.read_prompts(path, tokenizer)
        assert complete == open_ended and tokenizer.decode(complete.ids).count("Why?") == turns.count(question)
    for name, rows in {"a": [{"prompt": "Once"}], "b": [{"prompt": "Once"}, {"prompt": [1]}]}.items():
        tiny.write_jsonl(tmp_path / f"{name}.json", rows)
    with pytest.raises(SystemExit):
        prompts.read_prompts(tmp_path / "*.json", tokenizer)
    assert f"error: line 2 of {tmp_path}/b.json is not a prompt: unknown form: fields prompt" in capsys.readouterr().err
