//! The Rust client over a real server, where a fake one would prove nothing.

#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod common;

use std::future::{IntoFuture as _, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use common::{Server, http};
use tenure_client::{Begun, Client, ClientOptions, NewJob};
use tokio::sync::watch;

fn remembered(server: &Server) -> u64 {
    let page = http(&server.address, "GET", "/metrics", "", b"").unwrap().body;
    let line = page.lines().find(|line| line.starts_with("tenure_remembered_requests ")).unwrap();
    line.split(' ').nth(1).unwrap().parse().unwrap()
}

/// There are 500,000 places for answers that are kept for ten minutes: a client that took one with each change would soon be refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_client_leaves_little_to_remember() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let queue = client.queue("jobs");
    // From the first answer on the client knows what the cluster knows.
    client.put("first", "1").await.unwrap();
    for round in 0..200 {
        let mut puts = tokio::task::JoinSet::new();
        for n in 0..10 {
            let client = client.clone();
            puts.spawn(async move { client.put(format!("k{n}"), format!("{round}")).await });
        }
        puts.join_all().await.into_iter().for_each(|put| drop(put.unwrap()));
        queue.enqueue(NewJob::new("job")).await.unwrap();
    }
    few_are_kept(&server, 20).await;
}

/// What waits is numbered, too, and so is everything that is rare alone and not in sum.
#[tokio::test(flavor = "multi_thread")]
async fn waits_sessions_and_the_rest_leave_little_to_remember() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let [holder, other] = [client.session().await.unwrap(), client.session().await.unwrap()];
    let held = holder.lock("held").await.unwrap();
    // This wait is open until the end, so nothing that was numbered behind it in its series can be forgotten.
    let waiter = other.clone();
    let waiting = tokio::spawn(async move { waiter.lock("held").wait(Duration::from_secs(3_600)).await });
    while client.lock_info("held").await.unwrap().waiter_count == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    client.create_pool("pool", 1).await.unwrap();
    let check = tenure_client::ServiceCheck::ttl(Duration::from_secs(60));
    let registered = client.registry().register("web", "a", "10.0.0.1", 80).check(check).await.unwrap();
    for round in 0..60 {
        let wait = Duration::from_secs(10);
        other.lock("free").wait(wait).await.unwrap().release().await.unwrap();
        client.election("led").campaign(&other).await.unwrap().resign().await.unwrap();
        client.reserve("pool", 1).wait(wait).await.unwrap().cancel().await.unwrap();
        client.session().await.unwrap().end().await.unwrap();
        client.publish_config("flags", format!("{round}")).await.unwrap();
        client.schedule("nightly").put(format!("{} 3 * * *", round % 60), "reports", "full").await.unwrap();
        client.registry().heartbeat("web", "a", 0, tenure_client::Health::Passing, "").await.unwrap();
    }
    // 180 waits and 480 others. Kept are the long wait, what its series has beside it, and what was not yet said to be received.
    few_are_kept(&server, 64 + 20).await;
    held.release().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
    registered.deregister().await.unwrap();
}

/// The header of a page says the revision of now; what is read on is the past that was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn all_pages_of_the_past_are_of_the_past() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let mut past = 0;
    for key in ["k/1", "k/2", "k/3", "k/4", "k/5"] {
        past = client.put(key, "old").await.unwrap().revision;
    }
    client.put("k/4", "new").await.unwrap();
    client.put("k/6", "new").await.unwrap();
    client.delete("k/5").await.unwrap();
    let read = async |revision: u64| {
        let range = client.range("k/").prefix().limit(2);
        let all = if revision > 0 { range.at(revision).all().await } else { range.all().await }.unwrap();
        let told =
            all.records.iter().map(|record| format!("{} {}", record.key_str().unwrap(), record.value_str().unwrap()));
        told.collect::<Vec<_>>().join(", ")
    };
    assert_eq!(read(past).await, "k/1 old, k/2 old, k/3 old, k/4 old, k/5 old");
    assert_eq!(read(0).await, "k/1 old, k/2 old, k/3 old, k/4 new, k/6 new");
}

