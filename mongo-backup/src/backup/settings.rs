//! What a backup takes, and the builder that collects it.

use std::{collections::BTreeSet, num::NonZeroUsize, sync::Arc};

use mongo_core::{
    CancellationToken, Deployment, Error, NamespaceSelection, Result, RetryPolicy,
    gate::Background,
    metrics::{MetricsSink, NoMetrics},
    mongodb::options::{ReadPreference, SelectionCriteria},
    progress::{NoProgress, ProgressSink},
    transfer::partition::PartitionSettings,
    transform::Transform,
};
use serde::{Deserialize, Serialize};

use super::Backup;
use crate::{
    metrics,
    repository::Repository,
    setters::{conduct_setters, gate_setter, pattern_setters},
};

/// What a backup takes and how hard it works.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct BackupSettings {
    /// Which namespaces. Default all.
    pub selection: NamespaceSelection,
    /// zstd's compression level, from -7 to 22. Default 1, which keeps up with a server on the same machine; 3 makes the
    /// archive about a tenth smaller and takes half as long again.
    pub compression_level: i32,
    /// How many ranges are read and compressed at the same time. Default: one more than there are cores, at most 5: while one
    /// waits for the server, the others compress.
    pub parallel_ranges: NonZeroUsize,
    /// How collections are cut into ranges.
    pub partition: PartitionSettings,
    /// Bytes of server replies that are in memory at once. Default 64 MiB; see [the crate's documentation](crate#memory) for the whole.
    pub memory_bytes: u64,
    /// How long to go on asking when the server is away, for a failover or a restart. Default: five attempts within 60 s.
    pub retry: RetryPolicy,
    /// Whether everything is read, though the oplog tells what has changed since the newest snapshot. Default no; worth it now and then, for it relies
    /// on nothing that was stored before.
    pub full_scan: bool,
    /// On a standalone server, which has no oplog: the field that holds the date of a document's last change, as `updated_at`. Default none: everything is
    /// read each time. With it, documents that were deleted, or changed without that field, are in the snapshot as they were at the last full scan; the
    /// report says so. Changes up to five minutes before the last snapshot are read again, for clocks that differ. An index on the field helps.
    pub since_field: Option<String>,
    /// What the host calls this deployment: [retention](crate::RetentionPolicy) counts each by itself. Default nothing.
    pub source: Option<String>,
    /// What the snapshot is marked with. Default nothing.
    pub tags: BTreeSet<String>,
    /// What to do when the server cannot give, or no longer keeps, one cluster time. Default: go on with best effort, and say so.
    pub demand: ConsistencyDemand,
}

impl Default for BackupSettings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, NonZeroUsize::get);
        Self {
            selection: NamespaceSelection::all(),
            compression_level: 1,
            parallel_ranges: NonZeroUsize::new((cores + 1).clamp(2, 5)).unwrap_or(NonZeroUsize::MIN),
            partition: PartitionSettings::default(),
            memory_bytes: 64 << 20,
            retry: RetryPolicy::default(),
            full_scan: false,
            since_field: None,
            source: None,
            tags: BTreeSet::new(),
            demand: ConsistencyDemand::default(),
        }
    }
}

/// What a snapshot must be to be worth having.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ConsistencyDemand {
    /// One cluster time where the server can, else best effort; the report says which.
    #[default]
    WherePossible,
    /// One cluster time for everything, or no snapshot.
    PointInTime,
}

/// Prepares a [`Backup`].
#[derive(Debug)]
#[must_use]
pub struct BackupBuilder {
    deployment: Deployment,
    repository: Repository,
    settings: BackupSettings,
    selection: Result<NamespaceSelection>,
    read_preference: Option<ReadPreference>,
    transform: Option<Arc<dyn Transform>>,
    progress: Arc<dyn ProgressSink>,
    metrics: Arc<dyn MetricsSink>,
    cancel: CancellationToken,
    background: Background,
}

impl BackupBuilder {
    pub(super) fn new(deployment: Deployment, repository: Repository) -> Self {
        Self {
            deployment,
            repository,
            settings: BackupSettings::default(),
            selection: Ok(NamespaceSelection::all()),
            read_preference: None,
            transform: None,
            progress: Arc::new(NoProgress),
            metrics: Arc::new(NoMetrics),
            cancel: CancellationToken::new(),
            background: Background::ungated(),
        }
    }

    /// Replaces all settings.
    pub fn settings(mut self, settings: BackupSettings) -> Self {
        self.selection = Ok(settings.selection.clone());
        self.settings = settings;
        self
    }

    pattern_setters!();

    /// Names the deployment, where several are backed up into one repository: [retention](crate::RetentionPolicy) counts each by itself.
    pub fn source(mut self, name: impl Into<String>) -> Self {
        self.settings.source = Some(name.into());
        self
    }

    /// Marks the snapshot, for [retention](crate::RetentionPolicy::keep_tags); may be called several times.
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.settings.tags.insert(tag.into());
        self
    }

    /// Reads everything, though the oplog tells what has changed since the newest snapshot.
    pub fn full_scan(mut self) -> Self {
        self.settings.full_scan = true;
        self
    }

    /// On a standalone server, takes what has changed from a field with a date: see [`BackupSettings::since_field`].
    pub fn since_field(mut self, field: impl Into<String>) -> Self {
        self.settings.since_field = Some(field.into());
        self
    }

    /// Sets zstd's level.
    pub fn compression_level(mut self, level: i32) -> Self {
        self.settings.compression_level = level;
        self
    }

    /// Reads from the members that this read preference chooses; the primary by default.
    ///
    /// The cluster time is still taken from the primary, and a secondary waits until it has it.
    pub fn read_preference(mut self, preference: ReadPreference) -> Self {
        self.read_preference = Some(preference);
        self
    }

    /// Stores what `transform` makes of the documents, as [`Redactions`](mongo_core::transform::Redactions) that take out what not everybody may see.
    ///
    /// What it leaves out is nowhere in the repository. Such a snapshot holds no users and roles, cannot be rolled forward, and takes nothing over from
    /// others: everything is read each time. Time-series collections must be excluded.
    pub fn transform(mut self, transform: Arc<dyn Transform>) -> Self {
        self.transform = Some(transform);
        self
    }

    /// Sends metrics to `sink`.
    pub fn metrics(mut self, sink: Arc<dyn MetricsSink>) -> Self {
        self.metrics = sink;
        self
    }

    gate_setter!("backup");
    conduct_setters!("Stops when `token` is cancelled.");

    /// Checks the settings.
    ///
    /// # Errors
    /// `InvalidInput` for a bad pattern or a compression level that zstd does not have.
    pub fn build(self) -> Result<Backup> {
        let selection = self.selection?;
        if !(-7..=22).contains(&self.settings.compression_level) {
            return Err(Error::invalid("the compression level must be from -7 to 22")
                .with_context("level", self.settings.compression_level));
        }
        if self.settings.partition.target_bytes == 0 || self.settings.partition.max_ranges == 0 {
            return Err(Error::invalid("a partition needs a size above zero"));
        }
        Ok(Backup {
            deployment: self.deployment,
            repository: self.repository,
            settings: BackupSettings { selection, ..self.settings },
            transform: self.transform,
            from: self.read_preference.map(SelectionCriteria::ReadPreference),
            progress: self.progress,
            metrics: metrics::BackupMetrics::register(&*self.metrics),
            cancel: self.cancel,
            background: self.background,
        })
    }
}
