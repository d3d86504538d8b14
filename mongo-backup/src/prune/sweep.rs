//! Carrying sentences out: deleting condemned packs once nobody can need them.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use mongo_core::{ErrorKind, Result, bson::DateTime};

use super::{PackSet, Prune, PruneReport};
use crate::repository::{
    announcement::{Announced, Purpose},
    condemned::{Seen, Sentence},
    index::Index,
    indexes::IndexReading,
    manifest::SnapshotManifest,
    pack::PackId,
};

impl Prune {
    /// Looks at every sentence, whoever pronounced it, and carries out those whose time has come.
    pub(super) async fn sweep(&self, report: &mut PruneReport) -> Result<()> {
        let mut condemned = self.repository.read_condemned().await?;
        if let Some((_, error)) = condemned.damaged.pop() {
            return Err(error.wrap("what another prune has left is damaged, so nothing is deleted: delete the object named"));
        }
        for (sentence, decided) in &condemned.finished {
            if self.since(*decided) > REMEMBERED {
                self.repository.expunge(sentence).await?;
            }
        }
        for remains in &condemned.remains {
            self.repository.acquit(remains).await?;
        }
        for sentence in condemned.sentences {
            self.check_cancelled()?;
            if !self.carry_out(&sentence, report).await? {
                report.postponed_packs += sentence.packs.len() as u64;
            }
        }
        Ok(())
    }

    /// Deletes the packs of a sentence that nobody needs. False if it is not yet time.
    ///
    /// Of two prunes that would delete packs that stand in for each other, the one that has condemned later sees the other's sentence
    /// before it decides; and a decision is made once. So all that a prune can do that sleeps and wakes up is what was decided.
    async fn carry_out(&self, sentence: &Sentence, report: &mut PruneReport) -> Result<bool> {
        let decision = match &sentence.decision {
            Some(decision) => decision.clone(),
            None => {
                let seen = match &sentence.seen {
                    Some(seen) => seen.clone(),
                    None if self.is_settled(sentence.at, 2) => self.repository.note_announced(&sentence.id, self.now()).await?,
                    None => return Ok(false),
                };
                if !self.is_settled(seen.at, 1) || !self.are_through(&seen, report).await? {
                    return Ok(false);
                }
                let useless = self.useless(sentence, &seen).await?;
                self.repository.decide(&sentence.id, useless, self.now()).await?
            }
        };
        // Decisions are forgotten in the end: one of a sentence that is gone means nothing any more.
        if !self.repository.stands(&sentence.id).await? {
            return Ok(true);
        }
        self.delete(&decision.packs, report).await?;
        if !self.is_settled(decision.at, 1) {
            return Ok(false);
        }
        self.repository.acquit(&sentence.id).await?;
        Ok(true)
    }

    /// Whether every listing shows by now what was done at `at`, several times over. Clocks of hosts may differ by a day.
    fn is_settled(&self, at: DateTime, times: u32) -> bool {
        self.listing_lag.is_zero() || self.since(at) >= self.listing_lag * times + SKEW
    }

    /// Whether every operation that was under way when the packs were condemned is through, or revoked.
    async fn are_through(&self, seen: &Seen, report: &mut PruneReport) -> Result<bool> {
        for operation in &seen.announced {
            let publishes = operation.purpose == Purpose::Backup;
            if publishes && self.repository.find_snapshot(&operation.id).await?.is_some() {
                continue;
            }
            if self.may_be_alive(operation, seen).await? {
                return Ok(false);
            }
            if !publishes {
                // What it still reads it will miss.
                self.repository.conclude(&operation.id).await?;
                continue;
            }
            // Also where it has ended in failure: a late request of its own could still publish.
            if self.repository.revoke(&operation.id).await? {
                self.repository.conclude(&operation.id).await?;
                report.revoked.push(operation.id.clone());
            }
        }
        Ok(true)
    }

    async fn may_be_alive(&self, operation: &Announced, seen: &Seen) -> Result<bool> {
        Ok(match self.repository.sign_of_life(&operation.id).await? {
            None => false,
            // It was alive after it was seen; whether it still is, its own clock must tell, and that may differ by a day.
            // A clock that is further ahead tells nothing.
            Some(sign) if sign.beat != operation.beat && !self.is_ahead(sign.last_sign) => {
                self.since(sign.last_sign) < self.abandoned_after + SKEW
            }
            Some(_) => self.since(seen.at) < self.abandoned_after,
        })
    }

