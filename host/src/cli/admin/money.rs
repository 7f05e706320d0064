//! `batchwright admin budget` and `batchwright admin usage`

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_domain::money::Money;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::projects::path_of;
use super::text;
use super::transport::Transport;
use crate::cli::client::path_segment;
use crate::cli::terminal::outln;
use crate::error::Error;

/// Budget in dollars, with up to two decimals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dollars {
    pub cents: u64,
}

impl FromStr for Dollars {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || {
            format!(
                "`{text}` is not an amount; write dollars such as 250 or 12.50, up to {}",
                Money::MAX_CENTS / 100
            )
        };
        let (whole, cents) = text.split_once('.').unwrap_or((text, "0"));
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if !(1..=2).contains(&cents.len()) || !is_number(whole) || !is_number(cents) {
            return Err(error());
        }
        let whole: u64 = whole.parse().map_err(|_| error())?;
        let cents: u64 = format!("{cents:0<2}").parse().map_err(|_| error())?;
        let cents = whole.checked_mul(100).and_then(|whole| whole.checked_add(cents));
        let cents = cents.filter(|cents| *cents <= Money::MAX_CENTS).ok_or_else(error)?;
        Ok(Self { cents })
    }
}

#[derive(Subcommand)]
pub(super) enum Budget {
    /// Show the budget of a project, and what it has spent this month
    Show {
        /// Id, slug or name of the project
        project: String,
    },
    /// Set the budget of a project for each month
    Set {
        /// Id, slug or name of the project
        project: String,
        /// Budget in dollars, such as 250 or 12.50
        dollars: Dollars,
    },
    /// Remove the budget of a project
    Remove {
        /// Id, slug or name of the project
        project: String,
    },
}

impl Budget {
    pub(super) async fn run(self, transport: &Transport, as_json: bool) -> Result<(), Error> {
        let path = async |project: &str| {
            Ok::<_, Error>(format!("{}/spend_limit", path_of(transport, project).await?))
        };
        let budget = match self {
            Self::Show { project } => transport.get(&path(&project).await?).await?,
            Self::Set { project, dollars } => {
                transport.post(&path(&project).await?, &body(dollars)).await?
            }
            Self::Remove { project } => {
                let removed = transport.delete(&path(&project).await?).await?;
                if as_json {
                    outln!("{removed}");
                }
                return Ok(());
            }
        };
        if as_json {
            outln!("{budget}");
            return Ok(());
        }
        let cents = budget.get("threshold_amount").and_then(Value::as_u64).unwrap_or_default();
        let spent = budget.get("spent").and_then(Value::as_f64).unwrap_or_default();
        let state = match text(&budget, "/enforcement/status").as_str() {
            "enforcing" => "  (spent: new requests wait until the next month)",
            _ => "",
        };
        outln!("budget {} a month, spent ${spent:.2}{state}", Money::from_cents(cents));
        Ok(())
    }
}

/// Returns the body that sets a budget.
pub(super) fn body(dollars: Dollars) -> Value {
    json!({"threshold_amount": dollars.cents, "currency": "USD", "interval": "month"})
}

/// What usage is grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Group {
    Project,
    Key,
    Model,
}

#[derive(Args)]
pub(super) struct UsageReport {
    /// Id, slug or name of a project; all projects if absent
    #[arg(long)]
    project: Option<String>,
    /// Number of days (UTC), with today
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=366))]
    days: u64,
    /// What the usage is grouped by, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_value = "project,model")]
    by: Vec<Group>,
}

/// Sum of a group.
#[derive(Default)]
struct Sum {
    requests: u64,
    input: u64,
    cached: u64,
    output: u64,
    dollars: f64,
    unpriced: u64,
}

