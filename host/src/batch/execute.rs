//! Execution: lines are read in order and kept under way in a bounded window; what has a result already is passed over.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Batches;
use super::input::{InputLine, Lines};
use super::line::RequestLine;
use super::memory::Share;
use super::patience::Patience;
use super::request::Context;
use super::result_line::{request_id, row};
use super::served_by::served_by;
use super::stop::{Reason, Stop};
use crate::plugin::Plugin;
use crate::plugin::types::{Answer, Failure};
use crate::store::{BatchRecord, Claim, Lane, Result, ResultRow, StoreError};

/// Results written in one go at the most; more of them wait in the channel.
const GROUP: usize = 1024;

/// Plugins that have answered and are known to the store: held on to, so at the most so many.
const KNOWN: usize = 64;

/// Numbers of recorded lines held at a time.
const RECORDED: usize = 10_000;

/// How long results are gathered before they are written. A commit costs the same for one as for many, and nobody waits for a single one.
const GATHER: std::time::Duration = std::time::Duration::from_millis(10);

/// A result on its way to the store, with who gave it and the share of the memory budget it takes.
type Recorded = (ResultRow, By, Share);

/// The plugin that answered, if one did.
type By = Option<Arc<Plugin>>;

impl Batches {
    /// Executes what has no result yet. Returns when everything has one, or early with the reason to stop.
    pub(super) async fn execute(&self, claim: &Claim, batch: &BatchRecord, stop: &Arc<Stop>) -> Result<Option<Reason>> {
        let context = Arc::new(Context {
            tenant: claim.tenant.clone(),
            endpoint: batch.new.endpoint.clone(),
            created_at: u64::try_from(batch.new.created_at.as_seconds()).unwrap_or(0),
            registry: self.registry.clone(),
            clock: self.clock.clone(),
            settings: self.settings.clone(),
            stop: stop.clone(),
            bodies: self.memory.bodies.clone(),
        });
        let (results, to_record) = mpsc::channel(GROUP);
        let recording = self.record(claim, to_record);
        let working = async {
            let kill = CancellationToken::new();
            // If this is given up, so is what it spawned.
            let _guard = kill.clone().drop_guard();
            let tasks = TaskTracker::new();
            let provider = match &claim.lane {
                Lane::Execute(provider) => provider.as_str(),
                Lane::Validate | Lane::Finish => "",
            };
            let work = Work { context, provider: provider.into(), results, kill: &kill, tasks: &tasks };
            let read = self.send_out(claim, batch, stop, &work).await;
            // The channel ends with the last of its senders.
            drop(work);
            tasks.close();
            self.wait_for_all(stop, &tasks, &kill).await;
            read
        };
        // What was answered is recorded even if the input cannot be read to its end.
        let ((), read) = tokio::try_join!(recording, async { Ok(working.await) })?;
        read?;
        Ok(stop.reason())
    }

    /// Reads the input and spawns its requests, as the window and the memory budget allow.
    async fn send_out(&self, claim: &Claim, batch: &BatchRecord, stop: &Stop, work: &Work<'_>) -> Result<()> {
        let bytes = self.blobs.read(&claim.tenant, &batch.new.input_file_id, None).await?;
        // Validation held the lines to the limit of its day; today's may be lower.
        let mut lines = Lines::new(bytes, usize::MAX);
        let mut done = RecordedLines { batches: self, claim, known: VecDeque::new(), last: 0, ended: false };
        let window =
            Arc::new(Semaphore::new(self.settings.max_concurrent_requests_per_batch.get().min(Semaphore::MAX_PERMITS)));
        while let Some(line) = lines.next().await? {
            let InputLine::Whole { number, bytes } = line else { continue };
            if done.contains(number).await? {
                continue;
            }
            let permits = async {
                let slot = window.clone().acquire_owned().await.ok();
                (slot, self.memory.lines.take(&work.provider, bytes.len()).await)
            };
            let permits = tokio::select! {
                biased;
                () = stop.asked() => return Ok(()),
                permits = permits => permits,
            };
            let (context, results, memory) = (work.context.clone(), work.results.clone(), self.memory.results.clone());
            // A copy: the line shares the piece it was read in, which is much larger.
            let bytes = Bytes::copy_from_slice(&bytes);
            let batch_id = batch.new.id.clone();
            let kill = work.kill.clone();
            work.tasks.spawn(async move {
                let running = AssertUnwindSafe(run(&context, &batch_id, number, &bytes)).catch_unwind();
                let ended = kill.run_until_cancelled(running).await.map(|ended| match ended {
                    Ok(row) => row,
                    Err(_) => Some((panicked(&batch_id, number, &bytes), None)),
                });
                drop(bytes);
                drop(permits);
                if let Some(Some((row, by))) = ended {
                    let memory = memory.take(row.payload.len()).await;
                    results.send((row, by, memory)).await.ok();
                }
            });
        }
        Ok(())
    }

