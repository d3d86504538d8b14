//! Reading every selected collection, in ranges side by side, into segments and trees.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use mongo_core::{
    CancellationToken, Deployment, Error, ErrorKind, Namespace, Result, RetryBudget, RetryPolicy,
    bson::{RawDocument, Timestamp},
    mongodb::options::SelectionCriteria,
    progress::PhaseMeter,
    transfer::{
        catalog::{Catalog, CollectionEntry},
        partition::{KeyRange, ScanOrder, partition},
        scan::{MemoryBudget, ScanBatch, ScanSource},
    },
};
use tokio::task::JoinSet;

use super::BackupSettings;
use crate::{
    metrics::BackupMetrics,
    repository::{
        config::Config,
        manifest::SnapshotNamespace,
        segment::{Content, Segment, Segmenter, is_anchor},
        store::{BlockWriter, SegmentStore},
        tree::{TreeBuilder, TreeEntry, TreeRoot},
    },
};

/// What the workers share.
pub(super) struct Context<'a> {
    pub(super) deployment: &'a Deployment,
    pub(super) config: Arc<Config>,
    pub(super) store: Arc<SegmentStore>,
    pub(super) settings: &'a BackupSettings,
    pub(super) from: Option<&'a SelectionCriteria>,
    pub(super) at: Option<Timestamp>,
    /// How finely the newest snapshot cuts each collection: cutting alike is what lets snapshots share segments.
    pub(super) known_bits: HashMap<Namespace, u8>,
    pub(super) meter: Arc<PhaseMeter>,
    pub(super) metrics: BackupMetrics,
    pub(super) stop: CancellationToken,
    pub(super) retry: RetryPolicy,
    pub(super) retry_budget: RetryBudget,
}

/// Everything that goes into a manifest.
pub(super) struct Collected {
    pub(super) namespaces: Vec<SnapshotNamespace>,
    pub(super) catalog: TreeRoot,
    /// Namespaces that were not read at the cluster time, and why.
    pub(super) exceptions: BTreeMap<String, String>,
}

/// Reads all collections of the catalog. Ranges are started in order, so a collection's ranges are under way together
/// and its tree grows from the left while it is read.
pub(super) async fn collect(
    context: Context<'_>,
    catalog: &Catalog,
    estimates: &BTreeMap<Namespace, (u64, u64)>,
) -> Result<Collected> {
    let budget = MemoryBudget::new(context.settings.memory_bytes);
    let mut exceptions = BTreeMap::new();
    // Collections that are being read, and the trees of those that are through.
    let mut assemblies: HashMap<usize, Assembly> = HashMap::new();
    let mut roots: BTreeMap<usize, (TreeRoot, u8)> = BTreeMap::new();
    let mut waiting: VecDeque<Job> = VecDeque::new();
    let mut running: JoinSet<Result<RangeDone>> = JoinSet::new();
    let mut entries = catalog.entries.iter().enumerate();
    loop {
        // Collections are partitioned one at a time, only as far ahead as there are hands free.
        while running.len() < context.settings.parallel_ranges.get() {
            if let Some(job) = waiting.pop_front() {
                running.spawn(read_range(job));
                continue;
            }
            let Some((collection, entry)) = entries.next() else { break };
            let estimate = estimates.get(entry.namespace()).copied().unwrap_or_default();
            let (assembly, jobs) = context.prepare(collection, entry, estimate, &budget, &mut exceptions).await?;
            if jobs.is_empty() {
                roots.insert(collection, context.close(assembly).await?);
            } else {
                assemblies.insert(collection, assembly);
            }
            waiting.extend(jobs);
        }
        let Some(done) = running.join_next().await else { break };
        // Dropping the set on an error aborts the others; the store ends with their last reference to it.
        let done = match done.map_err(Error::from).and_then(|done| done) {
            Ok(done) => done,
            Err(error) => {
                context.stop.cancel();
                while running.join_next().await.is_some() {}
                return Err(error);
            }
        };
        let position = done.collection;
        let mut assembly = assemblies.remove(&position).ok_or_else(|| Error::internal("a range of no collection"))?;
        assembly.accept(done).await?;
        if assembly.is_complete() {
            roots.insert(position, context.close(assembly).await?);
        } else {
            assemblies.insert(position, assembly);
        }
    }
    if roots.len() != catalog.entries.len() {
        return Err(Error::internal("a range of a collection was not read"));
    }
    let namespaces: Vec<SnapshotNamespace> = roots
        .into_values()
        .zip(&catalog.entries)
        .map(|((root, boundary_bits), entry)| SnapshotNamespace { entry: entry.clone(), root, boundary_bits })
        .collect();
    let catalog = context.store_catalog(&namespaces).await?;
    Ok(Collected { namespaces, catalog, exceptions })
}

