//! What a client still sends while it is refused is read and thrown away: one that cannot send on does not look for an answer.

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

/// What is thrown away of one request at the most, in bytes.
const MOST: usize = 1 << 30;

pub async fn drain(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    if body.is_end_stream() {
        return next.run(Request::from_parts(head, body)).await;
    }
    let (sender, left) = oneshot::channel();
    let body = Body::new(Borrowed { body: Some(body), owner: Some(sender) });
    let response = next.run(Request::from_parts(head, body)).await;
    tokio::spawn(async move {
        // Whoever read the body may hold it for a little longer.
        let Ok(mut body) = left.await else { return };
        let mut drained = 0_usize;
        while let Some(Ok(frame)) = body.frame().await {
            drained = drained.saturating_add(frame.data_ref().map_or(0, Bytes::len));
            if drained > MOST {
                return;
            }
        }
    });
    response
}

/// A body that goes back to its owner when whoever reads it stops before its end.
struct Borrowed {
    body: Option<Body>,
    owner: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Borrowed {
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

impl Drop for Borrowed {
    fn drop(&mut self) {
        if let Some((body, owner)) = self.body.take().zip(self.owner.take()) {
            // Nobody waits for it if the connection has gone.
            owner.send(body).ok();
        }
    }
}
