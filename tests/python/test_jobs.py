"""Jobs that a provider runs and the server polls: none is submitted twice.

Attacks: kills and refused polls while jobs run.
"""

import http.server
import shutil
import time

from conftest import built, chat, http_server, wait_for
from outages import SHORT_BACKOFFS


def test_provider_job_is_polled_after_a_kill_and_not_created_again(serve, stub):
    server = serve("--outage-backoff", "50ms", plugins={"p": stub.plugin(["m"])})
    prompts = [f"job {number}" for number in range(20)]
    jobs = [
        {
            "custom_id": prompt,
            "method": "POST",
            "url": "/v1/responses",
            "body": {"model": "m", "input": prompt, "background": True},
        }
        for prompt in prompts
    ]
    batch = server.create(jobs, endpoint="/v1/responses")
    for wait in [1, 4, 6]:
        wait_for(lambda: len(stub.counts()) == 20, what="all jobs to be created")
        time.sleep(wait)
        server.kill()
        server.start()
    # A refused poll is repeated; the job continues.
    stub.ask("/mode?status=503")
    time.sleep(6)
    stub.ask("/mode?")
    ended = server.ended(batch.id, 90)
    assert ended.request_counts.completed == 20
    assert stub.counts() == dict.fromkeys(prompts, 1)
    output, _ = server.results(ended)
    assert {line["response"]["body"]["status"] for line in output} == {"completed"}


def test_job_is_not_submitted_again_after_a_refused_poll(serve):
    submitted, polled = [], []

    class Provider(http.server.BaseHTTPRequestHandler):
        def answer(self, status, body):
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            submitted.append(self.path)
            self.answer(200, b"{}")

        def do_GET(self):
            polled.append(self.path)
            # The key is refused until both jobs were polled and the breaker is open.
            status = 401 if len(polled) <= 4 else 200
            self.answer(status, b"{}")

        def log_message(self, *_):
            pass

    with http_server(Provider) as provider:
        url = provider.url
        server = serve(*SHORT_BACKOFFS, plugins={})
        shutil.copy(built("hostile") / "hostile.wasm", server.plugins)
        server.add_plugin(
            "jobs", f'component = "hostile.wasm"\nmodels = ["jobs"]\nallow = ["{url[7:]}"]\n'
        )
        wait_for(lambda: "jobs" in server.models(), what="the plugin")
        batch = server.run([chat(f"job {url}/{job}", model="jobs") for job in range(2)])
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 0)
    assert sorted(submitted) == ["/0", "/1"] and len(polled) > 4
