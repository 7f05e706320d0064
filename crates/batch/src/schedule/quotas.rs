//! Quotas of the projects whose requests this process sends.
//!
//! What a project may send is decided in [`batchwright_tenancy::quota`]. This module keeps a quota
//! for each tenant that is active, and reads its limits and its durable counts from the store, at
//! most [`MAX_STALENESS`] ago. Nothing is sent while they cannot be read.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_domain::limits::{Limit, Permissions};
use batchwright_domain::money::{Money, Price};
use batchwright_domain::usage::TokenUsage;
use batchwright_domain::window::Urgency;
use batchwright_egress::Priority;
use batchwright_plugin::Registry;
use batchwright_store::{BatchRecord, Result, Store, WaitCause};
use batchwright_tenancy::quota::{Allowance, Blocked, Quota, Reserved, Standing};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::Config;

/// Maximum age of limits and durable counts.
const MAX_STALENESS: Duration = Duration::from_millis(500);

/// Maximum time until a blocked request is checked again: a limit may have been raised.
const RECHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Pause after limits of a project could not be read.
pub(crate) const QUOTA_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Number of quotas beyond which unused ones are removed.
const MAX_UNUSED_QUOTAS: usize = 1000;

/// Time after which a quota without requests says nothing that the store does not know.
const UNUSED_TIME: Duration = Duration::from_secs(120);

/// Bytes of a request's body for each input token of its estimate.
const BYTES_PER_TOKEN: u64 = 4;

/// Completion window of a batch with the weight 1.
const WEIGHT_1_WINDOW: Duration = Duration::from_secs(86_400);

/// Maximum weight of a batch within its tenant.
const MAX_BATCH_WEIGHT: u32 = 100;

/// Returns the estimated input tokens of a request, given the bytes of its body.
pub(crate) fn estimated_tokens(body_bytes: usize) -> u64 {
    (body_bytes as u64).div_ceil(BYTES_PER_TOKEN)
}

/// Quotas of all active tenants.
pub(crate) struct Quotas {
    shared: Arc<Shared>,
    tenants: Mutex<HashMap<TenantId, Arc<TenantQuota>>>,
}

/// What the quotas of all tenants share.
struct Shared {
    store: Arc<dyn Store>,
    clock: Clock,
    config: Arc<Config>,
    /// Number of changes of limits through this process.
    changes: watch::Sender<u64>,
}

/// Quota of a tenant.
pub(crate) struct TenantQuota {
    tenant: TenantId,
    shared: Arc<Shared>,
    quota: Mutex<Quota>,
    share: watch::Sender<TenantShare>,
    /// What the tenant may use.
    permissions: Mutex<Arc<Permissions>>,
    /// Time of the last read of the store. Locked while the store is read.
    refreshed_at: tokio::sync::Mutex<Option<Instant>>,
    /// What is known of batches with requests that wait, or that a provider works on.
    batches: Mutex<HashMap<BatchId, OfBatch>>,
    /// True after a change through this process, so that it takes effect at once.
    is_stale: AtomicBool,
    used_at: Mutex<Instant>,
}

/// What decides on the share of a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TenantShare {
    weight: u32,
    max_in_flight: Option<u64>,
}

/// What a request that waits knows of the limits.
pub(crate) struct KnownLimits {
    /// Number of changes of limits through this process.
    changes: watch::Receiver<u64>,
    share: watch::Receiver<TenantShare>,
}

/// What is known of a batch.
#[derive(Default)]
struct OfBatch {
    /// Reservations of the requests that a provider works on and that are polled, by line.
    jobs: HashMap<u64, Reserved>,
    /// Limit that has refused a request of the batch last.
    blocked: Option<Blocked>,
}

/// What decides on the share of a batch within its tenant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchShare {
    /// Time of creation.
    pub created_at: Timestamp,
    /// End of the completion window.
    pub expires_at: Timestamp,
}

