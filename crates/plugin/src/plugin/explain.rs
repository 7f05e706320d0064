//! Errors of calls: which limit a call exceeded, or why it trapped.

use batchwright_domain::text::printable;
use wasmtime::Trap;

use crate::error::CallError;
use crate::package::limits::Limits;
use crate::plugin::Plugin;
use crate::sandbox::engine::GUEST_STACK_BYTES;
use crate::sandbox::instance::{CpuTimeExceeded, DeadlineExceeded, Refused};
use crate::sandbox::log::RecentOutput;

/// Converts the error of a call into the limit that the call exceeded, or into a trap.
pub(crate) fn explain(
    plugin: &str,
    limits: &Limits,
    function: &'static str,
    error: &wasmtime::Error,
    refused: Option<Refused>,
    output: &RecentOutput,
) -> CallError {
    let plugin = plugin.to_owned();
    if error.is::<CpuTimeExceeded>() {
        return CallError::Cpu { plugin, function, limit: limits.call_timeout.to_string() };
    }
    if error.is::<DeadlineExceeded>() {
        return CallError::DeadlineExceeded { plugin, function };
    }
    match refused {
        Some(Refused::Memory) => {
            return CallError::Memory { plugin, function, limit: limits.max_memory.to_string() };
        }
        Some(Refused::Table) => {
            return CallError::Table { plugin, function, limit: limits.max_table_elements.get() };
        }
        None => {}
    }
    if error.downcast_ref::<Trap>() == Some(&Trap::StackOverflow) {
        return CallError::Stack {
            plugin,
            function,
            limit: format!("{}KiB", GUEST_STACK_BYTES >> 10),
        };
    }
    let message = printable(&error.root_cause().to_string(), 500);
    if message.contains("fuel allocated for hostcalls") {
        return CallError::Answer { plugin, function, limit: limits.max_output.to_string() };
    }
    if message.contains("store handle limit exceeded") {
        return CallError::Handles { plugin, function, limit: limits.max_handles.get() };
    }
    CallError::Trap { plugin, function, message, output: output.joined() }
}

impl Plugin {
    /// Converts and logs the error of a call.
    pub(crate) fn explain(
        &self,
        function: &'static str,
        error: &wasmtime::Error,
        refused: Option<Refused>,
        output: &RecentOutput,
    ) -> CallError {
        self.logged(explain(&self.facts.name, &self.facts.limits, function, error, refused, output))
    }

    /// Logs and counts an error for the operator and returns it.
    pub(super) fn logged(&self, error: CallError) -> CallError {
        self.count(&error);
        self.runtime.log.write_call_error(&error.detail());
        error
    }

    /// Counts and returns the error of a call that returned a value which the contract forbids.
    pub fn contract_violation(&self, function: &'static str, message: String) -> CallError {
        let error = CallError::Contract { plugin: self.facts.name.clone(), function, message };
        self.count(&error);
        error
    }

    /// Counts a failed call.
    fn count(&self, error: &CallError) {
        let (metrics, plugin) = (&self.runtime.instances.metrics, &self.facts.name);
        match error {
            CallError::Cpu { function, .. } => metrics.failed(plugin, function, "cpu_time"),
            CallError::DeadlineExceeded { function, .. } => {
                metrics.failed(plugin, function, "deadline");
            }
            CallError::Memory { function, .. } => metrics.failed(plugin, function, "memory"),
            CallError::Table { function, .. } => metrics.failed(plugin, function, "table"),
            CallError::Handles { function, .. } => metrics.failed(plugin, function, "handles"),
            CallError::Stack { function, .. } => metrics.failed(plugin, function, "stack"),
            CallError::Answer { function, .. } => metrics.failed(plugin, function, "output"),
            CallError::Trap { function, .. } => metrics.failed(plugin, function, "trap"),
            CallError::Configure { .. } => metrics.failed(plugin, "configure", "rejected"),
            CallError::Contract { function, .. } => metrics.violated(plugin, function),
        }
    }
}
