//! Redaction of secrets that a stream spreads over several events.
//!
//! **Threat.** A model that repeats a credential sends a few letters of it in each event, so no
//! single event has the secret, and the client's text has it.
//!
//! **Layer.** `egress` redacts each event. Here, the texts of events are joined by what they
//! continue. While the end of a text may be the beginning of a secret, events are held. When the
//! secret is complete, its letters are removed from the events that are held.
//!
//! **Bounds.** Fewer than [`MIN_BEGINNING`] letters are not held, so at most that many are seen. At
//! most [`MAX_HELD`] events of [`MAX_HELD_BYTES`] are held; what is longer is passed on. An event
//! with more than [`MAX_TEXTS_OF_EVENT`] texts, or one that is too large for its values to be read,
//! is not followed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use batchwright_egress::SecretTexts;
use serde_json::Value;

use crate::formats::server_event::{remove_logprobs, texts, with_data};

/// Number of letters of a secret from which an event is held.
const MIN_BEGINNING: usize = 4;

/// Maximum number of events that are held.
const MAX_HELD: usize = 256;

/// Maximum size of the events that are held.
const MAX_HELD_BYTES: usize = 64 << 10;

/// Maximum number of texts of an event that are followed.
const MAX_TEXTS_OF_EVENT: usize = 16;

/// Maximum number of texts that are followed at a time.
const MAX_TEXTS: usize = 1024;

/// Replacement of a secret.
const REDACTED: &str = "[redacted]";

/// Event that is held, or ready.
struct Held {
    event: Vec<u8>,
    data: Value,
    is_changed: bool,
}

/// Scrubber of one stream.
pub(super) struct Scrubber {
    secrets: Arc<SecretTexts>,
    /// Events that wait for what follows.
    held: Vec<Held>,
    ready: VecDeque<Vec<u8>>,
    /// End of each text: what has been passed on, and may be the beginning of a secret.
    tails: BTreeMap<String, String>,
}

impl Scrubber {
    pub(super) fn new(secrets: Arc<SecretTexts>) -> Self {
        Self { secrets, held: Vec::new(), ready: VecDeque::new(), tails: BTreeMap::new() }
    }

    /// Returns the next event that may be sent.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        self.ready.pop_front()
    }

    /// Adds an event without text.
    pub(super) fn push_other(&mut self, event: Vec<u8>) {
        if self.held.is_empty() {
            self.ready.push_back(event);
        } else {
            self.held.push(Held { event, data: Value::Null, is_changed: false });
            self.bound();
        }
    }

    /// Adds an event with its values, which have a number of texts. An event without values is not
    /// followed.
    pub(super) fn push(&mut self, event: Vec<u8>, values: Option<Value>, texts: usize) {
        let is_followed = !self.secrets.is_empty() && texts <= MAX_TEXTS_OF_EVENT;
        let Some(data) = values.filter(|_| is_followed) else {
            self.flush();
            self.ready.push_back(event);
            return;
        };
        self.held.push(Held { event, data, is_changed: false });
        let mut is_open = false;
        for name in self.names() {
            is_open |= self.scrub(&name);
        }
        if !is_open {
            self.flush();
        }
        self.bound();
    }

    /// Passes on all events that are held.
    pub(super) fn flush(&mut self) {
        for mut held in self.held.drain(..) {
            for (name, text) in texts(&mut held.data) {
                let tail = self.tails.entry(name).or_default();
                tail.push_str(text);
                *tail = last_chars(tail, self.secrets.max_bytes());
            }
            self.ready.push_back(match held.is_changed {
                true => {
                    remove_logprobs(&mut held.data);
                    with_data(&held.event, &held.data)
                }
                false => held.event,
            });
        }
        if self.tails.len() > MAX_TEXTS {
            self.tails.clear();
        }
    }

    fn bound(&mut self) {
        let bytes: usize = self.held.iter().map(|held| held.event.len()).sum();
        if self.held.len() > MAX_HELD || bytes > MAX_HELD_BYTES {
            self.flush();
        }
    }

    /// Returns the names of the texts of the events that are held.
    fn names(&mut self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for held in &mut self.held {
            names.extend(texts(&mut held.data).into_iter().map(|(name, _)| name));
        }
        names.sort();
        names.dedup();
        names
    }

    /// Removes complete secrets from a text; returns true if its end may be the beginning of one.
    fn scrub(&mut self, name: &str) -> bool {
        let tail = self.tails.get(name).cloned().unwrap_or_default();
        let mut whole = tail.clone();
        for held in &mut self.held {
            for (found, text) in texts(&mut held.data) {
                if found == name {
                    whole.push_str(text);
                }
            }
        }
        // The part that is sent cannot be taken back; the rest of the secret is removed. What was
        // searched is not searched again, so that a secret that contains the mark ends too.
        let mut searched = tail.len();
        while let Some(range) = self.secrets.find(&whole, searched) {
            searched = range.start.max(tail.len()).saturating_add(REDACTED.len());
            let (mut at, mut is_marked) = (tail.len(), false);
            let mut rest = tail.clone();
            for held in &mut self.held {
                let mut is_changed = false;
                for (found, text) in texts(&mut held.data) {
                    if found != name {
                        continue;
                    }
                    let end = at.saturating_add(text.len());
                    let (from, to) = (range.start.max(at), range.end.min(end));
                    if from < to {
                        let cut = from.saturating_sub(at)..to.saturating_sub(at);
                        let mark =
                            if std::mem::replace(&mut is_marked, true) { "" } else { REDACTED };
                        text.replace_range(cut, mark);
                        is_changed = true;
                    }
                    rest.push_str(text);
                    at = end;
                }
                held.is_changed |= is_changed;
            }
            whole = rest;
        }
        self.secrets.beginning_at_end(&whole) >= MIN_BEGINNING
    }
}

