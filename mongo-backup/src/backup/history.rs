//! Where the oplog stands, and what it tells of the time since an older snapshot.

use std::{collections::HashMap, time::Duration};

use mongo_core::{
    Error, ErrorKind, Namespace, Result, RetryBudget, Topology,
    bson::{DateTime, Timestamp},
    transfer::{
        catalog::Catalog,
        oplog::{Oplog, OplogRead, ReplicaSetId, position_in},
    },
};

use super::{Backup, changes::Changes, collect::Older};
use crate::repository::{
    manifest::{SnapshotId, SnapshotManifest, SnapshotNamespace},
    slice::OpenSlice,
    tree::TreeRoot,
};

/// Where the oplog stood when a backup began.
#[derive(Clone, Copy, Debug)]
pub(super) struct History {
    pub(super) set: ReplicaSetId,
    pub(super) beginning: Timestamp,
}

/// What a backup takes over.
#[derive(Clone, Debug)]
pub(super) enum Parent {
    /// What an older snapshot holds, or what was read before for the same.
    Older { id: Option<SnapshotId>, catalog: TreeRoot, from: Timestamp, set: ReplicaSetId },
    /// The same, where there is no oplog: documents whose field says so have changed.
    ByField { id: SnapshotId, catalog: TreeRoot, since: DateTime, field: String },
    /// Nothing, and why.
    None { reason: String },
}

impl Backup {
    /// From where its oplog must be read to know everything that happens from now on; none where there is no oplog, or none that may be read.
    pub(super) async fn history(&self) -> Result<Option<History>> {
        // The oplog tells documents as they are, not as they are stored.
        if self.transform.is_some() {
            return Ok(None);
        }
        let Ok(oplog) = Oplog::of(&self.deployment) else { return Ok(None) };
        let read = async {
            let (set, beginning, _) = tokio::try_join!(oplog.replica_set_id(), oplog.beginning(), oplog.oldest())?;
            Ok::<_, Error>(History { set, beginning })
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

    /// How finely the newest readable snapshot cuts each collection.
    pub(super) async fn known_bits(&self) -> Result<HashMap<Namespace, u8>> {
        let Some(newest) = self.repository.snapshots().await?.snapshots.pop() else { return Ok(HashMap::new()) };
        let namespaces = self.sound_namespaces(&newest.catalog).await?;
        Ok(namespaces.map(|namespaces| bits_of(&namespaces)).unwrap_or_default())
    }

    /// What a catalog holds; none if it is damaged. That must not stand in the way of a new backup, which only takes over and shares less.
    async fn sound_namespaces(&self, catalog: &TreeRoot) -> Result<Option<Vec<SnapshotNamespace>>> {
        match self.repository.namespaces_in(catalog).await {
            Ok(namespaces) => Ok(Some(namespaces)),
            Err(error) if error.kind() == ErrorKind::CorruptData => {
                tracing::warn!(error = %error.report(), "{DAMAGED}");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The newest snapshot of the same replica set.
    pub(super) async fn parent(&self, history: Option<History>) -> Result<Parent> {
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
    pub(super) async fn older(
        &self,
        parent: &Parent,
        until: Option<Timestamp>,
        now: &Catalog,
    ) -> Result<std::result::Result<Older, String>> {
        let (catalog, from, set) = match parent {
            Parent::None { reason } => return Ok(Err(reason.clone())),
            Parent::ByField { catalog, since, field, .. } => {
                let Some(namespaces) = self.sound_namespaces(catalog).await? else { return Ok(Err(DAMAGED.to_owned())) };
                let changes = Changes::by_field(&self.deployment, now, field, *since).await?;
                return Ok(Ok(older(namespaces, changes)));
            }
            Parent::Older { catalog, from, set, .. } => (catalog, *from, *set),
        };
        let Some(until) = until else { return Ok(Err("the server does not tell its time".to_owned())) };
        let oplog = Oplog::of(&self.deployment)?.with(self.settings.retry.clone(), RetryBudget::default(), self.cancel.clone());
        let changes = async {
            self.wait_for_majority(&oplog, until).await?;
            Changes::read(&oplog, &self.repository, set, from, until).await
        };
        let (namespaces, changes) = tokio::join!(self.sound_namespaces(catalog), changes);
        let Some(namespaces) = namespaces? else { return Ok(Err(DAMAGED.to_owned())) };
        let changes = match changes {
            Ok(Ok(changes)) => changes,
            Ok(Err(reason)) => return Ok(Err(reason)),
            // A slice that was captured is damaged, or was removed meanwhile.
            Err(error) if error.kind() == ErrorKind::CorruptData => {
                self.note(format!("what has changed cannot be read: {}", error.report()));
                return Ok(Err("the oplog that was captured is damaged".to_owned()));
            }
            Err(error) => return Err(error),
        };
        Ok(Ok(older(namespaces, changes)))
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
    pub(super) async fn store_window(&self, history: History, until: Timestamp) -> Result<bool> {
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
                        slice.push(position_in(entry)?, entry);
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

fn older(namespaces: Vec<SnapshotNamespace>, changes: Changes) -> Older {
    let bits = bits_of(&namespaces);
    let collections = namespaces.into_iter().filter_map(|namespace| Some((namespace.entry().uuid()?, namespace))).collect();
    Older { collections, bits, changes }
}

fn bits_of(namespaces: &[SnapshotNamespace]) -> HashMap<Namespace, u8> {
    namespaces.iter().map(|namespace| (namespace.namespace().clone(), namespace.boundary_bits)).collect()
}

const DAMAGED: &str = "the newest snapshot's catalog is damaged";
/// Milliseconds by which the clock that sets a field may be behind that of a backup.
const CLOCKS_DIFFER: i64 = 5 * 60 * 1000;
const MAJORITY_WITHIN: Duration = Duration::from_secs(60);
const WINDOW_SLICE: usize = 16 << 20;
