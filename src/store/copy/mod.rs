//! Tables and rows that `copy` transfers from one database to another.

pub(super) mod rows;
pub(super) mod tables;
