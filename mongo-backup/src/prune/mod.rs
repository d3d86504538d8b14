//! Removing snapshots that a policy does not keep, and the data that no snapshot needs any more.

mod live;
mod repack;
mod slices;
mod sweep;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Result,
    bson::DateTime,
    clock::{Clock, SystemClock},
    progress::{NoProgress, ProgressSink},
};
use serde::Serialize;

use self::{live::Live, slices::Spent};
use crate::{
    audit::AuditAction,
    repository::{
        Repository,
        condemned::Condemned,
        manifest::{SnapshotId, SnapshotManifest},
        pack::PackId,
    },
    retention::{RetentionPolicy, Verdict},
    setters::conduct_setters,
};

/// Removes what a [`RetentionPolicy`] does not keep, and frees its space.
///
/// Backups, restores, verifications and other prunes may go on meanwhile, on other hosts too; there is no lock. Packs that no snapshot needs are first
/// *condemned*: no new backup relies on them. They are deleted when every backup that was under way then has published its
/// snapshot or ended, and whoever was reading is through. One that gives no sign of life for a day is waited for no longer; a backup is
/// revoked then, which makes it impossible that it publishes what it
/// began. Usually no backup is under way, and both happens in one run; otherwise the next prune deletes.
///
/// ```no_run
/// # async fn f(repository: mongo_backup::Repository) -> mongo_backup::Result<()> {
/// use mongo_backup::{Prune, RetentionPolicy};
///
/// let policy = RetentionPolicy { keep_daily: 7, keep_weekly: 4, keep_monthly: 12, ..RetentionPolicy::default() };
/// let prune = Prune::new(&repository, policy);
/// let plan = prune.plan().await?;
/// println!("{} snapshots would go, {} bytes with them", plan.summary().removed, plan.summary().unused_bytes);
/// let report = plan.execute().await?;
/// println!("{} bytes freed", report.freed_bytes);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Prune {
    repository: Repository,
    policy: RetentionPolicy,
    abandoned_after: Duration,
    listing_lag: Duration,
    max_unused: f64,
    max_repack_bytes: u64,
    max_oplog_age: Option<Duration>,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn ProgressSink>,
    cancel: CancellationToken,
}

impl Prune {
    /// Prepares a prune of a repository.
    pub fn new(repository: &Repository, policy: RetentionPolicy) -> Self {
        Self {
            repository: repository.clone(),
            policy,
            abandoned_after: ABANDONED_AFTER,
            listing_lag: repository.archive().listing_lag(),
            max_unused: MAX_UNUSED,
            max_repack_bytes: MAX_REPACK_BYTES,
            max_oplog_age: None,
            clock: Arc::new(SystemClock::new()),
            progress: Arc::new(NoProgress),
            cancel: CancellationToken::new(),
        }
    }

    /// Takes a backup or a reader for dead that has given no sign of life for so long. Default a day; they give one every five minutes.
    pub fn abandoned_after(mut self, silence: Duration) -> Self {
        self.abandoned_after = silence;
        self
    }

    /// Deletes nothing sooner than so long after it was condemned. Default what the [archive](crate::ArchiveSink::listing_lag) says.
    pub fn listing_lag(mut self, lag: Duration) -> Self {
        self.listing_lag = lag;
        self
    }

    /// Lets so large a share of what packs hold be unused before packs are written anew without it. Default 0.1.
    pub fn max_unused(mut self, share: f64) -> Self {
        self.max_unused = share;
        self
    }

    /// Writes packs of so many bytes anew at most. Default 4 GiB.
    pub fn max_repack_bytes(mut self, bytes: u64) -> Self {
        self.max_repack_bytes = bytes;
        self
    }

    /// Takes the time from `clock`.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    conduct_setters!("Stops when `token` is cancelled. What was done until then stays done, and the next prune goes on.");

