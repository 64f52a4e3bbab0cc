//! Helpers over configuration changes, as `raft` and whoever drives it call them.

use crate::eraftpb::{ConfChange, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState};
use std::borrow::Cow;

/// Either form of a configuration change.
pub trait ConfChangeI {
    fn into_v2(self) -> ConfChangeV2;

    fn as_v2(&self) -> Cow<'_, ConfChangeV2>;

    /// The older form, where the change is written in it.
    fn as_v1(&self) -> Option<Cow<'_, ConfChange>>;
}

impl ConfChangeI for ConfChange {
    fn into_v2(self) -> ConfChangeV2 {
        let changes = vec![new_conf_change_single(self.node_id, self.change_type)];
        ConfChangeV2 { transition: ConfChangeTransition::Auto, changes, context: self.context }
    }

    fn as_v2(&self) -> Cow<'_, ConfChangeV2> {
        Cow::Owned(self.clone().into_v2())
    }

    fn as_v1(&self) -> Option<Cow<'_, ConfChange>> {
        Some(Cow::Borrowed(self))
    }
}

impl ConfChangeI for ConfChangeV2 {
    fn into_v2(self) -> ConfChangeV2 {
        self
    }

    fn as_v2(&self) -> Cow<'_, ConfChangeV2> {
        Cow::Borrowed(self)
    }

    fn as_v1(&self) -> Option<Cow<'_, ConfChange>> {
        None
    }
}

impl ConfChangeV2 {
    /// Whether this change goes through a joint configuration and, if so, whether that is left without being asked.
    ///
    /// One change alone is safe without; several at once are not.
    pub fn enter_joint(&self) -> Option<bool> {
        if self.transition == ConfChangeTransition::Auto && self.changes.len() <= 1 {
            return None;
        }
        Some(self.transition != ConfChangeTransition::Explicit)
    }

    /// Whether this change ends a joint configuration: it says nothing else.
    pub fn leave_joint(&self) -> bool {
        self.transition == ConfChangeTransition::Auto && self.changes.is_empty()
    }
}

impl<V: Into<Vec<u64>>, L: Into<Vec<u64>>> From<(V, L)> for ConfState {
    /// Voters and learners.
    fn from((voters, learners): (V, L)) -> Self {
        Self { voters: voters.into(), learners: learners.into(), ..Self::default() }
    }
}

pub fn new_conf_change_single(node_id: u64, change_type: ConfChangeType) -> ConfChangeSingle {
    ConfChangeSingle { change_type, node_id }
}

/// Whether both name the same members in the same roles, in whatever order.
pub fn conf_state_eq(a: &ConfState, b: &ConfState) -> bool {
    fn sorted(ids: &[u64]) -> Vec<u64> {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    }
    a.auto_leave == b.auto_leave
        && sorted(&a.voters) == sorted(&b.voters)
        && sorted(&a.learners) == sorted(&b.learners)
        && sorted(&a.voters_outgoing) == sorted(&b.voters_outgoing)
        && sorted(&a.learners_next) == sorted(&b.learners_next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_changes_are_joint_and_one_is_not() {
        let add = |id| new_conf_change_single(id, ConfChangeType::AddNode);
        let change = |transition, changes| ConfChangeV2 { transition, changes, ..ConfChangeV2::default() };
        assert_eq!(change(ConfChangeTransition::Auto, vec![add(1)]).enter_joint(), None);
        assert_eq!(change(ConfChangeTransition::Auto, vec![add(1), add(2)]).enter_joint(), Some(true));
        assert_eq!(change(ConfChangeTransition::Implicit, vec![add(1)]).enter_joint(), Some(true));
        assert_eq!(change(ConfChangeTransition::Explicit, vec![add(1)]).enter_joint(), Some(false));
        assert!(!change(ConfChangeTransition::Auto, vec![add(1)]).leave_joint());
    }

    #[test]
    fn order_does_not_tell_configurations_apart() {
        let a = ConfState::from((vec![1, 2, 3], vec![4]));
        assert!(conf_state_eq(&a, &ConfState::from((vec![3, 1, 2], vec![4]))));
        assert!(!conf_state_eq(&a, &ConfState::from((vec![1, 2], vec![3, 4]))));
    }
}
