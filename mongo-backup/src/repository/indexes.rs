//! Reading the index of a repository: every index object, and the directories of the packs that none names.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering::SeqCst},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongo_core::{Error, ErrorKind, Result, lock};

use super::{
    READS_AT_ONCE, Repository,
    condemned::Condemned,
    envelope::{self, Magic},
    index::{self, Index, IndexPayload},
    pack::{self, Directory, PackId},
};
use crate::archive::{ObjectMeta, ObjectName};

/// Everything that index objects and packs say.
pub(crate) struct IndexReading {
    pub(crate) objects: Vec<(ObjectName, IndexPayload)>,
    /// The packs that are there, each with its size.
    pub(crate) packs: HashMap<PackId, u64>,
    /// What the directories of packs say that no index object names.
    pub(crate) unnamed: Vec<IndexPayload>,
    /// Index objects and directories that could not be read, and what is wrong with them.
    pub(crate) damaged: Vec<(String, String)>,
    pub(crate) condemned: Condemned,
    /// Whether something that was listed was gone when it was to be read: a prune may have moved what it held to where was looked already.
    vanished: bool,
    /// What it was read from, if all of that was there and could be read.
    inventory: Option<Inventory>,
}

/// The index in use.
#[derive(Debug, Default)]
pub(super) struct CurrentIndex {
    /// That of the reading that it comes from: one that began earlier never replaces one that began later.
    number: u64,
    index: Arc<Index>,
    /// Index objects and directories that could not be read, and what is wrong with them.
    damaged: Vec<(String, String)>,
    inventory: Option<Inventory>,
}

/// What an index is read from, by names and sizes. None of it ever changes, so who finds the same again knows what it says.
#[derive(Debug, PartialEq)]
struct Inventory {
    objects: HashMap<ObjectName, u64>,
    packs: HashMap<PackId, u64>,
    condemned: HashSet<PackId>,
}

/// The same, listed and not read yet.
struct Listed {
    condemned: Condemned,
    objects: Vec<ObjectMeta>,
    packs: HashMap<PackId, u64>,
}

impl Listed {
    fn inventory(&self) -> Inventory {
        Inventory {
            objects: self.objects.iter().map(|object| (object.name.clone(), object.size)).collect(),
            packs: self.packs.clone(),
            condemned: self.condemned.packs().clone(),
        }
    }
}

impl IndexReading {
    /// Each payload goes as soon as it is not needed any more: together they are as large as the index.
    fn into_index(mut self) -> Index {
        let objects = std::mem::take(&mut self.objects).into_iter().map(|(_, payload)| payload);
        let payloads = objects.chain(std::mem::take(&mut self.unnamed));
        let usable = |id, size| {
            let there = self.packs.get(&id) == Some(&size);
            if !there {
                tracing::warn!(pack = ?id, "a pack that the index names is missing or truncated");
            }
            there
        };
        Index::join(payloads, usable, |id| self.condemned.holds(id))
    }
}

impl Repository {
    /// Reads the index anew, and trusts only what lies in packs that are there with the size they should have.
    ///
    /// Clones share the index. Whoever has reloaded it finds a reading that began after the call, be it another's, or one that would have read the same: what
    /// was condemned before is known.
    pub(crate) async fn reload_index(&self) -> Result<()> {
        let number = self.0.readings.fetch_add(1, SeqCst);
        let listed = self.list_indexes().await?;
        self.read_current_index(number, listed).await
    }

    /// As [`reload_index`](Self::reload_index), but nothing is read where the archive holds the same objects as when it was last read.
    /// That one of them was damaged meanwhile, without another size, is not noticed.
    pub(crate) async fn refresh_index(&self) -> Result<()> {
        let number = self.0.readings.fetch_add(1, SeqCst);
        let listed = self.list_indexes().await?;
        let inventory = listed.inventory();
        // Its number stays: what somebody else is reading in full, and may find damaged, is not outdone by having looked at names.
        if lock::read(&self.0.index).inventory.as_ref() == Some(&inventory) {
            return Ok(());
        }
        self.read_current_index(number, listed).await
    }

