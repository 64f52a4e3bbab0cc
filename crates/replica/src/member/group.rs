//! The other members: who is connected, who may be, who should be one, and who leads next.
//!
//! Promises. Z1: nobody counts the word of a folder that is not the one that was registered: wiped, swapped, put back, or shorter than what
//! it acknowledged. Z2: the configuration follows the table of members one change at a time; a learner votes only when it has caught up;
//! one that replaces another comes and the other goes in the same change. Z3: a closed connection to the leader starts a vote at once, which
//! comes to nothing while a majority hears of it. Z4: a leader that is asked to go hands over to the member that is furthest.
//! Not promised. That a member of a static start that was wiped before any other had heard of it is noticed; or that a copy of a folder from
//! when its member was the only voter is: it knows of nobody whom it could ask.

use super::*;
use crate::effects::PeerStatus;
use crate::identity;
use crate::peer::{Hello, PeerFacts, PeerMessage, PeerRefusal};
use crate::store::everybody;
use sha2::Digest as _;
use tenure_machine::{MemberRecord, MemberRole};

/// Candidates follow each other at this distance when a leader's connection closes, so that they do not split the vote.
const STEP_MS: u64 = 25;
/// A vote that was lost is held again after this long and the own step, so often.
const CAMPAIGN_AGAIN_MS: u64 = 100;
const CAMPAIGNS_MAX: u32 = 4;
/// A member registers again, and a leader looks at the table again, after this long.
const REGISTER_MS: u64 = 1_000;
const RECONCILE_MS: u64 = 200;
const FACTS_MS: u64 = 1_000;
/// A learner that lacks no more entries than this has caught up.
const CLOSE_ENTRIES: u64 = 256;
const BOOT_BITS: u32 = 16;
const COMPLAINTS_MAX: usize = 32;
/// Members that came and are not in the table here.
const STRANGERS_MAX: usize = 16;
/// A peer that should fetch a snapshot and has not asked for a piece for so long is offered one anew.
const FETCH_STALLS_MS: u64 = 5_000;
/// Clocks of members may differ by this much before somebody should know.
const SKEW_MS: u64 = 10_000;
/// A leader whose disk is full looks for another leader this often.
const TROUBLE_MS: u64 = 10_000;

/// A peer that is connected, in one life of it.
pub(super) struct Link {
    pub(super) boot: u64,
    storage: [u8; 16],
    heard_at: u64,
    facts: Option<PeerFacts>,
    skew_ms: i64,
}

/// What the log says of a member's folder.
struct Registered {
    /// `None`: it has never come.
    storage: Option<[u8; 16]>,
    boots: u64,
    /// How far its log is known to have reached, of entries that are committed.
    end: u64,
}

/// What came up with a peer that is worth an operator's word.
#[derive(Default)]
pub(super) struct Complaints(BTreeMap<MemberId, String>);

impl Complaints {
    /// Anybody may come and be refused; what is remembered of that has a limit.
    fn add(&mut self, peer: MemberId, what: String) {
        if self.0.len() < COMPLAINTS_MAX || self.0.contains_key(&peer) {
            self.0.insert(peer, what);
        }
    }
}

impl<D: Disk> Member<D> {
    // Connections.

    /// What this member says first on each connection.
    pub fn hello(&self, wall_ms: u64) -> Hello {
        let (last_index, last_term) = self.raft.store().last();
        Hello {
            cluster_token: self.config.cluster_token.clone(),
            cluster: self.machine.cluster(),
            member: self.config.member,
            name: self.config.name.clone(),
            boot: self.config.boot,
            storage: self.identity.storage,
            boots: self.boots(),
            last_term,
            last_index,
            behaviour: self.config.behaviour,
            release: self.config.release.clone(),
            wall_ms,
            join: self.config.join.as_ref().map_or([0; 16], |j| j.secret),
            address: self.own_address().to_owned(),
        }
    }

