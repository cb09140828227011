//! Lenient JSON values: a value of an unexpected type reads as absent instead of failing the whole
//! document.
//!
//! API versions differ in the type of a field (an id or an expanded object, a boolean or no value),
//! and a new version may change any of them. One unexpected field must not hide the values of the
//! others. serde's derive decides which fields are read; the types here decide which JSON counts as
//! a value.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{
    Deserialize, DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use crate::domain::time::LAST_SECOND;

/// Longest id in bytes. Stripe's ids are not longer; a longer id counts as absent, because a
/// PostgreSQL index cannot hold it.
const MAX_ID_BYTES: usize = 255;

/// A JSON value of the expected type, or `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lenient<T>(pub Option<T>);

impl<T> Default for Lenient<T> {
    fn default() -> Lenient<T> {
        Lenient(None)
    }
}

/// An id, given as a string or as an expanded object with an `id`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id(pub String);

/// An id, given as a string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainId(pub String);

impl Lenient<Id> {
    pub fn into_text(self) -> Option<String> {
        self.0.map(|Id(id)| id)
    }
}

/// Unix seconds within the years that can be formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnixSeconds(pub i64);

/// A JSON object, read by the `Deserialize` of `T`; `None` for any other JSON value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nested<T>(pub Option<T>);

impl<T> Default for Nested<T> {
    fn default() -> Nested<T> {
        Nested(None)
    }
}

impl<T> Nested<T> {
    /// Returns a field of the object, or `None` if it is absent.
    pub fn and_then<V>(&self, field: impl FnOnce(&T) -> Option<V>) -> Option<V> {
        self.0.as_ref().and_then(field)
    }
}

/// A time for which `null` has a meaning of its own, different from an absent field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NullableTime {
    #[default]
    Absent,
    Null,
    At(i64),
}

/// Reads one JSON value. Each method gets a value of one JSON type and returns `None` unless it is
/// overridden.
pub trait FromJson<'de>: Sized {
    fn from_null() -> Option<Self> {
        None
    }

    fn from_bool(_: bool) -> Option<Self> {
        None
    }

    /// Reads an integer that fits 64 bits.
    fn from_integer(_: i64) -> Option<Self> {
        None
    }

    fn from_text(_: &str) -> Option<Self> {
        None
    }

    /// Reads an object. It must consume all fields of `map`.
    ///
    /// # Errors
    /// Returns an error for invalid JSON and for a repeated field of a derived struct.
    fn from_map<A: MapAccess<'de>>(mut map: A) -> Result<Option<Self>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}

        Ok(None)
    }

    /// Reads a list. It must consume all items of `items`.
    ///
    /// # Errors
    /// Returns an error for invalid JSON and for a repeated field of a derived struct.
    fn from_list<A: SeqAccess<'de>>(mut items: A) -> Result<Option<Self>, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}

        Ok(None)
    }
}

impl FromJson<'_> for bool {
    fn from_bool(value: bool) -> Option<bool> {
        Some(value)
    }
}

impl FromJson<'_> for i64 {
    fn from_integer(value: i64) -> Option<i64> {
        Some(value)
    }
}

/// A non-empty string. A string with a NUL counts as absent: Stripe never sends one, and PostgreSQL
/// cannot store it.
impl FromJson<'_> for String {
    fn from_text(text: &str) -> Option<String> {
        (!text.is_empty() && !text.contains('\0')).then(|| text.to_owned())
    }
}

impl FromJson<'_> for PlainId {
    fn from_text(text: &str) -> Option<PlainId> {
        String::from_text(text)
            .filter(|id| id.len() <= MAX_ID_BYTES)
            .map(PlainId)
    }
}

impl<'de> FromJson<'de> for Id {
    fn from_text(text: &str) -> Option<Id> {
        PlainId::from_text(text).map(|PlainId(id)| Id(id))
    }

    fn from_map<A: MapAccess<'de>>(map: A) -> Result<Option<Id>, A::Error> {
        #[derive(Default, serde::Deserialize)]
        #[serde(default)]
        struct Expanded {
            id: Lenient<PlainId>,
        }

        let expanded = Expanded::deserialize(MapAccessDeserializer::new(map))?;
        Ok(expanded.id.0.map(|PlainId(id)| Id(id)))
    }
}

impl FromJson<'_> for UnixSeconds {
    fn from_integer(value: i64) -> Option<UnixSeconds> {
        (0..=LAST_SECOND)
            .contains(&value)
            .then_some(UnixSeconds(value))
    }
}

/// A list. Each item is as lenient as its type.
impl<'de, T: Deserialize<'de>> FromJson<'de> for Vec<T> {
    fn from_list<A: SeqAccess<'de>>(mut items: A) -> Result<Option<Vec<T>>, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = items.next_element()? {
            values.push(value);
        }

        Ok(Some(values))
    }
}

/// The content of a [`Nested`].
struct Fields<T>(T);

