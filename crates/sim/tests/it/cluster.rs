//! Can the oracles of whole clusters fail? Each deliberate bug must be caught by some seed, and by the oracle that is meant to.

use std::ops::Range;
use std::panic::catch_unwind;
use tenure_replica::Sabotage;
use tenure_sim::cluster::{Bug, NativeBug, Options, run};
use tenure_sim::disk::Lie;

/// The first complaint among some seeds about a cluster that has this bug must say one of these words.
fn caught(bug: Bug, seeds: Range<u64>, words: &[&str]) {
    let options = Options { bug: Some(bug), ..Options::default() };
    let complaint = seeds.clone().find_map(|seed| {
        // A member that panics on what the bug did to it has noticed as well.
        let result = catch_unwind(|| run(seed, options));
        let why = result.map(Result::err).unwrap_or_else(|panic| panic.downcast_ref::<String>().cloned());
        why.map(|why| (seed, why))
    });
    let (seed, why) = complaint.unwrap_or_else(|| panic!("{bug:?} is not noticed in {seeds:?}"));
    // How much of the range is left in reserve; seen with `--nocapture`.
    println!("{bug:?}: seed {seed} of {seeds:?}");
    assert!(words.iter().any(|w| why.contains(w)), "{bug:?}: {why}");
}

fn inside(sabotage: Sabotage, seeds: Range<u64>, words: &[&str]) {
    caught(Bug::Inside(sabotage), seeds, words);
}

#[test]
fn an_acknowledgement_before_the_sync() {
    inside(
        Sabotage::AckBeforeSync,
        0..60,
        &["older than what the member has acknowledged", "gave", "changed", "is led by", "instead of"],
    );
}

#[test]
fn a_word_before_term_and_vote_are_synced() {
    inside(
        Sabotage::SendBeforeSync,
        0..60,
        &["older than what the member has acknowledged", "gave", "is led by", "instead of"],
    );
}

#[test]
fn a_vote_that_is_forgotten() {
    inside(Sabotage::ForgetVote, 0..60, &["is led by", "term should be set"]);
}

#[test]
fn a_read_without_a_read_index() {
    inside(Sabotage::SkipReadIndex, 0..120, &["a read at"]);
}

#[test]
fn a_read_at_any_door() {
    caught(Bug::SkipReadIndex, 0..60, &["a read at"]);
}

#[test]
fn a_renewal_answered_at_once() {
    caught(Bug::RenewAtOnce, 0..60, &["was owed until", "was accepted"]);
}

#[test]
fn a_folder_that_comes_back_refilled() {
    inside(
        Sabotage::ForgetStorage,
        0..200,
        &["out of range", "gave", "instead of", "is led by", "on a folder that is not its own"],
    );
}

#[test]
fn a_local_flag_in_apply() {
    inside(Sabotage::LocalFlagInApply, 0..20, &["gave"]);
}

#[test]
fn an_entry_that_is_applied_twice() {
    // What comes between the two may be seen first: a compare that fails at the second time, or a register that jumps back. One that took
    // a snapshot has done it once.
    inside(
        Sabotage::ApplyTwice,
        0..20,
        &["and again at", "was refused and is done at", "no order explains", "gave", "was acknowledged at"],
    );
}

#[test]
fn a_grant_to_a_dead_session() {
    caught(Bug::GrantToDead, 0..120, &["which had ended at"]);
}

#[test]
fn a_forward_that_is_repeated() {
    // A deletion names no call in what it leaves: that it came twice shows in what the register held, or in a compare that failed.
    caught(Bug::RepeatForward, 0..60, &["and again at", "was refused and is done at", "no order explains"]);
}

#[test]
fn a_second_holder() {
    caught(Bug::SecondHolder, 0..20, &["went to call"]);
}

#[test]
fn another_answer_to_a_retry() {
    caught(Bug::WrongReplay, 0..60, &["was acknowledged at", "was answered", "had been told"]);
}

