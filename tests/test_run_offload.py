"""Where the target's weights and the draft's states lie does not change the training: CPU memory, a disk, one rank."""

import json

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from helpers import tiny, training
from helpers.training import furthest, metrics, weights

STEPS = 4
disk = [
    pytest.mark.slow,  # the first use builds async_io, for minutes
    pytest.mark.skipif(not AsyncIOBuilder().is_compatible(), reason="DeepSpeed's async_io needs libaio's headers"),
]
DRAFT_ON_DISK, TARGET_ON_DISK = "zero3_nvme.json", "--target_sharding zero3 --target_offload nvme"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Prepared data, a target, and what the plain run on it gives. Tensors of 1 MiB and more: smaller ones stay in
    memory under DeepSpeed's offload to disks.
    """
    folder = tmp_path_factory.mktemp("offload")
    training.write_workspace(folder, validation=(), hidden_size=512, intermediate_size=512)
    train(folder, folder / "plain")
    return folder


def train(work, output, *flags):
    given = ("--ttt_length", 2, "--total_steps", STEPS, "--learning_rate", 1e-3, "--draft_vocab_size", 200)
    training.run(work, output, *given, *flags)


def check_same(work, output):
    losses = [[row["loss"] for row in metrics(run)] for run in (output, work / "plain")]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    assert furthest(weights(output / "final"), weights(work / "plain" / "final")) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("zero2_offload.json", marks=pytest.mark.slow),
        pytest.param("zero3_offload.json", marks=pytest.mark.slow),
        pytest.param(DRAFT_ON_DISK, marks=disk),
    ],
)
def test_draft_with_its_states_elsewhere(work, tmp_path, name):
    """The files of ds_configs as they are; in the one for a disk the path is written in, as its user has to."""
    path = tiny.REPOSITORY / "ds_configs" / name
    config = json.loads(path.read_text())
    if name == DRAFT_ON_DISK:
        config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path)
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(config))
    train(work, tmp_path / "out", "--deepspeed_config", path)
    check_same(work, tmp_path / "out")
    if name == DRAFT_ON_DISK:
        trained = sum(x.numel() for key, x in weights(tmp_path / "out" / "final").items() if key not in ("d2t", "t2d"))
        written = [file.stat().st_size for file in tmp_path.rglob("*.swp")]
        assert sum(written) >= 2 * 4 * trained, "the two moments of each parameter, in fp32"


@pytest.mark.parametrize(
    "flags", ["--target_sharding zero3 --target_offload cpu", pytest.param(TARGET_ON_DISK, marks=disk)]
)
def test_target_with_its_weights_elsewhere(work, tmp_path, capfd, flags):
    """One forward of the target serves a whole optimizer step of eight sequences, as in the recipe for one GPU."""
    place = ["--target_offload_path", tmp_path / "disk"] if flags == TARGET_ON_DISK else []
    train(work, tmp_path / "out", *flags.split(), *place, "--batch_size", 8)
    check_same(work, tmp_path / "out")
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("target ")]
    moved = 8 * (2 * 64 * 512 + 2 * 32 * 512 + 3 * 512 * 512 + 2 * 512) + 512  # neither table nor head
    assert f"a forward moves {4 * moved / 1e9:.3g} GB" in line and "8 sequences" in line
    if place:
        assert str(tmp_path / "disk") in line
        written = [file.stat().st_size for file in (tmp_path / "disk").rglob("*.swp")]
        assert sum(written) >= 8 * 3 * 4 * 512 * 512, "the matrices of the MLP"
