//! Reading `serverStatus` by the table.
//!
//! A field that a version does not have, or has as something else than a number, is passed over.

use std::time::Duration;

use mongo_core::bson::{Bson, DateTime, Document, RawDocumentBuf, doc, rawdoc};

use crate::{
    collector::number,
    metric::{Field, Metric, Source},
    reading::{Epoch, HistogramValue, Reading, Value, reading},
    table::{METRICS, metric},
};

/// The command. What no metric is made of and what is dear to put together is left out.
pub(crate) fn command() -> RawDocumentBuf {
    rawdoc! {
        "serverStatus": 1,
        "defaultRWConcern": 0,
        "indexStats": 0,
        "mirroredReads": 0,
        "readConcernCounters": 0,
        "sharding": 0,
        "tenantMigrations": 0,
        "transportSecurity": 0,
    }
}

/// The same for the distribution of latencies alone, which the server puts together only if it is asked to.
pub(crate) fn latencies_command() -> Document {
    let mut command = doc! { "serverStatus": 1, "opLatencies": { "histograms": true } };
    command.extend(SECTIONS.iter().map(|section| ((*section).to_owned(), Bson::Int32(0))));
    command
}

/// The distributions of an answer.
pub(crate) fn latencies(status: &Document) -> Vec<Reading> {
    let mut readings = Vec::new();
    for metric in METRICS.iter().filter(|metric| matches!(metric.source, Source::Latencies)) {
        read_latencies(metric, status, &mut readings);
    }
    readings
}

/// What diagnostic data say of the machine.
pub(crate) fn of_machine(data: &Document) -> Vec<Reading> {
    let mut readings = Vec::new();
    for metric in METRICS {
        if let Source::Machine(fields) = &metric.source {
            read_fields(metric, fields, data, &mut readings);
        }
    }
    readings
}

/// What an answer says.
pub(crate) fn read(status: &Document) -> (Option<Epoch>, Vec<Reading>) {
    let mut readings = Vec::new();
    for metric in METRICS {
        match &metric.source {
            Source::ServerStatus(fields) => read_fields(metric, fields, status, &mut readings),
            Source::Latencies | Source::Machine(_) | Source::WorkedOut(_) => {}
        }
    }
    let epoch = epoch(status);
    if let (Some(epoch), Some(started)) = (epoch, metric("mongodb_process_start_time_seconds")) {
        readings.push(Reading::number(started, Vec::new(), epoch.started.timestamp_millis() as f64 / 1e3));
    }
    readings.extend(instance(status));
    readings.extend(certificate(status));
    (epoch, readings)
}

/// What an answer of `hostInfo` says.
pub(crate) fn of_host(info: &Document) -> Vec<Reading> {
    let system = info.get_document("system").ok();
    let field = |name: &str| system.and_then(|system| system.get(name)).and_then(number);
    let memory = field("memLimitMB").or_else(|| field("memSizeMB")).map(|mebibytes| mebibytes * 1_048_576.0);
    [("mongodb_host_memory_bytes", memory), ("mongodb_host_cores", field("numCores"))]
        .into_iter()
        .filter_map(|(name, value)| reading(name, &[], value?))
        .collect()
}

/// For how long the server's certificate is still valid.
fn certificate(status: &Document) -> Option<Reading> {
    let expires = status.get_document("security").ok()?.get_datetime("SSLServerCertificateExpirationDate").ok()?;
    let left = expires.timestamp_millis() - status.get_datetime("localTime").ok()?.timestamp_millis();
    #[expect(clippy::cast_precision_loss, reason = "milliseconds until a date")]
    reading("mongodb_certificate_expiry_seconds", &[], left as f64 / 1e3)
}

fn epoch(status: &Document) -> Option<Epoch> {
    let uptime = number(status.get("uptimeMillis")?)?;
    let now = status.get_datetime("localTime").ok()?.timestamp_millis();
    #[expect(clippy::cast_possible_truncation, reason = "milliseconds of an uptime")]
    let started = DateTime::from_millis((now - uptime as i64).div_euclid(1000) * 1000);
    #[expect(clippy::cast_possible_truncation, reason = "a process id")]
    let pid = number(status.get("pid")?)? as i64;
    #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "no process has run for less than nothing")]
    let uptime = Duration::from_millis(uptime.max(0.0) as u64);
    Some(Epoch { pid, started, uptime })
}

