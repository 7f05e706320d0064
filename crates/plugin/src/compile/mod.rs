//! Compilation of components, in a process of its own with limits of time and memory.
//!
//! **Threat.** A component comes from a stranger. The component's bytes can keep a compiler busy
//! for hours, ask for all memory, overflow the stack, or exploit a bug in the compiler and run code
//! in it. In the server's process each of these would stop or take over the server.
//!
//! **Layers.**
//! - *Process.* The host starts its own program with a hidden command. The component goes in by
//!   standard input, compiled code comes out by standard output, errors by standard error. The
//!   server's environment, which may hold secrets, is not passed on. The process has a process
//!   group of its own.
//! - *Limits.* The host kills the process after `compile_timeout`. The process itself sets hard
//!   limits of memory (`compile_memory`), CPU time and output before it reads the component. The
//!   process dies with its parent, so no compiler outlives the server.
//! - *Sandbox.* Before it reads the component, the process gives up files, network, other
//!   processes and all system calls that compiling does not need: see `sandbox`. Limits and sandbox
//!   exist on Linux only.
//! - *Priority.* The process runs at a low priority, and only as many run at a time as there are
//!   threads, so batches keep their throughput.
//!
//! **Trust.** The server runs the compiled code. The sandbox therefore protects the host's secrets
//! from a compiler that was taken over, but not the server from code that such a compiler wrote.
//! Only output of this process enters the cache: see [`crate::compile::cache`].
//!
//! **Repeated work.** A component is compiled once: callers that ask for the same component wait
//! for the same process, which continues if its callers are canceled. A failure that the component
//! caused is cached for some minutes, because each change in the plugin directory asks for all
//! components again. A failure of the host, such as a full disk, is not cached.

mod process;
pub use process::Process;

pub(crate) mod cache;
#[cfg(target_os = "linux")]
mod confinement;

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use batchwright_domain::units::{Size, Span};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::Semaphore;
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::compile::cache::Cache;
use crate::compile::process::{EXIT_HOST_ERROR, EXIT_INVALID_COMPONENT, EXIT_OUT_OF_MEMORY};
use crate::sandbox::engine::EngineKind;

/// Hidden command that runs the compiler process.
pub const COMMAND: &str = "compile-component";

/// Bytes of the compiler's standard error that are read.
const MAX_STDERR_BYTES: u64 = 4000;

/// Prefix of a line on standard error that names a sandbox layer which this system lacks.
pub(crate) const MISSING_LAYER_PREFIX: &str = "missing layer: ";

/// Lifetime of a cached failure. A component is not compiled again before.
const FAILURE_TTL: Duration = Duration::from_secs(300);
/// Number of cached failures.
const MAX_CACHED_FAILURES: usize = 1000;

/// Compiler of components, with a cache of compiled code.
pub struct Compiler(Arc<Inner>);

struct Inner {
    cache: Cache,
    /// Permits for compiler processes, one for each thread of the machine.
    permits: Semaphore,
    /// Components in use, by cache path. Plugins of one component share its code.
    in_use: Mutex<HashMap<PathBuf, Weak<Component>>>,
    /// Compilations in flight, by cache path. A compilation continues when its callers are
    /// canceled, and the next caller waits for its result.
    in_flight: Mutex<HashMap<PathBuf, InFlight>>,
    /// Cached failures by SHA-256, with time and message.
    failures: Mutex<HashMap<String, (Instant, String)>>,
    /// Program that implements [`COMMAND`], normally the running one.
    program: PathBuf,
    timeout: Span,
    memory: Size,
    missing_layers_logged: Once,
}

type InFlight = Shared<BoxFuture<'static, Result<Component, String>>>;

/// Error of a compilation, with its message.
enum Failure {
    /// Fault of the component. The failure is cached.
    Component(String),
    /// Fault of the host, such as a full disk. The next caller tries again.
    Host(String),
}

impl Compiler {
    /// Creates a compiler that runs `program`, or the running program if `program` is `None`.
    pub fn new(cache: Cache, program: Option<PathBuf>, timeout: Span, memory: Size) -> Self {
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self(Arc::new(Inner {
            cache,
            permits: Semaphore::new(threads),
            in_use: Mutex::default(),
            in_flight: Mutex::default(),
            failures: Mutex::default(),
            program: program.unwrap_or_else(running_program),
            timeout,
            memory,
            missing_layers_logged: Once::new(),
        }))
    }

