//! Bodies of `multipart/form-data`, read as they come.
//!
//! The reader of the library holds what lies between two parts, a part's headers above all, until it has found their end. So what it is
//! given while it looks for that is bounded here.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Request};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

use super::error::ApiError;

/// Longest part that is no file, in bytes.
const LONGEST_TEXT: usize = 1024;

/// What may lie between the end of a part and the end of the next one's headers, in bytes; it comes in pieces of up to as much again.
const MAX_HEAD_BYTES: usize = 16 << 10;

pub struct Form {
    multipart: Multipart,
    allowance: Arc<AtomicUsize>,
}

/// The headers of a part do not end.
#[derive(Debug, thiserror::Error)]
#[error("the headers of a part are longer than {MAX_HEAD_BYTES} bytes")]
struct HeadTooLong;

impl Form {
    pub async fn read(request: Request) -> Result<Self, ApiError> {
        let allowance = Arc::new(AtomicUsize::new(MAX_HEAD_BYTES));
        let metered = allowance.clone();
        let request = request.map(|body| Body::new(Metered { body, allowance: metered, yielded: false }));
        match Multipart::from_request(request, &()).await {
            Ok(multipart) => Ok(Self { multipart, allowance }),
            Err(_) => Err(ApiError::bad_request("The request body must be multipart/form-data with a boundary.")),
        }
    }

    /// The next part, whose content is not bounded here.
    pub async fn next(&mut self) -> Result<Option<Field<'_>>, ApiError> {
        self.allowance.store(MAX_HEAD_BYTES, Ordering::Relaxed);
        let field = self.multipart.next_field().await.map_err(|error| broken(&error))?;
        self.allowance.store(usize::MAX, Ordering::Relaxed);
        Ok(field)
    }
}

pub fn broken(error: &MultipartError) -> ApiError {
    if let Some(late) = ApiError::of_late_body(error) {
        return late;
    }
    let causes = std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |cause| cause.source());
    if causes.into_iter().any(<dyn std::error::Error>::is::<HeadTooLong>) {
        return ApiError::bad_request(format!(
            "The multipart body could not be read: the headers of a part are longer than {MAX_HEAD_BYTES} bytes."
        ));
    }
    ApiError::bad_request(format!("The multipart body could not be read: {}.", error.body_text()))
}

/// The text of a short part.
pub async fn part_text(mut part: Field<'_>) -> Result<String, ApiError> {
    let name = part.name().unwrap_or_default().to_owned();
    let mut text = Vec::new();
    while let Some(bytes) = part.chunk().await.map_err(|error| broken(&error))? {
        if text.len().saturating_add(bytes.len()) > LONGEST_TEXT {
            return Err(ApiError::invalid(&name, "invalid_value", format!("The part '{name}' is too long.")));
        }
        text.extend_from_slice(&bytes);
    }
    String::from_utf8(text)
        .map_err(|_| ApiError::invalid(&name, "invalid_value", format!("The part '{name}' is not UTF-8.")))
}

/// A body that gives no more than its allowance, a piece at a time: whoever reads it looks at each piece before it gets the next.
struct Metered {
    body: Body,
    allowance: Arc<AtomicUsize>,
    yielded: bool,
}

impl HttpBody for Metered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if std::mem::take(&mut self.yielded) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let left = self.allowance.load(Ordering::Relaxed);
        if left == 0 {
            return Poll::Ready(Some(Err(axum::Error::new(HeadTooLong))));
        }
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.yielded = true;
            if left != usize::MAX {
                let size = frame.data_ref().map_or(0, Bytes::len);
                self.allowance.store(left.saturating_sub(size), Ordering::Relaxed);
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
