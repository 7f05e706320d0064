"""The Debian package on a booted Debian 12, under its systemd.

The commands of the documentation run as they are written.
"""

import json
import re
from platform import node

import pytest
import trustme
from booted import Machine
from conftest import ROOT, chat, jsonl, wait_for
from packages import needs_root_and, newer

pytestmark = needs_root_and("debootstrap", "unshare", "nsenter", "systemd-nspawn")

PAGE = ROOT / "docs/operating/packages.md"
# Name of the server in the page.
NAME = "batch.example.com"
HEALTHY = ("batchwright", "health", "--config", "/etc/batchwright/batchwright.toml")
# What an operator types into the editor that `sudoedit` opens.
EDITOR = '#!/bin/sh\nsed --in-place "$EDIT" "$1"\n'


def documented():
    """Returns the blocks of the page that this file runs."""
    block = r"<!-- not run: [^>]*test_boot\.py runs it[^>]*-->\n```sh\n(.*?)^```$"
    return re.findall(block, PAGE.read_text(), re.M | re.S)


@pytest.fixture
def machine(debian, release, tmp_path):
    with Machine(debian, tmp_path) as booted:
        (package,) = release.glob("*.deb")
        booted.write("/root/edit", EDITOR)
        # Nobody answers the question of a downgrade.
        booted.write("/etc/apt/apt.conf.d/99-test", 'APT::Get::Assume-Yes "true";\n')
        (booted.root / "root/edit").chmod(0o755)
        (booted.root / "root" / package.name).write_bytes(package.read_bytes())
        yield booted


def type_in(machine, block, edit="", folder="/root"):
    """Runs a block of the page in one shell, as it is; returns what it prints."""
    # Output of `systemctl status` is not paged, because it is no terminal.
    script = f"cd {folder}; export EDITOR=/root/edit EDIT='{edit}'\n{block}\nexport -p"
    return machine.run("bash", "-euo", "pipefail", "-c", script)


def is_alive(machine, process):
    return machine.call("test", "-e", f"/proc/{process}").returncode == 0


def wait_until_healthy(machine, check="ready"):
    wait_for(
        lambda: machine.call(*HEALTHY, "--check", check).returncode == 0,
        what=lambda: f"a server that is {check}: {machine.journal()}",
    )


def create(machine, number, env=None, content="hi"):
    """Creates a batch; returns its id."""
    (machine.root / "root/in.jsonl").write_bytes(
        jsonl([chat(f"line-{place}", content) for place in range(number)])
    )
    made = machine.run("batchwright", "batch", "create", "/root/in.jsonl", "--json", env=env)
    return json.loads(made)["id"]


def finished(machine, batch, env=None):
    """Waits for the end of a batch; returns its counts."""
    machine.run("batchwright", "batch", "watch", batch, env=env)
    shown = machine.run("batchwright", "batch", "get", batch, "--json", env=env)
    return json.loads(shown)["request_counts"]


