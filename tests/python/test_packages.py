"""Release: archive, papers, Debian package and container image, installed and used.

The Debian package is installed into a Debian of its own. The image is built from the Dockerfile, on
a base with the same libraries, and runs as any user in a root that nobody can write to.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import HOST, ROOT, chat, handles, jsonl, lines, run_host, wait_for
from containers import DOCKERFILE
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packages import Namespace, needs_root_and, newer, run


def test_archive_has_a_program_that_runs_where_it_is_unpacked(release, tmp_path):
    run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=release)
    (archive,) = release.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        members = packed.getmembers()
        packed.extractall(tmp_path, filter="data")
    assert {(member.uid, member.gid, member.mode & 0o022) for member in members} == {(0, 0, 0)}
    folder = tmp_path / "batchwright"
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a", "hi")]))
    # The plugins are found beside the program.
    run(folder / "batchwright", "run", "in.jsonl", "-o", "out.jsonl", cwd=tmp_path)
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == ["a"]
    pages = {page.name for page in (folder / "man").iterdir()}
    assert {"batchwright.1", "batchwright-serve.1", "batchwright-admin-key-create.1"} <= pages
    for file in folder.rglob("*"):
        if file.is_file() and file != folder / "batchwright":
            assert str(ROOT).encode() not in file.read_bytes(), f"{file} names the build folder"


def test_papers_name_what_is_linked_and_its_licenses(release):
    text = (release / "batchwright/batchwright.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_5).validate_str(text) is None
    bill = json.loads(text)
    linked = {part["name"]: part for part in bill["components"]}
    assert {"wasmtime", "rusqlite", "tokio", "batchwright-batch"} <= linked.keys()
    # Tools and test libraries are not linked into the program.
    assert not {"xtask", "proptest", "insta"} & linked.keys()
    papers = (release / "batchwright/THIRD-PARTY-LICENSES.txt").read_text()
    for name, part in linked.items():
        if not name.startswith("batchwright"):
            assert f"  {name} {part['version']} (" in papers, name
    assert "Apache License" in papers and "Permission is hereby granted" in papers


def test_completions_and_manual_pages_know_every_command(release):
    script = release / "batchwright/completions/batchwright.bash"
    words = run("bash", "-c", f"source {script} && complete -p batchwright && echo loaded")
    assert "_batchwright" in words and "loaded" in words
    help_text = run_host("--help").stdout
    commands = re.findall(r"^  (\w+)  ", help_text.split("Commands:")[1], re.M)
    commands.remove("help")
    page = (release / "batchwright/man/batchwright.1").read_text()
    assert len(commands) > 10
    for command in commands:
        assert command in script.read_text() and f"batchwright\\-{command}(1)" in page, command


# --- Debian package ---


@pytest.fixture
def installed(debian, release, tmp_path):
    """Returns a Debian of this test's own, with the package installed."""
    root = tmp_path / "debian"
    run("cp", "--archive", debian, root)
    systemctl = root / "usr/bin/systemctl"
    # Systemd does not run here: the real systemctl changes files, and other requests are recorded.
    systemctl.rename(systemctl.with_name("systemctl.real"))
    systemctl.write_text(
        '#!/bin/sh\necho "$@" >> /systemctl.log\n'
        'case "$*" in --root=*) exec /usr/bin/systemctl.real "$@" ;; esac\n'
        'case "$*" in\n'
        "*is-active*) test -e /active ;;\n"
        "*is-enabled*) exec /usr/bin/systemctl.real --root=/ is-enabled batchwright.service ;;\n"
        "esac\n"
    )
    systemctl.chmod(0o755)
    (root / "run/systemd/system").mkdir(parents=True)
    (package,) = release.glob("*.deb")
    dpkg(root, "--install", package)
    return root


def dpkg(root, action, subject):
    """Runs dpkg inside a root; returns what it prints."""
    if action == "--install":
        shutil.copy(subject, root / "tmp/package.deb")
        subject = "/tmp/package.deb"
    return run("chroot", root, "env", "DEBIAN_FRONTEND=noninteractive", "dpkg", action, subject)


def asked(root):
    """Returns what systemd was asked for, and forgets it."""
    log = root / "systemctl.log"
    words = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return words


def used(root):
    """Makes results and secrets, as on a server that runs; returns their files."""
    results = root / "var/lib/batchwright/results"
    results.write_text("answers")
    secrets = root / "etc/batchwright/environment"
    secrets.write_text("OPENAI_API_KEY=secret\n")
    (root / "active").touch()
    asked(root)
    return results, secrets


def unit_is_enabled(root):
    return (root / "etc/systemd/system/multi-user.target.wants/batchwright.service").is_symlink()


