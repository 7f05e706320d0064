"""Validator that enforces a policy: allowed models, a maximum of tokens, and banned words.

Built with componentize-py; see README.md beside this file.
"""

import json
import re

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.plugin import Description
from wit_world.exports.validation import Violation

SETTINGS = {
    "type": "object",
    "properties": {
        "allowed_models": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Models that requests may name; all if absent",
        },
        "max_tokens": {
            "type": "integer",
            "minimum": 1,
            "description": "Maximum number of tokens of a request",
        },
        "banned_words": {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "description": "Words that no prompt may contain; case is ignored",
        },
    },
    "additionalProperties": False,
}

# Lines that are nested deeper are refused, because a recursive parser would overflow the stack.
MAX_DEPTH = 100
MAX_BANNED_WORDS = 1000

settings = {}


class Plugin(exports.Plugin):
    def describe(self):
        return Description(
            name="policy",
            version="0.1.0",
            summary="Enforces allowed models, a maximum of tokens and banned words",
            endpoints=[],
            credentials=[],
            settings_schema=json.dumps(SETTINGS),
        )

    def configure(self, given):
        settings.update(json.loads(given))
        words = settings.get("banned_words", [])
        if len(words) > MAX_BANNED_WORDS:
            raise Err(
                f"banned_words has {len(words)} words; at most {MAX_BANNED_WORDS} are allowed"
            )
        settings["banned_words"] = [word.lower() for word in words]


class Validation(exports.Validation):
    def validate(self, batch, lines):
        return [violation for line in lines for violation in check(line)]


def check(line):
    """Yields the violations of one line."""
    # The count of brackets is a fast upper bound of the depth.
    if line.text.count("[") + line.text.count("{") > MAX_DEPTH and depth(line.text) > MAX_DEPTH:
        message = f"This line is nested deeper than {MAX_DEPTH} levels."
        yield Violation(line.number, "nested_too_deep", message, None)
        return
    try:
        body = json.loads(line.text)["body"]
        fields = body.items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Malformed lines are reported by other validators.
        return
    model = body.get("model")
    allowed = settings.get("allowed_models")
    if allowed is not None and isinstance(model, str) and model not in allowed:
        names = ", ".join(allowed)
        message = f"The model '{model[:100]}' is not allowed here; allowed are {names}."
        yield Violation(line.number, "model_not_allowed", message, "body.model")
    max_tokens = settings.get("max_tokens")
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        tokens = body.get(name)
        if max_tokens is not None and isinstance(tokens, (int, float)) and tokens > max_tokens:
            message = f"At most {max_tokens} tokens may be asked for."
            yield Violation(line.number, "too_many_tokens", message, f"body.{name}")
    for name, value in fields:
        if name != "model" and (word := banned_in(value)):
            message = f"The word '{word}' is banned by this server's policy."
            yield Violation(line.number, "banned_word", message, f"body.{name}")


def depth(text):
    """Returns the nesting depth of a JSON text."""
    deepest = level = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
        if token[0] in "[{":
            level += 1
            deepest = max(deepest, level)
        elif token[0] in "]}":
            level -= 1
    return deepest


def banned_in(value):
    """Returns the first banned word in a value, at any depth; None if it has none."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            text = value.lower()
            for word in settings.get("banned_words", []):
                if word in text:
                    return word
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, dict):
            values.extend(value.values())
    return None
