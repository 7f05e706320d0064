//! Rate-limit hints in response headers, in the forms that providers use.

use std::time::Duration;

use batchwright_domain::clock::Timestamp;

/// Maximum wait for a reset that a provider reports without refusing a request. The reset may be
/// the time until a steadily filling bucket is full, and far too long.
const MAX_RESET: Duration = Duration::from_secs(60);

/// Header pairs of remaining requests and their reset.
const REQUEST_HEADERS: [(&str, &str); 4] = [
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"),
    ("ratelimit-remaining", "ratelimit-reset"),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),
];
/// Header pairs of remaining tokens and their reset; only a remainder of zero counts.
const TOKEN_HEADERS: [(&str, &str); 4] = [
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"),
    ("anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"),
    ("anthropic-ratelimit-output-tokens-remaining", "anthropic-ratelimit-output-tokens-reset"),
];

/// Rate-limit hints of one response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimitHints {
    /// Time that the provider asks to wait.
    pub delay: Option<Duration>,
    /// Remaining requests, and the time until the reset.
    pub left: Option<(u64, Duration)>,
}

impl RateLimitHints {
    /// Parses the hints in the headers of a response that arrived at `now`.
    pub fn of(headers: &[(String, String)], now: Timestamp) -> Self {
        // Fast path: most responses have no hints.
        if !headers.iter().any(|(name, _)| is_hint(name)) {
            return Self::default();
        }
        let get = |name: &str| {
            headers
                .iter()
                .find(|(known, _)| known.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim())
        };
        // Dates are relative to the provider's clock if the response has a date.
        let now = get("date").and_then(parse_date).unwrap_or_else(|| now.as_millis());
        let delay = get("retry-after-ms")
            .and_then(|value| parse_span(&format!("{value}ms")))
            .or_else(|| get("retry-after").and_then(|value| parse_wait(value, now)));
        let pair = |(remaining, reset): &(&str, &str)| {
            let left: f64 = get(remaining)?.parse().ok().filter(|left: &f64| *left >= 0.0)?;
            let reset = parse_wait(get(reset)?, now)?.min(MAX_RESET);
            Some((left as u64, reset))
        };
        let tokens = TOKEN_HEADERS.iter().filter_map(pair).filter(|(left, _)| *left == 0);
        // Smallest remainder first, then the latest reset.
        let left = REQUEST_HEADERS
            .iter()
            .filter_map(pair)
            .chain(tokens)
            .min_by_key(|(left, reset)| (*left, u64::MAX - reset.as_millis() as u64));
        Self { delay, left }
    }
}

/// Returns true if a header may be a hint; the case of the name does not matter.
fn is_hint(name: &str) -> bool {
    let has_prefix =
        |word: &str| name.get(..word.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(word));
    ["x-ratelimit-", "ratelimit-", "retry-after", "anthropic-ratelimit-"]
        .iter()
        .any(|word| has_prefix(word))
}

/// Parses the wait until a point in time: a span, seconds, a date, or seconds since 1970.
fn parse_wait(text: &str, now: i64) -> Option<Duration> {
    let until =
        |then: i64| Duration::from_millis(u64::try_from(then.saturating_sub(now)).unwrap_or(0));
    if let Ok(seconds) = text.parse::<f64>() {
        const YEAR_2001: f64 = 1e9;
        const YEAR_5138: f64 = 1e11;
        return if seconds > YEAR_5138 {
            None
        } else if seconds > YEAR_2001 {
            Some(until((seconds * 1000.0) as i64))
        } else {
            Duration::try_from_secs_f64(seconds).ok()
        };
    }
    parse_span(text).or_else(|| parse_date(text).map(until))
}

/// Parses a span such as `6m0s`, `1.5s` or `20ms`.
fn parse_span(text: &str) -> Option<Duration> {
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let (number, tail) = rest.split_at(end);
        let unit_end = tail.find(|letter: char| letter.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * unit;
        rest = tail;
    }
    Duration::try_from_secs_f64(total).ok().filter(|_| !text.is_empty())
}

