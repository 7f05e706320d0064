//! Migrations of the database. A shipped migration never changes; a change needs a new migration.

use rusqlite_migration::{M, Migrations};

/// Creates the tables.
///
/// Times are milliseconds since 1970. The columns `tenant` and `batch` contain integer keys.
const MIGRATION_1: &str = "
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

/// Adds idempotency keys, lanes, tombstones, plugins of batches and registrations of objects.
const MIGRATION_2: &str = "
-- What the client called this creation, and a digest of its parameters.
ALTER TABLE batches ADD COLUMN idempotency_key TEXT;
ALTER TABLE batches ADD COLUMN fingerprint BLOB;
CREATE UNIQUE INDEX batches_idempotency ON batches (tenant, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
-- What is to be done next: 'validate', 'execute' and whom its requests go to, or 'finish'. Batches
-- compete for a place within a lane.
ALTER TABLE batches ADD COLUMN lane TEXT NOT NULL DEFAULT 'validate';
UPDATE batches SET lane = CASE status
    WHEN 'validating' THEN 'validate' WHEN 'in_progress' THEN 'execute ' ELSE 'finish' END;
DROP INDEX batches_running;
CREATE INDEX batches_running ON batches (lane, key)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
CREATE INDEX batches_expiring ON batches (expires_at) WHERE status = 'in_progress';
-- The key of the input file, if it was there when the batch was created. It outlives the file.
ALTER TABLE batches ADD COLUMN input_file INTEGER;
UPDATE batches SET input_file = (
    SELECT files.key FROM files
    WHERE files.tenant = batches.tenant AND files.id = batches.input_file_id
    AND (deleted_at IS NULL OR deleted_at > batches.created_at)
    AND (files.expires_at IS NULL OR files.expires_at > batches.created_at)
) WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
DROP INDEX batches_input;
CREATE INDEX batches_reading ON batches (input_file)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
-- The bytes of the file are gone; the row stays for a while, so that a list can go on after it.
ALTER TABLE files ADD COLUMN removed INTEGER NOT NULL DEFAULT 0;
CREATE INDEX files_removed ON files (removed) WHERE removed = 1;
CREATE INDEX files_by_tenant ON files (tenant, key);
CREATE INDEX batches_by_end
    ON batches (coalesce(completed_at, failed_at, expired_at, cancelled_at));
-- Deleting a batch looks for its errors.
CREATE INDEX batch_errors_by_batch ON batch_errors (batch);

-- The plugins that served a batch, as they were then.
CREATE TABLE batch_plugins (
    tenant INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    version TEXT NOT NULL,
    kind TEXT NOT NULL,
    PRIMARY KEY (tenant, batch, name, sha256, version)
) STRICT;

-- Objects whose writing has begun and which no record leads to yet. Those of a process that is gone
-- are removed.
CREATE TABLE pending_objects (
    tenant INTEGER NOT NULL,
    id TEXT NOT NULL,
    owner TEXT NOT NULL,
    PRIMARY KEY (tenant, id)
) STRICT, WITHOUT ROWID;
";

/// Adds turns and the table of the readiness probe.
const MIGRATION_3: &str = "
-- When it was created, or had its last turn: batches of a lane take turns.
ALTER TABLE batches ADD COLUMN waits_since INTEGER NOT NULL DEFAULT 0;
UPDATE batches SET waits_since = created_at;
DROP INDEX batches_running;
CREATE INDEX batches_running ON batches (lane, waits_since, key)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

-- Written now and then to see whether it can be.
CREATE TABLE probe (
    key INTEGER PRIMARY KEY,
    at INTEGER NOT NULL
) STRICT;
";

/// Adds causes of backoff and saved states of requests.
const MIGRATION_4: &str = "
-- What its requests wait for while the batch rests, in the client's words, and since when. It rests
-- until `waits_since`.
ALTER TABLE batches ADD COLUMN waits_for TEXT;
ALTER TABLE batches ADD COLUMN waits_for_since INTEGER;
-- One that was made since the last migration and had no turn yet.
UPDATE batches SET waits_since = created_at WHERE waits_since = 0;

-- Requests that a provider works on and that are asked about now and then: the adapter's own state.
-- They go with the batch's results.
CREATE TABLE jobs (
    tenant INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    line INTEGER NOT NULL,
    plugin TEXT NOT NULL,
    state BLOB NOT NULL,
    PRIMARY KEY (tenant, batch, line)
) STRICT, WITHOUT ROWID;
";

/// Gives registrations of objects a lease, and ends the claims and registrations of processes that
/// used an id of their own.
const MIGRATION_5: &str = "
ALTER TABLE pending_objects ADD COLUMN lease_until INTEGER NOT NULL DEFAULT 0;
-- 1 while the object is being removed: nobody may write it then.
ALTER TABLE pending_objects ADD COLUMN removing INTEGER NOT NULL DEFAULT 0;
UPDATE batches SET owner = NULL, lease_until = 0
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
";

/// Makes tenants projects, and adds service accounts, API keys and the audit log.
///
/// `tenants.name` is the slug of a project, `tenants.title` its name.
const MIGRATION_6: &str = "
ALTER TABLE tenants ADD COLUMN project_id TEXT;
ALTER TABLE tenants ADD COLUMN title TEXT NOT NULL DEFAULT '';
ALTER TABLE tenants ADD COLUMN created_at INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tenants ADD COLUMN archived_at INTEGER;
INSERT OR IGNORE INTO tenants (name) VALUES ('default');
UPDATE tenants SET project_id = 'proj_' || lower(hex(randomblob(16))), title = name,
    created_at = unixepoch() * 1000;
CREATE UNIQUE INDEX tenants_project ON tenants (project_id);
CREATE UNIQUE INDEX tenants_title ON tenants (title COLLATE NOCASE) WHERE archived_at IS NULL;

CREATE TABLE service_accounts (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant INTEGER NOT NULL REFERENCES tenants (key),
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    is_member INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    deleted_at INTEGER
) STRICT;
CREATE INDEX service_accounts_by_tenant ON service_accounts (tenant, key);

-- Rows are never deleted, so that the past use of a key keeps its owner.
CREATE TABLE api_keys (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    -- Null for an admin key.
    tenant INTEGER REFERENCES tenants (key),
    account INTEGER REFERENCES service_accounts (key),
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    -- SHA-256 of the text of the key.
    digest BLOB NOT NULL,
    redacted TEXT NOT NULL,
    -- Names, separated by spaces.
    scopes TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    last_used_at INTEGER,
    deleted_at INTEGER
) STRICT;
CREATE INDEX api_keys_by_tenant ON api_keys (tenant, key);
CREATE INDEX api_keys_by_account ON api_keys (account);

CREATE TABLE audit (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    at INTEGER NOT NULL,
    event TEXT NOT NULL,
    -- Id of the admin key; null for an operator at the data folder.
    actor TEXT,
    address TEXT,
    -- Id of the project.
    project TEXT,
    resource TEXT NOT NULL,
    -- A JSON object.
    details TEXT NOT NULL
) STRICT;
CREATE INDEX audit_by_project ON audit (project, key);
";

/// Adds limits of projects, and counts what a project stores.
///
/// Triggers count, so that no operation on files can forget to.
const MIGRATION_7: &str = "
ALTER TABLE tenants ADD COLUMN max_stored_bytes INTEGER;
ALTER TABLE tenants ADD COLUMN max_stored_files INTEGER;
ALTER TABLE tenants ADD COLUMN max_open_batches INTEGER;
ALTER TABLE tenants ADD COLUMN max_requests_per_batch INTEGER;
-- Models that the project may use: a JSON object with `mode` and `model_ids`; null allows all.
ALTER TABLE tenants ADD COLUMN models TEXT;
ALTER TABLE tenants ADD COLUMN stored_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tenants ADD COLUMN stored_files INTEGER NOT NULL DEFAULT 0;
UPDATE tenants SET
    stored_bytes = (SELECT coalesce(sum(bytes), 0) FROM files
                    WHERE files.tenant = tenants.key AND NOT removed),
    stored_files = (SELECT count(*) FROM files WHERE files.tenant = tenants.key AND NOT removed);
CREATE TRIGGER file_stored AFTER INSERT ON files WHEN NOT NEW.removed BEGIN
    UPDATE tenants SET stored_bytes = stored_bytes + NEW.bytes, stored_files = stored_files + 1
    WHERE key = NEW.tenant;
END;
CREATE TRIGGER file_removed AFTER UPDATE OF removed ON files WHEN NEW.removed AND NOT OLD.removed
BEGIN
    UPDATE tenants SET stored_bytes = stored_bytes - NEW.bytes, stored_files = stored_files - 1
    WHERE key = NEW.tenant;
END;
CREATE TRIGGER file_deleted AFTER DELETE ON files WHEN NOT OLD.removed BEGIN
    UPDATE tenants SET stored_bytes = stored_bytes - OLD.bytes, stored_files = stored_files - 1
    WHERE key = OLD.tenant;
END;
CREATE INDEX batches_open ON batches (tenant)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
";

/// Adds usage, budgets, limits of models, and the reservations of batches.
///
/// Usage is counted in the transaction that records the results.
const MIGRATION_8: &str = "
ALTER TABLE tenants ADD COLUMN max_requests_in_flight INTEGER;
ALTER TABLE tenants ADD COLUMN weight INTEGER;
-- Budget of a month in cents; null is no budget.
ALTER TABLE tenants ADD COLUMN spend_limit INTEGER;
-- Spent in the month `spent_month` (months since the year 0), in units of 10^-12 dollars.
ALTER TABLE tenants ADD COLUMN spent INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tenants ADD COLUMN spent_month INTEGER NOT NULL DEFAULT 0;

-- Key that created the batch; null without keys.
ALTER TABLE batches ADD COLUMN api_key INTEGER;
-- What validation found, while the batch waits in the lane 'admit': a JSON object.
ALTER TABLE batches ADD COLUMN admission TEXT;

-- Usage by minute, or by hour once it is older than a week.
CREATE TABLE usage (
    -- Minutes since 1970.
    minute INTEGER NOT NULL,
    tenant INTEGER NOT NULL,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    -- 0 without a key.
    api_key INTEGER NOT NULL,
    is_batch INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    cached_input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    -- In units of 10^-12 dollars.
    input_cost INTEGER NOT NULL,
    cached_input_cost INTEGER NOT NULL,
    output_cost INTEGER NOT NULL,
    -- Requests whose model had no price.
    unpriced INTEGER NOT NULL,
    PRIMARY KEY (tenant, minute, kind, model, api_key, is_batch)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_by_minute ON usage (minute);

-- Limits of a project for a model; null is no limit.
CREATE TABLE model_limits (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant INTEGER NOT NULL REFERENCES tenants (key),
    model TEXT NOT NULL,
    max_requests_per_1_minute INTEGER,
    max_tokens_per_1_minute INTEGER,
    max_requests_per_1_day INTEGER,
    batch_1_day_max_input_tokens INTEGER,
    UNIQUE (tenant, model)
) STRICT;

-- Input tokens of a batch by model: estimated by its validation, and used so far. They count as
-- enqueued while the batch is open.
CREATE TABLE batch_tokens (
    tenant INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    model TEXT NOT NULL,
    estimated INTEGER NOT NULL,
    used INTEGER NOT NULL DEFAULT 0,
    -- 0 while the batch waits for a limit, in the lane 'admit'.
    admitted INTEGER NOT NULL,
    PRIMARY KEY (tenant, batch, model)
) STRICT, WITHOUT ROWID;
";

/// Orders waiting batches by tenant within their lane.
const MIGRATION_9: &str = "
DROP INDEX batches_running;
CREATE INDEX batches_running ON batches (lane, tenant, waits_since, key)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
";

/// Counts requests by day, and finds usage that is not merged yet.
const MIGRATION_10: &str = "
CREATE INDEX usage_unmerged ON usage (minute) WHERE minute % 60 != 0;
-- Requests of the latest day (UTC) on which the model was used, in days since 1970.
CREATE TABLE model_days (
    tenant INTEGER NOT NULL,
    model TEXT NOT NULL,
    day INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    PRIMARY KEY (tenant, model)
) STRICT, WITHOUT ROWID;
";

/// Adds what a project may use (JSON arrays of names, or null for all), and its secrets.
const MIGRATION_11: &str = "
ALTER TABLE tenants ADD COLUMN allowed_plugins TEXT;
ALTER TABLE tenants ADD COLUMN allowed_validators TEXT;
ALTER TABLE tenants ADD COLUMN allowed_completion_windows TEXT;
-- Secrets that projects have set for plugins, sealed with a key that is not here.
CREATE TABLE project_secrets (
    tenant INTEGER NOT NULL REFERENCES tenants (key),
    plugin TEXT NOT NULL,
    name TEXT NOT NULL,
    sealed BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (tenant, plugin, name)
) STRICT, WITHOUT ROWID;
";

/// Adds webhook endpoints and the outbox of their events.
const MIGRATION_12: &str = "
CREATE TABLE webhooks (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant INTEGER NOT NULL REFERENCES tenants (key),
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    url TEXT NOT NULL,
    -- Names, separated by spaces.
    event_types TEXT NOT NULL,
    secret BLOB NOT NULL,
    secret_is_sealed INTEGER NOT NULL,
    -- The secret before the last rotation, while it signs, too.
    old_secret BLOB,
    old_secret_is_sealed INTEGER,
    old_secret_until INTEGER,
    hint TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    -- The first failed attempt since the last success.
    failing_since INTEGER,
    disabled_at INTEGER,
    UNIQUE (tenant, id)
) STRICT;

CREATE TABLE webhook_deliveries (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    webhook INTEGER NOT NULL REFERENCES webhooks (key),
    event TEXT NOT NULL,
    event_type TEXT NOT NULL,
    -- The id of the batch.
    subject TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    -- The time of the event, or of the last call for another delivery.
    retry_since INTEGER NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    -- The next attempt, or the end of the lease of a running one; null at the end.
    next_at INTEGER,
    last_at INTEGER,
    status INTEGER,
    detail TEXT,
    UNIQUE (webhook, event)
) STRICT;
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (webhook, next_at)
    WHERE next_at IS NOT NULL;
CREATE INDEX webhook_deliveries_of ON webhook_deliveries (webhook);
CREATE INDEX webhook_deliveries_next ON webhook_deliveries (next_at) WHERE next_at IS NOT NULL;
CREATE INDEX webhook_deliveries_ended ON webhook_deliveries (created_at) WHERE next_at IS NULL;
";

/// Adds lifetimes of projects, in seconds; null is the one of the server.
const MIGRATION_13: &str = "
ALTER TABLE tenants ADD COLUMN input_file_lifetime_seconds INTEGER;
ALTER TABLE tenants ADD COLUMN output_file_lifetime_seconds INTEGER;
ALTER TABLE tenants ADD COLUMN error_file_lifetime_seconds INTEGER;
ALTER TABLE tenants ADD COLUMN batch_lifetime_seconds INTEGER;
";

/// Returns all migrations, oldest first.
pub(super) fn migrations() -> Migrations<'static> {
    Migrations::new(vec![
        M::up(MIGRATION_1),
        M::up(MIGRATION_2),
        M::up(MIGRATION_3),
        M::up(MIGRATION_4),
        M::up(MIGRATION_5),
        M::up(MIGRATION_6),
        M::up(MIGRATION_7),
        M::up(MIGRATION_8),
        M::up(MIGRATION_9),
        M::up(MIGRATION_10),
        M::up(MIGRATION_11),
        M::up(MIGRATION_12),
        M::up(MIGRATION_13),
    ])
}

#[cfg(test)]
mod tests;
