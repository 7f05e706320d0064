"""Validator that rejects requests for more tokens than the setting `max_tokens`."""

import json
import re

from wit_world import exports
from wit_world.exports.plugin import Description
from wit_world.exports.validation import Violation

SETTINGS = {
    "type": "object",
    "properties": {
        "max_tokens": {
            "type": "integer",
            "minimum": 1,
            "default": 4096,
            "description": "Maximum number of tokens of a request",
        },
    },
    "additionalProperties": False,
}

settings = {}


class Plugin(exports.Plugin):
    def describe(self):
        return Description(
            name="{{name}}",
            version="0.1.0",
            summary="Limits the tokens of a request",
            endpoints=[],
            credentials=[],
            settings_schema=json.dumps(SETTINGS),
        )

    def configure(self, given):
        # The host fills in the schema's defaults.
        settings.update(json.loads(given))


class Validation(exports.Validation):
    def validate(self, batch, lines):
        return [violation for line in lines for violation in check(line)]


def check(line):
    """Yields the violations of one line."""
    if depth(line.text) > 100:
        # `json.loads` is recursive and would overflow the stack.
        message = "This line is nested deeper than 100 levels."
        yield Violation(line.number, "nested_too_deep", message, None)
        return
    try:
        body = json.loads(line.text)["body"]
        given = {name: body.get(name) for name in ("max_tokens", "max_completion_tokens")}
    except ValueError as error:
        # Another parser may accept what this one rejects (a number of 5,000 digits), so an
        # unreadable line must not pass.
        message = f"This line cannot be read: {ascii(str(error))}"
        yield Violation(line.number, "unreadable_line", message, None)
        return
    except (KeyError, TypeError, AttributeError):
        # Malformed requests are reported by the standard rules.
        return
    max_tokens = settings["max_tokens"]
    for name, tokens in given.items():
        if isinstance(tokens, (int, float)) and tokens > max_tokens:
            message = f"At most {max_tokens} tokens may be asked for."
            yield Violation(line.number, "too_many_tokens", message, f"body.{name}")


def depth(text):
    """Returns the nesting depth of a JSON text; 0 if it is at most 100."""
    deepest = level = 0
    if text.count("[") + text.count("{") > 100:
        for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
            level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            deepest = max(deepest, level)
    return deepest
