"""Measure a draft as serving uses it: real speculative decoding against the target, a chain or a tree per pass.

In:  a target, a draft checkpoint (flat or speculators form), and prompts: a benchmark by its name, a data set of
     conversations (without the reply at their end), of {"prompt": text} or of MT-Bench's {"turns", "category"}, or a
     folder written by prepare_data.py (its validation rows, up to the last reply).
Out: acceptance length and share accepted by position, of all prompts and by category, tokens/s with and without the
     draft; with --output a folder with evaluation.json, acceptance.png and generations.jsonl: the texts as rows that
     prepare_data.py reads (input_ids, loss_mask), with the drafts accepted in each pass.

    python evaluate_draft.py --target_model_path M --draft_model_path output/final --prompts validation.jsonl
    python evaluate_draft.py --target_model_path M --draft_model_path output/final --prompts mt_bench --output measured
    python evaluate_draft.py --target_model_path M --prompts mt_bench --server http://localhost:8000 \
        --baseline http://localhost:8001 --concurrency 1 4 --output measured
    python evaluate_draft.py --target_model_path M --draft_model_path output/final --prompts validation.jsonl \
        --num_draft_tokens 3 --max_new_tokens 64 --num_prompts 8 --temperature 0.7 --output measured
    python evaluate_draft.py --target_model_path M --draft_model_path output/final --prompts mt_bench --tree dynamic
    deepspeed --num_gpus 2 evaluate_draft.py --target_model_path M --draft_model_path output/final \
        --prompts mt_bench --tp_size 2

At temperature 0 every drafted text must equal the target's own greedy text, token by token, or the program ends with
exit code 1. One exception: a text of a half-precision target may leave it at a tie of rounding, if from there on the
target, which reads the text once more, gives each token a logit that is at most 4 % of the largest one below it. Such
texts are counted and printed. The program ends as well if the tokens below the largest are more than three and 5 % of
all tokens together.
At a higher temperature drafts are accepted by speculative sampling (arXiv 2211.17192), which keeps the target's
distribution.

With --server the prompts go to a running vLLM or SGLang server instead, greedily. Acceptance is then what the server
counts; neither target nor draft is loaded here.
"""

import io
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import prepare_data
import train_dflash
import train_eagle3
from core import (
    block_files,
    checkpoints,
    common,
    conversation_files,
    decoding,
    draft_config,
    draft_files,
    draft_trees,
    evaluations,
    prompts,
    ranks,
    rendering,
    served,
    serving,
    target_files,
    target_model,
    vocabulary,
)

# ==================== Target and draft ===============================================================================


def load_draft(config, tensors, target):
    """(DraftModel, d2t) of what read_draft returned, on the target's device and in its dtype."""
    device = target.embedding.device
    dtype = target.embedding.dtype
    tensors = dict(tensors)
    d2t = tensors.pop("d2t", torch.zeros(config["vocab_size"], dtype=torch.int64))
    tensors.pop("t2d", None)
    embedding = target.embedding
    if block_files.is_block(config):
        rows = vocabulary.target_ids(d2t).to(device)
        head = tensors.pop("lm_head.weight", target.head.weight[rows])
        draft = train_dflash.DraftModel(config, embedding, head.to(device, dtype))
        draft.confidence_head = None  # drafts do not depend on it, and others' drafts have it in other forms
        draft.load_state_dict({name: x for name, x in tensors.items() if not name.startswith("confidence_head.")})
        return draft.to(device, dtype).eval(), d2t.to(device)
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
    cached = decoding.CachedTarget(target)
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


def check_greedy(target, rows, alone):
    """Note where the last row's text leaves `alone`, the target's own; exit code 1 unless rounding explains it."""
    row = rows[-1]
    number = row["prompt"]
    prompt = row["input_ids"][: row["loss_mask"].index(1)]
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