    /// The number of this start of the folder, which only rises, and below it some bits of the life's own draw.
    fn boots(&self) -> u64 {
        self.turned_away.unwrap_or(self.log.life() << BOOT_BITS | self.config.boot & ((1 << BOOT_BITS) - 1))
    }

    /// Whoever starts this folder again is not to take it for newer than it is.
    pub(super) fn note_turned_away(&mut self) {
        if self.turned_away.is_none() {
            let boots = self.boots();
            if identity::turned_away(&mut self.disk, boots).is_ok() {
                self.turned_away = Some(boots);
            }
        }
    }

    /// Judges the hello of a connection, whoever made it. From then on that life of the peer is connected.
    pub fn greet(&mut self, hello: &Hello, wall_ms: u64) -> Result<(), PeerRefusal> {
        if let Err(refusal) = self.judge(hello) {
            self.complaints.add(hello.member, format!("refused here: {}", refusal.why));
            return Err(refusal);
        }
        self.complaints.0.remove(&hello.member);
        self.meet(hello);
        let skew_ms = i64::try_from(hello.wall_ms).unwrap_or(i64::MAX).saturating_sub_unsigned(wall_ms);
        let link =
            Link { boot: hello.boot, storage: hello.storage, heard_at: self.clock.elapsed(), facts: None, skew_ms };
        match self.links.get_mut(&hello.member) {
            Some(known) if known.boot == hello.boot => known.skew_ms = skew_ms,
            _ => {
                self.links.insert(hello.member, link);
            }
        }
        if self.campaign_at.is_some() && hello.member.0 == self.raft.raft.leader_id {
            self.campaign_at = None;
        }
        Ok(())
    }

    fn judge(&self, hello: &Hello) -> Result<(), PeerRefusal> {
        let refuse = |fatal: bool, why: String| Err(PeerRefusal { fatal, why });
        let name = &hello.name;
        if hello.cluster_token != self.config.cluster_token {
            return refuse(
                false,
                format!(
                    "member `{name}` was started for the cluster `{}`, this one is of `{}`: check --cluster-token and the addresses",
                    hello.cluster_token, self.config.cluster_token
                ),
            );
        }
        if hello.member == self.config.member {
            return refuse(
                false,
                format!("`{name}` has this member's own name and id: give each member its own --name"),
            );
        }
        let own = self.machine.cluster();
        if own != 0 && hello.cluster != 0 && own != hello.cluster {
            return refuse(
                false,
                format!(
                    "member `{name}` holds the data of cluster {:016x}, this one of {own:016x}: they were started apart; empty the folder of the one that is to join, and add it with `tenure member add`",
                    hello.cluster
                ),
            );
        }
        let Some(record) = self.machine.member(hello.member) else {
            let expected = own == 0
                || self.raft.store().conf_state.voters.contains(&hello.member.0)
                || self.config.peers.iter().any(|(id, ..)| *id == hello.member)
                || self.may_be_added_since(hello);
            if expected {
                return self.judge_folder(hello, self.known_folder(hello.member));
            }
            return refuse(false, format!("`{name}` is no member of this cluster: add it with `tenure member add`"));
        };
        self.judge_record(hello, record)
    }

    /// A member that was away does not know whom the others have added; one of those may be the leader that brings it up to date.
    fn may_be_added_since(&self, hello: &Hello) -> bool {
        let (last_index, last_term) = self.raft.store().last();
        hello.cluster == self.machine.cluster() && (hello.last_term, hello.last_index) >= (last_term, last_index)
    }

    /// What it says is answered over a connection to it, so one that is not in the table here is dialled too.
    fn meet(&mut self, hello: &Hello) {
        let known = self.peers().iter().any(|(id, ..)| *id == hello.member);
        if !known && !hello.address.is_empty() && self.strangers.len() < STRANGERS_MAX {
            self.strangers.insert(hello.member, (hello.name.clone(), hello.address.clone()));
            self.strangers_version += 1;
        }
    }

