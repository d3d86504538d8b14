//! Making a snapshot: plan, inspect, run, report.

mod changes;
mod collect;
mod regrow;
mod report;
mod settings;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use self::{changes::Changes, collect::Older};
pub use self::{
    report::{BackupReport, NamespaceReport},
    settings::{BackupBuilder, BackupSettings, ConsistencyDemand},
};
use crate::{
    audit::AuditAction,
    metrics,
    repository::{
        Repository, TOOL,
        announcement::Session,
        manifest::{Consistency, SnapshotId, SnapshotManifest, SnapshotNamespace},
        slice::OpenSlice,
        store::{SegmentStore, StoreTotals, storing},
        tree::TreeRoot,
    },
};
use mongo_core::{
    CancellationToken, Deployment, Error, ErrorKind, Namespace, Result, RetryBudget, Topology,
    bson::{DateTime, Timestamp, doc},
    mongodb::options::SelectionCriteria,
    progress::{PhaseMeter, ProgressEvent, ProgressSink, Total},
    transfer::{
        catalog::{Catalog, CollectionEntry, CollectionKind, LeftOut, collection_uuids},
        oplog::{Entry, Oplog, OplogRead, ReplicaSetId},
        scan::is_snapshot_lost,
    },
    transform::Transform,
};

/// A backup of a deployment into a repository.
///
/// ```no_run
/// # async fn f(deployment: mongo_core::Deployment) -> mongo_backup::Result<()> {
/// use mongo_backup::{Backup, Key, LocalArchive, Repository};
///
/// let repository = Repository::open_or_init(LocalArchive::new("/backups")?, Key::passphrase("correct horse")).await?;
/// let report = Backup::builder(&deployment, &repository).namespaces("shop.*").build()?.run().await?;
/// println!("{}: {} documents, {}", report.id, report.documents, report.consistency);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Backup {
    deployment: Deployment,
    repository: Repository,
    settings: BackupSettings,
    from: Option<SelectionCriteria>,
    transform: Option<Arc<dyn Transform>>,
    progress: Arc<dyn ProgressSink>,
    metrics: metrics::BackupMetrics,
    cancel: CancellationToken,
}

/// What a backup would do.
#[derive(Debug)]
pub struct BackupPlan<'a> {
    backup: &'a Backup,
    catalog: Catalog,
    estimates: BTreeMap<Namespace, (u64, u64)>,
}

impl Backup {
    /// Prepares a backup of everything in `deployment`.
    pub fn builder(deployment: &Deployment, repository: &Repository) -> BackupBuilder {
        BackupBuilder::new(deployment.clone(), repository.clone())
    }

