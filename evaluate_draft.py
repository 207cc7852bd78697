"""Measure a draft as serving uses it: real speculative decoding against the target, one chain of drafts per pass.

In:  a target, a draft checkpoint (flat or speculators form), and prompts: a data set of conversations (without the
     reply at their end) or of {"prompt": text}, or a folder written by prepare_data.py (its validation rows, up to
     the last reply).
Out: acceptance length, share accepted by position, tokens/s with and without the draft; with --output a folder with
     evaluation.json, acceptance.png and generations.jsonl: the texts as rows that prepare_data.py reads (input_ids,
     loss_mask), with the drafts accepted in each pass.

    python evaluate_draft.py --target_model_path M --draft_model_path output/final --prompts validation.jsonl
    python evaluate_draft.py --target_model_path M --draft_model_path output/final --prompts validation.jsonl \
        --num_draft_tokens 3 --max_new_tokens 64 --num_prompts 8 --temperature 0.7 --output measured

At temperature 0 every drafted text must equal the target's own greedy text, token by token, or the program ends with
exit code 1. One exception: a text of a half-precision target may leave it at a tie of rounding, if from there on the
target, which reads the text once more, gives each token a logit that is at most 4 % of the largest one below it. Such
texts are counted and printed. The program ends as well if the tokens below the largest are more than three and 5 % of
all tokens together.
At a higher temperature drafts are accepted by speculative sampling (arXiv 2211.17192), which keeps the target's
distribution.
"""

import copy
import io
import itertools
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import prepare_data
import train_eagle3
from core import (
    checkpoints,
    common,
    conversation_files,
    conversations,
    dataloader,
    draft_config,
    draft_files,
    rendering,
    target_files,
    target_model,
    vocabulary,
)

# ==================== Target and draft with their caches =============================================================


class Snapshot(NamedTuple):
    """A target's cache before a feed, and the tokens of that feed."""

    cache: DynamicCache
    length: int
    tokens: list