fn instance(status: &Document) -> Option<Reading> {
    let text = |path: &str| {
        let mut found = String::new();
        find(status, path, &mut Vec::new(), &mut |_, value| {
            if let Bson::String(text) = value {
                text.clone_into(&mut found);
            }
        });
        found
    };
    let labels = ["version", "storageEngine.name", "process", "repl.setName"].into_iter().map(text).collect();
    Some(Reading::number(metric("mongodb_instance_info")?, labels, 1.0))
}

fn read_fields(metric: &'static Metric, fields: &[Field], status: &Document, readings: &mut Vec<Reading>) {
    let first = readings.len();
    for field in fields {
        find(status, field.path, &mut Vec::new(), &mut |captured, value| {
            let is_wanted = field.only.is_empty() || captured.iter().all(|name| field.only.contains(name));
            let Some(value) = number(value).filter(|_| is_wanted) else { return };
            let labels: Vec<String> = field.labels.iter().chain(captured).map(|label| (*label).to_owned()).collect();
            // Where versions keep a number in different places, the newest comes first.
            if !readings[first..].iter().any(|reading| reading.labels == labels) {
                readings.push(Reading::number(metric, labels, value * field.scale));
            }
        });
    }
}

/// Gives what stands at a path, with the names that stand in place of `*`.
fn find<'a>(document: &'a Document, path: &str, captured: &mut Vec<&'a str>, found: &mut dyn FnMut(&[&'a str], &'a Bson)) {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    if name == "*" {
        for (name, value) in document {
            captured.push(name);
            go_on(value, rest, captured, found);
            captured.pop();
        }
    } else if let Some(value) = document.get(name) {
        go_on(value, rest, captured, found);
    }
}

fn go_on<'a>(value: &'a Bson, rest: Option<&str>, captured: &mut Vec<&'a str>, found: &mut dyn FnMut(&[&'a str], &'a Bson)) {
    match (rest, value) {
        (None, value) => found(captured, value),
        (Some(rest), Bson::Document(document)) => find(document, rest, captured, found),
        _ => {}
    }
}

/// The server counts in buckets each of which begins where the one before ends, and leaves out those that are empty. Its bounds are the powers of
/// two, and from two milliseconds on others between them (`OperationLatencyHistogram` of the server); those kept here are among them in every version.
fn read_latencies(metric: &'static Metric, status: &Document, readings: &mut Vec<Reading>) {
    let Ok(latencies) = status.get_document("opLatencies") else { return };
    for class in ["reads", "writes", "commands", "transactions"] {
        let Ok(latency) = latencies.get_document(class) else { continue };
        let field = |name: &str| latency.get(name).and_then(number);
        let (Some(micros), Some(count)) = (field("latency"), field("ops")) else { continue };
        let mut buckets: Vec<(f64, u64)> = BOUNDS_MICROS.iter().map(|bound| (*bound / 1e6, 0)).collect();
        let Ok(counted) = latency.get_array("histogram") else { continue };
        for bucket in counted.iter().filter_map(Bson::as_document) {
            let field = |name: &str| bucket.get(name).and_then(number);
            let (Some(begins), Some(count)) = (field("micros"), field("count")) else { continue };
            let within = buckets.iter_mut().zip(BOUNDS_MICROS).filter(|(_, bound)| begins < **bound);
            within.for_each(|((_, below), _)| *below += whole(count));
        }
        let value = Value::Histogram(HistogramValue { buckets, count: whole(count), sum: micros / 1e6 });
        readings.push(Reading { metric, labels: vec![class.to_owned()], value });
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count, of which the server never sends a negative one"
)]
fn whole(count: f64) -> u64 {
    count.max(0.0) as u64
}

/// Parts of a status, of all versions, that have nothing to do with latencies. A name that a version does not know means nothing to it.
const SECTIONS: &[&str] = &[
    "activeIndexBuilds",
    "admission",
    "asserts",
    "batchedDeletes",
    "bucketCatalog",
    "catalogStats",
    "changeStreamPreImages",
    "collectionCatalog",
    "connections",
    "defaultRWConcern",
    "electionMetrics",
    "encryptionAtRest",
    "extra_info",
    "featureCompatibilityVersion",
    "flowControl",
    "freeMonitoring",
    "globalLock",
    "health",
    "hedgingMetrics",
    "indexBuilds",
    "indexBulkBuilder",
    "indexStats",
    "internalTransactions",
    "locks",
    "logicalSessionRecordCache",
    "mem",
    "metrics",
    "mirroredReads",
    "network",
    "opReadConcernCounters",
    "opWorkingTime",
    "opcounters",
    "opcountersRepl",
    "oplog",
    "oplogTruncation",
    "planCache",
    "profiler",
    "queryAnalyzers",
    "queryStats",
    "querySettings",
    "queues",
    "readConcernCounters",
    "readPreferenceCounters",
    "repl",
    "scramCache",
    "security",
    "service",
    "sharding",
    "shardingStatistics",
    "shardedIndexConsistency",
    "shardSplits",
    "spillWiredTiger",
    "storageEngine",
    "tcmalloc",
    "tenantMigrations",
    "timeseriesCatalog",
    "trafficRecording",
    "transactions",
    "transportSecurity",
    "twoPhaseCommitCoordinator",
    "watchdog",
    "wiredTiger",
];

