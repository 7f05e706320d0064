//! Finalizing: the results become the two files, in the input's order. It can be repeated from the start at any time.

use bytes::Bytes;

use super::Batches;
use super::input::{Input, InputLine, Position};
use super::line::RequestLine;
use super::result_line::{file_id, not_executed};
use super::stop::Reason;
use super::validate::lost_input;
use crate::config::Span;
use crate::memory::{Holder, Share};
use crate::store::{
    BatchRecord, BlobWriter, Claim, Ending, FileRecord, Finish, Result, ResultRow, Status,
    StoreError,
};

/// Results held at a time, in bytes; and what is gathered of each file before it is written.
const PAGE: usize = 256 << 10;

/// What finalizing a batch takes: a page, the input that is read beside it, and what is gathered of both files.
const MEMORY: usize = 4 * PAGE;

/// What is read of the input at a time, in bytes.
const READ: u64 = 128 << 10;

/// A line is held by the database, as it is read, and as it is written.
const COPIES: usize = 3;

/// How a batch ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// Every line has a result.
    Whole,
    /// Lines without a result are told of with the reason.
    Stopped(Reason),
    /// The input is lost: what has a result is kept, the rest cannot be told of.
    InputLost,
}

/// One of the two files; it is not made before it has a line.
struct ResultFile<'a> {
    batches: &'a Batches,
    claim: &'a Claim,
    kind: &'static str,
    writer: Option<BlobWriter>,
    /// Lines not yet handed to the writer.
    buffer: Vec<u8>,
}

/// Results of a batch in order, a page at a time, within memory that one which is larger than a page is waited for.
struct Rows<'a> {
    batches: &'a Batches,
    claim: &'a Claim,
    page: std::iter::Peekable<std::vec::IntoIter<ResultRow>>,
    after: u64,
    ended: bool,
    share: Share,
}

impl<'a> Rows<'a> {
    async fn new(batches: &'a Batches, claim: &'a Claim) -> Self {
        let holder: Holder = claim.tenant.as_str().into();
        let share = batches.memory.finalizing.take(&holder, MEMORY).await;
        Self {
            batches,
            claim,
            page: Vec::new().into_iter().peekable(),
            after: 0,
            ended: false,
            share,
        }
    }

    /// The next result, if there is one.
    async fn peek(&mut self) -> Result<Option<&ResultRow>> {
        if self.page.peek().is_none() && !self.ended {
            let store = &self.batches.store;
            let mut page = store.results(self.claim, self.after, PAGE).await?;
            if let Some(size) = page.too_large {
                self.hold(size).await;
                page = store.results(self.claim, self.after, size).await?;
            }
            self.ended = page.rows.is_empty();
            self.after = page.rows.last().map_or(self.after, |row| row.line);
            self.page = page.rows.into_iter().peekable();
        }
        Ok(self.page.peek())
    }

    fn take(&mut self) -> Option<ResultRow> {
        self.page.next()
    }

    /// Has memory for something of this size, which is not read yet. Nothing is held while it waits: others may wait for the same.
    async fn hold(&mut self, size: usize) {
        let bytes = MEMORY.saturating_add(size.saturating_mul(COPIES));
        if bytes > self.share.bytes() {
            self.share.settle(0);
            self.share.cover(bytes).await;
        }
    }
}

impl Batches {
    /// Writes the files of a batch and ends it.
    pub(super) async fn finalize(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        end: End,
    ) -> Result<()> {
        self.store.start_finalizing(claim, self.clock.now()).await?;
        match self.write_files(claim, batch, end).await {
            // It was about to end as expired, and a client was told since that it is being cancelled.
            Err(StoreError::Overtaken) => {
                self.write_files(claim, batch, End::Stopped(Reason::Cancelled)).await
            }
            written => written,
        }
    }

