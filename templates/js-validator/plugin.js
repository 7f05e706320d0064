// Validator that rejects requests for more tokens than the setting `max_tokens`.

let maxTokens = 0;

export const plugin = {
  describe() {
    return {
      name: "{{name}}",
      version: "0.1.0",
      summary: "Limits the tokens of a request",
      endpoints: [],
      credentials: [],
      settingsSchema: JSON.stringify({
        type: "object",
        properties: {
          max_tokens: {
            type: "integer",
            minimum: 1,
            default: 4096,
            description: "Maximum number of tokens of a request",
          },
        },
        additionalProperties: false,
      }),
    };
  },

  // The host fills in the schema's defaults.
  configure(settings) {
    maxTokens = JSON.parse(settings).max_tokens;
  },
};

export const validation = {
  validate(_batch, lines) {
    return lines.flatMap(check);
  },
};

// Returns the violations of one line.
function check(line) {
  let body;
  if (depth(line.text) > 100) {
    // `JSON.parse` is recursive and would overflow the stack.
    const message = "This line is nested deeper than 100 levels.";
    return [{ line: line.number, code: "nested_too_deep", message, param: undefined }];
  }
  try {
    body = JSON.parse(line.text).body;
  } catch (error) {
    // Another parser may accept what this one rejects, so an unreadable line must not pass.
    const message = `This line cannot be read: ${error.message}.`;
    return [{ line: line.number, code: "unreadable_line", message, param: undefined }];
  }
  return ["max_tokens", "max_completion_tokens"]
    .filter((name) => typeof body?.[name] === "number" && body[name] > maxTokens)
    .map((name) => ({
      line: line.number,
      code: "too_many_tokens",
      message: `At most ${maxTokens} tokens may be asked for.`,
      param: `body.${name}`,
    }));
}

// Returns the nesting depth of a JSON text; 0 if it is at most 100.
function depth(text) {
  let deepest = 0;
  let level = 0;
  let inString = false;
  if ((text.match(/[[{]/g) ?? []).length <= 100) return 0;
  for (let at = 0; at < text.length; at++) {
    const letter = text[at];
    if (inString) {
      if (letter === "\\") at++;
      else if (letter === '"') inString = false;
    } else if (letter === '"') inString = true;
    else if (letter === "[" || letter === "{") deepest = Math.max(deepest, ++level);
    else if (letter === "]" || letter === "}") level--;
  }
  return deepest;
}
