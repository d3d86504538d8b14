//! Packs: many blocks in one object.
//!
//! ```text
//! magic "MBPK", version u16, flags u16, 16 random bytes
//! stored blocks, back to back, each sealed if the repository is encrypted
//! directory, sealed if the repository is encrypted:
//!            for each block    encoding u8, stored length u32, plain length u32, number of segments u32
//!            for each segment  id 32 bytes, length u32, in the order in which they stand in the blocks
//! trailer: number of blocks u32, number of segments u32, magic "MBPE"
//! ```
//! All numbers are little-endian. The object's name is the SHA-256 of all its bytes; because of the random ones no name ever comes
//! again, so whoever deletes a pack late never deletes another one. The directory repeats what the index holds, so that an
//! index can be made anew from the packs.

use std::borrow::Cow;

use mongo_core::{Error, Result};
use sha2::{Digest as _, Sha256};

use super::{
    block::{Block, Encoding},
    cipher::{self, Cipher},
    envelope::{self, VERSION},
    segment::SegmentId,
};
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

    /// Checks that these are the pack's bytes: before anything in them is believed.
    pub(crate) fn check(self, bytes: &[u8]) -> Result<()> {
        if Sha256::digest(bytes)[..] == self.0 {
            return Ok(());
        }
        Err(Error::corrupt("the pack is damaged: its bytes do not have the SHA-256 that is its name"))
    }
}

/// What a pack holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) blocks: Vec<Block>,
    pub(crate) segments: Vec<Placed>,
}

/// A segment's place in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) id: SegmentId,
    /// Position of its block in the directory.
    pub(crate) block: u32,
    /// Where it begins in the block's plain bytes.
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

/// A pack in the making. Its name is a hash of all its bytes, which is kept up with them: at the end nobody waits for it.
#[derive(Debug)]
pub(crate) struct PackBuilder {
    bytes: Vec<u8>,
    directory: Directory,
    hash: Sha256,
}

/// A finished pack.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) id: PackId,
    pub(crate) bytes: Vec<u8>,
    pub(crate) directory: Directory,
}

impl PackBuilder {
    /// Begins a pack in the given memory.
    pub(crate) fn new(mut bytes: Vec<u8>, cipher: Option<&Cipher>) -> Result<Self> {
        let mut salt = [0; SALT];
        cipher::random(&mut salt)?;
        bytes.clear();
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&envelope::flags(cipher).to_le_bytes());
        bytes.extend_from_slice(&salt);
        let hash = Sha256::new_with_prefix(&bytes);
        Ok(Self { bytes, directory: Directory::default(), hash })
    }

    /// Adds a block, as it is to be stored, that holds these segments, each with its length, back to back.
    pub(crate) fn add(&mut self, encoding: Encoding, stored: &[u8], segments: &[(SegmentId, u32)]) -> Result<()> {
        let number = |length: usize| u32::try_from(length).map_err(|_| too_large());
        let block = number(self.directory.blocks.len())?;
        let mut plain = 0_u32;
        for (id, length) in segments {
            self.directory.segments.push(Placed { id: *id, block, offset: plain, length: *length });
            plain = plain.checked_add(*length).ok_or_else(too_large)?;
        }
        let (offset, length) = (number(self.bytes.len())?, number(stored.len())?);
        self.directory.blocks.push(Block { encoding, offset, stored: length, plain });
        if self.bytes.len() + stored.len() > self.bytes.capacity() && self.bytes.len() > SMALL {
            // Doubling a large buffer would hold it twice while it is copied, and end with half of it unused.
            self.bytes.reserve_exact(USUAL);
        }
        self.bytes.extend_from_slice(stored);
        self.hash.update(stored);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.directory.blocks.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() + self.directory.blocks.len() * BLOCK_ROW + self.directory.segments.len() * SEGMENT_ROW
    }

    pub(crate) fn finish(mut self, cipher: Option<&Cipher>) -> Result<Pack> {
        let blocks_end = self.bytes.len();
        let mut rows = Vec::with_capacity(self.len() - self.bytes.len());
        let mut segments = self.directory.segments.chunk_by(|a, b| a.block == b.block);
        for block in &self.directory.blocks {
            rows.push(block.encoding.to_byte());
            let held = segments.next().map_or(0, <[Placed]>::len);
            for number in [block.stored, block.plain, count(held)] {
                rows.extend_from_slice(&number.to_le_bytes());
            }
        }
        for segment in &self.directory.segments {
            rows.extend_from_slice(&segment.id.0);
            rows.extend_from_slice(&segment.length.to_le_bytes());
        }
        match cipher {
            Some(cipher) => {
                let purpose = directory_purpose(&self.bytes[..HEADER]);
                cipher.seal_into(&purpose, &rows, &mut self.bytes)?;
            }
            None => self.bytes.extend_from_slice(&rows),
        }
        self.bytes.extend_from_slice(&count(self.directory.blocks.len()).to_le_bytes());
        self.bytes.extend_from_slice(&count(self.directory.segments.len()).to_le_bytes());
        self.bytes.extend_from_slice(END);
        self.hash.update(&self.bytes[blocks_end..]);
        Ok(Pack { id: PackId(self.hash.finalize().into()), bytes: self.bytes, directory: self.directory })
    }
}

