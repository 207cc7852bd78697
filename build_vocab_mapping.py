"""The draft vocabulary: which of the target's tokens the draft's head has a row for.

In:  token counts of the supervised tokens (token_freq.pt, written by prepare_data.py).
Out: d2t.npy  int64 [Vd]  offsets: target id = draft id + d2t[draft id], the target ids ascending
     t2d.npy  bool  [V]   True where a target token is in the draft vocabulary

    python build_vocab_mapping.py --token_freq_path prepared/token_freq.pt --draft_vocab_size 32000 \
        --target_model_path meta-llama/Llama-3.1-8B-Instruct --output_path ./vocab_mapping

    python build_vocab_mapping.py --token_freq_path tiny/token_freq.pt --draft_vocab_size 256 \
        --target_vocab_size 400 --output_path ./vocab_mapping
"""

import contextlib
from pathlib import Path

from core import common, target_files, vocabulary


def read_vocab_size(target_model_path):
    """The target's vocabulary size from its config.json: the rows of its head, which may exceed its tokenizer's."""
    path = target_files.locate(target_model_path, ["config.json"]) / "config.json"
    config, problem = common.read_object(path)
    if problem:
        common.fail(f"{path}: {problem}")
    text_config = config.get("text_config", config)
    if not isinstance(text_config, dict):
        common.fail(f"{path}: its text_config is not a JSON object")
    size = text_config.get("vocab_size", config.get("vocab_size"))
    if size is None:  # Gemma 3's files omit values that are the family's defaults
        from transformers import AutoConfig

        with contextlib.suppress(OSError, ValueError, KeyError):
            config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
            size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        common.fail(f"{path} has no vocab_size: give --target_vocab_size")
    return size


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument_group("the draft vocabulary").add_argument
    size = common.at_least(int, 1)
    add("--token_freq_path", default="./token_freq.pt", help="counts of the supervised tokens")
    add("--draft_vocab_size", type=size, default=32000, help="tokens of the draft vocabulary")
    add("--target_vocab_size", type=size, help="tokens of the target's vocabulary; none: give target_model_path")
    add("--target_model_path", help="folder or hub id of the target, whose config.json has the size")
    add("--output_path", default="./vocab_mapping", help="folder for d2t.npy and t2d.npy")
    args = parser.parse_args(argv)
    if (args.target_vocab_size is None) == (args.target_model_path is None):
        common.fail("give one of --target_vocab_size and --target_model_path")
    return args


def main(args):
    common.check_writable("output_path", args.output_path)
    token_freq = vocabulary.read_token_freq(args.token_freq_path)
    target_vocab_size = args.target_vocab_size
    if target_vocab_size is None:
        target_vocab_size = read_vocab_size(args.target_model_path)
    d2t, t2d = vocabulary.build_mapping(token_freq, args.draft_vocab_size, target_vocab_size)
    vocabulary.save_mapping(args.output_path, d2t, t2d)
    covered = vocabulary.coverage(token_freq, t2d)
    total = sum(token_freq.values())
    print(
        f"draft vocabulary: {len(d2t):,} of {len(t2d):,} tokens, {covered:.3%} of {total:,} supervised tokens covered"
    )
    used = sum(count > 0 and bool(t2d[token]) for token, count in token_freq.items())
    if unused := len(d2t) - used:
        print(f"{unused:,} tokens of the draft vocabulary never occur: filled with the lowest unused ids")
    print(f"written to {Path(args.output_path) / 'd2t.npy'} and t2d.npy")


if __name__ == "__main__":
    main(parse_args())
