//! The frame around every object but packs: what it is, which version, and a sum over all of it.

use bytes::Bytes;
use mongo_core::{Error, ErrorKind, Result};
use sha2::{Digest as _, Sha256};

use super::cipher::{Cipher, OVERHEAD};
use crate::archive::ObjectName;

/// What an object says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Magic(pub(crate) [u8; 4]);

impl Magic {
    pub(crate) const AUDIT: Self = Self(*b"MBAU");
    pub(crate) const CONFIG: Self = Self(*b"MBCF");
    pub(crate) const INDEX: Self = Self(*b"MBIX");
    pub(crate) const KEY: Self = Self(*b"MBKY");
    pub(crate) const SNAPSHOT: Self = Self(*b"MBSN");
    pub(crate) const SLICE: Self = Self(*b"MBSL");
    /// What backups and prunes leave for each other.
    pub(crate) const MARK: Self = Self(*b"MBMK");
    /// What lies where a snapshot would be whose backup was taken for dead.
    pub(crate) const TOMBSTONE: Self = Self(*b"MBTS");

    /// Whether an object says that it is this.
    pub(crate) fn is_of(self, object: &[u8]) -> bool {
        object.starts_with(&self.0)
    }

    /// What a sealed payload is bound to: what it is, and under which name. The name of an index object is a hash of what is sealed.
    fn purpose(self, name: Option<&ObjectName>) -> Vec<u8> {
        let name = name.filter(|_| self != Self::INDEX).map_or("", ObjectName::as_str);
        [&self.0, name.as_bytes()].concat()
    }
}

/// Puts the frame around a payload, and seals it if there is a cipher.
///
/// An object whose name is not a hash of its bytes is bound to that name.
pub(crate) fn seal(magic: Magic, name: Option<&ObjectName>, cipher: Option<&Cipher>, payload: &[u8]) -> Result<Bytes> {
    let length = payload.len() + cipher.map_or(0, |_| OVERHEAD);
    let mut object = Vec::with_capacity(HEADER + length + SUM);
    object.extend_from_slice(&magic.0);
    object.extend_from_slice(&VERSION.to_le_bytes());
    object.extend_from_slice(&flags(cipher).to_le_bytes());
    object.extend_from_slice(&(length as u64).to_le_bytes());
    match cipher {
        Some(cipher) => cipher.seal_into(&magic.purpose(name), payload, &mut object)?,
        None => object.extend_from_slice(payload),
    }
    let sum = Sha256::digest(&object);
    object.extend_from_slice(&sum);
    Ok(object.into())
}

/// Takes the frame off, or says what is wrong with it.
pub(crate) fn open(magic: Magic, name: &ObjectName, cipher: Option<&Cipher>, object: &Bytes) -> Result<Bytes> {
    let damaged = |what: &'static str| Error::corrupt(what).with_context("object", name);
    let (header, rest) = object.split_at_checked(HEADER).ok_or_else(|| damaged("the object is truncated"))?;
    if header[..4] != magic.0 {
        return Err(damaged("the object is not what its name says"));
    }
    let (version, found) = (u16::from_le_bytes([header[4], header[5]]), u16::from_le_bytes([header[6], header[7]]));
    let mut length = [0; 8];
    length.copy_from_slice(&header[8..16]);
    let length = u64::from_le_bytes(length);
    if rest.len() as u64 != length.saturating_add(SUM as u64) {
        return Err(damaged("the object is truncated or has something behind its end"));
    }
    let body = object.len() - SUM;
    if Sha256::digest(&object[..body])[..] != object[body..] {
        return Err(damaged("the object's checksum does not match: it was damaged after it was written"));
    }
    // After the sum, so that a flipped bit in the version is called damage and not a newer format.
    check_version(version, found).map_err(|error| error.with_context("object", name))?;
    if found != flags(cipher) {
        return Err(damaged(match cipher {
            Some(_) => "the object is not encrypted, as all others are: somebody else has written it",
            None => "the object is encrypted, and the repository is not: somebody else has written it",
        }));
    }
    let payload = object.slice(HEADER..body);
    match cipher {
        None => Ok(payload),
        Some(cipher) => cipher.open(&magic.purpose(Some(name)), &payload).map(Bytes::from).ok_or_else(|| {
            damaged("the object was not sealed with this repository's key, or under another name: it was exchanged")
        }),
    }
}