fn too_large() -> Error {
    Error::internal("a pack grew beyond its limit")
}

/// A pack of 64 MiB cannot hold four billion of anything.
fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A directory is bound to its pack's header, and so to the random bytes in it.
fn directory_purpose(header: &[u8]) -> Vec<u8> {
    [b"directory", header].concat()
}

/// Reads the directory of a whole pack.
pub(crate) fn directory(bytes: &[u8], cipher: Option<&Cipher>) -> Result<Directory> {
    let (header, _) = bytes.split_at_checked(HEADER).ok_or_else(no_directory)?;
    let trailer = bytes.len().checked_sub(TRAILER).and_then(|start| bytes.get(start..)).ok_or_else(no_directory)?;
    let length = usize::try_from(tail_length(trailer, cipher)?).map_err(|_| no_directory())?;
    let tail = bytes.len().checked_sub(length).and_then(|start| bytes.get(start..)).ok_or_else(no_directory)?;
    directory_from(header, tail, bytes.len() as u64, cipher)
}

/// How long directory and trailer are together, from the trailer.
pub(crate) fn tail_length(trailer: &[u8], cipher: Option<&Cipher>) -> Result<u64> {
    if trailer.len() != TRAILER || trailer[8..] != *END {
        return Err(no_directory());
    }
    let rows = |at: usize, row: usize| u64::from(read_u32(&trailer[at..])) * row as u64;
    let overhead = cipher.map_or(0, |_| cipher::OVERHEAD as u64);
    Ok(rows(0, BLOCK_ROW) + rows(4, SEGMENT_ROW) + overhead + TRAILER as u64)
}

/// Reads a directory from a pack's first bytes and its last, which are as many as [`tail_length`] says.
pub(crate) fn directory_from(header: &[u8], tail: &[u8], size: u64, cipher: Option<&Cipher>) -> Result<Directory> {
    let damaged = no_directory;
    if header.len() != HEADER || header[..4] != *MAGIC {
        return Err(damaged());
    }
    let number = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    envelope::check_version(number(4), number(6))?;
    if number(6) != envelope::flags(cipher) {
        return Err(Error::corrupt("the pack is not encrypted as the repository is: somebody else has written it"));
    }
    let (stored, trailer) = tail.split_at_checked(tail.len().checked_sub(TRAILER).ok_or_else(damaged)?).ok_or_else(damaged)?;
    if tail_length(trailer, cipher)? != tail.len() as u64 {
        return Err(damaged());
    }
    let start = size.checked_sub(tail.len() as u64).ok_or_else(damaged)?;
    let rows = match cipher {
        Some(cipher) => Cow::Owned(cipher.open(&directory_purpose(header), stored).ok_or_else(damaged)?),
        None => Cow::Borrowed(stored),
    };
    let (blocks, segments) = rows.split_at_checked(read_u32(trailer) as usize * BLOCK_ROW).ok_or_else(damaged)?;
    let mut segments = segments.chunks_exact(SEGMENT_ROW);
    let mut directory = Directory::default();
    let mut offset = HEADER as u64;
    for (position, row) in blocks.chunks_exact(BLOCK_ROW).enumerate() {
        let (stored, plain) = (read_u32(&row[1..]), read_u32(&row[5..]));
        let place = u32::try_from(offset).map_err(|_| damaged())?;
        let block = Block { encoding: Encoding::from_byte(row[0])?, offset: place, stored, plain };
        let mut filled = 0_u32;
        for _ in 0..read_u32(&row[9..]) {
            let row = segments.next().ok_or_else(damaged)?;
            let mut id = [0; 32];
            id.copy_from_slice(&row[..32]);
            let length = read_u32(&row[32..]);
            directory.segments.push(Placed { id: SegmentId(id), block: count(position), offset: filled, length });
            filled = filled.checked_add(length).ok_or_else(damaged)?;
        }
        if filled != plain {
            return Err(damaged());
        }
        directory.blocks.push(block);
        offset = offset.checked_add(u64::from(stored)).filter(|end| *end <= start).ok_or_else(damaged)?;
    }
    if offset != start || segments.next().is_some() { Err(damaged()) } else { Ok(directory) }
}

