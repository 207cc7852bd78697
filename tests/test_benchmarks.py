"""The dense reference against the slot-by-slot statement; the benchmark's counts against counting one by one."""

import re
import subprocess
import sys

import pytest
import torch

from helpers import dense, statement, tiny

sys.path.insert(0, str(tiny.REPOSITORY / "benchmarks"))  # it is not a package

import blocks as benchmark_blocks
import gpu
import objective
import operations
import scale
import step

import train_eagle3
from core import draft_files, target_model

LENGTHS, VOCABULARY, DRAFT_VOCABULARY, STEPS, DECAY, TARGET_HIDDEN = (9, 31, 1, 24), 8, 6, 4, 0.8, 16
OPTIONS = {
    "plain": {},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "norm_before_residual": {"norm_before_residual": True},
    "four layers with norms": draft_files.with_auxiliary_layers({"fc_norm": True}, [1, 2, 4, 6]),
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}
TINY = [
    "--shares=50", "--lengths=48", "--ttt_lengths=3", "--draft_vocab_sizes=64", "--hidden_size=32", "--rounds=1",
    "--intermediate_size=48", "--num_attention_heads=4", "--num_key_value_heads=2", "--head_dim=8", "--device=cpu",
    "--threads=1",
]  # fmt: skip

BLOCKS = [
    "--shares=50", "--lengths=48", "--hidden_size=32", "--rounds=1", "--intermediate_size=48", "--num_layers=2",
    "--num_attention_heads=4", "--num_key_value_heads=2", "--head_dim=8", "--vocab_size=64", "--block_size=4",
    "--max_anchors=6", "--device=cpu",
]  # fmt: skip


def case(dtype=torch.float64, softcap=None, **options):
    """Random draft, head and documents with two replies each: what dense.objective is called with."""
    torch.manual_seed(3)
    config = {
        "hidden_size": 16, "target_hidden_size": TARGET_HIDDEN, "intermediate_size": 24, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "rope_scaling": None,
        "max_position_embeddings": 64, "vocab_size": VOCABULARY, "draft_vocab_size": DRAFT_VOCABULARY,
        "hidden_act": "silu", **options,
    }  # fmt: skip
    draft = train_eagle3.DraftModel(config, torch.randn(VOCABULARY, 16, dtype=dtype))
    for parameter in draft.parameters():
        scale = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = torch.randn_like(parameter, dtype=dtype) * scale
    head = target_model.Head(
        torch.randn(VOCABULARY, TARGET_HIDDEN, dtype=dtype), torch.randn(VOCABULARY, dtype=dtype), 0.7, softcap
    )
    draft_ids = torch.randperm(VOCABULARY)[:DRAFT_VOCABULARY].sort().values
    masks = [[0] * (n // 3) + [1] * (n // 4) + [0] * 2 + [1] * n for n in LENGTHS]
    masks = [mask[:n] for mask, n in zip(masks, LENGTHS, strict=True)]
    total = sum(LENGTHS)
    return draft, masks, {
        "input_ids": torch.randint(VOCABULARY, (total,)),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]),
        "document_ids": torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
        "auxiliary": torch.randn(total, config.get("num_aux_hidden_states", 3) * TARGET_HIDDEN, dtype=dtype),
        "last": torch.randn(total, TARGET_HIDDEN, dtype=dtype), "head": head,
        "supervised": torch.tensor(live_slots(masks, STEPS)),
        "d2t": draft_ids - torch.arange(DRAFT_VOCABULARY), "decay": DECAY,
    }  # fmt: skip


def live_slots(masks, steps):
    """[K][T] bool by the rule, slot by slot."""
    return [[statement.supervised(m, j, i) for m in masks for j in range(len(m))] for i in range(steps)]


@pytest.mark.parametrize("option", OPTIONS)
def test_dense_reference_equals_the_statement(option):
    draft, masks, arguments = case(softcap=5.0 if option == "fc_norm" else None, **OPTIONS[option])
    head = arguments["head"]
    logits = head.scale * (arguments["last"] @ head.weight.T + head.bias)
    logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
    parts = [arguments["input_ids"], arguments["auxiliary"], logits]
    documents = [
        {"ids": ids, "mask": mask, "auxiliary": auxiliary, "logits": z}
        for mask, ids, auxiliary, z in zip(masks, *(part.split(LENGTHS) for part in parts), strict=True)
    ]
    weights = {name: p.detach().clone().requires_grad_() for name, p in draft.named_parameters()}
    draft_ids = (arguments["d2t"] + torch.arange(DRAFT_VOCABULARY)).tolist()
    expected, expected_sums, accepted, _ = statement.run(
        draft.config, weights, draft.embedding, documents, draft_ids, STEPS, DECAY
    )
    expected.backward()

    loss, sums, correct = dense.objective(draft, **arguments)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.tolist() == [pytest.approx(row, rel=1e-6, abs=1e-12) for row in expected_sums]
    assert correct.long().cumprod(0).sum(0).tolist() == sum(accepted, [])
    assert correct.any(), "a case without any correct draft shows too little"
    for name, parameter in draft.named_parameters():
        wanted = weights[name].grad
        assert wanted.norm() > 0 and (parameter.grad - wanted).norm() < 1e-6 * wanted.norm(), name


