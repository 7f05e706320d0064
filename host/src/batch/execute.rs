//! Execution: lines are read in order and kept under way in a bounded window; what has a result already is passed over.
//!
//! A batch takes lines while it has its place, a stint at a time; see [`lanes`](super::lanes). Between stints what is under way goes on. A line
//! that was not answered comes back, to be tried again later. When there is nothing to take for a while, as its provider is away, and
//! nothing under way, the batch goes back to the store and rests.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Batches;
use super::breaker::{Breaker, Gate};
use super::deferred::{Deferred, Entry};
use super::input::Input;
use super::jobs::Jobs;
use super::lanes::{Lanes, Place, Plugins};
use super::line::{RequestLine, with_model};
use super::lines::LinesToDo;
use super::record::{GROUP, Recorded};
use super::request::{Answered, Context, Ended, Line};
use super::rests::Kept;
use super::result_line::{request_id, row};
use super::stop::{Reason, Stop};
use crate::clock::Timestamp;
use crate::memory::Holder;
use crate::plugin::OPTIONAL_MODEL;
use crate::plugin::types::{Answer, Failure};
use crate::store::{BatchRecord, Claim, Lane, Result, ResultRow};

/// What is read of the input at a time, in bytes.
const READ: u64 = 128 << 10;

/// What a request under way takes beside its line, in bytes: its task, and what the runtime keeps for it.
const TASK: usize = 8 << 10;

/// What a result takes beside its line, in bytes.
const ROW: usize = 512;

/// A batch that has nothing to do for longer than this gives its claim back.
const REST: Duration = Duration::from_secs(2);

/// How execution came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Executed {
    /// Every line has been taken and answered.
    All,
    Stopped(Reason),
    /// Another batch has this one's place, and nothing is under way.
    TurnOver,
    /// Nothing can be sent before then, and nothing is under way.
    Rests(Timestamp),
}

/// Why no more lines are taken for now.
#[derive(Debug)]
enum Pause {
    End,
    Stopped,
    TurnOver,
    /// There is nothing to take before then, or before something comes back.
    Idle(Option<Timestamp>),
    Rests(Timestamp),
}

/// A plugin that lines of the batch go to.
struct Way {
    plugin: Holder,
    breaker: Arc<Breaker>,
}

impl Batches {
    /// Executes what has no result yet. Returns when everything has one, or early with the reason.
    pub(super) async fn execute(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        stop: &Arc<Stop>,
        lanes: &Arc<Lanes>,
        place: &mut Option<Place>,
    ) -> Result<Executed> {
        let plugins = match &claim.lane {
            Lane::Execute(plugins) => plugins.clone(),
            Lane::Validate | Lane::Finish => Plugins::new(),
        };
        let ways = plugins.iter().map(|name| Way {
            plugin: name.as_str().into(),
            breaker: self.outages.of(name, &claim.tenant, &batch.new.endpoint),
        });
        let ways: Vec<Way> = ways.collect();
        for way in &ways {
            way.breaker.wakes(&claim.batch_id);
        }
        let context = Arc::new(Context {
            tenant: claim.tenant.clone(),
            batch: claim.batch_id.clone(),
            endpoint: batch.new.endpoint.clone(),
            default_model: self.default_model(claim, batch),
            created_at: u64::try_from(batch.new.created_at.as_seconds()).unwrap_or(0),
            registry: self.registry.clone(),
            jobs: Jobs::of_batch(&self.store, claim).await?,
            outages: self.outages.clone(),
            breakers: ways
                .iter()
                .map(|way| (way.plugin.to_string(), way.breaker.clone()))
                .collect(),
            clock: self.clock.clone(),
            settings: self.settings.clone(),
            stop: stop.clone(),
            leave: stop.child(),
            gate: self.gate.clone(),
            queue: self.next_queue(),
        });
        let (results, to_record) = mpsc::channel(GROUP);
        let recording = self.record(claim, to_record);
        let working = async {
            let kill = CancellationToken::new();
            // If this is given up, so is what it spawned.
            let _guard = kill.clone().drop_guard();
            let tasks = TaskTracker::new();
            tasks.close();
            // Whom lines share memory with that were not looked into: all lines for the same plugins.
            let holder: Holder =
                plugins.iter().map(String::as_str).collect::<Vec<_>>().join(" ").into();
            let work = Work { context, holder, ways, results, kill: &kill, tasks: &tasks };
            let taken = self.take_lines(claim, batch, &work, (lanes, &plugins), place).await;
            // Lines that are under way need no place.
            *place = None;
            // The channel ends with the last of its senders.
            drop(work);
            self.wait_for_all(stop, &tasks, &kill).await;
            taken
        };
        // What was answered is recorded even if the input cannot be read to its end.
        let ((), taken) = tokio::try_join!(recording, async { Ok(working.await) })?;
        Ok(match (taken?, stop.reason()) {
            (_, Some(reason)) => Executed::Stopped(reason),
            (Pause::TurnOver, None) => Executed::TurnOver,
            (Pause::Rests(until), None) => Executed::Rests(until),
            (Pause::End | Pause::Stopped | Pause::Idle(_), None) => Executed::All,
        })
    }