pub(crate) fn no_directory() -> Error {
    Error::corrupt("the pack has no valid directory")
}

/// A number from the first four bytes; zero if there are fewer.
pub(crate) fn read_u32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

pub(crate) const PREFIX: &str = "packs/";
/// Below this a pack's buffer doubles as it grows; beyond, it gets its usual size at once.
const SMALL: usize = 1 << 20;
const USUAL: usize = 17 << 20;
const MAGIC: &[u8; 4] = b"MBPK";
const END: &[u8; 4] = b"MBPE";
const SALT: usize = 16;
pub(crate) const HEADER: usize = 8 + SALT;
pub(crate) const TRAILER: usize = 12;
const BLOCK_ROW: usize = 13;
const SEGMENT_ROW: usize = 36;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cipher(sealed: bool) -> Option<Cipher> {
        sealed.then(|| Cipher::new(&[1; 32], [2; 16]))
    }

    fn pack(blocks: &[Vec<Vec<u8>>], cipher: Option<&Cipher>) -> Pack {
        let mut builder = PackBuilder::new(Vec::new(), cipher).unwrap();
        for (number, segments) in blocks.iter().enumerate() {
            let placed: Vec<_> = segments
                .iter()
                .map(|segment| {
                    (SegmentId(Sha256::digest([&number.to_le_bytes(), &segment[..]].concat()).into()), count(segment.len()))
                })
                .collect();
            builder.add(Encoding::Plain, &segments.concat(), &placed).unwrap();
        }
        builder.finish(cipher).unwrap()
    }

    fn blocks(most: usize) -> impl Strategy<Value = Vec<Vec<Vec<u8>>>> {
        let segment = proptest::collection::vec(any::<u8>(), 1..50);
        proptest::collection::vec(proptest::collection::vec(segment, 1..6), 0..most)
    }

    proptest! {
        #[test]
        fn the_directory_reads_as_it_was_written(blocks in blocks(8), sealed: bool) {
            let cipher = cipher(sealed);
            let pack = pack(&blocks, cipher.as_ref());
            let read = directory(&pack.bytes, cipher.as_ref()).unwrap();
            prop_assert!(directory(&pack.bytes, self::cipher(!sealed).as_ref()).is_err());
            prop_assert_eq!(&read, &pack.directory);
            pack.id.check(&pack.bytes).unwrap();
            let expected: Vec<&Vec<u8>> = blocks.iter().flatten().collect();
            prop_assert_eq!(read.segments.len(), expected.len());
            for (placed, segment) in read.segments.iter().zip(expected) {
                let at = (read.blocks[placed.block as usize].offset + placed.offset) as usize;
                prop_assert_eq!(&pack.bytes[at..at + placed.length as usize], &segment[..]);
            }
        }

        #[test]
        fn a_truncated_or_random_pack_is_no_panic(blocks in blocks(4), cut in any::<prop::sample::Index>(), noise in proptest::collection::vec(any::<u8>(), 0..200), sealed: bool) {
            let cipher = cipher(sealed);
            let pack = pack(&blocks, cipher.as_ref());
            prop_assert!(directory(&pack.bytes[..cut.index(pack.bytes.len())], cipher.as_ref()).is_err());
            let _ = directory(&noise, cipher.as_ref());
        }

        #[test]
        fn a_changed_directory_is_no_panic(blocks in blocks(4), at in any::<prop::sample::Index>(), with in any::<u8>()) {
            let mut bytes = pack(&blocks, None).bytes;
            let at = at.index(bytes.len());
            bytes[at] = with;
            if let Ok(read) = directory(&bytes, None) {
                prop_assert!(read.segments.iter().all(|placed| (placed.block as usize) < read.blocks.len()));
            }
        }
    }

    #[test]
    fn names_and_objects_go_both_ways() {
        let id = PackId([0xab; 32]);
        assert_eq!(PackId::from_object(&id.object().unwrap()), Some(id));
        assert_eq!(PackId::from_object(&ObjectName::new("packs/cd/abab").unwrap()), None);
    }
}
