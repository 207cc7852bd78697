"""Conversations as text by the target's own chat template, and which characters of it the assistant produces.

In:  rows with messages; a Chat: the tokenizer, the markers of its template, and what the template does with reasoning
     and calls.
Out: text, and spans [(start, end)] in characters: each assistant turn, its end marker included.
"""

import contextlib
import copy
import json
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from core import conversations

SECONDS = 20  # that a chat template may take for a conversation

OWN_TEMPLATES = Path(__file__).with_name("templates")  # NAME.jinja, for tokenizers that have none


class Template(NamedTuple):
    """The markers of a chat template.

    An assistant turn follows one of headers and ends with one of ends, the first of which closes a final reply.
    joins_channels: a header right after an end continues the assistant's turn, which has several channels.
    shared_ends: the ends begin the next turn, so that the text has none after the last reply: the first end is added,
    after a call the second. options: variables of the tokenizer's template.
    """

    headers: tuple
    ends: tuple
    joins_channels: bool = False
    shared_ends: bool = False
    options: dict = {}


class CallForm(NamedTuple):
    """How a message with calls is handed to the template.

    content: of a message without text; None: transformers leaves the key out. arguments_as_text: not as an object.
    """

    content: str | None = None
    arguments_as_text: bool = False


@dataclass(frozen=True)
class Chat:
    """All that turns a row into tokens.

    encoder: the tokenizer without post-processing, which would trim blanks off the offsets.
    template: None for auto if the tokenizer has no chat template.
    opening: what the generation prompt, not the assistant, writes after the header.
    thoughts: reasoning is "dropped" because the target answers at once, goes into a "field" that the template reads,
        or stays in the "text" of the reply.
    missing: why the tokenizer has no chat template and gets none of core/templates/.
    """

    tokenizer: Any
    encoder: Any
    template: Template | None
    max_length: int
    only_last: bool
    opening: str = ""
    thoughts: str = "text"
    call_form: CallForm = CallForm()
    shows_calls: bool = False
    missing: str = ""


def with_own_template(tokenizer, name, template):
    """(tokenizer, why it has no chat template): if it has none, a copy of it with the file of core/templates/.

    template: the markers of that name. The end marker has to be a token: other models know nothing of these markers.
    """
    path = OWN_TEMPLATES / f"{name}.jinja"
    if tokenizer.chat_template:
        return tokenizer, ""
    if not path.is_file():
        names = sorted(own.stem for own in OWN_TEMPLATES.iterdir())
        return tokenizer, f"and none for {name} in core/templates: --chat_template {', '.join(names)}"
    if template.ends[0] not in tokenizer.get_vocab():
        return tokenizer, f"and the markers of {name} do not fit: it has no token {template.ends[0]}"
    print(f"the tokenizer has no chat template: rows are rendered with core/templates/{path.name}")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = path.read_text()
    return tokenizer, ""


def render(tokenizer, messages, tools=None, **options):
    """The conversation as text by the tokenizer's own template; reasoning under every name that templates look for."""
    named = []
    for message in messages:
        reasoning = dict.fromkeys(conversations.REASONING_FIELDS, message.get("reasoning"))
        named.append(message | reasoning)
    with time_limit(SECONDS):
        return tokenizer.apply_chat_template(named, tools=tools, tokenize=False, **options)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError in it after `seconds`: a template is foreign code. Only the main thread has a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_of(markers):
    """A pattern that matches any of the markers."""
    return re.compile("|".join(map(re.escape, markers)))


def find_spans(text, template, opening=""):
    """[(start, end)] in characters of each assistant turn: what the assistant produces, its end marker included."""
    headers = one_of(template.headers)
    ends = one_of(template.ends)
    spans = []
    position = 0
    while found := headers.search(text, position):
        closing = ends.search(text, found.end())
        limit = closing.start() if closing else len(text)
        # The last header before the end: the output of the first of several tools also ends with a header.
        *_, header = headers.finditer(text, found.start(), limit)
        start = header.end()
        if text.startswith(opening, start):
            start += len(opening)
        position = closing.end() if closing else len(text)
        if template.joins_channels and spans and spans[-1][1] == header.start():
            spans[-1] = (spans[-1][0], position)
        elif start < position:
            spans.append((start, position))
    return spans


