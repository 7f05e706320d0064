"""Input lines as people and tools write them, and the errors of bad ones.

Attacks: duplicate keys, deep nesting, lone surrogates, huge numbers, files in another format.
"""

import gzip
import json

import pytest
from conftest import CHAT, chat, jsonl, wait_for


def input_errors(server, content, **more):
    """Returns (line, code, param, message) of each error of a rejected input."""
    batch = server.run(content, **more)
    assert batch.status == "failed", batch
    return [(error.line, error.code, error.param, error.message) for error in batch.errors.data]


def test_urls_with_and_without_v1_are_equal_before_validation(serve, stub):
    server = serve(plugins={"echo": 'component = "inference-echo.wasm"\nmodels = ["echo"]\n'})
    wait_for(lambda: "echo" in server.models(), what="the plugin")
    short = {**chat("a"), "url": "/chat/completions"}
    for endpoint in [CHAT, "/chat/completions"]:
        batch = server.run([short, chat("b")], endpoint=endpoint)
        assert (batch.status, batch.endpoint, batch.request_counts.completed) == (
            "completed",
            CHAT,
            2,
        )
    ((line, code, param, message),) = input_errors(server, [{**short, "url": "/embeddings"}])
    assert (
        (line, code, param) == (1, "invalid_url", "url")
        and "'/embeddings'" in message
        and f"'{CHAT}'" in message
    )


def test_duplicate_keys_bypass_no_validation(server):
    body = '"body":{%s"messages":[{"role":"user","content":"x"}]}}'
    head = '{"custom_id":"%s","method":"POST","url":"/v1/chat/completions",'
    lines = [
        head % "a" + body % '"model":"echo","model":"other",',
        head % "b" + body % '"model":"echo","mod\\u0065l":"other",',
        head % "c" + '"custom_id":"z",' + body % '"model":"echo",',
        head % "d"
        + '"body":{"model":"echo","messages":'
        + '[{"role":"user","content":"x"},{"role":"user","role":"system"}]}}',
        json.dumps(chat("e")),
    ]
    found = input_errors(server, "\n".join(lines).encode())
    assert [(line, code, param) for line, code, param, _ in found] == [
        (1, "duplicate_key", "body.model"),
        (2, "duplicate_key", "body.model"),
        (3, "duplicate_key", "custom_id"),
        (4, "duplicate_key", "body.messages[1].role"),
    ]


UNUSUAL_BODY = '{"seed":123456789012345678901234567890,"x":1e400,"y":1.10,"z":"\\ud800"}'


@pytest.mark.parametrize("plugin", ["openai", "echo"])
def test_unusual_numbers_and_lone_surrogates_pass_through(serve, stub, plugin):
    plugins = {
        "openai": stub.plugin(["m"]),
        "echo": 'component = "inference-echo.wasm"\nmodels = ["m"]\n',
    }
    server = serve(plugins={"p": plugins[plugin]})
    wait_for(lambda: server.models() == ["m"], what="the plugin")
    content = "!raw half \\ud800, \u2028 and \x85"
    line = json.dumps(chat("id", "@@", model="m"))[:-2] + f',"more":{UNUSUAL_BODY}' + "}}"
    batch = server.run(line.replace("@@", content).encode())
    assert batch.status == "completed" and batch.request_counts.completed == 1, batch
    text = server.client.files.content(batch.output_file_id).content.decode()
    # Line separators of Unicode must not split the line for any reader.
    assert len(text.splitlines()) == 1
    body = json.loads(text)["response"]["body"]
    if plugin == "echo":
        assert body["choices"][0]["message"]["content"] == "!raw half \ud800, \u2028 and \x85"
    else:
        # The value reaches the provider and returns exactly as the client wrote it.
        assert f'"more":{UNUSUAL_BODY}' in text
        assert body["sent"]["messages"][0]["content"] == "!raw half \ud800, \u2028 and \x85"


def test_deeply_nested_line_does_not_stop_the_server(server):
    deep = "[" * 200_000 + "]" * 200_000
    for key in ["input", "messages", "other"]:
        line = json.dumps(chat("a", **{key: "DEEP"})).replace('"DEEP"', deep)
        batch = server.run((line + "\n" + json.dumps(chat("b"))).encode())
        assert batch.status in ["completed", "failed"], batch
    assert (
        server.run([chat("a")]).request_counts.completed == 1 and "overflow" not in server.logged()
    )


