//! The Rust client over a real server, where a fake one would prove nothing.

#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod common;

use std::time::{Duration, Instant};

use common::{Server, http};
use tenure_client::{Client, NewJob};

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
