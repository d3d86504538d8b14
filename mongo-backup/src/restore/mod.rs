//! Bringing a snapshot back: plan, inspect, run, report.

mod ids;
mod mirror;
mod run;
mod users;

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    sync::Arc,
};

use mongo_core::{
    CancellationToken, Deployment, Error, ErrorKind, Namespace, NamespaceRenames, NamespaceSelection, Result, Topology,
    metrics::{MetricsSink, NoMetrics},
    mongodb::options::WriteConcern,
    progress::{NoProgress, ProgressSink},
    transfer::catalog::{Catalog, CollectionKind},
};
use serde::{Deserialize, Serialize};

use self::ids::DocumentChoice;
pub use self::ids::{DocumentFilter, IdRange};
pub(crate) use self::users::is_authorization;
use crate::{
    metrics::RestoreMetrics,
    repository::{
        Repository, SnapshotChoice,
        manifest::{Consistency, SnapshotId, SnapshotManifest, SnapshotNamespace},
    },
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
    selection: Result<NamespaceSelection>,
    renames: Result<NamespaceRenames>,
    write_concern: WriteConcern,
    progress: Arc<dyn ProgressSink>,
    metrics: Arc<dyn MetricsSink>,
    cancel: CancellationToken,
}

impl RestoreBuilder {
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

    /// Takes the namespaces that match `pattern`; may be called several times.
    pub fn namespaces(mut self, pattern: &str) -> Self {
        self.selection = self.selection.and_then(|selection| selection.including(pattern));
        self
    }

    /// Leaves out the namespaces that match `pattern`.
    pub fn exclude(mut self, pattern: &str) -> Self {
        self.selection = self.selection.and_then(|selection| selection.excluding(pattern));
        self
    }

    /// Restores what matches `from` under the name `to`, as `shop.*` under `shop_copy.*`; the first rule that matches decides.
    pub fn rename(mut self, from: &str, to: &str) -> Self {
        self.renames = self.renames.and_then(|renames| renames.renaming(from, to));
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

    /// Tells `sink` how it goes.
    pub fn progress(mut self, sink: Arc<dyn ProgressSink>) -> Self {
        self.progress = sink;
        self
    }

    /// Sends metrics to `sink`.
    pub fn metrics(mut self, sink: Arc<dyn MetricsSink>) -> Self {
        self.metrics = sink;
        self
    }

    /// Stops when `token` is cancelled.
    pub fn cancellation(mut self, token: CancellationToken) -> Self {
        self.cancel = token;
        self
    }

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
            write_concern: self.write_concern,
            progress: self.progress,
            metrics: RestoreMetrics::register(&*self.metrics),
            cancel: self.cancel,
        })
    }
}

/// A restore of a snapshot into a deployment.
///
/// ```no_run
/// # async fn f(repository: mongo_backup::Repository, other: mongo_core::Deployment) -> mongo_backup::Result<()> {
/// use mongo_backup::{Restore, SnapshotChoice};
///
/// let report = Restore::builder(&repository, SnapshotChoice::Latest)
///     .into(&other)
///     .namespaces("shop.*")
///     .rename("shop.*", "shop_copy.*")
///     .build()?
///     .run()
///     .await?;
/// assert!(report.is_complete());
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Restore {
    repository: Repository,
    snapshot: SnapshotChoice,
    target: Deployment,
    settings: RestoreSettings,
    choice: DocumentChoice,
    write_concern: WriteConcern,
    progress: Arc<dyn ProgressSink>,
    metrics: RestoreMetrics,
    cancel: CancellationToken,
}

impl Restore {
    /// Prepares a restore of everything in a snapshot.
    pub fn builder(repository: &Repository, snapshot: impl Into<SnapshotChoice>) -> RestoreBuilder {
        RestoreBuilder {
            repository: repository.clone(),
            snapshot: snapshot.into(),
            target: None,
            settings: RestoreSettings::default(),
            choice: DocumentChoice::default(),
            selection: Ok(NamespaceSelection::all()),
            renames: Ok(NamespaceRenames::default()),
            write_concern: WriteConcern::majority(),
            progress: Arc::new(NoProgress),
            metrics: Arc::new(NoMetrics),
            cancel: CancellationToken::new(),
        }
    }

