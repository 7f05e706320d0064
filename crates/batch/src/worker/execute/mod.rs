//! Execution: sends the requests of one batch through a bounded window of requests in flight.
//!
//! **Problem.** A batch may have far more lines than fit into memory. Its provider may be slow, may
//! fail, or may be unavailable for hours. Other batches wait for the same plugins meanwhile.
//!
//! **Window.** Lines are read from the input in order. Lines that already have a result are
//! skipped, so an execution that starts again after a crash sends only the rest. A line is sent
//! when three conditions hold: results can be written (see [`gate`](crate::schedule::gate)), the
//! window has a permit (`max_concurrent_requests_per_batch`), and the memory pool `lines` has room
//! for the line. The permit and the memory are held until the result is in the channel of the
//! recorder. So a slow database slows the requests down, and results do not pile up in memory.
//!
//! **Turns.** A batch takes lines only while it holds a place, one stint at a time; see
//! [`lanes`](crate::schedule::lanes). Requests in flight need no place and continue between stints.
//!
//! **Retries.** A request without a final answer leaves the window. Only its position and its retry
//! state are kept, in the
//! [retry queue](crate::schedule::retry_queue), and the line is read again. If there is no
//! room for more deferred lines, the request waits in its task and keeps its permit.
//!
//! **Outages.** While the breakers of all plugins are open, nothing is read. If only some are open,
//! the lines of these plugins are skipped and read again later, so that the lines of the other
//! plugins continue. While a breaker has suspicion, untried lines go before lines that have failed:
//! a line with a fault of its own must not delay the others.
//!
//! **Parking.** If nothing is in flight and no line is due within [`MIN_PARK_DURATION`], the batch
//! is released to the store until then. Its position and its deferred lines are kept; see
//! [`parked`](crate::schedule::parked).
//!
//! **Stop.** After a cancellation, an expiry or a shutdown, no new request is sent. Requests in
//! flight get a grace period and are dropped after it. Every answer that has arrived is recorded,
//! even if the input cannot be read to its end. A panic in one request costs only its own line.

mod in_flight;
mod targets;

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_memory::Holder;
use batchwright_store::{BatchRecord, Claim, Lane, Result};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::formats::input::Input;
use crate::request::context::Context;
use crate::request::jobs::Jobs;
use crate::schedule::lanes::{Lanes, Place, Plugins};
use crate::schedule::parked::Checkpoint;
use crate::schedule::quotas::BatchShare;
use crate::schedule::retry_queue::Entry;
use crate::schedule::stop::{Reason, Stop};
use crate::worker::Worker;
use crate::worker::execute::in_flight::{Task, mark};
use crate::worker::execute::targets::{Target, Work};
use crate::worker::record::MAX_GROUP_ROWS;
use crate::worker::unfinished_lines::UnfinishedLines;

/// Size of the chunks in which the input is read.
const READ_CHUNK_BYTES: u64 = 128 << 10;

/// Memory of a request in flight in addition to its line: the task and its state in the runtime.
const TASK_OVERHEAD_BYTES: usize = 8 << 10;

/// Memory of a result in addition to its payload.
pub(crate) const ROW_OVERHEAD_BYTES: usize = 512;

/// Minimum idle time for which a batch is released to the store.
const MIN_PARK_DURATION: Duration = Duration::from_secs(2);

/// Outcome of an execution.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ExecutionOutcome {
    /// Every line has a result.
    All,
    /// The batch was stopped for this reason.
    Stopped(Reason),
    /// The turn has ended, and nothing is in flight.
    TurnOver,
    /// No request can be sent before this time, and nothing is in flight.
    Parked(Timestamp),
}

/// Reason why no more lines are taken for now.
#[derive(Debug)]
enum Pause {
    /// Every line has been taken and has a result.
    BatchEnd,
    /// The batch was stopped.
    Stopped,
    /// The turn has ended.
    TurnOver,
    /// No line is due before this time, or before another line is deferred if there is no time.
    Idle(Option<Timestamp>),
    /// The batch is parked until this time.
    Parked(Timestamp),
}

