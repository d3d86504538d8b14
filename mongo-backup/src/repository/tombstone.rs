//! Tombstones: objects in the place of snapshots that are not, or no longer, to be.

use mongo_core::{
    Result,
    bson::{self, doc},
};

use super::{
    Repository,
    envelope::{self, Magic},
    manifest::SnapshotId,
    snapshot_name,
};
use crate::archive::{PutMode, PutOutcome};

impl Repository {
    /// Makes it impossible that a backup publishes its snapshot. False if it has done so already.
    pub(crate) async fn revoke(&self, snapshot: &SnapshotId) -> Result<bool> {
        let outcome = self.put_tombstone(snapshot, PutMode::CreateOnly).await?;
        // Else there lies its manifest, or a tombstone of an earlier attempt.
        Ok(outcome == PutOutcome::Stored || self.find_snapshot(snapshot).await?.is_none())
    }

    /// Puts a tombstone in the place of a snapshot.
    pub(crate) async fn bury(&self, snapshot: &SnapshotId) -> Result<()> {
        self.put_tombstone(snapshot, PutMode::Replace).await.map(drop)
    }

    async fn put_tombstone(&self, snapshot: &SnapshotId, mode: PutMode) -> Result<PutOutcome> {
        let name = snapshot_name(snapshot)?;
        let payload = bson::serialize_to_vec(&doc! {})?;
        let object = envelope::seal(Magic::TOMBSTONE, Some(&name), self.config().cipher.as_ref(), &payload)?;
        self.archive().put(&name, object, mode).await
    }
}
