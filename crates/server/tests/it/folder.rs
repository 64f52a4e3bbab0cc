//! The folder and the port: what survives a restart, and what refuses to start.

use tenure_server::{FolderError, Server, StartError};
use tenure_wire::etcd::etcdserverpb::kv_client::KvClient;

use crate::etcd::{put, range_request};
use crate::{Fixture, config};

#[tokio::test]
async fn a_restart_keeps_everything() {
    let mut fixture = Fixture::start().await;
    for round in 0..3 {
        let mut kv = KvClient::new(fixture.channel().await);
        let revision = put(&mut kv, &format!("round{round}"), "v").await;
        assert_eq!(revision, 2 + round);
        fixture = fixture.restart().await;
    }
    let mut kv = KvClient::new(fixture.channel().await);
    let found = kv.range(range_request("round", "rounz")).await.unwrap().into_inner();
    assert_eq!((found.count, found.header.unwrap().revision), (3, 4));
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_folder_is_used_once() {
    let fixture = Fixture::start().await;
    let second = Server::start(config(fixture.folder.path())).await;
    let Err(error) = second else { panic!("two members on one folder") };
    assert!(matches!(error, StartError::Folder(FolderError::Locked(_))), "{error}");
    assert!(error.to_string().contains("in use by another process"));
    fixture.server.stop().await;
}

#[tokio::test]
async fn refusals_to_start_are_sentences() {
    let fixture = Fixture::start().await;
    let other = tempfile::tempdir().unwrap();
    let refused = |change: fn(&mut tenure_server::Config)| {
        let mut config = config(other.path());
        config.listen = fixture.server.address().to_string();
        change(&mut config);
        async move { Server::start(config).await.err().expect("refused").to_string() }
    };
    assert!(refused(|_| {}).await.contains("is in use"));
    assert!(refused(|config| config.listen = "0.0.0.0:0".to_owned()).await.contains("--insecure"));
    assert!(refused(|config| config.listen = "nonsense".to_owned()).await.contains("not an address"));
    let file = refused(|config| {
        config.listen = "127.0.0.1:0".to_owned();
        config.data_dir = "/proc/version/folder".into();
    });
    assert!(file.await.contains("cannot be made"));
    let soft = refused(|config| config.memory_soft_limit = u64::MAX);
    assert!(soft.await.contains("--memory-hard-limit"));
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_folder_of_another_cluster_is_refused() {
    let fixture = Fixture::start().await;
    fixture.server.stop().await;
    let mut config = config(fixture.folder.path());
    config.cluster_token = "another".to_owned();
    let Err(error) = Server::start(config).await else { panic!("another cluster's folder") };
    assert!(matches!(error, StartError::Member(_)), "{error}");
}
