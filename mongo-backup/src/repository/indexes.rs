//! Reading the index of a repository: every index object, and the directories of the packs that none names.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, atomic::Ordering::SeqCst},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongo_core::{Error, ErrorKind, Result};

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
    /// Clones share the index. Whoever has reloaded it finds a reading that began after the call, be it another's: what was condemned before is known.
    pub(crate) async fn reload_index(&self) -> Result<()> {
        let number = self.0.readings.fetch_add(1, SeqCst);
        let reading = self.read_indexes().await?;
        let damaged = reading.damaged.clone();
        // Joining sorts what can be millions of rows.
        let index = tokio::task::spawn_blocking(move || reading.into_index()).await?;
        tracing::debug!(segments = index.len(), packs = index.packs().len(), "index read");
        let mut current = self.0.index.write().unwrap_or_else(PoisonError::into_inner);
        if current.0 < number {
            *current = (number, Arc::new(index));
            *self.0.damaged.write().unwrap_or_else(PoisonError::into_inner) = damaged;
        }
        Ok(())
    }

    pub(crate) async fn read_indexes(&self) -> Result<IndexReading> {
        let mut reading = self.read_indexes_once().await?;
        for _ in 0..READINGS {
            if !reading.vanished {
                break;
            }
            reading = self.read_indexes_once().await?;
        }
        // What is gone every time is shown by a listing that lags behind.
        Ok(reading)
    }

    async fn read_indexes_once(&self) -> Result<IndexReading> {
        // What will go, before what is there: else a pack could be condemned in between, and be relied upon.
        let condemned = self.read_condemned().await?;
        // Index objects before packs: whoever writes at the same time writes packs before the index object that names them.
        let listed: Vec<ObjectMeta> = self.archive().list(index::PREFIX).try_collect().await?;
        let packs: HashMap<PackId, u64> = self
            .archive()
            .list(pack::PREFIX)
            .try_filter_map(|object| async move { Ok(PackId::from_object(&object.name).map(|id| (id, object.size))) })
            .try_collect()
            .await?;
        let read: Vec<(ObjectName, Result<IndexPayload>)> = stream::iter(listed)
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
        self.0.damaged.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn index(&self) -> Arc<Index> {
        Arc::clone(&self.0.index.read().unwrap_or_else(PoisonError::into_inner).1)
    }

    /// The objects of packs that the index names but that are missing or have another size.
    pub(crate) fn unusable_packs(&self) -> Vec<String> {
        self.index().unusable().iter().filter_map(|id| id.object().ok()).map(|name| name.to_string()).collect()
    }
}

const READINGS: usize = 4;
