"""Traces and the metrics of generative AI, as a collector of the official protobufs gets them."""

import http.server
import json
import re
import socket
import time
import uuid
from collections import defaultdict

import pytest
from conftest import chat, http_server, wait_for
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tenants import admin_key
from test_metrics import scrape

ERROR = 2  # Status.STATUS_CODE_ERROR
CLIENT_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
TRACEPARENT = f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"


class Collector:
    """Collector that keeps what it gets."""

    def __init__(self):
        self.bodies, self.spans, self.metrics, self.resource = [], [], {}, {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805
                body = handler.rfile.read(int(handler.headers["content-length"]))
                assert handler.headers["content-type"] == "application/x-protobuf"
                self.bodies.append(body)
                if handler.path == "/v1/traces":
                    self.take_spans(ExportTraceServiceRequest.FromString(body))
                else:
                    assert handler.path == "/v1/metrics"
                    self.take_metrics(ExportMetricsServiceRequest.FromString(body))
                handler.send_response(200)
                handler.send_header("content-length", "0")
                handler.end_headers()

            def log_message(handler, *arguments):  # noqa: N805
                pass

        self.handler = Handler

    def take_spans(self, request):
        for resource in request.resource_spans:
            self.resource = attributes(resource.resource)
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def take_metrics(self, request):
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics.update({metric.name: metric for metric in scope.metrics})

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def one(self, name):
        (span,) = self.named(name)
        return span


def attributes(item):
    """Returns the attributes of a span, a resource or a data point."""
    found = {}
    for pair in item.attributes:
        kind = pair.value.WhichOneof("value")
        found[pair.key] = getattr(pair.value, kind)
    return found


@pytest.fixture
def collector():
    collector = Collector()
    with http_server(collector.handler) as server:
        collector.url = server.url
        yield collector


def traced(collector, *more):
    return ("--otlp-endpoint", collector.url, *more)


def test_batch_is_one_trace_and_failed_requests_are_traces_linked_to_it(serve, stub, collector):
    server = serve(
        *traced(collector, "--trace-requests", "0", "--max-attempts", "2"),
        "--retry-backoff=10ms",
        plugins={"p": stub.plugin(["m"])},
    )
    lines = [chat(f"good-{number}", model="m") for number in range(30)]
    lines.append(chat("bad", "!status 500 no", model="m"))
    batch = server.run(lines)
    wait_for(lambda: collector.named("batch"), what="the span of the batch")
    wait_for(lambda: collector.named("request"), what="the span of the failed request")
    root = collector.one("batch")
    assert collector.resource["service.name"] == "batchwright"
    found = attributes(root)
    assert (found["batch"], found["status"], found["tenant"]) == (batch.id, "completed", "default")
    assert (found["requests.total"], found["requests.failed"]) == (31, 1)
    assert 0 < root.end_time_unix_nano - root.start_time_unix_nano < 60e9
    parts = [span for span in collector.spans if span.trace_id == root.trace_id]
    assert {span.name for span in parts} == {"batch", "validate", "execute", "finalize"}
    assert all(span.parent_span_id == root.span_id for span in parts if span is not root)
    assert all(attributes(span)["batch"] == batch.id for span in parts)
    assert sum(attributes(span).get("lines", 0) for span in parts) == 31
    # The batch is linked to the upload of its file.
    upload = collector.one("upload")
    assert [link.trace_id for link in root.links] == [upload.trace_id]
    assert attributes(upload)["file"] == batch.input_file_id
    # The failed request is a trace of its own.
    request = collector.one("request")
    assert request.trace_id != root.trace_id
    assert [link.span_id for link in request.links] == [root.span_id]
    found = attributes(request)
    assert (found["batch"], found["line"], found["error.type"]) == (batch.id, 31, "500")
    assert (found["plugin"], found["model"], request.status.code) == ("p", "m", ERROR)
    attempts = [span for span in collector.spans if span.parent_span_id == request.span_id]
    assert [span.name for span in attempts] == ["chat m"] * 2
    assert all(span.trace_id == request.trace_id for span in attempts)
    assert {attributes(span)["verdict"] for span in attempts} == {"failed"}
    # 30 successful requests left no span.
    assert len(collector.spans) == len(parts) + 1 + 1 + 2 + len(
        [span for span in collector.spans if span.name.startswith("POST ")]
    )


def test_provider_gets_the_context_of_the_attempt(serve, stub, collector):
    server = serve(*traced(collector, "--trace-requests", "1"), plugins={"p": stub.plugin(["m"])})
    batch = server.run([chat(f"a-{number}", "!headers", model="m") for number in range(5)])
    output, _ = server.results(batch)
    wait_for(lambda: len(collector.named("chat m")) == 5, what="five attempts")
    sent = set()
    for line in output:
        headers = json.loads(line["response"]["body"]["choices"][0]["message"]["content"])
        version, trace, span, flags = headers["traceparent"].split("-")
        assert (version, flags) == ("00", "01")
        sent.add((trace, span))
    attempts = collector.named("chat m")
    assert {(span.trace_id.hex(), span.span_id.hex()) for span in attempts} == sent
    assert len({span.trace_id for span in collector.named("request")}) == 5


def test_context_of_a_client_is_continued(serve, stub, collector):
    server = serve(*traced(collector), plugins={"p": stub.plugin(["m"])})
    headers = {"traceparent": TRACEPARENT}
    answer = server.client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "!headers"}], extra_headers=headers
    )
    sent = json.loads(answer.choices[0].message.content)["traceparent"]
    assert sent.split("-")[1] == CLIENT_TRACE and sent.split("-")[2] != CLIENT_SPAN
    batch = server.client.batches.create(
        input_file_id=server.upload([chat("a", model="m")]).id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        extra_headers=headers,
    )
    server.ended(batch.id)
    wait_for(lambda: collector.named("batch"), what="the span of the batch")
    wait_for(lambda: len(collector.named("request")) == 1, what="the span of the request")
    ours = [span for span in collector.spans if span.trace_id.hex() == CLIENT_TRACE]
    request = collector.one("request")
    assert request.parent_span_id.hex() == CLIENT_SPAN
    created = collector.one("POST /v1/batches")
    assert created.parent_span_id.hex() == CLIENT_SPAN
    assert [link.span_id for link in created.links] == [collector.one("batch").span_id]
    attempt = [span for span in ours if span.parent_span_id == request.span_id]
    assert [span.span_id.hex() for span in attempt] == [sent.split("-")[2]]


