"""train_eagle3.py through its command line: runs and their files, bad input, the same numbers on one rank and two."""

import json
import shutil

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import evaluate_draft
import prepare_data
import train_eagle3
from core import draft_files, foreign_flags, optimization, states
from helpers import tiny, training
from helpers.training import STEPS, arguments, furthest, recorded_gradients, run, weights


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A workspace, and in first/ a run of one step that prepared its data itself."""
    folder = training.write_workspace(tmp_path_factory.mktemp("train"))
    splits = (
        "--dataset_train_split",
        folder / "train.jsonl",
        "--dataset_validation_split",
        folder / "validation.jsonl",
    )
    run(folder, folder / "first", "--total_steps", 1, *splits, data=False)
    return folder


# --- a run and what it leaves behind ---


def test_run_leaves_checkpoints_metrics_and_settings(work, tmp_path, capsys):
    rows = run(
        work,
        tmp_path / "out",
        "--num_epochs",
        2,
        "--log_steps",
        2,
        "--draft_vocab_size",
        200,
        "--report_to",
        "tensorboard",
        "--draft_global_batch_size",
        4,
    )
    printed, out = capsys.readouterr().out, tmp_path / "out"
    per_epoch = -(-22 // 4)
    assert f"steps       {per_epoch} an epoch, {2 * per_epoch} in all" in printed
    for name in (f"step_{per_epoch:08d}", f"step_{2 * per_epoch:08d}", "final", "latest"):
        assert draft_files.check_draft(out / name) == [], name
    assert (out / "latest").resolve().name == f"step_{2 * per_epoch:08d}"
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "something half-built was left behind"
    assert furthest(weights(out / "final"), weights(out / "latest")) == 0
    assert furthest(weights(out / "final"), weights(out / f"step_{per_epoch:08d}")) > 0
    assert json.loads((out / "latest" / "trainer_state.json").read_text())["step"] == 2 * per_epoch

    train_rows = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train_rows] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [per_epoch, 2 * per_epoch]
    names = {f"{name}_{i}" for name in ("loss", "acc", "accept") for i in range(STEPS)}
    assert names | {"loss", "chain_length", "lr", "grad_norm", "tokens_per_second", "seconds"} <= train_rows[0].keys()
    assert names | {"loss", "chain_length", "acceptance_length", "passes"} <= rows[-1].keys()
    for row in rows:
        expected = sum(0.8**i * row[f"loss_{i}"] for i in range(1))
        assert row["loss"] > expected and 1 <= row["chain_length"] <= 1 + STEPS

    settings = json.loads((out / "run.json").read_text())
    assert settings["flags"]["draft_vocab_size"] == 200 and settings["world_size"] == 1
    assert settings["versions"]["torch"] == torch.__version__.split("+")[0] or settings["versions"]["torch"]
    assert (out / "final" / "run.json").read_text() == (out / "run.json").read_text()
    config = json.loads((out / "final" / "config.json").read_text())
    assert config["draft_vocab_size"] == 200 and config["torch_dtype"] == "float32" and "rope_theta" in config

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "logs" / settings["run_id"])).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in train_rows]


def test_total_steps_ends_the_training_there_and_repeats_the_data(work, tmp_path):
    for total in (2, 5):  # less and more than the epoch of 3 steps
        out = tmp_path / str(total)
        rows = run(work, out, "--total_steps", total, "--save_steps", 2, "--save_interval", 9, "--eval_interval", 9)
        assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, total + 1))
        assert [row["step"] for row in rows if row["split"] == "validation"] == [total]
        saved = sorted(path.name for path in out.glob("step_*"))
        assert saved == [f"step_{n:08d}" for n in sorted({*range(2, total + 1, 2), total})]
    assert rows[-2]["lr"] < 0.2 * rows[0]["lr"], "the schedule ends with the training"


def test_training_lowers_the_loss_and_a_draft_can_be_continued(work, tmp_path):
    rows = run(work, tmp_path / "a", "--total_steps", 30, "--learning_rate", "3e-3", "--draft_vocab_size", 300)
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    (tmp_path / "counts.pt").write_text("not read, as the draft has a mapping of its own")
    more = run(
        work,
        tmp_path / "b",
        "--total_steps",
        1,
        "--resume_from_checkpoint",
        tmp_path / "a" / "final",
        "--draft_vocab_size",
        100,
        "--token_freq_path",
        tmp_path / "counts.pt",
    )
    assert more[0]["loss"] < 0.9 * rows[0]["loss"]
    a, b = (weights(tmp_path / name / "final") for name in "ab")
    assert torch.equal(a["d2t"], b["d2t"]), "the mapping of the draft that is continued must stay"


def speculative(work, draft, output):
    """evaluate_draft.py on the validation prompts: its figures, and its texts as a file of training data."""
    argv = ["--target_model_path", work / "target", "--draft_model_path", draft, "--prompts", work / "validation.jsonl",
            "--max_new_tokens", 40, "--num_draft_tokens", STEPS, "--output", output]  # fmt: skip
    evaluate_draft.main(evaluate_draft.parse_args([str(part) for part in argv]))
    return json.loads((output / "evaluation.json").read_text()), output / "generations.jsonl"


@pytest.mark.slow
def test_training_code_and_speculative_decoding_measure_the_same(work, tmp_path):
    """evaluate() on the target's own texts gives the acceptance length and the passes that were measured on them."""
    _, texts = speculative(work, work / "first" / "final", tmp_path / "before")
    flags = ("--dataset_train_split", texts, "--dataset_validation_split", texts)
    run(
        work,
        tmp_path / "draft",
        "--total_steps",
        50,
        "--learning_rate",
        "5e-3",
        "--eval_interval",
        99,
        "--save_interval",
        99,
        *flags,
        data=False,
    )
    measured, _ = speculative(work, tmp_path / "draft" / "final", tmp_path / "after")
    rows = run(
        work,
        tmp_path / "again",
        "--total_steps",
        1,
        "--learning_rate",
        0,
        *flags,
        "--resume_from_checkpoint",
        tmp_path / "draft" / "final",
        data=False,
    )
    assert measured["acceptance_length"] > 1.2, "nothing accepted shows nothing"
    assert rows[-1]["passes"] == measured["passes"]
    assert rows[-1]["acceptance_length"] == pytest.approx(measured["acceptance_length"], rel=1e-9)


