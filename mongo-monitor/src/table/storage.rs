//! The storage engine: its cache, checkpoints and journal, and the transactions in it.

use super::declare::{as_is, counter, gauge, labelled, millis, scaled};
use crate::metric::{Metric, Unit};

pub(super) const METRICS: &[Metric] = &[
    gauge(
        "mongodb_cache_bytes",
        "The storage engine's cache",
        Unit::Bytes,
        &["kind"],
        &[
            labelled("wiredTiger.cache.bytes currently in the cache", &["used"]),
            labelled("wiredTiger.cache.tracked dirty bytes in the cache", &["dirty"]),
            labelled("wiredTiger.cache.maximum bytes configured", &["max"]),
        ],
    ),
    counter(
        "mongodb_cache_read_bytes_total",
        "Bytes that were read into the cache",
        Unit::Bytes,
        &[],
        &[as_is("wiredTiger.cache.bytes read into cache")],
    ),
    counter(
        "mongodb_cache_written_bytes_total",
        "Bytes that were written from the cache",
        Unit::Bytes,
        &[],
        &[as_is("wiredTiger.cache.bytes written from cache")],
    ),
    counter(
        "mongodb_cache_evicted_pages_total",
        "Pages that had to leave the cache",
        Unit::None,
        &["kind"],
        &[
            labelled("wiredTiger.cache.modified pages evicted", &["modified"]),
            labelled("wiredTiger.cache.unmodified pages evicted", &["unmodified"]),
            labelled("wiredTiger.cache.pages evicted by application threads", &["app_thread"]),
        ],
    ),
    counter(
        "mongodb_cache_eviction_failures_total",
        "Times that eviction could not reach its goal",
        Unit::None,
        &[],
        &[as_is("wiredTiger.cache.eviction server unable to reach eviction goal")],
    ),
    counter(
        "mongodb_cache_app_eviction_seconds_total",
        "Time that operations spent evicting pages",
        Unit::Seconds,
        &[],
        &[
            scaled("wiredTiger.cache.application thread time evicting (usecs)", 1e-6),
            scaled("wiredTiger.thread-yield.application thread time evicting (usecs)", 1e-6),
        ],
    ),
    gauge(
        "mongodb_checkpoint_duration_seconds",
        "How long checkpoints take",
        Unit::Seconds,
        &["which"],
        &[
            millis("wiredTiger.checkpoint.most recent time (msecs)", &["recent"]),
            millis("wiredTiger.checkpoint.max time (msecs)", &["max"]),
            millis("wiredTiger.transaction.transaction checkpoint most recent time (msecs)", &["recent"]),
            millis("wiredTiger.transaction.transaction checkpoint max time (msecs)", &["max"]),
        ],
    ),
    counter(
        "mongodb_checkpoints_total",
        "Checkpoints",
        Unit::None,
        &[],
        &[
            as_is("wiredTiger.checkpoint.total succeed number of checkpoints"),
            as_is("wiredTiger.transaction.transaction checkpoints"),
        ],
    ),
    counter(
        "mongodb_journal_sync_seconds_total",
        "Time that syncing the journal took",
        Unit::Seconds,
        &[],
        &[scaled("wiredTiger.log.log sync time duration (usecs)", 1e-6)],
    ),
    counter(
        "mongodb_journal_bytes_total",
        "Bytes that were written to the journal",
        Unit::Bytes,
        &[],
        &[as_is("wiredTiger.log.log bytes written")],
    ),
    gauge(
        "mongodb_wt_pinned_timestamp_seconds",
        "For how long the storage engine has to keep old versions for somebody who reads them",
        Unit::Seconds,
        &[],
        &[scaled("wiredTiger.transaction.transaction range of timestamps currently pinned", 1.0 / 4_294_967_296.0)],
    ),
    gauge(
        "mongodb_wt_open_sessions",
        "Sessions of the storage engine",
        Unit::None,
        &[],
        &[as_is("wiredTiger.session.open session count")],
    ),
    gauge(
        "mongodb_transactions_open",
        "Transactions that are open",
        Unit::None,
        &["state"],
        &[
            labelled("transactions.currentActive", &["active"]),
            labelled("transactions.currentInactive", &["inactive"]),
            labelled("transactions.currentPrepared", &["prepared"]),
        ],
    ),
    counter(
        "mongodb_transactions_total",
        "Transactions by what became of them",
        Unit::None,
        &["result"],
        &[
            labelled("transactions.totalStarted", &["started"]),
            labelled("transactions.totalCommitted", &["committed"]),
            labelled("transactions.totalAborted", &["aborted"]),
            labelled("transactions.totalPrepared", &["prepared"]),
        ],
    ),
    gauge(
        "mongodb_sessions_active",
        "Logical sessions",
        Unit::None,
        &[],
        &[as_is("logicalSessionRecordCache.activeSessionsCount")],
    ),
];