impl BatchShare {
    /// Returns the weight of the completion window: 1 for a day or more, 24 for an hour.
    fn weight(&self) -> u32 {
        let window = self.created_at.until(self.expires_at).as_secs().max(1);
        u32::try_from(WEIGHT_1_WINDOW.as_secs() / window).unwrap_or(1).clamp(1, MAX_BATCH_WEIGHT)
    }

    /// Returns the urgency now.
    pub(crate) fn urgency(&self, now: Timestamp) -> Urgency {
        Urgency::of(self.created_at, self.expires_at, now)
    }
}

/// Reservation of a request, given back when it is dropped.
pub(crate) struct Hold {
    of: Arc<TenantQuota>,
    /// None without limits, or once it was recorded.
    reserved: Option<Reserved>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Returns the price of a model now.
    fn price(&self, model: &str) -> Option<Price> {
        self.config.prices.at(model, self.clock.now()).copied()
    }
}

impl Quotas {
    pub(crate) fn new(store: Arc<dyn Store>, clock: Clock, config: Arc<Config>) -> Self {
        let shared = Shared { store, clock, config, changes: watch::Sender::new(0) };
        Self { shared: Arc::new(shared), tenants: Mutex::default() }
    }

    /// Returns the quota of a tenant.
    pub(crate) fn of(&self, tenant: &TenantId) -> Arc<TenantQuota> {
        let mut tenants = lock(&self.tenants);
        if tenants.len() >= MAX_UNUSED_QUOTAS {
            tenants.retain(|_, quota| Arc::strong_count(quota) > 1 || quota.is_in_use());
        }
        let quota = tenants.entry(tenant.clone()).or_insert_with(|| {
            Arc::new(TenantQuota {
                tenant: tenant.clone(),
                shared: self.shared.clone(),
                quota: Mutex::default(),
                share: watch::Sender::new(TenantShare { weight: 1, max_in_flight: None }),
                permissions: Mutex::default(),
                refreshed_at: tokio::sync::Mutex::new(None),
                batches: Mutex::default(),
                is_stale: AtomicBool::new(true),
                used_at: Mutex::new(Instant::now()),
            })
        });
        *lock(&quota.used_at) = Instant::now();
        quota.clone()
    }

    /// Forgets a batch that has ended.
    pub(crate) fn forget(&self, tenant: &TenantId, batch: &BatchId) {
        let Some(quota) = lock(&self.tenants).get(tenant).cloned() else { return };
        let Some(of_batch) = lock(&quota.batches).remove(batch) else { return };
        for reserved in of_batch.jobs.into_values() {
            lock(&quota.quota).release(reserved);
        }
    }

    /// Lets each quota read its limits and counts before its next request.
    pub(crate) fn expire(&self) {
        for quota in lock(&self.tenants).values() {
            quota.is_stale.store(true, Ordering::Relaxed);
        }
        self.shared.changes.send_modify(|changes| *changes = changes.wrapping_add(1));
    }

    /// Returns a receiver that learns of changes of limits.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// Returns why the requests of a batch wait, if a limit of the project is the cause.
    pub(crate) fn wait_cause(
        &self,
        tenant: &TenantId,
        registry: &Registry,
        batch: &BatchRecord,
        now: Timestamp,
    ) -> Option<WaitCause> {
        let model = batch.model.as_deref();
        let route = model.and_then(|model| registry.current().route(tenant, model));
        let quota = lock(&self.tenants).get(tenant).cloned()?;
        let blocked = quota.blocked(route.as_ref().map(|route| route.model.as_str()));
        // The requests of a batch may have different models and sizes.
        let last = || lock(&quota.batches).get(&batch.new.id)?.blocked.clone();
        let blocked = blocked.or_else(|| last().filter(|blocked| blocked.until > now))?;
        let cause = blocked.limit.to_string();
        let known = batch.waits_for.as_ref().filter(|known| known.cause == cause);
        let since = known.map_or(now, |known| known.since);
        Some(WaitCause { cause, since, next: blocked.until })
    }
}