    fn judge_record(&self, hello: &Hello, record: &MemberRecord) -> Result<(), PeerRefusal> {
        let name = &record.name;
        let fatal = |why: String| Err(PeerRefusal { fatal: true, why });
        // Until the configuration is without it, its vote may be needed for that.
        if !record.is_live() && !self.is_configured(record.id) {
            return fatal(removed(name));
        }
        if *hello.name != **name {
            return Err(PeerRefusal {
                fatal: false,
                why: format!("member {} is called `{name}`, not `{}`: check --name", record.id, hello.name),
            });
        }
        let registered = self.known_folder(record.id);
        if registered.storage.is_none() && record.join != [0; 32] && record.join != join_digest(&hello.join) {
            return fatal(format!(
                "the join token of member `{name}` is not the one that was given out: use the newest"
            ));
        }
        self.judge_folder(hello, registered)
    }

    fn judge_folder(&self, hello: &Hello, registered: Registered) -> Result<(), PeerRefusal> {
        let name = &hello.name;
        let fatal = |why: String| Err(PeerRefusal { fatal: true, why });
        if self.config.sabotage == Some(Sabotage::ForgetStorage) {
            return Ok(());
        }
        if registered.storage.is_some_and(|storage| storage != hello.storage) {
            return fatal(format!(
                "member `{name}` comes with another data folder than the one it was registered with: the folder was wiped or swapped, and the votes and entries it had given its word for are not in it; put the old folder back, or use `tenure member replace {name}`"
            ));
        }
        // A folder that was put back may come to the number of the start that was registered, but not to its draw.
        let same_start = hello.boots >> BOOT_BITS == registered.boots >> BOOT_BITS && hello.boots != registered.boots;
        if hello.boots < registered.boots || same_start || hello.last_index < registered.end {
            return fatal(format!(
                "the data folder of member `{name}` is older than what the member has acknowledged: a copy was put back; put the newest folder in its place, or use `tenure member replace {name}`"
            ));
        }
        Ok(())
    }

    /// What is known of a member's folder. After a start, what is in the log and not known to be committed counts: it may have been
    /// applied before, and whoever wrote it had it from the member itself.
    fn known_folder(&self, id: MemberId) -> Registered {
        let record = self.machine.member(id);
        let mut known = Registered {
            storage: record.filter(|r| r.has_come()).map(|r| r.storage),
            boots: record.map_or(0, |r| r.boots),
            end: record.map_or(0, |r| r.seen.0),
        };
        if self.lead.is_some() {
            let acknowledged = self.raft.raft.prs().get(id.0).map_or(0, |p| p.matched);
            known.end = known.end.max(acknowledged.min(self.raft.raft.raft_log.committed));
        }
        let unapplied = self.raft.store().after(self.machine.position().index.0);
        let batches = unapplied.filter(|e| e.entry_type == EntryType::EntryNormal && !e.data.is_empty());
        for batch in batches.filter_map(|e| Batch::decode(&e.data).ok()) {
            for op in batch.txns.iter().flat_map(|t| &t.then) {
                match op {
                    // A registration under another folder than the first is refused when it is applied.
                    Op::MemberRegister { id: of, storage, boots, .. }
                        if *of == id && known.storage.is_none_or(|first| first == *storage) =>
                    {
                        known.storage = Some(*storage);
                        known.boots = known.boots.max(*boots);
                    }
                    Op::MemberSeen { id: of, index } if *of == id => known.end = known.end.max(index.0),
                    _ => {}
                }
            }
        }
        known
    }

    /// Every connection for messages with that life of a peer is closed.
    pub fn hung_up(&mut self, peer: MemberId, boot: u64) {
        if self.links.get(&peer).is_none_or(|link| link.boot != boot) {
            return;
        }
        self.links.remove(&peer);
        if self.lead.is_some() {
            let matched = self.raft.raft.prs().get(peer.0).map_or(0, |p| p.matched);
            let index = Index(matched.min(self.raft.raft.raft_log.committed));
            let known = self.machine.member(peer).is_some_and(|r| r.is_live() && r.seen < index);
            self.raft.report_unreachable(peer.0);
            self.fetch_failed(peer);
            // So that a folder which comes back shorter is known for what it is, by whoever leads then.
            if known && !self.stopping {
                self.enqueue_lead(Op::MemberSeen { id: peer, index });
            }
        } else if peer.0 == self.raft.raft.leader_id {
            self.leader_hung_up(peer);
        }
    }

