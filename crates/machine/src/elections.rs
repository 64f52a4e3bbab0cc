//! Elections: one leader, a value that it publishes, and an order among those who would follow.
//!
//! Promises. E1: an election has at most one leader at any log position; its token is the revision of the commit that elected it, so a later
//! leader has a larger one. E2: who campaigns while somebody leads has a place in the log: higher priority first, then the order of
//! arrival. The commit that vacates an election elects the next; nobody sees it vacant. E3: a candidate is elected only while its session lives and
//! its wait is in time. E4: a leader is never put out by a higher candidate; it is told that it should yield. E5: publishing and resigning name
//! the token, and a wrong one changes nothing; resigning the last token again succeeds, as long as the session of that leader lives and
//! has not resigned eight other elections since.
//! Not promised. That a leader which was paused knows that it leads no more: let the token be checked where it acts.
//! Relies on. The waits of a session end before what it leads is vacated.
//!
//! One exception to E2: where one commit would have to elect twice (it ends the session that it has just elected), the next is elected by the
//! next entry, since two leaders of one election never share a token.

use crate::apply::{Commit, Machine, Place, invalid, is_same};
use crate::codec::name;
use crate::coded::{coded_enum, coded_struct};
use crate::command::{Limit, RequestId};
use crate::native::{NativeOp, Refusal, RefusalCode};
use crate::objects::{self, Lived, ObjectKey};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::{Ask, OwnerKey, Waiter, WaiterNumber};
use std::sync::Arc;

/// Bytes of a leader's value.
pub const ELECTION_VALUE_MAX: usize = 64 << 10;
/// What an operation may add beside the name and the value.
const GROWTH: u64 = 512;
/// Resignations that a session may repeat and be told again that they were done.
const RESIGNATIONS_KEPT: usize = 8;
/// A leader beside its value.
const LEADER_BYTES: u64 = 64;

coded_struct! {
    /// An election that somebody leads, or has led lately.
    pub struct Election as "an election" {
        pub leader: Option<Leader>,
        /// Who resigned last, so that a repeated resignation is not taken for a wrong one.
        pub left: Option<Left>,
        /// When a candidate with a higher priority than the leader's came: a word to whoever observes, not the truth about who waits now.
        pub challenged: Option<Revision>,
        /// The commit that vacated it could not elect again; the next entry does.
        pub stalled: Option<LogTime>,
    }
}

coded_struct! {
    pub struct Leader as "a leader" {
        /// The fencing token: the commit that elected it.
        pub token: Revision,
        pub session: SessionId,
        pub priority: i32,
        pub since: LogTime,
        /// What it publishes.
        pub value: Arc<[u8]>,
        /// The commit that published it.
        pub published: Revision,
    }
}

coded_struct! {
    #[derive(Copy, Eq)]
    pub struct Left as "a former leader" {
        pub token: Revision,
        pub session: SessionId,
    }
}

impl Lived for Election {
    fn bytes(&self) -> u64 {
        self.leader.as_ref().map_or(0, |leader| LEADER_BYTES + leader.value.len() as u64)
    }

    fn deadline(&self) -> Option<LogTime> {
        self.stalled
    }

    fn sessions(&self) -> Vec<SessionId> {
        let mut all = Vec::with_capacity(2);
        all.extend(self.leader.as_ref().map(|leader| leader.session));
        all.extend(self.left.map(|left| left.session).filter(|session| !all.contains(session)));
        all
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        let left = commit.object::<Self>(key).and_then(|election| election.left);
        commit.vacate(key, left, None);
    }

    fn session_ended(commit: &mut Commit<'_>, key: &ObjectKey, session: SessionId) {
        let Some(mut election) = commit.object::<Self>(key).cloned() else { return };
        election.left = election.left.filter(|left| left.session != session);
        if election.leader.as_ref().is_some_and(|leader| leader.session == session) {
            return commit.vacate(key, election.left, None);
        }
        commit.keep_election(key, election);
    }
}

coded_enum! {
    /// What is asked of an election.
    pub enum ElectionOp as "an election operation" {
        Campaign(Campaign) = 1,
        Proclaim(Proclaim) = 2,
        Resign(Resign) = 3,
        /// Takes a candidate out of the queue.
        Withdraw(Withdraw) = 4,
    }
}

