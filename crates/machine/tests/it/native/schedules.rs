//! Schedules in scripts: `schedule NAME queue=q payload=x every=5s [zone=Z] [run-once] [no-overlap] [header=BYTES] [expect=2]`, `schedule-delete NAME`,
//! `schedule-pause NAME`, `schedule-resume NAME`, `schedule-run NAME`, and the leader's `schedule-tick NAME changed=2 at=1000 next=2000 [begin]`.

use super::Said;
use std::sync::Arc;
use tenure_machine::*;

pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let name = || -> Box<[u8]> { said.plain(0).unwrap().trim_matches('\'').as_bytes().into() };
    let named = || ScheduleName { name: name() };
    let op = match said.verb {
        "schedule" => ScheduleOp::Put(SchedulePut {
            name: name(),
            plan: plan(said),
            expect: said.option("expect").map(|expect| Revision(expect.parse().unwrap())),
        }),
        "schedule-delete" => ScheduleOp::Delete(named()),
        "schedule-pause" => ScheduleOp::Pause(named()),
        "schedule-resume" => ScheduleOp::Resume(named()),
        "schedule-run" => ScheduleOp::Run(named()),
        "schedule-tick" => ScheduleOp::Tick(ScheduleTick {
            name: name(),
            changed: Revision(said.number("changed")),
            at: said.number("at"),
            run: !said.has("begin"),
            next: said.number("next"),
        }),
        _ => return None,
    };
    Some(op.into())
}

fn plan(said: &Said<'_>) -> SchedulePlan {
    let payload = said.option("payload").unwrap_or_default().as_bytes().into();
    let on_duplicate = OnDuplicate::ReturnExisting;
    let terms = said.option("header").map(|bytes| {
        let headers = vec![("h".into(), "x".repeat(bytes.parse::<usize>().unwrap() - 1).into())];
        Arc::new(JobTerms { headers, ..JobTerms::default() })
    });
    SchedulePlan {
        calendar: said.option("every").map_or_else(String::new, |every| format!("@every {every}")).into(),
        zone: said.option("zone").unwrap_or_default().into(),
        queue: said.bytes("queue"),
        job: NewJob { payload, delay_ms: 0, run_at_ms: None, priority: 0, terms, on_duplicate },
        missed: if said.has("run-once") { Missed::RunOnce } else { Missed::Skip },
        grace_ms: 60_000,
        no_overlap: said.has("no-overlap"),
    }
}

pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    let said = match (what, rest) {
        ("schedule", [name]) => match machine.object::<Schedule>(namespace, name.as_bytes()) {
            None => format!("no schedule {name}"),
            Some(s) => format!(
                "schedule {name} `{}` changed={} last={} next={:?} enqueued={}{}{}",
                s.plan.calendar,
                s.changed,
                s.last,
                s.next,
                s.enqueued,
                if s.paused { " paused" } else { "" },
                s.trouble.as_ref().map_or_else(String::new, |t| format!(" refused at {}: {}", t.at, t.why))
            ),
        },
        ("due", [now]) => {
            let at = now.parse().unwrap();
            // In pages of one, so that the places between them are looked at too.
            let mut names = Vec::new();
            let mut last = None;
            while let Some(due) = machine.due_schedules(at, last.as_ref(), 1).pop() {
                names.push(due.name.escape_ascii().to_string());
                last = Some(due);
            }
            let then = machine.next_schedule(at).map_or_else(String::new, |then| format!(", then {then}"));
            format!("due at {now} [{}]{then}", names.join(" "))
        }
        _ => return None,
    };
    Some(said)
}
