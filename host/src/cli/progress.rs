//! Progress display of a batch: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::cli::terminal::{errln, one_line};

/// Minimum time between two plain lines with the same status.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Progress display on standard error.
pub enum Progress {
    /// Bar on a terminal.
    Bar(ProgressBar),
    /// Plain lines, where standard error is not a terminal.
    Lines {
        /// Start of the display.
        started: Instant,
        /// Time of the last line.
        last: Instant,
        /// Requests done at the first update; not part of the rate.
        first_done: Option<u64>,
        /// Status in the last line.
        status: String,
    },
}

impl Progress {
    /// Creates a bar if standard error is a terminal, plain lines otherwise.
    pub fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            let now = Instant::now();
            return Self::Lines {
                started: now,
                last: now,
                first_done: None,
                status: String::new(),
            };
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(
            "{msg:12} {wide_bar} {human_pos}/{human_len} {rate:>8} {eta:>4} left",
        );
        if let Ok(style) = style {
            let rate = |state: &ProgressState, to: &mut dyn std::fmt::Write| {
                write!(to, "{:.0}/s", state.per_sec()).ok();
            };
            bar.set_style(style.with_key("rate", rate));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self::Bar(bar)
    }

    /// Updates the display.
    ///
    /// `done` counts completed and failed requests. `waiting` is the cause if the batch waits.
    pub fn show(
        &mut self,
        new_status: &str,
        done: u64,
        failed: u64,
        total: u64,
        waiting: Option<&str>,
    ) {
        let failures = if failed == 0 { String::new() } else { format!(", {failed} failed") };
        match self {
            Self::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                let message = match waiting {
                    Some(waiting) => format!("waiting{failures}: {waiting}"),
                    None => format!("{new_status}{failures}"),
                };
                // The bar does not write through `terminal`, and the texts come from a server.
                bar.set_message(one_line(&message));
            }
            Self::Lines { started, last, first_done, status } => {
                // Requests that an earlier run completed do not count for the rate of this run.
                let first = *first_done.get_or_insert(done);
                let new_status = if waiting.is_some() { "waiting" } else { new_status };
                if status == new_status && last.elapsed() < LINE_INTERVAL {
                    return;
                }
                *last = Instant::now();
                new_status.clone_into(status);
                if let Some(waiting) = waiting {
                    errln!("waiting: {waiting} ({done} of {total} done{failures})");
                    return;
                }
                if total == 0 {
                    errln!("{new_status}");
                    return;
                }
                let rate =
                    done.saturating_sub(first) as f64 / started.elapsed().as_secs_f64().max(0.001);
                let left = if rate > 0.0 && done < total {
                    format!(", {:.0} s left", (total.saturating_sub(done)) as f64 / rate)
                } else {
                    String::new()
                };
                errln!("{new_status}: {done} of {total} done{failures}, {rate:.0}/s{left}");
            }
        }
    }

    /// Returns a message with the cause of a wait and the seconds until the next attempt.
    pub fn waiting_message(cause: &str, left: u64) -> String {
        let cause = cause.trim_end_matches('.');
        match left {
            0 => format!("{cause}, retrying now"),
            left => format!("{cause}, next attempt in {left} s"),
        }
    }

    /// Removes the bar from the terminal.
    pub fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
