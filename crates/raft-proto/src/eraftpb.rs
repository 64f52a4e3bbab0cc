//! The nine structs and four enums, with the accessors that `raft` calls.
//!
//! The order of the fields and the numbers of the enums are the encoding: they never change, and a new field needs a new version.

use crate::wire::{self, Field};
use bytes::Bytes;
use protobuf::{Message as Encoded, ProtobufError};

/// An enum with stored numbers.
macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $number:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub enum $name {
            #[default]
            $($variant = $number),+
        }

        impl Field for $name {
            fn size(&self) -> usize {
                (*self as u64).size()
            }

            fn put(&self, out: &mut Vec<u8>) {
                (*self as u64).put(out);
            }

            fn take(from: &mut &[u8]) -> Result<Self, ProtobufError> {
                match u64::take(from)? {
                    $($number => Ok(Self::$variant),)+
                    number => Err(ProtobufError::UnknownEnum { what: stringify!($name), number }),
                }
            }
        }
    };
}

/// A getter and a setter: numbers are given by value, the rest by reference and with `mut_` and `take_` too.
macro_rules! accessors {
    (copy $name:ident: $type:ty, $get:ident $set:ident) => {
        pub fn $get(&self) -> $type {
            self.$name
        }

        pub fn $set(&mut self, value: $type) {
            self.$name = value;
        }
    };
    (own $name:ident: $type:ty, $get:ident $set:ident $borrow:ident $take:ident) => {
        pub fn $get(&self) -> &$type {
            &self.$name
        }

        pub fn $set(&mut self, value: $type) {
            self.$name = value;
        }

        pub fn $borrow(&mut self) -> &mut $type {
            &mut self.$name
        }

        pub fn $take(&mut self) -> $type {
            std::mem::take(&mut self.$name)
        }
    };
}

/// A struct, its accessors, its place inside others and its encoding on its own.
macro_rules! message {
    ($(#[$doc:meta])* $name:ident { $($kind:ident $field:ident: $type:ty, $($accessor:ident)+;)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name {
            $(pub $field: $type),+
        }

        impl $name {
            $(accessors!($kind $field: $type, $($accessor)+);)+
        }

        impl Field for $name {
            fn size(&self) -> usize {
                0 $(+ self.$field.size())+
            }

            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)+
            }

            fn take(from: &mut &[u8]) -> Result<Self, ProtobufError> {
                Ok(Self { $($field: Field::take(from)?),+ })
            }
        }

        impl Encoded for $name {
            fn compute_size(&self) -> u32 {
                u32::try_from(1 + self.size()).unwrap_or(u32::MAX)
            }

            fn write_to_bytes(&self) -> Result<Vec<u8>, ProtobufError> {
                Ok(wire::write(self))
            }

            fn merge_from_bytes(&mut self, bytes: &[u8]) -> Result<(), ProtobufError> {
                *self = wire::read(bytes)?;
                Ok(())
            }
        }
    };
}

numbered!(EntryType { EntryNormal = 0, EntryConfChange = 1, EntryConfChangeV2 = 2 });

numbered!(MessageType {
    MsgHup = 0,
    MsgBeat = 1,
    MsgPropose = 2,
    MsgAppend = 3,
    MsgAppendResponse = 4,
    MsgRequestVote = 5,
    MsgRequestVoteResponse = 6,
    MsgSnapshot = 7,
    MsgHeartbeat = 8,
    MsgHeartbeatResponse = 9,
    MsgUnreachable = 10,
    MsgSnapStatus = 11,
    MsgCheckQuorum = 12,
    MsgTransferLeader = 13,
    MsgTimeoutNow = 14,
    MsgReadIndex = 15,
    MsgReadIndexResp = 16,
    MsgRequestPreVote = 17,
    MsgRequestPreVoteResponse = 18,
});

numbered!(ConfChangeType { AddNode = 0, RemoveNode = 1, AddLearnerNode = 2 });

numbered!(
    /// How a joint configuration is entered, if at all, and left.
    ConfChangeTransition { Auto = 0, Implicit = 1, Explicit = 2 }
);

message!(Entry {
    copy entry_type: EntryType, get_entry_type set_entry_type;
    copy term: u64, get_term set_term;
    copy index: u64, get_index set_index;
    own data: Bytes, get_data set_data mut_data take_data;
    own context: Bytes, get_context set_context mut_context take_context;
});

message!(ConfState {
    own voters: Vec<u64>, get_voters set_voters mut_voters take_voters;
    own learners: Vec<u64>, get_learners set_learners mut_learners take_learners;
    own voters_outgoing: Vec<u64>, get_voters_outgoing set_voters_outgoing mut_voters_outgoing take_voters_outgoing;
    own learners_next: Vec<u64>, get_learners_next set_learners_next mut_learners_next take_learners_next;
    copy auto_leave: bool, get_auto_leave set_auto_leave;
});

message!(SnapshotMetadata {
    own conf_state: ConfState, get_conf_state set_conf_state mut_conf_state take_conf_state;
    copy index: u64, get_index set_index;
    copy term: u64, get_term set_term;
});

message!(Snapshot {
    own data: Bytes, get_data set_data mut_data take_data;
    own metadata: SnapshotMetadata, get_metadata set_metadata mut_metadata take_metadata;
});

impl Snapshot {
    /// A snapshot that covers no entry stands for "none".
    pub fn is_empty(&self) -> bool {
        self.metadata.index == 0
    }
}

