//! Transactions over the primitives on the command line, over HTTP and with the client, against a real server.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use common::{Server, ok, tenure_fed};
use serde_json::{Value, json};
use tenure_client::{
    Answer, Begun, Check, Client, Code, Compare, Error, Health, NewJob, Op, ServiceCheck, Step, StoredResult,
};

fn run(server: &Server, txn: &Value) -> (u16, Value) {
    let answer = server.post("/v1/txn:run", txn.to_string());
    (answer.status, serde_json::from_str(&answer.body).unwrap())
}

fn held(server: &Server, name: &str) -> (String, String) {
    let answer = server.post("/v1/locks:acquire", json!({ "name": name, "ttl_ms": "60000" }).to_string());
    let grant: Value = serde_json::from_str(&answer.body).unwrap();
    (grant["token"].as_str().unwrap().to_owned(), grant["session"].as_str().unwrap().to_owned())
}

#[test]
fn one_commit_over_the_primitives() {
    let server = Server::start(&[]);
    let (token, session) = held(&server, "jobs");
    let once = |by: &str, value: &str| {
        json!({
            "requires": [{ "lock_held": { "name": "jobs", "token": token } }, { "session_alive": { "session": session } }],
            "compares": [{ "counter": { "name": "stock", "max": "1" } }],
            "then": [
                { "once": {
                    "marker": { "fields": { "mail": "1" }, "by": by },
                    "ops": [{ "put": { "key": "effect", "value": value } }],
                } },
                { "counter_add": { "name": "stock", "delta": "1" } },
                { "put": { "key": "last", "value": value } },
            ],
            "otherwise": [{ "range": { "key": "last", "end": "last0" } }],
        })
    };
    let (status, first) = run(&server, &once("job-1", "one"));
    assert_eq!((status, &first["succeeded"]), (200, &json!(true)), "{first}");
    assert_eq!(first["answers"][0]["once"]["answers"], json!([{ "put": {} }]), "{first}");
    assert_eq!(first["answers"][1]["counter_add"]["counter"]["value"], "1");
    let (_, second) = run(&server, &once("job-2", "two"));
    assert_eq!(second["answers"][0]["once"]["already_done"], true, "{second}");
    assert_eq!(second["answers"][0]["once"]["marker"]["by"], "job-1");
    let value = |key: &str| {
        let record: Value = serde_json::from_str(&server.get(&format!("/v1/kv/{key}")).body).unwrap();
        record["record"]["value"].as_str().unwrap().to_owned()
    };
    assert_eq!((value("effect").as_str(), value("last").as_str()), ("one", "two"));
    // The third finds the counter out of its range: the losing compare is named.
    let (_, third) = run(&server, &once("job-3", "three"));
    assert_eq!((third["failed"]["facts"]["value"].as_str(), value("last").as_str()), (Some("2"), "two"), "{third}");
    assert_eq!(third["answers"][0]["range"]["records"][0]["value"], "two");
    // A refused operation drops the whole, and names its place.
    let (status, refused) = run(
        &server,
        &json!({ "then": [
            { "put": { "key": "last", "value": "lost" } },
            { "marker_confirm": { "marker": "mail=9", "token": "3" } },
        ] }),
    );
    assert_eq!((status, refused["code"].as_str()), (412, Some("FENCED")), "{refused}");
    assert_eq!(refused["op"].as_str().or(refused["facts"]["op"].as_str()), Some("1"), "{refused}");
    // The lock is freed and the session ended in one commit; then the requirement no longer holds.
    let end = json!({ "then": [
        { "lock_release": { "name": "jobs", "session": session, "token": token } },
        { "session_end": { "id": session } },
    ] });
    assert_eq!(run(&server, &end).0, 200);
    let (status, fenced) = run(&server, &once("job-4", "four"));
    assert_eq!((status, fenced["code"].as_str(), value("last").as_str()), (412, Some("FENCED"), "two"), "{fenced}");
}

