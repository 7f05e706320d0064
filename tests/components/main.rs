//! Shipped components, as built: their imports and exports, decoded from the bytes.
//!
//! A component without imports cannot reach out of its sandbox.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::path::Path;

use wit_component::DecodedWasm;

/// Returns the names of imports and exports of a component in `dist/plugins`.
fn world(file: &str) -> (Vec<String>, Vec<String>) {
    // Read at run time, because checkouts may share compiled tests.
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap();
    let path = Path::new(&here).join("../dist/plugins").join(file);
    let bytes = std::fs::read(&path)
        .unwrap_or_else(|error| panic!("{} ({error}); run `cargo xtask build`", path.display()));
    let DecodedWasm::Component(resolve, world) = wit_component::decode(&bytes).unwrap() else {
        panic!("{file} is not a component")
    };
    let world = &resolve.worlds[world];
    let names = |items: Vec<_>| items.iter().map(|key| resolve.name_world_key(key)).collect();
    (names(world.imports.keys().cloned().collect()), names(world.exports.keys().cloned().collect()))
}

#[test]
fn shipped_components_import_nothing() {
    for (file, export) in [
        ("validator-standard.wasm", "batchwright:plugin/validation@0.1.0"),
        ("one-model.wasm", "batchwright:plugin/validation@0.1.0"),
        ("inference-openai.wasm", "batchwright:plugin/inference@0.1.0"),
        ("inference-echo.wasm", "batchwright:plugin/inference@0.1.0"),
    ] {
        let (imports, exports) = world(file);
        assert!(
            imports.is_empty(),
            "{file} imports {imports:?}; shipped components must import nothing"
        );
        assert!(
            exports.iter().any(|name| name == export),
            "{file} exports {exports:?} without {export}"
        );
    }
}
