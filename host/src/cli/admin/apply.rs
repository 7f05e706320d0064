//! `batchwright admin apply`: makes projects, limits and models equal to a TOML file.
//!
//! The file names what it decides, and nothing else changes: a project, a limit or a rule that the
//! file does not name stays as it is. The whole file is checked before the first change, and the
//! same file can be applied again after an interruption.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use batchwright_domain::limits::{
    Allowed, Limit, MAX_LIMIT, MAX_RULE_MODELS, ModelLimit, lifetime_seconds,
};
use batchwright_domain::money::Money;
use batchwright_domain::units::{Size, Span};
use batchwright_tenancy::project::{check_name, slug as slug_of};
use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::money::{self, Dollars};
use super::text;
use super::transport::Transport;
use crate::cli::client::path_segment;
use crate::cli::terminal::outln;
use crate::error::Error;

#[derive(Args)]
pub(super) struct Apply {
    /// TOML file with a table per project, named by the project's slug
    file: PathBuf,
    /// Show the difference and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Content of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    projects: BTreeMap<String, Project>,
}

/// Project as the file wants it; what is absent stays as it is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Project {
    /// Name. A project that does not exist yet is created with this name, or with its slug.
    name: Option<String>,
    #[serde(default)]
    limits: FileLimits,
    models: Option<Models>,
    /// Budget of a month in dollars, such as "12.50".
    monthly_budget: Option<String>,
    /// Limits for models, by the names that their providers know.
    #[serde(default)]
    model_limits: BTreeMap<String, FileModelLimits>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLimits {
    max_stored_bytes: Option<String>,
    max_stored_files: Option<u64>,
    max_open_batches: Option<u64>,
    max_requests_per_batch: Option<u64>,
    max_requests_in_flight: Option<u64>,
    weight: Option<u64>,
    input_file_lifetime: Option<Span>,
    output_file_lifetime: Option<Span>,
    error_file_lifetime: Option<Span>,
    batch_lifetime: Option<Span>,
    allowed_plugins: Option<BTreeSet<String>>,
    allowed_validators: Option<BTreeSet<String>>,
    allowed_completion_windows: Option<BTreeSet<String>>,
}

/// Limits for a model.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileModelLimits {
    max_requests_per_1_minute: Option<u64>,
    max_tokens_per_1_minute: Option<u64>,
    max_requests_per_1_day: Option<u64>,
    batch_1_day_max_input_tokens: Option<u64>,
}

/// Models that a project may use.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Models {
    Allow(Vec<String>),
    Deny(Vec<String>),
}

impl Project {
    /// Returns the budget of a month.
    fn budget(&self) -> Result<Option<Dollars>, String> {
        let budget = self.monthly_budget.as_deref().map(str::parse).transpose();
        budget.map_err(|error| format!("monthly_budget: {error}"))
    }
}

/// Change that makes the server equal to the file.
struct Change {
    /// Description for people.
    text: String,
    /// Path below the project.
    path: String,
    body: Value,
}

/// Changes of one project.
struct Plan {
    slug: String,
    /// Id of the project; none if it does not exist yet.
    id: Option<String>,
    /// Name with which the project is created.
    name: String,
    changes: Vec<Change>,
}

impl Apply {
    pub(super) async fn run(self, transport: &Transport) -> Result<(), Error> {
        let plans = self.plan(transport).await?;
        let is_equal = plans.iter().all(|plan| plan.id.is_some() && plan.changes.is_empty());
        for plan in &plans {
            if plan.id.is_none() {
                outln!("{}: create the project \"{}\"", plan.slug, plan.name);
            }
            for change in &plan.changes {
                outln!("{}: {}", plan.slug, change.text);
            }
        }
        if is_equal {
            outln!("nothing to change");
        } else if self.dry_run {
            outln!("not applied: --dry-run");
        } else {
            for plan in &plans {
                plan.apply(transport).await?;
            }
            outln!("applied");
        }
        Ok(())
    }

    /// Compares the file with the server; changes nothing.
    async fn plan(&self, transport: &Transport) -> Result<Vec<Plan>, Error> {
        let wanted = self.read()?;
        let existing = transport.list("organization/projects?include_archived=true", None).await?;
        let (mut plans, mut names) = (Vec::new(), BTreeSet::new());
        for (slug, project) in wanted {
            let failed = |cause: String| self.failed(&slug, &cause);
            let found = existing.iter().find(|found| text(found, "/slug") == slug);
            let name = project.name.clone().unwrap_or_else(|| slug.clone());
            if found.is_some_and(|found| text(found, "/status") == "archived") {
                return Err(failed("the project is archived; remove it from the file".into()));
            }
            if found.is_none() && slug_of(&name).as_str() != slug {
                let own = slug_of(&name);
                return Err(failed(format!(
                    "a project with the name \"{name}\" gets the slug `{own}`; name the table \
                     `projects.{own}`, or create the project without a name and rename it later"
                )));
            }
            let id = found.map(|found| text(found, "/id"));
            if (found.is_none() || project.name.is_some())
                && (!names.insert(name.to_ascii_lowercase())
                    || is_taken(&existing, id.as_deref(), &name))
            {
                return Err(failed(format!("another project has the name \"{name}\"")));
            }
            let current_name = found.map(|found| text(found, "/name"));
            let changes = changes(transport, id.as_deref(), current_name, &project).await?;
            plans.push(Plan { slug, id, name, changes });
        }
        Ok(plans)
    }