#[test]
fn configuration_and_services_in_one_commit() {
    let server = Server::start(&[]);
    let register = |instance: &str| {
        json!({ "service_register": {
            "service": "web", "instance": instance, "address": "10.0.0.1", "port": 80, "check": { "ttl_ms": "60000" },
        } })
    };
    let publish =
        |content: &str| json!({ "config_publish": { "key": "web/flags", "content": content, "author": "ann" } });
    let at = |version: &str| json!({ "config": { "key": "web/flags", "version": version } });
    let passing = json!({ "registered": { "service": "web", "instance": "a", "health": ["PASSING"] } });
    let (status, first) =
        run(&server, &json!({ "compares": [at("0")], "then": [publish("{\"n\": 1}"), register("a")] }));
    assert_eq!((status, &first["succeeded"]), (200, &json!(true)), "{first}");
    assert_eq!(first["answers"][0]["config_publish"]["current_version"], "1", "{first}");
    let token = first["answers"][1]["service_register"]["token"].as_str().unwrap().to_owned();
    assert_eq!(first["header"]["revision"].as_str(), Some(token.as_str()), "one commit");
    let second = json!({
        "compares": [at("1"), passing],
        "then": [
            { "txn": { "then": [publish("{\"n\": 2}")] } },
            register("b"),
            { "service_drain": { "service": "web", "instance": "a", "token": token } },
        ],
        "otherwise": [{ "range": { "key": "lost", "end": "lost0" } }],
        "request": { "uuid": "00112233-4455-6677-8899-aabbccddee01" },
    });
    let (_, done) = run(&server, &second);
    assert_eq!(done["answers"][2]["service_drain"]["health"], "DRAINING", "{done}");
    // The content is looked at again, at another time: it is the same request.
    assert_eq!(run(&server, &second).1["header"]["replayed"], true);
    let again = |id: &str| {
        let mut again = second.clone();
        again["request"]["uuid"] = json!(format!("00112233-4455-6677-8899-aabbccddee{id}"));
        again
    };
    let (_, lost) = run(&server, &again("02"));
    assert_eq!((&lost["failed"]["facts"]["version"], &lost["failed"]["facts"]["author"]), (&json!("2"), &json!("ann")));
    let mut drained = again("03");
    drained["compares"][0] = at("2");
    let (_, lost) = run(&server, &drained);
    assert_eq!((lost["failed"]["index"].as_u64(), &lost["failed"]["facts"]["health"]), (Some(1), &json!("draining")));
    // As requirements they refuse, with the codes of their primitives.
    for (fact, status, code) in [
        (at("1"), 412, "CONFLICT"),
        (passing.clone(), 412, "CONFLICT"),
        (json!({ "registered": { "service": "web", "instance": "a", "token": "1" } }), 412, "FENCED"),
        (json!({ "registered": { "service": "web", "instance": "z" } }), 404, "NOT_FOUND"),
    ] {
        let (got, refused) =
            run(&server, &json!({ "requires": [fact], "then": [{ "put": { "key": "lost", "value": "1" } }] }));
        assert_eq!((got, refused["code"].as_str()), (status, Some(code)), "{fact}: {refused}");
    }
    // A content that its schema refuses drops the whole, wherever it stands.
    let schema = json!({ "key": "web/flags", "schema": "{\"properties\": {\"n\": {\"maximum\": 5}}}" });
    assert_eq!(server.post("/v1/configs:set-schema", schema.to_string()).status, 200);
    let bad = json!({ "then": [{ "put": { "key": "lost", "value": "1" } }, publish("{\"n\": 6}")] });
    let (status, refused) = run(&server, &bad);
    assert_eq!(
        (status, refused["code"].as_str(), &refused["facts"]["at"]),
        (400, Some("INVALID"), &json!("/n")),
        "{refused}"
    );
    // A roll-out in steps, back again, and the end of it all.
    let staged = json!({ "then": [
        { "config_publish": { "key": "web/flags", "content": "{\"n\": 3}", "rollout": { "share": 1000 } } },
    ] });
    assert_eq!(run(&server, &staged).1["answers"][0]["config_publish"]["candidate_version"], "3");
    let stage = json!({ "config_stage": { "key": "web/flags", "version": "3", "rollout": { "share": 5000 } } });
    let promote = json!({ "config_promote": { "key": "web/flags", "version": "3" } });
    let back = json!({ "config_rollback": { "key": "web/flags", "version": "1" } });
    let (_, moved) = run(&server, &json!({ "then": [stage, promote, back] }));
    assert_eq!(moved["answers"][2]["config_rollback"]["current_version"], "4", "{moved}");
    let away = json!({ "then": [
        { "config_delete": { "key": "web/flags" } },
        { "service_deregister": { "service": "web", "instance": "a" } },
        { "service_heartbeat": { "service": "web", "instance": "b" } },
        { "service_guard": { "service": "web", "percent": 50 } },
    ] });
    let (_, gone) = run(&server, &away);
    assert_eq!(gone["answers"][1]["service_deregister"]["deregistered"], true, "{gone}");
    assert_eq!(server.get("/v1/configs/web/flags").status, 404);
    assert_eq!(server.get("/v1/kv/lost").status, 404);
    // From a shell, over the client.
    let txn = json!({ "compares": [at("0")], "then": [publish("{\"n\": 5}")] }).to_string();
    assert!(tenure_fed(&server.address, &["txn"], &txn).out.contains("config_publish"));
    assert_eq!(tenure_fed(&server.address, &["txn"], &txn).code, 10);
}

