//! Operations that are under way, and those that have been for long.

use std::{collections::BTreeMap, time::Duration};

use mongo_core::{
    Result,
    bson::{Bson, Document, doc},
    mongodb::Client,
};
use serde::Serialize;

use crate::{
    collector::Collected,
    reading::{Reading, reading},
    table::is_on_collection,
};

/// An operation that has been under way for longer than [`slow_operation`](crate::MonitorSettings::slow_operation).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SlowOperation {
    /// Its number, as `killOp` takes it; through a router with the name of the shard.
    pub opid: String,
    /// What it is: `query`, `insert`, `update`, `remove`, `getmore` or `command`.
    pub op: String,
    /// The collection that it works on.
    pub namespace: String,
    /// For how long it has been under way, in seconds.
    pub running_seconds: f64,
    /// The application, as its connection names itself.
    pub application: Option<String>,
    /// Host and port of the client.
    pub client: Option<String>,
    /// How documents are found, as `COLLSCAN` or `IXSCAN { a: 1 }`.
    pub plan: Option<String>,
    /// Whether it waits for a lock.
    pub waits_for_lock: bool,
    /// The command: its fields, with `?` in place of all values but the collection, unless the settings ask for them.
    pub command: Document,
}

/// Asks for what is under way, but for what only waits by its nature.
pub(crate) async fn read(client: &Client, slow: Duration, with_values: bool, own_name: &str) -> Result<Collected> {
    let slow_micros = i64::try_from(slow.as_micros()).unwrap_or(i64::MAX);
    let pipeline = [
        doc! { "$currentOp": { "allUsers": true, "idleConnections": false, "idleSessions": false } },
        doc! { "$match": {
            "active": true,
            // Threads of the server itself.
            "op": { "$ne": "none" },
            "appName": { "$ne": own_name },
            // These wait for something to happen: a change of the topology, or the next entry of an oplog or a stream.
            "command.hello": { "$exists": false },
            "command.isMaster": { "$exists": false },
            "command.ismaster": { "$exists": false },
            "cursor.awaitData": { "$ne": true },
        } },
        doc! { "$sort": { "microsecs_running": -1 } },
        doc! { "$limit": OPERATIONS },
        doc! { "$project": {
            "opid": 1, "op": 1, "ns": 1, "microsecs_running": 1, "waitingForLock": 1, "appName": 1, "client": 1, "planSummary": 1,
            "queue": "$currentQueue.name",
            "command": { "$cond": [{ "$gte": ["$microsecs_running", slow_micros] }, "$command", "$$REMOVE"] },
        } },
    ];
    let mut cursor = client.database("admin").aggregate(pipeline).await?;
    let mut operations = Vec::new();
    while cursor.advance().await? {
        operations.push(cursor.deserialize_current()?);
    }
    let slow_operations = operations.iter().filter_map(|operation| slow_operation(operation, with_values)).take(SLOW).collect();
    Ok(Collected { slow_operations, ..Collected::of(readings(&operations)) })
}

fn readings(operations: &[Document]) -> Vec<Reading> {
    // All kinds, also those of which there are none now: that there are none is known.
    let mut kinds: BTreeMap<&str, (f64, f64)> = KINDS.into_iter().map(|kind| (kind, (0.0, 0.0))).collect();
    let mut plans: BTreeMap<&str, f64> = PLANS.into_iter().map(|plan| (plan, 0.0)).collect();
    let mut queues: BTreeMap<&str, f64> = BTreeMap::new();
    let mut waiting = 0.0;
    for operation in operations {
        if let Ok(summary) = operation.get_str("planSummary") {
            let is = |prefix: &str| summary.starts_with(prefix);
            let plan = if is("COLLSCAN") {
                "collscan"
            } else if is("IXSCAN") || is("IDHACK") {
                "ixscan"
            } else {
                "other"
            };
            *plans.entry(plan).or_default() += 1.0;
        }
        if let Ok(queue) = operation.get_str("queue") {
            *queues.entry(queue).or_default() += 1.0;
        }
        if let Some((count, oldest)) = operation.get_str("op").ok().and_then(|op| kinds.get_mut(op)) {
            *count += 1.0;
            *oldest = oldest.max(running(operation).unwrap_or(0.0));
        }
        waiting += f64::from(u8::from(operation.get_bool("waitingForLock").unwrap_or(false)));
    }
    let active = kinds.iter().filter_map(|(kind, (count, _))| reading("mongodb_currentop_active", &[kind], *count));
    let oldest = kinds.iter().filter_map(|(kind, (_, oldest))| reading("mongodb_currentop_oldest_seconds", &[kind], *oldest));
    let plans = plans.iter().filter_map(|(plan, count)| reading("mongodb_currentop_plans", &[plan], *count));
    let queues = queues.iter().filter_map(|(queue, count)| reading("mongodb_currentop_queued", &[queue], *count));
    active.chain(oldest).chain(reading("mongodb_currentop_waiting_lock", &[], waiting)).chain(plans).chain(queues).collect()
}

