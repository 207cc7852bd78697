"""The draft vocabulary: which tokens are chosen, what a mapping must be to be read, the command line."""

import json

import numpy as np
import pytest
import torch

import build_vocab_mapping
from core import vocabulary


def target_ids(d2t):
    return (d2t + np.arange(len(d2t))).tolist()


def plainly(token_freq, draft_vocab_size, target_vocab_size):
    """The rule word by word: by count, ties by id, missing ones filled with the lowest unused ids."""
    seen = sorted((t for t in token_freq if token_freq[t] > 0), key=lambda token: (-token_freq[token], token))
    chosen = seen[:draft_vocab_size]
    for token in range(target_vocab_size):
        if len(chosen) < draft_vocab_size and token not in seen:
            chosen.append(token)
    return sorted(chosen)


def run(*argv):
    build_vocab_mapping.main(build_vocab_mapping.parse_args([str(word) for word in argv]))


def fails(capsys, function, *arguments):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_the_most_frequent_tokens_are_chosen_and_ties_go_to_the_lower_id():
    d2t, t2d = vocabulary.build_mapping({7: 5, 2: 9, 9: 5, 4: 1, 5: 5}, 3, 12)
    assert target_ids(d2t) == [2, 5, 7]
    assert d2t.dtype == np.int64 and d2t.tolist() == [2, 4, 5]
    assert t2d.dtype == np.bool_ and np.flatnonzero(t2d).tolist() == [2, 5, 7]


def test_fewer_tokens_than_rows_are_filled_with_the_lowest_unused_ids():
    d2t, t2d = vocabulary.build_mapping({3: 2, 8: 1, 1: 0}, 5, 10)
    assert target_ids(d2t) == [0, 1, 2, 3, 8] and t2d.sum() == 5
    assert target_ids(vocabulary.build_mapping({}, 3, 10)[0]) == [0, 1, 2]


def test_the_full_vocabulary_is_the_identity():
    d2t, t2d = vocabulary.build_mapping({3: 2}, 6, 6)
    assert not d2t.any() and t2d.all()


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_rule_said_plainly(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 60))
    token_freq = {int(t): int(random.integers(0, 5)) for t in random.permutation(size)[: random.integers(0, size + 1)]}
    draft = int(random.integers(1, size + 1))
    d2t, t2d = vocabulary.build_mapping(token_freq, draft, size)
    assert target_ids(d2t) == plainly(token_freq, draft, size)
    assert vocabulary.mapping_problems(d2t, t2d) == []


def test_counts_that_are_not_there(tmp_path, capsys):
    for path, reason in ((tmp_path / "absent.pt", "No such file or directory"), (tmp_path, "Is a directory")):
        line = fails(capsys, run, "--token_freq_path", path, "--target_vocab_size", 40)
        assert f"token counts {path}: {reason}; prepare_data.py writes token_freq.pt" in line


def test_a_vocabulary_of_152064_tokens():
    # 32,000 × 152,064 comparisons (membership in a list) would take minutes here
    random = np.random.default_rng(0)
    tokens = random.permutation(152_064)[:120_000].tolist()
    token_freq = dict(zip(tokens, (1 + random.permutation(120_000)).tolist(), strict=True))
    d2t, t2d = vocabulary.build_mapping(token_freq, 32_000, 152_064)
    assert target_ids(d2t) == sorted(sorted(token_freq, key=token_freq.get)[-32_000:])
    assert t2d.shape == (152_064,) and t2d.sum() == 32_000
    inside = sum(sorted(token_freq.values())[-32_000:])
    assert vocabulary.coverage(token_freq, t2d) == inside / sum(token_freq.values())


def test_sizes_and_ids_that_do_not_fit(capsys):
    assert "draft_vocab_size 11" in fails(capsys, vocabulary.build_mapping, {1: 1}, 11, 10)
    assert "draft_vocab_size 0" in fails(capsys, vocabulary.build_mapping, {1: 1}, 0, 10)
    assert "draft_vocab_size -3" in fails(capsys, vocabulary.build_mapping, {1: 1}, -3, 10)
    error = fails(capsys, vocabulary.build_mapping, {1: 1, 10: 1, 12: 4}, 2, 10)
    assert "2 token ids" in error and "vocabulary of 10" in error
    assert "such as -1" in fails(capsys, vocabulary.build_mapping, {-1: 1}, 2, 10)


def test_save_and_load(tmp_path):
    d2t, t2d = vocabulary.build_mapping({7: 5, 2: 9}, 4, 12)
    vocabulary.save_mapping(tmp_path / "new" / "folder", d2t, t2d)
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["d2t.npy", "t2d.npy"]  # no temporary file stays
    read = vocabulary.load_mapping(folder / "d2t.npy", folder / "t2d.npy", 12)
    assert np.array_equal(read[0], d2t) and np.array_equal(read[1], t2d)
    assert read[0].dtype == np.int64 and read[1].dtype == np.bool_


