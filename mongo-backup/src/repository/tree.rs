//! The hash tree: a collection's list of segments, cut by the same hashes as the segments themselves.
//!
//! A node is stored as a segment of its own kind. Plain bytes of a node (little-endian):
//! ```text
//! height u8 (0: entries are segments of documents), number of entries u32
//! for each entry: id 32 bytes, level u8, documents u64, bytes u64, length of the first _id u32, first _id
//! ```
//! The first `_id` is the BSON element with its type and name. A node of height h ends behind an entry whose level (zero
//! bits of the hash of its last `_id`) reaches `bits + 7 · (h + 1)`, or when it holds 512
//! entries or 1 MiB of them. So a change in one
//! document changes one node at each height, and two trees can be compared from the top, skipping equal ids.

use bytes::Bytes;
use mongo_core::{Error, Result, transfer::leading_id};
use serde::{Deserialize, Serialize};

use super::{
    pack::read_u32,
    segment::{Segment, SegmentId},
};

/// One child of a node: a segment of documents, or another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TreeEntry {
    pub(crate) id: SegmentId,
    pub(crate) level: u8,
    pub(crate) documents: u64,
    pub(crate) bytes: u64,
    pub(crate) first_id: Bytes,
}

impl TreeEntry {
    /// The entry of a segment that is stored under `id`.
    pub(crate) fn of(id: SegmentId, segment: Segment<'_>) -> Self {
        Self {
            id,
            level: segment.level,
            documents: u64::from(segment.documents),
            bytes: segment.plain.len() as u64,
            first_id: Bytes::copy_from_slice(leading_id(segment.plain).unwrap_or_default()),
        }
    }
}

/// Where a tree begins, and what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TreeRoot {
    /// The root node; none for an empty collection.
    pub(crate) node: Option<mongo_core::bson::Binary>,
    pub(crate) documents: i64,
    pub(crate) bytes: i64,
    pub(crate) segments: i64,
}

impl TreeRoot {
    pub(crate) fn node_id(&self) -> Result<Option<SegmentId>> {
        let Some(node) = &self.node else { return Ok(None) };
        let id = node.bytes.as_slice().try_into().map_err(|_| Error::corrupt("a tree's root has an id of the wrong size"))?;
        Ok(Some(SegmentId(id)))
    }
}

/// Builds a tree from its segments in order, handing out nodes as they are complete.
#[derive(Debug)]
pub(crate) struct TreeBuilder {
    bits: u8,
    /// The open node of each height.
    open: Vec<OpenNode>,
    documents: u64,
    bytes: u64,
    segments: u64,
}

#[derive(Debug, Default)]
struct OpenNode {
    entries: Vec<TreeEntry>,
    /// What they will take in the node.
    bytes: usize,
}

impl TreeBuilder {
    pub(crate) fn new(bits: u8) -> Self {
        Self { bits, open: Vec::new(), documents: 0, bytes: 0, segments: 0 }
    }

    /// Adds the next segment; `store` stores a node and gives its id.
    pub(crate) fn push(&mut self, entry: TreeEntry, store: &mut impl FnMut(Vec<u8>) -> Result<SegmentId>) -> Result<()> {
        self.documents += entry.documents;
        self.bytes += entry.bytes;
        self.segments += 1;
        self.add(0, entry, store)
    }

    /// Whether nothing is open up to a height, so that a whole node of that height can come next.
    pub(crate) fn is_aligned(&self, height: u8) -> bool {
        self.open.iter().take(usize::from(height) + 1).all(|node| node.entries.is_empty())
    }

    /// Adds a node of another tree with all that is below it. [`is_aligned`](Self::is_aligned) must say that it can come next; how many segments it holds the
    /// caller must know.
    pub(crate) fn push_node(
        &mut self,
        height: u8,
        entry: TreeEntry,
        store: &mut impl FnMut(Vec<u8>) -> Result<SegmentId>,
    ) -> Result<()> {
        self.documents += entry.documents;
        self.bytes += entry.bytes;
        for _ in self.open.len()..=usize::from(height) {
            self.open.push(OpenNode::default());
        }
        self.add(usize::from(height) + 1, entry, store)
    }