    /// Its process is gone, or the way to it. Others may vote at once, and this member asks them, the first in the order of ids first.
    fn leader_hung_up(&mut self, leader: MemberId) {
        let conf = &self.raft.store().conf_state;
        if self.stopping || !conf.voters.contains(&self.config.member.0) {
            return;
        }
        let before = conf.voters.iter().filter(|id| **id != leader.0 && **id < self.config.member.0).count();
        self.raft.raft.election_elapsed = self.config.election_ticks;
        self.campaign_step = STEP_MS * before as u64;
        self.campaign_tries = CAMPAIGNS_MAX;
        self.campaign_at = Some(self.clock.elapsed() + self.campaign_step);
    }

    pub(super) fn campaign_early(&mut self) -> Result<(), Fault> {
        let now = self.clock.elapsed();
        if self.campaign_at.is_none_or(|at| now < at) {
            return Ok(());
        }
        self.campaign_at = None;
        let leader = MemberId(self.raft.raft.leader_id);
        let gone = self.raft.raft.state != StateRole::Leader && !self.links.contains_key(&leader);
        if gone && self.campaign_tries > 0 {
            // Two may ask at the same time and neither win: again, one after the other, and not only when the long timeout is over.
            self.campaign_tries -= 1;
            self.campaign_at = Some(now + CAMPAIGN_AGAIN_MS + self.campaign_step);
            self.raft.campaign().map_err(consensus_fault)?;
            self.set_jitter();
        }
        Ok(())
    }

    /// A peer refused this member's hello.
    pub fn turned_away(&mut self, by: MemberId, refusal: &PeerRefusal) {
        self.complaints.add(by, format!("refuses this member: {}", refusal.why));
        if refusal.fatal {
            self.expelled = Some(refusal.why.clone());
        }
    }

    // Who should be a member.

    /// Whom to connect to: id, name and address.
    pub fn peers(&self) -> Vec<(MemberId, String, String)> {
        let mut peers: BTreeMap<MemberId, (String, String)> = BTreeMap::new();
        let joined = self.config.join.iter().flat_map(|j| &j.peers);
        for (id, name, address) in self.config.peers.iter().chain(joined) {
            peers.insert(*id, (name.clone(), address.clone()));
        }
        peers.extend(self.strangers.clone());
        for record in self.machine.members() {
            // One that is to go is talked to until the configuration is without it: it has to hear of that.
            if !record.is_live() && !self.is_configured(record.id) {
                peers.remove(&record.id);
            } else if !record.peer.is_empty() {
                peers.insert(record.id, (record.name.to_string(), record.peer.to_string()));
            }
        }
        peers.remove(&self.config.member);
        peers.into_iter().map(|(id, (name, address))| (id, name, address)).collect()
    }

    /// Another number when `peers` may give something else.
    pub fn peers_version(&self) -> u64 {
        self.machine.members_version() + self.strangers_version + self.conf_version
    }

    /// Whether the configuration that votes are counted by names it, in whatever role.
    fn is_configured(&self, id: MemberId) -> bool {
        everybody(&self.raft.store().conf_state).any(|named| named == id.0)
    }

    fn own_address(&self) -> &str {
        let own = self.config.peers.iter().find(|(id, ..)| *id == self.config.member);
        own.map_or("", |(.., address)| address)
    }

