//! Snapshot of the plugins: entries of the TOML files, routes of models, validators of batches.
//!
//! A snapshot is immutable. A change of the directory creates a new snapshot, and calls in flight
//! keep the old one.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_domain::limits::{Allowed, Permissions};
use globset::{Glob, GlobMatcher};

use crate::config::RequiredPlugins;
use crate::contract::types::Kind;
use crate::directory::order::Order;
use crate::package::routing::names;
use crate::plugin::Plugin;

/// TOML file of the directory and the state of its plugin.
#[derive(Clone)]
pub struct Entry {
    /// Name of the plugin.
    pub name: String,
    /// Path of the TOML file.
    pub file: PathBuf,
    /// Serving plugin: of the current file, or of a previous version if the current file does not
    /// load.
    pub serving: Option<Arc<Plugin>>,
    /// Load error of the current file, for operators: with paths, hosts and names of secrets.
    pub error: Option<String>,
    /// Tenants that the file names, empty for all; None if the file could not be parsed.
    pub(crate) tenants: Option<Vec<TenantId>>,
    /// Fingerprint of the files at the last read.
    pub(crate) fingerprint: String,
    /// Other files that the TOML file depends on.
    pub(crate) named_files: Vec<PathBuf>,
}

/// Destination of the requests for a model.
#[derive(Clone)]
pub struct Route {
    /// Adapter that serves the model.
    pub plugin: Arc<Plugin>,
    /// Name of the model at the provider.
    pub model: String,
    /// Entry of the plugin's `models` or `aliases` that names the model: unlike a model that a glob
    /// matches, it is the operator's choice.
    pub listed: Arc<str>,
}

/// Plugins at one moment.
#[derive(Default)]
pub struct Snapshot {
    /// Entries of all TOML files, sorted by name.
    pub entries: Vec<Entry>,
    /// Routes by the exact model name; several if the plugins serve different tenants.
    exact: HashMap<String, Vec<Route>>,
    globs: Vec<(GlobMatcher, Arc<Plugin>)>,
    /// Validators in the order in which they run.
    validators: Vec<Arc<Plugin>>,
}

/// State of a TOML file and its plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryState {
    /// Current file loaded.
    Loaded,
    /// Current file loaded, but no requests are sent.
    Paused,
    /// Current file failed to load; a previous version still serves.
    Outdated,
    /// Current file failed to load; no plugin serves.
    Failed,
    /// Plugin disabled by its file.
    Disabled,
}

impl EntryState {
    /// All states.
    pub const ALL: [Self; 5] =
        [Self::Loaded, Self::Paused, Self::Outdated, Self::Failed, Self::Disabled];

    /// Returns the state's name in the API and on the command line.
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
    /// Returns true if the entry is visible to a tenant.
    ///
    /// A file that cannot be parsed may belong to another tenant, so it is visible to none.
    pub fn is_shown_to(&self, tenant: &TenantId) -> bool {
        match &self.serving {
            Some(plugin) => plugin.serves(tenant),
            None => self.tenants.as_deref().is_some_and(|tenants| names(tenants, tenant)),
        }
    }

    /// Returns the state of the entry.
    pub fn state(&self) -> EntryState {
        match (&self.serving, &self.error) {
            (Some(plugin), None) if plugin.routing().paused => EntryState::Paused,
            (Some(_), None) => EntryState::Loaded,
            (Some(_), Some(_)) => EntryState::Outdated,
            (None, Some(_)) => EntryState::Failed,
            (None, None) => EntryState::Disabled,
        }
    }
}

impl Snapshot {
    /// Returns the route of a model for a tenant, if a plugin serves it.
    pub fn route(&self, tenant: &TenantId, model: &str) -> Option<Route> {
        let exact = self
            .exact
            .get(model)
            .and_then(|routes| routes.iter().find(|route| route.plugin.serves(tenant)));
        exact.cloned().or_else(|| {
            let (glob, plugin) = self
                .globs
                .iter()
                .find(|(glob, plugin)| plugin.serves(tenant) && glob.is_match(model))?;
            let listed = glob.glob().glob().into();
            Some(Route { plugin: plugin.clone(), model: model.to_owned(), listed })
        })
    }

