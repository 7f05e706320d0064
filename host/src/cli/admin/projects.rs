//! `batchwright admin project`

use clap::Subcommand;
use serde_json::{Value, json};

use super::transport::Transport;
use super::{text, time};
use crate::cli::client::path_segment;
use crate::cli::terminal::outln;
use crate::error::Error;

#[derive(Subcommand)]
pub(super) enum Project {
    /// Create a project
    Create {
        /// Name of the project
        name: String,
    },
    /// List the projects
    List {
        /// List archived projects as well
        #[arg(long)]
        archived: bool,
    },
    /// Change the name of a project
    Rename {
        /// Id, slug or name of the project
        project: String,
        /// New name
        name: String,
    },
    /// Archive a project: its batches are cancelled, its data can still be read
    Archive {
        /// Id, slug or name of the project
        project: String,
    },
}

impl Project {
    pub(super) async fn run(self, transport: &Transport, as_json: bool) -> Result<(), Error> {
        match self {
            Self::Create { name } => {
                let project =
                    transport.post("organization/projects", &json!({"name": name})).await?;
                show(&project, as_json);
            }
            Self::List { archived } => {
                let path = format!("organization/projects?include_archived={archived}");
                for project in transport.list(&path, None).await? {
                    show(&project, as_json);
                }
            }
            Self::Rename { project, name } => {
                let path = path_of(transport, &project).await?;
                show(&transport.post(&path, &json!({"name": name})).await?, as_json);
            }
            Self::Archive { project } => {
                let path = path_of(transport, &project).await?;
                let project = transport.post(&format!("{path}/archive"), &json!({})).await?;
                show(&project, as_json);
            }
        }
        Ok(())
    }
}

/// Returns the path of a project, given its id, slug or name.
pub(super) async fn path_of(transport: &Transport, project: &str) -> Result<String, Error> {
    let found = transport.project(project).await?;
    Ok(format!("organization/projects/{}", path_segment(&text(&found, "/id"))))
}

fn show(project: &Value, as_json: bool) {
    if as_json {
        outln!("{project}");
        return;
    }
    outln!(
        "{}  {:<20} {:<8} {}  {}",
        text(project, "/id"),
        text(project, "/slug"),
        text(project, "/status"),
        time(project, "/created_at"),
        text(project, "/name")
    );
}
