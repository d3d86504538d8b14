//! Making a snapshot: plan, inspect, run, report.

mod collect;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroUsize,
    sync::Arc,
};

use mongo_core::{
    CancellationToken, Deployment, Error, ErrorKind, Namespace, NamespaceSelection, Result, RetryBudget, RetryPolicy, Topology,
    bson::{DateTime, Timestamp, doc},
    metrics::{MetricsSink, NoMetrics},
    mongodb::options::{ReadPreference, SelectionCriteria},
    progress::{NoProgress, PhaseMeter, ProgressSink, Total},
    transfer::{
        catalog::{Catalog, CollectionEntry, CollectionKind, LeftOut},
        partition::PartitionSettings,
        scan::is_snapshot_lost,
    },
};
use serde::{Deserialize, Serialize};

use crate::{
    audit::AuditAction,
    metrics,
    repository::{
        Repository, TOOL,
        announcement::Session,
        manifest::{Consistency, SnapshotId, SnapshotManifest, SnapshotNamespace},
        store::{SegmentStore, storing},
    },
};

/// What a backup takes and how hard it works.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct BackupSettings {
    /// Which namespaces. Default all.
    pub selection: NamespaceSelection,
    /// zstd's compression level, from -7 to 22. Default 1, which keeps up with a server on the same machine; 3 makes the
    /// archive about a tenth smaller and takes half as long again.
    pub compression_level: i32,
    /// How many ranges are read and compressed at the same time. Default: one more than there are cores, at most 5: while one
    /// waits for the server, the others compress.
    pub parallel_ranges: NonZeroUsize,
    /// How collections are cut into ranges.
    pub partition: PartitionSettings,
    /// Bytes of server replies that are in memory at once. Default 64 MiB; see [the crate's documentation](crate#memory) for the whole.
    pub memory_bytes: u64,
    /// How long to go on asking when the server is away, for a failover or a restart. Default: five attempts within 60 s.
    pub retry: RetryPolicy,
    /// What the host calls this deployment: [retention](crate::RetentionPolicy) counts each by itself. Default nothing.
    pub source: Option<String>,
    /// What the snapshot is marked with. Default nothing.
    pub tags: BTreeSet<String>,
    /// What to do when the server cannot give, or no longer keeps, one cluster time. Default: go on with best effort, and say so.
    pub demand: ConsistencyDemand,
}

impl Default for BackupSettings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, NonZeroUsize::get);
        Self {
            selection: NamespaceSelection::all(),
            compression_level: 1,
            parallel_ranges: NonZeroUsize::new((cores + 1).clamp(2, 5)).unwrap_or(NonZeroUsize::MIN),
            partition: PartitionSettings::default(),
            memory_bytes: 64 << 20,
            retry: RetryPolicy::default(),
            source: None,
            tags: BTreeSet::new(),
            demand: ConsistencyDemand::default(),
        }
    }
}

/// What a snapshot must be to be worth having.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ConsistencyDemand {
    /// One cluster time where the server can, else best effort; the report says which.
    #[default]
    WherePossible,
    /// One cluster time for everything, or no snapshot.
    PointInTime,
}

/// Prepares a [`Backup`].
#[derive(Debug)]
#[must_use]
pub struct BackupBuilder {
    deployment: Deployment,
    repository: Repository,
    settings: BackupSettings,
    selection: Result<NamespaceSelection>,
    read_preference: Option<ReadPreference>,
    progress: Arc<dyn ProgressSink>,
    metrics: Arc<dyn MetricsSink>,
    cancel: CancellationToken,
}

impl BackupBuilder {
    /// Replaces all settings.
    pub fn settings(mut self, settings: BackupSettings) -> Self {
        self.selection = Ok(settings.selection.clone());
        self.settings = settings;
        self
    }

    /// Takes the namespaces that match `pattern`, as `shop.*`; may be called several times.
    pub fn namespaces(mut self, pattern: &str) -> Self {
        self.selection = self.selection.and_then(|selection| selection.including(pattern));
        self
    }

    /// Leaves out the namespaces that match `pattern`.
    pub fn exclude(mut self, pattern: &str) -> Self {
        self.selection = self.selection.and_then(|selection| selection.excluding(pattern));
        self
    }

    /// Names the deployment, where several are backed up into one repository: [retention](crate::RetentionPolicy) counts each by itself.
    pub fn source(mut self, name: impl Into<String>) -> Self {
        self.settings.source = Some(name.into());
        self
    }

