//! Which snapshots are kept: a policy, and what it says of each snapshot.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mongo_core::{Error, Result, bson::DateTime};
use serde::{Deserialize, Serialize};

use crate::repository::manifest::{SnapshotId, SnapshotManifest};

/// Which snapshots are kept.
///
/// A snapshot is kept if any rule keeps it. The rules that count look at snapshots from the newest on: `keep_daily: 7` keeps the newest
/// snapshot of each of the seven newest days that have one. Days begin at midnight UTC, weeks on Monday. Snapshots of
/// different sources ([`BackupBuilder::source`](crate::BackupBuilder::source)), kinds of deployments, replica set names or selections are
/// counted apart, and the newest of each is always kept.
///
/// ```
/// use mongo_backup::RetentionPolicy;
///
/// let policy = RetentionPolicy { keep_daily: 7, keep_weekly: 4, keep_monthly: 12, ..RetentionPolicy::default() };
/// # let _ = policy;
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(clippy::exhaustive_structs, reason = "written as a literal by hosts; a new rule is a new major version")]
pub struct RetentionPolicy {
    /// Keeps so many of the newest.
    pub keep_last: u32,
    /// Keeps the newest of so many hours.
    pub keep_hourly: u32,
    /// Keeps the newest of so many days.
    pub keep_daily: u32,
    /// Keeps the newest of so many weeks.
    pub keep_weekly: u32,
    /// Keeps the newest of so many months.
    pub keep_monthly: u32,
    /// Keeps the newest of so many years.
    pub keep_yearly: u32,
    /// Keeps all that are younger.
    pub keep_within: Option<Duration>,
    /// Keeps all that have one of these tags.
    pub keep_tags: BTreeSet<String>,
    /// Removes what is older, whatever the rules that count say. If it is the only rule, it keeps everything younger.
    pub max_age: Option<Duration>,
}

/// What a policy says of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Verdict {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Why it is kept, each rule in words; empty if it goes.
    pub kept_by: Vec<String>,
}

impl Verdict {
    /// Whether the snapshot is kept.
    pub fn is_kept(&self) -> bool {
        !self.kept_by.is_empty()
    }
}

impl RetentionPolicy {
    /// What the policy says of each snapshot, in the order given.
    ///
    /// # Errors
    /// `InvalidInput` for a policy without a rule: it would keep next to nothing.
    pub fn judge(&self, snapshots: &[SnapshotManifest], now: DateTime) -> Result<Vec<Verdict>> {
        if *self == Self::default() {
            return Err(Error::invalid("the retention policy has no rule: say what is to be kept"));
        }
        let mut verdicts: Vec<Verdict> =
            snapshots.iter().map(|snapshot| Verdict { snapshot: snapshot.id.clone(), kept_by: Vec::new() }).collect();
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (position, snapshot) in snapshots.iter().enumerate() {
            groups.entry(group(snapshot)).or_default().push(position);
        }
        for mut positions in groups.into_values() {
            positions.sort_by(|a, b| {
                let key = |position: &usize| snapshots.get(*position).map(|snapshot| (snapshot.started, &snapshot.id));
                key(b).cmp(&key(a))
            });
            self.judge_group(snapshots, &positions, now, &mut verdicts);
        }
        Ok(verdicts)
    }

    /// Judges snapshots that are counted together, given newest first.
    fn judge_group(&self, snapshots: &[SnapshotManifest], newest_first: &[usize], now: DateTime, verdicts: &mut [Verdict]) {
        let counted = self.counted();
        let only_age = self.max_age.is_some()
            && *self == Self { max_age: self.max_age, keep_tags: self.keep_tags.clone(), ..Self::default() };
        let mut seen: Vec<BTreeSet<String>> = vec![BTreeSet::new(); counted.len()];
        for (rank, position) in newest_first.iter().enumerate() {
            let (Some(snapshot), Some(verdict)) = (snapshots.get(*position), verdicts.get_mut(*position)) else { continue };
            let kept_by = &mut verdict.kept_by;
            if rank == 0 {
                kept_by.push("the newest".to_owned());
            }
            for ((name, most, period), seen) in counted.iter().zip(&mut seen) {
                let bucket = period(snapshot);
                if seen.len() < *most as usize && seen.insert(bucket) {
                    kept_by.push(format!("{name} {} of {most}", seen.len()));
                }
            }
            let age = age(snapshot, now);
            if self.keep_within.is_some_and(|within| age <= within) {
                kept_by.push("within".to_owned());
            }
            if only_age && rank > 0 {
                kept_by.push("younger than the maximum age".to_owned());
            }
            if rank > 0 && self.max_age.is_some_and(|most| age > most) {
                kept_by.clear();
            }
            // Somebody has marked them by hand: only a hand takes them away.
            kept_by.extend(snapshot.tags.intersection(&self.keep_tags).map(|tag| format!("tag {tag}")));
        }
    }