    /// Waits until nothing is in flight: after a stop no longer than the grace period, then what is left is dropped.
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

    /// Writes results as they come, as many at a time as are there. A write that fails is tried again for as long as the batch is ours:
    /// what was answered is not asked twice.
    async fn record(&self, claim: &Claim, mut results: mpsc::Receiver<Recorded>) -> Result<()> {
        let mut group = Vec::new();
        let mut known: Vec<Arc<Plugin>> = Vec::new();
        while results.recv_many(&mut group, GROUP).await > 0 {
            if group.len() < GROUP && !results.is_closed() {
                tokio::time::sleep(GATHER).await;
                while let Ok(more) = results.try_recv() {
                    group.push(more);
                }
            }
            let (mut rows, mut memory, mut new) = (Vec::new(), Vec::new(), Vec::new());
            for (row, by, share) in group.drain(..) {
                rows.push(row);
                memory.push(share);
                // There are few: one for each model, and one more whenever the operator changes it.
                if let Some(by) = by.filter(|by| !known.iter().any(|known| Arc::ptr_eq(known, by))) {
                    new.push(served_by(&by));
                    known.push(by);
                }
            }
            if known.len() > KNOWN {
                known.clear();
            }
            let rows = Arc::new(rows);
            let mut patience = Patience::default();
            loop {
                match self.store.record(claim, rows.clone(), new.clone()).await {
                    Ok(()) => break,
                    Err(error @ (StoreError::Fenced | StoreError::Closed)) => return Err(error),
                    // A process that must end does not wait for room on the disk.
                    Err(error) if self.closing.is_cancelled() => return Err(error),
                    Err(error) => {
                        tracing::error!(batch = claim.batch_id, "results wait to be written: {error}");
                        self.closing.run_until_cancelled(self.clock.sleep(patience.pause())).await;
                    }
                }
            }
            drop(memory);
        }
        Ok(())
    }
}

/// What a batch's requests are spawned with.
struct Work<'a> {
    context: Arc<Context>,
    /// Whom they go to: what they share memory with.
    provider: Arc<str>,
    results: mpsc::Sender<Recorded>,
    kill: &'a CancellationToken,
    tasks: &'a TaskTracker,
}

/// Runs one request to its result; none if it was waiting for another attempt when the batch was stopped.
async fn run(context: &Context, batch: &str, number: u64, bytes: &Bytes) -> Option<(ResultRow, By)> {
    let line = std::str::from_utf8(bytes).map(RequestLine::parse).unwrap_or_default();
    let custom_id = line.custom_id.as_deref().unwrap_or_default();
    let (Some(body), Some(model)) = (line.body, line.model.as_deref()) else {
        // Validation let no such line through; the file would have to have changed since.
        let message = "The input file has changed since it was validated.".into();
        let failure = Answer::Failure(Failure { code: "invalid_request".into(), message });
        return Some((row(batch, number, custom_id, &failure), None));
    };
    let (answer, by) = context.answer(&request_id(batch, number), custom_id, model, body).await?;
    Some((row(batch, number, custom_id, &answer), by))
}

/// The result of a request whose handling panicked: a fault of ours that must not cost the line.
fn panicked(batch: &str, number: u64, bytes: &Bytes) -> ResultRow {
    let line = std::str::from_utf8(bytes).map(RequestLine::parse).unwrap_or_default();
    let message = "The server failed while it handled this request; its log says more.".into();
    let failure = Failure { code: "internal_error".into(), message };
    row(batch, number, line.custom_id.as_deref().unwrap_or_default(), &Answer::Failure(failure))
}

/// The lines that have a result, asked for in ascending order and held a page at a time.
struct RecordedLines<'a> {
    batches: &'a Batches,
    claim: &'a Claim,
    known: VecDeque<u64>,
    last: u64,
    ended: bool,
}

impl RecordedLines<'_> {
    async fn contains(&mut self, line: u64) -> Result<bool> {
        loop {
            match self.known.front() {
                Some(known) if *known < line => drop(self.known.pop_front()),
                Some(known) => return Ok(*known == line),
                None if self.ended => return Ok(false),
                None => {
                    let page = self.batches.store.recorded_lines(self.claim, self.last, RECORDED).await?;
                    self.ended = page.len() < RECORDED;
                    self.last = page.last().copied().unwrap_or(self.last);
                    self.known.extend(page);
                }
            }
        }
    }
}
