//! Webhook endpoints, the outbox of events, and deliveries.

use batchwright_domain::ids::{EventId, WebhookId};
use batchwright_domain::webhook::EventType;

use super::*;
use crate::accounts::ListQuery;
use crate::suite::Fixture;
use crate::webhooks::{
    AttemptResult, DeliveryRecord, DeliveryState, DueDelivery, NewWebhook, StoredSecret,
    WebhookChanges,
};
use crate::{Order, Paged};

fn new_webhook(id: &str, event_types: &[EventType]) -> NewWebhook {
    NewWebhook {
        id: id.into(),
        name: "hook".into(),
        url: "https://example.com/".into(),
        event_types: event_types.to_vec(),
        secret: StoredSecret { bytes: b"secret".as_slice().into(), is_sealed: true },
        hint: "whsec_…cret".into(),
    }
}

async fn add(store: &dyn Store, id: &str) {
    let new = new_webhook(id, EventType::ALL);
    store.create_webhook(&tenant(), new, 9, operator()).await.unwrap();
}

/// Ends a batch with a status.
async fn end(store: &dyn Store, id: &str, status: Status) {
    let held = executing(store, id, 0).await;
    store.start_finalizing(&held, NOW).await.unwrap();
    store.finish(&held, finish(status, None)).await.unwrap();
}

async fn claim_all(store: &dyn Store, now: Timestamp) -> Vec<DueDelivery> {
    store.claim_deliveries(Vec::new(), (9, 9), now, LEASE).await.unwrap()
}

async fn log(store: &dyn Store, id: &str) -> Vec<DeliveryRecord> {
    let part = ListQuery { after: None, limit: 9, order: Order::NewestFirst };
    match store.deliveries(&tenant(), &id.into(), part).await.unwrap() {
        Some(Paged::Page(page)) => page.items,
        other => panic!("{other:?}"),
    }
}

fn result(due: &DueDelivery, is_delivered: bool, next_at: Option<Timestamp>) -> AttemptResult {
    AttemptResult {
        lease: due.lease,
        webhook_updated_at: due.webhook.updated_at,
        at: NOW,
        status: Some(if is_delivered { 200 } else { 500 }),
        detail: None,
        is_delivered,
        next_at,
        disables: false,
    }
}

pub(crate) async fn end_of_a_batch_inserts_an_event_for_each_endpoint_that_asks(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    insert_file(&*store, file("file-in")).await;
    add(&*store, "all").await;
    let some = new_webhook("some", &[EventType::BatchExpired]);
    store.create_webhook(&tenant(), some, 9, operator()).await.unwrap();
    let foreign = new_webhook("foreign", EventType::ALL);
    store.create_webhook(&"other".into(), foreign, 9, operator()).await.unwrap();
    assert_eq!(store.next_delivery().await.unwrap(), None);
    end(&*store, "b", Status::Completed).await;
    create(&*store, "invalid").await;
    let validating = claim(&*store, &Lane::Validate).await;
    store.fail(&validating, Vec::new(), Vec::new(), at(NOW.as_millis() + 5)).await.unwrap();
    let found = log(&*store, "all").await;
    let facts: Vec<_> = found.iter().map(|one| (one.event_type, one.subject.as_str())).collect();
    assert_eq!(facts, [(EventType::BatchFailed, "invalid"), (EventType::BatchCompleted, "b")]);
    assert!(found.iter().all(|one| one.state == DeliveryState::Pending && one.attempts == 0));
    assert!(log(&*store, "some").await.is_empty());
    assert_eq!(store.webhook_counts().await.unwrap().pending, 2);
    assert_eq!(store.next_delivery().await.unwrap(), Some(NOW));
    // Nobody else sees them.
    let part = ListQuery { after: None, limit: 9, order: Order::NewestFirst };
    assert!(store.deliveries(&"other".into(), &"all".into(), part).await.unwrap().is_none());
    assert!(store.webhook(&"other".into(), &"all".into()).await.unwrap().is_none());
}

