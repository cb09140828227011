//! The query parameters and the page format that all lists share.

use serde::Serialize;

use super::error::ApiError;
use crate::domain::invoice::schema;

/// Number of items in a page if the query sets no limit.
const DEFAULT_LIMIT: usize = 50;
/// Largest number of items in a page.
const MAX_LIMIT: usize = 500;

/// Returns the number of items that a query requests.
///
/// # Errors
/// `InvalidQuery` if it is not a number from 1 to [`MAX_LIMIT`].
pub fn limit(text: Option<&str>) -> Result<usize, ApiError> {
    match text.map(str::parse) {
        None => Ok(DEFAULT_LIMIT),
        Some(Ok(limit @ 1..=MAX_LIMIT)) => Ok(limit),
        Some(_) => Err(ApiError::InvalidQuery(format!(
            "limit must be a number from 1 to {MAX_LIMIT}"
        ))),
    }
}

/// Returns the position at which a list continues. `parse` reads it from the text of a cursor.
///
/// # Errors
/// `InvalidQuery` if `parse` cannot read the cursor.
pub fn cursor<C>(
    text: Option<&str>,
    parse: impl Fn(&str) -> Option<C>,
) -> Result<Option<C>, ApiError> {
    text.map(|text| {
        parse(text).ok_or_else(|| {
            ApiError::InvalidQuery("cursor was not issued by this server".to_owned())
        })
    })
    .transpose()
}

/// Returns an id or a type to search for. `name` is the name of the parameter in the error message.
///
/// # Errors
/// `InvalidQuery` if the text is invalid.
pub fn sought(name: &str, text: Option<String>) -> Result<Option<String>, ApiError> {
    text.as_deref()
        .map(schema::validate_uid)
        .transpose()
        .map_err(|reason| ApiError::InvalidQuery(format!("{name} {reason}")))?;
    Ok(text)
}

/// A page that is written as JSON, item by item: `{"items": [...], "nextCursor": "..."}`.
///
/// Only the text of the page is in memory, never all of its items.
pub struct ItemWriter {
    json: Vec<u8>,
    is_empty: bool,
}

impl ItemWriter {
    pub fn new() -> ItemWriter {
        ItemWriter {
            json: b"{\"items\":[".to_vec(),
            is_empty: true,
        }
    }

    /// Appends an item.
    pub fn write(&mut self, item: &impl Serialize) {
        if !self.is_empty {
            self.json.push(b',');
        }
        self.is_empty = false;
        self.write_value(item);
    }

    /// Returns the page. The last page has no `next_cursor`.
    pub fn finish(mut self, next_cursor: Option<&str>) -> Vec<u8> {
        self.json.push(b']');
        if let Some(cursor) = next_cursor {
            self.json.extend_from_slice(b",\"nextCursor\":");
            self.write_value(&cursor);
        }
        self.json.push(b'}');
        self.json
    }

    fn write_value(&mut self, value: &impl Serialize) {
        serde_json::to_writer(&mut self.json, value)
            .expect("items have string keys, and writing to a vector cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn page(items: &[Value], next_cursor: Option<&str>) -> String {
        let mut writer = ItemWriter::new();
        for item in items {
            writer.write(item);
        }
        String::from_utf8(writer.finish(next_cursor)).unwrap()
    }

    #[test]
    fn page_of_items_is_valid_json() {
        assert_eq!(page(&[], None), r#"{"items":[]}"#);
        assert_eq!(
            page(&[json!({"a": 1}), json!("b")], Some("c\"d")),
            r#"{"items":[{"a":1},"b"],"nextCursor":"c\"d"}"#
        );
    }
}
