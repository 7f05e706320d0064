// Adapter from OpenAI's chat completions to the chat API of Ollama
// (https://github.com/ollama/ollama/blob/main/docs/api.md). That API has other paths, and other
// names for options, token counts and finish reasons.
//
// Built with componentize-qjs; see README.md beside this file.

// Parameters that are translated.
const TRANSLATED = [
  "model",
  "messages",
  "max_completion_tokens",
  "max_tokens",
  "temperature",
  "top_p",
  "seed",
  "stop",
  "presence_penalty",
  "frequency_penalty",
  "tools",
  "tool_choice",
  "response_format",
  "logprobs",
  "top_logprobs",
  "reasoning_effort",
];

// Parameters that are left out. They affect cost, speed and storage, not the answer.
const IGNORED = [
  "user",
  "safety_identifier",
  "metadata",
  "store",
  "prediction",
  "prompt_cache_key",
  "prompt_cache_retention",
  "prompt_cache_options",
  "service_tier",
  "stream_options",
];

// Parameters that Ollama does not have, each with its default. Any other value is refused.
const DEFAULTS = {
  n: 1,
  stream: false,
  parallel_tool_calls: true,
  verbosity: "medium",
  logit_bias: {},
  modalities: ["text"],
};

// Reasoning efforts, each with Ollama's `think`.
const EFFORTS = {
  none: false,
  minimal: "low",
  low: "low",
  medium: "medium",
  high: "high",
  xhigh: "max",
  max: "max",
};

let baseUrl = "";

export const plugin = {
  describe() {
    return {
      name: "ollama",
      version: "0.2.0",
      summary: "Asks an Ollama server through its own chat API",
      endpoints: ["/v1/chat/completions"],
      credentials: [],
      settingsSchema: JSON.stringify({
        type: "object",
        properties: {
          base_url: {
            type: "string",
            pattern: "^https?://",
            description: "URL of the server, such as http://127.0.0.1:11434",
          },
        },
        required: ["base_url"],
        additionalProperties: false,
      }),
    };
  },

  configure(settings) {
    baseUrl = JSON.parse(settings).base_url.replace(/\/+$/, "");
  },
};

// Refusal of a request before it is sent.
class Refused extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}
const invalid = (message) => new Refused("invalid_request", message);
const unsupported = (name, why) =>
  new Refused("unsupported_parameter", `Unsupported parameter: '${name.toWellFormed()}'. ${why}`);

export const inference = {
  begin(request) {
    let body;
    let sent;
    try {
      body = read(request.body);
      sent = translate(body, request.model);
    } catch (error) {
      if (error instanceof Refused) return failure(error.code, error.message);
      return failure("invalid_request", `The body cannot be read: ${error.message}.`);
    }
    return {
      tag: "send",
      val: {
        request: {
          method: "POST",
          url: `${baseUrl}/api/chat`,
          headers: [{ name: "content-type", value: "application/json" }],
          body: utf8(write(sent)),
        },
        // Data that `resume` needs. It goes into the state, because `resume` may run in another
        // instance.
        state: utf8(
          JSON.stringify({
            id: request.id,
            model: body.model,
            created: Number(request.createdAt),
            logprobs: sent.logprobs === true,
          }),
        ),
      },
    };
  },

  resume(state, outcome) {
    let request;
    try {
      request = JSON.parse(text(state));
    } catch {
      return failure("adapter_error", "The state is not the adapter's own.");
    }
    if (outcome.tag === "error") {
      const unreachable = fail("provider_unreachable", outcome.val.message);
      const permanent = ["not-allowed", "too-large"].includes(outcome.val.fault);
      return permanent ? done(unreachable) : retry(unreachable);
    }
    const { status, body } = outcome.val;
    let answer;
    try {
      answer = read(text(body));
    } catch {
      answer = null;
    }
    if (status !== 200) {
      const message =
        typeof answer?.error === "string"
          ? answer.error
          : `The server answered with status ${status}.`;
      const kind = status >= 500 ? "server_error" : "invalid_request_error";
      const refused = response(status < 200 ? 502 : status, {
        error: { message, type: kind, param: null, code: null },
      });
      return status === 429 || status >= 500 ? retry(refused) : done(refused);
    }
    return completed(request, answer);
  },
};

