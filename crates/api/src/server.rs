//! Listeners: accept connections, serve and close them, and bound the time that each may take to
//! send a request.

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
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::auth::ClientAddress;
use super::config::ApiConfig;
use super::connections::{Connection, Connections, IdleTimeouts, ResponseBody};
use super::data_rate::PacedStream;
use super::error::ApiError;
use super::http2_streams::StreamBody;
use super::metrics::HttpMetrics;
use super::path::normalized;
use super::tls::Tls;

/// Delay after a failed `accept`. The usual cause is a lack of file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(200);

/// Time that an idle connection has to close after it was asked to.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Buffer of a connection, in bytes: for the head of a request, for the body of a request, and for
/// a response.
const MAX_BUFFER_BYTES: usize = 16 << 10;

/// Maximum number of concurrent streams of an HTTP/2 connection.
const MAX_STREAMS: u32 = 32;

/// Flow-control window of an HTTP/2 stream, in bytes: data that a client may send before the server
/// reads it.
const STREAM_WINDOW_BYTES: u32 = 32 << 10;

/// Flow-control window of an HTTP/2 connection, in bytes: the initial window of RFC 9113, 6.9.2.
const CONNECTION_WINDOW_BYTES: u32 = (64 << 10) - 1;

/// Interval of HTTP/2 pings, and minimum timeout of each.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// Interval of checks whether a busy connection has become idle.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of connections of the admin listener.
const MAX_ADMIN_CONNECTIONS: usize = 64;

/// Serves the API until `shutdown`, and then until every request in flight has its response.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: &ApiConfig,
    tls: Option<Arc<Tls>>,
    metrics: &HttpMetrics,
    shutdown: impl Future<Output = ()>,
) {
    let connections =
        Connections::new(settings.max_connections.get(), settings.max_connections_per_address);
    if let Err(error) = metrics.register_connections(&connections) {
        tracing::error!(%error, "connections are not in the metrics");
    }
    let port = Port { listener, tls };
    listen(port, router, settings, (connections, metrics), shutdown).await;
}

/// Serves the admin listener until `shutdown`. Its connections do not count toward those of the
/// API.
pub async fn serve_admin(
    listener: TcpListener,
    router: Router,
    settings: &ApiConfig,
    metrics: &HttpMetrics,
    shutdown: impl Future<Output = ()>,
) {
    let connections = Connections::new(MAX_ADMIN_CONNECTIONS, 0);
    let port = Port { listener, tls: None };
    listen(port, router, settings, (connections, metrics), shutdown).await;
}

/// Socket that accepts connections, and how they are encrypted.
struct Port {
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
}

async fn listen(
    Port { listener, tls }: Port,
    router: Router,
    settings: &ApiConfig,
    (connections, metrics): (Arc<Connections>, &HttpMetrics),
    shutdown: impl Future<Output = ()>,
) {
    let builder = builder(settings.client_timeout.duration());
    let timeouts = IdleTimeouts {
        head: settings.request_head_timeout.duration(),
        keep_alive: settings.idle_timeout.duration(),
    };
    let draining = CancellationToken::new();
    let tasks = TaskTracker::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, address) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                    continue;
                }
            },
            () = &mut shutdown => break,
        };
        let Some(connection) = connections.admit(address.ip()).await.map(Arc::new) else {
            metrics.dropped();
            continue;
        };
        stream.set_nodelay(true).ok();
        let timeout = settings.client_timeout.duration();
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(timeout));
        let stream = PacedStream::new(Box::pin(stream), connection.clone(), timeout);
        let address = ClientAddress(address.ip());
        let context = Context {
            router: router.clone(),
            address,
            connection,
            timeouts,
            timeout,
            metrics: metrics.clone(),
        };
        let (builder, draining, tls) = (builder.clone(), draining.clone(), tls.clone());
        tasks.spawn(async move {
            let stream = match tls {
                None => Either::Left(stream),
                Some(tls) => {
                    match draining.run_until_cancelled(encrypt(&tls, stream, &context)).await {
                        Some(Ok(stream)) => Either::Right(stream),
                        Some(Err(error)) => {
                            tracing::debug!(%error, "TLS handshake failed");
                            return;
                        }
                        None => return,
                    }
                }
            };
            serve_connection(builder, stream, context, draining).await;
        });
    }
    drop(listener);
    draining.cancel();
    tasks.close();
    tasks.wait().await;
}

