"""A validator: no request may ask for more tokens than a setting allows."""

import json
import re

from wit_world import exports
from wit_world.exports.plugin import Description
from wit_world.exports.validation import Violation

SETTINGS = {
    "type": "object",
    "properties": {
        "max_tokens": {"type": "integer", "minimum": 1, "default": 4096, "description": "The most tokens a request may ask for"},
    },
    "additionalProperties": False,
}

settings = {}


class Plugin(exports.Plugin):
    def describe(self):
        return Description(
            name="{{name}}",
            version="0.1.0",
            summary="Holds requests to a number of tokens",
            endpoints=[],
            credentials=[],
            settings_schema=json.dumps(SETTINGS),
        )

    def configure(self, given):
        # The host fills in the schema's defaults.
        settings.update(json.loads(given))


class Validation(exports.Validation):
    def validate(self, batch, lines):
        return [violation for line in lines for violation in judge(line)]


def judge(line):
    if depth(line.text) > 100:
        # A parser that calls itself would run out of stack.
        yield Violation(line.number, "nested_too_deep", "This line is nested deeper than 100 levels.", None)
        return
    try:
        body = json.loads(line.text)["body"]
        asked = {name: body.get(name) for name in ("max_tokens", "max_completion_tokens")}
    except ValueError as error:
        # Not let through: what this reader does not take (a number of 5,000 digits) another one may.
        yield Violation(line.number, "unreadable_line", f"This line cannot be read: {ascii(str(error))}", None)
        return
    except (KeyError, TypeError, AttributeError):
        # What is wrong with the form of a request is for the standard rules to say.
        return
    most = settings["max_tokens"]
    for name, tokens in asked.items():
        if isinstance(tokens, (int, float)) and tokens > most:
            yield Violation(line.number, "too_many_tokens", f"At most {most} tokens may be asked for.", f"body.{name}")


def depth(text):
    deepest = level = 0
    if text.count("[") + text.count("{") > 100:
        for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
            level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            deepest = max(deepest, level)
    return deepest
