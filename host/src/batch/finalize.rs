//! Finalizing: the results become the two files, in the input's order. It can be repeated from the start at any time.

use bytes::Bytes;
use futures_util::stream::BoxStream;

use super::Batches;
use super::input::{InputLine, Lines};
use super::line::RequestLine;
use super::result_line::{file_id, not_executed};
use super::stop::Reason;
use crate::store::{BatchRecord, BlobWriter, Claim, Ending, FileRecord, Finish, Result, ResultRow, Status, StoreError};

/// Results held at a time, in bytes.
const PAGE: usize = 1 << 20;

/// One of the two files; it is not made before it has a line.
struct ResultFile<'a> {
    batches: &'a Batches,
    claim: &'a Claim,
    kind: &'static str,
    writer: Option<BlobWriter>,
    /// Lines not yet handed to the writer.
    buffer: Vec<u8>,
}

impl Batches {
    /// Writes the files of a batch whose every line has a result, or, if there is a reason, of one that was stopped before.
    pub(super) async fn finalize(&self, claim: &Claim, batch: &BatchRecord, stopped: Option<Reason>) -> Result<()> {
        self.store.start_finalizing(claim, self.clock.now()).await?;
        match self.write_files(claim, batch, stopped).await {
            // It was about to end as expired, and a client was told since that it is being cancelled.
            Err(StoreError::Overtaken) => self.write_files(claim, batch, Some(Reason::Cancelled)).await,
            written => written,
        }
    }

    async fn write_files(&self, claim: &Claim, batch: &BatchRecord, stopped: Option<Reason>) -> Result<()> {
        let file = |kind| ResultFile { batches: self, claim, kind, writer: None, buffer: Vec::new() };
        let (mut output, mut error) = (file("output"), file("error"));
        match stopped {
            None => self.copy_results(claim, &mut output, &mut error).await?,
            Some(reason) => match self.blobs.read(&claim.tenant, &batch.new.input_file_id, None).await {
                Ok(input) => self.copy_with_rest(claim, input, reason, &mut output, &mut error).await?,
                // Somebody has taken it out of the store. What is done is handed over all the same.
                Err(StoreError::Missing(cause)) => {
                    tracing::error!(
                        batch = batch.new.id,
                        "the input file is gone, so lines without a result are not told of: {cause}"
                    );
                    self.copy_results(claim, &mut output, &mut error).await?;
                }
                Err(error) => return Err(error),
            },
        }
        let at = self.clock.now();
        let expires_at = batch.new.output_lifetime.map(|lifetime| at.after(lifetime));
        let status = match stopped {
            None | Some(Reason::Shutdown) => Status::Completed,
            Some(Reason::Cancelled) => Status::Cancelled,
            Some(Reason::Expired) => Status::Expired,
        };
        let record = |kind: &str, bytes: Option<u64>| {
            bytes.map(|bytes| FileRecord {
                id: file_id(&batch.new.id, kind),
                bytes,
                created_at: at,
                expires_at,
                filename: format!("{}_{kind}.jsonl", batch.new.id),
                purpose: "batch_output".into(),
            })
        };
        let (output, error) = (record("output", output.finish().await?), record("error", error.finish().await?));
        self.store.finish(claim, Finish { status, output, error, at }).await?;
        self.garbage.notify_one();
        Ok(())
    }

    async fn copy_results(&self, claim: &Claim, output: &mut ResultFile<'_>, error: &mut ResultFile<'_>) -> Result<()> {
        let mut after = 0;
        loop {
            let rows = self.store.results(claim, after, PAGE).await?;
            let Some(last) = rows.last() else { return Ok(()) };
            after = last.line;
            for row in rows {
                place(row, output, error).await?;
            }
        }
    }

    /// Reads the input once more, beside the results, so that lines that were not executed are told of in their place.
    async fn copy_with_rest(
        &self,
        claim: &Claim,
        input: BoxStream<'static, Result<Bytes>>,
        reason: Reason,
        output: &mut ResultFile<'_>,
        error: &mut ResultFile<'_>,
    ) -> Result<()> {
        let (code, message) = match reason {
            Reason::Expired => ("batch_expired", "This request had no answer before the completion window expired."),
            Reason::Cancelled | Reason::Shutdown => {
                ("batch_cancelled", "This request had no answer when the batch was cancelled.")
            }
        };
        let mut lines = Lines::new(input, usize::MAX);
        let mut rows = Vec::new().into_iter().peekable();
        let (mut after, mut ended) = (0, false);
        while let Some(line) = lines.next().await? {
            let InputLine::Whole { number, bytes } = line else { continue };
            if rows.peek().is_none() && !ended {
                rows = self.store.results(claim, after, PAGE).await?.into_iter().peekable();
                ended = rows.peek().is_none();
            }
            after = number;
            if let Some(row) = rows.next_if(|row: &ResultRow| row.line == number) {
                place(row, output, error).await?;
                continue;
            }
            let parsed = std::str::from_utf8(&bytes).map(RequestLine::parse).unwrap_or_default();
            let custom_id = parsed.custom_id.unwrap_or_default();
            error.add(&not_executed(&claim.batch_id, number, &custom_id, code, message)).await?;
        }
        Ok(())
    }
}

async fn place(row: ResultRow, output: &mut ResultFile<'_>, error: &mut ResultFile<'_>) -> Result<()> {
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
                none.insert(self.batches.blobs.writer(tenant, &id))
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