impl Worker {
    /// Executes all lines that have no result yet.
    ///
    /// Returns early if the batch is stopped, its turn ends, or no line is due for long.
    pub(super) async fn execute(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        stop: &Arc<Stop>,
        lanes: &Arc<Lanes>,
        place: &mut Option<Place>,
    ) -> Result<ExecutionOutcome> {
        let plugins = match &claim.lane {
            Lane::Execute(plugins) => plugins.clone(),
            Lane::Validate | Lane::Finish | Lane::Admit => Plugins::new(),
        };
        let targets = plugins.iter().map(|name| Target {
            plugin: name.clone(),
            holder: format!("{name}/{}", claim.tenant).into(),
            breaker: self.breakers.of(name, &claim.tenant, batch.new.endpoint),
        });
        let targets: Vec<Target> = targets.collect();
        for target in &targets {
            target.breaker.remove_waiting(&claim.batch_id);
        }
        let context = Arc::new(Context {
            tenant: claim.tenant.clone(),
            batch: claim.batch_id.clone(),
            endpoint: batch.new.endpoint,
            default_model: self.default_model(claim, batch).await?,
            created_at: u64::try_from(batch.new.created_at.as_seconds()).unwrap_or(0),
            registry: self.registry.clone(),
            jobs: Jobs::of_batch(&self.store, claim).await?,
            breaker_registry: self.breakers.clone(),
            breakers: targets
                .iter()
                .map(|target| (target.plugin.clone(), target.breaker.clone()))
                .collect(),
            clock: self.clock.clone(),
            config: self.config.clone(),
            stop: stop.clone(),
            leave: stop.child(),
            gate: self.gate.clone(),
            metrics: self.metrics.clone(),
            spans: self.spans.clone(),
            queue: self.next_queue(&claim.tenant),
            quota: self.quotas.of(&claim.tenant),
            share: BatchShare {
                created_at: batch.new.created_at,
                expires_at: batch.new.expires_at,
            },
        });
        let began = batchwright_telemetry::trace::now();
        let (results, to_record) = mpsc::channel(MAX_GROUP_ROWS);
        let recording = self.record(claim, &batch.new, to_record);
        let working = async {
            let kill = CancellationToken::new();
            // Dropping this future also drops the requests that it has spawned.
            let _guard = kill.clone().drop_guard();
            let tasks = TaskTracker::new();
            tasks.close();
            // Lines whose model is not read yet share memory with all lines of the same plugins.
            let names = plugins.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
            let holder: Holder = format!("{names}/{}", claim.tenant).into();
            let model = self.model_at_provider(claim, batch);
            let work =
                Work { context, holder, targets, model, results, kill: &kill, tasks: &tasks };
            let taken = self.take_lines(claim, batch, &work, (lanes, &plugins), place).await;
            // Requests in flight need no place.
            *place = None;
            // The recorder ends when the last sender is dropped.
            drop(work);
            self.drain_requests(stop, &tasks, &kill).await;
            taken
        };
        // Answers are recorded even if the input cannot be read to its end.
        let done = tokio::try_join!(recording, async { Ok(working.await) });
        let has_failed = done.is_err();
        self.spans.part("execute", (&claim.tenant, &claim.batch_id), began, |span| {
            if has_failed { span.failed("store") } else { span }
        });
        let ((), taken) = done?;
        Ok(match (taken?, stop.reason()) {
            (_, Some(reason)) => ExecutionOutcome::Stopped(reason),
            (Pause::TurnOver, None) => ExecutionOutcome::TurnOver,
            (Pause::Parked(until), None) => ExecutionOutcome::Parked(until),
            (Pause::BatchEnd | Pause::Stopped | Pause::Idle(_), None) => ExecutionOutcome::All,
        })
    }

