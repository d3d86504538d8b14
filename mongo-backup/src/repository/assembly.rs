//! From documents to a collection's tree: cut into segments, stored, and put together from ranges that were read side by side.

use std::{collections::BTreeMap, sync::Arc};

use mongo_core::{
    Error, Namespace, Result,
    bson::RawDocument,
    transfer::{leading_id, scan::ScanBatch},
    transform::{Transform, Transformed},
};

use super::{
    block::OpenBlock,
    config::Config,
    documents_of,
    manifest::SnapshotNamespace,
    segment::{Content, Segment, Segmenter},
    store::{BlockWriter, SegmentStore},
    tree::{TreeBuilder, TreeEntry, TreeRoot},
};

/// Cuts the documents of a range into segments and stores them.
///
/// A range does not begin where a segment begins. Its documents up to the first anchor are kept as they are, its *head*: they
/// belong to the segment that is open at the end of the range before. So the segments of a collection are the
/// same wherever its ranges happen to begin.
pub(crate) struct Cutter {
    pub(crate) blocks: BlockWriter,
    segmenter: Segmenter,
    head: Head,
    entries: Vec<TreeEntry>,
}

/// Changes the documents of a collection on their way.
#[derive(Clone, Debug)]
pub(crate) struct Changing {
    pub(crate) transform: Arc<dyn Transform>,
    pub(crate) namespace: Namespace,
}

impl Changing {
    /// Gives what becomes of a document to `take`.
    pub(crate) fn change(&self, document: &RawDocument, mut take: impl FnMut(&RawDocument) -> Result<()>) -> Result<()> {
        let failed = |error: Error| error.wrap("a document could not be changed").with_context("namespace", &self.namespace);
        let changed = match self.transform.apply(&self.namespace, document).map_err(failed)? {
            Transformed::Keep => return take(document),
            Transformed::Drop => return Ok(()),
            Transformed::Replace(changed) => vec![changed],
            Transformed::Split(changed) => changed,
            _ => return Err(Error::internal("a document became something that is not known here")),
        };
        let changes_ids = self.transform.changes_ids(&self.namespace);
        for changed in changed {
            let id = leading_id(changed.as_bytes());
            if id.is_none() || (!changes_ids && id != leading_id(document.as_bytes())) {
                return Err(failed(Error::invalid("a transform must leave documents their _id, or say that it changes _ids")));
            }
            take(&changed)?;
        }
        Ok(())
    }
}

/// What a range begins with.
pub(crate) enum Head {
    /// No anchor has come yet: the documents so far, back to back.
    Open(Vec<u8>),
    /// The head is complete: it ends with an anchor.
    Complete(Vec<u8>),
    /// There is no head: the range began with a segment, or its head got too long to keep.
    Passed,
}

impl Cutter {
    pub(crate) fn new(store: Arc<SegmentStore>, segmenter: Segmenter, head: Head) -> Self {
        Self { blocks: BlockWriter::new(store), segmenter, head, entries: Vec::new() }
    }

    pub(crate) fn take(&mut self, batch: &ScanBatch, changed_by: Option<&Changing>) -> Result<(u64, u64)> {
        let (mut documents, mut bytes) = (0, 0);
        for document in batch.documents()? {
            let document = document?;
            documents += 1;
            bytes += document.as_bytes().len() as u64;
            match changed_by {
                None => self.push(document)?,
                Some(changing) => changing.change(document, |document| self.push(document))?,
            }
        }
        Ok((documents, bytes))
    }

    fn push(&mut self, document: &RawDocument) -> Result<()> {
        let hash = self.segmenter.hasher().hash(document);
        if let Head::Open(head) = &mut self.head {
            head.extend_from_slice(document.as_bytes());
            if self.segmenter.is_anchor(hash) {
                self.head = Head::Complete(std::mem::take(head));
            } else if head.len() > LONGEST_HEAD {
                // Only where documents are large: one in so many is an anchor. It costs that this place is cut by chance.
                let head = std::mem::take(head);
                self.head = Head::Passed;
                for document in documents_of(&head) {
                    self.cut(document?)?;
                }
            }
            return Ok(());
        }
        self.cut(document)
    }

    fn cut(&mut self, document: &RawDocument) -> Result<()> {
        let hash = self.segmenter.hasher().hash(document);
        let Self { blocks, segmenter, entries, .. } = self;
        segmenter.push(document.as_bytes(), hash, &mut |segment| {
            entries.push(store_segment(blocks, segment)?);
            Ok(())
        })
    }

    fn close(&mut self) -> Result<()> {
        let Self { blocks, segmenter, entries, .. } = self;
        segmenter.finish(&mut |segment| {
            entries.push(store_segment(blocks, segment)?);
            Ok(())
        })
    }
}

