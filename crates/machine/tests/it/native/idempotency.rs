//! Idempotency in scripts.

use super::Said;
use tenure_machine::{Machine, NamespaceId, Op};

pub(super) fn op(_: &Said<'_>) -> Option<Op> {
    None
}

pub(super) fn show(_: &Machine, _: NamespaceId, _: &str, _: &[&str]) -> Option<String> {
    None
}
