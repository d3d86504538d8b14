//! The frame around config, index and snapshot objects: what it is, which version, and a sum over all of it.

use bytes::Bytes;
use mongo_core::{Error, ErrorKind, Result};
use sha2::{Digest as _, Sha256};

use crate::archive::ObjectName;

/// What an object says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Magic(pub(crate) [u8; 4]);

impl Magic {
    pub(crate) const CONFIG: Self = Self(*b"MBCF");
    pub(crate) const INDEX: Self = Self(*b"MBIX");
    pub(crate) const SNAPSHOT: Self = Self(*b"MBSN");
}

/// Puts the frame around a payload.
pub(crate) fn seal(magic: Magic, payload: &[u8]) -> Bytes {
    let mut object = Vec::with_capacity(HEADER + payload.len() + SUM);
    object.extend_from_slice(&magic.0);
    object.extend_from_slice(&VERSION.to_le_bytes());
    object.extend_from_slice(&0_u16.to_le_bytes());
    object.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    object.extend_from_slice(payload);
    let sum = Sha256::digest(&object);
    object.extend_from_slice(&sum);
    object.into()
}

/// Takes the frame off, or says what is wrong with it.
pub(crate) fn open(name: &ObjectName, magic: Magic, object: &Bytes) -> Result<Bytes> {
    let damaged = |what: &'static str| Err(Error::corrupt(what).with_context("object", name));
    let Some((header, rest)) = object.split_at_checked(HEADER) else { return damaged("the object is truncated") };
    if header[..4] != magic.0 {
        return damaged("the object is not what its name says");
    }
    let (version, flags) = (u16::from_le_bytes([header[4], header[5]]), u16::from_le_bytes([header[6], header[7]]));
    let mut length = [0; 8];
    length.copy_from_slice(&header[8..16]);
    let length = u64::from_le_bytes(length);
    if rest.len() as u64 != length.saturating_add(SUM as u64) {
        return damaged("the object is truncated or has something behind its end");
    }
    let body = object.len() - SUM;
    if Sha256::digest(&object[..body])[..] != object[body..] {
        return damaged("the object's checksum does not match: it was damaged after it was written");
    }
    // After the sum, so that a flipped bit in the version is called damage and not a newer format.
    if version != VERSION || flags != 0 {
        return Err(Error::new(ErrorKind::Unsupported, "the object is of a newer format: use a newer version of mongo-backup")
            .with_context("object", name)
            .with_context("version", version)
            .with_context("flags", flags));
    }
    Ok(object.slice(HEADER..body))
}

/// The version of the format, in every object.
pub(crate) const VERSION: u16 = 1;
const HEADER: usize = 16;
const SUM: usize = 32;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name() -> ObjectName {
        ObjectName::new("config").unwrap()
    }

    proptest! {
        #[test]
        fn round_trips(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let object = seal(Magic::CONFIG, &payload);
            prop_assert_eq!(&open(&name(), Magic::CONFIG, &object).unwrap()[..], &payload[..]);
        }

        #[test]
        fn any_flipped_bit_and_any_truncation_is_damage(payload in proptest::collection::vec(any::<u8>(), 0..60), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let object = seal(Magic::INDEX, &payload);
            let mut flipped = object.to_vec();
            let position = at.index(flipped.len());
            flipped[position] ^= 1 << bit;
            let error = open(&name(), Magic::INDEX, &flipped.into()).unwrap_err();
            prop_assert_eq!(error.kind(), ErrorKind::CorruptData);
            prop_assert!(open(&name(), Magic::INDEX, &object.slice(..position)).is_err());
        }
    }

    #[test]
    fn test_vector() {
        let object = seal(Magic::SNAPSHOT, b"abc");
        // Also in docs/format.md.
        let expected = "4d42534e010000000300000000000000616263\
                        4353078623b3314e356a99fd6f184859c66d3a49e34535380b8875cddf3eab30";
        assert_eq!(hex::encode(&object), expected);
    }
}