def test_page_leads_from_the_package_to_a_restored_server(machine, release, tmp_path):
    page = documented()
    _, install, open_to_others, renew, add_provider, back_up, restore, upgrade, go_back, doctor = (
        page
    )
    output = type_in(machine, install)
    assert machine.property("ActiveState") == "active" and "ok" in output
    assert machine.property("User") == "batchwright"
    assert finished(machine, create(machine, 3))["completed"] == 3

    # Open to other machines, with a certificate and a key.
    authority = trustme.CA()
    machine.write("/usr/local/share/ca-certificates/own.crt", authority.cert_pem.bytes().decode())
    machine.run("update-ca-certificates")
    machine.write("/etc/hosts", f"127.0.0.1 localhost {NAME} {node()}\n")

    def issue(folder):
        """Writes a certificate and its key; returns the serial number."""
        issued = authority.issue_cert(NAME)
        machine.write(f"{folder}/fullchain.pem", issued.cert_chain_pems[0].bytes().decode())
        machine.write(f"{folder}/privkey.pem", issued.private_key_pem.bytes().decode())
        return machine.run("openssl", "x509", "-in", f"{folder}/fullchain.pem", "-serial", "-noout")

    def served():
        ask = f"openssl s_client -connect {NAME}:8443 </dev/null 2>/dev/null"
        return machine.run("bash", "-c", f"{ask} | openssl x509 -serial -noout")

    first = issue("/root")
    listen = (
        's|^listen = .*|listen = "0.0.0.0:8443"\\n'
        'tls_certificate = "/etc/batchwright/tls.pem"\\ntls_key = "/etc/batchwright/tls.key"|'
    )
    output = type_in(machine, open_to_others, listen)
    assert "serving on https://0.0.0.0:8443" in output
    env = dict(re.findall(r'declare -x (BATCHWRIGHT_\w+)="(.*)"', output))
    assert env["BATCHWRIGHT_URL"] == f"https://{NAME}:8443"
    (key,) = set(re.findall(r"bw_\w+", output)) - {env["BATCHWRIGHT_ADMIN_KEY"]}
    client = {"BATCHWRIGHT_URL": env["BATCHWRIGHT_URL"], "BATCHWRIGHT_API_KEY": key}
    batch = create(machine, 3, client)
    assert finished(machine, batch, client)["completed"] == 3

    def status_of(batch):
        shown = machine.run("batchwright", "batch", "get", batch, "--json", env=client)
        return json.loads(shown)["status"]

    # A renewal reaches the server, which reads the files as its user.
    type_in(machine, renew)
    assert served() == first
    second = issue("/root/renewed")
    hook = "/etc/letsencrypt/renewal-hooks/deploy/batchwright"
    machine.run(hook, env={"RENEWED_LINEAGE": "/root/renewed"})
    wait_for(lambda: served() == second, what="the renewed certificate")

    # Faults, before there is a provider that cannot be reached here.
    output = type_in(machine, doctor)
    assert "can be written" in output and "certificate" in output
    assert "openai" in type_in(machine, add_provider)

    # A restored server has what was backed up, and is backed up itself from then on.
    type_in(machine, back_up)
    assert "batchwright-backup.timer" in machine.run("systemctl", "list-timers", "--no-pager")
    lost = create(machine, 1, client)
    finished(machine, lost, client)
    type_in(machine, restore)
    wait_until_healthy(machine)
    assert status_of(batch) == "completed"
    assert machine.call("batchwright", "batch", "get", lost, env=client).returncode != 0
    later = create(machine, 1, client)
    finished(machine, later, client)
    machine.run("systemctl", "start", "batchwright-backup.service")
    machine.run("mv", "/var/lib/batchwright.old", "/root")
    type_in(machine, restore)
    wait_until_healthy(machine)
    assert status_of(later) == "completed"

    # An upgrade and the way back, which loses what was done in between.
    (package,) = release.glob("*.deb")
    (machine.root / "root/newer").mkdir()
    update = newer(package, tmp_path)
    (machine.root / f"root/newer/{package.name}").write_bytes(update.read_bytes())
    type_in(machine, upgrade)
    wait_until_healthy(machine)
    installed = ("dpkg-query", "--show", "--showformat=${Version}", "batchwright")
    assert machine.run(*installed) == "9.9.9-1"
    lost = create(machine, 1, client)
    type_in(machine, go_back)
    wait_until_healthy(machine)
    assert machine.run(*installed) != "9.9.9-1"
    assert status_of(later) == "completed"
    assert machine.call("batchwright", "batch", "get", lost, env=client).returncode != 0