coded_struct! {
    /// Leads, or waits to lead.
    pub struct Campaign as "a campaign" {
        pub name: Box<[u8]>,
        pub session: SessionId,
        /// Published when it is elected.
        pub value: Arc<[u8]>,
        /// Higher ones are elected first.
        pub priority: i32,
        pub wait: CampaignWait,
    }
}

coded_enum! {
    /// How long a candidate waits.
    #[derive(Copy, Eq)]
    pub enum CampaignWait as "a wait" {
        /// Refused at once where somebody leads.
        None = 0,
        /// Milliseconds of log time.
        Ms(u64) = 1,
        Forever = 2,
    }
}

coded_struct! {
    pub struct Proclaim as "a proclamation" {
        pub name: Box<[u8]>,
        pub token: Revision,
        pub value: Arc<[u8]>,
    }
}

coded_struct! {
    #[derive(Eq)]
    pub struct Resign as "a resignation" {
        pub name: Box<[u8]>,
        pub token: Revision,
        /// The candidate that is to lead; zero: whoever is next.
        pub to: SessionId,
    }
}

coded_struct! {
    #[derive(Eq)]
    pub struct Withdraw as "a withdrawal" {
        pub name: Box<[u8]>,
        pub session: SessionId,
        /// Of the campaign; `None`: whichever of the session waits.
        pub campaign: Option<RequestId>,
    }
}

coded_enum! {
    /// What came of it.
    #[derive(Copy, Eq)]
    pub enum ElectionReply as "an election answer" {
        Elected(Elected) = 1,
        /// Whether the leader should yield to a higher candidate.
        Proclaimed(bool) = 2,
        Resigned = 3,
        Withdrawn(Withdrawn) = 4,
    }
}

coded_struct! {
    #[derive(Copy, Eq)]
    pub struct Elected as "a won election" {
        pub token: Revision,
        pub session: SessionId,
        pub session_token: SessionToken,
        pub ttl_ms: u64,
    }
}

coded_struct! {
    #[derive(Copy, Eq)]
    pub struct Withdrawn as "a withdrawal's end" {
        /// How many waits were taken out.
        pub candidates: u64,
        /// The election came first: the session leads under this.
        pub elected: Option<Elected>,
    }
}

impl ElectionOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Campaign(Campaign { name, value, .. }) | Self::Proclaim(Proclaim { name, value, .. }) => {
                GROWTH + (name.len() + value.len()) as u64
            }
            Self::Resign(_) | Self::Withdraw(_) => 0,
        }
    }

    /// A candidate whose time is over has waited in vain.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }
}

