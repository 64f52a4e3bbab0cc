//! The etcd face: keys, transactions, leases, maintenance, with the answers a real etcd gives.

use bytes::Bytes;
use tenure_wire::etcd::etcdserverpb as pb;
use tenure_wire::etcd::etcdserverpb::cluster_client::ClusterClient;
use tenure_wire::etcd::etcdserverpb::kv_client::KvClient;
use tenure_wire::etcd::etcdserverpb::lease_client::LeaseClient;
use tenure_wire::etcd::etcdserverpb::maintenance_client::MaintenanceClient;
use tonic::Code;
use tonic::transport::Channel;

use crate::Fixture;

pub(crate) type Kv = KvClient<Channel>;

pub(crate) fn put_request(key: &str, value: &str) -> pb::PutRequest {
    pb::PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        ..Default::default()
    }
}

pub(crate) fn range_request(key: &str, range_end: &str) -> pb::RangeRequest {
    pb::RangeRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        range_end: Bytes::copy_from_slice(range_end.as_bytes()),
        ..Default::default()
    }
}

pub(crate) async fn put(kv: &mut Kv, key: &str, value: &str) -> i64 {
    kv.put(put_request(key, value)).await.unwrap().into_inner().header.unwrap().revision
}

fn op(request: pb::request_op::Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

async fn refused<T: std::fmt::Debug>(
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> (Code, String) {
    let status = answer.await.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn put_range_delete() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    assert_eq!(put(&mut kv, "a", "1").await, 2, "the empty store is at revision 1");
    assert_eq!(put(&mut kv, "b", "2").await, 3);
    let prev =
        kv.put(pb::PutRequest { prev_kv: true, ..put_request("a", "3") }).await.unwrap().into_inner().prev_kv.unwrap();
    assert_eq!((&prev.value[..], prev.mod_revision), (&b"1"[..], 2));

    let found = kv.range(range_request("a", "c")).await.unwrap().into_inner();
    let header = found.header.unwrap();
    assert_eq!((header.revision, found.count, found.more), (4, 2, false));
    assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term != 0);
    assert_eq!((found.kvs[0].version, found.kvs[0].create_revision, found.kvs[0].mod_revision), (2, 2, 4));

    let old = kv.range(pb::RangeRequest { revision: 3, ..range_request("a", "") }).await.unwrap().into_inner();
    assert_eq!(&old.kvs[0].value[..], b"1");
    let limited = kv.range(pb::RangeRequest { limit: 1, ..range_request("a", "\0") }).await.unwrap().into_inner();
    assert_eq!((limited.kvs.len(), limited.count, limited.more), (1, 2, true));
    let sorted = pb::RangeRequest { sort_order: 2, sort_target: 3, ..range_request("a", "\0") };
    assert_eq!(&kv.range(sorted).await.unwrap().into_inner().kvs[0].key[..], b"a");

    let request =
        pb::DeleteRangeRequest { key: Bytes::from_static(b"a"), range_end: Bytes::from_static(b"z"), prev_kv: true };
    let deleted = kv.delete_range(request.clone()).await.unwrap().into_inner();
    assert_eq!((deleted.deleted, deleted.prev_kvs.len(), deleted.header.unwrap().revision), (2, 2, 5));
    let again = kv.delete_range(request).await.unwrap().into_inner();
    assert_eq!((again.deleted, again.header.unwrap().revision), (0, 5), "nothing deleted, no revision taken");
    fixture.server.stop().await;
}

#[tokio::test]
async fn errors_are_etcds() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    let invalid = |text: &str| (Code::InvalidArgument, format!("etcdserver: {text}"));
    assert_eq!(refused(kv.put(put_request("", "v"))).await, invalid("key is not provided"));
    let request = pb::PutRequest { ignore_value: true, ..put_request("a", "v") };
    assert_eq!(refused(kv.put(request)).await, invalid("value is provided"));
    let request = pb::PutRequest { ignore_value: true, ..put_request("a", "") };
    assert_eq!(refused(kv.put(request)).await, invalid("key not found"));
    let request = pb::PutRequest { lease: 77, ..put_request("a", "v") };
    assert_eq!(refused(kv.put(request)).await, (Code::NotFound, "etcdserver: requested lease not found".to_owned()));
    let request = pb::RangeRequest { sort_target: 9, ..range_request("a", "") };
    assert_eq!(refused(kv.range(request)).await, invalid("invalid sort option"));
    let request = pb::RangeRequest { revision: 99, ..range_request("a", "") };
    let text = "etcdserver: mvcc: required revision is a future revision";
    assert_eq!(refused(kv.range(request)).await, (Code::OutOfRange, text.to_owned()));
    let large = "x".repeat(1536 << 10);
    assert_eq!(refused(kv.put(put_request("a", &large))).await, invalid("request is too large"));

    let twice = vec![op(pb::request_op::Request::RequestPut(put_request("a", "1"))); 2];
    let request = pb::TxnRequest { success: twice, ..Default::default() };
    assert_eq!(refused(kv.txn(request)).await, invalid("duplicate key given in txn request"));
    let many = (0..129).map(|n| op(pb::request_op::Request::RequestPut(put_request(&n.to_string(), "")))).collect();
    let request = pb::TxnRequest { success: many, ..Default::default() };
    assert_eq!(refused(kv.txn(request)).await, invalid("too many operations in txn request"));

    for n in 0..3 {
        put(&mut kv, "a", &n.to_string()).await;
    }
    kv.compact(pb::CompactionRequest { revision: 3, physical: true }).await.unwrap();
    let compacted = (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted".to_owned());
    assert_eq!(refused(kv.compact(pb::CompactionRequest { revision: 3, physical: false })).await, compacted);
    assert_eq!(refused(kv.range(pb::RangeRequest { revision: 2, ..range_request("a", "") })).await, compacted);
    fixture.server.stop().await;
}

#[tokio::test]
async fn transactions() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    let create = |value: &str| pb::TxnRequest {
        compare: vec![pb::Compare {
            result: pb::compare::CompareResult::Equal.into(),
            target: pb::compare::CompareTarget::Mod.into(),
            key: Bytes::from_static(b"k"),
            target_union: Some(pb::compare::TargetUnion::ModRevision(0)),
            range_end: Bytes::new(),
        }],
        success: vec![op(pb::request_op::Request::RequestPut(put_request("k", value)))],
        failure: vec![op(pb::request_op::Request::RequestRange(range_request("k", "")))],
    };
    let first = kv.txn(create("1")).await.unwrap().into_inner();
    assert!(first.succeeded);
    assert_eq!(first.header.unwrap().revision, 2);
    let second = kv.txn(create("2")).await.unwrap().into_inner();
    assert!(!second.succeeded);
    assert_eq!(second.header.unwrap().revision, 2, "a refused create takes no revision");
    let Some(pb::response_op::Response::ResponseRange(found)) = &second.responses[0].response else {
        panic!("a range")
    };
    assert_eq!(&found.kvs[0].value[..], b"1");
    let header = found.header.unwrap();
    assert_eq!((header.revision, header.cluster_id), (2, 0), "inner headers tell a revision only");

    let read_only = pb::TxnRequest {
        success: vec![op(pb::request_op::Request::RequestRange(range_request("k", "")))],
        ..Default::default()
    };
    let read = kv.txn(read_only).await.unwrap().into_inner();
    assert!(read.succeeded && read.header.unwrap().revision == 2);
    fixture.server.stop().await;
}

