//! Finding out what a restore has to do, before anything is written.

use std::collections::{BTreeMap, BTreeSet};

use mongo_core::{
    Error, ErrorKind, Namespace, NamespaceSelection, Result, Topology,
    bson::{DateTime, Timestamp},
    transfer::catalog::{Catalog, CollectionEntry, CollectionKind},
};
use serde::Serialize;

use super::{
    DropExisting, Restore, RestoreMode,
    checkpoint::{Checkpoint, Resumed},
    replay::Journey,
    report::UsersAndRoles,
    users::is_authorization,
};
use crate::{
    repository::manifest::{Consistency, SnapshotId, SnapshotManifest, SnapshotNamespace},
    timeline::{Ended, Timeline},
};

impl Restore {
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
        let (manifest, timeline) = self.find_snapshot().await?;
        // Another process may have written the snapshot since the repository was opened.
        self.repository.refresh_index().await?;
        let all = self.repository.namespaces(&manifest).await?;
        let (authorization, all): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|namespace| is_authorization(namespace.namespace()));
        let (journey, ended) = match timeline {
            Some(timeline) => {
                Journey::explore(self, timeline, &manifest, all).await.map(|(journey, ended)| (Some(journey), ended))?
            }
            None => (None, all.into_iter().map(Ended::as_in_snapshot).collect()),
        };
        let all = authorization.iter().chain(ended.iter().map(|ended| &ended.namespace));
        let names = all.map(SnapshotNamespace::namespace);
        let unmatched = [self.settings.selection.unmatched(names.clone()), self.settings.renames.unmatched(names)].concat();
        if let [first, ..] = unmatched.as_slice() {
            return Err(Error::new(ErrorKind::NotFound, "nothing in the snapshot matches the pattern: check its spelling")
                .with_context("pattern", first)
                .with_context("snapshot", &manifest.id));
        }
        let authorization: Vec<SnapshotNamespace> =
            authorization.into_iter().filter(|namespace| self.settings.selection.selects(namespace.namespace())).collect();
        if self.settings.users_and_roles && authorization.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, "the snapshot, or what is chosen of it, holds no users and roles")
                .with_context("snapshot", &manifest.id));
        }
        let mut items = Vec::new();
        let mut targets: BTreeMap<Namespace, Namespace> = BTreeMap::new();
        for ended in ended.iter().filter(|ended| self.settings.selection.selects(ended.namespace.namespace())) {
            let source = &ended.namespace;
            if ended.is_foreign {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "a collection was renamed into the selection from outside what the snapshot holds: leave it out, or restore from a later snapshot",
                )
                .with_context("namespace", source.namespace()));
            }
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
            let source = source.clone();
            items.push(RestoreItem { source, target, place: Place::Free, view_on: None, followed: ended.number });
        }
        if self.choice.ids.is_some()
            && (items.len() != 1 || items.iter().any(|item| item.source.kind() != CollectionKind::Collection))
        {
            return Err(Error::invalid("a range of _ids is one of a single collection: choose exactly one, as shop.orders"));
        }
        self.rename_view_sources(&mut items)?;
        let series = items.iter().find(|item| item.source.kind() == CollectionKind::TimeSeries);
        if let Some(series) = series.filter(|_| !self.transforms.is_empty()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "measurements lie in buckets, into which a transform does not look: leave time-series collections out",
            )
            .with_context("namespace", series.source.namespace()));
        }
        let checkpoint = if self.settings.all_or_nothing { None } else { self.checkpoint(&manifest.id)? };
        let resumed = self.find_existing(&mut items, &targets, checkpoint.as_ref()).await?;
        let plan = RestorePlan { restore: self, manifest, journey, items, authorization, checkpoint, resumed };
        if self.settings.all_or_nothing {
            self.check_transaction(&plan)?;
        }
        Ok(plan)
    }

    /// The snapshot, and the way from there to what is to be restored, if that is not the snapshot itself.
    async fn find_snapshot(&self) -> Result<(SnapshotManifest, Option<Timeline>)> {
        if let Some(point) = self.settings.at {
            return Timeline::find(&self.repository, &self.snapshot, point).await;
        }
        let mut manifest = self.repository.snapshot(&self.snapshot).await?;
        // What was read over a while is made one state, where that is possible.
        let was_read_over_a_while = !matches!(manifest.consistency, Consistency::PointInTime { .. });
        let is_as_it_was = self.choice.filter.is_none() && self.transforms.is_empty() && !self.settings.all_or_nothing;
        if !was_read_over_a_while || self.settings.mode != RestoreMode::Create || !is_as_it_was {
            if let Consistency::Window { reason, .. } = &manifest.consistency {
                let reason = format!(
                    "{reason}; the oplog that would make it one state is applied only where whole collections are made anew"
                );
                manifest.consistency = Consistency::BestEffort { reason };
            }
            return Ok((manifest, None));
        }
        let timeline = Timeline::settling(&self.repository, &manifest).await?;
        if timeline.is_none() && matches!(manifest.consistency, Consistency::Window { .. }) {
            return Err(Error::corrupt(
                "the oplog that belongs to the snapshot is missing from the archive: without it the snapshot is not one state",
            )
            .with_context("snapshot", &manifest.id));
        }
        Ok((manifest, timeline))
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

    /// Finds out what stands in the place of each item.
    async fn find_existing(
        &self,
        items: &mut [RestoreItem],
        targets: &BTreeMap<Namespace, Namespace>,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<Option<Resumed>> {
        let databases: BTreeSet<&str> = targets.keys().map(Namespace::database).collect();
        let mut selection = NamespaceSelection::all();
        for database in databases {
            selection = selection.including(&format!("{database}.*"))?;
        }
        let existing = Catalog::read(&self.target, &selection, None).await?;
        let resumed = match checkpoint.filter(|_| !self.anew) {
            Some(checkpoint) => self.find_begun(checkpoint, items, &existing).await?,
            None => None,
        };
        let mut conflicts = Vec::new();
        for item in items.iter_mut().filter(|item| item.place == Place::Free) {
            let Some(entry) = existing.get(&item.target) else { continue };
            item.place = Place::Taken;
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
            return Ok(resumed);
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
    pub(super) restore: &'a Restore,
    pub(super) manifest: SnapshotManifest,
    pub(super) journey: Option<Journey>,
    pub(super) items: Vec<RestoreItem>,
    pub(super) authorization: Vec<SnapshotNamespace>,
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) resumed: Option<Resumed>,
}

/// One namespace of a restore.
#[derive(Clone, Debug)]
pub struct RestoreItem {
    pub(super) source: SnapshotNamespace,
    pub(super) target: Namespace,
    pub(super) place: Place,
    /// The new name of what a view is on, where that is renamed.
    pub(super) view_on: Option<String>,
    /// The number under which it is followed through the oplog.
    pub(super) followed: Option<usize>,
}

/// What stands in the target under the name of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nothing.
    Free,
    /// Something that this restore has not made.
    Taken,
    /// What this restore has made before it was interrupted, and may have begun to fill.
    Begun,
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

    /// Whether the target has it already; then it is dropped first or merged into, as the settings say. Not meant is what this restore
    /// itself has made before it was interrupted.
    pub fn exists(&self) -> bool {
        self.place == Place::Taken
    }

    /// Whether a collection or view is what this restore makes of the item, without the indexes that come last.
    pub(super) fn is_as_made(&self, there: &CollectionEntry) -> bool {
        let source = self.source.entry();
        if source.kind() == CollectionKind::View {
            let view_on = self.view_on.as_deref().or(source.options().get_str("viewOn").ok());
            let same = |field| there.options().get(field).ok() == source.options().get(field).ok();
            let same_base = there.options().get_str("viewOn").ok() == view_on;
            return there.kind() == source.kind() && same_base && same("pipeline") && same("collation");
        }
        let names = |entry: &CollectionEntry| -> BTreeSet<String> {
            entry.indexes().iter().filter_map(|index| index.get_str("name").ok().map(str::to_owned)).collect()
        };
        there.kind() == source.kind() && there.options() == source.options() && names(there).is_subset(&names(source))
    }

    /// The namespace in the target that holds the documents; none for a view.
    pub(super) fn data_namespace(&self) -> Result<Option<Namespace>> {
        self.source.kind().data_namespace(&self.target)
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
        let action = |item: &RestoreItem| match (item.place, self.restore.settings.drop_existing) {
            (Place::Free, _) => RestoreAction::Create,
            (Place::Begun, _) => RestoreAction::GoOn,
            (Place::Taken, DropExisting::Yes) => RestoreAction::DropAndCreate,
            (Place::Taken, DropExisting::No) if self.restore.settings.mode == RestoreMode::Mirror => RestoreAction::Mirror,
            (Place::Taken, DropExisting::No) => RestoreAction::MergeInto,
        };
        let (documents, bytes) = self.total();
        RestoreSummary {
            snapshot: self.manifest.id.clone(),
            consistency: self.manifest.consistency.clone(),
            point: self.journey.as_ref().map(|journey| journey.reached),
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
            resumes: self.resumed.as_ref().map(|resumed| resumed.begun.at),
        }
    }

    pub(super) fn users_and_roles(&self) -> UsersAndRoles {
        match (self.authorization.is_empty(), self.restore.settings.users_and_roles) {
            (true, _) => UsersAndRoles::None,
            (false, true) => UsersAndRoles::Merged,
            (false, false) => UsersAndRoles::LeftOut,
        }
    }
}

/// A restore's plan as plain data.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct RestoreSummary {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// How its documents relate in time.
    pub consistency: Consistency,
    /// The position of the last operation that is restored, if the snapshot is rolled forward.
    pub point: Option<Timestamp>,
    /// What happens to each namespace.
    pub namespaces: Vec<PlannedNamespace>,
    /// What happens to users and roles.
    pub users_and_roles: UsersAndRoles,
    /// Documents in all.
    pub documents: u64,
    /// Bytes of BSON in all.
    pub bytes: u64,
    /// When the interrupted restore began that this one goes on with, if there is one.
    pub resumes: Option<DateTime>,
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
    /// This restore has made it before it was interrupted: the documents that are still missing go into it.
    GoOn,
}

const CONFLICTS_NAMED: usize = 5;