    fn add(&mut self, height: usize, entry: TreeEntry, store: &mut impl FnMut(Vec<u8>) -> Result<SegmentId>) -> Result<()> {
        if self.open.len() == height {
            self.open.push(OpenNode::default());
        }
        let threshold = usize::from(self.bits) + NODE_BITS * (height + 1);
        let ends = usize::from(entry.level) >= threshold;
        let node = &mut self.open[height];
        node.bytes += ENTRY + entry.first_id.len();
        node.entries.push(entry);
        // An `_id` can be as large as a document: nodes must stay small all the same.
        if ends || node.entries.len() == MAX_ENTRIES || node.bytes >= MAX_BYTES {
            let complete = std::mem::take(node);
            let parent = close(height, &complete.entries, store)?;
            self.add(height + 1, parent, store)?;
        }
        Ok(())
    }

    /// Closes every open node up to the root.
    pub(crate) fn finish(mut self, store: &mut impl FnMut(Vec<u8>) -> Result<SegmentId>) -> Result<TreeRoot> {
        let mut height = 0;
        let mut root = None;
        while height < self.open.len() {
            let node = std::mem::take(&mut self.open[height]).entries;
            let is_top = height + 1 == self.open.len();
            match (node.as_slice(), is_top) {
                ([], _) => {}
                // A single node needs no parent; the leaf height always makes one, so that a root is always a node.
                ([only], true) if height > 0 => root = Some(only.id),
                _ => {
                    let parent = close(height, &node, store)?;
                    if is_top {
                        root = Some(parent.id);
                    } else {
                        self.add(height + 1, parent, store)?;
                    }
                }
            }
            height += 1;
        }
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(TreeRoot {
            node: root.map(|id| mongo_core::bson::Binary {
                subtype: mongo_core::bson::spec::BinarySubtype::Generic,
                bytes: id.0.to_vec(),
            }),
            documents: number(self.documents),
            bytes: number(self.bytes),
            segments: number(self.segments),
        })
    }
}

fn close(height: usize, entries: &[TreeEntry], store: &mut impl FnMut(Vec<u8>) -> Result<SegmentId>) -> Result<TreeEntry> {
    let height = u8::try_from(height).map_err(|_| Error::internal("a tree of more than 255 heights"))?;
    let id = store(encode(height, entries))?;
    Ok(TreeEntry {
        id,
        level: entries.last().map_or(0, |entry| entry.level),
        documents: entries.iter().map(|entry| entry.documents).sum(),
        bytes: entries.iter().map(|entry| entry.bytes).sum(),
        first_id: entries.first().map(|entry| entry.first_id.clone()).unwrap_or_default(),
    })
}

fn encode(height: u8, entries: &[TreeEntry]) -> Vec<u8> {
    let mut node = Vec::with_capacity(5 + entries.len() * 80);
    node.push(height);
    node.extend_from_slice(&u32::try_from(entries.len()).unwrap_or(u32::MAX).to_le_bytes());
    for entry in entries {
        node.extend_from_slice(&entry.id.0);
        node.push(entry.level);
        node.extend_from_slice(&entry.documents.to_le_bytes());
        node.extend_from_slice(&entry.bytes.to_le_bytes());
        node.extend_from_slice(&u32::try_from(entry.first_id.len()).unwrap_or(u32::MAX).to_le_bytes());
        node.extend_from_slice(&entry.first_id);
    }
    node
}

