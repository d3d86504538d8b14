//! Packs: many segments in one object.
//!
//! ```text
//! magic "MBPK", version u16, flags u16
//! stored segments, back to back
//! directory: for each segment  id 32 bytes, encoding u8, stored length u32, plain length u32
//! trailer: number of segments u32, magic "MBPE"
//! ```
//! All numbers are little-endian. The object's name is the SHA-256 of all its bytes. The directory repeats what the index
//! holds, so that an index can be made anew from the packs.

use mongo_core::{Error, Result};
use sha2::{Digest as _, Sha256};

use super::{envelope::VERSION, segment::SegmentId};
use crate::archive::ObjectName;

/// The name of a pack: SHA-256 of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PackId(pub(crate) [u8; 32]);

impl std::fmt::Debug for PackId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl PackId {
    pub(crate) fn object(self) -> Result<ObjectName> {
        let name = hex::encode(self.0);
        ObjectName::new(format!("{PREFIX}{}/{name}", &name[..2]))
    }

    /// The pack that an object's name stands for.
    pub(crate) fn from_object(name: &ObjectName) -> Option<Self> {
        let (folder, name) = name.as_str().strip_prefix(PREFIX)?.split_once('/')?;
        let mut id = [0; 32];
        hex::decode_to_slice(name, &mut id).ok()?;
        (folder == name.get(..2)?).then_some(Self(id))
    }

    /// Whether these are the pack's bytes.
    pub(crate) fn matches(self, bytes: &[u8]) -> bool {
        Sha256::digest(bytes)[..] == self.0
    }
}

/// How a segment is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As it is: compression would not have made it smaller.
    Plain,
    /// One zstd frame.
    Zstd,
}

impl Encoding {
    pub(crate) fn to_byte(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Zstd => 1,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Result<Self> {
        match byte {
            0 => Ok(Self::Plain),
            1 => Ok(Self::Zstd),
            _ => Err(Error::new(
                mongo_core::ErrorKind::Unsupported,
                "a segment is stored in a way that is not known here: use a newer version of mongo-backup",
            )
            .with_context("encoding", byte)),
        }
    }
}

/// One entry of a pack's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) id: SegmentId,
    pub(crate) encoding: Encoding,
    pub(crate) offset: u32,
    pub(crate) stored: u32,
    pub(crate) plain: u32,
}

/// A pack in the making.
#[derive(Debug)]
pub(crate) struct PackBuilder {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Default for PackBuilder {
    fn default() -> Self {
        Self::new()
    }
}

/// A finished pack.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) bytes: Vec<u8>,
    pub(crate) entries: Vec<Entry>,
}

impl PackBuilder {
    pub(crate) fn new() -> Self {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&0_u16.to_le_bytes());
        Self { bytes, entries: Vec::new() }
    }

    pub(crate) fn add(&mut self, id: SegmentId, encoding: Encoding, stored: &[u8], plain: u32) -> Result<()> {
        let length = |length: usize| u32::try_from(length).map_err(|_| Error::internal("a pack grew beyond its limit"));
        let entry = Entry { id, encoding, offset: length(self.bytes.len())?, stored: length(stored.len())?, plain };
        if self.bytes.len() + stored.len() > self.bytes.capacity() && self.bytes.len() > SMALL {
            // Doubling a large buffer would hold it twice while it is copied, and end with half of it unused.
            self.bytes.reserve_exact(USUAL);
        }
        self.bytes.extend_from_slice(stored);
        self.entries.push(entry);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() + self.entries.len() * DIRECTORY_ENTRY
    }

    pub(crate) fn finish(mut self) -> Pack {
        for entry in &self.entries {
            self.bytes.extend_from_slice(&entry.id.0);
            self.bytes.push(entry.encoding.to_byte());
            self.bytes.extend_from_slice(&entry.stored.to_le_bytes());
            self.bytes.extend_from_slice(&entry.plain.to_le_bytes());
        }
        // A pack of 64 MiB cannot hold four billion segments of at least five bytes.
        let count = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&count.to_le_bytes());
        self.bytes.extend_from_slice(END);
        Pack { bytes: self.bytes, entries: self.entries }
    }
}

