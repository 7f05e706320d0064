//! JSON responses that may be large, for clients that may read them slowly.
//!
//! **Problem.** A response stays in memory until the client has read it, and a page of 10,000 files
//! has several MiB. As many slow clients as there are connections would then exhaust the memory of
//! the process.
//!
//! **Layers.**
//!
//! 1. A response of up to [`UNRESERVED_BYTES`] needs no reservation: the number of connections
//!    bounds the total.
//! 2. A larger object reserves memory of the pool `clients` before it is built. The reservation
//!    shrinks to the size of the JSON, and is released when the client has read the JSON. If there
//!    is no memory within [`MEMORY_TIMEOUT`], the client gets 503 and tries again.
//! 3. A larger list is streamed in chunks. Each chunk is read from the store when the client has
//!    read the one before it, so backpressure reaches the database, and no list is in memory as a
//!    whole.
//!
//! The chunk size depends on the pool. If [`CHUNK_BYTES`] can be reserved at once, the chunk has
//! that size. Otherwise the chunk has [`UNRESERVED_BYTES`] and needs no reservation. So a list
//! never waits for memory: it becomes slower. A wait in the middle of a response would look like a
//! dead server.
//!
//! The first chunk is read before the response begins, because an unknown `after` has to give an
//! error status. An error in a later chunk aborts the response: the client sees invalid JSON,
//! never a list that looks complete.

use std::future::Future;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use batchwright_memory::{Holder, Pool, Reservation};
use futures_util::stream;
use serde::Serialize;

use super::error::ApiError;
use super::wire::{Identified, List};

/// Bytes of a response that a connection may hold without a reservation.
pub(crate) const UNRESERVED_BYTES: usize = 8 << 10;

/// Chunk size of a list if memory can be reserved, in bytes.
const CHUNK_BYTES: usize = 64 << 10;

/// Number of copies of an entry in memory: the record, the wire object, the JSON.
const COPIES_PER_ENTRY: usize = 3;

/// Maximum time that a response waits for memory.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes with a reservation that is released when the client has read the bytes.
struct ReservedBytes {
    bytes: Bytes,
    _reservation: Option<Reservation>,
}

impl AsRef<[u8]> for ReservedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Attaches a reservation to bytes. The reservation is released when the bytes are dropped.
pub(crate) fn with_reservation(bytes: Bytes, reservation: Option<Reservation>) -> Bytes {
    match reservation {
        None => bytes,
        reservation => Bytes::from_owner(ReservedBytes { bytes, _reservation: reservation }),
    }
}

/// Reserves memory for a response before it is built. Fails with 503 if there is none in time.
pub(crate) async fn reserve(
    pool: &Pool,
    holder: &Holder,
    bytes: usize,
) -> Result<Reservation, ApiError> {
    tokio::time::timeout(MEMORY_TIMEOUT, pool.reserve(holder, bytes))
        .await
        .map_err(|_| ApiError::overloaded())
}

/// Returns an object as a JSON response, which holds its reservation until the client has read it.
pub(crate) fn object_response<T: Serialize>(
    value: &T,
    mut reservation: Option<Reservation>,
) -> Result<Response, ApiError> {
    let bytes = serde_json::to_vec(value).map_err(ApiError::internal)?;
    if let Some(reservation) = &mut reservation {
        // The caller may have reserved for the largest possible object.
        reservation.shrink_to(bytes.len());
    }
    Ok(json(Body::from(with_reservation(bytes.into(), reservation))))
}

fn json(body: Body) -> Response {
    let mut response = body.into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Entries of a page, and whether more follow. None if the `after` of the query is unknown.
pub(crate) type Entries<T> = Option<(Vec<T>, bool)>;

/// Remainder of a list that is being streamed.
struct Remainder<F> {
    page: F,
    pool: Pool,
    holder: Holder,
    first_id: Option<String>,
    last_id: Option<String>,
    limit: usize,
    has_more: bool,
    /// True once the first entry is written.
    begun: bool,
    /// True once the end of the JSON is written.
    ended: bool,
}

/// Returns a page of a list as a JSON response, or none if `after` is unknown.
///
/// A large page is streamed: each chunk is read when the client has read the one before it. `page`
/// reads entries, given the id that they follow, a maximum number and an approximate size in bytes.
pub(crate) async fn stream_list<T, F, Reading>(
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
    let Some((items, has_more)) = page(after, limit, UNRESERVED_BYTES).await? else {
        return Ok(None);
    };
    if !has_more || items.len() >= limit {
        let list = List::new(items, has_more);
        return object_response(&list, None).map(Some);
    }
    let remainder = Remainder {
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
    let chunks = stream::try_unfold((first, remainder), async |(first, mut remainder)| {
        if remainder.ended {
            return Ok(None);
        }
        let (items, reservation) = match first {
            Some(first) => first,
            None => remainder.read().await?,
        };
        let json = remainder.write(&items)?;
        Ok::<_, ApiError>(Some((with_reservation(json.into(), reservation), (None, remainder))))
    });
    Ok(Some(json(Body::from_stream(chunks))))
}

impl<F> Remainder<F> {
    /// Reads the entries of the next chunk, with a reservation if there is memory for one.
    async fn read<T, Reading>(&mut self) -> Result<(Vec<T>, Option<Reservation>), ApiError>
    where
        T: Identified,
        F: Fn(Option<String>, usize, usize) -> Reading,
        Reading: Future<Output = Result<Entries<T>, ApiError>>,
    {
        let reservation =
            self.pool.try_reserve(&self.holder, CHUNK_BYTES.saturating_mul(COPIES_PER_ENTRY));
        let bytes = if reservation.is_some() { CHUNK_BYTES } else { UNRESERVED_BYTES };
        let Some((items, has_more)) = (self.page)(self.last_id.clone(), self.limit, bytes).await?
        else {
            // The last entry of the previous chunk was deleted.
            return Err(ApiError::internal("a list changed while a client was reading it"));
        };
        self.limit = self.limit.saturating_sub(items.len());
        self.last_id =
            items.last().map(|item| item.id().to_owned()).or_else(|| self.last_id.take());
        self.has_more = has_more;
        Ok((items, reservation))
    }

    /// Returns entries as JSON, with the start of the list before the first entry and its end after
    /// the last.
    fn write<T: Serialize>(&mut self, items: &[T]) -> Result<Vec<u8>, ApiError> {
        let mut json = Vec::new();
        if !self.begun {
            json.extend_from_slice(br#"{"object":"list","data":["#);
        }
        for item in items {
            if std::mem::replace(&mut self.begun, true) {
                json.push(b',');
            }
            serde_json::to_writer(&mut json, item).map_err(ApiError::internal)?;
        }
        if !self.has_more || self.limit == 0 {
            self.ended = true;
            let end = serde_json::json!({
                "first_id": self.first_id,
                "last_id": self.last_id,
                "has_more": self.has_more,
            });
            json.extend_from_slice(b"],");
            // The opening brace of `end` is left out.
            json.extend_from_slice(end.to_string().get(1..).unwrap_or("}").as_bytes());
        }
        Ok(json)
    }
}