    /// Takes lines, one stint at a time.
    ///
    /// Returns when all lines have a result, when the batch must be parked or stopped, or when its
    /// turn has ended and nothing is in flight.
    async fn take_lines(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        work: &Work<'_>,
        (lanes, plugins): (&Arc<Lanes>, &Plugins),
        place: &mut Option<Place>,
    ) -> Result<Pause> {
        let mut lines = self.open_lines(claim, self.parked.take(claim), plugins.len() > 1).await?;
        lines.deferred.wake(self.clock.now());
        let mut changes = (self.breakers.changes(), self.quotas.changes());
        loop {
            let paused = match place {
                Some(place) => self.take_stint(batch, work, &mut lines, place).await?,
                None => Pause::TurnOver,
            };
            // Other batches use the place until this batch has a line to take again.
            *place = None;
            match paused {
                Pause::TurnOver => {}
                Pause::Idle(due) => {
                    if let Some(ended) =
                        self.wait_while_idle(claim, work, &mut lines, due, &mut changes).await?
                    {
                        return Ok(ended);
                    }
                }
                ended => return Ok(ended),
            }
            let left = async {
                work.tasks.wait().await;
                // Deferred lines exist only in this process, so the batch waits for its next turn.
                if lines.deferred.next().is_some() && !work.context.leave.is_cancelled() {
                    std::future::pending::<()>().await;
                }
            };
            *place = tokio::select! {
                granted = lanes.come_back(
                    (plugins, &claim.tenant),
                    self.clock.now(),
                    work.context.share.urgency(self.clock.now()),
                ),
                    if !work.context.leave.is_cancelled() =>
                {
                    if granted.is_none() {
                        work.context.leave.cancel();
                    }
                    granted
                }
                () = left => {
                    // An evicted batch may have dropped lines, so it is read from the start.
                    if !work.context.leave.is_cancelled() {
                        self.parked.save(claim, lines.checkpoint());
                    }
                    return Ok(Pause::TurnOver);
                }
                () = work.context.stop.asked() => return Ok(Pause::Stopped),
            };
        }
    }

    /// Returns the model for lines that name no model: the model that validation found in all lines
    /// of the batch, or the default model of the plugins.
    async fn default_model(&self, claim: &Claim, batch: &BatchRecord) -> Result<Option<String>> {
        let endpoint = batch.new.endpoint;
        if !endpoint.has_optional_model() || batch.model.is_some() {
            return Ok(batch.model.clone().filter(|_| endpoint.has_optional_model()));
        }
        let allowed = self.store.policy(&claim.tenant).await?.permissions;
        let plugins = self.registry.current();
        Ok(plugins.default_model(&claim.tenant, endpoint, &allowed).map(str::to_owned))
    }

    /// Returns the name that the provider knows of the model of a batch; none if its requests have
    /// different models.
    pub(super) fn model_at_provider(&self, claim: &Claim, batch: &BatchRecord) -> Option<String> {
        let plugins = self.registry.current();
        Some(plugins.route(&claim.tenant, batch.model.as_deref()?)?.model)
    }

