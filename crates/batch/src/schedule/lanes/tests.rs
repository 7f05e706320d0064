//! Tests of `lanes`.

use batchwright_store::BatchKey;
use futures_util::FutureExt;

use super::*;

fn plugins(names: &str) -> Plugins {
    names.split(' ').map(str::to_owned).collect()
}

/// Returns a waiting batch for each lane, each of another tenant.
fn waiting(lanes: &[(&str, i64)]) -> Vec<Waiting> {
    let lane = |name: &str| match name {
        "validate" => Lane::Validate,
        "finish" => Lane::Finish,
        names => Lane::Execute(plugins(names)),
    };
    lanes
        .iter()
        .map(|(name, since)| Waiting {
            tenant: (*name).into(),
            weight: 1,
            urgency: Urgency::Dated,
            lane: lane(name),
            since: Timestamp::from_millis(*since),
            key: BatchKey::new(&[]),
        })
        .collect()
}

#[test]
fn full_plugin_does_not_block_other_plugins() {
    let lanes = Lanes::new(2, 100, Arc::default());
    let slow = Lane::Execute(plugins("slow"));
    let first = lanes.take(&slow, &"t".into());
    let _second = lanes.take(&slow, &"t".into());
    assert_eq!(lanes.next(&waiting(&[("slow", 1)])), Next::Nothing);
    assert_eq!(lanes.next(&waiting(&[("slow", 1), ("fast", 2)])), Next::Claim(1));
    assert_eq!(lanes.next(&waiting(&[("slow", 1), ("validate", 3)])), Next::Claim(1));
    // A batch of both plugins waits for the full plugin and reserves the place of the other.
    assert_eq!(lanes.next(&waiting(&[("fast slow", 1), ("fast", 2)])), Next::Nothing);
    assert_eq!(lanes.next(&waiting(&[("fast slow", 2), ("fast", 1)])), Next::Claim(1));
    drop(first);
    assert_eq!(lanes.next(&waiting(&[("fast slow", 1), ("fast", 2)])), Next::Claim(0));
}

#[test]
fn total_limit_leaves_each_plugin_one_place() {
    let lanes = Lanes::new(16, 2, Arc::default());
    let _places = [
        lanes.take(&Lane::Execute(plugins("a")), &"t".into()),
        lanes.take(&Lane::Execute(plugins("b")), &"t".into()),
    ];
    assert_eq!(lanes.next(&waiting(&[("a", 1), ("a b", 1)])), Next::Nothing);
    assert_eq!(lanes.next(&waiting(&[("a", 1), ("c", 2)])), Next::Claim(1));
}

#[tokio::test]
async fn batch_releases_its_place_after_a_stint_if_another_waits() {
    let lanes = Lanes::new(1, 100, Arc::default());
    let (ours, theirs, tenant) = (plugins("p"), waiting(&[("p", 5)]), TenantId::from("t"));
    let _active = lanes.work_on(&Lane::Execute(ours.clone()));
    let mut place = lanes.take(&Lane::Execute(ours.clone()), &"t".into());
    place.started_at = Instant::now().checked_sub(STINT_DURATION);
    assert!(!place.is_over(), "no other batch waits");
    assert_eq!(lanes.next(&theirs), Next::Nothing);
    assert!(place.is_over());
    place = {
        drop(place);
        lanes.take(&Lane::Execute(ours.clone()), &"t".into())
    };
    assert_eq!(lanes.next(&theirs), Next::Nothing);
    assert!(!place.is_over(), "the stint has not started");
    for _ in 0..STINT_LINES {
        place.took_line();
    }
    assert!(place.is_over() && place.over().now_or_never().is_some());
    drop(place);
    // The other batch has waited longer and runs first.
    let mut back =
        Box::pin(lanes.come_back((&ours, &tenant), Timestamp::from_millis(6), Urgency::Dated));
    assert!((&mut back).now_or_never().is_none());
    assert_eq!(lanes.next(&theirs), Next::Claim(0));
    let other = lanes.take(&Lane::Execute(ours.clone()), &"t".into());
    assert_eq!(lanes.next(&[]), Next::Nothing);
    drop(other);
    assert_eq!(lanes.next(&[]), Next::Returned);
    assert!((&mut back).now_or_never().unwrap().is_some());
}

