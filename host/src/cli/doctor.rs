//! `batchwright doctor`: checks what a server needs on this machine, and says what to do.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use batchwright_domain::ids::{DEFAULT_TENANT, TenantId};
use batchwright_domain::text::printable;
use batchwright_egress::{HttpRequest, Priority, QueueId};
use batchwright_plugin::types::Kind;
use batchwright_plugin::{EntryState, Plugin, Registry};
use batchwright_store::inspect::{Inspection, inspect};
use batchwright_store::{SqliteStore, umask};
use clap::Args;
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

use super::VERSION;
use super::config::shown_settings;
use super::terminal::{one_line, outln};
use crate::assemble::{self, Options};
use crate::clock::Clock;
use crate::config::{All, Settings, SettingsArgs};
use crate::error::Error;

/// Exit status if nothing has failed, but something deserves attention.
const WARNING_STATUS: u8 = 7;

/// Part of the disk below which free space deserves attention, in percent.
const LOW_DISK_PERCENT: u64 = 10;

/// Days before the end of a certificate from which on it deserves attention.
const CERTIFICATE_DAYS: i64 = 7;

/// File descriptors that a server needs beside those of connections.
const OTHER_FILES: u64 = 512;

/// Time that a provider gets to answer.
const PROVIDER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(15);

/// Maximum length of an answer of a provider that is shown, in characters.
const MAX_SHOWN_CHARS: usize = 200;

/// Arguments of `batchwright doctor`.
#[derive(Args)]
pub struct Doctor {
    #[command(flatten)]
    settings: SettingsArgs<All>,
    /// Read the whole database, which takes time
    #[arg(long)]
    deep: bool,
    /// Do not send anything to providers
    #[arg(long)]
    offline: bool,
    /// Also write a file for support: findings, settings, plugins and counts, without secrets,
    /// prompts and answers
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Severity {
    Fine,
    Warning,
    Failure,
}

impl Severity {
    fn as_str(self) -> &'static str {
        match self {
            Self::Fine => "ok",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// Result of one check.
struct Finding {
    severity: Severity,
    check: String,
    message: String,
}

/// Findings so far.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, severity: Severity, check: impl Into<String>, message: impl Into<String>) {
        let message = one_line(&message.into());
        self.0.push(Finding { severity, check: check.into(), message });
    }

    fn fine(&mut self, check: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Fine, check, message);
    }

    fn warn(&mut self, check: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Warning, check, message);
    }

    fn fail(&mut self, check: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Failure, check, message);
    }

    fn worst(&self) -> Severity {
        self.0.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Fine)
    }

    fn to_json(&self) -> Value {
        let finding = |finding: &Finding| {
            json!({
                "severity": finding.severity.as_str(),
                "check": finding.check,
                "message": finding.message,
            })
        };
        self.0.iter().map(finding).collect()
    }
}

impl Doctor {
    /// Runs all checks; the exit status says the worst finding.
    pub async fn run(self) -> Result<ExitCode, Error> {
        umask();
        let mut findings = Findings::default();
        let (settings, given) = self.settings.explain();
        let settings = settings?;
        match assemble::check(&settings) {
            errors if errors.is_empty() => findings.fine("settings", "valid"),
            errors => errors.into_iter().for_each(|error| findings.fail("settings", error)),
        }
        file_limit(&settings, &mut findings);
        let data = settings.storage.data.clone();
        folder(&data, &mut findings);
        let inspection = database(&data, self.deep, &mut findings);
        certificate(&settings, &mut findings);
        let plugins = plugins(&settings, self.offline, &mut findings).await;
        if let Some(path) = &self.bundle {
            let bundle = json!({
                "version": VERSION,
                "findings": findings.to_json(),
                "settings": shown_settings(&given),
                "plugins": plugins,
                "data_folder": inspection.as_ref().map(described),
            });
            write_bundle(path, &bundle)?;
        }
        if self.json {
            outln!("{:#}", findings.to_json());
        } else {
            for Finding { severity, check, message } in &findings.0 {
                outln!("{:<8} {check}: {message}", severity.as_str());
            }
        }
        Ok(match findings.worst() {
            Severity::Fine => ExitCode::SUCCESS,
            Severity::Warning => ExitCode::from(WARNING_STATUS),
            Severity::Failure => ExitCode::FAILURE,
        })
    }
}

