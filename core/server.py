"""server."""

import contextlib
import http.client
import json
import os
import time
import urllib.request
from pathlib import Path

from core import common

LONGEST_PAUSE = 60  # seconds between two attempts


# ---------------------------------------------------------------------------- asking a server
class ServerFailed(Exception):
    """What is wanted cannot be had from a server; the message names both. status: with which it refused, or None."""

    status = None


def request_answer(endpoint, path, body=None, timeout=60):
    """The JSON that the server answers to a GET, or to a POST of body; OSError, HTTPException or ValueError if none."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{endpoint.rstrip('/').removesuffix('/v1')}/v1/{path}", data, headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def keep_asking(server, what, retries, work):
    """work()'s result, tried again after 1, 2, 4, ... seconds. ServerFailed, at once if asking again cannot help.

    server: its flag and URL, for the message; what: that which is wanted of it.
    """
    for attempt in range(retries + 1):
        time.sleep(min(2 ** (attempt - 1), LONGEST_PAUSE) if attempt else 0)
        try:
            return work()
        except ServerFailed as error:
            raise ServerFailed(f"{server}, {what}: {error}") from error
        except urllib.error.HTTPError as error:
            said = str(error)
            with contextlib.suppress(OSError, http.client.HTTPException):  # the connection may end in the middle
                said += f": {error.read(300).decode(errors='replace')}"
            if error.code < 500 and error.code not in (408, 429):
                failed = ServerFailed(f"{server} refuses {what}: {said}")
                failed.status = error.code
                raise failed from error
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__} {error}"  # the last three: an answer of another form
    raise ServerFailed(f"{server} fails for {what}, {attempt + 1} times, at last with {said}")


def find_served(flag, endpoint, targets, retries, timeout, remedy):
    """What the server's list of models says of the target, by its names and folders `targets`; ends the program if it
    has others only. flag: which gave the endpoint; remedy: what the line then proposes.
    """
    server, places = f"{flag} {endpoint}", {Path(target).resolve() for target in targets}

    def listed():
        return {model["id"]: model for model in request_answer(endpoint, "models", timeout=timeout)["data"]}

    try:
        models = keep_asking(server, "the list of its models", retries, listed)
    except ServerFailed as error:
        common.fail(error)
    for model in models.values():
        if any(model.get(key) and Path(model[key]).resolve() in places for key in ("id", "root")):
            return model
    common.fail(f"{server} serves {', '.join(models)}, not the target {targets[0]}: {remedy}")
