//! A backup becomes the beginning of another cluster.
//!
//! Promises. B1: every token that is given after it is larger than `revision`, so two restores of one backup at different revisions
//! give no token twice (as long as the first one has not counted up to the second's), and none that the old cluster gave
//! after the backup, if `revision` is beyond what it had reached. That holds for the tokens of etcd leases too, which are log indexes:
//! the log goes on at least at the same number. B2: keys, sessions, locks, waits and remembered requests are those of the backup.
//! B3: what lies before is compacted, so that a watch or a read at an older revision is told so, and nobody misses a change unknowingly.
//! B4: the table of members is empty: the members of the new cluster register anew, and no old one is taken for one of them.
//! Not promised. That owners of sessions come back: whoever does not renew within the time of its session loses it, as after any
//! outage. And an owner of a lock in the backup may have lost it in the old cluster after that; only the token check at the resource tells.
//! Relies on. The caller chooses the revision: 2^20 for each second since 2020 cannot be reached by counting.

use crate::apply::{Machine, Position, sum_event};
use crate::history::{Marks, Ring};
use crate::reply::Rejection;
use crate::types::*;

/// Numbers in JSON are exact below it.
const REVISION_END: u64 = 1 << 53;

impl Machine {
    /// Makes this state the first one of another cluster and says where its log begins: the caller writes a snapshot of it at that
    /// position. With an identity (cluster, issuer) it is a clone, whose tokens are of another issuer; without it replaces
    /// the old cluster. A refusal changes nothing.
    pub fn restore(&mut self, revision: Revision, identity: Option<(u64, [u8; 16])>) -> Result<Position, Rejection> {
        let refused = |why: String| Err(Rejection::Invalid { why: why.into() });
        if revision <= self.revision || revision.0 >= REVISION_END {
            return refused(format!(
                "the restored state must begin at a revision above {}, which is that of the backup, and below 2^53",
                self.revision
            ));
        }
        if identity.is_some_and(|(cluster, _)| cluster == 0 || cluster == self.cluster) {
            return refused("a clone has a cluster id of its own, which is not zero".to_owned());
        }
        self.snapshot_abort();
        if let Some((cluster, issuer)) = identity {
            (self.cluster, self.issuer) = (cluster, issuer);
        }
        self.revision = revision;
        self.compact_floor = revision.0 as i64;
        self.keys.compact(revision);
        self.ring = Ring::load(Vec::new(), revision);
        self.busy_ring = Ring::busy(revision);
        self.marks = Marks::new();
        self.members.clear();
        self.position.index = Index(self.position.index.0.max(revision.0));
        self.sums.event([sum_event::RESTORED, revision.0, self.cluster]);
        self.sums.note(self.position.index);
        Ok(self.position)
    }
}
