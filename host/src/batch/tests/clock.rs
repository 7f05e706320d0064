//! What time does to batches and files: the clock is turned, nobody sleeps.

use super::*;
use crate::store::Status;

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_expires_and_keeps_what_is_done() {
    let house = House::new("", "").await;
    let id = house.create(&[chat("slow", "m", "!delay 600000"), chat("quick", "m", "hello")]).await;
    let running = house.until(&id, "a result", |batch| batch.counts.completed == 1).await;
    eventually("the slow one to be sent", async || {
        (house.stub.counts().await.len() == 2).then_some(())
    })
    .await;
    house.clock.advance(HOUR * 23);
    tokio::task::yield_now().await;
    assert_eq!(house.batch(&id).await.status, Status::InProgress);
    // What is in flight gets its grace, and nothing more.
    house.clock.advance(HOUR);
    house.clock.advance(MINUTE);
    let ended = loop {
        let batch = house.batch(&id).await;
        if batch.status.is_final() {
            break batch;
        }
        house.clock.advance(Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(ended.status, Status::Expired);
    assert_eq!((ended.counts.total, ended.counts.completed, ended.counts.failed), (2, 1, 0));
    assert!(running.new.expires_at <= ended.times.expired_at.unwrap());
    assert_eq!(custom_ids(&house.results(ended.output_file_id.as_ref()).await), ["quick"]);
    let errors = house.results(ended.error_file_id.as_ref()).await;
    assert_eq!((custom_ids(&errors), code(&errors[0])), (vec!["slow"], "batch_expired".into()));
    // The clock has jumped past the lease of the batch many times over; nobody took it up a second time.
    assert_eq!(
        house.stub.counts().await,
        [("!delay 600000".into(), 1), ("hello".into(), 1)].into()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_past_the_lease_has_no_batch_worked_on_twice() {
    let house = House::new("", "").await;
    let id = house.create(&[chat("a", "m", "!delay 300")]).await;
    eventually("the request to be sent", async || {
        (!house.stub.counts().await.is_empty()).then_some(())
    })
    .await;
    for _ in 0..20 {
        house.clock.advance(MINUTE * 5);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(house.ended(&id).await.status, Status::Completed);
    assert_eq!(house.stub.counts().await["!delay 300"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn pauses_between_attempts_double_and_end() {
    let settings = "retry_backoff = \"1h\"\nmax_retry_backoff = \"3h\"\nmax_retry_time = \"20h\"\nmax_attempts = 5";
    let house = House::new(settings, "").await;
    let id = house.create(&[chat("a", "m", "!status 503")]).await;
    let attempts = async || house.stub.counts().await.get("!status 503").copied().unwrap_or(0);
    // A pause is a half of its length at the least, and all of it at the most.
    for (made, longest) in [(1, HOUR), (2, HOUR * 2), (3, HOUR * 3), (4, HOUR * 3)] {
        eventually("the attempt", async || (attempts().await == made).then_some(())).await;
        // The answer has to arrive before the pause begins.
        tokio::time::sleep(Duration::from_millis(50)).await;
        house.clock.advance(longest / 2 - MINUTE);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(attempts().await, made, "came back too early");
        house.clock.advance(longest / 2 + MINUTE);
    }
    let ended = house.ended(&id).await;
    assert_eq!((attempts().await, ended.counts.failed, ended.status), (5, 1, Status::Completed));
    assert_eq!(code(&house.results(ended.error_file_id.as_ref()).await[0]), "503");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_request_waits_for_as_long_as_the_provider_asks() {
    // Neither the number of attempts nor the time for them is for refusals.
    let house = House::new("max_retry_time = \"1h\"\nmax_attempts = 1", "").await;
    let (soon, late) = ("!fail 429 1 7200", "!fail 429 1 36000");
    let id = house.create(&[chat("soon", "m", soon), chat("late", "m", late)]).await;
    let attempts = async |prompt: &str| house.stub.counts().await.get(prompt).copied().unwrap_or(0);
    let both = async || (attempts(soon).await == 1 && attempts(late).await == 1).then_some(());
    eventually("the first attempts", both).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    house.clock.advance(HOUR * 2 - MINUTE);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(attempts(soon).await, 1, "came back too early");
    house.clock.advance(MINUTE * 2);
    eventually("the second attempt", async || (attempts(soon).await == 2).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(attempts(late).await, 1, "came back too early");
    house.clock.advance(HOUR * 8);
    let ended = house.ended(&id).await;
    assert_eq!((ended.counts.completed, ended.counts.failed, attempts(late).await), (2, 0, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_expires_without_harm_to_the_batch_that_reads_it() {
    let mut house = House::new("", "concurrency = 1").await;
    let lines: Vec<Value> = (0..20)
        .map(|number| chat(&number.to_string(), "m", &format!("!delay 20 {number}")))
        .collect();
    let file = house.upload(&jsonl(&lines), Some(HOUR)).await;
    let id = house.create_of(&file, Some(HOUR * 2)).await;
    house.until(&id, "the beginning", |batch| batch.counts.completed > 0).await;
    house.clock.advance(HOUR);
    assert!(house.batches().file(TENANT, &file.id).await.unwrap().is_none());
    // Also a process that begins now finds what it needs.
    house.restart().await;
    let ended = house.ended(&id).await;
    assert_eq!((ended.status, ended.counts.completed), (Status::Completed, 20));
    let output = ended.output_file_id.unwrap();
    assert_eq!(house.results(Some(&output)).await.len(), 20);
    let objects = || walk(&house.folder.path().join("data/objects"));
    eventually("the input's bytes to be gone", async || {
        (objects() == [output.clone()]).then_some(())
    })
    .await;
    house.clock.advance(HOUR * 2);
    assert!(house.batches().file(TENANT, &output).await.unwrap().is_none());
    let gone = async || {
        house.clock.advance(MINUTE);
        objects().is_empty().then_some(())
    };
    eventually("the output's bytes to be gone", gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_process_left_half_done_is_removed() {
    let mut house = House::new("", "").await;
    let kept = house.upload(b"kept", None).await;
    let files = house.folder.path().join("data/objects").join(TENANT).join("files");
    // One upload that was written and not recorded, one that was not written to its end; and what somebody else put there.
    let written = house.batches().store.begin_object(TENANT, "file-written").await;
    written.unwrap();
    for name in ["file-written", "file-unfinished#1", "not-ours"] {
        std::fs::write(files.join(name), "bytes").unwrap();
    }
    house.restart().await;
    let only_theirs =
        async || (walk(&files) == [kept.id.clone(), "not-ours".to_owned()]).then_some(());
    eventually("the rest to be removed", only_theirs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_remembered_as_long_as_its_files_and_its_lifetime_say() {
    let house = House::new("batch_lifetime = \"10d\"", "").await;
    let file = house.upload(&jsonl(&[chat("a", "echo", "hi")]), None).await;
    let with_file = house.create_of(&file, None).await;
    let without = house.create_of(&file, Some(HOUR)).await;
    let failed = house.create(&[json!({})]).await;
    for id in [&with_file, &without, &failed] {
        house.ended(id).await;
    }
    house.clock.advance(HOUR * 24 * 9);
    tokio::time::sleep(Duration::from_millis(50)).await;
    for id in [&with_file, &without, &failed] {
        house.batch(id).await;
    }
    let known = async |id: &str| house.batches().get(TENANT, id).await.unwrap().is_some();
    let gone = async || {
        house.clock.advance(HOUR * 5);
        (!known(&without).await && !known(&failed).await).then_some(())
    };
    eventually("the batches to be forgotten", gone).await;
    assert!(known(&with_file).await);
    let output = house.batch(&with_file).await.output_file_id.unwrap();
    assert!(house.batches().delete_file(TENANT, &output).await.unwrap());
    let gone = async || {
        house.clock.advance(HOUR);
        (!known(&with_file).await).then_some(())
    };
    eventually("the last batch to be forgotten", gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_gives_back_what_results_took() {
    let house = House::new("", "").await;
    let lines: Vec<Value> = (0..30)
        .map(|number| chat(&number.to_string(), "m", &format!("!big 4000000 {number}")))
        .collect();
    let database = house.folder.path().join("data/batchwright.db");
    let size = || std::fs::metadata(&database).unwrap().len();
    let ended = house.ended(&house.create(&lines).await).await;
    assert_eq!(ended.counts.completed, 30);
    let log = std::fs::metadata(database.with_extension("db-wal")).unwrap().len();
    assert!(size() + log > 120_000_000, "{} and {log}", size());
    // 120 MB of results were in it; 64 MiB may be kept for the next batch.
    let small = async || {
        house.clock.advance(MINUTE);
        (size() < 75 << 20).then_some(())
    };
    eventually("the database to shrink", small).await;
}

/// The names of all files in a folder and those in it.
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
async fn a_batch_whose_rules_are_gone_waits_for_them_and_can_be_cancelled() {
    let mut house = House::new("", "").await;
    // Created, and not yet taken up.
    house.batches().close().await;
    let [cancelled, expired] = [
        house.create(&[chat("a", "echo", "hi")]).await,
        house.create(&[chat("a", "echo", "hi")]).await,
    ];
    house.settings = "required_plugins = [\"absent\"]".into();
    house.restart().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(house.batch(&cancelled).await.status, Status::Validating);
    house.batches().cancel(TENANT, &cancelled).await.unwrap();
    let ended = house.ended(&cancelled).await;
    assert_eq!((ended.status, ended.errors[0].code.as_str()), (Status::Cancelled, "not_validated"));
    house.clock.advance(HOUR * 24);
    let ended = house.ended(&expired).await;
    assert_eq!((ended.status, ended.errors[0].code.as_str()), (Status::Failed, "not_validated"));
}