# ==================== Messages in the template's form ================================================================


def arrange(messages, chat):
    """The messages with calls and reasoning in the form in which the target's template shows them. Raises Rejected."""
    arranged = []
    for message in messages:
        message = dict(message)
        if message["role"] == "assistant" and chat.thoughts != "text":
            arrange_reasoning(message, chat.thoughts)
        if message.get("tool_calls"):
            message["content"] = message["content"] or chat.call_form.content
            if chat.call_form.arguments_as_text:
                message["tool_calls"] = [with_text_arguments(call) for call in message["tool_calls"]]
        arranged.append(message)
    return arranged


def arrange_reasoning(message, thoughts):
    """Move reasoning out of the content of an assistant's message into its field; "dropped" empties the field."""
    thought, tag, answer = (message["content"] or "").rpartition("</think>")
    if tag:
        message["content"] = answer.lstrip("\n")
        message["reasoning"] = message["reasoning"] or thought.strip().removeprefix("<think>").strip()
    if thoughts == "dropped":
        message["reasoning"] = None


def with_text_arguments(call):
    """A call whose arguments are JSON text."""
    text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": text}}


def split_reasoning(message):
    """(reasoning, answer) of an assistant's message, in a field or in its text; "" if there is none."""
    content = message["content"] or ""
    reasoning = message["reasoning"] or ""
    if not reasoning and "</think>" in content:
        reasoning, content = content.removeprefix("<think>").split("</think>", 1)
    return reasoning.strip(), content


def shows_reasoning(text, message):
    """Does the text of a reply contain the message's reasoning, which its answer may repeat?"""
    reasoning, answer = split_reasoning(message)
    return not reasoning or text.count(reasoning) > answer.count(reasoning)


# ==================== From messages to text and spans ================================================================


def render_reply(messages, tools, chat):
    """(text, spans) of a conversation that ends with the reply as the target produces it, reasoning included.

    Templates of reasoning models drop the reasoning of every turn: right for the history, but not for the last reply.
    In that case the text is the generation prompt, followed by what the target answers.
    """
    template = chat.template
    last = messages[-1]
    text = render(chat.tokenizer, messages, tools, **template.options)
    if template.shared_ends and not text.endswith(template.ends):
        text += template.ends[1] if last.get("tool_calls") else template.ends[0]
    spans = find_spans(text, template, chat.opening)
    if "tool_calls" in last or not spans:
        return text, spans
    start = spans[-1][0]
    has_tags = "</think>" in str(chat.tokenizer.chat_template)
    if shows_reasoning(text[start:], last) or not has_tags:
        return text, spans
    reasoning, content = split_reasoning(last)
    if text.startswith("<think></think>", start):  # the template has a place for it, without blanks around it
        text = text[:start] + f"<think>{reasoning}" + text[start + len("<think>") :]
    else:
        prompt = render(chat.tokenizer, messages[:-1], tools, add_generation_prompt=True, **template.options)
        prompt = re.sub(r"(<think>\n?)?\Z", "<think>\n", prompt, count=1)
        text = f"{prompt}{reasoning}\n</think>\n\n{content.strip()}{template.ends[0]}"
    return text, find_spans(text, template, chat.opening)


def render_row(row, chat):
    """(text, spans, whether the reasoning of the last reply is lost) of a row with messages. Raises Rejected."""
    given, tools = conversations.read_conversation(row)
    check_markers(given, tools, chat)
    messages = arrange(given, chat)
    try:
        text, spans = render_reply(messages, tools, chat)
        check_outputs(messages, tools, chat, text, spans)
        check_tools(messages, tools, chat, text)
    except conversations.Rejected:
        raise
    except Exception as error:  # whatever the template's own code raises on this row concerns this row alone
        raise conversations.Rejected("template error", f"{type(error).__name__}: {error}") from None
    check_replies(messages, text, spans)
    if messages[-1].get("cut"):
        spans[-1] = cut_span(messages[-1], text, spans[-1])
    start, end = spans[-1]
    reasoning_lost = not shows_reasoning(text[start:end], given[-1])
    return text, supervised_spans(messages, spans, chat.only_last), reasoning_lost