/// A check is of its moment: what was done is told as done, also where it could not be done any more.
#[test]
fn a_retry_of_a_change_that_was_checked_is_answered_from_memory() {
    let server = Server::start(&[]);
    let id = |last: u8| json!({ "uuid": format!("00112233-4455-6677-8899-aabbccddee{last:02}") });
    let publish = |n: u32| json!({ "key": "flags", "content": json!({ "n": n }).to_string(), "request": id(1) });
    let schema = |max: u32, last: u8| {
        let schema = json!({ "properties": { "n": { "maximum": max } } }).to_string();
        json!({ "key": "flags", "schema": schema, "request": id(last) })
    };
    let say = |path: &str, body: &Value| {
        let answer = server.post(path, body.to_string());
        (answer.status, serde_json::from_str::<Value>(&answer.body).unwrap())
    };
    let in_txn = |n: u32, last: u8| {
        let op = json!({ "config_publish": { "key": "flags", "content": json!({ "n": n }).to_string() } });
        json!({ "then": [op, { "counter_add": { "name": "done", "delta": "1" } }], "request": id(last) })
    };
    let back = json!({ "key": "flags", "version": "1", "request": id(2) });
    assert_eq!(say("/v1/configs:publish", &publish(7)).1["version"], "1");
    assert_eq!(say("/v1/configs:set-schema", &schema(9, 3)).0, 200);
    assert_eq!(say("/v1/txn:run", &in_txn(8, 4)).0, 200);
    assert_eq!(say("/v1/configs:rollback", &back).1["version"], "3");
    assert_eq!(say("/v1/txn:run", &in_txn(1, 5)).0, 200);
    assert_eq!(say("/v1/configs:set-schema", &schema(5, 6)).0, 200);
    // Now none of them could be done, but for the schemas and the last.
    for (path, body) in [
        ("/v1/configs:publish", publish(7)),
        ("/v1/configs:set-schema", schema(9, 3)),
        ("/v1/txn:run", in_txn(8, 4)),
        ("/v1/configs:rollback", back.clone()),
        ("/v1/txn:run", in_txn(1, 5)),
    ] {
        let (status, told) = say(path, &body);
        assert_eq!((status, &told["header"]["replayed"]), (200, &json!(true)), "{path} {body}: {told}");
        // Under an id of its own it is checked, and a second request under one id is refused.
        if path != "/v1/configs:set-schema" && !body.to_string().contains("n\\\":1") {
            let mut anew = body.clone();
            anew["request"] = id(9);
            assert_eq!(say(path, &anew).0, 400, "{path} {anew}");
        }
    }
    assert_eq!(say("/v1/configs:publish", &publish(8)).1["code"], "MISMATCH");
    let (_, now) = say("/v1/configs:publish", &json!({ "key": "flags", "content": "{\"n\": 2}" }));
    assert_eq!(now["version"], "5", "five versions, none twice");
}

