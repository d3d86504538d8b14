//! Slices of the oplog that no snapshot can be rolled forward with any more.

use std::time::Duration;

use mongo_core::{
    Result,
    bson::{DateTime, Timestamp},
    transfer::oplog::ReplicaSetId,
};

use super::Prune;
use crate::repository::{
    announcement::{Purpose, UnderWay},
    manifest::SnapshotManifest,
    slice::{Stretch, Stretches},
};

/// A slice or a gap that can go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spent {
    set: ReplicaSetId,
    stretch: Stretch,
    is_gap: bool,
    pub(super) bytes: u64,
}

impl Prune {
    /// What lies before everything that can be rolled forward from, or is older than is wanted and not needed by a snapshot for its own sake.
    ///
    /// A backup that is under way, here or on a host whose clock differs by a day, may rely on what was captured since shortly before it began.
    pub(super) async fn spent_slices(&self, kept: &[SnapshotManifest]) -> Result<Vec<Spent>> {
        let under_way = self.repository.under_way().await?;
        // A restore may be about to roll forward with what it has planned to.
        let reads = |operation: &UnderWay| operation.purpose == Purpose::Reading && self.is_young(operation.last_sign);
        if under_way.iter().any(reads) {
            return Ok(Vec::new());
        }
        let begun = under_way.iter().filter(|operation| operation.purpose == Purpose::Backup).map(|backup| backup.started);
        let earliest = begun.fold(self.now(), |earliest, started| earliest.min(started));
        let safe = seconds(earliest.timestamp_millis() / 1000).saturating_sub(MARGIN);
        let mut spent = Vec::new();
        for (set, stretches) in self.repository.all_stretches().await? {
            let of_set: Vec<&SnapshotManifest> = kept.iter().filter(|snapshot| snapshot.replica_set == Some(set)).collect();
            let first = of_set.iter().filter_map(|snapshot| snapshot.resume_point).min();
            let newest = of_set.iter().filter_map(|snapshot| snapshot.resume_point).max();
            let is_spent = |stretch: &Stretch| {
                let is_past = first.is_none_or(|first| stretch.last < first);
                let is_safe = stretch.last.time < safe;
                // From the newest snapshot on everything stays: there is no other way to what came behind it.
                let is_wanted = newest.is_none_or(|newest| stretch.last >= newest);
                is_safe
                    && (is_past
                        || (!is_wanted && self.is_too_old(stretch) && !of_set.iter().any(|snapshot| needs(snapshot, stretch))))
            };
            let Stretches { slices, gaps } = stretches;
            let of = |is_gap: bool| move |(stretch, bytes): (Stretch, u64)| Spent { set, stretch, is_gap, bytes };
            spent.extend(slices.into_iter().filter(|(stretch, _)| is_spent(stretch)).map(of(false)));
            spent.extend(gaps.into_iter().filter(|(stretch, _)| is_spent(stretch)).map(of(true)));
        }
        Ok(spent)
    }

    fn is_young(&self, sign: DateTime) -> bool {
        let age = self.now().saturating_duration_since(sign);
        age < self.abandoned_after + Duration::from_secs(24 * 3600)
    }

    fn is_too_old(&self, stretch: &Stretch) -> bool {
        let now = seconds(self.now().timestamp_millis() / 1000);
        self.max_oplog_age.is_some_and(|age| u64::from(stretch.last.time) + age.as_secs() < u64::from(now))
    }

    pub(super) async fn remove_slices(&self, spent: &[Spent]) -> Result<()> {
        for Spent { set, stretch, is_gap, .. } in spent {
            self.check_cancelled()?;
            self.repository.remove_stretch(*set, *stretch, *is_gap).await?;
        }
        Ok(())
    }

    /// Removes slices that ended so long ago, though older snapshots could be rolled forward with them. Default none are too old.
    ///
    /// Those from the newest snapshot on stay.
    /// What makes one state of a snapshot that was read over a while stays as long as the snapshot.
    pub fn max_oplog_age(mut self, age: Duration) -> Self {
        self.max_oplog_age = Some(age);
        self
    }
}

/// Whether a slice is what makes one state of a snapshot.
fn needs(snapshot: &SnapshotManifest, stretch: &Stretch) -> bool {
    let ends: Option<(Timestamp, Timestamp)> = snapshot.resume_point.zip(snapshot.read_until);
    ends.is_some_and(|(from, until)| stretch.last >= from && stretch.first <= until)
}

fn seconds(seconds: i64) -> u32 {
    u32::try_from(seconds.max(0)).unwrap_or(u32::MAX)
}

/// Clocks may differ by a day, and a transaction may have begun before the backup that sees it.
const MARGIN: u32 = 2 * 24 * 3600;