D2T, T2D = vocabulary.build_mapping({7: 5, 2: 9, 9: 5}, 3, 12)
BROKEN = {
    "d2t dtype": (D2T.astype(np.int32), T2D, "d2t is int32"),
    "t2d dtype": (D2T, T2D.astype(np.int64), "t2d is int64"),
    "d2t shape": (D2T[None], T2D, "d2t is int64 [1, 3]"),
    "t2d shape": (D2T, T2D[None], "t2d is bool [1, 12]"),
    "absolute ids": (np.array([2, 7, 11]), T2D, "outside the vocabulary of 12"),
    "below 0": (np.array([-1, 6, 7]), T2D, "leads to token -1"),
    "not ascending": (np.array([7, 1, 7]), T2D, "not ascending: draft token 1 is target token 2"),
    "twice": (np.array([2, 1, 7]), T2D, "not ascending: draft token 1 is target token 2"),
    "t2d has one more": (D2T, T2D | (np.arange(12) == 4), "t2d disagrees with d2t on 1 tokens, such as 4"),
    "t2d has one less": (D2T, T2D & (np.arange(12) != 7), "t2d disagrees with d2t on 1 tokens, such as 7"),
    "another target": (D2T, np.concatenate([T2D, [False]]), "t2d has 13 tokens, the target's vocabulary 12"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_mapping_is_named(case, tmp_path, capsys):
    d2t, t2d, message = BROKEN[case]
    vocabulary.save_mapping(tmp_path, d2t, t2d)
    assert message in fails(capsys, vocabulary.load_mapping, tmp_path / "d2t.npy", tmp_path / "t2d.npy", 12)


def test_files_that_are_no_mapping(tmp_path, capsys):
    vocabulary.save_mapping(tmp_path, D2T, T2D)
    good, bad = tmp_path / "t2d.npy", tmp_path / "d2t.npy"
    bad.write_bytes(bad.read_bytes()[:-5])
    assert "d2t.npy cannot be read" in fails(capsys, vocabulary.load_mapping, bad, good)
    bad.write_bytes(b"")
    assert "d2t.npy cannot be read" in fails(capsys, vocabulary.load_mapping, bad, good)
    np.save(bad, np.array([print], dtype=object), allow_pickle=True)  # would run code when loaded
    assert "d2t.npy cannot be read" in fails(capsys, vocabulary.load_mapping, bad, good)
    assert "none.npy cannot be read" in fails(capsys, vocabulary.load_mapping, tmp_path / "none.npy", good)


@pytest.fixture
def counts(tmp_path):
    torch.save({7: 60, 2: 30, 9: 6, 4: 4}, tmp_path / "token_freq.pt")
    return tmp_path / "token_freq.pt"


def test_command_line(counts, tmp_path, capsys):
    run("--token-freq-path", counts, "--draft_vocab_size=2", "--target_vocab_size", 12, "--output_path", tmp_path / "v")
    out = capsys.readouterr().out
    assert "2 of 12 tokens" in out and "90.000%" in out and "100 supervised tokens" in out and "never occur" not in out
    assert target_ids(vocabulary.load_mapping(tmp_path / "v" / "d2t.npy", tmp_path / "v" / "t2d.npy", 12)[0]) == [2, 7]
    run(
        "--token_freq_path", counts, "--draft_vocab_size", 7, "--target_vocab_size", 12, "--output_path", tmp_path / "v"
    )
    assert "3 tokens of the draft vocabulary never occur" in capsys.readouterr().out


@pytest.mark.parametrize("nested", [False, True])
def test_command_line_reads_the_size_from_the_target(counts, nested, tmp_path):
    config = {"model_type": "x", "text_config": {"vocab_size": 15}} if nested else {"model_type": "x", "vocab_size": 15}
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer.json").write_text("{}")
    run("--token_freq_path", counts, "--draft_vocab_size", 2, "--target_model_path", target, "--output_path", tmp_path)
    assert len(np.load(tmp_path / "t2d.npy")) == 15


def test_command_line_errors(counts, tmp_path, capsys):
    sizes = ["--target_vocab_size", 12, "--output_path", tmp_path / "v"]
    error = fails(capsys, run, "--token_freq_path", tmp_path / "absent.pt", "--draft_vocab_size", 2, *sizes)
    assert "absent.pt" in error
    assert "draft_vocab_size 13" in fails(capsys, run, "--token_freq_path", counts, "--draft_vocab_size", 13, *sizes)
    absent = ["--target_model_path", tmp_path / "no_model", "--draft_vocab_size", 2]
    assert "no_model" in fails(capsys, run, "--token_freq_path", counts, *absent)
    for content in (b"[]", b"\x80\x02}", b'{"text_config": 3}'):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_bytes(content)
        given = ["--target_model_path", tmp_path / "model", "--draft_vocab_size", 2, "--output_path", tmp_path / "v"]
        assert "config.json" in fails(capsys, run, "--token_freq_path", counts, *given)
    assert not (tmp_path / "v").exists()
    for given in ([], [*sizes, *absent]):
        assert "--target_vocab_size and --target_model_path" in fails(capsys, run, "--token_freq_path", counts, *given)
    for name in ("draft_vocab_size", "target_vocab_size"):
        assert f"{name} is 0; it must be at least 1" in fails(capsys, run, *sizes, f"--{name}", 0)
    assert "--draft_vocab_size" in fails(capsys, run, "--draft_vocab_size", "many", *sizes)