fn running(operation: &Document) -> Option<f64> {
    let micros = operation.get("microsecs_running").and_then(|micros| micros.as_i64().or(micros.as_i32().map(i64::from)))?;
    #[expect(clippy::cast_precision_loss, reason = "microseconds of an operation")]
    Some(micros as f64 / 1e6)
}

/// An operation whose command came along: that is so for slow ones only.
fn slow_operation(operation: &Document, with_values: bool) -> Option<SlowOperation> {
    let command = operation.get_document("command").ok()?;
    let text = |name: &str| operation.get_str(name).ok().map(str::to_owned);
    Some(SlowOperation {
        opid: match operation.get("opid")? {
            Bson::String(opid) => opid.clone(),
            opid => opid.to_string(),
        },
        op: text("op")?,
        namespace: text("ns").unwrap_or_default(),
        running_seconds: running(operation)?,
        application: text("appName"),
        client: text("client"),
        plan: text("planSummary"),
        waits_for_lock: operation.get_bool("waitingForLock").unwrap_or(false),
        command: if with_values { command.clone() } else { shape_of(command) },
    })
}

/// A command without its values: what it does can be seen, and nobody's data.
fn shape_of(command: &Document) -> Document {
    let fields = command.iter().filter(|(name, _)| !OF_NO_INTEREST.contains(&name.as_str())).enumerate();
    let shape = fields.map(|(position, (name, value))| {
        // The first field of a command names it, and holds its collection.
        let is_name = (position == 0 && is_on_collection(name) || name == "$db") && matches!(value, Bson::String(_));
        (name.clone(), if is_name { value.clone() } else { shape(value) })
    });
    shape.collect()
}

fn shape(value: &Bson) -> Bson {
    match value {
        Bson::Document(fields) => Bson::Document(fields.iter().map(|(name, value)| (name.clone(), shape(value))).collect()),
        // A list of a thousand values has the shape of its first.
        Bson::Array(values) => Bson::Array(match values.iter().all(|value| matches!(value, Bson::Document(_))) {
            true => values.iter().take(STAGES).map(shape).collect(),
            false => values.first().map(shape).into_iter().collect(),
        }),
        _ => Bson::String("?".to_owned()),
    }
}

const KINDS: [&str; 6] = ["query", "insert", "update", "remove", "getmore", "command"];
const PLANS: [&str; 3] = ["collscan", "ixscan", "other"];
const OF_NO_INTEREST: [&str; 5] = ["lsid", "$clusterTime", "txnNumber", "$readPreference", "apiVersion"];
const OPERATIONS: i32 = 1000;
const SLOW: usize = 50;
const STAGES: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_without_anybodys_data() {
        let command = doc! {
            "aggregate": "orders",
            "pipeline": [{ "$match": { "email": "ada@example.org", "n": { "$in": [1, 2, 3] } } }, { "$out": "copy" }],
            "lsid": { "id": 1 },
            "let": { "secret": 5 },
            "$db": "shop",
        };
        let expected = doc! {
            "aggregate": "orders",
            "pipeline": [{ "$match": { "email": "?", "n": { "$in": ["?"] } } }, { "$out": "?" }],
            "let": { "secret": "?" },
            "$db": "shop",
        };
        assert_eq!(shape_of(&command), expected);
        assert_eq!(shape_of(&doc! { "usersInfo": "ada@example.org" }), doc! { "usersInfo": "?" });
        assert_eq!(shape_of(&doc! { "getMore": 77_i64, "collection": "o" }), doc! { "getMore": "?", "collection": "?" });
    }

    #[test]
    fn kinds_of_which_there_are_none_are_zero_and_not_absent() {
        let operation =
            doc! { "op": "query", "microsecs_running": 12_500_000_i64, "waitingForLock": true, "planSummary": "IXSCAN { a: 1 }" };
        let readings = readings(&[operation, doc! { "op": "odd" }]);
        let number = |name: &str, labels: &[&str]| {
            let found = readings.iter().find(|reading| reading.metric.name == name && reading.labels.iter().eq(labels.iter()));
            found.unwrap().as_number()
        };
        assert_eq!(number("mongodb_currentop_active", &["query"]), 1.0);
        assert_eq!(number("mongodb_currentop_oldest_seconds", &["query"]), 12.5);
        assert_eq!(number("mongodb_currentop_oldest_seconds", &["update"]), 0.0);
        assert_eq!(number("mongodb_currentop_waiting_lock", &[]), 1.0);
        assert_eq!(number("mongodb_currentop_plans", &["ixscan"]), 1.0);
        assert_eq!(number("mongodb_currentop_plans", &["collscan"]), 0.0);
    }
}
