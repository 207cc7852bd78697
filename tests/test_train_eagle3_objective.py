"""The objective against the slot-by-slot statement, and the invariances that follow from it."""

import functools

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import train_eagle3
from core import attention, draft_files, losses, slots, target_model
from helpers import flex, statement, training

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
    "two layers": draft_files.with_auxiliary_layers({}, [2, 5]),
    "four layers with norms": draft_files.with_auxiliary_layers({"fc_norm": True}, [1, 2, 4, 6]),
    "gelu": {"hidden_act": "gelu"},
    "qwen3": {"model_type": "qwen3"},
    "a window": draft_files.window_keys(6, [True]),
    "a window as short as a chain": draft_files.window_keys(STEPS, [True]),
    "its own embedding": {"embed_requires_grad": True},
    "draft of two layers": {"num_hidden_layers": 2},
    "three layers, the second with a window": {"num_hidden_layers": 3}
    | draft_files.window_keys(7, [False, True, False]),
    "two layers, the first with a window": {"num_hidden_layers": 2, "norm_before_residual": True}
    | draft_files.window_keys(9, [True, False]),
    "two qwen3 layers with a window and 3.1's norms": {
        "num_hidden_layers": 2, "model_type": "qwen3", "fc_norm": True, "norm_output": True,
        **draft_files.window_keys(8, [True, True]),
    },
    "two layers with all that vLLM serves": {
        "num_hidden_layers": 2, "model_type": "qwen3", "norm_before_residual": True, "norm_before_fc": True,
        "embed_requires_grad": True,
    },
}  # fmt: skip
SHAPING_OFF = {  # keys without which the loss is another, and how they are switched off
    **{name: {name: False} for name in draft_files.FLAGS if name != "embed_requires_grad"},
    "hidden_act": {"hidden_act": "silu"}, "model_type": {"model_type": "llama"},
    "layer_types": {"layer_types": None},
}  # fmt: skip


def draft_config(rope="default", **options):
    return {
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "rope_scaling": ROPES[rope], "max_position_embeddings": 64,
        "vocab_size": VOCABULARY, "draft_vocab_size": DRAFT_VOCABULARY, "hidden_act": "silu", **options,
    }  # fmt: skip


