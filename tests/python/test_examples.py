"""Example plugins in four languages do what their README files say."""

import collections
import http.server
import json
import shutil
import threading

import openai
import pytest
from conftest import TARGET, built, chat, http_server, wait_for

FAST = ["--retry-backoff", "10ms", "--cache", TARGET / "examples-cache"]


@pytest.fixture
def provider():
    """Starts a provider over real HTTP; `answer` of a test returns (status, headers, body)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append((self.path, dict(self.headers), body))
            status, headers, answer = server.answer(
                body, sum(body == known for _, _, known in seen)
            )
            text = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "content-type": "application/json",
                "content-length": str(len(text)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    with http_server(Handler) as server:
        server.seen = seen
        yield server


@pytest.fixture
def jobs():
    """Starts a provider of jobs over real HTTP; `poll` of a test returns (status, members)."""
    created, lock = {}, threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status, answer):
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["input"]["messages"][-1]["content"]
            with lock:
                server.submissions += 1
                number = server.jobs_of(prompt) + 1
                job = created.setdefault(
                    self.headers["idempotency-key"],
                    {
                        "id": f"job-{len(created)}",
                        "prompt": prompt,
                        "number": number,
                        "body": body,
                        "authorization": self.headers["authorization"],
                        "polls": 0,
                    },
                )
            self.reply(201, {"id": job["id"], "status": "queued"})

        def do_GET(self):
            with lock:
                (job,) = [job for job in created.values() if self.path == f"/jobs/{job['id']}"]
                job["polls"] += 1
            status, members = server.poll(job)
            self.reply(status, {"id": job["id"], **members})

        def log_message(self, *_):
            pass

    with http_server(Handler) as server:
        server.created, server.submissions = created, 0
        server.jobs_of = lambda prompt: sum(job["prompt"] == prompt for job in created.values())
        yield server


def succeeded(job):
    """Returns the response to a poll of a job that has succeeded."""
    message = {"role": "assistant", "content": f"said: {job['prompt']}"}
    output = {
        "id": job["id"],
        "object": "chat.completion",
        "created": 1,
        "model": job["body"]["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }
    return 200, {"status": "succeeded", "output": output}


def start_polled(serve, jobs, interval):
    """Starts a server with the adapter for jobs, which polls at this interval in seconds."""
    text = (
        f'[aliases]\nm = "theirs"\n[settings]\nbase_url = "{jobs.url}"\n'
        f'poll_interval_seconds = {interval}\n[credentials]\napi_key = "env:JOBS_KEY"\n'
    )
    return start(serve, "polled", text, "m", {"JOBS_KEY": "sk-jobs-secret-0123456789"})


def start(serve, component, text, model=None, env=None):
    server = serve(*FAST, env=env, name=component)
    shutil.copy(built("examples") / f"{component}.wasm", server.plugins)
    server.add_plugin("example", f'component = "{component}.wasm"\n{text}')
    wait_for(
        lambda: 'plugin loaded plugin="example"' in server.logged(), 60, "the example to be loaded"
    )
    assert model is None or model in server.models()
    return server


def ask(server, *bodies):
    """Runs one request per body; returns the batch and the result lines in order."""
    lines = [
        {**chat(str(number), model="m"), "body": {"model": "m", **body}}
        for number, body in enumerate(bodies)
    ]
    batch = server.run(lines)
    assert batch.status == "completed", batch.errors
    output, errors = server.results(batch)
    return batch, sorted(output + errors, key=lambda line: int(line["custom_id"]))


def user(text):
    return {"messages": [{"role": "user", "content": text}]}


def test_anthropic_adapter_in_rust_translates_both_ways(serve, provider):
    def answer(body, times):
        prompt = body["messages"][-1]["content"][-1]["text"]
        if prompt == "busy" and times < 3:
            error = {"type": "overloaded_error", "message": "Overloaded"}
            return 529, {"retry-after": "0"}, {"type": "error", "error": error}
        if prompt == "bad":
            return (
                400,
                {},
                {"type": "error", "error": {"type": "invalid_request_error", "message": "too bad"}},
            )
        content = [{"type": "text", "text": f"said: {prompt}"}]
        if "tools" in body:
            content.append({"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"x": 1}})
        usage = {
            "input_tokens": 5,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": 2,
            "output_tokens": 4,
        }
        reason = "tool_use" if "tools" in body else "end_turn"
        return (
            200,
            {"request-id": "req_1"},
            {"id": "msg_1", "content": content, "stop_reason": reason, "usage": usage},
        )

    provider.answer = answer
    secret = "sk-ant-secret-0123456789"
    text = (
        f'[aliases]\nm = "claude"\n[settings]\nbase_url = "{provider.url}"\nmax_tokens = 77\n'
        '[credentials]\napi_key = "env:ANTHROPIC_KEY"\n'
    )
    server = start(serve, "anthropic", text, "m", {"ANTHROPIC_KEY": secret})
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    batch, (plain, busy, bad, called, robot) = ask(
        server,
        user("hello"),
        user("busy"),
        user("bad"),
        {**user("look"), "tools": tools},
        {"messages": [{"role": "robot", "content": "x"}]},
    )
    completion = openai.types.chat.ChatCompletion.model_validate(plain["response"]["body"])
    assert completion.choices[0].message.content == "said: hello" and completion.model == "m"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (10, 4)
    assert busy["response"]["status_code"] == 200
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"] == {
        "message": "too bad",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_request_error",
    }
    (call,) = (
        openai.types.chat.ChatCompletion.model_validate(called["response"]["body"])
        .choices[0]
        .message.tool_calls
    )
    assert (call.id, call.function.name, json.loads(call.function.arguments)) == (
        "toolu_1",
        "look",
        {"x": 1},
    )
    assert robot["error"]["message"] == "Unknown message role: robot"
    assert batch.usage.input_tokens == 30 and batch.usage.input_tokens_details.cached_tokens == 9
    path, headers, body = provider.seen[0]
    assert path == "/v1/messages" and body["model"] == "claude" and body["max_tokens"] == 77
    assert {name.lower(): value for name, value in headers.items()}["x-api-key"] == secret
    server.stop()
    assert secret not in server.logged()


def test_ollama_adapter_in_javascript_translates_both_ways(serve, provider):
    def answer(body, times):
        prompt = body["messages"][-1]["content"]
        if prompt == "busy" and times < 2:
            return 503, {}, {"error": "server busy, please try again"}
        if prompt == "missing":
            return 404, {}, {"error": "model 'llama' not found"}
        message = {"role": "assistant", "content": f"said: {prompt}"}
        return (
            200,
            {},
            {
                "message": message,
                "done": True,
                "done_reason": "length",
                "prompt_eval_count": 7,
                "eval_count": 2,
            },
        )

    provider.answer = answer
    server = start(
        serve, "ollama", f'[aliases]\nm = "llama"\n[settings]\nbase_url = "{provider.url}/"\n', "m"
    )
    batch, (plain, busy, missing, robot, wide) = ask(
        server,
        {
            **user([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]),
            "max_tokens": 9,
            "seed": 3,
        },
        user("busy"),
        user("missing"),
        {"messages": [{"role": "robot"}]},
        user("ü€😀"),
    )
    completion = openai.types.chat.ChatCompletion.model_validate(
        plain["response"]["body"], strict=True
    )
    assert (
        completion.choices[0].message.content == "said: hello"
        and completion.choices[0].finish_reason == "length"
    )
    assert busy["response"]["status_code"] == 200
    assert missing["response"]["status_code"] == 404
    assert missing["response"]["body"]["error"]["message"] == "model 'llama' not found"
    assert robot["error"]["message"] == "Unknown message role: robot"
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (21, 6)
    assert wide["response"]["body"]["choices"][0]["message"]["content"] == "said: ü€😀"
    path, _, body = next(
        request for request in provider.seen if request[2]["messages"][-1]["content"] == "hello"
    )
    assert path == "/api/chat" and body["model"] == "llama" and body["stream"] is False
    assert body["options"] == {"num_predict": 9, "seed": 3}


def test_polled_adapter_in_rust_submits_jobs_and_polls_them(serve, jobs):
    def poll(job):
        if job["polls"] == 1 and job["prompt"] == "slow":
            return 200, {"status": "running"}
        if job["polls"] == 1 and job["prompt"] == "busy":
            return 503, {"error": {"message": "try again"}}
        if job["number"] == 1 and job["prompt"] == "lost":
            return 404, {"error": {"message": "no such job"}}
        if job["number"] == 1 and job["prompt"] == "unlucky":
            return 200, {"status": "failed", "error": {"message": "no GPU", "retryable": True}}
        if job["prompt"] == "bad":
            return 200, {"status": "failed", "error": {"message": "too bad", "code": "bad_prompt"}}
        return succeeded(job)

    jobs.poll = poll
    server = start_polled(serve, jobs, 1)
    prompts = ["slow", "busy", "lost", "unlucky", "bad"]
    batch, (*good, bad, robot) = ask(
        server,
        *({**user(prompt), "seed": 12345678901234567} for prompt in prompts),
        {"messages": [{"role": "robot", "content": "x"}]},
    )
    for prompt, line in zip(prompts, good, strict=False):
        completion = openai.types.chat.ChatCompletion.model_validate(line["response"]["body"])
        assert completion.choices[0].message.content == f"said: {prompt}"
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"] == {
        "message": "too bad",
        "type": "invalid_request_error",
        "param": None,
        "code": "bad_prompt",
    }
    assert robot["error"]["message"] == "Unknown message role: robot"
    # A failed poll is repeated. A job that is lost, or that may succeed next time, is submitted
    # again.
    assert collections.Counter(job["prompt"] for job in jobs.created.values()) == {
        "slow": 1,
        "busy": 1,
        "lost": 2,
        "unlucky": 2,
        "bad": 1,
    }
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (20, 8)
    job = next(iter(jobs.created.values()))
    assert job["body"]["model"] == "theirs" and job["body"]["input"]["seed"] == 12345678901234567
    assert job["authorization"] == "Bearer sk-jobs-secret-0123456789"


# The state of a pause of 1 s is stored; a request leaves memory for a pause of 5 s.
@pytest.mark.parametrize("interval", [1, 5])
def test_polled_adapter_in_rust_continues_to_poll_after_a_kill(serve, jobs, interval):
    finished = threading.Event()
    jobs.poll = lambda job: succeeded(job) if finished.is_set() else (200, {"status": "running"})
    server = start_polled(serve, jobs, interval)
    prompts = [f"job {number}" for number in range(10)]
    batch = server.create([chat(prompt, prompt, model="m") for prompt in prompts])
    # The first poll of a job follows the pause whose state is stored.
    polled = lambda: sum(job["polls"] > 0 for job in list(jobs.created.values())) == 10
    wait_for(polled, what="the first poll of each job")
    server.kill()
    server.start()
    finished.set()
    ended = server.ended(batch.id)
    assert ended.request_counts.completed == 10
    output, _ = server.results(ended)
    says = lambda line: line["response"]["body"]["choices"][0]["message"]["content"]
    assert {line["custom_id"]: says(line) for line in output} == {
        prompt: f"said: {prompt}" for prompt in prompts
    }
    assert [jobs.jobs_of(prompt) for prompt in prompts] == [1] * 10
    # No job was submitted twice, not even with the same key.
    assert jobs.submissions == 10


def test_python_policy_runs_beside_the_standard_validator(serve):
    policy = (
        'order = 50\n[settings]\nallowed_models = ["echo"]\nmax_tokens = 100\n'
        'banned_words = ["Project X"]\n'
        '[limits]\nmax_memory = "128MiB"\ncall_timeout = "5s"\n'
    )
    server = start(serve, "policy-python", policy)
    good = server.run([chat("a"), chat("b", max_tokens=100)])
    assert good.status == "completed", good.errors
    batch = server.run(
        [
            chat("a", "tell me of PROJECT x"),
            chat("b", max_tokens=101),
            chat("c", model="other", stream=True),
            "no json",
            chat("e"),
        ]
    )
    found = [(error.line, error.code, error.param) for error in batch.errors.data]
    # Errors of a line follow the order of the validators: policy, standard, host.
    assert found == [
        (1, "banned_word", "body.messages"),
        (2, "too_many_tokens", "body.max_tokens"),
        (3, "model_not_allowed", "body.model"),
        (3, "streaming_unsupported", "body.stream"),
        (3, "model_not_found", "body.model"),
        (4, "invalid_json_line", None),
    ]


def test_c_policy_rejects_lines(serve):
    server = start(serve, "policy-c", "[settings]\nmax_line_bytes = 200\n")
    batch = server.run([chat("a"), chat("b", "x" * 200), '{"custom_id":"c\\u0001"}'])
    found = [(error.line, error.code) for error in batch.errors.data]
    assert (
        (2, "line_too_long") in found
        and (3, "control_character") in found
        and not [line for line, _ in found if line == 1]
    )
