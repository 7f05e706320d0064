"""Where a plugin's requests may go, and where its credentials may appear.

Attacks: private and metadata addresses in every notation, redirects, forged headers, and a
provider that echoes the credential.
"""

import base64
import shutil
import subprocess
import urllib.parse

import pytest
from conftest import CONTAINED, PLUGINS, ROOT, run_host
from containment import assert_contained, run_cases

pytestmark = pytest.mark.quiet

SECRET = "sk-Secret/of+the=0perator"


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


def test_metadata_addresses_need_an_allow_entry(tmp_path):
    for file in ["inference-openai.wasm"]:
        shutil.copy(PLUGINS / file, tmp_path)
    text = (
        'component = "inference-openai.wasm"\nmodels = ["m"]\n{}'
        '[settings]\nbase_url = "http://169.254.169.254/v1"\n'
    )
    (tmp_path / "p.toml").write_text(text.format(""))
    refused = run_host("plugin", "check", tmp_path / "p.toml")
    assert (
        refused.returncode == 1
        and "169.254.169.254" in refused.stdout
        and "allow" in refused.stdout
    )
    (tmp_path / "p.toml").write_text(text.format('allow = ["169.254.169.254:80"]\n'))
    assert run_host("plugin", "check", tmp_path / "p.toml").returncode == 0
