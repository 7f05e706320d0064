//! `/files`

use std::pin::pin;
use std::time::Duration;

use axum::extract::{Path, Request, State};
use axum::response::Response;
use axum::{Extension, Json};
use batchwright_batch::{NewFile, Upload};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::FileId;
use batchwright_domain::text::truncate_for_message;
use batchwright_store::{FileQuery, Order, Paged};

use super::App;
use super::batches::unknown_after;
use super::error::ApiError;
use super::json_response::stream_list;
use super::multipart::{Form, Part};
use super::openapi::Errors;
use super::params::{Params, check_anchor, check_lifetime, missing_parameter};
use super::query_params::QueryParams;
use super::wire::{Deleted, Direction, File, List, UploadForm};
use crate::auth::{DeleteFiles, ReadFiles, Tenant, UploadFiles};
use crate::traces::CreatedId;

/// Purposes that an upload may have. The server itself uses `batch_output` for result files.
const PURPOSES: [&str; 6] = ["assistants", "batch", "evals", "fine-tune", "user_data", "vision"];

/// Uploads a file
///
/// The input file of a batch has the purpose `batch` and one JSON object per line.
// Clients send the parts in any order, and the Node SDK sends the file first. So the content goes
// to the store at once, and the other parts are checked at the end.
#[utoipa::path(post, path = "/files", tag = "Files",
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 200, body = File, description = "The file"), Errors))]
pub(crate) async fn upload(
    State(app): App,
    tenant: Tenant<UploadFiles>,
    request: Request,
) -> Result<(Extension<CreatedId>, Json<File>), ApiError> {
    let mut form = Form::read(request)?;
    let mut upload = app.service.upload(&tenant.0).await?;
    let parts = read_parts(&mut form, &mut upload).await;
    let new = match parts.and_then(Parts::check) {
        Ok(new) => new,
        Err(error) => {
            upload.abort().await;
            return Err(error);
        }
    };
    let file = upload.finish(new).await?;
    let created = CreatedId(file.id.to_string());
    Ok((Extension(created), Json(file.into())))
}

/// Text parts of an upload form, and the name of the uploaded file.
#[derive(Default)]
struct Parts {
    filename: Option<String>,
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
    /// Anchor and seconds as one JSON object: the Ruby SDK sends them so.
    expires_after: Option<String>,
}

/// Time without data after which the buffered part of an upload is flushed to the store.
const FLUSH_DELAY: Duration = Duration::from_millis(50);

/// Reads a form: writes the content of the file to `upload`, and returns the other parts.
async fn read_parts(form: &mut Form, upload: &mut Upload) -> Result<Parts, ApiError> {
    let mut parts = Parts::default();
    while let Some(mut part) = form.next().await? {
        match part.name.as_str() {
            "file" => {
                if parts.filename.is_some() {
                    return Err(duplicate_part("file"));
                }
                parts.filename = Some(part.filename.take().unwrap_or_else(|| "upload".into()));
                loop {
                    let mut next = pin!(part.chunk());
                    let chunk = tokio::select! {
                        biased;
                        chunk = &mut next => chunk,
                        () = tokio::time::sleep(FLUSH_DELAY) => {
                            upload.flush().await?;
                            next.await
                        }
                    };
                    let Some(bytes) = chunk? else { break };
                    upload.write(&bytes).await?;
                }
            }
            "purpose" => read_once(&mut parts.purpose, part).await?,
            // The Go SDK writes a dot, most other clients write brackets.
            "expires_after[anchor]" | "expires_after.anchor" => {
                read_once(&mut parts.anchor, part).await?
            }
            "expires_after[seconds]" | "expires_after.seconds" => {
                read_once(&mut parts.seconds, part).await?
            }
            "expires_after" => read_once(&mut parts.expires_after, part).await?,
            _ => form.ignore(part).await?,
        }
    }
    Ok(parts)
}

/// Reads a text part. Fails if the form already had the part.
async fn read_once(text: &mut Option<String>, part: Part) -> Result<(), ApiError> {
    if text.is_some() {
        return Err(duplicate_part(&part.name));
    }
    *text = Some(part.text().await?);
    Ok(())
}

fn duplicate_part(part: &str) -> ApiError {
    let message = format!("The form has more than one part '{part}'; send one.");
    ApiError::invalid(part, ErrorCode::InvalidValue, message)
}

