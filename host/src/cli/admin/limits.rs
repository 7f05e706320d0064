//! `batchwright admin limits` and `batchwright admin models`

use std::str::FromStr;

use batchwright_domain::limits::{Allowed, Limit, ModelLimit, lifetime_seconds};
use batchwright_domain::units::{Size, Span};
use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::projects::path_of;
use super::text;
use super::transport::Transport;
use crate::cli::client::path_segment;
use crate::cli::terminal::outln;
use crate::error::Error;

/// Value of a limit: a number, or the default of the server, which is none for models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Given<T> {
    Default,
    Value(T),
}

impl<T: FromStr<Err = String>> FromStr for Given<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "default" | "none" => Ok(Self::Default),
            text => T::from_str(text).map(Self::Value),
        }
    }
}

/// Number of a limit; 0 allows nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number(u64);

impl FromStr for Number {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .map(Self)
            .map_err(|_| format!("`{text}` is not a number; write a whole number, or `default`"))
    }
}

/// Names, separated by commas.
#[derive(Clone)]
pub(super) struct Names(Vec<String>);

impl FromStr for Names {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<_> = text.split(',').map(|name| name.trim().to_owned()).collect();
        match names.iter().any(String::is_empty) {
            true => Err("expected names separated by commas, or `default`".into()),
            false => Ok(Self(names)),
        }
    }
}

#[derive(Subcommand)]
pub(super) enum LimitsCommand {
    /// Show the limits of a project, and what it uses
    Show {
        /// Id, slug or name of the project
        project: String,
    },
    /// Change limits of a project; `default` is the default of the server again
    Set {
        /// Id, slug or name of the project
        project: String,
        /// Total size of the stored files, such as 10GiB
        #[arg(long, value_name = "SIZE")]
        max_stored_bytes: Option<Given<Size>>,
        /// Number of stored files
        #[arg(long, value_name = "N")]
        max_stored_files: Option<Given<Number>>,
        /// Number of batches that have not ended
        #[arg(long, value_name = "N")]
        max_open_batches: Option<Given<Number>>,
        /// Number of requests in a batch
        #[arg(long, value_name = "N")]
        max_requests_per_batch: Option<Given<Number>>,
        /// Number of requests in flight, over all plugins
        #[arg(long, value_name = "N")]
        max_requests_in_flight: Option<Given<Number>>,
        /// Weight in the shares of providers, from 1 to 1000; 1 by default
        #[arg(long, value_name = "N")]
        weight: Option<Given<Number>>,
        /// Lifetime of an input file whose upload sets none, such as 30d
        #[arg(long, value_name = "TIME")]
        input_file_lifetime: Option<Given<Span>>,
        /// Lifetime of an output file whose batch sets none; 0s keeps it forever
        #[arg(long, value_name = "TIME")]
        output_file_lifetime: Option<Given<Span>>,
        /// Lifetime of an error file whose batch sets none; 0s keeps it forever
        #[arg(long, value_name = "TIME")]
        error_file_lifetime: Option<Given<Span>>,
        /// Time that a batch is kept after its end
        #[arg(long, value_name = "TIME")]
        batch_lifetime: Option<Given<Span>>,
        /// Adapters whose models the project may use, separated by commas
        #[arg(long, value_name = "NAMES")]
        allowed_plugins: Option<Given<Names>>,
        /// Validators that judge the requests of the project
        #[arg(long, value_name = "NAMES")]
        allowed_validators: Option<Given<Names>>,
        /// Completion windows that its batches may have
        #[arg(long, value_name = "NAMES")]
        allowed_completion_windows: Option<Given<Names>>,
    },
    /// Change limits of a project for a model; `none` removes a limit
    Model {
        /// Id, slug or name of the project
        project: String,
        /// Name of the model as its provider knows it
        model: String,
        /// Requests that begin within 60 seconds
        #[arg(long, value_name = "N")]
        requests_per_minute: Option<Given<Number>>,
        /// Tokens of requests that begin within 60 seconds
        #[arg(long, value_name = "N")]
        tokens_per_minute: Option<Given<Number>>,
        /// Requests of a day (UTC)
        #[arg(long, value_name = "N")]
        requests_per_day: Option<Given<Number>>,
        /// Input tokens of batches that have not ended
        #[arg(long, value_name = "N")]
        enqueued_tokens: Option<Given<Number>>,
    },
}

