//! The index: where each segment lies.
//!
//! Payload of an index object (little-endian), inside the envelope:
//! ```text
//! 16 random bytes
//! number of packs u32, then for each pack        id 32 bytes, size u64
//! number of blocks u32, then for each block      pack u32 (position above), offset u32, stored length u32, plain length u32, encoding u8
//! number of segments u64, then for each, sorted by id
//!     id 32 bytes, block u32 (position above), offset u32 and length u32 in the block's plain bytes
//! ```
//! The object's name is the SHA-256 of its bytes, and because of the random ones never comes again. Every backup adds at least one; a reader takes all of them together.

use std::collections::{BTreeSet, HashMap};

use mongo_core::{Error, Result};

use super::{
    block::{Block, Encoding},
    cipher::random,
    pack::{Directory, PackId, Placed, read_u32},
    segment::SegmentId,
};

/// Where a segment lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) id: SegmentId,
    pub(crate) pack: PackId,
    pub(crate) block: Block,
    /// Where it begins in the block's plain bytes.
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

impl Location {
    /// Names its block among all blocks, in the order in which they lie.
    pub(crate) fn block_key(&self) -> (PackId, u32) {
        (self.pack, self.block.offset)
    }
}

/// All that a repository's index objects say.
#[derive(Debug, Default)]
pub(crate) struct Index {
    packs: Vec<(PackId, u64)>,
    positions: HashMap<PackId, u32>,
    /// Each with the position of its pack.
    blocks: Vec<(u32, Block)>,
    /// Sorted by id; blocks are positions in `blocks`.
    rows: Vec<Placed>,
    /// Packs that index objects name but that are missing or have another size.
    unusable: BTreeSet<PackId>,
}

/// What one index object says. Packs of blocks and blocks of segments are positions in its own tables.
#[derive(Debug)]
pub(crate) struct IndexPayload {
    pub(crate) packs: Vec<(PackId, u64)>,
    blocks: Vec<(u32, Block)>,
    rows: Vec<Placed>,
}

impl Index {
    /// Joins index payloads; `usable` says which packs are really there.
    pub(crate) fn join(payloads: &[IndexPayload], usable: impl Fn(PackId, u64) -> bool) -> Self {
        let mut index = Self::default();
        for payload in payloads {
            let packs: Vec<Option<u32>> = payload
                .packs
                .iter()
                .map(|(id, size)| {
                    if usable(*id, *size) {
                        return Some(index.pack_position(*id, *size));
                    }
                    index.unusable.insert(*id);
                    None
                })
                .collect();
            let blocks: Vec<Option<u32>> = payload
                .blocks
                .iter()
                .map(|(pack, block)| {
                    let pack = packs.get(*pack as usize).copied().flatten()?;
                    index.blocks.push((pack, *block));
                    u32::try_from(index.blocks.len() - 1).ok()
                })
                .collect();
            index.rows.extend(payload.rows.iter().filter_map(|row| {
                let block = blocks.get(row.block as usize).copied().flatten()?;
                Some(Placed { block, ..*row })
            }));
        }
        index.rows.sort_unstable_by_key(|row| row.id);
        index.rows.dedup_by_key(|row| row.id);
        index
    }

    pub(crate) fn get(&self, id: SegmentId) -> Option<Location> {
        let row = self.rows.get(self.rows.binary_search_by_key(&id, |row| row.id).ok()?)?;
        let (pack, block) = *self.blocks.get(row.block as usize)?;
        let (pack, _) = *self.packs.get(pack as usize)?;
        Some(Location { id, pack, block, offset: row.offset, length: row.length })
    }

