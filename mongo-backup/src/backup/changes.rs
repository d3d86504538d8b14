//! What has changed since an older snapshot, as the oplog tells it.

use std::collections::{HashMap, HashSet};

use mongo_core::{
    Deployment, Error, ErrorKind, Result,
    bson::{DateTime, RawDocument, RawDocumentBuf, Timestamp, doc},
    transfer::{
        catalog::{Catalog, CollectionKind},
        leading_id,
        oplog::{Action, Command, Entry, Oplog, OplogRead, ReplicaSetId},
        partition::Key,
    },
};

use crate::repository::Repository;

/// The documents that may have changed, by the UUIDs of their collections.
#[derive(Debug, Default)]
pub(super) struct Changes {
    collections: HashMap<[u8; 16], Touched>,
    bytes: usize,
}

#[derive(Debug)]
enum Touched {
    /// Each once, as bytes.
    Ids(HashSet<Box<[u8]>>),
    /// Too many to tell apart, or something was done to all of them.
    Everything,
}

/// What there is to read of a collection.
#[derive(Debug)]
pub(super) enum ToRead {
    Nothing,
    /// The segments that hold these, which are in the order of the index.
    Documents(Vec<Key>),
    Everything,
}

impl Changes {
    /// Reads what happened from `from` up to `until`, from the oplog as far as that reaches back, and before that from what was captured of it.
    /// The other result says why it is not known.
    pub(super) async fn read(
        oplog: &Oplog,
        repository: &Repository,
        set: ReplicaSetId,
        from: Timestamp,
        until: Timestamp,
    ) -> Result<std::result::Result<Self, String>> {
        let mut changes = Self::default();
        match changes.read_oplog(oplog, from, until).await? {
            Ok(()) => return Ok(Ok(changes)),
            Err(Gap::Lost) => {}
            Err(Gap::Unknown(what)) => return Ok(Err(what)),
        }
        // Only what was captured can help.
        changes = Self::default();
        let mut reached = from;
        for stretch in repository.stretches(set).await?.cover(from, Some(until)) {
            let slice = repository.slice(set, stretch).await?;
            for entry in slice.entries() {
                if let Err(what) = changes.note_entry(entry?, from)? {
                    return Ok(Err(what));
                }
            }
            reached = stretch.last;
        }
        if reached < until {
            match changes.read_oplog(oplog, reached, until).await? {
                Ok(()) => {}
                Err(Gap::Lost) => {
                    return Ok(Err("the oplog no longer reaches back to the newest snapshot, and was not captured".to_owned()));
                }
                Err(Gap::Unknown(what)) => return Ok(Err(what)),
            }
        }
        Ok(Ok(changes))
    }

    /// What has changed where there is no oplog: documents whose field holds a date not before `since`.
    pub(super) async fn by_field(deployment: &Deployment, catalog: &Catalog, field: &str, since: DateTime) -> Result<Self> {
        let mut changes = Self::default();
        for entry in catalog.entries.iter().filter(|entry| entry.kind() == CollectionKind::Collection) {
            let Some(uuid) = entry.uuid() else { continue };
            let namespace = entry.namespace();
            let collection = deployment.database(namespace.database()).collection::<RawDocumentBuf>(namespace.collection());
            let mut found = collection.find(doc! { field: { "$gte": since } }).projection(doc! { "_id": 1 }).await?;
            let mut ids = HashSet::new();
            while found.advance().await? {
                if let Some(id) = leading_id(found.current().as_bytes()) {
                    ids.insert(id.to_vec().into_boxed_slice());
                }
            }
            let touched = if entry.is_capped() { Touched::Everything } else { Touched::Ids(ids) };
            changes.collections.insert(uuid, touched);
        }
        Ok(changes)
    }

    async fn read_oplog(&mut self, oplog: &Oplog, from: Timestamp, until: Timestamp) -> Result<std::result::Result<(), Gap>> {
        let mut scan = oplog.read(from, until);
        loop {
            match scan.next().await? {
                OplogRead::Entries(batch) => {
                    for entry in batch.documents()? {
                        if let Err(what) = self.note_entry(entry?, from)? {
                            return Ok(Err(Gap::Unknown(what)));
                        }
                    }
                }
                OplogRead::End => return Ok(Ok(())),
                _ => return Ok(Err(Gap::Lost)),
            }
        }
    }

