//! Whatever happens to a batch, in whatever order: each line ends in one of the two files, or nothing was counted.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;
use crate::store::{Cancel, Status};

#[derive(Clone, Debug)]
enum Event {
    /// Time passes, a little of it really.
    Pass(u64),
    Turn(Duration),
    Cancel,
    Restart,
    DeleteInput,
    /// The provider's plugin goes away, and comes back.
    TakeAway,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        6 => (0..30_u64).prop_map(Event::Pass),
        2 => prop::sample::select(vec![1, 60, 3600, 12 * 3600]).prop_map(|seconds| Event::Turn(Duration::from_secs(seconds))),
        2 => Just(Event::Cancel),
        2 => Just(Event::Restart),
        1 => Just(Event::DeleteInput),
        1 => Just(Event::TakeAway),
    ];
    prop::collection::vec(event, 0..8)
}

/// Prompts that are answered at once, late, with an error, after an error, or not at all.
fn prompt() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "hi",
        "hi",
        "!delay 3",
        "!delay 15",
        "!status 400",
        "!fail 503 1",
        "!close",
        "!html",
    ])
}

#[test]
fn every_line_ends_in_one_file_whatever_happens() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let settings = "retry_backoff = \"1ms\"\nmax_attempts = 3\nstop_grace = \"1s\"\nshutdown_grace = \"5ms\"\n\
                    max_concurrent_requests_per_batch = 4";
    let house = tokio::sync::Mutex::new(runtime.block_on(House::new(settings, "")));
    let case = (prop::collection::vec(prompt(), 1..60), events());
    let mut runner = TestRunner::new(cases(40));
    let found = runner.run(&case, |(prompts, events)| {
        runtime.block_on(async { live_through(&mut *house.lock().await, &prompts, &events).await })
    });
    found.unwrap();
}

async fn live_through(
    house: &mut House,
    prompts: &[&str],
    events: &[Event],
) -> Result<(), TestCaseError> {
    let lines: Vec<Value> = prompts
        .iter()
        .enumerate()
        .map(|(number, prompt)| chat(&number.to_string(), "m", &format!("{prompt} {number}")))
        .collect();
    let file = house.upload(&jsonl(&lines), None).await;
    let id = house.create_of(&file, None).await;
    let plugin = house.folder.path().join("plugins/provider.toml");
    let away = plugin.with_extension("away");
    let mut cancelled = false;
    for event in events {
        match event {
            Event::Pass(millis) => tokio::time::sleep(Duration::from_millis(*millis)).await,
            Event::Turn(by) => house.clock.advance(*by),
            Event::Cancel => {
                let before = house.batch(&id).await.status;
                match house.batches().cancel(TENANT, &id).await.unwrap() {
                    Cancel::Accepted(_) => cancelled = true,
                    Cancel::TooLate(status) => {
                        prop_assert!(status.is_final() && status != Status::Cancelled)
                    }
                    Cancel::Unknown => prop_assert!(false, "the batch is gone, it was {before:?}"),
                }
            }
            Event::Restart => house.restart().await,
            Event::DeleteInput => {
                drop(house.batches().delete_file(TENANT, &file.id).await.unwrap())
            }
            Event::TakeAway => {
                std::fs::rename(&plugin, &away).unwrap();
                house.restart().await;
                std::fs::rename(&away, &plugin).unwrap();
                house.restart().await;
            }
        }
    }
    let ended = loop {
        let batch = house.batch(&id).await;
        if batch.status.is_final() {
            break batch;
        }
        // Grace periods and rests pass.
        house.clock.advance(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(3)).await;
    };
    let output = house.results(ended.output_file_id.as_ref()).await;
    let errors = house.results(ended.error_file_id.as_ref()).await;
    // Who was told that it is being cancelled sees it cancelled.
    prop_assert_eq!(ended.status == Status::Cancelled, cancelled);
    // The provider was away when the file was validated, so nothing was begun, whatever else was asked.
    if ended.times.in_progress_at.is_none() {
        prop_assert!(
            !ended.errors.is_empty()
                && ended.errors.iter().all(|error| error.code == "model_not_found")
        );
        prop_assert_eq!((output.len(), errors.len(), ended.counts.total), (0, 0, 0));
        return Ok(());
    }
    let number = |line: &Value| line["custom_id"].as_str().unwrap().parse::<usize>().unwrap();
    for file in [&output, &errors] {
        prop_assert!(file.is_sorted_by_key(number), "not in the input's order");
    }
    let mut all: Vec<usize> = output.iter().chain(&errors).map(number).collect();
    all.sort_unstable();
    prop_assert_eq!(all, (0..lines.len()).collect::<Vec<_>>());
    let executed = |line: &&Value| !code(line).starts_with("batch_");
    let counts = ended.counts;
    prop_assert_eq!(counts.total as usize, lines.len());
    prop_assert_eq!(counts.completed as usize, output.len());
    prop_assert_eq!(counts.failed as usize, errors.iter().filter(executed).count());
    if ended.status == Status::Completed {
        prop_assert!(counts.is_whole());
    }
    for line in &output {
        let said = line["response"]["body"]["choices"][0]["message"]["content"].as_str().unwrap();
        let number = number(line);
        let asked = format!("stub: {} {number}", prompts[number]);
        prop_assert_eq!(said, asked, "an answer to another prompt");
    }
    Ok(())
}
