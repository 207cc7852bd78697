"""Drafts measured where they are served: figures against planned acceptance, two protocols, order, faults."""

import collections
import itertools
import json
import re
from dataclasses import dataclass

import pytest

import evaluate_draft
from core import decoding, prompts, served, target_files, target_model
from helpers import real_vllm, tiny, training, vllm_server
from helpers.serving import passes_of, reply_of, serve

TOKENS = 9


@dataclass(frozen=True)
class Prompt:
    """A prompt of two turns, as those of core/prompts.py are."""

    ids: list
    category: str | None = None
    turn: int = 1

    def following(self, reply):
        return Prompt([*self.ids, *reply, 3], self.category, 2) if self.turn == 1 else None


PROMPTS = [Prompt([10 + i, 7], "even" if i % 2 == 0 else "odd") for i in range(6)]
PATTERNS = {("even", 1): [3, 0, 1], ("even", 2): [1, 1, 3], ("odd", 1): [1], ("odd", 2): [0]}


def accepted(ids):
    """Drafts accepted in each pass behind a prompt of these tokens, again and again."""
    return PATTERNS["even" if ids[0] % 2 == 0 else "odd", 1 if len(ids) == 2 else 2]


def expected(category=None, turn=None, max_new_tokens=TOKENS):
    """The drafts accepted in each pass of PROMPTS, in plain words; those of the last pass count beyond the end."""
    found = []
    for prompt in PROMPTS:
        for key, pattern in PATTERNS.items():
            if key[0] == prompt.category and category in (None, key[0]) and turn in (None, key[1]):
                told, numbers = 1, itertools.cycle(pattern)
                while told < max_new_tokens:
                    found.append(next(numbers))
                    told += found[-1] + 1
    return found


def measure(*servers, levels=(1,), prompts=PROMPTS, max_new_tokens=TOKENS):
    engines = [served.connect("server", server.url, ["target"]) for server in servers]
    return served.measure(engines, prompts, levels, max_new_tokens)


def same_acceptance(figures, passes):
    assert figures["passes"] == len(passes)
    assert figures["acceptance_length"] == pytest.approx(1 + sum(passes) / len(passes))
    shares = [sum(number > i for number in passes) / len(passes) for i in range(3)]
    assert figures["accepted_by_position"] == pytest.approx(shares)


