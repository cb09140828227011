//! Follows a list of Stripe's page by page, and stops if the list does not end.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{StripeApiError, StripePage};

/// The position in a list: the value of `starting_after` for the next page.
///
/// Stripe, or a proxy in its place, may answer `has_more` forever, or ignore `starting_after` and
/// repeat a page. Both would keep a run busy without an error, so the cursor reports them.
pub struct ListCursor {
    path: &'static str,
    max_pages: usize,
    /// The last id of each page so far.
    last_ids: HashSet<String>,
    starting_after: Option<String>,
}

impl ListCursor {
    /// Starts at the first page. `max_pages` has to exceed the number of pages of any real list.
    pub fn new(path: &'static str, max_pages: usize) -> ListCursor {
        ListCursor {
            path,
            max_pages,
            last_ids: HashSet::new(),
            starting_after: None,
        }
    }

    /// Continues after this id.
    pub fn starting_at(mut self, id: String) -> ListCursor {
        self.last_ids.insert(id.clone());
        self.starting_after = Some(id);
        self
    }

    /// Returns the value of `starting_after`, or `None` for the first page.
    pub fn starting_after(&self) -> Option<&str> {
        self.starting_after.as_deref()
    }

    /// Advances past this page. Returns whether another page follows.
    ///
    /// # Errors
    /// [`StripeApiError::Invalid`] if the list has too many pages, or if another page is announced
    /// but the last item of this page has no id or an id that ended an earlier page.
    pub fn advance(&mut self, page: &StripePage) -> Result<bool, StripeApiError> {
        if !page.has_more {
            return Ok(false);
        }
        let Some(id) = page.data.last().and_then(|item| id_of(item)) else {
            let reason = "has_more is true, but the last item has no id";
            return Err(StripeApiError::invalid(self.path, reason));
        };
        if !self.last_ids.insert(id.clone()) {
            let reason = format!("the list does not advance: it returns to {id}");
            return Err(StripeApiError::invalid(self.path, reason));
        }
        if self.last_ids.len() >= self.max_pages {
            let reason = format!("the list does not end: {} pages were read", self.max_pages);
            return Err(StripeApiError::invalid(self.path, reason));
        }

        self.starting_after = Some(id);
        Ok(true)
    }
}

/// Returns the id of an item, or `None` if the id is absent or empty.
fn id_of(item: &RawValue) -> Option<String> {
    #[derive(Deserialize)]
    struct Item {
        id: String,
    }
    let item: Item = serde_json::from_str(item.get()).ok()?;
    Some(item.id).filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(ids: &[&str], has_more: bool) -> StripePage {
        let data = ids
            .iter()
            .map(|id| RawValue::from_string(format!(r#"{{"id":"{id}"}}"#)).unwrap())
            .collect();
        StripePage { data, has_more }
    }

    fn error(advanced: Result<bool, StripeApiError>) -> String {
        advanced.unwrap_err().to_string()
    }

    #[test]
    fn list_is_followed_to_its_last_page() {
        let mut cursor = ListCursor::new("/v1/events", 10);
        assert_eq!(cursor.starting_after(), None);
        assert!(cursor.advance(&page(&["a", "b"], true)).unwrap());
        assert_eq!(cursor.starting_after(), Some("b"));
        assert!(cursor.advance(&page(&["c"], true)).unwrap());
        assert_eq!(cursor.starting_after(), Some("c"));
        assert!(!cursor.advance(&page(&["b"], false)).unwrap());
        assert!(!cursor.advance(&page(&[], false)).unwrap());
    }

    #[test]
    fn repeated_page_is_reported() {
        let mut cursor = ListCursor::new("/v1/events", 10);
        cursor.advance(&page(&["a", "b"], true)).unwrap();
        let repeated = error(cursor.advance(&page(&["a", "b"], true)));
        assert!(repeated.contains("/v1/events") && repeated.contains("returns to b"));

        cursor.advance(&page(&["c"], true)).unwrap();
        let circle = error(cursor.advance(&page(&["b"], true)));
        assert!(circle.contains("returns to b"), "{circle}");

        let mut cursor = ListCursor::new("/v1/events", 10).starting_at("x".to_owned());
        assert!(cursor.advance(&page(&["x"], true)).is_err());
    }

    #[test]
    fn endless_list_is_reported() {
        let mut cursor = ListCursor::new("/v1/events", 3);
        assert!(cursor.advance(&page(&["a"], true)).unwrap());
        assert!(cursor.advance(&page(&["b"], true)).unwrap());
        let endless = error(cursor.advance(&page(&["c"], true)));
        assert!(endless.contains("3 pages"), "{endless}");

        for nameless in [page(&[], true), page(&[""], true)] {
            let mut cursor = ListCursor::new("/v1/events", 3);
            assert!(error(cursor.advance(&nameless)).contains("no id"));
        }
    }
}
