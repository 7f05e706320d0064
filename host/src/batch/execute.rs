//! Execution: lines are read in order and kept under way in a bounded window; what has a result already is passed over.
//!
//! A batch takes lines while it has its place, a stint at a time; see [`lanes`](super::lanes). Between stints what is under way goes on.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Batches;
use super::backoff::Backoff;
use super::input::{Input, InputLine};
use super::lanes::{Lanes, Place, Plugins};
use super::line::RequestLine;
use super::request::{Answered, Context};
use super::result_line::{request_id, row};
use super::served_by::served_by;
use super::stop::{Reason, Stop};
use crate::memory::{Holder, Share};
use crate::plugin::Plugin;
use crate::plugin::types::{Answer, Failure};
use crate::store::{BatchRecord, Claim, Lane, Result, ResultRow, StoreError};

/// Results written in one go at most; more of them wait in the channel.
const GROUP: usize = 1024;

/// Plugins that have answered and are known to the store: held on to, so at most so many.
const KNOWN: usize = 64;

/// Numbers of recorded lines held at a time.
const RECORDED: usize = 2000;

/// What is read of the input at a time, in bytes.
const READ: u64 = 128 << 10;

/// What a request under way takes beside its line, in bytes: its task, and what the runtime keeps for it.
const TASK: usize = 8 << 10;

/// What a result takes beside its line, in bytes.
const ROW: usize = 512;

/// How long results are gathered before they are written. A commit costs the same for one as for many, and nobody waits for a single one.
const GATHER: std::time::Duration = std::time::Duration::from_millis(10);

/// A result on its way to the store, with who gave it and the memory that it takes.
type Recorded = (ResultRow, By, Option<Share>);

/// The plugin that answered, if one did.
type By = Option<Arc<Plugin>>;

/// How execution came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Executed {
    /// Every line has been taken and answered.
    All,
    Stopped(Reason),
    /// Another batch has this one's place, and nothing is under way.
    TurnOver,
}

/// Why no more lines are taken for now.
enum Pause {
    End,
    Stopped,
    TurnOver,
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
        let context = Arc::new(Context {
            tenant: claim.tenant.clone(),
            endpoint: batch.new.endpoint.clone(),
            created_at: u64::try_from(batch.new.created_at.as_seconds()).unwrap_or(0),
            registry: self.registry.clone(),
            clock: self.clock.clone(),
            settings: self.settings.clone(),
            stop: stop.clone(),
            gate: self.gate.clone(),
            queue: self.next_queue(),
        });
        let plugins = match &claim.lane {
            Lane::Execute(plugins) => plugins.clone(),
            Lane::Validate | Lane::Finish => Plugins::new(),
        };
        let (results, to_record) = mpsc::channel(GROUP);
        let recording = self.record(claim, to_record);
        let working = async {
            let kill = CancellationToken::new();
            // If this is given up, so is what it spawned.
            let _guard = kill.clone().drop_guard();
            let tasks = TaskTracker::new();
            tasks.close();
            // Whom its lines share memory with: all lines for the same plugins.
            let holder: Holder = plugins.iter().map(String::as_str).collect::<Vec<_>>().join(" ").into();
            let work = Work { context, holder, results, kill: &kill, tasks: &tasks };
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
            (Pause::End | Pause::Stopped, None) => Executed::All,
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
        let input = self.open_input(claim, READ).await?;
        let window = self.settings.max_concurrent_requests_per_batch.get().min(Semaphore::MAX_PERMITS);
        let mut lines = LinesToDo {
            input,
            done: RecordedLines { batches: self, claim, known: VecDeque::new(), last: 0, ended: false },
            window: Arc::new(Semaphore::new(window)),
            next: None,
        };
        loop {
            if let Some(place) = place {
                match self.take_stint(batch, work, &mut lines, place).await? {
                    Pause::TurnOver => {}
                    ended => return Ok(ended),
                }
            }
            *place = None;
            *place = tokio::select! {
                place = lanes.come_back(plugins, self.clock.now()) => Some(place),
                () = work.tasks.wait() => return Ok(Pause::TurnOver),
                () = work.context.stop.asked() => return Ok(Pause::Stopped),
            };
        }
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
            if place.is_over() {
                return Ok(Pause::TurnOver);
            }
            let Some((number, line)) = lines.peek().await? else { return Ok(Pause::End) };
            let size = line.size();
            let permits = async {
                self.gate.open().await;
                let slot = lines.window.clone().acquire_owned().await.ok();
                (slot, self.memory.lines.take(&work.holder, size.saturating_add(TASK)).await)
            };
            let permits = tokio::select! {
                biased;
                () = stop.asked() => return Ok(Pause::Stopped),
                permits = permits => permits,
                () = place.over() => return Ok(Pause::TurnOver),
            };
            let Some(bytes) = lines.take().await? else { continue };
            place.took_line();
            let (context, results) = (work.context.clone(), work.results.clone());
            let (batch_id, kill) = (batch.new.id.clone(), work.kill.clone());
            work.tasks.spawn(async move {
                let running = AssertUnwindSafe(run(&context, &batch_id, number, &bytes)).catch_unwind();
                let ended = kill.run_until_cancelled(running).await.map(|ended| match ended {
                    Ok(row) => row,
                    Err(_) => Some((panicked(&batch_id, number, &bytes), None, None)),
                });
                drop(bytes);
                // What the result takes is in its own share by now.
                drop(permits);
                if let Some(Some(recorded)) = ended {
                    results.send(recorded).await.ok();
                }
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
            let mut backoff = Backoff::default();
            let mut closed = None;
            loop {
                match self.store.record(claim, rows.clone(), new.clone()).await {
                    Ok(()) => break,
                    Err(error @ (StoreError::Fenced | StoreError::Closed)) => return Err(error),
                    // A process that must end does not wait for room on the disk.
                    Err(error) if self.closing.is_cancelled() => return Err(error),
                    Err(error) => {
                        // Nothing is asked for whose answer could not be kept either.
                        closed.get_or_insert_with(|| self.gate.close());
                        tracing::error!(batch = claim.batch_id, "results wait to be written: {error}");
                        self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
                    }
                }
            }
            drop(closed);
            drop(memory);
        }
        Ok(())
    }
}

/// What a batch's requests are spawned with.
struct Work<'a> {
    context: Arc<Context>,
    holder: Holder,
    results: mpsc::Sender<Recorded>,
    kill: &'a CancellationToken,
    tasks: &'a TaskTracker,
}

