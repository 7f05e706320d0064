//! Simulation of a provider, a queue of lines and the limit between them, in simulated time. It
//! produces the results in `docs/operating/providers.md`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::{Limit, LimitFeedback, Next};

/// Behavior of a simulated provider; times in seconds.
#[derive(Clone, Copy)]
enum Provider {
    /// Refuses a share of requests at random, at any load.
    Random(f64),
    /// Accepts a rate per second with a burst of one second, and refuses a share at random.
    Rate(f64, f64),
    /// Accepts a number of concurrent requests.
    Concurrency(usize),
    /// Accepts a number of requests per minute, optionally with `Retry-After`.
    Minute(f64, Option<f64>),
    /// Refuses all requests until a time.
    DownUntil(f64),
    /// Accepts a rate per second, and from a time on another rate: first rate, time, second rate.
    ChangingRate(f64, f64, f64),
}

struct Model {
    provider: Provider,
    tokens: f64,
    at: f64,
    busy: usize,
    minute: (f64, f64),
}

impl Model {
    fn new(provider: Provider) -> Self {
        let tokens = match provider {
            Provider::Rate(rate, _) | Provider::ChangingRate(rate, ..) => rate,
            _ => 0.0,
        };
        Self { provider, tokens, at: 0.0, busy: 0, minute: (0.0, 0.0) }
    }

    /// Accepts a request, or refuses it with an optional `Retry-After`.
    fn accepts(&mut self, now: f64, rng: &mut fastrand::Rng) -> Result<(), Option<f64>> {
        let passed = now - self.at;
        self.at = now;
        let mut bucket = |rate: f64| {
            self.tokens = (self.tokens + passed * rate).min(rate);
            if self.tokens >= 1.0 {
                self.tokens -= 1.0;
                Ok(())
            } else {
                Err(None)
            }
        };
        match self.provider {
            Provider::Random(share) => {
                if rng.f64() < share {
                    Err(None)
                } else {
                    Ok(())
                }
            }
            Provider::Rate(rate, share) => {
                if rng.f64() < share {
                    return Err(None);
                }
                bucket(rate)
            }
            Provider::ChangingRate(first, when, then) => {
                bucket(if now < when { first } else { then })
            }
            Provider::Concurrency(max) => {
                if self.busy >= max {
                    Err(None)
                } else {
                    Ok(())
                }
            }
            Provider::Minute(number, retry_after) => {
                let minute = (now / 60.0).floor();
                if minute > self.minute.0 {
                    self.minute = (minute, 0.0)
                }
                if self.minute.1 >= number {
                    return Err(retry_after.map(|_| (minute + 1.0) * 60.0 - now));
                }
                self.minute.1 += 1.0;
                Ok(())
            }
            Provider::DownUntil(until) => {
                if now < until {
                    Err(None)
                } else {
                    Ok(())
                }
            }
        }
    }
}

/// Result of a simulation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// Simulated time until the last acceptance.
    pub seconds: f64,
    /// Number of refused requests.
    pub refused: usize,
}

/// Event with its time and its number, which orders simultaneous events.
#[derive(Clone, Copy)]
struct Scheduled(f64, u64, Event);

