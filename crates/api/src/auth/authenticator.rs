//! Authenticator: finds the record of a key, and remembers it for a moment.
//!
//! **Cache.** A record is read once per [`MAX_STALENESS`], however many requests present the key,
//! so a check costs a digest and a lookup, and a key that another process revoked stops within that
//! time. A change through this process empties the cache at once.
//! Ids that no key has are not remembered, so that a client that guesses ids displaces no key of
//! another, and few records are read at a time, so that such a client does not occupy the store.
//!
//! **Last use.** Uses are collected and written together, so that a request costs no write. Uses of
//! the last seconds are lost in a crash, or if their write fails.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::ids::KeyId;
use batchwright_store::accounts::KeyRecord;
use batchwright_store::{Accounts, StoreError};
use batchwright_tenancy::principal::ProjectFacts;
use batchwright_tenancy::{
    Denied, KeyDigest, KeyFacts, PresentedKey, Principal, Scopes, authenticate,
};
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Maximum age of a record in the cache.
const MAX_STALENESS: Duration = Duration::from_millis(500);

/// Maximum number of records in the cache.
const MAX_CACHED_KEYS: usize = 10_000;

/// Maximum number of records that are read at a time.
const MAX_READS: usize = 2;

/// Maximum wait for a record.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval between two writes of last uses.
const LAST_USE_WRITE_INTERVAL: Duration = Duration::from_secs(10);

/// Record in the cache.
struct Cached {
    begun: Instant,
    /// Filled by the first request; the others wait for it.
    facts: Arc<OnceCell<Option<Arc<KeyFacts>>>>,
}

/// Reason why a key is refused.
pub(crate) enum Rejected {
    /// Key that is not valid now.
    Denied(Denied),
    /// Failure of the store.
    Store(StoreError),
    /// Store that is too busy to answer.
    Overloaded,
}

/// Authenticates keys.
pub struct Authenticator {
    accounts: Arc<dyn Accounts>,
    clock: Clock,
    /// True if the server had no keys at its start. The first key is made while it is stopped.
    has_no_keys: bool,
    cache: Mutex<HashMap<KeyId, Cached>>,
    /// Reads of records at a time: fewer than the store allows, so that clients that guess keys do
    /// not keep others from the store.
    reads: Semaphore,
    /// Last uses that are not written yet.
    uses: Mutex<HashMap<KeyId, Timestamp>>,
}

impl Authenticator {
    /// Creates an authenticator; reads whether the server has keys.
    pub async fn load(accounts: Arc<dyn Accounts>, clock: Clock) -> Result<Arc<Self>, StoreError> {
        let has_no_keys = !accounts.had_key().await?;
        let (cache, uses) = (Mutex::default(), Mutex::default());
        let reads = Semaphore::new(MAX_READS);
        Ok(Arc::new(Self { accounts, clock, has_no_keys, cache, reads, uses }))
    }

    /// Returns true if the server has no keys, so that every client is the default tenant.
    pub fn has_no_keys(&self) -> bool {
        self.has_no_keys
    }

    /// Returns the principal of a key.
    pub(crate) async fn authenticate(&self, text: &str) -> Result<Principal, Rejected> {
        let presented = PresentedKey::parse(text).ok_or(Rejected::Denied(Denied::Invalid))?;
        let id = presented.id.clone();
        let facts = self.facts(&id).await?;
        let now = self.clock.now();
        let principal = authenticate(presented, facts.as_deref(), now).map_err(Rejected::Denied)?;
        let mut uses = lock(&self.uses);
        if uses.len() < MAX_CACHED_KEYS {
            uses.insert(id, now);
        }
        Ok(principal)
    }

    /// Returns what the store knows of a key, at most [`MAX_STALENESS`] ago.
    async fn facts(&self, id: &KeyId) -> Result<Option<Arc<KeyFacts>>, Rejected> {
        let cell = self.cached(id);
        let read = async || {
            let reading = async {
                let _permit = self.reads.acquire().await;
                self.accounts.key(id).await
            };
            let found = tokio::time::timeout(READ_TIMEOUT, reading).await;
            let found = found.map_err(|_| Rejected::Overloaded)?.map_err(Rejected::Store)?;
            Ok(found.map(|key| Arc::new(facts_of(&key))))
        };
        let facts = cell.get_or_try_init(read).await.cloned();
        if !matches!(facts, Ok(Some(_))) {
            // A client that guesses ids must not displace the keys of others.
            lock(&self.cache).remove(id);
        }
        facts
    }

    /// Returns the record of a key in the cache, which may not be read yet.
    fn cached(&self, id: &KeyId) -> Arc<OnceCell<Option<Arc<KeyFacts>>>> {
        let mut cache = lock(&self.cache);
        if let Some(cached) = cache.get(id)
            && cached.begun.elapsed() < MAX_STALENESS
        {
            return cached.facts.clone();
        }
        if cache.len() >= MAX_CACHED_KEYS {
            cache.retain(|_, cached| cached.begun.elapsed() < MAX_STALENESS);
        }
        if cache.len() >= MAX_CACHED_KEYS {
            cache.clear();
        }
        let facts = Arc::new(OnceCell::new());
        let cached = Cached { begun: Instant::now(), facts: facts.clone() };
        cache.insert(id.clone(), cached);
        facts
    }

    /// Empties the cache, so that a change takes effect at once.
    pub(crate) fn clear_cache(&self) {
        lock(&self.cache).clear();
    }

    /// Writes last uses until `closing`, and then once more.
    pub async fn run(self: Arc<Self>, closing: CancellationToken) {
        while closing
            .run_until_cancelled(tokio::time::sleep(LAST_USE_WRITE_INTERVAL))
            .await
            .is_some()
        {
            self.write_uses().await;
        }
        self.write_uses().await;
    }

    async fn write_uses(&self) {
        let uses = std::mem::take(&mut *lock(&self.uses));
        if uses.is_empty() {
            return;
        }
        let uses = uses.into_iter().collect();
        if let Err(error) = self.accounts.record_key_uses(uses).await {
            tracing::warn!(%error, "last uses of keys not recorded");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn facts_of(key: &KeyRecord) -> KeyFacts {
    KeyFacts {
        digest: KeyDigest::from_bytes(key.digest),
        expires_at: key.expires_at,
        project: key.owner.as_ref().map(|owner| ProjectFacts {
            tenant: owner.project.slug.clone(),
            is_archived: owner.project.archived_at.is_some(),
            scopes: Scopes::from_stored(&key.scopes),
        }),
        is_restricted: key.owner.is_none() && !key.scopes.is_empty(),
    }
}