    /// Returns the component with this SHA-256, compiled for `engine`.
    ///
    /// The component is shared with a plugin that uses it, loaded from the cache, or compiled from
    /// `bytes`. An error is a message for the operator.
    pub async fn component(
        &self,
        engine: &Engine,
        engine_kind: EngineKind,
        sha256: &str,
        bytes: &Arc<Vec<u8>>,
    ) -> Result<Arc<Component>, String> {
        let path = self.0.cache.path(engine, sha256);
        let in_use = || self.0.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(component) = in_use().get(&path).and_then(Weak::upgrade) {
            return Ok(component);
        }
        let component =
            Arc::new(self.load(engine, engine_kind, sha256, bytes, path.clone()).await?);
        let mut in_use = in_use();
        in_use.retain(|_, component| component.strong_count() > 0);
        // Another task may have loaded the same component in the meantime.
        let shared = in_use.get(&path).and_then(Weak::upgrade);
        Ok(shared.unwrap_or_else(|| {
            in_use.insert(path, Arc::downgrade(&component));
            component
        }))
    }

    async fn load(
        &self,
        engine: &Engine,
        engine_kind: EngineKind,
        sha256: &str,
        bytes: &Arc<Vec<u8>>,
        path: PathBuf,
    ) -> Result<Component, String> {
        let (inner, for_engine, from) = (self.0.clone(), engine.clone(), path.clone());
        let cached =
            tokio::task::spawn_blocking(move || inner.cache.load(&for_engine, &from)).await;
        if let Ok(Some(component)) = cached {
            return Ok(component);
        }
        if let Some(message) = self.0.recent_failure(sha256) {
            return Err(message);
        }
        let in_flight = {
            let mut all = self.0.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
            let (inner, engine, sha256, bytes) =
                (self.0.clone(), engine.clone(), sha256.to_owned(), bytes.clone());
            let target = path.clone();
            let start = || {
                let work = tokio::spawn(async move {
                    inner.compile(engine, engine_kind, sha256, bytes, target).await
                });
                let flatten = |joined: Result<_, tokio::task::JoinError>| {
                    joined.unwrap_or_else(|error| Err(format!("the compiler failed: {error}")))
                };
                work.map(flatten).boxed().shared()
            };
            all.entry(path).or_insert_with(start).clone()
        };
        in_flight.await
    }
}

