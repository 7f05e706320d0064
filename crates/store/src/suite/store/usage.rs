//! Usage, budgets and enqueued tokens.

use std::time::Duration;

use batchwright_domain::limits::{MAX_RULE_MODELS, ModelLimit, ModelLimits};
use batchwright_domain::money::{Cost, Money, Price, TokenPrice};
use batchwright_domain::usage::UsageKind;

use super::*;
use crate::accounts::{KeyHolder, NewKey, NewServiceAccount};
use crate::usage::{Meters, UsageCounts, UsageGroups, UsageQuery, UsageRow};
use crate::{Charge, OnlineUsage, Started, TokenLimit};

const MINUTE: i64 = 60_000;
const DAY: i64 = 86_400_000;

/// Row of a request with 2 input tokens, 1 of them cached, and 3 output tokens.
fn charged(line: u64, model: &str, dollars: Option<f64>) -> ResultRow {
    let price = dollars.map(|dollars| {
        let price = TokenPrice::per_million(dollars).unwrap();
        Price { input: price, cached_input: price, output: price }
    });
    let charge = Some(Charge { model: model.into(), price });
    ResultRow { charge, ..row(line, ResultKind::Completed, b"x") }
}

async fn record(store: &dyn Store, held: &Claim, rows: Vec<ResultRow>, at: Timestamp) {
    store.insert_results(held, Arc::new(rows), Vec::new(), at).await.unwrap();
}

fn usage_query(width: i64, group: UsageGroups) -> UsageQuery {
    UsageQuery {
        tenant: None,
        kind: None,
        from: at(0),
        before: at(100 * DAY),
        width: Duration::from_millis(width.unsigned_abs()),
        projects: Vec::new(),
        keys: Vec::new(),
        models: Vec::new(),
        is_batch: None,
        group,
        max_rows: 100,
    }
}

async fn usage(store: &dyn Store, query: UsageQuery) -> Vec<UsageRow> {
    store.usage(query).await.unwrap().rows
}

pub(crate) async fn result_counts_once_in_usage_and_costs(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let held = executing(&*store, "batch", 9).await;
    let first = charged(1, "a", Some(1.0));
    record(&*store, &held, vec![first.clone(), charged(2, "b", None)], NOW).await;
    // A result that is recorded again, a line without an answer, and a later minute.
    let unanswered = row(3, ResultKind::Failed, b"x");
    record(&*store, &held, vec![first, unanswered], NOW).await;
    record(&*store, &held, vec![charged(4, "a", Some(1.0))], at(NOW.as_millis() + MINUTE)).await;
    let sums = usage(&*store, usage_query(DAY, UsageGroups::default())).await;
    let units = Money::from_units;
    let expected = UsageCounts {
        requests: 3,
        tokens: TokenUsage { input: 6, cached_input: 3, output: 9, reasoning: 0 },
        cost: Cost {
            input: units(2_000_000),
            cached_input: units(2_000_000),
            output: units(6_000_000),
        },
        unpriced: 1,
    };
    let [sum] = sums.as_slice() else { panic!("{sums:?}") };
    assert_eq!((sum.start, sum.counts), (at(0), expected));
    let group = UsageGroups { project: true, key: true, model: true, batch: true };
    let rows = usage(&*store, usage_query(MINUTE, group)).await;
    let shown: Vec<_> = rows
        .iter()
        .map(|row| {
            assert_eq!((row.project.clone(), row.is_batch), (Some(project(&tenant())), Some(true)));
            (row.start.as_millis() / MINUTE, row.model.as_deref(), row.counts.requests)
        })
        .collect();
    assert_eq!(shown, [(16, Some("a"), 1), (16, Some("b"), 1), (17, Some("a"), 1)]);
    for (query, expected) in [
        (UsageQuery { kind: Some(UsageKind::Embeddings), ..usage_query(DAY, group) }, 2),
        (UsageQuery { kind: Some(UsageKind::Completions), ..usage_query(DAY, group) }, 0),
        (UsageQuery { models: vec!["b".into()], ..usage_query(DAY, group) }, 1),
        (UsageQuery { tenant: Some(tenant()), ..usage_query(DAY, group) }, 2),
        (UsageQuery { tenant: Some("other".into()), ..usage_query(DAY, group) }, 0),
        (UsageQuery { projects: vec!["proj_other".into()], ..usage_query(DAY, group) }, 0),
        (UsageQuery { is_batch: Some(false), ..usage_query(DAY, group) }, 0),
        (UsageQuery { before: at(17 * MINUTE), ..usage_query(DAY, group) }, 2),
        (UsageQuery { from: at(17 * MINUTE), ..usage_query(DAY, group) }, 1),
    ] {
        assert_eq!(usage(&*store, query.clone()).await.len(), expected, "{query:?}");
    }
    // A page never ends within a bucket.
    let query = UsageQuery { max_rows: 2, ..usage_query(MINUTE, group) };
    let page = store.usage(query).await.unwrap();
    assert_eq!((page.rows.len(), page.is_whole), (2, false));
    let page = store.usage(UsageQuery { max_rows: 1, ..usage_query(DAY, group) }).await.unwrap();
    assert_eq!((page.rows.len(), page.is_whole), (0, false));
}

