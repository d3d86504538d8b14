//! How far a restore is, kept so that the same restore can go on after an interruption.
//!
//! Two states are kept. The *beginning* says which collections the restore makes, and once they are made, which they are:
//! their UUIDs bind the checkpoint to them, so one that was dropped since, or another deployment, is never taken for what the restore has
//! begun. What was *reached* says up to where every document is there for good. Both are removed when the restore is complete.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use mongo_core::{
    Deployment, Error, ErrorKind, Namespace, Result,
    bson::{self, Binary, DateTime, Document, doc, spec::BinarySubtype},
    state::{StateName, StateStore},
    transfer::{
        catalog::{Catalog, collection_uuids},
        majority::PendingMajority,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};

use super::{
    Restore, RestoreItem,
    plan::Place,
    tally::{Reached, Tally},
};
use crate::repository::manifest::SnapshotId;

/// The checkpoint of one restore.
#[derive(Debug)]
pub(super) struct Checkpoint {
    store: Arc<dyn StateStore>,
    beginning: StateName,
    reached: StateName,
}

/// What a restore has begun.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Beginning {
    version: i32,
    /// Begun when, by the clock of the restore.
    pub(super) at: DateTime,
    /// A byte for each namespace, in their order: 1 where the restore makes it.
    makes: Binary,
    /// The UUIDs of the target's collections, in the same order; zeros for views. Not there before all were made.
    collections: Option<Binary>,
}

/// What was reached, of the restore that began at this time.
#[derive(Serialize, Deserialize)]
struct StoredReached {
    of: DateTime,
    reached: Reached,
}

/// What a restore goes on with.
#[derive(Clone, Debug)]
pub(super) struct Resumed {
    pub(super) at: DateTime,
    pub(super) reached: Reached,
}

impl Restore {
    /// The checkpoint of this restore of a snapshot, if any is to be kept.
    pub(super) fn checkpoint(&self, snapshot: &SnapshotId) -> Result<Option<Checkpoint>> {
        let Some(store) = &self.checkpoints else { return Ok(None) };
        let settings = &self.settings;
        let mut identity = doc! {
            "snapshot": snapshot.as_str(),
            "selection": bson::serialize_to_bson(&settings.selection)?,
            "renames": bson::serialize_to_bson(&settings.renames)?,
            "mode": bson::serialize_to_bson(&settings.mode)?,
            "drop": bson::serialize_to_bson(&settings.drop_existing)?,
            "users": settings.users_and_roles,
            // Which documents it takes only the caller knows.
            "filter": self.choice.filter.is_some(),
        };
        if let Some(ids) = &self.choice.ids {
            identity.insert("ids", ids.to_binary());
        }
        let name = hex::encode(&Sha256::digest(bson::serialize_to_vec(&identity)?)[..16]);
        Ok(Some(Checkpoint {
            store: Arc::clone(store),
            beginning: format!("restore-{name}").parse()?,
            reached: format!("restore-{name}.reached").parse()?,
        }))
    }

    /// Finds out what the target has of what an interrupted restore has begun. None if there was none, or if the target is no longer what
    /// that has left.
    pub(super) async fn find_begun(
        &self,
        checkpoint: &Checkpoint,
        items: &mut [RestoreItem],
        target: &Catalog,
    ) -> Result<Option<Resumed>> {
        let Some(beginning) = checkpoint.load_beginning(items.len()).await? else { return Ok(None) };
        let resumed = match &beginning.collections {
            Some(collections) => {
                if uuids(&self.target, items).await? != collections.bytes {
                    let note = "the target is no longer what the interrupted restore has left: this one begins anew";
                    self.note(note.to_owned());
                    return Ok(None);
                }
                let reached = checkpoint.load_reached(beginning.at).await?;
                Some(Resumed { at: beginning.at, reached })
            }
            None => None,
        };
        let makes = beginning.makes.bytes;
        for (item, _) in items.iter_mut().zip(makes).filter(|(_, makes)| *makes == 1) {
            let Some(entry) = target.get(&item.target).filter(|entry| entry.kind() == item.source.kind()) else { continue };
            let leftover = match (entry.data_namespace(), &resumed) {
                // A view that was made is made again.
                (None, _) => true,
                (Some(_), Some(_)) => {
                    item.place = Place::Begun;
                    continue;
                }
                // One that the restore has made, or anybody else: there is nothing in it.
                (Some(data), None) => self.is_empty(&data).await?,
            };
            if leftover {
                item.place = Place::Leftover;
            }
        }
        Ok(resumed)
    }

    async fn is_empty(&self, namespace: &Namespace) -> Result<bool> {
        let collection = self.target.database(namespace.database()).collection::<bson::RawDocumentBuf>(namespace.collection());
        Ok(collection.find_one(Document::new()).await?.is_none())
    }

