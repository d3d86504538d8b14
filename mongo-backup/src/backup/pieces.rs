//! Telling apart, in an older tree, what has changed since and what has not, reading only nodes below which something has.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use bytes::Bytes;
use mongo_core::{
    Result,
    transfer::{
        partition::{Key, KeyRange},
        scan::ScanSource,
    },
};

use crate::repository::{
    Repository,
    segment::{Content, SegmentId},
    tree::{self, TreeEntry, TreeRoot},
};

/// A part of the older tree, in order.
pub(super) enum Piece {
    /// A node below which nothing changed.
    Node { height: u8, entry: TreeEntry },
    /// Segments in which nothing changed.
    Segments(VecDeque<TreeEntry>),
    /// The documents that are there now in place of some segments.
    Documents(Vec<u8>),
    /// The same, but too many to be held.
    Range(KeyRange),
}

/// Finds the pieces.
pub(super) struct Pieces {
    repository: Repository,
    touched: Arc<[Key]>,
    /// What is left to visit, last first.
    pending: Vec<Pending>,
    /// Segments that were looked at one by one.
    visited: i64,
}

enum Pending {
    Found(Found),
    /// A node below which something changed, with its bytes, if it was read already.
    Changed {
        node: SegmentId,
        bytes: Option<Bytes>,
        below: Below,
    },
}

/// What lies below an entry in which something changed.
struct Below {
    range: KeyRange,
    /// Positions of the touched keys in it; never none.
    touched: Range<usize>,
}

/// A piece before it is read.
pub(super) enum Found {
    Node { height: u8, entry: TreeEntry },
    Segments(VecDeque<TreeEntry>),
    Changed { range: KeyRange, touched: usize, segments: usize },
}

impl Pieces {
    pub(super) fn of(repository: Repository, older: &TreeRoot, touched: Arc<[Key]>) -> Result<Self> {
        let (range, all) = (KeyRange::everything(), 0..touched.len());
        let first = match older.node_id()? {
            Some(node) => Pending::Changed { node, bytes: None, below: Below { range, touched: all } },
            // In place of an empty tree everything is read.
            None => Pending::Found(Found::Changed { range, touched: all.len(), segments: 1 }),
        };
        Ok(Self { repository, touched, pending: vec![first], visited: 0 })
    }

    /// Segments that were looked at one by one so far.
    pub(super) fn visited(&self) -> i64 {
        self.visited
    }

    pub(super) async fn next(&mut self) -> Result<Option<Found>> {
        loop {
            match self.pending.pop() {
                None => return Ok(None),
                Some(Pending::Found(found)) => return Ok(Some(found)),
                Some(Pending::Changed { bytes: Some(bytes), below, .. }) => self.expand(&bytes, below)?,
                Some(next @ Pending::Changed { .. }) => {
                    self.pending.push(next);
                    self.read_ahead().await?;
                }
            }
        }
    }

    /// Reads the next nodes, which lie side by side, at once.
    async fn read_ahead(&mut self) -> Result<()> {
        let unread = self.pending.iter_mut().rev().filter_map(|pending| match pending {
            Pending::Changed { node, bytes, .. } if bytes.is_none() => Some((*node, bytes)),
            _ => None,
        });
        let (ids, slots): (Vec<SegmentId>, Vec<&mut Option<Bytes>>) = unread.take(NODES_AT_ONCE).unzip();
        for (slot, bytes) in slots.into_iter().zip(self.repository.read_segments(Content::Node, &ids).await?) {
            *slot = Some(bytes);
        }
        Ok(())
    }

