"""A draft where it is served: prompts to a running vLLM or SGLang server, acceptance by the server's own counters.

In:  the URL of a server with target and draft, prompts (core/prompts.py), the numbers of requests under way at once;
     optionally the URL of a baseline, a second server with the target alone, which gets each set of prompts as well.
Out: acceptance, tokens/s, time to the first token and per token for each concurrency; the texts, a row each.

Every request has token ids in place of a text, is greedy, and shares no cached prompt with an earlier run or level.
"""

import collections
import itertools
import re
import time
import uuid
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import numpy as np
from tqdm import tqdm

from core import common, server

SILENCE = 600  # seconds without a token, after which a server is taken for gone
RETRIES = 3  # before the measurement; during it a repeated request would be counted twice
SETTLING = 5  # seconds in which the counters of a server catch up with its answers
WARM_UP = 8  # tokens of the first reply, which is not measured
SET_SIZE = 4  # prompts of a set, times the concurrency: few are left over while the last ones end

# Engines take such defaults from the target's generation_config.json, and apply the penalty to greedy texts as well.
GREEDY = {"temperature": 0, "top_p": 1, "top_k": -1, "repetition_penalty": 1}


@dataclass
class Answer:
    """A reply: its token ids, and when they arrived: (seconds since the request, number of tokens) of each part.

    histogram[n]: passes that accepted n drafts, if the answer says so; None if it does not.
    """

    ids: list = field(default_factory=list)
    arrivals: list = field(default_factory=list)
    histogram: list | None = None


@dataclass(frozen=True)
class Measured:
    """What a server made of one set of prompts. histogram: as in Answer, of all of them; None without a draft."""

    rows: list
    answers: list
    seconds: float
    histogram: list | None


# ==================== Engines ========================================================================================


