//! Behavior of the stub for all requests: latency, refusals, rate limits, hangs.

use std::time::{Duration, Instant};

use serde_json::Value;

/// Behavior, parsed from a query such as `latency=100-200&random=10`.
#[derive(Default)]
pub struct Mode {
    /// `latency=FROM-TO`: range of the latency of a response, in milliseconds.
    latency: (u64, u64),
    /// `random=PERCENT`: share of the requests that get 429.
    random: u64,
    /// `rate=N`: token bucket of N requests a second and a burst of N; more get 429.
    rate: Option<Bucket>,
    /// `window=N/SECONDS`: N requests in each window of that length; more get 429.
    window: Option<Window>,
    /// `retry-after=SECONDS`: header of each refusal.
    pub retry_after: Option<u64>,
    /// `status=STATUS`: status of every request.
    status: Option<u16>,
    /// `hang=N`: one request in N is never answered.
    hang: Option<u64>,
    /// `key=SECRET`: requests without this bearer token get 401.
    key: Option<String>,
    seen: u64,
    dice: u64,
}

struct Bucket {
    rate: f64,
    tokens: f64,
    at: Instant,
}

struct Window {
    number: u64,
    length: Duration,
    begun: Instant,
    taken: u64,
}

/// Decision about one request.
pub enum Decision {
    /// Answers after a latency.
    After(Duration),
    /// Answers with an error status.
    Refused(u16),
    /// Never answers.
    Hangs,
}

impl Mode {
    /// Parses a query; unknown keys are ignored.
    pub fn parse(query: &str) -> Self {
        let mut mode = Self { dice: 88_172_645_463_325_252, ..Self::default() };
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let number = || value.parse::<u64>().unwrap_or(0);
            let pair = |by| {
                value
                    .split_once(by)
                    .and_then(|(one, other)| Some((one.parse().ok()?, other.parse().ok()?)))
            };
            match key {
                "latency" => mode.latency = pair('-').unwrap_or((number(), number())),
                "random" => mode.random = number(),
                "rate" => {
                    let rate = number() as f64;
                    mode.rate = Some(Bucket { rate, tokens: rate, at: Instant::now() });
                }
                "window" => {
                    let (number, seconds) = pair('/').unwrap_or((1, 1));
                    let length = Duration::from_secs(seconds);
                    mode.window = Some(Window { number, length, begun: Instant::now(), taken: 0 });
                }
                "retry-after" => mode.retry_after = Some(number()),
                "status" => mode.status = value.parse().ok(),
                "hang" => mode.hang = Some(number().max(1)),
                "key" => mode.key = Some(value.to_owned()),
                _ => {}
            }
        }
        mode
    }

    /// Decides about a request with these headers, and counts it.
    pub fn decide(&mut self, headers: &Value) -> Decision {
        self.seen += 1;
        if let Some(status) = self.status {
            return Decision::Refused(status);
        }
        let given = headers.get("authorization").and_then(Value::as_str).unwrap_or_default();
        if self.key.as_ref().is_some_and(|key| given != format!("Bearer {key}")) {
            return Decision::Refused(401);
        }
        if self.hang.is_some_and(|each| self.seen.is_multiple_of(each)) {
            return Decision::Hangs;
        }
        if self.next() % 100 < self.random || !self.has_room() {
            return Decision::Refused(429);
        }
        let (from, to) = self.latency;
        Decision::After(Duration::from_millis(from + self.next() % (to - from).max(1)))
    }

    /// Returns true if rate and window allow one more request; counts it.
    fn has_room(&mut self) -> bool {
        let now = Instant::now();
        if let Some(bucket) = &mut self.rate {
            let passed = now.duration_since(bucket.at).as_secs_f64();
            bucket.at = now;
            bucket.tokens = (bucket.tokens + passed * bucket.rate).min(bucket.rate);
            if bucket.tokens < 1.0 {
                return false;
            }
            bucket.tokens -= 1.0;
        }
        if let Some(window) = &mut self.window {
            while now.duration_since(window.begun) >= window.length {
                window.begun += window.length;
                window.taken = 0;
            }
            if window.taken >= window.number {
                return false;
            }
            window.taken += 1;
        }
        true
    }

    /// Returns the next number of a xorshift generator with a fixed seed.
    fn next(&mut self) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice >> 11
    }
}