async fn few_are_kept(server: &Server, max: u64) {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        // The page is told about once a second.
        let kept = remembered(server);
        if kept > 0 && kept <= max {
            break;
        }
        assert!(Instant::now() < until, "{kept} answers are kept");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Polls once: what was asked for is then under way, and its answer is not looked at.
async fn start<F: Future>(asked: F) -> Pin<Box<F>> {
    let mut asked = Box::pin(asked);
    let waits = poll_fn(|cx| Poll::Ready(asked.as_mut().poll(cx).is_pending())).await;
    assert!(waits);
    asked
}

async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !is_so().await {
        assert!(Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A caller may leave when its answer has come and was not looked at yet: a branch of `select!`, an aborted task.
#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_nobody_takes_is_given_back() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let session = client.session().await.unwrap();
    client.create_pool("pool", 1).await.unwrap();
    let (election, records) = (client.election("election"), client.idempotent("scope"));

    let lock = start(session.lock("lock").into_future()).await;
    let campaign = start(election.campaign(&session)).await;
    let hold = start(client.reserve("pool", 1).hold(Duration::from_secs(600)).into_future()).await;
    let begin = start(records.begin("key")).await;
    let is_held = async || client.lock_info("lock").await.unwrap().holder.is_some();
    let is_led = async || election.get().await.unwrap().leader.is_some();
    let is_reserved = async || client.pool("pool").await.unwrap().unwrap().pool.held > 0;
    let is_running = async || records.get("key").await.is_ok_and(|record| record.state == "running");
    until("granted", async || is_held().await && is_led().await && is_reserved().await && is_running().await).await;
    // The answers are there.
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop((lock, campaign, hold, begin));
    until("the lock is free", async || !is_held().await).await;
    until("nobody leads", async || !is_led().await).await;
    until("nothing is reserved", async || !is_reserved().await).await;
    until("the key is free", async || !is_running().await).await;
    session.check().unwrap();
}

/// The server grants to a wait whether or not somebody still waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_comes_after_its_caller_has_left_is_given_free() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let records = client.idempotent("scope").takeover(tenure_client::Takeover::Never);
    let Begun::Granted(first) = records.begin("key").await.unwrap() else { panic!("nobody else asks") };
    let patient = records.clone().wait(Duration::from_secs(60));
    let waiting = start(patient.begin("key")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(waiting);
    first.release().await.unwrap();
    until("the key is free", async || {
        let record = records.get("key").await.unwrap();
        (record.attempt_no, &*record.state) == (2, "released")
    })
    .await;
    let Begun::Granted(third) = records.begin("key").await.unwrap() else { panic!("the key is free") };
    assert_eq!(third.number(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lead_whose_work_is_cut_off_is_resigned() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let session = client.session().await.unwrap();
    let election = client.election("election").wait(Duration::from_secs(5));
    let work = election.lead(&session, |_| std::future::pending::<()>());
    tokio::time::timeout(Duration::from_millis(500), work).await.unwrap_err();
    until("nobody leads", async || election.get().await.unwrap().leader.is_none()).await;
    let (again, same) = (election.clone(), session.clone());
    let broken = tokio::spawn(async move {
        again.lead(&same, |leader| async move { assert_eq!(leader.token(), 0, "the work breaks") }).await
    });
    assert!(broken.await.unwrap_err().is_panic());
    until("nobody leads", async || election.get().await.unwrap().leader.is_none()).await;
    // Under the same session.
    let token = election.lead(&session, async |leader| leader.token()).await.unwrap();
    assert!(token > 0);
}

/// The address of a line to the server, which breaks while it is told `false`.
async fn line(server: String) -> (String, watch::Sender<bool>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (is_up, seen) = watch::channel(true);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let (mut seen, server) = (seen.clone(), server.clone());
            tokio::spawn(async move {
                if !*seen.borrow_and_update() {
                    return;
                }
                let mut far = tokio::net::TcpStream::connect(server).await.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                    _ = seen.wait_for(|is_up| !is_up) => {}
                }
            });
        }
    });
    (address, is_up)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_fails_goes_on_in_the_background() {
    let server = Server::start(&[]);
    let (address, is_up) = line(server.address.clone()).await;
    let options = ClientOptions::default().timeout(Duration::from_millis(300));
    let (client, direct) = (Client::with_options([address], options).unwrap(), Client::connect([&server.address]));
    let direct = direct.await.unwrap();
    let session = client.session().await.unwrap();
    let (failing, left) = (session.lock("failing").await.unwrap(), session.lock("left").await.unwrap());
    let dropped = session.lock("dropped").await.unwrap();
    is_up.send_replace(false);
    failing.release().await.unwrap_err();
    tokio::time::timeout(Duration::from_millis(50), left.release()).await.unwrap_err();
    drop(dropped);
    tokio::time::sleep(Duration::from_secs(1)).await;
    is_up.send_replace(true);
    for name in ["failing", "left", "dropped"] {
        until(name, async || direct.lock_info(name).await.unwrap().holder.is_none()).await;
    }
    session.check().unwrap();
}