    /// Saves now and then what was reached, while documents are written.
    pub(super) async fn keep_checkpoints<T>(
        &self,
        checkpoint: Option<(&Checkpoint, DateTime)>,
        tally: &Tally,
        pending: &PendingMajority,
        writing: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let Some((checkpoint, begun)) = checkpoint else { return writing.await };
        let saving = async {
            let mut last = tally.reached();
            loop {
                tokio::time::sleep(self.settings.checkpoint_every).await;
                let reached = tally.reached();
                if reached == last {
                    continue;
                }
                match self.save_reached(checkpoint, begun, &reached, pending).await {
                    Ok(()) => last = reached,
                    // The restore itself goes on: an interruption only costs more then.
                    Err(error) => self.note(format!("how far the restore is could not be saved: {error}")),
                }
            }
        };
        // Every save that was begun and is dropped has taken effect or not: both are well.
        let written = tokio::select! {
            biased;
            written = writing => written?,
            () = saving => return Err(Error::internal("saving checkpoints has ended")),
        };
        if let Err(error) = self.save_reached(checkpoint, begun, &tally.reached(), pending).await {
            self.note(format!("how far the restore is could not be saved: {error}"));
        }
        Ok(written)
    }

    async fn save_reached(
        &self,
        checkpoint: &Checkpoint,
        begun: DateTime,
        reached: &Reached,
        pending: &PendingMajority,
    ) -> Result<()> {
        if self.notes_places() {
            pending.settle(&self.target, &self.cancel).await?;
        }
        let stored = StoredReached { of: begun, reached: reached.clone() };
        checkpoint.store.save(&checkpoint.reached, bson::serialize_to_vec(&stored)?).await
    }
}

impl Checkpoint {
    /// Says which namespaces the restore will make. Nothing was made yet.
    pub(super) async fn begin(&self, items: &[RestoreItem], makes: impl Fn(&RestoreItem) -> bool) -> Result<Beginning> {
        let makes = items.iter().map(|item| u8::from(makes(item))).collect();
        let beginning = Beginning { version: VERSION, at: DateTime::now(), makes: binary(makes), collections: None };
        self.store.save(&self.beginning, bson::serialize_to_vec(&beginning)?).await?;
        self.store.remove(&self.reached).await?;
        Ok(beginning)
    }

    /// Says which collections they are, now that all are there. No document was written yet.
    pub(super) async fn made(&self, beginning: Beginning, target: &Deployment, items: &[RestoreItem]) -> Result<()> {
        let beginning = Beginning { collections: Some(binary(uuids(target, items).await?)), ..beginning };
        self.store.save(&self.beginning, bson::serialize_to_vec(&beginning)?).await
    }

    /// Removes it: the restore is complete.
    pub(super) async fn remove(&self) -> Result<()> {
        self.store.remove(&self.beginning).await?;
        self.store.remove(&self.reached).await
    }

    async fn load_beginning(&self, namespaces: usize) -> Result<Option<Beginning>> {
        let Some(beginning) = self.load::<Beginning>(&self.beginning).await? else { return Ok(None) };
        if beginning.version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the checkpoint is of another version: go on with that, or begin anew",
            )
            .with_context("checkpoint", &self.beginning)
            .with_context("in", self.store.describe()));
        }
        let uuids = beginning.collections.as_ref().map_or(namespaces * UUID, |uuids| uuids.bytes.len());
        if beginning.makes.bytes.len() != namespaces || uuids != namespaces * UUID {
            return Err(self.malformed(&self.beginning));
        }
        Ok(Some(beginning))
    }

    async fn load_reached(&self, begun: DateTime) -> Result<Reached> {
        let stored = self.load::<StoredReached>(&self.reached).await?.filter(|stored| stored.of == begun);
        Ok(stored.map(|stored| stored.reached).unwrap_or_default())
    }

    async fn load<T: DeserializeOwned>(&self, name: &StateName) -> Result<Option<T>> {
        let Some(state) = self.store.load(name).await? else { return Ok(None) };
        bson::deserialize_from_slice(&state).map(Some).map_err(|error| self.malformed(name).with_source(error))
    }

    fn malformed(&self, name: &StateName) -> Error {
        Error::corrupt("the checkpoint of an interrupted restore is malformed: begin anew")
            .with_context("checkpoint", name)
            .with_context("in", self.store.describe())
    }
}

/// The UUIDs of the collections that hold the documents, in the order of the items; zeros where there is none.
async fn uuids(target: &Deployment, items: &[RestoreItem]) -> Result<Vec<u8>> {
    let databases: BTreeSet<&str> = items.iter().map(|item| item.target.database()).collect();
    let mut found = BTreeMap::new();
    for database in databases {
        found.insert(database, collection_uuids(target, database, None).await?);
    }
    let mut uuids = Vec::with_capacity(items.len() * UUID);
    for item in items {
        let uuid = item
            .data_namespace()?
            .and_then(|data| found.get(item.target.database())?.get(data.collection()).copied())
            .unwrap_or_default();
        uuids.extend_from_slice(&uuid);
    }
    Ok(uuids)
}

fn binary(bytes: Vec<u8>) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes }
}

const VERSION: i32 = 1;
const UUID: usize = 16;
/// How often what was reached is saved. A save waits for the majority, and is small.
pub(super) const EVERY: Duration = Duration::from_secs(1);