impl Context<'_> {
    async fn prepare(
        &self,
        collection: usize,
        entry: &CollectionEntry,
        (documents, bytes): (u64, u64),
        budget: &MemoryBudget,
        exceptions: &mut BTreeMap<String, String>,
    ) -> Result<(Assembly, Vec<Job>)> {
        let average = bytes.checked_div(documents).unwrap_or(0).max(1);
        let suggested = self.config.sizes.boundary_bits(average);
        let bits = match self.known_bits.get(entry.namespace()) {
            // A collection whose documents have grown or shrunk beyond recognition is cut anew.
            Some(known) if known.abs_diff(suggested) <= 2 => *known,
            _ => suggested,
        };
        let mut assembly =
            Assembly::new(Arc::clone(&self.store), Segmenter::new(&self.config.keys, self.config.sizes, bits), bits);
        let Some(namespace) = entry.data_namespace() else { return Ok((assembly, Vec::new())) };
        let order = ScanOrder::of(entry, self.deployment.server_version());
        let at = if entry.is_capped() && self.at.is_some() {
            exceptions
                .insert(entry.namespace().to_string(), "the server cannot read a capped collection at a cluster time".to_owned());
            None
        } else {
            self.at
        };
        let ranges = match order {
            ScanOrder::Id => {
                partition(self.deployment, &namespace, (documents, bytes), self.settings.partition, self.from).await?
            }
            _ => vec![KeyRange::everything()],
        };
        assembly.ranges = ranges.len();
        let mut source = ScanSource::new(self.deployment.clone(), namespace);
        source.order = order;
        source.at = at;
        source.from = self.from.cloned();
        source.average_document_bytes = u32::try_from(average).unwrap_or(u32::MAX);
        source.budget = budget.clone();
        source.retry = self.retry.clone();
        source.retry_budget = self.retry_budget.clone();
        source.cancel = self.stop.clone();
        let jobs = ranges
            .into_iter()
            .enumerate()
            .map(|(range, keys)| Job {
                collection,
                range,
                source: source.clone(),
                keys,
                store: Arc::clone(&self.store),
                segmenter: Segmenter::new(&self.config.keys, self.config.sizes, bits),
                bits,
                meter: Arc::clone(&self.meter),
                metrics: self.metrics.clone(),
                stop: self.stop.clone(),
            })
            .collect();
        Ok((assembly, jobs))
    }

    /// Completes a collection's tree: what is left of a collection that is through is in the store, and no longer in memory.
    async fn close(&self, assembly: Assembly) -> Result<(TreeRoot, u8)> {
        let bits = assembly.bits;
        let root = assembly.finish().await?;
        self.store.send_full().await?;
        Ok((root, bits))
    }

    /// The records of all namespaces, stored as if they were one more collection.
    async fn store_catalog(&self, namespaces: &[SnapshotNamespace]) -> Result<TreeRoot> {
        let records = namespaces.iter().map(SnapshotNamespace::to_document).collect::<Result<Vec<_>>>()?;
        let bits = self.config.sizes.boundary_bits(1024);
        let mut assembly =
            Assembly::new(Arc::clone(&self.store), Segmenter::new(&self.config.keys, self.config.sizes, bits), bits);
        assembly = tokio::task::spawn_blocking(move || {
            for record in &records {
                assembly.push(record)?;
            }
            Ok::<_, Error>(assembly)
        })
        .await??;
        assembly.finish().await
    }
}

/// One range to read.
struct Job {
    collection: usize,
    range: usize,
    source: ScanSource,
    keys: KeyRange,
    store: Arc<SegmentStore>,
    segmenter: Segmenter,
    bits: u8,
    meter: Arc<PhaseMeter>,
    metrics: BackupMetrics,
    stop: CancellationToken,
}

impl Job {
    fn cutter(&self) -> Cutter {
        let head = if self.range == 0 { Head::Passed } else { Head::Open(Vec::new()) };
        let blocks = BlockWriter::new(Arc::clone(&self.store));
        Cutter { blocks, segmenter: self.segmenter.emptied(), bits: self.bits, head, entries: Vec::new() }
    }
}

/// A range that was read.
struct RangeDone {
    collection: usize,
    range: usize,
    cutter: Cutter,
}

/// Reads a range. A capped collection that overtakes its reader is read anew from what is its oldest document by then, a few times.
async fn read_range(job: Job) -> Result<RangeDone> {
    let mut overtaken = 0;
    loop {
        match read_once(&job).await {
            // CappedPositionLost.
            Err(error) if error.server_code() == Some(136) && overtaken < OVERTAKEN_AT_MOST => overtaken += 1,
            Err(error) if error.server_code() == Some(136) => {
                return Err(error.wrap(
                    "a capped collection is overwritten faster than it can be read: leave it out, or choose a quieter hour",
                ));
            }
            result => return result,
        }
    }
}

