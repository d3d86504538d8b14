#![doc = include_str!("../README.md")]

mod archive;
mod audit;
mod backup;
mod capture;
mod diff;
mod interchange;
mod live;
pub mod metrics;
mod prune;
mod repository;
mod restore;
mod retention;
#[cfg(feature = "schedule")]
mod schedule;
mod setters;
mod timeline;
mod verify;

#[doc = include_str!("../docs/format.md")]
pub mod format {}

#[cfg(fuzzing)]
#[doc(hidden)]
pub use repository::fuzzing;

pub use mongo_core::{
    self, Error, ErrorKind, Result,
    transform::{NewIds, Redaction, Redactions, Reference, Transform, Transformed},
};

#[cfg(feature = "object-store")]
pub use archive::ObjectStoreArchive;
pub use archive::{ArchiveSink, LocalArchive, MemoryArchive, ObjectMeta, ObjectName, PutMode, PutOutcome};
#[cfg(any(test, feature = "testkit"))]
pub use archive::{FailingArchive, FailureMode, conformance};
pub use audit::{AuditAction, AuditRecord, AuditSink, MemoryAudit, OperationState, RepositoryAudit};
pub use backup::{Backup, BackupBuilder, BackupPlan, BackupReport, BackupSettings, ConsistencyDemand, NamespaceReport};
pub use capture::{Capture, CaptureBuilder, CaptureReport, CaptureSettings, OplogGap};
pub use diff::{Diff, DiffReport, DocumentChange, DocumentDiff, NamespaceDiff, Presence};
pub use interchange::{Export, ExportReport, Import, ImportReport};
pub use live::{LiveDiff, LiveDiffReport};
pub use prune::{Prune, PrunePlan, PruneReport, PruneSummary};
pub use repository::{
    Repository, SnapshotChoice, SnapshotList,
    announcement::{Purpose, UnderWay},
    key::{Key, KeyId, KeyInfo, KeyKind},
    manifest::{Consistency, SnapshotId, SnapshotManifest, SnapshotNamespace},
};
pub use restore::{
    DefinitionFailure, DocumentFilter, DropExisting, IdRange, PlannedNamespace, RefusedDocument, Restore, RestoreAction,
    RestoreBuilder, RestoreItem, RestoreMode, RestorePlan, RestoreReport, RestoreSettings, RestoreSummary, UsersAndRoles,
};
pub use retention::{RetentionPolicy, Verdict};
#[cfg(feature = "schedule")]
pub use schedule::{MissedRuns, Schedule, Scheduler};
pub use timeline::RestorePoint;
pub use verify::{Problem, Verify, VerifyReport};