    /// Takes lines, a stint at a time, until there are none or nothing is under way while others have their turn.
    async fn take_lines(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        work: &Work<'_>,
        (lanes, plugins): (&Arc<Lanes>, &Plugins),
        place: &mut Option<Place>,
    ) -> Result<Pause> {
        let mut lines = self.lines(claim, self.kept(claim), plugins.len() > 1).await?;
        lines.deferred.wake(self.clock.now());
        let mut changes = self.outages.changes();
        loop {
            let paused = match place {
                Some(place) => self.take_stint(batch, work, &mut lines, place).await?,
                None => Pause::TurnOver,
            };
            // Others may use the place until there is something to take again.
            *place = None;
            match paused {
                Pause::TurnOver => {}
                Pause::Idle(due) => {
                    if let Some(ended) =
                        self.idle(claim, work, &mut lines, due, &mut changes).await?
                    {
                        return Ok(ended);
                    }
                }
                ended => return Ok(ended),
            }
            let left = async {
                work.tasks.wait().await;
                // What is left for later is known here alone.
                if lines.deferred.next().is_some() && !work.context.leave.is_cancelled() {
                    std::future::pending::<()>().await;
                }
            };
            *place = tokio::select! {
                back = lanes.come_back(plugins, self.clock.now()), if !work.context.leave.is_cancelled() => {
                    if back.is_none() {
                        work.context.leave.cancel();
                    }
                    back
                }
                () = left => {
                    // One that was asked to leave may have let go of lines; it is read from the start.
                    if !work.context.leave.is_cancelled() {
                        self.keep(claim, &lines);
                    }
                    return Ok(Pause::TurnOver);
                }
                () = work.context.stop.asked() => return Ok(Pause::Stopped),
            };
        }
    }

    /// The model of a batch's lines that name none: the batch's own, if all lines have one, or that of the plugins.
    fn default_model(&self, claim: &Claim, batch: &BatchRecord) -> Option<String> {
        let plugins = self.registry.current();
        let default = plugins.default_model(&claim.tenant, &batch.new.endpoint).map(str::to_owned);
        (batch.new.endpoint == OPTIONAL_MODEL).then(|| batch.model.clone().or(default)).flatten()
    }

