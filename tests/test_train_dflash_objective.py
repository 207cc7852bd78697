"""The objective of block drafts against the plain statement, and what follows from it."""

import pytest
import torch

import train_dflash
import train_eagle3
from core import attention, block_files, blocks, dataloader, draft_files, losses, slots, target_model
from helpers import block_dense, block_statement, flex

LENGTHS, HIDDEN, VOCABULARY, DRAFT_VOCABULARY, MASK = (11, 20), 16, 32, 23, 31
CASES = {  # options of the draft, flags
    "dflash": ({}, ""),
    "dpace": ({}, "--position_weights dpace"),
    "kl": ({}, "--loss kl"),
    "tv, dpace": ({}, "--loss tv --position_weights dpace"),
    "lk": ({}, "--loss lk --dflash_decay_gamma 2"),
    "lk_hybrid": ({}, "--loss lk_hybrid"),
    "a window": (draft_files.window_keys(5, [True, True]), ""),
    "one of two layers with a window": (draft_files.window_keys(5, [False, True]), "--position_weights dpace"),
    "all layers causal": ({"is_causal": True}, ""),
    "a window that is not causal": (draft_files.window_keys(5, [True, True]) | {"is_causal": False}, ""),
    "full vocabulary": ({"draft_vocab_size": VOCABULARY}, ""),
    "dspark": ({"markov_rank": 6}, "--algorithm dspark"),
    "dspark, dpace, kl": ({"markov_rank": 6}, "--algorithm dspark --position_weights dpace --loss kl"),
    "dspark with a window": ({"markov_rank": 6, **draft_files.window_keys(5, [True, True])}, "--algorithm dspark"),
}  # fmt: skip


def draft_config(**options):
    architecture = block_files.ARCHITECTURES["dspark" if "markov_rank" in options else "dflash"]
    config = {
        "architectures": [architecture], "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": 24,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "block_size": 4,
        "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "rope_scaling": None, "max_position_embeddings": 64,
        "vocab_size": VOCABULARY, "draft_vocab_size": DRAFT_VOCABULARY, "hidden_act": "silu", "mask_token_id": MASK,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2, 4]}, "target_layer_ids": [0, 2, 4],
        "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    return config | options


