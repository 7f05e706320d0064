"""What systemd is told by a server, and the unit file."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import chat, wait_for

UNIT = Path(__file__).parents[2] / "deploy/systemd/batchwright.service"


class Supervisor:
    """Socket that gets the notifications of a service, as systemd has it."""

    def __init__(self, folder):
        self.path = str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(30)
        self.got = []

    def until(self, wanted):
        """Returns the notification that has a text, and keeps those before it."""
        while True:
            message = self.socket.recv(4096).decode()
            self.got.append(message)
            if wanted in message:
                return message


@pytest.fixture
def supervisor(tmp_path):
    return Supervisor(tmp_path)


def environment(supervisor):
    return {"NOTIFY_SOCKET": supervisor.path, "WATCHDOG_USEC": "600000"}


def test_supervisor_is_told_of_start_reload_life_and_stop(serve, supervisor, stub, tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text('[execution]\nshutdown_grace = "2h"\n')
    server = serve(
        "--config",
        config,
        env=environment(supervisor),
        plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 1\n")},
    )
    ready = supervisor.until("READY=1")
    assert f"STATUS=serving on {server.url}" in ready
    # A start that takes long, because of a migration, is given the time.
    assert any("EXTEND_TIMEOUT_USEC=60000000" in message for message in supervisor.got)
    for _ in range(3):
        supervisor.until("WATCHDOG=1")
    server.child.send_signal(signal.SIGHUP)
    reloading = supervisor.until("RELOADING=1")
    assert re.search(r"MONOTONIC_USEC=\d+", reloading)
    assert "failed" not in supervisor.until("READY=1")
    # A reload that fails ends, too.
    config.write_text("[execution]\nshutdown_grace = 5x\n")
    server.child.send_signal(signal.SIGHUP)
    supervisor.until("RELOADING=1")
    assert "the last reload failed" in supervisor.until("READY=1")
    server.create([chat("a", "!delay 3000 slow", model="m")])
    wait_for(lambda: stub.counts(), what="the request")
    server.child.send_signal(signal.SIGTERM)
    stopping = supervisor.until("STOPPING=1")
    # The time is that of the settings, and more than the typed field of 71 minutes could hold.
    asked = int(re.search(r"EXTEND_TIMEOUT_USEC=(\d+)", stopping)[1])
    assert asked > 7200 * 1_000_000
    # The server lives while it drains.
    supervisor.until("WATCHDOG=1")
    assert server.child.wait(30) == 0


def test_supervisor_that_reads_nothing_delays_nothing(serve, supervisor, stub):
    environment_of_server = {**environment(supervisor), "WATCHDOG_USEC": "30000"}
    server = serve(env=environment_of_server, plugins={"p": stub.plugin(["m"])})
    # The socket holds some ten notifications, and the server sends a hundred each second.
    time.sleep(1)
    batch = server.create([chat("a", "hi", model="m")])
    assert server.ended(batch.id).status == "completed"
    assert server.stop() == 0


def test_server_survives_its_supervisor(serve, supervisor, stub):
    server = serve(env=environment(supervisor), plugins={"p": stub.plugin(["m"])})
    supervisor.until("READY=1")
    supervisor.socket.close()
    os.unlink(supervisor.path)
    batch = server.create([chat("a", "hi", model="m")])
    assert server.ended(batch.id).status == "completed"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_timer_and_service_of_the_backup_are_valid(tmp_path):
    for file in UNIT.parent.glob("batchwright-backup.*"):
        text = file.read_text().replace("/usr/bin/batchwright", shutil.which("true"))
        (tmp_path / file.name).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "batchwright-backup.timer"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    ours = [line for line in checked.stderr.splitlines() if "batchwright-backup" in line]
    assert checked.returncode == 0 and not ours, checked.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_unit_file_is_valid_and_hardened(tmp_path):
    # The program of the unit is installed elsewhere than here.
    text = UNIT.read_text().replace("/usr/bin/batchwright", shutil.which("true"))
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60
    )
    of_unit = [line for line in checked.stderr.splitlines() if UNIT.name in line]
    assert checked.returncode == 0 and not of_unit, checked.stderr
    # The score is documented; the threshold has one digit more.
    command = [
        "systemd-analyze",
        "security",
        "--offline=true",
        "--threshold=14",
        "--no-pager",
        unit,
    ]
    scored = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert scored.returncode == 0, scored.stdout
    settings = [line.split("=")[0] for line in text.splitlines() if not line.startswith("#")]
    assert "MemoryDenyWriteExecute" not in settings, "compiled plugin code could not run"
