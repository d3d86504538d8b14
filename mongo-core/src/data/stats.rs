//! How many, how large: typed statistics of a database and of a collection.

use std::collections::BTreeMap;

use futures_util::stream::TryStreamExt;
use mongodb::{
    Collection, Database,
    bson::{Bson, Document, RawDocumentBuf, doc},
};

use crate::error::{Error, ErrorKind, Result};

/// Counts and sizes of a database, from [`dbStats`](https://www.mongodb.com/docs/manual/reference/command/dbStats/).
///
/// A field that this server version does not report is 0, or `None` where 0 means something else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct DatabaseStatistics {
    /// Name of the database.
    pub database: String,
    /// Collections, the server's own included.
    pub collections: u64,
    /// Views.
    pub views: u64,
    /// Documents in all collections.
    pub documents: u64,
    /// Bytes of BSON, uncompressed.
    pub data_bytes: u64,
    /// Bytes that the documents take on disk, compressed, with free space inside the files.
    pub storage_bytes: u64,
    /// Indexes of all collections.
    pub indexes: u64,
    /// Bytes that the indexes take on disk.
    pub index_bytes: u64,
    /// Bytes used on the file system that holds the data, by whomever. `None` on a mongos.
    pub filesystem_used_bytes: Option<u64>,
    /// Bytes in all on that file system. `None` on a mongos.
    pub filesystem_total_bytes: Option<u64>,
}

impl DatabaseStatistics {
    /// Mean bytes of BSON a document; `None` without documents.
    pub fn mean_document_bytes(&self) -> Option<u64> {
        self.data_bytes.checked_div(self.documents)
    }
}

/// Counts, sizes and indexes of a collection, from
/// [`$collStats`](https://www.mongodb.com/docs/manual/reference/operator/aggregation/collStats/), added up over its shards.
///
/// Of a time series collection, `documents` are its buckets: that is what is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct CollectionStatistics {
    /// `database.collection`.
    pub namespace: String,
    /// Documents, by the server's own count: after an unclean shutdown it can be off until the next validation, and on
    /// a sharded cluster it includes `orphaned_documents`.
    pub documents: u64,
    /// Copies that chunk migrations left behind; 0 before server 6.0 and without sharding.
    pub orphaned_documents: u64,
    /// Bytes of BSON, uncompressed.
    pub data_bytes: u64,
    /// Bytes that the documents take on disk, compressed, with free space inside the file.
    pub storage_bytes: u64,
    /// Bytes of free space inside the file, which new documents can reuse.
    pub free_storage_bytes: u64,
    /// Bytes that each index takes on disk, by name.
    pub index_bytes: BTreeMap<String, u64>,
    /// Whether the collection is capped.
    pub capped: bool,
    /// Largest size of a capped collection in bytes.
    pub capped_bytes: Option<u64>,
    /// Largest number of documents of a capped collection, where one is set.
    pub capped_documents: Option<u64>,
    /// Shards that hold a part; 1 without sharding.
    pub shards: u64,
}

impl CollectionStatistics {
    /// Bytes that all indexes take on disk.
    pub fn total_index_bytes(&self) -> u64 {
        self.index_bytes.values().sum()
    }

    /// Mean bytes of BSON a document; `None` without documents.
    pub fn mean_document_bytes(&self) -> Option<u64> {
        self.data_bytes.checked_div(self.documents)
    }

    fn add(&mut self, shard: &Document) -> Result<()> {
        let storage = shard
            .get_document("storageStats")
            .map_err(|_| Error::corrupt("the server's reply to $collStats has no storageStats"))?;
        let add = |sum: &mut u64, name: &str| *sum = sum.saturating_add(number(storage, name).unwrap_or(0));
        add(&mut self.documents, "count");
        add(&mut self.orphaned_documents, "numOrphanDocs");
        add(&mut self.data_bytes, "size");
        add(&mut self.storage_bytes, "storageSize");
        add(&mut self.free_storage_bytes, "freeStorageSize");
        for (name, size) in storage.get_document("indexSizes").into_iter().flatten() {
            *self.index_bytes.entry(name.clone()).or_default() += unsigned(size).unwrap_or(0);
        }
        self.capped |= storage.get_bool("capped").unwrap_or(false);
        self.capped_bytes = self.capped_bytes.or_else(|| number(storage, "maxSize"));
        // Servers say -1 or the largest integer of 32 or 64 bits for "no limit".
        let limit = number(storage, "max").filter(|max| *max > 0 && *max < i32::MAX as u64);
        self.capped_documents = self.capped_documents.or(limit);
        self.shards += 1;
        Ok(())
    }
}

