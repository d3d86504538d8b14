//! The table of all metrics. What is not in it is not emitted, and what a server does not have is absent, never zero.

use crate::metric::{Field, Kind, Metric, Source, Unit};

/// Every metric of this crate.
///
/// ```
/// let lag = mongo_monitor::METRICS.iter().find(|metric| metric.name == "mongodb_replica_lag_seconds").unwrap();
/// assert_eq!(lag.labels, ["member"]);
/// ```
pub const METRICS: &[Metric] = &[
    worked_out("mongodb_up", "Whether the member answered a ping within its deadline", Kind::Gauge, Unit::None, &[], "ping"),
    worked_out(
        "mongodb_instance_info",
        "What the member is",
        Kind::Info,
        Unit::None,
        &["version", "storage_engine", "process", "set"],
        "serverStatus: version, storageEngine.name, process, repl.setName",
    ),
    worked_out(
        "mongodb_member_state",
        "What the member is doing in its replica set",
        Kind::StateSet,
        Unit::None,
        &["state"],
        "replSetGetStatus: myState",
    ),
    gauge("mongodb_uptime_seconds", "How long the process has been running", Unit::Seconds, &[], &[scaled("uptimeMillis", 1e-3)]),
    worked_out(
        "mongodb_process_start_time_seconds",
        "When the process began, since 1970",
        Kind::Gauge,
        Unit::Seconds,
        &[],
        "serverStatus: localTime, uptimeMillis",
    ),
    counter(
        "mongodb_asserts_total",
        "Assertions that failed, most by requests that were wrong",
        Unit::None,
        &["type"],
        &[as_is("asserts.*")],
    ),
    gauge(
        "mongodb_connections",
        "Connections of clients",
        Unit::None,
        &["state"],
        &[
            labelled("connections.current", &["current"]),
            labelled("connections.available", &["available"]),
            labelled("connections.active", &["active"]),
            labelled("connections.awaitingTopologyChanges", &["awaiting_topology_changes"]),
            labelled("connections.exhaustIsMaster", &["exhaust_is_master"]),
            labelled("connections.exhaustHello", &["exhaust_hello"]),
            labelled("connections.loadBalanced", &["load_balanced"]),
        ],
    ),
    counter(
        "mongodb_connections_created_total",
        "Connections that were ever made",
        Unit::None,
        &[],
        &[as_is("connections.totalCreated")],
    ),
    counter(
        "mongodb_connections_rejected_total",
        "Connections that were refused for want of room",
        Unit::None,
        &[],
        &[as_is("connections.rejected")],
    ),
    gauge(
        "mongodb_connections_queued_for_establishment",
        "Connections that wait to be let in (8.2)",
        Unit::None,
        &[],
        &[as_is("connections.queuedForEstablishment")],
    ),
    counter(
        "mongodb_connection_establishment_rate_limit_total",
        "Connections that the limit on new ones met (8.2)",
        Unit::None,
        &["result"],
        &[
            labelled("connections.establishmentRateLimit.rejected", &["rejected"]),
            labelled("connections.establishmentRateLimit.exempted", &["exempted"]),
            labelled("connections.establishmentRateLimit.interruptedDueToClientDisconnect", &["interrupted"]),
        ],
    ),
    counter(
        "mongodb_network_bytes_total",
        "Bytes of messages, before compression",
        Unit::Bytes,
        &["direction"],
        &[labelled("network.bytesIn", &["in"]), labelled("network.bytesOut", &["out"])],
    ),
    counter(
        "mongodb_network_physical_bytes_total",
        "Bytes on the wire",
        Unit::Bytes,
        &["direction"],
        &[labelled("network.physicalBytesIn", &["in"]), labelled("network.physicalBytesOut", &["out"])],
    ),
    counter("mongodb_network_requests_total", "Requests that came in", Unit::None, &[], &[as_is("network.numRequests")]),
    counter(
        "mongodb_network_slow_operations_total",
        "Name lookups and handshakes that took over a second",
        Unit::None,
        &["kind"],
        &[labelled("network.numSlowDNSOperations", &["dns"]), labelled("network.numSlowSSLOperations", &["tls"])],
    ),
    counter(
        "mongodb_network_compressed_bytes_total",
        "Bytes that went into and came out of compression",
        Unit::Bytes,
        &["side", "compressor", "stage"],
        &[labelled("network.compression.*.*.bytesIn", &["in"]), labelled("network.compression.*.*.bytesOut", &["out"])],
    ),
    gauge(
        "mongodb_handshake_time_seconds",
        "How long making a connection takes, on the average (6.3)",
        Unit::Seconds,
        &["stage"],
        &[
            micros("metrics.network.averageTimeToCompletedTLSHandshakeMicros", &["tls"]),
            micros("metrics.network.averageTimeToCompletedHelloMicros", &["hello"]),
            micros("metrics.network.averageTimeToCompletedAuthMicros", &["auth"]),
        ],
    ),
    counter(
        "mongodb_ingress_admissions_total",
        "Requests and connections that the limits on new ones met (8.2)",
        Unit::None,
        &["limiter", "result"],
        &[
            labelled("network.ingressRequestRateLimiter.attemptedAdmissions", &["request", "attempted"]),
            labelled("network.ingressRequestRateLimiter.successfulAdmissions", &["request", "successful"]),
            labelled("network.ingressRequestRateLimiter.rejectedAdmissions", &["request", "rejected"]),
            labelled("network.ingressRequestRateLimiter.exemptedAdmissions", &["request", "exempted"]),
            labelled("network.ingressRequestRateLimiter.interruptedInQueue", &["request", "interrupted"]),
            labelled("queues.ingressSessionEstablishment.attemptedAdmissions", &["session", "attempted"]),
            labelled("queues.ingressSessionEstablishment.successfulAdmissions", &["session", "successful"]),
            labelled("queues.ingressSessionEstablishment.rejectedAdmissions", &["session", "rejected"]),
            labelled("queues.ingressSessionEstablishment.exemptedAdmissions", &["session", "exempted"]),
            labelled("queues.ingressSessionEstablishment.interruptedInQueue", &["session", "interrupted"]),
        ],
    ),
    gauge(
        "mongodb_ingress_queue_wait_seconds",
        "How long who is let in has waited, on the average (8.2)",
        Unit::Seconds,
        &["limiter"],
        &[
            micros("network.ingressRequestRateLimiter.averageTimeQueuedMicros", &["request"]),
            micros("queues.ingressSessionEstablishment.averageTimeQueuedMicros", &["session"]),
        ],
    ),
    gauge(
        "mongodb_ingress_tokens_available",
        "How many more are let in at once; very many if there is no limit (8.2)",
        Unit::None,
        &["limiter"],
        &[
            labelled("network.ingressRequestRateLimiter.totalAvailableTokens", &["request"]),
            labelled("queues.ingressSessionEstablishment.totalAvailableTokens", &["session"]),
        ],
    ),
    counter(
        "mongodb_operations_total",
        "Operations of clients",
        Unit::None,
        &["type"],
        &[
            labelled("opcounters.insert", &["insert"]),
            labelled("opcounters.query", &["query"]),
            labelled("opcounters.update", &["update"]),
            labelled("opcounters.delete", &["delete"]),
            labelled("opcounters.getmore", &["getmore"]),
            labelled("opcounters.command", &["command"]),
        ],
    ),
    counter(
        "mongodb_replicated_operations_total",
        "Operations that were applied from the oplog",
        Unit::None,
        &["type"],
        &[
            labelled("opcountersRepl.insert", &["insert"]),
            labelled("opcountersRepl.update", &["update"]),
            labelled("opcountersRepl.delete", &["delete"]),
            labelled("opcountersRepl.command", &["command"]),
        ],
    ),
    counter(
        "mongodb_timed_operations_total",
        "Operations whose time was taken",
        Unit::None,
        &["class"],
        &[
            labelled("opLatencies.reads.ops", &["reads"]),
            labelled("opLatencies.writes.ops", &["writes"]),
            labelled("opLatencies.commands.ops", &["commands"]),
            labelled("opLatencies.transactions.ops", &["transactions"]),
        ],
    ),
    counter(
        "mongodb_timed_operations_seconds_total",
        "How long they took in the server, all together",
        Unit::Seconds,
        &["class"],
        &[
            micros("opLatencies.reads.latency", &["reads"]),
            micros("opLatencies.writes.latency", &["writes"]),
            micros("opLatencies.commands.latency", &["commands"]),
            micros("opLatencies.transactions.latency", &["transactions"]),
        ],
    ),
    Metric {
        name: "mongodb_operation_duration_seconds",
        help: "How long operations took in the server; read less often than the rest",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        labels: &["class"],
        source: Source::Latencies,
    },
    counter(
        "mongodb_commands_total",
        "Commands that clients sent most",
        Unit::None,
        &["command"],
        &[among("metrics.commands.*.total", COMMANDS)],
    ),
    counter(
        "mongodb_operation_errors_total",
        "Commands that failed",
        Unit::None,
        &["command"],
        &[among("metrics.commands.*.failed", COMMANDS)],
    ),
    counter(
        "mongodb_commands_rejected_total",
        "Commands that were refused by a setting for their shape (8.0)",
        Unit::None,
        &["command"],
        &[among("metrics.commands.*.rejected", COMMANDS)],
    ),
    counter(
        "mongodb_documents_total",
        "Documents by what was done with them",
        Unit::None,
        &["op"],
        &[as_is("metrics.document.*")],
    ),
    counter(
        "mongodb_query_scanned_keys_total",
        "Keys of indexes that were looked at",
        Unit::None,
        &[],
        &[as_is("metrics.queryExecutor.scanned")],
    ),
    counter(
        "mongodb_query_scanned_objects_total",
        "Documents that were looked at",
        Unit::None,
        &[],
        &[as_is("metrics.queryExecutor.scannedObjects")],
    ),
    counter(
        "mongodb_query_collection_scans_total",
        "Queries that read a whole collection",
        Unit::None,
        &["kind"],
        &[
            labelled("metrics.queryExecutor.collectionScans.total", &["total"]),
            labelled("metrics.queryExecutor.collectionScans.nonTailable", &["non_tailable"]),
        ],
    ),
    counter(
        "mongodb_sort_in_memory_total",
        "Queries that sorted without an index",
        Unit::None,
        &[],
        &[as_is("metrics.operation.scanAndOrder")],
    ),
    counter(
        "mongodb_write_conflicts_total",
        "Writes that were tried again because another came first",
        Unit::None,
        &[],
        &[as_is("metrics.operation.writeConflicts")],
    ),
    counter(
        "mongodb_spill_bytes_total",
        "Bytes that stages wrote to disk because their memory was not enough (8.0)",
        Unit::Bytes,
        &["stage"],
        &[labelled("metrics.query.sort.spillToDiskBytes", &["sort"]), as_is("metrics.query.*.spilledBytes")],
    ),
    gauge(
        "mongodb_plan_cache_bytes",
        "Memory of cached query plans",
        Unit::Bytes,
        &[],
        &[as_is("metrics.query.planCacheTotalSizeEstimateBytes")],
    ),
    gauge(
        "mongodb_cursors_open",
        "Cursors that are open",
        Unit::None,
        &["kind"],
        &[
            labelled("metrics.cursor.open.total", &["total"]),
            labelled("metrics.cursor.open.pinned", &["pinned"]),
            labelled("metrics.cursor.open.noTimeout", &["no_timeout"]),
            labelled("metrics.cursor.open.singleTarget", &["single_target"]),
            labelled("metrics.cursor.open.multiTarget", &["multi_target"]),
        ],
    ),
    counter(
        "mongodb_cursors_timed_out_total",
        "Cursors that were closed because nobody read on",
        Unit::None,
        &[],
        &[as_is("metrics.cursor.timedOut")],
    ),
    counter(
        "mongodb_ttl_deleted_documents_total",
        "Documents that expired",
        Unit::None,
        &[],
        &[as_is("metrics.ttl.deletedDocuments")],
    ),
    counter(
        "mongodb_ttl_passes_total",
        "Times that expired documents were looked for",
        Unit::None,
        &[],
        &[as_is("metrics.ttl.passes")],
    ),
    gauge(
        "mongodb_global_lock_queue",
        "Operations that wait for a lock",
        Unit::None,
        &["kind"],
        &[labelled("globalLock.currentQueue.readers", &["readers"]), labelled("globalLock.currentQueue.writers", &["writers"])],
    ),
    gauge(
        "mongodb_global_lock_active_clients",
        "Clients whose operations are under way",
        Unit::None,
        &["kind"],
        &[labelled("globalLock.activeClients.readers", &["readers"]), labelled("globalLock.activeClients.writers", &["writers"])],
    ),
    counter(
        "mongodb_lock_acquire_total",
        "Locks that were taken",
        Unit::None,
        &["resource", "mode"],
        &[as_is("locks.*.acquireCount.*")],
    ),
    counter(
        "mongodb_lock_wait_total",
        "Locks that were waited for",
        Unit::None,
        &["resource", "mode"],
        &[as_is("locks.*.acquireWaitCount.*")],
    ),
    counter(
        "mongodb_lock_wait_seconds_total",
        "Time that was waited for locks",
        Unit::Seconds,
        &["resource", "mode"],
        &[scaled("locks.*.timeAcquiringMicros.*", 1e-6)],
    ),
    counter(
        "mongodb_lock_deadlocks_total",
        "Deadlocks that were broken",
        Unit::None,
        &["resource", "mode"],
        &[as_is("locks.*.deadlockCount.*")],
    ),
    gauge(
        "mongodb_tickets",
        "Tickets of the storage engine: who may read or write at the same time",
        Unit::None,
        &["op", "state"],
        &[
            labelled("queues.execution.read.out", &["read", "out"]),
            labelled("queues.execution.read.available", &["read", "available"]),
            labelled("queues.execution.read.totalTickets", &["read", "total"]),
            labelled("queues.execution.write.out", &["write", "out"]),
            labelled("queues.execution.write.available", &["write", "available"]),
            labelled("queues.execution.write.totalTickets", &["write", "total"]),
            // Before 8.0.
            labelled("wiredTiger.concurrentTransactions.read.out", &["read", "out"]),
            labelled("wiredTiger.concurrentTransactions.read.available", &["read", "available"]),
            labelled("wiredTiger.concurrentTransactions.read.totalTickets", &["read", "total"]),
            labelled("wiredTiger.concurrentTransactions.write.out", &["write", "out"]),
            labelled("wiredTiger.concurrentTransactions.write.available", &["write", "available"]),
            labelled("wiredTiger.concurrentTransactions.write.totalTickets", &["write", "total"]),
        ],
    ),
    gauge(
        "mongodb_ticket_queue_length",
        "Operations that wait for a ticket (7.0)",
        Unit::None,
        &["op", "priority"],
        &[
            labelled("queues.execution.read.normalPriority.queueLength", &["read", "normal"]),
            labelled("queues.execution.write.normalPriority.queueLength", &["write", "normal"]),
            labelled("queues.execution.read.lowPriority.queueLength", &["read", "low"]),
            labelled("queues.execution.write.lowPriority.queueLength", &["write", "low"]),
            labelled("wiredTiger.concurrentTransactions.read.normalPriority.queueLength", &["read", "normal"]),
            labelled("wiredTiger.concurrentTransactions.write.normalPriority.queueLength", &["write", "normal"]),
        ],
    ),
    counter(
        "mongodb_ticket_queue_seconds_total",
        "Time that was waited for tickets (7.0)",
        Unit::Seconds,
        &["op", "priority"],
        &[
            micros("queues.execution.read.normalPriority.totalTimeQueuedMicros", &["read", "normal"]),
            micros("queues.execution.write.normalPriority.totalTimeQueuedMicros", &["write", "normal"]),
            micros("queues.execution.read.lowPriority.totalTimeQueuedMicros", &["read", "low"]),
            micros("queues.execution.write.lowPriority.totalTimeQueuedMicros", &["write", "low"]),
            micros("wiredTiger.concurrentTransactions.read.normalPriority.totalTimeQueuedMicros", &["read", "normal"]),
            micros("wiredTiger.concurrentTransactions.write.normalPriority.totalTimeQueuedMicros", &["write", "normal"]),
        ],
    ),
    counter(
        "mongodb_ticket_queued_total",
        "Operations that had to wait for a ticket (7.0)",
        Unit::None,
        &["op", "priority"],
        &[
            labelled("queues.execution.read.normalPriority.addedToQueue", &["read", "normal"]),
            labelled("queues.execution.read.lowPriority.addedToQueue", &["read", "low"]),
            labelled("queues.execution.write.normalPriority.addedToQueue", &["write", "normal"]),
            labelled("queues.execution.write.lowPriority.addedToQueue", &["write", "low"]),
            labelled("wiredTiger.concurrentTransactions.read.normalPriority.addedToQueue", &["read", "normal"]),
            labelled("wiredTiger.concurrentTransactions.write.normalPriority.addedToQueue", &["write", "normal"]),
        ],
    ),
    counter(
        "mongodb_ticket_processing_seconds_total",
        "Time that operations had a ticket (7.0)",
        Unit::Seconds,
        &["op", "priority"],
        &[
            micros("queues.execution.read.normalPriority.totalTimeProcessingMicros", &["read", "normal"]),
            micros("queues.execution.read.lowPriority.totalTimeProcessingMicros", &["read", "low"]),
            micros("queues.execution.write.normalPriority.totalTimeProcessingMicros", &["write", "normal"]),
            micros("queues.execution.write.lowPriority.totalTimeProcessingMicros", &["write", "low"]),
            micros("wiredTiger.concurrentTransactions.read.normalPriority.totalTimeProcessingMicros", &["read", "normal"]),
            micros("wiredTiger.concurrentTransactions.write.normalPriority.totalTimeProcessingMicros", &["write", "normal"]),
        ],
    ),
    counter(
        "mongodb_ticket_admissions_total",
        "Tickets that were asked for, by what became of them (7.0)",
        Unit::None,
        &["op", "priority", "kind"],
        &[
            labelled("queues.execution.read.normalPriority.newAdmissions", &["read", "normal", "new"]),
            labelled("queues.execution.read.lowPriority.newAdmissions", &["read", "low", "new"]),
            labelled("queues.execution.write.normalPriority.newAdmissions", &["write", "normal", "new"]),
            labelled("queues.execution.write.lowPriority.newAdmissions", &["write", "low", "new"]),
            labelled("wiredTiger.concurrentTransactions.read.normalPriority.newAdmissions", &["read", "normal", "new"]),
            labelled("wiredTiger.concurrentTransactions.write.normalPriority.newAdmissions", &["write", "normal", "new"]),
            labelled("queues.execution.read.normalPriority.finishedProcessing", &["read", "normal", "finished"]),
            labelled("queues.execution.read.lowPriority.finishedProcessing", &["read", "low", "finished"]),
            labelled("queues.execution.write.normalPriority.finishedProcessing", &["write", "normal", "finished"]),
            labelled("queues.execution.write.lowPriority.finishedProcessing", &["write", "low", "finished"]),
            labelled("wiredTiger.concurrentTransactions.read.normalPriority.finishedProcessing", &["read", "normal", "finished"]),
            labelled(
                "wiredTiger.concurrentTransactions.write.normalPriority.finishedProcessing",
                &["write", "normal", "finished"],
            ),
            labelled("queues.execution.read.normalPriority.canceled", &["read", "normal", "canceled"]),
            labelled("queues.execution.read.lowPriority.canceled", &["read", "low", "canceled"]),
            labelled("queues.execution.write.normalPriority.canceled", &["write", "normal", "canceled"]),
            labelled("queues.execution.write.lowPriority.canceled", &["write", "low", "canceled"]),
            labelled("wiredTiger.concurrentTransactions.read.normalPriority.canceled", &["read", "normal", "canceled"]),
            labelled("wiredTiger.concurrentTransactions.write.normalPriority.canceled", &["write", "normal", "canceled"]),
        ],
    ),
    counter(
        "mongodb_execution_delinquent_acquisitions_total",
        "Tickets that were held for longer than they should be (8.2)",
        Unit::None,
        &["op", "priority"],
        &[
            labelled("queues.execution.read.normalPriority.totalDelinquentAcquisitions", &["read", "normal"]),
            labelled("queues.execution.read.lowPriority.totalDelinquentAcquisitions", &["read", "low"]),
            labelled("queues.execution.write.normalPriority.totalDelinquentAcquisitions", &["write", "normal"]),
            labelled("queues.execution.write.lowPriority.totalDelinquentAcquisitions", &["write", "low"]),
            labelled("wiredTiger.concurrentTransactions.read.normalPriority.totalDelinquentAcquisitions", &["read", "normal"]),
            labelled("wiredTiger.concurrentTransactions.write.normalPriority.totalDelinquentAcquisitions", &["write", "normal"]),
        ],
    ),
    counter(
        "mongodb_execution_deprioritized_total",
        "Operations that were moved to the queue for long ones (8.3)",
        Unit::None,
        &[],
        &[as_is("queues.execution.totalDeprioritizations")],
    ),
    counter(
        "mongodb_execution_load_shed_total",
        "Operations that were refused because there were too many, by how long they are (8.3)",
        Unit::None,
        &["length"],
        &[
            labelled("queues.execution.shortRunning.newAdmissionsLoadShed", &["short"]),
            labelled("queues.execution.longRunning.newAdmissionsLoadShed", &["long"]),
        ],
    ),
    gauge(
        "mongodb_flow_control_lagged",
        "Whether writes are slowed because a majority lags",
        Unit::None,
        &[],
        &[as_is("flowControl.isLagged")],
    ),
    gauge(
        "mongodb_flow_control_target_rate",
        "Locks a second that flow control allows",
        Unit::None,
        &[],
        &[as_is("flowControl.targetRateLimit")],
    ),
    counter(
        "mongodb_flow_control_wait_seconds_total",
        "Time that writes were slowed by flow control",
        Unit::Seconds,
        &[],
        &[scaled("flowControl.timeAcquiringMicros", 1e-6)],
    ),
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
    gauge(
        "mongodb_memory_bytes",
        "Memory of the process",
        Unit::Bytes,
        &["kind"],
        &[mebibytes("mem.resident", &["resident"]), mebibytes("mem.virtual", &["virtual"])],
    ),
    worked_out(
        "mongodb_host_memory_bytes",
        "Memory that the machine has, or that the container may use",
        Kind::Gauge,
        Unit::Bytes,
        &[],
        "hostInfo: system.memLimitMB, system.memSizeMB",
    ),
    worked_out("mongodb_host_cores", "Cores that the machine has", Kind::Gauge, Unit::None, &[], "hostInfo: system.numCores"),
    machine(
        "mongodb_host_cpu_seconds_total",
        "Processor time of the machine; Linux only, by the server's diagnostic data",
        Kind::Counter,
        Unit::Seconds,
        &["mode"],
        &[
            millis("systemMetrics.cpu.user_ms", &["user"]),
            millis("systemMetrics.cpu.nice_ms", &["nice"]),
            millis("systemMetrics.cpu.system_ms", &["system"]),
            millis("systemMetrics.cpu.idle_ms", &["idle"]),
            millis("systemMetrics.cpu.iowait_ms", &["iowait"]),
            millis("systemMetrics.cpu.irq_ms", &["irq"]),
            millis("systemMetrics.cpu.softirq_ms", &["softirq"]),
            millis("systemMetrics.cpu.steal_ms", &["steal"]),
        ],
    ),
    machine(
        "mongodb_host_available_memory_bytes",
        "Memory of the machine that is free or can be made so; Linux only, by the server's diagnostic data",
        Kind::Gauge,
        Unit::Bytes,
        &[],
        &[scaled("systemMetrics.memory.MemAvailable_kb", 1024.0)],
    ),
    machine(
        "mongodb_host_swap_bytes",
        "Swap space of the machine; Linux only, by the server's diagnostic data",
        Kind::Gauge,
        Unit::Bytes,
        &["kind"],
        &[kibibytes("systemMetrics.memory.SwapTotal_kb", &["total"]), kibibytes("systemMetrics.memory.SwapFree_kb", &["free"])],
    ),
    machine(
        "mongodb_host_disk_operations_total",
        "What the disks of the machine did; Linux only, by the server's diagnostic data",
        Kind::Counter,
        Unit::None,
        &["op", "device"],
        &[labelled("systemMetrics.disks.*.reads", &["read"]), labelled("systemMetrics.disks.*.writes", &["write"])],
    ),
    machine(
        "mongodb_host_disk_busy_seconds_total",
        "For how long the disks of the machine had something to do; Linux only, by the server's diagnostic data",
        Kind::Counter,
        Unit::Seconds,
        &["device"],
        &[scaled("systemMetrics.disks.*.io_time_ms", 1e-3)],
    ),
    counter(
        "mongodb_page_faults_total",
        "Pages that the process had to wait for from disk",
        Unit::None,
        &[],
        &[as_is("extra_info.page_faults")],
    ),
    gauge(
        "mongodb_allocator_bytes",
        "What the allocator holds",
        Unit::Bytes,
        &["kind"],
        &[
            labelled("tcmalloc.generic.heap_size", &["heap"]),
            labelled("tcmalloc.generic.current_allocated_bytes", &["allocated"]),
            labelled("tcmalloc.tcmalloc.pageheap_free_bytes", &["pageheap_free"]),
        ],
    ),
    counter(
        "mongodb_elections_total",
        "Elections that this member called",
        Unit::None,
        &["result", "reason"],
        &[labelled("electionMetrics.*.called", &["called"]), labelled("electionMetrics.*.successful", &["successful"])],
    ),
    counter(
        "mongodb_stepdowns_total",
        "Times that this primary had to step down",
        Unit::None,
        &["cause"],
        &[labelled("electionMetrics.numStepDownsCausedByHigherTerm", &["higher_term"])],
    ),
    counter(
        "mongodb_repl_apply_ops_total",
        "Operations that were applied from the oplog, in batches",
        Unit::None,
        &[],
        &[as_is("metrics.repl.apply.ops")],
    ),
    counter(
        "mongodb_repl_apply_batches_total",
        "Batches that were applied from the oplog",
        Unit::None,
        &[],
        &[as_is("metrics.repl.apply.batches.num")],
    ),
    counter(
        "mongodb_repl_apply_seconds_total",
        "Time that applying batches took",
        Unit::Seconds,
        &[],
        &[scaled("metrics.repl.apply.batches.totalMillis", 1e-3)],
    ),
    gauge(
        "mongodb_repl_buffer_bytes",
        "Oplog entries that wait to be applied",
        Unit::Bytes,
        &["kind"],
        &[
            labelled("metrics.repl.buffer.apply.sizeBytes", &["used"]),
            labelled("metrics.repl.buffer.apply.maxSizeBytes", &["max"]),
            labelled("metrics.repl.buffer.sizeBytes", &["used"]),
            labelled("metrics.repl.buffer.maxSizeBytes", &["max"]),
        ],
    ),
    gauge(
        "mongodb_repl_buffer_operations",
        "Oplog entries that wait to be applied",
        Unit::None,
        &[],
        &[as_is("metrics.repl.buffer.apply.count"), as_is("metrics.repl.buffer.count")],
    ),
    counter(
        "mongodb_repl_network_bytes_total",
        "Bytes of the oplog that were fetched",
        Unit::Bytes,
        &[],
        &[as_is("metrics.repl.network.bytes")],
    ),
    counter(
        "mongodb_sync_source_changes_total",
        "Times that the member chose another to replicate from",
        Unit::None,
        &[],
        &[as_is("metrics.repl.syncSource.numTimesChoseDifferent")],
    ),
    counter(
        "mongodb_authentications_total",
        "Users and members that proved who they are, or tried",
        Unit::None,
        &["result", "mechanism"],
        &[
            labelled("security.authentication.mechanisms.*.authenticate.received", &["received"]),
            labelled("security.authentication.mechanisms.*.authenticate.successful", &["successful"]),
        ],
    ),
    worked_out(
        "mongodb_certificate_expiry_seconds",
        "For how long the server's certificate is still valid",
        Kind::Gauge,
        Unit::Seconds,
        &[],
        "serverStatus: security.SSLServerCertificateExpirationDate, localTime",
    ),
    counter(
        "mongodb_migrations_total",
        "Moves of chunks that this member took part in",
        Unit::None,
        &["result"],
        &[
            labelled("shardingStatistics.countDonorMoveChunkStarted", &["donated_started"]),
            labelled("shardingStatistics.countDonorMoveChunkCommitted", &["donated"]),
            labelled("shardingStatistics.countDonorMoveChunkAborted", &["donated_aborted"]),
            labelled("shardingStatistics.countRecipientMoveChunkStarted", &["received_started"]),
        ],
    ),
    counter(
        "mongodb_stale_config_errors_total",
        "Requests by a router that did not know where data is",
        Unit::None,
        &[],
        &[as_is("shardingStatistics.countStaleConfigErrors")],
    ),
    worked_out(
        "mongodb_replica_member_health",
        "Whether the member answers heartbeats, as the member that was asked sees it",
        Kind::Gauge,
        Unit::None,
        &["member"],
        "replSetGetStatus: members.health",
    ),
    worked_out(
        "mongodb_replica_lag_seconds",
        "How far a member is behind the primary; only the primary tells it, and absent for members that cannot be reached or hold no data",
        Kind::Gauge,
        Unit::Seconds,
        &["member"],
        "replSetGetStatus: members.optimeDate",
    ),
    worked_out(
        "mongodb_replica_lag_beyond_delay_seconds",
        "How far a member is behind the primary, less what it is to be by the set's configuration",
        Kind::Gauge,
        Unit::Seconds,
        &["member"],
        "replSetGetStatus: members.optimeDate; replSetGetConfig: members.secondaryDelaySecs",
    ),
    worked_out(
        "mongodb_replica_lag_writes_seconds",
        "The same, but 0 where nothing has been written for longer than that: an idle set lags by its own no-ops",
        Kind::Gauge,
        Unit::Seconds,
        &["member"],
        "replSetGetStatus: members.optimeDate, optimes.lastAppliedWallTime",
    ),
    worked_out(
        "mongodb_replica_heartbeat_age_seconds",
        "How long ago the member that was asked heard of another",
        Kind::Gauge,
        Unit::Seconds,
        &["member"],
        "replSetGetStatus: members.lastHeartbeatRecv",
    ),
    worked_out(
        "mongodb_replica_majority_lag_seconds",
        "How far what a majority has is behind what this member has",
        Kind::Gauge,
        Unit::Seconds,
        &[],
        "replSetGetStatus: optimes.lastCommittedWallTime",
    ),
    worked_out(
        "mongodb_replica_durable_lag_seconds",
        "How far what is in the journal is behind what this member has",
        Kind::Gauge,
        Unit::Seconds,
        &[],
        "replSetGetStatus: optimes.lastDurableWallTime",
    ),
    worked_out(
        "mongodb_replica_ping_seconds",
        "Round trip of heartbeats",
        Kind::Gauge,
        Unit::Seconds,
        &["member"],
        "replSetGetStatus: members.pingMs",
    ),
    worked_out("mongodb_replica_term", "The election term", Kind::Gauge, Unit::None, &[], "replSetGetStatus: term"),
    worked_out(
        "mongodb_oplog_window_seconds",
        "From the oldest entry of the oplog to the newest",
        Kind::Gauge,
        Unit::Seconds,
        &[],
        "local.oplog.rs: the first and the last entry",
    ),
    worked_out(
        "mongodb_oplog_full_window_seconds",
        "The same, of an oplog that has become as large as it may: only then does it tell how much it holds",
        Kind::Gauge,
        Unit::Seconds,
        &[],
        "local.oplog.rs: the first and the last entry, size, maxSize",
    ),
    worked_out(
        "mongodb_oplog_bytes",
        "The oplog: how large it is, and may become",
        Kind::Gauge,
        Unit::Bytes,
        &["kind"],
        "$collStats of local.oplog.rs: size, maxSize",
    ),
    worked_out(
        "mongodb_replication_headroom_seconds",
        "How much longer a member can lag before the oplog no longer has what it needs; only the primary tells it, and only once its oplog is full",
        Kind::Gauge,
        Unit::Seconds,
        &["member"],
        "mongodb_oplog_full_window_seconds less mongodb_replica_lag_seconds",
    ),
    worked_out(
        "mongodb_currentop_active",
        "Operations that are under way, but for those that wait by their nature",
        Kind::Gauge,
        Unit::None,
        &["op"],
        "$currentOp",
    ),
    worked_out(
        "mongodb_currentop_oldest_seconds",
        "How long the one has been under way that has been for longest; 0 if there is none",
        Kind::Gauge,
        Unit::Seconds,
        &["op"],
        "$currentOp: microsecs_running",
    ),
    worked_out(
        "mongodb_currentop_waiting_lock",
        "Operations that wait for a lock",
        Kind::Gauge,
        Unit::None,
        &[],
        "$currentOp: waitingForLock",
    ),
    worked_out(
        "mongodb_currentop_plans",
        "Operations that are under way, by how they find documents",
        Kind::Gauge,
        Unit::None,
        &["plan"],
        "$currentOp: planSummary",
    ),
    worked_out(
        "mongodb_currentop_queued",
        "Operations that wait in a queue of the server (8.0)",
        Kind::Gauge,
        Unit::None,
        &["queue"],
        "$currentOp: currentQueue.name",
    ),
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
    worked_out(
        "mongodb_balancer_enabled",
        "Whether the balancer may move chunks",
        Kind::Gauge,
        Unit::None,
        &[],
        "balancerStatus: mode",
    ),
    worked_out(
        "mongodb_balancer_running",
        "Whether the balancer is moving chunks",
        Kind::Gauge,
        Unit::None,
        &[],
        "balancerStatus: inBalancerRound",
    ),
    worked_out(
        "mongodb_shard_state",
        "What a shard is to its cluster",
        Kind::StateSet,
        Unit::None,
        &["shard", "state"],
        "listShards: state, draining",
    ),
    worked_out(
        "mongodb_shard_member_up",
        "Whether a router reaches a member of a shard",
        Kind::Gauge,
        Unit::None,
        &["shard", "member"],
        "connPoolStats: replicaSets",
    ),
    worked_out(
        "mongodb_shard_pool_connections",
        "Connections of a router to members of shards",
        Kind::Gauge,
        Unit::None,
        &["member", "state"],
        "connPoolStats: hosts",
    ),
    worked_out("mongodb_shard_documents", "Documents of a shard", Kind::Gauge, Unit::None, &["shard"], "dbStats: raw.objects"),
    worked_out("mongodb_chunks", "Chunks of a shard", Kind::Gauge, Unit::None, &["shard"], "config.chunks"),
    worked_out(
        "mongodb_jumbo_chunks",
        "Chunks that are too large to be moved",
        Kind::Gauge,
        Unit::None,
        &["shard"],
        "config.chunks: jumbo",
    ),
    worked_out(
        "db_client_operation_duration_seconds",
        "How long operations took for the client, by the stable name of OpenTelemetry",
        Kind::Histogram,
        Unit::Seconds,
        &["db_operation_name", "db_namespace", "db_collection_name", "server", "error_type"],
        "the driver's command events",
    ),
    worked_out(
        "db_client_connection_count",
        "Connections of a pool",
        Kind::Gauge,
        Unit::None,
        &["server", "state"],
        "the driver's pool events",
    ),
    worked_out(
        "db_client_connection_pending_requests",
        "Operations that wait for a connection of a pool",
        Kind::Gauge,
        Unit::None,
        &["server"],
        "the driver's pool events",
    ),
    worked_out(
        "db_client_connection_timeouts_total",
        "Operations that got no connection in time",
        Kind::Counter,
        Unit::None,
        &["server"],
        "the driver's pool events",
    ),
    worked_out(
        "db_client_connection_create_time_seconds",
        "How long making a connection took",
        Kind::Histogram,
        Unit::Seconds,
        &["server"],
        "the driver's pool events",
    ),
    worked_out(
        "db_client_connection_wait_time_seconds",
        "How long operations waited for a connection",
        Kind::Histogram,
        Unit::Seconds,
        &["server"],
        "the driver's pool events",
    ),
    worked_out(
        "db_client_connection_use_time_seconds",
        "How long operations kept a connection",
        Kind::Histogram,
        Unit::Seconds,
        &["server"],
        "the driver's pool events",
    ),
    worked_out(
        "mongodb_client_server_state",
        "What a client takes a server for",
        Kind::StateSet,
        Unit::None,
        &["server", "state"],
        "the driver's topology events",
    ),
    worked_out(
        "mongodb_client_heartbeat_duration_seconds",
        "Round trip of heartbeats, but for those that wait for a change",
        Kind::Histogram,
        Unit::Seconds,
        &["server"],
        "the driver's topology events",
    ),
    worked_out(
        "mongodb_client_heartbeat_failures_total",
        "Heartbeats that failed",
        Kind::Counter,
        Unit::None,
        &["server"],
        "the driver's topology events",
    ),
    worked_out(
        "mongodb_client_pool_cleared_total",
        "Times that a pool was emptied because its server failed",
        Kind::Counter,
        Unit::None,
        &["server"],
        "the driver's pool events",
    ),
    worked_out(
        "mongodb_client_overload_errors_total",
        "Operations that a server refused because it had too many",
        Kind::Counter,
        Unit::None,
        &["server"],
        "the driver's command events",
    ),
    worked_out(
        "mongodb_client_failovers_total",
        "Times that a client found another primary than it had",
        Kind::Counter,
        Unit::None,
        &[],
        "the driver's topology events",
    ),
    worked_out(
        "mongodb_client_without_primary_seconds_total",
        "How long a client was without a primary, up to when it found one",
        Kind::Counter,
        Unit::Seconds,
        &[],
        "the driver's topology events",
    ),
    worked_out(
        "mongodb_monitor_collect_duration_seconds",
        "How long the last collection took",
        Kind::Gauge,
        Unit::Seconds,
        &["collector"],
        "this crate",
    ),
    worked_out(
        "mongodb_monitor_snapshot_age_seconds",
        "How old what is shown is",
        Kind::Gauge,
        Unit::Seconds,
        &["collector"],
        "this crate",
    ),
    worked_out(
        "mongodb_monitor_overdue_ratio",
        "The same as a share of the age from which on it is no longer shown; of what was never read, since the member is watched",
        Kind::Gauge,
        Unit::None,
        &["collector"],
        "this crate",
    ),
    worked_out("mongodb_monitor_series", "Series that are shown", Kind::Gauge, Unit::None, &["collector"], "this crate"),
    worked_out(
        "mongodb_monitor_series_dropped",
        "Series that are left out because there are too many",
        Kind::Gauge,
        Unit::None,
        &["collector"],
        "this crate",
    ),
];

