//! TLS of the API's listener: certificate and key from PEM files, which are read again when they
//! change.
//!
//! A renewed certificate takes effect without a restart. If the new files cannot be used, for
//! example because the key is not written yet, the previous certificate stays in use.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use batchwright_domain::clock::Clock;
use batchwright_telemetry::Error as MetricsError;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio_rustls::{Accept, TlsAcceptor};
use tokio_util::sync::CancellationToken;

use crate::metrics::HttpMetrics;

/// Time before the end of a certificate, in seconds, at which the log warns, as the alert does.
const EXPIRES_SOON: i64 = 7 * 86_400;

/// Interval between two warnings.
const WARNING_INTERVAL: Duration = Duration::from_secs(86_400);

/// Interval between two checks whether a file has changed.
const FILE_POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Maximum number of bytes that a connection buffers before it encrypts and sends them.
const MAX_BUFFER_BYTES: usize = 16 << 10;

/// Maximum number of certificates in a file.
const MAX_CERTIFICATES: usize = 100;

/// Protocols that clients can choose, in the order of preference.
const ALPN_PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Reason why a certificate and its key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// File that cannot be read or parsed; its path and the cause.
    #[error("{path}: {cause}")]
    File {
        /// Path of the file.
        path: String,
        /// Cause, and what the file should contain.
        cause: String,
    },
    /// Certificate and key that do not belong together, or are not supported.
    #[error("the certificate and the key cannot be used together: {0}")]
    Pair(rustls::Error),
    /// Configuration that the library refuses.
    #[error("TLS cannot be configured: {0}")]
    Configuration(rustls::Error),
}

/// TLS of a listener.
pub struct Tls {
    acceptor: TlsAcceptor,
    certificate: Arc<Certificate>,
    files: [PathBuf; 2],
    /// State of the files when they were read first.
    seen: FileStates,
    provider: Arc<CryptoProvider>,
    read_requested: Notify,
}

impl Tls {
    /// Reads a certificate chain and its private key from PEM files.
    pub fn open(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let files = [certificate.to_owned(), key.to_owned()];
        // A change between the two calls is found by the first poll.
        let seen = state_of(&files);
        let pair = read(certificate, key, &provider)?;
        let current = Arc::new(Certificate(ArcSwap::from_pointee(pair)));
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Configuration)?
            .with_no_client_auth()
            .with_cert_resolver(current.clone());
        config.alpn_protocols = ALPN_PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            certificate: current,
            files,
            seen,
            provider,
            read_requested: Notify::new(),
        })
    }

    /// Registers the end of the validity of the certificate that is in use.
    pub fn register_metrics(self: &Arc<Self>, metrics: &HttpMetrics) -> Result<(), MetricsError> {
        let certificate = self.certificate.clone();
        metrics.register_certificate(move || expires_at(&certificate.0.load()))
    }

    /// Returns the end of the validity of the certificate that is in use, in Unix seconds.
    pub fn expires_at(&self) -> Option<i64> {
        expires_at(&self.certificate.0.load())
    }

    /// Performs the handshake of a connection.
    pub(crate) fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> Accept<S> {
        // A client that reads slowly holds this much per connection.
        self.acceptor.accept_with(stream, |connection| {
            connection.set_buffer_limit(Some(MAX_BUFFER_BYTES));
        })
    }

    /// Reads the files again soon, although they seem unchanged.
    pub fn request_read(&self) {
        self.read_requested.notify_one();
    }

    /// Warns once a day of a certificate that expires soon.
    fn warn_of_expiry(&self, warned: &mut Option<Instant>) {
        let now = Clock::system().now().as_seconds();
        let Some(end) = self.expires_at().filter(|end| end.saturating_sub(now) < EXPIRES_SOON)
        else {
            *warned = None;
            return;
        };
        if warned.is_none_or(|at| at.elapsed() >= WARNING_INTERVAL) {
            *warned = Some(Instant::now());
            let hours = end.saturating_sub(now) / 3600;
            if end <= now {
                tracing::error!("certificate has expired; renew its files");
            } else {
                tracing::warn!(hours, "certificate expires soon; renew its files");
            }
        }
    }

    /// Reads the files again when they change, until `closing`. A failed read is repeated.
    pub async fn watch(self: Arc<Self>, closing: CancellationToken) {
        let (mut in_use, mut reported) = (self.seen, None);
        let mut warned = None;
        loop {
            self.warn_of_expiry(&mut warned);
            let pause = async {
                tokio::select! {
                    () = tokio::time::sleep(FILE_POLL_INTERVAL) => false,
                    () = self.read_requested.notified() => true,
                }
            };
            let Some(is_requested) = closing.run_until_cancelled(pause).await else { return };
            let now = state_of(&self.files);
            if now == in_use && !is_requested {
                continue;
            }
            if is_requested {
                // A failure is reported once more.
                reported = None;
            }
            let tls = self.clone();
            // Reading blocks.
            let reading = tokio::task::spawn_blocking(move || {
                let [certificate, key] = &tls.files;
                read(certificate, key, &tls.provider)
            });
            match reading.await {
                Ok(Ok(pair)) => {
                    self.certificate.0.store(Arc::new(pair));
                    in_use = now;
                    tracing::info!("certificate replaced");
                }
                Ok(Err(error)) if reported != Some(now) => {
                    reported = Some(now);
                    tracing::warn!(%error, "certificate not replaced, previous one still in use");
                }
                Ok(Err(_)) => {}
                Err(error) => tracing::warn!(%error, "certificate not read"),
            }
        }
    }
}

/// Inode, modification time and size of two files; none for a file that is missing.
type FileStates = [Option<(u64, i64, i64, u64)>; 2];

/// Returns what changes when a file is written or replaced, also through a link.
fn state_of([certificate, key]: &[PathBuf; 2]) -> FileStates {
    let state = |path: &PathBuf| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.ino(), found.mtime(), found.mtime_nsec(), found.len()))
    };
    [state(certificate), state(key)]
}

/// Certificate that is in use.
struct Certificate(ArcSwap<CertifiedKey>);

impl fmt::Debug for Certificate {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("Certificate(…)")
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

/// Returns the end of the validity of a chain, in Unix seconds: that of the certificate that
/// expires first.
fn expires_at(chain: &CertifiedKey) -> Option<i64> {
    let ends = chain.cert.iter().filter_map(|certificate| {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        Some(parsed.validity().not_after.timestamp())
    });
    ends.min()
}

/// Reads a certificate chain and its key, and checks that they belong together.
fn read(
    certificate: &Path,
    key: &Path,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    let failed = |path: &Path, cause: String| {
        let path = path.display().to_string();
        TlsError::File { path, cause }
    };
    let no_chain = |cause: &dyn fmt::Display| {
        failed(certificate, format!("{cause}; a PEM file with the certificate chain is expected"))
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .map_err(|error| no_chain(&error))?
        .take(MAX_CERTIFICATES)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| no_chain(&error))?;
    if chain.is_empty() {
        return Err(no_chain(&"the file has no certificate"));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| {
        failed(key, format!("{error}; a PEM file with a private key is expected"))
    })?;
    CertifiedKey::from_der(chain, private, provider).map_err(TlsError::Pair)
}
