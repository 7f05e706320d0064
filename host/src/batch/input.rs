//! An input file as lines, of which it holds a piece at a time.
//!
//! A line that is longer than [`HELD`] is not held: it is found, and whoever wants it reads it once there is memory for it.

use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::store::{Blobs, Result, StoreError};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Longest line that is held as it is read, in bytes.
pub const HELD: usize = 128 << 10;

/// A line that is not blank, with its physical number from 1.
#[derive(Debug, PartialEq, Eq)]
pub enum InputLine {
    /// Without its end, and without a byte order mark; it begins at this byte of the file.
    Whole { number: u64, at: u64, bytes: Bytes },
    /// Not held: these bytes of the file, which may be blank.
    Large { number: u64, range: Range<u64> },
    /// Longer than the limit.
    TooLong { number: u64 },
}

/// Where a line begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Lines before it.
    pub lines: u64,
    /// Bytes before it.
    pub bytes: u64,
}

/// The input file of a batch.
pub struct Input {
    blobs: Blobs,
    tenant: String,
    file: String,
    lines: Lines,
}

impl Input {
    /// Opens a file of so many bytes; one that has another size now is damaged. It is read in pieces of this size.
    pub async fn open(
        blobs: &Blobs,
        tenant: &str,
        file: &str,
        bytes: u64,
        longest: usize,
        piece: u64,
    ) -> Result<Self> {
        Self::open_at(blobs, (tenant, file), bytes, longest, piece, Position::default()).await
    }

    /// The same, from a line on.
    pub async fn open_at(
        blobs: &Blobs,
        (tenant, file): (&str, &str),
        bytes: u64,
        longest: usize,
        piece: u64,
        from: Position,
    ) -> Result<Self> {
        let size = blobs.size(tenant, file).await?;
        if size != bytes {
            return Err(StoreError::Missing(format!(
                "it has {size} bytes where {bytes} were uploaded"
            )));
        }
        let stream = blobs.read(tenant, file, Some(from.bytes.min(bytes)..bytes), piece).await?;
        let mut lines = Lines::new(stream, longest, HELD);
        lines.number = from.lines;
        lines.offset = from.bytes;
        Ok(Self { blobs: blobs.clone(), tenant: tenant.to_owned(), file: file.to_owned(), lines })
    }

    /// The next line that is not blank.
    pub async fn next(&mut self) -> Result<Option<InputLine>> {
        self.lines.next().await
    }

    /// Where the next line begins.
    pub fn position(&self) -> Position {
        self.lines.position()
    }

    /// The bytes of a large line; none if it is blank.
    pub async fn large(&mut self, range: Range<u64>) -> Result<Option<Bytes>> {
        let bytes = self.blobs.read_range(&self.tenant, &self.file, range).await?;
        Ok((!is_blank(&bytes)).then_some(bytes))
    }
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

/// Splits a stream of bytes into lines.
struct Lines {
    stream: BoxStream<'static, Result<Bytes>>,
    buffer: BytesMut,
    /// Where the buffer begins in the file.
    offset: u64,
    /// How much of the buffer holds no line end.
    searched: usize,
    number: u64,
    longest: usize,
    held: usize,
    /// Where the line began whose rest is passed over.
    passing: Option<u64>,
    /// The last byte that was passed over.
    passed: u8,
    ended: bool,
}

impl Lines {
    fn new(stream: BoxStream<'static, Result<Bytes>>, longest: usize, held: usize) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            offset: 0,
            searched: 0,
            number: 0,
            longest,
            held,
            passing: None,
            passed: 0,
            ended: false,
        }
    }

    async fn next(&mut self) -> Result<Option<InputLine>> {
        loop {
            if let Some((start, line)) = self.take_line() {
                if let Some(line) = self.judge(start, line) {
                    return Ok(Some(line));
                }
                continue;
            }
            if self.ended {
                return Ok(None);
            }
            if self.passing.is_some()
                || self.buffer.len() > self.held.saturating_add(BYTE_ORDER_MARK.len() + 1)
            {
                self.pass();
            }
            match self.stream.next().await {
                Some(piece) => self.buffer.extend_from_slice(&piece?),
                None => self.ended = true,
            }
        }
    }

    fn position(&self) -> Position {
        Position { lines: self.number, bytes: self.passing.unwrap_or(self.offset) }
    }

    /// Lets go of what is held of a line that goes on.
    fn pass(&mut self) {
        if self.passing.is_none() {
            let marked = self.number == 0 && self.buffer.starts_with(BYTE_ORDER_MARK);
            let mark = if marked { BYTE_ORDER_MARK.len() as u64 } else { 0 };
            self.passing = Some(self.offset.saturating_add(mark));
        }
        self.passed = self.buffer.last().copied().unwrap_or(self.passed);
        self.offset = self.offset.saturating_add(self.buffer.len() as u64);
        self.buffer.clear();
        self.searched = 0;
    }

