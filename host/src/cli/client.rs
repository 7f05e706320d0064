//! A client of the HTTP API, for the commands that work with a server.

use std::path::Path;

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
use serde_json::Value;
use tokio::io::AsyncReadExt;
use url::Url;

use super::Error;
use crate::egress::https;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Largest answer that is no file, in bytes.
const MOST_JSON: usize = 64 << 20;

/// Which server a command works with, and how it prints.
#[derive(Args)]
pub struct Server {
    /// The server
    #[arg(long, global = true, env = "BATCHWRIGHT_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Key for the server, if it wants one
    #[arg(long, global = true, env = "BATCHWRIGHT_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Print the server's JSON
    #[arg(long, global = true)]
    pub json: bool,
}

impl Server {
    pub fn client(&self) -> Result<Client, Error> {
        Client::new(&self.url, self.api_key.clone())
    }
}

pub struct Client {
    base: Url,
    key: Option<String>,
    http: HyperClient<HttpsConnector<HttpConnector>, Body>,
}

impl Client {
    /// A client for the server at `url`, with or without its `/v1`.
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

    pub async fn get(&self, path: &str) -> Result<Value, Error> {
        self.json(self.request(Method::GET, path, None, empty())?).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, Error> {
        let body =
            Full::new(Bytes::from(body.to_string())).map_err(|never| match never {}).boxed_unsync();
        self.json(self.request(Method::POST, path, Some("application/json"), body)?).await
    }

    pub async fn delete(&self, path: &str) -> Result<Value, Error> {
        self.json(self.request(Method::DELETE, path, None, empty())?).await
    }

    /// Uploads an input file as it is read.
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
            "--{boundary}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--{boundary}\r\n\
             Content-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\nContent-Type: application/jsonl\r\n\r\n"
        );
        let pieces = stream::try_unfold(file, async |mut file| {
            let mut piece = vec![0; 256 << 10];
            let read = file.read(&mut piece).await?;
            piece.truncate(read);
            Ok::<_, std::io::Error>((read > 0).then(|| (Bytes::from(piece), file)))
        });
        let edge = |text: String| stream::iter([Ok(Bytes::from(text))]);
        let body = edge(head).chain(pieces).chain(edge(format!("\r\n--{boundary}--\r\n")));
        let body = StreamBody::new(body.map_ok(Frame::data)).boxed_unsync();
        let kind = format!("multipart/form-data; boundary={boundary}");
        self.json(self.request(Method::POST, "files", Some(&kind), body)?).await
    }

    /// The bytes of a file of the server, as they come. One that breaks off before its end is an error.
    pub async fn content(
        &self,
        id: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>>, Error> {
        let request = self.request(Method::GET, &format!("files/{id}/content"), None, empty())?;
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let broken = |error: hyper::Error| Error::Other(format!("the download broke off: {error}"));
        Ok(response.into_body().into_data_stream().map_err(broken))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        kind: Option<&str>,
        body: Body,
    ) -> Result<Request<Body>, Error> {
        let invalid = |error: String| Error::Other(format!("the request cannot be made: {error}"));
        let url = self.base.join(path).map_err(|error| invalid(error.to_string()))?;
        let mut request = Request::builder().method(method).uri(url.as_str());
        if let Some(kind) = kind {
            request = request.header(header::CONTENT_TYPE, kind);
        }
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        request.body(body).map_err(|error| invalid(error.to_string()))
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, Error> {
        self.http.request(request).await.map_err(|error| {
            let cause = innermost(&error);
            let host = self.base.origin().ascii_serialization();
            Error::Other(format!(
                "no answer from {host}: {cause}; is the server running, and is --url right?"
            ))
        })
    }

    async fn json(&self, request: Request<Body>) -> Result<Value, Error> {
        let response = self.send(request).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        let bytes = bounded(response).await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::Other(format!("the server's answer is not JSON: {error}")))
    }
}

/// The cause of an error that has none itself: the outermost says least.
pub fn innermost<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> &'a (dyn std::error::Error + 'static) {
    std::iter::successors(Some(error), |cause| cause.source()).last().unwrap_or(error)
}

fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed_unsync()
}

async fn bounded(response: Response<Incoming>) -> Result<Bytes, Error> {
    let limited = http_body_util::Limited::new(response.into_body(), MOST_JSON);
    let collected = limited
        .collect()
        .await
        .map_err(|error| Error::Other(format!("the answer broke off: {error}")))?;
    Ok(collected.to_bytes())
}

/// What the server says of a request it refused.
async fn refusal(response: Response<Incoming>) -> Error {
    let status = response.status();
    let Ok(bytes) = bounded(response).await else {
        return Error::Other(format!("the server answered {status}"));
    };
    let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    match body.pointer("/error/message").and_then(Value::as_str) {
        Some(message) => Error::Other(message.to_owned()),
        None => Error::Other(format!("the server answered {status}")),
    }
}
