//! Result files of a run, copied to their paths.

use std::sync::Arc;

use batchwright_batch::Service;
use batchwright_domain::ids::{DEFAULT_TENANT, FileId, TenantId};
use batchwright_domain::status::Status;
use batchwright_store::BatchRecord;
use bytes::Bytes;
use futures_util::{Stream, stream};

use crate::cli::failures::Failures;
use crate::cli::place::Target;
use crate::cli::run::state::{RunPaths, RunState};
use crate::cli::terminal::{errln, one_line};
use crate::error::Error;

/// Size of the chunks in which a result file is copied, in bytes.
const READ_CHUNK_BYTES: u64 = 512 << 10;

/// Writes the result files to their paths, except for those that an earlier attempt placed.
///
/// A file without a line is not written.
pub(crate) async fn place_results(
    service: &Arc<Service>,
    batch: &BatchRecord,
    paths: &RunPaths,
    saved: &mut RunState,
    force: bool,
) -> Result<(), Error> {
    for (target, id) in
        [(&paths.output, &batch.output_file_id), (&paths.errors, &batch.error_file_id)]
    {
        let Some(id) = id else { continue };
        if target.path().is_none() {
            target.write_through(content(service, id).await?).await?;
            continue;
        }
        if saved.placed.iter().any(|written| target.matches(written)) {
            continue;
        }
        let draft = target.draft(Some(&paths.state), content(service, id).await?).await?;
        let overwrite = force || saved.placed.iter().any(|written| target.matches(written));
        saved.placed.retain(|written| written.path != draft.digested.path);
        saved.placed.push(draft.digested.clone());
        saved.write(&paths.state)?;
        target.place(draft, overwrite)?;
    }
    Ok(())
}

/// Streams the content of a result file in chunks.
pub(crate) async fn content(
    service: &Arc<Service>,
    id: &FileId,
) -> Result<impl Stream<Item = Result<Bytes, Error>> + use<>, Error> {
    let (service, tenant, id) = (service.clone(), TenantId::from(DEFAULT_TENANT), id.clone());
    let size = service.content_size(&tenant, &id).await?;
    Ok(stream::try_unfold(0, move |at: u64| {
        let (service, tenant, id) = (service.clone(), tenant.clone(), id.clone());
        async move {
            if at >= size {
                return Ok(None);
            }
            let next = at.saturating_add(READ_CHUNK_BYTES).min(size);
            Ok(Some((service.content(&tenant, &id, at..next).await?, next)))
        }
    }))
}

/// Prints the errors, counts and result files of a batch; returns the exit status.
pub(crate) fn report(
    batch: &BatchRecord,
    failures: &Failures,
    output: &Target,
    errors: &Target,
) -> u8 {
    let mut rejected = Failures::default();
    batch.errors.iter().for_each(|error| rejected.add(&error.code));
    let by_code = rejected.summary();
    for error in &batch.errors {
        let position = error.line.map(|line| format!("line {line}: ")).unwrap_or_default();
        let param = error.param.as_ref().map(|param| format!(" ({param})")).unwrap_or_default();
        errln!("{}", one_line(&format!("{position}{}{param}: {}", error.code, error.message)));
    }
    let counts = batch.counts;
    match batch.status {
        Status::Failed if counts.total == 0 => {
            errln!("rejected ({by_code}): no request was sent; correct the input and run again")
        }
        status => {
            let (completed, failed) = (counts.completed, counts.failed);
            errln!(
                "{}: {completed} of {} answered, {failed} failed",
                status.as_str(),
                counts.total
            );
            let by_code = failures.summary();
            if !by_code.is_empty() {
                errln!("failed: {by_code}");
            }
            for (what, id, target) in [
                ("output", &batch.output_file_id, output),
                ("errors", &batch.error_file_id, errors),
            ] {
                let path = target.given.display();
                if id.is_some() {
                    errln!("{what}: {path}");
                } else if target.exists() {
                    errln!("{what}: none; {path} is from an earlier run and stays as it is");
                }
            }
        }
    }
    let every_line = batch.status == Status::Completed && counts.failed == 0;
    u8::from(!every_line)
}
