//! Conditions of a transaction on anything but keys; see `Compare`.

use crate::apply::Machine;
use crate::coded::coded_enum;
use crate::types::*;

coded_enum! {
    /// What must be so for the first list of a transaction to run.
    pub enum Condition as "a condition" {
        /// The session lives.
        SessionAlive(SessionId) = 1,
    }
}

impl Machine {
    /// Whether it is so, in the namespace of the transaction.
    pub(crate) fn holds(&self, _namespace: NamespaceId, condition: &Condition) -> bool {
        match condition {
            Condition::SessionAlive(id) => self.sessions.get(*id).is_some(),
        }
    }
}
