//! How far a restore is, kept so that the same restore can go on after an interruption.
//!
//! Two states are kept. The *beginning* says which collections the restore makes, and once they are made, which they are:
//! their UUIDs bind the checkpoint to them, so one that was dropped since, or another deployment, is never taken for what the restore has
//! begun. Before that, one is taken for its own only if it is exactly as the restore would make it, and empty. Nothing is dropped for being begun.
//! What was *reached* says up to where every document is there for good. Both are removed when the restore is complete.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Namespace, Result,
    bson::{self, Binary, DateTime, Document, RawDocumentBuf, doc, spec::BinarySubtype},
    mongodb::options::{ReadPreference, SelectionCriteria},
    state::{StateName, StateStore},
    transfer::{
        catalog::{Catalog, collection_uuids},
        majority::PendingMajority,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};

use super::{
    DropExisting, Restore, RestoreItem,
    plan::Place,
    replay::Replayed,
    tally::{Reached, Tally},
};
use crate::repository::manifest::SnapshotId;

/// The checkpoint of one restore.
#[derive(Debug)]
pub(super) struct Checkpoint {
    store: Arc<dyn StateStore>,
    beginning: StateName,
    reached: StateName,
    replayed: StateName,
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
    /// When it was saved.
    at: DateTime,
    reached: Reached,
}

/// A restore whose collections are made.
#[derive(Clone, Debug)]
pub(super) struct Begun {
    pub(super) at: DateTime,
    /// Their UUIDs.
    collections: Vec<u8>,
}

/// What a restore goes on with.
#[derive(Clone, Debug)]
pub(super) struct Resumed {
    pub(super) begun: Begun,
    pub(super) reached: Reached,
    /// How far the oplog was applied; none if that had not begun.
    pub(super) replayed: Option<Replayed>,
}