    async fn write_files(&self, claim: &Claim, batch: &BatchRecord, end: End) -> Result<()> {
        let file =
            |kind| ResultFile { batches: self, claim, kind, writer: None, buffer: Vec::new() };
        let (mut output, mut error) = (file("output"), file("error"));
        let mut errors = Vec::new();
        let lost = match end {
            End::Whole => None,
            End::InputLost => Some("it is missing".to_owned()),
            End::Stopped(reason) => {
                match self.copy_with_rest(claim, batch, reason, &mut output, &mut error).await {
                    // Somebody has taken it out of the store. What is done is handed over all the same.
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
        if lost.is_some() || matches!(end, End::Whole) {
            self.copy_results(claim, &mut output, &mut error).await?;
        }
        let at = self.clock.now();
        let status = match end {
            End::Whole | End::Stopped(Reason::Shutdown) => Status::Completed,
            End::Stopped(Reason::Cancelled) => Status::Cancelled,
            End::Stopped(Reason::Expired) => Status::Expired,
            End::InputLost => Status::Failed,
        };
        let record = |kind: &str, bytes: Option<u64>, by_default: Span| {
            let by_default = Some(by_default.duration()).filter(|lifetime| !lifetime.is_zero());
            let expires_at =
                batch.new.output_lifetime.or(by_default).map(|lifetime| at.after(lifetime));
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
            record("output", output.finish().await?, self.settings.output_file_lifetime),
            record("error", error.finish().await?, self.settings.error_file_lifetime),
        );
        self.store.finish(claim, Finish { status, errors, output, error, at }).await?;
        self.garbage.notify_one();
        Ok(())
    }

    /// The input of a batch, as it was when the batch was created.
    pub(super) async fn open_input(&self, claim: &Claim, piece: u64) -> Result<Input> {
        self.open_input_at(claim, piece, Position::default()).await
    }

    /// The same, from a position on.
    pub(super) async fn open_input_at(
        &self,
        claim: &Claim,
        piece: u64,
        from: Position,
    ) -> Result<Input> {
        let Some(file) = self.store.input_file(claim).await? else {
            return Err(StoreError::Missing("it has no record".into()));
        };
        // Validation held the lines to the limit of its day; today's may be lower.
        let place = (claim.tenant.as_str(), file.id.as_str());
        Input::open_at(&self.blobs, place, file.bytes, usize::MAX, piece, from).await
    }

    async fn copy_results(
        &self,
        claim: &Claim,
        output: &mut ResultFile<'_>,
        error: &mut ResultFile<'_>,
    ) -> Result<()> {
        let mut rows = Rows::new(self, claim).await;
        while rows.peek().await?.is_some() {
            if let Some(row) = rows.take() {
                place(row, output, error).await?;
            }
        }
        Ok(())
    }

    /// Reads the input once more, beside the results, so that lines that were not executed are told of in their place. An input that cannot be
    /// read again and again is as good as missing.
    async fn copy_with_rest(
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
        let waited =
            self.waits_for(claim, batch, batch.new.expires_at).or_else(|| batch.waits_for.clone());
        if let Some(waited) = waited.filter(|_| reason == Reason::Expired) {
            message = format!("{message} It waited, as: {}", waited.cause);
        }
        let hopeless = self.is_hopeless(claim);
        let unreadable = |error: StoreError| match error {
            StoreError::Objects(cause) if hopeless => StoreError::Missing(cause),
            error => error,
        };
        let mut input = self.open_input(claim, READ).await.map_err(unreadable)?;
        let mut rows = Rows::new(self, claim).await;
        while let Some(line) = input.next().await.map_err(unreadable)? {
            let (number, held, range) = match line {
                InputLine::Whole { number, bytes, .. } => (number, Some(bytes), None),
                InputLine::Large { number, range } => (number, None, Some(range)),
                InputLine::TooLong { .. } => continue,
            };
            if rows.peek().await?.is_some_and(|row| row.line == number) {
                if let Some(row) = rows.take() {
                    place(row, output, error).await?;
                }
                continue;
            }
            let bytes = match (held, range) {
                (None, Some(range)) => {
                    rows.hold(
                        usize::try_from(range.end.saturating_sub(range.start))
                            .unwrap_or(usize::MAX),
                    )
                    .await;
                    input.large(range).await.map_err(unreadable)?
                }
                (held, _) => held,
            };
            let Some(bytes) = bytes else { continue };
            let parsed = std::str::from_utf8(&bytes).map(RequestLine::parse).unwrap_or_default();
            let custom_id = parsed.custom_id.unwrap_or_default();
            error.add(&not_executed(&claim.batch_id, number, &custom_id, code, &message)).await?;
        }
        Ok(())
    }
}

async fn place(
    row: ResultRow,
    output: &mut ResultFile<'_>,
    error: &mut ResultFile<'_>,
) -> Result<()> {
    match row.ending {
        Ending::Completed => output.add(&row.payload).await,
        Ending::Failed => error.add(&row.payload).await,
    }
}

impl ResultFile<'_> {
    async fn add(&mut self, line: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(line);
        self.buffer.push(b'\n');
        if self.buffer.len() >= PAGE { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<()> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => {
                let (tenant, id) = (&self.claim.tenant, file_id(&self.claim.batch_id, self.kind));
                self.batches.store.begin_object(tenant, &id).await?;
                none.insert(self.batches.blobs.writer(tenant, &id).await?)
            }
        };
        writer.write(Bytes::from(std::mem::take(&mut self.buffer))).await
    }

    /// The size of the file, if it has any line.
    async fn finish(mut self) -> Result<Option<u64>> {
        if !self.buffer.is_empty() {
            self.flush().await?;
        }
        match self.writer {
            Some(writer) => writer.finish().await.map(Some),
            None => Ok(None),
        }
    }
}