impl Parts {
    /// Checks the parts. Fails if a required part is missing or a value is invalid.
    fn check(self) -> Result<NewFile, ApiError> {
        let filename = self.filename.ok_or_else(|| missing_parameter("file"))?;
        let purpose = self.purpose.ok_or_else(|| missing_parameter("purpose"))?;
        if !PURPOSES.contains(&purpose.as_str()) {
            let shown = truncate_for_message(&purpose);
            let supported = PURPOSES.map(|purpose| format!("'{purpose}'")).join(", ");
            let message = format!(
                "Invalid value: '{shown}'. Supported values are: {supported}. \
                 The parameter is 'purpose'."
            );
            return Err(ApiError::invalid("purpose", ErrorCode::InvalidValue, message));
        }
        let lifetime = match (self.anchor, self.seconds) {
            (None, None) => match self.expires_after {
                Some(json) => {
                    Params::from_json("expires_after", &json)?.lifetime("expires_after")?
                }
                None => None,
            },
            (Some(_), None) => return Err(missing_parameter("expires_after[seconds]")),
            (None, Some(_)) => return Err(missing_parameter("expires_after[anchor]")),
            (Some(anchor), Some(seconds)) => {
                // The Go SDK sends an empty anchor if its caller did not set one. Only one anchor
                // exists, so its meaning is clear.
                if !anchor.is_empty() {
                    check_anchor("expires_after[anchor]", &anchor)?;
                }
                Some(check_lifetime("expires_after[seconds]", seconds.parse().ok(), &seconds)?)
            }
        };
        Ok(NewFile { filename: filename.chars().take(255).collect(), purpose, lifetime })
    }
}

/// Returns a file
#[utoipa::path(get, path = "/files/{id}", tag = "Files",
    params(("id" = String, Path, description = "Id of the file")),
    responses((status = 200, body = File, description = "The file"), Errors))]
pub(crate) async fn get(
    State(app): App,
    tenant: Tenant<ReadFiles>,
    Path(id): Path<FileId>,
) -> Result<Json<File>, ApiError> {
    match app.service.file(&tenant.0, &id).await? {
        Some(file) => Ok(Json(file.into())),
        None => Err(file_not_found(id.as_str())),
    }
}

/// Lists files
#[utoipa::path(get, path = "/files", tag = "Files", params(
    ("purpose" = Option<String>, Query, description = "Returns only files with this purpose"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 10000,
        description = "Maximum number of files in the page; the largest allowed number if absent"),
    ("order" = inline(Option<Direction>), Query,
        description = "Order by creation time; newest first if absent"),
    ("after" = Option<String>, Query, description = "Id of the last file of the previous page"),
), responses((status = 200, body = List<File>, description = "Page of files"), Errors))]
pub(crate) async fn list(
    State(app): App,
    tenant: Tenant<ReadFiles>,
    query: QueryParams,
) -> Result<Response, ApiError> {
    let after = query.text("after");
    let order = query.order(Order::NewestFirst)?;
    let max = app.config.batch.max_files_per_page.get() as u64;
    let limit = query.limit(1..=max, max)?;
    let (purpose, now) = (query.text("purpose"), app.clock.now());
    let clients = (app.memory.clients.clone(), tenant.0.as_str().into());
    let page = move |after: Option<String>, limit: usize, bytes: usize| {
        let limit = limit.min((bytes / BYTES_PER_ENTRY).max(1));
        let after = after.map(FileId::from);
        let query = FileQuery { purpose: purpose.clone(), order, after, limit, now };
        let (app, tenant) = (app.clone(), tenant.0.clone());
        async move {
            match app.service.files(&tenant, query).await? {
                Paged::Page(page) => {
                    Ok(Some((page.items.into_iter().map(File::from).collect(), page.has_more)))
                }
                Paged::UnknownAfter => Ok(None),
            }
        }
    };
    let listed = stream_list(after.clone(), limit, clients, page).await?;
    listed.ok_or_else(|| unknown_after("file", &after.unwrap_or_default()))
}

/// Approximate size of a list entry, in memory and in a response, in bytes.
const BYTES_PER_ENTRY: usize = 700;

/// Deletes a file
///
/// Clients can no longer read the file. A running batch that reads the file continues.
#[utoipa::path(delete, path = "/files/{id}", tag = "Files",
    params(("id" = String, Path, description = "Id of the file")),
    responses((status = 200, body = Deleted, description = "The file is deleted"), Errors))]
pub(crate) async fn delete(
    State(app): App,
    tenant: Tenant<DeleteFiles>,
    Path(id): Path<FileId>,
) -> Result<Json<Deleted>, ApiError> {
    if app.service.delete_file(&tenant.0, &id).await? {
        Ok(Json(Deleted { id: id.to_string(), object: "file", deleted: true }))
    } else {
        Err(file_not_found(id.as_str()))
    }
}

/// Returns the 404 of an unknown file.
pub(crate) fn file_not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("No file found with id '{}'.", truncate_for_message(id)))
}
