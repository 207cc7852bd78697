"""What cannot work with many ranks is said in one line, with the numbers and the remedy, before anything is loaded."""

import json

import pytest
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder import AsyncIOBuilder

import train_eagle3
from core import dataloader, ranks, states
from helpers import tiny

BELOW_A_FILE, NOWHERE = tiny.REPOSITORY / "README.md" / "below", "/proc/nothing/can/be/made/here"
NVME = {"device": "nvme", "nvme_path": "/proc/no/such/disk"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A target of 12 heads and 6 key-value heads that has a configuration and nothing else; prepared data without data;
    DeepSpeed configurations that cannot work.
    """
    folder = tmp_path_factory.mktemp("errors")
    ranks.start_distributed(20)
    config = tiny.llama_config(hidden_size=96, num_attention_heads=12, num_key_value_heads=6, head_dim=8)
    config.save_pretrained(folder / "target")
    (folder / "target" / "nothing.safetensors").write_text("")
    (folder / "prepared").mkdir()
    for name, zero in (
        ("disk", {"stage": 3, "offload_optimizer": NVME}),
        ("parameters", {"stage": 3, "offload_param": NVME | {"nvme_path": str(BELOW_A_FILE)}}),
        ("no_path", {"stage": 3, "offload_optimizer": {"device": "nvme"}}),
        ("stage", {"stage": 2, "offload_optimizer": NVME}),
    ):
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder


def arguments(work, output, flags):
    given = ["--target_model_path", work / "target", "--data_path", work / "prepared", "--output_dir", output]
    flags = flags.format(work=work, below=BELOW_A_FILE, nowhere=NOWHERE).split()
    return [str(part) for part in (*given, *flags)]


# (ranks, flags, what the line has to say)
CASES = [
    # the ranks
    (8, "--tp_size 3", ["tp_size 3 does not divide the 8 ranks", "fit: 2 or 4"]),
    (8, "--tp_size 16", ["tp_size 16 does not divide the 8 ranks", "fit: 8"]),
    (1, "--tp_size 2", ["tp_size 2 does not divide the 1 ranks", "fit: 1"]),
    (8, "--tp_size 0", ["tp_size is 0", "at least 1"]),
    # the heads
    (8, "--tp_size 8", ["tp_size 8 does not divide the target's 12 num_attention_heads", "[1, 2, 3, 4, 6, 12]"]),
    (8, "--tp_size 4", ["tp_size 4 does not divide the target's 6 num_key_value_heads", "[1, 2, 3, 6]"]),
    # how the target is shared
    (8, "--tp_size 2 --target_sharding none", ["target_sharding none contradicts tp_size 2"]),
    (8, "--tp_size 2 --target_sharding zero3", ["target_sharding zero3 contradicts tp_size 2"]),
    (8, "--target_sharding tp", ["target_sharding tp contradicts tp_size 1", "tp_size of at least 2"]),
    (8, "--target_offload cpu", ["target_offload cpu needs target_sharding zero3"]),
    (8, "--target_offload cpu --tp_size 2", ["target_offload cpu needs target_sharding zero3"]),
    (8, "--target_offload nvme --target_offload_path {work}", ["target_offload nvme needs target_sharding zero3"]),
    (8, "--target_sharding zero3 --target_offload nvme", ["target_offload_path None", "needs a folder"]),
    (8, "--target_sharding zero3 --target_offload_path {work}", ["target_offload none with target_offload_path"]),
    # folders that cannot be written, by root neither
    (1, "--target_sharding zero3 --target_offload nvme --target_offload_path {below}",
     [f"target_offload_path {BELOW_A_FILE} cannot be written: Not a directory", "give a folder"]),
    (1, "--target_sharding zero3 --target_offload nvme --target_offload_path {nowhere}",
     [f"target_offload_path {NOWHERE} cannot be written: ", "give a folder"]),
    (1, "--deepspeed_config {work}/disk.json",
     ["disk.json: nvme_path of offload_optimizer, /proc/no/such/disk cannot be written", "give a folder"]),
    (1, "--deepspeed_config {work}/parameters.json",
     [f"parameters.json: nvme_path of offload_param, {BELOW_A_FILE} cannot be written: Not a directory"]),
    (1, "--deepspeed_config {work}/no_path.json", ["nvme_path of offload_optimizer, None cannot be written"]),
    (1, "--deepspeed_config {work}/stage.json", ["offload_optimizer on nvme needs ZeRO stage 3, the file says 2"]),
    # the batch
    (8, "--draft_global_batch_size 20", ["draft_global_batch_size 20", "1 x 8 ranks = 8", "fit: 16 or 24"]),
    (8, "--draft_global_batch_size 6", ["draft_global_batch_size 6", "1 x 8 ranks = 8", "fit: 8"]),
    (4, "--draft_micro_batch_size 3 --draft_global_batch_size 16", ["3 x 4 ranks = 12", "fit: 12 or 24"]),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "flags", "expected"), CASES, ids=[f"{n} ranks {flags}" for n, flags, _ in CASES])
def test_one_line_with_the_numbers_and_nothing_loaded(work, tmp_path, monkeypatch, capsys, ranks, flags, expected):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks)
    check(work, tmp_path, capsys, monkeypatch, flags, expected)


def check(work, tmp_path, capsys, monkeypatch, flags, expected):
    monkeypatch.setattr(ranks, "start_distributed", lambda *args: torch.device("cpu"))  # of the one true rank
    monkeypatch.setattr(states, "open_source", lambda *args, **options: pytest.fail("the target is loaded"))
    monkeypatch.setattr(dataloader, "open_data", lambda folder: pytest.fail("the data are read"))
    with pytest.raises(SystemExit) as stop:
        train_eagle3.main(train_eagle3.parse_args(arguments(work, tmp_path / "out", flags)))
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in printed, printed
    for words in expected:
        assert words in lines[0], lines[0]
    assert not (tmp_path / "out").exists()


WRONG_TYPES = [  # a file of DeepSpeed's configuration, and the end of the line
    (b"[]", "it is not a JSON object"),
    (b"\x80\x02}", "it is not JSON"),
    (b"[" * 100_000, "it is not JSON"),
    (b'{"fp16": true}', "fp16 is true, it must be an object"),
    (b'{"fp16": {"enabled": true}}', "must be without fp16"),
    (b'{"bf16": "auto"}', 'bf16 is "auto", it must be an object'),
    (b'{"zero_optimization": 2}', "zero_optimization is 2, it must be an object"),
    (b'{"zero_optimization": {"stage": "two"}}', 'stage of zero_optimization is "two"'),
    (b'{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}', 'offload_optimizer is "cpu"'),
]


@pytest.mark.parametrize(("content", "expected"), WRONG_TYPES)
def test_a_configuration_of_deepspeed_of_another_kind(content, expected, work, tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong.json").write_bytes(content)
    check(work, tmp_path, capsys, monkeypatch, f"--deepspeed_config {tmp_path}/wrong.json", ["wrong.json", expected])


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--target_sharding zero3 --target_offload nvme --target_offload_path {work}", "target_offload_path"),
        ("--deepspeed_config {work}/here.json", "here.json: nvme_path of offload_optimizer,"),
    ],
)
def test_disk_without_the_library_that_reads_it(work, tmp_path, monkeypatch, capsys, flags, name):
    zero = {"stage": 3, "offload_optimizer": NVME | {"nvme_path": str(work)}}
    (work / "here.json").write_text(json.dumps({"zero_optimization": zero}))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, *args: False)
    check(work, tmp_path, capsys, monkeypatch, flags, [f"{name} {work}", "libaio-dev"])


def test_family_without_a_tensor_parallel_plan(work, tmp_path, monkeypatch, capsys):
    config = json.loads((work / "target" / "config.json").read_text())
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "nothing.safetensors").write_text("")
    options = {"model_type": "bloom", "n_layer": 8, "n_head": 4, "architectures": ["BloomForCausalLM"]}
    (tmp_path / "target" / "config.json").write_text(json.dumps(config | options))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    flags = f"--tp_size 2 --target_model_path {tmp_path / 'target'}"
    check(work, tmp_path, capsys, monkeypatch, flags, ["no tensor-parallel plan for model_type bloom", "zero3"])


def test_two_ranks_end_together_with_one_line_each_time(work, tmp_path):
    """Two ranks as a launcher starts them: rank 0 says what is wrong and both end with code 2."""
    several = {
        "--tp_size 4": "tp_size 4 does not divide the 2 ranks; nearest that fit: 2",
        "--draft_global_batch_size 7": "1 x 2 ranks = 2; nearest that fit: 6 or 8",
        "--target_offload cpu": "target_offload cpu needs target_sharding zero3",
        "--deepspeed_config {work}/disk.json": "/proc/no/such/disk cannot be written",
    }
    runs = [arguments(work, tmp_path / "out", flags) for flags in several]
    result = tiny.launch_many(2, runs, code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(several), result.stderr
    for line, words in zip(lines, several.values(), strict=True):
        assert words in line