// Translates the response to a chat.
function completed(request, answer) {
  const calls = answer?.message?.tool_calls;
  const isMessage =
    typeof answer?.message?.content === "string" &&
    (calls === undefined || calls === null || Array.isArray(calls));
  // "load" and "unload" answer an empty prompt; "" means that the answer was cut off.
  if (!isMessage || ["load", "unload", ""].includes(answer.done_reason)) {
    return done(
      fail("invalid_provider_response", "The server's answer is not a complete chat message."),
    );
  }
  if (request.logprobs && !Array.isArray(answer.logprobs)) {
    return done(
      fail(
        "unsupported_parameter",
        "Unsupported parameter: 'logprobs'. This server is older than Ollama 0.12.11.",
      ),
    );
  }
  const message = { role: "assistant", content: answer.message.content, refusal: null };
  if (calls?.length) {
    message.tool_calls = calls.map((call, index) => ({
      id:
        typeof call?.id === "string" && call.id
          ? call.id
          : `call_${String(request.id).slice(-24)}_${index}`,
      type: "function",
      function: {
        name: String(call?.function?.name ?? ""),
        arguments: write(call?.function?.arguments ?? {}),
      },
    }));
  }
  const reason =
    answer.done_reason === "length" ? "length" : message.tool_calls ? "tool_calls" : "stop";
  const [prompt, completion] = [tokens(answer.prompt_eval_count), tokens(answer.eval_count)];
  const logprobs = request.logprobs
    ? { content: answer.logprobs.map(logprob), refusal: null }
    : null;
  const body = {
    id: `chatcmpl-${String(request.id).slice(-32)}`,
    object: "chat.completion",
    created: request.created,
    model: request.model,
    choices: [{ index: 0, message, logprobs, finish_reason: reason }],
    usage: {
      prompt_tokens: prompt,
      completion_tokens: completion,
      total_tokens: prompt + completion,
    },
  };
  return done(
    response(200, body, {
      inputTokens: prompt,
      cachedInputTokens: 0,
      outputTokens: completion,
      reasoningTokens: 0,
    }),
  );
}

// Returns a token count; 0 for any other value.
const tokens = (value) => (Number.isSafeInteger(value) && value >= 0 ? value : 0);

// Translates the log probabilities of a token.
const logprob = (one) => ({
  token: String(one?.token ?? ""),
  logprob: one?.logprob ?? 0,
  bytes: one?.bytes ?? null,
  top_logprobs: (Array.isArray(one?.top_logprobs) ? one.top_logprobs : []).map((other) => ({
    token: String(other?.token ?? ""),
    logprob: other?.logprob ?? 0,
    bytes: other?.bytes ?? null,
  })),
});

// Translates the request body.
function translate(body, model) {
  if (typeof body !== "object" || body === null || Array.isArray(body)) {
    throw invalid("The body must be a JSON object.");
  }
  for (const [name, value] of Object.entries(body)) {
    if (value === null || TRANSLATED.includes(name) || IGNORED.includes(name)) continue;
    if (
      Object.hasOwn(DEFAULTS, name) &&
      JSON.stringify(number(value)) === JSON.stringify(DEFAULTS[name])
    ) {
      continue;
    }
    if (name === "parallel_tool_calls" && !body.tools?.length) continue;
    throw unsupported(name, "Ollama's chat API has no such parameter; remove it.");
  }
  if (!Array.isArray(body.messages)) throw invalid("Messages must be an array.");
  if (!body.messages.length) throw invalid("Messages must not be empty.");
  const names = {};
  const sent = {
    model,
    messages: body.messages.map((message) => translateMessage(message, names)),
    stream: false,
    options: options(body),
  };
  const tools = translateTools(body);
  if (tools.length) sent.tools = tools;
  const format = translateFormat(body.response_format);
  if (format !== undefined) sent.format = format;
  if (body.logprobs !== undefined && body.logprobs !== null) {
    if (typeof body.logprobs !== "boolean") throw invalid("'logprobs' must be true or false.");
    sent.logprobs = body.logprobs;
  }
  if (number(body.top_logprobs)) sent.top_logprobs = body.top_logprobs;
  if (body.reasoning_effort !== undefined && body.reasoning_effort !== null) {
    if (!Object.hasOwn(EFFORTS, body.reasoning_effort)) {
      throw unsupported("reasoning_effort", `Use ${Object.keys(EFFORTS).join(", ")}.`);
    }
    sent.think = EFFORTS[body.reasoning_effort];
  }
  return sent;
}