#[test]
fn waits_stand_alone_and_say_so() {
    let server = Server::start(&[]);
    held(&server, "busy");
    let wait = json!({ "lock_acquire": { "name": "busy", "ttl_ms": "9000", "wait_ms": "1000" } });
    let receive = json!({ "job_receive": { "queues": ["q"], "wait_ms": "1000" } });
    for op in [wait, receive] {
        let (status, refused) = run(&server, &json!({ "then": [{ "put": { "key": "a", "value": "1" } }, op] }));
        assert_eq!((status, refused["code"].as_str()), (400, Some("INVALID")), "{op}: {refused}");
        let detail = refused["detail"].as_str().unwrap();
        assert!(detail.contains("must be the only o") && detail.contains("of its transaction"), "{detail}");
    }
    assert_eq!(server.get("/v1/kv/a").status, 404);
}

/// A worker's last step: the job is done, its caller has the result, and what came of it is written, or none of it.
#[tokio::test]
async fn a_client_settles_a_job_an_attempt_and_a_key_in_one_commit() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let queue = client.queue("orders");
    queue.enqueue(NewJob::new("order 42")).await.unwrap();
    let job = queue.receive().await.unwrap().pop().unwrap();
    let orders = client.idempotent("orders");
    let Begun::Granted(attempt) = orders.begin("order-42").await.unwrap() else { panic!("nobody runs it") };
    let session = client.session().await.unwrap();
    let leader = client.election("scheduler").campaign(&session).await.unwrap();
    let settle = |value: &str| {
        client
            .transaction()
            .require(Check::leads(&leader))
            .when(Check::receipt_valid(&job))
            .when(Check::attempt_valid(&attempt))
            .when(Check::counter_within("paid", ..=0))
            .then(Step::ack_with(&job, "done"))
            .then(Step::complete(&attempt, &StoredResult::new("paid").status(201)))
            .then(Op::put("orders/42", value.to_owned()))
            .then(Step::add("paid", 1))
            .then(Step::enqueue("mail", NewJob::new("order 42 is paid").key("mail/42")))
            .then(Step::proclaim(&leader, "42 is paid"))
    };
    let done = settle("paid").await.unwrap();
    assert!(done.succeeded && done.failed.is_none() && done.answers.len() == 6, "{done:?}");
    let Answer::Enqueued(jobs) = &done.answers[4] else { panic!("{done:?}") };
    assert!(!jobs[0].duplicate, "{jobs:?}");
    assert_eq!(
        (&done.answers[3], &done.answers[5]),
        (&Answer::Counter(1), &Answer::Proclaimed { should_yield: false })
    );
    let written = client.get("orders/42").await.unwrap().unwrap();
    assert_eq!((written.value_str(), written.mod_revision), (Some("paid"), done.revision), "one commit");
    assert_eq!(client.job(job.id()).await.unwrap().unwrap().state, "done");
    let Begun::Replay(replay) = orders.begin("order-42").await.unwrap() else { panic!("it is completed") };
    assert_eq!((replay.result.status, &replay.result.body[..], replay.attempt), (201, &b"paid"[..], attempt.token()));
    // Once more: the losing check is named with what is there instead, and nothing of it happens.
    let lost = settle("twice").await.unwrap();
    let failed = lost.failed.as_ref().unwrap();
    assert!(!lost.succeeded && lost.answers.is_empty(), "{lost:?}");
    assert_eq!((failed.index, failed.facts["state"].as_str()), (0, "done"), "{failed:?}");
    assert!(failed.message.contains(job.id()), "{failed:?}");
    assert_eq!(client.get("orders/42").await.unwrap().unwrap().version, 1);
    // Each check tells of its own, and a step that is refused names its place.
    for (check, fact, value) in [
        (Check::attempt_valid(&attempt), "state", "completed"),
        (Check::counter_within("paid", 2..), "value", "1"),
        (Check::leads(("scheduler", 1)), "presented", "1"),
        (Check::receipt_valid((job.id(), 1)), "presented", "1"),
    ] {
        let told = client.transaction().when(check).then(Op::put("lost", "1")).await.unwrap();
        assert_eq!(told.failed.as_ref().map(|failed| failed.facts[fact].as_str()), Some(value), "{told:?}");
    }
    let refused = client.transaction().then(Op::put("lost", "1")).then(Step::fail(&attempt, &StoredResult::new("no")));
    let Err(Error::Refused(refused)) = refused.await else { panic!("the attempt is over") };
    assert_eq!((refused.code, refused.facts["op"].as_str()), (Code::Fenced, "1"), "{refused:?}");
    assert_eq!(client.get("lost").await.unwrap(), None);
}