    fn note_entry(&mut self, entry: &RawDocument, from: Timestamp) -> Result<std::result::Result<(), String>> {
        let entry = match Entry::parse(entry) {
            Ok(entry) => entry,
            Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(Err(error.to_string())),
            Err(error) => return Err(error),
        };
        match entry.action {
            None => Ok(Ok(())),
            // What is known already; but a transaction may begin with it.
            Some(Action::Operation(_)) if entry.position <= from => Ok(Ok(())),
            Some(action) => self.note(action, 0),
        }
    }

    /// Notes what an operation touches, whether or not its transaction commits.
    fn note(&mut self, action: Action<'_>, depth: u32) -> Result<std::result::Result<(), String>> {
        match action {
            Action::Operation(operation) => {
                let Some(uuid) = operation.uuid else {
                    return Ok(Err("the oplog does not tell of which collections it speaks".to_owned()));
                };
                let touched = self.collections.entry(uuid).or_insert_with(|| Touched::Ids(HashSet::new()));
                if let Touched::Ids(ids) = touched {
                    let id = operation.id()?.into_boxed_slice();
                    let bytes = id.len() + OVERHEAD;
                    if ids.insert(id) {
                        self.bytes += bytes;
                    }
                    if self.bytes > MOST_BYTES {
                        self.forget_largest();
                    }
                }
                Ok(Ok(()))
            }
            Action::Command(command) if command.name == "applyOps" => {
                if depth > DEEPEST {
                    return Err(Error::corrupt("operations of the oplog are nested deeper than any server allows"));
                }
                for carried in command.carried() {
                    if let Some(action) = Action::parse(carried?)?
                        && let Err(what) = self.note(action, depth + 1)?
                    {
                        return Ok(Err(what));
                    }
                }
                Ok(Ok(()))
            }
            Action::Command(command) => Ok(self.note_command(&command)),
            _ => Ok(Ok(())),
        }
    }

    fn note_command(&mut self, command: &Command<'_>) -> std::result::Result<(), String> {
        // These leave the documents of every collection as they are, or take them all away: a collection is known by its UUID.
        let is_harmless = [
            "create",
            "createIndexes",
            "startIndexBuild",
            "commitIndexBuild",
            "abortIndexBuild",
            "dropIndexes",
            "dropIndex",
            "deleteIndexes",
            "deleteIndex",
            "collMod",
            "drop",
            "dropDatabase",
            "renameCollection",
            "setMultikeyMetadata",
            "dropIdent",
            "commitTransaction",
            "abortTransaction",
        ];
        if is_harmless.contains(&command.name) || command.database == "config" {
            return Ok(());
        }
        match command.uuid {
            Some(uuid) => drop(self.collections.insert(uuid, Touched::Everything)),
            None => return Err(format!("what {} did is not known here", command.name)),
        }
        Ok(())
    }

    /// Memory is bounded: of the collection in which most has changed, it is no longer told what.
    fn forget_largest(&mut self) {
        let count = |touched: &Touched| match touched {
            Touched::Ids(ids) => ids.len(),
            Touched::Everything => 0,
        };
        let Some(largest) = self.collections.values_mut().max_by_key(|touched| count(touched)) else { return };
        if let Touched::Ids(ids) = largest {
            self.bytes -= ids.iter().map(|id| id.len() + OVERHEAD).sum::<usize>();
        }
        *largest = Touched::Everything;
    }

    /// What has to be read of a collection.
    pub(super) fn take(&mut self, uuid: [u8; 16]) -> Result<ToRead> {
        let ids = match self.collections.remove(&uuid) {
            None => return Ok(ToRead::Nothing),
            Some(Touched::Everything) => return Ok(ToRead::Everything),
            Some(Touched::Ids(ids)) => ids,
        };
        let mut keys: Vec<Key> = ids.iter().map(|id| Key::of_element(id)).collect::<Result<_>>()?;
        keys.sort_by(Key::compare);
        Ok(ToRead::Documents(keys))
    }
}

/// Why it is not known what happened.
enum Gap {
    /// The oplog does not reach back.
    Lost,
    /// It tells of something that is not known here.
    Unknown(String),
}

const MOST_BYTES: usize = 64 << 20;
/// What a set takes for each of its members.
const OVERHEAD: usize = 32;
const DEEPEST: u32 = 10;
