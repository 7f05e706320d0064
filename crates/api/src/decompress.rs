//! Decompression of request bodies, as a stream. The reader of the stream bounds the decompressed
//! size.

use std::io;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::io::AsyncRead;
use tokio_util::io::{ReaderStream, StreamReader};

use super::App;
use super::error::ApiError;
use super::json_response::{UNRESERVED_BYTES, reserve};
use crate::auth::holder;

/// Memory of one decoder, in bytes: a window of 32 KiB, tables and buffers.
const DECODER_BYTES: usize = 64 << 10;

/// Middleware that decompresses a request body according to its `Content-Encoding`.
///
/// Runs after authentication, because the decoder's memory is reserved for the tenant.
pub(crate) async fn decompress(State(app): App, request: Request, next: Next) -> Response {
    let encodings: Vec<String> = request
        .headers()
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .flat_map(|value| {
            String::from_utf8_lossy(value.as_bytes())
                .split(',')
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .map(|encoding| encoding.trim().to_ascii_lowercase())
        .filter(|encoding| !encoding.is_empty() && encoding != "identity")
        .collect();
    let Some(encoding) = encodings.first() else { return next.run(request).await };
    if encodings.len() > 1 || !matches!(encoding.as_str(), "gzip" | "x-gzip" | "deflate") {
        let given = truncate_for_message(&encodings.join(", "));
        let message = format!(
            "Unsupported Content-Encoding: '{given}'. \
             Send the body uncompressed, or compressed once with gzip or deflate."
        );
        let error = ApiError::client_error(StatusCode::UNSUPPORTED_MEDIA_TYPE, message);
        return error.with_code(ErrorCode::UnsupportedContentEncoding).into_response();
    }
    let holder = holder(request.extensions());
    let pool = &app.memory.clients;
    let reservation = match reserve(pool, &holder, DECODER_BYTES).await {
        Ok(reservation) => reservation,
        Err(error) => return error.into_response(),
    };
    let (mut head, body) = request.into_parts();
    head.headers.remove(header::CONTENT_ENCODING);
    head.headers.remove(header::CONTENT_LENGTH);
    let bytes = TryStreamExt::map_err(body.into_data_stream(), io::Error::other);
    let reader = StreamReader::new(bytes);
    let decompressed = match encoding.as_str() {
        "deflate" => {
            chunks(async_compression::tokio::bufread::ZlibDecoder::new(reader)).left_stream()
        }
        _ => {
            let mut decoder = async_compression::tokio::bufread::GzipDecoder::new(reader);
            decoder.multiple_members(true);
            chunks(decoder).right_stream()
        }
    };
    // The reservation is released together with the stream.
    let with_share = decompressed.map(move |chunk| {
        let _ = &reservation;
        chunk
    });
    next.run(Request::from_parts(head, Body::from_stream(with_share))).await
}

fn chunks<R: AsyncRead>(decoder: R) -> impl Stream<Item = io::Result<Bytes>> {
    ReaderStream::with_capacity(decoder, UNRESERVED_BYTES)
}
