//! Reservations in scripts, and a property test.

use super::Said;
use crate::script;
use tenure_machine::*;

/// `pool-create P 10`, `pool-resize P 5`, `pool-restock P 3`, `pool-return P 2`, `pool-delete P`, `reserve P 2 hold=30s session=7 owner=x wait=10s`,
/// `hold-confirm P id token`, `hold-cancel P id token`, `hold-extend P id token for=10s`, `give-up P request=u1`.
pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let pool = || -> Box<str> { said.plain(0).unwrap().into() };
    let number = |n: usize| said.plain(n).unwrap().parse().unwrap();
    let hold = || HoldRef { pool: pool(), id: number(1), token: Revision(number(2)) };
    let sized = || PoolCreate { pool: pool(), capacity: number(1) };
    let amount = || PoolAmount { pool: pool(), quantity: number(1) };
    let op = match said.verb {
        "pool-create" => ReservationOp::Create(sized()),
        "pool-resize" => ReservationOp::Resize(sized()),
        "pool-restock" => ReservationOp::Restock(amount()),
        "pool-return" => ReservationOp::Return(amount()),
        "pool-delete" => ReservationOp::Delete(pool()),
        "reserve" => ReservationOp::Reserve(Reserve {
            pool: pool(),
            quantity: number(1),
            hold_ms: said.option("hold").map_or(30_000, script::millis),
            session: SessionId(said.number("session")),
            owner: said.option("owner").unwrap_or_default().into(),
            wait_ms: if said.option("wait") == Some("forever") { None } else { Some(said.ms("wait")) },
        }),
        "hold-confirm" => ReservationOp::Confirm(hold()),
        "hold-cancel" => ReservationOp::Cancel(hold()),
        "hold-extend" => ReservationOp::Extend((hold(), said.ms("for"))),
        "give-up" => ReservationOp::GiveUp((pool(), script::request(said.option("request").unwrap()))),
        _ => return None,
    };
    Some(op.into())
}

/// `show pool P`: the pool, its holds and who waits.
pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    let ("pool", [name]) = (what, rest) else { return None };
    let Some(pool) = machine.object::<Pool>(namespace, name.as_bytes()) else {
        return Some(format!("no pool {name}"));
    };
    let hold = |(id, hold): (u64, &Hold)| {
        let owner = if hold.owner.is_empty() { String::new() } else { format!(" ({})", hold.owner) };
        let state = hold.state.name();
        format!("\n  {id} token={} {} {state}{owner} until {}", hold.token, hold.quantity, hold.until)
    };
    let holds: Vec<_> = machine.pool_holds(namespace, name, 0, 1_000).into_iter().map(hold).collect();
    let waiter = |waiter: &PoolWaiter| format!("\n  waits for {} until {:?}", waiter.quantity, waiter.deadline);
    let waiters: Vec<_> = machine.pool_waiters(namespace, name, 100).iter().map(waiter).collect();
    let (capacity, held, confirmed) = (pool.capacity, pool.held, pool.confirmed);
    let lists = format!("{}{}", holds.concat(), waiters.concat());
    Some(format!(
        "pool {name}: {} of {capacity} available, {held} held, {confirmed} confirmed{lists}",
        pool.available()
    ))
}

/// Whatever is done in whatever order: nothing is given twice, nobody waits for what is there, and the order of the asking is kept.
#[test]
fn a_pool_never_gives_more_than_it_has() {
    for seed in 1..=30 {
        Buyers::new(seed).run(400);
    }
}

struct Buyers {
    machine: Machine,
    random: u64,
    index: u64,
    clock: u64,
    tickets: u64,
    /// Grants seen, with what was asked for.
    holds: Vec<(u64, Revision)>,
    waiting: Vec<u64>,
}

impl Buyers {
    fn new(seed: u64) -> Self {
        let mut buyers = Self {
            machine: Machine::new(),
            random: seed,
            index: 0,
            clock: 0,
            tickets: 0,
            holds: Vec::new(),
            waiting: Vec::new(),
        };
        buyers.apply(Op::RaiseBehaviour { to: BEHAVIOUR });
        buyers.apply(ReservationOp::Create(PoolCreate { pool: "p".into(), capacity: 20 }).into());
        buyers
    }

    fn below(&mut self, n: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % n
    }

    fn run(&mut self, steps: usize) {
        for step in 0..steps {
            self.clock += self.below(400);
            let op = self.op();
            self.apply(op);
            self.check();
            if step % 50 == 0 {
                let blocks = script::snapshot(&mut self.machine, 300);
                self.machine = script::load(&blocks);
                self.check();
            }
        }
    }

