//! Clusters of either kind: started, watched, changed and repaired over the API that both speak, with the kind's own way to join.
//!
//! Relies on. `Maintenance.Status` of a member tells whom it follows and how far it has applied; `/metrics` counts the leaders it saw.

use super::load::RANGE;
use super::peer::{Kind, Peer, Place, Programs, together};
use super::rpc::Rpc;
use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use prost::Message;
use rustix::process::Signal;
use std::time::{Duration, Instant};
use tenure_wire::etcd::etcdserverpb as pb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const STATUS: &str = "/etcdserverpb.Maintenance/Status";
const MOVE_LEADER: &str = "/etcdserverpb.Maintenance/MoveLeader";
const MEMBER_ADD: &str = "/etcdserverpb.Cluster/MemberAdd";
const MEMBER_PROMOTE: &str = "/etcdserverpb.Cluster/MemberPromote";

/// How long a cluster may take to become whole.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a cluster.
const LOOK: Duration = Duration::from_millis(50);

/// Members that started together. Dropping it ends them.
pub(super) struct Cluster {
    kind: Kind,
    peers: Vec<Peer>,
}

impl Cluster {
    /// Starts `members` at once and waits until each takes a write.
    pub(super) async fn start(kind: Kind, programs: &Programs, members: usize) -> Result<Self> {
        let places: Vec<Place> = (0..members).map(Place::new).collect::<Result<_>>()?;
        let flags = together(kind, &places);
        let mut cluster = Self { kind, peers: Vec::new() };
        for place in places {
            cluster.peers.push(Peer::spawn(kind, programs, place, flags.clone())?);
        }
        for peer in &mut cluster.peers {
            peer.wait_for_write().await?;
        }
        cluster.settle().await?;
        Ok(cluster)
    }

    pub(super) fn endpoints(&self) -> Vec<String> {
        self.peers.iter().map(Peer::endpoint).collect()
    }

    pub(super) fn endpoint(&self, member: usize) -> String {
        self.peers[member].endpoint()
    }

    pub(super) fn pids(&self) -> Vec<u32> {
        self.peers.iter().map(Peer::pid).collect()
    }

    pub(super) fn signal(&self, member: usize, signal: Signal) -> Result<()> {
        self.peers[member].signal(signal)
    }

    pub(super) async fn wait_for_end(&mut self, member: usize) -> Result<()> {
        self.peers[member].wait_for_end().await
    }

    /// Starts a member that has ended, on its old folder, and waits until the cluster is whole.
    pub(super) async fn restart(&mut self, member: usize) -> Result<()> {
        self.peers[member].spawn_again(&[])?;
        self.settle().await
    }

