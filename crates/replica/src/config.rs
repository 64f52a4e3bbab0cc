//! What a member is told when it is opened. Nothing here is read by apply, so members may have different values.

use tenure_machine::{MemberId, MemoryLimits};

/// No configuration allows a larger transaction. The blocks of a snapshot are made for it.
pub(crate) const REQUEST_BYTES_MAX: usize = 64 << 20;

#[derive(Clone, Debug)]
pub struct Config {
    pub member: MemberId,
    pub name: String,
    /// What a static start calls the cluster; a folder of another one is refused.
    pub cluster_token: String,
    /// All members of a new cluster, this one among them: id, name, address. Empty: this member alone.
    pub peers: Vec<(MemberId, String, String)>,
    /// For a new member of a running cluster; `peers` then names this member alone.
    pub join: Option<Join>,
    /// Where clients are told to connect.
    pub clients: Vec<String>,
    /// The newest behaviour that this release knows. Less only where an older release is played.
    pub behaviour: u16,
    pub release: String,
    #[doc(hidden)]
    pub sabotage: Option<Sabotage>,
    pub tick_ms: u64,
    /// A follower that hears nothing for this many ticks may stand for election.
    pub election_ticks: usize,
    pub heartbeat_ticks: usize,
    /// For the jitter of elections.
    pub seed: u64,
    /// Drawn anew at each start, so that no answer reaches the caller of an earlier life.
    pub boot: u64,
    /// Drawn by the shell: the storage id of a new folder, and the issuer id of a new cluster.
    pub random: [u8; 32],

    pub first_segment_bytes: u64,
    pub segment_bytes: u64,
    /// A snapshot is taken after so much of log.
    pub snapshot_log_bytes: u64,
    /// Transactions are put together into entries of about this size.
    pub max_batch_bytes: usize,
    /// One transaction.
    pub max_request_bytes: usize,
    /// What may wait for the next poll.
    pub max_queued: usize,
    pub max_queued_bytes: usize,
    /// Below this much free space only what frees some is taken.
    pub disk_reserve_bytes: u64,
    pub memory: MemoryLimits,
    /// `None`: only what clients ask for is compacted.
    pub autocompact: Option<AutoCompact>,
}

/// What a new member was told about the cluster that it joins.
#[derive(Clone, Debug)]
pub struct Join {
    /// Zero: whichever answers to the token.
    pub cluster: u64,
    pub secret: [u8; 16],
    /// Some members: id, name, address.
    pub peers: Vec<(MemberId, String, String)>,
}

/// Rules that a simulated member breaks on purpose, to see that somebody notices.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    SkipReadIndex,
    SendBeforeSync,
    AckBeforeSync,
    ForgetStorage,
    LocalFlagInApply,
    ApplyTwice,
    ForgetVote,
}

/// How much history to keep: what is younger than `keep_ms` or among the newest `keep_revisions`, while it takes no more than its share
/// of memory.
#[derive(Clone, Copy, Debug)]
pub struct AutoCompact {
    pub keep_ms: u64,
    pub keep_revisions: u64,
    pub history_share_percent: u64,
}

impl Default for AutoCompact {
    fn default() -> Self {
        Self { keep_ms: 3_600_000, keep_revisions: 10_000, history_share_percent: 25 }
    }
}

impl Config {
    /// One member on its own, with the default sizes.
    pub fn alone(member: MemberId, name: &str, boot: u64, random: [u8; 32]) -> Self {
        Self {
            member,
            name: name.to_owned(),
            cluster_token: "tenure".to_owned(),
            peers: Vec::new(),
            join: None,
            clients: Vec::new(),
            behaviour: tenure_machine::BEHAVIOUR,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            sabotage: None,
            tick_ms: 100,
            election_ticks: 10,
            heartbeat_ticks: 1,
            seed: boot,
            boot,
            random,
            first_segment_bytes: 1 << 20,
            segment_bytes: 16 << 20,
            snapshot_log_bytes: 64 << 20,
            max_batch_bytes: 1 << 20,
            max_request_bytes: 3 << 19,
            max_queued: 16_384,
            max_queued_bytes: 64 << 20,
            disk_reserve_bytes: 64 << 20,
            memory: MemoryLimits::default(),
            autocompact: Some(AutoCompact::default()),
        }
    }

    pub(crate) fn election_ms(&self) -> u64 {
        self.tick_ms * self.election_ticks as u64
    }

    /// Who decides before the first entry. A member that joins learns it from a snapshot.
    pub(crate) fn voters(&self) -> Vec<u64> {
        if self.join.is_some() {
            return Vec::new();
        }
        if self.peers.is_empty() {
            return vec![self.member.0];
        }
        self.peers.iter().map(|(id, ..)| id.0).collect()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let wrong = |what: &str| Err(what.to_owned());
        if self.member.0 == 0 {
            return wrong("a member's id is not zero");
        }
        if self.join.is_none() && !self.voters().contains(&self.member.0) {
            return wrong("this member is not among the members of the cluster");
        }
        if self.tick_ms == 0 || self.heartbeat_ticks == 0 || self.election_ticks <= self.heartbeat_ticks {
            return wrong("heartbeats must come more often than elections");
        }
        if self.first_segment_bytes < 64 << 10 || self.segment_bytes < 64 << 10 || self.segment_bytes > 1 << 30 {
            return wrong("segments of the log have 64 KiB to 1 GiB");
        }
        if self.max_batch_bytes == 0
            || self.max_request_bytes > REQUEST_BYTES_MAX
            || self.max_batch_bytes > REQUEST_BYTES_MAX
        {
            return wrong("requests and batches have at most 64 MiB");
        }
        Ok(())
    }
}