ENGINES = {
    "vllm": {"late": 0.1},
    "sglang": {"engine": "sglang"},
    "sglang, new tokens only": {"engine": "sglang", "cumulative": False},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_acceptance_is_what_the_server_counted_for_these_prompts(engine):
    with serve(accepted=accepted, **ENGINES[engine]) as server:
        found = measure(server, levels=(2, 1))
    figures = served.summarise(found)
    assert [level["concurrency"] for level in figures["by_concurrency"]] == [2, 1]
    for level in (figures, *figures["by_concurrency"]):
        same_acceptance(level, expected())
        assert level["prompts"] == 12 and level["new_tokens"] == 12 * TOKENS and "speedup" not in level
    assert figures["by_category"].keys() == {"even", "odd"}
    for category, of_category in figures["by_category"].items():
        same_acceptance(of_category, expected(category))
        assert of_category["prompts"] == 6
    for turn, of_turn in figures["by_turn"].items():
        same_acceptance(of_turn, expected(turn=turn))
    assert list(figures["by_turn"]) == ([] if engine == "vllm" else [1, 2])
    for (sets,) in found.values():
        rows = served.rows_of(sets)
        assert [(row["prompt"], row["turn"]) for row in rows] == [(i, turn) for i in range(6) for turn in (1, 2)]
        for row in rows:
            first = PROMPTS[row["prompt"]].ids
            behind = [*first, *reply_of(first, TOKENS), 3]
            ids = first if row["turn"] == 1 else behind
            assert row["input_ids"] == ids + reply_of(ids, TOKENS)
            assert row["loss_mask"] == [0] * len(ids) + [1] * TOKENS
            if engine != "vllm":
                passes, _ = passes_of(server.plan, ids, TOKENS)
                assert row["accepted_histogram"] == [passes.count(i) for i in range(max(passes) + 1)]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_requests_are_greedy_and_share_a_cache_with_their_own_level_only(engine):
    with serve(engine=engine) as server:
        measure(server, levels=(1, 2))
        measure(server)
    salts = []
    for body in server.requests:
        sampling = body if engine == "vllm" else body["sampling_params"]
        assert body["stream"] is True and sampling["temperature"] == 0 and sampling["repetition_penalty"] == 1
        salts.append(body["cache_salt" if engine == "vllm" else "extra_key"])
    counts = [len(list(group)) for _, group in itertools.groupby(salts)]
    assert counts == [2, 12, 12, 2, 12], "a warm-up of two turns, then each level"
    assert len(set(salts)) == 5


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_requests_as_asked_for_are_under_way(concurrency):
    with serve(delay=0.01) as server:
        measure(server, levels=(concurrency,), prompts=[Prompt([i]) for i in range(2 * concurrency)])
    assert server.most == concurrency


def test_both_servers_get_each_set_in_alternating_order():
    log = []
    with serve(log=log, accepted=accepted) as server, serve(log=log, drafts=None) as baseline:
        found = measure(server, baseline, prompts=[Prompt([i]) for i in range(16)])
    order = [(name, len(list(group))) for name, group in itertools.groupby(name for name, _ in log[4:])]
    assert order == [("target", 8), ("baseline", 16), ("target", 16), ("baseline", 16), ("target", 8)]
    sets, others = found[1]
    assert len(sets) == 4 and served.compare_texts(sets, others) == {"compared": 32, "equal": 32}
    assert [m.histogram for m in others] == [None] * 4


def test_texts_that_differ_from_the_baselines_are_counted():
    with serve() as server, serve(drafts=None, offset=1) as baseline:
        sets, others = measure(server, baseline)[1]
    assert served.compare_texts(sets, others) == {"compared": 6, "equal": 0}, "second turns have other prompts"


def test_sets_keep_the_requests_under_way():
    prompts = [Prompt([i], "ab"[i % 2]) for i in range(40)]
    sizes = {
        c: [len(part) for part in served.split_sets(prompts, c, by)] for c, by in ((1, True), (4, False), (32, False))
    }
    assert sizes == {1: [4] * 10, 4: [20, 20], 32: [40]}
    assert all(len({p.category for p in part.values()}) == 1 for part in served.split_sets(prompts, 1, True))
    found = sorted(number for part in served.split_sets(prompts, 4, False) for number in part)
    assert found == list(range(40))


def test_times_are_those_of_the_answers():
    arrivals = [
        [(0.5, 1), (0.9, 2), (1.1, 1)],  # 3 further tokens in 0.6 s
        [(0.1, 2), (0.4, 1)],  # 1 in 0.3 s
        [(0.2, 4)],  # a reply of one part
    ]
    answers = [served.Answer([0] * sum(n for _, n in times), times) for times in arrivals]
    figures = served.speed([served.Measured([], answers[:1], 2.0, []), served.Measured([], answers[1:], 1.0, [])])
    assert figures["new_tokens"] == 11 and figures["tokens_per_second"] == pytest.approx(11 / 3)
    assert figures["seconds_to_first_token"] == {"median": pytest.approx(0.2), "p90": pytest.approx(0.44)}
    assert figures["seconds_per_token"] == {"median": pytest.approx(0.25), "p90": pytest.approx(0.29)}


def test_times_are_measured_where_parts_arrive():
    with serve(delay=0.02) as server:
        (sets,) = measure(server, prompts=PROMPTS[:1], max_new_tokens=9)[1]
    figures = served.speed(sets)
    first, further = (figures[name]["median"] for name in ("seconds_to_first_token", "seconds_per_token"))
    assert first >= 0.02 and further >= 0.01, "parts of 2 tokens, at least 0.02 s apart"
    assert 2 * (first + 8 * further) <= figures["seconds"], "two turns"
    assert sets[0].rows[0]["parts"] == [1, 2, 2, 2, 2]


def test_the_counters_of_several_engines_are_added(monkeypatch):
    text = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a {b} c"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a {b} c"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 1.234e+03
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="10"} 4.0
vllm:e2e_request_latency_seconds_bucket{engine="0",le="+Inf",model_name="m"} 3.0
process_open_fds 70.0
"""
    monkeypatch.setattr(served.server, "keep_asking", lambda *given: text)
    counters = served.Vllm("", "", "m", None).counters()
    name = "spec_decode_num_accepted_tokens_per_pos_total"
    assert counters["spec_decode_num_drafts_total"] == 12
    assert (counters[f"{name} 0"], counters[f"{name} 10"]) == (1235, 4)


# --- the command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target without weights, which nothing reads, and prompts of two turns and two categories."""
    folder = tmp_path_factory.mktemp("target")
    tiny.llama_config().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    turns = ["What is the quick brown fox?", "Tell me more about what you want."]
    rows = [{"category": "even" if i % 2 == 0 else "odd", "turns": turns} for i in range(6)]
    tiny.write_jsonl(folder / "prompts.jsonl", rows)
    return folder


