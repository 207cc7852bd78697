"""HTTP servers of models: requests, streams, retries, and whether a server has the target.

In:  the URL of a server, with or without /v1; OPENAI_API_KEY, if it is set, goes along.
Out: answers as JSON, at once or event by event as they are streamed; ServerFailed where a server has none.
"""

import contextlib
import http.client
import json
import os
import time
import urllib.request
from pathlib import Path

from core import common

LONGEST_PAUSE = 60  # seconds between two attempts
PASSING = (408, 429)  # timed out, too many requests: refusals that time mends
OTHER_FORM = (ValueError, LookupError, TypeError, AttributeError)  # an answer of another form raises these
ANSWER_BYTES = 2**28  # of an answer at most
LONGEST_STREAM = 3600  # seconds of a streamed answer


class ServerFailed(Exception):
    """A server does not deliver; the message names the server and the request. status: its HTTP refusal, or None."""

    status = None


def open_answer(endpoint, path, body=None, timeout=60):
    """The HTTP answer to a GET, or to a POST of body, at a path below the server's root. Raises OSError, HTTPException.

    timeout: seconds that it may be silent.
    """
    base = endpoint.rstrip("/").removesuffix("/v1")
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{base}/{path}", data, headers)
    return urllib.request.urlopen(request, timeout=timeout)


def request_answer(endpoint, path, body=None, timeout=60):
    """The JSON of the answer at a path below /v1. Raises OSError, HTTPException, ValueError.

    timeout: seconds until it begins, and then until it is there.
    """
    return json.loads(read_answer(endpoint, f"v1/{path}", body, timeout))


def read_answer(endpoint, path, body=None, timeout=60):
    """The bytes of the answer at a path below the server's root; the rest as of request_answer."""
    with open_answer(endpoint, path, body, timeout) as answer:
        return b"".join(parts_of(answer, timeout))


def parts_of(answer, seconds):
    """Yields the bytes of an answer as they arrive, ANSWER_BYTES at most. Raises TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    size = 0
    while part := answer.read1(2**20):
        size += len(part)
        if time.monotonic() > end:
            raise TimeoutError("the answer does not end")
        if size > ANSWER_BYTES:
            raise ValueError(f"an answer of more than {ANSWER_BYTES:,} bytes")
        yield part


def stream_answer(endpoint, path, body, timeout=60, longest=LONGEST_STREAM):
    """Yields the JSON of each event of a streamed answer when it arrives. Raises OSError, HTTPException, ValueError.

    timeout: seconds that it may be silent; longest: that it may take in all.
    """
    with open_answer(endpoint, path, body, timeout) as answer:
        unfinished = b""
        for part in parts_of(answer, longest):
            *lines, unfinished = (unfinished + part).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                event = line.removeprefix(b"data:").strip()
                if event == b"[DONE]":
                    return
                yield json.loads(event)
    raise ConnectionError("the answer breaks off")


def describe_refusal(error):
    """Status and the first characters of the text behind an HTTPError."""
    problem = str(error)
    with contextlib.suppress(OSError, http.client.HTTPException):  # the connection may break inside the text
        problem += f": {error.read(300).decode(errors='replace')}"
    return problem


def keep_asking(server, what, retries, work):
    """The result of work(), tried again after 1, 2, 4, ... 60 seconds.

    server and what name the flag with its URL and the request, for the message. Raises ServerFailed: at once if the
    server refuses the request or work() itself raises it, else after `retries` more attempts.
    """
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(2 ** (attempt - 1), LONGEST_PAUSE))
        try:
            return work()
        except ServerFailed as error:
            raise ServerFailed(f"{server}, {what}: {error}") from error
        except urllib.error.HTTPError as error:
            problem = describe_refusal(error)
            if error.code < 500 and error.code not in PASSING:
                failed = ServerFailed(f"{server} refuses {what}: {problem}")
                failed.status = error.code
                raise failed from error
        except (OSError, http.client.HTTPException, *OTHER_FORM) as error:
            problem = f"{type(error).__name__} {error}"
    tries = f", {retries + 1} times, at last" if retries else ""
    raise ServerFailed(f"{server} fails for {what}{tries} with {problem}")


def find_served(flag, endpoint, targets, retries, timeout, remedy):
    """The entry of the target in the server's list of models; ends the program if the server has other models only.

    flag: the one that gave the endpoint. targets: names and folders of the target. remedy: closes the error message.
    """
    server = f"{flag} {endpoint}"
    places = {Path(target).resolve() for target in targets}

    def list_models():
        models = request_answer(endpoint, "models", timeout=timeout)["data"]
        return {model["id"]: model for model in models}

    try:
        models = keep_asking(server, "the list of its models", retries, list_models)
    except ServerFailed as error:
        common.fail(error)
    for model in models.values():
        names = [model[key] for key in ("id", "root") if model.get(key)]
        if any(Path(name).resolve() in places for name in names):
            return model
    common.fail(f"{server} serves {', '.join(models)}, not the target {targets[0]}: {remedy}")