def measure(target, draft, d2t, asked, args, eos_ids, numbers=None):
    """Generate a reply to every prompt with the draft and without; returns one row per prompt and turn.

    Each next turn of a prompt follows the target's own reply, whatever the draft. numbers: of these prompts among all,
    if ranks share them; samples of a prompt hang on its number and the seed alone.
    """
    if not asked:
        return []
    choose = decoding.greedy
    verify = decoding.verify_greedy
    if args.temperature > 0:
        generator = torch.Generator(target.embedding.device)
        draft_ids = vocabulary.target_ids(d2t)
        choose, verify = decoding.sampling(args.temperature, generator, draft_ids, target.config.vocab_size)
    shape = draft_trees.shape_of(args)

    def with_draft(prompt, max_new_tokens):
        if shape:
            return draft_trees.speculate(target, draft, d2t, prompt, shape, max_new_tokens, eos_ids, choose)
        count = args.num_draft_tokens
        return decoding.speculate(target, draft, d2t, prompt, count, max_new_tokens, eos_ids, choose, verify)

    # The first forward of a process pays for allocations and kernels: not measured.
    decoding.generate(target, asked[0].ids, 4, eos_ids, choose)
    with_draft(asked[0].ids, 4)
    rows = []
    waiting = list(zip(numbers or range(len(asked)), asked, strict=True))
    waiting.reverse()
    while waiting:
        number, prompt = waiting.pop()
        if args.temperature > 0 and prompt.turn == 1:
            generator.manual_seed(args.seed + number)
        start = time.perf_counter()
        alone = decoding.generate(target, prompt.ids, args.max_new_tokens, eos_ids, choose)
        middle = time.perf_counter()
        reply, passes = with_draft(prompt.ids, args.max_new_tokens)
        end = time.perf_counter()
        rows.append(
            {
                "input_ids": prompt.ids + reply,
                "loss_mask": [0] * len(prompt.ids) + [1] * len(reply),
                "prompt": number,
                "category": prompt.category,
                "turn": prompt.turn,
                "passes": passes,
                "seconds": end - middle,
                "tokens_alone": len(alone),
                "seconds_alone": middle - start,
            }
        )
        if args.temperature == 0:
            check_greedy(target, rows, alone)
        if following := prompt.following(alone):
            waiting.append((number, following))
    return rows