    /// Puts what is below a node in its place.
    fn expand(&mut self, node: &Bytes, below: Below) -> Result<()> {
        let (height, entries) = tree::decode(node)?;
        let parts = tell_apart(&self.touched, below, entries)?;
        if let Some(height) = height.checked_sub(1) {
            for part in parts.into_iter().rev() {
                match part {
                    Part::Same(entries) => {
                        let nodes = entries.into_iter().rev().map(|entry| Pending::Found(Found::Node { height, entry }));
                        self.pending.extend(nodes);
                    }
                    Part::Changed { entry, below } => {
                        self.pending.push(Pending::Changed { node: entry.id, bytes: None, below });
                    }
                }
            }
            return Ok(());
        }
        let mut found: Vec<Found> = Vec::with_capacity(parts.len());
        for part in parts {
            let below = match part {
                Part::Same(entries) => {
                    self.visited += i64::try_from(entries.len()).unwrap_or(0);
                    found.push(Found::Segments(entries));
                    continue;
                }
                Part::Changed { below, .. } => below,
            };
            self.visited += 1;
            let count = below.touched.len();
            match found.last_mut() {
                // Neighbours that changed too are read with it.
                Some(Found::Changed { range, touched, segments }) if *segments < TOGETHER => {
                    range.upper = below.range.upper;
                    *touched += count;
                    *segments += 1;
                }
                _ => found.push(Found::Changed { range: below.range, touched: count, segments: 1 }),
            }
        }
        self.pending.extend(found.into_iter().rev().map(Pending::Found));
        Ok(())
    }

    /// The next pieces. None at the end.
    pub(super) async fn window(&mut self, held_at_most: usize) -> Result<Window> {
        let mut window = Window::default();
        let (mut changed, mut entries) = (0, 0);
        while changed < SEGMENTS_A_WINDOW && entries < ENTRIES_A_WINDOW {
            let piece = match self.next().await? {
                None => break,
                Some(Found::Node { height, entry }) => {
                    entries += 1;
                    Piece::Node { height, entry }
                }
                Some(Found::Segments(segments)) => {
                    entries += segments.len();
                    Piece::Segments(segments)
                }
                Some(Found::Changed { range, touched, .. }) if touched > held_at_most => Piece::Range(range),
                Some(Found::Changed { range, segments, .. }) => {
                    changed += segments;
                    window.wanted.push((window.pieces.len(), range));
                    Piece::Documents(Vec::new())
                }
            };
            window.pieces.push_back(piece);
        }
        Ok(window)
    }
}

/// How many segments of a tree hold documents that may have changed, or would hold them.
pub(super) async fn changed_segments(repository: &Repository, older: &TreeRoot, touched: Arc<[Key]>) -> Result<u64> {
    let mut pieces = Pieces::of(repository.clone(), older, touched)?;
    let mut changed = 0;
    while let Some(found) = pieces.next().await? {
        if let Found::Changed { segments, .. } = found {
            changed += segments as u64;
        }
    }
    Ok(changed)
}

/// A part of a node.
enum Part {
    /// Entries below which nothing changed.
    Same(VecDeque<TreeEntry>),
    Changed {
        entry: TreeEntry,
        below: Below,
    },
}

/// Splits the entries of a node by what changed below them. The first also takes what now comes before all that was there.
fn tell_apart(touched: &[Key], below: Below, entries: Vec<TreeEntry>) -> Result<Vec<Part>> {
    let Below { range: KeyRange { mut lower, upper, .. }, touched: Range { mut start, end } } = below;
    let mut entries: VecDeque<TreeEntry> = entries.into();
    let mut parts = Vec::new();
    while let Some(next) = touched.get(start..end).and_then(<[Key]>::first) {
        let position = begun_before(&entries, next)?.saturating_sub(1);
        let mut rest = entries.split_off(position);
        if !entries.is_empty() {
            parts.push(Part::Same(std::mem::take(&mut entries)));
        }
        let Some(entry) = rest.pop_front() else { break };
        if position > 0 {
            lower = Some(Key::of_element(&entry.first_id)?);
        }
        let behind = rest.front().map(|entry| Key::of_element(&entry.first_id)).transpose()?.or_else(|| upper.clone());
        let count = match &behind {
            Some(behind) => touched[start..end].partition_point(|key| key.compare(behind).is_lt()).max(1),
            None => end - start,
        };
        let range = KeyRange::between(std::mem::replace(&mut lower, behind.clone()), behind);
        parts.push(Part::Changed { entry, below: Below { range, touched: start..start + count } });
        start += count;
        entries = rest;
    }
    if !entries.is_empty() {
        parts.push(Part::Same(entries));
    }
    Ok(parts)
}