impl LimitsCommand {
    pub(super) async fn run(self, transport: &Transport, as_json: bool) -> Result<(), Error> {
        match self {
            Self::Show { project } => {
                show(transport, &project, as_json).await?;
            }
            Self::Set {
                project,
                max_stored_bytes,
                max_stored_files,
                max_open_batches,
                max_requests_per_batch,
                max_requests_in_flight,
                weight,
                input_file_lifetime,
                output_file_lifetime,
                error_file_lifetime,
                batch_lifetime,
                allowed_plugins,
                allowed_validators,
                allowed_completion_windows,
            } => {
                let bytes = max_stored_bytes.map(|limit| match limit {
                    Given::Default => Value::Null,
                    Given::Value(size) => json!(size.bytes()),
                });
                let changes = changes([
                    (Limit::StoredBytes.name(), bytes),
                    (Limit::StoredFiles.name(), number(max_stored_files)),
                    (Limit::OpenBatches.name(), number(max_open_batches)),
                    (Limit::RequestsPerBatch.name(), number(max_requests_per_batch)),
                    (Limit::RequestsInFlight.name(), number(max_requests_in_flight)),
                    (Limit::Weight.name(), number(weight)),
                    (Limit::InputFileLifetime.name(), seconds(input_file_lifetime)),
                    (Limit::OutputFileLifetime.name(), seconds(output_file_lifetime)),
                    (Limit::ErrorFileLifetime.name(), seconds(error_file_lifetime)),
                    (Limit::BatchLifetime.name(), seconds(batch_lifetime)),
                    (Allowed::Plugins.name(), names(allowed_plugins)),
                    (Allowed::Validators.name(), names(allowed_validators)),
                    (Allowed::CompletionWindows.name(), names(allowed_completion_windows)),
                ])?;
                let path = path_of(transport, &project).await?;
                transport.post(&format!("{path}/limits"), &changes).await?;
                show(transport, &project, as_json).await?;
            }
            Self::Model {
                project,
                model,
                requests_per_minute,
                tokens_per_minute,
                requests_per_day,
                enqueued_tokens,
            } => {
                let changes = changes([
                    (ModelLimit::RequestsPerMinute.name(), number(requests_per_minute)),
                    (ModelLimit::TokensPerMinute.name(), number(tokens_per_minute)),
                    (ModelLimit::RequestsPerDay.name(), number(requests_per_day)),
                    (ModelLimit::EnqueuedTokens.name(), number(enqueued_tokens)),
                ])?;
                let path = path_of(transport, &project).await?;
                let path = format!("{path}/rate_limits/{}", path_segment(&format!("rl-{model}")));
                transport.post(&path, &changes).await?;
                show(transport, &project, as_json).await?;
            }
        }
        Ok(())
    }
}

fn number(limit: Option<Given<Number>>) -> Option<Value> {
    limit.map(|limit| match limit {
        Given::Default => Value::Null,
        Given::Value(Number(number)) => json!(number),
    })
}

fn seconds(lifetime: Option<Given<Span>>) -> Option<Value> {
    lifetime.map(|lifetime| match lifetime {
        Given::Default => Value::Null,
        Given::Value(span) => json!(lifetime_seconds(span.duration())),
    })
}

fn names(list: Option<Given<Names>>) -> Option<Value> {
    list.map(|list| match list {
        Given::Default => Value::Null,
        Given::Value(Names(names)) => json!(names),
    })
}

/// Returns the body of the limits that are given.
fn changes<const N: usize>(values: [(&str, Option<Value>); N]) -> Result<Value, Error> {
    let given = values.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let changes: Map<String, Value> = given.collect();
    match changes.is_empty() {
        true => Err(Error::Usage("no limit is given; see --help".into())),
        false => Ok(Value::Object(changes)),
    }
}

