//! Limits of a plugin: the table `[limits]` of its TOML file.

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};

use batchwright_domain::units::{Size, Span};
use serde::Deserialize;

use crate::reference::{Key, Shown};

/// Maximum of `[limits] max_memory`: the size that one slot of the instance pool reserves.
pub(crate) const MAX_MEMORY: Size = Size::mib(4096);

/// Maximum of `[limits] max_table_elements`: the size that one slot of the instance pool reserves.
pub(crate) const MAX_TABLE_ELEMENTS: usize = 100_000;

/// Reuse of an instance between calls.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// Instance for many calls of one tenant, one after the other.
    #[default]
    PerTenant,
    /// Instance for one call.
    PerCall,
}

impl fmt::Display for Isolation {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self {
            Self::PerTenant => "per-tenant",
            Self::PerCall => "per-call",
        })
    }
}

impl Shown for Isolation {
    const KIND: &'static str = "string";

    fn shown(&self) -> String {
        format!("`{self}`")
    }
}

/// What tenants share equally.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum ShareBy {
    /// Exchanges in flight.
    #[default]
    Exchanges,
    /// Tokens.
    Tokens,
}

impl fmt::Display for ShareBy {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self {
            Self::Exchanges => "exchanges",
            Self::Tokens => "tokens",
        })
    }
}

impl Shown for ShareBy {
    const KIND: &'static str = "string";

    fn shown(&self) -> String {
        format!("`{self}`")
    }
}

impl From<ShareBy> for batchwright_egress::ShareBy {
    fn from(by: ShareBy) -> Self {
        match by {
            ShareBy::Exchanges => Self::Exchanges,
            ShareBy::Tokens => Self::Tokens,
        }
    }
}

/// Percentage of at most [`Percent::MAX`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "u8")]
pub struct Percent(u8);

impl Percent {
    /// Maximum: batches always have a share.
    const MAX: u8 = 90;

    /// Returns the percentage.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for Percent {
    type Error = String;

    fn try_from(percent: u8) -> Result<Self, String> {
        if percent > Self::MAX {
            return Err(format!("expected a percentage from 0 to {}", Self::MAX));
        }
        Ok(Self(percent))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

impl Shown for Percent {
    const KIND: &'static str = "integer";

    fn shown(&self) -> String {
        format!("`{self}`")
    }
}

/// Returns a number that is at least 1.
fn count(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN)
}

/// Declares the limits, each with its default.
macro_rules! limits {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[doc = $doc:literal])+ pub $field:ident: $type:ty = $default:expr;)*
        }
    ) => {
        $(#[$meta])*
        pub struct $name {
            $($(#[doc = $doc])+ pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        /// Returns the keys of the table `[limits]`, in the order of their declaration.
        pub fn limit_keys() -> Vec<Key> {
            let defaults = $name::default();
            vec![$(Key {
                name: stringify!($field),
                kind: <$type as Shown>::KIND,
                default: defaults.$field.shown(),
                meaning: concat!($($doc),+).trim_ascii(),
            }),*]
        }
    };
}

limits! {
    /// Limits of a plugin. The `[limits]` table of the TOML file has the same names.
    #[derive(Clone, Debug, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct Limits {
        /// Linear memory of an instance, as the sum of its memories. The default holds a line of 16
        /// MiB and a copy of it.
        pub max_memory: Size = Size::mib(64);
        /// CPU time of one call; for validators, CPU time per started 1,000 lines or MiB.
        pub call_timeout: Span = Span::milliseconds(100);
        /// Size of the result of one call.
        pub max_output: Size = Size::mib(16);
        /// Elements of each table of an instance.
        pub max_table_elements: NonZeroU32 = count(50_000);
        /// Open handles of an instance. A language runtime needs about a dozen for standard streams
        /// and clocks.
        pub max_handles: NonZeroU32 = count(1000);
        /// Reuse of instances. `per-tenant`: calls of one tenant share instances. `per-call`: each
        /// call has a new instance.
        pub isolation: Isolation = Isolation::PerTenant;
        /// Calls after which an instance is replaced.
        pub max_calls_per_instance: NonZeroU32 = count(100_000);
        /// Steps of one attempt. The limit ends an endless sequence of `resume` calls.
        pub max_steps: NonZeroU32 = count(1000);
        /// Duration of one wait that an adapter requests between polls of a provider.
        pub max_wait: Span = Span::seconds(3600);
        /// Exchanges in flight.
        pub max_in_flight: NonZeroUsize = NonZeroUsize::new(64).unwrap_or(NonZeroUsize::MIN);
        /// Percent of `max_in_flight`, 0 to 90, that lines of batches leave free while there are
        /// online requests, and for five minutes after the last one.
        pub online_share: Percent = Percent(10);
        /// What tenants share equally. `exchanges`: exchanges in flight. `tokens`: tokens, for a
        /// provider whose limit is in tokens.
        pub share_by: ShareBy = ShareBy::Exchanges;
        /// Exchanges started per minute; absent means no limit.
        pub requests_per_minute: Option<NonZeroU32> = None;
        /// Timeout of a connection attempt.
        pub connect_timeout: Span = Span::seconds(10);
        /// Timeout until the head of a response. A model may need minutes before its first byte.
        pub first_byte_timeout: Span = Span::seconds(600);
        /// Timeout of a whole exchange.
        pub exchange_timeout: Span = Span::seconds(900);
        /// Size of a response body of a provider.
        pub max_response_body: Size = Size::mib(16);
    }
}
