//! Which plugins there are: those of a directory, kept up to date while it changes.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use globset::{Glob, GlobMatcher};
use tokio::sync::{Notify, watch};

use super::error::LoadError;
use super::files::{Files, named_by};
use super::load::{Loader, plugin_name};
use super::order::Order;
use super::plugin::Plugin;
use super::read::read_text;
use super::types::Kind;
use super::watch::is_hidden;
use crate::config::RequiredPlugins;

/// One TOML file of the directory and what became of it.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub file: PathBuf,
    /// The plugin that serves under this name: of the file as it is, or, if that does not load, as it was.
    pub serving: Option<Arc<Plugin>>,
    /// Why the file as it is does not load, in the operator's words: with paths, hosts and names of secrets.
    pub error: Option<String>,
    /// The tenants that the file names, as far as it could be read: all if there are none.
    tenants: Option<Vec<String>>,
    /// What the files were when they were last read.
    fingerprint: String,
    /// Files besides the TOML file that it depends on.
    named_files: Vec<PathBuf>,
}

/// Where a model's requests go.
#[derive(Clone)]
pub struct Route {
    pub plugin: Arc<Plugin>,
    /// What the provider calls the model.
    pub model: String,
}

/// The plugins at one moment.
#[derive(Default)]
pub struct Snapshot {
    pub entries: Vec<Entry>,
    exact: HashMap<String, Vec<Route>>,
    globs: Vec<(GlobMatcher, Arc<Plugin>)>,
    /// In the order they judge in.
    validators: Vec<Arc<Plugin>>,
}

/// How things stand with one TOML file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryState {
    Loaded,
    /// It is loaded, and nothing is sent for now.
    Paused,
    /// The file does not load as it is; what it was before serves on.
    Outdated,
    Failed,
    Disabled,
}

impl EntryState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::Paused => "paused",
            Self::Outdated => "outdated",
            Self::Failed => "failed",
            Self::Disabled => "disabled",
        }
    }
}

impl Entry {
    /// Whether a tenant gets to know of it. A file that cannot be read may be anybody's.
    pub fn is_shown_to(&self, tenant: &str) -> bool {
        let is_for = |tenants: &[String]| tenants.is_empty() || tenants.iter().any(|known| known == tenant);
        match &self.serving {
            Some(plugin) => plugin.serves(tenant),
            None => self.tenants.as_deref().is_some_and(is_for),
        }
    }

    pub fn state(&self) -> EntryState {
        match (&self.serving, &self.error) {
            (Some(plugin), None) if plugin.paused => EntryState::Paused,
            (Some(_), None) => EntryState::Loaded,
            (Some(_), Some(_)) => EntryState::Outdated,
            (None, Some(_)) => EntryState::Failed,
            (None, None) => EntryState::Disabled,
        }
    }
}

impl Snapshot {
    /// Where requests for this model go, if anywhere.
    pub fn route(&self, tenant: &str, model: &str) -> Option<Route> {
        let exact = self.exact.get(model).and_then(|routes| routes.iter().find(|route| route.plugin.serves(tenant)));
        exact.cloned().or_else(|| {
            let (_, plugin) = self.globs.iter().find(|(glob, plugin)| plugin.serves(tenant) && glob.is_match(model))?;
            Some(Route { plugin: plugin.clone(), model: model.to_owned() })
        })
    }

    /// The model of requests that name none: of the first plugin, by name, that has one for this endpoint and serves it.
    pub fn default_model(&self, tenant: &str, endpoint: &str) -> Option<&str> {
        let plugins = self.adapters().filter(|plugin| plugin.serves(tenant) && plugin.handles(endpoint));
        let mut models = plugins.filter_map(|plugin| plugin.default_models.get(endpoint));
        models.find(|model| self.route(tenant, model).is_some()).map(String::as_str)
    }

