"""Drafts measured where they are served: figures against planned acceptance, two protocols, order, faults."""

import itertools
import re
from dataclasses import dataclass

import pytest

from core import served
from helpers import tiny
from helpers.serving import reply_of, serve

TOKENS = 9


@dataclass(frozen=True)
class Prompt:
    """A prompt of two turns, as core/prompts.py makes them."""

    ids: list
    category: str | None = None
    turn: int = 1

    def following(self, reply):
        return Prompt([*self.ids, *reply, 3], self.category, 2) if self.turn == 1 else None


PROMPTS = [Prompt([10 + i, 7], "even" if i % 2 == 0 else "odd") for i in range(6)]
PATTERNS = {0: [3, 0, 1], 1: [1]}  # drafts accepted in each pass behind a prompt, by its first token


def accepted(ids):
    return PATTERNS[ids[0] % 2]


def expected(prompts, max_new_tokens=TOKENS):
    """The drafts accepted in each pass of both turns of prompts, in plain words."""
    found = []
    for prompt in prompts:
        pattern = itertools.cycle(accepted(prompt.ids))
        passes, told = [], 1
        while told < max_new_tokens:
            passes.append(next(pattern))
            told += passes[-1] + 1
        found += passes * 2  # the second turn begins as the first one does
    return found


def measure(*servers, levels=(1,), prompts=PROMPTS, max_new_tokens=TOKENS):
    engines = [served.connect("server", server.url, ["target"]) for server in servers]
    return served.measure(engines, prompts, levels, max_new_tokens)


def same_acceptance(sets, passes):
    figures = served.acceptance(sets, 3)
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
    assert list(found) == [2, 1]
    for (sets,) in found.values():
        same_acceptance(sets, expected(PROMPTS))
    for category in ("even", "odd"):
        of_category = [s for s in found[1][0] if s.rows[0]["category"] == category]
        same_acceptance(of_category, expected(p for p in PROMPTS if p.category == category))
        assert {row["category"] for s in of_category for row in s.rows} == {category}
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
                passes = expected([PROMPTS[row["prompt"]]])[: len(row["parts"]) - 1]
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
    with serve(log=log, accepted=accepted) as server, serve(log=log, drafts=None, delay=0.004) as baseline:
        found = measure(server, baseline, prompts=[Prompt([i]) for i in range(16)])
    order = [(name, len(list(group))) for name, group in itertools.groupby(name for name, _ in log[4:])]
    assert order == [("target", 8), ("baseline", 16), ("target", 16), ("baseline", 16), ("target", 8)]
    sets, others = found[1]
    assert len(sets) == 4 and served.equal_texts(sets, others) == (32, 32)
    assert served.speed(sets)["tokens_per_second"] > served.speed(others)["tokens_per_second"]
    assert [m.histogram for m in others] == [None] * 4


def test_texts_that_differ_from_the_baselines_are_counted():
    with serve() as server, serve(drafts=None, offset=1) as baseline:
        sets, others = measure(server, baseline)[1]
    assert served.equal_texts(sets, others) == (0, 6), "second turns have other prompts"


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
        (sets,) = measure(server, prompts=PROMPTS[:1], max_new_tokens=9)[1].copy()
    figures = served.speed(sets)
    assert 0.02 <= figures["seconds_to_first_token"]["median"] < 0.2
    assert 0.01 <= figures["seconds_per_token"]["median"] < 0.1, "4 parts of 2 tokens, 0.02 s apart"
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