    /// Tells the cluster about this start, until the table has it.
    pub(super) fn register(&mut self) {
        let now = self.clock.elapsed();
        if now < self.register_at
            || self.stopping
            || (self.lead.is_none() && self.raft.raft.leader_id == raft::INVALID_ID)
        {
            return;
        }
        if self.lead.as_ref().is_some_and(|l| !l.serving) {
            return;
        }
        let Some(record) = self.machine.member(self.config.member).filter(|r| r.is_live()) else { return };
        let boots = self.boots();
        let same = record.storage == self.identity.storage
            && record.boots == boots
            && (self.own_address().is_empty() || *record.peer == *self.own_address())
            && record.clients.iter().map(|c| &**c).eq(self.config.clients.iter().map(String::as_str))
            && record.behaviour == self.config.behaviour
            && *record.release == *self.config.release;
        self.register_at = now + REGISTER_MS;
        if same {
            return;
        }
        let op = Op::MemberRegister {
            id: self.config.member,
            storage: self.identity.storage,
            boots,
            peer: self.own_address().into(),
            clients: self.config.clients.iter().map(|c| c.as_str().into()).collect(),
            behaviour: self.config.behaviour,
            release: self.config.release.as_str().into(),
        };
        let number = self.enqueue(Txn::of(op), 256, Wants::Own);
        self.registering = Some(number);
    }

    pub(super) fn registered(&mut self, number: u64, result: &Result<tenure_machine::TxnReply, Rejection>) {
        if self.registering != Some(number) {
            return;
        }
        self.registering = None;
        if result.is_ok() && self.turned_away.is_some() {
            // Taken after all: the reason was another one. This start keeps its number and the next has its own; if the file stays, the next but one.
            let _ = self.disk.remove(identity::TURNED_AWAY);
        }
        // One that was removed goes when the configuration is without it: until then its vote may be needed.
        if let Err(rejection @ (Rejection::OtherStorage { .. } | Rejection::RolledBack { .. })) = result {
            self.expelled = Some(rejection.to_string());
        }
    }

    /// Brings the configuration in line with the table of members, one change at a time.
    pub(super) fn reconcile(&mut self) -> Result<(), Fault> {
        let now = self.clock.elapsed();
        let leads = self.lead.as_ref().is_some_and(|l| l.serving);
        if !leads || now < self.reconcile_at || self.stopping || self.machine.cluster() == 0 {
            return Ok(());
        }
        self.reconcile_at = now + RECONCILE_MS;
        self.list_voters();
        self.raise_behaviour();
        let applied = self.machine.position().index.0;
        if self.raft.raft.pending_conf_index > applied || self.raft.raft.lead_transferee.is_some() {
            return Ok(());
        }
        let Some(change) = self.next_change() else { return Ok(()) };
        match self.raft.propose_conf_change(Vec::new(), change) {
            Ok(()) | Err(raft::Error::ProposalDropped) => Ok(()),
            Err(error) => Err(consensus_fault(error)),
        }
    }

    /// Members of a static start come into the table by the first leader's word.
    fn list_voters(&mut self) {
        let missing: Vec<_> = self
            .raft
            .store()
            .conf_state
            .voters
            .iter()
            .map(|id| MemberId(*id))
            .filter(|id| self.machine.member(*id).is_none())
            .filter_map(|id| self.config.peers.iter().find(|(peer, ..)| *peer == id).cloned())
            .collect();
        if !missing.is_empty() && now_or_later(&mut self.list_at, self.clock.elapsed(), REGISTER_MS) {
            for (id, name, address) in missing {
                self.enqueue_lead(Op::MemberAdd {
                    id,
                    name: name.into(),
                    peer: address.into(),
                    role: MemberRole::Voter,
                    replaces: None,
                    join: [0; 32],
                });
            }
        }
    }

    /// Every member has said what it can: the oldest decides.
    fn raise_behaviour(&mut self) {
        let able = everybody(&self.raft.store().conf_state)
            .map(|id| self.machine.member(MemberId(id)).filter(|r| r.has_come()).map_or(0, |r| r.behaviour));
        let to = able.min().unwrap_or_default().min(self.config.behaviour);
        if to > self.machine.behaviour() && now_or_later(&mut self.raise_at, self.clock.elapsed(), REGISTER_MS) {
            self.enqueue_lead(Op::RaiseBehaviour { to });
        }
    }

