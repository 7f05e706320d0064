//! An input file as lines, of which it holds one and a piece at a time.

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::store::Result;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A line that is not blank, with its physical number from 1.
#[derive(Debug, PartialEq, Eq)]
pub enum InputLine {
    /// Without its end, and without a byte order mark.
    Whole { number: u64, bytes: Bytes },
    /// Longer than the limit.
    TooLong { number: u64 },
}

/// Splits a stream of bytes into lines.
pub struct Lines {
    stream: BoxStream<'static, Result<Bytes>>,
    buffer: BytesMut,
    /// How much of the buffer holds no line end.
    searched: usize,
    number: u64,
    longest: usize,
    /// The rest of this line is passed over: it is too long.
    skipping: bool,
    ended: bool,
}

impl Lines {
    pub fn new(stream: BoxStream<'static, Result<Bytes>>, longest: usize) -> Self {
        Self { stream, buffer: BytesMut::new(), searched: 0, number: 0, longest, skipping: false, ended: false }
    }

    /// The next line that is not blank.
    pub async fn next(&mut self) -> Result<Option<InputLine>> {
        loop {
            if let Some(line) = self.take_line() {
                if let Some(line) = self.judge(line) {
                    return Ok(Some(line));
                }
                continue;
            }
            if self.ended {
                return Ok(None);
            }
            if self.buffer.len() > self.longest.saturating_add(BYTE_ORDER_MARK.len() + 1) {
                self.skipping = true;
                self.buffer.clear();
                self.searched = 0;
            }
            match self.stream.next().await {
                Some(piece) => {
                    let piece = piece?;
                    self.buffer.extend_from_slice(&piece);
                }
                None => self.ended = true,
            }
        }
    }

    /// Cuts the next line off the buffer, without its line feed.
    fn take_line(&mut self) -> Option<Bytes> {
        let unsearched = self.buffer.get(self.searched..).unwrap_or_default();
        if let Some(at) = memchr::memchr(b'\n', unsearched) {
            let line = self.buffer.split_to(self.searched.saturating_add(at)).freeze();
            self.buffer.advance(1);
            self.searched = 0;
            return Some(line);
        }
        self.searched = self.buffer.len();
        // The last line may have no end.
        let last = self.ended && (!self.buffer.is_empty() || self.skipping);
        last.then(|| {
            self.searched = 0;
            self.buffer.split().freeze()
        })
    }

    fn judge(&mut self, mut bytes: Bytes) -> Option<InputLine> {
        self.number = self.number.saturating_add(1);
        let number = self.number;
        if std::mem::take(&mut self.skipping) {
            return Some(InputLine::TooLong { number });
        }
        if number == 1 && bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.advance(BYTE_ORDER_MARK.len());
        }
        if bytes.ends_with(b"\r") {
            bytes.truncate(bytes.len().saturating_sub(1));
        }
        if bytes.len() > self.longest {
            return Some(InputLine::TooLong { number });
        }
        let blank = bytes.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'));
        (!blank).then_some(InputLine::Whole { number, bytes })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use proptest::prelude::*;

    use super::*;

    /// Each line as `number:text`, or `number!` where it is too long, from pieces of this many bytes.
    async fn read(file: &[u8], longest: usize, piece: usize) -> Vec<String> {
        let pieces: Vec<_> = file.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let mut lines = Lines::new(Box::pin(stream::iter(pieces)), longest);
        let mut found = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            found.push(match line {
                InputLine::Whole { number, bytes } => format!("{number}:{}", String::from_utf8_lossy(&bytes)),
                InputLine::TooLong { number } => format!("{number}!"),
            });
        }
        found
    }

    #[tokio::test]
    async fn lines_have_their_physical_numbers() {
        for piece in [1, 2, 3, 7, 100] {
            assert_eq!(read(b"\xef\xbb\xbfa\r\n\n  \t\nb\n\r\nc", 10, piece).await, ["1:a", "4:b", "6:c"], "{piece}");
            assert_eq!(read(b"a\n\xef\xbb\xbfb\n", 10, piece).await, ["1:a", "2:\u{feff}b"], "{piece}");
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
        fn where_a_file_is_cut_into_pieces_changes_nothing(file in "[ab\r\n ]{0,60}", piece in 1_usize..20, longest in 1_usize..10) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let whole = runtime.block_on(read(file.as_bytes(), longest, 1000));
            let pieces = runtime.block_on(read(file.as_bytes(), longest, piece));
            prop_assert_eq!(&whole, &pieces);
            let expected: Vec<String> = file.split('\n').enumerate().filter_map(|(index, line)| {
                let line = line.strip_suffix('\r').unwrap_or(line);
                if line.len() > longest { return Some(format!("{}!", index + 1)); }
                (!line.trim_matches([' ', '\t', '\r']).is_empty()).then(|| format!("{}:{line}", index + 1))
            }).collect();
            prop_assert_eq!(whole, expected);
        }
    }
}