def make_case(dtype=torch.float64, lengths=LENGTHS, **options):
    """A draft with random weights; documents with two replies each, some too short for a complete block."""
    torch.manual_seed(4)
    config = draft_config(**options)
    columns = config["draft_vocab_size"]
    embedding = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)
    head = 3 * torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)
    draft_ids = torch.randperm(VOCABULARY)[:columns].sort().values
    draft = train_dflash.DraftModel(config, embedding.to(dtype), head[draft_ids].to(dtype))
    for parameter in draft.parameters():
        scale = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = (torch.randn_like(parameter, dtype=torch.float64) * scale).to(dtype)
    documents = []
    for length in lengths:
        mask = torch.ones(length, dtype=torch.int64)
        mask[: length // 4] = 0
        mask[length // 3 : length // 3 + 2] = 0  # two replies
        last = torch.randn(length, HIDDEN, dtype=torch.float64) / HIDDEN**0.5
        documents.append(
            {
                "ids": torch.randint(VOCABULARY, (length,)),
                "mask": mask,
                "last": last,
                "logits": last @ head.T,
                "auxiliary": torch.randn(length, 3 * HIDDEN, dtype=torch.float64),
            }
        )
    return draft, embedding, head, documents, draft_ids


def parse(flags=""):
    return train_dflash.parse_args(["--target_model_path", "target", *flags.split()])


def make_inputs(case, flags="", trains=True):
    """The objective's arguments for the documents of a case, concatenated."""
    draft, _, head, documents, draft_ids = case
    dtype = draft.fc.weight.dtype
    args = parse(flags)
    rows = [(number, document["ids"], document["mask"]) for number, document in enumerate(documents)]
    batch = train_dflash.batch_of(args, draft, trains)(rows, 0)
    joined = {name: torch.cat([document[name] for document in documents]) for name in ("auxiliary", "last")}
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "auxiliary": joined["auxiliary"].to(dtype),
        "last": joined["last"].to(dtype),
        "head": target_model.Head(head.to(dtype)),
        "plan": batch.plan,
        "d2t": draft_ids - torch.arange(len(draft_ids)),
        "args": args,
    }


def complete(mask, anchor, count):
    """Whether the block at an anchor lies in its reply, with `count` predictions."""
    return anchor > 0 and anchor + count < len(mask) and bool(mask[anchor : anchor + count + 1].all())


def state(case, flags="", fewest=None):
    """What the statement says about a case; fewest: predictions that a block needs, none: all of them."""
    draft, embedding, head, documents, draft_ids = case
    args = parse(flags)
    count = draft.num_predictions()
    weights = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    anchors = [
        [a for a in range(len(document["ids"])) if complete(document["mask"], a, fewest or count)]
        for document in documents
    ]
    config = draft.config
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    causal = [config["is_causal"]] * 2 if "is_causal" in config else sliding
    loss, sums, accepted = block_statement.run(
        config, weights, embedding, head[draft_ids], documents, draft_ids.tolist(), anchors, causal, MASK,
        args.algorithm == "dspark", args.position_weights, args.dflash_decay_gamma, args.loss,
    )  # fmt: skip
    loss.backward()
    return loss.item(), sums, accepted, {name: weight.grad for name, weight in weights.items()}


def compare(case, flags="", tolerance=1e-6):
    """Loss, sums, accepted drafts and gradients are the statement's."""
    draft, _, _, documents, _ = case
    stated, stated_sums, stated_accepted, stated_gradients = state(case, flags)
    loss, sums, correct = draft(**make_inputs(case, flags))
    loss.backward()
    assert float(sums["total"]) == loss.item()
    assert loss.item() == pytest.approx(stated, rel=tolerance)
    found = zip(*(sums[name].tolist() for name in ("loss", "acc", "accept", "top", "slots")), strict=True)
    assert [list(row) for row in found] == [pytest.approx(row, rel=tolerance, abs=1e-12) for row in stated_sums]
    lengths = train_eagle3.chain_lengths(correct).split([len(document["ids"]) for document in documents])
    for (number, anchor), count in stated_accepted.items():
        assert lengths[number][anchor - 1] == count, (number, anchor)
    for name, parameter in draft.named_parameters():
        gradient = parameter.grad.double()
        assert gradient.norm() > 0, f"{name} gets no gradient"
        difference = (gradient - stated_gradients[name]).norm() / stated_gradients[name].norm()
        assert difference < tolerance, name
    draft.zero_grad()


@pytest.fixture(params=["sdpa", "sdpa without a kernel", "flex_attention"])
def backend(request, monkeypatch):
    """Each way to attend, with chunks and blocks so small that documents have several of each."""
    sizes = {"QUERY_CHUNK": 10, "BLOCK": 4, "HEAD_ROWS": 16, "HEAD_TOKENS": 7}
    for name, size in sizes.items():
        monkeypatch.setattr(slots, name, size)
    monkeypatch.setattr(losses, "PIECE_ROWS", 4)
    if request.param == "sdpa without a kernel":
        monkeypatch.setattr(attention, "MASKED_KERNEL", ())
    monkeypatch.setattr(attention, "flex_attention", flex.in_plain_torch)
    return request.param.split()[0]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_the_statement(name):
    options, flags = CASES[name]
    compare(make_case(**options), flags)


@pytest.mark.parametrize("name", ["dflash", "one of two layers with a window", "dspark, dpace, kl"])
def test_every_way_to_attend_equals_the_statement(name, backend):
    options, flags = CASES[name]
    case = make_case(**options)
    case[0].attention_backend = backend
    compare(case, flags)


@pytest.mark.parametrize("name", ["dflash", "dspark with a window"])
def test_recomputed_layers_and_fp32_equal_the_statement(name):
    options, flags = CASES[name]
    case = make_case(torch.float32, **options)
    for layer in case[0].layers:
        layer.gradient_checkpointing = True
    compare(case, flags, tolerance=1e-4)


def test_packed_documents_equal_one_by_one():
    draft, embedding, head, documents, draft_ids = make_case()
    packed, _, _ = draft(**make_inputs((draft, embedding, head, documents, draft_ids)))
    alone = [draft(**make_inputs((draft, embedding, head, [document], draft_ids)))[0] for document in documents]
    assert packed.item() == pytest.approx(sum(loss.item() for loss in alone), rel=1e-12)


def test_tokens_behind_an_anchor_change_nothing_in_its_block():
    """Of DFlash neither the tokens nor the states from the anchor on are read, but the anchor itself."""
    case = make_case(lengths=(20,))
    draft = case[0]
    inputs = make_inputs(case)
    plan = inputs["plan"]
    anchor = int(plan.slots[0]) + 1

    def first_block(arguments):
        context = draft.features(arguments["auxiliary"])
        hidden = draft.embed(arguments["input_ids"][plan.slots + 1], draft.block_size)
        return train_dflash.run_layers(draft, plan, arguments["position_ids"], context, hidden)[0]

    before = first_block(inputs)
    inputs["auxiliary"] = inputs["auxiliary"].clone()
    inputs["auxiliary"][anchor:] += 1
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][anchor + 1 :] = 0
    assert torch.equal(first_block(inputs), before)
    inputs["auxiliary"][anchor - 1] += 1
    assert not torch.allclose(first_block(inputs), before)


def test_a_causal_block_of_fewer_masks_is_the_beginning_of_a_longer_one():
    long = make_case(lengths=(20,), is_causal=True)
    short = make_case(lengths=(20,), is_causal=True, block_size=3)
    inputs = make_inputs(long)

    def outputs(case):
        draft = case[0]
        context = draft.features(inputs["auxiliary"])
        hidden = draft.embed(inputs["input_ids"][inputs["plan"].slots + 1], draft.block_size)
        return train_dflash.run_layers(draft, inputs["plan"], inputs["position_ids"], context, hidden)

    torch.testing.assert_close(outputs(long)[:, :3], outputs(short), rtol=1e-12, atol=1e-12)


