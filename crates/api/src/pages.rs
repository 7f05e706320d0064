//! Pages of short lists: the parameters `after` and `limit`, and the wire object of a page.

use std::ops::RangeInclusive;

use axum::Json;
use batchwright_store::accounts::ListQuery;
use batchwright_store::{Order, Paged};

use crate::batches::unknown_after;
use crate::error::ApiError;
use crate::query_params::QueryParams;
use crate::wire::{Identified, List};

/// Number of entries of a page without a `limit`.
pub(crate) const DEFAULT_PAGE_ENTRIES: u64 = 20;

/// Valid numbers of entries of a page.
pub(crate) const PAGE_ENTRIES: RangeInclusive<u64> = 1..=100;

/// Reads the part of a list that a client asks for.
pub(crate) fn list_query(query: &QueryParams, order: Order) -> Result<ListQuery, ApiError> {
    let limit = query.limit(PAGE_ENTRIES, DEFAULT_PAGE_ENTRIES)?;
    Ok(ListQuery { after: query.text("after"), limit, order })
}

/// Builds the wire objects of a page. `kind` is the kind of its entries.
pub(crate) fn page<R, T: Identified>(
    paged: Paged<R>,
    kind: &str,
    after: Option<&str>,
    to_wire: impl Fn(R) -> T,
) -> Result<Json<List<T>>, ApiError> {
    match paged {
        Paged::Page(page) => {
            Ok(Json(List::new(page.items.into_iter().map(to_wire).collect(), page.has_more)))
        }
        Paged::UnknownAfter => Err(unknown_after(kind, after.unwrap_or_default())),
    }
}