/// The metric of a name.
pub(crate) fn metric(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}

/// Whether the first field of a command names a collection; that of others may hold anything.
pub(crate) fn is_on_collection(command: &str) -> bool {
    COMMANDS.contains(&command) || MORE_ON_COLLECTIONS.contains(&command)
}

/// Commands that work on a collection besides those that clients send most.
const MORE_ON_COLLECTIONS: &[&str] = &[
    "collMod",
    "collStats",
    "compact",
    "convertToCapped",
    "create",
    "createSearchIndexes",
    "drop",
    "dropIndexes",
    "findandmodify",
    "listIndexes",
    "mapReduce",
    "mapreduce",
    "reIndex",
    "validate",
];

/// There are hundreds of commands; these are what clients do.
const COMMANDS: &[&str] = &[
    "abortTransaction",
    "aggregate",
    "commitTransaction",
    "count",
    "createIndexes",
    "delete",
    "distinct",
    "find",
    "findAndModify",
    "getMore",
    "insert",
    "update",
];

const fn counter(
    name: &'static str,
    help: &'static str,
    unit: Unit,
    labels: &'static [&'static str],
    fields: &'static [Field],
) -> Metric {
    Metric { name, help, kind: Kind::Counter, unit, labels, source: Source::ServerStatus(fields) }
}

