//! The join token: one line of text that tells a new member everything it must know to come.
//!
//! Promises. J1: what was encoded is decoded equally, by later releases too. J2: a token that was cut, mistyped or is something else
//! is refused with a sentence; it is never taken for another one. J3: it is one word of letters, digits, `-` and `_`.
//! Not promised. Secrecy: whoever holds it can become that member, once. Only the digest of its secret is kept by the cluster.
//!
//! `tenure1-`, and base64 (URL-safe, no padding) of a protobuf message behind the CRC-32C of it, little endian.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use prost::Message as _;
use tenure_machine::MemberId;
use tenure_replica::Join;

/// Names the format and its version.
const PREFIX: &str = "tenure1-";
/// Of a longer one somebody pasted something else.
const TEXT_MAX: usize = 64 << 10;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct JoinToken {
    pub(crate) cluster_token: String,
    pub(crate) member: MemberId,
    pub(crate) name: String,
    /// Where the others were told to find it.
    pub(crate) peer: String,
    /// Of the cluster; zero before it has one.
    pub(crate) cluster: u64,
    pub(crate) secret: [u8; 16],
    /// The members that there were: id, name, address.
    pub(crate) others: Vec<(MemberId, String, String)>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Wire {
    #[prost(string, tag = "1")]
    cluster_token: String,
    #[prost(uint64, tag = "2")]
    cluster: u64,
    #[prost(uint64, tag = "3")]
    member: u64,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "5")]
    peer: String,
    #[prost(bytes = "vec", tag = "6")]
    secret: Vec<u8>,
    #[prost(message, repeated, tag = "7")]
    others: Vec<Other>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Other {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, tag = "3")]
    peer: String,
}

impl JoinToken {
    pub(crate) fn encode(&self) -> String {
        let other =
            |(id, name, peer): &(MemberId, String, String)| Other { id: id.0, name: name.clone(), peer: peer.clone() };
        let wire = Wire {
            cluster_token: self.cluster_token.clone(),
            cluster: self.cluster,
            member: self.member.0,
            name: self.name.clone(),
            peer: self.peer.clone(),
            secret: self.secret.to_vec(),
            others: self.others.iter().map(other).collect(),
        };
        let message = wire.encode_to_vec();
        let mut bytes = crc32c::crc32c(&message).to_le_bytes().to_vec();
        bytes.extend_from_slice(&message);
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The token, or a sentence for whoever gave it.
    pub(crate) fn decode(text: &str) -> Result<Self, String> {
        let damaged = || "the join token is damaged: copy it again, the whole line and nothing else".to_owned();
        let text = text.trim();
        let Some(rest) = text.strip_prefix(PREFIX).filter(|_| text.len() <= TEXT_MAX) else {
            let is_later = text
                .strip_prefix("tenure")
                .and_then(|rest| rest.split_once('-'))
                .is_some_and(|(version, _)| version.bytes().all(|b| b.is_ascii_digit()) && !version.is_empty());
            return Err(if is_later {
                "the join token was made by another release: run the release of the members that are there".to_owned()
            } else {
                format!("this is no join token: those of `tenure member add` begin with `{PREFIX}`")
            });
        };
        let bytes = URL_SAFE_NO_PAD.decode(rest).map_err(|_| damaged())?;
        let (sum, message) = bytes.split_first_chunk::<4>().ok_or_else(damaged)?;
        if crc32c::crc32c(message) != u32::from_le_bytes(*sum) {
            return Err(damaged());
        }
        let wire = Wire::decode(message).map_err(|_| damaged())?;
        let secret = <[u8; 16]>::try_from(wire.secret.as_slice()).map_err(|_| damaged())?;
        if wire.member == 0 || wire.name.is_empty() || wire.peer.is_empty() || wire.others.is_empty() {
            return Err(damaged());
        }
        let others = wire.others.into_iter().map(|o| (MemberId(o.id), o.name, o.peer)).collect();
        Ok(Self {
            cluster_token: wire.cluster_token,
            member: MemberId(wire.member),
            name: wire.name,
            peer: wire.peer,
            cluster: wire.cluster,
            secret,
            others,
        })
    }

    /// What a member that joins is told.
    pub(crate) fn join(&self) -> Join {
        Join { cluster: self.cluster, secret: self.secret, peers: self.others.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            cluster_token: "tenure-cluster".to_owned(),
            member: MemberId(u64::MAX >> 1),
            name: "n3".to_owned(),
            peer: "10.0.0.3:2380".to_owned(),
            cluster: 0xfeed,
            secret: [7; 16],
            others: vec![(MemberId(1), "n0".to_owned(), "10.0.0.1:2380".to_owned())],
        }
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        let text = token().encode();
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'), "{text}");
        let read = JoinToken::decode(&format!(" {text}\n")).unwrap();
        assert_eq!(read, token());
        assert_eq!(read.encode(), text);
    }

    /// Tokens are pasted from terminals and kept in files: the format is a promise.
    #[test]
    fn golden() {
        assert_eq!(token().encode(), GOLDEN);
    }

    const GOLDEN: &str = "tenure1-z5hGZQoOdGVudXJlLWNsdXN0ZXIQ7f0DGP__________fyICbjMqDTEwLjAuMC4zOjIzODAyEAcHBwcHBwcHBwcHBwcHBwc6FQgBEgJuMBoNMTAuMC4wLjE6MjM4MA";

    #[test]
    fn every_flipped_cut_or_lengthened_token_is_refused() {
        let text = token().encode();
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let wrong = String::from_utf8(bytes).unwrap();
            assert!(JoinToken::decode(&wrong).is_err(), "{wrong}");
            assert!(JoinToken::decode(&text[..at]).is_err(), "cut at {at}");
        }
        assert!(JoinToken::decode(&format!("{text}A")).is_err());
    }

    #[test]
    fn what_is_wrong_is_told() {
        let check = |text: &str, expected: &str| {
            let why = JoinToken::decode(text).unwrap_err();
            assert!(why.contains(expected), "{why}");
        };
        check("", "no join token");
        check("K10abc::server:x", "no join token");
        check("tenure2-AAAA", "another release");
        check("tenure1-AAAA", "damaged");
    }
}