    /// Finds out what there is to do. Writes nothing anywhere.
    ///
    /// # Errors
    /// `NotFound` when a pattern matches no namespace, naming it; `Unsupported` for a sharded cluster; else the server's own.
    #[tracing::instrument(skip_all, name = "backup_plan")]
    pub async fn plan(&self) -> Result<BackupPlan<'_>> {
        if *self.deployment.topology() == Topology::Sharded {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "a sharded cluster cannot be backed up as one yet: back up each shard's replica set",
            ));
        }
        if self.settings.demand == ConsistencyDemand::PointInTime && !self.deployment.can_read_snapshots() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{}, so there is no backup at one point in time", no_snapshots(&self.deployment)),
            ));
        }
        let catalog = self.read_catalog().await?;
        let series = catalog.entries.iter().find(|entry| entry.kind() == CollectionKind::TimeSeries);
        if let Some(series) = series.filter(|_| self.transform.is_some()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "measurements lie in buckets, into which a transform does not look: leave time-series collections out",
            )
            .with_context("namespace", series.namespace()));
        }
        let names = catalog.entries.iter().map(CollectionEntry::namespace);
        if let [first, ..] = self.settings.selection.unmatched(names).as_slice() {
            return Err(Error::new(ErrorKind::NotFound, "no collection matches the pattern: check its spelling")
                .with_context("pattern", first));
        }
        let mut estimates = BTreeMap::new();
        for entry in &catalog.entries {
            let estimate = match entry.estimate(&self.deployment).await {
                Ok(estimate) => estimate,
                // Dropped since it was listed: the catalog is read again before anything else is.
                Err(error) if error.kind() == ErrorKind::NotFound => (0, 0),
                Err(error) => return Err(error.with_context("namespace", entry.namespace())),
            };
            estimates.insert(entry.namespace().clone(), estimate);
        }
        Ok(BackupPlan { backup: self, catalog, estimates })
    }

    /// [`plan`](Self::plan) and [`BackupPlan::execute`] in one.
    ///
    /// # Errors
    /// As those.
    ///
    /// # Cancel safety
    /// As [`BackupPlan::execute`].
    pub async fn run(&self) -> Result<BackupReport> {
        self.plan().await?.execute().await
    }

    async fn read_catalog(&self) -> Result<Catalog> {
        // From the primary, whatever is read from: a secondary that lags does not know of the newest collections yet.
        let mut catalog = Catalog::read(&self.deployment, &self.settings.selection, None).await?;
        // Who sees less of the documents should see nothing of the credentials.
        if self.transform.is_none() {
            catalog.read_users_and_roles(&self.deployment, &self.settings.selection).await?;
        }
        Ok(catalog)
    }

    /// A cluster time at which the catalog is known: the catalog is read before and after it, until both readings agree.
    async fn choose_cluster_time(&self, mut catalog: Catalog) -> Result<(Catalog, Timestamp)> {
        for _ in 0..CATALOG_READINGS {
            let at = self.operation_time().await?;
            let again = self.read_catalog().await?;
            if again.entries == catalog.entries {
                return Ok((again, at));
            }
            self.progress
                .event(&ProgressEvent::Note("collections or indexes are changing; reading the catalog again".to_owned()));
            catalog = again;
        }
        Err(Error::new(
            ErrorKind::Unavailable,
            "collections or indexes are created, changed or dropped all the time: try again when that has ended",
        ))
    }

    /// From where its oplog must be read to know everything that happens from now on; none where there is no oplog, or none that may be read.
    async fn history(&self) -> Result<Option<History>> {
        // The oplog tells documents as they are, not as they are stored.
        if self.transform.is_some() {
            return Ok(None);
        }
        let Ok(oplog) = Oplog::of(&self.deployment) else { return Ok(None) };
        let read = async {
            let (set, beginning) = (oplog.replica_set_id().await?, oplog.beginning().await?);
            oplog.oldest().await.map(|_| History { set, beginning })
        };
        match read.await {
            Ok(history) => Ok(Some(history)),
            Err(error) if matches!(error.kind(), ErrorKind::Unauthorized | ErrorKind::Unsupported) => {
                let note = "the snapshot cannot be rolled forward: the oplog may not be read, which the role backup allows";
                self.note(note.to_owned());
                tracing::warn!(error = %error.report(), "the oplog may not be read");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn note(&self, note: String) {
        tracing::warn!("{note}");
        self.progress.event(&ProgressEvent::Note(note));
    }

    /// No collection may have been dropped, renamed or made anew while it was read: a cursor on a name that is gone finds
    /// nothing, without an error, even at a cluster time at which there were documents.
    async fn check_still_there(&self, catalog: &Catalog) -> Result<()> {
        for entries in catalog.entries.chunk_by(|a, b| a.namespace().database() == b.namespace().database()) {
            let Some(first) = entries.first() else { continue };
            let now = collection_uuids(&self.deployment, first.namespace().database(), self.from.as_ref()).await?;
            for entry in entries {
                // Of a time-series collection the catalog does not tell the UUID.
                let is_gone = |data: Namespace| match (now.get(data.collection()), entry.uuid()) {
                    (Some(now), Some(before)) => *now != before,
                    (found, _) => found.is_none(),
                };
                if entry.data_namespace().is_some_and(is_gone) {
                    return Err(Error::new(
                        ErrorKind::Conflict,
                        "a collection was dropped or renamed during the backup: run it again",
                    )
                    .with_context("namespace", entry.namespace()));
                }
            }
        }
        Ok(())
    }

    /// The time of the primary's newest operation. A read at that time waits until a majority has it, so it holds every
    /// write that was acknowledged before, and nothing that can be rolled back.
    async fn operation_time(&self) -> Result<Timestamp> {
        let reply = self.deployment.database("admin").run_command(doc! { "ping": 1 }).await?;
        reply.get_timestamp("operationTime").map_err(|error| {
            Error::new(ErrorKind::Unsupported, "the primary does not tell its operation time").with_source(error)
        })
    }
}

impl BackupPlan<'_> {
    /// The namespaces that would be backed up, with the documents and bytes that their statistics tell.
    pub fn namespaces(&self) -> impl Iterator<Item = (&Namespace, u64, u64)> {
        self.catalog.entries.iter().map(|entry| {
            let (documents, bytes) = self.estimates.get(entry.namespace()).copied().unwrap_or_default();
            (entry.namespace(), documents, bytes)
        })
    }

    /// What the selection covers but will not be in the snapshot.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.catalog.left_out
    }

    /// Documents and bytes in all, estimated.
    pub fn total(&self) -> (u64, u64) {
        self.estimates.values().fold((0, 0), |(documents, bytes), (d, b)| (documents + d, bytes + b))
    }

    /// Makes the snapshot.
    ///
    /// On a replica set from 5.0 on everything is read at one cluster time, capped collections excepted (the server
    /// cannot); a standalone, and a replica set of 4.4, is read as it is at the moment. If the server drops the history
    /// of the cluster time while the backup runs (it keeps 300 s by default, `minSnapshotHistoryWindowInSeconds`), the backup
    /// starts its reading anew with best effort, unless the settings demand better; what was stored is not stored again.
    ///
    /// # Errors
    /// `Cancelled` by the token; `Unavailable` when the server or the archive stays away longer than the retries last;
    /// `Conflict` when a collection is dropped or renamed underneath. In every case no snapshot is listed, and segments that were stored
    /// are found again by the next backup.
    ///
    /// # Cancel safety
    /// A dropped future makes no snapshot either, but its tasks may end a little later.
    #[tracing::instrument(skip_all, name = "backup")]
    pub async fn execute(self) -> Result<BackupReport> {
        let backup = self.backup;
        let subject =
            [("deployment", backup.deployment.topology().to_string()), ("selection", backup.settings.selection.to_string())];
        let work = self.execute_unrecorded();
        backup.repository.recorded(AuditAction::Backup, subject, work, |report| Some(("snapshot", report.id.to_string()))).await
    }

    async fn execute_unrecorded(self) -> Result<BackupReport> {
        let started = DateTime::now();
        self.backup.repository.make().await?;
        let session = Session::begin(&self.backup.repository, started).await?;
        let report = self.make_snapshot(started, &session).await;
        session.end(report.is_err()).await;
        report
    }

    async fn make_snapshot(self, started: DateTime, session: &Session) -> Result<BackupReport> {
        let Self { backup, catalog, estimates } = self;
        let job = Job { backup, session, started, estimates };
        // Before anything else is read: what has begun by then is known to whoever replays the oplog from there.
        let history = backup.history().await?;
        let parent = backup.parent(history).await?;
        if backup.deployment.can_read_snapshots() {
            job.converge(catalog, history, parent).await
        } else {
            let reason = no_snapshots(&backup.deployment);
            let (catalog, defined_at) = match history {
                Some(_) => backup.choose_cluster_time(catalog).await.map(|(catalog, at)| (catalog, Some(at)))?,
                None => (backup.read_catalog().await?, None),
            };
            let reason = match &parent {
                Parent::ByField { field, .. } => format!(
                    "{reason}, and what has changed was told by the field {field}: documents that were deleted, or changed without it, since the last full scan are as they were"
                ),
                _ => reason,
            };
            let reading = job.read(catalog, When::Now { defined_at }, history, &parent).await?;
            job.publish_as_read(reading, reason, parent).await
        }
    }
}