    /// Reads and checks the file.
    fn read(&self) -> Result<BTreeMap<String, Project>, Error> {
        let shown = self.file.display();
        let content = std::fs::read_to_string(&self.file)
            .map_err(|error| Error::Usage(format!("{shown}: {error}")))?;
        let File { mut projects } = toml::from_str(&content)
            .map_err(|error| Error::Usage(format!("{shown}: {error}\nnothing was applied")))?;
        for (slug, project) in &mut projects {
            if !is_slug(slug) {
                let cause = "a slug has 1 to 63 lower-case letters, digits and hyphens";
                return Err(self.failed(slug, cause));
            }
            if let Some(name) = &mut project.name {
                *name = check_name(name)
                    .map_err(|fault| self.failed(slug, &format!("the name: {fault}")))?
                    .to_owned();
            }
            project.limits.values().map_err(|cause| self.failed(slug, &cause))?;
            project.budget().map_err(|cause| self.failed(slug, &cause))?;
            for (model, limits) in &project.model_limits {
                let is_too_large = limits.values().any(|(_, value)| value > MAX_LIMIT);
                if model.is_empty() || is_too_large {
                    let cause = format!(
                        "model_limits.\"{model}\": expected the name of a model, and limits up to \
                         {MAX_LIMIT}"
                    );
                    return Err(self.failed(slug, &cause));
                }
            }
            if let Some(Models::Allow(names) | Models::Deny(names)) = &project.models
                && (names.len() > MAX_RULE_MODELS || names.iter().any(String::is_empty))
            {
                let cause = format!("models: expected up to {MAX_RULE_MODELS} names");
                return Err(self.failed(slug, &cause));
            }
        }
        Ok(projects)
    }

    fn failed(&self, slug: &str, cause: &str) -> Error {
        let shown = self.file.display();
        Error::Usage(format!("{shown}: projects.{slug}: {cause}; nothing was applied"))
    }
}

impl Plan {
    /// Makes the changes. A repeated run continues after an interruption.
    async fn apply(&self, transport: &Transport) -> Result<(), Error> {
        let id = match &self.id {
            Some(id) => id.clone(),
            None => {
                let body = json!({"name": self.name});
                let created = transport.post("organization/projects", &body).await?;
                text(&created, "/id")
            }
        };
        for change in &self.changes {
            let path = format!("organization/projects/{}{}", path_segment(&id), change.path);
            transport.post(&path, &change.body).await?;
        }
        Ok(())
    }
}

/// Returns true if another project that is not archived has a name now.
fn is_taken(existing: &[Value], own_id: Option<&str>, name: &str) -> bool {
    existing.iter().any(|other| {
        text(other, "/status") == "active"
            && own_id != Some(&text(other, "/id"))
            && text(other, "/name").eq_ignore_ascii_case(name)
    })
}

/// Returns true if a text has the form of a slug.
fn is_slug(text: &str) -> bool {
    let is_valid = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    (1..=63).contains(&text.len()) && text.bytes().all(is_valid)
}

impl FileLimits {
    /// Returns the limits that the file names.
    fn values(&self) -> Result<Map<String, Value>, String> {
        let bytes = self.max_stored_bytes.as_deref().map(str::parse::<Size>).transpose();
        let bytes = bytes.map_err(|error| format!("max_stored_bytes: {error}"))?;
        let seconds = |lifetime: Span| lifetime_seconds(lifetime.duration());
        let value = |limit| match limit {
            Limit::StoredBytes => bytes.map(Size::bytes),
            Limit::StoredFiles => self.max_stored_files,
            Limit::OpenBatches => self.max_open_batches,
            Limit::RequestsPerBatch => self.max_requests_per_batch,
            Limit::RequestsInFlight => self.max_requests_in_flight,
            Limit::Weight => self.weight,
            Limit::InputFileLifetime => self.input_file_lifetime.map(seconds),
            Limit::OutputFileLifetime => self.output_file_lifetime.map(seconds),
            Limit::ErrorFileLifetime => self.error_file_lifetime.map(seconds),
            Limit::BatchLifetime => self.batch_lifetime.map(seconds),
        };
        let named = Limit::ALL.into_iter().filter_map(|limit| Some((limit, value(limit)?)));
        let checked = named.map(|(limit, value)| match limit.range() {
            range if range.contains(&value) => Ok((limit.name().to_owned(), json!(value))),
            range => {
                Err(format!("{}: expected {} to {}", limit.name(), range.start(), range.end()))
            }
        });
        let mut values = checked.collect::<Result<Map<_, _>, _>>()?;
        for kind in Allowed::ALL {
            let names = match kind {
                Allowed::Plugins => &self.allowed_plugins,
                Allowed::Validators => &self.allowed_validators,
                Allowed::CompletionWindows => &self.allowed_completion_windows,
            };
            let Some(names) = names else { continue };
            if names.len() > MAX_RULE_MODELS || names.contains("") {
                return Err(format!("{}: expected up to {MAX_RULE_MODELS} names", kind.name()));
            }
            values.insert(kind.name().to_owned(), json!(names));
        }
        Ok(values)
    }
}

