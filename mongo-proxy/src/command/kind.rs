//! The commands that there are.

use std::{collections::HashMap, sync::LazyLock};

use serde::{Deserialize, Serialize};

/// What a command does with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Access {
    /// It reads data, or what is known about it.
    Read,
    /// It changes data, definitions, users or the server. So does an aggregation with `$out` or `$merge`, a `mapReduce` that does not return its result inline, and every command that is not known: what later servers bring is taken for the worst.
    Write,
}

/// What a command is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Its connection or session alone: it begins, keeps or ends something.
    Connection,
    /// Reads on from a cursor.
    GetMore,
    /// The command inside it, which is not carried out but for reading.
    Explain,
    /// A collection of its database, which is its first value; or the database as a whole if that is no name.
    OnCollection(Access),
    /// Its database as a whole.
    OnDatabase(Access),
    /// The server, and no data of anybody.
    OnServer(Access),
    /// Whatever there is: it shows something of every namespace.
    OnEverything(Access),
    /// Namespaces that it names in full, whatever its database is.
    OnFullName(Access),
    /// Nobody knows: it is taken for the worst, a write that touches everything.
    Unknown,
}

impl Kind {
    /// What this command is about.
    pub(crate) fn of(name: &str) -> Self {
        Known::by(name).map_or(Self::Unknown, |known| known.kind)
    }
}

/// A command that there is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// By which [`name()`] knows it again.
    pub(crate) number: usize,
}

impl Known {
    /// The command of this name, if there is one.
    pub(crate) fn by(name: &str) -> Option<Self> {
        KNOWN.get(name).copied()
    }
}

/// All that there are, by their names.
static KNOWN: LazyLock<HashMap<&str, Known>> = LazyLock::new(|| {
    let all = COMMANDS.iter().flat_map(|(kind, names)| names.iter().map(|name| (*name, *kind)));
    all.enumerate().map(|(number, (name, kind))| (name, Known { name, kind, number })).collect()
});

fn names() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().flat_map(|(_, names)| names.iter().copied())
}

/// How a server writes the name of a command that it knows by these letters.
pub(crate) fn spelling(name: &str) -> Option<&'static str> {
    names().find(|known| *known == name).or_else(|| names().find(|known| known.eq_ignore_ascii_case(name)))
}

/// The command of this number.
pub(crate) fn name(number: usize) -> Option<&'static str> {
    match number {
        NOTHING => None,
        number => Some(names().nth(number).unwrap_or("another")),
    }
}

/// The number of no command at all.
pub(crate) const NOTHING: usize = usize::MAX;
/// That of a command that is not known.
pub(crate) const ANOTHER: usize = usize::MAX - 1;

/// The old name is taken in any case that drivers have ever sent it in.
pub(crate) fn is_hello(name: &str) -> bool {
    matches!(name, "hello" | "isMaster" | "ismaster")
}

/// The name by which rules call a command that has two.
pub(crate) fn canonical(name: &str) -> &str {
    match name {
        "isMaster" | "ismaster" => "hello",
        "findandmodify" => "findAndModify",
        "mapreduce" => "mapReduce",
        "collstats" => "collStats",
        "dbstats" => "dbStats",
        "dbhash" => "dbHash",
        "buildinfo" => "buildInfo",
        "deleteIndexes" => "dropIndexes",
        "shardcollection" => "shardCollection",
        "enablesharding" => "enableSharding",
        "movechunk" => "moveChunk",
        "moveprimary" => "movePrimary",
        "addshard" => "addShard",
        "removeshard" => "removeShard",
        "datasize" => "dataSize",
        "flushrouterconfig" => "flushRouterConfig",
        other => other,
    }
}

