//! Making a snapshot: plan, inspect, run, report.

mod changes;
mod collect;
mod history;
mod job;
mod pieces;
mod regrow;
mod report;
mod settings;

use std::{collections::BTreeMap, sync::Arc};

use mongo_core::{
    CancellationToken, Deployment, Error, ErrorKind, Namespace, Result, Topology,
    bson::{DateTime, Timestamp, doc},
    gate::Background,
    mongodb::options::SelectionCriteria,
    progress::{ProgressEvent, ProgressSink},
    transfer::catalog::{Catalog, CollectionEntry, CollectionKind, LeftOut, collection_uuids},
    transform::Transform,
};

pub use self::{
    report::{BackupReport, NamespaceReport},
    settings::{BackupBuilder, BackupSettings, ConsistencyDemand},
};
use crate::{
    audit::AuditAction,
    metrics,
    repository::{Repository, announcement::Session},
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
    background: Background,
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
                format!("{}, so there is no backup at one point in time", job::no_snapshots(&self.deployment)),
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
        let report = job::make_snapshot(self, started, &session).await;
        session.end(report.is_err()).await;

        report
    }
}

const CATALOG_READINGS: usize = 10;
