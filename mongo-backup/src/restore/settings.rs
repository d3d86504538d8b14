//! What a restore takes, and the builder that collects it.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use mongo_core::{
    CancellationToken, Deployment, Error, NamespaceRenames, NamespaceSelection, Result,
    gate::Background,
    metrics::{MetricsSink, NoMetrics},
    mongodb::options::WriteConcern,
    progress::{NoProgress, ProgressSink},
    state::StateStore,
    transfer::replay::ReplaySettings,
    transform::Transform,
};
use serde::{Deserialize, Serialize};

use super::{
    Restore,
    ids::{DocumentChoice, DocumentFilter, IdRange},
};
use crate::{
    metrics::RestoreMetrics,
    repository::{Repository, SnapshotChoice},
    setters::{conduct_setters, gate_setter, pattern_setters},
    timeline::RestorePoint,
};

/// What to do with a collection that the target has already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RestoreMode {
    /// Refuse to start if one exists: every collection is made anew. The default.
    #[default]
    Create,
    /// Add the documents whose `_id` the target does not have; those it has stay as they are, and are reported as refused.
    Insert,
    /// Add the missing documents and replace the existing ones, as far as the target's validator lets them in.
    Upsert,
    /// As upsert, and the backup wins over the target's validator too (needs the role `restore` or `bypassDocumentValidation`).
    Replace,
    /// As replace, and documents that the backup does not have are deleted from these collections. Other collections stay.
    Mirror,
}

/// What a restore takes and how hard it works.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct RestoreSettings {
    /// Which namespaces of the snapshot, by their names there. Default all.
    pub selection: NamespaceSelection,
    /// Under which names. Default the same.
    pub renames: NamespaceRenames,
    /// What to do with collections that exist.
    pub mode: RestoreMode,
    /// Whether collections that exist are dropped first. Default no.
    pub drop_existing: DropExisting,
    /// Whether users and roles of the snapshot that the target does not have are added to it. Default no. Needs the role `restore`.
    pub users_and_roles: bool,
    /// How many batches are written at the same time. Default 4.
    pub parallel_writes: NonZeroUsize,
    /// How often it is saved how far the restore is, where [checkpoints](RestoreBuilder::checkpoints) are kept. Default 1 s.
    pub checkpoint_every: Duration,
    /// The point in time that is restored; none for the snapshot as it is. Default none.
    pub at: Option<RestorePoint>,
    /// Whether everything is restored in one transaction, or nothing is. Default no.
    pub all_or_nothing: bool,
    /// The most bytes that are restored in one transaction. Default 64 MiB: until it commits, all of it must fit in the server's cache, and a
    /// transaction must end within `transactionLifetimeLimitSeconds`, 60 s by default.
    pub transaction_bytes: u64,
    /// How the oplog is applied.
    pub replay: ReplaySettings,
    /// How many documents that the target refused are listed in the report, each with its `_id`. All are counted. Default 100.
    pub list_refused: usize,
}

impl Default for RestoreSettings {
    fn default() -> Self {
        Self {
            selection: NamespaceSelection::all(),
            renames: NamespaceRenames::default(),
            mode: RestoreMode::Create,
            drop_existing: DropExisting::No,
            users_and_roles: false,
            parallel_writes: NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN),
            checkpoint_every: super::checkpoint::EVERY,
            at: None,
            all_or_nothing: false,
            transaction_bytes: super::transaction::TRANSACTION_BYTES,
            replay: ReplaySettings::default(),
            list_refused: 100,
        }
    }
}

/// Whether a restore drops what stands in its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropExisting {
    /// Leave it.
    #[default]
    No,
    /// Drop each target collection just before it is made anew, after every pack that the restore needs was read and found
    /// whole. Nothing else is dropped.
    Yes,
}