    /// What tells the plugin that serves under a name from those that did before; zero if there is none.
    pub fn identity(&self, name: &str) -> usize {
        let found = self.entries.iter().find(|entry| entry.name == name);
        found.and_then(|entry| entry.serving.as_ref()).map_or(0, |plugin| Arc::as_ptr(plugin) as usize)
    }

    /// The models that can be listed, by name, each with the plugin that serves it.
    pub fn models(&self, tenant: &str) -> Vec<(&str, &Plugin)> {
        let served = |(model, routes): (&'_ String, &'_ Vec<Route>)| {
            routes.iter().find(|route| route.plugin.serves(tenant)).map(|route| (model, &*route.plugin)).is_some()
        };
        let mut models: Vec<_> = self
            .exact
            .iter()
            .filter(|entry| served(*entry))
            .filter_map(|(model, routes)| {
                let route = routes.iter().find(|route| route.plugin.serves(tenant))?;
                Some((model.as_str(), &*route.plugin))
            })
            .collect();
        models.sort_by_key(|(model, _)| *model);
        models
    }

    /// Whether the plugins are there without which no batch is created; an error says which are not.
    pub fn check_required(&self, required: &RequiredPlugins, tenant: &str, endpoints: &[&str]) -> Result<(), String> {
        match required {
            RequiredPlugins::Named(names) => {
                let loaded =
                    |name: &String| self.entries.iter().any(|entry| entry.name == *name && entry.serving.is_some());
                let missing: Vec<&str> = names.iter().filter(|name| !loaded(name)).map(String::as_str).collect();
                if missing.is_empty() {
                    return Ok(());
                }
                Err(format!("required plugins are not loaded: {} (required_plugins)", missing.join(", ")))
            }
            RequiredPlugins::Validators => {
                let adapters = || self.adapters().filter(|plugin| plugin.serves(tenant));
                let judged = |endpoint: &str| !self.validators(tenant, endpoint).is_empty();
                let unjudged = endpoints
                    .iter()
                    .find(|endpoint| adapters().any(|plugin| plugin.handles(endpoint)) && !judged(endpoint));
                match unjudged {
                    None => Ok(()),
                    Some(endpoint) => Err(format!(
                        "no validator is loaded for {endpoint}, so lines would be sent unchecked; load one, or say which plugins have to be there (required_plugins)"
                    )),
                }
            }
        }
    }

    /// Adapters that are loaded.
    pub fn adapters(&self) -> impl Iterator<Item = &Plugin> {
        self.entries.iter().filter_map(|entry| entry.serving.as_deref()).filter(|plugin| plugin.kind == Kind::Adapter)
    }

    /// The validators of a batch, in order.
    pub fn validators(&self, tenant: &str, endpoint: &str) -> Vec<Arc<Plugin>> {
        self.validators.iter().filter(|plugin| plugin.serves(tenant) && plugin.handles(endpoint)).cloned().collect()
    }

    fn build(mut entries: Vec<Entry>, before: &Self, order: &Order) -> Self {
        entries.sort_by(|one, other| (order.place(&one.name), &one.name).cmp(&(order.place(&other.name), &other.name)));
        let mut snapshot = Self::default();
        // What serves already goes first: a new file takes no model away from it.
        for unchanged in [true, false] {
            for entry in &mut entries {
                let Some(plugin) = entry.serving.clone() else { continue };
                let known = before.entries.iter().find(|known| known.name == entry.name);
                let old = known.and_then(|known| known.serving.clone());
                let is_old = old.as_ref().is_some_and(|old| Arc::ptr_eq(old, &plugin));
                if is_old != unchanged {
                    continue;
                }
                if let Err(message) = snapshot.add(&plugin) {
                    entry.error = Some(format!("{}: {message}", entry.file.display()));
                    entry.serving = old.filter(|old| !is_old && snapshot.add(old).is_ok());
                }
            }
        }
        snapshot.validators.sort_by(|one, other| (one.order, &one.name).cmp(&(other.order, &other.name)));
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        snapshot.entries = entries;
        snapshot
    }