impl Commit<'_> {
    pub(crate) fn election_op(&mut self, op: &ElectionOp) -> Result<OpReply, Rejection> {
        match op {
            ElectionOp::Campaign(campaign) => self.campaign(campaign),
            ElectionOp::Proclaim(proclaim) => self.proclaim(proclaim).map(Into::into),
            ElectionOp::Resign(resign) => self.resign(resign).map(Into::into),
            ElectionOp::Withdraw(withdraw) => self.withdraw(withdraw).map(Into::into),
        }
    }

    fn campaign(&mut self, campaign: &Campaign) -> Result<OpReply, Rejection> {
        objects::check_name("an election", &campaign.name)?;
        check_value(&campaign.value)?;
        if self.live_session(campaign.session)?.is_native() {
            self.check_things(campaign.session)?;
        }
        let key = self.object_key::<Election>(&campaign.name);
        let election = self.object::<Election>(&key).cloned();
        let left = election.as_ref().and_then(|election| election.left);
        let is_free = election.as_ref().is_none_or(|election| election.leader.is_none() && election.stalled.is_none());
        if is_free {
            self.number_once(&key)?;
            return Ok(ElectionReply::Elected(self.elect(&key, campaign, left)?).into());
        }
        self.stand(&key, campaign, election.and_then(|election| election.leader))?;
        Ok(OpReply::Done)
    }

    /// Gives a candidate its place in the queue.
    fn stand(&mut self, key: &ObjectKey, campaign: &Campaign, leader: Option<Leader>) -> Result<(), Rejection> {
        let Campaign { name, session, priority, .. } = campaign;
        let leads = leader.as_ref().is_some_and(|leader| leader.session == *session);
        if leads || self.m.waits.is_waiting(key, &OwnerKey::Session(*session)) {
            return Err(twice(name, *session, leader.as_ref()));
        }
        let waiters = self.m.waits.len(key);
        let deadline = match campaign.wait {
            CampaignWait::None | CampaignWait::Ms(0) => {
                return Err(led(name, leader.as_ref(), waiters, self.m.stamp));
            }
            CampaignWait::Ms(ms) => Some(self.m.stamp.plus(ms)),
            CampaignWait::Forever => None,
        };
        self.check_alone()?;
        let should_yield = leader.as_ref().is_some_and(|leader| self.m.should_yield(key, leader));
        let limit = self.m.limit(Limit::LockWaiters);
        if waiters >= limit {
            return Err(Rejection::Quota { what: name::WAITERS, limit });
        }
        self.wait(Place {
            on: vec![key.clone()],
            rank: rank(*priority),
            session: *session,
            owner: Box::default(),
            deadline,
            ask: Ask::Native(Box::new(NativeOp::Election(ElectionOp::Campaign(campaign.clone())))),
        });
        let is_higher = leader.is_some_and(|leader| *priority > leader.priority);
        if is_higher && !should_yield {
            self.challenge(key);
        }
        Ok(())
    }

    /// Lets observers look again.
    fn challenge(&mut self, key: &ObjectKey) {
        if let Some(election) = self.object::<Election>(key).cloned() {
            self.put_object(key, Election { challenged: Some(self.at), ..election });
        }
    }

    /// Makes a candidate the leader. Whoever calls has taken care that this commit elects once.
    fn elect(&mut self, key: &ObjectKey, campaign: &Campaign, left: Option<Left>) -> Result<Elected, Rejection> {
        let elected = self.elected(campaign.session, self.at)?;
        let leader = Leader {
            token: self.at,
            session: campaign.session,
            priority: campaign.priority,
            since: self.m.stamp,
            value: campaign.value.clone(),
            published: self.at,
        };
        let challenged = self.m.should_yield(key, &leader).then_some(self.at);
        self.put_object(key, Election { leader: Some(leader), left, challenged, stalled: None });
        Ok(elected)
    }

    fn elected(&self, session: SessionId, token: Revision) -> Result<Elected, Rejection> {
        let facts = &self.live_session(session)?.facts;
        Ok(Elected { token, session, session_token: facts.token, ttl_ms: facts.create.ttl_ms })
    }

    /// Takes the election from its leader and gives it to `to`, or to the first candidate if there is one.
    fn vacate(&mut self, key: &ObjectKey, left: Option<Left>, to: Option<WaiterNumber>) {
        let vacant = Election { leader: None, left, challenged: None, stalled: None };
        let Some((number, campaign)) = to.or_else(|| self.m.waits.head(key)).and_then(|n| self.candidate(n)) else {
            return self.keep_election(key, vacant);
        };
        if self.number_once(key).is_err() {
            return self.put_object(key, Election { stalled: Some(self.m.stamp), ..vacant });
        }
        // It leaves the queue first, so that it is no challenge to itself.
        if let Ok(elected) = self.elected(campaign.session, self.at) {
            self.end_wait(number, Ok(ElectionReply::Elected(elected).into()));
            let done = self.elect(key, &campaign, left);
            debug_assert!(done.is_ok(), "its session lives");
        }
    }

    fn candidate(&self, number: WaiterNumber) -> Option<(WaiterNumber, Campaign)> {
        match &self.m.waits.get(number)?.ask {
            Ask::Native(op) => match &**op {
                NativeOp::Election(ElectionOp::Campaign(campaign)) => Some((number, campaign.clone())),
                _ => None,
            },
            Ask::Exclusive => None,
        }
    }

    /// An election that nobody leads and nobody may ask about is forgotten: the next token is larger than any before, remembered or not.
    fn keep_election(&mut self, key: &ObjectKey, election: Election) {
        if election.leader.is_none() && election.left.is_none() && election.stalled.is_none() {
            self.remove_object(key);
        } else {
            self.put_object(key, election);
        }
    }

    fn proclaim(&mut self, proclaim: &Proclaim) -> Result<ElectionReply, Rejection> {
        check_value(&proclaim.value)?;
        let key = self.object_key::<Election>(&proclaim.name);
        let election = self.object::<Election>(&key).cloned();
        let Some((election, leader)) = led_under(election.clone(), proclaim.token) else {
            return Err(fenced(&proclaim.name, proclaim.token, election.as_ref()));
        };
        let should_yield = self.m.should_yield(&key, &leader);
        // What says the same takes no revision and wakes nobody.
        if leader.value != proclaim.value {
            let leader = Leader { value: proclaim.value.clone(), published: self.at, ..leader };
            self.put_object(&key, Election { leader: Some(leader), ..election });
        }
        Ok(ElectionReply::Proclaimed(should_yield))
    }

    fn resign(&mut self, resign: &Resign) -> Result<ElectionReply, Rejection> {
        let key = self.object_key::<Election>(&resign.name);
        let election = self.object::<Election>(&key).cloned();
        let Some((_, leader)) = led_under(election.clone(), resign.token) else {
            let again = election.as_ref().and_then(|e| e.left).is_some_and(|left| left.token == resign.token);
            let refused = || fenced(&resign.name, resign.token, election.as_ref());
            return if again { Ok(ElectionReply::Resigned) } else { Err(refused()) };
        };
        let to = match resign.to {
            SessionId(0) => None,
            to => Some(self.waits_of(&key, to, None).first().copied().ok_or_else(|| no_candidate(&resign.name, to))?),
        };
        self.vacate(&key, Some(Left { token: leader.token, session: leader.session }), to);
        self.forget_resignations(leader.session);
        Ok(ElectionReply::Resigned)
    }

    /// Only the newest resignations of a session are kept: each takes as much of its room as something that it owns.
    fn forget_resignations(&mut self, session: SessionId) {
        let named = self.m.objects.kind_of_session::<Election>(self.txn.namespace, session);
        let left = named.filter_map(|(key, election)| Some((election.left?, key)));
        let left = left.filter(|(left, _)| left.session == session);
        let mut left: Vec<(Revision, ObjectKey)> = left.map(|(left, key)| (left.token, key.clone())).collect();
        left.sort();
        for (_, key) in &left[..left.len().saturating_sub(RESIGNATIONS_KEPT)] {
            if let Some(election) = self.object::<Election>(key).cloned() {
                self.keep_election(key, Election { left: None, ..election });
            }
        }
    }

    fn withdraw(&mut self, withdraw: &Withdraw) -> Result<ElectionReply, Rejection> {
        let Withdraw { name, session, campaign } = withdraw;
        let key = self.object_key::<Election>(name);
        let waits = self.waits_of(&key, *session, campaign.as_ref());
        for number in &waits {
            self.end_wait(*number, Err(withdrawn(name)));
        }
        let election = self.object::<Election>(&key);
        let leader = election.and_then(|election| election.leader.as_ref()).filter(|leader| leader.session == *session);
        let elected = match leader.map(|leader| leader.token) {
            Some(token) if waits.is_empty() => Some(self.elected(*session, token)?),
            _ => None,
        };
        Ok(ElectionReply::Withdrawn(Withdrawn { candidates: waits.len() as u64, elected }))
    }

    fn waits_of(&self, key: &ObjectKey, session: SessionId, request: Option<&RequestId>) -> Vec<WaiterNumber> {
        let mut waits = self.m.waits.of_session(session);
        waits.retain(|number| {
            let waiter = self.m.waits.get(*number).filter(|waiter| waiter.on.contains(key));
            waiter.is_some_and(|w| request.is_none_or(|asked| w.request.is_some_and(|own| is_same(&own, asked))))
        });
        waits
    }
}

