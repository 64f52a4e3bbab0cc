//! Bad input for every call, on gRPC, as JSON and on the pipeline: one answer, whichever way a caller came.
//!
//! Promises under test. F1: a namespace that does not exist is NOT_FOUND for every call that names one, whatever else its request lacks. F2: a
//! request of which everything is missing has one code by every way. F3: wrong tokens and wrong states have the code of their table by every way, with the same facts,
//! and change nothing. F4: protobuf ignores what it does not know. The calls are those of the descriptors, so that one added later is under test too.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes};
use common::{Answer, Server, http};
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, Value as Field};
use serde_json::{Value, json};
use tenure_wire::tenure::v1;
use tokio::sync::mpsc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::tokio_stream;
use tonic::transport::Channel;

/// Messages as bytes.
#[derive(Clone, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, tonic::Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// What one call was told: an empty code for success.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    code: String,
    facts: BTreeMap<String, String>,
}

impl Told {
    fn of(error: v1::Error) -> Self {
        Self { code: error.code, facts: error.facts }
    }

    fn of_status(status: &tonic::Status) -> Self {
        // google.rpc.Status: details are field 3, each an Any whose value is field 2.
        #[derive(Clone, PartialEq, prost::Message)]
        struct Any {
            #[prost(bytes = "vec", tag = "2")]
            value: Vec<u8>,
        }
        #[derive(Clone, PartialEq, prost::Message)]
        struct Details {
            #[prost(message, repeated, tag = "3")]
            details: Vec<Any>,
        }
        let details = Details::decode(status.details()).unwrap().details;
        let error = details.first().map(|any| v1::Error::decode(&any.value[..]).unwrap());
        // Without a native error it is no answer of a service.
        error.map_or_else(|| Self { code: format!("gRPC {status}"), ..Self::default() }, Self::of)
    }

    fn of_answer(answer: &Answer) -> Self {
        if answer.status < 400 {
            return Self::default();
        }
        let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        let facts = body["facts"].as_object().cloned().unwrap_or_default();
        let text = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let facts = facts.into_iter().map(|(name, value)| (name, text(value))).collect();
        Self { code: body["code"].as_str().unwrap_or(&answer.body).to_owned(), facts }
    }

    /// The facts by name: what tells of time differs from one call to the next.
    fn names(&self) -> BTreeSet<&str> {
        self.facts.keys().map(String::as_str).collect()
    }
}

/// One server, and all the ways to it.
struct Faces {
    server: Server,
    document: Value,
    pool: DescriptorPool,
    grpc: tonic::client::Grpc<Channel>,
    requests: mpsc::Sender<v1::Requests>,
    replies: tonic::Streaming<v1::Replies>,
    next: u64,
}

impl Faces {
    async fn start() -> Self {
        let server = Server::start(&[]);
        let document = serde_json::from_str(&server.get("/openapi.json").body).unwrap();
        let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
        let (requests, receiver) = mpsc::channel(4);
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut pipeline = v1::pipeline_client::PipelineClient::new(channel.clone());
        let replies = pipeline.stream(stream).await.unwrap().into_inner();
        let pool = DescriptorPool::decode(tenure_wire::DESCRIPTORS).unwrap();
        Self { server, document, pool, grpc: tonic::client::Grpc::new(channel), requests, replies, next: 0 }
    }

    fn methods(&self) -> Vec<MethodDescriptor> {
        let services = self.pool.services().filter(|service| service.package_name() == "tenure.v1");
        let methods: Vec<_> = services.flat_map(|service| service.methods().collect::<Vec<_>>()).collect();
        assert!(methods.len() > 80, "{}", methods.len());
        methods
    }

    fn method(&self, name: &str) -> MethodDescriptor {
        let found = self.methods().into_iter().find(|method| short(method) == name);
        found.unwrap_or_else(|| panic!("there is no {name}"))
    }

    async fn over_grpc(&mut self, method: &MethodDescriptor, message: &DynamicMessage) -> Told {
        self.raw(method, message.encode_to_vec().into()).await
    }

    /// Any call as a stream of one message, which is the same on the wire; of several answers the first.
    async fn raw(&mut self, method: &MethodDescriptor, message: Bytes) -> Told {
        self.grpc.ready().await.unwrap();
        let path = path(method).parse().unwrap();
        let call = async {
            let stream = tonic::Request::new(tokio_stream::once(message));
            self.grpc.streaming(stream, path, Raw).await?.into_inner().message().await
        };
        let answer = tokio::time::timeout(Duration::from_secs(10), call).await;
        match answer.unwrap_or_else(|_| panic!("no answer of {}", short(method))) {
            Ok(_) => Told::default(),
            Err(status) => Told::of_status(&status),
        }
    }