    /// Returns the route of a model that the tenant may use.
    pub fn allowed_route(
        &self,
        tenant: &TenantId,
        model: &str,
        permissions: &Permissions,
    ) -> Option<Route> {
        let is_allowed =
            |route: &Route| permissions.allows_model(route.plugin.name(), model, &route.model);
        self.route(tenant, model).filter(is_allowed)
    }

    /// Returns the listed models that the tenant may use.
    pub fn allowed_models(
        &self,
        tenant: &TenantId,
        permissions: &Permissions,
    ) -> Vec<(&str, &Plugin)> {
        let mut models = self.models(tenant);
        models.retain(|(model, _)| self.allowed_route(tenant, model, permissions).is_some());
        models
    }

    /// Returns the default model of requests to an endpoint.
    ///
    /// The first plugin by name decides whose default model for the endpoint is routed and allowed.
    pub fn default_model(
        &self,
        tenant: &TenantId,
        endpoint: Endpoint,
        permissions: &Permissions,
    ) -> Option<&str> {
        let plugins =
            self.adapters().filter(|plugin| plugin.serves(tenant) && plugin.handles(endpoint));
        let mut models =
            plugins.filter_map(|plugin| plugin.routing().default_models.get(&endpoint));
        models
            .find(|model| self.allowed_route(tenant, model, permissions).is_some())
            .map(String::as_str)
    }

    /// Returns a number that identifies the loaded version of a plugin; zero if none serves.
    pub fn identity(&self, name: &str) -> usize {
        let found = self.entries.iter().find(|entry| entry.name == name);
        found
            .and_then(|entry| entry.serving.as_ref())
            .map_or(0, |plugin| Arc::as_ptr(plugin) as usize)
    }

