//! Prices of models, from which costs follow.

use batchwright_domain::clock::Timestamp;
use batchwright_domain::money::Price;

/// Price of a model from a time on.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelPrice {
    /// Name of the model as its provider knows it.
    pub model: String,
    /// Time from which the price is valid; none is always.
    pub from: Option<Timestamp>,
    /// Price.
    pub price: Price,
}

/// Prices of all models.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prices(Vec<ModelPrice>);

impl Prices {
    /// Creates the table. The order of the entries has no meaning.
    pub fn new(mut entries: Vec<ModelPrice>) -> Self {
        entries.sort_by(|one, other| (&one.model, one.from).cmp(&(&other.model, other.from)));
        Self(entries)
    }

    /// Returns the price of a model at a time; none if it is unknown.
    pub fn at(&self, model: &str, at: Timestamp) -> Option<&Price> {
        let first = self.0.partition_point(|entry| entry.model.as_str() < model);
        let of_model = self.0.get(first..).unwrap_or_default();
        let valid = of_model
            .iter()
            .take_while(|entry| entry.model == model && entry.from.is_none_or(|from| from <= at));
        valid.last().map(|entry| &entry.price)
    }
}

#[cfg(test)]
mod tests {
    use batchwright_domain::money::TokenPrice;

    use super::*;

    #[test]
    fn latest_price_that_has_begun_is_valid() {
        let entry = |model: &str, from: Option<i64>, dollars: f64| ModelPrice {
            model: model.to_owned(),
            from: from.map(Timestamp::from_millis),
            price: Price { input: TokenPrice::per_million(dollars).unwrap(), ..Price::default() },
        };
        let prices = Prices::new(vec![
            entry("b", Some(50), 3.0),
            entry("a", Some(20), 2.0),
            entry("a", None, 1.0),
            entry("c", Some(5), 9.0),
        ]);
        let cost = |model, at| {
            let price = prices.at(model, Timestamp::from_millis(at))?;
            Some(price.input.cost(1_000_000).to_string())
        };
        assert_eq!(cost("a", 19).as_deref(), Some("$1.00"));
        assert_eq!(cost("a", 20).as_deref(), Some("$2.00"));
        assert_eq!(cost("b", 49), None);
        assert_eq!(cost("b", 50).as_deref(), Some("$3.00"));
        assert_eq!(cost("unknown", 50), None);
    }
}