class CachedTarget:
    """The target with its cache: feeds tokens, forgets rejected ones."""

    def __init__(self, target):
        self.target = target
        self.length = 0
        self.cache = DynamicCache(config=target.config)
        self.snapshot = None
        # The single state of linear attention cannot drop tokens: it is copied before each feed.
        self.copies = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.cache.layers)
        if not self.copies:  # sliding windows forget what a rejection must restore
            self.cache.activate_past_recording()

    @torch.inference_mode()
    def feed(self, tokens, last=0):
        """tokens (list of n ids) -> auxiliary hidden states [n, 3·Ht], fp32 logits of what follows each [n, V].

        last: logits of the last tokens only, because those of a long prompt would fill the memory (0 = all).
        """
        device = self.target.embedding.device
        positions = torch.arange(self.length, self.length + len(tokens), device=device)[None]
        if self.copies:
            self.snapshot = Snapshot(copy.deepcopy(self.cache), self.length, tokens)
        output = self.target.decoder(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.length += len(tokens)
        return self.target.auxiliary(), self.target.head.logits(output.last_hidden_state[0, -last:])

    def forget(self, count):
        """Drop the last `count` tokens, all of them from the last feed."""
        if not count:
            return
        if self.copies:
            before = self.snapshot
            self.cache = before.cache
            self.length = before.length
            self.feed(before.tokens[:-count], last=1)
        else:
            self.cache.crop(-count)
            self.length -= count


class CachedDraft:
    """The draft with its cache. Slot j reads token x[j+1] and the target's hidden states at j (in a chain, its own)."""

    def __init__(self, draft, d2t):
        self.draft = draft
        self.target_ids = vocabulary.target_ids(d2t)
        self.windows = draft_files.windows(draft.config)
        self.cache = [None] * len(self.windows)  # of each layer: keys and values [slots, G, D]
        self.length = 0  # slots

    def _attend(self, layer, q, k, v):
        """Attention of n new slots, appended to the cache: each sees the cached slots and the new ones up to itself."""
        if self.cache[layer]:
            before_k, before_v = self.cache[layer]
            k = torch.cat([before_k, k])
            v = torch.cat([before_v, v])
        self.cache[layer] = (k, v)
        new = len(q)
        slots = len(k)
        mask = torch.ones(new, slots, dtype=torch.bool, device=q.device).tril(slots - new)
        if self.windows[layer]:
            mask = mask.triu(slots - new - self.windows[layer] + 1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)

    def _step(self, tokens, feature, first):
        device = feature.device
        positions = torch.arange(first, first + len(tokens), device=device)
        return self.draft.step(torch.tensor(tokens, device=device), feature, positions, self._attend)

    @torch.inference_mode()
    def propose(self, tokens, auxiliary, count, choose):
        """A chain of `count` drafted tokens after the last of `tokens`.

        tokens: the n ids that entered the text since the last call. auxiliary [n, 3·Ht]: the target's hidden states one
        position before each. Their slots stay in the cache, those of the chain are dropped.
        choose(logits [Vd]) -> index into the draft vocabulary. Returns target ids [count] and logits [count, Vd].
        """
        slots = self.length
        feature = self.draft.features(auxiliary.to(self.draft.fc.weight.dtype))
        feature, logits = self._step(tokens, feature, slots)
        kept = slots + len(tokens)
        drafted = []
        rows = []
        for position in range(count):
            rows.append(logits[-1].float())
            drafted.append(int(self.target_ids[choose(rows[-1])]))
            if position + 1 < count:
                feature, logits = self._step(drafted[-1:], feature[-1:], kept + position)
        self.cache = [(k[:kept], v[:kept]) for k, v in self.cache]
        self.length = kept
        return drafted, torch.stack(rows)


# ==================== Speculative decoding ===========================================================================


def greedy(logits):
    return int(logits.argmax())


def verify_greedy(drafted, _, target_logits):
    """The number of leading drafts that are the target's argmax, and the target's token after them."""
    own = target_logits.argmax(dim=-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == own[accepted]:
        accepted += 1
    return accepted, own[accepted]


def sampling(temperature, generator, draft_ids, vocab_size):
    """(choose, verify) of lossless speculative sampling. draft_ids [Vd]: target ids of the draft vocabulary.

    A draft x is kept with probability min(1, p(x) / q(x)); the first rejected one is replaced by a sample of
    max(p - q, 0), normalised. Every token is then distributed as the target's own (arXiv 2211.17192, theorem 1).
    """

    def draw(probabilities):
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def choose(logits):
        return draw((logits / temperature).softmax(dim=-1))

    def verify(drafted, draft_logits, target_logits):
        p = (target_logits / temperature).softmax(dim=-1)  # [n + 1, V]
        if not drafted:
            return 0, draw(p[-1])
        q = torch.zeros(len(drafted), vocab_size, device=p.device)
        q[:, draft_ids] = (draft_logits / temperature).softmax(dim=-1)
        for i, token in enumerate(drafted):
            chance = torch.rand((), generator=generator, device=p.device)
            if chance * q[i, token] >= p[i, token]:
                rest = (p[i] - q[i]).clamp(min=0)
                return i, draw(rest if rest.sum() > 0 else p[i])
        return len(drafted), draw(p[-1])

    return choose, verify


def speculate(target, draft, d2t, prompt, count, max_new_tokens, eos_ids, choose=greedy, verify=verify_greedy):
    """Generate with chains of `count` drafts. Returns the new token ids and the number of drafts accepted in each pass.

    choose(logits [Vd]) picks a draft; verify(drafted, their logits [n, Vd], the target's logits [n + 1, V]) returns how
    many to accept and the target's token after them. The reply's first token is the target's own; a pass is one further
    forward of the target. As in slots.acceptance_walk, drafts after the end of the reply (its end-of-turn token, or
    max_new_tokens) are not counted.
    """
    cached_target = CachedTarget(target)
    cached_draft = CachedDraft(draft, d2t)
    auxiliary, logits = cached_target.feed(prompt, last=1)
    _, first = verify([], None, logits)
    reply = [first]
    passes = []
    tokens = [*prompt[1:], first]  # of the draft's slots 0 .. len(prompt) - 1
    while len(reply) < max_new_tokens and reply[-1] not in eos_ids:
        drafted, draft_logits = cached_draft.propose(tokens, auxiliary, count, choose)
        auxiliary, logits = cached_target.feed([reply[-1], *drafted])
        accepted, own = verify(drafted, draft_logits, logits)
        cached_target.forget(count - accepted)
        tokens = [*drafted[:accepted], own]
        auxiliary = auxiliary[: accepted + 1]
        new = tokens[: max_new_tokens - len(reply)]
        end = next((i + 1 for i, token in enumerate(new) if token in eos_ids), len(new))
        reply += new[:end]
        passes.append(min(accepted, end))
    return reply, passes


def generate(target, prompt, max_new_tokens, eos_ids, choose=greedy):
    """The target without a draft, token by token with its cache. Returns the new token ids."""
    cached = CachedTarget(target)
    _, logits = cached.feed(prompt, last=1)
    reply = [choose(logits[-1])]
    while len(reply) < max_new_tokens and reply[-1] not in eos_ids:
        _, logits = cached.feed(reply[-1:])
        reply.append(choose(logits[-1]))
    return reply


# ==================== Prompts, target and draft ======================================================================


def read_prompts(path, tokenizer, limit=None, options=None, **flags):
    """Token ids of at most `limit` prompts of a data set or a prepared folder; a bad row ends the program.

    flags: of core/conversation_files.py. options: variables of the tokenizer's template. Of several replies the last
    one is left out: templates of reasoning targets render earlier ones as history, without the thought that the target
    would begin.
    """
    if Path(path, "data_config.json").is_file():
        prompts = read_prepared_prompts(path, tokenizer, limit)
    else:
        source = conversation_files.open_source(str(path), "prompt", flags)
        found = (read_prompt(line, tokenizer, source.place(number), options or {}) for number, line in source.rows())
        prompts = list(itertools.islice((prompt for prompt in found if prompt is not None), limit))
    if not prompts or not all(prompts):
        common.fail(f"{path} has no prompts, or an empty one")
    return prompts


def read_prepared_prompts(folder, tokenizer, limit):
    """Token ids of the rows of a folder of prepare_data.py, up to the last reply."""
    data, config = dataloader.open_data(folder)
    if config["ingredients"]["tokenizer"] != target_files.hash_tokenizer(tokenizer):
        common.fail(
            f"{folder} was prepared with another tokenizer or chat template than the target's: prepare it again"
        )
    rows = data["validation" if "validation" in data else "train"]
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    prompts = []
    for row in rows:
        starts = np.flatnonzero(np.diff(row["loss_mask"], prepend=0) == 1)
        prompts.append(row["input_ids"][: starts[-1]])
    return prompts


def read_prompt(line, tokenizer, place, options):
    """Token ids of the prompt in one row; None if it has no question, as parts of split chats.

    The prompt ends with the last question, or with the output of a tool after it.
    """
    where = f"line {place['line']} of {place['file']}"
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise conversations.Rejected("not an object", type(row).__name__)
        turns = conversations.find_turns(row)
        if isinstance(row.get("prompt"), str) and not turns:
            return tokenizer(row["prompt"])["input_ids"]
        if not conversations.has_turns(row):
            detail = f"fields {', '.join(row)[:100]}: name the one of the questions by --prompt_column"
            raise conversations.Rejected("unknown form", detail)
        opened = {field: conversations.with_reply(given) for field, given in turns.items()}
        messages, tools = conversations.read_conversation(row | opened)
        if not tokenizer.chat_template:
            raise conversations.Rejected("no chat template in the tokenizer", "name one with --chat_template")
        text = rendering.render(tokenizer, messages[:-1], tools, add_generation_prompt=True, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except conversations.Rejected as error:
        if error.args[0] == conversations.UNANSWERED:
            print(f"{where} is left out: {conversations.UNANSWERED}")
            return None
        common.fail(f"{where} is not a prompt: {': '.join(map(str, error.args))}")
    except Exception as error:  # not JSON, no chat template, or whatever the template's own code raises
        common.fail(f"{where} is not a prompt: {type(error).__name__}: {error}")


def check_tokens(path, prompts, vocab_size):
    """End the program if a prompt has a token that the target's embedding table does not have."""
    largest = max(map(max, prompts))
    if largest >= vocab_size:
        common.fail(
            f"{path} has token {largest}, the target's embedding table {vocab_size} rows: its tokenizer has tokens "
            "that the model does not have; leave such prompts out"
        )


def load_draft(config, tensors, target):
    """(DraftModel, d2t) of what read_draft returned, on the target's device and in its dtype."""
    device = target.embedding.device
    dtype = target.embedding.dtype
    tensors = dict(tensors)
    d2t = tensors.pop("d2t", torch.zeros(config["vocab_size"], dtype=torch.int64))
    tensors.pop("t2d", None)
    embedding = target.embedding
    if not draft_files.needs_embedding(config):
        embedding = tensors.pop(draft_files.EMBEDDING, embedding)
    draft = train_eagle3.DraftModel(config, embedding.to(device, dtype))
    draft.load_state_dict(tensors)
    return draft.to(device, dtype).eval(), d2t.to(device)


def eos_token_ids(target, tokenizer):
    """Ids that end a reply: from the target's generation configuration, its configuration, and the tokenizer."""
    eos_ids = set()
    for source in (getattr(target.model, "generation_config", None), target.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if isinstance(ids, list):
            eos_ids.update(ids)
        elif ids is not None:
            eos_ids.add(ids)
    return eos_ids


# ==================== Measuring ======================================================================================


# Several tokens in one forward round differently from one at a time. With perfect drafts, a bf16 SmolLM2-135M says
# another token at 2.4 % of the places, so that 12 of 12 texts of up to 128 tokens leave the greedy one; tiny random
# bf16 targets do at up to 3.9 %. The logits of the two tokens were up to 1.3 % and 3.3 % of the largest apart. Of the
# tokens, 1.2 % and up to 2.6 % were below the most likely one, the others as likely.
MARGIN = 0.04  # of the largest logit: a token that lies less than this below the most likely one is a tie
TIES = 0.05  # of the tokens: more ties than this, and three, are too many for rounding


def shortfalls(target, prompt, reply, start):
    """How far the logits of the tokens reply[start:] lie below the target's largest one there, as shares of it: [n].

    A part at a time, because the logits of a long text would fill the memory.
    """
    cached = CachedTarget(target)
    _, logits = cached.feed(prompt + reply[:start], last=1)
    found = []
    for first in range(start, len(reply), 64):
        tokens = reply[first : first + 64]
        _, following = cached.feed(tokens)
        logits = torch.cat([logits, following])
        told = logits[:-1]
        chosen = told.gather(1, torch.tensor(tokens, device=told.device)[:, None])[:, 0]
        found.append((told.amax(dim=-1) - chosen) / told.abs().amax(dim=-1))
        logits = logits[-1:]
    return torch.cat(found)


def find_wrong(target, prompt, reply, alone, at):
    """Judge a text that leaves `alone`, the target's own, at token `at`: (its first wrong token or None, ties).

    A token is wrong if its logit is further below the largest than rounding explains; one that is nearer is a tie.
    """
    if target.embedding.dtype == torch.float32 or at >= min(len(reply), len(alone)):
        return at, 0
    if not shortfalls(target, prompt, alone[: at + 1], at) < MARGIN:
        return at, 0
    below = shortfalls(target, prompt, reply, at)
    wrong = (~(below < MARGIN)).nonzero()  # or not a number
    return (at + int(wrong[0]) if len(wrong) else None), int((below > 0).sum())


def check_greedy(target, prompts, rows, alone):
    """Note where the last row's text leaves `alone`, the target's own; exit code 1 unless rounding explains it."""
    number = len(rows) - 1
    prompt = prompts[number]
    row = rows[-1]
    reply = row["input_ids"][len(prompt) :]
    if reply == alone:
        return
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(reply, alone)) if a != b)
    wrong, row["rounding_ties"] = find_wrong(target, prompt, reply, alone, at)
    row["parted_by_rounding_at"] = at
    ties = sum(row.get("rounding_ties", 0) for row in rows)
    tokens = sum(sum(row["loss_mask"]) for row in rows)
    if wrong == at:
        problem = (
            f"prompt {number}: the drafted text leaves the target's greedy text at token {at}: "
            f"{reply[at : at + 5]} instead of {alone[at : at + 5]}"
        )
    elif wrong is not None:
        problem = (
            f"prompt {number}: the drafted text leaves the target's greedy text at token {at} by rounding, but goes on "
            f"at token {wrong} with {reply[wrong : wrong + 5]}, which the target would not say"
        )
    elif ties > 3 + TIES * tokens:
        problem = (
            f"{ties} of {tokens} drafted tokens are nearly the target's most likely, but not quite: too many for "
            "rounding"
        )
    else:
        return
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(1)


def measure(target, draft, d2t, prompts, args, eos_ids):
    """Generate a reply to every prompt with the draft and without; returns one row per prompt."""
    choose = greedy
    verify = verify_greedy
    if args.temperature > 0:
        generator = torch.Generator(target.embedding.device).manual_seed(args.seed)
        choose, verify = sampling(args.temperature, generator, vocabulary.target_ids(d2t), target.config.vocab_size)

    def with_draft(prompt, max_new_tokens):
        count = args.num_draft_tokens
        return speculate(target, draft, d2t, prompt, count, max_new_tokens, eos_ids, choose, verify)

    # The first forward of a process pays for allocations and kernels: not measured.
    generate(target, prompts[0], 4, eos_ids, choose)
    with_draft(prompts[0], 4)
    rows = []
    for prompt in prompts:
        start = time.perf_counter()
        alone = generate(target, prompt, args.max_new_tokens, eos_ids, choose)
        middle = time.perf_counter()
        reply, passes = with_draft(prompt, args.max_new_tokens)
        end = time.perf_counter()
        rows.append(
            {
                "input_ids": prompt + reply,
                "loss_mask": [0] * len(prompt) + [1] * len(reply),
                "passes": passes,
                "seconds": end - middle,
                "tokens_alone": len(alone),
                "seconds_alone": middle - start,
            }
        )
        if args.temperature == 0:
            check_greedy(target, prompts, rows, alone)
    return rows


def summarise(rows, args):
    """The figures of an evaluation as a dict; accepted_by_position[i] is the share of passes that accepted draft i."""
    passes = [accepted for row in rows for accepted in row["passes"]]
    count = max(len(passes), 1)
    new_tokens = sum(sum(row["loss_mask"]) for row in rows)
    with_draft = new_tokens / sum(row["seconds"] for row in rows)
    alone = sum(row["tokens_alone"] for row in rows) / sum(row["seconds_alone"] for row in rows)
    positions = range(args.num_draft_tokens)
    return {
        "acceptance_length": 1 + sum(passes) / count,
        "accepted_by_position": [sum(accepted > i for accepted in passes) / count for i in positions],
        "passes": len(passes),
        "prompts": len(rows),
        "new_tokens": new_tokens,
        "texts_parted_by_rounding": sum("parted_by_rounding_at" in row for row in rows),
        "rounding_ties": sum(row.get("rounding_ties", 0) for row in rows),
        "tokens_per_second_with_draft": with_draft,
        "tokens_per_second_without": alone,
        "speedup": with_draft / alone,
        "settings": vars(args),
    }


# ==================== Report =========================================================================================


def plot(figures):
    """acceptance.png as bytes: the share of passes that accepted the draft at each position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = figures["accepted_by_position"]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.bar(range(1, len(shares) + 1), shares, color="#3b6ea5")
    axes.set(xlabel="position of the draft in the chain", ylabel="share of passes that accept it", ylim=(0, 1))
    axes.set_title(f"acceptance length {figures['acceptance_length']:.2f} over {figures['passes']} passes")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)
    return image.getvalue()


def print_figures(figures, is_greedy):
    length = figures["acceptance_length"]
    print(f"acceptance_length {length:.3f} over {figures['passes']} passes of {figures['prompts']} prompts")
    shares = " ".join(f"{share:.3f}" for share in figures["accepted_by_position"])
    print(f"accepted by position {shares}")
    print(
        f"tokens/s {figures['tokens_per_second_with_draft']:.1f} with the draft, "
        f"{figures['tokens_per_second_without']:.1f} without: {figures['speedup']:.2f} times as fast"
    )
    if is_greedy:
        parted = figures["texts_parted_by_rounding"]
        exception = f", except for {parted} that leave it at a rounding tie" if parted else ""
        print(f"every text equals the target's own greedy text{exception}")


def write_report(folder, figures, rows, tokenizer):
    """evaluation.json, generations.jsonl and acceptance.png."""
    common.write_atomic(folder / "evaluation.json", json.dumps(figures, indent=2) + "\n")
    lines = []
    for row in rows:
        reply = tokenizer.decode(row["input_ids"][-sum(row["loss_mask"]) :])
        lines.append(json.dumps({**row, "reply": reply}) + "\n")
    common.write_atomic(folder / "generations.jsonl", "".join(lines))
    common.write_atomic(folder / "acceptance.png", plot(figures))


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    parser = common.Parser(__doc__)

    add = parser.add_argument_group("target, draft and prompts").add_argument
    add("--target_model_path", required=True, help="folder or hub id of the target")
    add("--draft_model_path", required=True, help="draft in flat or speculators form, or a run's output folder")
    add("--prompts", required=True, help='conversations or {"prompt": text} in any form of prepare_data.py --dataset')
    add("--prompt_split", help="split of a hub data set; none: test, else validation, or its only one")
    conversation_files.add_flags(add)
    add("--num_prompts", type=common.at_least(int, 1), help="use the first prompts only; none: all")
    add(
        "--chat_template",
        choices=(*prepare_data.TEMPLATES, "auto"),
        default="auto",
        help="of conversations; qwen3-thinking and -instruct switch thinking",
    )
    add("--trust_remote_code", action=common.Switch, help="run code that comes with the target")

    add = parser.add_argument_group("generation and output").add_argument
    add("--num_draft_tokens", type=common.at_least(int, 1), default=7, help="drafts per pass")
    add("--max_new_tokens", type=common.at_least(int, 1), default=128, help="tokens per reply")
    add("--temperature", type=common.at_least(float, 0), default=0.0, help="0 = greedy")
    add("--seed", type=common.SEED, default=0, help="of sampling at a temperature above 0")
    add("--output", help="folder for the figures, texts and plot; none: printed only")
    return parser.parse_args(argv)


def main(args):
    folder = common.open_output(args.output)
    is_prepared = Path(args.prompts, "data_config.json").is_file()
    if is_prepared and args.chat_template != "auto":
        common.fail(f"chat_template {args.chat_template}: the rows of {args.prompts} are rendered already, drop it")
    model_dir = target_files.resolve_target(args.target_model_path)
    tokenizer = target_files.load_tokenizer(args.target_model_path, args.trust_remote_code)
    template = prepare_data.TEMPLATES.get(args.chat_template)
    if not is_prepared:
        tokenizer, _ = rendering.with_own_template(tokenizer, args.chat_template, template)
    flags = {name: getattr(args, name) for name in conversation_files.PROMPT_FLAGS}
    prompts = read_prompts(args.prompts, tokenizer, args.num_prompts, template and template.options, **flags)
    text_config, target_config = target_files.read_target_config(model_dir, args.trust_remote_code)
    check_tokens(args.prompts, prompts, text_config.vocab_size)
    config, tensors = draft_files.read_draft(checkpoints.find_draft(args.draft_model_path))
    draft_config.check_target(f"the draft {args.draft_model_path}", config, text_config)
    target_model.check_weights(model_dir, target_config, args.trust_remote_code)
    target = target_model.load(
        model_dir,
        "cuda" if torch.cuda.is_available() else "cpu",
        layer_ids=draft_files.auxiliary_layers(config),
        trust_remote_code=args.trust_remote_code,
    )
    draft, d2t = load_draft(config, tensors, target)
    rows = measure(target, draft, d2t, prompts, args, eos_token_ids(target, tokenizer))
    figures = summarise(rows, args)
    print_figures(figures, is_greedy=args.temperature == 0)
    if folder:
        write_report(folder, figures, rows, tokenizer)


if __name__ == "__main__":
    main(parse_args())