    /// Returns the models of a tenant without globs, sorted by name, with the serving plugins.
    pub fn models(&self, tenant: &TenantId) -> Vec<(&str, &Plugin)> {
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

    /// Checks that the required plugins are loaded. The error names the missing plugins.
    pub fn check_required(
        &self,
        required: &RequiredPlugins,
        tenant: &TenantId,
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
                let has_validator = |endpoint| {
                    !self.validators(tenant, endpoint, &Permissions::default()).is_empty()
                };
                let unvalidated = Endpoint::ALL.into_iter().find(|endpoint| {
                    adapters().any(|plugin| plugin.handles(*endpoint)) && !has_validator(*endpoint)
                });
                match unvalidated {
                    None => Ok(()),
                    Some(endpoint) => Err(format!(
                        "no validator is loaded for {endpoint}, so lines would be sent unchecked; \
                         load one, or list the required plugins (required_plugins)"
                    )),
                }
            }
        }
    }

    /// Returns the serving adapters, sorted by name.
    pub fn adapters(&self) -> impl Iterator<Item = &Plugin> {
        self.entries
            .iter()
            .filter_map(|entry| entry.serving.as_deref())
            .filter(|plugin| plugin.kind() == Kind::Adapter)
    }

    /// Returns the validators of a tenant's batch for an endpoint, in the order in which they run.
    pub fn validators(
        &self,
        tenant: &TenantId,
        endpoint: Endpoint,
        permissions: &Permissions,
    ) -> Vec<Arc<Plugin>> {
        self.validators
            .iter()
            .filter(|plugin| plugin.serves(tenant) && plugin.handles(endpoint))
            .filter(|plugin| permissions.allows(Allowed::Validators, plugin.name()))
            .cloned()
            .collect()
    }

    /// Builds a snapshot of entries, with the routes of the serving plugins.
    ///
    /// A plugin that conflicts with another gets an error, and its version in `before` keeps
    /// serving.
    pub(crate) fn build(mut entries: Vec<Entry>, before: &Self, order: &Order) -> Self {
        entries.sort_by(|one, other| {
            (order.position(&one.name), &one.name).cmp(&(order.position(&other.name), &other.name))
        });
        let mut snapshot = Self::default();
        // Plugins that serve already go first, so that a new file takes no model away from them.
        for unchanged in [true, false] {
            for entry in &mut entries {
                let Some(plugin) = entry.serving.clone() else { continue };
                let known = before.entries.iter().find(|known| known.name == entry.name);
                let old = known.and_then(|known| known.serving.clone());
                let is_old = old.as_ref().is_some_and(|old| Arc::ptr_eq(old, &plugin));
                if is_old != unchanged {
                    continue;
                }
                if let Err(message) = snapshot.add_routes(&plugin) {
                    entry.error = Some(format!("{}: {message}", entry.file.display()));
                    entry.serving = old.filter(|old| !is_old && snapshot.add_routes(old).is_ok());
                }
            }
        }
        snapshot.validators.sort_by(|one, other| {
            (one.routing().order, &one.name()).cmp(&(other.routing().order, &other.name()))
        });
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        snapshot.entries = entries;
        snapshot
    }

    /// Adds all routes of a plugin, or none in case of an error.
    fn add_routes(&mut self, plugin: &Arc<Plugin>) -> Result<(), String> {
        if plugin.kind() == Kind::Validator {
            self.validators.push(plugin.clone());
            return Ok(());
        }
        let (mut globs, mut exact) = (Vec::new(), plugin.routing().aliases.clone());
        for model in &plugin.routing().models {
            match ModelPattern::parse(model)
                .map_err(|error| format!("models: `{model}`: {error}"))?
            {
                ModelPattern::Glob(glob) => globs.push((glob, plugin.clone())),
                // An alias of the same name already has the provider's model name.
                ModelPattern::Name(name) => drop(exact.entry(name.clone()).or_insert(name)),
            }
        }
        for model in exact.keys() {
            let taken = self.exact.get(model).and_then(|routes| {
                routes
                    .iter()
                    .find(|route| route.plugin.routing().shares_tenant_with(plugin.routing()))
            });
            if let Some(taken) = taken {
                return Err(format!(
                    "models: `{model}` is served by the plugin `{}` already; take it out of one \
                     of the two files",
                    taken.plugin.name()
                ));
            }
        }
        for (model, provider_model) in exact {
            let listed = model.as_str().into();
            let route = Route { plugin: plugin.clone(), model: provider_model, listed };
            self.exact.entry(model).or_default().push(route);
        }
        self.globs.extend(globs);
        Ok(())
    }
}

/// Parsed entry of `models`.
enum ModelPattern {
    Name(String),
    Glob(GlobMatcher),
}

impl ModelPattern {
    /// Parses an entry. `*` and `?` without a backslash before them make a glob; all other
    /// characters are literal, as in `claude[1m]`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_pattern_is_a_glob_only_with_an_unescaped_star_or_question_mark() {
        for (model, expected) in [
            ("gpt-5", "gpt-5"),
            ("claude[1m]", "claude[1m]"),
            ("a{b,c}", "a{b,c}"),
            (r"what\?", "what?"),
            (r"\*", "*"),
            (r"a\b", r"a\b"),
            (r"a\\b", r"a\b"),
        ] {
            let parsed = ModelPattern::parse(model);
            assert!(matches!(parsed, Ok(ModelPattern::Name(name)) if name == expected), "{model}");
        }
        for (model, matching, other) in [
            ("gpt-*", "gpt-5", "xgpt-5"),
            ("*", "a/b[c]", ""),
            ("a?[1]", "ab[1]", "ab1"),
            (r"\*?", "*x", "ax"),
            ("{a,b}*", "{a,b}c", "ac"),
            (r"a\b*", r"a\bc", "abc"),
        ] {
            let Ok(ModelPattern::Glob(glob)) = ModelPattern::parse(model) else {
                unreachable!("{model}")
            };
            assert!(
                glob.is_match(matching) && (other.is_empty() || !glob.is_match(other)),
                "{model}"
            );
        }
    }
}
