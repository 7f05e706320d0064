//! Tests of expiry, leases, backoff and cleanup under a clock that the tests advance.

use batchwright_domain::ids::{BatchId, ObjectKey};
use batchwright_domain::status::Status;
use batchwright_store::inspect::{Horizon, garbage};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn expired_batch_keeps_its_results() {
    let server = TestServer::new("", "").await;
    let id =
        server.create(&[chat("slow", "m", "!delay 600000"), chat("quick", "m", "hello")]).await;
    let running = server.until(&id, "a result", |batch| batch.counts.completed == 1).await;
    eventually("the slow request to be sent", async || {
        (server.stub.counts().await.len() == 2).then_some(())
    })
    .await;
    server.clock.advance(HOUR * 23);
    tokio::task::yield_now().await;
    assert_eq!(server.batch(&id).await.status, Status::InProgress);
    // Requests in flight have a grace period, and no longer.
    server.clock.advance(HOUR);
    server.clock.advance(MINUTE);
    let ended = loop {
        let batch = server.batch(&id).await;
        if batch.status.is_final() {
            break batch;
        }
        server.clock.advance(Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(ended.status, Status::Expired);
    assert_eq!((ended.counts.total, ended.counts.completed, ended.counts.failed), (2, 1, 0));
    assert!(running.new.expires_at <= ended.times.expired_at.unwrap());
    assert_eq!(custom_ids(&server.results(ended.output_file_id.as_ref()).await), ["quick"]);
    let errors = server.results(ended.error_file_id.as_ref()).await;
    assert_eq!((custom_ids(&errors), code(&errors[0])), (vec!["slow"], "batch_expired".into()));
    // The clock has jumped past the lease many times, and no worker has claimed the batch twice.
    assert_eq!(
        server.stub.counts().await,
        [("!delay 600000".into(), 1), ("hello".into(), 1)].into()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn clock_jump_past_the_lease_does_not_run_a_batch_twice() {
    let server = TestServer::new("", "").await;
    let id = server.create(&[chat("a", "m", "!delay 300")]).await;
    eventually("the request to be sent", async || {
        (!server.stub.counts().await.is_empty()).then_some(())
    })
    .await;
    for _ in 0..20 {
        server.clock.advance(MINUTE * 5);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(server.ended(&id).await.status, Status::Completed);
    assert_eq!(server.stub.counts().await["!delay 300"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_backoff_doubles_and_ends_after_max_attempts() {
    let settings = "[execution]\nretry_backoff = \"1h\"\nmax_retry_backoff = \"3h\"\n\
                    max_retry_time = \"20h\"\nmax_attempts = 5";
    let server = TestServer::new(settings, "").await;
    let id = server.create(&[chat("a", "m", "!status 503")]).await;
    let attempts = async || server.stub.counts().await.get("!status 503").copied().unwrap_or(0);
    // Jitter shortens a pause to no less than half of its length.
    for (made, backoff) in [(1, HOUR), (2, HOUR * 2), (3, HOUR * 3), (4, HOUR * 3)] {
        eventually("the attempt", async || (attempts().await == made).then_some(())).await;
        // The response must arrive before the pause starts.
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.clock.advance(backoff / 2 - MINUTE);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(attempts().await, made, "retried too early");
        server.clock.advance(backoff / 2 + MINUTE);
    }
    let ended = server.ended(&id).await;
    assert_eq!((attempts().await, ended.counts.failed, ended.status), (5, 1, Status::Completed));
    assert_eq!(code(&server.results(ended.error_file_id.as_ref()).await[0]), "503");
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limited_request_waits_for_retry_after() {
    // Neither the number of attempts nor the retry time limits refusals.
    let server =
        TestServer::new("[execution]\nmax_retry_time = \"1h\"\nmax_attempts = 1", "").await;
    let (soon, late) = ("!fail 429 1 7200", "!fail 429 1 36000");
    let id = server.create(&[chat("soon", "m", soon), chat("late", "m", late)]).await;
    let attempts =
        async |prompt: &str| server.stub.counts().await.get(prompt).copied().unwrap_or(0);
    let both = async || (attempts(soon).await == 1 && attempts(late).await == 1).then_some(());
    eventually("the first attempts", both).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.clock.advance(HOUR * 2 - MINUTE);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(attempts(soon).await, 1, "retried too early");
    server.clock.advance(MINUTE * 2);
    eventually("the second attempt", async || (attempts(soon).await == 2).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(attempts(late).await, 1, "retried too early");
    server.clock.advance(HOUR * 8);
    let ended = server.ended(&id).await;
    assert_eq!((ended.counts.completed, ended.counts.failed, attempts(late).await), (2, 0, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_input_file_stays_readable_for_its_batch() {
    let mut server = TestServer::new("", "max_in_flight = 1").await;
    let lines: Vec<Value> = (0..20)
        .map(|number| chat(&number.to_string(), "m", &format!("!delay 20 {number}")))
        .collect();
    let file = server.upload(&jsonl(&lines), Some(HOUR)).await;
    let id = server.create_of(&file, Some(HOUR * 2)).await;
    server.until(&id, "the first result", |batch| batch.counts.completed > 0).await;
    server.clock.advance(HOUR);
    assert!(server.service().file(&TENANT.into(), &file.id).await.unwrap().is_none());
    // A restarted process finds the input too.
    server.restart().await;
    let ended = server.ended(&id).await;
    assert_eq!((ended.status, ended.counts.completed), (Status::Completed, 20));
    let output = ended.output_file_id.unwrap();
    assert_eq!(server.results(Some(&output)).await.len(), 20);
    let objects = || walk(&server.folder.path().join("data/objects"));
    eventually("the input object to be removed", async || {
        (objects() == [output.to_string()]).then_some(())
    })
    .await;
    server.clock.advance(HOUR * 2);
    assert!(server.service().file(&TENANT.into(), &output).await.unwrap().is_none());
    let removed = async || {
        server.clock.advance(MINUTE);
        objects().is_empty().then_some(())
    };
    eventually("the output object to be removed", removed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_objects_of_a_killed_process_are_removed() {
    let mut server = TestServer::new("", "").await;
    let kept = server.upload(b"kept", None).await;
    let files = server.folder.path().join("data/objects").join(TENANT).join("files");
    // An upload that was written but not recorded, an upload that was not completed, and a file of
    // another program.
    let key = ObjectKey { tenant: TENANT.into(), file: "file-written".into() };
    let (now, store) = (server.clock.now(), &server.engine().parts().store);
    store.register_object(&key, now, now.after(HOUR)).await.unwrap();
    for name in ["file-written", "file-unfinished#1", "not-ours"] {
        std::fs::write(files.join(name), "bytes").unwrap();
    }
    server.restart().await;
    let only_recorded_and_foreign =
        async || (walk(&files) == [kept.id.to_string(), "not-ours".to_owned()]).then_some(());
    eventually("the unfinished objects to be removed", only_recorded_and_foreign).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn object_that_cannot_be_deleted_blocks_no_other() {
    let mut server = TestServer::new("", "").await;
    server.upload(b"kept", None).await;
    let files = server.folder.path().join("data/objects").join(TENANT).join("files");
    let (now, store) = (server.clock.now(), &server.engine().parts().store);
    for name in ["file-blocked", "file-written"] {
        let key = ObjectKey { tenant: TENANT.into(), file: name.into() };
        store.register_object(&key, now, now.after(HOUR)).await.unwrap();
    }
    // A folder cannot be deleted like a file.
    std::fs::create_dir(files.join("file-blocked")).unwrap();
    std::fs::write(files.join("file-written"), "bytes").unwrap();
    server.restart().await;
    let is_removed = async || (!files.join("file-written").exists()).then_some(());
    eventually("the other object to be removed", is_removed).await;
    std::fs::remove_dir(files.join("file-blocked")).unwrap();
    // The removal is repeated, and the server works meanwhile.
    let ended = server.ended(&server.create(&[chat("a", "echo", "hi")]).await).await;
    assert_eq!(ended.counts.completed, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_is_removed_after_its_lifetime_and_its_files() {
    let server = TestServer::new("[retention]\nbatch_lifetime = \"10d\"", "").await;
    let file = server.upload(&jsonl(&[chat("a", "echo", "hi")]), None).await;
    let with_file = server.create_of(&file, None).await;
    let without = server.create_of(&file, Some(HOUR)).await;
    let failed = server.create(&[json!({})]).await;
    for id in [&with_file, &without, &failed] {
        server.ended(id).await;
    }
    server.clock.advance(HOUR * 24 * 9);
    tokio::time::sleep(Duration::from_millis(50)).await;
    for id in [&with_file, &without, &failed] {
        server.batch(id).await;
    }
    let known =
        async |id: &BatchId| server.service().get(&TENANT.into(), id).await.unwrap().is_some();
    // A dry run counts what goes now, and what goes later.
    let expected = |after: Duration| {
        let now = server.clock.now().after(after);
        let horizon = Horizon { now, batch_lifetime: HOUR * 240, audit_before: Some(now) };
        garbage(&server.folder.path().join("data"), &horizon).unwrap()
    };
    assert_eq!(expected(Duration::ZERO).batches, 0);
    let cleaned = async || {
        server.clock.advance(MINUTE);
        (expected(Duration::ZERO).files.0 == 0).then_some(())
    };
    eventually("the output file that expired after an hour to be removed", cleaned).await;
    let later = expected(HOUR * 48);
    assert_eq!((later.batches, later.files, later.files_in_use), (2, (0, 0), (0, 0)));
    // The input files expire after 30 days, and the output file never does.
    assert_eq!(expected(HOUR * 24 * 40).files.0, 2);
    let removed = async || {
        server.clock.advance(HOUR * 5);
        (!known(&without).await && !known(&failed).await).then_some(())
    };
    eventually("the batches to be removed", removed).await;
    assert!(known(&with_file).await);
    let output = server.batch(&with_file).await.output_file_id.unwrap();
    assert!(server.service().delete_file(&TENANT.into(), &output).await.unwrap());
    let removed = async || {
        server.clock.advance(HOUR);
        (!known(&with_file).await).then_some(())
    };
    eventually("the last batch to be removed", removed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn database_shrinks_after_results_are_removed() {
    let server = TestServer::new("", "").await;
    let lines: Vec<Value> = (0..30)
        .map(|number| chat(&number.to_string(), "m", &format!("!big 4000000 {number}")))
        .collect();
    let database = server.folder.path().join("data/batchwright.db");
    let size = || std::fs::metadata(&database).unwrap().len();
    let ended = server.ended(&server.create(&lines).await).await;
    assert_eq!(ended.counts.completed, 30);
    let log = std::fs::metadata(database.with_extension("db-wal")).unwrap().len();
    assert!(size() + log > 120_000_000, "{} and {log}", size());
    // The database held 120 MB of results and may keep 64 MiB of free pages for the next batch.
    let small = async || {
        server.clock.advance(MINUTE);
        (size() < 75 << 20).then_some(())
    };
    eventually("the database to shrink", small).await;
}

/// Returns the sorted names of all files in a folder and its subfolders.
fn walk(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flat_map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path)
            } else {
                vec![path.file_name().unwrap().to_string_lossy().into_owned()]
            }
        })
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_without_required_plugins_waits_and_can_be_cancelled() {
    let mut server = TestServer::new("", "").await;
    // The server is closed, so the batches are created but not claimed.
    server.engine().close().await;
    let [cancelled, expired] = [
        server.create(&[chat("a", "echo", "hi")]).await,
        server.create(&[chat("a", "echo", "hi")]).await,
    ];
    server.settings = "[plugins]\nrequired_plugins = [\"absent\"]".into();
    server.restart().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(server.batch(&cancelled).await.status, Status::Validating);
    server.service().cancel(&TENANT.into(), &cancelled).await.unwrap();
    let ended = server.ended(&cancelled).await;
    assert_eq!((ended.status, ended.errors[0].code.as_str()), (Status::Cancelled, "not_validated"));
    server.clock.advance(HOUR * 24);
    let ended = server.ended(&expired).await;
    assert_eq!((ended.status, ended.errors[0].code.as_str()), (Status::Failed, "not_validated"));
}

#[tokio::test(flavor = "multi_thread")]
async fn cancellation_by_another_process_reaches_the_worker_at_its_renewal() {
    let server = TestServer::new("", "max_in_flight = 1").await;
    let lines: Vec<Value> = (0..50)
        .map(|number| chat(&number.to_string(), "m", &format!("!delay 100 {number}")))
        .collect();
    let id = server.create(&lines).await;
    server.until(&id, "the first result", |batch| batch.counts.completed > 0).await;
    // Another process changes the database and tells nobody.
    let (store, now) = (&server.engine().parts().store, server.clock.now());
    store.request_cancel(&TENANT.into(), &id, now).await.unwrap();
    let cancelled = eventually("the end of the batch", async || {
        server.clock.advance(Duration::from_secs(1));
        Some(server.batch(&id).await).filter(|batch| batch.status.is_final())
    });
    assert_eq!(cancelled.await.status, Status::Cancelled);
    let sent: usize = server.stub.counts().await.values().sum();
    assert!(sent < 50, "all {sent} requests were sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_that_lost_its_claim_sends_no_more_requests() {
    let mut server = TestServer::new("", "max_in_flight = 1").await;
    let lines: Vec<Value> = (0..50)
        .map(|number| chat(&number.to_string(), "m", &format!("!delay 100 {number}")))
        .collect();
    let id = server.create(&lines).await;
    server.until(&id, "the first result", |batch| batch.counts.completed > 0).await;
    // Another process claims the batch, with a lease that outlasts the test.
    let database = server.folder.path().join("data/batchwright.db");
    rusqlite::Connection::open(database)
        .unwrap()
        .execute(
            "UPDATE batches SET fence = fence + 1, owner = 'another process',
             lease_until = 9000000000000",
            [],
        )
        .unwrap();
    let sent = async || server.stub.counts().await.values().sum::<usize>();
    let mut before = sent().await;
    eventually("the requests to end", async || {
        server.clock.advance(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = sent().await;
        std::mem::replace(&mut before, now).eq(&now).then_some(())
    })
    .await;
    assert!(before < 50, "all {before} requests were sent");
    // The batch still belongs to the other process after a restart of this one.
    server.restart().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(server.stub.counts().await.values().sum::<usize>(), before);
}
