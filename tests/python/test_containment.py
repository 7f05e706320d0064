"""Hostile plugins and hostile providers, each contained with an error that names a remedy.

Attacks: endless loops, memory and table growth, contract violations, forged requests, egress to
private and metadata addresses, leaked credentials, hostile components and plugin files, WASI.
Another batch runs at the same time and must not be affected.
"""

import base64
import contextlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request

import pytest
from conftest import CONTAINED, ROOT, built, chat, load_errors, run_host, wait_for

SECRET = "sk-Secret/of+the=0perator"


@pytest.fixture
def provider():
    """Starts a hostile provider over real HTTP; the path names the attack."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            kind, _, argument = urllib.parse.unquote(self.path[1:]).partition("?")
            with contextlib.suppress(OSError):
                getattr(self, kind.replace("-", "_"))(argument)

        do_GET = do_POST

        def answer(self, body, status=200, **headers):
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def stream(self, _):
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            while True:
                self.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

        def drip(self, _):
            self.send_response(200)
            self.send_header("content-length", "1000000")
            self.end_headers()
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)

        def headers_without_end(self, _):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                self.wfile.write(b"x-a: " + b"x" * 1000 + b"\r\n")

        def silence(self, _):
            time.sleep(60)

        def nonsense(self, _):
            self.wfile.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
            self.close_connection = True

        def encoded(self, _):
            self.answer(b"\x1f\x8b...", content_encoding="gzip")

        def redirect(self, to):
            self.answer(b"", 302, location=to)

        def echo(self, _):
            key = self.headers["authorization"] or "none"
            secret = key.removeprefix("Bearer ")
            body = {
                "headers": dict(self.headers),
                "url": urllib.parse.quote(key),
                "base64": base64.b64encode(f"u:{secret}".encode()).decode(),
                "slashes": "SLASHES",
            }
            text = json.dumps(body).replace("SLASHES", secret.replace("/", "\\/"))
            self.answer(
                text.encode(),
                x_echo=key,
                x_again=base64.urlsafe_b64encode(secret.encode()).decode(),
            )

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def bystander(stub):
    """Runs another batch at the same time: each line must be answered, each prompt sent once."""

    @contextlib.contextmanager
    def beside(server):
        prompts = [f"!delay 20 {number}" for number in range(5000)]
        batch = server.create(
            [chat(str(number), prompt, model="m") for number, prompt in enumerate(prompts)]
        )
        yield
        ended = server.ended(batch.id)
        output, errors = server.results(ended)
        assert errors == [] and [line["custom_id"] for line in output] == [
            str(number) for number in range(5000)
        ]
        assert all(line["response"]["status_code"] == 200 for line in output)
        counts = stub.counts()
        assert set(counts.values()) == {1} and len(counts) == 5000

    return beside


@pytest.fixture
def hostile(serve, stub, provider):
    def start(more="", env=None, arguments=(), allow=()):
        hosts = [stub.url[7:], provider.url[7:], "*.example.com", "*.example.com:80", *allow]
        text = (
            f'component = "hostile.wasm"\nmodels = ["hostile"]\nallow = {json.dumps(hosts)}\n{more}'
        )
        server = serve(
            "--retry-backoff",
            "10ms",
            "--max-attempts",
            "2",
            *arguments,
            plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 32\n")},
            env=env,
        )
        shutil.copy(built("hostile") / "hostile.wasm", server.plugins / "hostile.wasm")
        server.add_plugin("hostile", text)
        wait_for(lambda: "hostile" in server.models(), what="the plugin")
        return server

    return start


def plugin_states(server):
    with urllib.request.urlopen(server.url + "/v1/plugins") as answer:
        return {plugin["name"]: plugin for plugin in json.load(answer)["data"]}


def run_cases(server, cases, model="hostile"):
    """Runs one request per case; returns the batch and each error or response body as text."""
    batch = server.run([chat(order, model=model) for order in cases])
    assert batch.status == "completed", batch.errors
    output, errors = server.results(batch)
    ends = {line["custom_id"]: json.dumps(line["response"]["body"]) for line in output}
    for line in errors:
        ends[line["custom_id"]] = f"{line['error']['code']}: {line['error']['message']}"
    assert list(ends.keys()) and len(ends) == len(cases)
    return batch, ends


def assert_contained(ends, cases):
    for order, parts in cases.items():
        for part in parts:
            assert part in ends[order], f"{order}: {ends[order]}"
        CONTAINED.append((order, ends[order]))


def test_guest_fault_fails_only_its_own_request(hostile, bystander, stub):
    # Touching 96 MiB of memory is slow on a busy machine, hence the long timeout.
    server = hostile('[limits]\nmax_memory = "96MiB"\nmax_steps = 50\ncall_timeout = "300ms"\n')
    name = "Plugin `hostile`"
    cases = {
        "loop": ["plugin_timeout", name, "300ms", "[limits] call_timeout"],
        "memory": [
            "plugin_out_of_memory",
            name,
            "96MiB of memory in `begin`",
            "[limits] max_memory",
        ],
        "recursion": ["plugin_out_of_memory", name, "call stack of 512KiB"],
        "trap": ["plugin_failed", name, "`begin`"],
        "gigantic": ["plugin_answer_too_large", name, "16MiB", "[limits] max_output"],
        "many": ["plugin_answer_too_large", name, "[limits] max_output"],
        f"headers {stub.url}/": [
            "protocol: The adapter's request has 30000 headers; it may have 200"
        ],
        "not-utf8": ["plugin_failed", name, "utf-8"],
        "not-utf8-failure": ["plugin_failed", name, "utf-8"],
        "not-json": ["plugin_contract_violation", name, "not JSON"],
        "not-object": ["plugin_contract_violation", name, "not a JSON object"],
        "two-lines": ['{"x": "y"}'],
        "bad-status": ["plugin_contract_violation", name, "7 is not a status"],
        "long-failure": ["ccccc"],
        "endless": ["plugin_contract_violation", name, "[limits] max_steps"],
        "big-state": ["plugin_contract_violation", name, "state"],
        "wait-forever": ["plugin_contract_violation", name, "[limits] max_wait"],
        "retry-forever": ["tired"],
        "log": ["{}"],
    }
    with bystander(server):
        batch, ends = run_cases(server, cases)
        assert_contained(ends, cases)
    assert batch.request_counts.total == len(cases)
    assert len(ends["long-failure"]) < 10_000
    logged = server.logged()
    assert "panicked" not in logged
    # About a hundred of the ten thousand lines are logged, truncated; the rest is counted.
    lines = [line for line in logged.splitlines() if 'plugin="hostile" text="line ' in line]
    assert 50 <= len(lines) <= 300 and all(
        len(line) < 1500 and "\x1b[2J" not in line for line in lines
    )
    assert not any(line.startswith("2026-01-01") for line in logged.splitlines())


def test_egress_outside_the_allowlist_is_refused(hostile, bystander, stub, provider, tmp_path):
    library = tmp_path / "resolve.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests/resolver/resolve.c", "-ldl"],
        check=True,
    )
    names = {
        "metadata.example.com": "169.254.169.254",
        "mapped.example.com": "::ffff:169.254.169.254",
        "home.example.com": "127.0.0.1",
        "office.example.com": "10.0.0.7",
        "named.internal": "169.254.169.254",
        "nat64.example.com": "64:ff9b::a9fe:a9fe",
        "6to4.example.com": "2002:a9fe:a9fe::1",
        "ec2.example.com": "fd00:ec2::254",
        "alibaba.example.com": "100.100.100.200",
        "any.example.com": "0.0.0.0",
        "loop.example.com": "::1",
        "link.example.com": "fe80::1",
    }
    hosts = ",".join(f"{name}={address}" for name, address in names.items())
    # The client sees only the refusal; the operator finds address and plugin in the log.
    logs = ["--log-filter", "info,batchwright_egress=debug"]
    server = hostile(
        env={"LD_PRELOAD": str(library), "TEST_HOSTS": hosts},
        allow=["named.internal:80"],
        arguments=logs,
    )
    host = provider.url[7:]
    refused = ["not-allowed", "does not allow"]
    cases = {
        "method http://h/".replace("http://h", stub.url): ["protocol", "method"],
        f"header-value {stub.url}/": ["protocol", "header"],
        f"header-name {stub.url}/": ["protocol", "header name"],
        "send http://127.0.0.2/": refused,
        "send http://169.254.169.254/latest/meta-data": refused,
        "send http://2852039166/": refused,
        "send http://0xa9fea9fe/": refused,
        "send http://0251.0376.0251.0376/": refused,
        "send http://0xa9.254.0251.254/": refused,
        "send http://169.16689662/": refused,
        "send http://[::ffff:169.254.169.254]/": refused,
        "send http://[::ffff:a9fe:a9fe]/": refused,
        "send http://[64:ff9b::a9fe:a9fe]/": refused,
        "send http://[fd00:ec2::254]/": refused,
        "send http://\u2460\u2461\u2466.0.0.2/": refused,
        "send http://metadata.example.com/": refused,
        "send http://mapped.example.com/": refused,
        **{
            f"send http://{name}.example.com/": refused
            for name in ("nat64", "6to4", "ec2", "alibaba", "any", "loop", "link")
        },
        "send http://home.example.com/": refused,
        "send http://office.example.com/": refused,
        "send http://named.internal/": refused,
        "send file:///etc/passwd": ["not-allowed", "scheme"],
        f"send http://user:pw@{host}/": ["not-allowed", "user name"],
        f"send http://{host}@169.254.169.254/": ["not-allowed"],
        f"send http://169.254.169.254#@{host}/": refused,
        f"send http://169.254.169.254\\@{host}/": refused,
        f"send //{host}/": ["not-allowed", "URL"],
        "send /v1/x": ["not-allowed", "URL"],
        f"send {provider.url}/redirect?http://169.254.169.254/": ["not followed"],
        f"follow {provider.url}/redirect?http://169.254.169.254/": refused,
        f"follow {provider.url}/redirect?http://metadata.example.com/": refused,
    }
    with bystander(server):
        _, ends = run_cases(server, cases)
        assert_contained(ends, cases)
    client_text = " ".join(ends.values())
    for secret in ["hostile.toml", str(server.folder), "127.0.0.2", "named.internal", "10.0.0.7"]:
        assert secret not in client_text, client_text
    logged = server.logged()
    for part in [
        "127.0.0.2:80 is not allowed",
        "hostile.toml",
        "metadata.example.com resolves to 169.254.169.254",
        "named.internal resolves to 169.254.169.254",
        "private address 10.0.0.7",
        "`allow` in",
    ]:
        assert part in logged, part
    # An absolute URL in a path stays a path on the allowed host; the host sets the headers.
    _, ends = run_cases(
        server,
        [f"forged {stub.url}/http://169.254.169.254/", f"forged {stub.url}/v1/chat/completions"],
    )
    in_path = ends[f"forged {stub.url}/http://169.254.169.254/"]
    assert stub.url[7:] in in_path, in_path
    forged = ends[f"forged {stub.url}/v1/chat/completions"]
    for part in ["evil.example", "chunked", "gzip", "Bearer"]:
        assert part not in forged, forged
    # Without a credential, the plugin's own authorization header is dropped too.
    assert "x-fine" in forged and "authorization" not in forged.lower()
    CONTAINED.append(("forged Host, Content-Length, …", "dropped; the host sets them"))
    CONTAINED.append(("absolute URL in a path", "sent to the allowed host, as a path"))


def test_provider_fault_fails_only_its_own_request(hostile, bystander, provider):
    server = hostile(
        '[limits]\nmax_response_body = "1MiB"\nfirst_byte_timeout = "1s"\nexchange_timeout = "2s"\n'
        'max_memory = "64MiB"\n'
    )
    cases = {
        f"send {provider.url}/stream": ["too-large", "[limits] max_response"],
        f"send {provider.url}/drip": ["timeout", "[limits] exchange_timeout"],
        f"send {provider.url}/silence": ["timeout", "[limits] first_byte_timeout"],
        f"send {provider.url}/headers-without-end": ["protocol"],
        f"send {provider.url}/nonsense": ["protocol"],
        f"send {provider.url}/encoded": ["protocol", "gzip"],
    }
    # Separate batch: the other cases would use up the time of the single provider process.
    after = {f"loop-after {provider.url}/echo": ["plugin_timeout", "`resume`"]}
    with bystander(server):
        for asked in [cases, after]:
            _, ends = run_cases(server, asked)
            assert_contained(ends, asked)


def test_credential_is_redacted_everywhere(hostile, provider):
    credentials = (
        f'[credentials]\napi_key = {{ from = "env:HOSTILE_KEY", hosts = ["{provider.url[7:]}"] }}\n'
    )
    server = hostile(credentials, env={"HOSTILE_KEY": SECRET}, arguments=["--log-filter", "debug"])
    order = f"memory-after {provider.url}/echo"
    refused = f"send {provider.url}/nonsense"
    _, ends = run_cases(server, [order, refused, "kept"])
    assert ends[order].count("[redacted]") >= 5, ends[order]
    assert '"kept": ' in ends["kept"] and "messages" in ends["kept"], ends["kept"]
    # Forms of the secret that must not appear: plain, partial, URL-encoded, escaped, base64.
    encoded = base64.b64encode(b"u:" + SECRET.encode()).decode()
    pieces = [
        SECRET,
        SECRET[3:],
        urllib.parse.quote(SECRET),
        SECRET.replace("/", "\\/"),
        encoded[6:-4],
    ]
    server.stop()
    files = [
        path
        for path in server.folder.rglob("*")
        if path.is_file() and path.suffix not in (".wasm", ".cwasm")
    ]
    assert any(path.suffix.startswith(".db") or "sqlite" in path.name for path in files), files
    for path in files:
        content = path.read_bytes()
        for piece in pieces:
            assert piece.encode() not in content, f"{piece} is in {path}"
            assert piece.lower().encode() not in content.lower(), f"{piece} is in {path}"
    for end in ends.values():
        assert not any(piece in end for piece in pieces), end
    assert "[redacted]" in server.logged()
    CONTAINED.append(
        ("provider echoes the credential", "[redacted] in guest, results, log and database")
    )


def compilers_of(server):
    """Returns the running compiler processes of a server."""
    compilers = [
        path
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")
        if b"compile-component" in read(path)
    ]
    return [
        path
        for path in compilers
        if f"\nPPid:\t{server.child.pid}\n".encode() in read(path.with_name("status"))
    ]


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


BAD_COMPONENTS = {
    "describe-trap": ["`describe-trap` failed in `describe`", "unreachable"],
    "describe-loop": ["100ms of CPU time in one call of `describe`", "[limits] call_timeout"],
    "describe-outside": ["`describe`", "out of bounds"],
    "describe-gigantic": ["`describe`", "out of bounds"],
    "describe-not-utf8": ["`describe`", "utf-8"],
    "schema-not-json": ["`describe`", "settings-schema is not JSON"],
    "host-credential": ["`describe`", "credential `key` cannot go into the header `host`"],
    "schema-bomb": ["settings-schema expands to", "the limits are 10000"],
    "configure-trap": ["settings", "`configure-trap` failed in `configure`"],
    "start-loop": ["`instantiate`", "[limits] call_timeout"],
    "huge-table": [
        "exceeds the host's limits of memories, tables or instances",
        "1000000",
        "100000",
    ],
    "huge-memory": ["more than 64MiB of memory in `instantiate`", "[limits] max_memory"],
    "slow": ["compiling takes longer than 2s", "compile_timeout"],
    "core-module": ["is a core WebAssembly module, not a component", "wasm-tools component new"],
    "truncated": ["is not a component that can be compiled", "may be damaged"],
    "text": ["is no WebAssembly component"],
    "unknown-world": [
        "exports wasi:cli/run@0.2.0, where a plugin exports",
        "build it for the world",
    ],
    "later-version": ["batchwright:plugin/inference@0.2.0", "batchwright:plugin/inference@0.1.0"],
    "wrong-type": ["an export does not match the contract", "Rebuild it"],
    "unknown-import": ["wasi:http/outgoing-handler", "plugins may import WASI"],
}
BAD_FILES = {
    "claims-a-model": (
        'models = ["m"]',
        ["`m` is served by the plugin `p` already", "take it out of one of the two files"],
    ),
    "alias-cycle": (
        '[aliases]\na = "b"\nb = "a"',
        [
            "aliases",
            "`a` = `b`, `b` = `a` is a cycle",
            "point each alias at a model name of the provider",
        ],
    ),
    "settings-refused": (
        'models = ["x1"]\n[settings]\nx = "refuse"',
        ["settings", "these settings are refused"],
    ),
    "settings-trap": (
        'models = ["x2"]\n[settings]\nx = "trap"',
        ["settings", "failed in `configure`"],
    ),
    "settings-loop": (
        'models = ["x3"]\n[settings]\nx = "loop"',
        ["`configure`", "[limits] call_timeout"],
    ),
    "too-much": (
        'models = ["x4"]\n[limits]\nmax_table_elements = 1000000',
        ["limits.max_table_elements", "100000"],
    ),
    "wrong-pin": (
        f'models = ["x5"]\nsha256 = "{"0" * 64}"',
        ["sha256", "check where it comes from"],
    ),
    "leads-out": ('models = ["x6"]', ["component", "leads out of the plugin directory"]),
}


def test_bad_plugin_is_refused_with_a_remedy(hostile, bystander):
    server = hostile(arguments=["--compile-timeout", "2s"], env={"AAA_SECRET": "not-for-clients"})
    with bystander(server):
        whole = (built("hostile") / "hostile.wasm").read_bytes()
        for name in BAD_COMPONENTS:
            content = {"truncated": whole[:5000], "text": b"#!/bin/sh\necho hello\n"}.get(name)
            content = (
                content if content is not None else (built("hostile") / f"{name}.wasm").read_bytes()
            )
            (server.plugins / f"{name}.wasm").write_bytes(content)
            server.add_plugin(name, f'component = "{name}.wasm"\nmodels = ["{name}"]\n')
        for name, (text, _) in BAD_FILES.items():
            component = "../hostile.wasm" if name == "leads-out" else "hostile.wasm"
            server.add_plugin(name, f'component = "{component}"\n{text}\n')
        # Pipes, endless files and links out of the directory.
        os.mkfifo(server.plugins / "pipe.toml")
        os.mkfifo(server.plugins / "piped.wasm")
        server.add_plugin("piped", 'component = "piped.wasm"\nmodels = ["piped"]\n')
        server.add_plugin(
            "secret",
            'component = "hostile.wasm"\nmodels = ["s"]\n'
            f'[credentials]\napi_key = "file:{server.plugins}/piped.wasm"\n',
        )
        (server.plugins / "endless.toml").symlink_to("/dev/zero")
        (server.plugins / "environ.toml").symlink_to("/proc/self/environ")
        links = {
            "pipe": ["not a regular file"],
            "piped": ["not a regular file"],
            "secret": ["credentials.api_key", "not a regular file"],
            "endless": ["not a regular file"],
            "environ": ["line 1, column"],
        }
        expected = {
            **BAD_COMPONENTS,
            **{name: parts for name, (_, parts) in BAD_FILES.items()},
            **links,
        }
        wait_for(
            lambda: all(load_errors(server).get(name) for name in expected), 60, "all complaints"
        )
        states, errors = plugin_states(server), load_errors(server)
        for name, parts in expected.items():
            # A file that cannot be read may be another tenant's, so clients must not see it.
            assert states.get(name, {"state": "failed"})["state"] == "failed", states[name]
            for part in parts:
                assert part in errors[name], f"{name}: {errors[name]}"
            assert name in errors[name]
            CONTAINED.append((name, errors[name].removeprefix(f"{server.plugins}/")))
        assert (
            str(server.plugins) not in json.dumps(states)
            and "pipe" not in states
            and "core-module" in states
        )
        assert states["p"]["state"] == states["hostile"]["state"] == "loaded"
        assert (
            "not-for-clients" not in json.dumps(states) and "not-for-clients" not in server.logged()
        )
    wait_for(lambda: not compilers_of(server), what="the compilers to exit")


def test_guest_requests_that_grow_stay_within_the_memory_budget(hostile, provider):
    server = hostile('[limits]\nfirst_byte_timeout = "100ms"\n')
    orders = [f"inflate {provider.url}/silence#{number}" for number in range(60)]
    _, ends = run_cases(server, orders)
    assert all("timeout" in end for end in ends.values()), ends
    status = dict(
        line.split(":", 1)
        for line in pathlib.Path(f"/proc/{server.child.pid}/status").read_text().splitlines()
    )
    peak = int(status["VmHWM"].split()[0]) >> 10
    assert peak < 350, f"{peak} MiB for 60 bodies of 12 MiB"
    CONTAINED.append(
        ("lines of 70 bytes become 12 MiB", f"60 of them wait in turn, peak {peak} MiB")
    )


def test_guest_table_growth_stops_at_its_limit(hostile):
    server = hostile()
    shutil.copy(built("hostile") / "growing-table.wasm", server.plugins)
    server.add_plugin(
        "growing",
        'component = "growing-table.wasm"\nmodels = ["growing"]\n'
        "[limits]\nmax_table_elements = 5000\n",
    )
    wait_for(lambda: "growing" in server.models(), what="the plugin")
    _, ends = run_cases(server, ["growing-table"], model="growing")
    assert_contained(
        ends,
        {
            "growing-table": [
                "plugin_out_of_memory",
                "more than 5000 elements in `begin`",
                "[limits] max_table_elements",
            ]
        },
    )


def test_compiler_memory_is_limited(tmp_path):
    component = built("examples") / "policy-python.wasm"
    checked = run_host(
        "plugin", "check", component, "--cache", tmp_path / "cache", "--compile-memory", "64MiB"
    )
    assert (
        checked.returncode == 1
        and "more memory than 64MiB, the setting compile_memory" in checked.stdout
    )
    CONTAINED.append(("compiling takes much memory", checked.stdout.strip()))


@pytest.mark.parametrize("version", ["0.2", "0.3"])
def test_wasi_guest_sees_no_files_environment_or_network(hostile, stub, version):
    server = hostile(env={"HOSTILE_SECRET": "in the environment"})
    shutil.copy(built("hostile") / f"wasi-{version}.wasm", server.plugins)
    server.add_plugin(
        "curious",
        f'component = "wasi-{version}.wasm"\nmodels = ["curious"]\n'
        '[limits]\ncall_timeout = "20ms"\n',
    )
    wait_for(lambda: "curious" in server.models(), what="the plugin")
    cases = {
        "look": ["[] [] clock true true"],
        "read /etc/passwd": ["Err("],
        f"read {server.plugins}/p.toml": ["Err("],
        "write /tmp/x": ["Err("],
        f"connect {stub.url[7:]}": ["Err("],
        "resolve localhost": ["Err("],
        "flood": ["plugin_timeout", "[limits] call_timeout"],
        "sleep": ["plugin_timeout", "blocked in `begin` past its deadline"],
        "exit": ["plugin_failed"],
    }
    if version == "0.3":
        cases["look"] = [*cases["look"], "p3 [] [] 0 random true clock true"]
        cases["resolve-p3 localhost"] = ["plugin_failed", "cannot block"]
        cases["sleep-p3"] = ["plugin_failed", "cannot block"]
    # Separate batch, so that the flood does not use up the log limit first.
    _, ends = run_cases(server, ["print"], model="curious")
    assert "said" in ends["print"]
    _, ends = run_cases(server, cases, model="curious")
    for order, parts in cases.items():
        for part in parts:
            assert part in ends[order], f"{order}: {ends[order]}"
        CONTAINED.append((f"WASI {version}: {order.split(' /')[0]}", ends[order]))
    logged = server.logged()
    assert (
        'plugin="curious" text="said aloud [31m"' in logged
        and 'plugin="curious" text="and aside"' in logged
    )
    assert logged.count('plugin="curious"') < 400


def test_fresh_instances_keep_no_state(hostile):
    server = hostile('[limits]\nisolation = "per-call"\n')
    output, _ = server.results(
        server.run([chat(str(number), model="hostile") for number in range(50)])
    )
    assert {line["response"]["body"]["seen"] for line in output} == {1}


def test_slow_compilation_delays_no_other_plugin(hostile, stub):
    server = hostile(arguments=["--compile-timeout", "8s"])
    shutil.copy(built("hostile") / "slow.wasm", server.plugins)
    server.add_plugin("slow", 'component = "slow.wasm"\nmodels = ["slow"]\n')
    # The slow component is in compilation when the other plugin is added.
    wait_for(lambda: compilers_of(server), what="the compiler")
    server.add_plugin("good", stub.plugin(["good"]))
    wait_for(lambda: "good" in server.models(), 6, "the good plugin")
    assert "slow" not in plugin_states(server), "the good plugin waited for the slow one"
    wait_for(
        lambda: plugin_states(server).get("slow", {}).get("state") == "failed",
        what="the error in the log",
    )
    # A change to another plugin does not start the compilation again.
    server.add_plugin("good", stub.plugin(["good", "better"]))
    wait_for(lambda: "better" in server.models(), 6, "the changed plugin")
    assert server.run([chat("a", model="better")]).request_counts.completed == 1


def test_inspect_output_cannot_be_forged_by_a_component():
    shown = run_host("plugin", "inspect", built("hostile") / "liar.wasm")
    assert shown.returncode == 0, shown.stderr
    assert [
        line for line in shown.stdout.splitlines() if line.startswith("sha256")
    ] == shown.stdout.splitlines()[-1:]
    assert "\x1b" not in shown.stdout and "harmless imports nothing" in " ".join(
        shown.stdout.split()
    )
    CONTAINED.append(
        (
            "summary with forged lines",
            next(line for line in shown.stdout.splitlines() if "harmless" in line),
        )
    )


def test_plugin_cache_keeps_compiled_code_and_touches_no_other_file(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache/thesis.docx").write_text("years of work")
    os.utime(tmp_path / "cache/thesis.docx", (0, 0))
    for _ in range(2):
        checked = run_host(
            "plugin", "check", built("hostile") / "hostile.wasm", "--cache", "cache", cwd=tmp_path
        )
        assert checked.returncode == 0, checked.stdout
    kept = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert kept == [".cwasm", ".docx"]


def test_new_instance_out_of_memory_fails_without_a_second_call(hostile):
    server = hostile('[limits]\nisolation = "per-call"\nmax_memory = "16MiB"\n')
    batch = server.run([chat("memory", model="hostile")])
    _, errors = server.results(batch)
    assert [line["error"]["code"] for line in errors] == ["plugin_out_of_memory"]
    assert server.logged().count("fills its memory") == 1