/// A backup that has begun.
struct Job<'a> {
    backup: &'a Backup,
    session: &'a Session,
    started: DateTime,
    estimates: BTreeMap<Namespace, (u64, u64)>,
}

/// Everything that was selected, read and stored once.
struct Reading {
    catalog: Catalog,
    collected: collect::Collected,
    totals: StoreTotals,
    history: Option<History>,
    defined_at: Option<Timestamp>,
    /// When the last of it was read.
    until: Option<Timestamp>,
}

impl Job<'_> {
    /// Reads at one cluster time. Where that takes longer than the server keeps its history, everything is read once as it is, and then, at one cluster
    /// time, what has changed meanwhile; and so on, until it fits.
    async fn converge(&self, catalog: Catalog, history: Option<History>, parent: Parent) -> Result<BackupReport> {
        let backup = self.backup;
        let (mut catalog, mut history, mut base) = (catalog, history, parent.clone());
        let mut last = None;
        for pass in 1.. {
            let (now, at) = backup.choose_cluster_time(catalog).await?;
            let error = match self.read(now, When::At(at), history, &base).await {
                Ok(mut reading) => {
                    if let Some(Reading { totals, .. }) = last {
                        reading.totals.add(totals);
                    }
                    let exceptions = std::mem::take(&mut reading.collected.exceptions);
                    let consistency = Consistency::PointInTime { cluster_time: at, exceptions };
                    return self.publish(reading, consistency, parent).await;
                }
                Err(error) if is_snapshot_lost(&error) => error,
                Err(error) => return Err(error),
            };
            let reason = "the server gave up the history of the cluster time before everything was read".to_owned();
            if (pass == PASSES || history.is_none()) && backup.settings.demand == ConsistencyDemand::PointInTime {
                return Err(error);
            }
            if let Some(last) = last.take_if(|_| pass == PASSES) {
                return self.publish_as_read(last, reason, parent).await;
            }
            backup.note(format!("{reason}: reading as it is, and then what has changed meanwhile"));
            history = backup.history().await?;
            let (now, defined_at) = backup.choose_cluster_time(backup.read_catalog().await?).await?;
            let mut reading = self.read(now, When::Now { defined_at: Some(defined_at) }, history, &base).await?;
            if let Some(Reading { totals, .. }) = last {
                reading.totals.add(totals);
            }
            let Some(known) = history else { return self.publish_as_read(reading, reason, parent).await };
            backup.repository.reload_index().await?;
            base = Parent::Older { id: None, catalog: reading.collected.catalog.clone(), from: known.beginning, set: known.set };
            history = backup.history().await?;
            catalog = backup.read_catalog().await?;
            last = Some(reading);
        }
        Err(Error::internal("a backup without an end"))
    }

    /// Publishes what was read over a while, with the oplog of that while if it is to be had.
    async fn publish_as_read(&self, reading: Reading, reason: String, parent: Parent) -> Result<BackupReport> {
        let stored = match (reading.history, reading.until) {
            (Some(history), Some(until)) => self.backup.store_window(history, until).await?.then_some(until),
            _ => None,
        };
        let consistency = match stored {
            Some(until) => Consistency::Window { until, reason },
            None => Consistency::BestEffort { reason },
        };
        self.publish(reading, consistency, parent).await
    }
}