/// Checks the limit of open files against the bound on connections.
fn file_limit(settings: &Settings, findings: &mut Findings) {
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let needed = (settings.api.max_connections.get() as u64).saturating_add(OTHER_FILES);
    if limit >= needed {
        return findings.fine("open files", format!("up to {limit}"));
    }
    findings.warn(
        "open files",
        format!(
            "the hard limit is {limit}, and max_connections needs {needed}; raise LimitNOFILE, or \
             lower max_connections"
        ),
    );
}

/// Checks that the data folder can be written and that others cannot read it.
fn folder(data: &Path, findings: &mut Findings) {
    let check = "data folder";
    let shown = data.display();
    let found = match std::fs::metadata(data) {
        Ok(found) if found.is_dir() => found,
        Ok(_) => return findings.fail(check, format!("{shown} is no folder")),
        Err(error) => {
            return findings.fail(
                check,
                format!("{shown}: {error}; the server creates it, or name another with --data"),
            );
        }
    };
    if let Err(error) = tempfile::Builder::new().prefix(".doctor").tempfile_in(data) {
        return findings.fail(
            check,
            format!("{shown} cannot be written: {error}; run this as the user of the server"),
        );
    }
    let mode = found.permissions().mode() & 0o077;
    if mode != 0 {
        return findings.warn(
            check,
            format!("{shown} can be reached by other users; chmod 700 it, or start the server"),
        );
    }
    findings.fine(check, format!("{shown} can be written"));
}

/// Checks the database, the disk, the clock and the webhooks.
fn database(data: &Path, deep: bool, findings: &mut Findings) -> Option<Inspection> {
    let inspection = match inspect(data, deep) {
        Ok(inspection) => inspection,
        Err(_) if !SqliteStore::exists(data) => {
            findings.warn("database", "does not exist yet; the server creates it");
            return None;
        }
        Err(error) => {
            findings.fail("database", error.to_string());
            return None;
        }
    };
    let size = |bytes: u64| bytesize::ByteSize(bytes).display().iec().to_string();
    match &inspection.damage {
        Some(damage) => findings.fail(
            "database",
            format!("is damaged: {damage}; restore a backup (batchwright restore)"),
        ),
        None => findings.fine(
            "database",
            format!(
                "{}, write-ahead log {}",
                size(inspection.database_bytes),
                size(inspection.wal_bytes)
            ),
        ),
    }
    let (free, all) = inspection.disk;
    let message = format!("{} of {} are free", size(free), size(all));
    if free < all / 100 * LOW_DISK_PERCENT {
        findings.warn("disk", format!("{message}; delete files, or enlarge the volume"));
    } else {
        findings.fine("disk", message);
    }
    let now = Clock::system().now();
    match inspection.latest.filter(|latest| *latest > now) {
        Some(latest) => findings.fail(
            "clock",
            format!(
                "the database knows a time that is {} s ahead; set the clock",
                now.until(latest).as_secs()
            ),
        ),
        None => findings.fine("clock", "not before the latest time of the database"),
    }
    match inspection.webhooks {
        (0, waiting) => findings.fine("webhooks", format!("{waiting} deliveries wait")),
        (disabled, waiting) => findings.warn(
            "webhooks",
            format!(
                "{disabled} endpoints are disabled because they do not answer, {waiting} \
                 deliveries wait; `batchwright webhook list` of their projects names them"
            ),
        ),
    }
    Some(inspection)
}

/// Checks the end of the certificate of the listener.
fn certificate(settings: &Settings, findings: &mut Findings) {
    // A certificate that cannot be read is a finding of the settings.
    let Ok(Some(tls)) = assemble::tls(settings) else { return };
    let Some(end) = tls.expires_at() else { return };
    let days = end.saturating_sub(Clock::system().now().as_seconds()) / 86_400;
    let message = format!("expires {} (in {days} days)", super::file::utc_time(end));
    match days {
        ..0 => findings.fail("certificate", format!("{message}; renew it")),
        0..CERTIFICATE_DAYS => findings.warn("certificate", format!("{message}; renew it")),
        _ => findings.fine("certificate", message),
    }
}

