//! Suite of stores.

mod accounts;
mod batches;
mod claims;
mod files;
mod limits;
mod usage;
mod webhooks;

pub(crate) use accounts::*;
pub(crate) use batches::*;
pub(crate) use claims::*;
pub(crate) use files::*;
pub(crate) use limits::*;
pub(crate) use usage::*;
pub(crate) use webhooks::*;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{ObjectKey, ProjectId, TenantId};
use batchwright_domain::status::Status;
use batchwright_domain::usage::TokenUsage;

use crate::accounts::{Actor, NewProject, Refusal, StorageBounds};
use crate::suite::Fixture;
use crate::{
    BatchRecord, Cancel, Claim, Created, FileQuery, FileRecord, Finish, Lane, NewBatch, Order,
    PluginVersion, ResultKind, ResultRow, Store, StoreError, Validated,
};

/// Start of every test.
const NOW: Timestamp = at(1_000_000);

/// End of leases that no test reaches.
const LEASE: Timestamp = at(2_000_000);
/// Lifetime of batches.
const HOUR: Duration = Duration::from_secs(3600);

/// End of the completion window of every batch.
const EXPIRY: Timestamp = at(80_000_000);

const fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

/// Opens the store with two projects: `t`, which [`tenant`] returns, and `other`.
async fn open(fixture: &impl Fixture) -> Arc<dyn Store> {
    let store = fixture.open();
    for slug in [tenant(), "other".into()] {
        let new = NewProject { id: project(&slug), name: slug.to_string(), slug };
        if store.project(&new.id).await.unwrap().is_none() {
            store.create_project(new, operator()).await.unwrap();
        }
    }
    store
}

/// Returns the id of the project with a slug.
fn project(slug: &TenantId) -> ProjectId {
    format!("proj_{slug}").into()
}

fn operator() -> Actor {
    Actor { key: None, address: None, at: NOW }
}

fn refusal<T: std::fmt::Debug>(outcome: crate::Result<T>) -> Refusal {
    match outcome {
        Err(StoreError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

fn tenant() -> TenantId {
    "t".into()
}

fn key(file: &str) -> ObjectKey {
    ObjectKey { tenant: tenant(), file: file.into() }
}

fn file(id: &str) -> FileRecord {
    FileRecord {
        id: id.into(),
        bytes: 10,
        created_at: NOW,
        expires_at: None,
        filename: "in.jsonl".into(),
        purpose: "batch".into(),
    }
}

fn query(after: Option<&str>, order: Order, limit: usize) -> FileQuery {
    FileQuery { purpose: None, order, after: after.map(Into::into), limit, now: NOW }
}

async fn insert_file(store: &dyn Store, file: FileRecord) {
    store.register_object(&key(file.id.as_str()), NOW, LEASE).await.unwrap();
    store.insert_file(&tenant(), file, StorageBounds::default()).await.unwrap();
}

fn new_batch(id: &str) -> NewBatch {
    NewBatch {
        id: id.into(),
        endpoint: Endpoint::Embeddings,
        input_file_id: "file-in".into(),
        completion_window: "24h".into(),
        metadata: Some([("project".to_owned(), "night".to_owned())].into()),
        created_at: NOW,
        expires_at: EXPIRY,
        output_lifetime: Some(Duration::from_secs(60)),
        api_key: None,
    }
}

async fn create(store: &dyn Store, id: &str) {
    let created = store.create_batch(&tenant(), new_batch(id), None, None).await.unwrap();
    assert!(matches!(created, Created::New));
}

async fn batch(store: &dyn Store, id: &str) -> BatchRecord {
    store.batch(&tenant(), &id.into()).await.unwrap().unwrap()
}

async fn cancel(store: &dyn Store, id: &str) -> Cancel {
    store.request_cancel(&tenant(), &id.into(), NOW).await.unwrap()
}

/// Claims the batch that waits in a lane, if any.
async fn claim_at(store: &dyn Store, lane: &Lane, now: Timestamp) -> Option<Claim> {
    let waiting = store.waiting(now).await.unwrap();
    let first = waiting.iter().find(|waiting| waiting.lane == *lane)?;
    let claim = store.claim(first, now, LEASE).await.unwrap().unwrap();
    assert!(store.claim(first, now, LEASE).await.unwrap().is_none(), "claimed twice");
    Some(claim)
}

async fn claim(store: &dyn Store, lane: &Lane) -> Claim {
    claim_at(store, lane, NOW).await.unwrap()
}

fn execution() -> Lane {
    Lane::Execute(["fast".to_owned(), "slow".to_owned()].into())
}

fn validated(total: u64) -> Validated {
    let plugins: BTreeSet<_> = ["fast".to_owned(), "slow".to_owned()].into();
    Validated {
        total,
        model: Some("m".into()),
        plugins,
        tokens: BTreeMap::new(),
        judged_by: vec![version("standard")],
    }
}

fn version(name: &str) -> PluginVersion {
    PluginVersion {
        name: name.into(),
        kind: "adapter".into(),
        version: "1.0.0".into(),
        sha256: "00".into(),
    }
}

/// Creates a batch, validates it and claims it for its execution.
async fn executing(store: &dyn Store, id: &str, total: u64) -> Claim {
    create(store, id).await;
    let validating = claim(store, &Lane::Validate).await;
    store.start_execution(&validating, validated(total), NOW, false).await.unwrap();
    claim(store, &execution()).await
}

fn row(line: u64, kind: ResultKind, payload: &[u8]) -> ResultRow {
    let usage = TokenUsage { input: 2, cached_input: 1, output: 3, reasoning: 1 };
    ResultRow { line, kind, payload: payload.to_vec(), usage, charge: None }
}

fn finish(status: Status, output: Option<FileRecord>) -> Finish {
    Finish { status, errors: Vec::new(), output, error: None, at: NOW }
}
