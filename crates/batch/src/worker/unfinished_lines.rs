//! Unfinished lines of a batch: new lines from the input, in order, and deferred lines for a retry.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use batchwright_domain::clock::Timestamp;
use batchwright_store::{Claim, Result, Store};
use bytes::Bytes;
use tokio::sync::Semaphore;

use crate::formats::input::{Input, InputLine, Position};
use crate::formats::line::RequestLine;
use crate::schedule::parked::Checkpoint;
use crate::schedule::retry_queue::{Entry, RetryQueue, RetryState};

/// Number of recorded lines that are loaded from the store at a time.
const RECORDED_PAGE_SIZE: usize = 2000;

/// Unfinished line, with its retry state.
pub(crate) struct Candidate {
    /// Line number in the input file, from 1.
    pub number: u64,
    /// Offset of the line in the input file, in bytes.
    pub at: u64,
    /// Content of the line, or its range in the file.
    pub held: LineContent,
    /// Model that the line names, or `None` if the line is not parsed yet.
    pub model: Option<String>,
    /// Retry state.
    pub retry_state: RetryState,
}

/// Content of a line, or its range in the file.
pub(crate) enum LineContent {
    /// Content of the line.
    Loaded(Bytes),
    /// Byte range of the line in the input file.
    InFile(Range<u64>),
}

impl Candidate {
    /// Returns the size of the line, in bytes.
    pub(crate) fn size(&self) -> usize {
        match &self.held {
            LineContent::Loaded(bytes) => bytes.len(),
            LineContent::InFile(range) => {
                usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX)
            }
        }
    }

    /// Returns the byte range of the line in the input file.
    pub(crate) fn range(&self) -> Range<u64> {
        match &self.held {
            LineContent::Loaded(bytes) => self.at..self.at.saturating_add(bytes.len() as u64),
            LineContent::InFile(range) => range.clone(),
        }
    }

    /// Returns the position of the line in the input file.
    fn position(&self) -> Position {
        Position { lines: self.number.saturating_sub(1), bytes: self.at }
    }
}

/// Reader of the unfinished lines of a batch.
pub(crate) struct UnfinishedLines<'a> {
    input: Input,
    recorded: RecordedLines<'a>,
    /// Permits for requests in flight.
    pub window: Arc<Semaphore>,
    /// Retry queue of the batch.
    pub deferred: Arc<RetryQueue>,
    next: Option<Candidate>,
    /// Number of lines that an earlier execution has read. Only these may already be deferred.
    read_before: u64,
    /// Time before which no line of the input is taken.
    pub held_until: Option<Timestamp>,
    input_ended: bool,
    /// True if the batch uses several plugins, so that each line is parsed for its model.
    has_many_plugins: bool,
    /// Position of the first skipped line.
    first_skipped: Option<Position>,
}

impl<'a> UnfinishedLines<'a> {
    /// Creates a reader that continues from a saved state. `window` is the number of permits.
    pub(crate) fn new(
        store: &'a dyn Store,
        claim: &'a Claim,
        input: Input,
        from: Checkpoint,
        window: usize,
        has_many_plugins: bool,
    ) -> Self {
        let recorded = RecordedLines {
            store,
            claim,
            page: VecDeque::new(),
            last: from.position.lines,
            ended: false,
        };
        Self {
            input,
            recorded,
            window: Arc::new(Semaphore::new(window)),
            deferred: from.deferred,
            read_before: from.read_before,
            next: None,
            held_until: None,
            input_ended: false,
            has_many_plugins,
            first_skipped: None,
        }
    }

    /// Returns the next line that can be taken now, without taking it.
    ///
    /// If `is_healthy` is false, some breaker has suspicion. Untried lines then go before lines
    /// that have failed.
    pub(crate) async fn peek(
        &mut self,
        now: Timestamp,
        is_healthy: bool,
    ) -> Result<Option<&Candidate>> {
        if self.next.is_none() {
            self.next = self.find_next(now, is_healthy).await?;
        }
        Ok(self.next.as_ref())
    }

    /// Finds the next deferred line that is due, or the next line of the input without a result.
    async fn find_next(&mut self, now: Timestamp, is_healthy: bool) -> Result<Option<Candidate>> {
        let is_held = self.held_until.is_some_and(|until| until > now);
        if let Some(entry) = self.deferred.due(now, is_healthy || self.input_ended) {
            let (number, at, retry_state) = (entry.number, entry.range.start, entry.retry_state);
            return Ok(Some(Candidate {
                number,
                at,
                held: LineContent::InFile(entry.range),
                model: None,
                retry_state,
            }));
        }
        if is_held {
            return Ok(None);
        }
        self.held_until = None;
        while !self.input_ended {
            let (number, at, held) = match self.input.next().await? {
                None => {
                    self.input_ended = true;
                    break;
                }
                Some(InputLine::Buffered { number, at, bytes }) => {
                    (number, at, LineContent::Loaded(bytes))
                }
                Some(InputLine::Large { number, range }) => {
                    (number, range.start, LineContent::InFile(range))
                }
                Some(InputLine::TooLong { .. }) => continue,
            };
            if self.recorded.contains(number).await?
                || (number <= self.read_before && self.deferred.contains(number))
            {
                continue;
            }
            let model = match &held {
                LineContent::Loaded(bytes) if self.has_many_plugins => {
                    std::str::from_utf8(bytes).ok().and_then(|text| RequestLine::parse(text).model)
                }
                LineContent::Loaded(_) | LineContent::InFile(_) => None,
            };
            let model = model.map(std::borrow::Cow::into_owned);
            return Ok(Some(Candidate {
                number,
                at,
                held,
                model,
                retry_state: RetryState::default(),
            }));
        }
        Ok(None)
    }

