//! A failed exchange in words: those of the client without names, those of the operator with all there is.

use std::error::Error;

use super::{Fault, Secrets, TransportError};

/// What went wrong, as the innermost error that knows it says.
pub fn explain(secrets: &Secrets, error: &(dyn Error + 'static)) -> TransportError {
    let mut fault = Fault::Protocol;
    let mut message = String::new();
    let mut detail = None;
    // What failed on the way to a connection was never sent.
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
            fault = Fault::Connection;
        }
        if let Some(tls) = tls_error(cause) {
            fault = Fault::Tls;
            detail = Some(tls.to_string());
            message = tls_trouble(tls).to_owned();
            continue;
        }
        if let Some(http) = cause.downcast_ref::<hyper::Error>() {
            if http.is_incomplete_message() {
                fault = Fault::Connection;
            }
            // The connection was closed before the request was written to it.
            unsent |= http.is_canceled();
        }
        if detail.is_none() {
            message = cause.to_string();
        }
    }
    let told = |text: String| {
        let mut text = format!("The exchange with the provider failed: {text}.");
        secrets.blank(&mut text);
        text
    };
    let error =
        TransportError { sent: sent && !unsent, ..TransportError::new(fault, told(message)) };
    match detail {
        Some(detail) => error.with_detail(told(detail)),
        None => error,
    }
}

/// The TLS error that an error is, or that it wraps: one of the system's may wrap another of its kind, which `source` does not show.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut hidden = Some(error);
    while let Some(io) = hidden.and_then(|error| error.downcast_ref::<std::io::Error>()) {
        hidden = io.get_ref().map(|inner| inner as &(dyn Error + 'static));
    }
    hidden?.downcast_ref()
}

/// A failed handshake in words without names: what a certificate says is the operator's.
fn tls_trouble(error: &rustls::Error) -> &'static str {
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
            "it does not speak TLS; if it is a server of plain HTTP, its URL begins with http://"
        }
        rustls::Error::InvalidMessage(_) => "it does not speak TLS",
        _ => "the TLS handshake failed",
    }
}
