//! Response of each endpoint, in the shapes of the OpenAI API reference.
//!
//! The echo is the last message of the user for chat, and the input itself for the other
//! endpoints. Every response is a pure function of the request: the id comes from the request's
//! id, the time is the batch's creation time, and an embedding is a hash of its text.
//!
//! Bodies pass through `serde_json::Value`, which cannot hold all of JSON. Two modules work around
//! that. `surrogates` hides halves of surrogate pairs before parsing and restores them afterwards.
//! `numbers` turns numbers beyond the range of a float into strings; it is tried only after a body
//! failed to parse.

use serde_json::{Map, Value, json};

use crate::bindings::exports::batchwright::plugin::inference::{Request, Usage};
use crate::numbers::without_large_numbers;
use crate::surrogates::hide;
use crate::tokens;

/// Message roles that the chat endpoint accepts.
const ROLES: [&str; 6] = ["user", "system", "assistant", "tool", "developer", "function"];

/// Length of an embedding if the request gives none.
const DEFAULT_DIMENSIONS: u64 = 16;
/// Maximum length of an embedding.
const MAX_DIMENSIONS: u64 = 4096;

/// Maximum number of choices for one prompt.
const MAX_CHOICES: u64 = 16;

/// Refusal of a request.
pub(crate) struct Refused {
    /// Status that a provider would return; 0 if an adapter would refuse without an exchange.
    pub(crate) status: u16,
    /// Sentence for the client.
    pub(crate) message: String,
    param: Option<&'static str>,
}

impl Refused {
    /// Returns the error body of the API.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": "invalid_request_error", "param": self.param,
            "code": "invalid_value"
        }})
    }
}

fn refused(param: &'static str, message: String) -> Refused {
    Refused { status: 400, message, param: Some(param) }
}

type Answered = Result<(Value, Usage), Refused>;
type Endpoint = fn(&Request, &Map<String, Value>) -> Answered;

/// Endpoints and their functions.
pub(crate) const ENDPOINTS: &[(&str, Endpoint)] = &[
    ("/v1/chat/completions", chat),
    ("/v1/completions", completions),
    ("/v1/embeddings", embeddings),
    ("/v1/responses", responses),
    ("/v1/moderations", moderations),
];

/// Returns the response body and the usage of a request.
pub(crate) fn answer(request: &Request) -> Answered {
    let without_exchange = |message: String| Refused { status: 0, message, param: None };
    let json = hide(&request.body);
    let parsed = serde_json::from_str(&json)
        .or_else(|_| serde_json::from_str(&without_large_numbers(&json)));
    let body: Map<String, Value> = parsed.map_err(|error| {
        without_exchange(format!("The request body is not a JSON object: {error}"))
    })?;
    match ENDPOINTS.iter().find(|(path, _)| *path == request.endpoint) {
        Some((_, answer)) => answer(request, &body),
        None => {
            Err(without_exchange(format!("The echo adapter has no endpoint {}.", request.endpoint)))
        }
    }
}

/// Returns the id of a response: the request's id with the API's prefix.
fn id(prefix: &str, request: &Request) -> String {
    format!("{prefix}{}", request.id.strip_prefix("batch_req_").unwrap_or(&request.id))
}

fn usage(input: u64, output: u64) -> Usage {
    Usage {
        input_tokens: input,
        cached_input_tokens: 0,
        output_tokens: output,
        reasoning_tokens: 0,
    }
}

fn completion_usage(input: u64, output: u64) -> Value {
    json!({
        "prompt_tokens": input, "completion_tokens": output,
        "total_tokens": input.saturating_add(output),
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0
        }
    })
}

/// Reads an optional integer parameter; an error if it is out of bounds.
fn limit(
    body: &Map<String, Value>,
    param: &'static str,
    bounds: (u64, u64),
) -> Result<Option<u64>, Refused> {
    match body.get(param) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().filter(|number| (bounds.0..=bounds.1).contains(number))
        {
            Some(number) => Ok(Some(number)),
            None => Err(refused(
                param,
                format!(
                    "Invalid value for '{param}': expected an integer from {} to {}.",
                    bounds.0, bounds.1
                ),
            )),
        },
    }
}

/// Truncates a text to a number of tokens. Returns the text, its tokens, and true if nothing was
/// cut.
fn truncate(text: &str, limit: Option<u64>) -> (String, u64, bool) {
    let pieces = tokens::pieces(text);
    let all = pieces.len() as u64;
    match limit.filter(|limit| *limit < all) {
        Some(limit) => (pieces.into_iter().take(limit as usize).collect(), limit, false),
        None => (text.to_owned(), all, true),
    }
}

