#![allow(unused_variables)]
use crate::store::*;
#[derive(Clone)]
pub struct Inbox;
pub struct InboxTask;
impl InboxTask {
    pub async fn finish(self) {
        todo!()
    }
}
#[derive(Debug, thiserror::Error)]
pub enum InboxError {
    #[error("full")]
    Full,
    #[error("closed")]
    Closed,
    #[error(transparent)]
    Store(#[from] StoreError),
}
impl Inbox {
    pub fn start(store: Store) -> (Inbox, InboxTask) {
        todo!()
    }
    pub async fn append(&self, event: NewEvent) -> Result<Appended, InboxError> {
        todo!()
    }
}