@dataclass(frozen=True)
class Vllm:
    """A vLLM server. /metrics counts over all requests; what the engine counts beyond a reply's end is in it."""

    where: str  # the flag and the URL, for messages
    endpoint: str
    model: str
    longest: int | None  # tokens of prompt and reply

    path = "v1/completions"
    without_draft = "start it with --speculative-config and without --disable-log-stats"

    def request(self, ids, max_new_tokens, salt):
        """The body of a request."""
        return {
            "model": self.model,
            "prompt": ids,
            "max_tokens": max_new_tokens,
            "cache_salt": salt,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **GREEDY,
        }

    def read(self, event, known):
        """(token ids that are new, how the reply ends or None, histogram or None) of an event after `known` tokens."""
        metrics = event.get("metrics") or {}
        histogram = (metrics.get("speculative_decoding") or {}).get("acceptance_histogram")
        if not event["choices"]:  # the last event: usage
            return [], None, histogram
        choice = event["choices"][0]
        if choice.get("token_ids") is None:
            raise server.ServerFailed("its answer has no token_ids: vLLM 0.11 and later give them")
        return choice["token_ids"], choice.get("finish_reason"), histogram

    def counters(self):
        """{name: value} of what the server has counted since its start, positions behind the name."""

        def work():
            with server.open_answer(self.endpoint, "metrics") as answer:
                return answer.read().decode()

        text = server.keep_asking(self.where, "/metrics", RETRIES, work)
        totals = collections.defaultdict(float)
        for name, labels, value in re.findall(r"^vllm:(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
            position = re.search(r'\bposition="(\d+)"', labels)
            totals[name + (f" {position[1]}" if position else "")] += float(value)
        return totals

    def counted_since(self, before, new_tokens):
        """{name: difference} since `before`, once the counters have caught up with new_tokens of replies.

        Ends the program if they count other tokens than that: the acceptance would be that of other requests.
        """
        end = time.monotonic() + SETTLING
        while True:
            now = self.counters()
            counted = {name: value - before.get(name, 0) for name, value in now.items()}
            found = counted.get("generation_tokens_total", new_tokens)
            if found >= new_tokens or time.monotonic() > end:
                break
            time.sleep(0.05)
        if found > new_tokens:
            raise server.ServerFailed(
                f"{self.where} counts {found:.0f} new tokens, {new_tokens} are ours: let nobody else use it meanwhile"
            )
        if found < new_tokens:
            raise server.ServerFailed(
                f"{self.where} counts {found:.0f} of {new_tokens} new tokens: several servers behind one URL?"
            )
        return counted

    def accepted(self, before, answers):
        """The histogram of a set of answers, from the counters before it and now; None without a draft."""
        counted = self.counted_since(before, sum(len(answer.ids) for answer in answers))
        passes = counted.get("spec_decode_num_drafts_total")
        if passes is None:
            return None
        name = "spec_decode_num_accepted_tokens_per_pos_total"
        positions = sum(key.startswith(f"{name} ") for key in counted)
        reached = [passes, *(counted[f"{name} {position}"] for position in range(positions)), 0]
        return [round(here - further) for here, further in itertools.pairwise(reached)]


@dataclass(frozen=True)
class Sglang:
    """An SGLang server. Each answer has the histogram of its own passes, those beyond its end included."""

    where: str
    endpoint: str
    model: str
    longest: int | None

    path = "generate"
    without_draft = "start it with --speculative-algorithm EAGLE3"

    def request(self, ids, max_new_tokens, salt):
        """As Vllm.request."""
        sampling = {"max_new_tokens": max_new_tokens, **GREEDY}
        return {"input_ids": ids, "sampling_params": sampling, "extra_key": salt, "stream": True}

    def read(self, event, known):
        """As Vllm.read. Parts have all tokens up to now, or with --incremental-streaming-output the new ones."""
        meta = event["meta_info"]
        ids = event["output_ids"]
        if len(ids) == meta["completion_tokens"]:
            ids = ids[known:]
        reason = meta.get("finish_reason")
        histogram = meta.get("spec_correct_drafts_histogram") or meta.get("spec_accept_histogram")
        return ids, reason and reason["type"], histogram

    def counters(self):
        """Nothing: what counts is in the answers."""

    def accepted(self, before, answers):
        """As Vllm.accepted. A reply of one token has no passes."""
        found = [answer.histogram for answer in answers if answer.histogram]
        if not found and any(len(answer.ids) > 1 for answer in answers):
            return None
        return added(found)


def added(histograms):
    """The sum of histograms of any length."""
    return [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]


def connect(flag, endpoint, targets):
    """The engine behind a URL, which has the target; ends the program if it has not."""
    remedy = f"start it with that one, or if it is, with --served-model-name {targets[0]}"
    model = server.find_served(flag, endpoint, targets, RETRIES, 60, remedy)
    engine = Sglang if model.get("owned_by") == "sglang" else Vllm
    return engine(f"{flag} {endpoint}", endpoint, model["id"], model.get("max_model_len"))


# ==================== Requests =======================================================================================


def ask(engine, what, ids, max_new_tokens, salt):
    """The Answer to a prompt; what: its name in messages. Raises ServerFailed."""

    def work():
        answer = Answer()
        start = time.perf_counter()
        end = None
        body = engine.request(ids, max_new_tokens, salt)
        for event in server.stream_answer(engine.endpoint, engine.path, body, SILENCE):
            if error := event.get("error"):
                raise server.ServerFailed(error["message"] if isinstance(error, dict) else error)
            new, reason, histogram = engine.read(event, len(answer.ids))
            end = reason or end
            answer.histogram = histogram or answer.histogram
            if new:
                answer.ids += new
                answer.arrivals.append((time.perf_counter() - start, len(new)))
        if end not in ("stop", "length") or not answer.ids:
            raise server.ServerFailed(f"the reply of {len(answer.ids)} tokens ends by {end}")
        return answer

    return server.keep_asking(engine.where, what, 0, work)


def converse(engine, number, prompt, max_new_tokens, salt):
    """[(row, Answer)] of a prompt and of those that follow, each behind the server's own reply."""
    found = []
    while prompt:
        turn = len(found) + 1
        what = f"prompt {number}, turn {turn}, of {len(prompt.ids)} tokens"
        answer = ask(engine, what, prompt.ids, max_new_tokens, salt)
        row = {
            "input_ids": prompt.ids + answer.ids,
            "loss_mask": [0] * len(prompt.ids) + [1] * len(answer.ids),
            "category": prompt.category,
            "prompt": number,
            "turn": turn,
            "seconds": answer.arrivals[-1][0],
            "parts": [count for _, count in answer.arrivals],
        }
        if answer.histogram:
            row["accepted_histogram"] = answer.histogram
        found.append((row, answer))
        prompt = prompt.following(answer.ids)
    return found


def run_set(engine, prompts, concurrency, max_new_tokens, salt):
    """Measured of a set: {number: Prompt}. Raises ServerFailed."""

    def work(item):
        return converse(engine, *item, max_new_tokens, salt)

    before = engine.counters()
    with ThreadPool(concurrency) as pool:
        start = time.perf_counter()
        found = list(itertools.chain.from_iterable(pool.imap(work, prompts.items())))
        seconds = time.perf_counter() - start
    rows = [row for row, _ in found]
    answers = [answer for _, answer in found]
    return Measured(rows, answers, seconds, engine.accepted(before, answers))


def split_sets(prompts, concurrency, by_category):
    """[{number: Prompt}]: sets of one category or of any, large enough to keep `concurrency` requests under way."""
    groups = collections.defaultdict(dict)
    for number, prompt in enumerate(prompts):
        groups[prompt.category if by_category else None][number] = prompt
    sets = []
    for group in groups.values():
        count = max(1, len(group) // (SET_SIZE * concurrency))
        sets += [dict(list(group.items())[part::count]) for part in range(count)]
    return sets


# ==================== Measuring ======================================================================================


def warm_up(engines, prompt, salt):
    """The first reply of each engine; ends the program if the first one has no draft, or the baseline has one."""
    for number, engine in enumerate(engines):
        measured = run_set(engine, {0: prompt}, 1, WARM_UP, salt)
        if not number and measured.histogram is None:
            common.fail(f"{engine.where} counts no drafts: {engine.without_draft}")
        if number and measured.histogram is not None:
            common.fail(f"{engine.where} has a draft: start it without one, it is what the draft is compared with")


def check_lengths(engines, prompts, max_new_tokens):
    """End the program if a server cannot read a prompt and write the reply; second turns show it when they are sent."""
    for engine in engines:
        for number, prompt in enumerate(prompts):
            needed = len(prompt.ids) + max_new_tokens
            if engine.longest and needed > engine.longest:
                common.fail(
                    f"{engine.where} reads {engine.longest} tokens, prompt {number} and its reply may have {needed}: "
                    "give it a larger context, or leave out such prompts"
                )


def measure(engines, prompts, levels, max_new_tokens):
    """{concurrency: [[Measured of each set] of each engine]}; any fault of a server ends the program.

    engines: that with the draft, and the baseline if there is one. They get each set in turn, in alternating order, so
    that a noisy machine hits both. The smallest concurrency has sets by category.
    """
    check_lengths(engines, prompts, max_new_tokens)
    run = uuid.uuid4().hex  # prompts that a server has cached in an earlier run would be faster
    found = {}
    try:
        warm_up(engines, prompts[0], f"{run} warm-up")
        for concurrency in levels:
            sets = split_sets(prompts, concurrency, concurrency == min(levels))
            found[concurrency] = [[] for _ in engines]
            for number, part in enumerate(tqdm(sets, f"concurrency {concurrency}", unit="set", mininterval=2)):
                turn = list(zip(engines, found[concurrency], strict=True))
                for engine, measured in turn if number % 2 == 0 else turn[::-1]:
                    measured.append(run_set(engine, part, concurrency, max_new_tokens, f"{run} {concurrency}"))
    except server.ServerFailed as error:
        common.fail(error)
    return found


# ==================== Figures ========================================================================================


def acceptance(sets, positions=0):
    """Acceptance of measured sets; accepted_by_position[i] is the share of passes that accepted draft i.

    positions: at least as many; the histograms of SGLang end with the most drafts that a pass accepted.
    """
    histogram = added([[0] * (positions + 1), *(measured.histogram for measured in sets)])
    passes = sum(histogram)
    shares = [sum(histogram[i:]) / max(passes, 1) for i in range(1, len(histogram))]
    return {
        "acceptance_length": 1 + sum(shares),
        "accepted_by_position": shares,
        "passes": passes,
        "prompts": sum(len(measured.rows) for measured in sets),
    }


def quantiles(seconds):
    """Median and 90th percentile; None of nothing."""
    if not seconds:
        return None
    return {"median": float(np.median(seconds)), "p90": float(np.quantile(seconds, 0.9))}


def speed(sets):
    """new_tokens, seconds and tokens_per_second of measured sets; time to the first token and per further token."""
    answers = [answer for measured in sets for answer in measured.answers]
    new_tokens = sum(len(answer.ids) for answer in answers)
    seconds = sum(measured.seconds for measured in sets)
    first = [answer.arrivals[0][0] for answer in answers]
    further = []
    for answer in answers:
        count = len(answer.ids) - answer.arrivals[0][1]
        if count:
            further.append((answer.arrivals[-1][0] - answer.arrivals[0][0]) / count)
    return {
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
        "seconds_to_first_token": quantiles(first),
        "seconds_per_token": quantiles(further),
    }


def equal_texts(sets, others):
    """(texts that are equal, texts) of two engines, among those with equal prompts."""
    same = 0
    count = 0
    for row, other in zip(rows_of(sets), rows_of(others), strict=True):
        length = row["loss_mask"].count(0)
        if row["loss_mask"].count(0) == other["loss_mask"].count(0) and (
            row["input_ids"][:length] == other["input_ids"][:length]
        ):
            count += 1
            same += row["input_ids"] == other["input_ids"]
    return same, count


def rows_of(sets):
    """The rows of measured sets in the order of their prompts."""
    rows = [row for measured in sets for row in measured.rows]
    return sorted(rows, key=lambda row: (row["prompt"], row["turn"]))