def test_context_of_a_client_is_passed_on_without_a_collector(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})

    def seen(value):
        headers = {"traceparent": value} if value else {}
        answer = server.client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "!headers"}], extra_headers=headers
        )
        return json.loads(answer.choices[0].message.content).get("traceparent")

    assert seen(TRACEPARENT) == TRACEPARENT
    assert seen(None) is None
    assert seen("00-not-a-context-01") is None


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_dead_collector_costs_spans_and_nothing_else(serve, stub, kind):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if kind == "silent":
            silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server = serve(
            "--otlp-endpoint", url, "--trace-requests", "1", plugins={"p": stub.plugin(["m"])}
        )
        batch = server.run([chat(f"a-{number}", model="m") for number in range(200)])
        assert batch.request_counts.completed == 200
        if kind == "closed":
            dropped = 'batchwright_trace_spans_dropped_total{cause="export_failed"}'
            wait_for(lambda: dropped in scrape(server.url)[2], what="counted spans")
            assert server.logged().count("spans not exported") == 1
        began = time.monotonic()
        assert server.stop() == 0
        took = time.monotonic() - began
        print(f"stopped in {took:.1f} s with a {kind} collector")
        assert took < 20


def test_metrics_of_generative_ai_have_their_current_and_former_names(serve, stub, collector):
    environment = {
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        "OTEL_SEMCONV_STABILITY_OPT_IN": "gen_ai/dup",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
    }
    server = serve(env=environment, plugins={"p": stub.plugin(["m-*"])})
    lines = [chat(f"a-{number}", model=f"m-{number}") for number in range(3)]
    batch = server.run([*lines, chat("bad", "!status 400 no", model="m-x")])
    server.client.chat.completions.create(model="m-y", messages=[{"role": "user", "content": "hi"}])

    def points(name):
        metric = collector.metrics.get(name)
        kind = metric and metric.WhichOneof("data")
        return list(getattr(metric, kind).data_points) if metric else []

    duration = "gen_ai.client.operation.duration"
    wait_for(lambda: sum(point.count for point in points(duration)) == 5, what="five operations")
    wait_for(lambda: collector.named("batch"), what="the trace")
    assert collector.resource["deployment.environment.name"] == "test"
    assert {metric.unit for metric in collector.metrics.values()} == {"s", "{token}"}
    by_error = defaultdict(int)
    for point in points(duration):
        found = attributes(point)
        assert found["gen_ai.operation.name"] == "chat"
        assert found["gen_ai.request.model"] == "m-*"
        assert found["gen_ai.provider.name"]
        by_error[found.get("error.type")] += point.count
    assert by_error == {None: 4, "400": 1}
    current = "gen_ai.client.inference.duration"
    assert sum(point.count for point in points(current)) == 5
    used = sum(point.as_int for point in points("gen_ai.client.inference.usage.input_tokens"))
    assert used > batch.usage.input_tokens
    former = points("gen_ai.client.token.usage")
    assert {attributes(point)["gen_ai.token.type"] for point in former} == {"input", "output"}