    fn next_change(&mut self) -> Option<ConfChangeV2> {
        let conf = self.raft.store().conf_state.clone();
        if !conf.voters_outgoing.is_empty() {
            // A leader that was lost in the middle leaves the end to its successor.
            return Some(ConfChangeV2::default());
        }
        let change = |kind: ConfChangeType, id: MemberId| {
            let mut single = ConfChangeSingle::default();
            single.set_change_type(kind);
            single.node_id = id.0;
            single
        };
        let mut changes = Vec::new();
        let mut goes = false;
        for record in self.machine.members() {
            let (id, is_voter, is_learner) =
                (record.id, conf.voters.contains(&record.id.0), conf.learners.contains(&record.id.0));
            match self.machine.member_wanted(id, |id| conf.voters.contains(&id.0)) {
                MemberRole::Removed if is_voter || is_learner => {
                    if id == self.config.member {
                        goes = true;
                        continue;
                    }
                    changes.push(change(ConfChangeType::RemoveNode, id));
                }
                MemberRole::Learner | MemberRole::Voter if !is_voter && !is_learner => {
                    changes.push(change(ConfChangeType::AddLearnerNode, id));
                }
                MemberRole::Voter if is_learner && self.has_caught_up(id) => {
                    changes.push(change(ConfChangeType::AddNode, id));
                    if let Some(old) = record.replaces.filter(|old| conf.voters.contains(&old.0))
                        && old != self.config.member
                    {
                        changes.push(change(ConfChangeType::RemoveNode, old));
                    }
                }
                _ => continue,
            }
            if !changes.is_empty() {
                break;
            }
        }
        // Members that are replaced and gone are so in the table too.
        let replaced = self.machine.members().find_map(|r| {
            let old = r.replaces.filter(|_| conf.voters.contains(&r.id.0))?;
            let stays = self.machine.member(old).is_some_and(|o| o.is_live());
            stays.then_some(old)
        });
        if let Some(old) = replaced {
            self.enqueue_lead(Op::MemberRemove { id: old });
        }
        if changes.is_empty() && goes {
            // Another leads before this one goes.
            let _ = self.hand_over(None);
        }
        (!changes.is_empty()).then(|| ConfChangeV2 { changes, ..ConfChangeV2::default() })
    }

    fn has_caught_up(&self, id: MemberId) -> bool {
        let committed = self.raft.raft.raft_log.committed;
        let registered = self.machine.member(id).is_some_and(MemberRecord::has_come);
        registered
            && self.links.contains_key(&id)
            && self.raft.raft.prs().get(id.0).is_some_and(|p| {
                p.state == raft::ProgressState::Replicate && p.matched + CLOSE_ENTRIES >= committed && p.matched > 0
            })
    }

    // Leadership.

    /// Whether an acknowledgement may count: of a folder that is registered, or while too few are for that to be asked.
    pub(super) fn may_count(&self, from: MemberId) -> bool {
        let Some(link) = self.links.get(&from) else { return false };
        if self.config.sabotage == Some(Sabotage::ForgetStorage) {
            return true;
        }
        let applied = |id: MemberId| self.machine.member(id).filter(|r| r.has_come()).map(|r| r.storage);
        let registered = |id: MemberId| applied(id).or_else(|| self.unapplied_storage.get(&id).copied());
        match registered(from) {
            Some(storage) => storage == link.storage,
            None => {
                let voters = &self.raft.store().conf_state.voters;
                let others = voters.iter().filter(|id| registered(MemberId(**id)).is_some()).count();
                !voters.contains(&from.0) || others <= voters.len() / 2
            }
        }
    }

    /// Where an acknowledgement that does not count leads: what is sent next, so that the member comes to the entry that registers it.
    pub(super) fn lead_on(&mut self, from: MemberId, index: u64) {
        if let Some(progress) = self.raft.raft.mut_prs().get_mut(from.0)
            && progress.state == raft::ProgressState::Probe
            && progress.next_idx <= index
        {
            progress.next_idx = index + 1;
            progress.resume();
        }
    }