/// Reads a node: its height and its entries.
pub(crate) fn decode(bytes: &Bytes) -> Result<(u8, Vec<TreeEntry>)> {
    let damaged = || Error::corrupt("a tree node is malformed");
    let (height, rest) = bytes.split_first().ok_or_else(damaged)?;
    let (count, rest) = rest.split_at_checked(4).ok_or_else(damaged)?;
    let count = read_u32(count) as usize;
    if count == 0 || count > MAX_ENTRIES {
        return Err(damaged());
    }
    let mut node = rest;
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let (fixed, rest) = node.split_first_chunk::<ENTRY>().ok_or_else(damaged)?;
        let number = |at: usize| fixed[at..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (first_id, rest) = rest.split_at_checked(read_u32(&fixed[49..]) as usize).ok_or_else(damaged)?;
        let mut id = [0; 32];
        id.copy_from_slice(&fixed[..32]);
        entries.push(TreeEntry {
            id: SegmentId(id),
            level: fixed[32],
            documents: number(33),
            bytes: number(41),
            // Shares the node's memory.
            first_id: bytes.slice_ref(first_id),
        });
        node = rest;
    }
    if node.is_empty() { Ok((*height, entries)) } else { Err(damaged()) }
}

const NODE_BITS: usize = 7;
const MAX_ENTRIES: usize = 512;
const MAX_BYTES: usize = 1 << 20;
/// An entry without its first `_id`.
const ENTRY: usize = 53;

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};

    use super::*;

    type Store = HashMap<SegmentId, Vec<u8>>;

    fn entry(number: u32, version: u8) -> TreeEntry {
        let hash = Sha256::digest(number.to_le_bytes());
        let level = u8::try_from(u64::from_le_bytes(*hash.first_chunk().unwrap()).trailing_zeros()).unwrap() + 4;
        let mut id: [u8; 32] = hash.into();
        id[31] = version;
        TreeEntry { id: SegmentId(id), level, documents: 3, bytes: 100, first_id: Bytes::copy_from_slice(&number.to_be_bytes()) }
    }

    fn build(entries: &[TreeEntry]) -> (TreeRoot, Store) {
        let mut nodes = Store::new();
        let mut store = |node: Vec<u8>| {
            let id = SegmentId(Sha256::digest(&node).into());
            nodes.insert(id, node);
            Ok(id)
        };
        let mut builder = TreeBuilder::new(4);
        for entry in entries {
            builder.push(entry.clone(), &mut store).unwrap();
        }
        let root = builder.finish(&mut store).unwrap();
        (root, nodes)
    }

    fn leaves(store: &Store, node: SegmentId, out: &mut Vec<TreeEntry>) {
        let (height, entries) = decode(&store[&node].clone().into()).unwrap();
        if height == 0 {
            out.extend(entries);
        } else {
            entries.iter().for_each(|entry| leaves(store, entry.id, out));
        }
    }

    #[test]
    fn a_tree_gives_back_its_segments_in_order() {
        for count in [0_u32, 1, 2, 511, 512, 513, 5000, 40_000] {
            let entries: Vec<_> = (0..count).map(|number| entry(number, 0)).collect();
            let (root, nodes) = build(&entries);
            assert_eq!(
                (root.segments, root.documents, root.bytes),
                (i64::from(count), i64::from(count) * 3, i64::from(count) * 100)
            );
            let mut read = Vec::new();
            if let Some(node) = root.node_id().unwrap() {
                leaves(&nodes, node, &mut read);
            }
            assert!(read == entries, "{count} entries");
        }
    }

    #[test]
    fn one_changed_segment_changes_one_node_at_each_height() {
        let mut entries: Vec<_> = (0..40_000).map(|number| entry(number, 0)).collect();
        let (_, before) = build(&entries);
        entries[12_345] = TreeEntry { level: entries[12_345].level, ..entry(12_345, 1) };
        let (_, after) = build(&entries);
        let known: HashSet<_> = before.keys().collect();
        let fresh = after.keys().filter(|id| !known.contains(id)).count();
        assert!(fresh <= 3, "{fresh} new nodes of {}", after.len());
    }

    proptest! {
        #[test]
        fn noise_is_no_panic(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&noise.into());
        }
    }
}
