"""Settings: every error at once, and where each value comes from."""

import tomllib

from conftest import run_host


def test_check_names_every_error_with_its_line(tmp_path):
    config = tmp_path / "batchwright.toml"
    config.write_text(
        '[server]\nlisten = "nowhere"\nlog_filter = "loud"\n\n[batch]\nmax_file_size = "much"\n'
        "unknown = 1\n"
    )
    done = run_host("config", "check", "--config", config, "--retry-backoff", "soon")
    assert done.returncode == 3 and not done.stdout
    for part in (
        "line 2: listen",
        "line 3: log_filter",
        "line 6: max_file_size",
        "line 7: there is no setting `unknown`",
        "--retry-backoff",
    ):
        assert part in done.stderr, part


def test_check_reads_the_files_that_the_settings_name(tmp_path):
    missing = tmp_path / "missing"
    done = run_host(
        "config",
        "check",
        "--plugins",
        missing,
        "--tls-certificate",
        missing,
        "--tls-key",
        missing,
        "--credential-key",
        f"file:{missing}",
        env={"BATCHWRIGHT_LISSTEN": "x"},
    )
    assert done.returncode == 3
    for part in ("tls_certificate", "credential_key", "plugin directory", "BATCHWRIGHT_LISTEN"):
        assert part in done.stderr, done.stderr
    (tmp_path / "plugins").mkdir()
    done = run_host("config", "check", "--plugins", tmp_path / "plugins")
    assert (done.returncode, done.stdout) == (0, "the settings are valid\n"), done.stderr


def test_show_says_where_each_value_comes_from_and_can_be_read_back(tmp_path):
    config = tmp_path / "batchwright.toml"
    config.write_text('[execution]\nmax_attempts = 3\nretry_backoff = "2s"\n')
    (tmp_path / "plugins").mkdir()
    arguments = ["--config", config, "--retry-backoff", "5s", "--plugins", tmp_path / "plugins"]
    env = {
        "BATCHWRIGHT_MAX_FILE_SIZE": "10MiB",
        "BATCHWRIGHT_OTLP_ENDPOINT": "https://user:planted-password@collector.example.com/",
    }
    done = run_host("config", "show", *arguments, env=env)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert f'max_attempts = "3" # {config}: line 2' in shown
    assert 'retry_backoff = "5s" # --retry-backoff' in shown
    assert 'max_file_size = "10MiB" # BATCHWRIGHT_MAX_FILE_SIZE' in shown
    assert "max_in_flight" not in shown and 'listen = "127.0.0.1:8080" # default' in shown
    assert "# admin_listen is not set (default)" in shown
    assert "planted-password" not in shown and "collector.example.com" in shown
    settings = tomllib.loads(shown)
    assert settings["execution"]["retry_backoff"] == "5s"
    again = tmp_path / "again.toml"
    again.write_text(shown)
    checked = run_host("config", "check", "--config", again)
    assert checked.returncode == 0, checked.stderr
    changed = run_host("config", "show", "--changed", *arguments, env=env).stdout
    assert "max_attempts" in changed and "listen =" not in changed