    fn op(&mut self) -> Op {
        let pool = || -> Box<str> { "p".into() };
        let (id, token) = match self.holds.len() as u64 {
            0 => (1, Revision(1)),
            n => {
                let place = self.below(n) as usize;
                self.holds[place]
            }
        };
        let hold = HoldRef { pool: pool(), id, token };
        let session = SessionId(self.below(4));
        let amount = PoolAmount { pool: pool(), quantity: 1 + self.below(6) };
        match self.below(12) {
            0..=4 => {
                let (hold_ms, wait_ms) = (1_000 + self.below(5_000), Some(self.below(5_000)));
                let reserve =
                    Reserve { pool: pool(), quantity: amount.quantity, hold_ms, session, owner: "".into(), wait_ms };
                return ReservationOp::Reserve(reserve).into();
            }
            5 | 6 => ReservationOp::Confirm(hold),
            7 => ReservationOp::Cancel(hold),
            8 => ReservationOp::Return(amount),
            9 => ReservationOp::Resize(PoolCreate { pool: pool(), capacity: 10 + self.below(20) }),
            10 if self.below(2) == 0 => return Op::SessionEnd { session, token: None },
            10 => ReservationOp::Extend((hold, 1_000 + self.below(3_000))),
            _ => {
                return Op::SessionCreate(SessionCreate {
                    id: session,
                    face: SessionFace::Native,
                    ttl_ms: 1_000,
                    on_expire: OnExpire::Delete,
                    name: "".into(),
                    metadata: Vec::new(),
                    alias: None,
                    secret: None,
                });
            }
        }
        .into()
    }

    fn apply(&mut self, op: Op) {
        self.index += 1;
        self.tickets += 1;
        let waits = matches!(&op, Op::Native(_));
        let batch = Batch {
            behaviour: self.machine.behaviour(),
            stamp: LogTime(self.clock),
            origin: Origin { member: MemberId(1), boot: 1, first: self.tickets },
            txns: vec![Txn::of(op)],
        };
        let mut out = Applied::default();
        let at = Position { index: Index(self.index), term: Term(1) };
        self.machine.apply_encoded(at, &batch.encode(), &mut out).unwrap();
        for (ticket, reply) in &out.replies {
            let granted = reply.result.as_ref().ok().and_then(|txn| match txn.results.first() {
                Some(OpReply::Native(reply)) => match &**reply {
                    NativeReply::Reservation(ReservationReply::Held(held)) => Some(*held),
                    _ => None,
                },
                _ => None,
            });
            if let Some(held) = granted {
                // Whoever asked earlier and still waits would have been overtaken.
                let overtaken = self.waiting.iter().filter(|&&earlier| earlier < ticket.number);
                let mut overtaken = overtaken.filter(|&&earlier| !out.replies.iter().any(|(t, _)| t.number == earlier));
                assert_eq!(overtaken.next(), None, "{} was granted before", ticket.number);
                self.holds.push((held.id, held.token));
            }
            self.waiting.retain(|waiting| *waiting != ticket.number);
        }
        if waits && out.replies.iter().all(|(ticket, _)| ticket.number != self.tickets) {
            self.waiting.push(self.tickets);
        }
    }

    fn check(&self) {
        let m = &self.machine;
        let pool = *m.object::<Pool>(NamespaceId::DEFAULT, b"p").unwrap();
        assert!(pool.held + pool.confirmed <= pool.capacity, "{pool:?}");
        let standing = m.pool_holds(NamespaceId::DEFAULT, "p", 0, 10_000).into_iter().map(|(_, hold)| hold);
        let held: u64 = standing.clone().filter(|h| h.state == HoldState::Held).map(|h| h.quantity).sum();
        assert_eq!(held, pool.held);
        for hold in standing.filter(|h| h.state == HoldState::Held) {
            assert!(hold.until > m.stamp(), "an expired hold stands: {hold:?}");
            assert!(hold.session == SessionId(0) || m.session(hold.session).is_some(), "held for nobody: {hold:?}");
        }
        let waiters = m.pool_waiters(NamespaceId::DEFAULT, "p", 1_000);
        assert_eq!(waiters.len(), self.waiting.len());
        if let Some(head) = waiters.first() {
            assert!(head.quantity > pool.available(), "the first one waits for what is there: {head:?}, {pool:?}");
        }
    }
}
