//! Creation of the batch of a run, or of the rest of an unfinished one.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use batchwright_batch::{Engine, NewBatchRequest, NewFile};
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{BatchId, DEFAULT_TENANT, TenantId};
use batchwright_domain::text::hex;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::cli::run::state::{RunPaths, RunState};
use crate::cli::run::unfinished_batch;
use crate::cli::terminal::errln;
use crate::error::Error;

/// Completion window of a run, long enough to have no effect.
pub(crate) const COMPLETION_WINDOW: &str = "99years";

/// Returns the `url` of the first line that has one.
fn first_url(input: &Path) -> std::io::Result<Option<String>> {
    #[derive(Deserialize)]
    struct Url {
        url: String,
    }
    // The search is bounded: a file without a `url` in its first 16 MiB fails validation.
    let beginning = BufReader::new(std::fs::File::open(input)?.take(16 << 20));
    for line in beginning.split(b'\n') {
        let line = line?;
        let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line);
        if let Ok(Url { url }) = serde_json::from_slice(line) {
            return Ok(Some(url));
        }
    }
    Ok(None)
}

/// Returns the endpoint in the first `url` of an input file; fails if it is not a batch endpoint.
pub fn endpoint_of_first_line(input: &Path) -> Result<Option<String>, Error> {
    let failed = |error: std::io::Error| {
        Error::Other(format!("failed to read {}: {error}", input.display()))
    };
    let Some(url) = first_url(input).map_err(failed)? else { return Ok(None) };
    if Endpoint::parse(&url).is_some() {
        return Ok(Some(url));
    }
    let endpoints = Endpoint::ALL.map(Endpoint::as_str).join(", ");
    let input = input.display();
    Err(Error::Other(format!(
        "{input}: the first `url` is '{url}', which is not a batch endpoint ({endpoints}); \
         correct it, or give --endpoint"
    )))
}

/// Creates the batch, or finds the batch of an unfinished run; returns its id and record.
pub(crate) async fn create_or_resume(
    engine: &Engine,
    paths: &RunPaths,
    before: Option<RunState>,
    endpoint: Option<String>,
    partial: bool,
) -> Result<(BatchId, RunState), Error> {
    if let (Some(batch), Some(saved)) = (unfinished_batch(engine.service()).await?, before) {
        if !partial {
            saved.check(paths, endpoint.as_deref())?;
            errln!("continuing an unfinished run");
        }
        return Ok((batch.new.id, saved));
    }
    if partial {
        let message = format!("{} holds no unfinished run", paths.state.display());
        return Err(Error::Usage(message));
    }
    let (parts, tenant) = (engine.parts(), TenantId::from(DEFAULT_TENANT));
    parts
        .registry
        .current()
        .check_required(&parts.config.required_plugins, &tenant)
        .map_err(Error::Required)?;
    let failed = |error: std::io::Error| {
        Error::Other(format!("failed to read {}: {error}", paths.input.display()))
    };
    let endpoint = match endpoint {
        Some(endpoint) => endpoint,
        None => {
            endpoint_of_first_line(&paths.input)?.unwrap_or_else(|| "/v1/chat/completions".into())
        }
    };
    let upload_failed =
        |error: &dyn std::fmt::Display| Error::Other(format!("{}: {error}", paths.input.display()));
    let mut file = std::fs::File::open(&paths.input).map_err(failed)?;
    let mut upload = engine.service().upload(&tenant).await?;
    let (mut buffer, mut digest, mut size) = (vec![0; 1 << 20], Sha256::new(), 0_u64);
    loop {
        let read = file.read(&mut buffer).map_err(failed)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        digest.update(bytes);
        size = size.saturating_add(read as u64);
        upload.write(bytes).await.map_err(|error| upload_failed(&error))?;
    }
    let filename = paths
        .input
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let new = NewFile { filename, purpose: "batch".into(), lifetime: None };
    let file = upload.finish(new).await.map_err(|error| upload_failed(&error))?;
    let saved = RunState {
        input: paths.input.clone(),
        bytes: size,
        sha256: hex(&digest.finalize()),
        endpoint: endpoint.clone(),
        placed: Vec::new(),
        finished: None,
    };
    // The record is written before the batch, so that a folder with a batch always has a record.
    saved.write(&paths.state)?;
    let request = NewBatchRequest {
        input_file_id: file.id,
        endpoint,
        completion_window: COMPLETION_WINDOW.into(),
        metadata: None,
        output_lifetime: None,
        idempotency_key: None,
        api_key: None,
    };
    let batch = engine
        .service()
        .create(&tenant, request)
        .await
        .map_err(|error| Error::Other(error.to_string()))?;
    Ok((batch.new.id, saved))
}
