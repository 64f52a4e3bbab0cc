//! Generated message types of the etcd v3 and `tenure.v1` protocols, and their descriptors; nothing else.
//!
//! Promises. Field names and numbers of [`etcd`] are those of etcd v3.7. [`DESCRIPTORS`] describes every type here and keeps the HTTP
//! annotations, from which the JSON faces are made. Fields of bytes are `Bytes` that share the received frame, and maps are ordered.
//! Not promised. A stored record must copy the bytes it keeps, or it keeps the whole frame alive.
//! Leaves out. Server stubs: the server dispatches by method path. Client stubs need the feature `client`.
//! Everything in `gen` is written by `cargo xtask codegen` from `proto/`; `cargo xtask codegen --check` proves it fresh.

#![cfg_attr(test, allow(clippy::unwrap_used))]

/// What the comments of the files of `tenure.v1` say: a line with full name, tab and text for each service, method, message and field, sorted.
pub const DESCRIPTIONS: &str = include_str!("gen/descriptions.txt");

/// The encoded descriptor set of every file below `proto/`, imports included.
///
/// Decode it with a library that keeps extensions (`prost_reflect::DescriptorPool::decode`): the plain descriptor types drop the HTTP
/// annotations.
pub const DESCRIPTORS: &[u8] = include_bytes!("gen/descriptors.bin");

/// The etcd v3 protocol. The modules are siblings named as their packages, since the generated code refers to them so.
pub mod etcd {
    /// Users, roles and permissions.
    #[allow(clippy::all, rustdoc::all, unreachable_pub)]
    pub mod authpb {
        include!("gen/authpb.rs");
    }

    /// The client services: KV, Watch, Lease, Cluster, Maintenance, Auth.
    #[allow(clippy::all, rustdoc::all, unreachable_pub)]
    pub mod etcdserverpb {
        include!("gen/etcdserverpb.rs");
    }

    /// Keys and events.
    #[allow(clippy::all, rustdoc::all, unreachable_pub)]
    pub mod mvccpb {
        include!("gen/mvccpb.rs");
    }

    /// The election service.
    #[allow(clippy::all, rustdoc::all, unreachable_pub)]
    pub mod v3electionpb {
        include!("gen/v3electionpb.rs");
    }

    /// The lock service.
    #[allow(clippy::all, rustdoc::all, unreachable_pub)]
    pub mod v3lockpb {
        include!("gen/v3lockpb.rs");
    }
}

/// The native protocol.
pub mod tenure {
    /// Version 1: sessions, locks, keys, the pipeline, members, status, errors.
    #[allow(clippy::all, rustdoc::all, unreachable_pub)]
    pub mod v1 {
        include!("gen/tenure.v1.rs");
        include!("gen/namespaces.rs");
    }
}

/// What a method of the native protocol takes.
pub trait Spaced {
    /// The namespace that it names; empty is `default`, also of what has none.
    fn namespace(&self) -> &str;
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prost::Message;
    use prost_reflect::{DescriptorPool, MethodDescriptor, Value};

    use super::*;

    fn pool() -> DescriptorPool {
        DescriptorPool::decode(DESCRIPTORS).unwrap()
    }

    fn method(pool: &DescriptorPool, service: &str, name: &str) -> MethodDescriptor {
        let service = pool.get_service_by_name(service).unwrap();
        service.methods().find(|method| method.name() == name).unwrap()
    }

    /// The annotation of a call as `verb path`, `None` where it has none.
    fn http(pool: &DescriptorPool, method: &MethodDescriptor) -> Option<String> {
        let extension = pool.get_extension_by_name("google.api.http").unwrap();
        let options = method.options();
        if !options.has_extension(&extension) {
            return None;
        }
        let rule = options.get_extension(&extension).as_message().unwrap().clone();
        let (field, path) = rule.fields().find(|(field, _)| field.containing_oneof().is_some()).unwrap();
        let body = rule.get_field_by_name("body").unwrap();
        Some(format!("{} {} {}", field.name(), path.as_str().unwrap(), body.as_str().unwrap()).trim_end().to_owned())
    }