    /// Every way of JSON to a method: verb, path and whether there is a body.
    fn bindings(&self, method: &MethodDescriptor) -> Vec<(String, String, bool)> {
        let mut found = Vec::new();
        for (path, verbs) in self.document["paths"].as_object().unwrap() {
            for (verb, operation) in verbs.as_object().unwrap() {
                let mut id = operation["operationId"].as_str().unwrap().split('_');
                if (id.next(), id.next()) == (Some(method.parent_service().name()), Some(method.name())) {
                    found.push((verb.to_uppercase(), path.clone(), !operation["requestBody"].is_null()));
                }
            }
        }
        found
    }

    fn over_json(&self, method: &MethodDescriptor, body: &Value) -> Option<Told> {
        let mut posts = self.bindings(method).into_iter().filter(|(verb, ..)| verb == "POST");
        posts.next().map(|(_, path, _)| Told::of_answer(&self.server.post(&path, body.to_string())))
    }

    async fn over_pipeline(&mut self, method: &MethodDescriptor, message: &DynamicMessage) -> Told {
        let kind = self.pool.get_message_by_name("tenure.v1.Request").unwrap();
        let mut request = DynamicMessage::new(kind.clone());
        let own = kind.fields().find(|field| field.kind().as_message() == Some(&method.input()));
        match own {
            Some(field) => request.set_field(&field, Field::Message(message.clone())),
            None => {
                let call = v1::UnaryCall { method: path(method), body: message.encode_to_vec().into() };
                let field = kind.get_field_by_name("unary").unwrap();
                let mut unary = DynamicMessage::new(field.kind().as_message().unwrap().clone());
                unary.merge(&call.encode_to_vec()[..]).unwrap();
                request.set_field(&field, Field::Message(unary));
            }
        }
        self.next += 1;
        let mut request = v1::Request::decode(&request.encode_to_vec()[..]).unwrap();
        request.id = self.next;
        self.requests.send(v1::Requests { requests: vec![request] }).await.unwrap();
        let replies = tokio::time::timeout(Duration::from_secs(10), self.replies.message()).await;
        let reply = replies.expect("an answer in time").unwrap().unwrap().replies.pop().unwrap();
        assert_eq!(reply.id, self.next);
        match reply.result.unwrap() {
            v1::reply::Result::Error(error) => Told::of(error),
            _ => Told::default(),
        }
    }

    fn message(&self, method: &MethodDescriptor, body: &Value) -> DynamicMessage {
        DynamicMessage::deserialize(method.input(), body)
            .unwrap_or_else(|error| panic!("{} {body}: {error}", short(method)))
    }

    fn post(&self, path: &str, body: Value) -> Value {
        let answer = self.server.post(path, body.to_string());
        assert_eq!(answer.status, 200, "{path} {body}: {answer:?}");
        serde_json::from_str(&answer.body).unwrap()
    }

    fn revision(&self) -> String {
        let answer: Value = serde_json::from_str(&self.server.get("/v1/kv?count_only").body).unwrap();
        answer["header"]["revision"].as_str().unwrap().to_owned()
    }
}

fn short(method: &MethodDescriptor) -> String {
    format!("{}.{}", method.parent_service().name(), method.name())
}

fn path(method: &MethodDescriptor) -> String {
    format!("/{}/{}", method.parent_service().full_name(), method.name())
}

/// Changes have a request id, and are taken by the pipeline.
fn is_on_the_pipeline(faces: &Faces, method: &MethodDescriptor) -> bool {
    let request = faces.pool.get_message_by_name("tenure.v1.Request").unwrap();
    let is_own = request.fields().any(|field| field.kind().as_message() == Some(&method.input()));
    let is_change = method.input().get_field_by_name("request").is_some();
    is_own && !method.is_client_streaming() || is_change
}

