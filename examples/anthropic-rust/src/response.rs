//! Translation of the response, of errors and of the retry delay.

use serde_json::{Value, json};

use crate::bindings::exports::batchwright::plugin::inference::{
    Advice, Answer, Failure, Header, HttpResponse, Response, Step, TransportError, TransportFault,
    Usage,
};
use crate::{RequestContext, exact, failed};

/// Returns the step after a response of the provider.
pub(crate) fn translate(context: &RequestContext, answer: HttpResponse) -> Step {
    let header = |name: &str| find(&answer.headers, name);
    let request_id = header("request-id").map(str::to_owned);
    let body = std::str::from_utf8(&answer.body).ok().and_then(|body| exact::read(body).ok());
    if answer.status != 200 {
        let response = Answer::Response(Response {
            status: answer.status,
            request_id,
            body: exact::write(&error(answer.status, body.as_ref())),
            usage: None,
        });
        // 529 is `overloaded_error`. The API documents 408 and 409 as transient too.
        return if matches!(answer.status, 408 | 409 | 429 | 500..) {
            Step::Retry(Advice {
                after_milliseconds: retry_after(header("retry-after")),
                otherwise: response,
            })
        } else {
            Step::Done(response)
        };
    }
    let Some(message) = body.filter(|body| body.get("content").is_some_and(Value::is_array)) else {
        return failed(
            "invalid_provider_response",
            "The provider answered 200 with a body that is not a message.".into(),
        );
    };
    let (body, usage) = completion(context, &message);
    Step::Done(Answer::Response(Response {
        status: 200,
        request_id,
        body: exact::write(&body),
        usage: Some(usage),
    }))
}

/// Returns the step after an exchange without a response.
pub(crate) fn no_answer(error: TransportError) -> Step {
    let code = match error.fault {
        TransportFault::NotAllowed => return failed("egress_refused", error.message),
        TransportFault::TooLarge => return failed("provider_answer_too_large", error.message),
        TransportFault::Timeout => "provider_timeout",
        TransportFault::Protocol => "provider_protocol_error",
        TransportFault::NameResolution | TransportFault::Connection | TransportFault::Tls => {
            "provider_unreachable"
        }
    };
    let otherwise = Answer::Failure(Failure { code: code.into(), message: error.message });
    Step::Retry(Advice { after_milliseconds: None, otherwise })
}

/// Translates a message into a chat completion.
fn completion(context: &RequestContext, message: &Value) -> (Value, Usage) {
    let blocks =
        message.get("content").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let of_type = |kind: &'static str| {
        blocks.iter().filter(move |block| block.get("type") == Some(&kind.into()))
    };
    let text: String =
        of_type("text").filter_map(|block| block.get("text").and_then(Value::as_str)).collect();
    let calls: Vec<Value> = of_type("tool_use")
        .map(|block| {
            let arguments = block.get("input").map_or_else(|| "{}".into(), exact::write);
            json!({
                "id": block.get("id"),
                "type": "function",
                "function": {"name": block.get("name"), "arguments": arguments},
            })
        })
        .collect();
    let reason = match message.get("stop_reason").and_then(Value::as_str) {
        Some("max_tokens" | "model_context_window_exceeded") => "length",
        Some("tool_use") => "tool_calls",
        Some("refusal") => "content_filter",
        _ => "stop",
    };
    // Reason of a refusal; not every refusal has one.
    let refusal =
        message.pointer("/stop_details/explanation").filter(|_| reason == "content_filter");
    let text = if text.is_empty() && !calls.is_empty() { Value::Null } else { text.into() };
    let mut reply = json!({"role": "assistant", "content": text, "refusal": refusal});
    if let (false, Value::Object(reply)) = (calls.is_empty(), &mut reply) {
        reply.insert("tool_calls".into(), calls.into());
    }
    let count = |name: &str| {
        message.pointer(&format!("/usage/{name}")).and_then(Value::as_u64).unwrap_or(0)
    };
    let cached = count("cache_read_input_tokens");
    // This API counts tokens read from and written to its cache separately.
    let input = count("input_tokens")
        .saturating_add(cached)
        .saturating_add(count("cache_creation_input_tokens"));
    let output = count("output_tokens");
    let reasoning = count("output_tokens_details/thinking_tokens");
    let body = json!({
        "id": message.get("id").cloned().unwrap_or_else(|| context.id.clone().into()),
        "object": "chat.completion",
        "created": context.created_at,
        "model": context.model,
        "choices": [{"index": 0, "message": reply, "logprobs": null, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": input,
            "completion_tokens": output,
            "total_tokens": input.saturating_add(output),
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        },
    });
    let usage = Usage {
        input_tokens: input,
        cached_input_tokens: cached,
        output_tokens: output,
        reasoning_tokens: reasoning,
    };
    (body, usage)
}

/// Returns the provider's error in the form of the OpenAI API. The provider's error type, such as
/// `overloaded_error`, becomes the code.
fn error(status: u16, body: Option<&Value>) -> Value {
    let given = |name: &str| body?.pointer(&format!("/error/{name}")).and_then(Value::as_str);
    let message = given("message")
        .map_or_else(|| format!("The provider answered with status {status}."), str::to_owned);
    let kind = if status >= 500 { "server_error" } else { "invalid_request_error" };
    json!({"error": {"message": message, "type": kind, "param": null, "code": given("type")}})
}

/// Returns the value of the first header of this name, ignoring case.
fn find<'a>(headers: &'a [Header], name: &str) -> Option<&'a str> {
    headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case(name))
        .map(|header| header.value.as_str())
}

/// Returns the delay in milliseconds. This API sends whole seconds.
fn retry_after(value: Option<&str>) -> Option<u64> {
    value?.trim().parse::<u64>().ok().map(|seconds| seconds.saturating_mul(1000))
}
