//! How a batch is coming along: a bar on a terminal, plain lines elsewhere.

use crate::cli::terminal::{plain, say};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

/// How often a plain line is printed.
const LINE: Duration = Duration::from_secs(5);

pub enum Progress {
    Bar(ProgressBar),
    Lines { begun: Instant, last: Instant, first_done: Option<u64>, status: String },
}

impl Progress {
    pub fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            let now = Instant::now();
            return Self::Lines { begun: now, last: now, first_done: None, status: String::new() };
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

    /// Shows how far it is, and what it waits for, if it waits.
    pub fn show(
        &mut self,
        now_status: &str,
        done: u64,
        failed: u64,
        total: u64,
        waits: Option<&str>,
    ) {
        let failures = if failed == 0 { String::new() } else { format!(", {failed} failed") };
        match self {
            Self::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(match waits {
                    Some(waits) => plain(&format!("waiting{failures}: {waits}")),
                    None => format!("{now_status}{failures}"),
                });
            }
            Self::Lines { begun, last, first_done, status } => {
                // What a former run did says nothing of this one's rate.
                let first = *first_done.get_or_insert(done);
                let now_status = if waits.is_some() { "waiting" } else { now_status };
                if status == now_status && last.elapsed() < LINE {
                    return;
                }
                *last = Instant::now();
                now_status.clone_into(status);
                if let Some(waits) = waits {
                    say!("waiting: {waits} ({done} of {total} done{failures})");
                    return;
                }
                if total == 0 {
                    say!("{now_status}");
                    return;
                }
                let rate =
                    done.saturating_sub(first) as f64 / begun.elapsed().as_secs_f64().max(0.001);
                let left = if rate > 0.0 && done < total {
                    format!(", {:.0} s left", (total.saturating_sub(done)) as f64 / rate)
                } else {
                    String::new()
                };
                say!("{now_status}: {done} of {total} done{failures}, {rate:.0}/s{left}");
            }
        }
    }

    /// What something waits for, in words: the cause without its full stop, and the time in seconds until it is tried again.
    pub fn waiting(cause: &str, left: u64) -> String {
        let cause = cause.trim_end_matches('.');
        match left {
            0 => format!("{cause}, being tried again"),
            left => format!("{cause}, next try in {left} s"),
        }
    }

    pub fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
