//! Frames between members: the bytes of a connection, and nothing of their meaning. `docs/formats.md` describes them.
//!
//! Promises. Any bytes are read without panic; a frame is given out whole and as it was sent, or the connection is in error.
//! A frame longer than the limit is refused when its length is read, before any room is made for it.

use bytes::{Buf as _, Bytes, BytesMut};
use tenure_replica::Lane;

/// Bytes before the body: length of the body, checksum, kind.
pub(super) const HEADER_LEN: usize = 9;
/// The largest request is 64 MiB; what carries it is a little longer.
pub(super) const BODY_MAX: usize = 66 << 20;
/// Before a hello is judged nobody is trusted with more memory than this.
pub(super) const HELLO_MAX: usize = 4 << 10;

/// The first byte of a preamble. A TLS connection begins with `TLS_FIRST`, so the two can be told apart.
pub(super) const PLAIN_FIRST: u8 = b'T';
pub(super) const TLS_FIRST: u8 = 0x16;
pub(super) const PREAMBLE_LEN: usize = 8;
const MAGIC: [u8; 4] = *b"TNRP";
pub(super) const TRANSPORT_VERSION: u16 = 1;

/// Numbers never change.
pub(super) mod kind {
    /// The dialler's hello.
    pub(crate) const HELLO: u8 = 1;
    /// The acceptor's hello, and with it the word that the dialler is taken.
    pub(crate) const WELCOME: u8 = 2;
    /// Why the connection ends. Its layout is the same in every version of the transport.
    pub(crate) const REFUSED: u8 = 3;
    /// A message of the member.
    pub(crate) const MESSAGE: u8 = 4;
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("what arrived does not begin like a member of Tenure")]
    Magic,
    #[error("it speaks version {0} of the transport, and this one speaks version {TRANSPORT_VERSION}")]
    Version(u16),
    #[error("there is no lane {0}")]
    Lane(u8),
    #[error("a frame of {len} bytes is longer than the {max} that may be sent here")]
    TooLong { len: usize, max: usize },
    #[error("a frame arrived damaged: its checksum is wrong")]
    Checksum,
}

pub(super) fn preamble(lane: Lane) -> [u8; PREAMBLE_LEN] {
    let [a, b, c, d] = MAGIC;
    let [low, high] = TRANSPORT_VERSION.to_le_bytes();
    [a, b, c, d, low, high, lane_number(lane), 0]
}

pub(super) fn read_preamble(bytes: [u8; PREAMBLE_LEN]) -> Result<Lane, FrameError> {
    let [a, b, c, d, low, high, lane, _] = bytes;
    if [a, b, c, d] != MAGIC {
        return Err(FrameError::Magic);
    }
    let version = u16::from_le_bytes([low, high]);
    if version != TRANSPORT_VERSION {
        return Err(FrameError::Version(version));
    }
    [Lane::Messages, Lane::Bulk].into_iter().find(|known| lane_number(*known) == lane).ok_or(FrameError::Lane(lane))
}

fn lane_number(lane: Lane) -> u8 {
    match lane {
        Lane::Messages => 0,
        Lane::Bulk => 1,
    }
}

pub(super) fn header(kind: u8, body: &[u8]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    // Queues take no body above `BODY_MAX`.
    header[..4].copy_from_slice(&(body.len() as u32).to_le_bytes());
    header[4..8].copy_from_slice(&checksum(kind, body).to_le_bytes());
    header[8] = kind;
    header
}

pub(super) fn put(out: &mut Vec<u8>, kind: u8, body: &[u8]) {
    out.extend_from_slice(&header(kind, body));
    out.extend_from_slice(body);
}

fn checksum(kind: u8, body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&[kind]), body)
}

/// Takes the first frame of `buffer`, if all of it is there.
pub(super) fn take(buffer: &mut BytesMut, max: usize) -> Result<Option<(u8, Bytes)>, FrameError> {
    let Some((len, _)) = buffer.split_first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_le_bytes(*len) as usize;
    if len > max {
        return Err(FrameError::TooLong { len, max });
    }
    let total = HEADER_LEN + len;
    if buffer.len() < total {
        // Doubling: whoever only says that much comes gets no room for it.
        let missing = total - buffer.len();
        buffer.reserve(missing.min(buffer.len().max(READ_LEN)));
        return Ok(None);
    }
    let mut frame = buffer.split_to(total).freeze();
    frame.advance(4);
    let claimed = frame.get_u32_le();
    let kind = frame.get_u8();
    if checksum(kind, &frame) != claimed {
        return Err(FrameError::Checksum);
    }
    Ok(Some((kind, frame)))
}

/// Room that is made for reading, and the least that a read is given.
pub(super) const READ_LEN: usize = 64 << 10;
pub(super) const READ_LEN_MIN: usize = 8 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_frame() {
        let mut bytes = preamble(Lane::Bulk).to_vec();
        put(&mut bytes, kind::MESSAGE, b"abc");
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "544e52500100010003000000f9e66a6504616263");
    }

    #[test]
    fn a_preamble_is_read_or_refused() {
        assert_eq!(read_preamble(preamble(Lane::Messages)), Ok(Lane::Messages));
        assert_eq!(read_preamble(preamble(Lane::Bulk)), Ok(Lane::Bulk));
        assert_eq!(read_preamble(*b"GET / HT"), Err(FrameError::Magic));
        assert_eq!(read_preamble(*b"TNRP\x02\0\0\0"), Err(FrameError::Version(2)));
        assert_eq!(read_preamble(*b"TNRP\x01\0\x09\0"), Err(FrameError::Lane(9)));
    }

    #[test]
    fn frames_are_read_however_they_are_cut() {
        let mut bytes = Vec::new();
        for body in [&b""[..], b"a", &[7; 300]] {
            put(&mut bytes, kind::MESSAGE, body);
        }
        for step in [1, 2, 9, 10, 100, 1000] {
            let (mut buffer, mut found) = (BytesMut::new(), Vec::new());
            for piece in bytes.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Some((kind, body)) = take(&mut buffer, BODY_MAX).unwrap() {
                    assert_eq!(kind, kind::MESSAGE);
                    found.push(body.len());
                }
            }
            assert_eq!((found, buffer.len()), (vec![0, 1, 300], 0), "in steps of {step}");
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed_and_a_long_frame_refused() {
        let mut good = Vec::new();
        put(&mut good, kind::MESSAGE, b"abc");
        for bit in 32..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(take(&mut BytesMut::from(&bad[..]), BODY_MAX), Err(FrameError::Checksum), "bit {bit}");
        }
        let long = FrameError::TooLong { len: 3, max: 2 };
        assert_eq!(take(&mut BytesMut::from(&good[..4]), 2), Err(long));
    }
}
