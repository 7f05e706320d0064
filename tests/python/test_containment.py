"""Hostile plugins and hostile providers, each contained with an error that names a remedy.

Attacks: endless loops, memory and table growth, contract violations, forged responses, responses
without end, WASI. Another batch runs at the same time and must not be affected.
"""

import pathlib
import shutil

import pytest
from conftest import CONTAINED, built, chat, wait_for
from containment import assert_contained, run_cases

pytestmark = pytest.mark.quiet


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


def test_new_instance_out_of_memory_fails_without_a_second_call(hostile):
    server = hostile('[limits]\nisolation = "per-call"\nmax_memory = "16MiB"\n')
    batch = server.run([chat("memory", model="hostile")])
    _, errors = server.results(batch)
    assert [line["error"]["code"] for line in errors] == ["plugin_out_of_memory"]
    assert server.logged().count("fills its memory") == 1


def test_growing_instance_is_replaced_without_failed_lines(serve):
    """Grows an instance up to its memory limit; a new instance must replace it."""
    server = serve()
    (server.plugins / "tight.toml").write_text(
        'component = "inference-echo.wasm"\nmodels = ["tight"]\n[limits]\nmax_memory = "6MiB"\n'
    )
    wait_for(lambda: "tight" in server.models(), what="the plugin")
    sizes = [1000, 100_000, 200_000, 300_000] * 10
    batch = server.run(
        [chat(str(number), "x" * size, "tight") for number, size in enumerate(sizes)]
    )
    assert batch.request_counts.completed == len(sizes), batch.request_counts
