"""Adapter that forwards chat completions to the provider at `base_url`."""

import json
import re

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.inference import (
    Advice, Answer_Failure, Answer_Response, Exchange, Failure, Header, HttpRequest,
    Outcome_Elapsed, Outcome_Error, Response, Step_Done, Step_Retry, Step_Send, TransportFault,
    Usage,
)  # fmt: skip
from wit_world.exports.plugin import Credential, Description

SETTINGS = {
    "type": "object",
    "properties": {
        "base_url": {
            "type": "string",
            "pattern": "^https?://",
            "description": "URL before /chat/completions",
        },
    },
    "required": ["base_url"],
    "additionalProperties": False,
}
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}

settings = {}


class Plugin(exports.Plugin):
    def describe(self):
        return Description(
            name="{{name}}",
            version="0.1.0",
            summary="Forwards chat completions",
            endpoints=["/v1/chat/completions"],
            # The host adds the secret to each request. The plugin never sees it.
            credentials=[Credential("api_key", "authorization", "Bearer ", False)],
            settings_schema=json.dumps(SETTINGS),
        )

    def configure(self, given):
        settings.update(json.loads(given))
        if "?" in settings["base_url"]:
            raise Err("base_url must not have a query")


class Inference(exports.Inference):
    def begin(self, request):
        """Returns the request to send, or refuses it."""
        try:
            body = read(request.body)
            messages = body.get("messages")
            for message in messages if isinstance(messages, list) else []:
                role = message.get("role") if isinstance(message, dict) else None
                if not isinstance(role, str) or role not in ROLES:
                    shown = role if isinstance(role, str) and role.isascii() else ascii(role)
                    return Step_Done(failure("invalid_request", f"Unknown message role: {shown}"))
            body = json.dumps({**body, "model": request.model}, ensure_ascii=False).encode()
        except ValueError as error:
            message = f"The body cannot be read: {ascii(str(error))}"
            return Step_Done(failure("invalid_request", message))
        url = settings["base_url"].rstrip("/") + "/chat/completions"
        headers = [Header("content-type", "application/json")]
        # Data for `resume`, which may run in another instance.
        state = b""
        return Step_Send(Exchange(HttpRequest("POST", url, headers, body), state))

    def resume(self, state, outcome):
        """Translates the response, or retries the request."""
        if isinstance(outcome, Outcome_Elapsed):
            return Step_Done(failure("adapter_error", "This adapter never waits."))
        if isinstance(outcome, Outcome_Error):
            unreachable = failure("provider_unreachable", outcome.value.message)
            if outcome.value.fault in (TransportFault.NOT_ALLOWED, TransportFault.TOO_LARGE):
                return Step_Done(unreachable)
            return Step_Retry(Advice(None, unreachable))
        status, headers = outcome.value.status, outcome.value.headers
        try:
            body = read(outcome.value.body.decode())
        except ValueError:
            body = None
        if 200 <= status < 300:
            if not isinstance(body, dict):
                message = "The provider's answer is not a JSON object."
                return Step_Done(failure("invalid_provider_response", message))
            return Step_Done(response(status, body, usage(body)))
        if not isinstance(body, dict) or "error" not in body:
            message = f"The provider answered with status {status}."
            error = {"message": message, "type": "provider_error", "param": None, "code": None}
            body = {"error": error}
        refused = response(status, body, None)
        if status == 429 or status >= 500:
            return Step_Retry(Advice(retry_after(headers), refused))
        return Step_Done(refused)


def read(text):
    """Parses untrusted JSON; raises ValueError."""
    if depth(text) > 100:
        # `json.loads` is recursive and would overflow the stack.
        raise ValueError("it is nested deeper than 100 levels")
    value = json.loads(text)
    # Rejects half a surrogate pair and a number beyond the range of a float: neither can be
    # written as JSON again.
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def depth(text):
    """Returns the nesting depth of a JSON text; 0 if it is at most 100."""
    deepest = level = 0
    if text.count("[") + text.count("{") > 100:
        for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
            level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            deepest = max(deepest, level)
    return deepest


def usage(body):
    """Returns the token usage of a chat completion."""

    def tokens(*path):
        value = body
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value if type(value) is int and 0 <= value < 1 << 63 else None

    prompt, completion = tokens("usage", "prompt_tokens"), tokens("usage", "completion_tokens")
    if prompt is None or completion is None:
        return None
    cached = tokens("usage", "prompt_tokens_details", "cached_tokens") or 0
    reasoning = tokens("usage", "completion_tokens_details", "reasoning_tokens") or 0
    return Usage(prompt, cached, completion, reasoning)


def retry_after(headers):
    """Returns the seconds of Retry-After in milliseconds; None for a date."""
    for header in headers:
        if header.name.lower() == "retry-after" and re.fullmatch(r"[0-9]{1,6}", header.value):
            return int(header.value) * 1000
    return None


def response(status, body, counted):
    return Answer_Response(Response(status, None, json.dumps(body), counted))


def failure(code, message):
    return Answer_Failure(Failure(code, message))
