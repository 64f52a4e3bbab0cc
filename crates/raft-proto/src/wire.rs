//! The encoding: fields in their declared order, nothing between them.
//!
//! Numbers are LEB128, booleans one byte, byte strings and lists their length and then their content, nested values their fields.
//! A value on its own is preceded by the version of this encoding.

use bytes::Bytes;
use protobuf::ProtobufError;

/// The first byte of every encoded value. A changed layout takes the next number and keeps reading this one.
pub(crate) const VERSION: u8 = 1;

/// One field of a value.
pub(crate) trait Field: Sized {
    fn size(&self) -> usize;
    fn put(&self, out: &mut Vec<u8>);
    fn take(from: &mut &[u8]) -> Result<Self, ProtobufError>;
}

pub(crate) fn write<T: Field>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + value.size());
    out.push(VERSION);
    value.put(&mut out);
    out
}

/// No bytes are the default value: `raft` proposes the end of a joint configuration as an entry without data.
pub(crate) fn read<T: Field + Default>(mut bytes: &[u8]) -> Result<T, ProtobufError> {
    let Some((&version, rest)) = bytes.split_first() else {
        return Ok(T::default());
    };
    if version != VERSION {
        return Err(ProtobufError::UnknownVersion(version));
    }
    bytes = rest;
    let value = T::take(&mut bytes)?;
    if bytes.is_empty() { Ok(value) } else { Err(ProtobufError::TrailingBytes) }
}

impl Field for u64 {
    fn size(&self) -> usize {
        // Seven bits a byte, and one byte for zero.
        (64 - (self | 1).leading_zeros() as usize).div_ceil(7)
    }

    fn put(&self, out: &mut Vec<u8>) {
        let mut n = *self;
        while n >= 0x80 {
            out.push(n as u8 | 0x80);
            n >>= 7;
        }
        out.push(n as u8);
    }

    fn take(from: &mut &[u8]) -> Result<Self, ProtobufError> {
        let mut n = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = from.split_first().ok_or(ProtobufError::Truncated)?;
            *from = rest;
            if shift == 63 && byte > 1 {
                return Err(ProtobufError::NumberTooLarge);
            }
            n |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(n);
            }
        }
        Err(ProtobufError::NumberTooLarge)
    }
}

impl Field for i64 {
    fn size(&self) -> usize {
        (*self as u64).size()
    }

    fn put(&self, out: &mut Vec<u8>) {
        (*self as u64).put(out);
    }

    fn take(from: &mut &[u8]) -> Result<Self, ProtobufError> {
        u64::take(from).map(|n| n as i64)
    }
}

impl Field for bool {
    fn size(&self) -> usize {
        1
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn take(from: &mut &[u8]) -> Result<Self, ProtobufError> {
        match u64::take(from)? {
            0 => Ok(false),
            1 => Ok(true),
            number => Err(ProtobufError::UnknownEnum { what: "bool", number }),
        }
    }
}

impl Field for Bytes {
    fn size(&self) -> usize {
        (self.len() as u64).size() + self.len()
    }

    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u64).put(out);
        out.extend_from_slice(self);
    }

    fn take(from: &mut &[u8]) -> Result<Self, ProtobufError> {
        let len = usize::try_from(u64::take(from)?).map_err(|_| ProtobufError::NumberTooLarge)?;
        let (value, rest) = from.split_at_checked(len).ok_or(ProtobufError::Truncated)?;
        *from = rest;
        Ok(Self::copy_from_slice(value))
    }
}

impl<T: Field> Field for Vec<T> {
    fn size(&self) -> usize {
        (self.len() as u64).size() + self.iter().map(Field::size).sum::<usize>()
    }

    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u64).put(out);
        for item in self {
            item.put(out);
        }
    }

    fn take(from: &mut &[u8]) -> Result<Self, ProtobufError> {
        let len = u64::take(from)?;
        // Each item takes at least one byte, so a length above that is a lie and reserves nothing.
        if len > from.len() as u64 {
            return Err(ProtobufError::Truncated);
        }
        (0..len).map(|_| T::take(from)).collect()
    }
}
