//! Tests of `pool`.

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;

fn holder(name: &str) -> Holder {
    name.into()
}

fn free(pool: &Pool) -> i64 {
    pool.lock().free
}

/// Creates a pool of 1000 bytes beside the overdraft.
fn pool() -> Pool {
    Pool::new(1333)
}

#[tokio::test]
async fn holder_leaves_as_much_free_as_it_holds_and_new_holder_finds_room() {
    let pool = pool();
    let whole = free(&pool);
    let held: Vec<_> = std::iter::from_fn(|| pool.try_reserve(&holder("stuck"), 100)).collect();
    assert_eq!(held.len(), 5);
    let others: Vec<_> = std::iter::from_fn(|| pool.try_reserve(&holder("next"), 100)).collect();
    assert_eq!(others.len(), 2);
    // Rule 3: one item may be larger than the pool.
    let oversized = pool.reserve(&holder("large"), 5000).now_or_never().unwrap();
    assert!(pool.reserve(&holder("larger"), 5000).now_or_never().is_none());
    drop((held, others, oversized));
    assert_eq!(free(&pool), whole);
    assert!(pool.lock().holders.is_empty() && pool.lock().waiting.is_empty());
}

#[tokio::test]
async fn small_holders_fit_into_the_overdraft_and_only_one_item_exceeds_the_pool() {
    let pool = Pool::new(4000);
    let hog = pool.reserve(&holder("hog"), 3000).await;
    let small: Vec<_> =
        (0..90).map(|name| pool.reserve(&holder(&name.to_string()), 10).now_or_never()).collect();
    assert!(small.iter().all(Option::is_some));
    let oversized = pool.reserve(&holder("first"), 2000).now_or_never();
    assert!(oversized.is_some());
    assert!(
        pool.reserve(&holder("second"), 2000).now_or_never().is_none(),
        "a second item exceeds the pool"
    );
    // The oversized reservation leaves the rest of the pool unchanged.
    assert!(pool.reserve(&holder("small"), 10).now_or_never().is_some());
    drop(oversized);
    assert!(pool.reserve(&holder("second"), 2000).now_or_never().is_some());
    drop((hog, small));
}

#[tokio::test]
async fn large_request_is_granted_before_later_requests() {
    let pool = pool();
    let one = holder("one");
    let first = pool.reserve(&one, 300).await;
    // The large reservation becomes the priority reservation and does not wait; the next one must.
    let large = pool.reserve(&one, 450).now_or_never().unwrap();
    let mut second = Box::pin(pool.reserve(&one, 450));
    let mut third = Box::pin(pool.reserve(&one, 1));
    assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
    drop(first);
    drop(large);
    let second = second.await;
    let third = third.await;
    assert_eq!((second.bytes(), third.bytes()), (450, 1));
}

#[tokio::test]
async fn reservations_that_grow_in_steps_all_complete() {
    let pool = Pool::new(1000);
    let tasks: Vec<_> = (0..40)
        .map(|number| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let mut reservation = pool.reservation(&holder(&(number % 4).to_string()));
                for size in 1..=20 {
                    reservation.grow_to(size * 50).await;
                    tokio::task::yield_now().await;
                }
                reservation.shrink_to(10);
                tokio::task::yield_now().await;
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(free(&pool), 750);
}

proptest! {
    #[test]
    fn pool_loses_no_bytes_and_never_exceeds_its_bound(
        steps in prop::collection::vec((0_usize..7, 0_usize..3, 1_usize..400), 1..200)
    ) {
        let pool = Pool::new(1000);
        let mut reservations: Vec<Reservation> = Vec::new();
        let mut largest = 0;
        for (action, name, bytes) in steps {
            match action {
                0..3 => {
                    let name = holder(&name.to_string());
                    reservations.extend(pool.reserve(&name, bytes).now_or_never());
                }
                3 => reservations.extend(pool.try_reserve(&holder(&name.to_string()), bytes)),
                4 => {
                    if let Some(reservation) = reservations.get_mut(name) {
                        // A request that has to wait is dropped at once.
                        reservation.grow_to(bytes).now_or_never();
                    }
                }
                5 => {
                    if let Some(reservation) = reservations.get_mut(name) {
                        reservation.shrink_to(bytes);
                    }
                }
                _ if name < reservations.len() => drop(reservations.remove(name)),
                _ => {}
            }
            largest = largest.max(bytes);
            let held: usize = reservations.iter().map(Reservation::bytes).sum();
            prop_assert!(held <= 1000 + largest, "{held}");
            let oversized = pool.lock().oversized;
            let counted: usize = reservations
                .iter()
                .filter(|reservation| oversized != Some(reservation.id))
                .map(Reservation::bytes)
                .sum();
            prop_assert!(counted <= 1000, "{counted}");
            prop_assert_eq!(free(&pool), 750 - i64::try_from(counted).unwrap());
        }
        drop(reservations);
        prop_assert_eq!(free(&pool), 750);
        let state = pool.lock();
        prop_assert!(state.holders.is_empty() && state.waiting.is_empty());
        prop_assert!(state.oversized.is_none());
    }
}

#[tokio::test]
async fn tenants_of_a_plugin_share_what_the_plugin_may_hold() {
    let pool = pool();
    let whole = free(&pool);
    let reserve =
        |name: &str| std::iter::from_fn(|| pool.try_reserve(&holder(name), 10)).collect::<Vec<_>>();
    // Alone, a tenant may hold all that its plugin may.
    let mut greedy = reserve("p/greedy");
    assert_eq!(greedy.len(), 50);
    let modest = holder("p/modest");
    let mut first = pool.reservation(&modest);
    first.grow_to(10).now_or_never().unwrap();
    assert!(pool.try_reserve(&modest, 10).is_none(), "the plugin holds what it may");
    // What the tenant releases goes to the other one, until they hold alike.
    let mut of_modest = Vec::new();
    for _ in 0..30 {
        greedy.pop();
        assert!(pool.try_reserve(&holder("p/greedy"), 10).is_none());
        of_modest.extend(pool.try_reserve(&modest, 10));
    }
    assert!(of_modest.len() >= 12, "{}", of_modest.len());
    // Another plugin is not affected by the number of tenants.
    let other = reserve("q/greedy");
    assert!(other.len() >= 20, "{}", other.len());
    drop((greedy, first, of_modest, other));
    assert_eq!(free(&pool), whole);
    let state = pool.lock();
    assert!(state.holders.is_empty() && state.groups.is_empty());
}
