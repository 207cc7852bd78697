"""Measure a draft as serving uses it: real speculative decoding against the target, a chain of drafts at a time.

In:  a target, a draft checkpoint (flat or speculators form), and prompts: JSON Lines of conversations (what stands
     before the last assistant turn) or of {"prompt": text}, or a folder written by prepare_data.py (what stands before
     the first supervised token of its validation rows).
Out: acceptance length, share accepted by position, tokens/s with and without the draft; with --output a folder with
     evaluation.json, acceptance.png and generations.jsonl: the texts as rows that prepare_data.py reads (input_ids,
     loss_mask), with the drafts accepted in each pass.

    python evaluate_draft.py --target_model_path M --draft_model_path output/final --prompts validation.jsonl
    python evaluate_draft.py --target_model_path M --draft_model_path output/final --prompts validation.jsonl \
        --num_draft_tokens 3 --max_new_tokens 64 --num_prompts 8 --temperature 0.7 --output measured

With temperature 0 every drafted text must equal the target's own greedy text, token by token, or the program ends with
exit code 1. One exception: a text of a half-precision target may part from it at the target's two most likely tokens,
if their logits are within 3 % of the largest. Such texts are counted and printed, and end the program as well if they
are more than one and more than a quarter of all.
With a higher temperature drafts are accepted by speculative sampling (arXiv 2211.17192), which leaves the target's
distribution as it is.
"""

import copy
import io
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import prepare_data
import train_eagle3
from core import common, conversations, dataloader, draft_files, target_files, target_model, vocabulary


class CachedTarget:
    """The target with its cache: feeds tokens, forgets rejected ones."""

    def __init__(self, target):
        self.target, self.length = target, 0
        self.cache, self.before = DynamicCache(config=target.config), None
        # Linear attention has one state for all that was read: tokens are not taken out of it, they are not put in.
        self.copies = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.cache.layers)
        if not self.copies:  # sliding windows forget what a rejection must bring back
            self.cache.activate_past_recording()

    @torch.inference_mode()
    def feed(self, tokens, last=0):
        """tokens (list of n ids) -> auxiliary hidden states [n, 3·Ht], fp32 logits of what follows each [n, V].

        last: logits of so many tokens only, as a long prompt's would fill the memory (0 = all).
        """
        device = self.target.embedding.device
        positions = torch.arange(self.length, self.length + len(tokens), device=device)[None]
        if self.copies:
            self.before = copy.deepcopy(self.cache), self.length, tokens
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
        if count and self.copies:
            self.cache, self.length, tokens = self.before
            self.feed(tokens[:-count], last=1)
        elif count:
            self.cache.crop(-count)
            self.length -= count


class CachedDraft:
    """The draft with its cache. Slot j reads token x[j+1] and the target's hidden states at j (in a chain, its own)."""

    def __init__(self, draft, d2t):
        self.draft, self.target_ids = draft, vocabulary.target_ids(d2t)
        self.keys = self.values = None  # [slots, G, D]

    def _attend(self, q, k, v):
        """q, k, v of n new slots behind the cached ones; each sees the cache and the new slots up to itself."""
        self.keys = k if self.keys is None else torch.cat([self.keys, k])
        self.values = v if self.values is None else torch.cat([self.values, v])
        new, slots = len(q), len(self.keys)
        mask = torch.ones(new, slots, dtype=torch.bool, device=q.device).tril(slots - new)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, self.keys, self.values))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)

    def _step(self, tokens, feature, first):
        device = feature.device
        positions = torch.arange(first, first + len(tokens), device=device)
        return self.draft.step(torch.tensor(tokens, device=device), feature, positions, self._attend)

    @torch.inference_mode()
    def propose(self, tokens, auxiliary, count, choose):
        """A chain of `count` drafted tokens after the last of `tokens`.

        tokens: ids that entered the text since the last call (n of them), auxiliary [n, 3·Ht]: the target's hidden
        states one position before each. Their slots stay in the cache, the chain's own are dropped again.
        choose(logits [Vd]) -> index into the draft vocabulary. Returns target ids [count] and logits [count, Vd].
        """
        slots = 0 if self.keys is None else len(self.keys)
        feature = self.draft.features(auxiliary.to(self.draft.fc.weight.dtype))
        feature, logits = self._step(tokens, feature, slots)
        kept = slots + len(tokens)
        drafted, rows = [], []
        for step in range(count):
            rows.append(logits[-1].float())
            drafted.append(int(self.target_ids[choose(rows[-1])]))
            if step + 1 < count:
                feature, logits = self._step(drafted[-1:], feature[-1:], kept + step)
        self.keys, self.values = self.keys[:kept], self.values[:kept]
        return drafted, torch.stack(rows)


