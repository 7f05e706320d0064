//! Chunks of an input file, each with the memory that it has reserved.

use std::ops::Range;

use batchwright_memory::{Holder, Pool, Reservation};
use batchwright_store::Result;

use crate::formats::input::{Input, InputLine};

/// Maximum number of lines in a chunk.
const MAX_CHUNK_LINES: usize = 1000;

/// Size at which a chunk is complete, in bytes.
const CHUNK_BYTES: usize = 256 << 10;

/// Memory of a chunk as a multiple of its size: the bytes as read, the text, the copy for all
/// validators except the last, and the hashes of the keys.
const COPIES_PER_CHUNK: usize = 4;

/// Reader of the chunks of a file, each with the memory that it has reserved.
pub(crate) struct Chunks {
    pub(super) input: Input,
    /// Large line after the last chunk, which is the next chunk.
    pub(super) next_large: Option<(u64, Range<u64>)>,
    pub(super) memory: Pool,
    pub(super) holder: Holder,
}

impl Chunks {
    /// Returns the next chunk, or `None` at the end of the file. A large line is a chunk of its
    /// own.
    pub(super) async fn next(&mut self) -> Result<Option<(Vec<InputLine>, Reservation)>> {
        if let Some((number, range)) = self.next_large.take()
            && let Some(chunk) = self.read_large(number, range).await?
        {
            return Ok(Some(chunk));
        }
        let reserved = CHUNK_BYTES.saturating_mul(COPIES_PER_CHUNK);
        let mut reservation = self.memory.reserve(&self.holder, reserved).await;
        let mut chunk = Vec::new();
        let mut bytes = 0_usize;
        while chunk.len() < MAX_CHUNK_LINES && bytes < CHUNK_BYTES {
            match self.input.next().await? {
                None => break,
                Some(InputLine::Large { number, range }) if chunk.is_empty() => {
                    drop(reservation);
                    if let Some(chunk) = self.read_large(number, range).await? {
                        return Ok(Some(chunk));
                    }
                    reservation = self.memory.reserve(&self.holder, reserved).await;
                }
                Some(InputLine::Large { number, range }) => {
                    self.next_large = Some((number, range));
                    break;
                }
                Some(line) => {
                    if let InputLine::Buffered { bytes: text, .. } = &line {
                        bytes = bytes.saturating_add(text.len());
                    }
                    chunk.push(line);
                }
            }
        }
        reservation.shrink_to(bytes.saturating_mul(COPIES_PER_CHUNK));
        Ok((!chunk.is_empty()).then_some((chunk, reservation)))
    }

    /// Reads a large line as a chunk, or returns `None` if the line is blank.
    async fn read_large(
        &mut self,
        number: u64,
        range: Range<u64>,
    ) -> Result<Option<(Vec<InputLine>, Reservation)>> {
        let size = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let reservation =
            self.memory.reserve(&self.holder, size.saturating_mul(COPIES_PER_CHUNK)).await;
        let bytes = self.input.large(range.clone()).await?;
        Ok(bytes.map(|bytes| {
            (vec![InputLine::Buffered { number, at: range.start, bytes }], reservation)
        }))
    }
}
