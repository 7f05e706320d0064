//! Settings of the plugin directory and of compilation.

use std::path::PathBuf;

use batchwright_domain::settings;
use batchwright_domain::settings::{Positive, Value};
use batchwright_domain::units::{Size, Span};

settings! {
    /// Settings of where plugins come from and of how they are compiled.
    pub struct PluginsConfig in "plugins" {
        /// Plugin folder, with one TOML file per plugin
        plugins: Option<PathBuf> = "" (shown "the folder `plugins` beside this program"), "DIR";
        /// Folders where a component is looked up that is not beside its plugin file, separated by
        /// commas
        components: Vec<String> = "" (shown "none"), "LIST";
        /// Folder with secrets of projects, each in the file SLUG/PLUGIN/CREDENTIAL
        secrets: Option<PathBuf> = "" (shown "none"), "DIR";
        /// Key that seals the secrets that projects set themselves, as `env:NAME` or `file:PATH`:
        /// 32 bytes in base64
        credential_key: Option<String> = ""
            (shown "none, and projects can set no secrets"), "SOURCE";
        /// Folder of compiled plugins, which only the server may write to
        cache: Option<PathBuf> = "" (shown "DATA/cache"), "DIR";
        /// Maximum time to compile one plugin; a plugin that takes longer is rejected
        compile_timeout: Positive<Span> = "5m", "TIME";
        /// Maximum memory to compile one plugin; a plugin that needs more is rejected
        compile_memory: Positive<Size> = "4GiB", "SIZE";
        /// File of public keys in OpenSSH format, one per line; only plugins that are signed with
        /// one of these keys are loaded
        trusted_keys: Option<PathBuf> = "" (shown "none, and unsigned plugins are loaded"), "FILE";
        /// Names of the plugins that must be loaded to create a batch, separated by commas;
        /// `none` requires no plugin
        required_plugins: RequiredPlugins = ""
            (shown "a validator for each endpoint that is served"), "LIST";
    }
}

impl PluginsConfig {
    /// The plugin folder.
    pub fn directory(&self) -> PathBuf {
        self.plugins.clone().unwrap_or_else(default_directory)
    }
}

/// Returns the folder `plugins` beside the running program.
///
/// If the path of the program is unknown, the folder is `plugins` in the working directory.
fn default_directory() -> PathBuf {
    let program = std::env::current_exe().ok();
    program
        .and_then(|program| Some(program.parent()?.join("plugins")))
        .unwrap_or_else(|| "plugins".into())
}

/// Plugins that must be loaded to create a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequiredPlugins {
    /// Any validator for each endpoint that an adapter serves.
    Validators,
    /// Plugins with these names; none if the list is empty.
    Named(Vec<String>),
}

impl Value for RequiredPlugins {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::Validators);
        }
        let names = Vec::<String>::parse(text)?;
        match names.as_slice() {
            [none] if none == "none" => Ok(Self::Named(Vec::new())),
            [] => Err("name at least one plugin, or write `none` to require none".into()),
            _ => Ok(Self::Named(names)),
        }
    }
}