def test_dry_run_saves_the_initial_draft(work, tmp_path):
    run(work, tmp_path / "dry", "--dry_run", "--total_steps", 2)
    assert draft_files.check_draft(tmp_path / "dry" / "step_00000000") == []
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == ["latest", "run.json", "step_00000000"]
    direct = run(work, tmp_path / "direct", "--total_steps", 2)
    continued = run(
        work, tmp_path / "continued", "--total_steps", 2, "--resume_from_checkpoint", tmp_path / "dry" / "latest"
    )
    assert [row["loss"] for row in direct] == [row["loss"] for row in continued]
    assert furthest(weights(tmp_path / "direct" / "final"), weights(tmp_path / "continued" / "final")) == 0


def test_same_seed_same_run_other_seed_another(work, tmp_path):
    losses = [
        [row["loss"] for row in run(work, tmp_path / str(i), "--total_steps", 3, "--seed", seed)]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_each_of_these_flags_changes_the_draft(work, tmp_path):
    base = run(work, tmp_path / "base", "--total_steps", 4)
    for i, flags in enumerate((
        ("--learning_rate", "1e-3"), ("--weight_decay", "0.5"), ("--warmup_ratio", "0.9"),
        ("--scheduler_type", "constant"), ("--ttt_step_loss_decay", "0.1"), ("--target_layer_ids", "1", "3", "8"),
        ("--scheduler_warmup_steps", "3"), ("--scheduler_total_steps", "50"), ("--scheduler_num_cosine_cycles", "2"),
        ("--draft_global_batch_size", "2"),
    )):  # fmt: skip
        rows = run(work, tmp_path / str(i), "--total_steps", 4, *flags)
        assert furthest(weights(tmp_path / str(i) / "final"), weights(tmp_path / "base" / "final")) > 0, flags
        assert rows[0].keys() == base[0].keys()
    config = json.loads((tmp_path / "5" / "final" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 8]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 7]


@pytest.mark.slow
def test_bf16_and_stage_0_train_as_well(work, tmp_path):
    """bf16 with fp32 master weights, as on a GPU, with the files of ds_configs; stage 0 reports no gradient norm."""
    expected, engines = run(work, tmp_path / "plain", "--total_steps", 4), {"stage0": {}}
    for path in (tiny.REPOSITORY / "ds_configs").glob("*.json"):
        if path.stem == "zero3_nvme":  # it names a disk: test_run_offload.py
            continue
        engines[path.stem] = json.loads(path.read_text())
    for name, engine in engines.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(engine))
        flags = "--precision", "fp32" if name == "stage0" else "bf16"
        rows = run(work, tmp_path / name, "--total_steps", 4, "--deepspeed_config", tmp_path / f"{name}.json", *flags)
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=0.02)
        assert draft_files.check_draft(tmp_path / name / "final") == []
    assert furthest(weights(tmp_path / "stage0" / "final"), weights(tmp_path / "plain" / "final")) < 1e-5