#[derive(Clone, Copy)]
enum Event {
    /// An exchange ends, accepted or refused; `asked` is `Retry-After` in seconds, zero if absent.
    Ends { host: usize, line: usize, accepted: bool, asked: f64 },
    /// A refused exchange releases its permit.
    Released { host: usize },
    /// The backoff of a line ends.
    Due { host: usize, line: usize },
    /// The host checks its limit again.
    Check { host: usize },
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

struct Host {
    limit: Limit,
    waiting: VecDeque<usize>,
    in_flight: usize,
    next_check: f64,
}

/// Simulates `lines` lines on `hosts` hosts, each with a limit of its own.
fn run(
    provider: Provider,
    hosts: usize,
    lines: usize,
    max: usize,
    latency: (f64, f64),
    seed: u64,
) -> Measured {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut model = Model::new(provider);
    let start = Instant::now();
    let instant = |at: f64| start + Duration::from_secs_f64(at);
    let seconds = |at: Instant| at.duration_since(start).as_secs_f64();
    let mut events = BinaryHeap::new();
    let mut order = 0_u64;
    let mut refusals = vec![0_u32; lines];
    let mut began = vec![None; lines];
    let mut hosts: Vec<Host> = (0..hosts)
        .map(|host| Host {
            limit: Limit::new(max),
            waiting: (0..lines).filter(|line| line % hosts == host).collect(),
            in_flight: 0,
            next_check: f64::INFINITY,
        })
        .collect();
    let mut measured = Measured { seconds: 0.0, refused: 0 };
    let mut done = 0;
    let mut push = |events: &mut BinaryHeap<Reverse<Scheduled>>, at: f64, event: Event| {
        order += 1;
        events.push(Reverse(Scheduled(at, order, event)));
    };
    for host in 0..hosts.len() {
        push(&mut events, 0.0, Event::Check { host });
    }
    while done < lines {
        let Some(Reverse(Scheduled(now, _, event))) = events.pop() else {
            panic!("no events remain")
        };
        assert!(now < 100_000.0, "simulation does not end");
        let host = match event {
            Event::Check { host } => {
                hosts[host].next_check = f64::INFINITY;
                host
            }
            Event::Released { host } => {
                hosts[host].in_flight -= 1;
                host
            }
            Event::Due { host, line } => {
                hosts[host].waiting.push_front(line);
                host
            }
            Event::Ends { host, line, accepted, asked } => {
                let asked = (asked > 0.0).then(|| Duration::from_secs_f64(asked));
                let taken =
                    if accepted { LimitFeedback::Accepted } else { LimitFeedback::Refused(asked) };
                let in_flight = hosts[host].in_flight;
                let held =
                    hosts[host].limit.ended(instant(now), began[line].unwrap(), taken, in_flight);
                match held.map(seconds).filter(|until| *until > now) {
                    Some(until) => push(&mut events, until, Event::Released { host }),
                    None => hosts[host].in_flight -= 1,
                }
                if accepted {
                    model.busy -= 1;
                    done += 1;
                    measured.seconds = now;
                } else {
                    measured.refused += 1;
                    refusals[line] += 1;
                    let pause = crate::refusal_pause(refusals[line]).as_secs_f64()
                        * (0.5 + rng.f64() / 2.0);
                    let pause = asked.map_or(pause, |asked| asked.as_secs_f64().max(pause));
                    push(&mut events, now + pause, Event::Due { host, line });
                }
                host
            }
        };
        loop {
            let Host { limit, waiting, in_flight, next_check } = &mut hosts[host];
            if waiting.is_empty() {
                break;
            }
            match limit.next(instant(now), *in_flight) {
                Next::Later => break,
                Next::At(at) => {
                    let at = seconds(at).max(now + 1e-6);
                    if at < *next_check {
                        *next_check = at;
                        push(&mut events, at, Event::Check { host });
                    }
                    break;
                }
                Next::Now => {}
            }
            let line = waiting.pop_front().unwrap();
            began[line] = Some(limit.begin(instant(now)));
            *in_flight += 1;
            let (accepted, asked) = match model.accepts(now, &mut rng) {
                Ok(()) => (true, 0.0),
                Err(asked) => (false, asked.unwrap_or(0.0)),
            };
            model.busy += usize::from(accepted);
            let takes =
                if accepted { latency.0 + rng.f64() * (latency.1 - latency.0) } else { 0.005 };
            push(&mut events, now + takes, Event::Ends { host, line, accepted, asked });
        }
    }
    measured
}

/// Simulates plain tasks with the official SDK's backoff and unlimited attempts.
fn run_plain_tasks(
    provider: Provider,
    lines: usize,
    tasks: usize,
    latency: (f64, f64),
    seed: u64,
) -> Measured {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut model = Model::new(provider);
    let mut events = BinaryHeap::new();
    let mut order = 0_u64;
    let mut measured = Measured { seconds: 0.0, refused: 0 };
    let mut left = lines;
    let mut refusals = vec![0_i32; tasks];
    // `Due` starts an exchange of a task, and `Ends` ends it.
    for task in 0..tasks.min(lines) {
        events.push(Reverse(Scheduled(0.0, order, Event::Due { host: 0, line: task })));
        order += 1;
        left -= 1;
    }
    while let Some(Reverse(Scheduled(now, _, event))) = events.pop() {
        order += 1;
        match event {
            Event::Due { line, .. } => {
                let (accepted, asked) = match model.accepts(now, &mut rng) {
                    Ok(()) => (true, 0.0),
                    Err(asked) => (false, asked.unwrap_or(0.0)),
                };
                model.busy += usize::from(accepted);
                let takes =
                    if accepted { latency.0 + rng.f64() * (latency.1 - latency.0) } else { 0.005 };
                events.push(Reverse(Scheduled(
                    now + takes,
                    order,
                    Event::Ends { host: 0, line, accepted, asked },
                )));
            }
            Event::Ends { line, accepted, asked, .. } => {
                if accepted {
                    model.busy -= 1;
                    measured.seconds = now;
                    refusals[line] = 0;
                    if left > 0 {
                        left -= 1;
                        events.push(Reverse(Scheduled(now, order, Event::Due { host: 0, line })));
                    }
                } else {
                    measured.refused += 1;
                    let pause = (0.5 * 2_f64.powi(refusals[line].min(4))).min(8.0)
                        * (1.0 - 0.25 * rng.f64());
                    // The SDK honors a `Retry-After` of at most one minute.
                    let pause = if asked > 0.0 && asked <= 60.0 { asked } else { pause };
                    refusals[line] += 1;
                    events.push(Reverse(Scheduled(
                        now + pause,
                        order,
                        Event::Due { host: 0, line },
                    )));
                }
            }
            Event::Released { .. } | Event::Check { .. } => {}
        }
    }
    measured
}

fn median(mut values: Vec<Measured>) -> Measured {
    let mut refused: Vec<usize> = values.iter().map(|measured| measured.refused).collect();
    refused.sort_unstable();
    values.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    Measured { seconds: values[values.len() / 2].seconds, refused: refused[refused.len() / 2] }
}

#[test]
fn limit_matches_plain_task_throughput_with_fewer_refusals() {
    let usual = (0.1, 0.2);
    let cases = [
        ("nothing refused", Provider::Random(0.0), 1500, usual),
        ("1 % at random", Provider::Random(0.01), 1500, usual),
        ("5 % at random", Provider::Random(0.05), 1500, usual),
        ("10 % at random", Provider::Random(0.1), 1500, usual),
        ("20 % at random", Provider::Random(0.2), 1500, usual),
        ("100 a second", Provider::Rate(100.0, 0.0), 1500, usual),
        ("100 a second, 5 % at random", Provider::Rate(100.0, 0.05), 1500, usual),
        ("1 a second", Provider::Rate(1.0, 0.0), 60, usual),
        ("16 at a time", Provider::Concurrency(16), 1500, usual),
        ("16 at a time, slow", Provider::Concurrency(16), 400, (30.0, 60.0)),
        ("600 a minute", Provider::Minute(600.0, None), 1500, usual),
        ("600 a minute, told", Provider::Minute(600.0, Some(1.0)), 1500, usual),
        ("down for 20 s", Provider::DownUntil(20.0), 1500, usual),
        ("200 a second, later 50", Provider::ChangingRate(200.0, 5.0, 50.0), 1500, usual),
        ("50 a second, later 200", Provider::ChangingRate(50.0, 10.0, 200.0), 2000, usual),
    ];
    for (name, provider, lines, latency) in cases {
        let ours = median((0..15).map(|seed| run(provider, 1, lines, 64, latency, seed)).collect());
        let plain = median(
            (0..15).map(|seed| run_plain_tasks(provider, lines, 64, latency, seed)).collect(),
        );
        let three_hosts =
            median((0..5).map(|seed| run(provider, 3, lines, 64, latency, seed)).collect());
        println!(
            "| {name} | {:.1} | {} | {:.1} | {} | {:.2} | {:.1} | {} |",
            ours.seconds,
            ours.refused,
            plain.seconds,
            plain.refused,
            ours.seconds / plain.seconds,
            three_hosts.seconds,
            three_hosts.refused
        );
        assert!(ours.seconds <= 1.1 * plain.seconds, "{name}: slower than plain tasks");
        let random = matches!(provider, Provider::Random(_));
        assert!(random || ours.refused * 3 <= plain.refused, "{name}: {} refusals", ours.refused);
    }
}