def test_scale_prints_both_tables(capsys, tmp_path):
    words = ["--ranks", "2", "--sequences", "3", "--rows", "500", "--output", str(tmp_path / "scale.md")]
    scale.main(scale.parse_args(words))
    printed = capsys.readouterr().out
    assert (tmp_path / "scale.md").read_text() in printed
    plan, start = ([line for line in printed.splitlines() if line.startswith(name)] for name in ("| 2 x 3", "| 500"))
    assert len(plan) == len(start) == 1 and plan[0].count("|") == 4 and start[0].count("|") == 6


def test_what_only_a_gpu_shows_is_tried_on_a_cpu(capsys, tmp_path, monkeypatch):
    words = [*TINY, "--tiny", "--output", str(tmp_path / "gpu.md")]
    with pytest.raises(SystemExit) as end:
        gpu.main(gpu.parse_args(words))
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    outcomes = dict(line.strip("| ").split(" | ") for line in lines if line.count("|") == 3)
    assert end.value.code == 0 and {outcomes[name] for name in gpu.CHECKS} == {"right", "left out: it needs a GPU"}
    assert sum(line.startswith(("| objective, ", "| target, ")) for line in lines) == 3

    # The comparison can fail: as if the objective were off, in a gradient.
    found = step.loss_and_gradients

    def off(case, side):
        loss, *gradients = found(case, side)
        return loss, *(x * (1.01 if side == "product" else 1) for x in gradients)

    monkeypatch.setattr(step, "loss_and_gradients", off)
    with pytest.raises(SystemExit) as end:
        gpu.main(gpu.parse_args(words))
    assert end.value.code == 1 and "off by 0.01, the dense form by" in capsys.readouterr().out


def test_dense_reference_works_in_bf16():
    draft, _, arguments = case()
    exact = dense.objective(draft, **arguments)[0].item()
    arguments |= {name: arguments[name].bfloat16() for name in ("auxiliary", "last")}
    arguments["head"] = target_model.Head(arguments["head"].weight.bfloat16(), arguments["head"].bias.bfloat16(), 0.7)
    draft.bfloat16().embedding = draft.embedding.bfloat16()
    loss, sums, _ = dense.objective(draft, **arguments)
    loss.backward()
    assert loss.dtype == torch.float32 and sums.dtype == torch.float64
    assert loss.item() == pytest.approx(exact, rel=0.02)


def count_one_by_one(config, masks, steps, naive):
    """Operations of every kind, forward and backward, with a loop over documents, slots and steps."""
    size, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    a, g = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    half = 2 * size if naive else size  # width that every slot and step projects
    done = dict.fromkeys(("fc", "q", "k, v", "attention", "o", "gate, up", "down", "head", "teacher"), 0)
    embedded_q, embedded_k = set(), set()
    for document, mask in enumerate(masks):
        live = [[statement.supervised(mask, j, i) for i in range(steps)] for j in range(len(mask))]
        for j, alive in enumerate(live):
            if any(row[0] for row in live[j:]):  # a later query sees this slot's step-0 key
                done["fc"] += 2 * 3 * config["target_hidden_size"] * size * 2
                done["k, v"] += 2 * half * g * 2 * 3
                embedded_k.add((document, j + 1))
            for i in range(steps):
                if not alive[i]:
                    continue
                done["q"] += 2 * half * a * 3
                if i > 0:
                    done["k, v"] += 2 * half * g * 2 * 3
                for _ in range(j + 1 + i):  # step-0 keys of slots 0 .. j, own keys of steps 1 .. i
                    done["attention"] += (2 * a + 2 * a) * 3
                done["o"] += 2 * a * size * 3
                done["gate, up"] += 2 * 2 * size * inner * 3
                done["down"] += 2 * inner * size * 3
                done["head"] += 2 * size * config["draft_vocab_size"] * 3
                embedded_q.add((document, j + 1 + i))
                embedded_k.add((document, j + 1 + i))
    done["teacher"] = len(embedded_q) * 2 * config["target_hidden_size"] * config["vocab_size"]
    if not naive:
        done["q of embeddings"] = len(embedded_q) * 2 * size * a * 3
        done["k, v of embeddings"] = len(embedded_k) * 2 * size * g * 2 * 3
    return done


