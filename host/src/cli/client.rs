//! HTTP client of the Batch API, for the commands that work with a server.

use std::path::Path;
use std::pin::Pin;

use batchwright_egress::https;
use bytes::Bytes;
use clap::Args;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use url::Url;

use crate::error::Error;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Stream of server-sent events, in pieces.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Bytes, hyper::Error>> + Send>>;

/// Maximum size of a response that is not file content, in bytes.
const MAX_JSON_BODY_BYTES: usize = 64 << 20;

/// Arguments that select the server and the output format.
#[derive(Args)]
pub struct Server {
    /// URL of the server, with or without /v1
    #[arg(long, global = true, env = "BATCHWRIGHT_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// API key, sent as a bearer token
    #[arg(long, global = true, env = "BATCHWRIGHT_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Print the JSON of the server instead of text
    #[arg(long, global = true)]
    pub json: bool,
}

impl Server {
    /// Creates a client; fails if the URL is invalid.
    pub fn client(&self) -> Result<Client, Error> {
        Client::new(&self.url, self.api_key.clone())
    }
}

/// Client of one server.
pub struct Client {
    base: Url,
    key: Option<String>,
    http: HyperClient<HttpsConnector<HttpConnector>, Body>,
}

impl Client {
    /// Creates a client for the server at `url`, with or without `/v1` at its end.
    pub fn new(url: &str, key: Option<String>) -> Result<Self, Error> {
        let trimmed = url.trim_end_matches('/').trim_end_matches("/v1");
        let base = Url::parse(&format!("{trimmed}/v1/")).map_err(|error| {
            Error::Other(format!(
                "--url `{url}` is not a URL: {error}; write it as http://127.0.0.1:8080"
            ))
        })?;
        let connector = https().https_or_http().enable_http1().build();
        Ok(Self { base, key, http: HyperClient::builder(TokioExecutor::new()).build(connector) })
    }

    /// Sends GET for a path below `/v1/` and returns the JSON body; any status but 200 is an error.
    pub async fn get(&self, path: &str) -> Result<Value, Error> {
        self.json(self.request(Method::GET, path, None, empty())?).await
    }

