//! Answers that may be large, and clients that may be slow to read them.
//!
//! An answer of a few KiB is the connection's own. What is larger takes memory of the pool `clients` for as long as the client reads it: a
//! single object as a whole, a list piece by piece, in larger pieces as long as there is memory and in small ones when there is none.

use std::future::Future;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;

use super::error::ApiError;
use super::wire::{Identified, List};
use crate::memory::{Holder, Pool, Share};

/// What a connection holds of an answer by itself, in bytes.
pub const FREE: usize = 8 << 10;

/// What is read of a list, or of a file, at a time while there is memory for it, in bytes.
pub const PIECE: usize = 64 << 10;

/// Copies of an entry: as a record, as an object, as JSON.
const COPIES: usize = 3;

/// How long an answer waits for memory.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes that give back their memory when the client has them.
pub struct Held {
    bytes: Bytes,
    _share: Option<Share>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bytes that hold a share for as long as they are there.
pub fn held(bytes: Bytes, share: Option<Share>) -> Bytes {
    match share {
        None => bytes,
        share => Bytes::from_owner(Held { bytes, _share: share }),
    }
}

/// A share for an answer of this size, which is not made yet.
pub async fn room_for(pool: &Pool, holder: &Holder, bytes: usize) -> Result<Share, ApiError> {
    tokio::time::timeout(PATIENCE, pool.take(holder, bytes))
        .await
        .map_err(|_| ApiError::overloaded())
}

/// An object that takes a share until the client has it.
pub fn sized<T: Serialize>(value: &T, mut share: Option<Share>) -> Result<Response, ApiError> {
    let bytes = serde_json::to_vec(value).map_err(ApiError::internal)?;
    if let Some(share) = &mut share {
        // It may have been taken for the largest that there is.
        share.settle(bytes.len());
    }
    Ok(json(Body::from(held(bytes.into(), share))))
}

fn json(body: Body) -> Response {
    let mut response = body.into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// What a list is read with: where to begin, how many entries and how many bytes at most; none if there is no such beginning.
pub type Entries<T> = Option<(Vec<T>, bool)>;

/// What is left of a list that is being handed over.
struct Rest<F> {
    page: F,
    pool: Pool,
    holder: Holder,
    first_id: Option<String>,
    last_id: Option<String>,
    limit: usize,
    has_more: bool,
    begun: bool,
    ended: bool,
}

/// A page of a list. One that is not small is handed over in pieces, each read when the client has the one before it.
pub async fn stream_list<T, F, Reading>(
    after: Option<String>,
    limit: usize,
    (pool, holder): (Pool, Holder),
    page: F,
) -> Result<Option<Response>, ApiError>
where
    T: Serialize + Identified + Send + 'static,
    F: Fn(Option<String>, usize, usize) -> Reading + Send + 'static,
    Reading: Future<Output = Result<Entries<T>, ApiError>> + Send,
{
    let Some((items, has_more)) = page(after, limit, FREE).await? else { return Ok(None) };
    if !has_more || items.len() >= limit {
        let list = List::new(items, has_more);
        return sized(&list, None).map(Some);
    }
    let rest = Rest {
        page,
        pool,
        holder,
        first_id: items.first().map(|item| item.id().to_owned()),
        last_id: items.last().map(|item| item.id().to_owned()),
        limit: limit.saturating_sub(items.len()),
        has_more,
        begun: false,
        ended: false,
    };
    let first = Some((items, None));
    let pieces = stream::try_unfold((first, rest), async |(first, mut rest)| {
        if rest.ended {
            return Ok(None);
        }
        let (items, share) = match first {
            Some(first) => first,
            None => rest.read().await?,
        };
        let text = rest.write(&items)?;
        Ok::<_, ApiError>(Some((held(text.into(), share), (None, rest))))
    });
    Ok(Some(json(Body::from_stream(pieces))))
}

impl<F> Rest<F> {
    async fn read<T, Reading>(&mut self) -> Result<(Vec<T>, Option<Share>), ApiError>
    where
        T: Identified,
        F: Fn(Option<String>, usize, usize) -> Reading,
        Reading: Future<Output = Result<Entries<T>, ApiError>>,
    {
        let share = self.pool.try_take(&self.holder, PIECE.saturating_mul(COPIES));
        let bytes = if share.is_some() { PIECE } else { FREE };
        let Some((items, has_more)) = (self.page)(self.last_id.clone(), self.limit, bytes).await?
        else {
            // The entry that the last piece ended with is gone.
            return Err(ApiError::internal("a list changed while it was read"));
        };
        self.limit = self.limit.saturating_sub(items.len());
        self.last_id =
            items.last().map(|item| item.id().to_owned()).or_else(|| self.last_id.take());
        self.has_more = has_more;
        Ok((items, share))
    }

    /// Some entries as they stand in the answer, with its beginning before the first and its end after the last.
    fn write<T: Serialize>(&mut self, items: &[T]) -> Result<Vec<u8>, ApiError> {
        let mut text = Vec::new();
        if !self.begun {
            text.extend_from_slice(br#"{"object":"list","data":["#);
        }
        for item in items {
            if std::mem::replace(&mut self.begun, true) {
                text.push(b',');
            }
            serde_json::to_writer(&mut text, item).map_err(ApiError::internal)?;
        }
        if !self.has_more || self.limit == 0 {
            self.ended = true;
            let end = serde_json::json!({"first_id": self.first_id, "last_id": self.last_id, "has_more": self.has_more});
            text.extend_from_slice(b"],");
            // Without the brace that opens it.
            text.extend_from_slice(end.to_string().get(1..).unwrap_or("}").as_bytes());
        }
        Ok(text)
    }
}
