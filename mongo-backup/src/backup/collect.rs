//! Reading every selected collection, in ranges side by side, into segments and trees.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use mongo_core::{
    CancellationToken, Deployment, Error, ErrorKind, Namespace, Result, RetryBudget, RetryPolicy,
    bson::Timestamp,
    gate::Background,
    mongodb::options::SelectionCriteria,
    progress::PhaseMeter,
    transfer::{
        catalog::{Catalog, CollectionEntry},
        partition::{Key, KeyRange, ScanOrder, partition},
        scan::{MemoryBudget, ScanSource},
    },
    transform::Transform,
};
use tokio::task::JoinSet;

use super::{
    BackupSettings, NamespaceReport,
    changes::{Changes, ToRead},
    pieces::changed_segments,
    regrow::{Regrow, Regrown},
};
use crate::{
    metrics::BackupMetrics,
    repository::{
        Repository,
        assembly::{Assembly, Changing, Cutter, Head, Regrowth, store_catalog},
        config::Config,
        manifest::SnapshotNamespace,
        segment::Segmenter,
        store::SegmentStore,
        tree::TreeRoot,
    },
    restore::is_authorization,
};

/// What the workers share.
pub(super) struct Context<'a> {
    pub(super) deployment: &'a Deployment,
    pub(super) config: Arc<Config>,
    pub(super) store: Arc<SegmentStore>,
    pub(super) settings: &'a BackupSettings,
    pub(super) from: Option<&'a SelectionCriteria>,
    pub(super) at: Option<Timestamp>,
    /// What is not read at the cluster time is read as it is then or later.
    pub(super) not_before: Option<Timestamp>,
    /// How finely an older snapshot cuts each collection: cutting alike is what lets snapshots share segments.
    pub(super) known_bits: HashMap<Namespace, u8>,
    /// What an older snapshot holds, and what has changed since.
    pub(super) older: Option<Older>,
    pub(super) repository: &'a Repository,
    /// What changes documents on the way in.
    pub(super) transform: Option<Arc<dyn Transform>>,
    pub(super) meter: Arc<PhaseMeter>,
    pub(super) metrics: BackupMetrics,
    pub(super) stop: CancellationToken,
    pub(super) background: Background,
    pub(super) retry: RetryPolicy,
    pub(super) retry_budget: RetryBudget,
}

/// What an older snapshot, or an earlier reading, holds, and what has changed since.
pub(super) struct Older {
    pub(super) collections: HashMap<[u8; 16], SnapshotNamespace>,
    /// How finely it cuts each collection, those included that have no UUID.
    pub(super) bits: HashMap<Namespace, u8>,
    pub(super) changes: Changes,
}

impl Older {
    /// What is taken over of a collection. Capped ones and such that are not in the order of an index, or in one of a collation, are taken over whole
    /// or not at all.
    fn of(&mut self, entry: &CollectionEntry, order: ScanOrder) -> Result<Inheritance> {
        let uuid = match entry.uuid() {
            // They change without an oplog's telling the UUID that they are known by.
            _ if is_authorization(entry.namespace()) => return Ok(Inheritance::None),
            Some(uuid) => uuid,
            None => return Ok(Inheritance::None),
        };
        let Some(older) = self.collections.remove(&uuid) else { return Ok(Inheritance::None) };
        let in_id_order = order == ScanOrder::Id && older.in_id_order;
        let is_collated = !matches!(entry.options().get("collation"), Ok(None));
        Ok(match self.changes.take(uuid)? {
            ToRead::Nothing => Inheritance::Whole(older),
            ToRead::Documents(touched) if in_id_order && !is_collated => Inheritance::But(older, touched.into()),
            _ => Inheritance::None,
        })
    }
}

/// Whether so little has changed that reading only that is faster than a scan. Changes can lie far apart or all in one place.
async fn is_worth_it(older: &SnapshotNamespace, touched: &Arc<[Key]>, repository: &Repository) -> Result<bool> {
    let segments = older.segments();
    if touched.len() as u64 <= segments / 8 {
        return Ok(true);
    }
    let changed = changed_segments(repository, &older.root, Arc::clone(touched)).await?;
    Ok(changed <= segments / 2 + 100)
}

/// What a collection takes over from an older reading.
enum Inheritance {
    None,
    Whole(SnapshotNamespace),
    /// All but the segments with these documents.
    But(SnapshotNamespace, Arc<[Key]>),
}

