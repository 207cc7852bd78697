"""The commands and their flags."""

import argparse

import build_vocab_mapping
import compare_runs
import evaluate_draft
import export_draft
import import_target
import prepare_data
import prepare_hidden_states
import train_dflash
import train_eagle3

SCRIPTS = (
    prepare_data, build_vocab_mapping, import_target, prepare_hidden_states, export_draft, train_eagle3, evaluate_draft,
    compare_runs, train_dflash,
)  # fmt: skip


def flags_of(script):
    """{flag: argparse action} of a script's parser, caught on its way through parse_args."""
    found = {}

    def catch(parser, *args, **kwargs):
        found.update({option: action for action in parser._actions for option in action.option_strings})
        raise KeyboardInterrupt

    original, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, catch
    try:
        script.parse_args([])
    except KeyboardInterrupt:
        pass
    finally:
        argparse.ArgumentParser.parse_args = original
    return found
