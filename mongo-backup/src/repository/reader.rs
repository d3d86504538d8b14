//! Reading segments back, each checked against its name.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use bytes::Bytes;
use mongo_core::{Error, Result};

use super::{
    Repository,
    index::Location,
    pack::{Encoding, PackId},
    segment::{Content, SegmentId},
    tree::{self, TreeEntry, TreeRoot},
};

impl Repository {
    /// Reads some segments, in the order asked for. Neighbours in a pack are read in one go.
    pub(crate) async fn read_segments(&self, content: Content, ids: &[SegmentId]) -> Result<Vec<Bytes>> {
        let mut by_pack: BTreeMap<PackId, Vec<(usize, Location)>> = BTreeMap::new();
        for (position, id) in ids.iter().enumerate() {
            let location = self.locate(*id)?;
            by_pack.entry(location.pack).or_default().push((position, location));
        }
        let mut plain = vec![Bytes::new(); ids.len()];
        for (pack, mut wanted) in by_pack {
            let object = pack.object()?;
            wanted.sort_unstable_by_key(|(_, location)| location.entry.offset);
            for run in runs(&wanted) {
                // The end is that of whichever reaches furthest: a damaged index can let segments overlap.
                let ends = wanted[run.clone()]
                    .iter()
                    .map(|(_, location)| u64::from(location.entry.offset) + u64::from(location.entry.stored));
                let (start, end) = (u64::from(wanted[run.start].1.entry.offset), ends.max().unwrap_or(0));
                let stored = self.archive().get(&object, Some(start..end)).await.map_err(|error| match error.kind() {
                    mongo_core::ErrorKind::NotFound => {
                        Error::corrupt("a pack is missing from the archive").with_context("object", &object).with_source(error)
                    }
                    _ => error,
                })?;
                let locations: Vec<(usize, Location)> = wanted[run].to_vec();
                let this = self.clone();
                // Decompressing and hashing are work for a blocking thread, not for the runtime's.
                let decoded = tokio::task::spawn_blocking(move || {
                    let mut decompressor = Decompressor::new()?;
                    locations
                        .into_iter()
                        .map(|(position, location)| {
                            let at = usize::try_from(u64::from(location.entry.offset) - start).unwrap_or(usize::MAX);
                            let bytes = stored.slice(at..at + location.entry.stored as usize);
                            Ok((position, this.decode(&mut decompressor, content, location, &bytes)?))
                        })
                        .collect::<Result<Vec<_>>>()
                })
                .await??;
                for (position, bytes) in decoded {
                    plain[position] = bytes;
                }
            }
        }
        Ok(plain)
    }

    /// Decompresses a stored segment and checks that it is the one it is named as.
    pub(crate) fn decode(
        &self,
        decompressor: &mut Decompressor,
        content: Content,
        location: Location,
        stored: &Bytes,
    ) -> Result<Bytes> {
        let damaged = |what: &'static str| -> Error {
            let error = Error::corrupt(what);
            match location.pack.object() {
                Ok(object) => error.with_context("object", object).with_context("offset", location.entry.offset),
                Err(_) => error,
            }
        };
        let plain = match location.entry.encoding {
            Encoding::Plain => stored.clone(),
            Encoding::Zstd => decompressor
                .decompress(stored, location.entry.plain as usize)
                .map_err(|error| damaged("a segment cannot be decompressed: the pack is damaged").with_source(error))?
                .into(),
        };
        if SegmentId::of(&self.config().keys, content, &plain) != location.entry.id {
            return Err(damaged("a segment is not what was stored: the pack is damaged"));
        }
        Ok(plain)
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
        let (matches, length) = tokio::task::spawn_blocking(move || (id.matches(&bytes), bytes.len() as u64)).await?;
        if matches {
            Ok(length)
        } else {
            Err(Error::corrupt("the pack is damaged: its bytes do not have the SHA-256 that is its name")
                .with_context("object", object))
        }
    }

    /// Where a segment lies.
    pub(crate) fn locate(&self, id: SegmentId) -> Result<Location> {
        self.index().get(id).ok_or_else(|| {
            let error = Error::corrupt(
                "a segment that the snapshot needs is not in the archive: an index or a pack was lost or truncated",
            );
            match self.unusable_packs().as_slice() {
                [] => error.with_context("segment", format!("{id:?}")),
                packs => error.with_context("missing or truncated", packs.join(" ")),
            }
        })
    }

    /// A walk over the segments of a tree, in order.
    pub(crate) fn walk(&self, root: &TreeRoot) -> Result<TreeWalk> {
        let pending = root.node_id()?.into_iter().map(Pending::Node).collect();
        Ok(TreeWalk { repository: self.clone(), pending, nodes: Vec::new() })
    }
}

/// Gives the leaf entries of a tree one after the other, reading one node at a time.
#[derive(Debug)]
pub(crate) struct TreeWalk {
    repository: Repository,
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
                    let node = self.repository.read_segments(Content::Node, &[id]).await?;
                    let (height, entries) = tree::decode(node.first().map(|bytes| &bytes[..]).unwrap_or_default())?;
                    self.nodes.push(id);
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

/// Runs of neighbours worth one read: a small gap is cheaper to read than another request. Repeated segments share a run.
fn runs(sorted: &[(usize, Location)]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut end = 0_u64;
    for (position, (_, location)) in sorted.iter().enumerate() {
        let entry = &location.entry;
        match runs.last_mut() {
            Some(run) if u64::from(entry.offset) <= end + GAP => run.end = position + 1,
            _ => runs.push(position..position + 1),
        }
        end = end.max(u64::from(entry.offset) + u64::from(entry.stored));
    }
    runs
}

/// A zstd context for reading.
pub(crate) struct Decompressor(zstd::bulk::Decompressor<'static>);

impl Decompressor {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(zstd::bulk::Decompressor::new().map_err(|error| Error::internal("zstd failed").with_source(error))?))
    }

    fn decompress(&mut self, stored: &[u8], plain: usize) -> std::io::Result<Vec<u8>> {
        // The length comes from the archive: a document has at most 16 MiB and a little, so a segment has no more than this.
        if plain > LARGEST_SEGMENT {
            return Err(std::io::Error::other("the segment claims to be larger than any segment is"));
        }
        self.0.decompress(stored, plain)
    }
}

const GAP: u64 = 64 << 10;
const LARGEST_SEGMENT: usize = 64 << 20;
