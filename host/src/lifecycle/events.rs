//! Property test: random events in random order. Each line of a batch ends in exactly one of the
//! two files, or the batch has no counts.

use batchwright_domain::status::Status;
use batchwright_store::Cancel;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;

/// Event during the life of a batch.
#[derive(Clone, Debug)]
enum Event {
    /// Sleep in real time, in milliseconds.
    Sleep(u64),
    /// Advance of the test clock.
    AdvanceClock(Duration),
    Cancel,
    Restart,
    DeleteInput,
    /// Removal and return of the provider's plugin.
    RemovePlugin,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        6 => (0..30_u64).prop_map(Event::Sleep),
        2 => prop::sample::select(vec![1, 60, 3600, 12 * 3600])
            .prop_map(|seconds| Event::AdvanceClock(Duration::from_secs(seconds))),
        2 => Just(Event::Cancel),
        2 => Just(Event::Restart),
        1 => Just(Event::DeleteInput),
        1 => Just(Event::RemovePlugin),
    ];
    prop::collection::vec(event, 0..8)
}

/// Prompts with an immediate response, a late one, an error, an error at first, or no response.
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
fn every_line_ends_in_one_file_after_any_events() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let settings = "[execution]\nretry_backoff = \"1ms\"\nmax_attempts = 3\nstop_grace = \"1s\"\n\
                    shutdown_grace = \"5ms\"\n\
                    max_concurrent_requests_per_batch = 4";
    let server = tokio::sync::Mutex::new(runtime.block_on(TestServer::new(settings, "")));
    let case = (prop::collection::vec(prompt(), 1..60), events());
    let mut runner = TestRunner::new(cases(40));
    let found = runner.run(&case, |(prompts, events)| {
        runtime.block_on(async { run_events(&mut *server.lock().await, &prompts, &events).await })
    });
    found.unwrap();
}

/// Creates a batch, applies the events and checks the result files.
async fn run_events(
    server: &mut TestServer,
    prompts: &[&str],
    events: &[Event],
) -> Result<(), TestCaseError> {
    let lines: Vec<Value> = prompts
        .iter()
        .enumerate()
        .map(|(number, prompt)| chat(&number.to_string(), "m", &format!("{prompt} {number}")))
        .collect();
    let file = server.upload(&jsonl(&lines), None).await;
    let id = server.create_of(&file, None).await;
    let plugin = server.folder.path().join("plugins/provider.toml");
    let removed = plugin.with_extension("removed");
    let mut cancelled = false;
    for event in events {
        match event {
            Event::Sleep(millis) => tokio::time::sleep(Duration::from_millis(*millis)).await,
            Event::AdvanceClock(by) => server.clock.advance(*by),
            Event::Cancel => {
                let before = server.batch(&id).await.status;
                match server.service().cancel(&TENANT.into(), &id).await.unwrap() {
                    Cancel::Accepted(_) => cancelled = true,
                    Cancel::TooLate(status) => {
                        prop_assert!(status.is_final() && status != Status::Cancelled)
                    }
                    Cancel::Unknown => {
                        prop_assert!(false, "the batch is unknown, its status was {before:?}")
                    }
                }
            }
            Event::Restart => server.restart().await,
            Event::DeleteInput => {
                server.service().delete_file(&TENANT.into(), &file.id).await.unwrap();
            }
            Event::RemovePlugin => {
                std::fs::rename(&plugin, &removed).unwrap();
                server.restart().await;
                std::fs::rename(&removed, &plugin).unwrap();
                server.restart().await;
            }
        }
    }
    let ended = loop {
        let batch = server.batch(&id).await;
        if batch.status.is_final() {
            break batch;
        }
        // Grace periods and rests must end.
        server.clock.advance(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(3)).await;
    };
    let output = server.results(ended.output_file_id.as_ref()).await;
    let errors = server.results(ended.error_file_id.as_ref()).await;
    // An accepted cancellation must lead to a cancelled batch.
    prop_assert_eq!(ended.status == Status::Cancelled, cancelled);
    // The plugin was unavailable during validation, so the batch never started.
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
        prop_assert!(file.is_sorted_by_key(number), "not in input order");
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
        let content =
            line["response"]["body"]["choices"][0]["message"]["content"].as_str().unwrap();
        let number = number(line);
        let expected = format!("stub: {} {number}", prompts[number]);
        prop_assert_eq!(content, expected, "response to another prompt");
    }
    Ok(())
}