/// How far the oplog was applied, of the restore that began at this time.
#[derive(Serialize, Deserialize)]
struct StoredReplayed {
    of: DateTime,
    at: DateTime,
    replayed: Replayed,
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
            "transforms": i64::try_from(self.transforms.len()).unwrap_or(i64::MAX),
        };
        if let Some(point) = settings.at {
            identity.insert("at", point.to_string());
        }
        if let Some(ids) = &self.choice.ids {
            identity.insert("ids", ids.to_binary());
        }
        let name = hex::encode(&Sha256::digest(bson::serialize_to_vec(&identity)?)[..16]);
        Ok(Some(Checkpoint {
            store: Arc::clone(store),
            beginning: format!("restore-{name}").parse()?,
            reached: format!("restore-{name}.reached").parse()?,
            replayed: format!("restore-{name}.replayed").parse()?,
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
        let resumed = match beginning.collections {
            Some(collections) => {
                let begun = Begun { at: beginning.at, collections: collections.bytes };
                let (mut saved, reached) = checkpoint.load_reached(&begun).await?;
                let replayed = checkpoint.load::<StoredReplayed>(&checkpoint.replayed).await?;
                let replayed = replayed.filter(|replayed| replayed.of == begun.at);
                saved = replayed.as_ref().map_or(saved, |replayed| replayed.at.max(saved));
                if self.uuids(items).await? != begun.collections {
                    self.note("the target is no longer what the interrupted restore has left: this one begins anew".to_owned());
                    return Ok(None);
                }
                if DateTime::now().saturating_duration_since(saved) > FORGOTTEN {
                    self.note("the interrupted restore is too long ago to go on with it: this one begins anew".to_owned());
                    return Ok(None);
                }
                Some(Resumed { begun, reached, replayed: replayed.map(|replayed| replayed.replayed) })
            }
            None => None,
        };
        let makes = beginning.makes.bytes;
        for (item, _) in items.iter_mut().zip(makes).filter(|(_, makes)| *makes == 1) {
            let Some(entry) = target.get(&item.target) else { continue };
            let is_begun = match (item.data_namespace()?, &resumed) {
                (None, _) => item.is_as_made(entry),
                (Some(_), Some(_)) => true,
                // One that is there to be dropped may be, whoever has made it.
                (Some(_), None) if self.settings.drop_existing == DropExisting::Yes => false,
                (Some(data), None) => item.is_as_made(entry) && self.is_empty(&data).await?,
            };
            if is_begun {
                item.place = Place::Begun;
            }
        }
        Ok(resumed)
    }

    async fn is_empty(&self, namespace: &Namespace) -> Result<bool> {
        let collection = self.target.database(namespace.database()).collection::<RawDocumentBuf>(namespace.collection());
        let find = collection.find_one(Document::new()).selection_criteria(primary());
        Ok(find.await?.is_none())
    }

    /// What was reached, as far as that is to be relied on; says so.
    pub(super) async fn trusted(&self, resumed: Option<&Resumed>, order: &[(i64, &RestoreItem)]) -> Result<Reached> {
        let Some(Resumed { begun, reached, replayed }) = resumed else { return Ok(Reached::default()) };
        let goes_on = format!("goes on with the restore of {}", begun.at.try_to_rfc3339_string().unwrap_or_default());
        if replayed.is_some() {
            self.note(format!("{goes_on}, which was interrupted while it applied the oplog"));
            return Ok(reached.clone());
        }
        // What is merged may have been changed by its owners since; and of chosen documents it is not known how many there should be.
        if order.iter().any(|(_, item)| self.merges(item)) || !self.choice.is_everything() || !self.transforms.is_empty() {
            self.note(format!("{goes_on}, which was interrupted: every document is looked at again"));
            return Ok(Reached::default());
        }
        let mut missing = 0;
        for (number, item) in order {
            let expected = match number.cmp(&reached.position.namespace) {
                Ordering::Less => item.source.documents(),
                Ordering::Equal => self.documents_in(item, reached.position.segments).await?,
                Ordering::Greater => break,
            };
            let Some(data) = item.data_namespace()? else { continue };
            let collection = self.target.database(data.database()).collection::<RawDocumentBuf>(data.collection());
            missing += expected.saturating_sub(collection.estimated_document_count().selection_criteria(primary()).await?);
        }
        if missing > u64::try_from(reached.refused).unwrap_or(0) {
            self.note(format!(
                "{goes_on}, which was interrupted: {missing} documents that it had written are gone, so all are looked at again"
            ));
            return Ok(Reached::default());
        }
        self.note(format!("{goes_on}, which was interrupted: {} documents are there", reached.documents));
        Ok(reached.clone())
    }

    /// How many documents the first segments of an item hold.
    async fn documents_in(&self, item: &RestoreItem, segments: i64) -> Result<u64> {
        let mut walk = self.repository.walk(&item.source.root)?;
        let mut documents = 0;
        for _ in 0..segments {
            let Some(entry) = walk.next().await? else { break };
            documents += entry.documents;
        }
        Ok(documents)
    }

    /// Whether the collections are still those that the restore has made.
    ///
    /// # Errors
    /// `Conflict` if not: what was written is gone, or is in a collection of another name.
    pub(super) async fn check_collections(&self, begun: &Begun, items: &[RestoreItem]) -> Result<()> {
        if self.uuids(items).await? == begun.collections {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Conflict,
            "a collection of the target was dropped, renamed or made anew by somebody else during the restore: restore again",
        ))
    }

    /// Saves now and then what was reached, while documents are written.
    pub(super) async fn keep_checkpoints<T>(
        &self,
        checkpoint: Option<(&Checkpoint, &Begun)>,
        tally: &Tally,
        pending: &PendingMajority,
        writing: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let Some((checkpoint, begun)) = checkpoint else { return writing.await };
        let ended = CancellationToken::new();
        let saving = async {
            let mut last = tally.reached();
            loop {
                tokio::select! {
                    biased;
                    () = ended.cancelled() => return,
                    () = tokio::time::sleep(self.settings.checkpoint_every) => {}
                }
                let reached = tally.reached();
                if reached == last {
                    continue;
                }
                match self.save_reached(checkpoint, begun, &reached, pending, &ended).await {
                    Ok(()) => last = reached,
                    Err(error) if error.kind() == ErrorKind::Cancelled => return,
                    // The restore itself goes on: an interruption only costs more then.
                    Err(error) => self.note(format!("how far the restore is could not be saved: {error}")),
                }
            }
        };
        let writing = async {
            let written = writing.await;
            ended.cancel();
            written
        };
        // A save that has begun is waited for: none may take effect after the last one, or after the checkpoint was removed.
        let (written, ()) = tokio::join!(writing, saving);
        let written = written?;
        if let Err(error) = self.save_reached(checkpoint, begun, &tally.reached(), pending, &self.cancel).await {
            self.note(format!("how far the restore is could not be saved: {error}"));
        }
        Ok(written)
    }

    async fn save_reached(
        &self,
        checkpoint: &Checkpoint,
        begun: &Begun,
        reached: &Reached,
        pending: &PendingMajority,
        cancel: &CancellationToken,
    ) -> Result<()> {
        if self.notes_places() {
            pending.settle(&self.target, cancel).await?;
        }
        let stored = StoredReached { of: begun.at, at: DateTime::now(), reached: reached.clone() };
        checkpoint.store.save(&checkpoint.reached, bson::serialize_to_vec(&stored)?).await
    }

    /// The UUIDs of the collections that hold the documents, in the order of the items; zeros where there is none.
    async fn uuids(&self, items: &[RestoreItem]) -> Result<Vec<u8>> {
        let databases: BTreeSet<&str> = items.iter().map(|item| item.target.database()).collect();
        let mut found = BTreeMap::new();
        for database in databases {
            found.insert(database, collection_uuids(&self.target, database, None).await?);
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

    /// Says which collections there are, now that all were made. No document was written yet.
    pub(super) async fn save_made(&self, checkpoint: &Checkpoint, beginning: Beginning, items: &[RestoreItem]) -> Result<Begun> {
        let begun = Begun { at: beginning.at, collections: self.uuids(items).await? };
        let beginning = Beginning { collections: Some(binary(begun.collections.clone())), ..beginning };
        checkpoint.store.save(&checkpoint.beginning, bson::serialize_to_vec(&beginning)?).await?;
        Ok(begun)
    }
}

impl Checkpoint {
    /// Says which namespaces the restore will make. Nothing was made yet.
    pub(super) async fn begin(&self, items: &[RestoreItem], makes: impl Fn(&RestoreItem) -> bool) -> Result<Beginning> {
        let makes = items.iter().map(|item| u8::from(makes(item))).collect();
        let beginning = Beginning { version: VERSION, at: DateTime::now(), makes: binary(makes), collections: None };
        self.store.save(&self.beginning, bson::serialize_to_vec(&beginning)?).await?;
        self.store.remove(&self.reached).await?;
        self.store.remove(&self.replayed).await?;
        Ok(beginning)
    }

    /// Removes it: the restore is complete.
    pub(super) async fn remove(&self) -> Result<()> {
        self.store.remove(&self.beginning).await?;
        self.store.remove(&self.replayed).await?;
        self.store.remove(&self.reached).await
    }

    pub(super) async fn save_replayed(&self, begun: &Begun, replayed: &Replayed) -> Result<()> {
        let stored = StoredReplayed { of: begun.at, at: DateTime::now(), replayed: replayed.clone() };
        self.store.save(&self.replayed, bson::serialize_to_vec(&stored)?).await
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

    /// What was reached, and when that was saved.
    async fn load_reached(&self, begun: &Begun) -> Result<(DateTime, Reached)> {
        let stored = self.load::<StoredReached>(&self.reached).await?.filter(|stored| stored.of == begun.at);
        Ok(stored.map_or_else(|| (begun.at, Reached::default()), |stored| (stored.at, stored.reached)))
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

/// A secondary may not have what is there.
fn primary() -> SelectionCriteria {
    SelectionCriteria::ReadPreference(ReadPreference::Primary)
}

fn binary(bytes: Vec<u8>) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes }
}

const VERSION: i32 = 1;
const UUID: usize = 16;
/// How often what was reached is saved. A save waits for the majority, and is small.
pub(super) const EVERY: Duration = Duration::from_secs(1);
/// A restore that stood still for longer is not gone on with: too much may have happened to what it has written.
const FORGOTTEN: Duration = Duration::from_secs(7 * 24 * 3600);