def run(folder, *words):
    given = ["--target_model_path", folder, *words]
    evaluate_draft.main(evaluate_draft.parse_args([str(word) for word in given]))


def test_the_command_compares_a_server_with_its_baseline(folder, tmp_path, capsys):
    patterns = [[3, 0, 1], [1]]
    flags = ["--prompts", folder / "prompts.jsonl", "--num_prompts", 4, "--max_new_tokens", TOKENS]
    flags += ["--concurrency", 1, 3, "--output", tmp_path]
    plan = {"model": str(folder), "per_request": True}
    drafting = {"accepted": lambda ids: patterns[len(ids) > 60]}
    with serve(**plan, **drafting) as server, serve(**plan, drafts=None) as baseline:
        run(folder, *flags, "--server", server.url, "--baseline", f"{baseline.url}/v1")
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    for level in figures["by_concurrency"]:
        with_draft, without = level["tokens_per_second_with_draft"], level["tokens_per_second_without"]
        assert with_draft == pytest.approx(8 * TOKENS / level["seconds"])
        assert without == pytest.approx(8 * TOKENS / level["baseline"]["seconds"])
        assert level["speedup"] == pytest.approx(with_draft / without)
        assert level["texts_of_baseline"] == {"compared": 8, "equal": 8}
    assert figures | figures["by_concurrency"][0] == figures | {"concurrency": 1}
    lengths = {turn: group["acceptance_length"] for turn, group in figures["by_turn"].items()}
    assert lengths == {"1": 1 + 7 / 4, "2": 2.0}, "3 0 1 3 and 1 1 1 1 accepted drafts"
    assert figures["by_category"].keys() == {"even", "odd"} and figures["engine"] == "vllm"
    settings = figures["settings"]
    assert settings["server"] == server.url and settings["concurrency"] == [1, 3] and settings["temperature"] == 0
    assert settings["num_draft_tokens"] == 3 and "seed" not in settings, "what was read, and the server's own"
    texts = read_texts(tmp_path)
    assert [(row["prompt"], row["turn"]) for row in texts] == [(i, turn) for i in range(4) for turn in (1, 2)]
    assert all(row["loss_mask"].count(1) == TOKENS and row["reply"] for row in texts)
    for name in ("acceptance.png", "serving.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if re.match(r"\| [13] ", line)]
    found = [(cells[0].strip(), cells[1].strip()) for cells in rows if cells[1].strip() in ("yes", "no")]
    assert found == [("1", "yes"), ("1", "no"), ("3", "yes"), ("3", "no")]
    assert "| even " in printed and "8 of 8 texts behind equal prompts equal the baseline's" in printed


REFUSED = {
    "--server http://localhost:1 --draft_model_path d": "draft_model_path: without effect beside --server",
    "--server http://localhost:1 --num_draft_tokens 3 --temperature 1 --seed 3":
        "num_draft_tokens, temperature, seed: without effect",
    "--draft_model_path d --baseline http://localhost:1 --concurrency 4": "baseline, concurrency: without effect",
    "": "draft_model_path is missing",
    "--server http://localhost:1 --concurrency 0": "concurrency is 0; it must be at least 1",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_flags_without_effect_are_refused(words, folder, capsys):
    assert REFUSED[words] in tiny.fails(capsys, run, folder, "--prompts", "p", *words.split())


@pytest.mark.slow
def test_a_real_vllm_accepts_what_the_same_draft_gets_here(tmp_path, capsys):
    """Prompt by prompt: the same texts, and the same passes but for the last one, which vLLM counts beyond the end."""
    real_vllm.find_python()
    target = tiny.write_target(tmp_path / "target", **vllm_server.HEADS)
    turns = ["What is the quick brown fox?", "Tell me more about what you want."]
    rows = [{"turns": [f"{i}: {turns[0]}", turns[1]], "category": "ab"[i % 2]} for i in range(6)]
    asked = ("--prompts", tiny.write_jsonl(tmp_path / "prompts.jsonl", rows), "--max_new_tokens", 30)
    replies = own_replies(target, asked[1])
    work = training.write_workspace(tmp_path / "work", replies, (), **vllm_server.HEADS)
    steps = ("--learning_rate", 5e-3, "--total_steps", 120, "--draft_global_batch_size", 4, "--batch_size", 4)
    training.run(work, tmp_path / "draft", *steps, "--save_interval", 100)
    final = tmp_path / "draft" / "final"
    run(target, *asked, "--draft_model_path", final, "--num_draft_tokens", 3, "--output", tmp_path / "here")
    speculative = json.dumps({"method": "eagle3", "model": str(final), "num_speculative_tokens": 3})
    flags = ("--speculative-config", speculative, "--per-request-spec-decode-metrics", "summary")
    with real_vllm.serve(target, tmp_path, *flags) as server:
        output = ("--output", tmp_path / "there")
        run(target, *asked, "--server", server.url, "--concurrency", 1, 3, *output)
    here, there = (read_texts(tmp_path / name) for name in ("here", "there"))
    longer = 0
    for row, other in zip(here, there, strict=True):
        assert row["input_ids"] == other["input_ids"] and row["loss_mask"] == other["loss_mask"]
        passes = collections.Counter(row["passes"])
        counted = collections.Counter(dict(enumerate(other["accepted_histogram"])))
        assert counted.total() == passes.total() and (passes - counted).total() <= 1
        longer += passes != counted
    figures = json.loads((tmp_path / "there" / "evaluation.json").read_text())
    accepted = [n for row in there for n, count in enumerate(row["accepted_histogram"]) for _ in range(count)]
    for level in (figures, *figures["by_concurrency"]):
        same_acceptance(level, accepted)
    assert figures["acceptance_length"] > 1.2 and figures["by_category"].keys() == {"a", "b"}


def own_replies(folder, path):
    """Rows of the target's own greedy replies to both turns of prompts."""
    target, tokenizer = target_model.load(folder), target_files.load_tokenizer(folder)
    rows = []
    for prompt in prompts.read_prompts(path, tokenizer):
        while prompt:
            reply = decoding.generate(target, prompt.ids, 30, set())
            mask = [0] * len(prompt.ids) + [1] * len(reply)
            rows.append({"input_ids": prompt.ids + reply, "loss_mask": mask})
            prompt = prompt.following(reply)
    return rows


def read_texts(folder):
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


# --- faults, a line each ---


def second(ids):
    return len(ids) > 2


FAULTS = {
    "no draft": ({"drafts": None}, "counts no drafts: start it with --speculative-config"),
    "no statistics": ({"stats": False}, "without --disable-log-stats"),
    "no draft of SGLang": ({"drafts": None, "engine": "sglang"}, "start it with --speculative-algorithm"),
    "requests of others": ({"others": 5}, "counts 26 new tokens, 16 are ours"),
    "a server behind others": ({"lost": 3}, "counts 10 of 16 new tokens"),
    "another model": ({"model": "other"}, "serves other, not the target target"),
    "too long": ({"max_model_len": 10}, "reads 10 tokens, prompt 0 and its reply may have 11"),
    "refused": ({"refused": second}, "refuses prompt 0, turn 2, of 11 tokens: HTTP Error 400: .*prompt is too long"),
    "breaks off": (
        {"breaks": second},
        "fails for prompt 0, turn 2, of 11 tokens with ConnectionError the answer",
    ),
    "fails inside": ({"fails": second}, "prompt 0, turn 2, of 11 tokens: out of memory"),
    "fails inside SGLang": ({"fails": second, "engine": "sglang"}, "turn 2, of 11 tokens: out of memory"),
    "silent": ({"silent": second}, "turn 2, of 11 tokens with TimeoutError timed out"),
    "an old vLLM": ({"token_ids": False}, "no token_ids: vLLM 0.11"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_line(fault, capsys, monkeypatch, waits):
    if fault in ("silent", "a server behind others"):  # short only where they are waited for: machines may be slow
        monkeypatch.setattr(served, "SETTLING", 0.2)
        monkeypatch.setattr(served, "SILENCE", 0.3)
    plan, message = FAULTS[fault]
    with serve(**plan) as server:
        error = tiny.fails(capsys, measure, server)
        assert re.search(message, error), error
        assert f"server {server.url}" in error
    if fault in ("another model", "too long"):
        assert not server.requests, "found before anything is asked"
    assert not waits


def test_a_server_that_is_not_there_or_ends_is_a_line(capsys, waits):
    with serve() as server:
        pass
    error = tiny.fails(capsys, measure, server)
    assert "fails for the list of its models, 4 times, at last with" in error and "refused" in error
    assert waits == [1, 2, 4]


def test_a_server_that_ends_between_two_prompts_is_a_line(capsys, waits):
    with serve() as server:
        engine = served.connect("server", server.url, ["target"])
    assert "server http" in tiny.fails(capsys, served.measure, [engine], PROMPTS, [1], TOKENS)


def test_a_baseline_with_a_draft_is_refused(capsys):
    with serve() as server, serve() as baseline:
        assert f"{baseline.url} has a draft" in tiny.fails(capsys, measure, server, baseline)
    with serve(engine="sglang") as server, serve(engine="sglang") as baseline:
        assert f"{baseline.url} has a draft" in tiny.fails(capsys, measure, server, baseline)
