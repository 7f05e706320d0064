//! Events of webhooks.

use crate::status::Status;

macro_rules! event_types {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal;)+) => {
        /// Type of an event, with the name that OpenAI uses.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum EventType {
            $($(#[doc = $doc])+ $name,)+
        }

        impl EventType {
            /// Every type.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Returns the name in the API.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

event_types! {
    /// A batch has completed.
    BatchCompleted = "batch.completed";
    /// A batch has failed.
    BatchFailed = "batch.failed";
    /// A batch has expired.
    BatchExpired = "batch.expired";
    /// A batch was cancelled.
    BatchCancelled = "batch.cancelled";
}

impl EventType {
    /// Returns the type with a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|known| known.as_str() == name)
    }

    /// Returns the event of a batch that ends with a status; none if it does not end.
    pub fn of_batch(status: Status) -> Option<Self> {
        match status {
            Status::Completed => Some(Self::BatchCompleted),
            Status::Failed => Some(Self::BatchFailed),
            Status::Expired => Some(Self::BatchExpired),
            Status::Cancelled => Some(Self::BatchCancelled),
            Status::Validating | Status::InProgress | Status::Finalizing | Status::Cancelling => {
                None
            }
        }
    }
}
