"""A draft where it is served: prompts to a running vLLM or SGLang server, acceptance by the server's own counters.

In:  the URL of a server with target and draft, prompts (core/prompts.py), the numbers of requests under way at once;
     optionally the URL of a baseline, a second server with the target alone, which gets each set of prompts as well.
Out: acceptance, tokens/s, time to the first token and per token for each concurrency; the texts, a row each.

Every request has token ids in place of a text, is greedy, and shares no cached prompt with an earlier run or level.
"""

import collections
import io
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
            return server.read_answer(self.endpoint, "metrics").decode()

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
            time.sleep(0.02)
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
        what = f"prompt {number}, turn {prompt.turn}, of {len(prompt.ids)} tokens"
        answer = ask(engine, what, prompt.ids, max_new_tokens, salt)
        row = {
            "input_ids": prompt.ids + answer.ids,
            "loss_mask": [0] * len(prompt.ids) + [1] * len(answer.ids),
            "category": prompt.category,
            "prompt": number,
            "turn": prompt.turn,
            "seconds": answer.arrivals[-1][0],
            "parts": [count for _, count in answer.arrivals],
        }
        if answer.histogram:
            row["accepted_histogram"] = answer.histogram
        found.append((row, answer))
        prompt = prompt.following(answer.ids)
    return found


def run_set(engine, asked, concurrency, max_new_tokens, salt):
    """Measured of a set: {number: Prompt}. Raises ServerFailed."""

    def work(item):
        return converse(engine, *item, max_new_tokens, salt)

    before = engine.counters()
    with ThreadPool(concurrency) as pool:
        start = time.perf_counter()
        found = list(itertools.chain.from_iterable(pool.imap(work, asked.items())))
        seconds = time.perf_counter() - start
    rows = [row for row, _ in found]
    answers = [answer for _, answer in found]
    return Measured(rows, answers, seconds, engine.accepted(before, answers))