def test_draft_model_config_is_used_and_completed(work, tmp_path):
    given = {"intermediate_size": 40, "num_attention_heads": 8, "num_key_value_heads": 2, "draft_vocab_size": 150,
             "norm_before_fc": True, "fc_norm": True, "norm_output": True}  # fmt: skip
    (tmp_path / "draft.json").write_text(json.dumps(given))
    run(work, tmp_path / "out", "--total_steps", 1, "--draft_model_config", tmp_path / "draft.json")
    config = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert {key: config[key] for key in given} == given and config["head_dim"] == 8 and config["vocab_size"] == 400
    tensors = weights(tmp_path / "out" / "final")
    assert tensors["input_norm.weight"].shape == (192,) and tensors["fc_norm.2.weight"].shape == (64,)


def test_aliases_and_kebab_case():
    argv = "--verifier-name-or-path M --train-data-path=T.jsonl --lr 3e-4 --epochs 5 --ttt-steps 4 --save-path o"
    argv = f"{argv} --logger tensorboard,swanlab --max-steps 9 --resume False".split()
    args = train_eagle3.parse_args(argv)
    assert (args.target_model_path, args.dataset_train_split, args.learning_rate) == ("M", "T.jsonl", 3e-4)
    assert (args.num_epochs, args.ttt_length, args.output_dir, args.total_steps) == (5, 4, "o", 9)
    assert args.report_to == ["tensorboard", "swanlab"] and args.resume is False
    assert {name.removesuffix("=false") for name in foreign_flags.ALIASES.values()} <= set(vars(args))


def test_learning_rate_follows_the_well_known_schedules():
    def ours(kind, steps, warmup):
        argv = f"--target_model_path M --learning_rate 2.0 --scheduler_type {kind} --scheduler_total_steps {steps}"
        argv = f"{argv} --scheduler_warmup_steps {warmup}".split()
        args = train_eagle3.parse_args(argv)
        return [optimization.learning_rate_at(step, args, args) for step in range(steps)]

    for kind, make in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        for warmup in (0, 4):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
            schedule, theirs = make(optimizer, warmup, 20), []
            for _ in range(20):
                theirs.append(schedule.get_last_lr()[0])
                optimizer.step()
                schedule.step()
            rates = ours(kind, 20, warmup)
            assert rates[warmup:] == pytest.approx(theirs[warmup:])
            assert rates[:warmup] == pytest.approx([2.0 * (i + 1) / warmup for i in range(warmup)])  # never a step of 0
    assert ours("constant", 6, 2) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


# --- the same numbers however the work is dealt out ---