/// Returns a builder for connections of HTTP/1, or of HTTP/2 if the client sends its preface.
///
/// The library's own timeout for heads is off: [`Connection::idle_deadline`] replaces it.
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
        // A client that reads nothing while it sends does not see the ping.
        .keep_alive_timeout(PING_INTERVAL.max(client_timeout));
    builder
}

/// Router, timeouts and state of one connection.
#[derive(Clone)]
struct Context {
    router: Router,
    address: ClientAddress,
    connection: Arc<Connection>,
    timeouts: IdleTimeouts,
    /// Setting `client_timeout`.
    timeout: Duration,
    metrics: HttpMetrics,
}

/// Connection without encryption.
type PlainStream = PacedStream<Pin<Box<TimeoutStream<TcpStream>>>>;

/// Performs the TLS handshake, within the timeout for the head of a request.
async fn encrypt(
    tls: &Tls,
    stream: PlainStream,
    context: &Context,
) -> std::io::Result<TlsStream<PlainStream>> {
    let handshake = tokio::time::timeout(context.timeouts.head, tls.accept(stream));
    tokio::select! {
        handshake = handshake => handshake.map_err(std::io::Error::from)?,
        () = context.connection.close.cancelled() => Err(std::io::ErrorKind::TimedOut.into()),
    }
}

async fn serve_connection(
    builder: Builder<TokioExecutor>,
    stream: Either<PlainStream, TlsStream<PlainStream>>,
    context: Context,
    draining: CancellationToken,
) {
    let (connection, timeouts) = (context.connection.clone(), context.timeouts);
    let service = service_fn(move |request| respond(context.clone(), request));
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let served = tokio::select! {
        served = &mut serving => served,
        () = close_requested(&connection, timeouts) => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                served = &mut serving => served,
                () = close_grace_over(&connection) => Ok(()),
                () = connection.abort.cancelled() => Ok(()),
            }
        }
        () = draining.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "connection failed");
    }
}

/// Waits until a connection is asked to close or exceeds an idle timeout.
async fn close_requested(connection: &Connection, timeouts: IdleTimeouts) {
    loop {
        let next_check = match connection.idle_deadline(timeouts) {
            Some(deadline) if deadline <= Instant::now() => return,
            Some(deadline) => deadline,
            None => Instant::now() + IDLE_CHECK_INTERVAL.min(timeouts.head),
        };
        tokio::select! {
            () = connection.close.cancelled() => return,
            () = tokio::time::sleep_until(next_check) => {}
        }
    }
}

/// Waits until a connection that was asked to close has used up its grace period and is idle.
async fn close_grace_over(connection: &Connection) {
    loop {
        tokio::time::sleep(CLOSE_GRACE).await;
        if connection.is_idle() {
            return;
        }
    }
}

async fn respond(context: Context, request: Request<Incoming>) -> Result<Response, Infallible> {
    let Context { router, address, connection, timeout, metrics, .. } = context;
    let is_multiplexed = request.version() == Version::HTTP_2;
    let guard = connection.begin_request(is_multiplexed);
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(address);
    if let Some(uri) = normalized(request.uri()) {
        *request.uri_mut() = uri;
    }
    let response = if guard.over_limit && !request.uri().path().starts_with("/health/") {
        let mut refused = ApiError::overloaded().into_response();
        metrics.overloaded(&request, refused.status());
        refused.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        refused
    } else {
        router.oneshot(request).await?
    };
    Ok(response.map(|body| match is_multiplexed {
        true => Body::new(StreamBody::new(body, guard, connection, timeout)),
        false => Body::new(ResponseBody::new(body, guard)),
    }))
}
