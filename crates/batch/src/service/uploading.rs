//! Bytes of uploads in progress, by tenant, so that uploads cannot fill the disk beyond the limit
//! of their project before the store refuses them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use batchwright_domain::ids::TenantId;

/// Bytes that are being uploaded, by tenant.
#[derive(Default)]
pub(crate) struct Uploading(Mutex<HashMap<TenantId, u64>>);

/// Bytes of one upload; they no longer count once it is dropped.
pub(crate) struct UploadingBytes {
    all: Arc<Uploading>,
    tenant: TenantId,
    bytes: u64,
    /// Bytes that the project could store when the upload began; none is no limit.
    room: Option<u64>,
}

impl Uploading {
    /// Begins to count an upload, given the bytes that the project can still store.
    pub(crate) fn begin(self: &Arc<Self>, tenant: TenantId, room: Option<u64>) -> UploadingBytes {
        UploadingBytes { all: self.clone(), tenant, bytes: 0, room }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UploadingBytes {
    /// Counts bytes; returns false if all uploads of the tenant together exceed the room.
    pub(crate) fn add(&mut self, bytes: u64) -> bool {
        let Some(room) = self.room else { return true };
        let mut all = self.all.lock();
        let of_tenant = all.entry(self.tenant.clone()).or_default();
        if of_tenant.saturating_add(bytes) > room {
            return false;
        }
        *of_tenant = of_tenant.saturating_add(bytes);
        self.bytes = self.bytes.saturating_add(bytes);
        true
    }
}

impl Drop for UploadingBytes {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        let Some(of_tenant) = all.get_mut(&self.tenant) else { return };
        *of_tenant = of_tenant.saturating_sub(self.bytes);
        if *of_tenant == 0 {
            all.remove(&self.tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_of_a_tenant_share_the_room_and_give_it_back() {
        let all = Arc::new(Uploading::default());
        let mut first = all.begin("t".into(), Some(10));
        let mut second = all.begin("t".into(), Some(10));
        let mut other = all.begin("other".into(), Some(10));
        assert!(first.add(6) && second.add(4) && other.add(10));
        assert!(!first.add(1) && !second.add(1) && !other.add(1));
        drop(first);
        assert!(second.add(6) && !second.add(1));
        drop((second, other));
        assert!(all.lock().is_empty());
        assert!(all.begin("t".into(), None).add(u64::MAX));
    }
}