/// Shows the limits of a project, and those for models.
async fn show(transport: &Transport, project: &str, as_json: bool) -> Result<(), Error> {
    let path = path_of(transport, project).await?;
    let limits = transport.get(&format!("{path}/limits")).await?;
    let models = transport.list(&format!("{path}/rate_limits"), None).await?;
    if as_json {
        outln!("{limits}");
    } else {
        show_limits(&limits);
    }
    for model in models {
        let limited = ModelLimit::ALL.map(ModelLimit::name).into_iter();
        let limited = limited.filter_map(|name| Some((name, model.get(name)?.as_u64()?)));
        let limited: Vec<_> = limited.map(|(name, value)| format!("{name} {value}")).collect();
        match (as_json, limited.is_empty()) {
            (true, _) => outln!("{model}"),
            (false, true) => {}
            (false, false) => outln!("{}: {}", text(&model, "/model"), limited.join(", ")),
        }
    }
    Ok(())
}

fn show_limits(limits: &Value) {
    for name in Limit::ALL.map(Limit::name) {
        let value = limits.get(name).and_then(Value::as_u64);
        let own = limits.get("own").and_then(Value::as_array);
        let is_own = own.is_some_and(|own| own.contains(&json!(name)));
        let used =
            name.strip_prefix("max_").and_then(|used| limits.pointer(&format!("/usage/{used}")));
        let used = used.map(|used| format!("  used {used}")).unwrap_or_default();
        let value = match value {
            Some(value) if is_own => value.to_string(),
            Some(value) => format!("{value}  (default)"),
            // A data folder does not say which defaults its server has.
            None => "default of the server, if it has one".to_owned(),
        };
        outln!("{name:<26} {value}{used}");
    }
    for name in Allowed::ALL.map(Allowed::name) {
        let names = limits.get(name).and_then(Value::as_array);
        let shown = names.map_or("all".to_owned(), |names| {
            let names: Vec<_> = names.iter().filter_map(Value::as_str).collect();
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        });
        outln!("{name:<26} {shown}");
    }
}

#[derive(Subcommand)]
pub(super) enum ModelsCommand {
    /// Show the models that a project may use
    Show {
        /// Id, slug or name of the project
        project: String,
    },
    /// Allow the named models alone
    Allow {
        /// Id, slug or name of the project
        project: String,
        /// Names of models
        #[arg(required = true)]
        models: Vec<String>,
    },
    /// Deny the named models, and allow all others
    Deny {
        /// Id, slug or name of the project
        project: String,
        /// Names of models
        #[arg(required = true)]
        models: Vec<String>,
    },
    /// Allow every model
    Any {
        /// Id, slug or name of the project
        project: String,
    },
}

impl ModelsCommand {
    pub(super) async fn run(self, transport: &Transport, as_json: bool) -> Result<(), Error> {
        let path = async |project: &str| {
            Ok::<_, Error>(format!("{}/model_permissions", path_of(transport, project).await?))
        };
        let rule = match self {
            Self::Show { project } => transport.get(&path(&project).await?).await?,
            Self::Allow { project, models } => {
                let body = json!({"mode": "allow_list", "model_ids": models});
                transport.post(&path(&project).await?, &body).await?
            }
            Self::Deny { project, models } => {
                let body = json!({"mode": "deny_list", "model_ids": models});
                transport.post(&path(&project).await?, &body).await?
            }
            Self::Any { project } => {
                let path = path(&project).await?;
                transport.delete(&path).await?;
                transport.get(&path).await?
            }
        };
        if as_json {
            outln!("{rule}");
            return Ok(());
        }
        let models = rule.get("model_ids").and_then(Value::as_array).into_iter().flatten();
        let models: Vec<_> = models.filter_map(Value::as_str).collect();
        match (text(&rule, "/mode").as_str(), models.is_empty()) {
            ("deny_list", true) => outln!("every model"),
            ("deny_list", false) => outln!("every model except: {}", models.join(", ")),
            (_, true) => outln!("no model"),
            (_, false) => outln!("only: {}", models.join(", ")),
        }
        Ok(())
    }
}