/// What a door can tell about an election.
#[derive(Clone, Debug, PartialEq)]
pub struct ElectionInfo {
    pub name: Box<[u8]>,
    pub leader: Option<Leader>,
    /// A candidate with a higher priority than the leader's waits.
    pub should_yield: bool,
    /// In the order in which they will be elected.
    pub candidates: Vec<Candidate>,
    /// How many there are in all.
    pub waiting: u64,
}

/// One who waits to lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub session: SessionId,
    pub priority: i32,
    pub since: LogTime,
    /// `None`: for ever.
    pub deadline: Option<LogTime>,
}

impl Machine {
    /// An election as it is, with up to `max` candidates; one that nobody leads is told as vacant.
    pub fn election(&self, namespace: NamespaceId, name: &[u8], max: usize) -> ElectionInfo {
        let key = ObjectKey::of::<Election>(namespace, name);
        let leader = self.objects.get::<Election>(&key).and_then(|election| election.leader.clone());
        let candidate = |waiter: &Waiter| Candidate {
            session: waiter.session,
            priority: i32::try_from(-waiter.rank).unwrap_or_default(),
            since: waiter.since,
            deadline: waiter.deadline,
        };
        ElectionInfo {
            name: name.into(),
            should_yield: leader.as_ref().is_some_and(|leader| self.should_yield(&key, leader)),
            leader,
            candidates: self.waits.queue(&key).take(max).map(|(_, waiter)| candidate(waiter)).collect(),
            waiting: self.waits.len(&key),
        }
    }