// Returns a client's role for a message.
const shownRole = (value) => (typeof value === "string" ? value.toWellFormed() : "none");

// Translates a message. `names` maps the ids of tool calls to the names of their tools.
function translateMessage(message, names) {
  switch (message?.role) {
    case "system":
    case "user":
      return { role: message.role, ...translateContent(message.content) };
    case "developer":
      return { role: "system", ...translateContent(message.content) };
    case "tool":
      return {
        role: "tool",
        ...translateContent(message.content),
        ...(typeof message.tool_call_id === "string" && { tool_call_id: message.tool_call_id }),
        ...(names[message.tool_call_id] && { tool_name: names[message.tool_call_id] }),
      };
    case "assistant": {
      for (const name of ["audio", "function_call"]) {
        if (message[name] !== undefined && message[name] !== null) {
          throw unsupported("messages", `Ollama accepts no '${name}' of the assistant.`);
        }
      }
      const calls = message.tool_calls ?? [];
      if (!Array.isArray(calls)) throw invalid("'tool_calls' must be an array.");
      const content = translateContent(message.content ?? message.refusal);
      if (!calls.length) return { role: "assistant", ...content };
      return {
        role: "assistant",
        ...content,
        tool_calls: calls.map((call) => toolCall(call, names)),
      };
    }
    default:
      throw invalid(`Unknown message role: ${shownRole(message?.role)}`);
  }
}

// Translates the content of a message: a string, or an array of texts and images.
function translateContent(content) {
  if (content === undefined || content === null) return { content: "" };
  if (typeof content === "string") return { content };
  if (!Array.isArray(content)) {
    throw invalid("A message's content must be a string or an array of parts.");
  }
  const texts = [];
  const images = [];
  for (const part of content) {
    if (part?.type === "text" || part?.type === "refusal") {
      texts.push(String(part.text ?? part.refusal ?? ""));
    } else if (part?.type === "image_url") images.push(image(part.image_url?.url));
    else {
      throw unsupported(
        "messages",
        `Ollama accepts no message part of type '${String(part?.type ?? "none").toWellFormed()}'.`,
      );
    }
  }
  return { content: texts.join(""), ...(images.length && { images }) };
}

// Returns the base64 data of an image.
function image(url) {
  const data = /^data:image\/(?:jpeg|jpg|png|webp);base64,([A-Za-z0-9+/=]+)$/.exec(
    typeof url === "string" ? url : "",
  );
  if (!data) {
    throw unsupported(
      "messages",
      "Ollama accepts jpeg, png and webp images as data: URLs in base64. It fetches no images.",
    );
  }
  return data[1];
}

// Translates a tool call of the assistant.
function toolCall(call, names) {
  const name = call?.function?.name;
  if (typeof name !== "string" || !name || (call.type ?? "function") !== "function") {
    throw unsupported(
      "messages",
      "Ollama accepts tool calls of type 'function', each with a name.",
    );
  }
  const given = call.function.arguments;
  let parsed = given ?? {};
  if (typeof given === "string") {
    try {
      // Some models write an empty string for no arguments.
      parsed = given.trim() ? (read(given) ?? {}) : {};
    } catch {
      throw invalid(
        `The arguments of the tool call '${String(call.id ?? name).toWellFormed()}' are not JSON.`,
      );
    }
  }
  if (typeof parsed !== "object" || Array.isArray(parsed)) {
    throw invalid("The arguments of a tool call must be a JSON object.");
  }
  if (typeof call.id === "string") names[call.id] = name;
  return {
    ...(typeof call.id === "string" && { id: call.id }),
    function: { name, arguments: parsed },
  };
}