    /// Hands leadership to a member, or to the one that is furthest.
    pub fn hand_over(&mut self, to: Option<MemberId>) -> Result<MemberId, Refusal> {
        if self.lead.is_none() {
            return Err(Refusal::NoQuorum);
        }
        let voters = &self.raft.store().conf_state.voters;
        let live = |id: &u64| self.machine.member(MemberId(*id)).is_none_or(MemberRecord::is_live);
        let best = voters
            .iter()
            .filter(|id| **id != self.config.member.0 && to.is_none_or(|to| to.0 == **id) && live(id))
            .filter(|id| self.links.contains_key(&MemberId(**id)))
            .filter_map(|id| self.raft.raft.prs().get(*id).map(|p| (p.matched, *id)))
            .max();
        let Some((_, id)) = best else { return Err(Refusal::NoQuorum) };
        self.raft.transfer_leader(id);
        self.set_jitter();
        Ok(MemberId(id))
    }

    pub fn is_handing_over(&self) -> bool {
        self.lead.is_some() && self.raft.raft.lead_transferee.is_some()
    }

    /// A leader that can take nothing that grows gives way to one that can.
    pub(super) fn leave_full_disk(&mut self) {
        if self.lead.is_none() || !self.disk_full() || self.alone() {
            return;
        }
        let voters = &self.raft.store().conf_state.voters;
        let has_room = |link: &Link| link.facts.as_ref().is_some_and(|f| !f.disk_full);
        let roomy = self.links.iter().find(|(id, link)| has_room(link) && voters.contains(&id.0)).map(|(id, _)| *id);
        if roomy.is_some() && now_or_later(&mut self.trouble_at, self.clock.elapsed(), TROUBLE_MS) {
            let _ = self.hand_over(roomy);
        }
    }

    // Who was heard, and what they say.

    pub(super) fn heard(&mut self, from: MemberId) {
        let now = self.clock.elapsed();
        if let Some(link) = self.links.get_mut(&from) {
            link.heard_at = now;
        }
        if from.0 == self.raft.raft.leader_id {
            self.leader_heard_at = now;
        }
    }

    /// When the slowest of the fastest majority was heard of last; of both, while a joint configuration holds.
    pub(super) fn majority_heard_at(&self) -> Option<u64> {
        let conf = &self.raft.store().conf_state;
        let heard = |id: &u64| match MemberId(*id) {
            own if own == self.config.member => self.clock.elapsed(),
            other => self.links.get(&other).map_or(0, |l| l.heard_at),
        };
        // Asked for each request: a handful of voters is compared in place.
        let of = |voters: &[u64]| {
            let by_majority = |at: &u64| voters.iter().filter(|id| heard(id) >= *at).count() > voters.len() / 2;
            voters.iter().map(heard).filter(by_majority).max()
        };
        let incoming = of(&conf.voters);
        if conf.voters_outgoing.is_empty() { incoming } else { incoming.min(of(&conf.voters_outgoing)) }
    }

    pub(super) fn tell_facts(&mut self) {
        if !now_or_later(&mut self.facts_at, self.clock.elapsed(), FACTS_MS) {
            return;
        }
        let facts = PeerFacts {
            applied: self.machine.position().index.0,
            last_index: self.raft.store().last_index(),
            disk_free: self.room.free(),
            disk_full: self.disk_full(),
            log_bytes: self.log.file_bytes(),
            memory: self.machine.memory().used,
            alarms: self.own_alarms().iter().map(|a| a.to_string().chars().take(200).collect()).take(8).collect(),
        };
        let peers: Vec<MemberId> = self.links.keys().copied().collect();
        for peer in peers {
            self.post(peer, Lane::Messages, &PeerMessage::Facts(facts.clone()));
        }
    }

