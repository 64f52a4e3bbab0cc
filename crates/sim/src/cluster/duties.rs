//! What a member does of itself while it believes to lead: it runs the schedules that are due, by its own wall clock, and tells how instances are.
//!
//! Promises. As the server does it: it reads its own state, and proposes. One that leads no more may go on for a while with what it has read, beside
//! its successor.
//! Relies on. Calendars of the kind `@every 2s`.

use super::native::NativeBug;
use super::people::Kind;
use super::world::{Bug, Event, World};
use tenure_machine::*;

const LOOK_EVERY_US: u64 = 200_000;
const PAGE: usize = 100;

/// How instances are from some moment on, and at last.
fn health(now_us: u64, healing: bool) -> Health {
    if healing || now_us / 1_000_000 % 2 == 1 { Health::Critical } else { Health::Passing }
}

impl World {
    pub(super) fn look_at_duties(&mut self) -> Result<(), String> {
        if self.idle {
            return Ok(());
        }
        let again = LOOK_EVERY_US + self.random.below(20_000);
        self.later(again, Event::Duties);
        for node in 0..self.nodes.len() {
            self.do_duties(node)?;
        }
        Ok(())
    }

    fn do_duties(&mut self, node: usize) -> Result<(), String> {
        let (wall, notices) = (self.wall_ms(node), self.random.chance(1, 16));
        let only_first = self.options.bug == Some(Bug::Native(NativeBug::OneRunner)) && node != 0;
        let health = health(self.now, self.healing);
        let report = self.report.calls;
        let n = &mut self.nodes[node];
        let Some(member) = n.member.as_ref().filter(|_| !n.paused && !only_first) else { return Ok(()) };
        if n.led {
            n.led_term = Some(member.status().term);
            let due = member.machine().due_schedules(wall, None, PAGE).into_iter();
            n.ticks = due.filter_map(|due| Some(ScheduleOp::Tick(tick_of(&due, wall)?).into())).collect();
        } else if notices {
            n.led_term = None;
        }
        let Some(term) = n.led_term else { return Ok(()) };
        let why = format!("report {report} of {}, term {term}", n.name);
        let probed = member.machine().probed_instances(None, PAGE).into_iter();
        let is_news = |at: &ProbedInstance| at.instance.checked != health || &*at.instance.why == NOT_CHECKED;
        let reports = probed.filter(is_news).map(|at| {
            let of = InstanceRef { service: at.service, instance: at.id, token: at.instance.token };
            RegistryOp::Probed(Probed { of, term, health, why: why.clone().into() }).into()
        });
        for op in n.ticks.clone().into_iter().chain(reports).collect::<Vec<Op>>() {
            let number = self.new_number();
            self.begin(number, None, node, Kind::Native, Txn::of(op))?;
        }
        Ok(())
    }

    /// Nothing has been due for long where somebody leads, and all that is probed is known to be as it is.
    pub(super) fn duties_are_done(&self) -> bool {
        const LATE_MS: u64 = 2_000;
        let leader = (0..self.nodes.len()).find(|&node| self.nodes[node].led && self.nodes[node].listens());
        let Some((node, member)) = leader.and_then(|node| Some((node, self.nodes[node].member.as_ref()?))) else {
            return false;
        };
        let machine = member.machine();
        let is_known =
            |at: &ProbedInstance| at.instance.checked == health(self.now, true) && &*at.instance.why != NOT_CHECKED;
        let due = machine.due_schedules(self.wall_ms(node) - LATE_MS, None, 1);
        // One that has just begun is due at once.
        due.is_empty() && machine.probed_instances(None, PAGE).iter().all(is_known)
    }
}

fn tick_of(due: &DueSchedule, now: u64) -> Option<ScheduleTick> {
    let Schedule { plan, changed, last, next, .. } = &due.schedule;
    let every_ms = 1_000 * plan.calendar.strip_prefix("@every ")?.strip_suffix('s')?.parse::<u64>().ok()?;
    let (at, run) = match next {
        None => (now.max(*last), false),
        Some(next) => {
            let at = next + (now - next) / every_ms * every_ms;
            (at, plan.missed == Missed::RunOnce || now - at <= plan.grace_ms)
        }
    };
    Some(ScheduleTick { name: due.name.clone(), changed: *changed, at, run, next: at + every_ms })
}
