//! Line reader for an input file that buffers one chunk at a time.
//!
//! A line that is longer than [`MAX_BUFFERED_LINE_BYTES`] is not buffered. The reader returns its
//! byte range, and the caller reads the line when memory is reserved for it.

use std::ops::Range;
use std::sync::Arc;

use batchwright_domain::ids::ObjectKey;
use batchwright_store::objects::read_in_chunks;
use batchwright_store::{Objects, Result, StoreError};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

/// UTF-8 byte order mark, which is dropped at the beginning of the file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Maximum size of a line that is buffered, in bytes.
pub(crate) const MAX_BUFFERED_LINE_BYTES: usize = 128 << 10;

/// Line of the input that is not blank.
///
/// `number` is the physical line number, from 1.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum InputLine {
    /// Buffered line without its line end and without a byte order mark.
    Buffered {
        /// Line number.
        number: u64,
        /// Offset of the line in the file, in bytes.
        at: u64,
        /// Content of the line.
        bytes: Bytes,
    },
    /// Large line that is not buffered and may be blank.
    Large {
        /// Line number.
        number: u64,
        /// Byte range of the line in the file.
        range: Range<u64>,
    },
    /// Line that is longer than the limit.
    TooLong {
        /// Line number.
        number: u64,
    },
}

/// Position of the beginning of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    /// Number of lines before the position.
    pub lines: u64,
    /// Number of bytes before the position.
    pub bytes: u64,
}

/// Reader of the input file of a batch.
pub(crate) struct Input {
    objects: Arc<dyn Objects>,
    key: ObjectKey,
    lines: Lines,
}

impl Input {
    /// Opens a file at its beginning.
    ///
    /// `bytes` is the expected size of the file; another size is an error. `max_line_bytes` is the
    /// maximum size of a line, and `chunk` is the size of a chunk, both in bytes.
    pub(crate) async fn open(
        objects: &Arc<dyn Objects>,
        key: ObjectKey,
        bytes: u64,
        max_line_bytes: usize,
        chunk: u64,
    ) -> Result<Self> {
        Self::open_at(objects, key, bytes, max_line_bytes, chunk, Position::default()).await
    }

    /// Opens a file like [`Self::open`], at a position.
    pub(crate) async fn open_at(
        objects: &Arc<dyn Objects>,
        key: ObjectKey,
        bytes: u64,
        max_line_bytes: usize,
        chunk: u64,
        from: Position,
    ) -> Result<Self> {
        let size = objects.size(&key).await?;
        if size != bytes {
            return Err(StoreError::Missing(format!(
                "it has {size} bytes instead of the uploaded {bytes}"
            )));
        }
        let range = from.bytes.min(bytes)..bytes;
        let stream = read_in_chunks(objects.clone(), key.clone(), range, chunk);
        let mut lines = Lines::new(stream, max_line_bytes, MAX_BUFFERED_LINE_BYTES);
        lines.number = from.lines;
        lines.offset = from.bytes;
        Ok(Self { objects: objects.clone(), key, lines })
    }

    /// Returns the next line that is not blank, or `None` at the end of the file.
    pub(crate) async fn next(&mut self) -> Result<Option<InputLine>> {
        self.lines.next().await
    }

    /// Returns the position of the next line.
    pub(crate) fn position(&self) -> Position {
        self.lines.position()
    }

    /// Reads a large line and returns its bytes, or `None` if the line is blank.
    pub(crate) async fn large(&mut self, range: Range<u64>) -> Result<Option<Bytes>> {
        let bytes = self.objects.read_range(&self.key, range).await?;
        Ok((!is_blank(&bytes)).then_some(bytes))
    }
}

/// Returns true if a line has only whitespace.
fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

/// Splitter of a byte stream into lines.
struct Lines {
    stream: BoxStream<'static, Result<Bytes>>,
    buffer: BytesMut,
    /// Offset of the buffer in the file.
    offset: u64,
    /// Length of the beginning of the buffer that is known to have no line feed.
    searched: usize,
    /// Number of the last line.
    number: u64,
    max_line_bytes: usize,
    max_buffered_bytes: usize,
    /// Offset of the line whose rest is skipped.
    skip_start: Option<u64>,
    /// Last skipped byte.
    last_skipped: u8,
    ended: bool,
}

