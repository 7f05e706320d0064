//! `batchwright plugin pause` and `resume`: set or remove `paused` in a plugin's TOML file.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use toml_edit::{DocumentMut, value};

use crate::cli::terminal::errln;
use crate::config::{PluginFolder, SettingsArgs};
use crate::error::Error;

/// Arguments of `batchwright plugin pause` and `resume`.
#[derive(Args)]
pub struct Pause {
    /// Name of the plugin, that is the name of its TOML file without `.toml`
    name: String,
    #[command(flatten)]
    settings: SettingsArgs<PluginFolder>,
}

impl Pause {
    /// Writes or removes `paused` in the plugin's TOML file.
    ///
    /// A server that watches the folder applies the change at once.
    pub fn run(self, paused: bool) -> Result<ExitCode, Error> {
        let folder = self.settings.resolve()?.plugins.directory();
        let name = self.name.trim_end_matches(".toml");
        let file = folder.join(format!("{name}.toml"));
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Error::Other(format!("failed to {what} {}: {error}", file.display()))
        };
        if name.contains('/') || !file.is_file() {
            let message = format!(
                "there is no plugin `{name}` in {}; see `batchwright plugin list`",
                folder.display()
            );
            return Err(Error::Usage(message));
        }
        let text = std::fs::read_to_string(&file).map_err(|error| failed("read", &error))?;
        let mut document: DocumentMut = text.parse().map_err(|error| failed("read", &error))?;
        if paused {
            document.insert("paused", value(true));
        } else {
            document.remove("paused");
        }
        // The rename makes the change atomic, because a server may read the file at any time.
        let write = || {
            let mut draft =
                tempfile::Builder::new().prefix(".").suffix(".draft").tempfile_in(&folder)?;
            draft.write_all(document.to_string().as_bytes())?;
            draft.as_file().set_permissions(std::fs::metadata(&file)?.permissions())?;
            draft.as_file().sync_all()?;
            draft.persist(&file).map_err(|error| error.error)?;
            Ok::<_, std::io::Error>(())
        };
        write().map_err(|error| failed("write", &error))?;
        errln!("{name}: {}", if paused { "paused; its batches wait" } else { "resumed" });
        Ok(ExitCode::SUCCESS)
    }
}
