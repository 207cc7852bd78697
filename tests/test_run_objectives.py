"""Objectives of other kinds than the default: trained, stopped and continued, on two ranks; what is random in them."""

import pytest
import torch

from core import dataloader
from helpers.resuming import arguments, check_continued, stage, train, write_work
from helpers.starts import Starts
from helpers.training import flags, furthest, metrics, weights

RANDOM = "--chain_sampling", "--noise_std", 0.1, "--use_off_policy_tokens", "false", "--loss_average", "sequences"
RANDOM = *RANDOM, "--loss", "lk_hybrid", "--recipe", "best", "--optimizer", "adamw", "--freeze_head", "false"
FEW = *RANDOM, "--max_chains", 5, "--total_steps", 4, "--save_steps", 2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, prepared data, and in random/ a run with all of RANDOM."""
    folder = tmp_path_factory.mktemp("work")
    write_work(folder)
    train(folder, folder / "random", *FEW)
    return folder


def test_a_stopped_run_is_continued_bit_by_bit(work, tmp_path, monkeypatch):
    check_continued(monkeypatch, work, tmp_path / "out", work / "random", *FEW)


@pytest.mark.slow
def test_two_ranks_and_other_batches_train_the_same_weights(work, tmp_path):
    """What is random belongs to a row, so neither micro-batches nor ranks change it; sums differ by rounding."""
    with Starts() as starts:
        flags = ("--draft_micro_batch_size", 2, "--num_workers", 2, *stage(1))
        starts.run(arguments(work, tmp_path / "out", *FEW, *flags), 2, tmp_path / "log")
    assert furthest(weights(tmp_path / "out" / "final"), weights(work / "random" / "final")) < 1e-4


def test_sampled_chains_do_less_work_and_the_seed_decides_which(work, tmp_path):
    rows = [row for row in metrics(work / "random") if row["split"] == "train"]
    live = [[row[f"live_{i}"] for i in range(3)] for row in rows]
    assert all(1 == first > second >= third for first, second, third in live)
    train(work, tmp_path / "out", *FEW, "--seed", 1)
    others = [row for row in metrics(tmp_path / "out") if row["split"] == "train"]
    assert live != [[row[f"live_{i}"] for i in range(3)] for row in others]


def test_noise_is_uniform_and_belongs_to_a_row():
    def batch(epoch, *rows):
        return dataloader.Batch(None, None, None, [700] * len(rows), list(rows), epoch, None, 0)

    states = torch.full((1400, 30), 5.0)
    both = dataloader.add_noise(states, batch(0, 3, 8), 1, 0.2) - states
    alone = dataloader.add_noise(states[:700], batch(0, 8), 1, 0.2) - states[:700]
    assert torch.equal(both[700:], alone)
    assert both.abs().max() <= 0.2 + 1e-6
    assert abs(float(both.mean())) < 0.005 and abs(float(both.std()) - 0.2 / 3**0.5) < 0.005
    for other in (batch(1, 8), batch(0, 7)):
        assert not torch.equal(dataloader.add_noise(states[:700], other, 1, 0.2) - states[:700], alone)
    assert not torch.equal(dataloader.add_noise(states[:700], batch(0, 8), 2, 0.2) - states[:700], alone)


def test_draws_are_uniform_and_belong_to_a_row():
    draws = dataloader.draw(4, 2, [9, 1], [3000, 5])
    assert torch.equal(dataloader.draw(4, 2, [1], [5]), draws[3000:])
    assert not torch.equal(dataloader.draw(4, 3, [1], [5]), draws[3000:])
    for share in (0.1, 0.5, 0.9):
        assert abs(float((draws[:3000] < share).double().mean()) - share) < 0.03


def test_a_recipe_sets_what_is_not_given_and_the_start_says_so(work, tmp_path, capsys):
    train(work, tmp_path / "out", "--recipe", "best", "--chain_sampling", "false", "--dry_run")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe"))
    assert line.split(": ")[1] == (
        "optimizer muon, fc_norm true, norm_output true, freeze_head true, chain_sampling false"
    )
    assert "fc_norm.0.weight" in weights(tmp_path / "out" / "step_00000000")
    default = flags()
    assert (default.optimizer, default.fc_norm, default.chain_sampling, default.freeze_head) == (
        "adamw",
        None,
        False,
        False,
    )