impl TenantQuota {
    fn is_in_use(&self) -> bool {
        lock(&self.used_at).elapsed() < UNUSED_TIME || !lock(&self.quota).is_idle()
    }

    /// Reads limits and counts from the store if they are too old.
    ///
    /// One request reads; the others go on with what is known, unless nothing is known.
    pub(crate) async fn refresh(self: &Arc<Self>) -> Result<()> {
        let mut refreshed_at = match self.refreshed_at.try_lock() {
            Ok(refreshed_at) => refreshed_at,
            Err(_) if !lock(&self.quota).is_known() => self.refreshed_at.lock().await,
            Err(_) => return Ok(()),
        };
        let is_stale = self.is_stale.swap(false, Ordering::Relaxed);
        if !is_stale && refreshed_at.is_some_and(|at| at.elapsed() < MAX_STALENESS) {
            return Ok(());
        }
        *refreshed_at = None;
        let mark = lock(&self.quota).begin_refresh();
        let Shared { store, config, .. } = &*self.shared;
        let now = self.shared.clock.now();
        let policy = store.policy(&self.tenant).await?;
        let limits = config.tenant_defaults.fill(policy.limits);
        let weight = limits.get(Limit::Weight).and_then(|weight| u32::try_from(weight).ok());
        let max_in_flight = limits.get(Limit::RequestsInFlight);
        let share = TenantShare { weight: weight.unwrap_or(1), max_in_flight };
        self.share.send_if_modified(|known| std::mem::replace(known, share) != share);
        *lock(&self.permissions) = Arc::new(policy.permissions);
        let budget = policy.spend_limit.map(Money::from_cents);
        let allowance = Allowance { models: policy.model_limits, budget };
        let meters = if allowance.is_unlimited() {
            Default::default()
        } else {
            store.meters(&self.tenant, now).await?
        };
        let (spent, today) = (meters.spent, &meters.requests_today);
        lock(&self.quota).refresh(&mark, allowance, spent, today, now);
        *refreshed_at = Some(Instant::now());
        Ok(())
    }

    /// Returns why a request of a model, or of any model, cannot begin now.
    pub(crate) fn blocked(&self, model: Option<&str>) -> Option<Blocked> {
        let now = self.shared.clock.now();
        let blocked = lock(&self.quota).check(model.unwrap_or_default(), now).err()?;
        Some(rechecked(blocked, now))
    }