/// Returns the last characters of a text, of up to `bytes` bytes.
fn last_chars(text: &str, bytes: usize) -> String {
    let mut from = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(from) {
        from = from.saturating_add(1);
    }
    text.get(from..).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SECRET: &str = "sk-0123456789abcdef";

    fn scrubbed(pieces: &[&str]) -> (String, usize) {
        scrubbed_of(SECRET, pieces)
    }

    fn scrubbed_of(secret: &str, pieces: &[&str]) -> (String, usize) {
        let mut scrubber = Scrubber::new(Arc::new(SecretTexts::new(vec![secret.to_owned()])));
        let (mut sent, mut most_held) = (Vec::new(), 0);
        for piece in pieces {
            let data = json!({"choices": [{"index": 0, "delta": {"content": piece, "x": [1]},
                "logprobs": {"content": [{"token": piece}]}}]});
            scrubber.push(format!("data: {data}\n\n").into_bytes(), Some(data), 1);
            most_held = most_held.max(scrubber.held.len());
            sent.extend(std::iter::from_fn(|| scrubber.next()));
        }
        scrubber.flush();
        sent.extend(std::iter::from_fn(|| scrubber.next()));
        assert_eq!(sent.len(), pieces.len(), "every event is sent");
        let text = |event: &Vec<u8>| {
            let data = std::str::from_utf8(event).unwrap().trim().strip_prefix("data: ").unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            let content = &data["choices"][0]["delta"]["content"];
            let token = &data["choices"][0]["logprobs"]["content"][0]["token"];
            assert!(token.is_null() || token == content, "{data}");
            data["choices"][0]["delta"]["content"].as_str().unwrap().to_owned()
        };
        (sent.iter().map(text).collect(), most_held)
    }

    #[test]
    fn secret_is_redacted_however_it_is_split() {
        let whole = format!("before {SECRET} after");
        for size in 1..whole.len() {
            let letters: Vec<char> = whole.chars().collect();
            let pieces: Vec<String> =
                letters.chunks(size).map(|piece| piece.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (text, _) = scrubbed(&pieces);
            assert!(!text.contains("456789"), "{size}: {text}");
            assert!(text.starts_with("before ") && text.ends_with(" after"), "{size}: {text}");
        }
    }

    #[test]
    fn secret_that_contains_the_mark_ends_the_search() {
        let secret = "abcde1[redacted]";
        let mut pieces = vec!["abcde1"; MAX_HELD + 1];
        pieces.extend(["[", "redacted", "]", " and "]);
        let (text, _) = scrubbed_of(secret, &pieces);
        assert!(text.ends_with(" and "), "{text}");
    }

    #[test]
    fn what_is_held_is_bounded() {
        let secret = "x".repeat(2000) + "1";
        let pieces = vec!["x"; 1000];
        let (text, held) = scrubbed_of(&secret, &pieces);
        assert_eq!(text.len(), 1000);
        assert!(held <= MAX_HELD, "{held}");
    }

    #[test]
    fn ordinary_text_is_unchanged_and_not_held() {
        let (text, held) = scrubbed(&["a", "sk", " and sk-", "0x", "sk-012", "y"]);
        assert_eq!((text.as_str(), held), ("ask and sk-0xsk-012y", 1));
    }
}