def case(rope="default", dtype=torch.float64, lengths=LENGTHS, seed=3, **options):
    """A draft with random weights; documents with two replies each and positions beyond max_position_embeddings / 2."""
    torch.manual_seed(seed)
    embedding = torch.randn(VOCABULARY, 24, dtype=torch.float64)
    draft = train_eagle3.DraftModel(draft_config(rope, **options), embedding.to(dtype))
    layers, head = (
        options.get("num_aux_hidden_states", 3),
        3 * torch.randn(VOCABULARY, TARGET_HIDDEN, dtype=torch.float64),
    )
    for parameter in draft.parameters():
        scale = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = (torch.randn_like(parameter, dtype=torch.float64) * scale).to(dtype)
    draft_ids = torch.randperm(VOCABULARY)[:DRAFT_VOCABULARY].sort().values
    documents = []
    for length in lengths:
        mask = torch.ones(length, dtype=torch.int64)
        mask[: length // 3] = 0
        mask[length // 2 : length // 2 + 2] = 0  # two replies
        last = torch.randn(length, TARGET_HIDDEN, dtype=torch.float64) / TARGET_HIDDEN**0.5
        documents.append(
            {
                "ids": torch.randint(VOCABULARY, (length,)),
                "mask": mask,
                "last": last,
                "head": head,
                "logits": last @ head.T,
                "auxiliary": torch.randn(length, layers * TARGET_HIDDEN, dtype=torch.float64),
            }
        )
    return draft, embedding, documents, draft_ids


def inputs(documents, draft_ids, dtype, steps=STEPS, windows=(0,), flags=(), epoch=0):
    """The objective's arguments for documents put behind one another; windows: of each layer of the draft."""
    joined = {
        name: torch.cat([document[name] for document in documents]) for name in ("ids", "mask", "auxiliary", "last")
    }
    args = training.flags("--ttt_length", steps, "--ttt_step_loss_decay", DECAY, *flags)
    rows = [(number, document["ids"], document["mask"]) for number, document in enumerate(documents)]
    batch = train_eagle3.batch_of(args, windows, trains=True)(rows, epoch)
    return {
        "input_ids": joined["ids"],
        "position_ids": torch.cat([torch.arange(len(document["ids"])) for document in documents]),
        "auxiliary": joined["auxiliary"].to(dtype),
        "last": joined["last"].to(dtype),
        "head": target_model.Head(documents[0]["head"].to(dtype)),
        "plan": batch.plan,
        "d2t": draft_ids - torch.arange(len(draft_ids)),
        "args": args,
    }


@pytest.fixture(params=["sdpa", "sdpa without a kernel", "flex_attention"])
def backend(request, monkeypatch):
    """Each way to attend, with chunks and blocks so small that documents have several of each."""
    sizes = {"QUERY_CHUNK": 5, "BLOCK": 8, "HEAD_ROWS": 16, "HEAD_TOKENS": 7, "PIECE_ROWS": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(losses if name == "PIECE_ROWS" else slots, name, size)
    if request.param == "sdpa without a kernel":
        monkeypatch.setattr(attention, "MASKED_KERNEL", ())
    monkeypatch.setattr(attention, "flex_attention", flex.in_plain_torch)
    return request.param.split()[0]


def gradients(draft):
    result = {name: parameter.grad.double().clone() for name, parameter in draft.named_parameters()}
    draft.zero_grad()
    return result


def relative(a, b):
    return float((a - b).norm() / b.norm())


def state(case, flags=()):
    """What the statement says about a case: loss, sums, accepted drafts of each slot, gradients by name."""
    args = training.flags(*flags)
    survival = args.step_weights == "survival"
    options = {
        "kind": args.loss,
        "survival_weights": survival,
        "by_sequence": args.loss_average == "sequences",
        "own_tokens": not args.use_off_policy_tokens,
    }
    draft, embedding, documents, draft_ids = case
    weights = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    constants = (draft_ids.tolist(), STEPS, DECAY)
    loss, sums, accepted, _ = statement.run(draft.config, weights, embedding, documents, *constants, **options)
    loss = torch.as_tensor(loss)  # a float if there is nothing to learn from
    if loss.requires_grad:
        loss.backward()
    return loss.item(), sums, sum(accepted, []), {name: weight.grad for name, weight in weights.items()}


def compare_with_statement(case, dtype, tolerance, stated=None, flags=()):
    """Loss, sums, accepted drafts and gradients are the statement's; returns its loss and number of accepted drafts."""
    draft, _, documents, draft_ids = case
    expected, expected_sums, expected_accepted, expected_gradients = stated or state(case, flags)
    windows = draft_files.windows(draft.config)
    arguments = inputs(documents, draft_ids, dtype, windows=windows, flags=flags)
    loss, sums, correct = train_eagle3.objective(draft, **arguments)
    loss.backward()
    assert float(sums["total"]) == loss.item()
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    found = zip(*(sums[name].tolist() for name in ("loss", "acc", "accept", "slots")), strict=True)
    assert [list(row) for row in found] == [pytest.approx(row, rel=1e-6, abs=1e-12) for row in expected_sums]
    assert train_eagle3.chain_lengths(correct).tolist() == expected_accepted
    for name, gradient in gradients(draft).items():
        if expected == 0:
            assert not gradient.any(), name
            continue
        assert relative(gradient, expected_gradients[name]) < tolerance, name
        assert gradient.norm() > 0, f"{name} gets no gradient"
    return expected, sum(expected_accepted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rope", ROPES)
def test_objective_and_gradients_equal_the_statement(rope, dtype, tolerance):
    _, accepted = compare_with_statement(case(rope, dtype), dtype, tolerance)
    assert accepted > 0, "a case without any accepted draft shows too little"


OBJECTIVES = {  # flags, options of the draft
    "kl": ("--loss kl", {}),
    "tv": ("--loss tv", {}),
    "lk": ("--loss lk", {}),
    "lk_hybrid": ("--loss lk_hybrid", {}),
    "survival": ("--step_weights survival", {}),
    "sequences": ("--loss_average sequences", {}),
    "own tokens": ("--use_off_policy_tokens false", {}),
    "lk, survival, sequences": ("--loss lk --step_weights survival --loss_average sequences", {"norm_output": True}),
    "tv, own tokens": ("--loss tv --use_off_policy_tokens false", {"fc_norm": True, "norm_output": True}),
    "lk_hybrid, survival, own tokens, two layers": (
        "--loss lk_hybrid --step_weights survival --use_off_policy_tokens false",
        {"num_hidden_layers": 2, "fc_norm": True},
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_equals_the_statement(name, monkeypatch):
    for size, value in {"HEAD_ROWS": 16, "HEAD_TOKENS": 7}.items():
        monkeypatch.setattr(slots, size, value)
    flags, options = OBJECTIVES[name]
    found = case("default", lengths=(9, 24, 12), **options)
    for checkpointing in (False, True):
        for layer in found[0].all_layers():
            layer.gradient_checkpointing = checkpointing
        compare_with_statement(found, torch.float64, 3e-6, flags=flags.split())


def project(found, loss):
    """Gradients in a random direction each, and the loss: [parameters + 1]."""
    generator = torch.Generator().manual_seed(0)
    values = [(found[name] * torch.randn(found[name].shape, generator=generator)).sum() for name in sorted(found)]
    return torch.stack([*values, torch.as_tensor(loss).detach()])


def check_mean(samples, exact):
    """The mean of samples [[n], ...] is `exact` [n] within its standard error."""
    samples = torch.stack(samples)
    deviation = samples.mean(0) - exact
    error = samples.std(0) / len(samples) ** 0.5
    assert (error > 0).all() and (deviation.abs() < 4 * error).all()
    assert (deviation / error).square().mean() < 3


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_drawn_chains_have_the_gradient_of_all(average):
    """Two slots of each document are drawn; over the epochs the mean is what the statement says of all slots."""
    flags = ("--loss_average", average)
    found = case("default", lengths=(8, 24, 12))
    draft, _, documents, draft_ids = found
    exact, _, _, exact_gradients = state(found, flags)
    every = inputs(documents, draft_ids, torch.float64, flags=flags)["plan"]
    samples = []
    drawn = set()
    for epoch in range(120):
        arguments = inputs(documents, draft_ids, torch.float64, flags=(*flags, "--max_chains", 2), epoch=epoch)
        loss, sums, _ = train_eagle3.objective(draft, **arguments)
        loss.backward()
        samples.append(project(gradients(draft), loss))
        drawn.update(arguments["plan"].live[: arguments["plan"].counts[0]].tolist())
        assert sums["slots"][0] == 6 < every.counts[0]
    assert drawn == set(every.live[: every.counts[0]].tolist())
    check_mean(samples, project(exact_gradients, exact))


def test_sampled_chains_have_the_gradient_of_survival_weights_for_less_work():
    """Over many draws: the mean gradient is the exact one within its standard error, and so is the number of rows."""
    draft, _, documents, draft_ids = case("default", lengths=(9, 15))
    draft.lm_head.weight.data *= 0.1
    for document in documents:  # acceptances that are neither small nor close to one
        document["head"] = 0.3 * document["head"]
        document["logits"] = 0.3 * document["logits"]
    flags = ("--step_weights", "survival")
    arguments = inputs(documents, draft_ids, torch.float64, flags=flags)
    loss, sums, _ = train_eagle3.objective(draft, **arguments)
    loss.backward()
    exact = gradients(draft)
    samples = []
    rows = []
    plan = arguments["plan"]
    for _ in range(100):
        draws = torch.rand(len(arguments["input_ids"]), dtype=torch.float64)
        arguments["plan"] = plan._replace(chains=plan.chains._replace(draws=draws))
        value, found, _ = train_eagle3.objective(draft, **arguments)
        value.backward()
        samples.append(project(gradients(draft), value))
        rows.append(found["slots"])
    check_mean(samples, project(exact, loss))

    # Independent of the program: the chance to reach a step from the statement's acceptances, slot by slot.
    rows = torch.stack(rows)
    reached = torch.tensor(statement_survivals(draft, documents, draft_ids), dtype=torch.float64)
    error = (reached / len(rows)).sqrt()  # at most, of independent slots
    assert ((rows.mean(0) - reached).abs() < 4 * error).all() and (rows[:, -1] > 0).any()
    assert reached.sum() < 0.6 * sums["slots"].sum(), "the case saves too little work to show anything"


@pytest.mark.parametrize("option", ["a window", "three layers, the second with a window"])
def test_chains_that_all_go_on_are_those_of_equal_weights(option, backend):
    """Planned step by step, and all at once: the same loss, sums and gradients, whichever way attends."""
    draft, _, documents, draft_ids = option_case(option)[0]
    draft.attention_backend = backend
    for layer in draft.all_layers():
        layer.gradient_checkpointing = backend != "sdpa"
    windows = draft_files.windows(draft.config)
    own = ("--use_off_policy_tokens", "false")
    arguments = inputs(documents, draft_ids, torch.float64, windows=windows, flags=("--ttt_step_loss_decay", 1, *own))
    loss, sums, correct = train_eagle3.objective(draft, **arguments)
    loss.backward()
    expected = gradients(draft)
    flags = ("--step_weights", "survival", *own)
    arguments = inputs(documents, draft_ids, torch.float64, windows=windows, flags=flags)
    plan = arguments["plan"]
    draws = torch.zeros(len(arguments["input_ids"]), dtype=torch.float64)
    arguments["plan"] = plan._replace(chains=plan.chains._replace(draws=draws))
    found, found_sums, found_correct = train_eagle3.objective(draft, **arguments)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-12) and torch.equal(found_correct, correct)
    assert all(torch.allclose(found_sums[name], sums[name]) for name in sums)
    assert all(relative(gradient, expected[name]) < 1e-12 for name, gradient in gradients(draft).items())


def statement_survivals(draft, documents, draft_ids):
    """Σ over slots of the product of the acceptances before each step, by the statement: [K]."""
    weights = {name: p.detach().double() for name, p in draft.named_parameters()}
    constants = (draft_ids.tolist(), STEPS, DECAY)
    return statement.run(draft.config, weights, draft.embedding.double(), documents, *constants)[3]


@functools.cache
def option_case(option):
    """(a case with an option, what the statement says about it)."""
    found = case("llama3", lengths=(9, 24, 12), **OPTIONS[option])
    return found, state(found)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_backend_with_an_option_and_checkpointing_equals_the_statement(option, backend):
    (draft, *rest), stated = option_case(option)
    draft.attention_backend = backend
    for layer in draft.all_layers():
        layer.gradient_checkpointing = backend != "sdpa"
    compare_with_statement((draft, *rest), torch.float64, 3e-6, stated)  # rotary frequencies are fp32


@pytest.mark.parametrize("option", [name for name, keys in OPTIONS.items() if SHAPING_OFF.keys() & keys.keys()])
def test_the_statement_tells_a_draft_with_an_option_from_one_without(option):
    draft, embedding, documents, draft_ids = option_case(option)[0]
    weights = {name: p.detach() for name, p in draft.named_parameters()}
    for key in SHAPING_OFF.keys() & OPTIONS[option].keys():
        without = draft.config | SHAPING_OFF[key]
        loss = statement.run(without, weights, embedding, documents[1:2], draft_ids.tolist(), STEPS, DECAY)[0]
        with_it = statement.run(draft.config, weights, embedding, documents[1:2], draft_ids.tolist(), STEPS, DECAY)[0]
        assert abs(float(loss) / float(with_it) - 1) > 1e-4, key


RAGGED = {  # loss masks of the documents of a micro-batch
    "one reply each": ["0001111111", "00000111111111111111111"],
    "everything": ["1" * 9, "1" * 17, "11"],
    "several replies": ["0011111001110", "000111101", "0111110000"],
    "one token": ["00010000", "0000"],
    "two tokens": ["000110000"],
    "every other token": ["01" * 9, "10" * 5],
    "replies of two and three": ["011001110110", "0111"],
    "unsupervised documents around": ["0000000", "00011111", "000", "01111111111", "00000"],
    "nothing": ["00000000", "000"],
    "a document of one token": ["1", "01111111111", "1"],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("spans", RAGGED)
def test_every_backend_with_ragged_spans_equals_the_statement(spans, backend, checkpointing):
    masks = [torch.tensor([int(x) for x in mask]) for mask in RAGGED[spans]]
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        draft, embedding, documents, draft_ids = case(dtype=dtype, lengths=[len(mask) for mask in masks])
        draft.attention_backend, draft.midlayer.gradient_checkpointing = backend, checkpointing
        for document, mask in zip(documents, masks, strict=True):
            document["mask"] = mask
        compare_with_statement((draft, embedding, documents, draft_ids), dtype, tolerance)


@pytest.mark.parametrize("windows", [(0,), (0, 140)])
def test_the_real_flex_attention_reads_the_block_mask_as_its_stand_in_does(windows, monkeypatch):
    """Forward only, which CPUs have; lengths of several blocks of the real size, several documents, ragged spans."""
    torch.manual_seed(0)
    lengths = (150, 7, 300, 129)
    mask = torch.cat([(torch.rand(n) < 0.9).long() for n in lengths])
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    plan = slots.plan_slots(slots.supervised_slots(mask, document_ids, 3), lengths, windows)
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    k, v = (torch.randn(sum(lengths), 2, 16) for _ in range(2))
    queries = [*enumerate(plan.live.split(plan.counts)), (0, torch.arange(sum(lengths)))]
    for window, view in plan.views.items():
        blocks = view.blocks.split([-(-len(live) // slots.BLOCK) for _, live in queries[: len(view.spans)]], dim=1)
        for (i, live), spans, block in zip(queries, view.spans, blocks, strict=len(windows) > 1):
            q, own = torch.randn(len(live), 4, 16), [torch.randn(len(live), 2, 3, 16) for _ in range(2)]
            begin = live - position_ids[live]
            if window:
                begin = begin.maximum(live + i + 1 - window)
            results = []
            for kernel in (flex_attention, flex.in_plain_torch):
                monkeypatch.setattr(attention, "flex_attention", kernel)
                results.append(attention.flex_slots(q, k, v, own, live, begin, block))
            results.append(attention.SlotAttention.apply(q, k, v, live, begin, spans, None, *own))
            assert torch.allclose(results[0], results[1], atol=1e-5)
            assert torch.allclose(results[2], results[1], atol=1e-5)


@pytest.mark.parametrize("loss", ["ce", "lk_hybrid"])  # which has all of the others in it but a logarithm
def test_each_loss_and_the_metrics_compile_to_the_same_numbers(loss):
    """On GPUs each is compiled into one kernel, forward and backward; the compiler takes the same code here."""
    torch.manual_seed(0)
    draft_ids = torch.arange(300)
    p, mass, best = torch.randn(5, 300).softmax(-1), torch.rand(5), torch.randint(300, (5,))
    results = []
    for compiled in (attention.compiled, lambda function: function):
        logits = (4 * torch.randn(5, 300, generator=torch.Generator().manual_seed(1))).requires_grad_()
        values = compiled(train_eagle3.LOSSES[loss])(logits, p, mass)
        values.sum().backward()
        metrics = compiled(train_eagle3.token_metrics)(logits.detach(), p, mass, best, draft_ids)
        results.append([values.detach(), logits.grad, *(value.float() for value in metrics.values())])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_another_token_loss_is_differentiated_chunk_by_chunk(monkeypatch):
    """Any function of logits and teacher: value and gradients are those of plain autograd over all rows at once."""
    torch.manual_seed(0)
    rows, size, columns = 40, 12, 9

    def token_loss(logits, p, mass):
        accepted = torch.minimum(p * mass[:, None], logits.softmax(-1)).sum(-1)
        return -accepted.clamp(min=1e-5).log() + 0.1 * logits.square().mean(-1)

    monkeypatch.setattr(losses, "PIECE_ROWS", 4)
    draft_ids = torch.arange(1, 2 * columns, 2)
    last = torch.randn(rows, size, dtype=torch.float64)
    head = target_model.Head(torch.randn(2 * columns, size, dtype=torch.float64))
    plan = slots.plan_slots(torch.tensor([[True] * (rows - 2) + [False] * 2] * 2), [rows])
    teacher = losses.Teacher(head, last, draft_ids)
    count = len(plan.live)
    weights = torch.rand(count, dtype=torch.float64)
    hidden = torch.randn(count, size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(columns, size, dtype=torch.float64, requires_grad=True)
    tokens = torch.empty(count, dtype=torch.int64)
    tokens[plan.order] = plan.teachers[plan.places]
    p, mass, best = teacher.read(tokens)
    expected = token_loss(hidden @ weight.T, p, mass)
    learnable = (best[:, None] == draft_ids).any(-1)
    assert 0 < learnable.sum() < count
    total = (expected * weights)[learnable].sum()
    gradients = torch.autograd.grad(total, (hidden, weight))

    loss, values = losses.head_loss(
        hidden.clone(), weight, weights, teacher, plan, token_loss, train_eagle3.token_metrics
    )
    found = torch.autograd.grad(loss, (hidden, weight))
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    assert torch.allclose(values["loss"], torch.where(learnable, expected, 0.0).detach(), rtol=1e-12)
    for got, wanted in zip(found, gradients, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_costs_none(monkeypatch):
    draft, _, documents, draft_ids = case()
    arguments = inputs(documents, draft_ids, torch.float64)
    train_eagle3.objective(draft, **arguments)[0].backward()
    expected = gradients(draft)
    draft.lm_head.requires_grad_(False)
    monkeypatch.setattr(losses, "add_product", None)  # which the head's gradient is added up by
    train_eagle3.objective(draft, **arguments)[0].backward()
    assert draft.lm_head.weight.grad is None or not draft.lm_head.weight.grad.any()
    for name, parameter in draft.named_parameters():
        assert name == "lm_head.weight" or torch.equal(parameter.grad, expected[name]), name


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
    packed, packed_sums, packed_correct = train_eagle3.objective(draft, **inputs(documents, draft_ids, torch.float64))
    packed.backward()
    together = gradients(draft)
    singles = [train_eagle3.objective(draft, **inputs([document], draft_ids, torch.float64)) for document in documents]
    sum(loss for loss, _, _ in singles).backward()
    assert float(packed) == pytest.approx(sum(float(loss) for loss, _, _ in singles), rel=1e-12)
    assert torch.equal(packed_correct, torch.cat([correct for _, _, correct in singles], dim=1))
    for name, value in packed_sums.items():
        assert torch.allclose(value, sum(sums[name] for _, sums, _ in singles), rtol=1e-12), name
    for name, gradient in gradients(draft).items():
        assert relative(gradient, together[name]) < 1e-12, name


def test_supervised_slots_equal_the_rule():
    torch.manual_seed(1)
    for lengths in ((1,), (2, 1), (9, 3, 30), (5, 4)):
        masks = [(torch.rand(n) < 0.8).long() for n in lengths]
        document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        got = slots.supervised_slots(torch.cat(masks), document_ids, 6)
        expected = [[statement.supervised(m.tolist(), j, i) for m in masks for j in range(len(m))] for i in range(6)]
        assert got.tolist() == expected
        assert (got[1:] <= got[:-1]).all(), "a dead chain came back to life"


def test_first_draft_after_a_prompt_and_the_end_of_turn_are_supervised():
    mask = [0, 0, 0, 1, 1, 1, 0, 0]  # x[3] is the first token of the reply, x[5] its end-of-turn
    live = slots.supervised_slots(torch.tensor(mask), torch.zeros(8), 3)
    assert live[0].nonzero().flatten().tolist() == [2, 3]  # drafting x[4] and x[5]; x[3] is the target's own
    assert live[1].nonzero().flatten().tolist() == [2]
    assert not live[2].any()


def test_dead_slots_and_unsupervised_text_behind_a_reply_change_nothing():
    draft, _, documents, draft_ids = case(lengths=(20,))
    documents[0]["mask"][15:] = 0
    base = train_eagle3.objective(draft, **inputs(documents, draft_ids, torch.float64))[0]
    documents[0]["auxiliary"][15:] = 7.0
    documents[0]["ids"][15:] = 3
    documents[0]["last"][15:] = 0.0
    assert float(train_eagle3.objective(draft, **inputs(documents, draft_ids, torch.float64))[0]) == float(base)


def test_acceptance_walk_by_hand():
    #       prompt | reply of 7 tokens at 2..8 | prompt | reply of one token, nothing to draft
    mask = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1]
    accepted = [9, 2, 9, 9, 0, 2, 9, 9, 9, 9, 9]
    # slot 1 accepts x[3] and x[4], the target adds x[5]; slot 4 accepts none, x[6] is the target's;
    # slot 5 accepts x[7] and x[8].
    assert slots.acceptance_walk(accepted, mask) == [2, 0, 2]
    assert slots.acceptance_walk([1, 0, 0], [1, 1, 1]) == [1]  # supervised from the first token on: slot 0 is the first
    assert slots.acceptance_walk([], []) == []


def test_metric_values_are_sums_over_sums():
    sums = {"loss": [8.0, 6.0], "acc": [2.0, 1.0], "accept": [3.0, 0.5], "slots": [4.0, 2.0], "chains": 5.0}
    values = train_eagle3.metric_values(sums | {"total": 11.0, "normaliser": 2.0})
    assert (values["loss"], values["live_0"], values["live_1"]) == (11 / 2, 1.0, 0.5)
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