impl Inner {
    async fn compile(
        self: Arc<Self>,
        engine: Engine,
        engine_kind: EngineKind,
        sha256: String,
        bytes: Arc<Vec<u8>>,
        path: PathBuf,
    ) -> Result<Component, String> {
        let permit = self.permits.acquire().await;
        let compiled = self.compile_to_cache(&engine, engine_kind, &bytes, &path).await;
        drop(permit);
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner).remove(&path);
        compiled.map_err(|failure| match failure {
            Failure::Host(message) => message,
            Failure::Component(message) => {
                self.record_failure(&sha256, &message);
                message
            }
        })
    }

    /// Runs the compiler process and moves its output into the cache.
    async fn compile_to_cache(
        self: &Arc<Self>,
        engine: &Engine,
        engine_kind: EngineKind,
        bytes: &[u8],
        path: &Path,
    ) -> Result<Component, Failure> {
        let no_output = |error: std::io::Error| {
            Failure::Host(format!("the file for its compiled code cannot be created: {error}"))
        };
        let output = self.cache.output().map_err(no_output)?;
        self.run(engine_kind, bytes, output.writer().map_err(no_output)?).await?;
        let (inner, engine, path) = (self.clone(), engine.clone(), path.to_owned());
        let stored =
            tokio::task::spawn_blocking(move || inner.cache.store(&engine, output, &path)).await;
        stored.map_err(|error| Failure::Host(error.to_string()))?.map_err(|error| {
            let error = format!("{error:#}");
            if error.contains("pooling allocator") {
                Failure::Component(format!(
                    "exceeds the host's limits of memories, tables or instances: {error}"
                ))
            } else {
                Failure::Host(format!(
                    "its compiled code does not load: {error}{}",
                    exec_hint(&error)
                ))
            }
        })
    }

    fn recent_failure(&self, sha256: &str) -> Option<String> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, message) = failures.get(sha256)?;
        (since.elapsed() < FAILURE_TTL).then(|| message.clone())
    }

    fn record_failure(&self, sha256: &str, message: &str) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.retain(|_, (since, _)| since.elapsed() < FAILURE_TTL);
        if failures.len() < MAX_CACHED_FAILURES {
            failures.insert(sha256.to_owned(), (Instant::now(), message.to_owned()));
        }
    }

    /// Runs the compiler process with the component as input and `output` as output.
    async fn run(
        &self,
        engine_kind: EngineKind,
        bytes: &[u8],
        output: std::fs::File,
    ) -> Result<(), Failure> {
        let failed = |error: std::io::Error| {
            Failure::Host(format!("the compiler process does not start: {error}"))
        };
        let mut command = Command::new(&self.program);
        command.arg(COMMAND).args(["--memory", &self.memory.bytes().to_string()]);
        // Limit of CPU time over all threads, in case this process ends before the timeout.
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
        let seconds = self.timeout.duration().as_secs().saturating_add(10).saturating_mul(threads);
        command.args([
            "--seconds",
            &seconds.to_string(),
            "--parent",
            &std::process::id().to_string(),
        ]);
        if engine_kind == EngineKind::Concurrent {
            command.arg("--concurrent");
        }
        command.stdin(Stdio::piped()).stdout(output).stderr(Stdio::piped()).kill_on_drop(true);
        // The environment may hold the operator's secrets.
        command.env_clear().env("RAYON_NUM_THREADS", threads.to_string());
        // A process group of its own: an interrupt at the terminal must reach only the server.
        command.process_group(0);
        let mut child = command.spawn().map_err(failed)?;
        let (mut stdin, stderr) = (child.stdin.take(), child.stderr.take());
        let work = async {
            if let Some(stdin) = &mut stdin {
                // A process that ended early reports the cause on standard error.
                stdin.write_all(bytes).await.ok();
            }
            drop(stdin);
            let mut errors = Vec::new();
            if let Some(stderr) = stderr {
                stderr.take(MAX_STDERR_BYTES).read_to_end(&mut errors).await.ok();
            }
            (child.wait().await, errors)
        };
        // Dropping `work` kills the process.
        let ended = tokio::time::timeout(self.timeout.duration(), work).await;
        let Ok((status, errors)) = ended else {
            return Err(Failure::Component(format!(
                "compiling takes longer than {}; \
                 make the component smaller, or raise the setting compile_timeout",
                self.timeout
            )));
        };
        let errors = self.component_errors(&String::from_utf8_lossy(&errors));
        match status.map_err(failed)? {
            status if status.success() => Ok(()),
            status if status.code() == Some(i32::from(EXIT_INVALID_COMPONENT)) => {
                Err(Failure::Component(format!(
                    "is not a component that can be compiled: {errors}; it may be damaged, \
                     truncated, or built with features that this version does not support"
                )))
            }
            status if status.code() == Some(i32::from(EXIT_HOST_ERROR)) => {
                Err(Failure::Host(format!("the compiler process failed: {errors}")))
            }
            status if status.signal() == Some(libc::SIGSYS) => Err(Failure::Component(
                "caused a system call that compiling never needs, and the compiler was killed; \
                 do not load this component"
                    .into(),
            )),
            status if status.signal() == Some(libc::SIGXFSZ) => Err(Failure::Component(
                "compiles to more than 1 GiB of code; make the component smaller".into(),
            )),
            status => {
                let cause = if status.code() == Some(i32::from(EXIT_OUT_OF_MEMORY)) {
                    "out of memory".into()
                } else {
                    status.to_string()
                };
                Err(Failure::Component(format!(
                    "compiling failed ({cause}); \
                     it may need more memory than {}, the setting compile_memory",
                    self.memory
                )))
            }
        }
    }

    /// Returns the errors about the component. Lines about the sandbox are logged once per process.
    fn component_errors(&self, stderr: &str) -> String {
        let missing: Vec<&str> =
            stderr.lines().filter_map(|line| line.strip_prefix(MISSING_LAYER_PREFIX)).collect();
        if !missing.is_empty() {
            self.missing_layers_logged.call_once(|| {
                for layer in &missing {
                    tracing::warn!(layer, "compiler sandbox lacks a layer");
                }
            });
        }
        stderr
            .lines()
            .filter(|line| !line.starts_with(MISSING_LAYER_PREFIX))
            .collect::<Vec<_>>()
            .join("\n")
            .trim_end()
            .to_owned()
    }
}

/// Returns the remedy for a system that forbids a process to run code that it has compiled.
fn exec_hint(error: &str) -> &'static str {
    let denials = ["Operation not permitted", "Permission denied", "os error 1)", "os error 13)"];
    if denials.iter().any(|denial| error.contains(denial)) {
        "; the system forbids this process to run code that it has compiled: \
         set MemoryDenyWriteExecute=no in the systemd unit, or allow execmem in SELinux"
    } else {
        ""
    }
}

/// Returns the running program. The path stays valid after the file was replaced.
fn running_program() -> PathBuf {
    let linux = PathBuf::from("/proc/self/exe");
    if linux.exists() { linux } else { std::env::current_exe().unwrap_or(linux) }
}