def test_archive_is_installed_as_the_page_says(machine, release):
    (archive,) = release.glob("*.tar.gz")
    (machine.root / "root/batchwright.tar.gz").write_bytes(archive.read_bytes())
    machine.run("tar", "--extract", "--file", "/root/batchwright.tar.gz", "--directory", "/root")
    install, *_ = documented()
    type_in(machine, install, folder="/root/batchwright")
    wait_until_healthy(machine)
    assert machine.property("User") == "batchwright"
    assert finished(machine, create(machine, 3))["completed"] == 3
    machine.run("systemctl", "start", "batchwright-backup.service")


def test_server_that_is_killed_or_hangs_is_restarted_and_answers_every_line(machine):
    machine.write(
        "/etc/systemd/system/batchwright.service.d/fast.conf",
        "[Service]\nWatchdogSec=5\nRestartSec=100ms\n",
    )
    machine.run("bash", "-c", "dpkg --install /root/*.deb")
    wait_until_healthy(machine)
    assert machine.property("WatchdogUSec") == "5s"
    batch = create(machine, 20_000)
    for signal in ["KILL", "STOP"]:
        before = machine.property("MainPID")
        machine.run("bash", "-c", f"kill -{signal} {before}")
        wait_for(
            lambda before=before: machine.property("MainPID") not in (before, "0"),
            what=f"another process after {signal}",
        )
        wait_until_healthy(machine)
    assert machine.property("NRestarts") == "2"
    assert finished(machine, batch) == {"total": 20_000, "completed": 20_000, "failed": 0}
    # A stop is a success, and is not restarted.
    machine.run("systemctl", "stop", "batchwright")
    assert (machine.property("Result"), machine.property("ActiveState")) == ("success", "inactive")


def test_invalid_settings_fail_once_and_say_what_is_wrong(machine):
    machine.run("bash", "-c", "dpkg --install /root/*.deb")
    wait_until_healthy(machine)
    settings = machine.root / "etc/batchwright/batchwright.toml"
    valid = settings.read_text()
    settings.write_text(valid + '\n[batch]\nmax_file_sise = "1GiB"\n')
    # A reload keeps the server and the former settings, and the status says so.
    machine.call("systemctl", "reload", "batchwright")
    wait_for(lambda: "the last reload failed" in machine.property("StatusText"), what="the status")
    assert machine.property("ActiveState") == "active"
    wait_for(lambda: "max_file_sise" in machine.journal(), what="the reason in the log")
    assert machine.call("systemctl", "restart", "batchwright").returncode != 0
    assert machine.property("ActiveState") == "failed"
    assert machine.property("NRestarts") == "0"
    assert machine.property("ExecMainStatus") == "3"
    wait_for(lambda: "did you mean `max_file_size`" in machine.journal(), what="the reason")
    settings.write_text(valid)
    machine.run("systemctl", "restart", "batchwright")
    wait_until_healthy(machine)


def test_upgrade_replaces_the_process_and_removal_ends_it(machine, release, tmp_path):
    machine.run("bash", "-c", "dpkg --install /root/*.deb")
    wait_until_healthy(machine)
    batch = create(machine, 3)
    finished(machine, batch)
    before = machine.property("MainPID")
    (package,) = release.glob("*.deb")
    update = newer(package, tmp_path)
    (machine.root / "root/newer.deb").write_bytes(update.read_bytes())
    machine.run("dpkg", "--install", "/root/newer.deb")
    wait_until_healthy(machine)
    after = machine.property("MainPID")
    assert after != before and not is_alive(machine, before)
    machine.run("batchwright", "batch", "get", batch)
    # What was stopped and disabled is not started by an upgrade.
    machine.run("systemctl", "disable", "--now", "batchwright")
    machine.run("dpkg", "--install", "/root/newer.deb")
    assert machine.property("ActiveState") == "inactive"
    machine.run("systemctl", "enable", "--now", "batchwright")
    wait_until_healthy(machine)
    last = machine.property("MainPID")
    machine.run("dpkg", "--purge", "batchwright")
    assert not is_alive(machine, last)
    assert (machine.root / "var/lib/batchwright/batchwright.db").exists()
