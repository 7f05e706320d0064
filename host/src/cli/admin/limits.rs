//! `batchwright admin limits` and `batchwright admin models`

use std::str::FromStr;

use batchwright_domain::limits::Limits;
use batchwright_domain::units::Size;
use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::projects::path_of;
use super::text;
use super::transport::Transport;
use crate::cli::terminal::outln;
use crate::error::Error;

/// Value of a limit: a number, or the default of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit<T> {
    Default,
    Value(T),
}

impl<T: FromStr<Err = String>> FromStr for Limit<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "default" => Ok(Self::Default),
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
        max_stored_bytes: Option<Limit<Size>>,
        /// Number of stored files
        #[arg(long, value_name = "N")]
        max_stored_files: Option<Limit<Number>>,
        /// Number of batches that have not ended
        #[arg(long, value_name = "N")]
        max_open_batches: Option<Limit<Number>>,
        /// Number of requests in a batch
        #[arg(long, value_name = "N")]
        max_requests_per_batch: Option<Limit<Number>>,
    },
}

impl LimitsCommand {
    pub(super) async fn run(self, transport: &Transport, as_json: bool) -> Result<(), Error> {
        match self {
            Self::Show { project } => {
                let path = path_of(transport, &project).await?;
                show(&transport.get(&format!("{path}/limits")).await?, as_json);
            }
            Self::Set {
                project,
                max_stored_bytes,
                max_stored_files,
                max_open_batches,
                max_requests_per_batch,
            } => {
                let number = |limit: Option<Limit<Number>>| {
                    limit.map(|limit| match limit {
                        Limit::Default => Value::Null,
                        Limit::Value(Number(number)) => json!(number),
                    })
                };
                let bytes = max_stored_bytes.map(|limit| match limit {
                    Limit::Default => Value::Null,
                    Limit::Value(size) => json!(size.bytes()),
                });
                let values = [
                    bytes,
                    number(max_stored_files),
                    number(max_open_batches),
                    number(max_requests_per_batch),
                ];
                let changes: Map<String, Value> = Limits::NAMES
                    .into_iter()
                    .zip(values)
                    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
                    .collect();
                if changes.is_empty() {
                    return Err(Error::Usage("no limit is given; see --help".into()));
                }
                let path = path_of(transport, &project).await?;
                let path = format!("{path}/limits");
                show(&transport.post(&path, &Value::Object(changes)).await?, as_json);
            }
        }
        Ok(())
    }
}

fn show(limits: &Value, as_json: bool) {
    if as_json {
        outln!("{limits}");
        return;
    }
    for name in Limits::NAMES {
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
        outln!("{name:<24} {value}{used}");
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