    /// Cuts the next line off the buffer, without its line feed; with the place where that began.
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
        // The last line may have no end.
        let last = self.ended && (!self.buffer.is_empty() || self.passing.is_some());
        last.then(|| {
            self.searched = 0;
            let line = self.buffer.split().freeze();
            self.offset = start.saturating_add(line.len() as u64);
            (start, line)
        })
    }

    fn judge(&mut self, start: u64, mut bytes: Bytes) -> Option<InputLine> {
        self.number = self.number.saturating_add(1);
        let number = self.number;
        if let Some(began) = self.passing.take() {
            let last = bytes.last().copied().unwrap_or(self.passed);
            let end =
                start.saturating_add(bytes.len() as u64).saturating_sub(u64::from(last == b'\r'));
            let range = began..end;
            let too_long = end.saturating_sub(began) > self.longest as u64;
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
        if bytes.len() > self.longest {
            return Some(InputLine::TooLong { number });
        }
        if bytes.len() > self.held {
            // It came in one piece, which is as large as whoever reads has it.
            return Some(InputLine::Large {
                number,
                range: began..began.saturating_add(bytes.len() as u64),
            });
        }
        (!is_blank(&bytes)).then_some(InputLine::Whole { number, at: began, bytes })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use proptest::prelude::*;

    use super::*;

    /// Each line as `number:text`, or `number!` where it is too long, from pieces of this many bytes.
    async fn read_holding(file: &[u8], longest: usize, held: usize, piece: usize) -> Vec<String> {
        let pieces: Vec<_> =
            file.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let mut lines = Lines::new(Box::pin(stream::iter(pieces)), longest, held);
        let mut found = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            assert!(
                lines.buffer.len() <= held + piece + 4,
                "it holds {} bytes",
                lines.buffer.len()
            );
            let shown =
                |number: u64, bytes: &[u8]| format!("{number}:{}", String::from_utf8_lossy(bytes));
            found.push(match line {
                InputLine::Whole { number, at, bytes } => {
                    let at = usize::try_from(at).unwrap();
                    assert_eq!(file[at..at + bytes.len()], bytes);
                    shown(number, &bytes)
                }
                InputLine::Large { number, range } => {
                    let bytes = &file[usize::try_from(range.start).unwrap()
                        ..usize::try_from(range.end).unwrap()];
                    assert!(bytes.len() > held);
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

    async fn read(file: &[u8], longest: usize, piece: usize) -> Vec<String> {
        read_holding(file, longest, 1000, piece).await
    }

    #[tokio::test]
    async fn lines_have_their_physical_numbers() {
        for piece in [1, 2, 3, 7, 100] {
            assert_eq!(
                read(b"\xef\xbb\xbfa\r\n\n  \t\nb\n\r\nc", 10, piece).await,
                ["1:a", "4:b", "6:c"],
                "{piece}"
            );
            assert_eq!(
                read(b"a\n\xef\xbb\xbfb\n", 10, piece).await,
                ["1:a", "2:\u{feff}b"],
                "{piece}"
            );
            assert_eq!(read(b"", 10, piece).await, [""; 0]);
            assert_eq!(read(b"\n\n", 10, piece).await, [""; 0]);
        }
    }

    #[tokio::test]
    async fn a_line_over_the_limit_is_passed_over_and_the_next_one_is_read() {
        for piece in [1, 2, 5, 100] {
            assert_eq!(
                read(b"12345\n123456\n12345\r\n1234567890123\nx", 5, piece).await,
                ["1:12345", "2!", "3:12345", "4!", "5:x"]
            );
            assert_eq!(read(b"1234567890123", 5, piece).await, ["1!"], "{piece}");
            assert_eq!(read(b"\xef\xbb\xbf12345\r\n", 5, piece).await, ["1:12345"], "{piece}");
        }
    }

    proptest! {
        #[test]
        fn where_a_file_is_cut_and_how_much_is_held_changes_nothing(
            mark in any::<bool>(), file in "[ab\r\n ]{0,60}", piece in 1_usize..20, longest in 1_usize..10, held in 0_usize..12,
        ) {
            let file = if mark { format!("\u{feff}{file}") } else { file };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let whole = runtime.block_on(read(file.as_bytes(), longest, 1000));
            let pieces = runtime.block_on(read_holding(file.as_bytes(), longest, held, piece));
            prop_assert_eq!(&whole, &pieces);
            let file = file.trim_start_matches('\u{feff}');
            let expected: Vec<String> = file.split('\n').enumerate().filter_map(|(index, line)| {
                let line = line.strip_suffix('\r').unwrap_or(line);
                if line.len() > longest { return Some(format!("{}!", index + 1)); }
                (!line.trim_matches([' ', '\t', '\r']).is_empty()).then(|| format!("{}:{line}", index + 1))
            }).collect();
            prop_assert_eq!(whole, expected);
        }
    }
}
