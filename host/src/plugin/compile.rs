//! Compiles components in a process of its own, which is held to time and memory and ended when it goes past them.
//!
//! A component from a stranger can make a compiler work for hours or ask for all the memory there is; here it costs the host nothing but
//! its own loading. The process runs at a low priority, so that batches do not feel it, and in a sandbox ([`super::sandbox`]).

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use rustix::process::nice;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::Semaphore;
use wasmtime::Engine;
use wasmtime::component::Component;

use super::cache::Cache;
use super::engine::{self, Flavour};
use super::files::MOST_COMPONENT;
use crate::config::{Size, Span};

/// The hidden command that the process is started with.
pub const COMMAND: &str = "compile-component";

/// What of the compiler's complaint is shown, in bytes.
const LONGEST_COMPLAINT: u64 = 4000;

/// How a line begins that names a layer of the sandbox which this system does not have.
const MISSING: &str = "missing layer: ";

/// How long a component that could not be compiled is not tried again, and how many of them are remembered.
const REST: Duration = Duration::from_secs(300);
const REMEMBERED: usize = 1000;

pub struct Compiler(Arc<Inner>);

struct Inner {
    cache: Cache,
    /// Compilers at a time.
    permits: Semaphore,
    /// Components that plugins use, by where their compiled form is kept: plugins of one component share its code.
    in_use: Mutex<HashMap<PathBuf, Weak<Component>>>,
    /// What is being compiled, by where it will be kept. It goes on when nobody waits any more: whoever asks next finds it.
    running: Mutex<HashMap<PathBuf, Running>>,
    /// By SHA-256: when a component could not be compiled, and why. Every change in the plugin directory asks for it again.
    failures: Mutex<HashMap<String, (Instant, String)>>,
    /// The program that has `COMMAND`: this one.
    program: PathBuf,
    timeout: Span,
    memory: Size,
    told_missing: Once,
}

type Running = Shared<BoxFuture<'static, Result<Component, String>>>;

/// Why nothing was compiled: because of the component, or of what there is to compile it with.
enum Failure {
    Component(String),
    Passing(String),
}

impl Compiler {
    pub fn new(cache: Cache, program: Option<PathBuf>, timeout: Span, memory: Size) -> Self {
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self(Arc::new(Inner {
            cache,
            permits: Semaphore::new(threads),
            in_use: Mutex::default(),
            running: Mutex::default(),
            failures: Mutex::default(),
            program: program.unwrap_or_else(this_program),
            timeout,
            memory,
            told_missing: Once::new(),
        }))
    }

    /// The compiled form of a component whose SHA-256 is `sha256`: one that is in use, from the cache, or compiled now.
    pub async fn component(
        &self,
        engine: &Engine,
        flavour: Flavour,
        sha256: &str,
        bytes: &Arc<Vec<u8>>,
    ) -> Result<Arc<Component>, String> {
        let path = self.0.cache.path(engine, sha256);
        let in_use = || self.0.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(component) = in_use().get(&path).and_then(Weak::upgrade) {
            return Ok(component);
        }
        let component = Arc::new(self.load(engine, flavour, sha256, bytes, path.clone()).await?);
        let mut in_use = in_use();
        in_use.retain(|_, component| component.strong_count() > 0);
        // Another plugin may have loaded the same one meanwhile.
        let known = in_use.get(&path).and_then(Weak::upgrade);
        Ok(known.unwrap_or_else(|| {
            in_use.insert(path, Arc::downgrade(&component));
            component
        }))
    }

    async fn load(
        &self,
        engine: &Engine,
        flavour: Flavour,
        sha256: &str,
        bytes: &Arc<Vec<u8>>,
        path: PathBuf,
    ) -> Result<Component, String> {
        let (inner, loading, found) = (self.0.clone(), engine.clone(), path.clone());
        let cached = tokio::task::spawn_blocking(move || inner.cache.load(&loading, &found)).await;
        if let Ok(Some(component)) = cached {
            return Ok(component);
        }
        if let Some(message) = self.0.failed_lately(sha256) {
            return Err(message);
        }
        let running = {
            let mut all = self.0.running.lock().unwrap_or_else(PoisonError::into_inner);
            let (inner, engine, sha256, bytes) =
                (self.0.clone(), engine.clone(), sha256.to_owned(), bytes.clone());
            let place = path.clone();
            let start = || {
                let work = tokio::spawn(async move {
                    inner.compile(engine, flavour, sha256, bytes, place).await
                });
                let ended = |ended: Result<_, tokio::task::JoinError>| {
                    ended.unwrap_or_else(|error| Err(format!("the compiler failed: {error}")))
                };
                work.map(ended).boxed().shared()
            };
            all.entry(path).or_insert_with(start).clone()
        };
        running.await
    }
}

