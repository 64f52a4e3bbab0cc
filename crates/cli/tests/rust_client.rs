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
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        // The page is told about once a second.
        let kept = remembered(&server);
        if kept > 0 && kept <= 20 {
            break;
        }
        assert!(Instant::now() < until, "{kept} answers are kept");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
