//! Records of the plugins that served a batch.

use batchwright_plugin::Plugin;
use batchwright_store::PluginVersion;

/// Returns the record of a plugin: its name, kind, version and digest.
pub(crate) fn served_by(plugin: &Plugin) -> PluginVersion {
    PluginVersion {
        name: plugin.name().to_owned(),
        kind: plugin.kind().to_string(),
        version: plugin.description().version.clone(),
        sha256: plugin.sha256().to_owned(),
    }
}