impl Inner {
    async fn compile(
        self: Arc<Self>,
        engine: Engine,
        flavour: Flavour,
        sha256: String,
        bytes: Arc<Vec<u8>>,
        path: PathBuf,
    ) -> Result<Component, String> {
        let permit = self.permits.acquire().await;
        let compiled = self.make(&engine, flavour, &bytes, &path).await;
        drop(permit);
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&path);
        compiled.map_err(|failure| match failure {
            Failure::Passing(message) => message,
            Failure::Component(message) => {
                self.note_failure(&sha256, &message);
                message
            }
        })
    }

    async fn make(
        self: &Arc<Self>,
        engine: &Engine,
        flavour: Flavour,
        bytes: &[u8],
        path: &Path,
    ) -> Result<Component, Failure> {
        let nowhere = |error: std::io::Error| {
            Failure::Passing(format!("there is no room for its compiled form: {error}"))
        };
        let output = self.cache.output().map_err(nowhere)?;
        self.run(flavour, bytes, output.writer().map_err(nowhere)?).await?;
        let (inner, engine, path) = (self.clone(), engine.clone(), path.to_owned());
        let kept =
            tokio::task::spawn_blocking(move || inner.cache.keep(&engine, output, &path)).await;
        kept.map_err(|error| Failure::Passing(error.to_string()))?.map_err(|error| {
            let error = format!("{error:#}");
            if error.contains("pooling allocator") {
                Failure::Component(format!("asks for more than a plugin may have: {error}"))
            } else {
                Failure::Passing(format!(
                    "its compiled form does not load: {error}{}",
                    hint(&error)
                ))
            }
        })
    }

    fn failed_lately(&self, sha256: &str) -> Option<String> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, message) = failures.get(sha256)?;
        (since.elapsed() < REST).then(|| message.clone())
    }

    fn note_failure(&self, sha256: &str, message: &str) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.retain(|_, (since, _)| since.elapsed() < REST);
        if failures.len() < REMEMBERED {
            failures.insert(sha256.to_owned(), (Instant::now(), message.to_owned()));
        }
    }

    /// Runs the process: the component goes in, compiled code comes out.
    async fn run(
        &self,
        flavour: Flavour,
        bytes: &[u8],
        output: std::fs::File,
    ) -> Result<(), Failure> {
        let failed = |error: std::io::Error| {
            Failure::Passing(format!("the compiler does not start: {error}"))
        };
        let mut command = Command::new(&self.program);
        command.arg(COMMAND).args(["--memory", &self.memory.bytes().to_string()]);
        // Its own clock, should this process end before it.
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
        let seconds = self.timeout.duration().as_secs().saturating_add(10).saturating_mul(threads);
        command.args([
            "--seconds",
            &seconds.to_string(),
            "--parent",
            &std::process::id().to_string(),
        ]);
        if flavour == Flavour::Concurrent {
            command.arg("--concurrent");
        }
        command.stdin(Stdio::piped()).stdout(output).stderr(Stdio::piped()).kill_on_drop(true);
        // It compiles and does nothing else: nothing of the operator's belongs in there.
        command.env_clear().env("RAYON_NUM_THREADS", threads.to_string());
        // An interrupt at the terminal is for the server to act on.
        command.process_group(0);
        let mut child = command.spawn().map_err(failed)?;
        let (mut input, complaint) = (child.stdin.take(), child.stderr.take());
        let work = async {
            if let Some(input) = &mut input {
                // One that ended early says why by itself.
                input.write_all(bytes).await.ok();
            }
            drop(input);
            let mut said = Vec::new();
            if let Some(complaint) = complaint {
                complaint.take(LONGEST_COMPLAINT).read_to_end(&mut said).await.ok();
            }
            (child.wait().await, said)
        };
        // Dropping the work ends the process.
        let ended = tokio::time::timeout(self.timeout.duration(), work).await;
        let Ok((status, said)) = ended else {
            return Err(Failure::Component(format!(
                "compiling takes longer than {}; make the component smaller, or raise the setting compile_timeout",
                self.timeout
            )));
        };
        let said = self.without_missing_layers(&String::from_utf8_lossy(&said));
        match status.map_err(failed)? {
            status if status.success() => Ok(()),
            // 1 is the compiler's own word; anything else is its sudden end.
            status if status.code() == Some(1) => Err(Failure::Component(format!(
                "is no component that can be compiled: {}; it may be damaged, cut short, or built with features that this version does not know",
                said
            ))),
            status if status.code() == Some(i32::from(UNWRITTEN)) => {
                Err(Failure::Passing(format!("its compiled form cannot be kept: {said}")))
            }
            status if status.signal() == Some(libc::SIGSYS) => Err(Failure::Component(
                "made the compiler try what compiling never needs, and it was ended; do not load this component".into(),
            )),
            status if status.signal() == Some(libc::SIGXFSZ) => {
                Err(Failure::Component("has a compiled form larger than 1 GiB; make the component smaller".into()))
            }
            status => {
                let how = if status.code() == Some(i32::from(NO_MEMORY)) {
                    "no memory left".into()
                } else {
                    status.to_string()
                };
                Err(Failure::Component(format!(
                    "compiling broke off ({how}); it may need more memory than {}, the setting compile_memory",
                    self.memory
                )))
            }
        }
    }
}