    /// Adds a plugin's routes, or none of them.
    fn add(&mut self, plugin: &Arc<Plugin>) -> Result<(), String> {
        if plugin.kind == Kind::Validator {
            self.validators.push(plugin.clone());
            return Ok(());
        }
        let (mut globs, mut exact) = (Vec::new(), plugin.aliases.clone());
        for model in &plugin.models {
            match Served::parse(model).map_err(|error| format!("models: `{model}`: {error}"))? {
                Served::Glob(glob) => globs.push((glob, plugin.clone())),
                // An alias for the same name says what it is called at the provider.
                Served::Name(name) => drop(exact.entry(name.clone()).or_insert(name)),
            }
        }
        for model in exact.keys() {
            let taken =
                self.exact.get(model).and_then(|routes| routes.iter().find(|route| overlap(&route.plugin, plugin)));
            if let Some(taken) = taken {
                return Err(format!(
                    "models: `{model}` is served by the plugin `{}` already; take it out of one of the two files",
                    taken.plugin.name
                ));
            }
        }
        for (model, provider_model) in exact {
            let route = Route { plugin: plugin.clone(), model: provider_model };
            self.exact.entry(model).or_default().push(route);
        }
        self.globs.extend(globs);
        Ok(())
    }
}

/// What an entry of `models` means.
enum Served {
    Name(String),
    Glob(GlobMatcher),
}

impl Served {
    /// `*` and `?` make a glob, unless a backslash stands before each. Everything else is as it stands, as in `claude[1m]`.
    fn parse(model: &str) -> Result<Self, String> {
        let (mut name, mut glob, mut is_glob) = (String::new(), String::new(), false);
        let mut letters = model.chars().peekable();
        while let Some(letter) = letters.next() {
            let escaped = (letter == '\\').then(|| letters.next_if(|next| matches!(next, '*' | '?' | '\\'))).flatten();
            let literal = escaped.unwrap_or(letter);
            name.push(literal);
            if escaped.is_none() && matches!(letter, '*' | '?') {
                is_glob = true;
            } else if matches!(literal, '*' | '?' | '[' | ']' | '{' | '}' | '\\') {
                glob.push('\\');
            }
            glob.push(literal);
        }
        if !is_glob {
            return Ok(Self::Name(name));
        }
        Glob::new(&glob).map(|glob| Self::Glob(glob.compile_matcher())).map_err(|error| error.to_string())
    }
}

/// Whether two plugins serve a tenant in common.
fn overlap(one: &Plugin, other: &Plugin) -> bool {
    one.tenants.is_empty() || other.tenants.is_empty() || one.tenants.iter().any(|tenant| other.serves(tenant))
}

/// Whether a directory can be read: asked before anything is made that would be left behind.
pub fn check_directory(folder: &Path) -> Result<(), LoadError> {
    let found = std::fs::read_dir(folder);
    found.map(drop).map_err(|source| LoadError::Directory { path: folder.to_owned(), source })
}

/// The plugins of a directory.
pub struct Registry {
    folder: PathBuf,
    loader: Loader,
    current: ArcSwap<Snapshot>,
    /// One reading of the directory at a time.
    reading: tokio::sync::Mutex<()>,
    changed: watch::Sender<()>,
    is_requested: AtomicBool,
    requests: Arc<Notify>,
    order: Order,
    /// The file system of the directory when it was read last; zero before.
    device: AtomicU64,
}

impl Registry {
    /// Loads every plugin of the directory. One that fails does not stop the others; a directory that cannot be read does.
    pub async fn open(folder: &Path, loader: Loader) -> Result<Arc<Self>, LoadError> {
        let order = Order::open(loader.order_file.clone());
        let registry = Arc::new(Self {
            folder: folder.to_owned(),
            loader,
            current: ArcSwap::default(),
            reading: tokio::sync::Mutex::default(),
            changed: watch::Sender::new(()),
            is_requested: AtomicBool::new(false),
            requests: Arc::default(),
            order,
            device: AtomicU64::new(0),
        });
        registry.read().await?;
        Ok(registry)
    }