def test_invalid_json_errors_name_column_and_cause(server):
    good = json.dumps(chat("a"))
    lines = [
        good,
        good[:-1] + ",}",
        good.replace('"hi"', "NaN"),
        good.replace('"hi"', "None"),
        good[:40],
        "a,b,c",
    ]
    found = input_errors(
        server, "\n".join(lines).encode() + b"\n" + good.encode().replace(b"hi", b"h\xfc")
    )
    assert [(line, code) for line, code, *_ in found] == [
        (line, "invalid_json_line") for line in range(2, 8)
    ]
    for (*_, message), words in zip(
        found,
        ["trailing comma", "NaN", "None is Python", "middle of a value", "CSV", "Latin-1"],
        strict=True,
    ):
        assert (
            message.startswith("This line is not parseable as valid JSON. Column ")
            and words in message
        ), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(jsonl([chat("a")])), "gzip"),
        (jsonl([chat("a")]).decode().encode("utf-16"), "UTF-16"),
        (json.dumps([chat(str(number)) for number in range(1000)], indent=1).encode(), "array"),
        (json.dumps(chat("a"), indent=2).encode() * 2, "several lines"),
    ],
)
def test_input_in_another_format_is_one_error(server, content, words):
    ((line, code, _, message),) = input_errors(server, content)
    assert (line, code) == (1, "invalid_json_line") and words in message


def test_model_not_found_error_lists_the_served_models(serve, stub):
    models = [f"model-{number:02}" for number in range(30)]
    server = serve(plugins={"p": stub.plugin(models), "broken": "component = 7\n"})
    wait_for(lambda: len(server.models()) == 30, what="the plugin")
    found = input_errors(server, [chat("a", model="gpt"), chat("b", model="gpt")])
    assert [code for _, code, *_ in found] == ["model_not_found"] * 2
    first, second = found[0][3], found[1][3]
    begin = (
        "The provided model 'gpt' is not supported by the Batch API: "
        "it does not exist or is not supported"
    )
    assert (
        first.startswith(begin)
        and "'model-00'" in first
        and "and 10 more" in first
        and "could not be loaded" in first
    )
    assert second == begin


def test_parameter_and_limit_errors_name_the_setting(serve):
    server = serve("--max-file-size", "1KiB", "--max-requests-per-file", "2")
    file = server.upload([chat("a")])
    for change in [{"endpoint": "/v1/nothing"}, {"completion_window": "7d"}]:
        given = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **change}
        with pytest.raises(Exception) as caught:
            server.client.batches.create(**given)
        assert f"'{next(iter(change))}'" in caught.value.body["message"]
    with pytest.raises(Exception) as caught:
        server.upload(b"x" * 2000)
    assert "max_file_size" in caught.value.body["message"]
    assert "max_requests_per_file" in input_errors(server, [chat(name) for name in "abc"])[0][3]


def test_moderation_without_model_uses_the_plugins_default(serve, stub):
    text = stub.plugin(["moderator"]).replace(
        "[settings]", '[default_models]\n"/v1/moderations" = "moderator"\n[settings]'
    )
    server = serve(plugins={"p": text})
    wait_for(lambda: server.models() == ["moderator"], what="the plugin")
    line = {"custom_id": "a", "method": "POST", "url": "/v1/moderations", "body": {"input": "x"}}
    batch = server.run(
        [line, {**line, "custom_id": "b", "body": {"input": "y", "model": "moderator"}}],
        endpoint="/v1/moderations",
    )
    assert (batch.status, batch.request_counts.completed) == ("completed", 2)
    output, _ = server.results(batch)
    assert [line["response"]["body"]["model"] for line in output] == ["moderator"] * 2
    found = input_errors(server, [{**line, "url": "/v1/embeddings"}], endpoint="/v1/embeddings")
    assert found[0][1:3] == ("invalid_request", "body.model")


def test_credentials_made_of_words_are_redacted_only_in_errors(serve, stub):
    server = serve(
        plugins={"p": stub.plugin(["m"], '[credentials]\napi_key = "env:WORDS"\n')},
        env={"WORDS": "lm-studio"},
    )
    wait_for(lambda: server.models() == ["m"], what="the plugin")
    assert "short or made of words" in server.logged()
    output, _ = server.results(server.run([chat("a", "What is LM-Studio?", model="m")]))
    assert "LM-Studio" in output[0]["response"]["body"]["choices"][0]["message"]["content"]
