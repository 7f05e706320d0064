//! What a provider says of its limits in headers, in the forms that are in use.

use std::time::Duration;

use crate::clock::Timestamp;

/// The longest that is waited because a provider says that nothing is left, without refusing anything: it may mean a bucket that fills
/// steadily, and the time until it is full.
const LONGEST_RESET: Duration = Duration::from_secs(60);

/// Pairs of headers that say what is left, and until when. Of requests, each counts; of tokens, only that there are none.
const REQUESTS: [(&str, &str); 4] = [
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"),
    ("ratelimit-remaining", "ratelimit-reset"),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),
];
const TOKENS: [(&str, &str); 4] = [
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"),
    ("anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"),
    ("anthropic-ratelimit-output-tokens-remaining", "anthropic-ratelimit-output-tokens-reset"),
];

/// What the headers of a response say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// How long it asks to wait.
    pub delay: Option<Duration>,
    /// Requests that are left, and for how long that holds.
    pub left: Option<(u64, Duration)>,
}

impl Hints {
    pub fn of(headers: &[(String, String)], now: Timestamp) -> Self {
        // Most say nothing, and it is asked of every response.
        if !headers.iter().any(|(name, _)| is_hint(name)) {
            return Self::default();
        }
        let get = |name: &str| {
            headers
                .iter()
                .find(|(known, _)| known.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim())
        };
        // By the provider's own clock where it gives the time.
        let now = get("date").and_then(date).unwrap_or_else(|| now.as_millis());
        let delay = get("retry-after-ms")
            .and_then(|value| span(&format!("{value}ms")))
            .or_else(|| get("retry-after").and_then(|value| moment(value, now)));
        let pair = |(remaining, reset): &(&str, &str)| {
            let left: f64 = get(remaining)?.parse().ok().filter(|left: &f64| *left >= 0.0)?;
            let reset = moment(get(reset)?, now)?.min(LONGEST_RESET);
            Some((left as u64, reset))
        };
        let tokens = TOKENS.iter().filter_map(pair).filter(|(left, _)| *left == 0);
        // The one that holds for longest, of those of which least is left.
        let left = REQUESTS
            .iter()
            .filter_map(pair)
            .chain(tokens)
            .min_by_key(|(left, reset)| (*left, u64::MAX - reset.as_millis() as u64));
        Self { delay, left }
    }
}

/// Whether a header may be one of these. Names are in lower case as they come from the network; others are looked at in any case.
fn is_hint(name: &str) -> bool {
    let begins =
        |word: &str| name.get(..word.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(word));
    ["x-ratelimit-", "ratelimit-", "retry-after", "anthropic-ratelimit-"]
        .iter()
        .any(|word| begins(word))
}

/// A time from now: a span, seconds, a date, or seconds since 1970.
fn moment(text: &str, now: i64) -> Option<Duration> {
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
    span(text).or_else(|| date(text).map(until))
}

/// A span such as `6m0s`, `1.5s` or `20ms`.
fn span(text: &str) -> Option<Duration> {
    let mut whole = 0.0;
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
        whole += number.parse::<f64>().ok()? * unit;
        rest = tail;
    }
    Duration::try_from_secs_f64(whole).ok().filter(|_| !text.is_empty())
}

/// A date as HTTP (RFC 9110) or RFC 3339 write it, in milliseconds since 1970.
fn date(text: &str) -> Option<i64> {
    let at = httpdate::parse_http_date(text)
        .ok()
        .or_else(|| humantime::parse_rfc3339_weak(text).ok())?;
    i64::try_from(at.duration_since(std::time::UNIX_EPOCH).ok()?.as_millis()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(headers: &[(&str, &str)]) -> Hints {
        let headers: Vec<_> =
            headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Hints::of(&headers, Timestamp::from_millis(784_111_770_000))
    }

    #[test]
    fn delays_are_read_in_every_form() {
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
                of(&[(name, value)]).delay,
                milliseconds.map(Duration::from_millis),
                "{name}: {value}"
            );
        }
        // A date is held against the provider's own.
        let headers = [
            ("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("date", "Sun, 06 Nov 1994 08:49:36 GMT"),
        ];
        assert_eq!(of(&headers).delay, Some(Duration::from_secs(1)));
    }

    #[test]
    fn what_is_left_is_read_from_the_headers_of_many_providers() {
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
            assert_eq!(of(&headers).left, expected, "{headers:?}");
        }
    }
}