def greedy(logits):
    return int(logits.argmax())


def verify_greedy(drafted, _, target_logits):
    """How many leading drafts are the target's argmax, and the target's token behind them."""
    own = target_logits.argmax(dim=-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == own[accepted]:
        accepted += 1
    return accepted, own[accepted]


def sampling(temperature, generator, draft_ids, vocabulary):
    """(choose, verify) of lossless speculative sampling. draft_ids [Vd]: target ids of the draft vocabulary.

    A draft x is kept with probability min(1, p(x) / q(x)), the first rejected one replaced by a sample of
    max(p - q, 0), normalised: so every token is distributed as the target's own.
    """

    def draw(probabilities):
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def choose(logits):
        return draw((logits / temperature).softmax(dim=-1))

    def verify(drafted, draft_logits, target_logits):
        p = (target_logits / temperature).softmax(dim=-1)  # [n + 1, V]
        if not drafted:
            return 0, draw(p[-1])
        q = torch.zeros(len(drafted), vocabulary, device=p.device)
        q[:, draft_ids] = (draft_logits / temperature).softmax(dim=-1)
        for i, token in enumerate(drafted):
            chance = torch.rand((), generator=generator, device=p.device)
            if chance * q[i, token] >= p[i, token]:
                rest = (p[i] - q[i]).clamp(min=0)
                return i, draw(rest if rest.sum() > 0 else p[i])
        return len(drafted), draw(p[-1])

    return choose, verify


def speculate(target, draft, d2t, prompt, count, max_new_tokens, eos_ids, choose=greedy, verify=verify_greedy):
    """Generate with chains of `count` drafts. Returns the new token ids and the accepted drafts of every pass.

    The reply's first token is the target's own; a pass is one further forward of the target. As in acceptance_walk of
    train_eagle3.py, drafts behind the end of the reply (its end-of-turn token, or max_new_tokens) are not counted.
    """
    cached_target, cached_draft = CachedTarget(target), CachedDraft(draft, d2t)
    auxiliary, logits = cached_target.feed(prompt, last=1)
    reply, passes = [verify([], None, logits)[1]], []
    tokens = [*prompt[1:], reply[0]]  # of the draft's slots 0 .. len(prompt) - 1
    while len(reply) < max_new_tokens and reply[-1] not in eos_ids:
        drafted, rows = cached_draft.propose(tokens, auxiliary, count, choose)
        auxiliary, logits = cached_target.feed([reply[-1], *drafted])
        accepted, own = verify(drafted, rows, logits)
        cached_target.forget(count - accepted)
        tokens, auxiliary = [*drafted[:accepted], own], auxiliary[: accepted + 1]
        room = max_new_tokens - len(reply)
        new = tokens[:room]
        end = next((i + 1 for i, token in enumerate(new) if token in eos_ids), len(new))
        reply += new[:end]
        passes.append(min(accepted, end))
    return reply, passes


def generate(target, prompt, max_new_tokens, eos_ids, choose=greedy):
    """The target alone, token by token with its cache. Returns the new token ids."""
    cached = CachedTarget(target)
    reply = [choose(cached.feed(prompt, last=1)[1][-1])]
    while len(reply) < max_new_tokens and reply[-1] not in eos_ids:
        reply.append(choose(cached.feed(reply[-1:])[1][-1]))
    return reply


def read_prompts(path, tokenizer, limit=None, options=None):
    """Token ids of at most `limit` prompts of a JSON Lines file or a prepared folder; a bad row ends the program.

    options: variables of the tokenizer's template. Of a row with several turns the last reply is to be given again:
    templates of targets that reason render earlier ones as history, without the thought that the target would begin.
    """
    if Path(path).is_dir():
        data, config = dataloader.open_data(path)
        if config["ingredients"]["tokenizer"] != target_files.hash_tokenizer(tokenizer):
            common.fail(
                f"{path} was prepared with another tokenizer or chat template than the target's: prepare it again"
            )
        rows = data["validation" if "validation" in data else "train"]
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        starts = [np.flatnonzero(np.diff(row["loss_mask"], prepend=0) == 1)[-1] for row in rows]
        prompts = [row["input_ids"][:start] for row, start in zip(rows, starts, strict=True)]
    elif Path(path).is_file():
        lines = itertools.islice(conversations.read_lines(path), limit)
        prompts = [read_prompt(line, tokenizer, f"line {number} of {path}", options or {}) for number, line in lines]
    else:
        common.fail(f"prompts {path} does not exist")
    if not prompts or not all(prompts):
        common.fail(f"{path} has no prompts, or an empty one")
    return prompts


def read_prompt(line, tokenizer, where, options):
    """Token ids of the prompt in one line of a JSON Lines file."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise conversations.Rejected("not an object", type(row).__name__)
        if isinstance(row.get("prompt"), str):
            return tokenizer(row["prompt"])["input_ids"]
        messages, tools = conversations.read_conversation(row)
        text = prepare_data.render(tokenizer, messages[:-1], tools, add_generation_prompt=True, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except conversations.Rejected as error:
        common.fail(f"{where} is not a prompt: {': '.join(map(str, error.args))}")
    except Exception as error:  # not JSON, no chat template, or whatever the template's own code raises
        common.fail(f"{where} is not a prompt: {type(error).__name__}: {error}")


def check_fit(folder, config, text):
    """End the program if the draft with this configuration is not one of the target with this text configuration."""
    sizes = {"hidden_size": config.get("target_hidden_size", config["hidden_size"]), "vocab_size": config["vocab_size"]}
    for key, value in sizes.items():
        if value != getattr(text, key):
            common.fail(
                f"the draft {folder} is another target's: its {key} is {value}, this target's {getattr(text, key)}"
            )


def load_draft(config, tensors, target):
    """(DraftModel, d2t) of what read_draft returned, on the target's device and in its dtype."""
    device, dtype, tensors = target.embedding.device, target.embedding.dtype, dict(tensors)
    d2t = tensors.pop("d2t", torch.zeros(config["vocab_size"], dtype=torch.int64))
    tensors.pop("t2d", None)
    draft = train_eagle3.DraftModel(config, tensors.pop("embed_tokens.weight", target.embedding).to(device, dtype))
    draft.load_state_dict(tensors)
    return draft.to(device, dtype).eval(), d2t.to(device)


def eos_token_ids(target, tokenizer):
    """Ids that end a reply: the target's generation configuration's, its configuration's, and the tokenizer's."""
    sources = (getattr(target.model, "generation_config", None), target.config, tokenizer)
    found = [getattr(source, "eos_token_id", None) for source in sources]
    return {i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])}