/// Returns the text of a message content: a string, or the text parts of an array.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts
            .iter()
            .filter_map(|part| part.get("text")?.as_str())
            .collect::<Vec<_>>()
            .join("\n"),
        _ => String::new(),
    }
}

/// Returns the text of the user's last message, or of the last message if the user has none, and
/// the tokens of all messages.
fn conversation(messages: &[Value]) -> (String, u64) {
    let text = |message: &Value| message.get("content").map(text_of).unwrap_or_default();
    let of_user = |message: &&Value| message.get("role").is_some_and(|role| role == "user");
    let last =
        messages.iter().rev().find(of_user).or(messages.last()).map(text).unwrap_or_default();
    // Chat templates add about three tokens per message.
    let input =
        messages.iter().map(|message| tokens::count(&text(message)).saturating_add(3)).sum();
    (last, input)
}

fn chat(request: &Request, body: &Map<String, Value>) -> Answered {
    let Some(Value::Array(messages)) = body.get("messages") else {
        return Err(refused("messages", "Messages must be an array".into()));
    };
    for (index, message) in messages.iter().enumerate() {
        let role = message.get("role");
        if !role.and_then(Value::as_str).is_some_and(|role| ROLES.contains(&role)) {
            let shown = role.map_or_else(
                || "none given".into(),
                |role| role.as_str().map_or(role.to_string(), str::to_owned),
            );
            let message = format!(
                "Unknown message role: {shown} (messages[{index}].role; known are {})",
                ROLES.join(", ")
            );
            return Err(Refused { status: 0, message, param: None });
        }
    }
    let (last, input) = conversation(messages);
    let max_tokens = limit(body, "max_completion_tokens", (1, u64::MAX))?.or(limit(
        body,
        "max_tokens",
        (1, u64::MAX),
    )?);
    let (text, output, complete) = truncate(&last, max_tokens);
    let choices = limit(body, "n", (1, MAX_CHOICES))?.unwrap_or(1);
    let choice = |index: u64| {
        json!({
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": null, "annotations": []},
            "logprobs": null,
            "finish_reason": if complete { "stop" } else { "length" }
        })
    };
    let output = output.saturating_mul(choices);
    let answer = json!({
        "id": id("chatcmpl-", request), "object": "chat.completion", "created": request.created_at,
        "model": request.model, "choices": (0..choices).map(choice).collect::<Vec<_>>(),
        "usage": completion_usage(input, output), "service_tier": "default",
        "system_fingerprint": null
    });
    Ok((answer, usage(input, output)))
}

/// Returns the inputs of an endpoint that accepts one or many. A token array becomes a text of its
/// numbers.
fn inputs(body: &Map<String, Value>, param: &'static str) -> Result<Vec<String>, Refused> {
    match body.get(param) {
        Some(Value::String(text)) => Ok(vec![text.clone()]),
        Some(Value::Array(values)) if values.iter().all(Value::is_u64) && !values.is_empty() => {
            Ok(vec![numbers(values)])
        }
        Some(Value::Array(values)) if !values.is_empty() => Ok(values
            .iter()
            .map(|value| match value {
                Value::Array(tokens) => numbers(tokens),
                // Multimodal input of the moderations endpoint.
                Value::Object(part) => part.get("text").map(text_of).unwrap_or_default(),
                other => text_of(other),
            })
            .collect()),
        _ => Err(refused(
            param,
            format!("Invalid '{param}': expected a string or an array that is not empty."),
        )),
    }
}

fn numbers(tokens: &[Value]) -> String {
    tokens.iter().map(Value::to_string).collect::<Vec<_>>().join(" ")
}

fn completions(request: &Request, body: &Map<String, Value>) -> Answered {
    let prompts = inputs(body, "prompt")?;
    let max_tokens = limit(body, "max_tokens", (1, u64::MAX))?;
    let mut output = 0_u64;
    let mut choices = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let (text, count, complete) = truncate(prompt, max_tokens);
        output = output.saturating_add(count);
        let reason = if complete { "stop" } else { "length" };
        choices
            .push(json!({"index": index, "text": text, "logprobs": null, "finish_reason": reason}));
    }
    let input = prompts.iter().map(|prompt| tokens::count(prompt)).sum();
    let answer = json!({
        "id": id("cmpl-", request), "object": "text_completion", "created": request.created_at,
        "model": request.model, "choices": choices, "usage": completion_usage(input, output),
        "system_fingerprint": null
    });
    Ok((answer, usage(input, output)))
}

