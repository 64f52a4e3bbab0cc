//! Can the oracles fail? Each deliberate bug must be caught by some seed, and no honest run may be.
#![allow(clippy::unwrap_used)]

mod cluster;

use tenure_sim::disk::Lie;
use tenure_sim::world::{Bug, Options, run};

/// The first complaint among some seeds about a member that has this bug.
fn caught(bug: Bug) -> String {
    let options = Options { bug: Some(bug), ..Options::default() };
    let complaint = (0..80).find_map(|seed| {
        // A member that panics on what the bug did to its folder has noticed as well.
        std::panic::catch_unwind(|| run(seed, options)).unwrap_or_else(|_| Err("a panic".to_owned())).err()
    });
    complaint.unwrap_or_else(|| panic!("{bug:?} is not noticed"))
}

#[test]
fn a_disk_that_does_not_sync_is_noticed() {
    caught(Bug::Disk(Lie::Sync));
}

#[test]
fn a_disk_that_does_not_sync_names_is_noticed() {
    caught(Bug::Disk(Lie::SyncFolder));
}

#[test]
fn a_lost_sector_is_noticed() {
    caught(Bug::Disk(Lie::LoseSector));
}

#[test]
fn an_answer_before_its_time_is_noticed() {
    caught(Bug::EarlyAnswers);
}

#[test]
fn a_log_that_is_cut_is_noticed() {
    caught(Bug::CutLog);
}

#[test]
fn an_older_folder_is_noticed() {
    caught(Bug::OldFolder);
}

#[test]
fn a_second_holder_is_noticed() {
    let why = caught(Bug::SecondHolder);
    assert!(why.contains("lock") || why.contains("token"), "{why}");
}

#[test]
fn a_clock_that_runs_fast_is_noticed() {
    let why = caught(Bug::FastClock);
    assert!(why.contains("was owed until"), "{why}");
}

#[test]
fn another_answer_to_a_retry_is_noticed() {
    let why = caught(Bug::WrongReplay);
    assert!(why.contains("was answered"), "{why}");
}

#[test]
fn half_a_commit_is_noticed() {
    let why = caught(Bug::HalfCommit);
    assert!(why.contains("not the whole"), "{why}");
}

#[test]
fn honest_runs_pass_and_are_the_same_twice() {
    for seed in 0..10 {
        let first = run(seed, Options::default()).unwrap();
        assert_eq!(first.hash, run(seed, Options::default()).unwrap().hash, "seed {seed}");
    }
}