    async fn read_current_index(&self, number: u64, listed: Listed) -> Result<()> {
        let mut reading = self.read_listed(listed).await?;
        let (damaged, inventory) = (reading.damaged.clone(), reading.inventory.take());
        // Joining sorts what can be millions of rows.
        let index = tokio::task::spawn_blocking(move || reading.into_index()).await?;
        tracing::debug!(segments = index.len(), packs = index.packs().len(), "index read");
        let inventory = inventory.filter(|_| index.unusable().is_empty());
        let mut current = lock::write(&self.0.index);
        if current.number < number {
            *current = CurrentIndex { number, index: Arc::new(index), damaged, inventory };
        }
        Ok(())
    }

    pub(crate) async fn read_indexes(&self) -> Result<IndexReading> {
        let listed = self.list_indexes().await?;
        self.read_listed(listed).await
    }

    async fn read_listed(&self, listed: Listed) -> Result<IndexReading> {
        let mut reading = self.read_listed_once(listed).await?;
        for _ in 0..READINGS {
            if !reading.vanished {
                break;
            }
            let listed = self.list_indexes().await?;
            reading = self.read_listed_once(listed).await?;
        }
        // What is gone every time is shown by a listing that lags behind.
        Ok(reading)
    }

    async fn list_indexes(&self) -> Result<Listed> {
        // What will go, before what is there: else a pack could be condemned in between, and be relied upon.
        let condemned = self.read_condemned().await?;
        // Index objects before packs: whoever writes at the same time writes packs before the index object that names them.
        let objects: Vec<ObjectMeta> = self.archive().list(index::PREFIX).try_collect().await?;
        let packs: HashMap<PackId, u64> = self
            .archive()
            .list(pack::PREFIX)
            .try_filter_map(|object| async move { Ok(PackId::from_object(&object.name).map(|id| (id, object.size))) })
            .try_collect()
            .await?;
        Ok(Listed { condemned, objects, packs })
    }

    async fn read_listed_once(&self, listed: Listed) -> Result<IndexReading> {
        let inventory = listed.inventory();
        let Listed { condemned, objects, packs } = listed;
        let read: Vec<(ObjectName, Result<IndexPayload>)> = stream::iter(objects)
            .map(|object| async move {
                let read = self.read_index(&object.name).await;
                (object.name, read)
            })
            .buffer_unordered(READS_AT_ONCE)
            .collect()
            .await;
        let mut reading = IndexReading {
            objects: Vec::with_capacity(read.len()),
            packs,
            unnamed: Vec::new(),
            damaged: Vec::new(),
            condemned,
            vanished: false,
            inventory: None,
        };
        for (name, read) in read {
            match read {
                Ok(payload) => reading.objects.push((name, payload)),
                Err(error) if error.kind() == ErrorKind::CorruptData => reading.damaged.push((name.to_string(), error.report())),
                Err(error) if error.kind() == ErrorKind::NotFound => reading.vanished = true,
                Err(error) => return Err(error),
            }
        }
        self.find_unlisted(&mut reading).await?;
        self.read_unnamed(&mut reading).await?;
        let is_whole = reading.damaged.is_empty() && !reading.vanished && reading.packs == inventory.packs;
        reading.inventory = is_whole.then_some(inventory);
        Ok(reading)
    }