/// Parses a date of RFC 9110 or RFC 3339 to milliseconds since 1970.
fn parse_date(text: &str) -> Option<i64> {
    let at = httpdate::parse_http_date(text)
        .ok()
        .or_else(|| humantime::parse_rfc3339_weak(text).ok())?;
    i64::try_from(at.duration_since(std::time::UNIX_EPOCH).ok()?.as_millis()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hints(headers: &[(&str, &str)]) -> RateLimitHints {
        let headers: Vec<_> =
            headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        RateLimitHints::of(&headers, Timestamp::from_millis(784_111_770_000))
    }

    #[test]
    fn hints_parse_every_form_of_retry_after() {
        for (name, value, milliseconds) in [
            ("Retry-After", "3", Some(3000)),
            ("retry-after", "0.25", Some(250)),
            ("retry-after", "7200", Some(7_200_000)),
            ("retry-after-ms", "120", Some(120)),
            ("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT", Some(7000)),
            ("retry-after", "1994-11-06T08:49:37Z", Some(7000)),
            ("retry-after", "Sun, 06 Nov 1994 08:40:00 GMT", Some(0)),
            ("retry-after", "soon", None),
            ("retry-after", "-1", None),
            ("retry-after", "1e300", None),
            ("retry-after", "", None),
        ] {
            assert_eq!(
                hints(&[(name, value)]).delay,
                milliseconds.map(Duration::from_millis),
                "{name}: {value}"
            );
        }
        // A date is relative to the provider's own date.
        let headers = [
            ("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("date", "Sun, 06 Nov 1994 08:49:36 GMT"),
        ];
        assert_eq!(hints(&headers).delay, Some(Duration::from_secs(1)));
    }

    #[test]
    fn hints_parse_remaining_requests_and_tokens_of_many_providers() {
        for (headers, left) in [
            (
                vec![
                    ("x-ratelimit-remaining-requests", "59"),
                    ("x-ratelimit-reset-requests", "1s"),
                ],
                Some((59, 1000)),
            ),
            (
                vec![
                    ("x-ratelimit-remaining-requests", "0"),
                    ("x-ratelimit-reset-requests", "20ms"),
                ],
                Some((0, 20)),
            ),
            (
                vec![("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "6m0s")],
                Some((0, 60_000)),
            ),
            (
                vec![("x-ratelimit-remaining-tokens", "100"), ("x-ratelimit-reset-tokens", "6s")],
                None,
            ),
            (
                vec![
                    ("anthropic-ratelimit-requests-remaining", "3"),
                    ("anthropic-ratelimit-requests-reset", "1994-11-06T08:49:40Z"),
                ],
                Some((3, 10_000)),
            ),
            (vec![("RateLimit-Remaining", "2"), ("RateLimit-Reset", "30")], Some((2, 30_000))),
            (
                vec![
                    ("x-ratelimit-remaining", "2"),
                    ("x-ratelimit-reset", "1800000002"),
                    ("date", "Fri, 15 Jan 2027 08:00:00 GMT"),
                ],
                Some((2, 2000)),
            ),
            (
                vec![
                    ("x-ratelimit-remaining-requests", "5"),
                    ("x-ratelimit-reset-requests", "1s"),
                    ("x-ratelimit-remaining-tokens", "0"),
                    ("x-ratelimit-reset-tokens", "2s"),
                ],
                Some((0, 2000)),
            ),
            (
                vec![
                    ("x-ratelimit-remaining-requests", "-1"),
                    ("x-ratelimit-reset-requests", "1s"),
                ],
                None,
            ),
            (vec![("x-ratelimit-remaining-requests", "many")], None),
        ] {
            let expected =
                left.map(|(left, milliseconds)| (left, Duration::from_millis(milliseconds)));
            assert_eq!(hints(&headers).left, expected, "{headers:?}");
        }
    }
}
