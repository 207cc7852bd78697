"""Chat templates of the model families, conversations, and what has to be supervised in them. A family is

- a row of templates/families.json: the file of its template, the names that --chat_template may have for it, and its
  special tokens, of which the first begins a text and the second ends it (~ in front: swallows the blanks behind it);
- templates/NAME.jinja: a template with the markers of the family's own, and what that does with reasoning and calls;
- templates/FAMILY.txt: each of templates/conversations.json as text, supervised between ⟦ and ⟧, or the cause for which
  the row is rejected. A line `## CONVERSATION` stands before each.

FAMILIES: name -> (special tokens, template). CONVERSATIONS: name -> row.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken

from helpers import tiny

FOLDER = Path(__file__).resolve().parents[1] / "templates"
ROWS = json.loads((FOLDER / "families.json").read_text())
CONVERSATIONS = json.loads((FOLDER / "conversations.json").read_text())


def special_token(text):
    return AddedToken(text[1:], special=True, rstrip=True) if text[0] == "~" else text


FAMILIES = {
    name: ([special_token(text) for text in row["special_tokens"]], (FOLDER / row["template"]).read_text().rstrip("\n"))
    for name, row in ROWS.items()
}


def names_of(family):
    """The values of --chat_template that fit it."""
    return ROWS[family]["chat_template"]


def expected(family):
    """{conversation: its text with ⟦ and ⟧, or "rejected: CAUSE"}."""
    parts = (FOLDER / f"{family}.txt").read_text().removeprefix("## ").split("\n## ")
    parts[-1] = parts[-1].removesuffix("\n")
    return dict(part.split("\n", 1) for part in parts)


def family_tokenizer(family, texts=tiny.TEXTS):
    special, template = FAMILIES[family]
    begin, end = (str(getattr(token, "content", token)) for token in special[:2])
    return tiny.train_tokenizer(texts, 400, special, template, bos_token=begin, eos_token=end)


def marked(ids, mask, tokenizer):
    """The text of the tokens with each run of supervised ones between ⟦ and ⟧."""
    borders = [0, *np.flatnonzero(np.diff(mask)) + 1, len(ids)]
    parts = zip(borders, borders[1:], strict=False)
    return "".join(("⟦{}⟧" if mask[a] else "{}").format(tokenizer.decode(ids[a:b])) for a, b in parts)