    #[test]
    fn http_annotations_survive() {
        let pool = pool();
        let check = |service: &str, name: &str, expected: Option<&str>| {
            assert_eq!(http(&pool, &method(&pool, service, name)).as_deref(), expected, "{service}.{name}");
        };
        check("etcdserverpb.KV", "Range", Some("post /v3/kv/range *"));
        check("etcdserverpb.KV", "RangeStream", None);
        check("etcdserverpb.Maintenance", "MoveLeader", Some("post /v3/maintenance/transfer-leadership *"));
        check("v3lockpb.Lock", "Lock", Some("post /v3/lock/lock *"));
        check("v3electionpb.Election", "Observe", Some("post /v3/election/observe *"));
        check("tenure.v1.Locks", "Acquire", Some("post /v1/locks:acquire *"));
        check("tenure.v1.Locks", "Get", Some("get /v1/locks/{name=**}"));
        check("tenure.v1.Members", "MoveLeader", Some("post /v1/members:move-leader *"));
        check("tenure.v1.Pipeline", "Stream", None);
    }

    /// The second ways of the leases are easily lost: they are rules inside a rule.
    #[test]
    fn additional_bindings_survive() {
        let pool = pool();
        let extension = pool.get_extension_by_name("google.api.http").unwrap();
        let revoke = method(&pool, "etcdserverpb.Lease", "LeaseRevoke").options();
        let rule = revoke.get_extension(&extension);
        let more = rule.as_message().unwrap().get_field_by_name("additional_bindings").unwrap().into_owned();
        let Value::List(more) = more else { panic!("a list of rules") };
        let post = more[0].as_message().unwrap().get_field_by_name("post").unwrap();
        assert_eq!((more.len(), post.as_str()), (1, Some("/v3/kv/lease/revoke")));
    }

    /// `POST /v1/<things>:<verb>` with everything in the body, or `GET /v1/<things>...` without one. A read that is not the thing itself, such
    /// as what it was before or what becomes of it, names that behind a colon.
    #[test]
    fn native_paths_follow_the_convention() {
        let pool = pool();
        let mut seen = 0;
        for service in pool.services().filter(|service| service.package_name() == "tenure.v1") {
            for rule in service.methods().filter_map(|method| http(&pool, &method)) {
                let change = rule.starts_with("post /v1/") && rule.contains(':') && rule.ends_with(" *");
                let view = rule
                    .split_once(':')
                    .is_none_or(|(_, view)| ["history", "observe", "poll", "watch"].contains(&view));
                let read = rule.starts_with("get /v1/") && view && !rule.ends_with('*');
                assert!(change || read, "{rule}");
                seen += 1;
            }
        }
        assert!(seen >= 105, "{seen}");
    }

    #[test]
    fn namespace_and_request_have_one_number() {
        for message in pool().all_messages().filter(|message| message.package_name() == "tenure.v1") {
            for field in message.fields() {
                match (field.name(), message.name()) {
                    ("namespace", _) => assert_eq!(field.number(), 14, "{}", message.name()),
                    ("request", _) => assert_eq!(field.number(), 15, "{}", message.name()),
                    _ => {}
                }
            }
        }
    }