/// Where the oplog stood when a backup began.
#[derive(Clone, Copy, Debug)]
struct History {
    set: ReplicaSetId,
    beginning: Timestamp,
}

/// The time at which a backup reads.
#[derive(Clone, Copy)]
enum When {
    /// Everything at one cluster time.
    At(Timestamp),
    /// Everything as it is when its turn comes. Collections and indexes are those of a time, if there is an oplog.
    Now { defined_at: Option<Timestamp> },
}

/// What a backup takes over.
#[derive(Clone, Debug)]
enum Parent {
    /// What an older snapshot holds, or what was read before for the same.
    Older { id: Option<SnapshotId>, catalog: TreeRoot, from: Timestamp, set: ReplicaSetId },
    /// The same, where there is no oplog: documents whose field says so have changed.
    ByField { id: SnapshotId, catalog: TreeRoot, since: DateTime, field: String },
    /// Nothing, and why.
    None { reason: String },
}

fn no_snapshots(deployment: &Deployment) -> String {
    match deployment.topology() {
        Topology::Standalone => "a standalone server cannot be read at one cluster time".to_owned(),
        _ => format!("MongoDB {} cannot be read at one cluster time, 5.0 and newer can", deployment.server_version()),
    }
}

impl Backup {
    /// How finely the newest readable snapshot cuts each collection, after the index was read anew: the backup was announced before.
    async fn known_bits(&self) -> Result<HashMap<Namespace, u8>> {
        self.repository.reload_index().await?;
        let Some(newest) = self.repository.snapshots().await?.snapshots.pop() else { return Ok(HashMap::new()) };
        match self.repository.namespaces(&newest).await {
            Ok(namespaces) => {
                Ok(namespaces.iter().map(|namespace| (namespace.namespace().clone(), namespace.boundary_bits)).collect())
            }
            Err(error) if error.kind() == ErrorKind::CorruptData => {
                // Damage there must not stand in the way of a new backup; it only shares less.
                tracing::warn!(snapshot = %newest.id, "the newest snapshot's catalog is damaged; collections are cut anew");
                Ok(HashMap::new())
            }
            Err(error) => Err(error),
        }
    }

