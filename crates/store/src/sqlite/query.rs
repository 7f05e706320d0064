//! Queries that several tables share: one row, and a page of a list.

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Params, Row, params_from_iter};

use super::super::accounts::ListQuery;
use super::super::{Order, Page, Paged, Result};
use super::{database_error, to_i64};

/// Runs a statement; returns the number of changed rows.
pub(super) fn execute(connection: &Connection, sql: &str, params: impl Params) -> Result<usize> {
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| statement.execute(params))
        .map_err(database_error)
}

/// Returns the first row of a query, if there is one.
pub(super) fn find<T>(
    connection: &Connection,
    sql: &str,
    params: impl Params,
    from_row: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Option<T>> {
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| statement.query_row(params, from_row).optional())
        .map_err(database_error)
}

/// Rows that a list shows, in the order of their row keys.
pub(super) struct Listing<'a> {
    pub columns: &'a str,
    /// Tables, joined.
    pub from: &'a str,
    /// Condition of every row that ever was in the list, and its values.
    pub ever: (String, Vec<Value>),
    /// Further condition of the rows that are shown, and its values.
    pub visible: (String, Vec<Value>),
    /// Column by which the list is ordered.
    pub key: &'a str,
    /// Column of the ids after which a page can begin.
    pub id: &'a str,
}

/// Part of a list.
pub(super) struct Part<'a> {
    /// Id of the entry before the page; also of an entry that was deleted since.
    pub after: Option<&'a str>,
    pub limit: usize,
    pub order: Order,
}

/// Returns a page of a list.
pub(super) fn list<T>(
    connection: &Connection,
    listing: Listing<'_>,
    part: &Part<'_>,
    from_row: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Paged<T>> {
    let Listing { columns, from, ever, visible, key, id } = listing;
    let ((ever, mut values), (visible, more)) = (ever, visible);
    let mut sql = format!("SELECT {columns} FROM {from} WHERE {ever} AND {visible}");
    let (compare, direction) = match part.order {
        Order::NewestFirst => ("<", "DESC"),
        Order::OldestFirst => (">", "ASC"),
    };
    let mut begin = None;
    if let Some(after) = part.after {
        let cursor = format!("SELECT {key} FROM {from} WHERE {ever} AND {id} = ?");
        let of_cursor = values.iter().cloned().chain([Value::from(after.to_owned())]);
        let found = find(connection, &cursor, params_from_iter(of_cursor), |row| row.get(0))?;
        let Some(found) = found else { return Ok(Paged::UnknownAfter) };
        sql.push_str(&format!(" AND {key} {compare} ?"));
        begin = Some(Value::Integer(found));
    }
    sql.push_str(&format!(" ORDER BY {key} {direction} LIMIT ?"));
    values.extend(more.into_iter().chain(begin));
    values.push(Value::from(to_i64(part.limit as u64).saturating_add(1)));
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let rows = statement.query_map(params_from_iter(values), from_row).map_err(database_error)?;
    let mut items = rows.collect::<rusqlite::Result<Vec<_>>>().map_err(database_error)?;
    let has_more = items.len() > part.limit;
    items.truncate(part.limit);
    Ok(Paged::Page(Page { items, has_more }))
}

impl ListQuery {
    /// Returns the part that the query asks for.
    pub(super) fn part(&self) -> Part<'_> {
        Part { after: self.after.as_deref(), limit: self.limit, order: self.order }
    }
}