fn store_segment(blocks: &mut BlockWriter, segment: Segment<'_>) -> Result<TreeEntry> {
    Ok(TreeEntry::of(blocks.put(Content::Documents, segment.plain)?, segment))
}

/// A collection's tree, put together from its ranges in order.
pub(crate) struct Assembly {
    bits: u8,
    ranges: usize,
    next: usize,
    /// Ranges that were read before their turn.
    early: BTreeMap<usize, Cutter>,
    /// Cuts on where the last range in order ended.
    cutter: Cutter,
    tree: Tree,
}

/// A tree that grows from an older one: what has not changed is taken over, the rest is cut anew.
pub(crate) struct Regrowth {
    cutter: Cutter,
    tree: Tree,
    /// Segments below nodes that were taken over whole.
    below_nodes: i64,
    /// Other segments that were taken over.
    alone: i64,
}

impl Regrowth {
    pub(crate) fn new(store: Arc<SegmentStore>, segmenter: Segmenter, bits: u8) -> Self {
        let tree = Tree::new(Arc::clone(&store), bits);
        let blocks = BlockWriter::leaving_full_blocks(store);
        let cutter = Cutter { blocks, segmenter, head: Head::Passed, entries: Vec::new() };
        Self { cutter, tree, below_nodes: 0, alone: 0 }
    }

    /// Whether a segment of the older tree can come next as it is.
    pub(crate) fn takes_segments(&self) -> bool {
        self.cutter.segmenter.is_empty()
    }

    /// Whether a node of the older tree can come next as it is.
    pub(crate) fn takes_nodes(&self, height: u8) -> bool {
        self.takes_segments() && self.tree.builder.is_aligned(height)
    }

    pub(crate) fn take_over_segment(&mut self, entry: TreeEntry) -> Result<()> {
        self.alone += 1;
        self.tree.push(entry)
    }

    pub(crate) fn take_over_node(&mut self, height: u8, entry: TreeEntry) -> Result<()> {
        let Tree { builder, nodes } = &mut self.tree;
        builder.push_node(height, entry, &mut |node| nodes.put(Content::Node, &node))
    }

    /// Cuts documents, which stand back to back, and counts them.
    pub(crate) fn cut(&mut self, documents: &[u8]) -> Result<u64> {
        let count = self.cutter.cut_all(documents)?;
        self.cutter.entries.drain(..).try_for_each(|entry| self.tree.push(entry))?;
        Ok(count)
    }

    /// What is to be compressed by somebody else: to be called after every cut.
    pub(crate) fn take_full(&mut self) -> Vec<OpenBlock> {
        self.cutter.blocks.take_full()
    }

    /// Where its segments go.
    pub(crate) fn store(&self) -> &Arc<SegmentStore> {
        self.cutter.blocks.store()
    }

    /// Says how many segments stand below nodes that were taken over.
    pub(crate) fn count_taken_over(&mut self, segments: i64) {
        self.below_nodes = segments;
    }

    /// Completes the tree. Gives also how many segments were taken over.
    pub(crate) fn finish(self) -> Result<(TreeRoot, u64)> {
        let Self { mut cutter, mut tree, below_nodes, alone } = self;
        cutter.close()?;
        cutter.blocks.flush()?;
        tree.add(std::mem::take(&mut cutter.entries))?;
        let root = tree.finish()?;
        let root = TreeRoot { segments: root.segments + below_nodes, ..root };
        Ok((root, u64::try_from(below_nodes + alone).unwrap_or(0)))
    }
}

/// A tree and where its nodes go.
struct Tree {
    builder: TreeBuilder,
    nodes: BlockWriter,
}

impl Tree {
    fn new(store: Arc<SegmentStore>, bits: u8) -> Self {
        Self { builder: TreeBuilder::new(bits), nodes: BlockWriter::new(store) }
    }

    fn add(&mut self, entries: Vec<TreeEntry>) -> Result<()> {
        entries.into_iter().try_for_each(|entry| self.push(entry))
    }

    fn push(&mut self, entry: TreeEntry) -> Result<()> {
        let Self { builder, nodes } = self;
        builder.push(entry, &mut |node| nodes.put(Content::Node, &node))
    }

    fn finish(self) -> Result<TreeRoot> {
        let Self { builder, mut nodes } = self;
        let root = builder.finish(&mut |node| nodes.put(Content::Node, &node))?;
        nodes.flush()?;
        Ok(root)
    }
}