#[test]
fn a_number_for_each_try() {
    // What comes between the two may be seen first, as with a forward that is repeated.
    caught(
        Bug::NumberTries,
        0..60,
        &["and again at", "was refused and is done at", "did nothing and is done", "no order explains", "ran again"],
    );
}

#[test]
fn open_numbers_that_are_taken_for_answered() {
    caught(Bug::AcknowledgeBelow, 0..60, &["is taken for answered"]);
}

#[test]
fn a_clock_that_runs_fast() {
    caught(Bug::FastClock, 0..60, &["was owed until"]);
}

#[test]
fn logs_that_are_cut() {
    caught(Bug::CutLogs, 0..60, &["older than what", "gave", "instead of", "is refused"]);
}

#[test]
fn disks_that_do_not_sync() {
    caught(Bug::Disk(Lie::Sync), 0..60, &["is refused", "gave", "older than what"]);
}

fn native(bug: NativeBug, words: &[&str]) {
    caught(Bug::Native(bug), 0..300, words);
}

#[test]
fn a_door_that_knows_a_newer_token_of_a_lock() {
    native(NativeBug::NewestToken, &["a guarded write of lock"]);
}

#[test]
fn a_door_that_knows_a_newer_leader() {
    native(NativeBug::NewestLeader, &["a proclamation of election"]);
}

#[test]
fn a_door_that_knows_a_newer_instance() {
    native(NativeBug::NewestInstance, &["a word about an instance of instance"]);
}

#[test]
fn permits_without_places() {
    native(
        NativeBug::SlotsByCount,
        &["of lock permits went to", "which nobody had ended", "a guarded write of lock permits"],
    );
}

#[test]
fn a_reader_beside_a_writer() {
    native(NativeBug::ReaderBeside, &["of lock rw went to", "which nobody had ended", "a guarded write of lock rw"]);
}

#[test]
fn a_publication_on_whatever_there_is() {
    native(NativeBug::PublishAnyway, &["and expected version"]);
}

#[test]
fn a_lead_that_goes_to_somebody_else() {
    native(NativeBug::ResignToAnybody, &["was to lead under"]);
}

#[test]
fn markers_that_a_jump_of_the_clock_clears_away() {
    native(NativeBug::SweepByWall, &["was put by", "before its retention is over"]);
}

#[test]
fn a_late_result_that_is_refused() {
    native(NativeBug::RefuseResults, &["was refused, and nothing had replaced it"]);
}

#[test]
fn a_confirmed_part_that_is_cancelled() {
    native(NativeBug::CancelConfirmed, &["became"]);
}

#[test]
fn results_and_markers_that_go_early() {
    native(NativeBug::ShortRetention, &["before its retention is over"]);
}

#[test]
fn answers_that_are_forgotten_early() {
    caught(Bug::ForgetAnswers, 0..300, &["ran again"]);
}

#[test]
fn ticks_that_are_taken_from_the_clock() {
    native(NativeBug::TickByClock, &["was taken at"]);
}

#[test]
fn a_tick_that_ends_a_pause() {
    native(NativeBug::ResumeByTick, &["and it was paused at"]);
}

#[test]
fn jobs_of_a_schedule_beside_each_other() {
    native(NativeBug::Overlap, &["beside job"]);
}

#[test]
fn duties_that_nobody_takes_over() {
    native(NativeBug::OneRunner, &["is not done"]);
}

#[test]
fn a_report_of_whoever_led_before() {
    native(NativeBug::NewestTerm, &["and the log had come to term"]);
}

#[test]
fn a_content_that_breaks_its_schema() {
    native(NativeBug::SkipSchema, &["breaks the schema"]);
}

#[test]
fn a_candidate_for_everybody() {
    native(NativeBug::StageAll, &["after Stage"]);
}

#[test]
fn one_permit_more() {
    native(NativeBug::OneMore, &["the permits were told to have changed"]);
}

#[test]
fn honest_runs_pass_and_are_the_same_twice() {
    for seed in 0..10 {
        let first = run(seed, Options::default()).unwrap();
        assert_eq!(first.hash, run(seed, Options::default()).unwrap().hash, "seed {seed}");
    }
}