def split_sets(asked, concurrency, by_category):
    """[{number: Prompt}]: sets of one category or of any, large enough to keep `concurrency` requests under way."""
    groups = collections.defaultdict(dict)
    for number, prompt in enumerate(asked):
        groups[prompt.category if by_category else None][number] = prompt
    sets = []
    for group in groups.values():
        count = max(1, len(group) // (SET_SIZE * concurrency))
        sets += [dict(list(group.items())[part::count]) for part in range(count)]
    return sets


# ==================== Measuring ======================================================================================


def check_lengths(engine, asked, max_new_tokens):
    """End the program if a server cannot read a prompt and write the reply; second turns show it when they are sent."""
    for number, prompt in enumerate(asked):
        needed = len(prompt.ids) + max_new_tokens
        if engine.longest and needed > engine.longest:
            common.fail(
                f"{engine.where} reads {engine.longest} tokens, prompt {number} and its reply may have {needed}: "
                "give it a larger context, or leave out such prompts"
            )


def check_draft(engine, measured, is_baseline):
    """End the program if a server has no draft, or the baseline has one."""
    if is_baseline and measured.histogram:
        common.fail(f"{engine.where} has a draft: start it without one, it is what the draft is compared with")
    if not is_baseline and measured.histogram is None:
        common.fail(f"{engine.where} counts no drafts: {engine.without_draft}")


def measure(engines, asked, levels, max_new_tokens):
    """{concurrency: [[Measured of each set] of each engine]}; any fault of a server ends the program.

    engines: that with the draft, and the baseline if there is one. They get each set in turn, in alternating order, so
    that a noisy machine hits both. The smallest concurrency has sets by category.
    """
    run = uuid.uuid4().hex  # prompts that a server has cached in an earlier run would be faster

    def measure_set(number, part, concurrency, count, salt):
        measured = run_set(engines[number], part, concurrency, count, f"{run} {salt}")
        check_draft(engines[number], measured, is_baseline=number > 0)
        return measured

    numbers = list(range(len(engines)))
    found = {}
    try:
        for number in numbers:
            check_lengths(engines[number], asked, max_new_tokens)
            measure_set(number, {0: asked[0]}, 1, WARM_UP, "warm-up")
        for concurrency in levels:
            sets = split_sets(asked, concurrency, concurrency == min(levels))
            smallest = min(map(len, sets))
            if smallest < concurrency:
                print(f"concurrency {concurrency}: a set has {smallest} prompts, so no more are under way at once")
            found[concurrency] = [[] for _ in engines]
            for part in tqdm(sets, f"concurrency {concurrency}", unit="set", mininterval=2):
                for number in numbers:
                    measured = measure_set(number, part, concurrency, max_new_tokens, concurrency)
                    found[concurrency][number].append(measured)
                numbers.reverse()
    except server.ServerFailed as error:
        common.fail(error)
    return found


# ==================== Figures ========================================================================================


def acceptance(histograms, prompts, positions):
    """Acceptance in a number of prompts; accepted_by_position[i] is the share of passes that accepted draft i.

    positions: at least as many, because the histograms of SGLang end with the most drafts that a pass accepted.
    """
    histogram = added([[0] * (positions + 1), *histograms])
    passes = sum(histogram)
    shares = [sum(histogram[i:]) / max(passes, 1) for i in range(1, len(histogram))]
    return {
        "acceptance_length": 1 + sum(shares),
        "accepted_by_position": shares,
        "passes": passes,
        "prompts": prompts,
    }


def grouped(pairs, positions):
    """{name: acceptance} of [(name, histogram, number of prompts)]; {} unless there are several names."""
    groups = collections.defaultdict(list)
    for name, *measured in pairs:
        groups[name or "none"].append(measured)
    if len(groups) < 2:
        return {}
    found = {}
    for name, measured in groups.items():
        histograms, counts = zip(*measured, strict=True)
        found[name] = acceptance(histograms, sum(counts), positions)
    return found


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


def rows_of(sets):
    """The rows of measured sets in the order of their prompts."""
    rows = [row for measured in sets for row in measured.rows]
    return sorted(rows, key=lambda row: (row["prompt"], row["turn"]))


def compare_texts(sets, others):
    """How many prompts both engines got alike, which second turns are not always, and how many texts of them agree."""
    texts = {}
    for row in rows_of(others):
        start = row["loss_mask"].index(1)
        texts[tuple(row["input_ids"][:start]), row["prompt"]] = row["input_ids"]
    compared = 0
    equal = 0
    for row in rows_of(sets):
        start = row["loss_mask"].index(1)
        other = texts.get((tuple(row["input_ids"][:start]), row["prompt"]))
        compared += other is not None
        equal += other == row["input_ids"]
    return {"compared": compared, "equal": equal}


def summarise_level(concurrency, sets, others, positions):
    """The figures of one concurrency; others: the sets of the baseline, if there is one."""
    measured = speed(sets)
    histograms = [part.histogram for part in sets]
    figures = {"concurrency": concurrency, **acceptance(histograms, len(rows_of(sets)), positions)}
    figures["tokens_per_second_with_draft"] = measured.pop("tokens_per_second")
    figures |= measured
    if others:
        figures["baseline"] = speed(*others)
        figures["tokens_per_second_without"] = figures["baseline"]["tokens_per_second"]
        figures["speedup"] = figures["tokens_per_second_with_draft"] / figures["tokens_per_second_without"]
        figures["texts_of_baseline"] = compare_texts(sets, *others)
    return figures


def summarise(found):
    """The figures of measure(), named as those of evaluate_draft.py; above all those of the smallest concurrency.

    Acceptance by turn is known if each answer says its own.
    """
    positions = max(len(part.histogram) for sets, *_ in found.values() for part in sets) - 1
    levels = [summarise_level(count, sets, others, positions) for count, (sets, *others) in found.items()]
    lowest = min(found)
    sets = found[lowest][0]
    by_category = [(part.rows[0]["category"], part.histogram, len(part.rows)) for part in sets]
    rows = rows_of(sets)
    by_turn = [(row["turn"], row["accepted_histogram"], 1) for row in rows if "accepted_histogram" in row]
    figures = next(dict(level) for level in levels if level["concurrency"] == lowest)
    del figures["concurrency"]
    return figures | {
        "by_category": grouped(by_category, positions),
        "by_turn": grouped(by_turn, positions),
        "by_concurrency": levels,
    }


def evaluate(args, asked, targets):
    """(figures, rows of the smallest concurrency) of the server and the baseline that the flags name.

    targets: names and folders of the target, one of which a server has to have.
    """
    engines = [connect("server", args.server, targets)]
    if args.baseline:
        engines.append(connect("baseline", args.baseline, targets))
    levels = list(dict.fromkeys(args.concurrency or [1]))
    found = measure(engines, asked, levels, args.max_new_tokens)
    figures = summarise(found)
    figures["engine"] = type(engines[0]).__name__.lower()
    return figures, rows_of(found[min(found)][0])


# ==================== Report =========================================================================================


def in_milliseconds(times):
    """Median and 90th percentile as texts."""
    return ["-", "-"] if times is None else [f"{1000 * times[name]:.0f}" for name in ("median", "p90")]


def table_of(figures):
    """The levels as lines for common.format_table; that of the baseline follows each level."""
    first = ["requests at once", "draft", "length", "tokens/s", "speedup"]
    table = [[*first, "first token, ms", "90 %", "each further, ms", "90 %"]]
    for level in figures["by_concurrency"]:
        rate = f"{level['tokens_per_second_with_draft']:.1f}"
        speedup = f"{level['speedup']:.2f}" if "speedup" in level else "-"
        cells = [str(level["concurrency"]), "yes", f"{level['acceptance_length']:.3f}", rate, speedup]
        table.append(cells + times_of(level))
        if baseline := level.get("baseline"):
            cells = [str(level["concurrency"]), "no", "1", f"{baseline['tokens_per_second']:.1f}", "1"]
            table.append(cells + times_of(baseline))
    return table


def times_of(figures):
    """Both times, as cells."""
    return in_milliseconds(figures["seconds_to_first_token"]) + in_milliseconds(figures["seconds_per_token"])


def print_levels(figures):
    """The table by concurrency, and whether the texts are the baseline's."""
    print(common.format_table(table_of(figures)))
    for level in figures["by_concurrency"]:
        if texts := level.get("texts_of_baseline"):
            print(
                f"concurrency {level['concurrency']}: {texts['equal']} of {texts['compared']} texts behind equal "
                "prompts equal the baseline's"
            )


def plot(figures):
    """serving.png as bytes: tokens/s with the draft and without at each concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levels = figures["by_concurrency"]
    places = np.arange(len(levels))
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    bars = axes.bar(places, [level["tokens_per_second_with_draft"] for level in levels], 0.4, label="with the draft")
    if "speedup" in figures:
        axes.bar_label(bars, [f"{level['speedup']:.2f} x" for level in levels])
        axes.bar(places + 0.4, [level["tokens_per_second_without"] for level in levels], 0.4, label="without")
        axes.legend()
    axes.set_xticks(places, [str(level["concurrency"]) for level in levels])
    axes.set(xlabel="requests under way at once", ylabel="tokens/s of all requests")
    axes.set_title(f"acceptance length {figures['acceptance_length']:.2f} over {figures['passes']} passes")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)
    return image.getvalue()