    fn is_ahead(&self, at: DateTime) -> bool {
        at.saturating_duration_since(self.now()) > SKEW
    }

    fn since(&self, at: DateTime) -> Duration {
        let millis = self.now().timestamp_millis().saturating_sub(at.timestamp_millis());
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }

    /// The packs of a sentence of which every needed segment lies in a pack that nobody has condemned.
    async fn useless(&self, sentence: &Sentence, seen: &Seen) -> Result<Vec<PackId>> {
        // Who publishes a snapshot after this was among the backups that were seen, or has read what is condemned.
        let snapshots = self.all_snapshots(sentence, seen).await?;
        let live = self.mark(&snapshots).await?;
        let mut useless = self.known_packs(&sentence.packs, live.index()).await?;
        let mut relied_upon = PackSet::new();
        for (id, _, places) in live.needed() {
            if !places.iter().any(|place| useless.contains(&place.pack)) {
                continue;
            }
            match places.first() {
                Some(first) if live.index().holds_for_good(id) => {
                    relied_upon.insert(first.pack);
                }
                _ => places.iter().for_each(|place| {
                    useless.remove(&place.pack);
                }),
            }
        }
        // A listing can show what is deleted already.
        for pack in relied_upon {
            self.repository.archive().head(&pack.object()?).await?;
        }
        Ok(sentence.packs.iter().filter(|pack| useless.contains(pack)).copied().collect())
    }

    /// Those packs of which it is known what they hold, or that are gone. What no index object names was read from the packs themselves.
    async fn known_packs(&self, packs: &[PackId], index: &Index) -> Result<PackSet> {
        let indexed: PackSet = index.packs().iter().map(|pack| pack.id).collect();
        let mut known = PackSet::new();
        for pack in packs {
            if indexed.contains(pack) {
                known.insert(*pack);
                continue;
            }
            match self.repository.archive().head(&pack.object()?).await {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    known.insert(*pack);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(known)
    }

    /// The snapshots that are listed, those that were there when the packs were condemned, and those of backups that were under way.
    async fn all_snapshots(&self, sentence: &Sentence, seen: &Seen) -> Result<Vec<SnapshotManifest>> {
        let mut snapshots = self.readable_snapshots().await?;
        let listed: BTreeSet<_> = snapshots.iter().map(|snapshot| snapshot.id.clone()).collect();
        let seen = seen.announced.iter().map(|operation| &operation.id);
        for id in sentence.snapshots.iter().chain(seen) {
            if !listed.contains(id)
                && let Some(snapshot) = self.repository.find_snapshot(id).await?
            {
                snapshots.push(snapshot);
            }
        }
        Ok(snapshots)
    }

    /// Deletes packs, after every index object that names them was replaced by one that does not.
    async fn delete(&self, packs: &[PackId], report: &mut PruneReport) -> Result<()> {
        let reading = self.repository.read_indexes().await?;
        let mut gone: PackSet = packs.iter().copied().collect();
        // Also what another prune has deleted, and an index object that was on its way then names.
        let named = reading.objects.iter().flat_map(|(_, payload)| &payload.packs).map(|(pack, _)| *pack);
        gone.extend(named.filter(|pack| !reading.packs.contains_key(pack)));
        self.replace_indexes(&reading, &gone).await?;
        let sizes: HashMap<PackId, u64> = reading.packs;
        for pack in packs {
            self.check_cancelled()?;
            self.repository.archive().delete(&pack.object()?).await?;
            if let Some(size) = sizes.get(pack) {
                report.deleted_packs += 1;
                report.freed_bytes += size;
            }
        }
        Ok(())
    }

    async fn replace_indexes(&self, reading: &IndexReading, gone: &PackSet) -> Result<()> {
        let mut old = Vec::new();
        let mut kept = Vec::new();
        for (name, payload) in &reading.objects {
            if payload.packs.iter().any(|(pack, _)| gone.contains(pack)) {
                old.push(name.clone());
                kept.extend(payload.directories().into_iter().filter(|(pack, ..)| !gone.contains(pack)));
            }
        }
        if !kept.is_empty() {
            self.repository.write_index(&kept).await?;
        }
        for name in old {
            self.repository.archive().delete(&name).await?;
        }
        Ok(())
    }
}

/// By how much the clocks of two hosts may differ.
const SKEW: Duration = Duration::from_secs(24 * 3600);
/// For so long it is remembered which packs were deleted: longer than any process sleeps.
const REMEMBERED: Duration = Duration::from_secs(180 * 24 * 3600);
