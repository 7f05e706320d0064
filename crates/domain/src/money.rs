//! Amounts of money, and prices.

use std::fmt;

use crate::usage::TokenUsage;

/// Units of a dollar.
const UNITS_PER_DOLLAR: u64 = 1_000_000_000_000;

/// Units of a cent.
const UNITS_PER_CENT: u64 = UNITS_PER_DOLLAR / 100;

/// Amount in US dollars, counted in units of 10^-12 dollars.
///
/// A price of 10^-6 dollars per million tokens is one unit per token, so the costs of requests are
/// exact sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Money(u64);

impl Money {
    /// Maximum of a budget in cents: four million dollars, which a database can count in units.
    pub const MAX_CENTS: u64 = 400_000_000;

    /// Returns an amount in units of 10^-12 dollars.
    pub const fn from_units(units: u64) -> Self {
        Self(units)
    }

    /// Returns an amount in cents.
    pub const fn from_cents(cents: u64) -> Self {
        Self(cents.saturating_mul(UNITS_PER_CENT))
    }

    /// Returns the units of 10^-12 dollars.
    pub const fn units(self) -> u64 {
        self.0
    }

    /// Returns the amount in dollars, rounded to the precision of the type.
    pub fn dollars(self) -> f64 {
        self.0 as f64 / UNITS_PER_DOLLAR as f64
    }

    /// Returns the sum of two amounts.
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl fmt::Display for Money {
    /// Writes the amount in dollars, with as many digits as it has, and at least two.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dollars, rest) = (self.0 / UNITS_PER_DOLLAR, self.0 % UNITS_PER_DOLLAR);
        let digits = format!("{rest:012}");
        let (cents, small) = digits.split_at_checked(2).unwrap_or(("00", ""));
        write!(formatter, "${dollars}.{cents}{}", small.trim_end_matches('0'))
    }
}

/// Price of a token, in units of [`Money`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenPrice(u64);

impl TokenPrice {
    /// Maximum price in dollars per million tokens.
    pub const MAX_PER_MILLION: f64 = 1_000_000.0;

    /// Returns the price, given the dollars per million tokens; none if they are negative, too many
    /// or have more than six decimals.
    pub fn per_million(dollars: f64) -> Option<Self> {
        if !(0.0..=Self::MAX_PER_MILLION).contains(&dollars) {
            return None;
        }
        let units = dollars * 1e6;
        let rounded = units.round();
        // A text such as 0.15 has no exact binary value.
        ((units - rounded).abs() < 1e-3).then_some(Self(rounded as u64))
    }

    /// Returns the cost of a number of tokens.
    pub fn cost(self, tokens: u64) -> Money {
        Money(self.0.saturating_mul(tokens))
    }
}

/// Prices of the tokens of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Price {
    /// Input tokens that are not cached.
    pub input: TokenPrice,
    /// Input tokens that the provider read from its cache.
    pub cached_input: TokenPrice,
    /// Output tokens.
    pub output: TokenPrice,
}

/// Cost of tokens, by the price that they have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Input tokens that are not cached.
    pub input: Money,
    /// Input tokens that the provider read from its cache.
    pub cached_input: Money,
    /// Output tokens.
    pub output: Money,
}

impl Cost {
    /// Returns the sum of two costs.
    pub const fn plus(self, other: Self) -> Self {
        Self {
            input: self.input.plus(other.input),
            cached_input: self.cached_input.plus(other.cached_input),
            output: self.output.plus(other.output),
        }
    }

    /// Returns the sum of the parts.
    pub const fn total(self) -> Money {
        self.input.plus(self.cached_input).plus(self.output)
    }
}

impl Price {
    /// Returns the cost of a request.
    pub fn cost(&self, usage: TokenUsage) -> Cost {
        let uncached = usage.input.saturating_sub(usage.cached_input);
        Cost {
            input: self.input.cost(uncached),
            cached_input: self.cached_input.cost(usage.cached_input),
            output: self.output.cost(usage.output),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_is_the_exact_sum_of_its_tokens() {
        let price = |dollars| TokenPrice::per_million(dollars).unwrap();
        let price = Price { input: price(0.15), cached_input: price(0.075), output: price(0.6) };
        let usage = TokenUsage { input: 1_000_001, cached_input: 1, output: 1, reasoning: 1 };
        assert_eq!(price.cost(usage).total().to_string(), "$0.150000675");
        assert_eq!(price.cost(TokenUsage::default()).total().to_string(), "$0.00");
        assert_eq!(Money::from_cents(1234).to_string(), "$12.34");
    }

    #[test]
    fn price_has_up_to_six_decimals() {
        assert!(TokenPrice::per_million(0.018_75).is_some());
        assert!(TokenPrice::per_million(0.000_001).is_some());
        for dollars in [-0.1, 0.000_000_5, 1e9, f64::NAN, f64::INFINITY] {
            assert_eq!(TokenPrice::per_million(dollars), None, "{dollars}");
        }
    }
}
