//! Reading the index of a repository: every index object, and the directories of packs where one is damaged.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongo_core::{ErrorKind, Result};

use super::{
    READS_AT_ONCE, Repository,
    envelope::{self, Magic},
    index::{self, Index, IndexPayload},
    pack::{self, Directory, PackId},
};
use crate::archive::{ObjectMeta, ObjectName};

impl Repository {
    /// Reads every index object anew, and trusts only what lies in packs that are there with the size they should have.
    pub(crate) async fn reload_index(&self) -> Result<()> {
        // Index objects first: whoever writes at the same time writes packs before the index object that names them.
        let objects: Vec<ObjectMeta> = self.archive().list(index::PREFIX).try_collect().await?;
        let packs: HashMap<PackId, u64> = self
            .archive()
            .list(pack::PREFIX)
            .try_filter_map(|object| async move { Ok(PackId::from_object(&object.name).map(|id| (id, object.size))) })
            .try_collect()
            .await?;
        let read: Vec<(ObjectName, Result<IndexPayload>)> = stream::iter(objects)
            .map(|object| async move {
                let read = self.read_index(&object.name).await;
                (object.name, read)
            })
            .buffer_unordered(READS_AT_ONCE)
            .collect()
            .await;
        let mut payloads = Vec::with_capacity(read.len());
        let mut damaged = Vec::new();
        for (name, read) in read {
            match read {
                Ok(payload) => payloads.push(payload),
                // What a damaged index object says is in the directories of its packs too.
                Err(error) if error.kind() == ErrorKind::CorruptData => damaged.push((name.to_string(), error.report())),
                Err(error) => return Err(error),
            }
        }
        if !damaged.is_empty() {
            tracing::warn!(objects = damaged.len(), "index objects are damaged; the directories of packs are read instead");
            let covered: HashSet<PackId> = payloads.iter().flat_map(|payload| payload.packs.iter().map(|(id, _)| *id)).collect();
            for (id, size) in packs.iter().filter(|(id, _)| !covered.contains(id)) {
                match self.read_directory(*id, *size).await {
                    Ok(directory) => payloads.push(index::decode(&index::encode(&[(*id, *size, directory)])?)?),
                    Err(error) if error.kind() == ErrorKind::CorruptData => {
                        damaged.push((id.object()?.to_string(), error.report()))
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        *self.0.damaged.write().unwrap_or_else(PoisonError::into_inner) = damaged;
        let index = Index::join(&payloads, |id, size| {
            let there = packs.get(&id) == Some(&size);
            if !there {
                tracing::warn!(pack = ?id, "a pack that the index names is missing or truncated");
            }
            there
        });
        tracing::debug!(segments = index.len(), packs = packs.len(), "index read");
        *self.0.index.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(index);
        Ok(())
    }

    async fn read_index(&self, name: &ObjectName) -> Result<IndexPayload> {
        let bytes = self.archive().get(name, None).await?;
        let payload = envelope::open(Magic::INDEX, name, self.config().cipher.as_ref(), &bytes)?;
        index::decode(&payload).map_err(|error| error.with_context("object", name))
    }

    async fn read_directory(&self, id: PackId, size: u64) -> Result<Directory> {
        let object = id.object()?;
        let bytes = self.archive().get(&object, Some(0..size)).await?;
        let config = self.config();
        let read = move || id.check(&bytes).and_then(|()| pack::directory(&bytes, config.cipher.as_ref()));
        let directory = tokio::task::spawn_blocking(read).await?;
        directory.map_err(|error| error.with_context("object", object))
    }
}