@pytest.mark.parametrize("naive", [False, True])
def test_counted_operations_equal_counting_one_by_one(naive):
    args = step.parse_args(TINY)
    config = objective.draft_config(args, 40) | {"target_hidden_size": 24, "num_attention_heads": 6}
    reply = [0] * 5 + [1] * 9
    for masks in ([reply], [reply, [0] * 6, [1] * 4, [1], [1, 0] * 6, reply + reply + [0] * 3], [[0] * 8]):
        supervised = objective.supervised_of(masks, 4)
        products = operations.count_products(config, supervised, [len(mask) for mask in masks], naive)
        counted = {product.name: product.operations * (1 + product.backward) for product in products}
        assert counted == count_one_by_one(config, masks, 4, naive)
        assert operations.total_operations(products) == sum(counted.values())


def test_counts_at_the_sizes_of_the_table():
    """The weights' products alone are the prototype's 1.35, 0.69 and 0.21 TFLOP at 100, 50 and 15 per cent."""
    args = step.parse_args(["--table"])
    assert (args.lengths, args.ttt_lengths, args.draft_vocab_sizes) == ([1024], [7], [16000])
    config = objective.draft_config(args, 16000)
    for share, published, attention in ((100.0, 1.35, 0.045), (50.0, 0.69, 0.034), (15.0, 0.21, 0.012)):
        supervised = objective.supervised_of([objective.tail(1024, share)], 7)
        strict, naive = (operations.count_products(config, supervised, [1024], naive) for naive in (False, True))
        attending = 3 * next(product.operations for product in naive if product.name == "attention") / 1e12
        total = operations.total_operations(naive) / 1e12
        assert total - attending == pytest.approx(published, rel=0.03)
        assert attending == pytest.approx(attention, rel=0.03)
        assert 0.95 * total < operations.total_operations(strict) / 1e12 < total


def test_floor_is_operations_over_measured_rates():
    products = [
        operations.Product("all", 12, 2, (1, 1, 1, 1)),
        operations.Product("no input gradient", 6, 1, (1, 1, 1, 2)),
        operations.Product("forward", 4, 0, (1, 1, 1, 2)),
    ]
    rates = {((1, 1, 1, 1), name): rate for name, rate in zip(operations.PASSES, (1.0, 2.0, 4.0), strict=True)}
    rates |= {((1, 1, 1, 2), "forward"): 2.0, ((1, 1, 1, 2), "weight gradient"): 3.0}
    assert operations.floor_seconds(products, rates) == 12 + 6 + 3 + 3 + 2 + 2


def table(text):
    """[{column: cell}] of the one Markdown table in a report."""
    header, _, *rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.slow
