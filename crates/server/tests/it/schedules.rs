//! Schedules against the wall clock: ticks come once, not during a pause, and after an outage as the schedule asks for.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::queues_client::QueuesClient;
use tenure_wire::tenure::v1::schedules_client::SchedulesClient;
use tokio::time::sleep;
use tonic::Code;
use tonic::transport::Channel;

use crate::Fixture;
use crate::native::error;

fn put(name: &str, calendar: &str) -> v1::SchedulePutRequest {
    v1::SchedulePutRequest {
        name: name.to_owned(),
        calendar: calendar.to_owned(),
        queue: name.to_owned(),
        job: Some(v1::NewJob { payload: "x".to_owned(), ..Default::default() }),
        ..Default::default()
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

async fn get(schedules: &mut SchedulesClient<Channel>, name: &str) -> v1::Schedule {
    let request = v1::ScheduleGetRequest { name: name.to_owned(), ..Default::default() };
    schedules.get(request).await.unwrap().into_inner().schedule.unwrap()
}

/// The ticks of the jobs that a queue has, which are done then.
async fn ticks(queues: &mut QueuesClient<Channel>, queue: &str) -> Vec<u64> {
    let receive = v1::ReceiveRequest { queues: vec![queue.to_owned()], max: 100, ..Default::default() };
    let jobs = queues.receive(receive).await.unwrap().into_inner().jobs;
    for job in &jobs {
        assert_eq!(job.headers["tenure-schedule"], queue);
        let receipt = v1::JobReceipt { id: job.id.clone(), token: job.token, ..Default::default() };
        queues.ack(v1::AckRequest { receipts: vec![receipt], ..Default::default() }).await.unwrap();
    }
    jobs.iter().filter_map(|job| Some(job.headers.get("tenure-tick-ms")?.parse().unwrap())).collect()
}

async fn wait_until(unix: u64) {
    sleep(Duration::from_millis(unix.saturating_sub(unix_ms()))).await;
}

#[tokio::test]
async fn ticks_come_once_and_not_during_a_pause() {
    let fixture = Fixture::start().await;
    let mut schedules = SchedulesClient::new(fixture.channel().await);
    let mut queues = QueuesClient::new(fixture.channel().await);
    let stored = schedules.put(put("s", "@every 1s")).await.unwrap().into_inner();
    assert!(stored.created && stored.next_unix_ms.len() == 5);
    let again = schedules.put(put("s", "@every 1s")).await.unwrap().into_inner();
    assert_eq!((again.created, again.revision), (false, stored.revision));
    sleep(Duration::from_millis(3_600)).await;
    let begun = get(&mut schedules, "s").await;
    let seen = ticks(&mut queues, "s").await;
    assert!(seen.len() >= 3 && seen.windows(2).all(|two| two[1] == two[0] + 1_000), "{seen:?}");
    assert_eq!((begun.late_ms, begun.last_error.as_str()), (0, ""));
    assert!(begun.next_unix_ms.len() == 5 && begun.next_unix_ms[0] == begun.last_unix_ms + 1_000, "{begun:?}");
    let (name, namespace, request) = ("s".to_owned(), String::new(), None);
    let pause = v1::SchedulePauseRequest { name: name.clone(), namespace: namespace.clone(), request };
    schedules.pause(pause).await.unwrap();
    ticks(&mut queues, "s").await;
    sleep(Duration::from_millis(2_200)).await;
    assert_eq!(ticks(&mut queues, "s").await, [] as [u64; 0]);
    let paused = get(&mut schedules, "s").await;
    assert!(paused.paused && paused.next_unix_ms.is_empty() && paused.late_ms == 0, "{paused:?}");
    // A run beside the calendar is no tick.
    let run = v1::ScheduleRunRequest { name: name.clone(), namespace: namespace.clone(), request: None };
    let job = schedules.run(run).await.unwrap().into_inner().job.unwrap();
    assert_eq!(get(&mut schedules, "s").await.job_id, job.id);
    assert_eq!(ticks(&mut queues, "s").await, [] as [u64; 0]);
    let resumed = unix_ms();
    schedules.resume(v1::ScheduleResumeRequest { name: name.clone(), namespace, request: None }).await.unwrap();
    sleep(Duration::from_millis(2_600)).await;
    let more = ticks(&mut queues, "s").await;
    assert!(more.len() >= 2 && more[0] >= resumed + 1_000, "{more:?} since {resumed}");
    let delete = v1::ScheduleDeleteRequest { name, ..Default::default() };
    assert!(schedules.delete(delete.clone()).await.unwrap().into_inner().deleted);
    assert!(!schedules.delete(delete).await.unwrap().into_inner().deleted);
}

#[tokio::test]
async fn what_was_missed_is_done_once_late_or_not_at_all() {
    let fixture = Fixture::start().await;
    let mut schedules = SchedulesClient::new(fixture.channel().await);
    for (name, missed) in [("skip", v1::MissedTicks::SkipMissed), ("once", v1::MissedTicks::RunLastMissed)] {
        let request = v1::SchedulePutRequest { missed: missed.into(), grace_ms: 500, ..put(name, "@every 3s") };
        schedules.put(request).await.unwrap();
    }
    sleep(Duration::from_millis(600)).await;
    let begun = [get(&mut schedules, "skip").await, get(&mut schedules, "once").await];
    assert!(begun.iter().all(|schedule| schedule.last_unix_ms > 0), "{begun:?}");
    let last = begun.iter().map(|schedule| schedule.last_unix_ms).max().unwrap();
    // Two ticks pass meanwhile; the grace of the second is over, and the third is to come.
    fixture.server.stop().await;
    wait_until(last + 7_000).await;
    let fixture = fixture.restart().await;
    fixture.ready().await;
    wait_until(last + 8_200).await;
    let mut schedules = SchedulesClient::new(fixture.channel().await);
    let mut queues = QueuesClient::new(fixture.channel().await);
    for (before, expected) in begun.iter().zip([None, Some(6_000)]) {
        let now = get(&mut schedules, &before.name).await;
        assert_eq!(now.last_unix_ms, before.last_unix_ms + 6_000, "{now:?}");
        let expected: Vec<u64> = expected.into_iter().map(|late| before.last_unix_ms + late).collect();
        assert_eq!(ticks(&mut queues, &before.name).await, expected, "{now:?}");
    }
}

#[tokio::test]
async fn a_tick_that_the_queue_does_not_take_is_seen() {
    let fixture = Fixture::start().await;
    let mut schedules = SchedulesClient::new(fixture.channel().await);
    let mut queues = QueuesClient::new(fixture.channel().await);
    let one = v1::QueueConfigureRequest { queue: "s".to_owned(), jobs_max: Some(1), ..Default::default() };
    queues.configure(one).await.unwrap();
    schedules.put(put("s", "@every 1s")).await.unwrap();
    sleep(Duration::from_millis(4_500)).await;
    let full = get(&mut schedules, "s").await;
    assert_eq!((full.enqueued, full.last_error.as_str()), (1, "queue `s` has 1 jobs, which is all it may have"));
    assert!(full.last_error_unix_ms > full.last_unix_ms && full.late_ms > 1_000, "{full:?}");
    let run = v1::ScheduleRunRequest { name: "s".to_owned(), ..Default::default() };
    assert_eq!(error(&schedules.run(run).await.unwrap_err()).code, "QUOTA");
    assert_eq!(ticks(&mut queues, "s").await.len(), 1);
    for _ in 0..100 {
        sleep(Duration::from_millis(100)).await;
        let now = get(&mut schedules, "s").await;
        if now.enqueued == 2 {
            assert_eq!((now.last_error.as_str(), now.late_ms), ("", 0), "{now:?}");
            return;
        }
    }
    panic!("no tick was taken: {:?}", get(&mut schedules, "s").await);
}

#[tokio::test]
async fn bad_schedules_are_refused_with_the_field() {
    let fixture = Fixture::start().await;
    let mut schedules = SchedulesClient::new(fixture.channel().await);
    let good = put("s", "0 3 * * *");
    let stored = schedules.put(good.clone()).await.unwrap().into_inner();
    let refused = async |schedules: &mut SchedulesClient<Channel>, request: v1::SchedulePutRequest, field: &str| {
        let status = schedules.put(request.clone()).await.unwrap_err();
        let error = error(&status);
        assert_eq!((status.code(), error.code.as_str()), (Code::InvalidArgument, "INVALID"), "{request:?} {error:?}");
        assert_eq!(error.facts["field"], field, "{request:?} {error:?}");
        error.message
    };
    let s = &mut schedules;
    let message = refused(s, put("s", "0 25 * * *"), "calendar").await;
    assert_eq!(message, "field 2, the hour (0 to 23), is `25`: number out of bounds");
    refused(s, put("s", ""), "calendar").await;
    refused(s, put("s", &"0".repeat(256)), "calendar").await;
    refused(s, put("s", "0 0 30 2 *"), "calendar").await;
    refused(s, put("s", "@every 1ms"), "calendar").await;
    refused(s, put("", "@daily"), "name").await;
    refused(s, put(&"n".repeat(241), "@daily"), "name").await;
    refused(s, v1::SchedulePutRequest { time_zone: "Mars".into(), ..good.clone() }, "time_zone").await;
    refused(s, v1::SchedulePutRequest { queue: String::new(), ..good.clone() }, "queue").await;
    refused(s, v1::SchedulePutRequest { missed: 9, ..good.clone() }, "missed").await;
    refused(s, v1::SchedulePutRequest { grace_ms: 86_400_001, ..good.clone() }, "grace_ms").await;
    let job = |job| v1::SchedulePutRequest { job: Some(job), ..good.clone() };
    refused(s, job(v1::NewJob { run_at_unix_ms: 1, ..Default::default() }), "job.run_at_unix_ms").await;
    refused(s, job(v1::NewJob { on_duplicate: 2, ..Default::default() }), "job.on_duplicate").await;
    refused(s, job(v1::NewJob { priority: 8, ..Default::default() }), "priority").await;
    let keyed = job(v1::NewJob { dedup_key: "k".into(), ..Default::default() });
    refused(s, v1::SchedulePutRequest { no_overlap: true, ..keyed }, "job.dedup_key").await;
    let expect = |fact| v1::SchedulePutRequest { expect: Some(v1::ScheduleExpect { fact }), ..good.clone() };
    refused(s, expect(None), "expect").await;
    refused(s, expect(Some(v1::schedule_expect::Fact::Absent(false))), "expect.absent").await;
    refused(s, expect(Some(v1::schedule_expect::Fact::Revision(0))), "expect.revision").await;
    let status = s.put(expect(Some(v1::schedule_expect::Fact::Absent(true)))).await.unwrap_err();
    let conflict = error(&status);
    assert_eq!(conflict.facts["revision"], stored.revision.to_string(), "{conflict:?}");
    assert_eq!((status.code(), conflict.code.as_str()), (Code::FailedPrecondition, "CONFLICT"));
    let missing = |name: &str| v1::SchedulePauseRequest { name: name.to_owned(), ..Default::default() };
    assert_eq!(error(&s.pause(missing("none")).await.unwrap_err()).code, "NOT_FOUND");
    assert_eq!(error(&s.pause(missing("")).await.unwrap_err()).code, "INVALID");
    let elsewhere = v1::SchedulePutRequest { namespace: "other".into(), ..good.clone() };
    assert_eq!(error(&s.put(elsewhere).await.unwrap_err()).code, "NOT_FOUND");
    // Nothing of that has changed it.
    let same = s.put(good).await.unwrap().into_inner();
    assert_eq!((same.created, same.revision), (false, stored.revision));
}