impl FileModelLimits {
    /// Returns the limits that the file names.
    fn values(&self) -> impl Iterator<Item = (ModelLimit, u64)> {
        let value = |limit| match limit {
            ModelLimit::RequestsPerMinute => self.max_requests_per_1_minute,
            ModelLimit::TokensPerMinute => self.max_tokens_per_1_minute,
            ModelLimit::RequestsPerDay => self.max_requests_per_1_day,
            ModelLimit::EnqueuedTokens => self.batch_1_day_max_input_tokens,
        };
        ModelLimit::ALL.into_iter().filter_map(move |limit| Some((limit, value(limit)?)))
    }
}

/// Returns what differs between the file and a project, which does not exist yet if `id` is none.
async fn changes(
    transport: &Transport,
    id: Option<&str>,
    current_name: Option<String>,
    wanted: &Project,
) -> Result<Vec<Change>, Error> {
    let mut changes = Vec::new();
    if let (Some(current), Some(name)) = (&current_name, &wanted.name)
        && current != name
    {
        let text = format!("name \"{current}\" -> \"{name}\"");
        changes.push(Change { text, path: String::new(), body: json!({"name": name}) });
    }
    let current = async |part: &str| match id {
        None => Ok(Value::Null),
        Some(id) => {
            transport.get(&format!("organization/projects/{}/{part}", path_segment(id))).await
        }
    };
    let limits = current("limits").await?;
    changes.extend(limit_changes(&limits, wanted.limits.values().map_err(Error::Usage)?));
    if let Some(models) = &wanted.models {
        changes.extend(model_changes(&current("model_permissions").await?, models));
    }
    if let Some(budget) = wanted.budget().map_err(Error::Usage)? {
        let now = match current("spend_limit").await {
            // A project without a budget has no such resource.
            Err(Error::NotFound(_)) => Value::Null,
            now => now?,
        };
        changes.extend(budget_change(&now, budget));
    }
    if !wanted.model_limits.is_empty() {
        let now = match id {
            None => Vec::new(),
            Some(id) => {
                let path = format!("organization/projects/{}/rate_limits", path_segment(id));
                transport.list(&path, None).await?
            }
        };
        for (model, limits) in &wanted.model_limits {
            let now = now.iter().find(|now| text(now, "/model") == *model);
            changes.extend(model_limit_changes(now, model, limits));
        }
    }
    Ok(changes)
}

/// Returns the limits that differ from those that the project has of its own.
fn limit_changes(now: &Value, wanted: Map<String, Value>) -> impl Iterator<Item = Change> {
    let own = now.get("own").and_then(Value::as_array);
    wanted.into_iter().filter_map(move |(name, value)| {
        let is_own = own.is_some_and(|own| own.contains(&json!(name)));
        let now = now.get(&name).filter(|_| is_own);
        if now == Some(&value) {
            return None;
        }
        let shown = now.map_or("default".to_owned(), ToString::to_string);
        let text = format!("{name} {shown} -> {value}");
        let body = Value::Object(Map::from_iter([(name, value)]));
        Some(Change { text, path: "/limits".into(), body })
    })
}

fn model_changes(now: &Value, wanted: &Models) -> Option<Change> {
    let (mode, names) = match wanted {
        Models::Allow(names) => ("allow_list", names),
        Models::Deny(names) => ("deny_list", names),
    };
    let names: Vec<&str> =
        names.iter().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect();
    let body = json!({"mode": mode, "model_ids": names});
    let is_same = ["mode", "model_ids"].iter().all(|key| now.get(key) == body.get(key));
    let text = format!("models {mode} {}", names.join(", "));
    (!is_same).then(|| Change { text, path: "/model_permissions".into(), body })
}

fn budget_change(now: &Value, wanted: Dollars) -> Option<Change> {
    let now = now.get("threshold_amount").and_then(Value::as_u64);
    let shown = now.map_or("none".to_owned(), |now| Money::from_cents(now).to_string());
    let text = format!("monthly_budget {shown} -> {}", Money::from_cents(wanted.cents));
    let body = money::body(wanted);
    (now != Some(wanted.cents)).then(|| Change { text, path: "/spend_limit".into(), body })
}

fn model_limit_changes(
    now: Option<&Value>,
    model: &str,
    wanted: &FileModelLimits,
) -> impl Iterator<Item = Change> {
    wanted.values().filter_map(move |(limit, value)| {
        let name = limit.name();
        let now = now.and_then(|now| now.get(name)).and_then(Value::as_u64);
        if now == Some(value) {
            return None;
        }
        let shown = now.map_or("none".to_owned(), |now| now.to_string());
        let text = format!("{model}: {name} {shown} -> {value}");
        let path = format!("/rate_limits/{}", path_segment(&format!("rl-{model}")));
        Some(Change { text, path, body: json!({name: value}) })
    })
}