    pub(crate) fn unusable(&self) -> &BTreeSet<PackId> {
        &self.unusable
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    fn pack_position(&mut self, id: PackId, size: u64) -> u32 {
        let next = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        let packs = &mut self.packs;
        *self.positions.entry(id).or_insert_with(|| {
            packs.push((id, size));
            next
        })
    }
}

/// The payload for some finished packs, each with its size.
pub(crate) fn encode(packs: &[(PackId, u64, Directory)]) -> Result<Vec<u8>> {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let mut payload = vec![0; SALT];
    random(&mut payload)?;
    payload.extend_from_slice(&count(packs.len()).to_le_bytes());
    for (id, size, _) in packs {
        payload.extend_from_slice(&id.0);
        payload.extend_from_slice(&size.to_le_bytes());
    }
    let blocks: usize = packs.iter().map(|(_, _, directory)| directory.blocks.len()).sum();
    payload.extend_from_slice(&count(blocks).to_le_bytes());
    let mut rows: Vec<Placed> = Vec::new();
    let mut first_block = 0_u32;
    for (position, (_, _, directory)) in packs.iter().enumerate() {
        for block in &directory.blocks {
            for number in [count(position), block.offset, block.stored, block.plain] {
                payload.extend_from_slice(&number.to_le_bytes());
            }
            payload.push(block.encoding.to_byte());
        }
        rows.extend(directory.segments.iter().map(|row| Placed { block: first_block + row.block, ..*row }));
        first_block += count(directory.blocks.len());
    }
    rows.sort_unstable_by_key(|row| row.id);
    payload.reserve_exact(8 + rows.len() * SEGMENT_ROW);
    payload.extend_from_slice(&(rows.len() as u64).to_le_bytes());
    for row in rows {
        payload.extend_from_slice(&row.id.0);
        for number in [row.block, row.offset, row.length] {
            payload.extend_from_slice(&number.to_le_bytes());
        }
    }
    Ok(payload)
}

/// Reads a payload.
pub(crate) fn decode(payload: &[u8]) -> Result<IndexPayload> {
    let damaged = || Error::corrupt("the index is malformed");
    let (_, rest) = payload.split_at_checked(SALT).ok_or_else(damaged)?;
    let (packs, rest) = table(rest, PACK_ROW)?;
    let packs: Vec<(PackId, u64)> = packs
        .chunks_exact(PACK_ROW)
        .map(|raw| {
            let (mut id, mut size) = ([0; 32], [0; 8]);
            id.copy_from_slice(&raw[..32]);
            size.copy_from_slice(&raw[32..]);
            (PackId(id), u64::from_le_bytes(size))
        })
        .collect();
    let (blocks, rest) = table(rest, BLOCK_ROW)?;
    let blocks = blocks
        .chunks_exact(BLOCK_ROW)
        .map(|raw| {
            let number = |at: usize| read_u32(&raw[at..]);
            let block =
                Block { encoding: Encoding::from_byte(raw[16])?, offset: number(4), stored: number(8), plain: number(12) };
            if number(0) as usize >= packs.len() { Err(damaged()) } else { Ok((number(0), block)) }
        })
        .collect::<Result<Vec<_>>>()?;
    let (count, rows) = rest.split_first_chunk::<8>().ok_or_else(damaged)?;
    if u64::from_le_bytes(*count).checked_mul(SEGMENT_ROW as u64) != Some(rows.len() as u64) {
        return Err(damaged());
    }
    let rows = rows
        .chunks_exact(SEGMENT_ROW)
        .map(|raw| {
            let mut id = [0; 32];
            id.copy_from_slice(&raw[..32]);
            let number = |at: usize| read_u32(&raw[at..]);
            let row = Placed { id: SegmentId(id), block: number(32), offset: number(36), length: number(40) };
            let fits = blocks
                .get(row.block as usize)
                .is_some_and(|(_, block)| row.offset.checked_add(row.length).is_some_and(|end| end <= block.plain));
            if fits { Ok(row) } else { Err(damaged()) }
        })
        .collect::<Result<_>>()?;
    Ok(IndexPayload { packs, blocks, rows })
}

/// A table of rows of a fixed length behind their number, and what follows.
fn table(bytes: &[u8], row: usize) -> Result<(&[u8], &[u8])> {
    let split = bytes.split_at_checked(4).and_then(|(count, rest)| {
        let size = (read_u32(count) as usize).checked_mul(row)?;
        rest.split_at_checked(size)
    });
    split.ok_or_else(|| Error::corrupt("the index is malformed"))
}

pub(crate) const PREFIX: &str = "index/";
const SALT: usize = 16;
const PACK_ROW: usize = 40;
const BLOCK_ROW: usize = 17;
const SEGMENT_ROW: usize = 44;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One block at `offset` that holds these segments of ten bytes each.
    fn directory(offset: u32, ids: &[u8]) -> Directory {
        let plain = u32::try_from(ids.len() * 10).unwrap();
        Directory {
            blocks: vec![Block { encoding: Encoding::Zstd, offset, stored: 7, plain }],
            segments: ids
                .iter()
                .zip((0..).step_by(10))
                .map(|(id, offset)| Placed { id: SegmentId([*id; 32]), block: 0, offset, length: 10 })
                .collect(),
        }
    }

    #[test]
    fn joined_indexes_find_every_segment_in_a_pack_that_exists() {
        let (a, b) = (PackId([1; 32]), PackId([2; 32]));
        let first = decode(&encode(&[(a, 100, directory(8, &[9, 3])), (b, 50, directory(30, &[5]))]).unwrap()).unwrap();
        let second = decode(&encode(&[(b, 50, directory(30, &[5, 7]))]).unwrap()).unwrap();
        let index = Index::join(&[first, second], |_, _| true);
        assert_eq!(index.len(), 4);
        let found =
            |id: u8| index.get(SegmentId([id; 32])).map(|found| (found.pack, found.block.offset, found.offset, found.length));
        assert_eq!(found(3), Some((a, 8, 10, 10)));
        assert_eq!(found(7), Some((b, 30, 10, 10)));
        assert_eq!(found(4), None);
    }

    #[test]
    fn segments_of_a_missing_pack_are_not_known() {
        let (a, b) = (PackId([1; 32]), PackId([2; 32]));
        let payload = decode(&encode(&[(a, 100, directory(8, &[1])), (b, 50, directory(8, &[2]))]).unwrap()).unwrap();
        let index = Index::join(&[payload], |id, size| id == a && size == 100);
        assert!(index.get(SegmentId([1; 32])).is_some() && index.get(SegmentId([2; 32])).is_none());
    }

    #[test]
    fn a_segment_that_reaches_beyond_its_block_is_refused() {
        let mut wrong = directory(8, &[1, 2]);
        wrong.segments[1].length = 11;
        assert!(decode(&encode(&[(PackId([1; 32]), 100, wrong)]).unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn noise_is_no_panic(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&noise);
        }
    }
}
