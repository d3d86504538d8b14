//! What became of every collection of a snapshot, and which ones were made since.
//!
//! Collections are followed by their UUIDs, so that at the end each operation is known to belong to a collection under the name
//! that it has at the end, whatever it was called in between: renames, drops and making anew need not be carried out at all.

use std::collections::{BTreeMap, HashMap};

use mongo_core::{
    Error, ErrorKind, Namespace, NamespaceSelection, Result,
    bson::{RawDocument, RawDocumentBuf, Timestamp, cstr},
    transfer::{
        catalog::{CollectionEntry, CollectionKind},
        oplog::{Command, Operation, OperationKind},
        replay::apply_update,
        without,
    },
};

use super::definitions::{BUCKETS, Followed, listing};
use crate::repository::{manifest::SnapshotNamespace, tree::TreeRoot};

/// Collections and views, followed through the oplog.
#[derive(Debug)]
pub(crate) struct History {
    selection: NamespaceSelection,
    collections: Vec<Option<Followed>>,
    by_uuid: HashMap<[u8; 16], usize>,
    by_name: HashMap<String, usize>,
    /// The documents of `system.views` by their `_id`s, but for those of time-series collections.
    views: BTreeMap<String, RawDocumentBuf>,
    in_snapshot: Vec<SnapshotNamespace>,
    /// When the snapshot's definitions were as they are in it: what changed them before is in them already.
    defined_at: Timestamp,
}

/// What an operation is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A collection that is followed, by its number.
    Collection(usize),
    /// A view, or nothing that the snapshot would hold.
    Nothing,
}

/// A collection or view as it is at the end.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) namespace: SnapshotNamespace,
    /// The number under which it was followed; none for a view.
    pub(crate) number: Option<usize>,
    pub(crate) is_foreign: bool,
}

impl Ended {
    /// One that is restored as the snapshot has it.
    pub(crate) fn as_in_snapshot(namespace: SnapshotNamespace) -> Self {
        Self { namespace, number: None, is_foreign: false }
    }
}

impl History {
    pub(crate) fn of(selection: NamespaceSelection, in_snapshot: Vec<SnapshotNamespace>, defined_at: Timestamp) -> Result<Self> {
        let mut history = Self {
            selection,
            collections: Vec::new(),
            by_uuid: HashMap::new(),
            by_name: HashMap::new(),
            views: BTreeMap::new(),
            in_snapshot: Vec::new(),
            defined_at,
        };
        for (position, namespace) in in_snapshot.iter().enumerate() {
            let entry = namespace.entry();
            let name = namespace.namespace();
            if namespace.kind() == CollectionKind::View {
                let mut view = RawDocumentBuf::new();
                view.append(cstr!("_id"), name.to_string());
                for option in entry.options() {
                    let (option, value) = option?;
                    view.append(option, value);
                }
                history.views.insert(name.to_string(), view);
                continue;
            }
            let data = entry.data_namespace().ok_or_else(|| Error::internal("a collection without documents"))?;
            let followed = Followed {
                name: data.to_string(),
                options: entry.options().to_owned(),
                indexes: entry.indexes().to_vec(),
                in_snapshot: Some(position),
                is_foreign: false,
            };
            // Where the UUID is not told, it is learnt from the first operation on the collection.
            history.add(followed, entry.uuid());
        }
        history.in_snapshot = in_snapshot;
        Ok(history)
    }

    fn add(&mut self, followed: Followed, uuid: Option<[u8; 16]>) {
        let number = self.collections.len();
        self.by_name.insert(followed.name.clone(), number);
        if let Some(uuid) = uuid {
            self.by_uuid.insert(uuid, number);
        }
        self.collections.push(Some(followed));
    }

    /// The collection of a UUID, or, where that is not known yet, of a name.
    fn find(&mut self, uuid: Option<[u8; 16]>, name: &str) -> Option<usize> {
        let Some(uuid) = uuid else { return self.by_name.get(name).copied() };
        if let Some(number) = self.by_uuid.get(&uuid) {
            return Some(*number);
        }
        let number = *self.by_name.get(name)?;
        let is_known = self.by_uuid.values().any(|other| *other == number);
        if is_known {
            return None;
        }
        self.by_uuid.insert(uuid, number);
        Some(number)
    }

    /// Whether a collection that is followed is capped.
    pub(crate) fn is_capped(&self, number: usize) -> bool {
        let followed = self.collections.get(number).and_then(Option::as_ref);
        followed.is_some_and(|followed| followed.options.get_bool("capped").is_ok_and(|capped| capped))
    }

