// An adapter for the chat API of Ollama (https://github.com/ollama/ollama/blob/main/docs/api.md), which is not OpenAI's: other paths, other
// names for options, counts and reasons to stop.
//
// Built with componentize-qjs; see README.md beside this file.

const ROLES = ["system", "user", "assistant", "tool", "developer"];

let baseUrl = "";

export const plugin = {
  describe() {
    return {
      name: "ollama",
      version: "0.1.0",
      summary: "Asks an Ollama server through its own chat API",
      endpoints: ["/v1/chat/completions"],
      credentials: [],
      settingsSchema: JSON.stringify({
        type: "object",
        properties: {
          base_url: { type: "string", pattern: "^https?://", description: "Where the server is, such as http://127.0.0.1:11434" },
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

export const inference = {
  begin(request) {
    let body;
    try {
      body = read(request.body);
    } catch (error) {
      return failure("invalid_request", `The body cannot be read: ${error.message}.`);
    }
    if (!Array.isArray(body.messages)) return failure("invalid_request", "Messages must be an array.");
    for (const message of body.messages) {
      if (!ROLES.includes(message?.role)) return failure("invalid_request", `Unknown message role: ${typeof message?.role === "string" ? message.role.toWellFormed() : "none"}`);
    }
    const asked = {
      model: request.model,
      messages: body.messages.map((message) => ({
        role: message.role === "developer" ? "system" : message.role,
        content: textOf(message.content),
        ...(message.tool_calls && { tool_calls: message.tool_calls.map(toolCall) }),
      })),
      stream: false,
      options: options(body),
      ...(body.tools && { tools: body.tools }),
      ...(body.response_format?.type === "json_object" && { format: "json" }),
      ...(body.response_format?.type === "json_schema" && { format: body.response_format.json_schema?.schema }),
    };
    return {
      tag: "send",
      val: {
        request: {
          method: "POST",
          url: `${baseUrl}/api/chat`,
          headers: [{ name: "content-type", value: "application/json" }],
          body: utf8(JSON.stringify(asked)),
        },
        // Everything that `resume` needs: it may run in another instance.
        state: utf8(JSON.stringify({ id: request.id, model: body.model, created: Number(request.createdAt) })),
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
      const hopeless = ["not-allowed", "too-large"].includes(outcome.val.fault);
      return hopeless ? done(unreachable) : retry(unreachable);
    }
    const { status, body } = outcome.val;
    let answer;
    try {
      answer = read(text(body));
    } catch {
      answer = null;
    }
    if (status !== 200) {
      const message = typeof answer?.error === "string" ? answer.error : `The server answered with status ${status}.`;
      const kind = status >= 500 ? "server_error" : "invalid_request_error";
      const refused = response(status < 200 ? 502 : status, { error: { message, type: kind, param: null, code: null } });
      return status === 429 || status >= 500 ? retry(refused) : done(refused);
    }
    if (typeof answer?.message?.content !== "string") {
      return done(fail("invalid_provider_response", "The server's answer is no chat message."));
    }
    const [prompt, completion] = [answer.prompt_eval_count ?? 0, answer.eval_count ?? 0];
    const message = { role: "assistant", content: answer.message.content, refusal: null };
    if (answer.message.tool_calls?.length) {
      message.tool_calls = answer.message.tool_calls.map((call, index) => ({
        id: `call_${request.id.slice(-24)}_${index}`,
        type: "function",
        function: { name: call.function.name, arguments: JSON.stringify(call.function.arguments ?? {}) },
      }));
    }
    const reason = message.tool_calls ? "tool_calls" : answer.done_reason === "length" ? "length" : "stop";
    const completed = {
      id: `chatcmpl-${request.id.slice(-32)}`,
      object: "chat.completion",
      created: request.created,
      model: request.model,
      choices: [{ index: 0, message, logprobs: null, finish_reason: reason }],
      usage: { prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion },
    };
    return done(
      response(200, completed, { inputTokens: prompt, cachedInputTokens: 0, outputTokens: completion, reasoningTokens: 0 }),
    );
  },
};

// OpenAI's names for what Ollama calls options.
function options(body) {
  const named = {
    temperature: body.temperature,
    top_p: body.top_p,
    seed: body.seed,
    num_predict: body.max_completion_tokens ?? body.max_tokens,
    stop: body.stop,
    frequency_penalty: body.frequency_penalty,
    presence_penalty: body.presence_penalty,
  };
  return Object.fromEntries(Object.entries(named).filter(([, value]) => value !== undefined && value !== null));
}

function toolCall(call) {
  let given = {};
  try {
    given = JSON.parse(call?.function?.arguments ?? "{}");
  } catch {
    // What the model once wrote need not be JSON.
  }
  return { function: { name: call?.function?.name ?? "", arguments: given } };
}

// A message's content is a string, or parts of which the texts count.
function textOf(content) {
  if (!Array.isArray(content)) return typeof content === "string" ? content : "";
  return content.map((part) => (typeof part?.text === "string" ? part.text : "")).join("");
}

const response = (status, body, usage = null) => ({
  tag: "response",
  val: { status, requestId: null, body: JSON.stringify(body), usage },
});
const fail = (code, message) => ({ tag: "failure", val: { code, message } });
const done = (answer) => ({ tag: "done", val: answer });
const failure = (code, message) => done(fail(code, message));
const retry = (otherwise) => ({ tag: "retry", val: { afterMilliseconds: null, otherwise } });

// JSON of a client or a provider, which may be anything.
function read(json) {
  // A parser that calls itself would run out of stack.
  if (depth(json) > 100) throw new Error("it is nested deeper than 100 levels");
  return JSON.parse(json, (_, value) => {
    if (value === Infinity || value === -Infinity) throw new Error("it holds a number that is too large");
    return value;
  });
}

function depth(json) {
  let deepest = 0;
  let level = 0;
  if ((json.match(/[[{]/g) ?? []).length <= 100) return 0;
  for (const [token] of json.matchAll(/"(?:[^"\\]|\\.)*"|[[\]{}]/g)) {
    if (token === "[" || token === "{") deepest = Math.max(deepest, ++level);
    else if (token === "]" || token === "}") level--;
  }
  return deepest;
}

// QuickJS has no TextEncoder and no TextDecoder.
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
      // JSON.stringify leaves no half of a pair.
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

// Throws where the bytes are no UTF-8.
function text(bytes) {
  const pieces = [];
  for (let at = 0; at < bytes.length; at += 4096) pieces.push(String.fromCharCode(...bytes.subarray(at, at + 4096)));
  const letters = pieces.join("");
  return /[^\0-\x7f]/.test(letters) ? decodeURIComponent(escape(letters)) : letters;
}
