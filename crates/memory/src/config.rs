//! Settings of the memory pools.

use batchwright_domain::settings;
use batchwright_domain::settings::{Positive, Value};
use batchwright_domain::units::Size;

settings! {
    /// Settings of how much memory the host may use.
    pub struct MemoryConfig in "memory" {
        /// Memory for the data of clients and providers: lines, responses, results, uploads and
        /// lists
        memory_budget: Budget = "64MiB", "SIZE";
        /// Memory for the instances of all plugins
        instance_memory: Positive<Size> = "128MiB", "SIZE";
    }
}

/// Size of the budget, at least [`Budget::MIN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget(Size);

impl Budget {
    /// The least with which a server works.
    pub const MIN: Size = Size::mib(1);

    /// The budget in bytes.
    pub fn size(self) -> Size {
        self.0
    }
}

impl Value for Budget {
    fn parse(text: &str) -> Result<Self, String> {
        let size: Size = text.parse()?;
        if size < Self::MIN {
            Err(format!("must be at least {}", Self::MIN))
        } else {
            Ok(Self(size))
        }
    }
}
