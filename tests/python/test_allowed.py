"""What a project may use: plugins, validators and completion windows, also one without an end."""

import pytest
from conftest import CHAT, chat, jsonl, run_host, wait_for
from tenants import Tenants, error_of, request

ONE_MODEL = 'component = "one-model.wasm"\n'


@pytest.fixture
def start(serve, stub, tmp_path):
    def start(*arguments, more=""):
        plugins = {"a": stub.plugin(["m"], more), "b": stub.plugin(["n"]), "one": ONE_MODEL}
        return Tenants(serve, tmp_path, *arguments, plugins=plugins)

    return start


def limits(tenants, project, **changes):
    path = f"/v1/organization/projects/{project.id}/limits"
    status, body = request(tenants.server, path, tenants.key, "POST", body=changes)
    assert status == 200, body
    return body


def create(client, lines, window="24h"):
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window=window)


def ended(client, batch, seconds=60):
    def look():
        found = client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed") else None

    return wait_for(look, seconds, f"the end of {batch.id}")


def ask(client, model):
    messages = [{"role": "user", "content": "hi"}]
    return client.chat.completions.create(model=model, messages=messages)


def test_project_uses_its_plugins_and_validators_alone(start):
    tenants = start()
    project, _, client = tenants.project("Acme")
    _, _, other = tenants.project("Globex")
    body = limits(tenants, project, allowed_plugins=["a"])
    assert (body["allowed_plugins"], body["allowed_validators"]) == (["a"], None)
    assert body["own"] == ["allowed_plugins"]
    assert [model.id for model in client.models.list()] == ["m"]
    assert [model.id for model in other.models.list()] == ["m", "n"]
    assert error_of(lambda: ask(client, "n"))[1]["code"] == "model_not_found"
    assert ask(client, "m").choices and ask(other, "n").choices
    failed = ended(client, create(client, [chat("1", model="n")]))
    assert [error.code for error in failed.errors.data] == ["model_not_found"]

    # A validator that a project is not judged by refuses nothing.
    limits(tenants, project, allowed_plugins=None)
    mixed = [chat("1", model="m"), chat("2", model="n")]
    failed = ended(client, create(client, mixed))
    assert [error.code for error in failed.errors.data] == ["mismatched_model"]
    limits(tenants, project, allowed_validators=["standard"])
    assert ended(client, create(client, mixed)).status == "completed"
    for wrong in (["a", 1], "a", [""], {"a": 1}):
        path = f"/v1/organization/projects/{project.id}/limits"
        body = {"allowed_plugins": wrong}
        status, _ = request(tenants.server, path, tenants.key, "POST", body=body)
        assert status == 400, wrong


def test_command_line_and_file_decide_what_a_project_may_use(start, tmp_path):
    tenants = start()
    tenants.project("Acme")
    env = {"BATCHWRIGHT_ADMIN_KEY": tenants.key, "BATCHWRIGHT_URL": tenants.server.url}

    def admin(*arguments):
        done = run_host("admin", *arguments, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "allowed_plugins            a, b\n" in admin(
        "limits", "set", "acme", "--allowed-plugins", "a,b"
    )
    file = tmp_path / "tenants.toml"
    file.write_text('[projects.acme.limits]\nallowed_completion_windows = ["24h"]\n')
    assert 'allowed_completion_windows default -> ["24h"]' in admin("apply", file)
    assert admin("apply", file) == "nothing to change\n"
    shown = admin("limits", "set", "acme", "--allowed-plugins", "default")
    assert "allowed_plugins            all\n" in shown
    assert "allowed_completion_windows 24h\n" in shown


def test_batch_without_a_deadline_has_no_end_and_projects_have_windows_of_their_own(start):
    tenants = start("--completion-windows", "24h,1h,none")
    project, _, client = tenants.project("Acme")
    batch = create(client, [chat("1", model="m")], "none")
    assert (batch.completion_window, batch.expires_at) == ("none", None)
    done = ended(client, batch)
    assert (done.status, done.expires_at) == ("completed", None)
    limits(tenants, project, allowed_completion_windows=["1h", "7d"])
    status, body = error_of(lambda: create(client, [chat("1", model="m")], "none"))
    assert (status, body["param"], body["code"]) == (400, "completion_window", "invalid_value")
    assert "'1h'" in body["message"] and "7d" not in body["message"]
    assert create(client, [chat("1", model="m")], "1h").expires_at is not None
    # A window that the server does not have is refused, whatever the project may use.
    assert error_of(lambda: create(client, [chat("1", model="m")], "7d"))[0] == 400


@pytest.mark.quiet
def test_batch_without_a_deadline_runs_when_nothing_else_waits(start, stub):
    tenants = start("--completion-windows", "24h,none", more="[limits]\nmax_in_flight = 4\n")
    _, _, client = tenants.project("Acme")
    _, _, other = tenants.project("Globex")
    stub.ask("/mode?latency=20")
    patient = create(
        client,
        [chat(str(number), f"patient {number}", model="m") for number in range(3000)],
        "none",
    )
    wait_for(lambda: len(stub.counts()) > 50, what="lines of the batch without a deadline")
    for owner in (client, other):
        before = len(stub.counts())
        dated = [chat(str(number), f"{owner.api_key} {number}", model="m") for number in range(300)]
        assert ended(owner, create(owner, dated)).status == "completed"
        others = len(stub.counts()) - before - 300
        # What was sent until the dated batch was validated, and one in a hundred since.
        assert others < 150, others
    assert client.batches.cancel(patient.id).status in ("cancelling", "cancelled")