    /// Finds out what there is to do. Writes nothing: a dry run is a plan that is not executed.
    ///
    /// # Errors
    /// `NotFound` for an unknown snapshot or a pattern that matches nothing in it, `Conflict` when a target collection exists
    /// that the mode does not allow to exist or when two namespaces would get one name, `Unsupported` for what the target cannot hold,
    /// `CorruptData` when the snapshot's catalog is damaged.
    #[tracing::instrument(skip_all, name = "restore_plan")]
    pub async fn plan(&self) -> Result<RestorePlan<'_>> {
        if *self.target.topology() == Topology::Sharded {
            return Err(Error::new(ErrorKind::Unsupported, "a restore into a sharded cluster is not possible yet"));
        }
        let manifest = self.repository.snapshot(&self.snapshot).await?;
        // Another process may have written the snapshot since the repository was opened.
        self.repository.reload_index().await?;
        let all = self.repository.namespaces(&manifest).await?;
        let names = all.iter().map(SnapshotNamespace::namespace);
        let unmatched = [self.settings.selection.unmatched(names.clone()), self.settings.renames.unmatched(names)].concat();
        if let [first, ..] = unmatched.as_slice() {
            return Err(Error::new(ErrorKind::NotFound, "nothing in the snapshot matches the pattern: check its spelling")
                .with_context("pattern", first)
                .with_context("snapshot", &manifest.id));
        }
        let (authorization, all): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|namespace| is_authorization(namespace.namespace()));
        let authorization: Vec<SnapshotNamespace> =
            authorization.into_iter().filter(|namespace| self.settings.selection.selects(namespace.namespace())).collect();
        if self.settings.users_and_roles && authorization.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, "the snapshot, or what is chosen of it, holds no users and roles")
                .with_context("snapshot", &manifest.id));
        }
        let mut items = Vec::new();
        let mut targets: BTreeMap<Namespace, Namespace> = BTreeMap::new();
        for source in all.iter().filter(|source| self.settings.selection.selects(source.namespace())) {
            let target = self.settings.renames.apply(source.namespace())?;
            if let Some(other) = targets.insert(target.clone(), source.namespace().clone()) {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "two namespaces would be restored under one name: change the renames",
                )
                .with_context("first", other)
                .with_context("second", source.namespace())
                .with_context("name", target));
            }
            items.push(RestoreItem { source: source.clone(), target, existing: None, view_on: None });
        }
        if self.choice.ids.is_some()
            && (items.len() != 1 || items.iter().any(|item| item.source.kind() != CollectionKind::Collection))
        {
            return Err(Error::invalid("a range of _ids is one of a single collection: choose exactly one, as shop.orders"));
        }
        self.rename_view_sources(&mut items)?;
        self.find_existing(&mut items, &targets).await?;
        Ok(RestorePlan { restore: self, manifest, items, authorization })
    }

    /// [`plan`](Self::plan) and [`RestorePlan::execute`] in one.
    ///
    /// # Errors
    /// As those.
    ///
    /// # Cancel safety
    /// As [`RestorePlan::execute`].
    pub async fn run(&self) -> Result<RestoreReport> {
        self.plan().await?.execute().await
    }

    /// A view that is restored together with its collection follows it to its new name.
    fn rename_view_sources(&self, items: &mut [RestoreItem]) -> Result<()> {
        if self.settings.renames.is_empty() {
            return Ok(());
        }
        let mut view_on = Vec::with_capacity(items.len());
        for item in items.iter() {
            let base = match item.source.kind() {
                CollectionKind::View => item.source.entry().options().get_str("viewOn").ok(),
                _ => None,
            };
            let Some(base) = base else {
                view_on.push(None);
                continue;
            };
            let renamed = self.settings.renames.apply(&item.source.namespace().sibling(base)?)?;
            if renamed.database() != item.target.database() {
                return Err(Error::invalid(
                    "a view and its collection would be restored into different databases: rename both alike",
                )
                .with_context("view", item.source.namespace())
                .with_context("collection", renamed));
            }
            view_on.push((renamed.collection() != base).then(|| renamed.collection().to_owned()));
        }
        for (item, view_on) in items.iter_mut().zip(view_on) {
            item.view_on = view_on;
        }
        Ok(())
    }

    async fn find_existing(&self, items: &mut [RestoreItem], targets: &BTreeMap<Namespace, Namespace>) -> Result<()> {
        let databases: BTreeSet<&str> = targets.keys().map(Namespace::database).collect();
        let mut selection = NamespaceSelection::all();
        for database in databases {
            selection = selection.including(&format!("{database}.*"))?;
        }
        let existing = Catalog::read(&self.target, &selection, None).await?;
        let mut conflicts = Vec::new();
        for item in items.iter_mut() {
            let Some(entry) = existing.get(&item.target) else { continue };
            item.existing = Some(entry.kind());
            match (self.settings.mode, self.settings.drop_existing) {
                (RestoreMode::Create, DropExisting::No) => conflicts.push(item.target.to_string()),
                (RestoreMode::Create, DropExisting::Yes) => {}
                _ if entry.kind() != item.source.kind() => {
                    return Err(Error::new(
                        ErrorKind::Conflict,
                        "the target has something of another kind under that name: drop it or rename",
                    )
                    .with_context("namespace", &item.target)
                    .with_context("there", entry.kind())
                    .with_context("in the snapshot", item.source.kind()));
                }
                _ if entry.kind() == CollectionKind::TimeSeries => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        "a time-series collection cannot be merged into: restore it under another name, or drop first",
                    )
                    .with_context("namespace", &item.target));
                }
                _ => {}
            }
        }
        if conflicts.is_empty() {
            return Ok(());
        }
        let more = conflicts.len().saturating_sub(CONFLICTS_NAMED);
        conflicts.truncate(CONFLICTS_NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Err(Error::new(
            ErrorKind::Conflict,
            format!("the target has {}{more} already: drop first, merge with another mode, or rename", conflicts.join(", ")),
        ))
    }
}