#[tokio::test]
async fn leases() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let (mut kv, mut lease) = (KvClient::new(channel.clone()), LeaseClient::new(channel));
    let granted = lease.lease_grant(pb::LeaseGrantRequest { ttl: 1, id: 0 }).await.unwrap().into_inner();
    assert_eq!(granted.ttl, 2, "raised to the smallest TTL");
    assert!(granted.id > 0);
    let exists = refused(lease.lease_grant(pb::LeaseGrantRequest { ttl: 5, id: granted.id })).await;
    assert_eq!(exists, (Code::FailedPrecondition, "etcdserver: lease already exists".to_owned()));
    let large = refused(lease.lease_grant(pb::LeaseGrantRequest { ttl: 9_000_000_001, id: 0 })).await;
    assert_eq!(large, (Code::OutOfRange, "etcdserver: too large lease TTL".to_owned()));

    let long = lease.lease_grant(pb::LeaseGrantRequest { ttl: 600, id: 500 }).await.unwrap().into_inner();
    kv.put(pb::PutRequest { lease: long.id, ..put_request("held", "v") }).await.unwrap();
    let left = lease.lease_time_to_live(pb::LeaseTimeToLiveRequest { id: 500, keys: true }).await.unwrap().into_inner();
    assert!((590..=600).contains(&left.ttl) && left.granted_ttl == 600, "{left:?}");
    assert_eq!(left.keys, [Bytes::from_static(b"held")]);
    let none =
        lease.lease_time_to_live(pb::LeaseTimeToLiveRequest { id: 501, keys: false }).await.unwrap().into_inner();
    assert_eq!((none.ttl, none.granted_ttl), (-1, 0));
    let all = lease.lease_leases(pb::LeaseLeasesRequest {}).await.unwrap().into_inner();
    assert_eq!(all.leases.iter().map(|lease| lease.id).collect::<Vec<_>>(), [granted.id, 500], "the next to end first");

    let ids = [500, 501].map(|id| pb::LeaseKeepAliveRequest { id });
    let mut answers = lease.lease_keep_alive(tokio_stream::iter(ids)).await.unwrap().into_inner();
    let first = answers.message().await.unwrap().unwrap();
    let second = answers.message().await.unwrap().unwrap();
    assert_eq!((first.id, first.ttl, second.id, second.ttl), (500, 600, 501, 0));

    // The short one ends by itself.
    let gone = async {
        while lease
            .lease_time_to_live(pb::LeaseTimeToLiveRequest { id: granted.id, keys: false })
            .await
            .unwrap()
            .into_inner()
            .ttl
            >= 0
        {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), gone).await.expect("the lease ends");
    lease.lease_revoke(pb::LeaseRevokeRequest { id: 500 }).await.unwrap();
    assert_eq!(kv.range(range_request("held", "")).await.unwrap().into_inner().count, 0);
    fixture.server.stop().await;
}