pub(crate) async fn usage_stays_when_its_key_is_deleted(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let project = project(&tenant());
    let key = NewKey {
        id: "key_a".into(),
        name: "a".into(),
        digest: [1; 32],
        redacted: "bw_…".into(),
        scopes: vec!["api.batch.write".into()],
        expires_at: None,
    };
    let account = NewServiceAccount { id: "user-a".into(), name: "a".into(), is_member: true };
    store.create_account(&project, account, Some(key), operator()).await.unwrap();
    let new = crate::NewBatch { api_key: Some("key_a".into()), ..new_batch("batch") };
    store.create_batch(&tenant(), new, None, None).await.unwrap();
    let validating = claim(&*store, &Lane::Validate).await;
    store.start_execution(&validating, validated(1), NOW, false).await.unwrap();
    let held = claim(&*store, &execution()).await;
    let holder = KeyHolder::Project(project);
    store.delete_key(&holder, &"key_a".into(), operator()).await.unwrap();
    record(&*store, &held, vec![charged(1, "a", None)], NOW).await;
    let group = UsageGroups { key: true, ..UsageGroups::default() };
    let rows = usage(&*store, usage_query(DAY, group)).await;
    assert_eq!(rows.first().unwrap().key, Some("key_a".into()));
    let query = UsageQuery { keys: vec!["key_a".into()], ..usage_query(DAY, group) };
    assert_eq!(usage(&*store, query).await.len(), 1);
    let query = UsageQuery { keys: vec!["key_b".into()], ..usage_query(DAY, group) };
    assert_eq!(usage(&*store, query).await.len(), 0);
}

pub(crate) async fn usage_of_online_requests_is_told_from_that_of_batches(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let held = executing(&*store, "batch", 9).await;
    record(&*store, &held, vec![charged(1, "a", Some(1.0))], NOW).await;
    let online = |model, endpoint| {
        let ResultRow { charge, usage: tokens, .. } = charged(1, model, Some(1.0));
        OnlineUsage { endpoint, key: None, charge: charge.unwrap(), tokens }
    };
    let requests = vec![
        online("a", Endpoint::ChatCompletions),
        online("a", Endpoint::Responses),
        online("b", Endpoint::Embeddings),
    ];
    store.record_online_usage(&tenant(), requests.clone(), NOW).await.unwrap();
    store.record_online_usage(&"unknown".into(), requests, NOW).await.unwrap();
    let group = UsageGroups { batch: true, model: true, ..UsageGroups::default() };
    let rows = usage(&*store, usage_query(DAY, group)).await;
    let shown: Vec<_> = rows
        .iter()
        .map(|row| (row.model.as_deref().unwrap(), row.is_batch.unwrap(), row.counts.requests))
        .collect();
    assert_eq!(shown, [("a", false, 2), ("a", true, 1), ("b", false, 1)]);
    let query = UsageQuery { kind: Some(UsageKind::Embeddings), ..usage_query(DAY, group) };
    // The suite's batch has embeddings too.
    assert_eq!(usage(&*store, query).await.len(), 2);
    let spent = store.meters(&tenant(), NOW).await.unwrap().spent;
    assert_eq!(spent, Money::from_units(4 * 5_000_000));
}