/// While one batch is cut and compressed, the next is on its way.
async fn read_once(job: &Job) -> Result<RangeDone> {
    let mut cutter = job.cutter();
    let mut scan = job.source.scan(job.keys.clone());
    let mut batch = scan.next().await.map_err(explain)?;
    while let Some(current) = batch {
        let work = tokio::task::spawn_blocking(move || cutter.take(&current).map(|counts| (cutter, counts)));
        let next = scan.next().await;
        let (returned, (documents, bytes)) = work.await??;
        cutter = returned;
        job.store.send_full().await?;
        job.meter.advance(documents, bytes);
        job.metrics.read(documents, bytes);
        batch = match next {
            Ok(batch) => batch,
            Err(error) => {
                // The range may be read anew, and then takes what was cut so far for stored.
                tokio::task::spawn_blocking(move || cutter.blocks.flush()).await??;
                return Err(explain(error));
            }
        };
        if job.stop.is_cancelled() {
            return Err(Error::cancelled());
        }
    }
    let cutter = tokio::task::spawn_blocking(move || cutter.blocks.flush().map(|()| cutter)).await??;
    Ok(RangeDone { collection: job.collection, range: job.range, cutter })
}

/// Errors that mean that the collection went away have codes that say something else.
fn explain(error: Error) -> Error {
    // NamespaceNotFound, QueryPlanKilled, and the index of the hint gone with its collection.
    if matches!(error.server_code(), Some(26 | 175)) {
        return Error::new(ErrorKind::Conflict, "a collection was dropped or renamed during the backup: run it again")
            .with_source(error);
    }
    error
}

/// Cuts the documents of a range into segments and stores them.
///
/// A range does not begin where a segment begins. Its documents up to the first anchor are kept as they are, its *head*: they
/// belong to the segment that is open at the end of the range before. So the segments of a collection are the
/// same wherever its ranges happen to begin.
struct Cutter {
    blocks: BlockWriter,
    segmenter: Segmenter,
    bits: u8,
    head: Head,
    entries: Vec<TreeEntry>,
}

enum Head {
    /// No anchor has come yet: the documents so far, back to back.
    Open(Vec<u8>),
    /// The head is complete: it ends with an anchor.
    Complete(Vec<u8>),
    /// There is no head: the range began with a segment, or its head got too long to keep.
    Passed,
}

impl Cutter {
    fn take(&mut self, batch: &ScanBatch) -> Result<(u64, u64)> {
        let (mut documents, mut bytes) = (0, 0);
        for document in batch.documents()? {
            let document = document?;
            documents += 1;
            bytes += document.as_bytes().len() as u64;
            self.push(document)?;
        }
        Ok((documents, bytes))
    }

    fn push(&mut self, document: &RawDocument) -> Result<()> {
        let hash = self.segmenter.hasher().hash(document);
        if let Head::Open(head) = &mut self.head {
            head.extend_from_slice(document.as_bytes());
            if is_anchor(hash, self.bits) {
                self.head = Head::Complete(std::mem::take(head));
            } else if head.len() > LONGEST_HEAD {
                // Rare (one anchor is due every few segments), and only costs that this place is cut by chance.
                let head = std::mem::take(head);
                self.head = Head::Passed;
                for document in crate::repository::documents_of(&head) {
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
struct Assembly {
    bits: u8,
    ranges: usize,
    next: usize,
    /// Ranges that were read before their turn.
    early: BTreeMap<usize, Cutter>,
    /// Cuts on where the last range in order ended.
    cutter: Cutter,
    tree: Tree,
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
        for entry in entries {
            self.builder.push(entry, &mut |node| self.nodes.put(Content::Node, &node))?;
        }
        Ok(())
    }

    fn finish(self) -> Result<TreeRoot> {
        let Self { builder, mut nodes } = self;
        let root = builder.finish(&mut |node| nodes.put(Content::Node, &node))?;
        nodes.flush()?;
        Ok(root)
    }
}

impl Assembly {
    fn new(store: Arc<SegmentStore>, segmenter: Segmenter, bits: u8) -> Self {
        let tree = Tree::new(Arc::clone(&store), bits);
        let cutter = Cutter { blocks: BlockWriter::new(store), segmenter, bits, head: Head::Passed, entries: Vec::new() };
        Self { bits, ranges: 0, next: 0, early: BTreeMap::new(), cutter, tree }
    }

    fn push(&mut self, document: &RawDocument) -> Result<()> {
        self.cutter.push(document)
    }

    /// Takes a range, and joins every range whose turn has come.
    async fn accept(&mut self, done: RangeDone) -> Result<()> {
        self.early.insert(done.range, done.cutter);
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

    /// Whether every range has been joined.
    fn is_complete(&self) -> bool {
        self.next == self.ranges
    }

    async fn finish(self) -> Result<TreeRoot> {
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

    fn cut_all(&mut self, documents: &[u8]) -> Result<()> {
        for document in crate::repository::documents_of(documents) {
            self.cut(document?)?;
        }
        Ok(())
    }
}

/// Holds an assembly's place while its cutter is away on a blocking thread.
fn placeholder(like: &Cutter) -> Cutter {
    Cutter {
        blocks: BlockWriter::new(Arc::clone(like.blocks.store())),
        segmenter: like.segmenter.emptied(),
        bits: like.bits,
        head: Head::Passed,
        entries: Vec::new(),
    }
}

const LONGEST_HEAD: usize = 8 << 20;
const OVERTAKEN_AT_MOST: usize = 3;
