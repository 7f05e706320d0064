//! The listeners: connections are accepted, served and ended, each with bounds on how long it may take to say what it wants.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::connections::{Answer, Connection, Connections};
use super::error::ApiError;
use super::pace::PacedStream;
use crate::config::Settings;

/// How long nobody is let in after the system refused a connection: for want of file descriptors, mostly.
const REFUSED: Duration = Duration::from_millis(200);

/// How long a connection that is asked to close may take for it, if no request comes meanwhile.
const CLOSING: Duration = Duration::from_secs(1);

/// What is held of a request's head, of a body on its way in, and of an answer on its way out, in bytes for each connection.
const MAX_BUFFER_BYTES: usize = 16 << 10;

/// Connections of the listener for health alone.
const ADMIN_CONNECTIONS: usize = 64;

/// Serves the API until `end`, and then until every connection has its answer.
pub async fn serve(listener: TcpListener, router: Router, settings: &Settings, end: impl Future<Output = ()>) {
    let connections = Connections::new(settings.max_connections.get(), settings.max_connections_per_address);
    listen(listener, router, settings, connections, end).await;
}

/// Serves health alone, with connections of its own.
pub async fn serve_admin(listener: TcpListener, router: Router, settings: &Settings, end: impl Future<Output = ()>) {
    listen(listener, router, settings, Connections::new(ADMIN_CONNECTIONS, 0), end).await;
}

async fn listen(
    listener: TcpListener,
    router: Router,
    settings: &Settings,
    connections: Arc<Connections>,
    end: impl Future<Output = ()>,
) {
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(settings.request_head_timeout.duration());
    builder.max_buf_size(MAX_BUFFER_BYTES);
    let ending = CancellationToken::new();
    let tasks = TaskTracker::new();
    let mut end = pin!(end);
    loop {
        let (stream, address) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("a connection was not accepted: {error}");
                    tokio::time::sleep(REFUSED).await;
                    continue;
                }
            },
            () = &mut end => break,
        };
        let Some(connection) = connections.enter(address.ip()) else { continue };
        stream.set_nodelay(true).ok();
        let timeout = settings.client_timeout.duration();
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(timeout));
        let stream = PacedStream::new(Box::pin(stream), timeout);
        tasks.spawn(run(builder.clone(), stream, router.clone(), connection, ending.clone()));
    }
    drop(listener);
    ending.cancel();
    tasks.close();
    tasks.wait().await;
}

async fn run(
    builder: Builder,
    stream: PacedStream<Pin<Box<TimeoutStream<TcpStream>>>>,
    router: Router,
    connection: Connection,
    ending: CancellationToken,
) {
    let connection = Arc::new(connection);
    let of_request = connection.clone();
    let service = service_fn(move |request| answer(router.clone(), of_request.clone(), request));
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let served = tokio::select! {
        served = &mut serving => served,
        () = connection.close.cancelled() => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                served = &mut serving => served,
                () = given_up(&connection) => Ok(()),
            }
        }
        () = ending.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!("a connection ended: {error}");
    }
}

/// Returns when a connection that was asked to close has had its time and is idle.
async fn given_up(connection: &Connection) {
    loop {
        tokio::time::sleep(CLOSING).await;
        if connection.is_idle() {
            return;
        }
    }
}

async fn answer(
    router: Router,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response, Infallible> {
    let busy = connection.begin();
    let request = request.map(Body::new);
    let response = if busy.over_limit && !request.uri().path().starts_with("/health/") {
        let mut refused = ApiError::overloaded().into_response();
        refused.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        refused
    } else {
        router.oneshot(request).await?
    };
    Ok(response.map(|body| Body::new(Answer::new(body, busy))))
}