    /// Reserves a request of a model, given the bytes of its body, and whether it waits if it is
    /// refused.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        (model, body_bytes): (&str, usize),
        may_wait: bool,
    ) -> std::result::Result<Hold, Blocked> {
        let now = self.shared.clock.now();
        let mut quota = lock(&self.quota);
        if quota.is_unlimited() {
            return Ok(Hold { of: self.clone(), reserved: None });
        }
        let (tokens, cost) = self.estimate(&quota, model, body_bytes);
        let reserved = quota.reserve(model, tokens, cost, now);
        if may_wait && let Err(blocked) = &reserved {
            quota.wait(model, tokens, blocked);
        }
        Ok(Hold { of: self.clone(), reserved: Some(reserved?) })
    }

    /// Returns what the tenant may use, as it was read last.
    pub(crate) fn permissions(&self) -> Arc<Permissions> {
        lock(&self.permissions).clone()
    }

    /// Returns the limits for a model and what is left of them.
    pub(crate) fn standing(&self, model: &str) -> Standing {
        lock(&self.quota).standing(model, self.shared.clock.now())
    }

    /// Returns the priority of an online request among those that wait for a provider.
    pub(crate) fn online_priority(&self, model: &str, body_bytes: usize) -> Priority {
        let TenantShare { weight: tenant_weight, max_in_flight } = *self.share.borrow();
        let output = lock(&self.quota).expected_output(model);
        let tokens = estimated_tokens(body_bytes).saturating_add(output);
        Priority { tenant_weight, max_in_flight, tokens, ..Priority::default() }
    }

    /// Returns the priority of a request of a batch among those that wait for a provider.
    pub(crate) fn priority(&self, batch: &BatchShare, model: &str, body_bytes: usize) -> Priority {
        Priority {
            batch_weight: batch.weight(),
            urgency: batch.urgency(self.shared.clock.now()),
            ..self.online_priority(model, body_bytes)
        }
    }

    /// Remembers which limit has refused a request of a batch, and returns when to ask again.
    pub(crate) fn set_blocked(&self, batch: &BatchId, blocked: Blocked) -> Timestamp {
        let blocked = rechecked(blocked, self.shared.clock.now());
        let until = blocked.until;
        lock(&self.batches).entry(batch.clone()).or_default().blocked = Some(blocked);
        until
    }

    /// Keeps the reservation of a request that a provider works on, until it is polled.
    pub(crate) fn keep_job(&self, batch: &BatchId, line: u64, mut hold: Hold) {
        if let Some(reserved) = hold.reserved.take() {
            let mut batches = lock(&self.batches);
            let before = batches.entry(batch.clone()).or_default().jobs.insert(line, reserved);
            drop(batches);
            if let Some(before) = before {
                lock(&self.quota).release(before);
            }
        }
    }

    /// Returns the reservation of a request that a provider works on.
    pub(crate) fn resume_job(
        self: &Arc<Self>,
        batch: &BatchId,
        line: u64,
        (model, body_bytes): (&str, usize),
    ) -> Hold {
        let kept = lock(&self.batches).get_mut(batch).and_then(|found| found.jobs.remove(&line));
        let reserved = kept.or_else(|| {
            let mut quota = lock(&self.quota);
            // A restart has forgotten the reservation.
            (!quota.is_unlimited()).then(|| {
                let (_, cost) = self.estimate(&quota, model, body_bytes);
                quota.resume(model, cost)
            })
        });
        Hold { of: self.clone(), reserved }
    }

    /// Returns the estimated tokens and the estimated cost of a request.
    fn estimate(&self, quota: &Quota, model: &str, body_bytes: usize) -> (u64, Money) {
        let (input, output) = (estimated_tokens(body_bytes), quota.expected_output(model));
        let usage = TokenUsage { input, output, ..TokenUsage::default() };
        let cost =
            self.shared.price(model).map(|price| price.cost(usage).total()).unwrap_or_default();
        (usage.total(), cost)
    }

    /// Returns what a request knows of the limits before it waits.
    pub(crate) async fn known_limits(self: &Arc<Self>) -> KnownLimits {
        let (changes, mut share) = (self.shared.changes.subscribe(), self.share.subscribe());
        // A change that came before the subscription would not wake the request.
        if self.is_stale.load(Ordering::Relaxed) {
            self.read_limits().await;
            share.mark_unchanged();
        }
        KnownLimits { changes, share }
    }

    /// Waits until limits were changed through this process, or others were read.
    pub(crate) async fn changed(self: &Arc<Self>, known: &mut KnownLimits) {
        tokio::select! {
            // The senders live as long as this quota.
            _ = known.share.changed() => {}
            _ = known.changes.changed() => {
                self.read_limits().await;
                known.share.mark_unchanged();
            }
        }
    }

    /// Reads limits and counts, however often the store fails.
    async fn read_limits(self: &Arc<Self>) {
        // Another request may read them at this moment.
        drop(self.refreshed_at.lock().await);
        while let Err(error) = self.refresh().await {
            tracing::error!(tenant = %self.tenant, %error, "limits not read");
            self.shared.clock.sleep(QUOTA_RETRY_INTERVAL).await;
        }
        drop(self.refreshed_at.lock().await);
    }
}

