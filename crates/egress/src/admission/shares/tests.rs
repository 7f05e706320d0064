use std::collections::BTreeMap;

use super::*;

fn id(tenant: &str, batch: u64) -> QueueId {
    QueueId { tenant: tenant.into(), batch: Some(batch) }
}

/// Lets a number of requests of each queue wait, and gives out permits; each is held until `slots`
/// are. Returns the permits by queue.
fn share(
    by: ShareBy,
    queues: &[(QueueId, Priority)],
    slots: usize,
    permits: usize,
) -> BTreeMap<QueueId, usize> {
    let mut shares = Shares::new(by);
    for (id, priority) in queues {
        for _ in 0..permits {
            shares.wait(id, *priority, ());
        }
    }
    let (mut held, mut given) = (VecDeque::new(), BTreeMap::new());
    for _ in 0..permits {
        let (id, tokens, ()) = shares.take_next(true, |_, _| true).unwrap();
        shares.begin(&id, tokens);
        *given.entry(id.clone()).or_default() += 1;
        held.push_back(id);
        if held.len() >= slots {
            shares.end(&held.pop_front().unwrap());
        }
    }
    given
}

#[test]
fn tenants_share_exchanges_by_weight_and_then_their_queues() {
    let heavy = Priority { tenant_weight: 3, ..Priority::default() };
    let queues =
        [(id("a", 1), Priority::default()), (id("a", 2), Priority::default()), (id("b", 3), heavy)];
    for slots in [1, 4, 40] {
        let given = share(ShareBy::Exchanges, &queues, slots, 400);
        let [one, two, other] = [id("a", 1), id("a", 2), id("b", 3)].map(|id| given[&id]);
        assert!((45..=55).contains(&one) && (45..=55).contains(&two), "{slots}: {given:?}");
        assert!((290..=310).contains(&other), "{slots}: {given:?}");
    }
}

#[test]
fn long_prompts_do_not_take_the_tokens_of_short_ones() {
    let long = Priority { tokens: 1000, ..Priority::default() };
    let short = Priority { tokens: 100, ..Priority::default() };
    let queues = [(id("long", 1), long), (id("short", 2), short)];
    let given = share(ShareBy::Tokens, &queues, 8, 220);
    assert!((18..=22).contains(&given[&id("long", 1)]), "{given:?}");
    // With one exchange at a time, tokens decide too.
    let given = share(ShareBy::Exchanges, &queues, 1, 220);
    assert!((18..=22).contains(&given[&id("long", 1)]), "{given:?}");
    let given = share(ShareBy::Exchanges, &queues, 8, 220);
    assert!((100..=120).contains(&given[&id("long", 1)]), "{given:?}");
}

#[test]
fn urgent_batch_is_first_within_its_tenant_and_windows_are_weights() {
    let urgent = Priority { urgency: Urgency::Urgent, ..Priority::default() };
    let queues = [
        (id("a", 1), Priority::default()),
        (id("a", 2), urgent),
        (id("b", 3), Priority::default()),
    ];
    let given = share(ShareBy::Exchanges, &queues, 4, 100);
    assert_eq!(given.get(&id("a", 1)), None);
    assert!((45..=55).contains(&given[&id("b", 3)]), "{given:?}");
    let hour = Priority { batch_weight: 24, ..Priority::default() };
    let queues = [(id("a", 1), Priority::default()), (id("a", 2), hour)];
    for slots in [1, 25, 50] {
        let given = share(ShareBy::Exchanges, &queues, slots, 500);
        assert!((15..=25).contains(&given[&id("a", 1)]), "{slots}: {given:?}");
    }
}

#[test]
fn tenant_that_comes_back_has_saved_up_nothing() {
    let mut shares = Shares::new(ShareBy::Tokens);
    let wait = |shares: &mut Shares<()>, tenant: &str, number| {
        for _ in 0..number {
            shares.wait(&id(tenant, 1), Priority::default(), ());
        }
    };
    let next = |shares: &mut Shares<()>| {
        let (id, tokens, ()) = shares.take_next(true, |_, _| true).unwrap();
        shares.begin(&id, tokens);
        shares.end(&id);
        id.tenant.to_string()
    };
    wait(&mut shares, "greedy", 300);
    for _ in 0..100 {
        next(&mut shares);
    }
    wait(&mut shares, "modest", 100);
    assert_eq!(next(&mut shares), "modest");
    let of_modest = (0..100).filter(|_| next(&mut shares) == "modest").count();
    assert!((49..=51).contains(&of_modest), "{of_modest}");
}

#[test]
fn tenant_at_its_limit_is_passed_over_and_what_is_gone_is_forgotten() {
    let mut shares = Shares::new(ShareBy::Exchanges);
    shares.wait(&id("a", 1), Priority::default(), 1);
    shares.wait(&id("a", 2), Priority::default(), 2);
    shares.wait(&id("b", 1), Priority::default(), 3);
    let next = shares.take_next(true, |tenant, _| tenant.as_str() != "a").unwrap();
    assert_eq!(next, (id("b", 1), 1, 3));
    shares.begin(&next.0, next.1);
    assert!(shares.take_next(true, |_, _| false).is_none());
    shares.leave(&id("a", 1), |waiting| *waiting == 1);
    shares.leave(&id("a", 2), |waiting| *waiting == 1);
    assert!(shares.has_waiting());
    shares.clear_waiting();
    assert!(!shares.has_waiting() && !shares.is_empty());
    shares.end(&next.0);
    assert!(shares.is_empty());
}

#[test]
fn online_requests_are_first_and_starve_no_batch() {
    let online = QueueId { tenant: "a".into(), batch: None };
    let undated = Priority { urgency: Urgency::Undated, ..Priority::default() };
    let queues = [
        (online.clone(), Priority::default()),
        (id("a", 1), Priority::default()),
        (id("b", 2), Priority::default()),
        (id("c", 3), undated),
    ];
    let given = share(ShareBy::Exchanges, &queues, 4, 1000);
    let of = |id: &QueueId| given.get(id).copied().unwrap_or(0);
    assert!((885..=900).contains(&of(&online)), "{given:?}");
    assert!((9..=11).contains(&of(&id("c", 3))), "{given:?}");
    // The tenant with online requests in flight has its share of the batches' part too.
    assert!(of(&id("b", 2)) >= 45, "{given:?}");
    let given = share(ShareBy::Exchanges, &queues[1..], 4, 1000);
    assert_eq!(given.get(&id("c", 3)), Some(&10), "{given:?}");
}

#[test]
fn without_room_for_batches_only_online_requests_are_next() {
    let mut shares = Shares::new(ShareBy::Exchanges);
    let online = QueueId { tenant: "a".into(), batch: None };
    shares.wait(&id("b", 1), Priority::default(), 1);
    assert!(shares.take_next(false, |_, _| true).is_none());
    shares.wait(&online, Priority::default(), 2);
    assert_eq!(shares.take_next(false, |_, _| true), Some((online, 1, 2)));
    assert_eq!(shares.take_next(true, |_, _| true), Some((id("b", 1), 1, 1)));
}