#[tokio::test]
async fn oldest_active_batch_is_evicted_and_others_keep_their_turns() {
    let lanes = Lanes::new(1, 100, Arc::default());
    let (ours, tenant) = (plugins("p"), TenantId::from("t"));
    let active = [(); 2].map(|()| lanes.work_on(&Lane::Execute(ours.clone())));
    let mut first =
        Box::pin(lanes.come_back((&ours, &tenant), Timestamp::from_millis(1), Urgency::Dated));
    let mut second =
        Box::pin(lanes.come_back((&ours, &tenant), Timestamp::from_millis(2), Urgency::Dated));
    assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
    let third = waiting(&[("p", 0), ("p q", 0)]);
    // The batch with the oldest turn is evicted. The other active batch has its turn, although
    // the third batch has waited longer.
    assert_eq!(lanes.next(&third), Next::Returned);
    assert!(first.await.is_none());
    assert_eq!(lanes.next(&third), Next::Returned);
    let place = second.await;
    assert!(place.is_some());
    drop((place, active));
    assert_eq!(lanes.next(&third), Next::Claim(0));
}

#[test]
fn tenants_take_turns_by_weight_and_urgent_batches_are_first_of_their_tenant() {
    let lanes = Lanes::new(100, 100, Arc::default());
    let batch = |tenant: &str, since: i64, urgency| Waiting {
        tenant: tenant.into(),
        weight: if tenant == "heavy" { 3 } else { 1 },
        urgency,
        lane: Lane::Execute(plugins("p")),
        since: Timestamp::from_millis(since),
        key: BatchKey::new(&[]),
    };
    let mut claimed = HashMap::<String, usize>::new();
    let mut places = Vec::new();
    for _ in 0..50 {
        // The greedy tenant has waited longest with many batches.
        let waiting = [
            batch("greedy", 1, Urgency::Dated),
            batch("greedy", 3, Urgency::Urgent),
            batch("modest", 5, Urgency::Dated),
            batch("heavy", 6, Urgency::Dated),
        ];
        let Next::Claim(index) = lanes.next(&waiting) else { panic!("no place") };
        assert_ne!(index, 0, "the urgent batch of a tenant is first");
        let found = &waiting[index];
        places.push(lanes.take(&found.lane, &found.tenant));
        *claimed.entry(found.tenant.to_string()).or_default() += 1;
    }
    assert_eq!(
        claimed,
        HashMap::from(
            [("greedy", 10), ("modest", 10), ("heavy", 30)]
                .map(|(name, number)| (name.to_owned(), number))
        )
    );
}

#[test]
fn batch_without_a_deadline_runs_last_but_gets_one_in_a_hundred_places() {
    let lanes = Lanes::new(1000, 1000, Arc::default());
    let batch = |tenant: &str, urgency| Waiting {
        tenant: tenant.into(),
        weight: 1,
        urgency,
        lane: Lane::Execute(plugins("p")),
        since: Timestamp::from_millis(0),
        key: BatchKey::new(&[]),
    };
    let waiting = [batch("patient", Urgency::Undated), batch("dated", Urgency::Dated)];
    let mut places = Vec::new();
    let mut claimed = [0, 0];
    for _ in 0..500 {
        let Next::Claim(index) = lanes.next(&waiting) else { panic!("no place") };
        claimed[index] += 1;
        places.push(lanes.take(&waiting[index].lane, &waiting[index].tenant));
    }
    assert_eq!(claimed, [5, 495]);
    let alone = waiting.get(..1).unwrap();
    assert_eq!(lanes.next(alone), Next::Claim(0), "alone, it runs at once");
}
