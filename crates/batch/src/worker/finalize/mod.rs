//! Finalizing: writes the results of a batch to its output and error files, in input order.
//!
//! **Problem.** A crash, a shutdown or a lost claim can interrupt finalizing at any moment. Clients
//! must never see a partial file, two versions of a file, or an ended batch without its files.
//!
//! **Repeatable.** Finalizing can start again from the beginning at any time:
//!
//! - Results stay in the store until the files are committed.
//! - The file ids derive from the id of the batch, so a repetition overwrites the same objects.
//! - Objects are registered before they are written, so a crash leaves no unknown object.
//! - One transaction commits the records of both files, the status and the time. A worker that has
//!   lost its claim is fenced and commits nothing.
//!
//! **Cancellation race.** A client can cancel a batch while the batch is being finalized as
//! expired. Then the transaction fails, and the files are written again as those of a cancelled
//! batch.
//!
//! **Lines without a result.** A batch that was stopped early has lines without a result. The input
//! is read again next to the results, so that the error file reports these lines in input order. If
//! the input is lost, the files contain only the recorded results.
//!
//! **Memory.** Results and input are read in pages and chunks within a memory reservation. A batch
//! with a result or a line that is larger than a page waits for more memory. The batch releases its
//! reservation before it waits, so that two batches cannot deadlock.

use batchwright_domain::ids::ObjectKey;
use batchwright_domain::limits::Limit;
use batchwright_domain::status::Status;
use batchwright_memory::{Holder, Reservation};
use batchwright_store::{
    BatchRecord, Claim, FileRecord, Finish, Result, ResultKind, ResultRow, StoreError,
};

use crate::formats::input::{Input, InputLine, Position};
use crate::formats::line::RequestLine;
use crate::formats::result_line::{file_id, not_executed};
use crate::objects::RegisteredWriter;
use crate::schedule::stop::Reason;
use crate::worker::Worker;
use crate::worker::validate::lost_input;

/// Size of a page of results, in bytes.
const PAGE_BYTES: usize = 256 << 10;

/// Size of a chunk of the input, in bytes.
const READ_CHUNK_BYTES: u64 = 128 << 10;

/// Number of copies of a line in memory: in the database, after the read and in the write buffer.
const LINE_COPIES: usize = 3;

/// Outcome with which a batch ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BatchEnd {
    /// Every line has a result.
    Complete,
    /// The batch was stopped. Lines without a result are reported with the reason.
    Stopped(Reason),
    /// The input is lost. Recorded results are kept, and lines without a result are not reported.
    InputLost,
}

/// Output or error file of a batch, created with its first line.
struct ResultFile<'a> {
    worker: &'a Worker,
    key: ObjectKey,
    writer: Option<RegisteredWriter>,
}

/// Reader of the results of a batch in input order, one page at a time, within reserved memory.
struct Rows<'a> {
    worker: &'a Worker,
    claim: &'a Claim,
    page: std::iter::Peekable<std::vec::IntoIter<ResultRow>>,
    after: u64,
    ended: bool,
    /// Memory that every batch needs, in bytes.
    reserved: usize,
    reservation: Reservation,
}

impl<'a> Rows<'a> {
    async fn new(worker: &'a Worker, claim: &'a Claim) -> Self {
        let holder: Holder = claim.tenant.as_str().into();
        // A page, a chunk of the input, and a part of each file.
        let reserved =
            worker.objects.part_size().target.saturating_add(PAGE_BYTES).saturating_mul(2);
        let reservation = worker.memory.finalizing.reserve(&holder, reserved).await;
        Self {
            worker,
            claim,
            page: Vec::new().into_iter().peekable(),
            after: 0,
            ended: false,
            reserved,
            reservation,
        }
    }

    /// Returns the next result without removing it.
    async fn peek(&mut self) -> Result<Option<&ResultRow>> {
        if self.page.peek().is_none() && !self.ended {
            let store = &self.worker.store;
            let mut page = store.results(self.claim, self.after, PAGE_BYTES).await?;
            if let Some(size) = page.too_large {
                self.reserve(size).await;
                page = store.results(self.claim, self.after, size).await?;
            }
            self.ended = page.rows.is_empty();
            self.after = page.rows.last().map_or(self.after, |row| row.line);
            self.page = page.rows.into_iter().peekable();
        }
        Ok(self.page.peek())
    }

