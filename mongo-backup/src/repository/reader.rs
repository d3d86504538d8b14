//! Reading segments back, each checked against its name.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use mongo_core::{Error, ErrorKind, Result, transfer::partition::Key};

use super::{
    Repository,
    block::Decompressor,
    index::Location,
    pack::PackId,
    segment::{Content, SegmentId},
    tree::{self, TreeEntry, TreeRoot},
};
use crate::restore::IdRange;

impl Repository {
    /// Reads some segments, in the order asked for. Neighbours in a pack are read in one go, and each block once.
    pub(crate) async fn read_segments(&self, content: Content, ids: &[SegmentId]) -> Result<Vec<Bytes>> {
        match self.try_read_segments(content, ids).await? {
            Ok(segments) => Ok(segments),
            // A prune may have moved its segments into another pack since the index was read.
            Err(missing) => {
                self.reload_index().await?;
                self.try_read_segments(content, ids).await?.map_err(|_| missing)
            }
        }
    }

    /// Reads a node of a tree: its height and its entries.
    pub(crate) async fn read_node(&self, node: SegmentId) -> Result<(u8, Vec<TreeEntry>)> {
        tree::decode(&self.read_segments(Content::Node, &[node]).await?.pop().unwrap_or_default())
    }

    /// The inner error is that something is not where the index says, or not in the index.
    async fn try_read_segments(&self, content: Content, ids: &[SegmentId]) -> Result<Result<Vec<Bytes>>> {
        let mut by_pack: BTreeMap<PackId, Vec<(usize, Location)>> = BTreeMap::new();
        for (position, id) in ids.iter().enumerate() {
            let location = match self.locate(*id) {
                Ok(location) => location,
                Err(missing) => return Ok(Err(missing)),
            };
            by_pack.entry(location.pack).or_default().push((position, location));
        }
        let mut reading = Vec::new();
        for (pack, mut wanted) in by_pack {
            wanted.sort_unstable_by_key(|(_, location)| (location.block.offset, location.offset));
            for run in runs(&wanted) {
                reading.push(self.read_run(content, pack, wanted[run].to_vec()));
            }
        }
        let mut plain = vec![Bytes::new(); ids.len()];
        let mut reading = stream::iter(reading).buffer_unordered(RUNS_AT_ONCE);
        while let Some(run) = reading.next().await {
            match run? {
                Ok(segments) => segments.into_iter().for_each(|(position, bytes)| plain[position] = bytes),
                Err(missing) => return Ok(Err(missing)),
            }
        }
        Ok(Ok(plain))
    }

    /// Reads segments that are neighbours in a pack. The inner error is that the pack is not there.
    async fn read_run(
        &self,
        content: Content,
        pack: PackId,
        wanted: Vec<(usize, Location)>,
    ) -> Result<Result<Vec<(usize, Bytes)>>> {
        let object = pack.object()?;
        // The end is that of whichever reaches furthest: a damaged index can let blocks overlap.
        let start = wanted.iter().map(|(_, location)| u64::from(location.block.offset)).min().unwrap_or(0);
        let end = wanted.iter().map(|(_, location)| location.block.end()).max().unwrap_or(0);
        let stored = match self.archive().get(&object, Some(start..end)).await {
            Ok(stored) => stored,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let missing = Error::corrupt("a pack is missing from the archive").with_context("object", &object);
                return Ok(Err(missing.with_source(error)));
            }
            Err(error) => return Err(error),
        };
        let this = self.clone();
        let blocks = wanted.chunk_by(|(_, a), (_, b)| a.block == b.block).filter_map(<[_]>::first);
        // What comes of a block says how long it takes: few bytes can become very many.
        if blocks.map(|(_, location)| u64::from(location.block.plain)).sum::<u64>() <= WORTH_A_THREAD {
            return this.decode_run(content, &wanted, start, &stored).map(Ok);
        }
        // Decompressing and hashing are work for a blocking thread, not for the runtime's.
        tokio::task::spawn_blocking(move || this.decode_run(content, &wanted, start, &stored)).await?.map(Ok)
    }

    /// The segments of a run of blocks, of which `stored` holds the bytes from `start` on.
    fn decode_run(
        &self,
        content: Content,
        sorted: &[(usize, Location)],
        start: u64,
        stored: &Bytes,
    ) -> Result<Vec<(usize, Bytes)>> {
        let mut decompressor = Decompressor::new()?;
        let mut decoded = Vec::with_capacity(sorted.len());
        for same_block in sorted.chunk_by(|(_, a), (_, b)| a.block == b.block) {
            let Some((_, first)) = same_block.first() else { continue };
            let at = usize::try_from(u64::from(first.block.offset) - start).unwrap_or(usize::MAX);
            let block = self.decode_block(&mut decompressor, first, &stored.slice(at..at + first.block.stored as usize))?;
            let wanted: usize = same_block.iter().map(|(_, location)| location.length as usize).sum();
            for (position, location) in same_block {
                let segment = self.segment_of(content, location, &block)?;
                // A slice keeps the whole block in memory: worth it only where most of it is wanted.
                let segment = if wanted * 2 < block.len() { Bytes::copy_from_slice(&segment) } else { segment };
                decoded.push((*position, segment));
            }
        }
        Ok(decoded)
    }

    /// The plain bytes of the block in which a segment lies.
    pub(crate) fn decode_block(&self, decompressor: &mut Decompressor, location: &Location, stored: &Bytes) -> Result<Bytes> {
        let config = self.config();
        decompressor
            .open(&location.block, stored, config.cipher.as_ref())
            .map_err(|error| damaged("a block cannot be decompressed: the pack is damaged", location).with_source(error))
    }

    /// Takes a segment out of its block's plain bytes and checks that it is the one it is named as.
    pub(crate) fn segment_of(&self, content: Content, location: &Location, block: &Bytes) -> Result<Bytes> {
        let wrong = || damaged("a segment is not what was stored: the pack is damaged", location);
        let end = location.offset.checked_add(location.length).filter(|end| *end as usize <= block.len()).ok_or_else(wrong)?;
        let segment = block.slice(location.offset as usize..end as usize);
        if SegmentId::of(&self.config().keys, content, &segment) == location.id { Ok(segment) } else { Err(wrong()) }
    }

    /// The packs in which a tree's nodes and segments lie.
    pub(crate) async fn packs_of(&self, root: &TreeRoot) -> Result<BTreeSet<PackId>> {
        let mut packs = BTreeSet::new();
        let mut walk = self.walk(root)?;
        loop {
            let entry = walk.next().await?;
            for node in walk.take_nodes() {
                packs.insert(self.locate(node)?.pack);
            }
            let Some(entry) = entry else { return Ok(packs) };
            packs.insert(self.locate(entry.id)?.pack);
        }
    }

    /// Reads a pack whole and checks that its bytes are those that it is named after; gives their number.
    pub(crate) async fn check_pack(&self, id: PackId) -> Result<u64> {
        let object = id.object()?;
        let bytes = self.archive().get(&object, None).await?;
        let checked = tokio::task::spawn_blocking(move || id.check(&bytes).map(|()| bytes.len() as u64)).await?;
        checked.map_err(|error| error.with_context("object", object))
    }

    /// Where a segment lies.
    pub(crate) fn locate(&self, id: SegmentId) -> Result<Location> {
        self.index().get(id).ok_or_else(|| self.lost(id))
    }

    /// What there is to say of a segment that is not in the index.
    pub(crate) fn lost(&self, id: SegmentId) -> Error {
        let error =
            Error::corrupt("a segment that the snapshot needs is not in the archive: an index or a pack was lost or truncated");
        match self.unusable_packs().as_slice() {
            [] => error.with_context("segment", format!("{id:?}")),
            packs => error.with_context("missing or truncated", packs.join(" ")),
        }
    }

    /// A walk over the segments of a tree, in order.
    pub(crate) fn walk(&self, root: &TreeRoot) -> Result<TreeWalk> {
        self.walk_range(root, None)
    }

    /// A walk over the segments that can hold documents of a range, in order. The collection must have been read by its `_id`s.
    pub(crate) fn walk_range(&self, root: &TreeRoot, range: Option<&IdRange>) -> Result<TreeWalk> {
        let pending = root.node_id()?.into_iter().map(Pending::Node).collect();
        Ok(TreeWalk { repository: self.clone(), range: range.cloned(), pending, nodes: Vec::new() })
    }
}