impl<'de, T: DeserializeOwned> FromJson<'de> for Fields<T> {
    fn from_map<A: MapAccess<'de>>(map: A) -> Result<Option<Fields<T>>, A::Error> {
        let fields = T::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Some(Fields(fields)))
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Nested<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Nested<T>, D::Error> {
        let Lenient(fields) = Lenient::<Fields<T>>::deserialize(deserializer)?;
        Ok(Nested(fields.map(|Fields(fields)| fields)))
    }
}

impl NullableTime {
    pub fn at(self) -> Option<i64> {
        match self {
            NullableTime::At(at) => Some(at),
            NullableTime::Absent | NullableTime::Null => None,
        }
    }
}

impl FromJson<'_> for NullableTime {
    fn from_null() -> Option<NullableTime> {
        Some(NullableTime::Null)
    }

    fn from_integer(value: i64) -> Option<NullableTime> {
        UnixSeconds::from_integer(value).map(|UnixSeconds(at)| NullableTime::At(at))
    }
}

impl<'de, T: FromJson<'de>> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Lenient<T>, D::Error> {
        deserializer
            .deserialize_any(LenientVisitor(PhantomData))
            .map(Lenient)
    }
}

struct LenientVisitor<T>(PhantomData<T>);

impl<'de, T: FromJson<'de>> Visitor<'de> for LenientVisitor<T> {
    type Value = Option<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Option<T>, E> {
        Ok(T::from_null())
    }

    fn visit_bool<E>(self, value: bool) -> Result<Option<T>, E> {
        Ok(T::from_bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Option<T>, E> {
        Ok(T::from_integer(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Option<T>, E> {
        Ok(i64::try_from(value).ok().and_then(T::from_integer))
    }

    /// Accepts floats such as `2500.0`. Beyond 9e15 a float cannot distinguish neighbouring
    /// integers.
    fn visit_f64<E>(self, value: f64) -> Result<Option<T>, E> {
        let is_exact = value.fract() == 0.0 && value.abs() < 9e15;
        Ok(is_exact.then_some(value as i64).and_then(T::from_integer))
    }

    fn visit_str<E>(self, text: &str) -> Result<Option<T>, E> {
        Ok(T::from_text(text))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<T>, A::Error> {
        T::from_map(map)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Option<T>, A::Error> {
        T::from_list(items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: for<'de> FromJson<'de>>(json: &str) -> Option<T> {
        serde_json::from_str::<Lenient<T>>(json).unwrap().0
    }

    #[test]
    fn value_of_another_type_reads_as_absent() {
        for other in [
            "null",
            "true",
            "1.5",
            "\"x\"",
            "[1, {\"a\": 2}]",
            "{\"a\": [1]}",
        ] {
            assert_eq!(read::<i64>(other), None, "{other}");
        }

        for other in ["null", "true", "1", "[\"x\"]", "{\"id\": \"x\"}"] {
            assert_eq!(read::<String>(other), None, "{other}");
        }
    }

    #[test]
    fn integer_may_be_written_as_float() {
        assert_eq!(read::<i64>("2500.0"), Some(2500));
        assert_eq!(read::<i64>("-1.5e3"), Some(-1500));
        assert_eq!(read::<i64>("9223372036854775807"), Some(i64::MAX));
        assert_eq!(read::<i64>("9223372036854775808"), None);
        assert_eq!(read::<i64>("1e300"), None);
    }

    #[test]
    fn text_with_nul_and_long_id_read_as_absent() {
        assert_eq!(read::<String>(r#""a\u0000b""#), None);
        assert_eq!(read::<String>("\"\""), None);

        let id = |bytes: usize| read::<Id>(&format!("\"{}\"", "x".repeat(bytes)));
        assert!(id(MAX_ID_BYTES).is_some());
        assert_eq!(id(MAX_ID_BYTES + 1), None);
    }

    #[test]
    fn id_may_be_expanded() {
        let expected = Some(Id("ch_1".to_owned()));
        assert_eq!(read::<Id>("\"ch_1\""), expected);
        assert_eq!(
            read::<Id>(r#"{"object": "charge", "id": "ch_1"}"#),
            expected
        );
        assert_eq!(read::<Id>(r#"{"object": "charge"}"#), None);
    }

    #[test]
    fn null_time_differs_from_other_types() {
        assert_eq!(read::<NullableTime>("null"), Some(NullableTime::Null));
        assert_eq!(read::<NullableTime>("7"), Some(NullableTime::At(7)));
        assert_eq!(read::<NullableTime>("-7"), None);
        assert_eq!(read::<NullableTime>("\"7\""), None);
    }

    #[test]
    fn list_keeps_items_of_expected_type() {
        let items = read::<Vec<Lenient<String>>>(r#"["a", 1, {}, "b"]"#).unwrap();
        let texts: Vec<String> = items.into_iter().filter_map(|item| item.0).collect();
        assert_eq!(texts, ["a", "b"]);
    }

    #[test]
    fn nested_object_reads_any_other_value_as_absent() {
        let read = |json: &str| {
            serde_json::from_str::<Nested<serde_json::Value>>(json)
                .unwrap()
                .0
        };
        assert!(read("{\"a\": 1}").is_some());
        for other in ["null", "1", "\"x\"", "[{\"a\": 1}]"] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
