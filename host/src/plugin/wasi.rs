//! The empty world: what a component finds that was built with a language runtime and so imports WASI 0.2.
//!
//! No files, no environment, no arguments, no standard input, no sockets and no name resolution. Clocks and random numbers are real.
//! What it writes to standard output and error becomes lines of the log.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder};

use super::log::{PluginLog, Said};

pub struct EmptyWorld {
    pub ctx: WasiCtx,
    pub table: ResourceTable,
}

impl EmptyWorld {
    pub fn new(log: &Arc<PluginLog>, said: &Said) -> Self {
        let mut builder = WasiCtxBuilder::new();
        // Each denial is written out, so that no default of a later version opens a door.
        builder
            .allow_tcp(false)
            .allow_udp(false)
            .allow_ip_name_lookup(false)
            .socket_addr_check(|_, _| Box::pin(async { false }))
            .allow_blocking_current_thread(false)
            .max_random_size(1 << 20)
            .stdout(LogPipe { log: log.clone(), said: said.clone(), line: Arc::default() })
            .stderr(LogPipe { log: log.clone(), said: said.clone(), line: Arc::default() });
        Self { ctx: builder.build(), table: ResourceTable::new() }
    }
}

/// Bytes in, lines of the log out.
#[derive(Clone)]
struct LogPipe {
    log: Arc<PluginLog>,
    said: Said,
    /// What stands since the last line end; bounded by what the log takes of a line.
    line: Arc<Mutex<Vec<u8>>>,
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
                self.said.add(&text);
                self.log.write(tracing::Level::INFO, &text);
                line.clear();
            } else if line.len() <= PluginLog::LONGEST {
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