    /// Tells what an operation on a document is about, and takes note of it if it defines a view.
    pub(crate) fn operation(&mut self, at: Timestamp, operation: &Operation<'_>) -> Result<Subject> {
        let name = operation.namespace;
        if let Some(database) = name.strip_suffix(".system.views") {
            if at > self.defined_at && !database.contains('.') {
                self.define_view(operation)?;
            }
            return Ok(Subject::Nothing);
        }
        if name == "admin.system.version" && at > self.defined_at {
            let is_version = |holder: &RawDocument| holder.get_str("_id").is_ok_and(|id| id == "featureCompatibilityVersion");
            if is_version(operation.query.unwrap_or(operation.object)) {
                return Err(barrier("the feature compatibility version of the source was changed", name));
            }
        }
        if is_internal(name) {
            return Ok(Subject::Nothing);
        }
        if let Some(number) = self.find(operation.uuid, name) {
            return Ok(Subject::Collection(number));
        }
        let is_selected = name.parse().is_ok_and(|namespace| self.selects(&namespace));
        // One that was dropped before the definitions were read is in nobody's way.
        if is_selected && at > self.defined_at {
            return Err(Error::corrupt("the oplog tells of a collection that the snapshot should hold and does not")
                .with_context("namespace", name));
        }
        Ok(Subject::Nothing)
    }

    /// Whether a collection would be in the snapshot if it existed then.
    fn selects(&self, namespace: &Namespace) -> bool {
        let shown = match namespace.collection().strip_prefix(BUCKETS) {
            Some(owner) => namespace.sibling(owner),
            None => Ok(namespace.clone()),
        };
        let is_left_out = |collection: &str| {
            ["system.profile", "system.views"].contains(&collection)
                || ["tmp.agg_out.", "system.resharding.", "system.drop."].iter().any(|prefix| collection.starts_with(prefix))
        };
        shown.is_ok_and(|shown| self.selection.selects(&shown)) && !is_left_out(namespace.collection())
    }

    fn define_view(&mut self, operation: &Operation<'_>) -> Result<()> {
        let holder = operation.query.unwrap_or(operation.object);
        let Ok(id) = holder.get_str("_id") else { return Ok(()) };
        match operation.kind {
            OperationKind::Insert => drop(self.views.insert(id.to_owned(), operation.object.to_owned())),
            OperationKind::Delete => drop(self.views.remove(id)),
            _ => {
                if let Some(view) = self.views.get_mut(id) {
                    *view = apply_update(view, operation.object)?;
                }
            }
        }
        Ok(())
    }

    /// Takes note of a command.
    ///
    /// # Errors
    /// `Unsupported` for one behind which nothing can be restored, see [`is_barrier`].
    pub(crate) fn command(&mut self, at: Timestamp, command: &Command<'_>) -> Result<()> {
        if at <= self.defined_at || ["config", "local"].contains(&command.database) {
            return Ok(());
        }
        match command.name {
            // What these begin or end, others tell; the rest is between the members of the source.
            "startIndexBuild"
            | "abortIndexBuild"
            | "setMultikeyMetadata"
            | "dropIdent"
            | "commitTransaction"
            | "abortTransaction" => return Ok(()),
            "dropDatabase" => {
                self.drop_database(command.database);
                return Ok(());
            }
            "renameCollection" => return self.rename(command),
            _ => {}
        }
        let name = command.namespace()?;
        if is_internal(&name) {
            return Ok(());
        }
        if command.name == "create" {
            if let Some(number) = self.by_name.get(&name).copied() {
                self.forget(number);
            }
            self.add(Followed::created(name, command.object)?, command.uuid);
            return Ok(());
        }
        if name.ends_with(".system.views") {
            self.drop_views(command);
            return Ok(());
        }
        let Some(number) = self.find(command.uuid, &name) else {
            let is_selected = name.parse().is_ok_and(|namespace| self.selects(&namespace));
            return if is_selected && !KNOWN.contains(&command.name) { Err(barrier(UNKNOWN, command.name)) } else { Ok(()) };
        };
        let Some(followed) = self.collections.get_mut(number).and_then(Option::as_mut) else { return Ok(()) };
        match command.name {
            "drop" => self.forget(number),
            "createIndexes" => followed.add_index(&without(command.object, &["createIndexes"])?)?,
            "commitIndexBuild" => {
                let indexes = command.object.get_array("indexes");
                for index in
                    indexes.map_err(|error| Error::corrupt("an index build of the oplog has no indexes").with_source(error))?
                {
                    if let Some(index) = index?.as_document() {
                        followed.add_index(index)?;
                    }
                }
            }
            "dropIndexes" | "deleteIndexes" | "dropIndex" | "deleteIndex" => followed.drop_indexes(command.object)?,
            "collMod" => followed.modify(command.object)?,
            other => return Err(barrier(UNKNOWN, other)),
        }
        Ok(())
    }

    fn drop_views(&mut self, command: &Command<'_>) {
        if command.name == "drop" {
            let prefix = format!("{}.", command.database);
            self.views.retain(|name, _| !name.starts_with(&prefix));
        }
    }

    fn drop_database(&mut self, database: &str) {
        let prefix = format!("{database}.");
        let gone: Vec<usize> =
            self.by_name.iter().filter(|(name, _)| name.starts_with(&prefix)).map(|(_, number)| *number).collect();
        gone.into_iter().for_each(|number| self.forget(number));
        self.views.retain(|name, _| !name.starts_with(&prefix));
    }