def test_gradient_is_the_same_for_one_micro_batch_of_four_and_four_of_one(work, tmp_path, monkeypatch):
    single = recorded_gradients(work, tmp_path / "a", monkeypatch, "--draft_micro_batch_size", 1)
    packed = recorded_gradients(work, tmp_path / "b", monkeypatch, "--draft_micro_batch_size", 4, "--batch_size", 3)
    assert len(single) == 13 and single.keys() == packed.keys()
    for name, gradient in single.items():
        assert gradient.norm() > 0, name
        assert (packed[name] - gradient).norm() / gradient.norm() < 1e-5, name


@pytest.mark.slow
def test_two_ranks_and_every_deepspeed_config_equal_one_rank(work, tmp_path):
    """One start of two ranks runs the files of ds_configs/, a batch that does not divide, and a rank without data."""
    flags = [
        "--total_steps",
        4,
        "--draft_global_batch_size",
        4,
        "--draft_vocab_size",
        200,
        "--draft_micro_batch_size",
        2,
    ]
    one_flags = [*flags[:-1], 1]
    expected = run(work, tmp_path / "one", *one_flags)
    configs = sorted(path.stem for path in (tiny.REPOSITORY / "ds_configs").glob("*.json"))
    configs.remove("zero3_nvme")  # it names a disk: test_run_offload.py
    assert configs == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    runs = [
        arguments(work, tmp_path / name, *flags, "--deepspeed_config", tiny.REPOSITORY / "ds_configs" / f"{name}.json")
        for name in configs
    ]
    tiny.write_jsonl(tmp_path / "one.jsonl", tiny.conversations(1))
    runs.append(arguments(work, tmp_path / "few", "--dataset_train_split", tmp_path / "one.jsonl", data=False))
    runs.append(arguments(work, tmp_path / "odd", "--draft_global_batch_size", 3))
    result = tiny.on_ranks(2, tiny.LAUNCH_MANY, json.dumps(runs), timeout=540)
    assert result.returncode == 0, result.stderr[-4000:]
    codes = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("exit "))[5:])
    assert codes == [[0, 0, 0, 0, 0, 2, 2]] * 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2, "one line each, from rank 0 only"
    assert errors[0] == "error: 1 training sequences for 2 ranks: a rank would have none"
    assert "draft_global_batch_size 3 is not a multiple" in errors[1] and "fit: 2 or 4" in errors[1]
    for name in configs:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5), name
        assert rows[-1]["acceptance_length"] == pytest.approx(expected[-1]["acceptance_length"]), name
        assert furthest(weights(tmp_path / name / "final"), weights(tmp_path / "one" / "final")) < 1e-4, name


# --- bad input: one line, exit code 2, before any model loads ---