    /// The newest snapshot of the same replica set.
    async fn parent(&self, history: Option<History>) -> Result<Parent> {
        let none = |reason: &str| Ok(Parent::None { reason: reason.to_owned() });
        if self.settings.full_scan {
            return none("it was asked for");
        }
        let snapshots = self.repository.snapshots().await?.snapshots;
        // One of the same selection has all that is asked for; any other has some of it.
        let best = |fits: &dyn Fn(&SnapshotManifest) -> bool| {
            let fitting = || snapshots.iter().rev().filter(|snapshot| fits(snapshot));
            fitting().find(|snapshot| snapshot.selection == self.settings.selection).or_else(|| fitting().next()).cloned()
        };
        if let (None, None, Some(field)) = (history, &self.transform, &self.settings.since_field) {
            let fits = |snapshot: &SnapshotManifest| {
                let is_alike = snapshot.source == self.settings.source && snapshot.topology == *self.deployment.topology();
                is_alike && !snapshot.is_transformed && snapshot.resume_point.is_none()
            };
            return Ok(match best(&fits) {
                None => Parent::None { reason: "it is the first snapshot of this deployment".to_owned() },
                Some(parent) => {
                    let since = DateTime::from_millis(parent.started.timestamp_millis().saturating_sub(CLOCKS_DIFFER));
                    Parent::ByField { id: parent.id, catalog: parent.catalog, since, field: field.clone() }
                }
            });
        }
        let Some(history) = history else {
            return none(match self.deployment.topology() {
                _ if self.transform.is_some() => "documents are changed on the way, which the oplog does not tell",
                Topology::Standalone => "a standalone server has no oplog that tells what has changed",
                _ => "the oplog, which tells what has changed, may not be read",
            });
        };
        let newest = best(&|snapshot| snapshot.replica_set == Some(history.set) && snapshot.resume_point.is_some());
        let Some((newest, from)) = newest.and_then(|newest| newest.resume_point.map(|from| (newest, from))) else {
            return none("it is the first snapshot of this replica set");
        };
        Ok(Parent::Older { id: Some(newest.id), catalog: newest.catalog, from, set: history.set })
    }

