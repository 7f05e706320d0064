//! BatchRow keys of SQLite inside the opaque keys of the store.

use crate::BatchKey;

/// BatchRow of a batch.
#[derive(Clone, Copy)]
pub(super) struct BatchRow {
    /// Key of the tenant.
    pub tenant: i64,
    /// Key of the batch.
    pub batch: i64,
}

impl BatchRow {
    /// Encodes the row as an opaque key.
    pub(super) fn key(self) -> BatchKey {
        BatchKey::new([self.tenant.to_be_bytes(), self.batch.to_be_bytes()].as_flattened())
    }

    /// Decodes a key; a key of another store has no row.
    pub(super) fn of(key: &BatchKey) -> Self {
        let halves = key.as_bytes().as_chunks::<8>().0;
        let [tenant, batch] = [0, 1].map(|half| halves.get(half).copied().unwrap_or_default());
        Self { tenant: i64::from_be_bytes(tenant), batch: i64::from_be_bytes(batch) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_encoding_and_foreign_keys_have_no_row() {
        let row = BatchRow::of(&BatchRow { tenant: 3, batch: i64::MAX }.key());
        assert_eq!((row.tenant, row.batch), (3, i64::MAX));
        let row = BatchRow::of(&BatchKey::new(b"another store"));
        assert_eq!(row.batch, 0);
    }
}
