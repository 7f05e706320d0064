//! The plugins at one moment: what each is, which of them serves a model, and who judges a batch.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use globset::{Glob, GlobMatcher};

use super::config::RequiredPlugins;
use super::order::Order;
use super::plugin::Plugin;
use super::types::Kind;

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
    pub(super) tenants: Option<Vec<String>>,
    /// What the files were when they were last read.
    pub(super) fingerprint: String,
    /// Files besides the TOML file that it depends on.
    pub(super) named_files: Vec<PathBuf>,
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
        let is_for =
            |tenants: &[String]| tenants.is_empty() || tenants.iter().any(|known| known == tenant);
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
        let exact = self
            .exact
            .get(model)
            .and_then(|routes| routes.iter().find(|route| route.plugin.serves(tenant)));
        exact.cloned().or_else(|| {
            let (_, plugin) = self
                .globs
                .iter()
                .find(|(glob, plugin)| plugin.serves(tenant) && glob.is_match(model))?;
            Some(Route { plugin: plugin.clone(), model: model.to_owned() })
        })
    }

    /// The model of requests that name none: of the first plugin, by name, that has one for this endpoint and serves it.
    pub fn default_model(&self, tenant: &str, endpoint: &str) -> Option<&str> {
        let plugins =
            self.adapters().filter(|plugin| plugin.serves(tenant) && plugin.handles(endpoint));
        let mut models = plugins.filter_map(|plugin| plugin.default_models.get(endpoint));
        models.find(|model| self.route(tenant, model).is_some()).map(String::as_str)
    }

    /// What tells the plugin that serves under a name from those that did before; zero if there is none.
    pub fn identity(&self, name: &str) -> usize {
        let found = self.entries.iter().find(|entry| entry.name == name);
        found
            .and_then(|entry| entry.serving.as_ref())
            .map_or(0, |plugin| Arc::as_ptr(plugin) as usize)
    }

    /// The models that can be listed, by name, each with the plugin that serves it.
    pub fn models(&self, tenant: &str) -> Vec<(&str, &Plugin)> {
        let served = |(model, routes): (&'_ String, &'_ Vec<Route>)| {
            routes
                .iter()
                .find(|route| route.plugin.serves(tenant))
                .map(|route| (model, &*route.plugin))
                .is_some()
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
    pub fn check_required(
        &self,
        required: &RequiredPlugins,
        tenant: &str,
        endpoints: &[&str],
    ) -> Result<(), String> {
        match required {
            RequiredPlugins::Named(names) => {
                let loaded = |name: &String| {
                    self.entries.iter().any(|entry| entry.name == *name && entry.serving.is_some())
                };
                let missing: Vec<&str> =
                    names.iter().filter(|name| !loaded(name)).map(String::as_str).collect();
                if missing.is_empty() {
                    return Ok(());
                }
                Err(format!(
                    "required plugins are not loaded: {} (required_plugins)",
                    missing.join(", ")
                ))
            }
            RequiredPlugins::Validators => {
                let adapters = || self.adapters().filter(|plugin| plugin.serves(tenant));
                let judged = |endpoint: &str| !self.validators(tenant, endpoint).is_empty();
                let unjudged = endpoints.iter().find(|endpoint| {
                    adapters().any(|plugin| plugin.handles(endpoint)) && !judged(endpoint)
                });
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
        self.entries
            .iter()
            .filter_map(|entry| entry.serving.as_deref())
            .filter(|plugin| plugin.kind == Kind::Adapter)
    }

    /// The validators of a batch, in order.
    pub fn validators(&self, tenant: &str, endpoint: &str) -> Vec<Arc<Plugin>> {
        self.validators
            .iter()
            .filter(|plugin| plugin.serves(tenant) && plugin.handles(endpoint))
            .cloned()
            .collect()
    }

    pub(super) fn build(mut entries: Vec<Entry>, before: &Self, order: &Order) -> Self {
        entries.sort_by(|one, other| {
            (order.place(&one.name), &one.name).cmp(&(order.place(&other.name), &other.name))
        });
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
        snapshot
            .validators
            .sort_by(|one, other| (one.order, &one.name).cmp(&(other.order, &other.name)));
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
            let taken = self
                .exact
                .get(model)
                .and_then(|routes| routes.iter().find(|route| overlap(&route.plugin, plugin)));
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
            let escaped = (letter == '\\')
                .then(|| letters.next_if(|next| matches!(next, '*' | '?' | '\\')))
                .flatten();
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
        Glob::new(&glob)
            .map(|glob| Self::Glob(glob.compile_matcher()))
            .map_err(|error| error.to_string())
    }
}

/// Whether two plugins serve a tenant in common.
fn overlap(one: &Plugin, other: &Plugin) -> bool {
    one.tenants.is_empty()
        || other.tenants.is_empty()
        || one.tenants.iter().any(|tenant| other.serves(tenant))
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
            assert!(
                matches!(Served::parse(model), Ok(Served::Name(name)) if name == expected),
                "{model}"
            );
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
            assert!(
                glob.is_match(matching) && (other.is_empty() || !glob.is_match(other)),
                "{model}"
            );
        }
    }
}