    pub fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Told whenever plugins may have changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Reads the directory again and swaps in what changed. What is under way finishes on the plugins it began with.
    pub async fn read(&self) -> Result<(), LoadError> {
        let _one_at_a_time = self.reading.lock().await;
        let before = self.current.load_full();
        self.loader.read_trusted_keys();
        let files = self.files(!before.entries.is_empty())?;
        // Until its turn comes, each stays as it was.
        let mut entries: Vec<Entry> =
            before.entries.iter().filter(|entry| files.contains(&entry.file)).cloned().collect();
        let mut loading: FuturesUnordered<_> = files.into_iter().map(|file| self.entry(file, &before)).collect();
        while let Some(entry) = loading.next().await {
            entries.retain(|known| known.name != entry.name);
            entries.push(entry);
            // One that takes long to compile does not hold up the others; at the start there is nobody to wait for them.
            if !before.entries.is_empty() {
                self.publish(&entries, &before);
            }
        }
        self.publish(&entries, &before);
        Ok(())
    }

    /// Makes these the plugins from now on. Where two want the same, those of `before` go first.
    fn publish(&self, entries: &[Entry], before: &Snapshot) {
        let last = self.current.swap(Arc::new(Snapshot::build(entries.to_vec(), before, &self.order)));
        let now = self.current.load();
        let known_in = |entries: &'_ [Entry], name: &str| entries.iter().position(|entry| entry.name == name);
        for entry in &now.entries {
            let known = known_in(&last.entries, &entry.name).and_then(|place| last.entries.get(place));
            if known.is_none_or(|known| {
                known.fingerprint != entry.fingerprint
                    || known.error != entry.error
                    || known.serving.is_some() != entry.serving.is_some()
            }) {
                announce(entry);
            }
        }
        self.order.note(now.entries.iter().filter(|entry| entry.serving.is_some()).map(|entry| entry.name.as_str()));
        for entry in last.entries.iter().filter(|old| known_in(&now.entries, &old.name).is_none()) {
            tracing::info!(plugin = entry.name, "plugin removed");
        }
        self.changed.send_replace(());
    }

    fn files(&self, had_some: bool) -> Result<Vec<PathBuf>, LoadError> {
        let unreadable = |source| LoadError::Directory { path: self.folder.clone(), source };
        let mut files = Vec::new();
        for found in std::fs::read_dir(&self.folder).map_err(unreadable)? {
            let path = found.map_err(unreadable)?.path();
            if path.extension().is_some_and(|extension| extension == "toml") && !is_hidden(&path) {
                files.push(path);
            }
        }
        let device = std::fs::metadata(&self.folder).map_err(unreadable)?.dev();
        if files.is_empty() && had_some && device != self.device.load(Ordering::Relaxed) {
            let message = "it is empty and on another file system than before, as if a mount were missing";
            return Err(unreadable(std::io::Error::other(message)));
        }
        self.device.store(device, Ordering::Relaxed);
        Ok(files)
    }