const BOUNDS_MICROS: &[f64] = &[
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16_384.0,
    32_768.0,
    65_536.0,
    131_072.0,
    262_144.0,
    524_288.0,
    1_048_576.0,
    2_097_152.0,
    4_194_304.0,
    8_388_608.0,
    16_777_216.0,
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Answers of real servers, as they came.
    fn fixture(version: &str) -> Document {
        let text =
            std::fs::read_to_string(format!("{}/fixtures/server_status_{version}.json", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        match Bson::try_from(value).unwrap() {
            Bson::Document(document) => document,
            other => panic!("{other:?}"),
        }
    }

    fn value(readings: &[Reading], name: &str, labels: &[&str]) -> Option<f64> {
        let found = readings.iter().find(|reading| reading.metric.name == name && reading.labels.iter().eq(labels.iter()));
        found.map(Reading::as_number)
    }

    #[test]
    fn every_version_gives_the_metrics_that_all_have() {
        for version in ["4.4", "5.0", "6.0"] {
            let (epoch, readings) = read(&fixture(version));
            assert!(epoch.is_some(), "{version}");
            let has: BTreeSet<&str> = readings.iter().map(|reading| reading.metric.name).collect();
            let newer = [
                "mongodb_connections_queued_for_establishment",
                "mongodb_connection_establishment_rate_limit_total",
                "mongodb_connections_rejected_total",
                "mongodb_commands_rejected_total",
                "mongodb_handshake_time_seconds",
                "mongodb_ingress_admissions_total",
                "mongodb_ingress_queue_wait_seconds",
                "mongodb_ingress_tokens_available",
                "mongodb_spill_bytes_total",
                "mongodb_ticket_queue_length",
                "mongodb_ticket_queue_seconds_total",
                "mongodb_ticket_queued_total",
                "mongodb_ticket_processing_seconds_total",
                "mongodb_ticket_admissions_total",
                "mongodb_execution_delinquent_acquisitions_total",
                "mongodb_execution_deprioritized_total",
                "mongodb_execution_load_shed_total",
            ];
            // The fixtures are of servers without TLS or shards.
            let rare = [
                "mongodb_lock_deadlocks_total",
                "mongodb_authentications_total",
                "mongodb_certificate_expiry_seconds",
                "mongodb_migrations_total",
                "mongodb_stale_config_errors_total",
            ];
            for metric in METRICS {
                let is_due = match &metric.source {
                    Source::Latencies | Source::Machine(_) => false,
                    Source::WorkedOut(from) => from.starts_with("serverStatus") && !rare.contains(&metric.name),
                    _ => !newer.contains(&metric.name) && !rare.contains(&metric.name),
                };
                assert_eq!(has.contains(metric.name), is_due, "{version}: {}", metric.name);
            }
            // No series stands there twice.
            let series: BTreeSet<_> = readings.iter().map(|reading| (reading.metric.name, &reading.labels)).collect();
            assert_eq!(series.len(), readings.len(), "{version}");
        }
    }

    #[test]
    fn the_machine_is_told_by_what_a_server_has_collected() {
        let data = doc! { "systemMetrics": {
            "cpu": { "num_cpus": 2, "user_ms": 5_000_i64, "idle_ms": 9_000_i64 },
            "memory": { "MemTotal_kb": 100_i64, "SwapTotal_kb": 8, "SwapFree_kb": 2 },
            "disks": { "vda": { "reads": 7, "writes": 3, "io_time_ms": 1500 } },
        } };
        let readings = of_machine(&data);
        assert_eq!(value(&readings, "mongodb_host_cpu_seconds_total", &["user"]), Some(5.0));
        assert_eq!(value(&readings, "mongodb_host_swap_bytes", &["free"]), Some(2048.0));
        assert_eq!(value(&readings, "mongodb_host_disk_operations_total", &["read", "vda"]), Some(7.0));
        assert_eq!(value(&readings, "mongodb_host_disk_busy_seconds_total", &["vda"]), Some(1.5));
    }

    #[test]
    fn for_latencies_alone_nothing_else_is_asked_for() {
        let command = latencies_command();
        assert_eq!(command.keys().next().map(String::as_str), Some("serverStatus"));
        for version in ["4.4", "5.0", "6.0"] {
            let status = fixture(version);
            let sections = status.iter().filter(|(name, value)| *name != "opLatencies" && value.as_document().is_some());
            let asked: Vec<&String> =
                sections.map(|(name, _)| name).filter(|name| command.get_i32(name).ok() != Some(0)).collect();
            assert!(asked.is_empty(), "{version}: {asked:?}");
        }
    }

    #[test]
    fn numbers_come_in_base_units_from_the_newest_place() {
        let status = bson_doc();
        let (epoch, readings) = read(&status);
        assert_eq!(epoch.map(|epoch| (epoch.pid, epoch.started)), Some((77, DateTime::from_millis(1_000_000_000))));
        assert_eq!(value(&readings, "mongodb_uptime_seconds", &[]), Some(2.5));
        assert_eq!(value(&readings, "mongodb_memory_bytes", &["resident"]), Some(2_097_152.0));
        assert_eq!(value(&readings, "mongodb_tickets", &["read", "out"]), Some(5.0));
        assert_eq!(value(&readings, "mongodb_lock_wait_seconds_total", &["Global", "r"]), Some(1.5));
        assert_eq!(value(&readings, "mongodb_flow_control_lagged", &[]), Some(1.0));
        assert_eq!(value(&readings, "mongodb_elections_total", &["called", "stepUpCmd"]), Some(3.0));
        assert_eq!(value(&readings, "mongodb_memory_bytes", &["virtual"]), None, "a text is no number");
        assert_eq!(value(&readings, "mongodb_page_faults_total", &[]), None);
    }

    #[test]
    fn a_certificate_is_told_by_how_long_it_is_still_valid() {
        let expires = DateTime::from_millis(1_000_003_400 + 86_400_000);
        let mut status = bson_doc();
        status.insert("security", doc! { "SSLServerCertificateExpirationDate": expires });
        assert_eq!(value(&read(&status).1, "mongodb_certificate_expiry_seconds", &[]), Some(86_400.0));
        assert_eq!(value(&read(&bson_doc()).1, "mongodb_certificate_expiry_seconds", &[]), None);
    }

    #[test]
    fn a_container_has_the_memory_that_it_may_use() {
        let host = of_host(&doc! { "system": { "memSizeMB": 64_000, "memLimitMB": 2_048_i64, "numCores": 4 } });
        assert_eq!(value(&host, "mongodb_host_memory_bytes", &[]), Some(2_147_483_648.0));
        assert_eq!(value(&host, "mongodb_host_cores", &[]), Some(4.0));
    }

    fn bson_doc() -> Document {
        doc! {
            "pid": 77_i64, "uptimeMillis": 2500_i64, "localTime": DateTime::from_millis(1_000_003_400),
            "mem": { "resident": 2, "virtual": "much" },
            "queues": { "execution": { "read": { "out": 5 } } },
            "wiredTiger": { "concurrentTransactions": { "read": { "out": 9, "available": 1 } } },
            "locks": { "Global": { "timeAcquiringMicros": { "r": 1_500_000_i64 } }, "odd": 3 },
            "flowControl": { "isLagged": true },
            "electionMetrics": { "stepUpCmd": { "called": 3 }, "numCatchUps": 7 },
        }
    }

    #[test]
    fn latencies_become_a_cumulated_histogram() {
        let bucket = |micros: i64, count: i64| doc! { "micros": micros, "count": count };
        let reads = doc! { "latency": 9_000_000_i64, "ops": 10_i64, "histogram": [bucket(64, 4), bucket(128, 1), bucket(3072, 3), bucket(1_572_864, 2)] };
        let status = doc! { "opLatencies": { "reads": reads } };
        let readings = latencies(&status);
        let Some(Value::Histogram(histogram)) = readings.first().map(|reading| &reading.value) else { panic!("{readings:?}") };
        let below = |bound: f64| histogram.buckets.iter().find(|bucket| bucket.0 == bound).unwrap().1;
        assert_eq!((below(0.000_128), below(0.000_256), below(0.002_048), below(0.004_096)), (4, 5, 5, 8));
        assert_eq!((below(1.048_576), below(2.097_152), histogram.count, histogram.sum), (8, 10, 10, 9.0));
    }
}
