//! What several calls take in their query: how much of a list, and where it goes on.

use super::error::ApiError;
use crate::domain::invoice::schema;

/// Items in a page when the query does not say.
const DEFAULT: usize = 50;
/// Items in a page at most.
const MOST: usize = 500;

pub fn limit(text: Option<&str>) -> Result<usize, ApiError> {
    match text.map(str::parse) {
        None => Ok(DEFAULT),
        Some(Ok(limit @ 1..=MOST)) => Ok(limit),
        Some(_) => Err(ApiError::InvalidQuery(format!(
            "limit must be a number from 1 to {MOST}"
        ))),
    }
}

/// Where a list goes on, as `parse` reads what was given out.
pub fn cursor<C>(
    text: Option<&str>,
    parse: impl Fn(&str) -> Option<C>,
) -> Result<Option<C>, ApiError> {
    let not_given_out =
        || ApiError::InvalidQuery("cursor is not one that was given out here".to_owned());
    text.map(|text| parse(text).ok_or_else(not_given_out))
        .transpose()
}

/// An id or a type to look for.
pub fn sought(name: &str, text: Option<String>) -> Result<Option<String>, ApiError> {
    let unfit = |reason: String| ApiError::InvalidQuery(format!("{name} {reason}"));
    text.as_deref()
        .map(schema::validate_uid)
        .transpose()
        .map_err(unfit)?;
    Ok(text)
}
