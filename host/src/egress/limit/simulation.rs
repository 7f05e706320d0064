//! A provider, a queue of lines and the limit between them, in simulated time: what `docs/providers.md` says of them is measured here.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::{Limit, Next, Taken};

/// How a provider takes requests; times in seconds.
#[derive(Clone, Copy)]
enum Provider {
    /// A share of them is refused, however few there are.
    Random(f64),
    /// So many a second, of which a second's worth may come at once; a share is refused besides.
    Rate(f64, f64),
    /// So many at a time.
    AtATime(usize),
    /// So many in each minute.
    Minute(f64, Option<f64>),
    /// Everything is refused until then.
    DownUntil(f64),
    /// So many a second, and after a while so many.
    Moving(f64, f64, f64),
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
            Provider::Rate(rate, _) | Provider::Moving(rate, ..) => rate,
            _ => 0.0,
        };
        Self { provider, tokens, at: 0.0, busy: 0, minute: (0.0, 0.0) }
    }

    /// Whether a request is accepted, and what is asked for if not.
    fn accepts(&mut self, now: f64, dice: &mut fastrand::Rng) -> Result<(), Option<f64>> {
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
                if dice.f64() < share {
                    Err(None)
                } else {
                    Ok(())
                }
            }
            Provider::Rate(rate, share) => {
                if dice.f64() < share {
                    return Err(None);
                }
                bucket(rate)
            }
            Provider::Moving(first, when, then) => bucket(if now < when { first } else { then }),
            Provider::AtATime(most) => {
                if self.busy >= most {
                    Err(None)
                } else {
                    Ok(())
                }
            }
            Provider::Minute(number, told) => {
                let minute = (now / 60.0).floor();
                if minute > self.minute.0 {
                    self.minute = (minute, 0.0)
                }
                if self.minute.1 >= number {
                    return Err(told.map(|_| (minute + 1.0) * 60.0 - now));
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

#[derive(Debug, Clone, Copy)]
pub struct Measured {
    pub seconds: f64,
    pub refused: usize,
}

#[derive(Clone, Copy)]
struct At(f64, u64, Event);

#[derive(Clone, Copy)]
enum Event {
    /// An exchange of a host ends: its number, whether it was accepted, and what is asked for.
    Ends {
        host: usize,
        line: usize,
        accepted: bool,
        asked: f64,
    },
    Freed {
        host: usize,
    },
    Due {
        host: usize,
        line: usize,
    },
    Look {
        host: usize,
    },
}

impl PartialEq for At {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for At {}

impl PartialOrd for At {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for At {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

struct Host {
    limit: Limit,
    waiting: VecDeque<usize>,
    under_way: usize,
    looking_at: f64,
}

/// Runs so many lines of so many hosts through the limit.
fn run(
    provider: Provider,
    hosts: usize,
    lines: usize,
    max: usize,
    latency: (f64, f64),
    seed: u64,
) -> Measured {
    let mut dice = fastrand::Rng::with_seed(seed);
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
            under_way: 0,
            looking_at: f64::INFINITY,
        })
        .collect();
    let mut measured = Measured { seconds: 0.0, refused: 0 };
    let mut done = 0;
    let mut push = |events: &mut BinaryHeap<Reverse<At>>, at: f64, event: Event| {
        order += 1;
        events.push(Reverse(At(at, order, event)));
    };
    for host in 0..hosts.len() {
        push(&mut events, 0.0, Event::Look { host });
    }
    while done < lines {
        let Some(Reverse(At(now, _, event))) = events.pop() else {
            panic!("nothing happens any more")
        };
        assert!(now < 100_000.0, "it does not end");
        let host = match event {
            Event::Look { host } => {
                hosts[host].looking_at = f64::INFINITY;
                host
            }
            Event::Freed { host } => {
                hosts[host].under_way -= 1;
                host
            }
            Event::Due { host, line } => {
                hosts[host].waiting.push_front(line);
                host
            }
            Event::Ends { host, line, accepted, asked } => {
                let asked = (asked > 0.0).then(|| Duration::from_secs_f64(asked));
                let taken = if accepted { Taken::Accepted } else { Taken::Refused(asked) };
                let under_way = hosts[host].under_way;
                let held =
                    hosts[host].limit.ended(instant(now), began[line].unwrap(), taken, under_way);
                match held.map(seconds).filter(|until| *until > now) {
                    Some(until) => push(&mut events, until, Event::Freed { host }),
                    None => hosts[host].under_way -= 1,
                }
                if accepted {
                    model.busy -= 1;
                    done += 1;
                    measured.seconds = now;
                } else {
                    measured.refused += 1;
                    refusals[line] += 1;
                    let pause = crate::egress::refusal_pause(refusals[line]).as_secs_f64()
                        * (0.5 + dice.f64() / 2.0);
                    let pause = asked.map_or(pause, |asked| asked.as_secs_f64().max(pause));
                    push(&mut events, now + pause, Event::Due { host, line });
                }
                host
            }
        };
        loop {
            let Host { limit, waiting, under_way, looking_at } = &mut hosts[host];
            if waiting.is_empty() {
                break;
            }
            match limit.next(instant(now), *under_way) {
                Next::Later => break,
                Next::At(at) => {
                    let at = seconds(at).max(now + 1e-6);
                    if at < *looking_at {
                        *looking_at = at;
                        push(&mut events, at, Event::Look { host });
                    }
                    break;
                }
                Next::Now => {}
            }
            let line = waiting.pop_front().unwrap();
            began[line] = Some(limit.begin(instant(now)));
            *under_way += 1;
            let (accepted, asked) = match model.accepts(now, &mut dice) {
                Ok(()) => (true, 0.0),
                Err(asked) => (false, asked.unwrap_or(0.0)),
            };
            model.busy += usize::from(accepted);
            let takes =
                if accepted { latency.0 + dice.f64() * (latency.1 - latency.0) } else { 0.005 };
            push(&mut events, now + takes, Event::Ends { host, line, accepted, asked });
        }
    }
    measured
}

/// The same with plain tasks and the official SDK's backoff, without a bound on its attempts.
fn plain(
    provider: Provider,
    lines: usize,
    tasks: usize,
    latency: (f64, f64),
    seed: u64,
) -> Measured {
    let mut dice = fastrand::Rng::with_seed(seed);
    let mut model = Model::new(provider);
    let mut events = BinaryHeap::new();
    let mut order = 0_u64;
    let mut measured = Measured { seconds: 0.0, refused: 0 };
    let mut left = lines;
    let mut refusals = vec![0_i32; tasks];
    // A task begins; or its exchange ends, accepted or not.
    for task in 0..tasks.min(lines) {
        events.push(Reverse(At(0.0, order, Event::Due { host: 0, line: task })));
        order += 1;
        left -= 1;
    }
    while let Some(Reverse(At(now, _, event))) = events.pop() {
        order += 1;
        match event {
            Event::Due { line, .. } => {
                let (accepted, asked) = match model.accepts(now, &mut dice) {
                    Ok(()) => (true, 0.0),
                    Err(asked) => (false, asked.unwrap_or(0.0)),
                };
                model.busy += usize::from(accepted);
                let takes =
                    if accepted { latency.0 + dice.f64() * (latency.1 - latency.0) } else { 0.005 };
                events.push(Reverse(At(
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
                        events.push(Reverse(At(now, order, Event::Due { host: 0, line })));
                    }
                } else {
                    measured.refused += 1;
                    let pause = (0.5 * 2_f64.powi(refusals[line].min(4))).min(8.0)
                        * (1.0 - 0.25 * dice.f64());
                    // It heeds up to a minute.
                    let pause = if asked > 0.0 && asked <= 60.0 { asked } else { pause };
                    refusals[line] += 1;
                    events.push(Reverse(At(now + pause, order, Event::Due { host: 0, line })));
                }
            }
            Event::Freed { .. } | Event::Look { .. } => {}
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
fn the_limit_keeps_up_with_plain_tasks_and_spares_the_provider() {
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
        ("16 at a time", Provider::AtATime(16), 1500, usual),
        ("16 at a time, slow", Provider::AtATime(16), 400, (30.0, 60.0)),
        ("600 a minute", Provider::Minute(600.0, None), 1500, usual),
        ("600 a minute, told", Provider::Minute(600.0, Some(1.0)), 1500, usual),
        ("down for 20 s", Provider::DownUntil(20.0), 1500, usual),
        ("200 a second, later 50", Provider::Moving(200.0, 5.0, 50.0), 1500, usual),
        ("50 a second, later 200", Provider::Moving(50.0, 10.0, 200.0), 2000, usual),
    ];
    for (name, provider, lines, latency) in cases {
        let ours = median((0..15).map(|seed| run(provider, 1, lines, 64, latency, seed)).collect());
        let theirs =
            median((0..15).map(|seed| plain(provider, lines, 64, latency, seed)).collect());
        let three = median((0..5).map(|seed| run(provider, 3, lines, 64, latency, seed)).collect());
        println!(
            "| {name} | {:.1} | {} | {:.1} | {} | {:.2} | {:.1} | {} |",
            ours.seconds,
            ours.refused,
            theirs.seconds,
            theirs.refused,
            ours.seconds / theirs.seconds,
            three.seconds,
            three.refused
        );
        assert!(ours.seconds <= 1.1 * theirs.seconds, "{name}: slower than plain tasks");
        let random = matches!(provider, Provider::Random(_));
        assert!(random || ours.refused * 3 <= theirs.refused, "{name}: {} refusals", ours.refused);
    }
}