def bad_inputs(work, folder):
    empty, text, alone, small = (folder / name for name in ("empty.jsonl", "text.jsonl", "alone.jsonl", "small"))
    empty.write_text("")
    text.write_text("Dear diary,\ntoday\n")
    tiny.write_jsonl(alone, [{"conversations": [{"role": "user", "content": "Is anybody there?"}]}])
    tiny.write_target(small, layers=6)
    contradiction, broken = folder / "ds.json", folder / "broken.json"
    listed, half = folder / "listed.json", folder / "half.json"
    listed.write_text("[1]")
    half.write_text('{"fp16": {"enabled": true}}')
    contradiction.write_text(json.dumps({"gradient_clipping": 7.0}))
    in_bf16 = folder / "bf16.json"
    in_bf16.write_text(json.dumps({"bf16": {"enabled": True}}))
    broken.write_text("{")
    split, model = ("--dataset_train_split", work / "train.jsonl"), ("--data_path", work / "data")
    return {
        "missing file": (["--dataset_train_split", folder / "no.jsonl"], "no.jsonl: no such file"),
        "empty file": (["--dataset_train_split", empty], "empty.jsonl"),
        "not JSON": (["--dataset_train_split", text], "text.jsonl"),
        "no reply": (["--dataset_train_split", alone], "no question with a reply"),
        "template does not fit": ([*split, "--chat_template", "qwen"], "use --chat_template llama3 or auto"),
        "unknown template": ([*split, "--chat_template", "nobody"], "nobody"),
        "ttt_length": ([*split, "--ttt_length", 0], "ttt_length is 0"),
        "few layers": ([*split, "--target_model_path", small], "6 layers"),
        "no target": ([*split, "--target_model_path", folder / "nowhere"], "nowhere"),
        "large draft vocabulary": ([*split, "--draft_vocab_size", 401], "401"),
        "batch": ([*split, "--draft_micro_batch_size", 3], "fit: 6 or 9"),
        "no data": ([], "dataset_train_split"),
        "data twice": ([*split, "--data_path", work / "data"], "dataset_train_split"),
        "data of another tokenizer": ([*model, "--target_model_path", folder / "other_target"], "another tokenizer"),
        "data of another template": ([*model, "--chat_template", "qwen"], "auto or llama3, not qwen"),
        "data of longer rows": ([*model, "--max_length", 40], "give --max_length "),
        "missing mapping": ([*split, "--d2t_path", folder / "d2t.npy", "--t2d_path", folder / "t2d.npy"], "d2t.npy"),
        "half a mapping": ([*split, "--d2t_path", "d2t.npy"], "t2d_path"),
        "tensor parallel": ([*split, "--tp_size", 2], "tp_size 2"),
        "contradiction": ([*split, "--deepspeed_config", contradiction], "clipping 7.0 contradicts max_grad_norm"),
        "precision": ([*split, "--deepspeed_config", in_bf16, "--precision", "fp32"], "contradicts precision fp32"),
        "broken engine file": ([*split, "--deepspeed_config", broken], "broken.json"),
        "engine file of a list": ([*split, "--deepspeed_config", listed], "listed.json"),
        "engine in fp16": ([*split, "--deepspeed_config", half], "bf16 is what trains"),
        "long warm-up": ([*split, "--scheduler_warmup_steps", 99], "warm-up of 99 steps"),
        "schedule": ([*split, "--scheduler_total_steps", -1], "scheduler_total_steps is -1"),
        "decay": ([*split, "--ttt_step_loss_decay", -1], "ttt_step_loss_decay is -1"),
        "not a number": ([*split, "--ttt_length", "x"], "ttt_length"),
        "tracker": ([*split, "--report_to", "pigeon"], "pigeon"),
        "output in the way": ([*split, "--output_dir", empty], "a file is in the way"),
        "layer that is not there": ([*split, "--target_layer_ids", 2, 4, 9], "[2, 4, 9]"),
        "earlier run": ([*split, "--output_dir", work / "first"], "holds a run"),
        "other layers": (
            [*model, "--resume_from_checkpoint", work / "first" / "final", "--target_layer_ids", 2, 4], "reads 3 layers"
        ),
        "draft of another target": ([*split, "--resume_from_checkpoint", folder / "other"], "vocab_size"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def cases(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny.write_target(folder / "other_target", vocab_size=300)
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(folder / "other_target", other / "target")
    run(other, other / "out", "--dataset_train_split", work / "train.jsonl", "--dry_run", data=False)
    shutil.copytree(other / "out" / "step_00000000", folder / "other")
    return bad_inputs(work, folder)


def test_bad_input_is_one_line_with_exit_code_2_before_any_model_loads(work, cases, tmp_path, monkeypatch, capfd):
    def no_target(*args, **kwargs):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr(states, "open_source", no_target)
    for name, (flags, expected) in cases.items():
        argv = arguments(work, tmp_path / "out", *flags, data=False)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train_eagle3.main(train_eagle3.parse_args(argv))
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert stopped.value.code == 2, name
        assert len(lines) == 1 and expected in lines[0], (name, lines)


def test_data_prepared_on_the_fly_take_the_flags_of_their_preparation(work, tmp_path, monkeypatch):
    given = {}

    def stop(*_, **options):
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr(prepare_data, "prepare", stop)
    flags = "--dataset_train_split", work / "train.jsonl", "--build_dataset_num_proc", 3, "--max_length", 99
    with pytest.raises(InterruptedError):
        run(work, tmp_path / "out", *flags, "--chat_template", "auto", data=False)
    assert (given["num_proc"], given["max_length"], given["chat_template"]) == (3, 99, "auto")
