//! Rows that `copy` carries from one database to another.

pub(super) mod rows;
pub(super) mod tables;
