//! Error texts of failed exchanges: one without names for clients, and a full one for the operator.

use std::error::Error;

use super::{Secrets, TransportError, TransportErrorKind};

/// Converts a client error to a [`TransportError`], with the text of the innermost known cause.
pub(crate) fn explain(secrets: &Secrets, error: &(dyn Error + 'static)) -> TransportError {
    let mut fault = TransportErrorKind::Protocol;
    let mut message = String::new();
    let mut detail = None;
    // An error before the connection was established means that nothing was sent.
    let sent = !error
        .downcast_ref::<hyper_util::client::legacy::Error>()
        .is_some_and(|error| error.is_connect());
    let mut unsent = false;
    let mut next = Some(error);
    while let Some(cause) = next {
        next = cause.source();
        if let Some(known) = cause.downcast_ref::<TransportError>() {
            return TransportError::new(known.fault, known.message.clone())
                .with_detail(known.detail());
        }
        if cause.is::<std::io::Error>() {
            fault = TransportErrorKind::Connection;
        }
        if let Some(tls) = tls_error(cause) {
            fault = TransportErrorKind::Tls;
            detail = Some(tls.to_string());
            message = tls_message(tls).to_owned();
            continue;
        }
        if let Some(http) = cause.downcast_ref::<hyper::Error>() {
            if http.is_incomplete_message() {
                fault = TransportErrorKind::Connection;
            }
            // The connection was closed before the request was written.
            unsent |= http.is_canceled();
        }
        if detail.is_none() {
            message = cause.to_string();
        }
    }
    let to_sentence = |text: String| {
        let mut text = format!("The exchange with the provider failed: {text}.");
        secrets.redact(&mut text);
        text
    };
    let error = TransportError {
        sent: sent && !unsent,
        ..TransportError::new(fault, to_sentence(message))
    };
    match detail {
        Some(detail) => error.with_detail(to_sentence(detail)),
        None => error,
    }
}

/// Returns the TLS error that an error is or wraps. An I/O error may wrap another I/O error, which
/// `source` does not return.
pub(super) fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut wrapped = Some(error);
    while let Some(io) = wrapped.and_then(|error| error.downcast_ref::<std::io::Error>()) {
        wrapped = io.get_ref().map(|inner| inner as &(dyn Error + 'static));
    }
    wrapped?.downcast_ref()
}

/// Returns the client's text of a TLS error, without the names in the certificate.
pub(super) fn tls_message(error: &rustls::Error) -> &'static str {
    use rustls::CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, UnknownIssuer,
    };
    match error {
        rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. }) => {
            "its certificate has expired"
        }
        rustls::Error::InvalidCertificate(UnknownIssuer) => {
            "its certificate is from an unknown issuer"
        }
        rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }) => {
            "its certificate is for another name"
        }
        rustls::Error::InvalidCertificate(_) => "its certificate is not valid",
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            "it does not speak TLS; for a plain HTTP server, use a URL with http://"
        }
        rustls::Error::InvalidMessage(_) => "it does not speak TLS",
        _ => "the TLS handshake failed",
    }
}