/// Prepares a [`Restore`].
#[derive(Debug)]
#[must_use]
pub struct RestoreBuilder {
    repository: Repository,
    snapshot: SnapshotChoice,
    target: Option<Deployment>,
    settings: RestoreSettings,
    choice: DocumentChoice,
    transforms: Vec<Arc<dyn Transform>>,
    selection: Result<NamespaceSelection>,
    renames: Result<NamespaceRenames>,
    write_concern: WriteConcern,
    checkpoints: Option<Arc<dyn StateStore>>,
    anew: bool,
    progress: Arc<dyn ProgressSink>,
    metrics: Arc<dyn MetricsSink>,
    cancel: CancellationToken,
    background: Background,
}

impl RestoreBuilder {
    pub(super) fn new(repository: Repository, snapshot: SnapshotChoice) -> Self {
        Self {
            repository,
            snapshot,
            target: None,
            settings: RestoreSettings::default(),
            choice: DocumentChoice::default(),
            transforms: Vec::new(),
            selection: Ok(NamespaceSelection::all()),
            renames: Ok(NamespaceRenames::default()),
            write_concern: WriteConcern::majority(),
            checkpoints: None,
            anew: false,
            progress: Arc::new(NoProgress),
            metrics: Arc::new(NoMetrics),
            cancel: CancellationToken::new(),
            background: Background::ungated(),
        }
    }

    /// Sets the deployment to restore into.
    pub fn into(mut self, target: &Deployment) -> Self {
        self.target = Some(target.clone());
        self
    }

    /// Replaces all settings.
    pub fn settings(mut self, settings: RestoreSettings) -> Self {
        self.selection = Ok(settings.selection.clone());
        self.renames = Ok(settings.renames.clone());
        self.settings = settings;
        self
    }

    pattern_setters!();

    /// Restores what matches `from` under the name `to`, as `shop.*` under `shop_copy.*`; the first rule that matches decides.
    pub fn rename(mut self, from: &str, to: &str) -> Self {
        self.renames = self.renames.and_then(|renames| renames.renaming(from, to));
        self
    }

    /// Restores everything as it was at a point in time: from a snapshot, which is rolled forward with the oplog that a [`Capture`](crate::Capture)
    /// has stored. Unless one is named, the newest snapshot that can be is taken.
    ///
    /// What is restored are the collections that existed then, under the names and with the definitions that they had then. The selection and the
    /// renames mean these names. Users and roles are those of the snapshot.
    ///
    /// [`RestoreBuilder::filter`] and modes that merge go with a snapshot as it is only.
    pub fn at(mut self, point: RestorePoint) -> Self {
        self.settings.at = Some(point);
        self
    }

    /// Restores only documents with these `_id`s, of one collection. Of the others hardly any is read.
    ///
    /// Where the collection has a collation, or was not read by its `_id`s (capped collections, imports), all are read.
    pub fn ids(mut self, range: IdRange) -> Self {
        self.choice.ids = Some(range);
        self
    }

    /// Restores only the documents for which `filter` says so. It is asked on several threads.
    pub fn filter(mut self, filter: DocumentFilter) -> Self {
        self.choice.filter = Some(filter);
        self
    }

    /// Sets what to do with collections that exist.
    pub fn mode(mut self, mode: RestoreMode) -> Self {
        self.settings.mode = mode;
        self
    }

    /// Drops each target collection before it is made anew.
    pub fn drop_existing(mut self) -> Self {
        self.settings.drop_existing = DropExisting::Yes;
        self
    }

    /// Restores everything in one transaction, or nothing: collections and their indexes are made and documents written at once, for every reader. A
    /// document that the target refuses undoes all.
    ///
    /// For small sets of ordinary collections on a replica set from 4.4 on, see [`RestoreSettings::transaction_bytes`]; not with dropping, mirroring and
    /// points in time. Indexes of collections that exist are left as they are.
    pub fn all_or_nothing(mut self) -> Self {
        self.settings.all_or_nothing = true;
        self
    }

    /// Changes documents on their way into the target, as [`Redactions`](mongo_core::transform::Redactions) do, or
    /// [`NewIds`](mongo_core::transform::NewIds). Several are applied in order.
    ///
    /// Not with points in time, mirroring and time-series collections. Names are those in the snapshot.
    pub fn transform(mut self, transform: Arc<dyn Transform>) -> Self {
        self.transforms.push(transform);
        self
    }