def is_rounding(target, prompt, reply, alone, at):
    """Whether two texts part at token `at` because a half-precision target holds both tokens for equally likely.

    Several tokens in one forward round differently from one at a time. Perfect drafts for random bf16 and fp16 targets
    parted at logits up to 2.7 % of the largest apart, those for fp32 targets never. No third token may be more likely
    than either: rounding does not bring forward what the target would not say.
    """
    if target.embedding.dtype == torch.float32 or at >= min(len(reply), len(alone)):
        return False
    logits = CachedTarget(target).feed(prompt + reply[:at], last=1)[1][-1]
    pair = logits[[reply[at], alone[at]]]
    close = (pair[0] - pair[1]).abs() < 0.03 * logits.abs().max()
    return bool(close and (logits > pair.min()).sum() <= 1)


def measure(target, draft, d2t, prompts, args, eos_ids):
    """Generate every prompt with the draft and without; returns one row a prompt."""
    device, rows = target.embedding.device, []
    generator = torch.Generator(device).manual_seed(args.seed)
    choose, verify = greedy, verify_greedy
    if args.temperature > 0:
        choose, verify = sampling(args.temperature, generator, vocabulary.target_ids(d2t), target.config.vocab_size)
    for number, prompt in enumerate(prompts):
        if number == 0:  # the first forward of a process pays for allocations and kernels: not measured
            generate(target, prompt, 4, eos_ids, choose)
            speculate(target, draft, d2t, prompt, args.num_draft_tokens, 4, eos_ids, choose, verify)
        start = time.perf_counter()
        alone = generate(target, prompt, args.max_new_tokens, eos_ids, choose)
        middle = time.perf_counter()
        reply, passes = speculate(
            target, draft, d2t, prompt, args.num_draft_tokens, args.max_new_tokens, eos_ids, choose, verify
        )
        rows.append(
            {
                "input_ids": prompt + reply,
                "loss_mask": [0] * len(prompt) + [1] * len(reply),
                "passes": passes,
                "seconds": time.perf_counter() - middle,
                "tokens_alone": len(alone),
                "seconds_alone": middle - start,
            }
        )
        if args.temperature == 0 and reply != alone:
            at = next(i for i, (a, b) in enumerate(itertools.zip_longest(reply, alone)) if a != b)
            rows[-1]["parted_by_rounding_at"] = at
            parted = sum("parted_by_rounding_at" in row for row in rows)
            if not is_rounding(target, prompt, reply, alone, at):
                error = (
                    f"prompt {number}: the drafted text leaves the target's greedy text at token {at}: "
                    f"{reply[at : at + 5]} instead of {alone[at : at + 5]}"
                )
            elif parted > max(1, len(prompts) / 4):
                error = (
                    f"{parted} of {number + 1} drafted texts leave the target's greedy text at tokens nearly as "
                    f"likely, more than a quarter of {len(prompts)}: too many for rounding"
                )
            else:
                continue
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1)
    return rows


