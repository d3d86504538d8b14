//! The table of all metrics. What is not in it is not emitted, and what a server does not have is absent, never zero.

mod admission;
mod client;
mod declare;
mod instance;
mod machine;
mod monitoring;
mod namespaces;
mod operations;
mod replication;
mod sharding;
mod storage;

use crate::metric::Metric;

/// Every metric of this crate.
///
/// ```
/// let lag = mongo_monitor::METRICS.iter().find(|metric| metric.name == "mongodb_replica_lag_seconds").unwrap();
/// assert_eq!(lag.labels, ["member"]);
/// ```
pub const METRICS: &[Metric] = &joined::<{ count(ROOMS) }>(ROOMS);

/// What the table is made of, in its order.
const ROOMS: &[&[Metric]] = &[
    instance::METRICS,
    operations::METRICS,
    admission::METRICS,
    storage::METRICS,
    machine::METRICS,
    replication::METRICS,
    namespaces::METRICS,
    sharding::METRICS,
    client::METRICS,
    monitoring::METRICS,
];

const fn count(rooms: &[&[Metric]]) -> usize {
    let (mut room, mut count) = (0, 0);
    while room < rooms.len() {
        count += rooms[room].len();
        room += 1;
    }
    count
}

/// One room behind the other; there must be `N` metrics in them.
const fn joined<const N: usize>(rooms: &[&[Metric]]) -> [Metric; N] {
    let mut all = [rooms[0][0]; N];
    let (mut room, mut at, mut next) = (0, 0, 0);
    while room < rooms.len() {
        while at < rooms[room].len() {
            all[next] = rooms[room][at];
            at += 1;
            next += 1;
        }
        room += 1;
        at = 0;
    }
    all
}

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::metric::{Kind, Source, Unit};

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