pub(super) async fn database(database: &Database) -> Result<DatabaseStatistics> {
    let mut command = database.run_command(doc! { "dbStats": 1 });
    if let Some(criteria) = database.selection_criteria() {
        command = command.selection_criteria(criteria.clone());
    }
    Ok(database_statistics(database.name(), &command.await?))
}

fn database_statistics(name: &str, reply: &Document) -> DatabaseStatistics {
    let count = |field: &str| number(reply, field).unwrap_or(0);
    DatabaseStatistics {
        database: name.to_owned(),
        collections: count("collections"),
        views: count("views"),
        documents: count("objects"),
        data_bytes: count("dataSize"),
        storage_bytes: count("storageSize"),
        indexes: count("indexes"),
        index_bytes: count("indexSize"),
        filesystem_used_bytes: number(reply, "fsUsedSize").filter(|bytes| *bytes > 0),
        filesystem_total_bytes: number(reply, "fsTotalSize").filter(|bytes| *bytes > 0),
    }
}

pub(super) async fn collection(collection: &Collection<RawDocumentBuf>) -> Result<CollectionStatistics> {
    let namespace = collection.namespace().to_string();
    let missing = |error: Error| match error.server_code() {
        // NamespaceNotFound, and the code that servers before 5.0 have for it here.
        Some(26 | 40280) => Error::new(ErrorKind::NotFound, "the collection does not exist")
            .with_context("namespace", &namespace)
            .with_source(error),
        _ => error,
    };
    let pipeline = [doc! { "$collStats": { "storageStats": {} } }];
    let cursor = collection.aggregate(pipeline).await.map_err(|error| missing(error.into()))?;
    let shards: Vec<Document> = cursor.try_collect().await.map_err(|error| missing(Error::from(error)))?;
    let mut statistics = CollectionStatistics { namespace, ..CollectionStatistics::default() };
    for shard in &shards {
        statistics.add(shard)?;
    }
    Ok(statistics)
}

fn number(document: &Document, name: &str) -> Option<u64> {
    unsigned(document.get(name)?)
}

/// Servers send the same field as an integer of either width or as a double, by its size and their version.
#[expect(clippy::cast_possible_truncation, reason = "a byte count above 2^53 would be off by a few bytes")]
fn unsigned(value: &Bson) -> Option<u64> {
    match value {
        Bson::Int32(number) => u64::try_from(*number).ok(),
        Bson::Int64(number) => u64::try_from(*number).ok(),
        Bson::Double(number) if *number >= 0.0 => Some(*number as u64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_come_as_any_number() {
        let reply = doc! { "collections": 3, "objects": 50_i64, "dataSize": 4028.0, "fsUsedSize": 0, "indexSize": -1 };
        let statistics = database_statistics("shop", &reply);
        assert_eq!((statistics.collections, statistics.documents, statistics.data_bytes), (3, 50, 4028));
        assert_eq!((statistics.index_bytes, statistics.filesystem_used_bytes), (0, None));
        assert_eq!(statistics.mean_document_bytes(), Some(80));
        assert_eq!(DatabaseStatistics::default().mean_document_bytes(), None);
    }

    #[test]
    fn shards_are_added_up() {
        let shard = |documents: i32| {
            doc! { "storageStats": {
                "count": documents, "size": 10 * documents, "storageSize": 4096, "freeStorageSize": 0,
                "capped": false, "indexSizes": { "_id_": 4096, "a_1": 8192_i64 },
            } }
        };
        let mut statistics = CollectionStatistics::default();
        statistics.add(&shard(3)).unwrap();
        statistics.add(&shard(4)).unwrap();
        assert_eq!((statistics.documents, statistics.data_bytes, statistics.shards), (7, 70, 2));
        assert_eq!(statistics.index_bytes.get("a_1"), Some(&16384));
        assert_eq!(statistics.total_index_bytes(), 2 * 4096 + 2 * 8192);
        assert_eq!(statistics.capped_documents, None);
    }

    #[test]
    fn a_reply_without_statistics_is_an_error() {
        assert!(CollectionStatistics::default().add(&doc! { "ns": "a.b" }).is_err());
    }
}
