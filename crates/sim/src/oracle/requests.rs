//! A request id is answered once and then always the same.

use std::collections::BTreeMap;
use tenure_machine::{OpReply, Rejection, Reply, RequestId, TxnReply};

#[derive(Default)]
pub struct Requests {
    answers: BTreeMap<RequestId, Reply>,
    pub replayed: u64,
}

impl Requests {
    /// What is asked under this id from now on is asked anew.
    pub fn is_over(&mut self, id: RequestId) {
        self.answers.remove(&named(id));
    }

    pub fn answered(&mut self, id: RequestId, reply: &Reply) -> Result<(), String> {
        if is_about_the_table(&reply.result) {
            return Ok(());
        }
        let id = named(id);
        self.replayed += u64::from(reply.replayed);
        let Some(first) = self.answers.get(&id) else {
            self.answers.insert(id, reply.clone());
            return Ok(());
        };
        // Of two who ask at once, the one for whom it ran may be the later to hear of it.
        let is_first = first.replayed && first.revision == reply.revision;
        if !reply.replayed && !is_first {
            return Err(format!("request {id:?} was answered {first:?} and ran again: {reply:?}"));
        }
        if first.revision != reply.revision || !same(&first.result, &reply.result) {
            return Err(format!("request {id:?} was answered {first:?} and then {reply:?}"));
        }
        Ok(())
    }
}

/// What a caller says beside it that it has is no part of a name.
fn named(id: RequestId) -> RequestId {
    let acked_below = 0;
    match id {
        RequestId::Session { session, seq, .. } => RequestId::Session { session, seq, acked_below },
        RequestId::Series { series, seq, .. } => RequestId::Series { series, seq, acked_below },
        RequestId::Uuid(_) => id,
    }
}

/// Answers that say nothing of the request's own outcome: the table is full, or what it knew is gone with the session.
fn is_about_the_table(result: &Result<TxnReply, Rejection>) -> bool {
    match result {
        Err(Rejection::RateLimited { .. } | Rejection::SessionExpired { .. } | Rejection::Mismatch) => true,
        Err(why) => why.leaves_open(),
        Ok(_) => false,
    }
}

fn same(first: &Result<TxnReply, Rejection>, again: &Result<TxnReply, Rejection>) -> bool {
    let body_gone = |r: &Result<TxnReply, Rejection>| matches!(r, Ok(t) if t.results == [OpReply::ResultNotRetained]);
    first == again || (body_gone(again) && first.is_ok())
}