def measure_shared(target, draft, d2t, asked, args, eos_ids, copies):
    """`measure` where ranks share the prompts: `copies` groups of consecutive ranks hold a copy of the target each.

    All rows, in the order of the prompts, on every rank.
    """
    size = dist.get_world_size() // copies
    copy = dist.get_rank() // size
    numbers = range(copy, len(asked), copies)
    rows = measure(target, draft, d2t, asked[copy::copies], args, eos_ids, numbers)
    gathered = ranks.gather(rows)
    for rank, found in enumerate(gathered):
        first = gathered[rank // size * size]
        if [row["input_ids"] for row in found] != [row["input_ids"] for row in first]:
            ranks.fail_together(f"rank {rank} has other texts than rank {rank // size * size}, which shares its target")
    rows = [row for found in gathered[::size] for row in found]
    return sorted(rows, key=lambda row: (row["prompt"], row["turn"]))


def summarise_passes(rows, num_draft_tokens):
    """What the target accepted in rows; accepted_by_position[i] is the share of passes that accepted draft i."""
    passes = [accepted for row in rows for accepted in row["passes"]]
    count = max(len(passes), 1)
    return {
        "acceptance_length": 1 + sum(passes) / count,
        "accepted_by_position": [sum(accepted > i for accepted in passes) / count for i in range(num_draft_tokens)],
        "passes": len(passes),
        "prompts": len(rows),
    }


def summarise_by(name, rows, num_draft_tokens):
    """{value: summarise_passes} of the rows with each value of a field; {} unless there are several."""
    groups = {}
    for row in rows:
        groups.setdefault(row[name] or "none", []).append(row)
    if len(groups) < 2:
        return {}
    return {value: summarise_passes(group, num_draft_tokens) for value, group in groups.items()}


def summarise(rows, args):
    """The figures of an evaluation as a dict."""
    new_tokens = sum(sum(row["loss_mask"]) for row in rows)
    with_draft = new_tokens / sum(row["seconds"] for row in rows)
    alone = sum(row["tokens_alone"] for row in rows) / sum(row["seconds_alone"] for row in rows)
    longest = args.depth or args.num_draft_tokens  # drafts that a pass can accept
    return summarise_passes(rows, longest) | {
        "by_category": summarise_by("category", rows, longest),
        "by_turn": summarise_by("turn", rows, longest),
        "new_tokens": new_tokens,
        "texts_parted_by_rounding": sum("parted_by_rounding_at" in row for row in rows),
        "rounding_ties": sum(row.get("rounding_ties", 0) for row in rows),
        "tokens_per_second_with_draft": with_draft,
        "tokens_per_second_without": alone,
        "speedup": with_draft / alone,
        "sglang_flags": draft_trees.sglang_flags(args),
        "settings": vars(args),
    }


# ==================== Report =========================================================================================


def plot(figures):
    """acceptance.png as bytes: the share of passes that accepted the draft at each position, also by category."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = figures["accepted_by_position"]
    positions = range(1, len(shares) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.bar(positions, shares, color="#c9d8e8", label="all")
    for name, group in figures["by_category"].items():
        label = f"{name}: {group['acceptance_length']:.2f}"
        axes.plot(positions, group["accepted_by_position"], marker="o", markersize=3, label=label)
    if figures["by_category"]:
        axes.legend(title="acceptance length", fontsize=8)
    axes.set(xlabel="position of the draft", ylabel="share of passes that accept it", ylim=(0, 1))
    axes.set_title(f"acceptance length {figures['acceptance_length']:.2f} over {figures['passes']} passes")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)
    return image.getvalue()


def print_groups(figures):
    """The tables by category and by turn, where there are several."""
    for name in ("category", "turn"):
        groups = figures[f"by_{name}"]
        if not groups:
            continue
        table = [[name, "prompts", "passes", "length", "accepted by position"]]
        for value, group in groups.items():
            shares = " ".join(f"{share:.3f}" for share in group["accepted_by_position"])
            length = f"{group['acceptance_length']:.3f}"
            table.append([str(value), str(group["prompts"]), str(group["passes"]), length, shares])
        print(common.format_table(table))


def print_figures(figures, is_greedy):
    length = figures["acceptance_length"]
    print_groups(figures)
    print(f"acceptance_length {length:.3f} over {figures['passes']} passes of {figures['prompts']} prompts")
    shares = " ".join(f"{share:.3f}" for share in figures["accepted_by_position"])
    print(f"accepted by position {shares}")
    print(
        f"tokens/s {figures['tokens_per_second_with_draft']:.1f} with the draft, "
        f"{figures['tokens_per_second_without']:.1f} without: {figures['speedup']:.2f} times as fast"
    )
    if figures["sglang_flags"]:
        flags = " ".join(f"{name} {value}" for name, value in figures["sglang_flags"].items())
        print(f"SGLang serves this with {flags}")
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
    add("--draft_model_path", help="draft in flat or speculators form, or a run's output folder; none: see --server")
    benchmarks = ", ".join(prompts.BENCHMARKS)
    add("--prompts", required=True, help=f"data set in any form of prepare_data.py --dataset, or {benchmarks}, gsm8k")
    add("--dataset_path", help="local copy of a benchmark's hub repository or its file, instead of a download")
    add("--prompt_split", help="split of a hub data set; none: test, else validation, or its only one")
    conversation_files.add_flags(add)
    add(
        "--num_prompts",
        type=common.at_least(int, 1),
        help="use the first prompts only, of each category in turn; none: all",
    )
    add(
        "--chat_template",
        choices=(*prepare_data.TEMPLATES, "auto"),
        default="auto",
        help="of conversations; qwen3-thinking and -instruct switch thinking",
    )
    add("--trust_remote_code", action=common.Switch, help="run code that comes with the target")

    target_model.add_sharing_flags(parser, batches=False)

    add = parser.add_argument_group("a running server, instead of a draft").add_argument
    add("--server", help="URL of a vLLM or SGLang server that has the target and a draft; none: both are loaded here")
    add("--baseline", help="URL of a second server that has the target alone, for the speedup")
    count = common.at_least(int, 1)
    add("--concurrency", type=count, nargs="+", help="requests under way at once, a number or several; none: 1")

    add = parser.add_argument_group("generation and output").add_argument
    draft_trees.add_flags(add)
    add("--max_new_tokens", type=common.at_least(int, 1), default=128, help="tokens per reply")
    add("--temperature", type=common.at_least(float, 0), default=0.0, help="0 = greedy")
    add("--seed", type=common.SEED, default=0, help="of sampling at a temperature above 0")
    add("--output", help="folder for the figures, texts and plot; none: printed only")
    add("--dist_timeout", type=common.above_zero, default=20, help="minutes a collective may take")
    add("--local_rank", type=int, default=-1, help="set by the launcher; -1 = from LOCAL_RANK")
    args = parser.parse_args(argv)
    draft_trees.fill_flags(args)
    return args


# What is read beside --server; the rest is the server's business.
BESIDE_SERVER = ("server", "baseline", "concurrency", "target_model_path", "prompts", "num_prompts", "chat_template",
                 "trust_remote_code", "max_new_tokens", "output", *conversation_files.PROMPT_FLAGS)  # fmt: skip


def check_flags(args):
    """End the program if a flag has no effect with --server or without it, or if there is no draft."""
    defaults = vars(parse_args(["--target_model_path", "", "--prompts", ""]))
    given = [name for name, value in vars(args).items() if value != defaults[name]]
    if args.server:
        unread = [name for name in given if name not in BESIDE_SERVER]
        why = "beside --server, which has its own draft and settings"
    else:
        unread = [name for name in given if name in ("baseline", "concurrency")]
        why = "without --server"
    if unread:
        common.fail(f"{', '.join(unread)}: without effect {why}, drop it")
    if not args.server and not args.draft_model_path:
        common.fail("draft_model_path is missing: name a draft, or by --server a server that has one")


def read_asked(args, weights=True):
    """(folder, text_config, config, tokenizer, prompts) of the target; ends the program if something is wrong."""
    common.open_output(args.output)
    is_prepared = Path(args.prompts, "data_config.json").is_file()
    if is_prepared and args.chat_template != "auto":
        common.fail(f"chat_template {args.chat_template}: the rows of {args.prompts} are rendered already, drop it")
    model_dir = target_files.resolve_target(args.target_model_path, weights=weights)
    tokenizer = target_files.load_tokenizer(args.target_model_path, args.trust_remote_code)
    template = prepare_data.TEMPLATES.get(args.chat_template)
    if not is_prepared:
        tokenizer, _ = rendering.with_own_template(tokenizer, args.chat_template, template)
    flags = {name: getattr(args, name) for name in conversation_files.PROMPT_FLAGS}
    options = template and template.options
    asked = prompts.read_prompts(args.prompts, tokenizer, args.num_prompts, options, **flags)
    text_config, target_config = target_files.read_target_config(model_dir, args.trust_remote_code)
    prompts.check_tokens(args.prompts, asked, text_config.vocab_size)
    return model_dir, text_config, target_config, tokenizer, asked


def evaluate_served(args):
    """Measure the draft of a running server, and report."""
    model_dir, _, _, tokenizer, asked = read_asked(args, weights=False)
    figures, rows = served.evaluate(args, asked, [args.target_model_path, model_dir])
    figures["settings"] = {name: getattr(args, name) for name in BESIDE_SERVER} | {"temperature": 0.0}
    if figures["engine"] == "vllm":  # SGLang says how many drafts were accepted, not how many there were
        figures["settings"]["num_draft_tokens"] = len(figures["accepted_by_position"])
    print_groups(figures)
    served.print_levels(figures)
    if args.output:
        folder = Path(args.output)
        write_report(folder, figures, rows, tokenizer)
        common.write_atomic(folder / "serving.png", served.plot(figures))


def prepare(args):
    """On the main rank, before the target loads: how ranks share it, prompts, tokenizer, drafts a pass.

    Ends the program if something is wrong.
    """
    sharding = target_model.resolve_sharding(args, dist.get_world_size())
    model_dir, text_config, target_config, tokenizer, asked = read_asked(args)
    config, _ = draft_files.read_draft(checkpoints.find_draft(args.draft_model_path))
    draft_config.check_target(f"the draft {args.draft_model_path}", config, text_config)
    count = draft_trees.count_drafts(args, config)
    if shape := draft_trees.shape_of(args):
        draft_trees.check(shape, text_config, config["draft_vocab_size"])
    target_model.check_heads(text_config, args.tp_size)
    target_model.check_weights(model_dir, target_config, args.trust_remote_code)
    return sharding, asked, tokenizer, count


def main(args):
    check_flags(args)
    if args.server:
        evaluate_served(args)
        return
    device = ranks.start_distributed(args.dist_timeout, args.local_rank)
    sharding, asked, tokenizer, args.num_draft_tokens = ranks.on_first_rank(lambda: prepare(args))
    model_dir = ranks.on_each_node(lambda: target_files.resolve_target(args.target_model_path))
    config, tensors = draft_files.read_draft(checkpoints.find_draft(args.draft_model_path))
    layers = draft_files.auxiliary_layers(config)
    target = target_model.load_as_asked(args, sharding, model_dir, device, layers)
    if args.tree != "none":
        draft_trees.check_masks(target)
    draft, d2t = load_draft(config, tensors, target)
    copies = 1 if sharding == "zero3" else dist.get_world_size() // args.tp_size
    rows = measure_shared(target, draft, d2t, asked, args, eos_token_ids(target, tokenizer), copies)
    if dist.get_rank() == 0:
        figures = summarise(rows, args) | evaluations.describe_origin(device)
        if block_files.is_block(config) or "SGLang" not in serving.find_engines(config)[0]:
            figures["sglang_flags"] = {}
        print_figures(figures, is_greedy=args.temperature == 0)
        if args.output:
            write_report(Path(args.output), figures, rows, tokenizer)


if __name__ == "__main__":
    ranks.run_watched(main, parse_args())
