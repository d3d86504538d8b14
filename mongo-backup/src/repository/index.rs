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

use std::{
    borrow::Borrow,
    collections::{BTreeSet, HashMap, HashSet},
    ops::Range,
};

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
///
/// A segment can lie in several packs: two backups stored it at the same time, or it was moved out of a pack that will go.
#[derive(Debug, Default)]
pub(crate) struct Index {
    packs: Vec<IndexedPack>,
    positions: HashMap<PackId, u32>,
    /// Each with the position of its pack.
    blocks: Vec<(u32, Block)>,
    /// Sorted by id, and of equal ids those first that lie in packs that stay; blocks are positions in `blocks`.
    rows: Vec<Placed>,
    /// Packs that index objects name but that are missing or have another size.
    unusable: BTreeSet<PackId>,
}

/// A pack of the index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IndexedPack {
    pub(crate) id: PackId,
    pub(crate) size: u64,
    /// A prune will delete it: nothing that is written from now on may rely on it.
    pub(crate) condemned: bool,
}

/// What one index object says. Packs of blocks and blocks of segments are positions in its own tables.
#[derive(Debug)]
pub(crate) struct IndexPayload {
    pub(crate) packs: Vec<(PackId, u64)>,
    blocks: Vec<(u32, Block)>,
    rows: Vec<Placed>,
}

