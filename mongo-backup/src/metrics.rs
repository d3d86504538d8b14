//! The metrics of backup and restore.

use std::sync::Arc;

use mongo_core::metrics::{Counter, MetricsSink};

/// Documents read by backups.
pub const BACKUP_DOCUMENTS: &str = "mongo_backup_documents_total";
/// Bytes of BSON read by backups.
pub const BACKUP_BYTES: &str = "mongo_backup_bytes_total";
/// Documents written by restores.
pub const RESTORE_DOCUMENTS: &str = "mongo_backup_restored_documents_total";
/// Bytes of BSON written by restores.
pub const RESTORE_BYTES: &str = "mongo_backup_restored_bytes_total";
/// Documents that the target of a restore refused.
pub const RESTORE_REFUSED: &str = "mongo_backup_refused_documents_total";

#[derive(Clone, Debug)]
pub(crate) struct BackupMetrics {
    documents: Arc<dyn Counter>,
    bytes: Arc<dyn Counter>,
}

impl BackupMetrics {
    pub(crate) fn register(sink: &dyn MetricsSink) -> Self {
        Self {
            documents: sink.counter(BACKUP_DOCUMENTS, "Documents read by backups", &[]),
            bytes: sink.counter(BACKUP_BYTES, "Bytes of BSON read by backups", &[]),
        }
    }

    pub(crate) fn read(&self, documents: u64, bytes: u64) {
        self.documents.add(documents);
        self.bytes.add(bytes);
    }
}

#[derive(Clone, Debug)]
pub(crate) struct RestoreMetrics {
    documents: Arc<dyn Counter>,
    bytes: Arc<dyn Counter>,
    refused: Arc<dyn Counter>,
}

impl RestoreMetrics {
    pub(crate) fn register(sink: &dyn MetricsSink) -> Self {
        Self {
            documents: sink.counter(RESTORE_DOCUMENTS, "Documents written by restores", &[]),
            bytes: sink.counter(RESTORE_BYTES, "Bytes of BSON written by restores", &[]),
            refused: sink.counter(RESTORE_REFUSED, "Documents that the target of a restore refused", &[]),
        }
    }

    pub(crate) fn wrote(&self, documents: u64, bytes: u64, refused: u64) {
        self.documents.add(documents);
        self.bytes.add(bytes);
        self.refused.add(refused);
    }
}
