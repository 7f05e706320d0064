"""Administration of projects and keys, by the official SDK and by `batchwright admin`."""

import os
import re
import subprocess
import sys
import time

import openai
import pytest
from conftest import HOST, ROOT, run_host
from tenants import error_of, run_batch


def test_sdk_creates_a_project_with_a_key_that_runs_a_batch_until_it_is_revoked(tenants):
    admin = tenants.admin
    project = admin.projects.create(name="Acme Labs")
    assert (project.object, project.status) == ("organization.project", "active")
    assert project.model_extra["slug"] == "acme-labs"
    assert admin.projects.retrieve(project.id) == project
    renamed = admin.projects.update(project.id, name="Acme")
    assert (renamed.name, renamed.model_extra["slug"]) == ("Acme", "acme-labs")
    assert [found.name for found in admin.projects.list()] == ["default", "Acme"]

    accounts = admin.projects.service_accounts
    account = accounts.create(project.id, name="nightly")
    assert (account.role, account.api_key.value[:3]) == ("member", "bw_")
    assert accounts.retrieve(account.id, project_id=project.id).name == "nightly"
    assert accounts.update(account.id, project_id=project.id, name="daily").name == "daily"
    assert [found.id for found in accounts.list(project.id)] == [account.id]
    second = accounts.api_keys.create(
        account.id,
        project_id=project.id,
        name="reader",
        scopes=["api.batch.read", "api.files.read"],
        expires_in_seconds=3600,
    )
    assert second.expires_at - second.created_at == 3600

    client = tenants.client(account.api_key.value)
    batch = run_batch(client)
    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    reader = tenants.client(second.value)
    assert reader.files.content(batch.output_file_id).text.count("\n") == 3

    keys = admin.projects.api_keys
    listed = {key.id: key for key in keys.list(project.id)}
    assert set(listed) == {account.api_key.id, second.id}
    assert listed[second.id].owner.service_account.name == "daily"
    assert second.value[-4:] in listed[second.id].redacted_value
    assert second.value[30:60] not in listed[second.id].redacted_value
    updated = keys.update(second.id, project_id=project.id, scopes=["api.batch.read"])
    assert updated.model_extra["scopes"] == ["api.batch.read"]
    assert error_of(lambda: reader.files.list())[0] == 403
    assert reader.batches.retrieve(batch.id).id == batch.id

    assert keys.delete(account.api_key.id, project_id=project.id).deleted
    status, error = error_of(lambda: client.batches.list())
    assert (status, error["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        client.files.list()
    assert accounts.delete(account.id, project_id=project.id).deleted
    assert error_of(lambda: reader.batches.list())[0] == 401
    with pytest.raises(openai.NotFoundError):
        accounts.retrieve(account.id, project_id=project.id)


def test_admin_keys_and_audit_log_in_the_shapes_of_the_sdk(tenants):
    admin = tenants.admin
    [first] = admin.admin_api_keys.list()
    assert (first.name, first.object) == ("ops", "organization.admin_api_key")
    created = admin.admin_api_keys.create(name="second", expires_in_seconds=1000)
    assert admin.admin_api_keys.retrieve(created.id).expires_at == created.created_at + 1000
    other = openai.OpenAI(
        base_url=tenants.server.url + "/v1", api_key="none", admin_api_key=created.value
    ).admin.organization
    project = other.projects.create(name="Acme")
    assert admin.admin_api_keys.delete(created.id).deleted
    with pytest.raises(openai.AuthenticationError):
        other.projects.list()
    status, error = error_of(lambda: admin.admin_api_keys.delete(first.id))
    assert (status, error["code"]) == (400, "last_admin_key")

    log = list(admin.audit_logs.list(limit=2))
    kinds = [entry.type for entry in log]
    assert kinds == [
        "tenant.admin_api_key.deleted",
        "project.created",
        "tenant.admin_api_key.created",
        "tenant.admin_api_key.created",
    ]
    assert log[1].actor.api_key.id == created.id
    assert log[1].actor.model_extra["ip_address"] == "127.0.0.1"
    assert (log[1].project.id, log[1].project_created.id) == (project.id, project.id)
    assert log[3].actor.type == "operator", "the first key was made at the data folder"
    for unsupported in ({"before": log[0].id}, {"actor_emails": ["x@y"]}):
        with pytest.raises(openai.BadRequestError, match="is not supported"):
            admin.audit_logs.list(**unsupported)
    [found] = admin.audit_logs.list(event_types=["project.created"], project_ids=[project.id])
    assert found.id == log[1].id
    assert list(admin.audit_logs.list(effective_at={"gt": found.effective_at + 60})) == []
    assert len(list(admin.audit_logs.list(effective_at={"lte": found.effective_at + 60}))) == 4


def test_names_that_are_empty_long_or_taken_are_refused(tenants):
    admin = tenants.admin
    admin.projects.create(name="Acme")
    for name, code in [
        ("", "invalid_value"),
        (" \t", "invalid_value"),
        ("x" * 129, "invalid_value"),
        ("a\nb", "invalid_value"),
        ("acme", "project_name_taken"),
        (" ACME ", "project_name_taken"),
    ]:
        status, error = error_of(lambda: admin.projects.create(name=name))
        assert (status, error["code"], error["param"]) == (400, code, "name")
    assert error_of(lambda: admin.projects.create(name="x" * 1_000_000))[0] == 413
    with pytest.raises(openai.BadRequestError):
        admin.projects.create(name="x", geography="EU")
    with pytest.raises(openai.NotFoundError):
        admin.projects.retrieve("proj_x")
    with pytest.raises(openai.BadRequestError):
        admin.projects.list(after="proj_x")


def test_resources_of_the_sdk_that_are_not_served_say_so(tenants):
    project, *_ = tenants.project("one")
    for call in (
        lambda: tenants.admin.users.list(),
        lambda: tenants.admin.invites.list(),
        lambda: tenants.admin.certificates.list(),
        lambda: tenants.admin.projects.users.list(project.id),
        lambda: tenants.admin.projects.roles.list(project.id),
    ):
        status, error = error_of(call)
        assert (status, error["code"]) == (404, "not_served")
        assert "does not serve" in error["message"]


def test_last_use_of_a_key_is_recorded_at_shutdown_at_the_latest(tenants):
    project, account, client = tenants.project("one")
    before = int(time.time())
    client.batches.list()
    tenants.server.stop()
    tenants.server.start()
    tenants = tenants.client("none", admin_api_key=tenants.key)
    key = tenants.admin.organization.projects.api_keys.retrieve(
        account.api_key.id, project_id=project.id
    )
    assert before <= key.last_used_at <= time.time()


def test_admin_commands_work_with_a_server_and_with_its_data_folder(tenants, tmp_path):
    server = tenants.server

    def admin(*arguments, **env):
        environment = {"BATCHWRIGHT_ADMIN_KEY": tenants.key, "BATCHWRIGHT_URL": server.url, **env}
        return run_host("admin", *arguments, env=environment)

    assert admin("project", "create", "Acme").returncode == 0
    done = admin("project", "create", "acme")
    assert done.returncode == 1 and "Another project has this name" in done.stderr
    key = admin("key", "create", "--project", "acme", "--name", "night").stdout.strip()
    client = tenants.client(key)
    client.batches.list()
    for words in (("plugin", "list", "--server", server.url), ("batch", "list")):
        done = run_host(*words, env={"BATCHWRIGHT_API_KEY": key, "BATCHWRIGHT_URL": server.url})
        assert "API key" not in done.stderr
        done = run_host(*words, env={"BATCHWRIGHT_API_KEY": "", "BATCHWRIGHT_URL": server.url})
        assert done.returncode == 1 and "No API key provided" in done.stderr
    [listed] = admin("key", "list", "--project", "Acme").stdout.splitlines()
    key_id = listed.split()[0]
    rotated = admin("key", "rotate", key_id, "--project", "acme").stdout.strip()
    assert error_of(lambda: client.batches.list())[0] == 401
    assert tenants.client(rotated).batches.list().data == []
    other = admin("key", "create", "--project", "acme", "--name", "night", "--expires-in", "90d")
    kept = admin("key", "list", "--project", "acme").stdout.splitlines()[1].split()[0]
    overlapped = admin("key", "rotate", kept, "--project", "acme", "--overlap", "1h").stdout
    for key in (other.stdout.strip(), overlapped.strip()):
        tenants.client(key).batches.list()
    [ends] = {
        key.expires_at - key.created_at
        for key in tenants.admin.projects.api_keys.list(tenants.admin.projects.list().data[1].id)
        if key.expires_at and key.id != kept
    }
    assert ends == 90 * 86_400
    done = admin("project", "list", "--data", server.data)
    assert done.returncode == 5 and "in use by another batchwright" in done.stderr
    missing = tmp_path / "missing"
    done = admin("project", "list", "--data", missing)
    assert done.returncode == 2 and "has no database" in done.stderr and not missing.exists()
    done = run_host("admin", "key", "create", "--data", missing, "--name", "x")
    assert done.returncode == 0 and "a new one is created there" in done.stderr
    # A key that nobody received does not replace another one.
    with open("/dev/full", "w") as full:
        command = [HOST, "admin", "key", "rotate", kept, "--project", "acme"]
        environment = {**os.environ, "BATCHWRIGHT_ADMIN_KEY": tenants.key}
        environment["BATCHWRIGHT_URL"] = server.url
        failed = subprocess.run(command, stdout=full, env=environment, timeout=60)
    assert failed.returncode == 1
    assert kept in admin("key", "list", "--project", "acme").stdout
    assert admin("key", "revoke", kept, "--project", "acme").returncode == 0
    done = run_host("admin", "project", "list", "--url", server.url)
    assert done.returncode == 2 and "an admin key is missing" in done.stderr
    done = admin("project", "archive", "nothing")
    assert done.returncode == 1 and "there is no project `nothing`" in done.stderr
    assert "project.created" in admin("log").stdout
    server.stop()
    done = admin("project", "archive", "acme", "--data", server.data)
    assert done.returncode == 0 and "archived" in done.stdout
    assert "by operator" in admin("log", "--limit", "1", "--data", server.data).stdout


def test_commands_of_the_guide_work_in_order(serve, tmp_path):
    guide = (ROOT / "docs/guides/tenants-and-keys.md").read_text()
    first, *rest = re.findall(r"```sh\n(.*?)```", guide, re.S)
    [python] = re.findall(r"```python\n(.*?)```", guide, re.S)
    environment = {**os.environ, "PATH": f"{ROOT / 'dist'}:{os.environ['PATH']}"}

    def shell(commands, **more):
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=tmp_path,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=60,
        )

    key = shell(first + 'echo "$BATCHWRIGHT_ADMIN_KEY"').stdout.strip()
    (tmp_path / "server").mkdir()
    (tmp_path / "batchwright-data").rename(tmp_path / "server/data")
    url = serve().url
    environment |= {"BATCHWRIGHT_ADMIN_KEY": key, "BATCHWRIGHT_URL": url}
    for commands in rest:
        commands = commands.replace("http://127.0.0.1:8080", url)
        commands = commands.replace("python -c", f"{sys.executable} -c")
        listed = run_host("admin", "key", "list", "--project", "acme-labs", env=environment)
        key_id = listed.stdout.split()[0] if listed.stdout else ""
        if "key revoke" in commands:
            # Rotation leaves the old key alive for an hour, so that it can be revoked.
            assert commands.index("key rotate") < commands.index("key revoke")
        done = shell(commands, KEY_ID=key_id)
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    python = python.replace("http://127.0.0.1:8080", url).replace("Acme Labs", "From Python")
    done = subprocess.run(
        [sys.executable, "-c", f"ADMIN_KEY = {key!r}\n{python}"], capture_output=True, text=True
    )
    assert done.stdout.startswith("bw_"), done.stderr


def test_first_admin_key_is_read_by_a_server_that_never_had_a_key(serve, tmp_path):
    def generated():
        return run_host("admin", "key", "generate").stdout.strip()

    def keys(server, key):
        env = {"BATCHWRIGHT_ADMIN_KEY": key}
        return run_host("admin", "key", "list", "--url", server.url, env=env)

    first, second = generated(), generated()
    assert first != second and re.fullmatch(r"bw_[0-9a-f]{16}_[0-9a-f]{64}", first)
    file = tmp_path / "key"
    file.write_text(first + "\n")
    config = tmp_path / "settings.toml"
    config.write_text(f'[server]\nfirst_admin_key = "file:{file}"\n')
    server = serve("--config", config)
    found = keys(server, first)
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 1, found.stderr
    assert keys(server, second).returncode == 1
    # From the first key on, every request needs one.
    with pytest.raises(openai.AuthenticationError):
        server.client.batches.list()
    # Replaced by the operator: the key of the file is never valid again.
    rotated = run_host(
        *("admin", "key", "rotate", found.stdout.split()[0], "--url", server.url),
        env={"BATCHWRIGHT_ADMIN_KEY": first},
    )
    assert rotated.returncode == 0, rotated.stderr
    server.stop()
    server.start()
    assert keys(server, first).returncode == 1
    assert keys(server, rotated.stdout.strip()).returncode == 0
    # A key of another form is refused at the start, without its text.
    file.write_text("hunter2\n")
    data = tmp_path / "other"
    refused = run_host("serve", "--config", config, "--data", data, "--listen", "127.0.0.1:0")
    assert refused.returncode == 3 and "first_admin_key" in refused.stderr, refused.stderr
    assert "hunter2" not in refused.stderr
    assert "hunter2" not in run_host("config", "check", "--config", config).stderr