#[tokio::test]
async fn a_client_deploys_reserves_and_gives_back_in_one_commit() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    client.create_pool("seats", 3).await.unwrap();
    let registry = client.registry();
    let check = ServiceCheck::ttl(std::time::Duration::from_secs(60));
    let deploy = |version: u64, instance: &str, content: &str| {
        client
            .transaction()
            .when(Check::config_at("flags", version))
            .then(client.publish_config("flags", content.to_owned()).author("ann"))
            .then(registry.register("web", instance, "10.0.0.1", 80).check(check.clone()))
            .then(client.reserve("seats", 2))
    };
    let first = deploy(0, "a", "one").await.unwrap();
    let [Answer::Config(flags), Answer::Registered(token), Answer::Reserved(hold)] = &first.answers[..] else {
        panic!("{first:?}")
    };
    assert_eq!((flags.version, *token, hold.token), (1, first.revision, first.revision));
    // There are not so many seats, and so no second version and no second instance.
    let Err(Error::Refused(refused)) = deploy(1, "b", "two").await else { panic!("there is one seat") };
    assert_eq!((refused.code, refused.facts["op"].as_str()), (Code::Held, "2"), "{refused:?}");
    let second = client
        .transaction()
        .when(Check::in_health(("web", "a"), [Health::Passing]))
        .when(Compare::version("none").equals(0))
        .then(Step::cancel_reservation(hold.clone()))
        .then(client.publish_config("flags", "two"))
        .then(Step::drain(("web", "a")))
        .await
        .unwrap();
    assert_eq!(second.answers[2], Answer::Health(Health::Draining), "{second:?}");
    assert_eq!(client.pool("seats").await.unwrap().unwrap().pool.available, 3);
    let lost = client.transaction().when(Check::config_at("flags", 1)).then(Op::put("lost", "1")).await.unwrap();
    assert_eq!(lost.failed.unwrap().facts["version"], "2");
    let back = client
        .transaction()
        .when(Check::registered(("web", "b")).negated())
        .then(Step::rollback_config("flags", 1))
        .then(Step::deregister(("web", "a")))
        .await
        .unwrap();
    assert!(matches!(back.answers[0], Answer::Config(change) if change.current == 3), "{back:?}");
    assert_eq!(client.read_config("flags").await.unwrap().unwrap().text(), Some("one"));
}