    /// Removes and returns the result that was last peeked.
    fn take(&mut self) -> Option<ResultRow> {
        self.page.next()
    }

    /// Reserves memory for an item of this size before the item is read.
    ///
    /// Releases the current reservation before a wait, because others may wait for the same memory.
    async fn reserve(&mut self, size: usize) {
        let bytes = self.reserved.saturating_add(size.saturating_mul(LINE_COPIES));
        if bytes > self.reservation.bytes() {
            self.reservation.shrink_to(0);
            self.reservation.grow_to(bytes).await;
        }
    }
}

impl Worker {
    /// Writes the files of a batch and ends the batch.
    pub(super) async fn finalize(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        end: BatchEnd,
    ) -> Result<()> {
        self.store.start_finalizing(claim, self.clock.now()).await?;
        match self.write_files(claim, batch, end).await {
            // A client cancelled the batch while it was being finalized as expired.
            Err(StoreError::CancelledFirst) => {
                self.write_files(claim, batch, BatchEnd::Stopped(Reason::Cancelled)).await
            }
            written => written,
        }
    }

    /// Writes both files and commits the end of the batch.
    async fn write_files(&self, claim: &Claim, batch: &BatchRecord, end: BatchEnd) -> Result<()> {
        let file = |kind| ResultFile {
            worker: self,
            key: ObjectKey { tenant: claim.tenant.clone(), file: file_id(&claim.batch_id, kind) },
            writer: None,
        };
        let (mut output, mut error) = (file("output"), file("error"));
        let mut errors = Vec::new();
        let lost = match end {
            BatchEnd::Complete => None,
            BatchEnd::InputLost => Some("the object is missing".to_owned()),
            BatchEnd::Stopped(reason) => {
                match self.copy_with_unexecuted(claim, batch, reason, &mut output, &mut error).await
                {
                    // The input is lost. The recorded results are still delivered.
                    Err(StoreError::Missing(cause)) => Some(cause),
                    copied => {
                        copied?;
                        None
                    }
                }
            }
        };
        if let Some(cause) = &lost {
            errors.push(lost_input(claim, &batch.new.input_file_id, cause));
            (output, error) = (file("output"), file("error"));
        }
        if lost.is_some() || matches!(end, BatchEnd::Complete) {
            self.copy_results(claim, &mut output, &mut error).await?;
        }
        let at = self.clock.now();
        let status = match end {
            BatchEnd::Complete | BatchEnd::Stopped(Reason::Shutdown) => Status::Completed,
            BatchEnd::Stopped(Reason::Cancelled) => Status::Cancelled,
            BatchEnd::Stopped(Reason::Expired) => Status::Expired,
            BatchEnd::InputLost => Status::Failed,
        };
        let own = self.store.policy(&claim.tenant).await?.limits;
        let lifetimes = self.config.retention.fill(own);
        let record = |kind: &str, bytes: Option<u64>, by_default: Limit| {
            let lifetime = batch.new.output_lifetime.or(lifetimes.lifetime(by_default));
            let expires_at = lifetime.map(|lifetime| at.after(lifetime));
            bytes.map(|bytes| FileRecord {
                id: file_id(&batch.new.id, kind),
                bytes,
                created_at: at,
                expires_at,
                filename: format!("{}_{kind}.jsonl", batch.new.id),
                purpose: "batch_output".into(),
            })
        };
        let (output, error) = (
            record("output", output.finish().await?, Limit::OutputFileLifetime),
            record("error", error.finish().await?, Limit::ErrorFileLifetime),
        );
        self.store.finish(claim, Finish { status, errors, output, error, at }).await?;
        self.cleanup_needed.notify_one();
        Ok(())
    }

    /// Opens the input of a batch, which is read in chunks of `chunk` bytes.
    pub(super) async fn open_input(&self, claim: &Claim, chunk: u64) -> Result<Input> {
        self.open_input_at(claim, chunk, Position::default()).await
    }

    /// Opens the input of a batch at a position.
    pub(super) async fn open_input_at(
        &self,
        claim: &Claim,
        chunk: u64,
        from: Position,
    ) -> Result<Input> {
        let Some(file) = self.store.input_file(claim).await? else {
            return Err(StoreError::Missing("the file has no record".into()));
        };
        // Validation has checked the line length. The current limit may be lower.
        let key = ObjectKey { tenant: claim.tenant.clone(), file: file.id.clone() };
        Input::open_at(&self.objects, key, file.bytes, usize::MAX, chunk, from).await
    }

