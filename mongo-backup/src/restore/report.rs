//! What a restore tells when it has ended.

use mongo_core::{Namespace, bson::Timestamp};
use serde::{Deserialize, Serialize};

use crate::repository::manifest::{Consistency, SnapshotId};

/// What a restore did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct RestoreReport {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// How its documents relate in time.
    pub consistency: Consistency,
    /// The position of the last operation that was restored, if the snapshot was rolled forward.
    pub point: Option<Timestamp>,
    /// Operations of the oplog that were applied.
    pub replayed: u64,
    /// Namespaces restored.
    pub namespaces: u64,
    /// Documents that the target now holds as the snapshot has them.
    pub documents: u64,
    /// Their bytes of BSON.
    pub bytes: u64,
    /// Documents of these that an earlier run had written which was interrupted.
    pub resumed_documents: u64,
    /// Documents that were deleted because the snapshot does not have them.
    pub deleted: u64,
    /// Indexes built.
    pub indexes: u64,
    /// What happened to users and roles.
    pub users_and_roles: UsersAndRoles,
    /// How many documents the target refused.
    pub refused: u64,
    /// The first of them.
    pub refused_documents: Vec<RefusedDocument>,
    /// Indexes that could not be built, and views that could not be made.
    pub failures: Vec<DefinitionFailure>,
    /// Seconds that it took.
    pub seconds: f64,
}

impl RestoreReport {
    /// Whether everything that was asked for is there.
    pub fn is_complete(&self) -> bool {
        self.refused == 0 && self.failures.is_empty()
    }
}

/// A document that the target refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RefusedDocument {
    /// The collection that refused it.
    pub namespace: Namespace,
    /// Its `_id`, as canonical Extended JSON.
    pub id: String,
    /// The server's error code.
    pub code: i32,
    /// The reason in words.
    pub reason: String,
}

/// A definition that the target refused.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DefinitionFailure {
    /// The collection or view.
    pub namespace: Namespace,
    /// The index, if it is about one.
    pub index: Option<String>,
    /// Why.
    pub reason: String,
}

/// What becomes of the users and roles in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum UsersAndRoles {
    /// It holds none.
    None,
    /// They are added to those of the target.
    Merged,
    /// They are not asked for.
    LeftOut,
}