impl Index {
    /// Joins index payloads; `usable` says which packs are really there, `condemned` which will be deleted.
    pub(crate) fn join(
        payloads: impl IntoIterator<Item: Borrow<IndexPayload>>,
        usable: impl Fn(PackId, u64) -> bool,
        condemned: impl Fn(PackId) -> bool,
    ) -> Self {
        let mut index = Self::default();
        for payload in payloads {
            let payload = payload.borrow();
            let packs: Vec<Option<u32>> = payload
                .packs
                .iter()
                .map(|(id, size)| {
                    if usable(*id, *size) {
                        return Some(index.pack_position(IndexedPack { id: *id, size: *size, condemned: condemned(*id) }));
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
            index.rows.reserve(payload.rows.len());
            index.rows.extend(payload.rows.iter().filter_map(|row| {
                let block = blocks.get(row.block as usize).copied().flatten()?;
                Some(Placed { block, ..*row })
            }));
        }
        let mut rows = std::mem::take(&mut index.rows);
        let order = |row: &Placed| index.pack_of(row).map(|pack| (pack.condemned, pack.id));
        rows.sort_unstable_by(|a, b| a.id.cmp(&b.id).then_with(|| order(a).cmp(&order(b))));
        // Two index objects may name the same pack.
        rows.dedup_by(|a, b| a.id == b.id && order(a) == order(b));
        rows.shrink_to_fit();
        index.rows = rows;
        index
    }

    fn pack_of(&self, row: &Placed) -> Option<&IndexedPack> {
        let (pack, _) = self.blocks.get(row.block as usize)?;
        self.packs.get(*pack as usize)
    }

    /// Where a segment lies, in a pack that stays if there is one.
    pub(crate) fn get(&self, id: SegmentId) -> Option<Location> {
        self.rows_of(id).next().and_then(|row| self.location(row))
    }

    /// Whether a segment lies in a pack that stays.
    pub(crate) fn holds_for_good(&self, id: SegmentId) -> bool {
        self.rows
            .get(self.rows_of(id))
            .and_then(|rows| rows.first())
            .and_then(|row| self.pack_of(row))
            .is_some_and(|pack| !pack.condemned)
    }

    /// Whether a segment lies in a pack that stays and is none of these.
    pub(crate) fn holds_outside(&self, id: SegmentId, packs: &HashSet<PackId>) -> bool {
        let rows = self.rows.get(self.rows_of(id)).unwrap_or_default();
        rows.iter().filter_map(|row| self.pack_of(row)).any(|pack| !pack.condemned && !packs.contains(&pack.id))
    }

    /// The positions of a segment's rows; empty if it is not known.
    pub(crate) fn rows_of(&self, id: SegmentId) -> Range<usize> {
        let start = self.rows.partition_point(|row| row.id < id);
        let count = self.rows.get(start..).unwrap_or_default().iter().take_while(|row| row.id == id).count();
        start..start + count
    }

    /// What stands in a row.
    pub(crate) fn location(&self, row: usize) -> Option<Location> {
        let row = self.rows.get(row)?;
        let (pack, block) = *self.blocks.get(row.block as usize)?;
        let pack = self.packs.get(pack as usize)?.id;
        Some(Location { id: row.id, pack, block, offset: row.offset, length: row.length })
    }

    pub(crate) fn packs(&self) -> &[IndexedPack] {
        &self.packs
    }

    pub(crate) fn unusable(&self) -> &BTreeSet<PackId> {
        &self.unusable
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    fn pack_position(&mut self, pack: IndexedPack) -> u32 {
        let next = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        let packs = &mut self.packs;
        *self.positions.entry(pack.id).or_insert_with(|| {
            packs.push(pack);
            next
        })
    }
}

impl IndexPayload {
    /// What it says of each of its packs, as [`encode`] takes it.
    pub(crate) fn directories(&self) -> Vec<(PackId, u64, Directory)> {
        let mut directories: Vec<(PackId, u64, Directory)> =
            self.packs.iter().map(|(id, size)| (*id, *size, Directory::default())).collect();
        // Where each block went: its pack, and its place in the pack's directory.
        let mut places = Vec::with_capacity(self.blocks.len());
        for (pack, block) in &self.blocks {
            let place = directories.get_mut(*pack as usize).map(|(_, _, directory)| {
                directory.blocks.push(*block);
                (*pack as usize, u32::try_from(directory.blocks.len() - 1).unwrap_or(u32::MAX))
            });
            places.push(place);
        }
        for row in &self.rows {
            if let Some((pack, block)) = places.get(row.block as usize).copied().flatten()
                && let Some((_, _, directory)) = directories.get_mut(pack)
            {
                directory.segments.push(Placed { block, ..*row });
            }
        }
        directories
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
        let index = Index::join([&first, &second], |_, _| true, |_| false);
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
        let index = Index::join([&payload], |id, size| id == a && size == 100, |_| false);
        assert!(index.get(SegmentId([1; 32])).is_some() && index.get(SegmentId([2; 32])).is_none());
    }

    #[test]
    fn an_index_object_can_be_taken_apart_and_written_anew() {
        let packs = [
            (PackId([1; 32]), 100, directory(8, &[9, 3])),
            (PackId([2; 32]), 50, directory(30, &[5])),
            (PackId([4; 32]), 1, Directory::default()),
        ];
        let payload = decode(&encode(&packs).unwrap()).unwrap();
        let again = decode(&encode(&payload.directories()[..2]).unwrap()).unwrap();
        let index = Index::join([&again], |_, _| true, |_| false);
        let whole = Index::join([&payload], |_, _| true, |_| false);
        for id in [3, 5, 9] {
            assert_eq!(index.get(SegmentId([id; 32])), whole.get(SegmentId([id; 32])));
        }
        assert_eq!(index.len(), 3);
    }

    #[test]
    fn a_pack_that_stays_is_preferred_to_one_that_will_go() {
        let (a, b) = (PackId([1; 32]), PackId([2; 32]));
        let payload = decode(&encode(&[(a, 100, directory(8, &[1, 2])), (b, 50, directory(8, &[2]))]).unwrap()).unwrap();
        let index = Index::join([&payload], |_, _| true, |id| id == a);
        let segment = |id: u8| SegmentId([id; 32]);
        assert_eq!(index.get(segment(2)).unwrap().pack, b);
        assert_eq!(index.rows_of(segment(2)).len(), 2);
        assert!(index.holds_for_good(segment(2)) && !index.holds_for_good(segment(1)) && !index.holds_for_good(segment(3)));
        assert_eq!(index.get(segment(1)).unwrap().pack, a);
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
