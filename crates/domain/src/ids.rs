//! Identifiers of projects, keys, batches and files.
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
    /// Slug of a project, which is the tenant of files and batches. It never changes, and no later
    /// project gets the slug of an archived one.
    TenantId
}

/// Tenant of clients of a server without keys, of `batchwright run`, and of readiness probes.
pub const DEFAULT_TENANT: &str = "default";

id! {
    /// Id of a project in the API, such as `proj_8d0c…`.
    ProjectId
}

id! {
    /// Id of a service account, such as `svc_acct_8d0c…`.
    ServiceAccountId
}

id! {
    /// Id of an API key, such as `key_8d0c…`. The id is no secret.
    KeyId
}

id! {
    /// Id of a webhook endpoint, such as `whe_8d0c…`, unique for its tenant.
    WebhookId
}

id! {
    /// Id of an event, such as `evt_8d0c…`, the same in every delivery.
    EventId
}

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