    /// Finds out what there is to do. Changes nothing.
    ///
    /// # Errors
    /// `InvalidInput` for a policy without a rule; `CorruptData` when a snapshot is damaged so that it cannot be told what it needs, naming the
    /// object: nothing is deleted then; else the archive's own.
    #[tracing::instrument(skip_all, name = "prune_plan")]
    pub async fn plan(&self) -> Result<PrunePlan<'_>> {
        if !(0.0..=1.0).contains(&self.max_unused) {
            return Err(Error::invalid("the share that may be unused must be from 0 to 1"));
        }
        let snapshots = self.readable_snapshots().await?;
        let verdicts = self.policy.judge(&snapshots, self.now())?;
        let kept: Vec<SnapshotManifest> = snapshots
            .into_iter()
            .zip(&verdicts)
            .filter_map(|(snapshot, verdict)| verdict.is_kept().then_some(snapshot))
            .collect();
        let condemned = self.repository.read_condemned().await?;
        let live = self.mark(&kept).await?;
        if verdicts.is_empty() && !live.index().packs().is_empty() {
            // A folder that is not mounted looks like this, and everything would go.
            return Err(Error::new(
                ErrorKind::NotFound,
                "no snapshot is listed, though data of snapshots is there, so nothing is removed: see whether snapshots/ can be read, or delete the repository",
            ));
        }
        let mut selection = self.select(&live, &condemned);
        selection.slices = self.spent_slices(&kept).await?;
        let summary = PruneSummary {
            removed: verdicts.iter().filter(|verdict| !verdict.is_kept()).count() as u64,
            unused_packs: selection.unused.len() as u64,
            unused_bytes: selection.unused_bytes,
            repacked_packs: selection.repack.len() as u64,
            repacked_bytes: selection.repack_bytes,
            oplog_slices: selection.slices.len() as u64,
            oplog_bytes: selection.slices.iter().map(|spent| spent.bytes).sum(),
            snapshots: verdicts,
        };
        Ok(PrunePlan { prune: self, kept, selection, live, summary })
    }

    /// [`plan`](Self::plan) and [`PrunePlan::execute`] in one.
    ///
    /// # Errors
    /// As those.
    ///
    /// # Cancel safety
    /// As [`PrunePlan::execute`].
    pub async fn run(&self) -> Result<PruneReport> {
        self.plan().await?.execute().await
    }

    fn now(&self) -> DateTime {
        let since = self.clock.wall().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        DateTime::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }

    /// All snapshots: if one cannot be read, what it needs is not known and nothing may be deleted.
    async fn readable_snapshots(&self) -> Result<Vec<SnapshotManifest>> {
        let mut list = self.repository.snapshots().await?;
        match list.damaged.pop() {
            None => Ok(list.snapshots),
            Some((name, error)) => Err(error
                .wrap("a snapshot's manifest cannot be read, so nothing is removed: put a good copy back, or delete it")
                .with_context("object", name)),
        }
    }

    /// Marks what snapshots need, on an index that is read anew.
    async fn mark(&self, snapshots: &[SnapshotManifest]) -> Result<Live> {
        let mut attempts = 0;
        loop {
            self.repository.reload_index().await?;
            let mut live = Live::new(self.repository.clone(), self.repository.index());
            let Err((snapshot, error)) = self.try_mark(&mut live, snapshots).await else { return Ok(live) };
            attempts += 1;
            if error.kind() != ErrorKind::CorruptData {
                return Err(error);
            }
            // Another prune may have moved what is missing since the index was read.
            if attempts >= MARKINGS {
                return Err(error
                    .wrap("a snapshot is damaged, so nothing is removed: verify tells more")
                    .with_context("snapshot", snapshot));
            }
        }
    }

    async fn try_mark(&self, live: &mut Live, snapshots: &[SnapshotManifest]) -> Result<(), (SnapshotId, Error)> {
        for snapshot in snapshots {
            let marked = match self.check_cancelled() {
                Ok(()) => live.mark(snapshot).await,
                Err(cancelled) => Err(cancelled),
            };
            if let Err(error) = marked {
                // Another prune may have removed it, and deleted what only it needed, since it was listed.
                match self.repository.find_snapshot(&snapshot.id).await {
                    Ok(None) => {}
                    _ => return Err((snapshot.id.clone(), error)),
                }
            }
        }
        Ok(())
    }

    /// Which packs can go: those of which nothing is needed, and some of which little is, as far as the limits allow.
    fn select(&self, live: &Live, condemned: &Condemned) -> Selection {
        let usage = live.usage();
        let mut selection = Selection::default();
        let (mut held, mut unused) = (0, 0);
        let mut partly: Vec<(f64, PackId, u64, u64)> = Vec::new();
        for pack in live.index().packs().iter().filter(|pack| !condemned.is_pending(pack.id)) {
            let usage = usage.get(&pack.id).copied().unwrap_or_default();
            if usage.used == 0 {
                selection.unused.push(pack.id);
                selection.unused_bytes += pack.size;
                continue;
            }
            if pack.condemned {
                continue;
            }
            held += usage.held;
            unused += usage.held - usage.used;
            if usage.used < usage.held {
                let share = usage.used as f64 / usage.held as f64;
                partly.push((share, pack.id, pack.size, usage.held - usage.used));
            }
        }
        partly.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        for (_, pack, size, waste) in partly {
            if unused as f64 <= self.max_unused * held as f64 || selection.repack_bytes + size > self.max_repack_bytes {
                break;
            }
            selection.repack.push(pack);
            selection.repack_bytes += size;
            unused -= waste;
            held -= waste;
        }
        selection
    }
}