    /// What is taken over, and what has changed since up to a time.
    async fn older(
        &self,
        parent: &Parent,
        until: Option<Timestamp>,
        now: &Catalog,
    ) -> Result<std::result::Result<Older, String>> {
        let (catalog, from, set) = match parent {
            Parent::None { reason } => return Ok(Err(reason.clone())),
            Parent::ByField { catalog, since, field, .. } => {
                let namespaces = self.repository.namespaces_in(catalog).await?;
                let known: HashMap<[u8; 16], SnapshotNamespace> =
                    namespaces.into_iter().filter_map(|namespace| Some((namespace.entry().uuid()?, namespace))).collect();
                let changes = Changes::by_field(&self.deployment, now, field, *since).await?;
                return Ok(Ok(Older { collections: known, changes }));
            }
            Parent::Older { catalog, from, set, .. } => (catalog, *from, *set),
        };
        let Some(until) = until else { return Ok(Err("the server does not tell its time".to_owned())) };
        let oplog = Oplog::of(&self.deployment)?.with(self.settings.retry.clone(), RetryBudget::default(), self.cancel.clone());
        self.wait_for_majority(&oplog, until).await?;
        let namespaces = match self.repository.namespaces_in(catalog).await {
            Ok(namespaces) => namespaces,
            Err(error) if error.kind() == ErrorKind::CorruptData => {
                tracing::warn!(error = %error.report(), "the newest snapshot's catalog is damaged");
                return Ok(Err("the newest snapshot's catalog is damaged".to_owned()));
            }
            Err(error) => return Err(error),
        };
        let changes = match Changes::read(&oplog, &self.repository, set, from, until).await {
            Ok(Ok(changes)) => changes,
            Ok(Err(reason)) => return Ok(Err(reason)),
            // A slice that was captured is damaged, or was removed meanwhile.
            Err(error) if error.kind() == ErrorKind::CorruptData => {
                self.note(format!("what has changed cannot be read: {}", error.report()));
                return Ok(Err("the oplog that was captured is damaged".to_owned()));
            }
            Err(error) => return Err(error),
        };
        let known = namespaces.into_iter().filter_map(|namespace| Some((namespace.entry().uuid()?, namespace)));
        Ok(Ok(Older { collections: known.collect(), changes }))
    }

    /// Waits until a majority holds everything up to a time: before, the oplog may still be taken back.
    async fn wait_for_majority(&self, oplog: &Oplog, until: Timestamp) -> Result<()> {
        let begun = tokio::time::Instant::now();
        while oplog.newest().await? < until {
            if begun.elapsed() > MAJORITY_WITHIN {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "no majority of the replica set follows the primary: look at its members",
                ));
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(Error::cancelled()),
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
        }
        Ok(())
    }

    /// Stores the oplog of the while in which was read, unless it was captured. False if it is no longer there.
    async fn store_window(&self, history: History, until: Timestamp) -> Result<bool> {
        let captured = self.repository.stretches(history.set).await?.cover(history.beginning, Some(until));
        if captured.last().is_some_and(|last| last.last >= until) {
            return Ok(true);
        }
        let oplog = Oplog::of(&self.deployment)?.with(self.settings.retry.clone(), RetryBudget::default(), self.cancel.clone());
        self.wait_for_majority(&oplog, until).await?;
        let mut scan = oplog.read(history.beginning, until);
        let mut slice = OpenSlice::default();
        loop {
            match scan.next().await? {
                OplogRead::Entries(batch) => {
                    for entry in batch.documents()? {
                        let entry = entry?;
                        slice.push(Entry::parse(entry)?.position, entry);
                        if slice.bytes() >= WINDOW_SLICE {
                            self.repository.store_slice(history.set, &slice, self.settings.compression_level).await?;
                            slice = slice.next()?;
                        }
                    }
                }
                OplogRead::End => break,
                _ => {
                    self.note("the oplog was overrun while the backup read: what was read is not one state".to_owned());
                    return Ok(false);
                }
            }
        }
        self.repository.store_slice(history.set, &slice, self.settings.compression_level).await?;
        Ok(true)
    }
}