impl Assembly {
    pub(crate) fn new(store: Arc<SegmentStore>, segmenter: Segmenter, bits: u8) -> Self {
        let tree = Tree::new(Arc::clone(&store), bits);
        let cutter = Cutter::new(store, segmenter, Head::Passed);
        Self { bits, ranges: 0, next: 0, early: BTreeMap::new(), cutter, tree }
    }

    pub(crate) fn push(&mut self, document: &RawDocument) -> Result<()> {
        self.cutter.push(document)
    }

    /// Takes a range, and joins every range whose turn has come.
    pub(crate) async fn accept(&mut self, range: usize, cutter: Cutter) -> Result<()> {
        self.early.insert(range, cutter);
        while let Some(range) = self.early.remove(&self.next) {
            self.next += 1;
            // Joining hashes and compresses.
            let mut open = std::mem::replace(&mut self.cutter, placeholder(&range));
            let store = Arc::clone(open.blocks.store());
            let (open, range) = tokio::task::spawn_blocking(move || open.join(range).map(|range| (open, range))).await??;
            store.send_full().await?;
            let (mut finished, current) = match range {
                Some(range) => (open, range),
                None => {
                    self.cutter = open;
                    continue;
                }
            };
            self.cutter = current;
            self.add(std::mem::take(&mut finished.entries)).await?;
        }
        Ok(())
    }

    async fn add(&mut self, entries: Vec<TreeEntry>) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let empty = Tree::new(Arc::clone(self.tree.nodes.store()), self.bits);
        let mut tree = std::mem::replace(&mut self.tree, empty);
        self.tree = tokio::task::spawn_blocking(move || tree.add(entries).map(|()| tree)).await??;
        Ok(())
    }

    /// Says how many ranges there will be.
    pub(crate) fn expect(&mut self, ranges: usize) {
        self.ranges = ranges;
    }

    pub(crate) fn bits(&self) -> u8 {
        self.bits
    }

    /// Whether every range has been joined.
    pub(crate) fn is_complete(&self) -> bool {
        self.next == self.ranges
    }

    /// Completes the tree.
    pub(crate) async fn finish(self) -> Result<TreeRoot> {
        if !self.is_complete() {
            return Err(Error::internal("a range of a collection was not read"));
        }
        let Self { mut cutter, mut tree, .. } = self;
        tokio::task::spawn_blocking(move || {
            cutter.close()?;
            cutter.blocks.flush()?;
            tree.add(std::mem::take(&mut cutter.entries))?;
            tree.finish()
        })
        .await?
    }
}

impl Cutter {
    /// Goes on with the head of the next range. Gives the range back if it had an anchor, which closes what is open here;
    /// otherwise the whole range was head and is part of this one now.
    fn join(&mut self, mut range: Self) -> Result<Option<Self>> {
        match std::mem::replace(&mut range.head, Head::Passed) {
            Head::Open(head) => {
                self.cut_all(&head)?;
                Ok(None)
            }
            Head::Complete(head) => {
                self.cut_all(&head)?;
                if !self.segmenter.is_empty() {
                    return Err(Error::internal("an anchor did not end a segment"));
                }
                self.blocks.flush()?;
                Ok(Some(range))
            }
            Head::Passed => {
                self.close()?;
                self.blocks.flush()?;
                Ok(Some(range))
            }
        }
    }

    fn cut_all(&mut self, documents: &[u8]) -> Result<u64> {
        let mut count = 0;
        for document in documents_of(documents) {
            self.cut(document?)?;
            count += 1;
        }
        Ok(count)
    }
}

/// Holds an assembly's place while its cutter is away on a blocking thread.
fn placeholder(like: &Cutter) -> Cutter {
    Cutter::new(Arc::clone(like.blocks.store()), like.segmenter.emptied(), Head::Passed)
}

/// Stores the records of all namespaces as if they were one more collection.
pub(crate) async fn store_catalog(
    store: &Arc<SegmentStore>,
    config: &Config,
    mut namespaces: impl Iterator<Item = SnapshotNamespace>,
) -> Result<TreeRoot> {
    let bits = config.cutting.boundary_bits(1024);
    let mut assembly = Assembly::new(Arc::clone(store), Segmenter::new(&config.keys, config.cutting, bits), bits);
    loop {
        let some: Vec<SnapshotNamespace> = namespaces.by_ref().take(RECORDS_AT_ONCE).collect();
        if some.is_empty() {
            return assembly.finish().await;
        }
        assembly = tokio::task::spawn_blocking(move || {
            for namespace in some {
                assembly.push(&namespace.to_document()?)?;
            }
            Ok::<_, Error>(assembly)
        })
        .await??;
        store.send_full().await?;
    }
}

const RECORDS_AT_ONCE: usize = 1000;
const LONGEST_HEAD: usize = 8 << 20;