    /// Bytes on the wire, written out by hand: number and type of a field are what clients depend on.
    #[test]
    fn golden_bytes() {
        let put = etcd::etcdserverpb::PutRequest {
            key: Bytes::from_static(b"k"),
            value: Bytes::from_static(b"v"),
            lease: 7,
            ..Default::default()
        };
        assert_eq!(put.encode_to_vec(), b"\x0a\x01k\x12\x01v\x18\x07");

        let event = etcd::mvccpb::Event { r#type: etcd::mvccpb::event::EventType::Delete.into(), ..Default::default() };
        // Events are field 11 of the answer, with a gap behind 7.
        let watch = etcd::etcdserverpb::WatchResponse { watch_id: 1, events: vec![event], ..Default::default() };
        assert_eq!(watch.encode_to_vec(), b"\x10\x01\x5a\x02\x08\x01");

        let compare = etcd::etcdserverpb::Compare { range_end: Bytes::from_static(b"z"), ..Default::default() };
        assert_eq!(compare.encode_to_vec(), b"\x82\x04\x01z");

        let acquire = tenure::v1::LockAcquireRequest {
            name: "jobs".to_owned(),
            session: 5,
            wait: Some(tenure::v1::lock_acquire_request::Wait::WaitMs(300)),
            ..Default::default()
        };
        assert_eq!(acquire.encode_to_vec(), b"\x0a\x04jobs\x10\x05\x28\xac\x02");
    }

    /// One of each primitive, and what they have in common.
    #[test]
    fn golden_bytes_of_the_primitives() {
        use tenure::v1::*;
        let check = |message: Vec<u8>, expected: &[u8]| {
            assert_eq!(message, expected, "{} is not {}", message.escape_ascii(), expected.escape_ascii());
        };
        let text = str::to_owned;
        let begin = IdempotencyBeginRequest {
            scope: text("s"),
            key: text("k"),
            attempt_ttl_ms: 300,
            takeover: Takeover::Never.into(),
            ..Default::default()
        };
        check(begin.encode_to_vec(), b"\x0a\x01s\x12\x01k(\xac\x02@\x02");
        let job = NewJob { payload: text("p"), delay_ms: 5, dedup_key: text("d"), ..Default::default() };
        let enqueue = EnqueueRequest { queue: text("q"), jobs: vec![job], ..Default::default() };
        check(enqueue.encode_to_vec(), b"\x0a\x01q\x12\x08\x0a\x01p\x18\x05B\x01d");
        let receive = ReceiveRequest { queues: vec![text("q")], max: 2, wait_ms: 300, ..Default::default() };
        check(receive.encode_to_vec(), b"\x0a\x01q\x10\x02\x18\xac\x02");
        let receipt = JobReceipt { id: text("5-0"), token: 7, ..Default::default() };
        let ack = AckRequest { receipts: vec![receipt], ..Default::default() };
        check(ack.encode_to_vec(), b"\x0a\x07\x0a\x035-0\x10\x07");
        let once = MarkerOnceRequest { marker: text("a=1"), by: text("j"), ..Default::default() };
        check(once.encode_to_vec(), b"\x0a\x03a=1\x1a\x01j");
        let campaign = CampaignRequest {
            name: text("e"),
            session: 5,
            priority: -1,
            wait: Some(campaign_request::Wait::Forever(true)),
            ..Default::default()
        };
        check(campaign.encode_to_vec(), b"\x0a\x01e\x10\x05(\xff\xff\xff\xff\xff\xff\xff\xff\xff\x018\x01");
        let add = CounterAddRequest { name: text("c"), delta: Some(-1), min: Some(0), ..Default::default() };
        check(add.encode_to_vec(), b"\x0a\x01c\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x18\x00");
        let reserve = ReserveRequest { pool: text("p"), quantity: 2, hold_ms: 300, ..Default::default() };
        check(reserve.encode_to_vec(), b"\x0a\x01p\x10\x02\x18\xac\x02");
        let publish =
            ConfigPublishRequest { key: text("k"), content: text("c"), expect_version: Some(0), ..Default::default() };
        check(publish.encode_to_vec(), b"\x0a\x01k\x12\x01c8\x00");
        let register = ServiceRegisterRequest {
            service: text("s"),
            instance: text("i"),
            address: text("a"),
            port: 80,
            session: 5,
            ..Default::default()
        };
        check(register.encode_to_vec(), b"\x0a\x01s\x12\x01i\x1a\x01a P@\x05");
        let held = check::Fact::LockHeld(RequireLock { name: text("l"), token: 7 });
        let run = TxnRunRequest { requires: vec![Check { fact: Some(held), not: false }], ..Default::default() };
        check(run.encode_to_vec(), b"\x0a\x07\x1a\x05\x0a\x01l\x10\x07");
        let watch =
            WatchRequest { kind: text("lock"), name: text("n"), prefix: true, snapshot: true, ..Default::default() };
        check(watch.encode_to_vec(), b"(\x012\x04lock:\x01nP\x01");
        let renewal =
            SessionRenewal { id: 5, token: 7, ttl_ms: 300, should_yield: vec![text("e")], ..Default::default() };
        check(renewal.encode_to_vec(), b"\x08\x05\x10\x07\x18\xac\x022\x01e");
        let call = UnaryCall { method: text("/m"), body: Bytes::from_static(b"b") };
        check(
            Request { id: 1, call: Some(request::Call::Unary(call)) }.encode_to_vec(),
            b"\x08\x01j\x07\x0a\x02/m\x12\x01b",
        );
        let error = Error { code: text("FENCED"), retryable: true, ..Default::default() };
        check(error.encode_to_vec(), b"\x0a\x06FENCED\x18\x01");
    }
}