    /// Marks the snapshot, for [retention](crate::RetentionPolicy::keep_tags); may be called several times.
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.settings.tags.insert(tag.into());
        self
    }

    /// Sets zstd's level.
    pub fn compression_level(mut self, level: i32) -> Self {
        self.settings.compression_level = level;
        self
    }

    /// Reads from the members that this read preference chooses; the primary by default.
    ///
    /// The cluster time is still taken from the primary, and a secondary waits until it has it.
    pub fn read_preference(mut self, preference: ReadPreference) -> Self {
        self.read_preference = Some(preference);
        self
    }

    /// Tells `sink` how it goes.
    pub fn progress(mut self, sink: Arc<dyn ProgressSink>) -> Self {
        self.progress = sink;
        self
    }

    /// Sends metrics to `sink`.
    pub fn metrics(mut self, sink: Arc<dyn MetricsSink>) -> Self {
        self.metrics = sink;
        self
    }

    /// Stops when `token` is cancelled.
    pub fn cancellation(mut self, token: CancellationToken) -> Self {
        self.cancel = token;
        self
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// `InvalidInput` for a bad pattern or a compression level that zstd does not have.
    pub fn build(self) -> Result<Backup> {
        let selection = self.selection?;
        if !(-7..=22).contains(&self.settings.compression_level) {
            return Err(Error::invalid("the compression level must be from -7 to 22")
                .with_context("level", self.settings.compression_level));
        }
        if self.settings.partition.target_bytes == 0 || self.settings.partition.max_ranges == 0 {
            return Err(Error::invalid("a partition needs a size above zero"));
        }
        Ok(Backup {
            deployment: self.deployment,
            repository: self.repository,
            settings: BackupSettings { selection, ..self.settings },
            from: self.read_preference.map(SelectionCriteria::ReadPreference),
            progress: self.progress,
            metrics: metrics::BackupMetrics::register(&*self.metrics),
            cancel: self.cancel,
        })
    }
}

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
        BackupBuilder {
            deployment: deployment.clone(),
            repository: repository.clone(),
            settings: BackupSettings::default(),
            selection: Ok(NamespaceSelection::all()),
            read_preference: None,
            progress: Arc::new(NoProgress),
            metrics: Arc::new(NoMetrics),
            cancel: CancellationToken::new(),
        }
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
        catalog.read_users_and_roles(&self.deployment, &self.settings.selection).await?;
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
            self.progress.event(&mongo_core::progress::ProgressEvent::Note(
                "collections or indexes are changing; reading the catalog again".to_owned(),
            ));
            catalog = again;
        }
        Err(Error::new(
            ErrorKind::Unavailable,
            "collections or indexes are created, changed or dropped all the time: try again when that has ended",
        ))
    }

    /// What a majority has: nothing before it can be rolled back, and everything after it is still to be read.
    async fn majority_time(&self) -> Result<Timestamp> {
        let hello = self.deployment.database("admin").run_command(doc! { "hello": 1 }).await?;
        let time = hello
            .get_document("lastWrite")
            .and_then(|write| write.get_document("majorityOpTime"))
            .and_then(|time| time.get_timestamp("ts"));
        time.map_err(|error| {
            Error::new(ErrorKind::Unsupported, "the primary does not tell what a majority has").with_source(error)
        })
    }

    /// No collection may have been dropped, renamed or made anew while it was read: a cursor on a name that is gone finds
    /// nothing, without an error, even at a cluster time at which there were documents.
    async fn check_still_there(&self, catalog: &Catalog) -> Result<()> {
        let now = self.read_catalog().await?;
        for entry in &catalog.entries {
            if entry.kind() != CollectionKind::View && now.get(entry.namespace()).is_none_or(|now| now.uuid() != entry.uuid()) {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "a collection was dropped or renamed during the backup: run it again",
                )
                .with_context("namespace", entry.namespace()));
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
        let resume_point = match backup.deployment.topology() {
            Topology::Standalone => None,
            _ => Some(backup.majority_time().await?),
        };
        if backup.deployment.can_read_snapshots() {
            let (catalog, at) = backup.choose_cluster_time(catalog).await?;
            let attempt = backup.attempt(started, session, &catalog, &estimates, When::At(at)).await;
            match attempt {
                Err(error) if is_snapshot_lost(&error) && backup.settings.demand == ConsistencyDemand::WherePossible => {
                    let reason = "the server gave up the history of the cluster time before everything was read".to_owned();
                    tracing::warn!("{reason}");
                    backup
                        .progress
                        .event(&mongo_core::progress::ProgressEvent::Note(format!("{reason}: reading anew with best effort")));
                    let catalog = backup.read_catalog().await?;
                    backup.attempt(started, session, &catalog, &estimates, When::BestEffort { reason, resume_point }).await
                }
                other => other,
            }
        } else {
            let reason = no_snapshots(&backup.deployment);
            // Read again behind the resume point, so that a later replay knows every collection or sees it made.
            let catalog = backup.read_catalog().await?;
            backup.attempt(started, session, &catalog, &estimates, When::BestEffort { reason, resume_point }).await
        }
    }
}

/// The time at which a backup reads.
enum When {
    /// Everything at one cluster time.
    At(Timestamp),
    /// Everything as it is when its turn comes. A later replay must begin at the resume point.
    BestEffort { reason: String, resume_point: Option<Timestamp> },
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

