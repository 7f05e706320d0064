//! Empty world: an implementation of WASI without capabilities.
//!
//! A component that was built with a language runtime imports WASI even if the component's own code
//! uses none of it. The empty world satisfies those imports and grants nothing: no files, no
//! environment, no arguments, no standard input, no sockets, no name resolution. Clocks and random
//! numbers are real. Output to standard output and standard error becomes lines of the log.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder};

use crate::sandbox::log::{PluginLog, RecentOutput};

/// WASI context of one instance, without capabilities.
pub(crate) struct EmptyWorld {
    /// Context that wasmtime's WASI functions read.
    pub ctx: WasiCtx,
    /// Handles that the guest holds.
    pub table: ResourceTable,
}

impl EmptyWorld {
    /// Builds a context whose output goes to `log` and `output`.
    pub(crate) fn new(log: &Arc<PluginLog>, output: &RecentOutput) -> Self {
        let mut builder = WasiCtxBuilder::new();
        // Each denial is explicit, so that no default of a later version grants a capability.
        builder
            .allow_tcp(false)
            .allow_udp(false)
            .allow_ip_name_lookup(false)
            .socket_addr_check(|_, _| Box::pin(async { false }))
            .allow_blocking_current_thread(false)
            .max_random_size(1 << 20)
            .stdout(LogPipe::new(log, output))
            .stderr(LogPipe::new(log, output));
        Self { ctx: builder.build(), table: ResourceTable::new() }
    }
}

/// Output stream whose lines go to the log.
#[derive(Clone)]
struct LogPipe {
    log: Arc<PluginLog>,
    output: RecentOutput,
    /// Bytes since the last line end, bounded by the longest line of the log.
    line: Arc<Mutex<Vec<u8>>>,
}

impl LogPipe {
    fn new(log: &Arc<PluginLog>, output: &RecentOutput) -> Self {
        Self { log: log.clone(), output: output.clone(), line: Arc::default() }
    }
}

impl IsTerminal for LogPipe {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for LogPipe {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }
}

impl AsyncWrite for LogPipe {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if *byte == b'\n' {
                let text = String::from_utf8_lossy(&line);
                self.output.add(&text);
                self.log.write(tracing::Level::INFO, &text);
                line.clear();
            } else if line.len() <= PluginLog::MAX_LINE_CHARS {
                line.push(*byte);
            }
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