/// Packs that can go.
#[derive(Debug, Default)]
struct Selection {
    unused: Vec<PackId>,
    unused_bytes: u64,
    repack: Vec<PackId>,
    repack_bytes: u64,
    slices: Vec<Spent>,
}

/// What a prune would do.
#[derive(Debug)]
pub struct PrunePlan<'a> {
    prune: &'a Prune,
    kept: Vec<SnapshotManifest>,
    selection: Selection,
    live: Live,
    summary: PruneSummary,
}

/// A prune's plan as plain data, for a dry run's output.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct PruneSummary {
    /// What the policy says of each snapshot.
    pub snapshots: Vec<Verdict>,
    /// How many snapshots would be removed.
    pub removed: u64,
    /// Packs of which nothing would be needed any more.
    pub unused_packs: u64,
    /// Their bytes.
    pub unused_bytes: u64,
    /// Packs that would be written anew without what is not needed.
    pub repacked_packs: u64,
    /// Their bytes.
    pub repacked_bytes: u64,
    /// Slices of the oplog that no snapshot that is kept could be rolled forward with.
    pub oplog_slices: u64,
    /// Their bytes.
    pub oplog_bytes: u64,
}

/// What a prune did.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct PruneReport {
    /// Snapshots that were removed.
    pub removed: Vec<SnapshotId>,
    /// Packs that were condemned.
    pub condemned_packs: u64,
    /// Packs that were written anew without what is not needed.
    pub repacked_packs: u64,
    /// Packs that were deleted, those that an earlier prune condemned included.
    pub deleted_packs: u64,
    /// Slices of the oplog that were removed.
    pub removed_slices: u64,
    /// The bytes of both.
    pub freed_bytes: u64,
    /// Packs that are condemned and not deleted yet, because a backup or a reader that may need them is under way, or the archive's listings lag behind.
    pub postponed_packs: u64,
    /// Backups that were taken for dead: they can no longer publish their snapshots.
    pub revoked: Vec<SnapshotId>,
}

impl PrunePlan<'_> {
    /// The plan as plain data.
    pub fn summary(&self) -> &PruneSummary {
        &self.summary
    }

    /// Carries the plan out.
    ///
    /// # Errors
    /// `Cancelled` by the token, `CorruptData` when something that a kept snapshot needs turns out to be damaged, or the archive's own.
    /// Whatever happens, no snapshot that is kept loses anything, and the next prune goes on where this one ended.
    ///
    /// # Cancel safety
    /// A dropped future leaves what an error does.
    #[tracing::instrument(skip_all, name = "prune")]
    pub async fn execute(self) -> Result<PruneReport> {
        let prune = self.prune;
        let subject = [("policy", format!("{:?}", prune.policy))];
        let removed = |report: &PruneReport| {
            let ids: Vec<&str> = report.removed.iter().map(SnapshotId::as_str).collect();
            Some(("removed", ids.join(" ")))
        };
        prune.repository.recorded(AuditAction::Prune, subject, self.execute_unrecorded(), removed).await
    }

    async fn execute_unrecorded(self) -> Result<PruneReport> {
        let Self { prune, kept, selection, live, summary } = self;
        let mut report = PruneReport::default();
        for verdict in summary.snapshots.iter().filter(|verdict| !verdict.is_kept()) {
            prune.check_cancelled()?;
            prune.repository.forget(&verdict.snapshot).await?;
            report.removed.push(verdict.snapshot.clone());
        }
        prune.remove_slices(&selection.slices).await?;
        report.removed_slices = selection.slices.len() as u64;
        report.freed_bytes += summary.oplog_bytes;
        if !selection.repack.is_empty() {
            prune.repack(&selection.repack, &live).await?;
            report.repacked_packs = selection.repack.len() as u64;
        }
        let condemned: Vec<PackId> = selection.unused.iter().chain(&selection.repack).copied().collect();
        if !condemned.is_empty() {
            let snapshots: Vec<SnapshotId> = kept.iter().map(|snapshot| snapshot.id.clone()).collect();
            prune.repository.condemn(&condemned, &snapshots, prune.now()).await?;
            report.condemned_packs = condemned.len() as u64;
        }
        drop(live);
        prune.sweep(&mut report).await?;
        prune.repository.reload_index().await?;
        Ok(report)
    }
}

/// How much of a pack snapshots need.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    /// Plain bytes that it holds.
    held: u64,
    /// Those of them that are needed from this pack, and not from another that holds them too.
    used: u64,
}

type Usages = HashMap<PackId, Usage>;
type PackSet = HashSet<PackId>;

const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);
const MAX_UNUSED: f64 = 0.1;
const MAX_REPACK_BYTES: u64 = 4 << 30;
const MARKINGS: u32 = 4;