/// Loads the plugins, and asks their providers. Returns what a bundle shows of them.
async fn plugins(settings: &Settings, offline: bool, findings: &mut Findings) -> Value {
    let options = Options { clock: Clock::system(), serials: None, order: None, compiler: None };
    let opened = async {
        let loader = assemble::loader(settings, options)?;
        Ok::<_, Error>(Registry::open(&settings.plugins.directory(), loader).await?)
    };
    let registry = match opened.await {
        Ok(registry) => registry,
        Err(error) => {
            findings.fail("plugins", error.to_string());
            return Value::Null;
        }
    };
    let snapshot = registry.current();
    let mut shown = Vec::new();
    for entry in &snapshot.entries {
        let (check, state) = (format!("plugin {}", entry.name), entry.state());
        let error = entry.error.clone().unwrap_or_default();
        match state {
            EntryState::Failed | EntryState::Outdated => findings.fail(&check, error),
            EntryState::Paused => findings.warn(&check, "is paused"),
            EntryState::Disabled | EntryState::Loaded => findings.fine(&check, state.as_str()),
        }
        let serving = entry.serving.as_ref();
        shown.push(json!({
            "name": entry.name,
            "state": state.as_str(),
            "component": serving.map(|plugin| plugin.description().name.clone()),
            "version": serving.map(|plugin| plugin.description().version.clone()),
            "sha256": serving.map(|plugin| plugin.sha256()),
        }));
        let adapter = serving.filter(|plugin| plugin.kind() == Kind::Adapter);
        if let Some(plugin) = adapter.filter(|_| !offline && state == EntryState::Loaded) {
            provider(plugin, findings).await;
        }
    }
    shown.into()
}

/// Asks the provider of a plugin for its models, with the credential of the plugin.
async fn provider(plugin: &Plugin, findings: &mut Findings) {
    let check = format!("provider of {}", plugin.name());
    let Some(url) = plugin.setting("base_url") else { return };
    let tenant = TenantId::from(DEFAULT_TENANT);
    let gateway = plugin.gateway();
    let queue = QueueId { tenant: tenant.clone(), batch: None };
    let asked = async {
        let mut permit = gateway.admit(queue, Priority::default()).await.ok()?;
        let mut reservation = gateway.reservation(&tenant);
        let request = HttpRequest {
            method: "GET".to_owned(),
            url: format!("{}/models", url.trim_end_matches('/')),
            headers: Vec::new(),
            body: Vec::new(),
        };
        Some(gateway.send(&tenant, request, &mut permit, &mut reservation).await)
    };
    let answer = match tokio::time::timeout(PROVIDER_TIMEOUT, asked).await {
        Ok(Some(Ok(answer))) => answer,
        Ok(Some(Err(error))) => return findings.fail(check, error.detail()),
        Ok(None) | Err(_) => {
            return findings.fail(check, format!("no answer within {PROVIDER_TIMEOUT:?}"));
        }
    };
    let body = String::from_utf8_lossy(&answer.body);
    let said = printable(&body, MAX_SHOWN_CHARS);
    match answer.status {
        200..=299 => findings.fine(check, "is reachable and accepts the credential"),
        401 | 403 => {
            findings.fail(check, format!("refuses the credential with {}: {said}", answer.status))
        }
        // Not every provider lists its models.
        404 | 405 => findings.fine(check, format!("is reachable (status {})", answer.status)),
        status => findings.warn(check, format!("answers with status {status}: {said}")),
    }
}

/// Returns what a bundle shows of the data folder.
fn described(inspection: &Inspection) -> Value {
    let open: std::collections::BTreeMap<_, _> = inspection.open.iter().cloned().collect();
    json!({
        "database_bytes": inspection.database_bytes,
        "wal_bytes": inspection.wal_bytes,
        "disk_free_bytes": inspection.disk.0,
        "disk_size_bytes": inspection.disk.1,
        "open_batches": open,
        "webhook_endpoints_disabled": inspection.webhooks.0,
        "webhook_deliveries_pending": inspection.webhooks.1,
    })
}

/// Writes a bundle into a new file.
fn write_bundle(path: &Path, bundle: &Value) -> Result<(), Error> {
    let write = || {
        let mut file = std::fs::File::create_new(path)?;
        writeln!(file, "{bundle:#}")
    };
    write().map_err(|error| {
        Error::Other(format!(
            "the bundle {} cannot be written: {error}; name a new file",
            path.display()
        ))
    })
}