    /// Which member leads.
    pub(super) async fn leader(&self) -> Result<usize> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            for (i, peer) in self.peers.iter().enumerate() {
                if let Ok(status) = status(&peer.endpoint()).await
                    && status.leader == member_id(&status)
                {
                    return Ok(i);
                }
            }
            tokio::time::sleep(LOOK).await;
        }
        bail!("{}: no member says that it leads", self.kind.name())
    }

    /// Waits until all members follow one leader and have applied what it had committed.
    pub(super) async fn settle(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            for peer in &mut self.peers {
                peer.check()?;
            }
            let leader = self.leader().await?;
            if self.all_follow(leader).await.unwrap_or(false) {
                return Ok(());
            }
            ensure!(began.elapsed() < PATIENCE, "{}: not whole within {PATIENCE:?}", self.kind.name());
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn all_follow(&self, leader: usize) -> Result<bool> {
        let goal = status(&self.endpoint(leader)).await?;
        for peer in &self.peers {
            let status = status(&peer.endpoint()).await?;
            if status.leader != member_id(&goal) || status.raft_applied_index < goal.raft_index {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The changes of leader that each member counted since it started, and the term.
    pub(super) async fn elections(&self) -> Result<Elections> {
        let mut seen = Vec::new();
        let mut term = 0;
        for peer in &self.peers {
            seen.push(metric(&page(&peer.endpoint(), "/metrics").await?, LEADER_CHANGES)?);
            term = term.max(status(&peer.endpoint()).await?.raft_term);
        }
        Ok(Elections { seen, term })
    }

    /// Asks the leader to hand over.
    pub(super) async fn move_leader(&self, from: usize, to: usize) -> Result<()> {
        let target_id = member_id(&status(&self.endpoint(to)).await?);
        let request = pb::MoveLeaderRequest { target_id };
        let _: pb::MoveLeaderResponse = call(&self.endpoint(from), MOVE_LEADER, &request).await?;
        Ok(())
    }

    /// Adds a member and returns, once it votes and has applied what the leader had committed, how long that took.
    pub(super) async fn grow(&mut self, programs: &Programs) -> Result<Duration> {
        let leader = self.leader().await?;
        let place = Place::new(self.peers.len())?;
        let (began, learner, flags) = match self.kind {
            Kind::Tenure => self.admit_to_tenure(programs, leader, &place).await?,
            Kind::Etcd => self.admit_to_etcd(leader, &place).await?,
        };
        self.peers.push(Peer::spawn(self.kind, programs, place, flags)?);
        self.wait_for_newest(leader, learner).await?;
        let took = began.elapsed();
        // What a member says of itself is not enough.
        let (newest, old) = (count(&self.endpoint(self.peers.len() - 1)).await?, count(&self.endpoint(leader)).await?);
        ensure!(newest == old, "the new member has {newest} keys and not {old}");
        Ok(took)
    }

    /// When it was asked for, nobody to promote (the cluster does so by itself), and how the new member starts.
    async fn admit_to_tenure(&self, programs: &Programs, leader: usize, place: &Place) -> Result<Admitted> {
        let began = Instant::now();
        let output = tokio::process::Command::new(&programs.tenure)
            .args(["--endpoints", &self.endpoint(leader), "member", "add", &place.name, "--peer", &place.peer()])
            .output()
            .await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "tenure member add: {}", error.trim_end());
        let said = String::from_utf8_lossy(&output.stdout);
        let token = join_token(&said).with_context(|| format!("tenure member add told no token: {said}"))?;
        Ok((began, None, vec!["--join".to_owned(), token.to_owned()]))
    }

    /// When it was asked for, the learner to promote, and how it starts.
    async fn admit_to_etcd(&self, leader: usize, place: &Place) -> Result<Admitted> {
        let request = pb::MemberAddRequest { peer_ur_ls: vec![format!("http://{}", place.peer())], is_learner: true };
        let first = Instant::now();
        // For the first seconds of a cluster it refuses, because it has not seen its members alive for long enough.
        let (began, answer) = loop {
            let began = Instant::now();
            match call::<pb::MemberAddResponse>(&self.endpoint(leader), MEMBER_ADD, &request).await {
                Ok(answer) => break (began, answer),
                Err(e) if first.elapsed() > Duration::from_secs(15) => return Err(e),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        };
        let mut all: Vec<Place> = self.peers.iter().map(|p| p.place().clone()).collect();
        all.push(place.clone());
        let mut flags = together(self.kind, &all);
        flags.extend(["--initial-cluster-state".to_owned(), "existing".to_owned()]);
        Ok((began, Some(answer.member.context("no member in the answer")?.id), flags))
    }

    async fn wait_for_newest(&mut self, leader: usize, mut to_promote: Option<u64>) -> Result<()> {
        let (began, limit) = (Instant::now(), 10 * PATIENCE);
        let leader = self.endpoint(leader);
        let newest = self.peers.last_mut().context("no member")?;
        while began.elapsed() < limit {
            newest.check()?;
            // What the leader had a moment ago: under load nobody has applied what it commits right now.
            let goal = status(&leader).await.map(|s| s.raft_index);
            tokio::time::sleep(LOOK).await;
            if let Some(id) = to_promote {
                // Refused until it has nearly caught up.
                let request = pb::MemberPromoteRequest { id };
                if call::<pb::MemberPromoteResponse>(&leader, MEMBER_PROMOTE, &request).await.is_ok() {
                    to_promote = None;
                }
            } else if let (Ok(goal), Ok(status)) = (goal, status(&newest.endpoint()).await)
                && status.leader != 0
                && !status.is_learner
                && status.raft_applied_index >= goal
            {
                return Ok(());
            }
        }
        bail!("{}: the new member has not caught up within {limit:?}", self.kind.name())
    }
}

/// What members know of elections at a moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Elections {
    seen: Vec<f64>,
    term: u64,
}

impl Elections {
    /// The most changes that anything tells of since `before`. A member may count only what concerns itself; the term rises with each.
    pub(super) fn since(&self, before: &Self) -> f64 {
        let counted = self.seen.iter().zip(&before.seen).map(|(now, then)| now - then);
        counted.fold((self.term - before.term) as f64, f64::max)
    }
}

type Admitted = (Instant, Option<u64>, Vec<String>);

async fn call<A: Message + Default>(endpoint: &str, path: &str, question: &impl Message) -> Result<A> {
    let work = async { Rpc::connect(endpoint).await?.unary(path, question).await };
    tokio::time::timeout(Duration::from_secs(5), work).await.context("no answer within 5 s")?
}

async fn status(endpoint: &str) -> Result<pb::StatusResponse> {
    call(endpoint, STATUS, &pb::StatusRequest {}).await
}

fn member_id(status: &pb::StatusResponse) -> u64 {
    status.header.as_ref().map_or(0, |h| h.member_id)
}

/// How many keys a member has after a linearizable read; the load changes only keys that are there.
async fn count(endpoint: &str) -> Result<i64> {
    let all = Bytes::from_static(&[0]);
    let request = pb::RangeRequest { key: all.clone(), range_end: all, count_only: true, ..Default::default() };
    Ok(call::<pb::RangeResponse>(endpoint, RANGE, &request).await?.count)
}

const LEADER_CHANGES: &str = "etcd_server_leader_changes_seen_total";

/// The body of a page of plain HTTP.
async fn page(endpoint: &str, path: &str) -> Result<String> {
    let mut socket = TcpStream::connect(endpoint).await?;
    // 1.0: the end of the connection is the end of the page, with no pieces to put together.
    socket.write_all(format!("GET {path} HTTP/1.0\r\nHost: {endpoint}\r\n\r\n").as_bytes()).await?;
    let mut text = String::new();
    tokio::time::timeout(Duration::from_secs(5), socket.read_to_string(&mut text)).await??;
    let (head, body) = text.split_once("\r\n\r\n").context("an answer without a body")?;
    ensure!(head.split(' ').nth(1) == Some("200"), "{path}: {}", head.lines().next().unwrap_or_default());
    Ok(body.to_owned())
}

/// The value of a metric without labels.
fn metric(page: &str, name: &str) -> Result<f64> {
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("no metric {name}"))?.trim().parse()?)
}