/// Gives the leaf entries of a tree one after the other, reading one node at a time.
#[derive(Debug)]
pub(crate) struct TreeWalk {
    repository: Repository,
    range: Option<IdRange>,
    /// What is left to visit, last first.
    pending: Vec<Pending>,
    nodes: Vec<SegmentId>,
}

#[derive(Debug)]
enum Pending {
    Node(SegmentId),
    Segment(TreeEntry),
}

impl TreeWalk {
    pub(crate) async fn next(&mut self) -> Result<Option<TreeEntry>> {
        loop {
            match self.pending.pop() {
                None => return Ok(None),
                Some(Pending::Segment(entry)) => return Ok(Some(entry)),
                Some(Pending::Node(id)) => {
                    let (height, entries) = self.repository.read_node(id).await?;
                    self.nodes.push(id);
                    let entries = match &self.range {
                        Some(range) => within(entries, range)?,
                        None => entries,
                    };
                    let children = entries.into_iter().rev();
                    if height == 0 {
                        self.pending.extend(children.map(Pending::Segment));
                    } else {
                        self.pending.extend(children.map(|entry| Pending::Node(entry.id)));
                    }
                }
            }
        }
    }

    /// The nodes visited since the last call.
    pub(crate) fn take_nodes(&mut self) -> Vec<SegmentId> {
        std::mem::take(&mut self.nodes)
    }
}

/// The entries of a node that can hold documents of a range. Where a part begins, the one before it has ended.
fn within(entries: Vec<TreeEntry>, range: &IdRange) -> Result<Vec<TreeEntry>> {
    let firsts: Vec<Key> = entries.iter().map(|entry| Key::of_element(&entry.first_id)).collect::<Result<_>>()?;
    let may_hold = |position: usize| firsts.get(position).is_none_or(|first| range.may_hold(first, firsts.get(position + 1)));
    Ok(entries.into_iter().enumerate().filter(|(position, _)| may_hold(*position)).map(|(_, entry)| entry).collect())
}

fn damaged(what: &'static str, location: &Location) -> Error {
    let error = Error::corrupt(what);
    match location.pack.object() {
        Ok(object) => error.with_context("object", object).with_context("offset", location.block.offset),
        Err(_) => error,
    }
}

/// Runs of neighbours worth one read: a small gap is cheaper to read than another request. Segments of a block share a run.
fn runs(sorted: &[(usize, Location)]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut end = 0_u64;
    for (position, (_, location)) in sorted.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if u64::from(location.block.offset) <= end + GAP => run.end = position + 1,
            _ => runs.push(position..position + 1),
        }
        end = end.max(location.block.end());
    }
    runs
}

const GAP: u64 = 64 << 10;
const RUNS_AT_ONCE: usize = 4;
/// What takes longer than to wake a thread up.
const WORTH_A_THREAD: u64 = 192 << 10;
