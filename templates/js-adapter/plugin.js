// Adapter that forwards chat completions to the provider at `base_url`.

const ROLES = ["system", "developer", "user", "assistant", "tool", "function"];

let baseUrl = "";

export const plugin = {
  describe() {
    return {
      name: "{{name}}",
      version: "0.1.0",
      summary: "Forwards chat completions",
      endpoints: ["/v1/chat/completions"],
      // The host adds the secret to each request. The plugin never sees it.
      credentials: [
        { name: "api_key", header: "authorization", prefix: "Bearer ", required: false },
      ],
      settingsSchema: JSON.stringify({
        type: "object",
        properties: {
          base_url: {
            type: "string",
            pattern: "^https?://",
            description: "URL before /chat/completions",
          },
        },
        required: ["base_url"],
        additionalProperties: false,
      }),
    };
  },

  // Throws if the settings are invalid. The message goes to the operator.
  configure(settings) {
    baseUrl = JSON.parse(settings).base_url.replace(/\/+$/, "");
  },
};

export const inference = {
  // Returns the request to send, or refuses it.
  begin(request) {
    let body;
    try {
      body = read(request.body);
    } catch (error) {
      return done(failure("invalid_request", `The body cannot be read: ${error.message}.`));
    }
    for (const message of Array.isArray(body.messages) ? body.messages : []) {
      if (!ROLES.includes(message?.role)) {
        const role = typeof message?.role === "string" ? message.role.toWellFormed() : "none";
        return done(failure("invalid_request", `Unknown message role: ${role}`));
      }
    }
    const exchange = {
      request: {
        method: "POST",
        url: `${baseUrl}/chat/completions`,
        headers: [{ name: "content-type", value: "application/json" }],
        body: utf8(write({ ...body, model: request.model })),
      },
      // Data for `resume`, which may run in another instance.
      state: new Uint8Array(),
    };
    return { tag: "send", val: exchange };
  },

  // Translates the response, or retries the request.
  resume(_state, outcome) {
    if (outcome.tag === "elapsed") {
      return done(failure("adapter_error", "This adapter never waits."));
    }
    if (outcome.tag === "error") {
      const unreachable = failure("provider_unreachable", outcome.val.message);
      const permanent = ["not-allowed", "too-large"].includes(outcome.val.fault);
      return permanent ? done(unreachable) : retry(undefined, unreachable);
    }
    const { status, headers } = outcome.val;
    let body = null;
    try {
      body = read(text(outcome.val.body));
    } catch {
      // The body is not JSON or not UTF-8, so it stays null.
    }
    const isObject = typeof body === "object" && body !== null && !Array.isArray(body);
    if (status >= 200 && status < 300) {
      if (isObject) return done(response(status, body, usage(body)));
      const message = "The provider's answer is not a JSON object.";
      return done(failure("invalid_provider_response", message));
    }
    if (!isObject || !("error" in body)) {
      const message = `The provider answered with status ${status}.`;
      body = { error: { message, type: "provider_error", param: null, code: null } };
    }
    const refused = response(status, body, undefined);
    return status === 429 || status >= 500 ? retry(retryAfter(headers), refused) : done(refused);
  },
};

// JSON reader and writer for untrusted input that keep every number exactly. `read` turns a number
// that JavaScript cannot represent into a string behind a mark, and `write` turns the string back
// into the number. The mark is a noncharacter, which interchanged text does not contain.
const MARK = "\uFDD0";
const STRING_OR_NUMBER = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[\d.eE+-]*/g;
const NUMBER = /^-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?$/;

function read(json) {
  // `JSON.parse` is recursive and would overflow the stack.
  if (depth(json) > 100) throw new Error("it is nested deeper than 100 levels");
  const isInexact = (token) => NUMBER.test(token) && String(Number(token)) !== token;
  const mark = (token) => (isInexact(token) ? `"${MARK}${token}"` : token);
  return JSON.parse(json.replace(STRING_OR_NUMBER, mark));
}

function write(value) {
  return JSON.stringify(value).replace(/"\uFDD0(-?\d[\d.eE+-]*)"/g, "$1");
}

// Returns the nesting depth of a JSON text; 0 if it is at most 100.
function depth(json) {
  let deepest = 0;
  let level = 0;
  if ((json.match(/[[{]/g) ?? []).length <= 100) return 0;
  for (const [token] of json.matchAll(/"[^"\\]*(?:\\.[^"\\]*)*"|[[\]{}]/g)) {
    if (token === "[" || token === "{") deepest = Math.max(deepest, ++level);
    else if (token === "]" || token === "}") level--;
  }
  return deepest;
}

// Returns the token usage of a chat completion.
function usage(body) {
  const tokens = (value) => (Number.isSafeInteger(value) && value >= 0 ? value : undefined);
  const prompt = tokens(body.usage?.prompt_tokens);
  const completion = tokens(body.usage?.completion_tokens);
  if (prompt === undefined || completion === undefined) return undefined;
  return {
    inputTokens: prompt,
    cachedInputTokens: tokens(body.usage.prompt_tokens_details?.cached_tokens) ?? 0,
    outputTokens: completion,
    reasoningTokens: tokens(body.usage.completion_tokens_details?.reasoning_tokens) ?? 0,
  };
}

// Returns the seconds of Retry-After in milliseconds; undefined for a date.
function retryAfter(headers) {
  const value = headers.find((header) => header.name.toLowerCase() === "retry-after")?.value ?? "";
  return /^\d{1,6}$/.test(value) ? Number(value) * 1000 : undefined;
}

const response = (status, body, usage) => ({
  tag: "response",
  val: { status, requestId: undefined, body: write(body), usage },
});
const failure = (code, message) => ({ tag: "failure", val: { code, message } });
const done = (answer) => ({ tag: "done", val: answer });
const retry = (afterMilliseconds, otherwise) => ({
  tag: "retry",
  val: { afterMilliseconds, otherwise },
});

// Encodes a string as UTF-8: QuickJS has no TextEncoder.
function utf8(string) {
  const bytes = new Uint8Array(string.length * 3);
  let length = 0;
  for (let at = 0; at < string.length; at++) {
    let code = string.charCodeAt(at);
    if (code < 0x80) {
      bytes[length++] = code;
      continue;
    }
    if (code < 0x800) {
      bytes[length++] = 0xc0 | (code >> 6);
    } else {
      // JSON.stringify escapes lone surrogates, so a high surrogate is followed by a low one.
      if (code >= 0xd800 && code < 0xdc00) {
        code = 0x10000 + ((code & 0x3ff) << 10) + (string.charCodeAt(++at) & 0x3ff);
        bytes[length++] = 0xf0 | (code >> 18);
        bytes[length++] = 0x80 | ((code >> 12) & 0x3f);
      } else {
        bytes[length++] = 0xe0 | (code >> 12);
      }
      bytes[length++] = 0x80 | ((code >> 6) & 0x3f);
    }
    bytes[length++] = 0x80 | (code & 0x3f);
  }
  return bytes.slice(0, length);
}

// Decodes UTF-8; throws if the bytes are not UTF-8. QuickJS has no TextDecoder.
function text(bytes) {
  const pieces = [];
  for (let at = 0; at < bytes.length; at += 4096) {
    pieces.push(String.fromCharCode(...bytes.subarray(at, at + 4096)));
  }
  const letters = pieces.join("");
  return /[^\0-\x7f]/.test(letters) ? decodeURIComponent(escape(letters)) : letters;
}
