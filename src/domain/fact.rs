#![allow(unused_variables)]
use super::event::Event;
pub fn tells_a_fact(event: &Event) -> bool { todo!() }