/// The lines of a batch that have no result yet.
struct LinesToDo<'a> {
    input: Input,
    done: RecordedLines<'a>,
    window: Arc<Semaphore>,
    next: Option<(u64, Held)>,
}

/// A line, or where it is.
enum Held {
    Here(Bytes),
    InFile(std::ops::Range<u64>),
}

impl Held {
    fn size(&self) -> usize {
        match self {
            Self::Here(bytes) => bytes.len(),
            Self::InFile(range) => usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX),
        }
    }
}

impl LinesToDo<'_> {
    /// The next line, which stays the next until it is taken.
    async fn peek(&mut self) -> Result<Option<(u64, &Held)>> {
        while self.next.is_none() {
            let (number, held) = match self.input.next().await? {
                None => return Ok(None),
                Some(InputLine::Whole { number, bytes }) => (number, Held::Here(bytes)),
                Some(InputLine::Large { number, range }) => (number, Held::InFile(range)),
                Some(InputLine::TooLong { .. }) => continue,
            };
            if !self.done.contains(number).await? {
                self.next = Some((number, held));
            }
        }
        Ok(self.next.as_ref().map(|(number, held)| (*number, held)))
    }

    /// The bytes of the next line; none if it is blank.
    async fn take(&mut self) -> Result<Option<Bytes>> {
        match self.next.take() {
            // A copy: the line shares the piece it was read in, which is much larger.
            Some((_, Held::Here(bytes))) => Ok(Some(Bytes::copy_from_slice(&bytes))),
            Some((_, Held::InFile(range))) => self.input.large(range).await,
            None => Ok(None),
        }
    }
}

/// Runs one request to its result; none if the batch was stopped before it was sent, or while it waited for another attempt.
async fn run(context: &Context, batch: &str, number: u64, bytes: &Bytes) -> Option<Recorded> {
    let line = std::str::from_utf8(bytes).map(RequestLine::parse).unwrap_or_default();
    let custom_id = line.custom_id.as_deref().unwrap_or_default();
    let (Some(body), Some(model)) = (line.body, line.model.as_deref()) else {
        // Validation let no such line through; the file would have to have changed since.
        let message = "The input file has changed since it was validated.".into();
        let failure = Answer::Failure(Failure { code: "invalid_request".into(), message });
        return Some((row(batch, number, custom_id, &failure), None, None));
    };
    let answered = context.answer(&request_id(batch, number), custom_id, model, body).await?;
    let Answered { answer, by, mut share } = answered;
    let row = row(batch, number, custom_id, &answer);
    drop(answer);
    if let Some(share) = &mut share {
        share.settle(row.payload.len().saturating_add(ROW));
    }
    Some((row, by, share))
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
