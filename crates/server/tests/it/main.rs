//! A member in a temporary folder, reached by generated clients over loopback.

#![allow(clippy::unwrap_used)]

mod etcd;
mod folder;
mod native;
mod schedules;
mod watch;
mod watches;

use std::path::Path;

use tenure_server::{Config, Server};
use tonic::transport::Channel;

/// A server on a port of its own, and its folder.
struct Fixture {
    server: Server,
    folder: tempfile::TempDir,
}

impl Fixture {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        change(&mut config);
        let server = Server::start(config).await.unwrap();
        let fixture = Self { server, folder };
        fixture.ready().await;
        fixture
    }

    /// Until the member says that it is ready: a fresh one settles on its behaviour version first.
    async fn ready(&self) {
        for _ in 0..500 {
            if self.page("/readyz").await.starts_with("HTTP/1.1 200") {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("the member does not get ready");
    }

    /// One page, head and body.
    async fn page(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.server.address()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Stops, and starts on the same folder.
    async fn restart(self) -> Self {
        self.server.stop().await;
        drop(self.server);
        let server = Server::start(config(self.folder.path())).await.unwrap();
        Self { server, folder: self.folder }
    }

    async fn channel(&self) -> Channel {
        let uri = format!("http://{}", self.server.address());
        Channel::from_shared(uri).unwrap().connect().await.unwrap()
    }
}

fn config(folder: &Path) -> Config {
    Config { data_dir: folder.to_owned(), listen: "127.0.0.1:0".to_owned(), ..Config::default() }
}
