//! What a backup tells when it has ended.

use mongo_core::{
    Namespace,
    transfer::catalog::{CollectionKind, LeftOut},
};
use serde::Serialize;

use crate::repository::manifest::{Consistency, SnapshotId, SnapshotManifest, SnapshotNamespace};

/// What a backup did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct BackupReport {
    /// The new snapshot.
    pub id: SnapshotId,
    /// How its documents relate in time.
    pub consistency: Consistency,
    /// The snapshot from which what has not changed was taken over; none after a full scan.
    pub parent: Option<SnapshotId>,
    /// Why everything was read, if it was.
    pub full_scan: Option<String>,
    /// Documents that were read.
    pub documents_read: u64,
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

impl NamespaceReport {
    pub(super) fn of(namespace: &SnapshotNamespace) -> Self {
        Self {
            namespace: namespace.namespace().clone(),
            kind: namespace.kind(),
            documents: namespace.documents(),
            bytes: namespace.bytes(),
        }
    }
}

impl BackupReport {
    pub(super) fn new(
        manifest: &SnapshotManifest,
        namespaces: Vec<NamespaceReport>,
        documents_read: u64,
        full_scan: Option<String>,
    ) -> Self {
        Self {
            id: manifest.id.clone(),
            consistency: manifest.consistency.clone(),
            parent: manifest.parent.clone(),
            full_scan,
            documents_read,
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