    /// The elections that this session leads and should give up, for a candidate with a higher priority waits.
    pub fn elections_to_yield(&self, namespace: NamespaceId, session: SessionId) -> Vec<Box<[u8]>> {
        let led = self.objects.kind_of_session::<Election>(namespace, session);
        let yields = led.filter(|(key, election)| {
            let leader = election.leader.as_ref().filter(|leader| leader.session == session);
            leader.is_some_and(|leader| self.should_yield(key, leader))
        });
        yields.map(|(key, _)| key.name().into()).collect()
    }

    fn should_yield(&self, key: &ObjectKey, leader: &Leader) -> bool {
        let first = self.waits.head(key).and_then(|number| self.waits.get(number));
        first.is_some_and(|waiter| waiter.rank < rank(leader.priority))
    }
}

/// The place of a priority in a queue that serves lower ranks first.
fn rank(priority: i32) -> i64 {
    -i64::from(priority)
}

fn check_value(value: &[u8]) -> Result<(), Rejection> {
    if value.len() > ELECTION_VALUE_MAX {
        return Err(invalid(format!("the value of a leader has at most {ELECTION_VALUE_MAX} bytes")));
    }
    Ok(())
}

fn led_under(election: Option<Election>, token: Revision) -> Option<(Election, Leader)> {
    let election = election?;
    let leader = election.leader.clone().filter(|leader| leader.token == token)?;
    Some((election, leader))
}

fn led(name: &[u8], leader: Option<&Leader>, waiters: u64, now: LogTime) -> Rejection {
    let name = name.escape_ascii();
    let Some(leader) = leader else {
        // The next entry elects one of those who wait.
        let why = format!("election `{name}` has candidates that wait");
        return Refusal::new(RefusalCode::Held, why).fact("name", name).fact("waiters", waiters).into();
    };
    let why = format!("election `{name}` is led by session {} under token {}", leader.session, leader.token);
    let refusal = Refusal::new(RefusalCode::Held, why).fact("name", name).fact("waiters", waiters);
    let refusal = refusal.fact("token", leader.token).fact("holder_session", leader.session);
    refusal.fact("since_ms", now.0.saturating_sub(leader.since.0)).into()
}

fn twice(name: &[u8], session: SessionId, leader: Option<&Leader>) -> Rejection {
    let name = name.escape_ascii();
    let refusal = match leader.filter(|leader| leader.session == session) {
        Some(leader) => {
            let why = format!("session {session} leads election `{name}` already, under token {}", leader.token);
            Refusal::new(RefusalCode::Deadlock, why).fact("token", leader.token)
        }
        None => {
            let why = format!("session {session} is a candidate of election `{name}` already");
            Refusal::new(RefusalCode::Deadlock, why)
        }
    };
    refusal.fact("name", name).fact("session", session).into()
}

fn fenced(name: &[u8], presented: Revision, election: Option<&Election>) -> Rejection {
    let name = name.escape_ascii();
    let leader = election.and_then(|election| election.leader.as_ref());
    let newest = leader.map(|l| l.token).or_else(|| Some(election?.left?.token)).unwrap_or_default();
    let why = match leader {
        Some(leader) => format!(
            "token {presented} of election `{name}` is stale: session {} leads under token {}",
            leader.session, leader.token
        ),
        None => format!("token {presented} of election `{name}` is stale: nobody leads"),
    };
    let refusal = Refusal::new(RefusalCode::Fenced, why).fact("name", name).fact("presented", presented);
    let refusal = refusal.fact("newest", newest);
    match leader {
        Some(leader) => refusal.fact("token", leader.token).fact("holder_session", leader.session).into(),
        None => refusal.into(),
    }
}

fn no_candidate(name: &[u8], session: SessionId) -> Rejection {
    let name = name.escape_ascii();
    let why = format!("session {session} is no candidate of election `{name}`, so it cannot be given the lead");
    Refusal::new(RefusalCode::NotFound, why).fact("name", name).fact("session", session).into()
}

fn withdrawn(name: &[u8]) -> Rejection {
    let name = name.escape_ascii();
    Refusal::new(RefusalCode::Cancelled, format!("the campaign for election `{name}` was withdrawn"))
        .fact("name", name)
        .into()
}