    fn counted(&self) -> Vec<Counted> {
        vec![
            ("last", self.keep_last, |snapshot| snapshot.id.to_string()),
            ("hourly", self.keep_hourly, |snapshot| periods(snapshot, HOUR).to_string()),
            ("daily", self.keep_daily, |snapshot| periods(snapshot, DAY).to_string()),
            // The epoch was a Thursday.
            ("weekly", self.keep_weekly, |snapshot| (periods(snapshot, DAY) + 3).div_euclid(7).to_string()),
            ("monthly", self.keep_monthly, |snapshot| calendar(snapshot, "0000-00".len())),
            ("yearly", self.keep_yearly, |snapshot| calendar(snapshot, "0000".len())),
        ]
    }
}

/// A rule that counts: its name, how many periods it keeps, and in which period a snapshot lies.
type Counted = (&'static str, u32, fn(&SnapshotManifest) -> String);

/// What snapshots must have in common to stand in for each other.
fn group(snapshot: &SnapshotManifest) -> String {
    format!("{:?} {} {:?}", snapshot.source, snapshot.topology, snapshot.selection)
}

fn periods(snapshot: &SnapshotManifest, millis: i64) -> i64 {
    snapshot.started.timestamp_millis().div_euclid(millis)
}

/// The beginning of the date, as 2026-02.
fn calendar(snapshot: &SnapshotManifest, length: usize) -> String {
    snapshot.started.try_to_rfc3339_string().unwrap_or_default().chars().take(length).collect()
}

/// Zero for a snapshot from the future: clocks of two hosts differ.
fn age(snapshot: &SnapshotManifest, now: DateTime) -> Duration {
    let millis = now.timestamp_millis().saturating_sub(snapshot.started.timestamp_millis());
    Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;

#[cfg(test)]
mod tests {
    use mongo_core::{NamespaceSelection, Topology, bson::doc};
    use proptest::prelude::*;

    use super::*;

    fn snapshot(hours: i64, tag: Option<&str>, pattern: Option<&str>) -> SnapshotManifest {
        let started = DateTime::from_millis(1_770_000_000_000 + hours * HOUR);
        let selection =
            pattern.map_or_else(NamespaceSelection::all, |pattern| NamespaceSelection::all().including(pattern).unwrap());
        let document = doc! {
            "id": SnapshotId::generate(started).unwrap().to_string(), "started": started, "finished": started,
            "serverVersion": "6.0.5", "topology": mongo_core::bson::serialize_to_bson(&Topology::Standalone).unwrap(),
            "consistency": { "kind": "best_effort", "reason": "test" }, "resumePoint": null,
            "selection": mongo_core::bson::serialize_to_bson(&selection).unwrap(), "leftOut": [],
            "namespaces": 0_i64, "documents": 0_i64, "bytes": 0_i64, "newSegments": 0_i64, "reusedSegments": 0_i64, "storedBytes": 0_i64,
            "tool": "test", "tags": tag.map(|tag| vec![tag]).unwrap_or_default(),
            "catalog": { "node": null, "documents": 0_i64, "bytes": 0_i64, "segments": 0_i64 },
        };
        mongo_core::bson::deserialize_from_document(document).unwrap()
    }

    /// The hours of the snapshots that a policy keeps, `now` being an hour after the last.
    fn kept(policy: &RetentionPolicy, hours: &[i64]) -> Vec<i64> {
        let snapshots: Vec<_> = hours.iter().map(|hours| snapshot(*hours, None, None)).collect();
        let now = DateTime::from_millis(1_770_000_000_000 + (hours.iter().max().unwrap() + 1) * HOUR);
        let verdicts = policy.judge(&snapshots, now).unwrap();
        hours.iter().zip(verdicts).filter(|(_, verdict)| verdict.is_kept()).map(|(hours, _)| *hours).collect()
    }

    #[test]
    fn counting_rules_keep_the_newest_of_each_period() {
        // 1_770_000_000 is 2026-02-02 02:40 UTC, a Monday.
        let every_six_hours: Vec<i64> = (0..120).map(|number| number * 6).collect();
        let policy = RetentionPolicy { keep_daily: 3, ..RetentionPolicy::default() };
        assert_eq!(kept(&policy, &every_six_hours), [666, 690, 714]);
        let policy = RetentionPolicy { keep_weekly: 2, ..RetentionPolicy::default() };
        assert_eq!(kept(&policy, &every_six_hours), [666, 714]);
        let policy = RetentionPolicy { keep_monthly: 2, ..RetentionPolicy::default() };
        assert_eq!(kept(&policy, &every_six_hours), [642, 714]);
        let policy = RetentionPolicy { keep_last: 2, keep_yearly: 5, ..RetentionPolicy::default() };
        assert_eq!(kept(&policy, &every_six_hours), [708, 714]);
    }

    #[test]
    fn ages_keep_and_remove() {
        let day = Duration::from_secs(24 * 3600);
        let hours = [0, 100, 200, 210];
        let policy = RetentionPolicy { max_age: Some(day), ..RetentionPolicy::default() };
        assert_eq!(kept(&policy, &hours), [200, 210]);
        let policy = RetentionPolicy { keep_within: Some(day * 5), keep_last: 1, ..RetentionPolicy::default() };
        assert_eq!(kept(&policy, &hours), [100, 200, 210]);
        let policy = RetentionPolicy { keep_last: 4, max_age: Some(day), ..RetentionPolicy::default() };
        assert_eq!(kept(&policy, &hours), [200, 210]);
        // The newest stays, however old it is.
        let old = [snapshot(0, None, None)];
        let now = DateTime::from_millis(1_900_000_000_000);
        assert!(policy.judge(&old, now).unwrap()[0].is_kept());
    }

    #[test]
    fn a_tag_does_not_turn_a_policy_by_age_into_one_that_keeps_nothing() {
        let day = Duration::from_secs(24 * 3600);
        let policy = RetentionPolicy {
            max_age: Some(day),
            keep_tags: BTreeSet::from(["release".to_owned()]),
            ..RetentionPolicy::default()
        };
        assert_eq!(kept(&policy, &[0, 100, 200, 210]), [200, 210]);
    }

    #[test]
    fn tags_and_other_selections_are_kept_apart() {
        let snapshots = [
            snapshot(0, Some("release"), None),
            snapshot(1, None, Some("a.*")),
            snapshot(2, None, None),
            snapshot(3, None, None),
        ];
        let policy =
            RetentionPolicy { keep_last: 1, keep_tags: BTreeSet::from(["release".to_owned()]), ..RetentionPolicy::default() };
        let verdicts = policy.judge(&snapshots, snapshots[3].started).unwrap();
        assert_eq!(verdicts.iter().map(Verdict::is_kept).collect::<Vec<_>>(), [true, true, false, true]);
        assert!(RetentionPolicy::default().judge(&snapshots, snapshots[3].started).is_err());
    }

    proptest! {
        /// A snapshot from a host whose clock is ahead is kept by age and never counted as old.
        #[test]
        fn the_newest_is_always_kept_and_never_more_than_the_rules_allow(
            hours in proptest::collection::btree_set(0_i64..20_000, 1..40),
            last in 0_u32..4, daily in 0_u32..4, weekly in 0_u32..4, skew in -24_i64..24,
        ) {
            let policy = RetentionPolicy { keep_last: last, keep_daily: daily, keep_weekly: weekly, keep_hourly: 1, ..RetentionPolicy::default() };
            let snapshots: Vec<_> = hours.iter().map(|hours| snapshot(*hours, None, None)).collect();
            let now = DateTime::from_millis(snapshots.last().unwrap().started.timestamp_millis() + skew * HOUR);
            let verdicts = policy.judge(&snapshots, now).unwrap();
            prop_assert!(verdicts.last().unwrap().is_kept());
            let kept = verdicts.iter().filter(|verdict| verdict.is_kept()).count();
            prop_assert!(kept <= (last + daily + weekly + 1) as usize);
            prop_assert!(kept >= (last as usize).min(snapshots.len()));
        }
    }
}
