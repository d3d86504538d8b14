//! A record of every operation: who did what to what, and how it ended.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use futures_util::TryStreamExt as _;
use mongo_core::{
    Error, ErrorKind, Result,
    bson::{self, DateTime},
    lock::lock,
};
use serde::{Deserialize, Serialize};

use crate::archive::{ObjectMeta, ObjectName, PutMode};
use crate::repository::{
    Repository,
    envelope::{self, Magic},
    manifest::SnapshotId,
};

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AuditAction {
    /// A snapshot was made.
    Backup,
    /// The oplog was captured.
    Capture,
    /// A snapshot was restored.
    Restore,
    /// Snapshots were verified.
    Verify,
    /// Snapshots were removed, and space was freed.
    Prune,
    /// A snapshot was written in a foreign format.
    Export,
    /// A foreign dump was taken in.
    Import,
    /// Keys were added, removed or rotated.
    Keys,
}

/// How far an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OperationState {
    /// It has begun. If no later record tells how it ended, it is under way, or its process died.
    InProgress,
    /// It did what it was asked.
    Completed,
    /// It failed.
    Failed,
    /// It was cancelled.
    Cancelled,
}

/// One record. An operation has two: one when it begins, and one when it ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct AuditRecord {
    /// The operation that both records belong to.
    pub operation: String,
    /// When, by the clock of the host that did it.
    pub at: DateTime,
    /// Who, as the host named them.
    pub actor: String,
    /// What.
    pub action: AuditAction,
    /// To what: `snapshot`, `deployment`, `selection` and so on; never a credential, never data.
    pub subject: BTreeMap<String, String>,
    /// How far it has come.
    pub state: OperationState,
    /// Why it failed, in a line.
    pub reason: Option<String>,
}

/// Where records go.
///
/// An operation whose beginning cannot be recorded does not begin. That its end cannot be is a warning: what is done is done.
#[async_trait]
pub trait AuditSink: fmt::Debug + Send + Sync + 'static {
    /// Appends a record, durably.
    ///
    /// # Errors
    /// The sink's own.
    async fn append(&self, record: &AuditRecord) -> Result<()>;
}

/// Keeps records in memory: for tests.
#[derive(Debug, Default)]
pub struct MemoryAudit(Mutex<Vec<AuditRecord>>);

impl MemoryAudit {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The records so far, oldest first.
    pub fn records(&self) -> Vec<AuditRecord> {
        lock(&self.0).clone()
    }
}

#[async_trait]
impl AuditSink for MemoryAudit {
    async fn append(&self, record: &AuditRecord) -> Result<()> {
        lock(&self.0).push(record.clone());
        Ok(())
    }
}

/// Keeps records in the repository's own archive, each an object of its own in `audit/`, sealed if the repository is encrypted. Nothing of this
/// crate ever deletes one.
#[derive(Debug)]
pub struct RepositoryAudit(Repository);

impl RepositoryAudit {
    /// Records of this repository.
    pub fn new(repository: &Repository) -> Self {
        Self(repository.clone())
    }
}

#[async_trait]
impl AuditSink for RepositoryAudit {
    async fn append(&self, record: &AuditRecord) -> Result<()> {
        self.0.make().await?;
        let name = ObjectName::new(format!("{PREFIX}{}", SnapshotId::generate(record.at)?))?;
        let payload = bson::serialize_to_vec(record)?;
        let object = envelope::seal(Magic::AUDIT, Some(&name), self.0.config().cipher.as_ref(), &payload)?;
        self.0.archive().put(&name, object, PutMode::CreateOnly).await.map(drop)
    }
}

/// Who works with a repository, and where that is recorded.
#[derive(Debug)]
pub(crate) struct Auditor {
    actor: String,
    sink: Arc<dyn AuditSink>,
}

impl Auditor {
    pub(crate) fn new(actor: impl Into<String>, sink: Arc<dyn AuditSink>) -> Self {
        Self { actor: actor.into(), sink }
    }
}

impl Repository {
    /// The records that [`RepositoryAudit`] has kept in this repository, oldest first.
    ///
    /// # Errors
    /// `CorruptData` naming a damaged record; the archive's own.
    pub async fn audit_records(&self) -> Result<Vec<AuditRecord>> {
        let mut listed: Vec<ObjectMeta> = self.archive().list(PREFIX).try_collect().await?;
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        let mut records = Vec::with_capacity(listed.len());
        for object in listed {
            let bytes = self.archive().get(&object.name, None).await?;
            let payload = envelope::open(Magic::AUDIT, &object.name, self.config().cipher.as_ref(), &bytes)?;
            let record = bson::deserialize_from_slice(&payload).map_err(|error| {
                Error::corrupt("a record of the audit is malformed").with_context("object", &object.name).with_source(error)
            })?;
            records.push(record);
        }
        Ok(records)
    }

    /// Does work and records who did it and how it ended, if the repository is [audited](Repository::audited).
    pub(crate) async fn recorded<T>(
        &self,
        action: AuditAction,
        subject: impl IntoIterator<Item = (&'static str, String)>,
        work: impl Future<Output = Result<T>>,
        result: impl FnOnce(&T) -> Option<(&'static str, String)>,
    ) -> Result<T> {
        let Some(auditor) = self.auditor() else { return work.await };
        let now = DateTime::now();
        let mut record = AuditRecord {
            operation: SnapshotId::generate(now)?.to_string(),
            at: now,
            actor: auditor.actor.clone(),
            action,
            subject: subject.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            state: OperationState::InProgress,
            reason: None,
        };
        auditor
            .sink
            .append(&record)
            .await
            .map_err(|error| error.wrap("nothing was done, for it cannot be recorded in the audit"))?;
        let done = work.await;
        record.at = DateTime::now();
        match &done {
            Ok(done) => {
                record.state = OperationState::Completed;
                record.subject.extend(result(done).map(|(key, value)| (key.to_owned(), value)));
            }
            Err(error) if error.kind() == ErrorKind::Cancelled => record.state = OperationState::Cancelled,
            Err(error) => {
                record.state = OperationState::Failed;
                record.reason = Some(error.to_string());
            }
        }
        if let Err(error) = auditor.sink.append(&record).await {
            tracing::warn!(error = %error.report(), "the end of an operation could not be recorded in the audit");
        }
        done
    }
}

const PREFIX: &str = "audit/";
