//! `/files`

use std::pin::pin;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::response::Response;

use super::batches::unknown_after;
use super::error::ApiError;
use super::lists::stream_list;
use super::multipart::{Form, Part};
use super::openapi::Errors;
use super::params::{Params, QueryParams, check_anchor, check_lifetime, missing};
use super::wire::{Deleted, Direction, File, List, UploadForm};
use super::{App, Tenant};
use crate::batch::{NewFile, Upload, shortened};
use crate::store::{FileQuery, Order, Paged};

/// What a client may upload a file for; `batch_output` is for the server's own.
const PURPOSES: [&str; 6] = ["assistants", "batch", "evals", "fine-tune", "user_data", "vision"];

/// Upload a file
///
/// The file that a batch reads has the purpose `batch` and one JSON object a line.
// The parts come in any order: the Node SDK sends the file first. So the bytes go to the store at once, and what else is said decides
// at the end.
#[utoipa::path(post, path = "/files", tag = "Files", request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 200, body = File, description = "The file"), Errors))]
pub async fn upload(
    State(batches): App,
    tenant: Tenant,
    request: Request,
) -> Result<Json<File>, ApiError> {
    let mut form = Form::read(request)?;
    let mut upload = batches.upload(&tenant.0).await?;
    let received = receive(&mut form, &mut upload).await;
    let new = match received.and_then(Received::check) {
        Ok(new) => new,
        Err(error) => {
            upload.abort().await;
            return Err(error);
        }
    };
    Ok(Json(upload.finish(new).await?.into()))
}

#[derive(Default)]
struct Received {
    filename: Option<String>,
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
    /// Both as one JSON object, as the Ruby SDK has them.
    expires_after: Option<String>,
}

/// How long a client may pause before what was gathered of its upload is written.
const PAUSE: Duration = Duration::from_millis(50);

async fn receive(form: &mut Form, upload: &mut Upload) -> Result<Received, ApiError> {
    let mut received = Received::default();
    while let Some(mut part) = form.next().await? {
        match part.name.as_str() {
            "file" => {
                if received.filename.is_some() {
                    return Err(twice("file"));
                }
                received.filename = Some(part.filename.take().unwrap_or_else(|| "upload".into()));
                loop {
                    let mut next = pin!(part.chunk());
                    let chunk = tokio::select! {
                        biased;
                        chunk = &mut next => chunk,
                        () = tokio::time::sleep(PAUSE) => {
                            upload.flush().await?;
                            next.await
                        }
                    };
                    let Some(bytes) = chunk? else { break };
                    upload.write(bytes).await?;
                }
            }
            "purpose" => once(&mut received.purpose, part).await?,
            // Brackets are most clients' form, dots that of Go.
            "expires_after[anchor]" | "expires_after.anchor" => {
                once(&mut received.anchor, part).await?
            }
            "expires_after[seconds]" | "expires_after.seconds" => {
                once(&mut received.seconds, part).await?
            }
            "expires_after" => once(&mut received.expires_after, part).await?,
            _ => form.ignore(part).await?,
        }
    }
    Ok(received)
}

async fn once(text: &mut Option<String>, part: Part) -> Result<(), ApiError> {
    if text.is_some() {
        return Err(twice(&part.name));
    }
    *text = Some(part.text().await?);
    Ok(())
}

fn twice(part: &str) -> ApiError {
    ApiError::invalid(part, "invalid_value", format!("There is more than one part '{part}'."))
}

