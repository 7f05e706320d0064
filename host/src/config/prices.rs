//! Prices of models: the tables `[[prices]]` of the config file.

use batchwright_domain::clock::Timestamp;
use batchwright_domain::money::{Price, TokenPrice};
use batchwright_domain::settings::Given;
use batchwright_tenancy::ModelPrice;
use chrono::NaiveDate;
use serde::Deserialize;
use toml::Value;
use toml::value::Datetime;

/// Name of the tables.
pub const SECTION: &str = "prices";

/// Maximum number of prices.
const MAX_PRICES: usize = 10_000;

/// Price as the file has it, in dollars per million tokens.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    model: String,
    input: f64,
    /// Equal to `input` if absent.
    cached_input: Option<f64>,
    /// Zero if absent, as for embeddings.
    #[serde(default)]
    output: f64,
    /// First day (UTC) of the price: a date of TOML, or its text, as programs write it.
    from: Option<Day>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Day {
    Date(Datetime),
    Text(String),
}

/// Reads the prices; `origin` begins the message of an error, given the position of the price.
pub fn read(value: &Value, origin: impl Fn(usize) -> String, given: &mut Given) -> Vec<ModelPrice> {
    let Value::Array(entries) = value else {
        given.add_error(format!("{}: write each price as a table [[prices]]", origin(0)));
        return Vec::new();
    };
    if entries.len() > MAX_PRICES {
        given.add_error(format!("{}: there are more than {MAX_PRICES} prices", origin(0)));
        return Vec::new();
    }
    let mut prices: Vec<ModelPrice> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let parsed = entry
            .clone()
            .try_into::<Entry>()
            .map_err(|error| error.message().trim_end().to_owned())
            .and_then(price);
        match parsed {
            Ok(price) => {
                let is_same =
                    |other: &ModelPrice| (&other.model, other.from) == (&price.model, price.from);
                if prices.iter().any(is_same) {
                    let model = &price.model;
                    given.add_error(format!(
                        "{}: prices: `{model}` has two prices from the same day",
                        origin(index)
                    ));
                }
                prices.push(price);
            }
            Err(error) => given.add_error(format!("{}: prices: {error}", origin(index))),
        }
    }
    prices
}

fn price(entry: Entry) -> Result<ModelPrice, String> {
    if entry.model.is_empty() {
        return Err("`model` is empty".into());
    }
    let token = |name: &str, dollars: f64| {
        TokenPrice::per_million(dollars).ok_or_else(|| {
            format!(
                "`{name}` is {dollars}; write dollars per million tokens, from 0 to {}, with at \
                 most six decimals",
                TokenPrice::MAX_PER_MILLION
            )
        })
    };
    let price = Price {
        input: token("input", entry.input)?,
        cached_input: token("cached_input", entry.cached_input.unwrap_or(entry.input))?,
        output: token("output", entry.output)?,
    };
    let from = match entry.from {
        None => None,
        Some(Day::Date(date)) => Some(first_moment(date)?),
        Some(Day::Text(text)) => {
            let wrong = |_| format!("`from` is \"{text}\"; write a day, such as 2026-01-31");
            Some(first_moment(text.parse().map_err(wrong)?)?)
        }
    };
    Ok(ModelPrice { model: entry.model, from, price })
}

/// Returns the beginning of a day (UTC).
fn first_moment(date: Datetime) -> Result<Timestamp, String> {
    let day = match (date.date, date.time, date.offset) {
        (Some(day), None, None) => {
            NaiveDate::from_ymd_opt(i32::from(day.year), u32::from(day.month), u32::from(day.day))
        }
        _ => None,
    };
    day.and_then(|day| day.and_hms_opt(0, 0, 0))
        .map(|day| Timestamp::from_millis(day.and_utc().timestamp_millis()))
        .ok_or_else(|| format!("`from` is {date}; write a day, such as 2026-01-31"))
}