#[tokio::test]
async fn a_client_changes_a_schedule_and_what_belongs_to_it_in_one_commit() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let nightly = client.schedule("nightly");
    let begin = |calendar: &'static str| {
        client
            .transaction()
            .when(Check::schedule_at("nightly", 0))
            .then(nightly.put(calendar, "reports", "full").zone("Europe/Berlin"))
            .then(Step::run_schedule("nightly"))
            .then(Op::put("reports/by", calendar))
    };
    let first = begin("0 3 * * *").await.unwrap();
    let [Answer::Scheduled(stored), Answer::Enqueued(jobs), Answer::Put(None)] = &first.answers[..] else {
        panic!("{first:?}")
    };
    assert!(stored.created && stored.revision == first.revision && stored.next.len() == 5, "{stored:?}");
    assert_eq!(client.queue("reports").receive().await.unwrap()[0].id(), jobs[0].id);
    // Somebody has a say in it by now: the check names the revision.
    let lost = begin("0 4 * * *").await.unwrap();
    assert_eq!(lost.failed.unwrap().facts["revision"], stored.revision.to_string());
    assert_eq!(nightly.get().await.unwrap().unwrap().calendar, "0 3 * * *");
    let pause = client
        .transaction()
        .when(Check::schedule_at("nightly", stored.revision))
        .then(Step::pause_schedule("nightly"))
        .then(Op::put("reports/by", "nobody"));
    let paused = pause.await.unwrap();
    assert!(paused.succeeded && nightly.get().await.unwrap().unwrap().paused, "{paused:?}");
    let old = client.transaction().require(Check::schedule_at("nightly", stored.revision)).then(Op::put("lost", "1"));
    let Err(Error::Refused(refused)) = old.await else { panic!("it was paused since") };
    assert_eq!((refused.code, refused.facts["name"].as_str()), (Code::Conflict, "nightly"), "{refused:?}");
    // One step that is refused drops the others, and a bad calendar is one.
    let bad = client.transaction().then(Step::resume_schedule("nightly")).then(nightly.put("soon", "reports", "full"));
    assert_eq!(bad.await.unwrap_err().code(), Some(Code::Invalid));
    assert!(nightly.get().await.unwrap().unwrap().paused);
    let end = client
        .transaction()
        .when(Check::schedule_at("nightly", 0).negated())
        .then(Step::delete_schedule("nightly"))
        .then(Op::delete("reports/by"));
    assert!(end.await.unwrap().succeeded && nightly.get().await.unwrap().is_none());
    assert_eq!(client.get("lost").await.unwrap(), None);
    // From a shell.
    let txn = json!({
        "compares": [{ "schedule": { "name": "nightly", "revision": "0" } }],
        "then": [{ "schedule_put": { "name": "nightly", "calendar": "@hourly", "queue": "reports" } }],
    });
    assert!(tenure_fed(&server.address, &["txn"], &txn.to_string()).out.contains("schedule_put"));
    assert_eq!(tenure_fed(&server.address, &["txn"], &txn.to_string()).code, 10);
}

#[test]
fn a_retry_is_answered_and_not_repeated() {
    let server = Server::start(&[]);
    // What is drawn for an operation follows from the request id of the whole.
    let txn = json!({
        "then": [{ "session_create": { "ttl_ms": "60000" } }, { "counter_add": { "name": "n", "delta": "1" } }],
        "request": { "uuid": "00112233-4455-6677-8899-aabbccddeeff" },
    });
    let (_, first) = run(&server, &txn);
    let (_, again) = run(&server, &txn);
    let made = |reply: &Value| reply["answers"][0]["session_create"]["id"].clone();
    assert!(made(&first).is_string() && made(&first) == made(&again), "{first} {again}");
    assert_eq!(again["header"]["replayed"], true);
    assert_eq!(again["answers"][1]["counter_add"]["counter"]["value"], "1");
}

#[test]
fn bad_transactions_change_nothing() {
    let server = Server::start(&[]);
    let put = json!({ "put": { "key": "a", "value": "1" } });
    for wrong in [
        json!({ "then": [{}] }),
        json!({ "then": [{ "nothing": {} }] }),
        json!({ "then": [put, put] }),
        json!({ "then": [{ "put": { "key": "a", "namespace": "default" } }] }),
        json!({ "then": [{ "counter_add": { "name": "n", "delta": "1", "namespace": "default" } }] }),
        json!({ "then": [put, { "lock_acquire": { "name": "l", "ttl_ms": "9000", "mode": "NO" } }] }),
        json!({ "then": [put, { "once": {} }] }),
        json!({ "then": [put, { "marker_claim": { "marker": "plain" } }] }),
        json!({ "compares": [{}], "then": [put] }),
        json!({ "compares": [{ "key": { "key": "a", "version": "0" }, "not": true }], "then": [put] }),
        json!({ "requires": [{ "key": { "key": "a", "version": "0" } }], "then": [put] }),
        json!({ "requires": [{ "session_alive": {} }], "then": [put] }),
        json!({ "compares": [{ "config": { "version": "1" } }], "then": [put] }),
        json!({ "compares": [{ "schedule": { "revision": "1" } }], "then": [put] }),
        json!({ "compares": [{ "registered": { "service": "web" } }], "then": [put] }),
        json!({ "compares": [{ "registered": { "service": "w", "instance": "i", "health": ["HEALTH_UNSPECIFIED"] } }], "then": [put] }),
        json!({ "then": [put, { "config_publish": { "content": "x" } }] }),
        json!({ "then": [put, { "config_publish": { "key": "k", "content": "x", "namespace": "default" } }] }),
        json!({ "then": [put, { "config_set_schema": { "key": "k", "schema": "{}" } }] }),
        json!({ "then": [put, { "config_stage": { "key": "k", "version": "1" } }] }),
        json!({ "then": [put, { "service_register": { "service": "w", "instance": "i", "address": "a", "port": 1 } }] }),
        json!({ "then": vec![json!({ "counter_add": { "name": "n", "delta": "1" } }); 129] }),
    ] {
        let (status, refused) = run(&server, &wrong);
        assert_eq!((status, refused["code"].as_str()), (400, Some("INVALID")), "{wrong}: {refused}");
    }
    assert_eq!(server.get("/v1/kv/a").status, 404);
    assert_eq!(server.get("/v1/counters/n").status, 404);
}