    fn rename(&mut self, command: &Command<'_>) -> Result<()> {
        let field = |field| {
            let name = command.object.get_str(field);
            name.map(str::to_owned).map_err(|error| Error::corrupt("a rename of the oplog has no name").with_source(error))
        };
        let (from, to) = (field("renameCollection")?, field("to")?);
        let moved = self.find(command.uuid, &from);
        if let Some(replaced) = self.by_name.get(&to).copied().filter(|replaced| Some(*replaced) != moved) {
            self.forget(replaced);
        }
        match moved {
            Some(number) => {
                if let Some(followed) = self.collections.get_mut(number).and_then(Option::as_mut) {
                    followed.rename(to.clone())?;
                }
                if self.by_name.get(&from) == Some(&number) {
                    self.by_name.remove(&from);
                }
                self.by_name.insert(to, number);
            }
            None if to.parse().is_ok_and(|namespace| self.selects(&namespace)) => {
                let options = RawDocumentBuf::new();
                let foreign = Followed { name: to, options, indexes: Vec::new(), in_snapshot: None, is_foreign: true };
                self.add(foreign, command.uuid);
            }
            None => {}
        }
        Ok(())
    }

    /// A collection is gone. What still names it is about nothing.
    fn forget(&mut self, number: usize) {
        if let Some(gone) = self.collections.get_mut(number).and_then(Option::take)
            && self.by_name.get(&gone.name) == Some(&number)
        {
            self.by_name.remove(&gone.name);
        }
    }

    /// Everything that is there at the end, sorted by name.
    pub(crate) fn end(&self) -> Result<Vec<Ended>> {
        let mut all = Vec::new();
        let mut time_series = Vec::new();
        for (number, followed) in self.collections.iter().enumerate() {
            let Some(followed) = followed else { continue };
            let (name, kind, options) = match followed.time_series() {
                Some((database, owner)) => {
                    let options =
                        without(&followed.options, &["validator", "clusteredIndex", "validationLevel", "validationAction"])?;
                    (format!("{database}.{owner}"), CollectionKind::TimeSeries, options)
                }
                None => (followed.name.clone(), CollectionKind::Collection, followed.options.clone()),
            };
            let namespace: Namespace = name.parse()?;
            if !self.selects(&namespace) && followed.in_snapshot.is_none() {
                continue;
            }
            if kind == CollectionKind::TimeSeries {
                time_series.push(name);
            }
            let listed = match kind {
                CollectionKind::TimeSeries => listing(namespace.collection(), "timeseries", &options),
                _ => listing(namespace.collection(), "collection", &options),
            };
            let entry = CollectionEntry::from_parts(namespace, kind, listed, followed.indexes.clone())?;
            let namespace = match followed.in_snapshot.and_then(|position| self.in_snapshot.get(position)) {
                Some(before) => SnapshotNamespace { entry, ..before.clone() },
                None => made(entry),
            };
            all.push(Ended { namespace, number: Some(number), is_foreign: followed.is_foreign });
        }
        for (name, view) in &self.views {
            let namespace: Namespace = name.parse()?;
            if time_series.contains(name) || !self.selects(&namespace) {
                continue;
            }
            let options = without(view, &["_id"])?;
            let listed = listing(namespace.collection(), "view", &options);
            let entry = CollectionEntry::from_parts(namespace, CollectionKind::View, listed, Vec::new())?;
            all.push(Ended { namespace: made(entry), number: None, is_foreign: false });
        }
        all.sort_by(|a, b| a.namespace.namespace().cmp(b.namespace.namespace()));
        Ok(all)
    }
}

/// A collection of which the snapshot holds nothing.
fn made(entry: CollectionEntry) -> SnapshotNamespace {
    let root = TreeRoot { node: None, documents: 0, bytes: 0, segments: 0 };
    SnapshotNamespace { in_id_order: !entry.is_capped(), entry, root, boundary_bits: 0 }
}

/// Whether a namespace belongs to the server itself, or to what a copy does not hold.
fn is_internal(name: &str) -> bool {
    ["config.", "local.", "admin.system.", "admin.mongo_backup."].iter().any(|prefix| name.starts_with(prefix))
        || name.split_once('.').is_some_and(|(_, collection)| collection == "system.profile")
}

/// Whether an error says that the oplog holds something that cannot be done again elsewhere.
pub(crate) fn is_barrier(error: &Error) -> bool {
    error.kind() == ErrorKind::Unsupported && error.context().any(|(key, _)| key == BARRIER)
}

fn barrier(what: &'static str, which: &str) -> Error {
    Error::new(ErrorKind::Unsupported, what).with_context(BARRIER, which)
}

const BARRIER: &str = "in the oplog";
const UNKNOWN: &str = "something was done that cannot be done again from the oplog";
/// Commands that are of no matter for a collection that is not followed.
const KNOWN: [&str; 8] =
    ["drop", "createIndexes", "commitIndexBuild", "dropIndexes", "deleteIndexes", "dropIndex", "deleteIndex", "collMod"];