    async fn entry(&self, file: PathBuf, before: &Snapshot) -> Entry {
        let (name, mut error) = match plugin_name(&file) {
            Ok(name) => (name, None),
            Err(error) => (file.display().to_string(), Some(error.to_string())),
        };
        let known = before.entries.iter().find(|known| known.name == name);
        // What serves is held to its own signature, whatever has become of its files.
        let mut serving =
            known.and_then(|known| known.serving.clone()).filter(|plugin| self.loader.is_still_trusted(plugin));
        let _turn = self.loader.turn().await;
        let read = file.clone();
        // With its secrets, which are files too.
        let files =
            tokio::task::spawn_blocking(move || Files::read(&read).map(|files| (files.fingerprint(), files))).await;
        let named = named_by(&file);
        let mut fingerprint = String::new();
        let named_files = named.or_else(|| known.map(|known| known.named_files.clone())).unwrap_or_default();
        let tenants = tenants_of(&file);
        if error.is_none() {
            match files {
                Ok(Ok((read, files))) => {
                    fingerprint = format!("{read} {}", self.loader.trusted_keys_digest());
                    // One that failed is tried again: what was in its way may be gone.
                    let unchanged =
                        known.is_some_and(|known| known.fingerprint == fingerprint && known.error.is_none());
                    if !unchanged {
                        match self.loader.load_files(files).await {
                            Ok(plugin) => serving = Some(Arc::new(plugin)),
                            Err(failed) => error = Some(failed.to_string()),
                        }
                    }
                }
                Ok(Err(LoadError::Disabled { .. })) => match self.loader.check_disabled(&file).await {
                    Ok(()) => serving = None,
                    Err(failed) => error = Some(failed.to_string()),
                },
                Ok(Err(failed)) => error = Some(failed.to_string()),
                Err(failed) => error = Some(failed.to_string()),
            }
        }
        Entry { name, file, serving, error, tenants, fingerprint, named_files }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Files that plugins name and the loader asks for, wherever they are: components, signatures, secrets, trusted keys.
    pub fn named_files(&self) -> BTreeSet<PathBuf> {
        let current = self.current.load();
        let of_plugins = current.entries.iter().flat_map(|entry| entry.named_files.iter().cloned());
        of_plugins.chain(self.loader.trusted_keys_file()).collect()
    }

    /// Has the directory and the keys read again soon, whether anything seems to have changed or not.
    pub fn request_read(&self) {
        self.is_requested.store(true, Ordering::Relaxed);
        self.requests.notify_one();
    }

    pub(super) fn take_request(&self) -> bool {
        self.is_requested.swap(false, Ordering::Relaxed)
    }

    pub(super) fn requested(self: &Arc<Self>) -> impl Future<Output = ()> + use<> {
        let requests = self.requests.clone();
        async move { requests.notified().await }
    }
}

/// The tenants that a TOML file names, whatever else is wrong with it.
fn tenants_of(file: &Path) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Tenants {
        #[serde(default)]
        tenants: Vec<String>,
    }
    let text = read_text(file).ok()?;
    toml::from_str::<Tenants>(&text).ok().map(|found| found.tenants)
}

fn announce(entry: &Entry) {
    match (&entry.error, &entry.serving) {
        (None, Some(plugin)) => tracing::info!(
            plugin = entry.name, kind = %plugin.kind, version = plugin.description.version, sha256 = plugin.sha256, "plugin loaded"
        ),
        (Some(error), Some(_)) => {
            tracing::error!(plugin = entry.name, "plugin not changed, the one before serves on: {error}")
        }
        (Some(error), None) => tracing::error!(plugin = entry.name, "plugin not loaded: {error}"),
        (None, None) => tracing::info!(plugin = entry.name, "plugin turned off"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stars_and_question_marks_without_a_backslash_make_a_glob() {
        for (model, expected) in [
            ("gpt-5", "gpt-5"),
            ("claude[1m]", "claude[1m]"),
            ("a{b,c}", "a{b,c}"),
            (r"what\?", "what?"),
            (r"\*", "*"),
            (r"a\b", r"a\b"),
            (r"a\\b", r"a\b"),
        ] {
            assert!(matches!(Served::parse(model), Ok(Served::Name(name)) if name == expected), "{model}");
        }
        for (model, matching, other) in [
            ("gpt-*", "gpt-5", "xgpt-5"),
            ("*", "a/b[c]", ""),
            ("a?[1]", "ab[1]", "ab1"),
            (r"\*?", "*x", "ax"),
            ("{a,b}*", "{a,b}c", "ac"),
            (r"a\b*", r"a\bc", "abc"),
        ] {
            let Ok(Served::Glob(glob)) = Served::parse(model) else { unreachable!("{model}") };
            assert!(glob.is_match(matching) && (other.is_empty() || !glob.is_match(other)), "{model}");
        }
    }
}