    /// The lines of a batch from a position on, before which all have a result.
    async fn lines<'a>(
        &'a self,
        claim: &'a Claim,
        from: Kept,
        many: bool,
    ) -> Result<LinesToDo<'a>> {
        let window =
            self.settings.max_concurrent_requests_per_batch.get().min(Semaphore::MAX_PERMITS);
        let input: Input = self.open_input_at(claim, READ, from.position).await?;
        Ok(LinesToDo::new(self, claim, input, from, window, many))
    }

    /// Waits until there may be a line to take, with nothing said, or until it is known how this ends.
    async fn idle<'a>(
        &'a self,
        claim: &'a Claim,
        work: &Work<'_>,
        lines: &mut LinesToDo<'a>,
        due: Option<Timestamp>,
        changes: &mut tokio::sync::watch::Receiver<u64>,
    ) -> Result<Option<Pause>> {
        if work.blocked(self.clock.now()).is_some() {
            self.count_waiting(claim, &work.context.endpoint).await?;
        }
        if work.tasks.is_empty() {
            if lines.is_at_end() && !lines.has_passed_over() {
                return Ok(Some(Pause::End));
            }
            let due =
                due.or_else(|| work.due(self.clock.now())).unwrap_or_else(|| self.clock.now());
            if self.clock.now().until(due) > REST {
                self.keep(claim, lines);
                return Ok(Some(Pause::Rests(due)));
            }
            if lines.is_at_end() {
                // What was passed over is read again.
                self.clock.sleep_until(due).await;
                let from = lines.kept();
                *lines = self.lines(claim, from, work.ways.len() > 1).await?;
                return Ok(None);
            }
        }
        let sleep = async {
            match due {
                Some(due) => self.clock.sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let all_back = async {
            if work.tasks.is_empty() {
                std::future::pending::<()>().await;
            }
            work.tasks.wait().await;
        };
        tokio::select! {
            () = sleep => {}
            () = lines.deferred.added() => {}
            () = all_back => {}
            _ = changes.changed() => {
                lines.held_until = None;
                lines.deferred.wake(self.clock.now());
            }
            () = work.context.stop.asked() => return Ok(Some(Pause::Stopped)),
        }
        Ok(None)
    }

    /// Takes lines and spawns their requests, as the window and the memory budget allow, until the turn is over.
    async fn take_stint(
        &self,
        batch: &BatchRecord,
        work: &Work<'_>,
        lines: &mut LinesToDo<'_>,
        place: &mut Place,
    ) -> Result<Pause> {
        let stop = &work.context.stop;
        loop {
            let now = self.clock.now();
            if stop.reason().is_some() {
                return Ok(Pause::Stopped);
            }
            // When nothing at all can be sent, nothing is read for it.
            if let Some(until) = work.blocked(now) {
                lines.held_until = Some(until);
                return Ok(Pause::Idle(Some(until)));
            }
            let Some(line) = lines.peek(now, work.is_calm()).await? else {
                return Ok(Pause::Idle(lines.due()));
            };
            place.begins();
            if place.is_over() {
                return Ok(Pause::TurnOver);
            }
            let size = line.size();
            let holder = match work.way(line.model.as_deref()) {
                Some(way) if !way.breaker.is_calm() => {
                    if work.waits(way, now).is_some() {
                        // Others of the batch go elsewhere, and do not wait for this one.
                        lines.pass_over();
                        continue;
                    }
                    let in_vain = way.breaker.tries(mark(&batch.new.id, line.number));
                    if lines.is_behind_untried(in_vain) {
                        continue;
                    }
                    way.plugin.clone()
                }
                Some(way) => way.plugin.clone(),
                None => work.holder.clone(),
            };
            let permits = async {
                self.gate.open().await;
                let slot = lines.window.clone().acquire_owned().await.ok();
                (slot, self.memory.lines.take(&holder, size.saturating_add(TASK)).await)
            };
            let permits = tokio::select! {
                biased;
                () = stop.asked() => return Ok(Pause::Stopped),
                permits = permits => permits,
                () = place.over() => return Ok(Pause::TurnOver),
            };
            let Some(candidate) = lines.take() else { continue };
            let Some(bytes) = lines.read(&candidate).await? else { continue };
            place.took_line();
            let task = Task {
                context: work.context.clone(),
                deferred: lines.deferred.clone(),
                batch: batch.new.id.clone(),
                entry: Entry {
                    at: now,
                    number: candidate.number,
                    range: candidate.range(),
                    tries: candidate.tries,
                },
                bytes,
            };
            let (results, kill) = (work.results.clone(), work.kill.clone());
            work.tasks.spawn(async move {
                if let Some(Some(recorded)) = kill.run_until_cancelled(task.run()).await {
                    results.send(recorded).await.ok();
                }
                // What the result takes is in its own share by now; a slow database must not let more and more of them wait.
                drop(permits);
            });
        }
    }

    /// Waits until nothing is under way: after a stop no longer than the grace period, then what is left is dropped.
    async fn wait_for_all(&self, stop: &Stop, tasks: &TaskTracker, kill: &CancellationToken) {
        tokio::select! {
            () = tasks.wait() => return,
            () = stop.asked() => {}
        }
        let grace = match stop.reason() {
            Some(Reason::Shutdown) => self.settings.shutdown_grace,
            _ => self.settings.stop_grace,
        };
        tokio::select! {
            () = tasks.wait() => return,
            () = self.clock.sleep(grace.duration()) => kill.cancel(),
        }
        tasks.wait().await;
    }
}

/// What a batch's requests are spawned with.
struct Work<'a> {
    context: Arc<Context>,
    holder: Holder,
    ways: Vec<Way>,
    results: mpsc::Sender<Recorded>,
    kill: &'a CancellationToken,
    tasks: &'a TaskTracker,
}

