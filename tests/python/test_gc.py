"""`batchwright gc --dry-run`: what the cleanup of a server would remove."""

from conftest import chat, run_host
from tenants import run_batch


def counts(data, *arguments):
    """Returns the numbers of a dry run by kind."""
    done = run_host("gc", "--dry-run", "--data", data, *arguments)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit("  ", 1) for line in done.stdout.splitlines()]
    return {kind.strip(): int(value.split()[0]) for kind, value in rows}


def test_dry_run_counts_what_a_setting_would_remove(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    kept = server.create([chat("a", "hi", model="m")])
    bare = server.create(
        [chat("b", "!status 400", model="m")],
        extra_body={"output_expires_after": {"anchor": "created_at", "seconds": 3600}},
    )
    for batch in (kept, bare):
        server.ended(batch.id)
    server.create([chat("c", "!delay 60000 slow", model="m")])
    none = {"files": 0, "batches": 0, "audit entries": 0}
    assert counts(server.data) == none
    # The error file of the second batch expires, and then the batch is old enough.
    lifetime = ("--batch-lifetime", "1m")
    soon = counts(server.data, *lifetime, "--within", "2h")
    assert soon == {"files": 1, "batches": 1, "audit entries": 0}
    # The input file of the batch that runs is in use until its end.
    late = counts(server.data, *lifetime, "--within", "40d")
    assert late == {"files": 3, "files in use": 1, "batches": 1, "audit entries": 0}
    # Nothing has gone.
    assert counts(server.data) == none and server.client.batches.retrieve(bare.id).error_file_id


def test_run_without_dry_run_or_database_is_refused(tmp_path):
    missing = run_host("gc", "--data", tmp_path)
    assert missing.returncode == 2 and "--dry-run" in missing.stderr
    empty = run_host("gc", "--dry-run", "--data", tmp_path / "data")
    assert empty.returncode != 0 and "database" in empty.stderr
    assert not (tmp_path / "data").exists()


def test_project_has_lifetimes_of_its_own(tenants, tmp_path):
    def lifetimes(batch, client):
        files = [client.files.retrieve(id) for id in (batch.input_file_id, batch.output_file_id)]
        return [file.expires_at and file.expires_at - file.created_at for file in files]

    def limits(slug, *arguments):
        done = run_host(
            *("admin", "limits", "set", slug, *arguments, "--url", tenants.server.url),
            env={"BATCHWRIGHT_ADMIN_KEY": tenants.key},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    _, _, short = tenants.project("Short")
    _, _, usual = tenants.project("Usual")
    day = 24 * 3600
    shown = limits(
        "short",
        *("--input-file-lifetime", "2d", "--output-file-lifetime", "1d", "--batch-lifetime", "1h"),
    )
    assert "batch_lifetime_seconds" in shown and "172800" in shown, shown
    assert lifetimes(run_batch(short), short) == [2 * day, day]
    assert lifetimes(run_batch(usual), usual) == [30 * day, None]
    # The short project has nothing left after two days, and the usual one has all.
    kinds = counts(tenants.server.data, "--within", "50h")
    assert (kinds["files"], kinds["batches"]) == (2, 1), kinds
    # A file of limits has the same keys, and `default` is that of the server again.
    file = tmp_path / "projects.toml"
    file.write_text('[projects.short.limits]\ninput_file_lifetime = "3d"\n')
    applied = run_host(
        *("admin", "apply", file, "--url", tenants.server.url),
        env={"BATCHWRIGHT_ADMIN_KEY": tenants.key},
    )
    assert applied.returncode == 0, applied.stderr
    limits("short", "--output-file-lifetime", "default")
    wrong = run_host("admin", "limits", "set", "short", "--batch-lifetime", "soon")
    assert wrong.returncode == 2 and "soon" in wrong.stderr
    assert lifetimes(run_batch(short), short) == [3 * day, None]