def test_objective_writes_a_table_with_every_column(tmp_path):
    command = [sys.executable, str(tiny.REPOSITORY / "benchmarks" / "step.py"), "objective", *TINY]
    command += ["--output", str(tmp_path / "table.md")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = (tmp_path / "table.md").read_text()
    (row,) = table(report)
    assert list(row) == list(step.COLUMNS)
    assert all(float(cell.replace(",", "")) >= 0 for cell in row.values()), row
    assert (row["share %"], row["tokens"], row["K"], row["draft vocab"]) == ("50", "48", "3", "64")
    assert float(row["dense/product"]) == pytest.approx(float(row["dense s"]) / float(row["product s"]), rel=0.02)
    assert f"torch {torch.__version__}" in report and re.search(r"\d{4}-\d\d-\d\d", report)


@pytest.mark.slow
def test_another_checkout_is_measured_in_turn(capsys):
    """This one stands in for the other: the same numbers, and every column is filled, in both dtypes."""
    step.main(step.parse_args(["objective", *TINY, "--other", str(tiny.REPOSITORY)]))
    rows = table(capsys.readouterr().out)
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert list(row) == list(step.OTHER_COLUMNS)
        assert float(row["this/other"]) == pytest.approx(float(row["this s"]) / float(row["other s"]), rel=0.02)
        assert float(row["other MiB"].replace(",", "")) > 0 and row["loss difference"] == "0"


def test_another_checkout_has_to_be_one(tmp_path, capsys):
    for argv, words in ((["objective"], "is not a checkout"), (["prompt"], "measures the objective, not prompt")):
        with pytest.raises(SystemExit) as stop:
            step.parse_args([*argv, "--other", str(tmp_path)])
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_dense_is_left_out_where_its_memory_does_not_suffice(monkeypatch):
    monkeypatch.setattr(objective, "proc_bytes", lambda *_: 1000)
    args = step.parse_args([*TINY, "--skip_memory"])
    args.threads = 1
    row = step.measure(args, 50.0, 48, 3, 64)
    assert row["dense s"] == "needs 0.0 GiB" and row["product s"] > 0 and "dense/product" not in row


def test_prompt_and_end_to_end_write_their_tables(capsys):
    flags = [*TINY, "--conversations", "2", "--prompt_length", "8", "--reply_length", "8", "--total_seq_len", "128"]
    for mode in ("prompt", "end_to_end"):
        step.main(step.parse_args([mode, *flags, "--steps", "1"]))
        text = capsys.readouterr().out
        rows = table(text)
        if mode == "prompt":
            assert [row["prompt tokens"] for row in rows] == ["8", "16"] and float(rows[1]["ratio"]) > 0
        else:
            assert list(rows[0]) == list(step.END_COLUMNS) and len(rows) == 1
            shares = [float(rows[0][f"{phase} %"]) for phase in step.PHASES]
            assert sum(shares) == pytest.approx(100, abs=5)
            gaps = re.findall(r"loss (\S+), worst gradient (\S+)  ", text)
            assert len(gaps) == 2 and all(float(gap) < 1e-4 for pair in gaps for gap in pair)


def test_a_wrong_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        step.parse_args(["objective", "--shares", "much"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


# --- blocks ---


def test_products_of_blocks_are_those_that_are_counted_one_by_one():
    """Each query of a block sees the tokens before its anchor and its block; each projection is counted by hand."""
    args = benchmark_blocks.parse_args(BLOCKS)
    case = benchmark_blocks.make_case(args, 48, 50.0)
    plan = case["batch"].plan
    products = benchmark_blocks.count_products(case["draft"].config, plan, 48)
    counted = {product.name: product.operations for product in products}
    slots_of_blocks = [slot for slot in plan.slots.tolist() for _ in range(4)]
    pairs = sum(slot + 1 + 4 for slot in slots_of_blocks)
    assert counted["attention"] == 2 * 2 * 2 * pairs * 8 * 4  # two layers, scores and values
    assert counted["q"] == 2 * 2 * len(slots_of_blocks) * 32 * 32
    assert counted["k, v"] == 2 * 2 * 2 * (max(plan.slots.tolist()) + 1 + len(slots_of_blocks)) * 32 * 16
    assert counted["head"] == 2 * 3 * len(plan.slots) * 32 * 64


@pytest.mark.slow
def test_benchmark_of_blocks_has_every_column(capsys):
    command = [sys.executable, str(tiny.REPOSITORY / "benchmarks" / "blocks.py"), *BLOCKS]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert len(cells) == len(benchmark_blocks.COLUMNS) and "-" not in cells


# --- hidden states on disk ---


def benchmark(*argv, timeout=300):
    command = [sys.executable, tiny.REPOSITORY / "benchmarks" / "hidden_states.py", *map(str, argv)]
    variables = tiny.environment()
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_benchmark_counts_the_bytes_of_a_token():
    """By hand: 5 bytes of token and mask; 4 layers, the last only of supervised tokens; fp8 has 4 bytes of scale."""
    lines = benchmark("size", "--hidden_size", 512, "--tokens", 1000, "--shares", 50).splitlines()
    header = next(line for line in lines if line.startswith("| supervised"))
    found = dict(zip(re.findall(r"\w+", header)[1:], re.findall(r"([\d,]+) \(", lines[-1]), strict=True))
    for dtype, size in (("bfloat16", 1024), ("float16", 1024), ("float32", 2048), ("fp8", 516)):
        assert int(found[dtype].replace(",", "")) == pytest.approx(5 + 3.5 * size, rel=0.01), dtype


@pytest.mark.slow
def test_benchmark_measures_the_waiting(tmp_path):
    target = tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(16, 2))
    flags = ["--target_model_path", target, "--dataset_train_split", tmp_path / "chats.jsonl", "--ttt_length", 3,
             "--output_dir", tmp_path / "out", "--hidden_states_path", tmp_path / "states", "--on_generate", "cache",
             "--total_steps", 6]  # fmt: skip
    printed = benchmark("wait", "--skip", 2, *flags)
    assert re.search(r"data waiting: \d+\.\d\d% of a step; 4 steps of \d+ ms", printed), printed[-500:]