impl Pack {
    pub(crate) fn id(&self) -> PackId {
        PackId(Sha256::digest(&self.bytes).into())
    }
}

/// Reads a pack's directory.
pub(crate) fn directory(bytes: &[u8]) -> Result<Vec<Entry>> {
    let damaged = || Error::corrupt("the pack has no valid directory");
    let (header, _) = bytes.split_at_checked(HEADER).ok_or_else(damaged)?;
    if &header[..4] != MAGIC {
        return Err(damaged());
    }
    if header[4..6] != VERSION.to_le_bytes() || header[6..8] != [0, 0] {
        return Err(Error::new(
            mongo_core::ErrorKind::Unsupported,
            "the pack is of a newer format: use a newer version of mongo-backup",
        ));
    }
    let (body, trailer) = bytes.split_at_checked(bytes.len().checked_sub(TRAILER).ok_or_else(damaged)?).ok_or_else(damaged)?;
    let (count, end) = trailer.split_at(4);
    if end != END {
        return Err(damaged());
    }
    let count = read_u32(count) as usize;
    let start = count.checked_mul(DIRECTORY_ENTRY).and_then(|size| body.len().checked_sub(size)).ok_or_else(damaged)?;
    let mut offset = HEADER;
    let mut entries = Vec::with_capacity(count);
    for raw in body[start..].chunks_exact(DIRECTORY_ENTRY) {
        let mut id = [0; 32];
        id.copy_from_slice(&raw[..32]);
        let stored = read_u32(&raw[33..37]);
        entries.push(Entry {
            id: SegmentId(id),
            encoding: Encoding::from_byte(raw[32])?,
            offset: u32::try_from(offset).map_err(|_| damaged())?,
            stored,
            plain: read_u32(&raw[37..41]),
        });
        offset = offset.checked_add(stored as usize).ok_or_else(damaged)?;
    }
    if offset != start { Err(damaged()) } else { Ok(entries) }
}

/// A number from exactly four bytes; zero if there are fewer.
pub(crate) fn read_u32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

pub(crate) const PREFIX: &str = "packs/";
/// Below this a pack's buffer doubles as it grows; beyond, it gets its usual size at once.
const SMALL: usize = 1 << 20;
const USUAL: usize = 17 << 20;
const MAGIC: &[u8; 4] = b"MBPK";
const END: &[u8; 4] = b"MBPE";
const HEADER: usize = 8;
const TRAILER: usize = 8;
const DIRECTORY_ENTRY: usize = 41;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pack(segments: &[Vec<u8>]) -> Pack {
        let mut builder = PackBuilder::new();
        for (number, segment) in segments.iter().enumerate() {
            let id = SegmentId(Sha256::digest(number.to_le_bytes()).into());
            builder.add(id, Encoding::Plain, segment, u32::try_from(segment.len()).unwrap()).unwrap();
        }
        builder.finish()
    }

    proptest! {
        #[test]
        fn the_directory_reads_as_it_was_written(segments in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..20)) {
            let pack = pack(&segments);
            let read = directory(&pack.bytes).unwrap();
            prop_assert_eq!(&read, &pack.entries);
            for (entry, segment) in read.iter().zip(&segments) {
                let at = entry.offset as usize;
                prop_assert_eq!(&pack.bytes[at..at + entry.stored as usize], &segment[..]);
            }
        }

        #[test]
        fn a_truncated_or_random_pack_is_no_panic(segments in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..5), cut in any::<prop::sample::Index>(), noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let pack = pack(&segments);
            prop_assert!(directory(&pack.bytes[..cut.index(pack.bytes.len())]).is_err());
            let _ = directory(&noise);
        }
    }

    #[test]
    fn names_and_objects_go_both_ways() {
        let id = PackId([0xab; 32]);
        assert_eq!(PackId::from_object(&id.object().unwrap()), Some(id));
        assert_eq!(PackId::from_object(&ObjectName::new("packs/cd/abab").unwrap()), None);
    }
}