impl UsageReport {
    pub(super) async fn run(self, transport: &Transport, as_json: bool) -> Result<(), Error> {
        let days = Duration::from_secs(self.days.saturating_sub(1).saturating_mul(86_400));
        let start = Clock::system().now().before(days).start_of_day().as_seconds();
        let mut filter = format!("?start_time={start}");
        let mut names = BTreeMap::new();
        for project in transport.list("organization/projects?include_archived=true", None).await? {
            names.insert(text(&project, "/id"), text(&project, "/slug"));
        }
        if let Some(project) = &self.project {
            let id = text(&transport.project(project).await?, "/id");
            filter.push_str(&format!("&project_ids={}", path_segment(&id)));
        }
        let (mut usage_groups, mut cost_groups) = (String::new(), String::new());
        for group in &self.by {
            let (of_usage, of_costs) = match group {
                Group::Project => ("project_id", "project_id"),
                Group::Key => ("api_key_id", "api_key_id"),
                Group::Model => ("model", "line_item"),
            };
            usage_groups.push_str(&format!("&group_by={of_usage}"));
            cost_groups.push_str(&format!("&group_by={of_costs}"));
        }
        let mut sums = BTreeMap::<Vec<String>, Sum>::new();
        let group_of = |result: &Value| -> Vec<String> {
            let value = |group: &Group| match group {
                Group::Project => {
                    let id = text(result, "/project_id");
                    names.get(&id).cloned().unwrap_or(id)
                }
                Group::Key => text(result, "/api_key_id"),
                Group::Model => match text(result, "/line_item").rsplit_once(", ") {
                    Some((model, _)) => model.to_owned(),
                    None => text(result, "/model"),
                },
            };
            self.by.iter().map(value).collect()
        };
        let number = |value: &Value, key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
        for kind in ["completions", "embeddings", "moderations"] {
            let path = format!("organization/usage/{kind}{filter}&limit=31{usage_groups}");
            for result in results(transport, &path, as_json).await? {
                let sum = sums.entry(group_of(&result)).or_default();
                sum.requests = sum.requests.saturating_add(number(&result, "num_model_requests"));
                sum.input = sum.input.saturating_add(number(&result, "input_tokens"));
                sum.cached = sum.cached.saturating_add(number(&result, "input_cached_tokens"));
                sum.output = sum.output.saturating_add(number(&result, "output_tokens"));
            }
        }
        let path = format!("organization/costs{filter}&limit=180{cost_groups}");
        for result in results(transport, &path, as_json).await? {
            let sum = sums.entry(group_of(&result)).or_default();
            sum.dollars += result.pointer("/amount/value").and_then(Value::as_f64).unwrap_or(0.0);
            sum.unpriced = sum.unpriced.saturating_add(number(&result, "unpriced_requests"));
        }
        if !as_json {
            print(&sums);
        }
        Ok(())
    }
}

/// Prints a table of the groups with requests.
fn print(sums: &BTreeMap<Vec<String>, Sum>) {
    outln!(
        "{:<40} {:>10} {:>13} {:>13} {:>13} {:>12}",
        "GROUP",
        "REQUESTS",
        "INPUT",
        "CACHED",
        "OUTPUT",
        "COST"
    );
    for (group, sum) in sums.iter().filter(|(_, sum)| sum.requests > 0) {
        let unpriced = match sum.unpriced {
            0 => String::new(),
            number => format!("  and requests without a price: {number}"),
        };
        outln!(
            "{:<40} {:>10} {:>13} {:>13} {:>13} {:>12}{unpriced}",
            group.join("  "),
            sum.requests,
            sum.input,
            sum.cached,
            sum.output,
            format!("${:.4}", sum.dollars)
        );
    }
}

/// Returns the results of all buckets of a report; prints them as JSON if asked.
async fn results(transport: &Transport, path: &str, as_json: bool) -> Result<Vec<Value>, Error> {
    let (mut all, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = transport.get(&format!("{path}{cursor}")).await?;
        for bucket in page.get("data").and_then(Value::as_array).into_iter().flatten() {
            if as_json {
                outln!("{bucket}");
            }
            all.extend(
                bucket.get("results").and_then(Value::as_array).into_iter().flatten().cloned(),
            );
        }
        match page.get("next_page").and_then(Value::as_str) {
            Some(next) => cursor = format!("&page={}", path_segment(next)),
            None => return Ok(all),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_is_given_in_dollars_with_up_to_two_decimals() {
        for (text, cents) in [("250", 25_000), ("12.5", 1250), ("12.50", 1250), ("0", 0)] {
            assert_eq!(text.parse(), Ok(Dollars { cents }), "{text}");
        }
        for text in ["", "-1", "1.234", "1e3", "4000000.01", "$5", "1.", ".5x"] {
            assert!(text.parse::<Dollars>().is_err(), "{text}");
        }
    }
}