/// What is known of commands, by what they are about.
const COMMANDS: &[(Kind, &[&str])] = &[
    (Kind::OnEverything(Access::Read), &["currentOp", "getLog", "top"]),
    (
        Kind::Connection,
        &[
            "abortTransaction",
            "authenticate",
            "commitTransaction",
            "endSessions",
            "getnonce",
            "hello",
            "isMaster",
            "ismaster",
            "killCursors",
            "killSessions",
            "logout",
            "ping",
            "refreshSessions",
            "saslContinue",
            "saslStart",
        ],
    ),
    (Kind::GetMore, &["getMore"]),
    (Kind::Explain, &["explain"]),
    (
        Kind::OnCollection(Access::Read),
        &[
            "aggregate",
            "collStats",
            "collstats",
            "count",
            "distinct",
            "find",
            "listIndexes",
            "listSearchIndexes",
            "mapReduce",
            "mapreduce",
            "planCacheListFilters",
            "planCacheListPlans",
            "validate",
        ],
    ),
    (
        Kind::OnCollection(Access::Write),
        &[
            "collMod",
            "compact",
            "convertToCapped",
            "create",
            "createIndexes",
            "createSearchIndexes",
            "delete",
            "deleteIndexes",
            "drop",
            "dropIndexes",
            "dropSearchIndex",
            "findAndModify",
            "findandmodify",
            "insert",
            "planCacheClear",
            "planCacheClearFilters",
            "planCacheSetFilter",
            "reIndex",
            "update",
            "updateSearchIndex",
        ],
    ),
    (
        Kind::OnDatabase(Access::Read),
        &["dbHash", "dbStats", "dbhash", "dbstats", "filemd5", "listCollections", "rolesInfo", "usersInfo"],
    ),
    (
        Kind::OnDatabase(Access::Write),
        &[
            "bulkWrite",
            "createRole",
            "createUser",
            "dropAllRolesFromDatabase",
            "dropAllUsersFromDatabase",
            "dropDatabase",
            "dropRole",
            "dropUser",
            "grantPrivilegesToRole",
            "grantRolesToRole",
            "grantRolesToUser",
            "profile",
            "revokePrivilegesFromRole",
            "revokeRolesFromRole",
            "revokeRolesFromUser",
            "updateRole",
            "updateUser",
        ],
    ),
    (
        Kind::OnServer(Access::Read),
        &[
            "atlasVersion",
            "balancerStatus",
            "buildInfo",
            "buildinfo",
            "connPoolStats",
            "connectionStatus",
            "features",
            "getClusterParameter",
            "getCmdLineOpts",
            "getDefaultRWConcern",
            "getFreeMonitoringStatus",
            "getParameter",
            "getShardMap",
            "hostInfo",
            "isdbgrid",
            "listCommands",
            "listDatabases",
            "listShards",
            "lockInfo",
            "replSetGetConfig",
            "replSetGetRBID",
            "replSetGetStatus",
            "serverStatus",
            "shardConnPoolStats",
            "shardingState",
            "startSession",
            "whatsmyuri",
        ],
    ),
    (
        Kind::OnServer(Access::Write),
        &[
            "addShard",
            "addShardToZone",
            "addshard",
            "balancerStart",
            "balancerStop",
            "clearLog",
            "dropConnections",
            "flushRouterConfig",
            "flushrouterconfig",
            "fsync",
            "fsyncUnlock",
            "killAllSessions",
            "killAllSessionsByPattern",
            "killOp",
            "logRotate",
            "removeShard",
            "removeShardFromZone",
            "removeshard",
            "replSetAbortPrimaryCatchUp",
            "replSetFreeze",
            "replSetInitiate",
            "replSetMaintenance",
            "replSetReconfig",
            "replSetResizeOplog",
            "replSetStepDown",
            "replSetStepUp",
            "replSetSyncFrom",
            "rotateCertificates",
            "setClusterParameter",
            "setDefaultRWConcern",
            "setFeatureCompatibilityVersion",
            "setFreeMonitoring",
            "setParameter",
            "setUserWriteBlockMode",
            "shutdown",
        ],
    ),
    (
        Kind::OnFullName(Access::Read),
        &[
            "analyzeShardKey",
            "balancerCollectionStatus",
            "checkShardingIndex",
            "dataSize",
            "datasize",
            "getShardVersion",
            "splitVector",
        ],
    ),
    (
        Kind::OnFullName(Access::Write),
        &[
            "abortReshardCollection",
            "cleanupOrphaned",
            "clearJumboFlag",
            "commitReshardCollection",
            "configureCollectionBalancing",
            "configureQueryAnalyzer",
            "enableSharding",
            "enablesharding",
            "mergeAllChunksOnShard",
            "mergeChunks",
            "moveChunk",
            "moveCollection",
            "movePrimary",
            "moveRange",
            "movechunk",
            "moveprimary",
            "refineCollectionShardKey",
            "renameCollection",
            "reshardCollection",
            "setAllowMigrations",
            "shardCollection",
            "shardcollection",
            "split",
            "unshardCollection",
            "updateZoneKeyRange",
        ],
    ),
];
