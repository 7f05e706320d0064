//! The lines of a batch that have no result yet: those of the input, in order, and those that are to be tried again.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::Batches;
use super::deferred::{Deferred, Entry, Tries};
use super::input::{Input, InputLine, Position};
use super::line::RequestLine;
use super::rests::Kept;
use crate::clock::Timestamp;
use crate::store::{Claim, Result};

/// Numbers of recorded lines held at a time.
const RECORDED: usize = 2000;

/// A line, with what became of it before.
pub struct Candidate {
    pub number: u64,
    pub at: u64,
    pub held: Held,
    /// The model it names, if it has been read.
    pub model: Option<String>,
    pub tries: Tries,
}

/// A line, or where it is.
pub enum Held {
    Here(Bytes),
    InFile(Range<u64>),
}

impl Candidate {
    pub fn size(&self) -> usize {
        match &self.held {
            Held::Here(bytes) => bytes.len(),
            Held::InFile(range) => {
                usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX)
            }
        }
    }

    pub fn range(&self) -> Range<u64> {
        match &self.held {
            Held::Here(bytes) => self.at..self.at.saturating_add(bytes.len() as u64),
            Held::InFile(range) => range.clone(),
        }
    }

    fn position(&self) -> Position {
        Position { lines: self.number.saturating_sub(1), bytes: self.at }
    }
}

pub struct LinesToDo<'a> {
    input: Input,
    done: RecordedLines<'a>,
    pub window: Arc<Semaphore>,
    pub deferred: Arc<Deferred>,
    next: Option<Candidate>,
    /// Lines that were read before may be among the deferred ones: up to this number.
    read_before: u64,
    /// No line of the input is taken before.
    pub held_until: Option<Timestamp>,
    ended: bool,
    /// Lines go to more than one plugin, so that each is looked into.
    many: bool,
    /// The first line that was passed over without being remembered.
    passed_over: Option<Position>,
}

impl<'a> LinesToDo<'a> {
    pub fn new(
        batches: &'a Batches,
        claim: &'a Claim,
        input: Input,
        from: Kept,
        window: usize,
        many: bool,
    ) -> Self {
        let done = RecordedLines {
            batches,
            claim,
            known: VecDeque::new(),
            last: from.position.lines,
            ended: false,
        };
        Self {
            input,
            done,
            window: Arc::new(Semaphore::new(window)),
            deferred: from.deferred,
            read_before: from.read_before,
            next: None,
            held_until: None,
            ended: false,
            many,
            passed_over: None,
        }
    }

    /// The next line that can be taken now; it stays the next until it is taken. While there is trouble, lines that were not tried yet go
    /// before those that were.
    pub async fn peek(&mut self, now: Timestamp, calm: bool) -> Result<Option<&Candidate>> {
        if self.next.is_none() {
            self.next = self.find(now, calm).await?;
        }
        Ok(self.next.as_ref())
    }

    async fn find(&mut self, now: Timestamp, calm: bool) -> Result<Option<Candidate>> {
        let held = self.held_until.is_some_and(|until| until > now);
        if let Some(entry) = self.deferred.due(now, calm || self.ended) {
            let (number, at, tries) = (entry.number, entry.range.start, entry.tries);
            return Ok(Some(Candidate {
                number,
                at,
                held: Held::InFile(entry.range),
                model: None,
                tries,
            }));
        }
        if held {
            return Ok(None);
        }
        self.held_until = None;
        while !self.ended {
            let (number, at, held) = match self.input.next().await? {
                None => {
                    self.ended = true;
                    break;
                }
                Some(InputLine::Whole { number, at, bytes }) => (number, at, Held::Here(bytes)),
                Some(InputLine::Large { number, range }) => {
                    (number, range.start, Held::InFile(range))
                }
                Some(InputLine::TooLong { .. }) => continue,
            };
            if self.done.contains(number).await?
                || (number <= self.read_before && self.deferred.contains(number))
            {
                continue;
            }
            let model = match &held {
                Held::Here(bytes) if self.many => {
                    std::str::from_utf8(bytes).ok().and_then(|text| RequestLine::parse(text).model)
                }
                Held::Here(_) | Held::InFile(_) => None,
            };
            let model = model.map(std::borrow::Cow::into_owned);
            return Ok(Some(Candidate { number, at, held, model, tries: Tries::default() }));
        }
        Ok(None)
    }

    pub fn take(&mut self) -> Option<Candidate> {
        self.next.take()
    }

    /// The bytes of a line; none if it is blank.
    pub async fn read(&mut self, candidate: &Candidate) -> Result<Option<Bytes>> {
        match &candidate.held {
            // A copy: the line shares the piece it was read in, which is much larger.
            Held::Here(bytes) => Ok(Some(Bytes::copy_from_slice(bytes))),
            Held::InFile(range) => self.input.large(range.clone()).await,
        }
    }

    /// Whether the next line was tried in vain so often, and has to wait behind those of the input that were not; it does then.
    pub fn is_behind_untried(&mut self, in_vain: u32) -> bool {
        let Some(line) = &self.next else { return false };
        if in_vain == 0 || line.tries.in_vain > 0 || self.ended {
            return false;
        }
        let tries = Tries { in_vain, ..line.tries };
        let entry = Entry {
            at: Timestamp::from_millis(0),
            number: line.number,
            range: line.range(),
            tries,
        };
        if self.deferred.add(entry).is_err() {
            return false;
        }
        self.next = None;
        true
    }

    /// Leaves the next line for a later reading of the input.
    pub fn pass_over(&mut self) {
        if let Some(candidate) = self.next.take() {
            self.forget(candidate.position());
        }
    }

    /// Takes note that a line is not remembered, and has no result.
    fn forget(&mut self, position: Position) {
        self.passed_over = Some(self.passed_over.map_or(position, |known| known.min(position)));
    }

    /// Whether every line has been taken, those aside that were passed over.
    pub fn is_at_end(&self) -> bool {
        self.ended && self.next.is_none() && self.deferred.next().is_none()
    }

    /// Whether lines were passed over.
    pub fn has_passed_over(&self) -> bool {
        self.passed_over.is_some()
    }

    /// When the next line can be taken, as far as that is a matter of time.
    pub fn due(&self) -> Option<Timestamp> {
        self.deferred.next().into_iter().chain(self.held_until.filter(|_| !self.ended)).min()
    }

    /// Where to go on another time.
    pub fn kept(&self) -> Kept {
        let read_before = self.read_before.max(self.input.position().lines);
        Kept { position: self.position(), deferred: self.deferred.clone(), read_before }
    }

    /// Where to begin another time: every line before has a result, or is deferred, as long as nothing is under way.
    pub fn position(&self) -> Position {
        let next = self.next.as_ref().map_or_else(|| self.input.position(), Candidate::position);
        self.passed_over.map_or(next, |passed_over| passed_over.min(next))
    }
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
                    let page =
                        self.batches.store.recorded_lines(self.claim, self.last, RECORDED).await?;
                    self.ended = page.len() < RECORDED;
                    self.last = page.last().copied().unwrap_or(self.last);
                    self.known.extend(page);
                }
            }
        }
    }
}