    /// Copies all results into the files.
    async fn copy_results(
        &self,
        claim: &Claim,
        output: &mut ResultFile<'_>,
        error: &mut ResultFile<'_>,
    ) -> Result<()> {
        let mut rows = Rows::new(self, claim).await;
        while rows.peek().await?.is_some() {
            if let Some(row) = rows.take() {
                add_result(row, output, error).await?;
            }
        }
        Ok(())
    }

    /// Copies all results into the files and reports each line without a result in its place.
    ///
    /// Returns [`StoreError::Missing`] if the input is lost or all retries to read it have failed.
    async fn copy_with_unexecuted(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        reason: Reason,
        output: &mut ResultFile<'_>,
        error: &mut ResultFile<'_>,
    ) -> Result<()> {
        let (code, mut message) = match reason {
            Reason::Expired => (
                "batch_expired",
                "This request had no answer before the completion window expired.".to_owned(),
            ),
            Reason::Cancelled | Reason::Shutdown => (
                "batch_cancelled",
                "This request had no answer when the batch was cancelled.".to_owned(),
            ),
        };
        let waited = self.wait_cause(claim, batch, batch.new.expires_at);
        let waited = waited.or_else(|| batch.waits_for.clone());
        if let Some(waited) = waited.filter(|_| reason == Reason::Expired) {
            message = format!("{message} The request was waiting: {}", waited.cause);
        }
        let retries_exhausted = self.retries_exhausted(claim);
        let unreadable = |error: StoreError| match error {
            StoreError::Objects(cause) if retries_exhausted => StoreError::Missing(cause),
            error => error,
        };
        let mut input = self.open_input(claim, READ_CHUNK_BYTES).await.map_err(unreadable)?;
        let mut rows = Rows::new(self, claim).await;
        while let Some(line) = input.next().await.map_err(unreadable)? {
            let (number, whole, range) = match line {
                InputLine::Buffered { number, bytes, .. } => (number, Some(bytes), None),
                InputLine::Large { number, range } => (number, None, Some(range)),
                InputLine::TooLong { .. } => continue,
            };
            if rows.peek().await?.is_some_and(|row| row.line == number) {
                if let Some(row) = rows.take() {
                    add_result(row, output, error).await?;
                }
                continue;
            }
            let bytes = match (whole, range) {
                (None, Some(range)) => {
                    rows.reserve(
                        usize::try_from(range.end.saturating_sub(range.start))
                            .unwrap_or(usize::MAX),
                    )
                    .await;
                    input.large(range).await.map_err(unreadable)?
                }
                (whole, _) => whole,
            };
            let Some(bytes) = bytes else { continue };
            let parsed = std::str::from_utf8(&bytes).map(RequestLine::parse).unwrap_or_default();
            let custom_id = parsed.custom_id.unwrap_or_default();
            error.add(&not_executed(&claim.batch_id, number, &custom_id, code, &message)).await?;
        }
        Ok(())
    }
}

/// Adds a result to the file in which it belongs.
async fn add_result(
    row: ResultRow,
    output: &mut ResultFile<'_>,
    error: &mut ResultFile<'_>,
) -> Result<()> {
    match row.kind {
        ResultKind::Completed => output.add(&row.payload).await,
        ResultKind::Failed => error.add(&row.payload).await,
    }
}

impl ResultFile<'_> {
    /// Appends a line. Registers and creates the object before its first line.
    async fn add(&mut self, line: &[u8]) -> Result<()> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            vacant => {
                let Worker { store, objects, clock, .. } = self.worker;
                let (store, objects, clock) = (store.clone(), objects.clone(), clock.clone());
                let key = self.key.clone();
                vacant.insert(RegisteredWriter::create(store, objects, clock, key).await?)
            }
        };
        writer.write(line).await?;
        writer.write(b"\n").await
    }

    /// Completes the file and returns its size in bytes, or `None` if the file has no line.
    async fn finish(self) -> Result<Option<u64>> {
        match self.writer {
            Some(writer) => writer.finish().await.map(Some),
            None => Ok(None),
        }
    }
}