impl Received {
    fn check(self) -> Result<NewFile, ApiError> {
        let filename = self.filename.ok_or_else(|| missing("file"))?;
        let purpose = self.purpose.ok_or_else(|| missing("purpose"))?;
        if !PURPOSES.contains(&purpose.as_str()) {
            let shown = shortened(&purpose);
            let supported = PURPOSES.map(|purpose| format!("'{purpose}'")).join(", ");
            let message = format!(
                "Invalid value: '{shown}'. Supported values are: {supported}. The parameter is 'purpose'."
            );
            return Err(ApiError::invalid("purpose", "invalid_value", message));
        }
        let lifetime = match (self.anchor, self.seconds) {
            (None, None) => match self.expires_after {
                Some(json) => Params::of_json("expires_after", &json)?.lifetime("expires_after")?,
                None => None,
            },
            (Some(_), None) => return Err(missing("expires_after[seconds]")),
            (None, Some(_)) => return Err(missing("expires_after[anchor]")),
            (Some(anchor), Some(seconds)) => {
                // The Go SDK sends it empty if its caller did not set it, and there is only one.
                if !anchor.is_empty() {
                    check_anchor("expires_after[anchor]", &anchor)?;
                }
                Some(check_lifetime("expires_after[seconds]", seconds.parse().ok(), &seconds)?)
            }
        };
        Ok(NewFile { filename: filename.chars().take(255).collect(), purpose, lifetime })
    }
}

/// Get a file
#[utoipa::path(get, path = "/files/{id}", tag = "Files", params(("id" = String, Path, description = "Id of the file")),
    responses((status = 200, body = File, description = "The file"), Errors))]
pub async fn get(
    State(batches): App,
    tenant: Tenant,
    Path(id): Path<String>,
) -> Result<Json<File>, ApiError> {
    match batches.file(&tenant.0, &id).await? {
        Some(file) => Ok(Json(file.into())),
        None => Err(no_file(&id)),
    }
}

/// List files
#[utoipa::path(get, path = "/files", tag = "Files", params(
    ("purpose" = Option<String>, Query, description = "Only files of this purpose"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 10000, description = "Files in the page; as many as may be if absent"),
    ("order" = inline(Option<Direction>), Query, description = "By age; newest first if absent"),
    ("after" = Option<String>, Query, description = "Id of the last file of the page before"),
), responses((status = 200, body = List<File>, description = "A page of files"), Errors))]
pub async fn list(
    State(batches): App,
    tenant: Tenant,
    mut query: QueryParams,
) -> Result<Response, ApiError> {
    let after = query.text("after");
    let order = match query.text("order").as_deref() {
        None | Some("desc") => Order::NewestFirst,
        Some("asc") => Order::OldestFirst,
        Some(_) => {
            return Err(ApiError::invalid(
                "order",
                "invalid_value",
                "Invalid 'order'. Supported values are: 'asc', 'desc'.",
            ));
        }
    };
    let most = batches.settings().max_files_per_page.get() as u64;
    let limit = query.limit(1..=most, most)?;
    let (purpose, now) = (query.text("purpose"), batches.clock().now());
    let of_clients = (batches.memory().clients.clone(), tenant.0.as_str().into());
    let page = move |after: Option<String>, limit: usize, bytes: usize| {
        let limit = limit.min((bytes / LISTED_BYTES).max(1));
        let query = FileQuery { purpose: purpose.clone(), order, after, limit, now };
        let (batches, tenant) = (batches.clone(), tenant.0.clone());
        async move {
            match batches.files(&tenant, query).await? {
                Paged::Page(page) => {
                    Ok(Some((page.items.into_iter().map(File::from).collect(), page.has_more)))
                }
                Paged::UnknownAfter => Ok(None),
            }
        }
    };
    let listed = stream_list(after.clone(), limit, of_clients, page).await?;
    listed.ok_or_else(|| unknown_after("file", &after.unwrap_or_default()))
}

/// What an entry of a list takes in memory and in an answer, in bytes.
const LISTED_BYTES: usize = 700;

/// Delete a file
///
/// It is gone for clients at once; a batch that reads it goes on.
#[utoipa::path(delete, path = "/files/{id}", tag = "Files", params(("id" = String, Path, description = "Id of the file")),
    responses((status = 200, body = Deleted, description = "It is deleted"), Errors))]
pub async fn delete(
    State(batches): App,
    tenant: Tenant,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    if batches.delete_file(&tenant.0, &id).await? {
        Ok(Json(Deleted { id, object: "file", deleted: true }))
    } else {
        Err(no_file(&id))
    }
}

pub fn no_file(id: &str) -> ApiError {
    ApiError::not_found(format!("No file found with id '{}'.", shortened(id)))
}