pub(crate) async fn money_is_counted_by_month_and_requests_by_day(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let project = project(&tenant());
    let limited = [(ModelLimit::RequestsPerDay, Some(5))];
    store.update_model_limits(&project, "a", limited.into(), operator()).await.unwrap();
    let held = executing(&*store, "batch", 9).await;
    let meters = async |now| store.meters(&tenant(), now).await.unwrap();
    let counted =
        |units, requests| Meters { spent: Money::from_units(units), requests_today: requests };
    assert_eq!(meters(NOW).await, Meters::default());
    record(&*store, &held, vec![charged(1, "a", Some(1.0)), charged(2, "b", Some(1.0))], NOW).await;
    let requests = [("a".to_owned(), 1)];
    assert_eq!(meters(NOW).await, counted(10_000_000, requests.clone().into()));
    let (tomorrow, next_month) = (at(2 * DAY), at(40 * DAY));
    assert_eq!(meters(tomorrow).await, counted(10_000_000, [].into()));
    assert_eq!(meters(next_month).await, Meters::default());
    record(&*store, &held, vec![charged(3, "b", Some(1.0))], next_month).await;
    assert_eq!(meters(next_month).await, counted(5_000_000, [].into()));
    // A clock that goes back does not give the money of this month back.
    record(&*store, &held, vec![charged(4, "b", Some(1.0))], NOW).await;
    assert_eq!(meters(next_month).await.spent, Money::from_units(10_000_000));
    // A time far ahead was wrong, and its month does not stay.
    record(&*store, &held, vec![charged(8, "b", Some(1.0))], at(400 * DAY)).await;
    record(&*store, &held, vec![charged(9, "b", Some(1.0))], next_month).await;
    assert_eq!(meters(next_month).await.spent, Money::from_units(5_000_000));
    // Sums of what a guest reports never overflow.
    let huge = TokenUsage { input: u64::MAX, ..TokenUsage::default() };
    for line in 5..8 {
        let rows = vec![ResultRow { usage: huge, ..charged(line, "b", Some(1e6)) }];
        record(&*store, &held, rows, next_month).await;
    }
    assert!(meters(next_month).await.spent.units() > i64::MAX as u64 / 3);
}

pub(crate) async fn old_usage_is_merged_into_hours(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let held = executing(&*store, "batch", 9).await;
    for line in 1..=5 {
        // Minutes 0, 30, 60, 90 and 120.
        let time = at((line as i64 - 1) * 30 * MINUTE);
        record(&*store, &held, vec![charged(line, "a", Some(1.0))], time).await;
    }
    let before = usage(&*store, usage_query(60 * MINUTE, UsageGroups::default())).await;
    assert!(store.merge_usage(at(100 * MINUTE), 1).await.unwrap());
    while store.merge_usage(at(100 * MINUTE), 1).await.unwrap() {}
    let after = usage(&*store, usage_query(60 * MINUTE, UsageGroups::default())).await;
    assert_eq!(before, after);
    let minutes = usage(&*store, usage_query(MINUTE, UsageGroups::default())).await;
    let minutes: Vec<_> =
        minutes.iter().map(|row| (row.start.as_millis() / MINUTE, row.counts.requests)).collect();
    assert_eq!(minutes, [(0, 2), (60, 2), (120, 1)]);
}

pub(crate) async fn limits_of_models_and_budgets_are_changed(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let id = project(&tenant());
    let changes = [(ModelLimit::RequestsPerMinute, Some(3)), (ModelLimit::EnqueuedTokens, Some(9))];
    let limits = store.update_model_limits(&id, "m", changes.into(), operator()).await.unwrap();
    let expected = ModelLimits {
        requests_per_minute: Some(3),
        enqueued_tokens: Some(9),
        ..ModelLimits::default()
    };
    assert_eq!(limits, expected);
    let policy = store.policy(&tenant()).await.unwrap();
    assert_eq!(policy.model_limits, [("m".to_owned(), expected)].into());
    assert!(store.policy(&"other".into()).await.unwrap().model_limits.is_empty());
    let none = [(ModelLimit::RequestsPerMinute, None), (ModelLimit::EnqueuedTokens, None)];
    store.update_model_limits(&id, "m", none.into(), operator()).await.unwrap();
    assert!(store.policy(&tenant()).await.unwrap().model_limits.is_empty());
    for model in 0..=MAX_RULE_MODELS {
        let changes = [(ModelLimit::RequestsPerDay, Some(1))].into();
        let name = model.to_string();
        match store.update_model_limits(&id, &name, changes, operator()).await {
            Ok(_) => assert!(model < MAX_RULE_MODELS),
            refused => assert_eq!(refusal(refused), Refusal::ModelLimits(MAX_RULE_MODELS)),
        }
    }
    for (cents, before) in [(Some(500), None), (Some(0), Some(500)), (None, Some(0)), (None, None)]
    {
        assert_eq!(store.set_spend_limit(&id, cents, operator()).await.unwrap(), before);
        assert_eq!(store.policy(&tenant()).await.unwrap().spend_limit, cents);
    }
}

/// Creates and validates a batch with an estimate of tokens of the model `m`.
async fn start(store: &dyn Store, id: &str, tokens: u64, may_wait: bool) -> (Claim, Started) {
    create(store, id).await;
    let validating = claim(store, &Lane::Validate).await;
    let found = Validated { tokens: [("m".to_owned(), tokens)].into(), ..validated(2) };
    let started = store.start_execution(&validating, found, NOW, may_wait).await.unwrap();
    (validating, started)
}

