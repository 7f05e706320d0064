"""A validator that enforces what an operator allows: models, an upper bound for tokens, and words nobody may send.

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
            "description": "Models that may be asked for; all if absent",
        },
        "max_tokens": {"type": "integer", "minimum": 1, "description": "The most tokens a request may ask for"},
        "banned_words": {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "description": "Words that no prompt may contain, whatever their case",
        },
    },
    "additionalProperties": False,
}

settings = {}


class Plugin(exports.Plugin):
    def describe(self):
        return Description(
            name="policy",
            version="0.1.0",
            summary="Enforces allowed models, a ceiling for tokens and banned words",
            endpoints=[],
            credentials=[],
            settings_schema=json.dumps(SETTINGS),
        )

    def configure(self, given):
        settings.update(json.loads(given))
        words = settings.get("banned_words", [])
        if len(words) > 1000:
            raise Err(f"there are {len(words)} banned words; this plugin looks for 1000 at the most")
        settings["banned_words"] = [word.lower() for word in words]


class Validation(exports.Validation):
    def validate(self, batch, lines):
        return [violation for line in lines for violation in judge(line)]


# JSON nested deeper than this is not read: a parser that calls itself runs out of stack.
DEEPEST = 100


def judge(line):
    if line.text.count("[") + line.text.count("{") > DEEPEST and depth(line.text) > DEEPEST:
        yield Violation(line.number, "nested_too_deep", f"This line is nested deeper than {DEEPEST} levels.", None)
        return
    try:
        body = json.loads(line.text)["body"]
        fields = body.items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # What is wrong with the form of a line is for other validators to say.
        return
    model = body.get("model")
    allowed = settings.get("allowed_models")
    if allowed is not None and isinstance(model, str) and model not in allowed:
        message = f"The model '{model[:100]}' is not allowed here; allowed are {', '.join(allowed)}."
        yield Violation(line.number, "model_not_allowed", message, "body.model")
    ceiling = settings.get("max_tokens")
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        asked = body.get(name)
        if ceiling is not None and isinstance(asked, (int, float)) and asked > ceiling:
            yield Violation(line.number, "too_many_tokens", f"At most {ceiling} tokens may be asked for.", f"body.{name}")
    for name, value in fields:
        if name != "model" and (word := banned_in(value)):
            message = f"The word '{word}' is banned by this server's policy."
            yield Violation(line.number, "banned_word", message, f"body.{name}")


def depth(text):
    """How deep a JSON text is nested."""
    deepest = level = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
        if token[0] in "[{":
            level += 1
            deepest = max(deepest, level)
        elif token[0] in "]}":
            level -= 1
    return deepest


def banned_in(value):
    """The first banned word in a value, at any depth."""
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
