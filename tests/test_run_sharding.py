"""However ranks share the work and the target, the training is the same: losses, and weights after ten steps."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers

import train_eagle3
from core import dataloader
from helpers import tiny
from helpers.training import arguments, weights

SIZES = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 4,
    "initializer_range": 0.2,
}  # fmt: skip
TARGETS = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "moe": (transformers.Qwen3MoeConfig, {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
}
STEPS, SEQUENCES = 10, 8
# (target, ZeRO stage of the draft, flags) by the number of ranks
ZERO3 = ("--target_sharding", "zero3")
OFFLOAD = (*ZERO3, "--target_offload", "cpu")
RUNS = {
    1: [
        ("llama", 3, ZERO3), ("moe", 1, OFFLOAD), ("llama", 0, ()), ("qwen3", 1, ()), ("moe", 3, ()),
    ],
    2: [
        ("llama", 0, ()), ("qwen3", 1, ("--tp_size", 2)), ("moe", 2, ("--tp_size", 2)),
        ("llama", 3, ("--tp_size", 2, "--draft_micro_batch_size", 2)), ("qwen3", 2, ZERO3), ("moe", 3, ZERO3),
        ("llama", 1, (*OFFLOAD, "--batch_size", 3)),
    ],
    4: [
        ("llama", 2, ()), ("llama", 1, ("--tp_size", 2)), ("qwen3", 3, ("--tp_size", 2, "--total_seq_len", 256)),
        ("moe", 2, ("--tp_size", 2, "--batch_size", 1)), ("llama", 0, ("--tp_size", 4)), ("moe", 3, ("--tp_size", 4)),
        ("qwen3", 2, ("--tp_size", 4, "--draft_micro_batch_size", 2)), ("llama", 3, ZERO3), ("moe", 0, ZERO3),
        ("qwen3", 1, (*OFFLOAD, "--total_seq_len", 256)), ("llama", 3, OFFLOAD),
    ],
}  # fmt: skip


def rows():
    """Sequences of 8 to 200 tokens; two in five supervise nothing, so some ranks have steps without a slot."""
    random = torch.Generator().manual_seed(0)
    for number in range(48):
        length = int(torch.randint(8, 40 if number % 4 else 201, (), generator=random))
        ids = torch.randint(5, 400, (length,), generator=random).tolist()
        prompt = length - 1 if number % 5 < 2 else int(torch.randint(2, length - 4, (), generator=random))
        yield {"input_ids": ids, "loss_mask": [0] * prompt + [1] * (length - prompt)}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the targets and prepared data; and by target what one rank gives, with everything in its memory."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, (kind, options) in TARGETS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES, **options))
        model.save_pretrained(folder / name)
        tiny.tokenizer(400).save_pretrained(folder / name)
    tiny.write_jsonl(folder / "rows.jsonl", rows())
    for stage in range(4):
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    given = arguments(folder, folder / "prepared", "--dry_run", data=False)
    tiny.write_jsonl(folder / "five.jsonl", list(rows())[2::10])  # a rank of four has none in an evaluation's last step
    train = ["--dataset_train_split", folder / "rows.jsonl", "--dataset_validation_split", folder / "five.jsonl",
             "--target_model_path", folder / "llama"]  # fmt: skip
    train_eagle3.main(train_eagle3.parse_args(list(map(str, given + train))))
    for name in TARGETS:
        train_eagle3.main(train_eagle3.parse_args(command(folder, "one", name, 2)))
    return folder


def command(folder, output, target, stage, *flags):
    given = arguments(folder, output_of(folder, output, target, stage, *flags), data=False)
    given += ["--target_model_path", folder / target, "--data_path", folder / "prepared" / "data",
              "--total_steps", STEPS, "--draft_global_batch_size", SEQUENCES, "--log_steps", 1, "--learning_rate", 1e-3,
              "--deepspeed_config", folder / f"zero{stage}.json", *flags]  # fmt: skip
    return list(map(str, given))


def output_of(folder, output, target, stage, *flags):
    return folder / output / "-".join([target, str(stage), *(str(flag).lstrip("-") for flag in flags)])


def start(folder, ranks, runs):
    """All runs on so many ranks, started once."""
    several = [[*command(folder, str(ranks), *run, *flags), "--dist_timeout", "2"] for *run, flags in runs]
    return tiny.launch_many(ranks, several).stdout


def outcome(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines].count("validation") == 2 and len(lines) == STEPS + 2
    return lines, weights(folder / "final")


@pytest.mark.slow
def test_the_data_leave_ranks_without_a_slot_and_have_very_different_lengths(work):
    split = dataloader.open_data(work / "prepared" / "data")[0]["train"]
    for world in (2, 4):
        steps = dataloader.Steps(split, None, None, "train", 0, SEQUENCES, 1, 0, 0, world)
        slots = []
        for step in range(STEPS):
            rows = [itertools.chain(*lists) for lists in steps.assigned(step)]
            slots.append([sum(int(steps.row(number)[2][1:-1].sum()) for number in numbers) for numbers in rows])
        assert any(0 in each and sum(each) for each in slots)
    lengths = dataloader.measure_rows(split)[0]
    assert lengths.max() > 15 * lengths.min()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        (1, RUNS[1]),
        (4, RUNS[4][1:2]),
        (2, RUNS[2]),
        (4, RUNS[4][:1] + RUNS[4][2:]),
    ],
    ids=["1", "two groups of 2", "2", "4"],
)
def test_any_number_of_ranks_and_any_sharding_give_the_same_training(work, ranks, runs):
    start(work, ranks, runs)
    for target, stage, flags in runs:
        name = Path(
            command(work, str(ranks), target, stage, *flags)[command(work, "", target, stage).index("--output_dir") + 1]
        )
        expected, tensors = outcome(work / "one" / f"{target}-2")
        found, others = outcome(name)
        for key in expected[0]:
            if key not in ("split", "seconds", "tokens_per_second", "grad_norm", "lr"):
                values = [[row[key] for row in part] for part in (found, expected)]
                assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-7), (target, stage, flags, key)
        walks = [
            [row["acceptance_length"] for row in part if row["split"] == "validation"] for part in (found, expected)
        ]
        assert walks[0] == pytest.approx(walks[1], rel=1e-5), (target, stage, flags)
        assert others.keys() == tensors.keys()
        for tensor in tensors:
            gap = (others[tensor].double() - tensors[tensor]).norm() / tensors[tensor].double().norm()
            assert gap < 1e-5, (target, stage, flags, tensor, float(gap))
