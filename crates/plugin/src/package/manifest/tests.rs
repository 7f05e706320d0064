//! Tests of `manifest`.

use batchwright_domain::units::{Size, Span};

use super::*;

fn parse(text: &str) -> Result<Manifest, String> {
    Manifest::parse(Path::new("plugins/x.toml"), text).map_err(|error| error.to_string())
}

#[test]
fn manifest_parse_reads_keys_and_fills_in_defaults() {
    let manifest = parse(
        "component = 'x.wasm'\nmodels = ['a', 'b-*']\n[aliases]\nc = 'd'\n[settings]\n\
         base_url = 'http://h/v1'\n[credentials]\napi_key = 'env:KEY'\n[limits]\n\
         max_memory = '32MiB'\nrequests_per_minute = 3000\n",
    )
    .unwrap();
    assert_eq!(manifest.limits.max_memory, Size::mib(32));
    assert_eq!(manifest.limits.call_timeout, Span::milliseconds(100));
    assert_eq!(manifest.settings.get("base_url"), Some(&"http://h/v1".into()));
}

#[test]
fn manifest_errors_name_file_and_location_but_no_secret() {
    for (text, parts) in [
        ("component = 'x.wasm'\nmodel = ['a']", vec!["plugins/x.toml", "line 2", "model"]),
        ("component = '../x.wasm'", vec!["component", "leads out"]),
        ("component = '/x.wasm'", vec!["component", "leads out"]),
        ("component = 'x.wasm'\n[limits]\nmax_memory = '5GiB'", vec!["limits.max_memory", "4GiB"]),
        ("component = 'x.wasm'\n[limits]\nmax_in_flight = 0", vec!["line 3"]),
        (
            "component = 'x.wasm'\n[limits]\nconcurrency = 8",
            vec!["line 3", "this limit is called `max_in_flight`"],
        ),
        ("component = 'x.wasm'\n[limits]\ncall_timeout = 'long'", vec!["line 3", "100ms"]),
        (
            "component = 'x.wasm'\n[limits]\nmax_table_elements = 1000000",
            vec!["limits.max_table_elements", "100000"],
        ),
        (
            "component = 'x.wasm'\n[aliases]\na = 'b'\nb = 'c'\nc = 'b'",
            vec!["aliases", "`b` = `c`, `c` = `b` is a cycle"],
        ),
        ("component = 'x.wasm'\n[aliases]\na = 'a'", vec!["aliases", "`a` = `a` is a cycle"]),
        ("", vec!["component"]),
    ] {
        let error = parse(text).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "`{part}` is missing from: {error}");
        }
    }
    let error = parse("component = 'x.wasm'\n[credentials]\napi_key = 'sk-secret'").unwrap_err();
    assert!(error.contains("credentials.api_key") && error.contains("env:NAME"), "{error}");
    assert!(!error.contains("sk-secret"), "{error}");
    let error = parse("component = 'x.wasm'\n[credentials]\napi_key = sk-secret").unwrap_err();
    assert!(
        error.contains("line 3") && error.contains("api_key") && !error.contains("sk-secret"),
        "{error}"
    );
}
