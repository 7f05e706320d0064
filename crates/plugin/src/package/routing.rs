//! What a plugin serves: tenants, endpoints and models.

use std::collections::BTreeMap;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;

/// What a plugin serves, as the operator configured it.
#[derive(Clone, Debug, Default)]
pub struct Routing {
    /// Validators: position in the order; lower ones run first.
    pub order: i64,
    /// Validators: paths of the endpoints that the operator allows; empty means all.
    pub endpoints: Vec<String>,
    /// Tenants that the plugin serves; empty means all.
    pub tenants: Vec<TenantId>,
    /// Adapters: models that the plugin serves.
    pub models: Vec<String>,
    /// Adapters: models of clients, with the provider's model for each.
    pub aliases: BTreeMap<String, String>,
    /// Adapters: models of requests that name none, by endpoint.
    pub default_models: BTreeMap<Endpoint, String>,
    /// Adapters: credentials that projects may set themselves.
    pub from_projects: Vec<String>,
    /// Adapters: true if the plugin sends no requests for now.
    pub paused: bool,
}

impl Routing {
    /// Returns true if the plugin serves this tenant.
    pub fn serves(&self, tenant: &TenantId) -> bool {
        names(&self.tenants, tenant)
    }

    /// Returns true if the plugin and another one serve a tenant together.
    pub(crate) fn shares_tenant_with(&self, other: &Self) -> bool {
        self.tenants.is_empty()
            || other.tenants.is_empty()
            || self.tenants.iter().any(|tenant| other.serves(tenant))
    }
}

/// Returns true if a list of tenants names a tenant; an empty list names all.
pub(crate) fn names(tenants: &[TenantId], tenant: &TenantId) -> bool {
    tenants.is_empty() || tenants.contains(tenant)
}
