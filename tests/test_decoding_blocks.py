"""Speculative decoding with block drafts: the target's own text, what training computes, lossless samples."""

import json

import pytest
import torch
import transformers

import evaluate_draft
import train_dflash
import train_eagle3
from core import block_files, decoding, draft_files, slots, target_model, vocabulary
from helpers import block_statement, drafts, tiny
from helpers.statement import rms
from helpers.training import refused

SMALL, MASK, SIZE = 8, 7, 4  # few tokens, so that random drafts are accepted now and then
KINDS = {
    "dflash": {},
    "dspark": {"markov_rank": 6},
    "a window": draft_files.window_keys(6, [True, True]),
    "dspark, one layer with a window": {"markov_rank": 6, **draft_files.window_keys(7, [False, True])},
    "causal": {"is_causal": True},
    "fewer tokens": {"draft_vocab_size": 6, "markov_rank": 6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    options = {"vocab_size": SMALL, "hidden_size": 32, "initializer_range": 0.12, "eos_token_id": 1}
    torch.manual_seed(2)
    transformers.LlamaForCausalLM(tiny.llama_config(**options)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(folder):
    return target_model.load(folder, layer_ids=[2, 6])


def make_draft(target, seed=0, **options):
    """A random draft of the target and its mapping."""
    torch.manual_seed(seed)
    algorithm = "dspark" if "markov_rank" in options else "dflash"
    config = {
        "architectures": [block_files.ARCHITECTURES[algorithm]], "model_type": "qwen3", "hidden_size": 32,
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_hidden_layers": 2, "block_size": SIZE, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None,
        "max_position_embeddings": 512, "vocab_size": SMALL, "draft_vocab_size": SMALL, "hidden_act": "silu",
        "layer_types": ["full_attention"] * 2, **options,
    }  # fmt: skip
    config = block_files.with_options(config, mask_token_id=MASK, target_layer_ids=[1, 5])
    columns = config["draft_vocab_size"]
    d2t = (torch.arange(columns) >= 3).long() * (SMALL - columns)
    draft = train_dflash.DraftModel(config, target.embedding, target.head.weight[vocabulary.target_ids(d2t)])
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return draft.eval(), d2t


def walk(target, draft, d2t, prompt, reply):
    """The passes of a reply by the evaluation of a training."""
    ids = torch.tensor(prompt + reply)
    mask = torch.tensor([0] * len(prompt) + [1] * len(reply))
    args = train_dflash.parse_args(["--target_model_path", "t"])
    batch = train_dflash.batch_of(args, draft)([(0, ids, mask)], 0)
    auxiliary, last = target.hidden_states(ids, [len(ids)])
    with torch.no_grad():
        _, _, correct = draft(ids, batch.position_ids, auxiliary, last, target.head, batch.plan, d2t, args)
    return slots.acceptance_walk(train_eagle3.chain_lengths(correct).tolist(), mask.tolist())


def train(target, draft, d2t, texts):
    """A few steps on texts [(prompt, reply)], after which the draft is right now and then."""
    args = train_dflash.parse_args(["--target_model_path", "t", "--loss", "ce"])
    rows = []
    for prompt, reply in texts:
        mask = torch.tensor([0] * len(prompt) + [1] * len(reply))
        rows.append((len(rows), torch.tensor(prompt + reply), mask))
    batch = train_dflash.batch_of(args, draft)(rows, 0)
    auxiliary, last = target.hidden_states(batch.input_ids, batch.lengths)
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss, _, _ = draft(batch.input_ids, batch.position_ids, auxiliary, last, target.head, batch.plan, d2t, args)
        (loss / batch.normaliser).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_the_targets_and_passes_are_what_training_computes(kind, target):
    """Of complete blocks and of shorter ones; replies end by their length, and within drafts by a token."""
    draft, d2t = make_draft(target, **KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    asked = [torch.randint(2, SMALL, (length,), generator=generator).tolist() for length in (1, 3, 9, 17)]
    texts = [(prompt, decoding.generate(target, prompt, 30, set())) for prompt in asked]
    train(target, draft, d2t, texts)
    accepted = []
    for prompt, alone in texts:
        for count in (draft.num_predictions(), 2):
            shorter = with_blocks_of(draft, draft.block_of(count))
            reply, passes = decoding.speculate(target, draft, d2t, prompt, count, 30, set())
            assert reply == alone
            assert passes == walk(target, shorter, d2t, prompt, reply)
            accepted += passes
        ends = {alone[20]}
        reply, passes = decoding.speculate(target, draft, d2t, prompt, draft.num_predictions(), 30, ends)
        assert reply == decoding.generate(target, prompt, 30, ends)
        assert passes == walk(target, draft, d2t, prompt, reply)
    assert set(accepted) == set(range(draft.num_predictions() + 1)), "passes of every length belong to the case"


def with_blocks_of(draft, size):
    """The same weights with blocks of another size."""
    other = train_dflash.DraftModel(draft.config | {"block_size": size}, draft.embedding, draft.head)
    other.load_state_dict(draft.state_dict())
    return other


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_block_from_the_cache_is_the_objectives(kind, target):
    """In float64, and the plain statement's. Read in three parts, with a block drafted and dropped in between."""
    draft, d2t = make_draft(target, **KINDS[kind])
    draft = draft.double()
    draft.embedding = draft.embedding.double()
    draft.head = draft.head.double()
    ids = torch.randint(SMALL, (20,), generator=torch.Generator().manual_seed(3))
    auxiliary, _ = target.hidden_states(ids, [len(ids)])
    auxiliary = auxiliary.double()
    args = train_dflash.parse_args(["--target_model_path", "t"])
    batch = train_dflash.batch_of(args, draft)([(0, ids, torch.ones_like(ids))], 0)
    hidden = draft.embed(ids[batch.plan.slots + 1], SIZE)
    context = draft.features(auxiliary)
    expected = train_dflash.run_layers(draft, batch.plan, batch.position_ids, context, hidden)
    expected = draft.outputs(expected)
    cached = decoding.with_cache(draft, d2t)
    anchors = (batch.plan.slots + 1).tolist()
    read = 0
    for anchor in (4, 5, 11):
        tokens = ids[read + 1 : anchor + 1].tolist()
        drafted, logits = cached.propose(tokens, auxiliary[read:anchor], draft.num_predictions(), decoding.greedy)
        read = anchor
        found = cached.run(int(ids[anchor]), SIZE)
        torch.testing.assert_close(found, expected[anchors.index(anchor)], rtol=1e-10, atol=1e-10)
        stated, stated_logits = state_block(draft, ids, auxiliary, anchor, drafted)
        torch.testing.assert_close(found, stated, rtol=1e-6, atol=1e-6)  # the table of frequencies is in fp32
        torch.testing.assert_close(logits.double(), stated_logits, rtol=1e-5, atol=1e-5)
        assert drafted == vocabulary.target_ids(d2t)[stated_logits.argmax(dim=-1)].tolist()
        assert cached.length == anchor and all(len(keys) == anchor for keys, _ in cached.cache)


def state_block(draft, ids, auxiliary, anchor, drafted):
    """Normed states [P, H] and logits [P, Vd] of a block's predictions by the plain statement; drafted: its tokens."""
    config = draft.config
    weights = dict(draft.named_parameters())
    norm = weights["hidden_norm.weight"]
    context = [rms(weights["fc.weight"] @ states, norm, config["rms_norm_eps"]) for states in auxiliary]
    causal = block_files.causal_layers(config)
    outputs = block_statement.block(
        config, weights, draft.embedding, context, int(ids[anchor]), anchor, MASK, causal
    )  # fmt: skip
    outputs = torch.stack(outputs)[-draft.num_predictions() :]
    logits = outputs @ draft.head.T
    if block_files.algorithm(config) == "dspark":
        before = weights["markov_head.markov_w1.weight"][[int(ids[anchor]), *drafted[:-1]]]
        logits = logits + before @ weights["markov_head.markov_w2.weight"].T
    return outputs, logits


@torch.no_grad()
def test_fewer_masks_of_a_causal_block_draft_the_same(target):
    draft, d2t = make_draft(target, is_causal=True)
    prompt = [3, 4, 5, 6, 2]
    auxiliary, _ = target.hidden_states(torch.tensor(prompt), [5])
    found = []
    for count in (3, 2, 1):
        drafted, logits = decoding.with_cache(draft, d2t).propose([*prompt[1:], 4], auxiliary, count, decoding.greedy)
        found.append((drafted, logits))
    for drafted, logits in found[1:]:
        assert drafted == found[0][0][: len(drafted)]
        torch.testing.assert_close(logits, found[0][1][: len(drafted)])


CACHED_TARGET = decoding.CachedTarget


class RememberedTarget:
    """In place of a CachedTarget: what it computes behind the same text is computed once."""

    memory = {}

    def __init__(self, target):
        self.target = target
        self.text = ()

    def feed(self, tokens, last=0):
        self.text += tuple(tokens)
        if self.text not in self.memory:
            self.memory[self.text] = CACHED_TARGET(self.target).feed(list(self.text))
        auxiliary, logits = self.memory[self.text]
        return auxiliary[-len(tokens) :], logits[-(last or len(tokens)) :]

    def forget(self, count):
        self.text = self.text[: len(self.text) - count]


class RememberedDraft(decoding.CachedBlockDraft):
    """The block behind the same text is computed once; its tokens are chosen anew."""

    memory = {}

    def __init__(self, *models):
        super().__init__(*models)
        self.text = ()
        self.unread = []

    def propose(self, tokens, *args):
        self.text += tuple(tokens)
        return super().propose(tokens, *args)

    def read(self, auxiliary):
        self.unread.append(auxiliary)

    def run(self, anchor, size):
        if self.text not in self.memory:
            for auxiliary in self.unread:
                super().read(auxiliary)
            self.unread = []
            self.memory[self.text] = super().run(anchor, size)
        return self.memory[self.text]


class WithoutCorrection(RememberedDraft):
    """Wrong: drafts are sampled with DSpark's correction, and judged without it."""

    def propose(self, tokens, auxiliary, count, choose):
        drafted, _ = super().propose(tokens, auxiliary, count, choose)
        return drafted, self.draft.logits(self.memory[self.text]).float()


@pytest.mark.parametrize("runs", [1_500, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["dflash", "dspark", "fewer tokens"])
def test_samples_are_the_targets(kind, runs, target, monkeypatch):
    """The first three tokens; the first is the target's own, the others are drafted."""
    draft, d2t = make_draft(target, **KINDS[kind])
    monkeypatch.setattr(decoding, "CachedTarget", RememberedTarget)
    monkeypatch.setattr(RememberedTarget, "memory", {})
    monkeypatch.setattr(RememberedDraft, "memory", {})
    prompt = [3, 4, 5]
    texts = torch.tensor([[*prompt, a, b] for a in range(SMALL) for b in range(SMALL)])
    with torch.inference_mode():
        p = target.model(texts).logits[:, 2:].softmax(-1).double().view(SMALL, SMALL, 3, SMALL)
    exact = p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]  # [first, second, third]
    generator = torch.Generator().manual_seed(0)
    rules = decoding.sampling(1.0, generator, vocabulary.target_ids(d2t), SMALL)

    def observed(cache):
        monkeypatch.setattr(decoding, "with_cache", cache)
        counts = torch.zeros(SMALL, SMALL, SMALL)
        accepted = []
        for _ in range(runs):
            reply, passes = decoding.speculate(target, draft, d2t, prompt, 2, 3, set(), *rules)
            counts[tuple(reply)] += 1
            accepted += passes
        return counts, accepted

    counts, accepted = observed(RememberedDraft)
    assert set(accepted) == {0, 1, 2} and accepted.count(2) > runs / 20
    for at in range(3):
        rest = [axis for axis in range(3) if axis != at]
        assert drafts.p_value(counts.sum(rest), exact.sum(rest)) > 1e-3
        assert drafts.p_value(counts.sum(at), exact.sum(at)) > 1e-3
    assert drafts.p_value(counts, exact) > 1e-3
    if draft.markov_head:
        counts, _ = observed(WithoutCorrection)
        assert drafts.p_value(counts.sum(0), exact.sum(0)) < 1e-6


def complete(config):
    """The configuration as a file has it."""
    keys = {
        "torch_dtype": "float32", "tie_word_embeddings": False, "attention_bias": False, "num_target_layers": 8,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if "markov_rank" in config:
        keys |= {"markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True}
    return config | keys


@pytest.mark.parametrize("kind", ["dflash", "dspark", "a window", "fewer tokens"])
@torch.no_grad()
def test_a_draft_that_is_written_and_read_in_either_form_drafts_the_same(kind, target, tmp_path):
    draft, d2t = make_draft(target, **KINDS[kind])
    config = complete(draft.config)
    tensors = draft.state_dict()
    if config["draft_vocab_size"] < SMALL:
        tensors["lm_head.weight"] = draft.head
    tensors = vocabulary.with_mapping(tensors, d2t, SMALL)
    draft_files.write_draft(tmp_path / "flat", config, tensors)
    named = {"target_model_path": "org/target", "target_architectures": ["LlamaForCausalLM"]}
    draft_files.write_speculators(tmp_path / "nested", config, tensors, embed_tokens=target.embedding, **named)
    prompt = [3, 4, 5, 6, 2, 4]
    auxiliary, _ = target.hidden_states(torch.tensor(prompt), [6])
    arguments = ([*prompt[1:], 4], auxiliary, draft.num_predictions(), decoding.greedy)
    expected, logits = decoding.with_cache(draft, d2t).propose(*arguments)
    for form in ("flat", "nested"):
        assert draft_files.check_draft(tmp_path / form) == []
        loaded = evaluate_draft.load_draft(*draft_files.read_draft(tmp_path / form), target)
        found, again = decoding.with_cache(*loaded).propose(*arguments)
        assert found == expected
        torch.testing.assert_close(again, logits)


def test_the_command_measures_a_written_draft(tmp_path, capfd):
    """Without a number it drafts all that a block makes; more, and trees, are refused."""
    tiny.write_target(tmp_path / "target")
    target = target_model.load(tmp_path / "target", layer_ids=[2, 6])
    size = target.config.hidden_size
    draft, d2t = make_draft(target, hidden_size=size, vocab_size=400, draft_vocab_size=400, markov_rank=4)
    config = complete(draft.config) | {"eos_token_id": 4}
    draft_files.write_draft(tmp_path / "draft", config, draft.state_dict())
    chats = tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(2))
    argv = ["--target_model_path", tmp_path / "target", "--draft_model_path", tmp_path / "draft", "--prompts", chats,
            "--max_new_tokens", 12, "--output", tmp_path / "out"]  # fmt: skip

    def measure(*flags):
        evaluate_draft.main(evaluate_draft.parse_args([str(part) for part in (*argv, *flags)]))

    measure()
    printed = capfd.readouterr().out
    assert "every text equals the target's own greedy text" in printed
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(figures["accepted_by_position"]) == 4 and figures["sglang_flags"] == {}
    assert figures["settings"]["num_draft_tokens"] == 4
    shares = figures["accepted_by_position"]
    measure("--num_draft_tokens", 2, "--temperature", 0.8)
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(figures["accepted_by_position"]) == 2
    assert "a block draft makes one chain a pass: drop --tree" in refused(capfd, measure, "--tree", "dynamic")
    line = refused(capfd, measure, "--num_draft_tokens", 5)
    assert line == "num_draft_tokens 5: a block of 4 drafts 4: give at most 4"

    tensors = {name: x for name, x in draft.state_dict().items() if not name.startswith("confidence_head.")}
    draft_files.write_draft(tmp_path / "draft", config | {"enable_confidence_head": False}, tensors)
    measure()
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert again["accepted_by_position"] == shares