    /// Takes the line that [`Self::peek`] has returned.
    pub(crate) fn take(&mut self) -> Option<Candidate> {
        self.next.take()
    }

    /// Returns the bytes of a line, or `None` if the line is blank.
    pub(crate) async fn read(&mut self, candidate: &Candidate) -> Result<Option<Bytes>> {
        match &candidate.held {
            // Copied, because the line shares the memory of a much larger chunk.
            LineContent::Loaded(bytes) => Ok(Some(Bytes::copy_from_slice(bytes))),
            LineContent::InFile(range) => self.input.large(range.clone()).await,
        }
    }

    /// Defers the next line if it has failed during an outage and untried lines are left.
    ///
    /// `failed_attempts` is the number of failed attempts of the line. Returns true if the line was
    /// deferred.
    pub(crate) fn is_behind_untried(&mut self, failed_attempts: u32) -> bool {
        let Some(line) = &self.next else { return false };
        if failed_attempts == 0 || line.retry_state.outage_failures > 0 || self.input_ended {
            return false;
        }
        let retry_state = RetryState { outage_failures: failed_attempts, ..line.retry_state };
        let entry = Entry {
            at: Timestamp::from_millis(0),
            number: line.number,
            range: line.range(),
            retry_state,
        };
        if self.deferred.add(entry).is_err() {
            return false;
        }
        self.next = None;
        true
    }

    /// Defers the next line until a time or until it is woken; returns false if there is no room.
    pub(crate) fn defer(&mut self, until: Timestamp) -> bool {
        let Some(line) = &self.next else { return false };
        let entry = Entry {
            at: until,
            number: line.number,
            range: line.range(),
            retry_state: RetryState { waits: true, ..line.retry_state },
        };
        let is_deferred = self.deferred.add(entry).is_ok();
        if is_deferred {
            self.next = None;
        }
        is_deferred
    }

    /// Skips the next line, which is found when the input is read again.
    pub(crate) fn skip(&mut self) {
        if let Some(candidate) = self.next.take() {
            self.record_skipped(candidate.position());
        }
    }

    /// Records the position of a skipped line, if it is the first one.
    fn record_skipped(&mut self, position: Position) {
        self.first_skipped = Some(self.first_skipped.map_or(position, |first| first.min(position)));
    }

    /// Returns true if every line has been taken, except skipped lines.
    pub(crate) fn is_at_end(&self) -> bool {
        self.input_ended && self.next.is_none() && self.deferred.next().is_none()
    }

    /// Returns true if lines were skipped.
    pub(crate) fn has_skipped(&self) -> bool {
        self.first_skipped.is_some()
    }

    /// Returns the time at which the next line can be taken, if that depends on time alone.
    pub(crate) fn due(&self) -> Option<Timestamp> {
        self.deferred.next().into_iter().chain(self.held_until.filter(|_| !self.input_ended)).min()
    }

    /// Returns the state from which a later execution can continue.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        let read_before = self.read_before.max(self.input.position().lines);
        Checkpoint { position: self.position(), deferred: self.deferred.clone(), read_before }
    }

    /// Returns the position from which a later execution can continue.
    ///
    /// If nothing is in flight, each line before the position has a result or is deferred.
    pub(crate) fn position(&self) -> Position {
        let next = self.next.as_ref().map_or_else(|| self.input.position(), Candidate::position);
        self.first_skipped.map_or(next, |first| first.min(next))
    }
}

/// Numbers of the lines that have a result, loaded from the store page by page.
struct RecordedLines<'a> {
    store: &'a dyn Store,
    claim: &'a Claim,
    /// Loaded numbers, in ascending order.
    page: VecDeque<u64>,
    /// Number after which the next page starts.
    last: u64,
    /// True if the last page is loaded.
    ended: bool,
}

impl RecordedLines<'_> {
    /// Returns true if a line has a result. Lines must be queried in ascending order.
    async fn contains(&mut self, line: u64) -> Result<bool> {
        loop {
            match self.page.front() {
                Some(recorded) if *recorded < line => drop(self.page.pop_front()),
                Some(recorded) => return Ok(*recorded == line),
                None if self.ended => return Ok(false),
                None => {
                    let page = self
                        .store
                        .recorded_lines(self.claim, self.last, RECORDED_PAGE_SIZE)
                        .await?;
                    self.ended = page.len() < RECORDED_PAGE_SIZE;
                    self.last = page.last().copied().unwrap_or(self.last);
                    self.page.extend(page);
                }
            }
        }
    }
}