    /// Sends POST with a JSON body and returns the JSON body; any status but 200 is an error.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, Error> {
        let body =
            Full::new(Bytes::from(body.to_string())).map_err(|never| match never {}).boxed_unsync();
        self.json(self.request(Method::POST, path, Some("application/json"), body)?).await
    }

    /// Sends DELETE and returns the JSON body; any status but 200 is an error.
    pub async fn delete(&self, path: &str) -> Result<Value, Error> {
        self.json(self.request(Method::DELETE, path, None, empty())?).await
    }

    /// Uploads an input file as a stream and returns the file object.
    pub async fn upload(&self, path: &Path) -> Result<Value, Error> {
        let failed = |error: std::io::Error| {
            Error::Other(format!("failed to read {}: {error}", path.display()))
        };
        let file = tokio::fs::File::open(path).await.map_err(failed)?;
        let boundary = uuid::Uuid::new_v4().simple().to_string();
        let name = path.file_name().map_or_else(String::new, |name| {
            name.to_string_lossy().replace(['"', '\r', '\n'], "_")
        });
        let head = format!(
            "--{boundary}\r\n\
             Content-Disposition: form-data; name=\"purpose\"\r\n\r\n\
             batch\r\n\
             --{boundary}\r\n\
             Content-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
             Content-Type: application/jsonl\r\n\r\n"
        );
        let chunks = stream::try_unfold(file, async |mut file| {
            let mut chunk = vec![0; 256 << 10];
            let read = file.read(&mut chunk).await?;
            chunk.truncate(read);
            Ok::<_, std::io::Error>((read > 0).then(|| (Bytes::from(chunk), file)))
        });
        let text_part = |text: String| stream::iter([Ok(Bytes::from(text))]);
        let body =
            text_part(head).chain(chunks).chain(text_part(format!("\r\n--{boundary}--\r\n")));
        let body = StreamBody::new(body.map_ok(Frame::data)).boxed_unsync();
        let content_type = format!("multipart/form-data; boundary={boundary}");
        self.json(self.request(Method::POST, "files", Some(&content_type), body)?).await
    }

    /// Streams the content of a file; the stream fails if the content ends early.
    pub async fn content(
        &self,
        id: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>>, Error> {
        let path = format!("files/{}/content", path_segment(id));
        let request = self.request(Method::GET, &path, None, empty())?;
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(response_error(response).await);
        }
        let failed =
            |error: hyper::Error| Error::Other(format!("the download was interrupted: {error}"));
        Ok(response.into_body().into_data_stream().map_err(failed))
    }

    /// Opens a stream of server-sent events; none if the server has none.
    pub async fn events(&self, path: &str) -> Option<EventStream> {
        let response =
            self.send(self.request(Method::GET, path, None, empty()).ok()?).await.ok()?;
        let is_stream = response.status() == StatusCode::OK;
        is_stream.then(|| Box::pin(response.into_body().into_data_stream()) as EventStream)
    }

    /// Sends GET for a path of the server; returns the status and the JSON body, or null.
    pub async fn probe(&self, path: &str) -> Result<(StatusCode, Value), Error> {
        let response = self.send(self.request(Method::GET, path, None, empty())?).await?;
        let status = response.status();
        Ok((status, serde_json::from_slice(&read_body(response).await?).unwrap_or_default()))
    }

    /// Builds a request for a path below `/v1/`, with the API key.
    fn request(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Body,
    ) -> Result<Request<Body>, Error> {
        let invalid = |error: String| Error::Other(format!("failed to build the request: {error}"));
        let url = self.base.join(path).map_err(|error| invalid(error.to_string()))?;
        let mut request = Request::builder().method(method).uri(url.as_str());
        if let Some(content_type) = content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        request.body(body).map_err(|error| invalid(error.to_string()))
    }

    /// Sends a request; the error names the server.
    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, Error> {
        self.http.request(request).await.map_err(|error| {
            let cause = root_cause(&error);
            let host = self.base.origin().ascii_serialization();
            Error::Other(format!(
                "no response from {host}: {cause}; is the server running, and is --url correct?"
            ))
        })
    }

    /// Sends a request and parses the JSON body of a response with status 200.
    async fn json(&self, request: Request<Body>) -> Result<Value, Error> {
        let response = self.send(request).await?;
        if response.status() != StatusCode::OK {
            return Err(response_error(response).await);
        }
        let bytes = read_body(response).await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::Other(format!("the server's response is not JSON: {error}")))
    }
}

/// Returns the last error in the chain of causes, which has the most specific message.
pub fn root_cause<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> &'a (dyn std::error::Error + 'static) {
    std::iter::successors(Some(error), |cause| cause.source()).last().unwrap_or(error)
}

/// Returns a body without content.
fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed_unsync()
}

/// Reads a body of at most [`MAX_JSON_BODY_BYTES`].
async fn read_body(response: Response<Incoming>) -> Result<Bytes, Error> {
    let limited = http_body_util::Limited::new(response.into_body(), MAX_JSON_BODY_BYTES);
    let collected = limited
        .collect()
        .await
        .map_err(|error| Error::Other(format!("failed to read the response: {error}")))?;
    Ok(collected.to_bytes())
}

/// Returns the error message of a response with an error status.
async fn response_error(response: Response<Incoming>) -> Error {
    let status = response.status();
    let Ok(bytes) = read_body(response).await else {
        return Error::Other(format!("the server returned status {status}"));
    };
    response_error_of(status, &bytes)
}

/// Returns the error message of a body with an error status.
pub fn response_error_of(status: StatusCode, body: &[u8]) -> Error {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = body.pointer("/error/message").and_then(Value::as_str);
    let message =
        message.map_or_else(|| format!("the server returned status {status}"), ToOwned::to_owned);
    if status == StatusCode::NOT_FOUND { Error::NotFound(message) } else { Error::Other(message) }
}

/// Characters of an id that are not part of a path segment.
const ID_ESCAPE_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// Escapes an id for a path, so that no id names another resource.
pub fn path_segment(id: &str) -> PercentEncode<'_> {
    utf8_percent_encode(id, ID_ESCAPE_SET)
}