/// How many of some entries, which are in order, begin with a key or before it.
fn begun_before(entries: &VecDeque<TreeEntry>, key: &Key) -> Result<usize> {
    let mut among = 0..entries.len();
    while !among.is_empty() {
        let middle = among.start + among.len() / 2;
        match entries.get(middle) {
            Some(entry) if Key::of_element(&entry.first_id)?.compare(key).is_le() => among.start = middle + 1,
            _ => among.end = middle,
        }
    }
    Ok(among.start)
}

/// Some pieces, and which of them are to be filled with the documents of which range.
#[derive(Default)]
pub(super) struct Window {
    pieces: VecDeque<Piece>,
    wanted: Vec<(usize, KeyRange)>,
}

impl Window {
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Reads the documents.
    pub(super) async fn fill(mut self, source: ScanSource, by_filter: bool) -> Result<VecDeque<Piece>> {
        for some in self.wanted.chunks(RANGES_A_COMMAND) {
            let (positions, ranges): (Vec<usize>, Vec<KeyRange>) = some.iter().cloned().unzip();
            let read = source.read_ranges(&ranges, by_filter).await?;
            for (position, documents) in positions.into_iter().zip(read) {
                if let Some(piece) = self.pieces.get_mut(position) {
                    *piece = Piece::Documents(documents);
                }
            }
        }
        Ok(self.pieces)
    }
}

/// So many neighbouring segments are read together.
const TOGETHER: usize = 8;
const RANGES_A_COMMAND: usize = 64;
/// So many segments that changed are held in each window: a MiB or two.
const SEGMENTS_A_WINDOW: usize = 64;
const ENTRIES_A_WINDOW: usize = 8192;
const NODES_AT_ONCE: usize = 64;

#[cfg(test)]
mod tests {
    use mongo_core::bson::RawBson;
    use proptest::prelude::*;

    use super::*;

    fn key(id: i32) -> Key {
        Key::from(RawBson::Int32(id))
    }

    fn entry(first: i32) -> TreeEntry {
        let first_id = mongo_core::transfer::leading_id(key(first).as_document().as_bytes()).unwrap().to_vec().into();
        TreeEntry { id: SegmentId([0; 32]), level: 0, documents: 1, bytes: 1, first_id }
    }

    proptest! {
        #[test]
        fn every_touched_key_is_found_in_its_entry_and_nothing_is_lost(
            firsts in proptest::collection::btree_set(-50..50_i32, 1..30),
            touched in proptest::collection::btree_set(-60..60_i32, 0..30),
            is_leftmost: bool,
            upper in proptest::option::of(50..60_i32),
        ) {
            let firsts: Vec<i32> = firsts.into_iter().collect();
            // What lies before a node's first document, or behind it, belongs to its neighbours.
            let here = |id: &i32| (is_leftmost || *id >= firsts[0]) && upper.is_none_or(|upper| *id < upper);
            let touched: Vec<i32> = touched.into_iter().filter(here).collect();
            let keys: Vec<Key> = touched.iter().map(|id| key(*id)).collect();
            let lower = (!is_leftmost).then(|| key(firsts[0]));
            let below = Below { range: KeyRange::between(lower.clone(), upper.map(key)), touched: 0..keys.len() };
            let parts = tell_apart(&keys, below, firsts.iter().map(|first| entry(*first)).collect()).unwrap();

            let mut found = Vec::new();
            let mut seen = 0;
            for part in parts {
                match part {
                    Part::Same(entries) => found.extend(entries),
                    Part::Changed { entry, below: Below { range, touched: within } } => {
                        let position = found.len();
                        let begins = if position == 0 { lower.clone() } else { Some(key(firsts[position])) };
                        prop_assert!(range.lower == begins);
                        prop_assert!(range.upper == firsts.get(position + 1).copied().or(upper).map(key));
                        prop_assert_eq!(within.start, seen);
                        prop_assert!(!within.is_empty());
                        for id in &touched[within.clone()] {
                            prop_assert!(position == 0 || *id >= firsts[position]);
                            prop_assert!(firsts.get(position + 1).is_none_or(|next| id < next));
                        }
                        seen = within.end;
                        found.push(entry);
                    }
                }
            }
            prop_assert_eq!(seen, touched.len());
            prop_assert_eq!(found, firsts.iter().map(|first| entry(*first)).collect::<Vec<_>>());
        }
    }
}
