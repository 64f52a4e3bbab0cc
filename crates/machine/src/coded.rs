//! Encodings by declaration: a structure is written as its fields in order, an enum as a number and what it holds.
//!
//! Promises. D1: a type declared here has one encoding, by the rules of `codec.rs` (E2, E3). D2: numbers of variants stand in the declaration and
//! never change; a field can only be added by a new variant or a new format of what holds it.
//! Not promised. A format version: whoever stores a value puts one in front of it.

use crate::codec::{DecodeError, Reader, Write};
use crate::types::*;
use std::sync::Arc;

/// What has a written form.
pub(crate) trait Coded: Sized {
    fn write(&self, b: &mut Vec<u8>);
    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError>;
}

/// A structure whose written form is that of its fields, in their order.
macro_rules! coded_struct {
    ($(#[$meta:meta])* $vis:vis struct $name:ident as $what:literal { $($(#[$field_meta:meta])* $field_vis:vis $field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        $vis struct $name { $($(#[$field_meta])* $field_vis $field: $kind,)* }

        impl $crate::coded::Coded for $name {
            fn write(&self, b: &mut Vec<u8>) {
                $($crate::coded::Coded::write(&self.$field, b);)*
            }

            fn read(r: &mut $crate::codec::Reader<'_>, _: &'static str) -> Result<Self, $crate::codec::DecodeError> {
                Ok(Self { $($field: $crate::coded::Coded::read(r, $what)?,)* })
            }
        }
    };
}

/// An enum whose written form is the number of the variant and what it holds.
macro_rules! coded_enum {
    ($(#[$meta:meta])* $vis:vis enum $name:ident as $what:literal { $($(#[$variant_meta:meta])* $variant:ident $(($kind:ty))? = $number:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        $vis enum $name { $($(#[$variant_meta])* $variant $(($kind))?,)* }

        impl $crate::coded::Coded for $name {
            fn write(&self, b: &mut Vec<u8>) {
                match self {
                    $(Self::$variant $(($crate::coded::bound!(held, $kind)))? => {
                        b.push($number);
                        $(<$kind as $crate::coded::Coded>::write(held, b);)?
                    })*
                }
            }

            fn read(r: &mut $crate::codec::Reader<'_>, _: &'static str) -> Result<Self, $crate::codec::DecodeError> {
                match r.byte($what)? {
                    $($number => Ok(Self::$variant $((<$kind as $crate::coded::Coded>::read(r, $what)?))?),)*
                    number => Err($crate::codec::DecodeError::UnknownNumber { what: $what, number: u64::from(number) }),
                }
            }
        }
    };
}

/// A name, once for each kind that a variant holds.
macro_rules! bound {
    ($name:ident, $kind:ty) => {
        $name
    };
}

pub(crate) use {bound, coded_enum, coded_struct};

impl Coded for bool {
    fn write(&self, b: &mut Vec<u8>) {
        b.flag(*self);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.flag(what)
    }
}

impl Coded for u64 {
    fn write(&self, b: &mut Vec<u8>) {
        b.varint(*self);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.varint(what)
    }
}

impl Coded for u32 {
    fn write(&self, b: &mut Vec<u8>) {
        b.varint(u64::from(*self));
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.u32(what)
    }
}

impl Coded for u8 {
    fn write(&self, b: &mut Vec<u8>) {
        b.push(*self);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.byte(what)
    }
}

impl Coded for i64 {
    fn write(&self, b: &mut Vec<u8>) {
        b.signed(*self);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.signed(what)
    }
}

impl Coded for i32 {
    fn write(&self, b: &mut Vec<u8>) {
        b.signed(i64::from(*self));
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        i32::try_from(r.signed(what)?).map_err(|_| DecodeError::Malformed { what })
    }
}

/// Numbers that are a type of their own.
macro_rules! coded_numbers {
    ($($name:ident)*) => {
        $(impl Coded for $name {
            fn write(&self, b: &mut Vec<u8>) {
                b.varint(u64::from(self.0));
            }

            fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
                r.varint(what)?.try_into().map(Self).map_err(|_| DecodeError::Malformed { what })
            }
        })*
    };
}

coded_numbers!(Revision Index LogTime SessionId MemberId NamespaceId);

impl Coded for Box<[u8]> {
    fn write(&self, b: &mut Vec<u8>) {
        b.bytes(self);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.boxed(what)
    }
}

impl Coded for Arc<[u8]> {
    fn write(&self, b: &mut Vec<u8>) {
        b.bytes(self);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        Ok(r.bytes(what)?.into())
    }
}

impl Coded for Box<str> {
    fn write(&self, b: &mut Vec<u8>) {
        b.bytes(self.as_bytes());
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.text(what)
    }
}

impl<const N: usize> Coded for [u8; N] {
    fn write(&self, b: &mut Vec<u8>) {
        b.extend_from_slice(self);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.array(what)
    }
}

impl<T: Coded> Coded for Box<T> {
    fn write(&self, b: &mut Vec<u8>) {
        (**self).write(b);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        T::read(r, what).map(Self::new)
    }
}

impl<T: Coded> Coded for Arc<T> {
    fn write(&self, b: &mut Vec<u8>) {
        (**self).write(b);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        T::read(r, what).map(Self::new)
    }
}

impl<T: Coded> Coded for Option<T> {
    fn write(&self, b: &mut Vec<u8>) {
        b.option(self.as_ref(), |b, held| held.write(b));
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.option(what, |r| T::read(r, what))
    }
}

impl<T: Coded> Coded for Vec<T> {
    fn write(&self, b: &mut Vec<u8>) {
        b.list(self, |b, item| item.write(b));
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        r.list(what, |r| T::read(r, what))
    }
}

impl<A: Coded, B: Coded> Coded for (A, B) {
    fn write(&self, b: &mut Vec<u8>) {
        self.0.write(b);
        self.1.write(b);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        Ok((A::read(r, what)?, B::read(r, what)?))
    }
}

impl Coded for crate::command::RequestId {
    fn write(&self, b: &mut Vec<u8>) {
        crate::codec::write_request(b, Some(self));
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        crate::codec::read_request(r)?.ok_or(DecodeError::Malformed { what })
    }
}

impl Coded for crate::record::Record {
    fn write(&self, b: &mut Vec<u8>) {
        crate::codec::write_record(b, self);
    }

    fn read(r: &mut Reader<'_>, _: &'static str) -> Result<Self, DecodeError> {
        crate::codec::read_record(r)
    }
}

impl Coded for crate::command::Ticket {
    fn write(&self, b: &mut Vec<u8>) {
        self.member.write(b);
        b.extend_from_slice(&self.boot.to_le_bytes());
        b.varint(self.number);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        Ok(Self { member: MemberId::read(r, what)?, boot: r.u64_fixed(what)?, number: r.varint(what)? })
    }
}

impl Coded for crate::reply::Holder {
    fn write(&self, b: &mut Vec<u8>) {
        crate::codec::write_holder(b, self);
    }

    fn read(r: &mut Reader<'_>, _: &'static str) -> Result<Self, DecodeError> {
        crate::codec::read_holder(r)
    }
}

impl Coded for crate::command::SessionCreate {
    fn write(&self, b: &mut Vec<u8>) {
        crate::codec::write_session_create(b, self);
    }

    fn read(r: &mut Reader<'_>, _: &'static str) -> Result<Self, DecodeError> {
        crate::codec::read_session_create(r)
    }
}

impl Coded for crate::command::Wait {
    fn write(&self, b: &mut Vec<u8>) {
        match self {
            Self::None => b.push(0),
            Self::Ms(ms) => {
                b.push(1);
                b.varint(*ms);
            }
            Self::Forever => b.push(2),
        }
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        match r.byte(what)? {
            0 => Ok(Self::None),
            1 => r.varint(what).map(Self::Ms),
            2 => Ok(Self::Forever),
            number => Err(DecodeError::UnknownNumber { what, number: u64::from(number) }),
        }
    }
}

impl<T: Coded> Coded for std::collections::VecDeque<T> {
    fn write(&self, b: &mut Vec<u8>) {
        b.varint(self.len() as u64);
        self.iter().for_each(|item| item.write(b));
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        Vec::read(r, what).map(Self::from)
    }
}

/// All the bytes of a value.
pub(crate) fn encoded(value: &impl Coded) -> Vec<u8> {
    let mut b = Vec::new();
    value.write(&mut b);
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    coded_struct! {
        struct Pair as "a pair" {
            number: u64,
            text: Box<str>,
        }
    }

    coded_enum! {
        enum Choice as "a choice" {
            Nothing = 0,
            Pair(Pair) = 7,
        }
    }

    #[test]
    fn a_value_comes_back_and_an_unknown_number_is_refused() {
        let value = vec![Choice::Nothing, Choice::Pair(Pair { number: 300, text: "x".into() })];
        let bytes = encoded(&value);
        assert_eq!(bytes, [2, 0, 7, 0xac, 2, 1, b'x']);
        assert_eq!(Vec::<Choice>::read(&mut Reader::new(&bytes), "choices"), Ok(value));
        let unknown = Choice::read(&mut Reader::new(&[9]), "a choice");
        assert_eq!(unknown, Err(DecodeError::UnknownNumber { what: "a choice", number: 9 }));
    }
}