def test_nothing_that_leaves_the_process_has_a_prompt_an_answer_or_a_secret(
    serve, stub, collector, tmp_path
):
    words = {
        name: f"{name}-{uuid.uuid4().hex}"
        for name in ("prompt", "answer", "credential", "body", "metadata", "idempotency")
    }
    data = tmp_path / "server/data"
    admin = admin_key(data)
    plugin = stub.plugin(["m"]) + '[credentials]\napi_key = "env:PLANTED"\n'
    server = serve(
        *traced(collector, "--trace-requests", "1", "--log-filter", "trace"),
        "--retry-backoff=10ms",
        "--max-attempts=2",
        env={"PLANTED": words["credential"], "OTEL_METRIC_EXPORT_INTERVAL": "200"},
        plugins={"p": plugin},
    )
    project = admin_project(server, admin)
    prompts = [
        words["prompt"],
        f"!status 400 {words['prompt']}",
        f"!status 500 {words['prompt']}",
        f"!status 401 {words['prompt']}",
        f"!close {words['prompt']}",
        f"!html {words['prompt']}",
    ]
    lines = [chat(f"c-{place}", prompt, model="m") for place, prompt in enumerate(prompts)]
    lines[0]["body"]["metadata"] = {"word": words["metadata"]}
    broken = b'{"custom_id": "' + words["body"].encode() + b'", "method"\n' * 20
    client = server.client.with_options(api_key=project)
    for content in (lines, broken):
        body = (
            content
            if isinstance(content, bytes)
            else b"\n".join(json.dumps(line).encode() for line in content)
        )
        file = client.files.create(file=("in.jsonl", body), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"word": words["metadata"]},
            extra_headers={"idempotency-key": words["idempotency"] + str(len(body))},
        )
        wait_for(
            lambda batch=batch: (
                client.batches.retrieve(batch.id).status in ("completed", "failed")
                or len(collector.named("request")) > 3
            ),
            what="the end",
        )
    for prompt in prompts[:2]:
        try:
            client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": prompt}]
            )
        except Exception as error:
            print(type(error).__name__)
    wait_for(lambda: collector.named("request"), what="spans of requests")
    wait_for(lambda: collector.metrics, what="metrics")
    outputs = {
        "log": server.logged(),
        "metrics": scrape(server.url, admin)[2],
        "otlp": b"\n".join(collector.bodies).decode(errors="replace"),
    }
    secrets = {**words, "admin key": admin, "project key": project}
    found = [
        (name, place)
        for place, text in outputs.items()
        for name, word in secrets.items()
        if word in text
    ]
    for name, place in found:
        at = outputs[place].index(secrets[name])
        print(place, name, re.sub(r"\s+", " ", outputs[place][max(0, at - 300) : at + 100]))
    assert not found
    assert len(outputs["log"]) > 10_000


def admin_project(server, admin):
    """Creates a project and returns its key."""
    projects = server.client.with_options(admin_api_key=admin).admin.organization.projects
    project = projects.create(name="planted")
    return projects.service_accounts.create(project.id, name="tests").api_key.value
