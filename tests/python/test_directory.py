"""Plugin directories: symlinks, renames, Kubernetes mounts, editor files, inotify exhaustion."""

import os
import resource
import shutil
import time

import pytest
from conftest import PLUGINS, plugin_states, run_host, wait_for


def swap(link, to):
    """Replaces a symlink atomically, as Kubernetes does."""
    beside = link.with_name(link.name + "_tmp")
    beside.symlink_to(to)
    os.replace(beside, link)


@pytest.mark.parametrize("kind", ["link", "renamed", "kubernetes"])
def test_plugin_directory_changes_are_seen_for_links_renames_and_kubernetes(serve, tmp_path, kind):
    def version(name, model):
        folder = tmp_path / name
        folder.mkdir()
        for file in ["inference-echo.wasm", "validator-standard.wasm", "standard.toml"]:
            shutil.copy(PLUGINS / file, folder)
        (folder / "echo.toml").write_text(
            f'component = "inference-echo.wasm"\nmodels = ["{model}"]\n'
        )
        return folder

    home = tmp_path / "server"
    home.mkdir()
    one = version("one", "first")
    plugins = home / "plugins"
    if kind == "link":
        plugins.symlink_to(one)
    elif kind == "renamed":
        one.rename(plugins)
    else:
        plugins.mkdir()
        (plugins / "..data").symlink_to(one)
        for file in one.iterdir():
            (plugins / file.name).symlink_to(f"..data/{file.name}")
    server = serve()
    assert server.models() == ["first"]
    for number in range(3):
        two = version(f"next-{number}", f"model-{number}")
        if kind == "link":
            swap(plugins, two)
        elif kind == "renamed":
            plugins.rename(tmp_path / f"old-{number}")
            two.rename(plugins)
        else:
            swap(plugins / "..data", two)
        wait_for(lambda: server.models() == [f"model-{number}"], 20, "the changed plugin")
        # A file edited in place is seen too.
        echo = (plugins / "echo.toml").resolve()
        echo.write_text(echo.read_text().replace(f"model-{number}", f"edited-{number}"))
        wait_for(lambda: server.models() == [f"edited-{number}"], 20, "the edit")


def test_plugin_directory_ignores_editor_files_and_survives_a_missing_mount(serve):
    server = serve()
    for name in ["._echo.toml", ".#echo.toml", ".echo.toml.swp"]:
        (server.plugins / name).write_text("\x00binary")
    (server.plugins / "other.toml").write_text(
        'component = "inference-echo.wasm"\nmodels = ["other"]\n'
    )
    wait_for(lambda: "other" in server.models(), what="the plugin")
    listed = run_host("plugin", "list", "--plugins", server.plugins)
    assert listed.returncode == 0 and "._echo" not in listed.stdout
    server.plugins.rename(server.folder / "away")
    wait_for(
        lambda: "plugin directory not read, plugins unchanged" in server.logged(),
        20,
        "the log message",
    )
    assert server.models() == ["echo", "other"]


def test_model_owner_is_kept_after_restart(serve):
    server = serve()
    (server.plugins / "a-second.toml").write_text(
        'component = "inference-echo.wasm"\nmodels = ["echo"]\n'
    )
    wait_for(
        lambda: "served by the plugin `echo` already" in server.logged(),
        what="the error in the log",
    )
    server.stop()
    server.start()
    assert [model.owned_by for model in server.client.models.list()] == ["echo"]
    checked = run_host("plugin", "check", server.plugins)
    assert checked.returncode == 1 and "already" in checked.stdout
    assert run_host("plugin", "list", "--plugins", server.plugins).returncode == 1


# Another test would free a watch meanwhile.
@pytest.mark.quiet
def test_inotify_exhaustion_is_logged_and_replaced_by_polling(serve):
    with open("/proc/sys/fs/inotify/max_user_instances") as file:
        max_instances = int(file.read())
    if max_instances > 5000 or os.geteuid() != 0:
        pytest.skip("the system allows too many watches to exhaust in a test")
    watches = []
    try:
        import ctypes

        libc = ctypes.CDLL(None)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        while (watch := libc.inotify_init()) >= 0:
            watches.append(watch)
        server = serve()
        wait_for(lambda: "by polling" in server.logged(), what="the log message")
        (server.plugins / "other.toml").write_text(
            'component = "inference-echo.wasm"\nmodels = ["other"]\n'
        )
        wait_for(lambda: "other" in server.models(), 20, "the changed plugin")
    finally:
        for watch in watches:
            os.close(watch)


def test_component_is_found_in_a_folder_of_components_and_replaced_there(serve, tmp_path):
    components = tmp_path / "components"
    components.mkdir()
    other = tmp_path / "empty"
    other.mkdir()
    server = serve("--components", f"{other},{components}", plugins={})
    for name in ["echo", "mine"]:
        server.add_plugin(name, f'component = "{name}.wasm"\nmodels = ["{name}"]\n')
    wait_for(lambda: "nor in" in server.logged(), what="the error of a missing component")
    # The files are no longer new, so nothing but their names makes the server look.
    time.sleep(4)
    # A component that appears later, and one that takes the place of another, are noticed.
    for name in ["echo", "mine"]:
        shutil.copy(PLUGINS / "inference-echo.wasm", components / f"{name}.wasm")
    wait_for(lambda: server.models() == ["echo", "mine"], what="both models")
    shutil.copy(PLUGINS / "inference-openai.wasm", components / "new.wasm")
    (components / "new.wasm").rename(components / "mine.wasm")
    wait_for(lambda: 'plugin="mine" error=' in server.logged(), what="another component")
    # Beside the plugin file is looked first.
    shutil.copy(PLUGINS / "inference-echo.wasm", server.plugins / "mine.wasm")
    wait_for(lambda: plugin_states(server)["mine"]["state"] == "loaded", what="the one beside")
    # A file cannot lead out of these folders.
    server.add_plugin("bad", f'component = "{components}/echo.wasm"\nmodels = ["bad"]\n')
    wait_for(lambda: "leads out of the plugin directory" in server.logged(), what="an error")
