//! What happened to a lock: the newest events, for people.

use crate::coded::coded_struct;
use crate::objects::Lived;

coded_struct! {
    /// Under construction.
    pub struct LockEvents as "lock events" {
        pub value: u64,
    }
}

impl Lived for LockEvents {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        0
    }
}
