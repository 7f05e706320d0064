"""Plugins that are refused before the first request, each with an error that names a remedy.

Attacks: hostile, damaged and wrong components, plugin files with mistakes, pipes, endless files.
"""

import json
import os

from conftest import CONTAINED, built, load_errors, plugin_states, wait_for
from containment import compilers_of

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