    /// The configuration is without this member, and so is the table: it was removed.
    pub(super) fn notice_removal(&mut self) {
        let conf = &self.raft.store().conf_state;
        let own = self.config.member;
        if !self.is_configured(own)
            && let Some(record) = self.machine.member(own)
            && self.machine.member_wanted(own, |id| conf.voters.contains(&id.0)) == MemberRole::Removed
        {
            self.expelled = Some(removed(&record.name));
        }
    }

    /// The library waits for a word on each snapshot that it has offered; the word may have been lost.
    pub(super) fn watch_fetches(&mut self) {
        if self.lead.is_none() {
            return;
        }
        let now = self.clock.elapsed();
        let offered: Vec<(MemberId, u64)> = self
            .raft
            .raft
            .prs()
            .iter()
            .filter(|(_, p)| p.state == raft::ProgressState::Snapshot)
            .map(|(id, p)| (MemberId(*id), p.pending_snapshot))
            .collect();
        self.offers.retain(|id, _| offered.iter().any(|(peer, _)| peer == id));
        for (peer, index) in offered {
            let since = *self.offers.entry(peer).or_insert(now);
            let facts = self.links.get(&peer).and_then(|l| l.facts.as_ref());
            if facts.is_some_and(|f| f.last_index >= index) {
                self.raft.report_snapshot(peer.0, raft::SnapshotStatus::Finish);
                self.set_jitter();
            } else if now >= since + FETCH_STALLS_MS {
                self.offers.remove(&peer);
                self.fetch_failed(peer);
            }
        }
    }

    pub(super) fn facts_told(&mut self, from: MemberId, facts: PeerFacts) {
        if let Some(link) = self.links.get_mut(&from) {
            link.facts = Some(facts);
        }
    }

    pub(super) fn peer_alarms(&self) -> Vec<Alarm> {
        let name = |id: &MemberId| {
            let known = self.machine.member(*id).map(|r| r.name.to_string());
            known
                .or_else(|| self.config.peers.iter().find(|(p, ..)| p == id).map(|p| p.1.clone()))
                .unwrap_or_else(|| id.to_string())
        };
        let skewed = self.links.iter().filter(|(_, l)| l.skew_ms.unsigned_abs() > SKEW_MS);
        let skewed = skewed.map(|(id, l)| Alarm::ClockSkew { member: name(id), ms: l.skew_ms });
        let gone = |id: &MemberId| self.machine.member(*id).is_some_and(|r| !r.is_live());
        let said = self
            .complaints
            .0
            .iter()
            .filter(|(id, _)| !gone(id))
            .map(|(id, why)| Alarm::Peer { member: name(id), why: why.clone() });
        skewed.chain(said).collect()
    }

    /// Every member of the table, as this member sees it.
    pub(super) fn peer_statuses(&self) -> Vec<PeerStatus> {
        let now = self.clock.elapsed();
        let conf = &self.raft.store().conf_state;
        self.machine
            .members()
            .filter(|r| r.is_live() || conf.voters.contains(&r.id.0) || conf.learners.contains(&r.id.0))
            .map(|r| {
                let link = self.links.get(&r.id);
                PeerStatus {
                    record: r.clone(),
                    is_connected: link.is_some() || r.id == self.config.member,
                    heard_ms: link.map(|l| now.saturating_sub(l.heard_at)),
                    matched: self.lead.as_ref().and_then(|_| self.raft.raft.prs().get(r.id.0)).map(|p| p.matched),
                    facts: link.and_then(|l| l.facts.clone()),
                    skew_ms: link.map_or(0, |l| l.skew_ms),
                }
            })
            .collect()
    }
}

/// Whether it is time for something that happens at most so often; if so the next time is set.
fn now_or_later(at: &mut u64, now: u64, every: u64) -> bool {
    let due = now >= *at;
    if due {
        *at = now + every;
    }
    due
}

/// What is kept of a join secret.
pub fn join_digest(secret: &[u8; 16]) -> [u8; 32] {
    sha2::Sha256::digest(secret).into()
}

fn removed(name: &str) -> String {
    format!(
        "member `{name}` was removed from the cluster; to come back it needs an empty folder and `tenure member add`"
    )
}