    /// Adds the users and roles of the snapshot that the target does not have. Those that it has stay as they are.
    pub fn users_and_roles(mut self) -> Self {
        self.settings.users_and_roles = true;
        self
    }

    /// Sets the write concern. Default majority: what is reported as restored cannot be rolled back.
    ///
    /// On a replica set a majority without a timeout is waited for after every sixteenth batch, and at the end for
    /// everything, definitions included: an election in between is an error. Any other write concern holds for every batch.
    pub fn write_concern(mut self, concern: WriteConcern) -> Self {
        self.write_concern = concern;
        self
    }

    /// Keeps in `store` how far the restore is, so that the same restore goes on where this one is interrupted. Default no.
    ///
    /// The same is one of the same snapshot with the same choice of namespaces and `_id`s, renames, mode and dropping, into the collections that the
    /// interrupted one has made, within a week; of a [filter](Self::filter) only you know whether it is the same. It drops nothing that the interrupted
    /// one has made. Documents that were written for certain are passed over, if as many are there; what else is there already is the
    /// restore's own if it is the same byte for byte, which takes the action `find`. A restore that merges, and one of chosen documents, makes no
    /// collection twice, but looks at every document again.
    ///
    /// What is in the store are names, numbers, and the `_id`s of documents that were refused. On a standalone server writes are journaled,
    /// which takes longer.
    pub fn checkpoints(mut self, store: Arc<dyn StateStore>) -> Self {
        self.checkpoints = Some(store);
        self
    }

    /// Does not go on with a restore that was interrupted, but treats what it has made like anything else that exists.
    pub fn anew(mut self) -> Self {
        self.anew = true;
        self
    }

    /// Sends metrics to `sink`.
    pub fn metrics(mut self, sink: Arc<dyn MetricsSink>) -> Self {
        self.metrics = sink;
        self
    }

    gate_setter!("restore");
    conduct_setters!("Stops when `token` is cancelled.");

    /// Checks the settings.
    ///
    /// # Errors
    /// `InvalidInput` for a bad pattern or rename, a missing target, an unacknowledged write concern, or dropping
    /// together with a mode that merges.
    pub fn build(self) -> Result<Restore> {
        let target = self.target.ok_or_else(|| Error::invalid("a restore needs a deployment to restore into"))?;
        if self.settings.drop_existing == DropExisting::Yes && self.settings.mode != RestoreMode::Create {
            return Err(Error::invalid("dropping first and merging into what exists exclude each other: choose one"));
        }
        if self.settings.mode == RestoreMode::Mirror && !self.choice.is_everything() {
            return Err(Error::invalid(
                "mirroring deletes what is not restored, so it restores whole collections: leave the choice of documents out",
            ));
        }
        if !self.transforms.is_empty() && (self.settings.at.is_some() || self.settings.mode == RestoreMode::Mirror) {
            return Err(Error::invalid(
                "documents are not changed on the way to a point in time or into a mirror: leave one of them out",
            ));
        }
        if self.settings.at.is_some() && (self.choice.filter.is_some() || self.settings.mode != RestoreMode::Create) {
            return Err(Error::invalid(
                "a point in time is restored into new collections and without a filter: restore it under another name and merge from there",
            ));
        }
        if matches!(self.write_concern.w, Some(mongo_core::mongodb::options::Acknowledgment::Nodes(0))) {
            return Err(Error::invalid(
                "a restore with unacknowledged writes could lose documents in silence: choose w of 1 or more",
            ));
        }
        Ok(Restore {
            repository: self.repository,
            snapshot: self.snapshot,
            target,
            settings: RestoreSettings { selection: self.selection?, renames: self.renames?, ..self.settings },
            choice: self.choice,
            transforms: self.transforms,
            write_concern: self.write_concern,
            checkpoints: self.checkpoints,
            anew: self.anew,
            progress: self.progress,
            metrics: RestoreMetrics::register(&*self.metrics),
            cancel: self.cancel,
            background: self.background,
        })
    }
}
