//! The index: where each segment lies.
//!
//! Payload of an index object (little-endian), inside the envelope:
//! ```text
//! number of packs u32, then for each pack      id 32 bytes, size u64
//! number of segments u64, then for each, sorted by id
//!     id 32 bytes, pack u32 (position above), offset u32, stored length u32, plain length u32, encoding u8
//! ```
//! The object's name is the SHA-256 of its bytes. Every backup adds at least one; a reader takes all of them together.

use std::collections::{BTreeSet, HashMap};

use mongo_core::{Error, Result};

use super::{
    pack::{Encoding, Entry, PackId, read_u32},
    segment::SegmentId,
};

/// Where a segment lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) pack: PackId,
    pub(crate) entry: Entry,
}

/// All that a repository's index objects say.
#[derive(Debug, Default)]
pub(crate) struct Index {
    packs: Vec<(PackId, u64)>,
    positions: HashMap<PackId, u32>,
    /// Sorted by id.
    rows: Vec<Row>,
    /// Packs that index objects name but that are missing or have another size.
    unusable: BTreeSet<PackId>,
}

/// A segment's place. In an index object, its pack is a position in the object's own table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    id: SegmentId,
    pack: u32,
    offset: u32,
    stored: u32,
    plain: u32,
    encoding: Encoding,
}

impl Index {
    /// Joins index payloads; `usable` says which packs are really there.
    pub(crate) fn join(payloads: &[IndexPayload], usable: impl Fn(PackId, u64) -> bool) -> Self {
        let mut index = Self::default();
        for (packs, rows) in payloads {
            let mut mapped = Vec::with_capacity(packs.len());
            for (id, size) in packs {
                if usable(*id, *size) {
                    mapped.push(Some(index.pack_position(*id, *size)));
                } else {
                    index.unusable.insert(*id);
                    mapped.push(None);
                }
            }
            for (row, position) in rows.iter().filter_map(|row| Some((row, mapped.get(row.pack as usize).copied().flatten()?))) {
                index.rows.push(Row { pack: position, ..*row });
            }
        }
        index.rows.sort_unstable_by_key(|row| row.id);
        index.rows.dedup_by_key(|row| row.id);
        index
    }

    pub(crate) fn get(&self, id: SegmentId) -> Option<Location> {
        let row = self.rows.get(self.rows.binary_search_by_key(&id, |row| row.id).ok()?)?;
        let (pack, _) = self.packs.get(row.pack as usize)?;
        Some(Location {
            pack: *pack,
            entry: Entry { id, encoding: row.encoding, offset: row.offset, stored: row.stored, plain: row.plain },
        })
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

/// The packs of an index object and their sizes.
pub(crate) type PackTable = Vec<(PackId, u64)>;

/// What one index object says.
pub(crate) type IndexPayload = (PackTable, Vec<Row>);

/// The payload for some finished packs.
pub(crate) fn encode(packs: &[(PackId, u64, Vec<Entry>)]) -> Vec<u8> {
    let mut rows: Vec<(usize, &Entry)> = packs
        .iter()
        .enumerate()
        .flat_map(|(position, (_, _, entries))| entries.iter().map(move |entry| (position, entry)))
        .collect();
    rows.sort_unstable_by_key(|(_, entry)| entry.id);
    let mut payload = Vec::with_capacity(16 + packs.len() * PACK_ROW + rows.len() * SEGMENT_ROW);
    payload.extend_from_slice(&u32::try_from(packs.len()).unwrap_or(u32::MAX).to_le_bytes());
    for (id, size, _) in packs {
        payload.extend_from_slice(&id.0);
        payload.extend_from_slice(&size.to_le_bytes());
    }
    payload.extend_from_slice(&(rows.len() as u64).to_le_bytes());
    for (position, entry) in rows {
        payload.extend_from_slice(&entry.id.0);
        for number in [u32::try_from(position).unwrap_or(u32::MAX), entry.offset, entry.stored, entry.plain] {
            payload.extend_from_slice(&number.to_le_bytes());
        }
        payload.push(entry.encoding.to_byte());
    }
    payload
}

/// Reads a payload.
pub(crate) fn decode(payload: &[u8]) -> Result<IndexPayload> {
    let damaged = || Error::corrupt("the index is malformed");
    let (count, rest) = payload.split_at_checked(4).ok_or_else(damaged)?;
    let size = (read_u32(count) as usize).checked_mul(PACK_ROW).ok_or_else(damaged)?;
    let (packs, rest) = rest.split_at_checked(size).ok_or_else(damaged)?;
    let (count, rows) = rest.split_first_chunk::<8>().ok_or_else(damaged)?;
    if u64::from_le_bytes(*count).checked_mul(SEGMENT_ROW as u64) != Some(rows.len() as u64) {
        return Err(damaged());
    }
    let packs: PackTable = packs
        .chunks_exact(PACK_ROW)
        .map(|raw| {
            let (mut id, mut size) = ([0; 32], [0; 8]);
            id.copy_from_slice(&raw[..32]);
            size.copy_from_slice(&raw[32..]);
            (PackId(id), u64::from_le_bytes(size))
        })
        .collect();
    let rows = rows
        .chunks_exact(SEGMENT_ROW)
        .map(|raw| {
            let mut id = [0; 32];
            id.copy_from_slice(&raw[..32]);
            let number = |at: usize| read_u32(&raw[at..]);
            let row = Row {
                id: SegmentId(id),
                pack: number(32),
                offset: number(36),
                stored: number(40),
                plain: number(44),
                encoding: Encoding::from_byte(raw[48])?,
            };
            if row.pack as usize >= packs.len() { Err(damaged()) } else { Ok(row) }
        })
        .collect::<Result<_>>()?;
    Ok((packs, rows))
}

pub(crate) const PREFIX: &str = "index/";
const PACK_ROW: usize = 40;
const SEGMENT_ROW: usize = 49;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(id: u8, offset: u32) -> Entry {
        Entry { id: SegmentId([id; 32]), encoding: Encoding::Zstd, offset, stored: 10, plain: 20 }
    }

    #[test]
    fn joined_indexes_find_every_segment_in_a_pack_that_exists() {
        let (a, b) = (PackId([1; 32]), PackId([2; 32]));
        let first = decode(&encode(&[(a, 100, vec![entry(9, 8), entry(3, 18)]), (b, 50, vec![entry(5, 8)])])).unwrap();
        let second = decode(&encode(&[(b, 50, vec![entry(5, 8), entry(7, 99)])])).unwrap();
        let index = Index::join(&[first, second], |_, _| true);
        assert_eq!(index.len(), 4);
        assert_eq!(index.get(SegmentId([3; 32])), Some(Location { pack: a, entry: entry(3, 18) }));
        assert_eq!(index.get(SegmentId([7; 32])), Some(Location { pack: b, entry: entry(7, 99) }));
        assert_eq!(index.get(SegmentId([4; 32])), None);
    }

    #[test]
    fn segments_of_a_missing_pack_are_not_known() {
        let (a, b) = (PackId([1; 32]), PackId([2; 32]));
        let payload = decode(&encode(&[(a, 100, vec![entry(1, 8)]), (b, 50, vec![entry(2, 8)])])).unwrap();
        let index = Index::join(&[payload], |id, size| id == a && size == 100);
        assert!(index.get(SegmentId([1; 32])).is_some() && index.get(SegmentId([2; 32])).is_none());
    }

    proptest! {
        #[test]
        fn noise_is_no_panic(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&noise);
        }
    }
}
