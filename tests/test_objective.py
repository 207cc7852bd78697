"""The objective against the slot-by-slot statement, and the invariances that follow from it."""

import pytest
import statement
import torch

import train_eagle3
from export_eagle3 import FLAGS, with_auxiliary_layers
from train_eagle3 import DraftModel, acceptance_walk, chain_lengths, objective, supervised_slots

ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
LENGTHS, VOCABULARY, DRAFT_VOCABULARY, STEPS, DECAY, TARGET_HIDDEN = (11, 41, 17), 48, 29, 5, 0.8, 24
OPTIONS = {
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "norm_before_residual": {"norm_before_residual": True},
    "two layers": with_auxiliary_layers({}, [2, 5]),
    "four layers with norms": with_auxiliary_layers({"fc_norm": True}, [1, 2, 4, 6]),
}


def draft_config(rope="default", **options):
    return {
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "rope_scaling": ROPES[rope], "max_position_embeddings": 64,
        "vocab_size": VOCABULARY, "draft_vocab_size": DRAFT_VOCABULARY, "hidden_act": "silu", **options,
    }  # fmt: skip


def case(rope="default", dtype=torch.float64, lengths=LENGTHS, seed=0, **options):
    """A draft with random weights; documents with two replies each and positions beyond max_position_embeddings / 2."""
    torch.manual_seed(seed)
    embedding = torch.randn(VOCABULARY, 24, dtype=torch.float64)
    draft = DraftModel(draft_config(rope, **options), embedding.to(dtype))
    layers = options.get("num_aux_hidden_states", 3)
    for parameter in draft.parameters():
        scale = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = (torch.randn_like(parameter, dtype=torch.float64) * scale).to(dtype)
    draft_ids = torch.randperm(VOCABULARY)[:DRAFT_VOCABULARY].sort().values
    documents = []
    for length in lengths:
        mask = torch.ones(length, dtype=torch.int64)
        mask[: length // 3] = 0
        mask[length // 2 : length // 2 + 2] = 0  # two replies
        documents.append({
            "ids": torch.randint(VOCABULARY, (length,)), "mask": mask,
            "auxiliary": torch.randn(length, layers * TARGET_HIDDEN, dtype=torch.float64),
            "logits": 3 * torch.randn(length, VOCABULARY, dtype=torch.float64),
        })  # fmt: skip
    return draft, embedding, documents, draft_ids


def inputs(documents, draft_ids, dtype, steps=STEPS):
    """The objective's arguments for documents put behind one another."""
    joined = {name: torch.cat([document[name] for document in documents]) for name in documents[0]}
    lengths = [len(document["ids"]) for document in documents]
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    logits = joined["logits"].to(dtype)
    return {
        "input_ids": joined["ids"],
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "document_ids": document_ids,
        "auxiliary": joined["auxiliary"].to(dtype),
        "teaching": (logits[:, draft_ids], logits.argmax(-1), logits.logsumexp(-1)),
        "supervised": supervised_slots(joined["mask"], document_ids, steps),
        "d2t": draft_ids - torch.arange(len(draft_ids)),
        "decay": DECAY,
    }


def gradients(draft):
    result = {name: parameter.grad.double().clone() for name, parameter in draft.named_parameters()}
    draft.zero_grad()
    return result


def relative(a, b):
    return float((a - b).norm() / b.norm())


def compare_with_statement(case, dtype, tolerance):
    """Loss, sums, accepted drafts and gradients are the statement's; returns its loss and number of accepted drafts."""
    draft, embedding, documents, draft_ids = case
    weights = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    expected, expected_sums, expected_accepted = statement.run(
        draft.config, weights, embedding, documents, draft_ids.tolist(), STEPS, DECAY
    )
    expected.backward()

    loss, sums, correct = objective(draft, **inputs(documents, draft_ids, dtype))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.tolist() == [pytest.approx(row, rel=1e-6, abs=1e-12) for row in expected_sums]
    assert chain_lengths(correct).tolist() == sum(expected_accepted, [])
    for name, gradient in gradients(draft).items():
        assert relative(gradient, weights[name].grad) < tolerance, name
        assert gradient.norm() > 0, f"{name} gets no gradient"
    return expected.item(), sum(map(sum, expected_accepted))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rope", ROPES)
def test_objective_and_gradients_equal_the_statement(rope, dtype, tolerance):
    _, accepted = compare_with_statement(case(rope, dtype), dtype, tolerance)
    assert accepted > 0, "a case without any accepted draft shows too little"


@pytest.mark.parametrize("option", OPTIONS)
def test_objective_and_gradients_with_an_option_equal_the_statement(option):
    draft, embedding, documents, draft_ids = case(**OPTIONS[option])
    expected, _ = compare_with_statement((draft, embedding, documents, draft_ids), torch.float64, 1e-6)
    flags = set(FLAGS) & set(OPTIONS[option])
    if flags:  # the comparison can fail: without the option the loss is another
        without = {key: value for key, value in draft.config.items() if key not in flags}
        weights = {name: p.detach() for name, p in draft.named_parameters()}
        loss = statement.run(without, weights, embedding, documents, draft_ids.tolist(), STEPS, DECAY)[0]
        assert abs(float(loss) / expected - 1) > 1e-4


def test_statement_tells_ropes_and_alignment_apart():
    """The comparison above can fail: another rope type, a shifted mask and a shifted teacher each change the loss."""
    draft, embedding, documents, draft_ids = case()
    weights = {name: p.detach() for name, p in draft.named_parameters()}

    def entropies(config=draft.config, **changed):
        changed_documents = [document | {key: f(document[key]) for key, f in changed.items()} for document in documents]
        sums = statement.run(config, weights, embedding, changed_documents, draft_ids.tolist(), STEPS, DECAY)[1]
        return torch.tensor([row[0] for row in sums])

    plain = entropies()
    others = [entropies(draft_config(rope)) for rope in ROPES if rope != "default"]
    for name, change in (
        ("mask", lambda m: m.roll(1)),
        ("logits", lambda z: z.roll(1, 0)),
        ("ids", lambda x: x.roll(1)),
    ):
        others.append(entropies(**{name: change}))
    assert all(((other / plain - 1).abs() > 1e-4).any() for other in others), (plain, others)


def test_packed_equals_one_by_one():
    draft, _, documents, draft_ids = case()
    packed, packed_sums, packed_correct = objective(draft, **inputs(documents, draft_ids, torch.float64))
    packed.backward()
    together = gradients(draft)
    singles = [objective(draft, **inputs([document], draft_ids, torch.float64)) for document in documents]
    sum(loss for loss, _, _ in singles).backward()
    assert float(packed) == pytest.approx(sum(float(loss) for loss, _, _ in singles), rel=1e-12)
    assert torch.equal(packed_correct, torch.cat([correct for _, _, correct in singles], dim=1))
    assert torch.allclose(packed_sums, sum(sums for _, sums, _ in singles), rtol=1e-12)
    for name, gradient in gradients(draft).items():
        assert relative(gradient, together[name]) < 1e-12, name


def test_supervised_slots_equal_the_rule():
    torch.manual_seed(1)
    for lengths in ((1,), (2, 1), (9, 3, 30), (5, 4)):
        masks = [(torch.rand(n) < 0.8).long() for n in lengths]
        document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        got = supervised_slots(torch.cat(masks), document_ids, 6)
        expected = [[statement.supervised(m.tolist(), j, i) for m in masks for j in range(len(m))] for i in range(6)]
        assert got.tolist() == expected
        assert (got[1:] <= got[:-1]).all(), "a dead chain came back to life"


def test_first_draft_after_a_prompt_and_the_end_of_turn_are_supervised():
    mask = [0, 0, 0, 1, 1, 1, 0, 0]  # x[3] is the first token of the reply, x[5] its end-of-turn
    live = supervised_slots(torch.tensor(mask), torch.zeros(8), 3)
    assert live[0].nonzero().flatten().tolist() == [2, 3]  # drafting x[4] and x[5]; x[3] is the target's own
    assert live[1].nonzero().flatten().tolist() == [2]
    assert not live[2].any()


def test_dead_slots_and_unsupervised_text_behind_a_reply_change_nothing():
    draft, _, documents, draft_ids = case(lengths=(20,))
    documents[0]["mask"][15:] = 0
    base = objective(draft, **inputs(documents, draft_ids, torch.float64))[0]
    documents[0]["auxiliary"][15:] = 7.0
    documents[0]["ids"][15:] = 3
    documents[0]["logits"][15:] = 0.0
    assert float(objective(draft, **inputs(documents, draft_ids, torch.float64))[0]) == float(base)


def test_acceptance_walk_by_hand():
    #       prompt | reply of 7 tokens at 2..8 | prompt | reply of one token, nothing to draft
    mask = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1]
    accepted = [9, 2, 9, 9, 0, 2, 9, 9, 9, 9, 9]
    # slot 1 accepts x[3] and x[4], the target adds x[5]; slot 4 accepts none, x[6] is the target's;
    # slot 5 accepts x[7] and x[8].
    assert acceptance_walk(accepted, mask) == [2, 0, 2]
    assert acceptance_walk([1, 0, 0], [1, 1, 1]) == [1]  # supervised from the first token on: slot 0 is the first
    assert acceptance_walk([], []) == []


def test_metric_values_are_sums_over_sums():
    values = train_eagle3.metric_values([[8.0, 2.0, 3.0, 4.0], [6.0, 1.0, 0.5, 2.0]], 5.0, [1.0, 0.5])
    assert values["loss"] == pytest.approx((8 + 0.5 * 6) / 4)
    assert (values["loss_1"], values["acc_0"], values["accept_1"]) == (3.0, 0.5, 0.25)
    assert values["chain_length"] == 1 + 5 / 4


def test_rotary_table_stays_exact_in_a_bf16_draft_at_long_positions():
    """DeepSpeed casts a module's buffers to bf16; a table made of such frequencies would be wrong by radians."""
    draft = case("llama3")[0].to(torch.bfloat16)
    positions = torch.tensor([0, 1, 1000, 60001, 131071])
    frequencies, scale = statement.frequencies(draft.config)
    angles = positions[:, None].double() * torch.tensor(frequencies * 2, dtype=torch.float64)
    cos, sin = draft.rotary(positions, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    for got, expected in ((cos, angles.cos() * scale), (sin, angles.sin() * scale)):
        # fp32 angles of up to 1e5 carry an error of 0.008, bf16 rounding another 0.004
        assert (got.double() - expected).abs().max() < 0.02