message!(HardState {
    copy term: u64, get_term set_term;
    copy vote: u64, get_vote set_vote;
    copy commit: u64, get_commit set_commit;
});

message!(Message {
    copy msg_type: MessageType, get_msg_type set_msg_type;
    copy to: u64, get_to set_to;
    copy from: u64, get_from set_from;
    copy term: u64, get_term set_term;
    copy log_term: u64, get_log_term set_log_term;
    copy index: u64, get_index set_index;
    own entries: Vec<Entry>, get_entries set_entries mut_entries take_entries;
    copy commit: u64, get_commit set_commit;
    copy commit_term: u64, get_commit_term set_commit_term;
    own snapshot: Snapshot, get_snapshot set_snapshot mut_snapshot take_snapshot;
    copy request_snapshot: u64, get_request_snapshot set_request_snapshot;
    copy reject: bool, get_reject set_reject;
    copy reject_hint: u64, get_reject_hint set_reject_hint;
    own context: Bytes, get_context set_context mut_context take_context;
    copy deprecated_priority: u64, get_deprecated_priority set_deprecated_priority;
    copy priority: i64, get_priority set_priority;
});

message!(ConfChangeSingle {
    copy change_type: ConfChangeType, get_change_type set_change_type;
    copy node_id: u64, get_node_id set_node_id;
});

message!(
    /// The older form, of one change.
    ConfChange {
        copy change_type: ConfChangeType, get_change_type set_change_type;
        copy node_id: u64, get_node_id set_node_id;
        own context: Bytes, get_context set_context mut_context take_context;
        copy id: u64, get_id set_id;
    }
);

message!(ConfChangeV2 {
    copy transition: ConfChangeTransition, get_transition set_transition;
    own changes: Vec<ConfChangeSingle>, get_changes set_changes mut_changes take_changes;
    own context: Bytes, get_context set_context mut_context take_context;
});

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            entry_type: EntryType::EntryConfChangeV2,
            term: 3,
            index: 300,
            data: Bytes::from_static(b"data"),
            context: Bytes::from_static(b"\xff"),
        }
    }

    fn conf_state() -> ConfState {
        ConfState {
            voters: vec![1, 2],
            learners: vec![3],
            voters_outgoing: vec![4],
            learners_next: vec![5],
            auto_leave: true,
        }
    }

    fn message() -> Message {
        Message {
            msg_type: MessageType::MsgAppend,
            to: 1,
            from: 2,
            term: 3,
            log_term: 4,
            index: 5,
            entries: vec![entry(), Entry::default()],
            commit: 6,
            commit_term: 7,
            snapshot: Snapshot {
                data: Bytes::from_static(b"s"),
                metadata: SnapshotMetadata { conf_state: conf_state(), index: 8, term: 9 },
            },
            request_snapshot: 10,
            reject: true,
            reject_hint: 11,
            context: Bytes::from_static(b"c"),
            deprecated_priority: 12,
            priority: -1,
        }
    }

    /// The bytes are what they were, they come back as the value, and no shorter piece is taken for one.
    fn check<T: Encoded + Default + PartialEq + std::fmt::Debug>(value: &T, golden: &str) {
        let bytes = value.write_to_bytes().unwrap();
        assert_eq!(bytes.iter().map(|b| format!("{b:02x}")).collect::<String>(), golden);
        assert_eq!(value.compute_size() as usize, bytes.len());
        let mut back = T::default();
        back.merge_from_bytes(&bytes).unwrap();
        assert_eq!(&back, value);
        for cut in 1..bytes.len() {
            assert_eq!(T::default().merge_from_bytes(&bytes[..cut]), Err(ProtobufError::Truncated), "cut at {cut}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(T::default().merge_from_bytes(&longer), Err(ProtobufError::TrailingBytes));
    }

    #[test]
    fn golden_bytes_and_round_trips() {
        check(&entry(), "010203ac02046461746101ff");
        check(&conf_state(), "0102010201030104010501");
        check(&HardState { term: 1, vote: 2, commit: u64::MAX }, "010102ffffffffffffffffff01");
        check(&message(), "010301020304050202 03ac02046461746101ff 0000000000 0607 0173 02010201030104010501 0809 0a 01 0b 0163 0c ffffffffffffffffff01".replace(' ', "").as_str());
        let single = ConfChangeSingle { change_type: ConfChangeType::AddLearnerNode, node_id: 9 };
        check(&single, "010209");
        check(
            &ConfChange {
                change_type: ConfChangeType::RemoveNode,
                node_id: 9,
                context: Bytes::from_static(b"x"),
                id: 7,
            },
            "010109017807",
        );
        let v2 =
            ConfChangeV2 { transition: ConfChangeTransition::Explicit, changes: vec![single], context: Bytes::new() };
        check(&v2, "010201020900");
    }

    #[test]
    fn strange_bytes_are_refused() {
        let mut entry = Entry::default();
        assert_eq!(entry.merge_from_bytes(&[2]), Err(ProtobufError::UnknownVersion(2)));
        assert_eq!(entry.merge_from_bytes(&[1, 3]), Err(ProtobufError::UnknownEnum { what: "EntryType", number: 3 }));
        // A length far above what follows reserves nothing.
        assert_eq!(entry.merge_from_bytes(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f]), Err(ProtobufError::Truncated));
        assert_eq!(
            entry.merge_from_bytes(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]),
            Err(ProtobufError::NumberTooLarge)
        );
        let mut leave = ConfChangeV2::default();
        leave.merge_from_bytes(&[]).unwrap();
        assert!(leave.leave_joint());
    }
}