/// Refuses a version and flags that are not known here.
pub(crate) fn check_version(version: u16, flags: u16) -> Result<()> {
    if version == VERSION && flags & !SEALED == 0 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Unsupported, "the object is of a newer format: use a newer version of mongo-backup")
        .with_context("version", version)
        .with_context("flags", flags))
}

/// The flags of what is stored with this cipher, or without one.
pub(crate) fn flags(cipher: Option<&Cipher>) -> u16 {
    if cipher.is_some() { SEALED } else { 0 }
}

/// The version of the format, in every object.
pub(crate) const VERSION: u16 = 1;
const SEALED: u16 = 1;
const HEADER: usize = 16;
const SUM: usize = 32;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name() -> ObjectName {
        ObjectName::new("config").unwrap()
    }

    fn cipher() -> Cipher {
        Cipher::new(&[1; 32], [2; 16])
    }

    proptest! {
        #[test]
        fn round_trips(payload in proptest::collection::vec(any::<u8>(), 0..300), sealed: bool) {
            let cipher = sealed.then(cipher);
            let object = seal(Magic::CONFIG, Some(&name()), cipher.as_ref(), &payload).unwrap();
            prop_assert_eq!(&open(Magic::CONFIG, &name(), cipher.as_ref(), &object).unwrap()[..], &payload[..]);
        }

        #[test]
        fn any_flipped_bit_and_any_truncation_is_damage(
            payload in proptest::collection::vec(any::<u8>(), 0..60),
            at in any::<prop::sample::Index>(),
            bit in 0_u8..8,
            sealed: bool,
        ) {
            let cipher = sealed.then(cipher);
            let object = seal(Magic::INDEX, None, cipher.as_ref(), &payload).unwrap();
            let mut flipped = object.to_vec();
            let position = at.index(flipped.len());
            flipped[position] ^= 1 << bit;
            let error = open(Magic::INDEX, &name(), cipher.as_ref(), &flipped.into()).unwrap_err();
            prop_assert_eq!(error.kind(), ErrorKind::CorruptData);
            prop_assert!(open(Magic::INDEX, &name(), cipher.as_ref(), &object.slice(..position)).is_err());
        }
    }

    #[test]
    fn a_sealed_object_opens_under_its_own_name_and_kind_only() {
        let (cipher, other) = (cipher(), ObjectName::new("other").unwrap());
        let object = seal(Magic::SNAPSHOT, Some(&name()), Some(&cipher), b"payload").unwrap();
        let refused = |result: Result<Bytes>| assert_eq!(result.unwrap_err().kind(), ErrorKind::CorruptData);
        refused(open(Magic::SNAPSHOT, &other, Some(&cipher), &object));
        refused(open(Magic::SNAPSHOT, &name(), None, &object));
        refused(open(Magic::SNAPSHOT, &name(), Some(&Cipher::new(&[9; 32], [2; 16])), &object));
        let plain = seal(Magic::SNAPSHOT, Some(&name()), None, b"payload").unwrap();
        refused(open(Magic::SNAPSHOT, &name(), Some(&cipher), &plain));
    }

    #[test]
    fn test_vector() {
        let object = seal(Magic::SNAPSHOT, Some(&name()), None, b"abc").unwrap();
        // Also in docs/format.md.
        let expected = "4d42534e010000000300000000000000616263\
                        4353078623b3314e356a99fd6f184859c66d3a49e34535380b8875cddf3eab30";
        assert_eq!(hex::encode(&object), expected);
    }
}