/// The word behind `--join` in a printed command line.
fn join_token(text: &str) -> Option<&str> {
    text.split_whitespace().skip_while(|word| *word != "--join").nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let page = "# TYPE changes counter\nchanges_more 7\nchanges 3\nother{a=\"b\"} 1\n";
        assert_eq!(metric(page, "changes").unwrap(), 3.0);
        assert!(metric(page, "change").is_err());
        assert!(metric(page, "other").is_err());
    }

    #[test]
    fn a_change_that_only_one_member_counted_is_a_change() {
        let elections = |seen: [f64; 3], term| Elections { seen: seen.to_vec(), term };
        let before = elections([0.0, 0.0, 1.0], 4);
        assert_eq!(before.since(&before), 0.0);
        assert_eq!(elections([1.0, 0.0, 1.0], 5).since(&before), 1.0);
        assert_eq!(elections([1.0, 0.0, 2.0], 6).since(&before), 2.0);
        assert_eq!(elections([3.0, 2.0, 3.0], 6).since(&before), 3.0);
    }

    #[test]
    fn the_token_is_the_word_behind_its_flag() {
        let said = "added n3 (1f)\nstart it with:\n  tenure serve --name n3 --join abc.def --data-dir DIR\n";
        assert_eq!(join_token(said), Some("abc.def"));
        assert_eq!(join_token("tenure serve --join"), None);
        assert_eq!(join_token("nothing"), None);
    }
}
