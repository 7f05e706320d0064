//! Worlds of the contract: which kind of plugin a component is, how it is linked and instantiated.
//!
//! Callers see no version: the newest version of the contract that a component exports decides
//! which of the `bindings` serve it.

use wasmtime::component::{InstancePre, Linker};
use wasmtime::{AsContextMut, Store};

use crate::contract::bindings::v0_1;
use crate::contract::guest_log::GuestLog;
use crate::contract::types::Kind;

pub(crate) use v0_1::Exports;

/// Version of the contract that the host implements.
pub(crate) const VERSION: &str = "0.1.0";

/// Linked component, from which instances are created.
pub(crate) struct Template<T: 'static>(v0_1::Template<T>);

/// Adds the imports of the contract, which is the log, to a linker.
pub(crate) fn add_to_linker<T: GuestLog>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    v0_1::add_to_linker(linker)
}

/// Determines the kind of a component from the names of the interfaces that it exports.
pub(crate) fn kind_of(exports: &[String]) -> Result<Kind, String> {
    let has = |interface: &str| exports.iter().any(|name| same_interface(name, interface));
    let kind = match (has(v0_1::VALIDATION), has(v0_1::INFERENCE)) {
        (true, false) => Kind::Validator,
        (false, true) => Kind::Adapter,
        (true, true) => {
            return Err(
                "exports both `validation` and `inference`; a plugin is one or the other".into()
            );
        }
        (false, false) => {
            return Err(format!(
                "exports {}, where a plugin exports {} or {}; build it for the world `validator` \
                 or `adapter` of batchwright:plugin@{VERSION}",
                list(exports),
                v0_1::VALIDATION,
                v0_1::INFERENCE,
            ));
        }
    };
    if !has(v0_1::PLUGIN) {
        return Err(format!("exports {}, but not {}", list(exports), v0_1::PLUGIN));
    }
    Ok(kind)
}

impl<T: Send + 'static> Template<T> {
    /// Creates a template from a linked component; fails if an export has other types than the
    /// contract.
    pub(crate) fn new(
        linked: InstancePre<T>,
        kind: Kind,
        exports: &[String],
    ) -> wasmtime::Result<Self> {
        let has = |interface| exports.iter().any(|name| same_interface(name, interface));
        let optional = (has(v0_1::CLASSIFICATION), has(v0_1::STREAMING));
        v0_1::Template::new(linked, kind, optional).map(Self)
    }

    /// Creates an instance and returns its functions.
    pub(crate) async fn instantiate(&self, store: &mut Store<T>) -> wasmtime::Result<Exports> {
        self.0.instantiate(store.as_context_mut()).await
    }

    /// Returns true if the component exports the optional interface `classification`.
    pub(crate) fn classifies(&self) -> bool {
        self.0.classifies()
    }

    /// Returns true if the component exports the optional interface `streaming`.
    pub(crate) fn streams(&self) -> bool {
        self.0.streams()
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}

/// Returns true if an interface has the known name and the same major and minor version.
fn same_interface(name: &str, known: &str) -> bool {
    let (Some((name, version)), Some((known, known_version))) =
        (name.split_once('@'), known.split_once('@'))
    else {
        return false;
    };
    let minor_line = |version: &str| {
        semver::Version::parse(version).ok().map(|version| (version.major, version.minor))
    };
    name == known
        && minor_line(version).is_some()
        && minor_line(version) == minor_line(known_version)
}