#[tokio::test]
async fn big_ranges() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await).max_decoding_message_size(64 << 20);
    for group in 0..25 {
        let puts = (0..100)
            .map(|n| op(pb::request_op::Request::RequestPut(put_request(&format!("big/{group:02}{n:02}"), "v"))));
        kv.txn(pb::TxnRequest { success: puts.collect(), ..Default::default() }).await.unwrap();
    }
    let all = kv.range(range_request("big/", "big0")).await.unwrap().into_inner();
    assert_eq!((all.kvs.len(), all.count, all.more), (2500, 2500, false));
    assert!(all.kvs.is_sorted_by(|a, b| a.key < b.key));
    let limited = kv
        .range(pb::RangeRequest { limit: 1500, keys_only: true, ..range_request("big/", "big0") })
        .await
        .unwrap()
        .into_inner();
    assert_eq!((limited.kvs.len(), limited.count, limited.more), (1500, 2500, true));
    assert!(limited.kvs[0].value.is_empty());

    for limit in [0, 700] {
        let request = pb::RangeRequest { limit, ..range_request("big/", "big0") };
        let mut chunks = kv.range_stream(request).await.unwrap().into_inner();
        let (mut keys, mut last) = (0, None);
        while let Some(chunk) = chunks.message().await.unwrap() {
            let chunk = chunk.range_response.unwrap();
            keys += chunk.kvs.len();
            last = Some(chunk);
        }
        let last = last.unwrap();
        let expected = if limit == 0 { 2500 } else { limit as usize };
        assert_eq!((keys, last.count, last.more), (expected, 2500, limit > 0));
        assert_eq!(last.header.unwrap().revision, 26);
    }
    fixture.server.stop().await;
}

#[tokio::test]
async fn members_and_maintenance() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let mut cluster = ClusterClient::new(channel.clone());
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let members = cluster.member_list(pb::MemberListRequest { linearizable: true }).await.unwrap().into_inner();
    assert_eq!(members.header.unwrap().revision, 0);
    assert_eq!(members.members[0].client_ur_ls, [format!("http://{}", fixture.server.address())]);
    let status = maintenance.status(pb::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.version.as_str(), status.leader), ("3.7.3", members.members[0].id));
    assert!(status.db_size > 0 && status.raft_applied_index > 0 && status.errors.is_empty());
    assert!(maintenance.alarm(pb::AlarmRequest::default()).await.unwrap().into_inner().alarms.is_empty());
    let mut kv = KvClient::new(channel);
    let before = maintenance.hash_kv(pb::HashKvRequest { revision: 0 }).await.unwrap().into_inner();
    put(&mut kv, "a", "1").await;
    let after = maintenance.hash_kv(pb::HashKvRequest { revision: 0 }).await.unwrap().into_inner();
    assert!(before.hash != after.hash && after.hash_revision == 2);
    let again = maintenance.hash_kv(pb::HashKvRequest { revision: 1 }).await.unwrap().into_inner();
    assert_eq!(again.hash, before.hash, "the same revision, the same hash");
    let snapshot = maintenance.snapshot(pb::SnapshotRequest {}).await.map(|_| ());
    let refused = match snapshot {
        Err(status) => status,
        Ok(()) => panic!("snapshots have a format of their own"),
    };
    assert!(refused.code() == Code::Unimplemented && refused.message().contains("a format of their own"));
    fixture.server.stop().await;
}