def summarise(rows, args):
    """The figures of an evaluation as a dict; accepted_by_position[i] is the share of passes that accepted draft i."""
    passes = [n for row in rows for n in row["passes"]]
    new_tokens = sum(sum(row["loss_mask"]) for row in rows)
    with_draft = new_tokens / sum(row["seconds"] for row in rows)
    alone = sum(row["tokens_alone"] for row in rows) / sum(row["seconds_alone"] for row in rows)
    return {
        "acceptance_length": 1 + sum(passes) / max(len(passes), 1),
        "accepted_by_position": [
            sum(n > i for n in passes) / max(len(passes), 1) for i in range(args.num_draft_tokens)
        ],
        "passes": len(passes),
        "prompts": len(rows),
        "new_tokens": new_tokens,
        "texts_parted_by_rounding": sum("parted_by_rounding_at" in row for row in rows),
        "tokens_per_second_with_draft": with_draft,
        "tokens_per_second_without": alone,
        "speedup": with_draft / alone,
        "settings": vars(args),
    }


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


FLAGS = {
    "target, draft and prompts": [
        ("target_model_path", str, ..., "folder or hub id of the target"),
        ("draft_model_path", str, ..., "draft checkpoint, flat or speculators form"),
        ("prompts", str, ..., 'JSON Lines of conversations or {"prompt": text}, or a prepared folder'),
        ("num_prompts", int, None, "use only the first so many; none: all", 1),
        (
            "chat_template",
            (*prepare_data.TEMPLATES, "auto"),
            "auto",
            "of JSON Lines; qwen3-thinking and -instruct switch thinking",
        ),
        ("trust_remote_code", common.boolean, False, "run code that comes with the target"),
    ],
    "generation and output": [
        ("num_draft_tokens", int, 7, "drafts a pass", 1),
        ("max_new_tokens", int, 128, "tokens a reply", 1),
        ("temperature", float, 0.0, "0 = greedy", 0),
        ("seed", int, 0, "of sampling with a temperature"),
        ("output", str, None, "folder for the figures, texts and plot; none: printed only"),
    ],
}


def parse_args(argv=None):
    return common.parse_flags(__doc__, FLAGS, argv)


def main(args):
    model_dir = target_files.resolve_target(args.target_model_path)
    tokenizer = target_files.load_tokenizer(args.target_model_path, args.trust_remote_code)
    template = prepare_data.TEMPLATES.get(args.chat_template)
    prompts = read_prompts(args.prompts, tokenizer, args.num_prompts, template and template.options)
    config, tensors = draft_files.read_draft(args.draft_model_path)
    check_fit(args.draft_model_path, config, target_files.read_target_config(model_dir, args.trust_remote_code)[0])
    folder = common.open_output(args.output)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = target_model.load(
        model_dir, device, layer_ids=draft_files.auxiliary_layers(config), trust_remote_code=args.trust_remote_code
    )
    draft, d2t = load_draft(config, tensors, target)
    rows = measure(target, draft, d2t, prompts, args, eos_token_ids(target, tokenizer))
    figures = summarise(rows, args)

    shares = " ".join(f"{share:.3f}" for share in figures["accepted_by_position"])
    print(
        f"acceptance_length {figures['acceptance_length']:.3f} over {figures['passes']} passes of {len(rows)} prompts"
    )
    print(f"accepted by position {shares}")
    print(
        f"tokens/s {figures['tokens_per_second_with_draft']:.1f} with the draft, "
        f"{figures['tokens_per_second_without']:.1f} without: {figures['speedup']:.2f} times as fast"
    )
    if args.temperature == 0:
        parted = figures["texts_parted_by_rounding"]
        print(
            "every text equals the target's own greedy text"
            + (f", but for {parted} that part from it at a rounding tie" if parted else "")
        )
    if folder:
        common.write_atomic(folder / "evaluation.json", json.dumps(figures, indent=2) + "\n")
        for row in rows:
            row["reply"] = tokenizer.decode(row["input_ids"][-sum(row["loss_mask"]) :])
        common.write_atomic(folder / "generations.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        common.write_atomic(folder / "acceptance.png", plot(figures))


if __name__ == "__main__":
    main(parse_args())
