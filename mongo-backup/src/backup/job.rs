//! Making one snapshot: reading, once or in several passes, and publishing.

use std::{collections::BTreeMap, sync::Arc};

use mongo_core::{
    Deployment, Error, Namespace, Result, RetryBudget, Topology,
    bson::{DateTime, Timestamp},
    progress::{PhaseMeter, Total},
    transfer::{catalog::Catalog, scan::is_snapshot_lost},
};

use super::{
    Backup, BackupPlan, BackupReport, ConsistencyDemand, NamespaceReport, collect,
    history::{History, Parent},
};
use crate::repository::{
    TOOL,
    announcement::Session,
    manifest::{Consistency, SnapshotManifest},
    store::{SegmentStore, StoreTotals, storing},
};

/// Makes the snapshot of a plan, under the id of a session.
pub(super) async fn make_snapshot(plan: BackupPlan<'_>, started: DateTime, session: &Session) -> Result<BackupReport> {
    let BackupPlan { backup, catalog, estimates } = plan;
    let job = Job { backup, session, started, estimates };
    let origin = async {
        // Before anything else is read: what has begun by then is known to whoever replays the oplog from there.
        let history = backup.history().await?;
        let parent = backup.parent(history).await?;
        let (catalog, at) = match history {
            None if !backup.deployment.can_read_snapshots() => (backup.read_catalog().await?, None),
            _ => backup.choose_cluster_time(catalog).await.map(|(catalog, at)| (catalog, Some(at)))?,
        };
        Ok((history, parent, catalog, at))
    };
    // Now that the backup is announced, what it finds stays.
    let ((history, parent, catalog, at), ()) = tokio::try_join!(origin, backup.repository.refresh_index())?;
    if let Some(at) = at.filter(|_| backup.deployment.can_read_snapshots()) {
        job.converge(catalog, at, history, parent).await
    } else {
        let reason = no_snapshots(&backup.deployment);
        let reason = match &parent {
            Parent::ByField { field, .. } => format!(
                "{reason}, and what has changed was told by the field {field}: documents that were deleted, or changed without it, since the last full scan are as they were"
            ),
            _ => reason,
        };
        let reading = job.read(catalog, When::Now { defined_at: at }, history, &parent).await?;
        job.publish_as_read(reading, reason, parent).await
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

impl Reading {
    /// Counts what an earlier pass read for the same snapshot.
    fn goes_on_from(&mut self, earlier: Option<Self>) {
        let Some(earlier) = earlier else { return };
        self.totals.add(earlier.totals);
        let (now, before) = (&mut self.collected, earlier.collected);
        now.read += before.read;
        // What an earlier pass did not take over from the parent, the later ones did not either.
        now.taken_over = now.taken_over.min(before.taken_over);
        now.full_scan = before.full_scan.or(now.full_scan.take());
    }
}

impl Job<'_> {
    /// Reads at one cluster time. Where that takes longer than the server keeps its history, everything is read once as it is, and then, at one cluster
    /// time, what has changed meanwhile; and so on, until it fits.
    async fn converge(
        &self,
        mut catalog: Catalog,
        mut at: Timestamp,
        mut history: Option<History>,
        parent: Parent,
    ) -> Result<BackupReport> {
        let backup = self.backup;
        let mut base = parent.clone();
        let mut last = None;
        for pass in 1.. {
            let error = match self.read(catalog, When::At(at), history, &base).await {
                Ok(mut reading) => {
                    reading.goes_on_from(last);
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
            // What was stored so far need not be stored again.
            backup.repository.refresh_index().await?;
            let (now, defined_at) = backup.choose_cluster_time(backup.read_catalog().await?).await?;
            let mut reading = self.read(now, When::Now { defined_at: Some(defined_at) }, history, &base).await?;
            reading.goes_on_from(last);
            let Some(known) = history else { return self.publish_as_read(reading, reason, parent).await };
            base = Parent::Older { id: None, catalog: reading.collected.catalog.clone(), from: known.beginning, set: known.set };
            history = backup.history().await?;
            backup.repository.refresh_index().await?;
            (catalog, at) = backup.choose_cluster_time(backup.read_catalog().await?).await?;
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

/// The time at which a backup reads.
#[derive(Clone, Copy)]
enum When {
    /// Everything at one cluster time.
    At(Timestamp),
    /// Everything as it is when its turn comes. Collections and indexes are those of a time, if there is an oplog.
    Now { defined_at: Option<Timestamp> },
}

impl Job<'_> {
    /// Reads and stores everything that is not taken over.
    async fn read(&self, catalog: Catalog, when: When, history: Option<History>, parent: &Parent) -> Result<Reading> {
        let backup = self.backup;
        let (at, defined_at) = match when {
            When::At(at) => (Some(at), Some(at)),
            When::Now { defined_at } => (None, defined_at),
        };
        let (older, known_bits, full_scan) = match backup.older(parent, defined_at, &catalog).await? {
            Ok(mut older) => {
                let bits = std::mem::take(&mut older.bits);
                (Some(older), bits, None)
            }
            Err(reason) => (None, backup.known_bits().await?, Some(reason)),
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
                background: backup.background.clone(),
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
        Ok(BackupReport::new(&manifest, collected.namespaces, collected.read, collected.full_scan))
    }
}

pub(super) fn no_snapshots(deployment: &Deployment) -> String {
    match deployment.topology() {
        Topology::Standalone => "a standalone server cannot be read at one cluster time".to_owned(),
        _ => format!("MongoDB {} cannot be read at one cluster time, 5.0 and newer can", deployment.server_version()),
    }
}

/// So often it is tried to read what has changed within the server's history.
const PASSES: u32 = 4;