impl Work<'_> {
    fn is_calm(&self) -> bool {
        self.ways.iter().all(|way| way.breaker.is_calm())
    }

    /// Until when nothing can be sent at all.
    fn blocked(&self, now: Timestamp) -> Option<Timestamp> {
        if self.ways.iter().any(|way| way.breaker.is_calm()) {
            return None;
        }
        let waits = self.ways.iter().map(|way| self.waits(way, now)).collect::<Option<Vec<_>>>()?;
        waits.into_iter().min()
    }

    /// When the first of those is looked at again that wait.
    fn due(&self, now: Timestamp) -> Option<Timestamp> {
        self.ways.iter().filter_map(|way| self.waits(way, now)).min()
    }

    /// Until when a plugin's lines wait, if they do.
    fn waits(&self, way: &Way, now: Timestamp) -> Option<Timestamp> {
        if way.breaker.is_calm() {
            return None;
        }
        match way.breaker.check(now, self.context.registry.current().identity(&way.plugin)) {
            Gate::Wait(until) => Some(until),
            Gate::Go | Gate::Probe | Gate::GiveUp(_) => None,
        }
    }

    /// Where a line goes, as far as its model is known.
    fn way(&self, model: Option<&str>) -> Option<&Way> {
        if let [only] = self.ways.as_slice() {
            return Some(only);
        }
        let route = self.context.registry.current().route(&self.context.tenant, model?)?;
        self.ways.iter().find(|way| *way.plugin == *route.plugin.name)
    }
}

/// A request under way.
struct Task {
    context: Arc<Context>,
    deferred: Arc<Deferred>,
    batch: String,
    entry: Entry,
    bytes: Bytes,
}

impl Task {
    /// Runs a request to its result. None if the batch was stopped before it was sent, or if it is to be tried again: it is left for later.
    async fn run(mut self) -> Option<Recorded> {
        loop {
            // In a box of its own: it is large, and what wraps it moves it.
            let attempt = AssertUnwindSafe(Box::pin(self.attempt())).catch_unwind();
            let (at, tries) = match attempt.await {
                Err(_) => {
                    return Some((
                        panicked(&self.batch, self.entry.number, &self.bytes),
                        None,
                        None,
                    ));
                }
                Ok(Attempt::Recorded(recorded)) => return Some(recorded),
                Ok(Attempt::Stopped) => return None,
                Ok(Attempt::Back(at, tries)) => (at, tries),
            };
            self.entry.at = at;
            self.entry.tries = tries;
            // Where there is no room to remember it, it waits here.
            match self.deferred.add(self.entry) {
                Ok(()) => return None,
                Err(entry) => self.entry = entry,
            }
            tokio::select! {
                () = self.context.clock.sleep_until(at) => {}
                () = self.context.leave.cancelled() => return None,
            }
        }
    }

    async fn attempt(&self) -> Attempt {
        let (batch, number) = (&self.batch, self.entry.number);
        let line = std::str::from_utf8(&self.bytes).map(RequestLine::parse).unwrap_or_default();
        let custom_id = line.custom_id.as_deref().unwrap_or_default();
        // A line of moderations may name no model; then it has the one that it was validated with.
        let default = self.context.default_model.as_deref().filter(|_| line.model.is_none());
        let with_default =
            line.body.zip(default).map(|(body, model)| (with_model(body, model), model));
        let (body, model) = match &with_default {
            Some((body, model)) => (Some(body.as_str()), Some(*model)),
            None => (line.body, line.model.as_deref()),
        };
        let (Some(body), Some(model)) = (body, model) else {
            // Validation let no such line through; the file would have to have changed since.
            let message = "The input file has changed since it was validated.".into();
            let failure = Answer::Failure(Failure { code: "invalid_request".into(), message });
            return Attempt::Recorded((row(batch, number, custom_id, &failure), None, None));
        };
        let id = request_id(batch, number);
        let line = Line { id: &id, custom_id, model, body, number, mark: mark(batch, number) };
        match self.context.attempt(line, self.entry.tries).await {
            Ended::Stopped => Attempt::Stopped,
            Ended::Back(at, tries) => Attempt::Back(at, tries),
            Ended::Answered(Answered { answer, by, mut share }) => {
                let row = row(batch, number, custom_id, &answer);
                drop(answer);
                if let Some(share) = &mut share {
                    share.settle(row.payload.len().saturating_add(ROW));
                }
                Attempt::Recorded((row, by, share))
            }
        }
    }
}

enum Attempt {
    Recorded(Recorded),
    Back(Timestamp, super::deferred::Tries),
    Stopped,
}

/// What breakers know a line by.
pub fn mark(batch: &str, number: u64) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (batch, number).hash(&mut hasher);
    hasher.finish()
}

/// The result of a request whose handling panicked: a fault of ours that must not cost the line.
fn panicked(batch: &str, number: u64, bytes: &Bytes) -> ResultRow {
    let line = std::str::from_utf8(bytes).map(RequestLine::parse).unwrap_or_default();
    let message = "The server failed while it handled this request; its log says more.".into();
    let failure = Failure { code: "internal_error".into(), message };
    row(batch, number, line.custom_id.as_deref().unwrap_or_default(), &Answer::Failure(failure))
}