/// Lets a refusal end earlier, because a limit may be raised meanwhile.
fn rechecked(blocked: Blocked, now: Timestamp) -> Blocked {
    Blocked { until: blocked.until.min(now.after(RECHECK_INTERVAL)), ..blocked }
}

impl Hold {
    /// Returns the price of the model now.
    pub(crate) fn price(&self, model: &str) -> Option<Price> {
        self.of.shared.price(model)
    }

    /// Replaces the estimate by what the request has used, after the store has counted it.
    pub(crate) fn record(mut self, usage: TokenUsage, price: Option<Price>) {
        let Some(reserved) = self.reserved.take() else { return };
        let usage = usage.plausible();
        let cost = price.map(|price| price.cost(usage).total()).unwrap_or_default();
        lock(&self.of.quota).record(reserved, usage.total(), usage.output, cost);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(reserved) = self.reserved.take() {
            lock(&self.of.quota).release(reserved);
        }
    }
}

#[cfg(test)]
mod tests {
    use batchwright_domain::settings::{Given, Section};
    use batchwright_plugin::RequiredPlugins;
    use batchwright_store::SqliteStore;
    use batchwright_store::accounts::{Actor, NewProject};
    use batchwright_tenancy::Prices;

    use super::*;

    fn section<T: Section>() -> T {
        T::read(&mut Given::default()).unwrap()
    }

    #[tokio::test]
    async fn limit_that_changes_before_a_request_waits_reaches_it() {
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(folder.path()).unwrap());
        let by = || Actor { key: None, address: None, at: Timestamp::from_millis(0) };
        let new = NewProject { id: "proj_t".into(), slug: "t".into(), name: "t".into() };
        store.create_project(new, by()).await.unwrap();
        let set = async |max| {
            let limits = [(Limit::RequestsInFlight, Some(max))];
            store.update_limits(&"proj_t".into(), limits.into(), by()).await.unwrap();
        };
        let config = Config {
            batch: section(),
            retention: section(),
            execution: section(),
            online: section(),
            tenant_defaults: section(),
            prices: Prices::default(),
            required_plugins: RequiredPlugins::Named(Vec::new()),
        };
        let quotas = Quotas::new(store.clone(), Clock::system(), Arc::new(config));
        let quota = quotas.of(&"t".into());
        let max = || quota.online_priority("m", 0).max_in_flight;
        set(1).await;
        quota.refresh().await.unwrap();

        // Between what the request has read and what it begins to watch.
        set(4).await;
        quotas.expire();
        let mut known = quota.known_limits().await;
        assert_eq!(max(), Some(4));

        // While it waits: a change through this process, and one that another request has read.
        set(5).await;
        quotas.expire();
        quota.changed(&mut known).await;
        assert_eq!(max(), Some(5));
        let mut known = quota.known_limits().await;
        set(6).await;
        *quota.refreshed_at.lock().await = None;
        quota.refresh().await.unwrap();
        quota.changed(&mut known).await;
        assert_eq!(max(), Some(6));
    }

    #[test]
    fn window_is_weight_and_its_end_is_urgent() {
        let batch = |seconds: u64| BatchShare {
            created_at: Timestamp::from_millis(0),
            expires_at: Timestamp::from_millis(0).after(Duration::from_secs(seconds)),
        };
        for (seconds, weight) in [(3600, 24), (86_400, 1), (7 * 86_400, 1), (60, 100), (0, 100)] {
            assert_eq!(batch(seconds).weight(), weight, "{seconds}");
        }
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1000);
        for (window, now, urgency) in [
            (3600, 3200, Urgency::Dated),
            (3600, 3241, Urgency::Urgent),
            (3600, 9999, Urgency::Urgent),
            (7 * 86_400, 7 * 86_400 - 4 * 3600, Urgency::Dated),
            (u64::MAX, 9_999_999, Urgency::Undated),
        ] {
            assert_eq!(batch(window).urgency(at(now)), urgency, "{window} {now}");
        }
        assert_eq!(batch(u64::MAX).weight(), 1);
    }
}