#[test]
fn transactions_from_a_shell() {
    let server = Server::start(&[]);
    let at = &server.address;
    let txn = r#"{"compares": [{"key": {"key": "seat/12", "version": "0"}}],
                  "then": [{"put": {"key": "seat/12", "value": "ann"}}],
                  "otherwise": [{"range": {"key": "seat/12", "end": "seat/13"}}]}"#;
    let first = tenure_fed(at, &["txn"], txn);
    assert_eq!(first.code, 0, "{}", first.err);
    assert!(first.out.starts_with("then ran, revision "), "{}", first.out);
    let second = tenure_fed(at, &["txn", "-"], txn);
    assert_eq!(second.code, 10, "{}", second.err);
    assert!(second.out.contains("ann"), "{}", second.out);
    assert!(second.err.starts_with("error: compare 0 does not hold: key `seat/12` is at version 1"), "{}", second.err);
    let file = server.folder.path().join("txn.json");
    std::fs::write(&file, txn).unwrap();
    let third = tenure_fed(at, &["txn", file.to_str().unwrap(), "-o", "json"], "");
    let reply: Value = serde_json::from_str(&third.out).unwrap();
    assert_eq!((third.code, &reply["succeeded"]), (10, &json!(false)));
    assert_eq!(reply["failed"]["current"]["value"], "ann");
    assert_eq!(tenure_fed(at, &["txn"], "{").code, 64);
    assert_eq!(tenure_fed(at, &["txn"], r#"{"than": []}"#).code, 64);
    assert_eq!(ok(at, &["kv", "get", "seat/12"]).trim_end(), "ann");
}

/// A request that was not done must not undo what its id did before.
#[test]
fn a_refused_copy_of_an_acquire_ends_nothing() {
    let server = Server::start(&[]);
    let id = "0b7f3c1e-8a35-4f0e-9a0f-6f0d0a3c1b2d";
    let acquire = |body: &str| {
        let url = format!("http://{}/v1/locks:acquire", server.address);
        let header = format!("Idempotency-Key: {id}");
        let said = std::process::Command::new("curl").args(["-s", "-H", &header, "-d", body, &url]).output().unwrap();
        serde_json::from_slice::<serde_json::Value>(&said.stdout).unwrap()
    };
    let first = r#"{"name":"mm/a","ttl_ms":"60000"}"#;
    let granted = acquire(first);
    assert!(granted["token"].is_string(), "{granted}");
    let refused = acquire(r#"{"name":"mm/b","ttl_ms":"60000"}"#);
    assert_eq!(
        (refused["code"].as_str(), refused["outcome"].as_str()),
        (Some("MISMATCH"), Some("not_applied")),
        "{refused}"
    );
    // Whatever the refusal set going is done when another change has been.
    ok(&server.address, &["kv", "put", "k", "v"]);
    let url = format!("http://{}/v1/locks/mm%2Fa", server.address);
    let lock = std::process::Command::new("curl").args(["-s", &url]).output().unwrap();
    let lock: serde_json::Value = serde_json::from_slice(&lock.stdout).unwrap();
    assert_eq!(acquire(first)["token"], granted["token"]);
    assert_eq!(lock["lock"]["holders"][0]["token"], granted["token"], "{lock}");
}