const fn gauge(
    name: &'static str,
    help: &'static str,
    unit: Unit,
    labels: &'static [&'static str],
    fields: &'static [Field],
) -> Metric {
    Metric { name, help, kind: Kind::Gauge, unit, labels, source: Source::ServerStatus(fields) }
}

const fn worked_out(
    name: &'static str,
    help: &'static str,
    kind: Kind,
    unit: Unit,
    labels: &'static [&'static str],
    from: &'static str,
) -> Metric {
    Metric { name, help, kind, unit, labels, source: Source::WorkedOut(from) }
}

const fn machine(
    name: &'static str,
    help: &'static str,
    kind: Kind,
    unit: Unit,
    labels: &'static [&'static str],
    fields: &'static [Field],
) -> Metric {
    Metric { name, help, kind, unit, labels, source: Source::Machine(fields) }
}

const fn as_is(path: &'static str) -> Field {
    labelled(path, &[])
}

const fn among(path: &'static str, only: &'static [&'static str]) -> Field {
    Field { path, only, labels: &[], scale: 1.0 }
}

const fn scaled(path: &'static str, scale: f64) -> Field {
    Field { path, only: &[], labels: &[], scale }
}

const fn labelled(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1.0 }
}

const fn micros(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1e-6 }
}

const fn millis(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1e-3 }
}

