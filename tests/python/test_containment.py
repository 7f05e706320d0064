"""A plugin that means harm: its own request fails with a message that names the limit, and nothing else is harmed."""

import shutil

import pytest
from conftest import STUB, chat, wait_for

HOSTILE = STUB.parents[1] / "hostile/hostile.wasm"


@pytest.fixture
def hostile(serve, stub):
    def start(more=""):
        text = f'component = "hostile.wasm"\nmodels = ["hostile"]\nallow = ["{stub.url[7:]}", "*.example.com"]\n{more}'
        server = serve(plugins={"hostile": text, "p": stub.plugin(["m"])})
        shutil.copy(HOSTILE, server.plugins / "hostile.wasm")
        # Written again, so that the watch sees a component that was not there at first.
        server.add_plugin("hostile", text + "# there now\n")
        wait_for(lambda: "hostile" in server.models(), what="the plugin")
        return server

    return start


def test_each_misdeed_fails_its_own_request_and_names_the_limit(hostile):
    server = hostile('[limits]\nmemory = "32MiB"\nmax_steps = 50\n')
    expected = {
        "loop": ("plugin_timeout", "call_timeout"),
        "memory": ("plugin_out_of_memory", "32MiB of memory in `begin`; the limit is [limits] memory"),
        "trap": ("plugin_failed", "`begin`"),
        "recursion": ("plugin_failed", "stack"),
        "not-json": ("plugin_contract_violation", "not JSON"),
        "not-object": ("plugin_contract_violation", "not a JSON object"),
        "bad-status": ("plugin_contract_violation", "7 is not a status"),
        "endless": ("plugin_contract_violation", "max_steps"),
        "big-state": ("plugin_contract_violation", "state"),
    }
    well = server.create([chat(str(number), model="m") for number in range(500)])
    batch = server.run([chat(order, model="hostile") for order in expected] + [chat("fine", model="hostile")])
    assert batch.status == "completed"
    output, errors = server.results(batch)
    assert [line["custom_id"] for line in output] == ["fine"]
    assert [line["custom_id"] for line in errors] == list(expected)
    for line in errors:
        code, part = expected[line["custom_id"]]
        assert line["error"]["code"] == code and part in line["error"]["message"], line
        assert "`hostile`" in line["error"]["message"], line
    assert server.ended(well.id).request_counts.completed == 500
    assert "panicked" not in server.logged()


def test_a_gigantic_answer_is_not_taken(hostile):
    server = hostile('[limits]\nanswer = "1MiB"\n')
    _, (line,) = server.results(server.run([chat("gigantic", model="hostile")]))
    assert line["error"]["code"] == "plugin_answer_too_large" and "[limits] answer" in line["error"]["message"]


def test_only_what_is_allowed_is_reached_and_headers_cannot_be_forged(hostile, stub):
    server = hostile()
    other = stub.url.replace("127.0.0.1", "127.0.0.2")
    orders = [
        f"send {stub.url}/v1/chat/completions", f"forged {stub.url}/v1/chat/completions",
        f"header {stub.url}/", f"send {other}/", "send http://169.254.169.254/", "send http://2852039166/",
        "send http://[::ffff:169.254.169.254]/", "send file:///etc/passwd", "send http://user:pw@x.example.com/", "send /v1/x",
    ]  # fmt: skip
    output, errors = server.results(server.run([chat(order, model="hostile") for order in orders]))
    plain, forged = [line["response"]["body"]["choices"][0]["message"]["content"] for line in output]
    assert '"host":"127.0.0.1:' in plain
    assert "evil.example" not in forged and "chunked" not in forged and '"x-fine":"1"' in forged
    messages = [line["response"]["body"]["error"]["message"] for line in errors]
    assert [message.split(": ")[0] for message in messages] == ["TransportFault::Protocol"] + ["TransportFault::NotAllowed"] * 7
    assert "to `allow` in" in messages[1] and "127.0.0.2" in messages[1]


def test_a_fresh_instance_remembers_nothing(hostile):
    server = hostile('[limits]\ninstances = "fresh"\n')
    output, _ = server.results(server.run([chat(str(number), model="hostile") for number in range(50)]))
    assert {line["response"]["body"]["seen"] for line in output} == {1}


def test_settings_that_a_plugin_refuses_keep_it_from_loading(hostile):
    server = hostile()
    server.add_plugin("refused", 'component = "hostile.wasm"\nmodels = ["r"]\n[settings]\nx = "refuse"\n')
    wait_for(lambda: "these settings are refused" in server.logged(), what="the complaint")
    assert "r" not in server.models()