    /// Opens the unfinished lines of a batch at a saved position.
    async fn open_lines<'a>(
        &'a self,
        claim: &'a Claim,
        from: Checkpoint,
        many: bool,
    ) -> Result<UnfinishedLines<'a>> {
        let window = self
            .config
            .execution
            .max_concurrent_requests_per_batch
            .get()
            .min(Semaphore::MAX_PERMITS);
        let input: Input = self.open_input_at(claim, READ_CHUNK_BYTES, from.position).await?;
        Ok(UnfinishedLines::new(&*self.store, claim, input, from, window, many))
    }

    /// Waits until there may be a line to take, and returns `None` then.
    ///
    /// Returns a pause if the execution must end instead.
    async fn wait_while_idle<'a>(
        &'a self,
        claim: &'a Claim,
        work: &Work<'_>,
        lines: &mut UnfinishedLines<'a>,
        due: Option<Timestamp>,
        changes: &mut (watch::Receiver<u64>, watch::Receiver<u64>),
    ) -> Result<Option<Pause>> {
        if work.blocked_until(self.clock.now()).is_some() {
            self.count_waiting(claim, work.context.endpoint).await?;
        }
        if work.tasks.is_empty() {
            if lines.is_at_end() && !lines.has_skipped() {
                return Ok(Some(Pause::BatchEnd));
            }
            let due = due
                .or_else(|| work.next_probe(self.clock.now()))
                .unwrap_or_else(|| self.clock.now());
            if changes.1.has_changed().unwrap_or(false) {
                // A limit was changed since the wait was decided on.
                changes.1.mark_unchanged();
                lines.deferred.wake(self.clock.now());
                return Ok(None);
            }
            if self.clock.now().until(due) > MIN_PARK_DURATION {
                self.parked.save(claim, lines.checkpoint());
                return Ok(Some(Pause::Parked(due)));
            }
            if lines.is_at_end() {
                // The skipped lines are read again.
                self.clock.sleep_until(due).await;
                let from = lines.checkpoint();
                *lines = self.open_lines(claim, from, work.targets.len() > 1).await?;
                return Ok(None);
            }
        }
        let sleep = async {
            match due {
                Some(due) => self.clock.sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let all_finished = async {
            if work.tasks.is_empty() {
                std::future::pending::<()>().await;
            }
            work.tasks.wait().await;
        };
        tokio::select! {
            () = sleep => {}
            () = lines.deferred.added() => {}
            () = all_finished => {}
            () = first_change(changes) => {
                lines.held_until = None;
                lines.deferred.wake(self.clock.now());
            }
            () = work.context.stop.asked() => return Ok(Some(Pause::Stopped)),
        }
        Ok(None)
    }

    /// Takes lines and spawns their requests until the turn ends or no line is due.
    ///
    /// The window and the memory pool limit the requests in flight.
    async fn take_stint(
        &self,
        batch: &BatchRecord,
        work: &Work<'_>,
        lines: &mut UnfinishedLines<'_>,
        place: &mut Place,
    ) -> Result<Pause> {
        let stop = &work.context.stop;
        loop {
            let now = self.clock.now();
            if stop.reason().is_some() {
                return Ok(Pause::Stopped);
            }
            // Lines are not read while none of them can be sent.
            if let Some(until) = work.blocked_until(now) {
                lines.held_until = Some(until);
                return Ok(Pause::Idle(Some(until)));
            }
            // While the project may send nothing, only jobs that have begun are polled.
            let held_until = match work.context.jobs.has_stored() {
                // Which lines have jobs is known when they are looked up.
                true => None,
                false => work.held_until(now).await,
            };
            lines.held_until = held_until.or(lines.held_until);
            let Some(line) = lines.peek(now, work.is_healthy()).await? else {
                return Ok(Pause::Idle(lines.due()));
            };
            if let Some(until) = held_until.filter(|_| !line.retry_state.has_job) {
                if lines.defer(until) {
                    continue;
                }
                return Ok(Pause::Idle(Some(until)));
            }
            place.start();
            if place.is_over() {
                return Ok(Pause::TurnOver);
            }
            let size = line.size();
            let holder = match work.target(line.model.as_deref()) {
                Some(target) if !target.breaker.is_healthy() => {
                    if work.waits_until(target, now).is_some() {
                        // Lines of other plugins must not wait for this line.
                        lines.skip();
                        continue;
                    }
                    let failed_attempts =
                        target.breaker.failed_attempts(mark(&batch.new.id, line.number));
                    if lines.is_behind_untried(failed_attempts) {
                        continue;
                    }
                    target.holder.clone()
                }
                Some(target) => target.holder.clone(),
                None => work.holder.clone(),
            };
            let permits = async {
                self.gate.open().await;
                let slot = lines.window.clone().acquire_owned().await.ok();
                (
                    slot,
                    self.memory
                        .lines
                        .reserve(&holder, size.saturating_add(TASK_OVERHEAD_BYTES))
                        .await,
                )
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
                    retry_state: candidate.retry_state,
                },
                bytes,
            };
            let (results, kill) = (work.results.clone(), work.kill.clone());
            work.tasks.spawn(async move {
                if let Some(Some(recorded)) = kill.run_until_cancelled(task.run()).await {
                    results.send(recorded).await.ok();
                }
                // The result has memory of its own. The permit is held until here, so that a slow
                // database limits the number of results that wait to be written.
                drop(permits);
            });
        }
    }

    /// Drains the requests in flight.
    ///
    /// After a stop, requests that exceed the grace period are dropped.
    async fn drain_requests(&self, stop: &Stop, tasks: &TaskTracker, kill: &CancellationToken) {
        tokio::select! {
            () = tasks.wait() => return,
            () = stop.asked() => {}
        }
        let grace = match stop.reason() {
            Some(Reason::Shutdown) => self.config.execution.shutdown_grace,
            _ => self.config.execution.stop_grace,
        };
        tokio::select! {
            () = tasks.wait() => return,
            () = self.clock.sleep(grace.duration()) => kill.cancel(),
        }
        tasks.wait().await;
    }
}

/// Waits for a change of a breaker, of the plugins or of a limit.
async fn first_change(changes: &mut (watch::Receiver<u64>, watch::Receiver<u64>)) {
    let (breakers, limits) = changes;
    tokio::select! {
        _ = breakers.changed() => {}
        _ = limits.changed() => {}
    }
}