@needs_root_and("debootstrap", "unshare", "nsenter", "setpriv")
def test_package_is_installed_and_its_server_used(installed, tmp_path):
    root = installed
    assert unit_is_enabled(root) and "start batchwright.service" in asked(root)
    (user,) = [
        line for line in (root / "etc/passwd").read_text().splitlines() if "batchwright" in line
    ]
    uid, gid = user.split(":")[2:4]
    assert user.endswith("/usr/sbin/nologin")
    data = root / "var/lib/batchwright"
    found = data.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (int(uid), int(gid), 0o700)
    assert (root / "etc/batchwright/environment").stat().st_mode & 0o777 == 0o600
    assert list((root / "usr/share/man/man1").glob("batchwright*"))
    # The command line of the unit, as its user.
    unit = (root / "lib/systemd/system/batchwright.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    server = Namespace(
        root, command.split(), tmp_path / "server.log", user=uid, group=gid, read_only=False
    )
    try:
        health = ["/usr/bin/batchwright", "health", "--check", "ready"]
        config = ["--config", "/etc/batchwright/batchwright.toml"]
        wait_for(lambda: server.first(), what="a process")
        wait_for(
            lambda: server.inside(*health, *config).returncode == 0,
            what=lambda: f"a ready server: {server.log.read_text()}",
        )
        # No plugin is an error, although no provider has a key yet.
        plugins = server.beside(HOST, "plugin", "list", "--server", "http://127.0.0.1:8081")
        assert plugins.returncode == 0 and "failed" not in plugins.stdout, plugins.stdout
        checked = server.inside("/usr/bin/batchwright", "config", "check", *config)
        assert checked.returncode == 0, checked.stderr
        (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a", "hi")]))
        made = server.beside(HOST, "batch", "create", tmp_path / "in.jsonl", "--json")
        assert made.returncode == 0, made.stderr
        batch = json.loads(made.stdout)["id"]
        watched = server.beside(HOST, "batch", "watch", batch)
        assert watched.returncode == 0 and "1 of 1" in watched.stdout + watched.stderr
        # What the timer of backups starts, once an operator enables it.
        assert not (
            root / "etc/systemd/system/timers.target.wants/batchwright-backup.timer"
        ).exists()
        backups = root / "var/backups/batchwright"
        backups.mkdir(mode=0o700)
        os.chown(backups, int(uid), int(gid))
        unit = (root / "lib/systemd/system/batchwright-backup.service").read_text()
        (backup,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
        done = server.inside(*backup.split())
        assert done.returncode == 0 and "backed up" in done.stdout, done.stderr
        assert server.terminate() == 0
    finally:
        server.kill()


@needs_root_and("debootstrap", "dpkg-deb")
def test_upgrade_keeps_what_the_operator_changed_and_restarts(installed, release, tmp_path):
    root = installed
    settings = root / "etc/batchwright/batchwright.toml"
    settings.write_text(settings.read_text() + 'batch_lifetime = "9d"\n')
    results, secrets = used(root)
    (package,) = release.glob("*.deb")
    update = newer(package, tmp_path)
    dpkg(root, "--install", update)
    assert "batch_lifetime" in settings.read_text() and secrets.read_text() and results.exists()
    assert "# New in 9.9.9." in (root / "etc/batchwright/plugins/echo.toml").read_text()
    words = asked(root)
    assert "restart batchwright.service" in words and unit_is_enabled(root), words
    # What an operator disabled stays disabled.
    (root / "etc/systemd/system/multi-user.target.wants/batchwright.service").unlink()
    dpkg(root, "--install", update)
    assert not unit_is_enabled(root)


@needs_root_and("debootstrap")
def test_removal_keeps_settings_and_purge_keeps_results_and_secrets(installed):
    root = installed
    results, secrets = used(root)
    dpkg(root, "--remove", "batchwright")
    assert "stop batchwright.service" in asked(root)
    assert not (root / "usr/bin/batchwright").exists() and results.exists()
    assert (root / "etc/batchwright/batchwright.toml").exists()
    dpkg(root, "--purge", "batchwright")
    assert results.read_text() == "answers" and secrets.read_text()
    assert not (root / "etc/batchwright/batchwright.toml").exists()
    assert not unit_is_enabled(root)


# --- container image ---


def env_of(config):
    return [tuple(pair.split("=", 1)) for pair in config["Env"] or []]


@needs_root_and("buildah", "unshare", "nsenter", "setpriv")
@pytest.mark.parametrize("user", ["65532:0", "1000680000:0"])
def test_image_runs_as_any_user_in_a_root_that_nobody_can_write(image, user, tmp_path):
    root, config = image.root, image.config
    assert re.fullmatch(r"[1-9]\d*:\d+", config["User"]), "runAsNonRoot needs a number"
    assert not (root / "bin/sh").exists()
    uid, gid = user.split(":")
    key = run_host("admin", "key", "generate").stdout.strip()
    volume = tmp_path / "volume"
    run("cp", "--archive", root / "var/lib/batchwright", volume)
    env = [*env_of(config), ("BATCHWRIGHT_FIRST_ADMIN_KEY", "env:ADMIN_KEY"), ("ADMIN_KEY", key)]
    command = [*config["Entrypoint"], *config["Cmd"]]
    mounts = [(volume, "/var/lib/batchwright")]
    started = []

    def start():
        log = tmp_path / "log"
        server = Namespace(root, command, log, user=uid, group=gid, env=env, mounts=mounts)
        started.append(server)
        wait_for(lambda: server.first(), what="a process")
        wait_for(
            lambda: server.inside(*config["Healthcheck"]["Test"][1:]).returncode == 0,
            what=lambda: f"a healthy server: {log.read_text()}",
        )
        return server

    try:
        server = start()
        assert server.inside(*command[:1], "--version").returncode == 0
        admin = {"BATCHWRIGHT_ADMIN_KEY": key}
        made = server.beside(
            HOST, "admin", "key", "create", "--project", "default", "--name", "nightly", env=admin
        )
        assert made.returncode == 0, made.stderr
        (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a", "hi")]))
        client = {"BATCHWRIGHT_API_KEY": made.stdout.strip()}
        batch = server.beside(HOST, "batch", "create", tmp_path / "in.jsonl", "--json", env=client)
        assert batch.returncode == 0, batch.stderr
        # SIGTERM reaches PID 1, and a second start has everything.
        assert server.terminate() == 0
        server = start()
        watched = server.beside(HOST, "batch", "watch", json.loads(batch.stdout)["id"], env=client)
        assert watched.returncode == 0, watched.stderr
    finally:
        for server in started:
            server.kill()


def write_to_reader(pipe, content):
    """Writes to a named pipe; returns false if nothing reads it."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    with open(descriptor, "wb") as writer:
        writer.write(content)
    return True


@needs_root_and("buildah", "unshare", "nsenter", "setpriv")
def test_first_process_of_a_container_ends_at_a_signal_while_it_starts(image, tmp_path):
    key = run_host("admin", "key", "generate").stdout.strip()
    volume = tmp_path / "volume"
    run("cp", "--archive", image.root / "var/lib", volume)
    env = [("BATCHWRIGHT_FIRST_ADMIN_KEY", "env:ADMIN_KEY"), ("ADMIN_KEY", key)]
    env += env_of(image.config)
    # The start waits for its settings, until something is written.
    config = volume / "batchwright/config"
    os.mkfifo(config, 0o666)
    config.chmod(0o666)
    command = [*image.config["Entrypoint"], "serve", "--config", "/var/lib/batchwright/config"]
    mounts = [(volume / "batchwright", "/var/lib/batchwright")]
    log = tmp_path / "log"
    server = Namespace(image.root, command, log, user=65532, env=env, mounts=mounts)

    def handles_sigterm():
        first = server.first()
        if not first or Path(f"/proc/{first}/comm").read_text() != "batchwright\n":
            return False
        return handles(first, signal.SIGTERM)

    try:
        # The kernel drops a signal to the first process that has no handler for it.
        wait_for(handles_sigterm, what="a handler")
        os.kill(server.first(), signal.SIGTERM)
        text = (image.root / "etc/batchwright/batchwright.toml").read_bytes()
        wait_for(lambda: write_to_reader(config, text), what="a reader of the settings")
        assert server.child.wait(timeout=30) == 0
        assert "listening" not in log.read_text()
    finally:
        server.kill()


@needs_root_and("buildah", "unshare", "nsenter", "setpriv")
def test_container_without_a_key_says_what_to_do(image, tmp_path):
    root, config = image.root, image.config
    command = [*config["Entrypoint"], *config["Cmd"]]
    volume = tmp_path / "volume"
    run("cp", "--archive", root / "var/lib/batchwright", volume)
    mounts = [(volume, "/var/lib/batchwright")]
    log = tmp_path / "log"
    server = Namespace(root, command, log, user=65532, env=env_of(config), mounts=mounts)
    try:
        assert server.child.wait(timeout=30) != 0
        assert "first_admin_key" in log.read_text(), log.read_text()
    finally:
        server.kill()


def test_dockerfile_has_no_fault_that_hadolint_knows():
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [hadolint, "--ignore", "DL3006", DOCKERFILE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