fn embeddings(request: &Request, body: &Map<String, Value>) -> Answered {
    let texts = inputs(body, "input")?;
    let dimensions = limit(body, "dimensions", (1, MAX_DIMENSIONS))?.unwrap_or(DEFAULT_DIMENSIONS);
    let as_base64 = match body.get("encoding_format").and_then(Value::as_str) {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            return Err(refused(
                "encoding_format",
                "Invalid 'encoding_format': use 'float' or 'base64'.".into(),
            ));
        }
    };
    let data: Vec<Value> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| {
            let vector = vector(text, dimensions);
            let embedding = if as_base64 { json!(base64(&vector)) } else { json!(vector) };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    let input: u64 = texts.iter().map(|text| tokens::count(text)).sum();
    let answer = json!({
        "object": "list", "data": data, "model": request.model,
        "usage": {"prompt_tokens": input, "total_tokens": input}
    });
    Ok((answer, usage(input, 0)))
}

/// Returns a unit vector that depends on the text alone and differs between texts.
fn vector(text: &str, dimensions: u64) -> Vec<f32> {
    // FNV-1a hash of the text, used as the seed of a SplitMix64 sequence.
    let seed = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut vector: Vec<f32> = (1..=dimensions)
        .map(|step| {
            let mut word = seed.wrapping_add(step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((word ^ (word >> 31)) >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
        })
        .collect();
    let length =
        vector.iter().map(|value| value * value).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    vector.iter_mut().for_each(|value| *value /= length);
    vector
}

/// Encodes little-endian floats in base64 (RFC 4648), the API's encoding of vectors.
fn base64(vector: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit =
                ALPHABET.get((word >> (18 - 6 * place) & 63) as usize).copied().unwrap_or(b'=');
            out.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

fn responses(request: &Request, body: &Map<String, Value>) -> Answered {
    let (last, mut input) = match body.get("input") {
        Some(Value::String(text)) => (text.clone(), tokens::count(text)),
        Some(Value::Array(items)) => conversation(items),
        _ => return Err(refused("input", "Input must be a string or an array".into())),
    };
    let instructions = body.get("instructions").cloned().unwrap_or(Value::Null);
    input = input.saturating_add(tokens::count(&text_of(&instructions)));
    let max_tokens = limit(body, "max_output_tokens", (1, u64::MAX))?;
    let (text, output, complete) = truncate(&last, max_tokens);
    let status = if complete { "completed" } else { "incomplete" };
    let incomplete = if complete { Value::Null } else { json!({"reason": "max_output_tokens"}) };
    let given_or = |param: &str, default: Value| body.get(param).cloned().unwrap_or(default);
    let answer = json!({
        "id": id("resp_", request), "object": "response", "created_at": request.created_at,
        "status": status, "background": false, "error": null,
        "incomplete_details": incomplete,
        "instructions": instructions, "max_output_tokens": max_tokens, "model": request.model,
        "output": [{
            "id": id("msg_", request), "type": "message", "status": status, "role": "assistant",
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
        }],
        "parallel_tool_calls": given_or("parallel_tool_calls", json!(true)),
        "previous_response_id": null,
        "reasoning": {"effort": null, "summary": null}, "store": false,
        "temperature": given_or("temperature", json!(1.0)), "text": {"format": {"type": "text"}},
        "tool_choice": given_or("tool_choice", json!("auto")),
        "tools": given_or("tools", json!([])),
        "top_p": given_or("top_p", json!(1.0)), "truncation": "disabled",
        "usage": {
            "input_tokens": input,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": output, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input.saturating_add(output)
        },
        "user": given_or("user", Value::Null), "metadata": given_or("metadata", json!({}))
    });
    Ok((answer, usage(input, output)))
}

fn moderations(request: &Request, body: &Map<String, Value>) -> Answered {
    const CATEGORIES: [&str; 13] = [
        "harassment",
        "harassment/threatening",
        "hate",
        "hate/threatening",
        "illicit",
        "illicit/violent",
        "self-harm",
        "self-harm/instructions",
        "self-harm/intent",
        "sexual",
        "sexual/minors",
        "violence",
        "violence/graphic",
    ];
    let each = |value: Value| {
        CATEGORIES.iter().map(|name| ((*name).to_owned(), value.clone())).collect::<Map<_, _>>()
    };
    let texts = inputs(body, "input")?;
    let result = json!({
        "flagged": false, "categories": each(json!(false)), "category_scores": each(json!(0.0)),
        "category_applied_input_types": each(json!(["text"]))
    });
    let answer = json!({
        "id": id("modr-", request), "model": request.model, "results": vec![result; texts.len()]
    });
    Ok((answer, usage(texts.iter().map(|text| tokens::count(text)).sum(), 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(endpoint: &str, body: Value) -> Answered {
        answer(&Request {
            id: "batch_req_00ff".into(),
            custom_id: "a".into(),
            endpoint: endpoint.into(),
            model: "echo".into(),
            body: body.to_string(),
            created_at: 1_700_000_000,
            attempt: 1,
        })
    }

    fn value(answered: Answered) -> (Value, Usage) {
        answered.unwrap_or_else(|refused| panic!("{}", refused.message))
    }

    #[test]
    fn chat_echoes_the_last_user_message() {
        let messages = json!([{"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one two three"}]},
            {"role": "assistant", "content": "x"}]);
        let (answer, usage) = value(ask("/v1/chat/completions", json!({"messages": messages})));
        assert_eq!(answer["id"], "chatcmpl-00ff");
        assert_eq!(answer["created"], 1_700_000_000);
        assert_eq!(answer["choices"][0]["message"]["content"], "one two three");
        assert_eq!((usage.input_tokens, usage.output_tokens), (3 + 3 + 3 + 3 + 1 + 3, 3));
        let (answer, usage) = value(ask(
            "/v1/chat/completions",
            json!({"messages": messages, "max_tokens": 2, "n": 2}),
        ));
        assert_eq!(answer["choices"][1]["message"]["content"], "one two");
        assert_eq!(answer["choices"][1]["finish_reason"], "length");
        assert_eq!(usage.output_tokens, 4);
    }

    #[test]
    fn invalid_parameters_are_refused() {
        let messages = json!([{"role": "user", "content": "x"}]);
        for body in [
            json!({"messages": messages, "n": 17}),
            json!({"messages": messages, "max_tokens": 0}),
            json!({}),
        ] {
            assert_eq!(
                ask("/v1/chat/completions", body).err().map(|refused| refused.status),
                Some(400)
            );
        }
        let refused = ask("/v1/chat/completions", json!({"messages": [{"role": "robot"}]})).err();
        assert!(refused.is_some_and(|refused| refused.status == 0
            && refused.message.starts_with("Unknown message role: robot")));
        assert!(ask("/v1/embeddings", json!({"input": []})).is_err());
        assert!(ask("/v1/embeddings", json!({"input": "x", "dimensions": 1_000_000})).is_err());
    }

    #[test]
    fn embeddings_are_unit_vectors_in_both_encodings() {
        let (answer, _) =
            value(ask("/v1/embeddings", json!({"input": ["a", "b"], "dimensions": 3})));
        let vector: Vec<f64> =
            serde_json::from_value(answer["data"][0]["embedding"].clone()).unwrap();
        assert!((vector.iter().map(|value| value * value).sum::<f64>() - 1.0).abs() < 1e-5);
        assert_ne!(answer["data"][0]["embedding"], answer["data"][1]["embedding"]);
        let (answer, _) = value(ask(
            "/v1/embeddings",
            json!({"input": [1, 2], "dimensions": 1, "encoding_format": "base64"}),
        ));
        assert_eq!(answer["data"].as_array().map(Vec::len), Some(1));
        assert_eq!(base64(&[1.0]), "AACAPw==");
        assert_eq!(base64(&[1.0, -1.0]), "AACAPwAAgL8=");
    }

    #[test]
    fn completions_responses_and_moderations_answer_each_input() {
        let (answer, _) =
            value(ask("/v1/completions", json!({"prompt": ["a b", "c"], "max_tokens": 1})));
        assert_eq!(
            (&answer["choices"][0]["text"], &answer["choices"][1]["text"]),
            (&json!("a"), &json!("c"))
        );
        let (answer, usage) =
            value(ask("/v1/responses", json!({"input": "hi there", "instructions": "be kind"})));
        assert_eq!(answer["output"][0]["content"][0]["text"], "hi there");
        assert_eq!((usage.input_tokens, usage.output_tokens), (4, 2));
        let (answer, _) =
            value(ask("/v1/moderations", json!({"input": ["a", {"type": "text", "text": "b"}]})));
        assert_eq!(answer["results"].as_array().map(Vec::len), Some(2));
    }
}