const fn kibibytes(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1024.0 }
}

const fn mebibytes(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1_048_576.0 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_say_what_the_kind_and_the_unit_are() {
        let mut families = BTreeSet::new();
        for metric in METRICS {
            // In OpenMetrics a counter and a gauge whose names differ by `_total` alone are one.
            let family = metric.name.trim_end_matches("_total").trim_end_matches("_info");
            assert!(families.insert(family), "{} stands there twice", metric.name);
            assert!(
                (metric.name.starts_with("mongodb_") || metric.name.starts_with("db_client_"))
                    && !metric.help.is_empty()
                    && !metric.help.ends_with('.'),
                "{}",
                metric.name
            );
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
            assert_eq!(metric.name.ends_with("_info"), metric.kind == Kind::Info, "{}", metric.name);
            let stem = metric.name.trim_end_matches("_total");
            let unit =
                [Unit::Seconds, Unit::Bytes].into_iter().find(|unit| unit.suffix().is_some_and(|unit| stem.ends_with(unit)));
            assert_eq!(unit.unwrap_or(Unit::None), metric.unit, "{}", metric.name);
        }
    }

    #[test]
    fn every_field_gives_all_labels_of_its_metric() {
        for metric in METRICS {
            let (Source::ServerStatus(fields) | Source::Machine(fields)) = metric.source else { continue };
            for field in fields {
                let given = field.labels.len() + field.path.split('.').filter(|name| *name == "*").count();
                assert_eq!(given, metric.labels.len(), "{}: {}", metric.name, field.path);
            }
        }
    }

    /// To write it anew: `UPDATE_DOCS=1 cargo test -p mongo-monitor`.
    #[test]
    fn the_documentation_is_that_of_the_table() {
        let mut page = "# Metrics\n\nMade from the table in the code. Absent is what a server does not have; where there are several sources, the first that is there counts.\n\n\
            | name | kind | labels | what it says | from |\n|---|---|---|---|---|\n"
            .to_owned();
        for metric in METRICS {
            let labels = metric.labels.join(", ");
            let mut sources = metric.sources();
            let more = sources.len().saturating_sub(3);
            sources.truncate(3);
            let more = if more > 0 { format!("; {more} more") } else { String::new() };
            let from = sources.join("; ").replace('*', "\\*");
            page.push_str(&format!("| `{}` | {} | {labels} | {} | {from}{more} |\n", metric.name, metric.kind, metric.help));
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        assert!(
            std::fs::read_to_string(path).unwrap_or_default() == page,
            "docs/metrics.md is not that of the table: write it anew"
        );
    }
}
