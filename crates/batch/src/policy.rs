//! Policy of a tenant: what its project may use, with the defaults of the server.

use std::collections::BTreeMap;

use batchwright_domain::ids::TenantId;
use batchwright_domain::limits::{Limit, Limits, ModelLimits, Permissions};
use batchwright_store::accounts::StorageBounds;
use batchwright_store::{Result, Store};
use batchwright_tenancy::TenantDefaults;

/// Policy of a tenant at one moment.
pub(crate) struct Policy {
    /// Limits that hold.
    pub limits: Limits,
    /// What the tenant may use.
    pub permissions: Permissions,
    /// Limits for models.
    pub model_limits: BTreeMap<String, ModelLimits>,
}

impl Policy {
    /// Reads the policy of a tenant.
    pub(crate) async fn read(
        store: &dyn Store,
        defaults: &TenantDefaults,
        tenant: &TenantId,
    ) -> Result<Self> {
        let stored = store.policy(tenant).await?;
        Ok(Self {
            limits: defaults.fill(stored.limits),
            permissions: stored.permissions,
            model_limits: stored.model_limits,
        })
    }

    /// Returns the bounds of the stored files.
    pub(crate) fn storage(&self) -> StorageBounds {
        let [bytes, files] =
            [Limit::StoredBytes, Limit::StoredFiles].map(|limit| self.limits.get(limit));
        StorageBounds { bytes, files }
    }
}
