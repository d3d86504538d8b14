//! What snapshots need, as one bit for each row of the index.

use std::sync::Arc;

use mongo_core::Result;

use super::{Usage, Usages};
use crate::repository::{
    Repository,
    index::{Index, Location},
    manifest::SnapshotManifest,
    segment::{Content, SegmentId},
    tree::{self, TreeRoot},
};

/// Marks of what is needed. A segment that lies in several packs is marked at its first row.
#[derive(Debug)]
pub(super) struct Live {
    repository: Repository,
    index: Arc<Index>,
    needed: Bits,
    nodes: Bits,
}

impl Live {
    pub(super) fn new(repository: Repository, index: Arc<Index>) -> Self {
        let rows = index.len();
        Self { repository, index, needed: Bits::new(rows), nodes: Bits::new(rows) }
    }

    pub(super) fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Marks everything that a snapshot needs. What it shares with those before is not walked again.
    pub(super) async fn mark(&mut self, snapshot: &SnapshotManifest) -> Result<()> {
        self.mark_tree(&snapshot.catalog).await?;
        for namespace in self.repository.namespaces(snapshot).await? {
            self.mark_tree(&namespace.root).await?;
        }
        Ok(())
    }

    async fn mark_tree(&mut self, root: &TreeRoot) -> Result<()> {
        let mut pending: Vec<SegmentId> = root.node_id()?.into_iter().collect();
        while !pending.is_empty() {
            let batch = pending.split_off(pending.len().saturating_sub(NODES_AT_ONCE));
            let mut fresh = Vec::with_capacity(batch.len());
            for id in batch {
                // A node that is lost hides what lies below it: without it nothing can be told.
                let rows = self.index.rows_of(id);
                if rows.is_empty() {
                    return Err(self.repository.lost(id));
                }
                let row = rows.start;
                self.nodes.set(row);
                if self.needed.set(row) {
                    fresh.push(id);
                }
            }
            for node in self.repository.read_segments(Content::Node, &fresh).await? {
                let (height, entries) = tree::decode(&node)?;
                if height > 0 {
                    pending.extend(entries.iter().map(|entry| entry.id));
                    continue;
                }
                for entry in entries {
                    let rows = self.index.rows_of(entry.id);
                    // A segment that is lost already needs nothing any more.
                    if !rows.is_empty() {
                        self.needed.set(rows.start);
                    }
                }
            }
        }
        Ok(())
    }

    /// The segments that are needed, each with what it holds and all places where it lies, the preferred one first.
    pub(super) fn needed(&self) -> impl Iterator<Item = (SegmentId, Content, Vec<Location>)> + '_ {
        (0..self.index.len()).filter(|row| self.needed.get(*row)).filter_map(|row| {
            let id = self.index.location(row)?.id;
            let content = if self.nodes.get(row) { Content::Node } else { Content::Documents };
            Some((id, content, self.index.rows_of(id).filter_map(|row| self.index.location(row)).collect()))
        })
    }

    pub(super) fn usage(&self) -> Usages {
        let mut usages = Usages::new();
        for row in 0..self.index.len() {
            let Some(location) = self.index.location(row) else { continue };
            let usage: &mut Usage = usages.entry(location.pack).or_default();
            usage.held += u64::from(location.length);
            if self.needed.get(row) {
                usage.used += u64::from(location.length);
            }
        }
        usages
    }
}

#[derive(Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: usize) -> Self {
        Self(vec![0; count.div_ceil(64)])
    }

    /// Sets a bit. False if it was set already.
    fn set(&mut self, position: usize) -> bool {
        let Some(word) = self.0.get_mut(position / 64) else { return false };
        let bit = 1 << (position % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    fn get(&self, position: usize) -> bool {
        self.0.get(position / 64).is_some_and(|word| word & (1 << (position % 64)) != 0)
    }
}

const NODES_AT_ONCE: usize = 64;