/// Everything that goes into a manifest.
pub(super) struct Collected {
    pub(super) namespaces: Vec<NamespaceReport>,
    pub(super) catalog: TreeRoot,
    /// Namespaces that were not read at the cluster time, and why.
    pub(super) exceptions: BTreeMap<String, String>,
    /// Documents that were read.
    pub(super) read: u64,
    /// Segments that were taken over.
    pub(super) taken_over: u64,
    /// Why everything was read, if it was.
    pub(super) full_scan: Option<String>,
}

/// Reads all collections of the catalog. Ranges are started in order, so a collection's ranges are under way together
/// and its tree grows from the left while it is read.
pub(super) async fn collect(
    mut context: Context<'_>,
    catalog: &Catalog,
    estimates: &BTreeMap<Namespace, (u64, u64)>,
) -> Result<Collected> {
    let budget = MemoryBudget::new(context.settings.memory_bytes);
    let mut exceptions = BTreeMap::new();
    // Collections that are being read, and the trees of those that are through.
    let mut assemblies: HashMap<usize, Assembly> = HashMap::new();
    let mut roots: BTreeMap<usize, (TreeRoot, u8)> = BTreeMap::new();
    let mut waiting: VecDeque<Job> = VecDeque::new();
    let mut running: JoinSet<Result<Done>> = JoinSet::new();
    let (mut read, mut taken_over) = (0, 0);
    let mut entries = catalog.entries.iter().enumerate();
    loop {
        // Collections are partitioned one at a time, only as far ahead as there are hands free.
        while running.len() < context.settings.parallel_ranges.get() {
            if let Some(job) = waiting.pop_front() {
                running.spawn(async move { read_range(job).await.map(|done| Done::Range(Box::new(done))) });
                continue;
            }
            let Some((collection, entry)) = entries.next() else { break };
            let order = ScanOrder::of(entry, context.deployment.server_version());
            match context.older.as_mut().map_or(Ok(Inheritance::None), |older| older.of(entry, order))? {
                Inheritance::None => {}
                Inheritance::Whole(older) => {
                    context.meter.advance(older.documents(), older.bytes());
                    taken_over += older.segments();
                    roots.insert(collection, (older.root, older.boundary_bits));
                    continue;
                }
                Inheritance::But(older, touched) if !is_worth_it(&older, &touched, context.repository).await? => {}
                Inheritance::But(older, touched) => {
                    let (regrow, bits) = context.regrow(entry, older, touched, &budget)?;
                    running.spawn(async move {
                        let regrown = regrow.run().await.map_err(explain)?;
                        Ok(Done::Regrown { collection, bits, regrown })
                    });
                    continue;
                }
            }
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
        let done = match done {
            Done::Range(done) => done,
            Done::Regrown { collection, bits, regrown } => {
                read += regrown.read;
                taken_over += regrown.taken_over;
                roots.insert(collection, (regrown.root, bits));
                continue;
            }
        };
        read += done.documents;
        let position = done.collection;
        let mut assembly = assemblies.remove(&position).ok_or_else(|| Error::internal("a range of no collection"))?;
        assembly.accept(done.range, done.cutter).await?;
        if assembly.is_complete() {
            roots.insert(position, context.close(assembly).await?);
        } else {
            assemblies.insert(position, assembly);
        }
    }
    if roots.len() != catalog.entries.len() {
        return Err(Error::internal("a range of a collection was not read"));
    }
    // There may be very many: none is held but while it is stored.
    let mut reports = Vec::with_capacity(roots.len());
    let namespaces = roots.into_values().zip(&catalog.entries).map(|((root, boundary_bits), entry)| {
        let changes_ids = context.transform.as_ref().is_some_and(|transform| transform.changes_ids(entry.namespace()));
        let in_id_order = ScanOrder::of(entry, context.deployment.server_version()) == ScanOrder::Id && !changes_ids;
        let namespace = SnapshotNamespace { entry: entry.clone(), root, boundary_bits, in_id_order };
        reports.push(NamespaceReport::of(&namespace));
        namespace
    });
    let catalog = store_catalog(&context.store, &context.config, namespaces).await?;
    let namespaces = reports;
    Ok(Collected { namespaces, catalog, exceptions, read, taken_over, full_scan: None })
}

/// What a task has done.
enum Done {
    Range(Box<RangeDone>),
    Regrown { collection: usize, bits: u8, regrown: Regrown },
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
        let suggested = self.config.cutting.boundary_bits(average);
        let bits = match self.known_bits.get(entry.namespace()) {
            // A collection whose documents have grown or shrunk beyond recognition is cut anew.
            Some(known) if known.abs_diff(suggested) <= 2 => *known,
            _ => suggested,
        };
        let mut assembly =
            Assembly::new(Arc::clone(&self.store), Segmenter::new(&self.config.keys, self.config.cutting, bits), bits);
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
        assembly.expect(ranges.len());
        let source = self.source(namespace, order, at, average, budget);
        let jobs = ranges
            .into_iter()
            .enumerate()
            .map(|(range, keys)| Job {
                collection,
                range,
                source: source.clone(),
                changing: self.transform.clone().map(|transform| Changing { transform, namespace: entry.namespace().clone() }),
                keys,
                store: Arc::clone(&self.store),
                segmenter: Segmenter::new(&self.config.keys, self.config.cutting, bits),
                meter: Arc::clone(&self.meter),
                metrics: self.metrics.clone(),
                stop: self.stop.clone(),
            })
            .collect();
        Ok((assembly, jobs))
    }

    fn source(
        &self,
        namespace: Namespace,
        order: ScanOrder,
        at: Option<Timestamp>,
        average: u64,
        budget: &MemoryBudget,
    ) -> ScanSource {
        let mut source = ScanSource::new(self.deployment.clone(), namespace);
        source.order = order;
        source.at = at;
        source.not_before = self.not_before;
        source.from = self.from.cloned();
        source.average_document_bytes = u32::try_from(average).unwrap_or(u32::MAX);
        source.budget = budget.clone();
        source.retry = self.retry.clone();
        source.retry_budget = self.retry_budget.clone();
        source.cancel = self.stop.clone();
        source.background = self.background.clone();
        source
    }

    /// Prepares to read only what has changed of a collection.
    fn regrow(
        &self,
        entry: &CollectionEntry,
        older: SnapshotNamespace,
        touched: Arc<[Key]>,
        budget: &MemoryBudget,
    ) -> Result<(Regrow, u8)> {
        let namespace = entry.data_namespace().ok_or_else(|| Error::internal("a view has no documents"))?;
        let bits = older.boundary_bits;
        let average = older.bytes().checked_div(older.documents()).unwrap_or(0).max(1);
        let segmenter = Segmenter::new(&self.config.keys, self.config.cutting, bits);
        let regrow = Regrow {
            repository: self.repository.clone(),
            source: self.source(namespace, ScanOrder::Id, self.at, average, budget),
            by_filter: !entry.is_clustered(),
            average_bytes: average,
            older: older.root,
            touched,
            growth: Regrowth::new(Arc::clone(&self.store), segmenter, bits),
            meter: Arc::clone(&self.meter),
        };
        Ok((regrow, bits))
    }

    /// Completes a collection's tree: what is left of a collection that is through is in the store, and no longer in memory.
    async fn close(&self, assembly: Assembly) -> Result<(TreeRoot, u8)> {
        let bits = assembly.bits();
        let root = assembly.finish().await?;
        self.store.send_full().await?;
        Ok((root, bits))
    }
}

