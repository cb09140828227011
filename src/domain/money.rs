#![allow(unused_variables)]
pub fn amount(minor_units: i64, currency: Option<&str>) -> String {
    todo!()
}