    async fn attempt(
        &self,
        started: DateTime,
        session: &Session,
        catalog: &Catalog,
        estimates: &BTreeMap<Namespace, (u64, u64)>,
        when: When,
    ) -> Result<BackupReport> {
        let at = match &when {
            When::At(at) => Some(*at),
            When::BestEffort { .. } => None,
        };
        let known_bits = self.known_bits().await?;
        let (documents, bytes) = estimates.values().fold((0, 0), |(documents, bytes), (d, b)| (documents + d, bytes + b));
        let meter = Arc::new(PhaseMeter::start(Arc::clone(&self.progress), "data", Total::estimate(documents, bytes)));
        // Readers stop when the archive fails.
        let stop = self.cancel.child_token();
        let store = SegmentStore::new(&self.repository, self.settings.compression_level)?;
        let (collected, totals) = storing(store, &self.cancel, |store| {
            let context = collect::Context {
                deployment: &self.deployment,
                config: self.repository.config(),
                store,
                settings: &self.settings,
                from: self.from.as_ref(),
                at,
                known_bits,
                meter: Arc::clone(&meter),
                metrics: self.metrics.clone(),
                stop: stop.clone(),
                retry: self.settings.retry.clone(),
                retry_budget: RetryBudget::default(),
            };
            async {
                let collected = collect::collect(context, catalog, estimates).await;
                if collected.is_err() {
                    stop.cancel();
                }
                collected
            }
        })
        .await?;
        if let Ok(meter) = Arc::try_unwrap(meter) {
            meter.finish();
        }
        self.check_still_there(catalog).await?;
        let (consistency, resume_point) = match when {
            When::At(cluster_time) => {
                (Consistency::PointInTime { cluster_time, exceptions: collected.exceptions }, Some(cluster_time))
            }
            When::BestEffort { reason, resume_point } => (Consistency::BestEffort { reason }, resume_point),
        };
        let sum = |number: fn(&SnapshotNamespace) -> u64| collected.namespaces.iter().map(number).sum::<u64>();
        let manifest = SnapshotManifest {
            id: session.snapshot().clone(),
            started,
            finished: DateTime::now(),
            server_version: self.deployment.server_version().to_string(),
            topology: self.deployment.topology().clone(),
            consistency,
            resume_point,
            selection: self.settings.selection.clone(),
            left_out: catalog.left_out.clone(),
            namespaces: collected.namespaces.len() as u64,
            documents: sum(SnapshotNamespace::documents),
            bytes: sum(SnapshotNamespace::bytes),
            new_segments: totals.new_segments,
            reused_segments: totals.reused_segments,
            stored_bytes: totals.stored_bytes,
            tool: TOOL.to_owned(),
            source: self.settings.source.clone(),
            tags: self.settings.tags.clone(),
            catalog: collected.catalog,
        };
        session.publish(&manifest).await?;
        // The snapshot exists: what goes wrong from here on is the next operation's business.
        if let Err(error) = self.repository.reload_index().await {
            tracing::warn!(error = %error.report(), "the index could not be read anew");
        }
        Ok(BackupReport::new(&manifest, &collected.namespaces))
    }
}

/// What a backup did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct BackupReport {
    /// The new snapshot.
    pub id: SnapshotId,
    /// How its documents relate in time.
    pub consistency: Consistency,
    /// Each namespace with its documents and bytes.
    pub namespaces: Vec<NamespaceReport>,
    /// Documents in all.
    pub documents: u64,
    /// Bytes of BSON in all.
    pub bytes: u64,
    /// Segments that were new to the repository.
    pub new_segments: u64,
    /// Segments that it had already.
    pub reused_segments: u64,
    /// Bytes that the archive grew by, but for pack directories, index and manifest.
    pub stored_bytes: u64,
    /// What the selection covered but the snapshot does not hold.
    pub left_out: Vec<LeftOut>,
    /// Seconds that it took.
    pub seconds: f64,
    /// The server's version.
    pub server_version: String,
}

/// One namespace of a report.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct NamespaceReport {
    /// Its name.
    pub namespace: Namespace,
    /// Its kind.
    pub kind: CollectionKind,
    /// Documents; of a time-series collection its buckets.
    pub documents: u64,
    /// Bytes of BSON.
    pub bytes: u64,
}

impl BackupReport {
    fn new(manifest: &SnapshotManifest, namespaces: &[SnapshotNamespace]) -> Self {
        let namespaces = namespaces
            .iter()
            .map(|namespace| NamespaceReport {
                namespace: namespace.namespace().clone(),
                kind: namespace.kind(),
                documents: namespace.documents(),
                bytes: namespace.bytes(),
            })
            .collect();
        Self {
            id: manifest.id.clone(),
            consistency: manifest.consistency.clone(),
            namespaces,
            documents: manifest.documents,
            bytes: manifest.bytes,
            new_segments: manifest.new_segments,
            reused_segments: manifest.reused_segments,
            stored_bytes: manifest.stored_bytes,
            left_out: manifest.left_out.clone(),
            seconds: manifest.duration().as_secs_f64(),
            server_version: manifest.server_version.clone(),
        }
    }
}

const CATALOG_READINGS: usize = 10;