impl Job<'_> {
    /// Reads and stores everything that is not taken over.
    async fn read(&self, catalog: Catalog, when: When, history: Option<History>, parent: &Parent) -> Result<Reading> {
        let backup = self.backup;
        let (at, defined_at) = match when {
            When::At(at) => (Some(at), Some(at)),
            When::Now { defined_at } => (None, defined_at),
        };
        let known_bits = backup.known_bits().await?;
        let (older, full_scan) = match backup.older(parent, defined_at, &catalog).await? {
            Ok(older) => (Some(older), None),
            Err(reason) => (None, Some(reason)),
        };
        let (documents, bytes) = self.estimates.values().fold((0, 0), |(documents, bytes), (d, b)| (documents + d, bytes + b));
        let meter = Arc::new(PhaseMeter::start(Arc::clone(&backup.progress), "data", Total::estimate(documents, bytes)));
        // Readers stop when the archive fails.
        let stop = backup.cancel.child_token();
        let store = SegmentStore::new(&backup.repository, backup.settings.compression_level)?;
        let (mut collected, totals) = storing(store, &backup.cancel, |store| {
            let context = collect::Context {
                deployment: &backup.deployment,
                config: backup.repository.config(),
                store,
                settings: &backup.settings,
                from: backup.from.as_ref(),
                at,
                not_before: defined_at,
                known_bits,
                older,
                repository: &backup.repository,
                transform: backup.transform.clone(),
                meter: Arc::clone(&meter),
                metrics: backup.metrics.clone(),
                stop: stop.clone(),
                retry: backup.settings.retry.clone(),
                retry_budget: RetryBudget::default(),
            };
            async {
                let collected = collect::collect(context, &catalog, &self.estimates).await;
                if collected.is_err() {
                    stop.cancel();
                }
                collected
            }
        })
        .await?;
        collected.full_scan = full_scan;
        if let Ok(meter) = Arc::try_unwrap(meter) {
            meter.finish();
        }
        backup.check_still_there(&catalog).await?;
        let is_at_one_time = at.is_some() && collected.exceptions.is_empty();
        let until = match history {
            Some(_) if !is_at_one_time => Some(backup.operation_time().await?),
            _ => None,
        };
        Ok(Reading { catalog, collected, totals, history, defined_at, until })
    }

    async fn publish(&self, reading: Reading, consistency: Consistency, parent: Parent) -> Result<BackupReport> {
        let Reading { catalog, collected, totals, history, defined_at, until } = reading;
        let backup = self.backup;
        let sum = |number: fn(&NamespaceReport) -> u64| collected.namespaces.iter().map(number).sum::<u64>();
        let parent = match parent {
            Parent::Older { id, .. } if collected.full_scan.is_none() => id,
            Parent::ByField { id, .. } if collected.full_scan.is_none() => Some(id),
            _ => None,
        };
        let manifest = SnapshotManifest {
            id: self.session.snapshot().clone(),
            started: self.started,
            finished: DateTime::now(),
            server_version: backup.deployment.server_version().to_string(),
            topology: backup.deployment.topology().clone(),
            consistency,
            resume_point: history.map(|history| history.beginning),
            replica_set: history.map(|history| history.set),
            read_until: until,
            defined_at,
            parent,
            is_transformed: backup.transform.is_some(),
            selection: backup.settings.selection.clone(),
            left_out: catalog.left_out.clone(),
            namespaces: collected.namespaces.len() as u64,
            documents: sum(|namespace| namespace.documents),
            bytes: sum(|namespace| namespace.bytes),
            new_segments: totals.new_segments,
            reused_segments: totals.reused_segments + collected.taken_over,
            stored_bytes: totals.stored_bytes,
            tool: TOOL.to_owned(),
            source: backup.settings.source.clone(),
            tags: backup.settings.tags.clone(),
            catalog: collected.catalog,
        };
        self.session.publish(&manifest).await?;
        // The snapshot exists: what goes wrong from here on is the next operation's business.
        if let Err(error) = backup.repository.reload_index().await {
            tracing::warn!(error = %error.report(), "the index could not be read anew");
        }
        Ok(BackupReport::new(&manifest, collected.namespaces, collected.read, collected.full_scan))
    }
}

const CATALOG_READINGS: usize = 10;
/// So often it is tried to read what has changed within the server's history.
const PASSES: u32 = 4;
/// Milliseconds by which the clock that sets a field may be behind that of a backup.
const CLOCKS_DIFFER: i64 = 5 * 60 * 1000;
const MAJORITY_WITHIN: Duration = Duration::from_secs(60);
const WINDOW_SLICE: usize = 16 << 20;
