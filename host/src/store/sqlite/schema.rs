//! The tables, migration by migration. One that has shipped is never changed; a new one is added.

use rusqlite_migration::{M, Migrations};

/// What a table holds is said beside it. Times are milliseconds since 1970, tenants and batches are meant by their integer keys.
const FIRST: &str = "
CREATE TABLE tenants (
    key INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;

-- AUTOINCREMENT: keys are never used again, so a page that begins after one stays where it is.
CREATE TABLE files (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant INTEGER NOT NULL REFERENCES tenants (key),
    id TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    -- Deleted by a client; the row goes when the bytes are gone.
    deleted_at INTEGER,
    UNIQUE (tenant, id)
) STRICT;
CREATE INDEX files_deleted ON files (deleted_at) WHERE deleted_at IS NOT NULL;
CREATE INDEX files_expiring ON files (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE batches (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant INTEGER NOT NULL REFERENCES tenants (key),
    id TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    -- A JSON object of strings, or null.
    metadata TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    output_lifetime INTEGER,
    status TEXT NOT NULL,
    model TEXT,
    output_file_id TEXT,
    error_file_id TEXT,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    -- Who works on it and until when, and how often it was claimed.
    owner TEXT,
    lease_until INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    -- Whether rows of it may be left in `results` after its end.
    has_results INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant, id)
) STRICT;
CREATE INDEX batches_by_tenant ON batches (tenant, key);
CREATE INDEX batches_running ON batches (status, key)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
CREATE INDEX batches_input ON batches (tenant, input_file_id)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
CREATE INDEX batches_ended ON batches (has_results) WHERE has_results = 1;

CREATE TABLE batch_errors (
    tenant INTEGER NOT NULL,
    batch INTEGER NOT NULL REFERENCES batches (key),
    place INTEGER NOT NULL,
    code TEXT NOT NULL,
    message TEXT NOT NULL,
    param TEXT,
    line INTEGER,
    PRIMARY KEY (tenant, batch, place)
) STRICT, WITHOUT ROWID;

-- How each request ended, until the batch's files hold it.
CREATE TABLE results (
    tenant INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    line INTEGER NOT NULL,
    -- 0: output file; 1: error file.
    ending INTEGER NOT NULL,
    payload BLOB NOT NULL,
    PRIMARY KEY (tenant, batch, line)
) STRICT, WITHOUT ROWID;
";

const SECOND: &str = "
-- What the client called this creation, and a digest of its parameters.
ALTER TABLE batches ADD COLUMN idempotency_key TEXT;
ALTER TABLE batches ADD COLUMN fingerprint BLOB;
CREATE UNIQUE INDEX batches_idempotency ON batches (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL;
-- Whom its requests go to, once that is known: batches compete for a place with those that go to the same.
ALTER TABLE batches ADD COLUMN provider TEXT NOT NULL DEFAULT '';
-- The key of the input file, if it was there when the batch was created. It outlives the file.
ALTER TABLE batches ADD COLUMN input_file INTEGER;
UPDATE batches SET input_file = (
    SELECT files.key FROM files WHERE files.tenant = batches.tenant AND files.id = batches.input_file_id
    AND (deleted_at IS NULL OR deleted_at > batches.created_at)
    AND (files.expires_at IS NULL OR files.expires_at > batches.created_at)
) WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
DROP INDEX batches_input;
CREATE INDEX batches_reading ON batches (input_file)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
CREATE INDEX batches_by_end ON batches (coalesce(completed_at, failed_at, expired_at, cancelled_at));
";

pub fn migrations() -> Migrations<'static> {
    Migrations::new(vec![M::up(FIRST), M::up(SECOND)])
}

#[cfg(test)]
mod tests {
    #[test]
    fn migrations_are_valid() {
        super::migrations().validate().unwrap();
    }
}
