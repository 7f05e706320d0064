//! Submission of a job: the check of a request, and the body of the job.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Roles of messages that the provider has.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Members of a request body that are checked.
#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
}

/// Body of a submission. The input is the client's body, with every number as the client wrote it.
#[derive(Serialize)]
struct Submission<'a> {
    model: &'a str,
    input: &'a RawValue,
}

/// Returns the body of the submission, or a message for the client.
pub(crate) fn write(body: &str, model: &str) -> Result<Vec<u8>, String> {
    let unreadable = |error: serde_json::Error| format!("The body cannot be read: {error}.");
    let chat: Chat = serde_json::from_str(body).map_err(unreadable)?;
    for message in &chat.messages {
        if !ROLES.contains(&message.role.as_str()) {
            return Err(format!("Unknown message role: {}", message.role));
        }
    }
    let input: &RawValue = serde_json::from_str(body).map_err(unreadable)?;
    serde_json::to_vec(&Submission { model, input }).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn body_is_forwarded_unchanged() {
        let body = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"seed":1e999}"#;
        let sent = String::from_utf8(write(body, "theirs").unwrap()).unwrap();
        assert_eq!(sent, format!(r#"{{"model":"theirs","input":{body}}}"#));
    }

    #[test]
    fn body_without_known_roles_is_refused() {
        for (body, message) in [
            ("{}", "messages"),
            (r#"{"messages": null}"#, "cannot be read"),
            (r#"{"messages": [7]}"#, "cannot be read"),
            (r#"{"messages": [{"content": "x"}]}"#, "role"),
            (r#"{"messages": [{"role": "robot"}]}"#, "Unknown message role: robot"),
        ] {
            let refused = write(body, "m").unwrap_err();
            assert!(refused.contains(message), "{body}: {refused}");
        }
    }
}