// Translates `tools` and `tool_choice`.
function translateTools(body) {
  const given = body.tools ?? [];
  if (!Array.isArray(given)) throw invalid("'tools' must be an array.");
  const tools = given.map((tool) => {
    if (tool?.type !== "function" || typeof tool.function?.name !== "string") {
      throw unsupported("tools", "Ollama accepts tools of type 'function', each with a name.");
    }
    const { name, description, parameters } = tool.function;
    const schema = parameters ?? { type: "object", properties: {} };
    return {
      type: "function",
      function: { name, ...(description && { description }), parameters: schema },
    };
  });
  const choice = body.tool_choice ?? "auto";
  if (choice === "auto") return tools;
  if (choice === "none") return [];
  const allowed =
    choice?.type === "allowed_tools" && choice.allowed_tools?.mode === "auto"
      ? choice.allowed_tools.tools
      : null;
  if (Array.isArray(allowed)) {
    const names = allowed.map((tool) => tool?.function?.name);
    return tools.filter((tool) => names.includes(tool.function.name));
  }
  throw unsupported("tool_choice", "Ollama cannot require a tool call; use 'auto' or 'none'.");
}

// Translates `response_format`; undefined for plain text.
function translateFormat(format) {
  switch (format?.type) {
    case undefined:
    case "text":
      return undefined;
    case "json_object":
      return "json";
    case "json_schema":
      if (typeof format.json_schema?.schema === "object" && format.json_schema.schema !== null) {
        return format.json_schema.schema;
      }
      throw invalid("'response_format.json_schema.schema' must be an object.");
    default:
      throw unsupported("response_format", "Use text, json_object or json_schema.");
  }
}

// Translates parameters that Ollama calls options. Checks their types, because Ollama answers a
// wrong type with a server error, which would be retried.
function options(body) {
  const named = {
    temperature: body.temperature,
    top_p: body.top_p,
    seed: body.seed,
    num_predict: body.max_completion_tokens ?? body.max_tokens,
    frequency_penalty: body.frequency_penalty,
    presence_penalty: body.presence_penalty,
  };
  const given = Object.entries(named).filter(([, value]) => value !== undefined && value !== null);
  for (const [name, value] of given) {
    if (typeof number(value) !== "number") throw invalid(`'${name}' must be a number.`);
  }
  if (number(named.num_predict) < 1) throw invalid("'max_completion_tokens' must be at least 1.");
  const stops = typeof body.stop === "string" ? [body.stop] : (body.stop ?? []);
  if (!Array.isArray(stops) || stops.some((stop) => typeof stop !== "string")) {
    throw invalid("'stop' must be a string or an array of strings.");
  }
  return { ...Object.fromEntries(given), ...(stops.length && { stop: stops }) };
}

const response = (status, body, usage = null) => ({
  tag: "response",
  val: { status, requestId: null, body: write(body), usage },
});
const fail = (code, message) => ({ tag: "failure", val: { code, message } });
const done = (answer) => ({ tag: "done", val: answer });
const failure = (code, message) => done(fail(code, message));
const retry = (otherwise) => ({ tag: "retry", val: { afterMilliseconds: null, otherwise } });

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
  return JSON.parse(
    json.replace(STRING_OR_NUMBER, (token) => (isInexact(token) ? `"${MARK}${token}"` : token)),
  );
}

function write(value) {
  return JSON.stringify(value).replace(/"\uFDD0(-?\d[\d.eE+-]*)"/g, "$1");
}

// Returns a number, marked or not, as a number; any other value unchanged.
const number = (value) =>
  typeof value === "string" && value[0] === MARK ? Number(value.slice(1)) : value;

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
