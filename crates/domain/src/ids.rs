//! Identifiers of tenants, batches and files.
//!
//! Each kind has a type of its own, so that two ids cannot be swapped. Any text is an id: a text
//! that the server never gave out is the id of nothing.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;

macro_rules! id {
    ($(#[$docs:meta])* $name:ident) => {
        $(#[$docs])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
        #[serde(from = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Returns the text of the id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, formatter)
            }
        }
    };
}

id! {
    /// Name of a tenant.
    TenantId
}

/// Name of the tenant of requests that carry no key.
pub const DEFAULT_TENANT: &str = "default";

id! {
    /// Id of a batch, unique for its tenant.
    BatchId
}

id! {
    /// Id of a file, unique for its tenant.
    FileId
}

/// Key of the object with the content of a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Tenant of the file.
    pub tenant: TenantId,
    /// File whose content the object is.
    pub file: FileId,
}