#[tokio::test]
async fn f1_another_namespace_is_not_found_by_every_call() {
    let mut faces = Faces::start().await;
    let before = faces.revision();
    let mut wrong = Vec::new();
    for method in faces.methods() {
        if method.input().get_field_by_name("namespace").is_none() {
            continue;
        }
        let body = json!({ "namespace": "elsewhere" });
        let message = faces.message(&method, &body);
        let mut told = vec![("gRPC".to_owned(), faces.over_grpc(&method, &message).await)];
        let bindings = faces.bindings(&method);
        assert!(!bindings.is_empty() || method.is_client_streaming(), "{} has no JSON", short(&method));
        for (verb, path, has_body) in bindings {
            // Numbers fit every variable.
            let parts: Vec<_> = path.split('/').map(|part| if part.starts_with('{') { "7" } else { part }).collect();
            let query = if has_body { "" } else { "?namespace=elsewhere" };
            let target = format!("{}{query}", parts.join("/"));
            let body = if has_body { body.to_string() } else { String::new() };
            let headers = "content-type: application/json\r\n";
            let answer = http(&faces.server.address, &verb, &target, headers, body.as_bytes()).unwrap();
            told.push((format!("{verb} {target}"), Told::of_answer(&answer)));
        }
        if is_on_the_pipeline(&faces, &method) {
            told.push(("pipeline".to_owned(), faces.over_pipeline(&method, &message).await));
        }
        let elsewhere = Told { code: "NOT_FOUND".into(), facts: [("name".into(), "elsewhere".into())].into() };
        wrong.extend(told.into_iter().filter(|(_, told)| *told != elsewhere).map(|it| (short(&method), it)));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(faces.revision(), before);
}

#[tokio::test]
async fn f2_nothing_at_all_has_one_code() {
    let mut faces = Faces::start().await;
    let mut wrong = Vec::new();
    for method in faces.methods() {
        let Some(json) = faces.over_json(&method, &json!({})) else { continue };
        let message = faces.message(&method, &json!({}));
        let mut told = vec![json, faces.over_grpc(&method, &message).await];
        if is_on_the_pipeline(&faces, &method) {
            told.push(faces.over_pipeline(&method, &message).await);
        }
        let codes: BTreeSet<_> = told.iter().map(|told| (&told.code, told.names())).collect();
        if codes.len() > 1 {
            wrong.push(format!("{}: {told:?}", short(&method)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn f4_protobuf_ignores_what_it_does_not_know() {
    let mut faces = Faces::start().await;
    for method in faces.methods() {
        if method.is_client_streaming() || method.is_server_streaming() {
            continue;
        }
        // Field 1000 as a number, in front of nothing.
        let plain = faces.raw(&method, Bytes::new()).await.code;
        let more = faces.raw(&method, Bytes::from_static(b"\xc0\x3e\x01")).await.code;
        assert_eq!(plain, more, "{}", short(&method));
        assert!(!plain.starts_with("gRPC"), "{}: {plain}", short(&method));
    }
}

/// Things in every state, as their owners left them; what is in `$` stands for a number of theirs.
fn things(faces: &Faces) -> BTreeMap<&'static str, String> {
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{value}")).to_owned();
    let mut numbers = BTreeMap::new();
    let mut keep = |name, value: &Value| assert!(numbers.insert(name, text(value)).is_none());
    for name in ["$live", "$other", "$dead"] {
        let session = faces.post("/v1/sessions:create", json!({ "ttl_ms": "60000" }));
        keep(name, &session["id"]);
        if name == "$dead" {
            faces.post("/v1/sessions:end", json!({ "id": session["id"] }));
        }
    }
    let live = numbers["$live"].clone();
    let mut keep = |name, value: &Value| assert!(numbers.insert(name, text(value)).is_none());
    let lock = faces.post("/v1/locks:acquire", json!({ "name": "held", "session": live }));
    keep("$lock", &lock["token"]);
    let led = faces.post("/v1/elections:campaign", json!({ "name": "led", "session": live }));
    keep("$led", &led["token"]);
    let begun = faces.post(
        "/v1/idempotency:begin",
        json!({ "key": "running", "fingerprint": {"algorithm": "a", "digest": "YQ=="} }),
    );
    keep("$attempt", &begun["granted"]["attempt"]);
    let begun = faces.post("/v1/idempotency:begin", json!({ "key": "done" }));
    let attempt = text(&begun["granted"]["attempt"]);
    faces.post("/v1/idempotency:complete", json!({ "key": "done", "attempt": attempt, "result": { "body": "42" } }));
    let jobs = json!([{ "payload": "1" }, { "payload": "2" }]);
    faces.post("/v1/queues:enqueue", json!({ "queue": "q", "jobs": jobs }));
    let given = faces.post("/v1/queues:receive", json!({ "queues": ["q"], "visibility_ms": "600000", "max": 2 }));
    keep("$job", &given["jobs"][0]["id"]);
    keep("$receipt", &given["jobs"][0]["token"]);
    keep("$done", &given["jobs"][1]["id"]);
    let receipt = json!({ "id": given["jobs"][1]["id"], "token": given["jobs"][1]["token"] });
    faces.post("/v1/queues:ack", json!({ "receipts": [receipt] }));
    faces.post("/v1/pools:create", json!({ "name": "sold-out", "capacity": "1" }));
    let hold = json!({ "pool": "sold-out", "quantity": "1", "hold_ms": "600000" });
    let held = faces.post("/v1/reservations:reserve", hold);
    keep("$hold", &held["id"]);
    faces.post("/v1/counters:set", json!({ "name": "five", "value": "5" }));
    faces.post("/v1/configs:publish", json!({ "key": "cfg", "content": "a" }));
    let claim = json!({ "marker": "a=claimed", "session": live, "by": "me" });
    keep("$claim", &faces.post("/v1/markers:claim", claim)["granted"]["token"]);
    faces.post("/v1/markers:once", json!({ "marker": "a=done", "by": "me" }));
    let instance = json!({ "service": "svc", "instance": "one", "address": "127.0.0.1", "session": live });
    keep("$instance", &faces.post("/v1/services:register", instance)["token"]);
    // Paused, so that its calendar moves nothing.
    faces.post("/v1/schedules:put", json!({ "name": "daily", "calendar": "@daily", "queue": "q" }));
    faces.post("/v1/schedules:pause", json!({ "name": "daily" }));
    faces.post("/v1/kv:put", json!({ "key": "k", "value": "v" }));
    numbers
}

/// Method, request, code. A token of 1 is one of the first commit, which granted nothing.
const REFUSED: &[(&str, &str, &str)] = &[
    ("Sessions.Create", r#"{"id":"$live"}"#, "INVALID"),
    ("Sessions.End", r#"{"id":"$live","token":"1"}"#, "SESSION_EXPIRED"),
    ("Sessions.End", r#"{"id":"$dead"}"#, "SESSION_EXPIRED"),
    ("Locks.Acquire", r#"{"name":"held","session":"$other"}"#, "HELD"),
    ("Locks.Acquire", r#"{"name":"held","session":"$live"}"#, "DEADLOCK"),
    ("Locks.Acquire", r#"{"name":"free","session":"$dead"}"#, "SESSION_EXPIRED"),
    ("Locks.Acquire", r#"{"name":"held","session":"$other","wait_ms":"20"}"#, "TIMEOUT_WAITING"),
    ("Locks.AcquireMany", r#"{"locks":[{"name":"held"},{"name":"free"}],"session":"$other"}"#, "HELD"),
    ("Locks.AcquireMany", r#"{"locks":[{"name":"free"}],"session":"$dead"}"#, "SESSION_EXPIRED"),
    ("Locks.Release", r#"{"name":"held","session":"$live","token":"1"}"#, "FENCED"),
    ("Locks.Release", r#"{"name":"held","session":"$other","token":"$lock"}"#, "FENCED"),
    ("Locks.Release", r#"{"name":"free","session":"$live","token":"$lock"}"#, "FENCED"),
    ("Locks.ForceRelease", r#"{"name":"held","expected_token":"1","reason":"r"}"#, "FENCED"),
    ("Locks.Resize", r#"{"name":"held","of":3}"#, "MISMATCH"),
    ("Locks.Resize", r#"{"name":"free","of":3}"#, "NOT_FOUND"),
    ("Locks.Cancel", r#"{"name":"held","session":"$other"}"#, "NOT_FOUND"),
    ("Elections.Campaign", r#"{"name":"led","session":"$other"}"#, "HELD"),
    ("Elections.Campaign", r#"{"name":"led","session":"$live"}"#, "DEADLOCK"),
    ("Elections.Campaign", r#"{"name":"free","session":"$dead"}"#, "SESSION_EXPIRED"),
    ("Elections.Proclaim", r#"{"name":"led","token":"1","value":"x"}"#, "FENCED"),
    ("Elections.Proclaim", r#"{"name":"free","token":"$led","value":"x"}"#, "FENCED"),
    ("Elections.Resign", r#"{"name":"led","token":"1"}"#, "FENCED"),
    ("Elections.Resign", r#"{"name":"led","token":"$led","to":"$other"}"#, "NOT_FOUND"),
    ("Idempotency.Heartbeat", r#"{"key":"running","attempt":"1"}"#, "FENCED"),
    ("Idempotency.Heartbeat", r#"{"key":"never","attempt":"$attempt"}"#, "FENCED"),
    ("Idempotency.Checkpoint", r#"{"key":"running","attempt":"1","checkpoint":{"name":"c"}}"#, "FENCED"),
    ("Idempotency.Complete", r#"{"key":"running","attempt":"1","result":{"body":"x"}}"#, "FENCED"),
    ("Idempotency.Complete", r#"{"key":"done","attempt":"1","result":{"body":"x"}}"#, "FENCED"),
    ("Idempotency.Fail", r#"{"key":"running","attempt":"1","retryable":true}"#, "FENCED"),
    ("Idempotency.Reconcile", r#"{"key":"running","attempt":"1","release":true}"#, "FENCED"),
    ("Idempotency.Reconcile", r#"{"key":"never","release":true}"#, "NOT_FOUND"),
    ("Queues.Ack", r#"{"receipts":[{"id":"$job","token":"1"}]}"#, "FENCED"),
    ("Queues.Nack", r#"{"id":"$job","token":"1"}"#, "FENCED"),
    ("Queues.Nack", r#"{"id":"$done","token":"1"}"#, "FENCED"),
    ("Queues.Release", r#"{"id":"$job","token":"1"}"#, "FENCED"),
    ("Queues.Heartbeat", r#"{"id":"$job","token":"1"}"#, "FENCED"),
    ("Queues.Cancel", r#"{"id":"1-0"}"#, "NOT_FOUND"),
    ("Queues.Purge", r#"{"queue":"q","states":["ready"],"confirm":"another"}"#, "INVALID"),
    ("Queues.Redrive", r#"{"queue":"never"}"#, "NOT_FOUND"),
    ("Schedules.Put", r#"{"name":"daily","calendar":"@daily","queue":"q","expect":{"absent":true}}"#, "CONFLICT"),
    ("Schedules.Put", r#"{"name":"daily","calendar":"0 25 * * *","queue":"q"}"#, "INVALID"),
    ("Schedules.Pause", r#"{"name":"never"}"#, "NOT_FOUND"),
    ("Schedules.Resume", r#"{"name":"never"}"#, "NOT_FOUND"),
    ("Schedules.Run", r#"{"name":"never"}"#, "NOT_FOUND"),
    ("Pools.Create", r#"{"name":"sold-out","capacity":"2"}"#, "CONFLICT"),
    ("Pools.Resize", r#"{"name":"never","capacity":"2"}"#, "NOT_FOUND"),
    ("Pools.Restock", r#"{"name":"never","quantity":"2"}"#, "NOT_FOUND"),
    ("Pools.Return", r#"{"name":"never","quantity":"2"}"#, "NOT_FOUND"),
    ("Pools.Delete", r#"{"name":"sold-out"}"#, "HELD"),
    ("Reservations.Reserve", r#"{"pool":"sold-out","quantity":"1"}"#, "HELD"),
    ("Reservations.Reserve", r#"{"pool":"never","quantity":"1"}"#, "NOT_FOUND"),
    ("Reservations.Confirm", r#"{"pool":"sold-out","id":"$hold","token":"1"}"#, "FENCED"),
    ("Reservations.Cancel", r#"{"pool":"sold-out","id":"$hold","token":"1"}"#, "FENCED"),
    ("Reservations.Extend", r#"{"pool":"sold-out","id":"$hold","token":"1","hold_ms":"1000"}"#, "FENCED"),
    ("Counters.Add", r#"{"name":"five","delta":"-6","min":"0"}"#, "CONFLICT"),
    ("Counters.Set", r#"{"name":"five","value":"1","expect":{"value":"4"}}"#, "CONFLICT"),
    ("Counters.Delete", r#"{"name":"five","expect":{"revision":"1"}}"#, "CONFLICT"),
    ("Configs.Publish", r#"{"key":"cfg","content":"b","expect_version":"7"}"#, "CONFLICT"),
    ("Configs.Rollback", r#"{"key":"cfg","version":"7"}"#, "NOT_FOUND"),
    ("Configs.Rollback", r#"{"key":"cfg","version":"1","expect_version":"7"}"#, "CONFLICT"),
    ("Configs.SetSchema", r#"{"key":"cfg","schema":"","expect_schema":"7"}"#, "CONFLICT"),
    ("Configs.Stage", r#"{"key":"cfg","version":"7","rollout":{"share":1}}"#, "CONFLICT"),
    ("Configs.Promote", r#"{"key":"cfg","version":"7"}"#, "CONFLICT"),
    ("Configs.Abort", r#"{"key":"cfg","version":"7"}"#, "CONFLICT"),
    ("Configs.Delete", r#"{"key":"cfg","expect_version":"7"}"#, "CONFLICT"),
    ("Configs.Delete", r#"{"key":"cfg","purge_version":"7"}"#, "CONFLICT"),
    ("Markers.Confirm", r#"{"marker":"a=claimed","token":"1"}"#, "FENCED"),
    ("Markers.Release", r#"{"marker":"a=claimed","token":"1"}"#, "FENCED"),
    ("Markers.Delete", r#"{"marker":"a=claimed","token":"1","reason":"r"}"#, "FENCED"),
    (
        "Services.Register",
        r#"{"service":"svc","instance":"one","address":"127.0.0.1","session":"$live","replace_token":"1"}"#,
        "FENCED",
    ),
    (
        "Services.Register",
        r#"{"service":"svc","instance":"two","address":"127.0.0.1","session":"$dead"}"#,
        "SESSION_EXPIRED",
    ),
    ("Services.Deregister", r#"{"service":"svc","instance":"one","token":"1"}"#, "FENCED"),
    ("Services.Heartbeat", r#"{"service":"svc","instance":"one","token":"1"}"#, "FENCED"),
    ("Services.Drain", r#"{"service":"svc","instance":"one","token":"1"}"#, "FENCED"),
    ("Kv.Get", r#"{"key":"never"}"#, "NOT_FOUND"),
    ("Kv.Put", r#"{"key":"k","value":"x","expect":{"version":"7"}}"#, "CONFLICT"),
    ("Kv.Put", r#"{"key":"k","value":"x","session":"$dead"}"#, "SESSION_EXPIRED"),
    ("Kv.Put", r#"{"key":"k","value":"x","require_locks":[{"name":"held","token":"1"}]}"#, "FENCED"),
    ("Kv.Delete", r#"{"key":"k","expect":{"version":"7"}}"#, "CONFLICT"),
    ("Kv.Delete", r#"{"key":"k","require_locks":[{"name":"held","token":"1"}]}"#, "FENCED"),
    ("Kv.Txn", r#"{"then":[{"put":{"key":"k","value":"x"}}],"require_locks":[{"name":"held","token":"1"}]}"#, "FENCED"),
    (
        "Txns.Run",
        r#"{"requires":[{"lock_held":{"name":"held","token":"1"}}],"then":[{"put":{"key":"k","value":"x"}}]}"#,
        "FENCED",
    ),
    (
        "Txns.Run",
        r#"{"requires":[{"receipt_valid":{"id":"$job","token":"1"}}],"then":[{"put":{"key":"k","value":"x"}}]}"#,
        "FENCED",
    ),
    (
        "Txns.Run",
        r#"{"requires":[{"leads":{"name":"led","token":"1"}}],"then":[{"put":{"key":"k","value":"x"}}]}"#,
        "FENCED",
    ),
];

/// Fields by which a caller says what it believes.
const BELIEFS: [&str; 9] = [
    "token",
    "expected_token",
    "replace_token",
    "attempt",
    "receipts",
    "expect",
    "expect_version",
    "expect_schema",
    "require_locks",
];

#[tokio::test]
async fn f3_wrong_tokens_and_states_are_refused_alike_and_change_nothing() {
    let mut faces = Faces::start().await;
    let tabled: BTreeSet<_> = REFUSED.iter().map(|(method, ..)| (*method).to_owned()).collect();
    for method in faces.methods() {
        let believes = BELIEFS.iter().any(|field| method.input().get_field_by_name(field).is_some());
        assert!(!believes || tabled.contains(&short(&method)), "{} has no line in the table", short(&method));
    }
    let numbers = things(&faces);
    let before = faces.revision();
    let mut wrong = Vec::new();
    for (name, body, code) in REFUSED {
        let method = faces.method(name);
        let mut body = (*body).to_owned();
        for (name, number) in &numbers {
            body = body.replace(&format!("\"{name}\""), &format!("\"{number}\""));
        }
        let body: Value = serde_json::from_str(&body).unwrap();
        let message = faces.message(&method, &body);
        let mut told = vec![faces.over_grpc(&method, &message).await];
        told.extend(faces.over_json(&method, &body));
        if is_on_the_pipeline(&faces, &method) {
            told.push(faces.over_pipeline(&method, &message).await);
        }
        let alike = told.iter().all(|it| it.code == *code && it.names() == told[0].names());
        if !alike {
            wrong.push(format!("{name} {body}: not {code}: {told:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(faces.revision(), before);
}