impl Inner {
    /// What the compiler says of the component. What it says of its sandbox is logged once.
    fn without_missing_layers(&self, said: &str) -> String {
        let missing: Vec<&str> =
            said.lines().filter_map(|line| line.strip_prefix(MISSING)).collect();
        if !missing.is_empty() {
            self.told_missing.call_once(|| {
                for layer in &missing {
                    tracing::warn!(
                        layer,
                        "the process that compiles plugins runs without a layer of its sandbox"
                    );
                }
            });
        }
        said.lines()
            .filter(|line| !line.starts_with(MISSING))
            .collect::<Vec<_>>()
            .join("\n")
            .trim_end()
            .to_owned()
    }
}

/// What to do about a system that does not let compiled code be run.
fn hint(error: &str) -> &'static str {
    let is_refused =
        ["Operation not permitted", "Permission denied", "os error 1)", "os error 13)"];
    if is_refused.iter().any(|words| error.contains(words)) {
        "; the system forbids this process to run code that it has compiled: set MemoryDenyWriteExecute=no in the unit of systemd, or allow execmem in SELinux"
    } else {
        ""
    }
}

/// Also when its file was replaced since it was started.
fn this_program() -> PathBuf {
    let linux = PathBuf::from("/proc/self/exe");
    if linux.exists() { linux } else { std::env::current_exe().unwrap_or(linux) }
}

/// How the process ends when its result cannot be written; 1 is what it finds in the component.
const UNWRITTEN: u8 = 3;

/// How it ends when its memory does not even hold the component.
const NO_MEMORY: u8 = 4;

/// What the process is told.
#[derive(Args)]
pub struct Process {
    /// Most memory, in bytes
    #[arg(long)]
    memory: u64,
    /// Most CPU time, in seconds
    #[arg(long)]
    seconds: u64,
    /// The process that started it, and ends it by its own end
    #[arg(long)]
    parent: u32,
    #[arg(long)]
    concurrent: bool,
}

impl Process {
    /// Compiles what comes on standard input and writes the result to standard output.
    pub fn run(self) -> ExitCode {
        match self.compile() {
            Ok(()) => ExitCode::SUCCESS,
            Err((code, message)) => {
                eprintln!("{message}");
                ExitCode::from(code)
            }
        }
    }

    fn compile(self) -> Result<(), (u8, String)> {
        self.bound()
            .map_err(|error| (UNWRITTEN, format!("the compiler cannot be bounded: {error}")))?;
        let flavour = if self.concurrent { Flavour::Concurrent } else { Flavour::Plain };
        let mut bytes = Vec::new();
        let read = std::io::stdin().lock().take(MOST_COMPONENT).read_to_end(&mut bytes);
        read.map_err(|error| {
            let code =
                if error.kind() == std::io::ErrorKind::OutOfMemory { NO_MEMORY } else { UNWRITTEN };
            (code, format!("the component does not come through: {error}"))
        })?;
        let compiler = engine::compiler(flavour).map_err(|message| (UNWRITTEN, message))?;
        let compiled =
            compiler.precompile_component(&bytes).map_err(|error| (1, format!("{error:#}")))?;
        std::io::stdout()
            .lock()
            .write_all(&compiled)
            .map_err(|error| (UNWRITTEN, error.to_string()))
    }

    fn bound(&self) -> std::io::Result<()> {
        #[cfg(target_os = "linux")]
        {
            use rustix::process::{Signal, getppid, set_parent_process_death_signal};
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // It may have ended before this was heard.
            if getppid()
                .is_none_or(|parent| parent.as_raw_nonzero().get().cast_unsigned() != self.parent)
            {
                return Err(std::io::Error::other("whoever started it is gone"));
            }
        }
        // Not a condition: a system may forbid it.
        nice(10).ok();
        #[cfg(target_os = "linux")]
        {
            use super::sandbox;
            sandbox::limit(self.memory, self.seconds)?;
            for layer in sandbox::enter() {
                eprintln!("{MISSING}{layer}");
            }
        }
        Ok(())
    }
}
