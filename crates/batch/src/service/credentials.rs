//! Credentials that a project sets for the plugins that allow it.

use batchwright_domain::ids::TenantId;
use batchwright_domain::limits::Allowed;
use batchwright_store::Result;
use batchwright_store::accounts::{Actor, SecretRecord};

use crate::credentials::{CredentialError, ProjectCredentials};
use crate::service::Service;

impl Service {
    /// Returns the credentials that a project has set.
    pub async fn credentials(&self, tenant: &TenantId) -> Result<Vec<SecretRecord>> {
        self.store.secrets(tenant, None).await
    }

    /// Sets a credential of a project, which takes effect with the next request.
    pub async fn set_credential(
        &self,
        tenant: &TenantId,
        (plugin, name): (&str, &str),
        secret: &str,
        by: Actor,
    ) -> std::result::Result<SecretRecord, CredentialError> {
        match self.accepting(tenant, plugin, name).await? {
            Some(credentials) => credentials.set(tenant, (plugin, name), secret, by).await,
            None => {
                let (plugin, name) = (plugin.to_owned(), name.to_owned());
                Err(CredentialError::NotAccepted { plugin, name })
            }
        }
    }

    /// Deletes a credential of a project; returns false if there is none.
    pub async fn delete_credential(
        &self,
        tenant: &TenantId,
        (plugin, name): (&str, &str),
        by: Actor,
    ) -> Result<bool> {
        match &self.credentials {
            Some(credentials) => credentials.delete(tenant, (plugin, name), by).await,
            // The secrets of a server that has lost its key can be deleted.
            None => self.store.delete_secret(tenant, plugin, name, by).await,
        }
    }

    /// Returns the credentials if a plugin of the project takes this one from projects.
    async fn accepting(
        &self,
        tenant: &TenantId,
        plugin: &str,
        name: &str,
    ) -> Result<Option<&ProjectCredentials>> {
        let permissions = self.permissions(tenant).await?;
        let plugins = self.registry.current();
        let found = plugins.adapters().find(|found| found.name() == plugin);
        let accepts = found.is_some_and(|found| {
            found.serves(tenant) && found.routing().from_projects.iter().any(|known| known == name)
        });
        let accepts = accepts && permissions.allows(Allowed::Plugins, plugin);
        Ok(self.credentials.as_deref().filter(|_| accepts))
    }
}