pub(crate) async fn delivery_is_claimed_once_in_order_and_again_after_its_lease(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    insert_file(&*store, file("file-in")).await;
    for endpoint in ["one", "two", "three"] {
        add(&*store, endpoint).await;
    }
    end(&*store, "a", Status::Completed).await;
    let before = at(NOW.as_millis() - 1);
    assert!(claim_all(&*store, before).await.is_empty(), "claimed before it is due");
    // One for each endpoint, and as many of a tenant as allowed, with those in flight.
    let busy = vec![(tenant(), WebhookId::from("one"))];
    let first = store.claim_deliveries(busy, (9, 2), NOW, LEASE).await.unwrap();
    assert_eq!(first.len(), 1);
    assert_eq!((first[0].delivery.subject.as_str(), &first[0].tenant), ("a", &tenant()));
    let rest = claim_all(&*store, NOW).await;
    let claimed = first.iter().chain(&rest).map(|due| due.webhook.id.as_str().to_owned());
    assert_eq!(claimed.collect::<BTreeSet<_>>(), ["one", "three", "two"].map(str::to_owned).into());
    assert!(claim_all(&*store, NOW).await.is_empty(), "claimed twice");
    // The lease has ended, and another claim counts.
    let end_of_second = at(LEASE.as_millis() + 9);
    let again = store.claim_deliveries(Vec::new(), (9, 9), LEASE, end_of_second).await.unwrap();
    let again = again.iter().find(|due| due.key == first[0].key).unwrap();
    let endpoint = first[0].webhook.id.as_str();
    store.record_attempt(first[0].key, result(&first[0], true, None)).await.unwrap();
    assert_eq!(log(&*store, endpoint).await[0].state, DeliveryState::Pending);
    store.record_attempt(again.key, result(again, true, None)).await.unwrap();
    let sent = log(&*store, endpoint).await.remove(0);
    assert_eq!((sent.state, sent.attempts), (DeliveryState::Delivered, 1));
    assert_eq!(sent.next_at, None);
    // The older event of an endpoint goes first.
    end(&*store, "b", Status::Completed).await;
    let next = at(LEASE.as_millis() + 10);
    let last = at(LEASE.as_millis() + 20);
    let due = store.claim_deliveries(Vec::new(), (9, 9), next, last).await.unwrap();
    let of = |id: &str| due.iter().find(|due| due.webhook.id.as_str() == id).unwrap();
    assert_eq!(of(endpoint).delivery.subject, "b");
}

pub(crate) async fn failing_endpoint_is_disabled_and_enabled_by_a_change(fixture: impl Fixture) {
    let store = open(&fixture).await;
    insert_file(&*store, file("file-in")).await;
    add(&*store, "w").await;
    end(&*store, "a", Status::Completed).await;
    end(&*store, "b", Status::Completed).await;
    let due = claim_all(&*store, NOW).await.remove(0);
    let later = at(NOW.as_millis() + 50);
    store.record_attempt(due.key, result(&due, false, Some(later))).await.unwrap();
    let endpoint = async || store.webhook(&tenant(), &"w".into()).await.unwrap().unwrap();
    assert_eq!(endpoint().await.failing_since, Some(NOW));
    let again = claim_all(&*store, later).await;
    let again = again.iter().find(|due| due.delivery.subject == "b" || due.delivery.attempts == 1);
    let again = again.unwrap();
    let disabling = AttemptResult { disables: true, ..result(again, false, None) };
    let outdated = AttemptResult { webhook_updated_at: at(1), ..disabling.clone() };
    store
        .record_attempt(again.key, AttemptResult { next_at: Some(later), ..outdated })
        .await
        .unwrap();
    assert_eq!(endpoint().await.disabled_at, None, "the endpoint was changed since");
    let again = claim_all(&*store, later).await.remove(0);
    let disabling = AttemptResult { lease: again.lease, ..disabling };
    store.record_attempt(again.key, disabling).await.unwrap();
    assert_eq!(endpoint().await.disabled_at, Some(NOW));
    assert_eq!(store.next_delivery().await.unwrap(), None);
    assert!(log(&*store, "w").await.iter().all(|one| one.state == DeliveryState::Failed));
    end(&*store, "c", Status::Completed).await;
    assert_eq!(log(&*store, "w").await.len(), 2, "a disabled endpoint gets no events");
    let old = log(&*store, "w").await.remove(1);
    let event: EventId = old.event.clone();
    let refused = store.redeliver(&tenant(), &"w".into(), &event, later).await;
    assert_eq!(refusal(refused), Refusal::DisabledWebhook);
    let changes = WebhookChanges { name: Some("new".into()), ..WebhookChanges::default() };
    let changed = store.update_webhook(&tenant(), &"w".into(), changes, operator()).await;
    let changed = changed.unwrap().unwrap();
    assert_eq!((changed.disabled_at, changed.failing_since), (None, None));
    // An event of before can be delivered again, under its id and with its time.
    let again = store.redeliver(&tenant(), &"w".into(), &event, later).await.unwrap().unwrap();
    assert_eq!((again.state, again.created_at), (DeliveryState::Pending, old.created_at));
    assert_eq!((again.retry_since, again.attempts), (later, 0));
    assert_eq!(claim_all(&*store, later).await[0].delivery.event, event);
    let purged = store.purge_deliveries(LEASE, 9).await.unwrap();
    assert!(!purged && log(&*store, "w").await.len() == 1, "pending deliveries stay");
    assert!(store.delete_webhook(&tenant(), &"w".into(), operator()).await.unwrap());
    assert!(!store.delete_webhook(&tenant(), &"w".into(), operator()).await.unwrap());
    assert_eq!(store.webhook_counts().await.unwrap(), Default::default());
    // What was in flight is recorded nowhere.
    store.record_attempt(due.key, result(&due, true, None)).await.unwrap();
}
