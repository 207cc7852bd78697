"""What only a GPU can show: kernels that are right, compiled once and never waited for; and how fast they are.

Out: two Markdown tables on stdout and, with --output, in a file. Exit code 1 if a check fails.

    python benchmarks/gpu.py                                  # eight minutes at most
    python benchmarks/gpu.py --device cpu --tiny              # tries the program where there is no GPU

Checks: loss and gradients in bf16 against the dense form in float64, beside what that form itself is off in bf16; no
graph is compiled for new lengths; a step never waits for the device; collectives of one rank. Times: the objective
against its floor; the target's forward on concatenated sequences, each alone, against transformers' own masks; the
objective's memory by length where 512 chains stand for all.
"""

import copy
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import objective  # noqa: E402  (neither the root nor benchmarks/ is on the path of a script that lies elsewhere)
import step  # noqa: E402

from core import ranks, slots  # noqa: E402

CHAINS = 512
LENGTHS = [2048, 8192, 32768, 131072]
COLUMNS = (
    "what",
    "measured",
    "beside it",
    "ratio",
)

# ==================== Checks: "" if right, else what is wrong ========================================================


def check_numbers(args, config):
    """The objective in args.dtype is at most twice as far from the dense form in float64 as that form in args.dtype."""
    masks = [objective.tail(length, 60) for length in (300, 7, 129)]
    case = objective.make_case(args, config, masks, 4)
    exact = copy.deepcopy(case)
    exact["draft"].double().embedding = exact["draft"].embedding.double()
    exact["head"].weight = exact["head"].weight.double()
    for name in ("auxiliary", "last"):
        exact[name] = exact[name].double()
    expected = step.loss_and_gradients(exact, "dense")
    gaps = {}
    for side in ("dense", "product"):
        found = step.loss_and_gradients(case, side)
        gaps[side] = max(map(step.relative_gap, found, expected))
    if gaps["product"] < 2 * gaps["dense"] + 1e-5:
        return ""
    return f"off by {gaps['product']:.2g}, the dense form by {gaps['dense']:.2g}"


def check_compiled(args, config):
    """Nothing is compiled for lengths that were not there before."""
    run_lengths(args, config, [700, 330, 5])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run_lengths(args, config, [1200, 64, 801, 2])
    more = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    return f"{more} graphs for new lengths" if more else ""


def run_lengths(args, config, lengths):
    for length in lengths:
        case = objective.make_case(args, config, [objective.tail(length, 50)], 4)
        objective.forward_backward(case, "product")


def check_waiting(args, config):
    """A step hands all its work to the device without waiting for a result."""
    if args.device.type != "cuda":
        return "left out: it needs a GPU"
    case = objective.make_case(args, config, [objective.tail(900, 50)], 4)
    objective.forward_backward(case, "product")
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.forward_backward(case, "product")
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def check_collectives(args, config):
    """NCCL, or gloo on a CPU, with one rank: a sum, and what core/ranks.py gathers."""
    backend = "nccl" if args.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            ones = torch.ones(8, device=args.device)
            dist.all_reduce(ones)
            gathered = ranks.gather({"rank": 0})
        finally:
            dist.destroy_process_group()
    if ones.sum() == 8 and gathered == [{"rank": 0}]:
        return ""
    return f"{ones.tolist()}, {gathered}"


CHECKS = {
    "bf16 against float64": check_numbers,
    "compiled once": check_compiled,
    "no waiting": check_waiting,
    "collectives": check_collectives,
}

# ==================== Times ==========================================================================================


def time_objective(args):
    """The objective, beside its floor."""
    columns = args.draft_vocab_sizes[-1]
    for share in args.shares:
        row = step.measure(args, share, args.lengths[-1], args.ttt_lengths[-1], columns)
        name = f"objective, {share:g} % of {args.lengths[-1]:,} tokens, s; its floor"
        yield name, row["product s"], row["floor s"], row["product/floor"]


def time_target(args):
    """A forward of the target on concatenated sequences, beside one with transformers' mask of tokens x tokens."""
    target = step.load_target(args)
    for count, length in args.target_sizes:
        alone, masked = time_forwards(args, target, count, length)
        yield f"target, {count} x {length:,} tokens, s; with a mask", alone, masked, alone / masked


def time_forwards(args, target, count, length):
    """Median seconds of both forwards, in turn."""
    ids = torch.randint(len(target.embedding), (count * length,), device=args.device)
    positions = torch.arange(len(ids), device=args.device) % length

    def each_alone():
        target.hidden_states(ids, [length] * count)

    @torch.no_grad()
    def with_mask():
        target.decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)

    alone = []
    masked = []
    for _ in range(args.rounds + 1):
        alone.append(objective.seconds(each_alone, args.device))
        masked.append(objective.seconds(with_mask, args.device))
    return statistics.median(alone[1:]), statistics.median(masked[1:])  # the first ones compile and allocate


def measure_chains(args, config):
    """The objective's peak memory where CHAINS chains stand for all, by length; beside it, that of all chains."""
    for length in args.memory_lengths:
        drawn = peak_of_chains(args, config, length, CHAINS)
        every = None
        ratio = None
        if length <= LENGTHS[1]:
            every = peak_of_chains(args, config, length, length)
            ratio = drawn / every
        yield f"objective, {length:,} tokens, {CHAINS} chains, MiB; all chains", drawn, every, ratio


def peak_of_chains(args, config, length, most):
    """MiB of the objective with at most this many chains of one sequence."""
    mask = objective.tail(length, 60)
    case = objective.make_case(args, config, [mask], args.ttt_lengths[-1])
    supervised = case["supervised"].cpu()
    chosen = slots.choose_slots(supervised[0], [length], most, torch.rand(length))
    plan = slots.plan_slots(supervised & chosen, [length])
    case["plan"] = objective.place(plan, args.device)
    return objective.peak_memory(case, "product") / 2**20


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    parser = step.make_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, in seconds")
    parser.set_defaults(mode="objective", lengths=[4096], ttt_lengths=[7], skip_dense=True, skip_memory=True)
    args = step.resolve(parser.parse_args(argv))
    args.target_sizes = [(8, 512), (2, 2048), (4, 8192)]  # sequences, tokens of each
    args.memory_lengths = LENGTHS
    if args.tiny:
        args.target_sizes = [(2, 64)]
        args.memory_lengths = [600]
    return args


def main(args):
    torch.set_num_threads(args.threads)
    config = objective.draft_config(args, args.draft_vocab_sizes[-1])
    step.put_header(args, ("check", "outcome"), f"Draft: {step.describe_draft(args)}.")
    wrong = False
    for name, check in CHECKS.items():
        problem = check(args, config)
        wrong |= bool(problem) and not problem.startswith("left out")
        step.put(args, step.cells((name, problem or "right")))
    step.put(args, "", step.cells(COLUMNS), f"|{' ---: |' * len(COLUMNS)}")
    for rows in (time_objective(args), time_target(args), measure_chains(args, config)):
        for row in rows:
            step.put(args, step.cells(row))
    sys.exit(int(wrong))


if __name__ == "__main__":
    main(parse_args())