/// One range to read.
struct Job {
    collection: usize,
    range: usize,
    source: ScanSource,
    changing: Option<Changing>,
    keys: KeyRange,
    store: Arc<SegmentStore>,
    segmenter: Segmenter,
    meter: Arc<PhaseMeter>,
    metrics: BackupMetrics,
    stop: CancellationToken,
}

impl Job {
    fn cutter(&self) -> Cutter {
        let head = if self.range == 0 { Head::Passed } else { Head::Open(Vec::new()) };
        Cutter::new(Arc::clone(&self.store), self.segmenter.emptied(), head)
    }
}

/// A range that was read.
struct RangeDone {
    collection: usize,
    range: usize,
    documents: u64,
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
    let mut all = 0;
    let mut scan = job.source.scan(job.keys.clone());
    let mut batch = scan.next().await.map_err(explain)?;
    while let Some(current) = batch {
        let changing = job.changing.clone();
        let work = tokio::task::spawn_blocking(move || cutter.take(&current, changing.as_ref()).map(|counts| (cutter, counts)));
        let next = scan.next().await;
        let (returned, (documents, bytes)) = work.await??;
        cutter = returned;
        job.store.send_full().await?;
        all += documents;
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
    Ok(RangeDone { collection: job.collection, range: job.range, documents: all, cutter })
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

const OVERTAKEN_AT_MOST: usize = 3;