    /// Packs that an index object names and the listing did not show, or with another size: a listing may lag behind.
    async fn find_unlisted(&self, reading: &mut IndexReading) -> Result<()> {
        let named = reading.objects.iter().flat_map(|(_, payload)| &payload.packs);
        let unlisted: HashSet<PackId> =
            named.filter(|(id, size)| reading.packs.get(id) != Some(size)).map(|(id, _)| *id).collect();
        let found: Vec<(PackId, Result<ObjectMeta>)> = stream::iter(unlisted)
            .map(|id| async move {
                let found = match id.object() {
                    Ok(name) => self.archive().head(&name).await,
                    Err(error) => Err(error),
                };
                (id, found)
            })
            .buffer_unordered(READS_AT_ONCE)
            .collect()
            .await;
        for (id, found) in found {
            match found {
                Ok(object) => {
                    reading.packs.insert(id, object.size);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    reading.packs.remove(&id);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Packs that no index object names were stored by a backup that is under way or was interrupted, or their index object is lost.
    async fn read_unnamed(&self, reading: &mut IndexReading) -> Result<()> {
        let named: HashSet<PackId> =
            reading.objects.iter().flat_map(|(_, payload)| payload.packs.iter().map(|(id, _)| *id)).collect();
        let unnamed: Vec<(PackId, u64)> =
            reading.packs.iter().filter(|(id, _)| !named.contains(id)).map(|(id, size)| (*id, *size)).collect();
        let read: Vec<(PackId, u64, Result<Directory>)> = stream::iter(unnamed)
            .map(|(id, size)| async move { (id, size, self.read_directory(id, size).await) })
            .buffer_unordered(READS_AT_ONCE)
            .collect()
            .await;
        for (id, size, directory) in read {
            match directory {
                Ok(directory) => reading.unnamed.push(index::decode(&index::encode(&[(id, size, directory)])?)?),
                Err(error) if error.kind() == ErrorKind::CorruptData => {
                    reading.damaged.push((id.object()?.to_string(), error.report()))
                }
                Err(error) if error.kind() == ErrorKind::NotFound => reading.vanished = true,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn read_index(&self, name: &ObjectName) -> Result<IndexPayload> {
        let bytes = self.archive().get(name, None).await?;
        let (config, name) = (self.config(), name.clone());
        // There can be megabytes to hash and decrypt.
        let decoding = move || {
            let payload = envelope::open(Magic::INDEX, &name, config.cipher.as_ref(), &bytes)?;
            index::decode(&payload).map_err(|error| error.with_context("object", name))
        };
        tokio::task::spawn_blocking(decoding).await?
    }

    /// The directory of a pack, read from its end. That its segments are what they are named as is checked when they are read.
    async fn read_directory(&self, id: PackId, size: u64) -> Result<Directory> {
        let object = id.object()?;
        let named = |error: Error| error.with_context("object", &object);
        let config = self.config();
        let header = self.archive().get(&object, Some(0..size.min(pack::HEADER as u64))).await?;
        let trailer = self.archive().get(&object, Some(size.saturating_sub(pack::TRAILER as u64)..size)).await?;
        let tail = pack::tail_length(&trailer, config.cipher.as_ref()).map_err(named)?;
        let start = size.checked_sub(tail).ok_or_else(|| named(pack::no_directory()))?;
        let tail = self.archive().get(&object, Some(start..size)).await?;
        pack::directory_from(&header, &tail, size, config.cipher.as_ref()).map_err(named)
    }

    /// Index objects and directories that cannot be read, and what is wrong with them.
    pub(crate) fn damaged_indexes(&self) -> Vec<(String, String)> {
        lock::read(&self.0.index).damaged.clone()
    }

    pub(crate) fn index(&self) -> Arc<Index> {
        Arc::clone(&lock::read(&self.0.index).index)
    }

    /// The objects of packs that the index names but that are missing or have another size.
    pub(crate) fn unusable_packs(&self) -> Vec<String> {
        self.index().unusable().iter().filter_map(|id| id.object().ok()).map(|name| name.to_string()).collect()
    }
}

const READINGS: usize = 4;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{ArchiveSink as _, Key, MemoryArchive, PutMode, repository::testing};

    async fn open(archive: &Arc<MemoryArchive>) -> Repository {
        Repository::open_or_init_shared(Arc::<MemoryArchive>::clone(archive), Key::unencrypted()).await.unwrap()
    }

    async fn store(repository: &Repository, value: i32) {
        let documents = (0..200).map(|id| (id, value)).collect();
        testing::snapshot(repository, mongo_core::bson::DateTime::from_millis(i64::from(value)), &documents).await.unwrap();
    }

    /// Whether a refresh reads the index anew.
    async fn is_read_anew(repository: &Repository) -> bool {
        let before = repository.index();
        repository.refresh_index().await.unwrap();
        !Arc::ptr_eq(&before, &repository.index())
    }

    #[tokio::test]
    async fn an_index_is_read_anew_when_something_was_added_condemned_or_lost_and_not_otherwise() {
        let archive = Arc::new(MemoryArchive::new());
        let (ours, others) = (open(&archive).await, open(&archive).await);
        store(&ours, 1).await;
        ours.refresh_index().await.unwrap();
        assert!(!is_read_anew(&ours).await);

        store(&others, 2).await;
        assert!(is_read_anew(&ours).await);
        assert!(!is_read_anew(&ours).await);
        let packs: Vec<PackId> = ours.index().packs().iter().map(|pack| pack.id).collect();
        assert_eq!(packs.len(), 4, "one of documents and one of the catalog for each snapshot");

        others.condemn(&packs[..1], &[], mongo_core::bson::DateTime::now()).await.unwrap();
        assert!(is_read_anew(&ours).await);
        assert!(ours.index().packs().iter().any(|pack| pack.condemned));
        assert!(!is_read_anew(&ours).await);

        archive.put(&packs[1].object().unwrap(), bytes::Bytes::from_static(b"truncated"), PutMode::Replace).await.unwrap();
        assert!(is_read_anew(&ours).await);
        assert_eq!(ours.unusable_packs().len(), 1);
        // What is not whole is looked at every time.
        assert!(is_read_anew(&ours).await);
    }

    /// Lets nobody read index objects while it is shut.
    #[derive(Debug)]
    struct Gate {
        archive: Arc<MemoryArchive>,
        open: tokio::sync::watch::Sender<bool>,
        reading: tokio::sync::watch::Sender<bool>,
    }

    #[async_trait::async_trait]
    impl crate::ArchiveSink for Gate {
        fn describe(&self) -> String {
            self.archive.describe()
        }
        async fn put(&self, name: &ObjectName, bytes: bytes::Bytes, mode: PutMode) -> Result<crate::PutOutcome> {
            self.archive.put(name, bytes, mode).await
        }
        async fn get(&self, name: &ObjectName, range: Option<std::ops::Range<u64>>) -> Result<bytes::Bytes> {
            if name.as_str().starts_with(index::PREFIX) {
                self.reading.send_replace(true);
                self.open.subscribe().wait_for(|open| *open).await.unwrap();
            }
            self.archive.get(name, range).await
        }
        fn list(&self, prefix: &str) -> stream::BoxStream<'static, Result<ObjectMeta>> {
            self.archive.list(prefix)
        }
        async fn delete(&self, name: &ObjectName) -> Result<()> {
            self.archive.delete(name).await
        }
        async fn head(&self, name: &ObjectName) -> Result<ObjectMeta> {
            self.archive.head(name).await
        }
    }

    #[tokio::test]
    async fn damage_that_a_full_reading_finds_is_told_though_somebody_has_refreshed_meanwhile() {
        let archive = Arc::new(MemoryArchive::new());
        store(&open(&archive).await, 1).await;
        let flag = |value| tokio::sync::watch::Sender::new(value);
        let gate = Arc::new(Gate { archive: Arc::clone(&archive), open: flag(true), reading: flag(false) });
        let repository = Repository::open_shared(Arc::<Gate>::clone(&gate), Key::unencrypted()).await.unwrap();
        let listed: Vec<ObjectMeta> = archive.list(index::PREFIX).try_collect().await.unwrap();
        let length = archive.get(&listed[0].name, None).await.unwrap().len();
        archive.put(&listed[0].name, bytes::Bytes::from(vec![0; length]), PutMode::Replace).await.unwrap();

        gate.open.send_replace(false);
        gate.reading.send_replace(false);
        let (full, ()) = tokio::join!(repository.reload_index(), async {
            gate.reading.subscribe().wait_for(|reading| *reading).await.unwrap();
            repository.refresh_index().await.unwrap();
            gate.open.send_replace(true);
        });
        full.unwrap();
        assert_eq!(repository.damaged_indexes().len(), 1);
    }

    #[tokio::test]
    async fn an_index_of_which_something_was_damaged_is_read_anew_every_time() {
        let archive = Arc::new(MemoryArchive::new());
        let repository = open(&archive).await;
        store(&repository, 1).await;
        repository.reload_index().await.unwrap();
        let listed: Vec<ObjectMeta> = archive.list(index::PREFIX).try_collect().await.unwrap();
        let whole = archive.get(&listed[0].name, None).await.unwrap();
        let damaged = bytes::Bytes::from(vec![0; whole.len()]);
        archive.put(&listed[0].name, damaged, PutMode::Replace).await.unwrap();
        repository.reload_index().await.unwrap();
        assert_eq!(repository.damaged_indexes().len(), 1);
        archive.put(&listed[0].name, whole, PutMode::Replace).await.unwrap();
        assert!(is_read_anew(&repository).await);
        assert!(repository.damaged_indexes().is_empty());
    }
}