/// What a restore would do.
#[derive(Debug)]
pub struct RestorePlan<'a> {
    restore: &'a Restore,
    manifest: SnapshotManifest,
    items: Vec<RestoreItem>,
    authorization: Vec<SnapshotNamespace>,
}

/// One namespace of a restore.
#[derive(Clone, Debug)]
pub struct RestoreItem {
    source: SnapshotNamespace,
    target: Namespace,
    existing: Option<CollectionKind>,
    view_on: Option<String>,
}

impl RestoreItem {
    /// What it is in the snapshot.
    pub fn source(&self) -> &SnapshotNamespace {
        &self.source
    }

    /// The name under which it is restored.
    pub fn target(&self) -> &Namespace {
        &self.target
    }

    /// Whether the target has it already; then it is dropped first or merged into, as the settings say.
    pub fn exists(&self) -> bool {
        self.existing.is_some()
    }
}

impl RestorePlan<'_> {
    /// The snapshot.
    pub fn snapshot(&self) -> &SnapshotManifest {
        &self.manifest
    }

    /// The namespaces, in order of their names in the snapshot.
    pub fn items(&self) -> &[RestoreItem] {
        &self.items
    }

    /// Documents and bytes in all.
    pub fn total(&self) -> (u64, u64) {
        self.items
            .iter()
            .fold((0, 0), |(documents, bytes), item| (documents + item.source.documents(), bytes + item.source.bytes()))
    }

    /// The plan as plain data, for a dry run's output.
    pub fn summary(&self) -> RestoreSummary {
        let action = |item: &RestoreItem| match (item.existing, self.restore.settings.drop_existing) {
            (None, _) => RestoreAction::Create,
            (Some(_), DropExisting::Yes) => RestoreAction::DropAndCreate,
            (Some(_), DropExisting::No) if self.restore.settings.mode == RestoreMode::Mirror => RestoreAction::Mirror,
            (Some(_), DropExisting::No) => RestoreAction::MergeInto,
        };
        let (documents, bytes) = self.total();
        RestoreSummary {
            snapshot: self.manifest.id.clone(),
            consistency: self.manifest.consistency.clone(),
            namespaces: self
                .items
                .iter()
                .map(|item| PlannedNamespace {
                    from: item.source.namespace().clone(),
                    to: item.target.clone(),
                    action: action(item),
                    documents: item.source.documents(),
                    bytes: item.source.bytes(),
                })
                .collect(),
            users_and_roles: self.users_and_roles(),
            documents,
            bytes,
        }
    }

    fn users_and_roles(&self) -> UsersAndRoles {
        match (self.authorization.is_empty(), self.restore.settings.users_and_roles) {
            (true, _) => UsersAndRoles::None,
            (false, true) => UsersAndRoles::Merged,
            (false, false) => UsersAndRoles::LeftOut,
        }
    }
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

/// A restore's plan as plain data.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct RestoreSummary {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// How its documents relate in time.
    pub consistency: Consistency,
    /// What happens to each namespace.
    pub namespaces: Vec<PlannedNamespace>,
    /// What happens to users and roles.
    pub users_and_roles: UsersAndRoles,
    /// Documents in all.
    pub documents: u64,
    /// Bytes of BSON in all.
    pub bytes: u64,
}

/// One namespace of a plan.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct PlannedNamespace {
    /// Its name in the snapshot.
    pub from: Namespace,
    /// Its name in the target.
    pub to: Namespace,
    /// What happens to it.
    pub action: RestoreAction,
    /// Documents.
    pub documents: u64,
    /// Bytes of BSON.
    pub bytes: u64,
}

/// What happens to a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RestoreAction {
    /// It is made.
    Create,
    /// What is there is dropped, then it is made.
    DropAndCreate,
    /// Its documents go into what is there.
    MergeInto,
    /// Its documents go into what is there, and what it does not have is deleted.
    Mirror,
}

/// What a restore did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct RestoreReport {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// How its documents relate in time.
    pub consistency: Consistency,
    /// Namespaces restored.
    pub namespaces: u64,
    /// Documents that the target now holds as the snapshot has them.
    pub documents: u64,
    /// Their bytes of BSON.
    pub bytes: u64,
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
#[derive(Clone, Debug, Serialize)]
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

const CONFLICTS_NAMED: usize = 5;