impl Lines {
    fn new(
        stream: BoxStream<'static, Result<Bytes>>,
        max_line_bytes: usize,
        max_buffered_bytes: usize,
    ) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            offset: 0,
            searched: 0,
            number: 0,
            max_line_bytes,
            max_buffered_bytes,
            skip_start: None,
            last_skipped: 0,
            ended: false,
        }
    }

    /// Returns the next line that is not blank, or `None` at the end of the stream.
    async fn next(&mut self) -> Result<Option<InputLine>> {
        loop {
            if let Some((start, line)) = self.take_line() {
                if let Some(line) = self.classify(start, line) {
                    return Ok(Some(line));
                }
                continue;
            }
            if self.ended {
                return Ok(None);
            }
            if self.skip_start.is_some()
                || self.buffer.len()
                    > self.max_buffered_bytes.saturating_add(BYTE_ORDER_MARK.len() + 1)
            {
                self.skip_buffer();
            }
            match self.stream.next().await {
                Some(chunk) => self.buffer.extend_from_slice(&chunk?),
                None => self.ended = true,
            }
        }
    }

    /// Returns the position of the next line.
    fn position(&self) -> Position {
        Position { lines: self.number, bytes: self.skip_start.unwrap_or(self.offset) }
    }

    /// Drops the buffered beginning of a line that continues in the next chunk.
    fn skip_buffer(&mut self) {
        if self.skip_start.is_none() {
            let marked = self.number == 0 && self.buffer.starts_with(BYTE_ORDER_MARK);
            let mark = if marked { BYTE_ORDER_MARK.len() as u64 } else { 0 };
            self.skip_start = Some(self.offset.saturating_add(mark));
        }
        self.last_skipped = self.buffer.last().copied().unwrap_or(self.last_skipped);
        self.offset = self.offset.saturating_add(self.buffer.len() as u64);
        self.buffer.clear();
        self.searched = 0;
    }

    /// Splits the next line off the buffer and returns its offset and its bytes without line feed.
    fn take_line(&mut self) -> Option<(u64, Bytes)> {
        let start = self.offset;
        let unsearched = self.buffer.get(self.searched..).unwrap_or_default();
        if let Some(at) = memchr::memchr(b'\n', unsearched) {
            let line = self.buffer.split_to(self.searched.saturating_add(at)).freeze();
            self.buffer.advance(1);
            self.offset = start.saturating_add(line.len() as u64).saturating_add(1);
            self.searched = 0;
            return Some((start, line));
        }
        self.searched = self.buffer.len();
        // The last line may have no line feed.
        let last = self.ended && (!self.buffer.is_empty() || self.skip_start.is_some());
        last.then(|| {
            self.searched = 0;
            let line = self.buffer.split().freeze();
            self.offset = start.saturating_add(line.len() as u64);
            (start, line)
        })
    }

    /// Counts a line and converts it, or returns `None` if the line is blank.
    fn classify(&mut self, start: u64, mut bytes: Bytes) -> Option<InputLine> {
        self.number = self.number.saturating_add(1);
        let number = self.number;
        if let Some(began) = self.skip_start.take() {
            let last = bytes.last().copied().unwrap_or(self.last_skipped);
            let end =
                start.saturating_add(bytes.len() as u64).saturating_sub(u64::from(last == b'\r'));
            let range = began..end;
            let too_long = end.saturating_sub(began) > self.max_line_bytes as u64;
            return Some(if too_long {
                InputLine::TooLong { number }
            } else {
                InputLine::Large { number, range }
            });
        }
        let mut began = start;
        if number == 1 && bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.advance(BYTE_ORDER_MARK.len());
            began = began.saturating_add(BYTE_ORDER_MARK.len() as u64);
        }
        if bytes.ends_with(b"\r") {
            bytes.truncate(bytes.len().saturating_sub(1));
        }
        if bytes.len() > self.max_line_bytes {
            return Some(InputLine::TooLong { number });
        }
        if bytes.len() > self.max_buffered_bytes {
            // The line arrived in one chunk and is larger than the buffer limit.
            return Some(InputLine::Large {
                number,
                range: began..began.saturating_add(bytes.len() as u64),
            });
        }
        (!is_blank(&bytes)).then_some(InputLine::Buffered { number, at: began, bytes })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use proptest::prelude::*;

    use super::*;

    /// Returns each line as `number:text`, or as `number!` if the line is too long.
    async fn read_buffering(
        file: &[u8],
        max_line_bytes: usize,
        max_buffered_bytes: usize,
        chunk: usize,
    ) -> Vec<String> {
        let chunks: Vec<_> =
            file.chunks(chunk).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        let mut lines =
            Lines::new(Box::pin(stream::iter(chunks)), max_line_bytes, max_buffered_bytes);
        let mut found = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            assert!(
                lines.buffer.len() <= max_buffered_bytes + chunk + 4,
                "the buffer has {} bytes",
                lines.buffer.len()
            );
            let shown =
                |number: u64, bytes: &[u8]| format!("{number}:{}", String::from_utf8_lossy(bytes));
            found.push(match line {
                InputLine::Buffered { number, at, bytes } => {
                    let at = usize::try_from(at).unwrap();
                    assert_eq!(file[at..at + bytes.len()], bytes);
                    shown(number, &bytes)
                }
                InputLine::Large { number, range } => {
                    let bytes = &file[usize::try_from(range.start).unwrap()
                        ..usize::try_from(range.end).unwrap()];
                    assert!(bytes.len() > max_buffered_bytes);
                    if is_blank(bytes) {
                        continue;
                    }
                    shown(number, bytes)
                }
                InputLine::TooLong { number } => format!("{number}!"),
            });
        }
        found
    }

    async fn read(file: &[u8], max_line_bytes: usize, chunk: usize) -> Vec<String> {
        read_buffering(file, max_line_bytes, 1000, chunk).await
    }

    #[tokio::test]
    async fn lines_have_physical_line_numbers() {
        for chunk in [1, 2, 3, 7, 100] {
            assert_eq!(
                read(b"\xef\xbb\xbfa\r\n\n  \t\nb\n\r\nc", 10, chunk).await,
                ["1:a", "4:b", "6:c"],
                "{chunk}"
            );
            assert_eq!(
                read(b"a\n\xef\xbb\xbfb\n", 10, chunk).await,
                ["1:a", "2:\u{feff}b"],
                "{chunk}"
            );
            assert_eq!(read(b"", 10, chunk).await, [""; 0]);
            assert_eq!(read(b"\n\n", 10, chunk).await, [""; 0]);
        }
    }

    #[tokio::test]
    async fn line_over_the_limit_is_skipped_and_the_next_line_is_read() {
        for chunk in [1, 2, 5, 100] {
            assert_eq!(
                read(b"12345\n123456\n12345\r\n1234567890123\nx", 5, chunk).await,
                ["1:12345", "2!", "3:12345", "4!", "5:x"]
            );
            assert_eq!(read(b"1234567890123", 5, chunk).await, ["1!"], "{chunk}");
            assert_eq!(read(b"\xef\xbb\xbf12345\r\n", 5, chunk).await, ["1:12345"], "{chunk}");
        }
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_chunk_and_buffer_sizes(
            mark in any::<bool>(),
            file in "[ab\r\n ]{0,60}",
            chunk in 1_usize..20,
            max_line_bytes in 1_usize..10,
            max_buffered_bytes in 0_usize..12,
        ) {
            let file = if mark { format!("\u{feff}{file}") } else { file };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let whole = runtime.block_on(read(file.as_bytes(), max_line_bytes, 1000));
            let chunked = runtime.block_on(read_buffering(
                file.as_bytes(),
                max_line_bytes,
                max_buffered_bytes,
                chunk,
            ));
            prop_assert_eq!(&whole, &chunked);
            let file = file.trim_start_matches('\u{feff}');
            let shown = |(index, line): (usize, &str)| {
                let line = line.strip_suffix('\r').unwrap_or(line);
                if line.len() > max_line_bytes {
                    return Some(format!("{}!", index + 1));
                }
                let is_blank = line.trim_matches([' ', '\t', '\r']).is_empty();
                (!is_blank).then(|| format!("{}:{line}", index + 1))
            };
            let expected: Vec<String> = file.split('\n').enumerate().filter_map(shown).collect();
            prop_assert_eq!(whole, expected);
        }
    }
}
