//! Log of guests.

/// Receiver of the log lines of a guest.
pub(crate) trait GuestLog: Send + 'static {
    /// Writes a log line of the guest.
    fn write(&mut self, level: tracing::Level, message: String);
}
