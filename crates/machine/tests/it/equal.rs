//! Members with other flags, other chores and other histories of snapshots have equal state after equal logs.

use crate::model::{log, steps};
use crate::script::{load, snapshot};
use proptest::prelude::*;
use tenure_machine::*;

type Blocks = Vec<Vec<u8>>;

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equal_logs_give_equal_states(steps in steps(150), chores in prop::collection::vec(0..12u8, 200), cut in 0..150usize) {
        let log = log(&steps);
        // One that never does a chore.
        let mut plain = Machine::new();
        // One that maintains and takes snapshots while entries come.
        let mut busy = Machine::new();
        busy.set_memory_limits(MemoryLimits { soft: 1, hard: 2 });
        // One that starts from a snapshot of the busy one.
        let mut loaded: Option<Machine> = None;
        // What the plain one writes at that moment, and what the busy one has written so far.
        let mut running: Option<(Blocks, Blocks)> = None;
        for (n, ((at, batch, _), chore)) in log.into_iter().zip(chores.into_iter().cycle()).enumerate() {
            let (a, b) = (apply(&mut plain, at, &batch), apply(&mut busy, at, &batch));
            prop_assert_eq!(&a, &b);
            if let Some(loaded) = &mut loaded {
                prop_assert_eq!(&a, &apply(loaded, at, &batch));
                prop_assert_eq!(loaded.checksum(), plain.checksum());
            }
            prop_assert_eq!(plain.checksum(), busy.checksum());
            if n == cut && running.is_none() {
                loaded = Some(load(&snapshot(&mut busy, 300)));
            }
            match (chore, &mut running) {
                (0..=3, _) => drop(busy.maintain(usize::from(chore))),
                // A snapshot of now, whose slices come later, is that of the plain one now.
                (4, None) => {
                    running = Some((snapshot(&mut plain, 64), Vec::new()));
                    busy.snapshot_begin();
                }
                (5, Some(_)) => {
                    busy.snapshot_abort();
                    running = None;
                }
                (6..=9, Some((expected, blocks))) => match busy.snapshot_next(64) {
                    Some(block) => blocks.push(block),
                    None => {
                        prop_assert_eq!(&*expected, &*blocks);
                        running = None;
                    }
                },
                _ => {}
            }
        }
        busy.snapshot_abort();
        while busy.maintain(3) {}
        let blocks = snapshot(&mut plain, 500);
        prop_assert_eq!(&snapshot(&mut busy, 500), &blocks);
        prop_assert_eq!(plain.counts().sessions, busy.counts().sessions);
        if let Some(loaded) = &mut loaded {
            prop_assert_eq!(&snapshot(loaded, 500), &blocks);
        }
        prop_assert_eq!(load(&blocks).checksum(), plain.checksum());
        prop_assert_eq!(load(&blocks).memory().used, { while plain.maintain(100) {} plain.memory().used });
    }

    /// Snapshots that were altered anywhere, cut or reordered are refused, or load as something; none panics.
    #[test]
    fn damaged_snapshots_never_panic(steps in steps(60), block in any::<prop::sample::Index>(), byte in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut machine = Machine::new();
        for (at, batch, _) in log(&steps) {
            apply(&mut machine, at, &batch);
        }
        let mut blocks = snapshot(&mut machine, 100);
        let block = block.index(blocks.len());
        let byte = byte.index(blocks[block].len());
        let was = std::mem::replace(&mut blocks[block][byte], to);
        prop_assert_eq!(try_load(&blocks).is_ok(), was == to);
        blocks[block][byte] = was;
        blocks[block].truncate(byte);
        prop_assert!(try_load(&blocks).is_err());
        blocks.remove(block);
        prop_assert!(try_load(&blocks).is_err());
    }
}

fn try_load(blocks: &[Vec<u8>]) -> Result<Machine, DecodeError> {
    let mut loader = Loader::new();
    blocks.iter().try_for_each(|block| loader.push(block))?;
    loader.finish()
}

/// Everything that an entry gave.
fn apply(machine: &mut Machine, at: Position, batch: &Batch) -> String {
    let mut out = Applied::default();
    machine.apply(at, batch.clone(), &mut out).unwrap();
    let changes: Vec<_> = out.changes.iter().map(|c| (c.record.as_bytes().to_vec(), c.before.clone())).collect();
    format!("{changes:?} {:?} {:?}", out.replies, out.sessions)
}