def test_dpace_weights_are_the_sums_of_products():
    top = torch.tensor([[0.2, 0.9, 0.4], [0.5, 0.1, 0.3]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    r = [[0.6, 0.95, 0.7], [0.75, 0.55, 1.0]]
    first = [r[0][0], r[0][0] * r[0][1], r[0][0] * r[0][1] * r[0][2]]
    second = [r[1][0], r[1][0] * r[1][1]]
    expected = [[sum(first), sum(first[1:]), first[2]], [sum(second), second[1], 0.0]]
    assert train_dflash.dpace_weights(top, valid).tolist() == [pytest.approx(row) for row in expected]


def test_anchors_lie_in_replies_with_their_block_and_are_drawn_anew_in_each_epoch():
    """At most max_anchors of each sequence, the same whatever else is in the batch."""
    draft = make_case(lengths=(11,))[0]
    args = parse("--max_anchors 3 --seed 5")
    collate = train_dflash.batch_of(args, draft, trains=True)
    masks = [torch.tensor([0] * 4 + [1] * 9 + [0] * 3 + [1] * 4 + [0, 1]), torch.tensor([1] * 12)]
    rows = [(number, torch.arange(len(mask)), mask) for number, mask in enumerate(masks)]
    both = collate(rows, 0)
    alone = collate(rows[1:], 0)
    first = len(masks[0])
    assert both.plan.slots[both.plan.slots >= first].tolist() == (alone.plan.slots + first).tolist()
    drawn = set()
    for epoch in range(60):
        anchors = (collate(rows, epoch).plan.slots + 1).tolist()
        inside = [a for a in anchors if a < first]
        assert len(inside) == 3 and len(anchors) == 6
        drawn.update(anchors)
    allowed = {a for a in range(first) if complete(masks[0], a, 3)}
    allowed |= {first + a for a in range(12) if complete(masks[1], a, 3)}
    assert drawn == allowed


def test_the_walk_has_a_block_at_each_token_of_a_reply():
    case = make_case()
    stated = state(case, fewest=1)
    loss, sums, correct = case[0](**make_inputs(case, trains=False))
    assert loss.item() == pytest.approx(stated[0], rel=1e-6)
    lengths = train_eagle3.chain_lengths(correct).split([len(document["ids"]) for document in case[3]])
    assert {key: int(lengths[key[0]][key[1] - 1]) for key in stated[2]} == stated[2]


def test_a_batch_without_blocks_has_a_loss_of_zero_and_gradients():
    case = make_case(lengths=(9,))
    case[3][0]["mask"][:] = 0
    loss, sums, _ = case[0](**make_inputs(case))
    loss.backward()
    assert loss.item() == 0 and not sums["slots"].any()
    assert all(p.grad is not None and not p.grad.any() for p in case[0].parameters())


def test_blocks_of_one_prediction_are_where_chains_of_one_step_are():
    """A block of an anchor and a mask has EAGLE-3's slots of step 0, and their teachers."""
    masks = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1])
    lengths = [7, 5]
    supervised = slots.supervised_slots(masks, slots.documents_of(lengths), 1)
    plan = blocks.plan_blocks(supervised, supervised[0], lengths, (0,), 2)
    chains = slots.plan_slots(supervised, lengths)
    assert plan.slots.tolist() == chains.live.tolist() and plan.teachers.tolist() == chains.teachers.tolist()


def test_chunks_of_the_head_are_whole_blocks(monkeypatch):
    monkeypatch.setattr(slots, "HEAD_ROWS", 16)
    monkeypatch.setattr(slots, "HEAD_TOKENS", 7)
    places = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4], [4, 5, 6, 7], [8, 9, 10, 11], [9, 10, 11, 12]])
    assert blocks.cut_chunks(places) == [(0, 5, 0, 8), (4, 8, 8, 12), (8, 13, 12, 20)]
    assert dataloader.FORMAT_VERSION == 3, "plans are not a part of the data"


@pytest.mark.parametrize("lengths", [(40,), (17, 30)])
def test_the_dense_form_of_the_benchmark_is_the_same_objective(lengths):
    case = make_case(lengths=lengths)
    inputs = make_inputs(case)
    product, _, _ = case[0](**inputs)
    documents = slots.documents_of(list(lengths))
    plan, args = inputs.pop("plan"), inputs.pop("args")
    anchors = plan.slots + 1
    options = {"anchors": anchors, "gamma": args.dflash_decay_gamma, "mask_token": MASK}
    dense = block_dense.objective(case[0], document_ids=documents, **options, **inputs)
    assert product.item() == pytest.approx(dense.item(), rel=1e-7)
    found = [torch.autograd.grad(loss, list(case[0].parameters())) for loss in (product, dense)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
