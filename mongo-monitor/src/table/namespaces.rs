//! Databases, collections and indexes.

use super::declare::worked_out;
use crate::metric::{Kind, Metric, Unit};

pub(super) const METRICS: &[Metric] = &[
    worked_out(
        "mongodb_namespaces",
        "How many databases and collections there are",
        Kind::Gauge,
        Unit::None,
        &["kind"],
        "listDatabases, listCollections",
    ),
    worked_out(
        "mongodb_stored_documents",
        "Documents in all databases but the server's own",
        Kind::Gauge,
        Unit::None,
        &[],
        "dbStats: objects",
    ),
    worked_out(
        "mongodb_database_bytes",
        "Size of a database; of the largest",
        Kind::Gauge,
        Unit::Bytes,
        &["database", "kind"],
        "dbStats: dataSize, storageSize, indexSize",
    ),
    worked_out(
        "mongodb_database_documents",
        "Documents of a database; of the largest",
        Kind::Gauge,
        Unit::None,
        &["database"],
        "dbStats: objects",
    ),
    worked_out(
        "mongodb_filesystem_bytes",
        "The file system that holds the data",
        Kind::Gauge,
        Unit::Bytes,
        &["kind"],
        "dbStats: fsUsedSize, fsTotalSize",
    ),
    worked_out(
        "mongodb_collection_bytes",
        "Size of a collection; of the busiest and largest",
        Kind::Gauge,
        Unit::Bytes,
        &["database", "collection", "kind"],
        "$collStats: storageStats",
    ),
    worked_out(
        "mongodb_collection_documents",
        "Documents of a collection; of the busiest and largest",
        Kind::Gauge,
        Unit::None,
        &["database", "collection"],
        "$collStats: storageStats.count",
    ),
    worked_out(
        "mongodb_collection_operations_total",
        "What was done with a collection; of the busiest and largest",
        Kind::Counter,
        Unit::None,
        &["database", "collection", "op"],
        "top",
    ),
    worked_out(
        "mongodb_collection_operation_seconds_total",
        "How long that took",
        Kind::Counter,
        Unit::Seconds,
        &["database", "collection", "op"],
        "top",
    ),
    worked_out(
        "mongodb_index_accesses_total",
        "How often an index was used; of the busiest and largest collections",
        Kind::Counter,
        Unit::None,
        &["database", "collection", "index"],
        "$indexStats: accesses.ops",
    ),
];
