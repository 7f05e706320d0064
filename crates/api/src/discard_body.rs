//! Drain of request bodies: reads and discards what a handler left unread.
//!
//! Many clients read the response only after they have sent the whole body. If the server stopped
//! reading, such a client would see a broken connection instead of the error response.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::sync::oneshot;

/// Maximum size of the discarded part of a request body, in bytes.
const MAX_DISCARDED_BYTES: usize = 1 << 30;

/// Middleware that discards the rest of a request body while the client gets the response.
pub(crate) async fn drain(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    if body.is_end_stream() {
        return next.run(Request::from_parts(head, body)).await;
    }
    let (sender, unread) = oneshot::channel();
    let body = Body::new(ReclaimedBody { body: Some(body), owner: Some(sender) });
    let response = next.run(Request::from_parts(head, body)).await;
    tokio::spawn(async move {
        // The handler's task may hold the body for a moment after the response is ready.
        let Ok(mut body) = unread.await else { return };
        let mut discarded = 0_usize;
        while let Some(Ok(frame)) = body.frame().await {
            discarded = discarded.saturating_add(frame.data_ref().map_or(0, Bytes::len));
            if discarded > MAX_DISCARDED_BYTES {
                return;
            }
        }
    });
    response
}

/// Request body that returns to its owner if its reader drops it before the end.
struct ReclaimedBody {
    /// None once the body has ended or failed.
    body: Option<Body>,
    owner: Option<oneshot::Sender<Body>>,
}

impl HttpBody for ReclaimedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(body) = self.body.as_mut() else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for ReclaimedBody {
    fn drop(&mut self) {
        if let Some((body, owner)) = self.body.take().zip(self.owner.take()) {
            // The receiver is gone if the connection was closed.
            owner.send(body).ok();
        }
    }
}