def supervised_spans(messages, spans, only_last):
    """The spans of the replies that are to be trained; those of the others are empty. Raises Rejected if all are."""
    replies = [message for message in messages if message["role"] == "assistant"]
    kept = []
    for message, (start, end) in zip(replies, spans, strict=True):
        kept.append((start, end if message["supervised"] else start))
    trained = kept[-1:] if only_last else kept
    if all(start == end for start, end in trained):
        which = "its last reply" if only_last else "each of its replies"
        raise conversations.Rejected(conversations.UNTRAINED, f"the row says so of {which}")
    return trained


def check_markers(messages, tools, chat):
    """No text may contain a marker: a prompt could declare itself supervised, a reply could end too early.

    No reply may contain a special token either: it would be supervised, and the target says nothing after it.
    """
    replies = [message for message in messages if message["role"] == "assistant"]
    template = chat.template
    refuse_texts(template.headers + template.ends, [messages, tools])
    refuse_texts(chat.tokenizer.all_special_tokens, replies)


def refuse_texts(texts, given):
    """Raise Rejected if one of the texts stands somewhere in the given objects."""
    content = json.dumps(given, ensure_ascii=False)
    for text in texts:
        escaped = json.dumps(text.strip(), ensure_ascii=False)[1:-1]
        if escaped in content:
            raise conversations.Rejected("marker inside content", repr(text))


def check_outputs(messages, tools, chat, text, spans):
    """Raise Rejected if the spans change with the outputs of tools: these would be supervised.

    An unknown template may close a call by a marker of its own, so that the span would run on into the output.
    """
    others = []
    for message in messages:
        is_output = message["role"] == "tool"
        others.append(message | {"content": "x"} if is_output else message)
    if others == messages:
        return
    other, other_spans = render_reply(others, tools, chat)
    produced = [text[start:end] for start, end in spans]
    if produced != [other[start:end] for start, end in other_spans]:
        raise conversations.Rejected("turns not marked", "a tool's output would be supervised")


def check_tools(messages, tools, chat, text):
    """Raise Rejected if the template knows nothing of tools.

    One that shows calls, but no tools, leaves it to the system prompt to describe them (DeepSeek V3).
    """
    if tools and not chat.shows_calls and render_reply(messages, None, chat)[0] == text:
        raise conversations.Rejected("tools left out", "the chat template shows no tools")


def check_replies(messages, text, spans):
    """Raise Rejected unless prompts are shown, and each assistant turn has a span with its text and its calls in it."""
    for message in messages:
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise conversations.Rejected("text left out", f"the chat template does not show a {message['role']} turn")
    replies = [message for message in messages if message["role"] == "assistant"]
    if len(spans) != len(replies):
        detail = f"{len(spans)} marked replies for {len(replies)} assistant turns"
        raise conversations.Rejected("turns not marked", detail)
    for message, (start, end) in zip(replies, spans, strict=True):
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        reply = text[start:end]
        if any(reply.count(name) < names.count(name) for name in names):
            raise conversations.Rejected("calls left out", f"the chat template does not show all calls of {names}")
        answer = (message["content"] or "").rpartition("</think>")[2].strip()
        if answer not in reply:
            detail = f"the chat template does not show {answer[:80]!r} as it is"
            raise conversations.Rejected("text left out", detail)


def cut_span(message, text, span):
    """The span of a reply that was cut, without its end: there is none to learn."""
    content = message["content"].strip()
    start = text.rfind(content, *span)
    if start < 0:
        raise conversations.Rejected("turns not marked", "an answer that was cut is not shown as it is")
    return span[0], start + len(content)