pub(crate) async fn enqueued_tokens_are_reserved_until_their_batch_ends(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let limited = [(ModelLimit::EnqueuedTokens, Some(100))];
    let id = project(&tenant());
    store.update_model_limits(&id, "m", limited.into(), operator()).await.unwrap();
    assert_eq!(start(&*store, "first", 60, false).await.1, Started::Begun);
    let first = claim(&*store, &execution()).await;
    let over = |enqueued| {
        Started::OverLimit(TokenLimit { model: "m".into(), limit: 100, enqueued, estimated: 50 })
    };
    let (second, started) = start(&*store, "second", 50, false).await;
    assert_eq!(started, over(60));
    // What a batch has used is not enqueued any more.
    record(&*store, &first, vec![charged(1, "m", None)], NOW).await;
    let found = Validated { tokens: [("m".to_owned(), 50)].into(), ..validated(2) };
    assert_eq!(store.start_execution(&second, found, NOW, false).await.unwrap(), over(58));
    store.fail(&second, Vec::new(), Vec::new(), NOW).await.unwrap();
    // Failed, cancelled, expired and completed batches give their tokens back.
    for end in [Status::Failed, Status::Cancelled, Status::Expired, Status::Completed] {
        let name = format!("end {}", end.as_str());
        assert_eq!(start(&*store, &name, 42, false).await.1, Started::Begun, "{end:?}");
        let held = claim(&*store, &execution()).await;
        if end == Status::Cancelled {
            cancel(&*store, &name).await;
        }
        store.finish(&held, finish(end, None)).await.unwrap();
        assert_eq!(batch(&*store, &name).await.status, end);
    }
}

pub(crate) async fn batch_over_the_token_limit_waits_for_its_turn(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let limited = [(ModelLimit::EnqueuedTokens, Some(100))];
    let id = project(&tenant());
    store.update_model_limits(&id, "m", limited.into(), operator()).await.unwrap();
    assert_eq!(start(&*store, "first", 60, true).await.1, Started::Begun);
    let first = claim(&*store, &execution()).await;
    assert_eq!(start(&*store, "second", 50, true).await.1, Started::Queued);
    // A batch that could never start does not wait, and a small batch waits behind a large one.
    let (never, started) = start(&*store, "never", 101, true).await;
    assert!(matches!(started, Started::OverLimit(_)), "{started:?}");
    store.fail(&never, Vec::new(), Vec::new(), NOW).await.unwrap();
    assert_eq!(start(&*store, "third", 1, true).await.1, Started::Queued);
    let waiting = batch(&*store, "second").await;
    assert_eq!((waiting.status, waiting.counts.total), (Status::Validating, 0));
    let later = at(NOW.as_millis() + 500);
    for name in ["second", "third"] {
        let held = claim(&*store, &Lane::Admit).await;
        assert_eq!(held.batch_id.as_str(), name);
        store.admit(&held, NOW, later).await.unwrap();
    }
    assert!(claim_at(&*store, &Lane::Admit, NOW).await.is_none());
    // The end of the first batch wakes the others at once.
    store.finish(&first, finish(Status::Completed, None)).await.unwrap();
    for name in ["second", "third"] {
        let held = claim(&*store, &Lane::Admit).await;
        assert_eq!(held.batch_id.as_str(), name);
        store.admit(&held, NOW, later).await.unwrap();
        let started = batch(&*store, name).await;
        assert_eq!((started.status, started.counts.total), (Status::InProgress, 2), "{name}");
    }
    // A batch that waits ends as its client or its window says.
    assert_eq!(start(&*store, "cancelled", 99, true).await.1, Started::Queued);
    cancel(&*store, "cancelled").await;
    let held = claim(&*store, &Lane::Admit).await;
    store.admit(&held, NOW, later).await.unwrap();
    assert_eq!(claim(&*store, &Lane::Finish).await.batch_id.as_str(), "cancelled");
    // A limit that is lowered below the batch alone ends its wait.
    assert_eq!(start(&*store, "lowered", 99, true).await.1, Started::Queued);
    let lower = |limit| [(ModelLimit::EnqueuedTokens, Some(limit))].into();
    store.update_model_limits(&id, "m", lower(98), operator()).await.unwrap();
    let held = claim(&*store, &Lane::Admit).await;
    let started = store.admit(&held, NOW, later).await.unwrap();
    assert!(matches!(started, Started::OverLimit(_)), "{started:?}");
    store.fail(&held, Vec::new(), Vec::new(), NOW).await.unwrap();
    store.update_model_limits(&id, "m", lower(100), operator()).await.unwrap();
    assert_eq!(start(&*store, "expired", 99, true).await.1, Started::Queued);
    let held = claim(&*store, &Lane::Admit).await;
    store.admit(&held, EXPIRY, later).await.unwrap();
    assert_eq!(batch(&*store, "expired").await.status, Status::InProgress);
}
