//! `plugin inspect | check | list | test`, for plugins that ship and for files with faults.

use std::path::Path;

use tempfile::TempDir;

use crate::{batchwright, built, check, report};

fn plugin(folder: &Path, arguments: &[&str]) -> String {
    report(&batchwright(folder).arg("plugin").args(arguments).output().unwrap())
}

#[test]
fn plugin_inspect() {
    for name in ["validator-standard", "one-model", "inference-openai", "inference-echo"] {
        let file = built("dist/plugins").join(format!("{name}.wasm"));
        let text = plugin(Path::new("/"), &["inspect", file.to_str().unwrap()]);
        check(&format!("plugin-inspect-{name}"), &text);
    }
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("text.wasm"), "not a component").unwrap();
    let texts = ["text.wasm", "missing.wasm"].map(|file| plugin(folder.path(), &["inspect", file]));
    check("plugin-inspect-errors", &texts.concat());
}

#[test]
fn plugin_test() {
    for name in ["validator-standard", "inference-openai", "inference-echo"] {
        let file = built("dist/plugins").join(format!("{name}.wasm"));
        let mut arguments = vec!["test", file.to_str().unwrap()];
        if name == "inference-openai" {
            arguments.extend(["--settings", r#"{"base_url":"https://models.example.com/v1"}"#]);
        }
        check(&format!("plugin-test-{name}"), &plugin(Path::new("/"), &arguments));
    }
}

/// Plugin files, each with one fault.
const FAULTY: [(&str, &str); 14] = [
    ("not-toml", "component = "),
    ("no-component", "models = [\"a\"]"),
    ("missing-component", "component = \"missing.wasm\"\nmodels = [\"a\"]"),
    ("absolute-component", "component = \"/etc/passwd\"\nmodels = [\"a\"]"),
    ("unknown-key", "component = \"inference-echo.wasm\"\nmodel = [\"a\"]"),
    ("no-models", "component = \"inference-echo.wasm\""),
    ("models-of-validator", "component = \"validator-standard.wasm\"\nmodels = [\"a\"]"),
    (
        "unknown-limit",
        "component = \"inference-echo.wasm\"\nmodels = [\"a\"]\n[limits]\nmemry = \"1MiB\"",
    ),
    (
        "limit-zero",
        "component = \"inference-echo.wasm\"\nmodels = [\"a\"]\n[limits]\nmax_in_flight = 0",
    ),
    (
        "limit-unit",
        "component = \"inference-echo.wasm\"\nmodels = [\"a\"]\n[limits]\ncall_timeout = 5",
    ),
    (
        "setting-missing",
        "component = \"inference-openai.wasm\"\nmodels = [\"a\"]\n[credentials]\n\
         api_key = \"env:HOME\"",
    ),
    (
        "secret-in-file",
        "component = \"inference-openai.wasm\"\nmodels = [\"a\"]\n\
         [settings]\nbase_url = \"https://m.example.com/v1\"\n\
         [credentials]\napi_key = \"sk-1234567890abcdef\"",
    ),
    (
        "variable-unset",
        "component = \"inference-openai.wasm\"\nmodels = [\"a\"]\n\
         [settings]\nbase_url = \"https://m.example.com/v1\"\n\
         [credentials]\napi_key = \"env:NO_SUCH_VARIABLE\"",
    ),
    (
        "plain-http",
        "component = \"inference-openai.wasm\"\nmodels = [\"a\"]\n\
         [settings]\nbase_url = \"http://m.example.com/v1\"\n\
         [credentials]\napi_key = \"env:COLUMNS\"",
    ),
];

/// A directory with the components that ship and these files.
fn directory(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for file in ["validator-standard.wasm", "inference-openai.wasm", "inference-echo.wasm"] {
        std::fs::copy(built("dist/plugins").join(file), folder.path().join(file)).unwrap();
    }
    for (name, text) in files {
        std::fs::write(folder.path().join(format!("{name}.toml")), text).unwrap();
    }
    folder
}

#[test]
fn plugin_check_of_faulty_files() {
    let folder = directory(&FAULTY);
    for (name, _) in FAULTY {
        let file = format!("{name}.toml");
        check(&format!("plugin-check-{name}"), &plugin(folder.path(), &["check", &file]));
    }
}

#[test]
fn plugin_list() {
    let shipped = "component = \"inference-echo.wasm\"\nmodels = [\"echo\"]";
    let folder = directory(&[
        ("standard", "component = \"validator-standard.wasm\""),
        ("echo", shipped),
        ("echo-again", shipped),
        ("off", "component = \"inference-echo.wasm\"\nmodels = [\"b\"]\nenabled = false"),
        ("faulty", "component = \"missing.wasm\"\nmodels = [\"a\"]"),
    ]);
    check("plugin-list", &plugin(folder.path(), &["list", "--plugins", "."]));
    check("plugin-check-directory", &plugin(folder.path(), &["check", "."]));
    let empty = TempDir::new().unwrap();
    check("plugin-list-empty", &plugin(empty.path(), &["list", "--plugins", "."]));
}
