"""Signatures of plugins: trusted keys, keys of OpenSSH, serials.

Attacks: unsigned edits, changed components, withdrawn and untrusted keys, old signed versions.
"""

import json
import pathlib
import shutil
import subprocess
import time

import pytest
from conftest import PLUGINS, chat, load_errors, run_host, wait_for
from conftest import plugin_states as states

ECHO = PLUGINS / "inference-echo.wasm"


@pytest.fixture
def keys(tmp_path):
    """Creates SSH key pairs by name."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed; it is in openssh-client of Debian")

    def make(name, passphrase="", kind="ed25519"):
        path = tmp_path / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", name, "-f", path], check=True
        )
        return path

    return make


def test_trusted_keys_require_a_signature(serve, stub, keys, tmp_path):
    ours, theirs = keys("ours"), keys("theirs", kind="ecdsa")
    trusted = tmp_path / "trusted"
    trusted.write_text("# the platform team\n" + pathlib.Path(f"{ours}.pub").read_text())
    server = serve("--trusted-keys", trusted, plugins={"p": stub.plugin(["m"])})

    def state(name):
        return states(server).get(name, {})

    wait_for(lambda: {"p", "standard"} <= set(states(server)), what="the errors in the log")
    assert state("p")["state"] == state("standard")["state"] == "failed"
    assert "p.toml: signature: there is none" in load_errors(server).get(
        "p", ""
    ) and "plugin sign" in load_errors(server).get("p", "")

    def sign(name, key, *more, **options):
        return run_host(
            "plugin", "sign", server.plugins / f"{name}.toml", "--key", key, *more, **options
        )

    signed = sign("p", ours)
    assert signed.returncode == 0, signed.stderr
    assert sign("standard", ours).returncode == 0
    wait_for(
        lambda: state("p").get("state") == state("standard").get("state") == "loaded",
        what="the signed plugins",
    )
    assert state("p")["signed_by"].startswith("SHA256:") and state("p")["signed_by"].endswith(
        " ours"
    )
    assert server.run([chat("a", model="m")]).request_counts.completed == 1
    # ssh-keygen accepts the signature of the printed statement.
    (tmp_path / "allowed").write_text("team " + pathlib.Path(f"{ours}.pub").read_text())
    statement = run_host("plugin", "sign", server.plugins / "p.toml", "--statement")
    assert statement.stdout.startswith("batchwright plugin v1\nname p\nmanifest sha256:"), (
        statement.stderr
    )
    verified = subprocess.run(
        [
            "ssh-keygen",
            "-Y",
            "verify",
            "-f",
            tmp_path / "allowed",
            "-I",
            "team",
            "-n",
            "batchwright-plugin",
            "-s",
            server.plugins / "p.toml.sig",
        ],
        input=statement.stdout,
        text=True,
        capture_output=True,
    )
    assert verified.returncode == 0 and "Good" in verified.stdout, verified.stderr
    # Changed file, changed component, untrusted key: the old plugin keeps serving.
    text = (server.plugins / "p.toml").read_text()
    server.add_plugin("p", text.replace('["m"]', '["m", "n"]'))
    wait_for(lambda: state("p")["state"] == "outdated", what="the error in the log")
    assert (
        "changed after it was signed" in load_errors(server).get("p", "")
        and "n" not in server.models()
    )
    sign("p", theirs)
    wait_for(
        lambda: "a key that is not in" in load_errors(server).get("p", ""),
        what="the error in the log",
    )
    sign("p", ours)
    wait_for(lambda: "n" in server.models(), what="the newly signed file")
    component = server.plugins / "inference-openai.wasm"
    component.write_bytes(component.read_bytes() + b"\x00\x05\x04note")
    wait_for(lambda: state("p")["state"] == "outdated", what="the error in the log")
    assert server.run([chat("a", model="n")]).request_counts.completed == 1
    verify = [
        "plugin",
        "verify",
        "--trusted-keys",
        trusted,
        server.plugins / "p.toml",
        server.plugins / "standard.toml",
    ]
    verified = run_host(*verify)
    assert (
        verified.returncode == 1
        and "changed after it was signed" in verified.stdout
        and "ok " in verified.stdout
    )
    sign("p", ours)
    assert run_host(*verify).returncode == 0
    # A component in another folder that the settings name is the same component.
    elsewhere = tmp_path / "components"
    elsewhere.mkdir()
    shutil.copy(component, elsewhere)
    (tmp_path / "alone").mkdir()
    for name in ["p.toml", "p.toml.sig"]:
        shutil.copy(server.plugins / name, tmp_path / "alone")
    alone = ["plugin", "verify", "--trusted-keys", trusted, tmp_path / "alone/p.toml"]
    assert run_host(*alone).returncode == 1
    assert run_host(*alone, "--components", elsewhere).returncode == 0
    # Disabling a plugin needs a signature too.
    signed = (server.plugins / "p.toml").read_text()
    server.add_plugin("p", "enabled = false\n" + signed)
    wait_for(lambda: state("p")["state"] == "outdated", what="the error in the log")
    assert server.run([chat("a", model="n")]).request_counts.completed == 1
    sign("p", ours)
    wait_for(lambda: state("p")["state"] == "disabled", what="the plugin to be disabled")
    server.add_plugin("p", signed)
    sign("p", ours)
    wait_for(lambda: state("p")["state"] == "loaded", what="the plugin")
    # The signature covers the name, so a copy under another name is refused.
    for end in ["toml", "toml.sig"]:
        shutil.copy(server.plugins / f"p.{end}", server.plugins / f"q.{end}")
    wait_for(lambda: state("q").get("state") == "failed", what="the error in the log")
    assert "changed after it was signed" in load_errors(server)["q"]


def test_openssh_signatures_are_accepted_and_bad_keys_reported(serve, keys, tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    shutil.copy(ECHO, folder)
    manifest = folder / "e.toml"
    manifest.write_text('component = "inference-echo.wasm"\nmodels = ["e"]\n')
    key = keys("locked", "open sesame")
    trusted = tmp_path / "locked.pub"
    sign = ["plugin", "sign", manifest, "--key", key]
    before = manifest.read_text()
    assert "--passphrase" in run_host(*sign).stderr
    wrong = run_host(*sign, "--passphrase", "env:P", env={"P": "wrong"})
    assert wrong.returncode != 0 and "the passphrase is wrong" in wrong.stderr
    assert manifest.read_text() == before
    assert run_host(*sign, "--passphrase", "env:P", env={"P": "open sesame"}).returncode == 0
    check = ["plugin", "check", manifest, "--trusted-keys", trusted]
    assert run_host(*check).returncode == 0
    # The host never sees the key: ssh-keygen signs the printed statement.
    statement = run_host("plugin", "sign", manifest, "--statement").stdout
    plain = keys("plain")
    signature = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-n", "batchwright-plugin", "-f", plain],
        input=statement.encode(),
        capture_output=True,
        check=True,
    ).stdout
    (folder / "e.toml.sig").write_bytes(signature)
    assert "a key that is not in" in run_host(*check).stdout
    assert run_host("plugin", "check", manifest, "--trusted-keys", f"{plain}.pub").returncode == 0
    for content, part in [("", "holds no public key"), ("ssh-ed25519 nonsense", "line 1")]:
        bad = tmp_path / "bad"
        bad.write_text(content)
        refused = run_host("plugin", "check", manifest, "--trusted-keys", bad)
        assert (
            refused.returncode == 3 and part in refused.stderr and "trusted_keys" in refused.stderr
        ), refused.stderr
    assert "is not a private key" in run_host("plugin", "sign", manifest, "--key", trusted).stderr


def test_old_serial_and_withdrawn_key_are_refused(serve, tmp_path):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed; it is in openssh-client of Debian")
    for name in ["ours", "theirs"]:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True
        )
    public = {name: (tmp_path / f"{name}.pub").read_text() for name in ["ours", "theirs"]}
    trusted = tmp_path / "trusted"
    trusted.write_text(public["ours"] + 'names="other" ' + public["theirs"])
    server = serve("--trusted-keys", trusted)

    def sign(name, key):
        signed = run_host(
            "plugin", "sign", server.plugins / f"{name}.toml", "--key", tmp_path / key
        )
        assert signed.returncode == 0, signed.stderr

    sign("standard", "ours")
    sign("echo", "ours")
    wait_for(lambda: server.models() == ["echo"], what="the signed plugin")
    old = {end: (server.plugins / f"echo.{end}").read_bytes() for end in ["toml", "toml.sig"]}
    sign("echo", "ours")
    serial = lambda: int(
        (server.plugins / "echo.toml").read_text().split("serial = ")[1].split()[0]
    )  # noqa: E731
    kept = lambda: json.loads((server.data / "serials").read_text()).get("echo")  # noqa: E731
    wait_for(lambda: kept() == serial(), what="the serial to be stored")
    for end, content in old.items():
        (server.plugins / f"echo.{end}").write_bytes(content)
    wait_for(lambda: "its serial is" in server.logged(), what="the error in the log")
    server.stop()
    server.start()
    assert server.models() == []
    sign("echo", "ours")
    wait_for(lambda: server.models() == ["echo"], what="the newly signed plugin")
    # A key for another plugin name, then a withdrawn key.
    sign("echo", "theirs")
    wait_for(lambda: "may sign only other" in server.logged(), what="the error in the log")
    sign("echo", "ours")
    trusted.write_text('names="other" ' + public["theirs"])
    wait_for(
        lambda: "trusted keys changed" in server.logged() and "is not in" in server.logged(),
        20,
        "the complaint",
    )
    wait_for(lambda: server.models() == [], what="the plugin to be unloaded")
    # The last key can be withdrawn too.
    trusted.write_text("# no key\n")
    wait_for(lambda: server.logged().count("trusted keys changed") == 2, 20, "the keys to be read")


def test_unsigned_edit_keeps_the_signed_plugin_serving(serve, tmp_path):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed; it is in openssh-client of Debian")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "ours"], check=True
    )
    server = serve("--trusted-keys", tmp_path / "ours.pub")
    for name in ["standard", "echo"]:
        assert (
            run_host(
                "plugin", "sign", server.plugins / f"{name}.toml", "--key", tmp_path / "ours"
            ).returncode
            == 0
        )
    wait_for(lambda: server.models() == ["echo"], what="the signed plugin")
    with open(server.plugins / "echo.toml", "a") as file:
        file.write("# edited\n")
    wait_for(lambda: "changed after it was signed" in server.logged(), what="the error in the log")
    time.sleep(5)
    assert server.models() == ["echo"] and server.run([chat("a")]).request_counts.completed == 1
