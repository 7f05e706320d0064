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
use hyper::http::Version;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::connections::{Answer, Connection, Connections, Patience};
use super::error::ApiError;
use super::pace::PacedStream;
use super::path::normalized;
use super::streams::Watched;
use crate::config::Settings;

/// How long nobody is let in after the system refused a connection: for want of file descriptors, mostly.
const REFUSED: Duration = Duration::from_millis(200);

/// How long a connection that is asked to close may take for it, if no request comes meanwhile.
const CLOSING: Duration = Duration::from_secs(1);

/// What is held of a request's head, of a body on its way in, and of an answer on its way out, in bytes for each connection.
const MAX_BUFFER_BYTES: usize = 16 << 10;

/// Streams of one connection of HTTP/2, and what one may send before it is read, in bytes. The connection's own window is 64 KiB (RFC 9113, 6.9.2).
const MAX_STREAMS: u32 = 32;
const STREAM_WINDOW_BYTES: u32 = 32 << 10;
const CONNECTION_WINDOW_BYTES: u32 = (64 << 10) - 1;

/// How often a connection of HTTP/2 is asked whether it is still there, and how long it has for an answer.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// How often it is looked whether a busy connection has become idle.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Connections of the listener for health alone.
const ADMIN_CONNECTIONS: usize = 64;

/// Serves the API until `end`, and then until every connection has its answer.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: &Settings,
    end: impl Future<Output = ()>,
) {
    let connections =
        Connections::new(settings.max_connections.get(), settings.max_connections_per_address);
    listen(listener, router, settings, connections, end).await;
}

/// Serves health alone, with connections of its own.
pub async fn serve_admin(
    listener: TcpListener,
    router: Router,
    settings: &Settings,
    end: impl Future<Output = ()>,
) {
    listen(listener, router, settings, Connections::new(ADMIN_CONNECTIONS, 0), end).await;
}

async fn listen(
    listener: TcpListener,
    router: Router,
    settings: &Settings,
    connections: Arc<Connections>,
    end: impl Future<Output = ()>,
) {
    let builder = builder(settings.client_timeout.duration());
    let patience = Patience {
        head: settings.request_head_timeout.duration(),
        keep_alive: settings.keep_alive_timeout.duration(),
    };
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
        let Some(connection) = connections.enter_soon(address.ip()).await.map(Arc::new) else {
            continue;
        };
        stream.set_nodelay(true).ok();
        let timeout = settings.client_timeout.duration();
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(timeout));
        let stream = PacedStream::new(Box::pin(stream), connection.clone(), timeout);
        let serving = Serving { router: router.clone(), connection, patience, timeout };
        tasks.spawn(run(builder.clone(), stream, serving, ending.clone()));
    }
    drop(listener);
    ending.cancel();
    tasks.close();
    tasks.wait().await;
}

/// HTTP/1, or HTTP/2 if the client begins with its preface. When a connection is idle for too long is decided here, not by the library.
fn builder(client_timeout: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(MAX_BUFFER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_BUFFER_BYTES as u32)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(MAX_BUFFER_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        // A client that reads nothing while it sends does not see that it is asked.
        .keep_alive_timeout(PING_INTERVAL.max(client_timeout));
    builder
}

/// What a connection is served with.
#[derive(Clone)]
struct Serving {
    router: Router,
    connection: Arc<Connection>,
    patience: Patience,
    timeout: Duration,
}

async fn run(
    builder: Builder<TokioExecutor>,
    stream: PacedStream<Pin<Box<TimeoutStream<TcpStream>>>>,
    serving: Serving,
    ending: CancellationToken,
) {
    let (connection, patience) = (serving.connection.clone(), serving.patience);
    let service = service_fn(move |request| answer(serving.clone(), request));
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let served = tokio::select! {
        served = &mut serving => served,
        () = closing(&connection, patience) => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                served = &mut serving => served,
                () = given_up(&connection) => Ok(()),
                () = connection.abort.cancelled() => Ok(()),
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

/// Returns when a connection is asked to close, or has been without a request for too long.
async fn closing(connection: &Connection, patience: Patience) {
    loop {
        let look = match connection.deadline(patience) {
            Some(deadline) if deadline <= Instant::now() => return,
            Some(deadline) => deadline,
            None => Instant::now() + IDLE_CHECK_INTERVAL.min(patience.head),
        };
        tokio::select! {
            () = connection.close.cancelled() => return,
            () = tokio::time::sleep_until(look) => {}
        }
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

async fn answer(serving: Serving, request: Request<Incoming>) -> Result<Response, Infallible> {
    let Serving { router, connection, timeout, .. } = serving;
    let is_multiplexed = request.version() == Version::HTTP_2;
    let busy = connection.begin(is_multiplexed);
    let mut request = request.map(Body::new);
    if let Some(uri) = normalized(request.uri()) {
        *request.uri_mut() = uri;
    }
    let response = if busy.over_limit && !request.uri().path().starts_with("/health/") {
        let mut refused = ApiError::overloaded().into_response();
        refused.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        refused
    } else {
        router.oneshot(request).await?
    };
    Ok(response.map(|body| match is_multiplexed {
        true => Body::new(Watched::new(body, busy, connection, timeout)),
        false => Body::new(Answer::new(body, busy)),
    }))
}
