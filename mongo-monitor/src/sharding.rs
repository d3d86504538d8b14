//! A sharded cluster, as a router shows it.

use std::{collections::BTreeMap, time::Duration};

use mongo_core::{
    Error, ErrorKind, Result,
    bson::{Bson, Document, doc},
    mongodb::{self, Client},
};
use tokio::time::Instant;

use crate::{
    collector::{Collected, number},
    lacking::{Lacking, within},
    reading::{self, Reading, reading},
};

/// Asks a router; of who is none there is nothing to tell. What it does not answer hides nothing else.
pub(crate) async fn read(client: &Client, deadline: Duration) -> Result<Collected> {
    let admin = client.database("admin");
    let hello = within(deadline, admin.run_command(doc! { "hello": 1 }).into_future()).await?;
    if hello.get_str("msg").ok() != Some("isdbgrid") {
        return Ok(Collected::of(Vec::new()));
    }
    let (mut readings, mut lacking) = (Vec::new(), Lacking::default());
    let commands: [(&str, Read); 3] =
        [("balancerStatus", of_balancer), ("listShards", of_shards), ("connPoolStats", of_connections)];
    for (command, read) in commands {
        let asked = admin.run_command(doc! { command: 1 });
        if let Some(answer) = lacking.ask(command, deadline, asked.into_future()).await {
            readings.extend(read(&answer));
        }
    }
    if !lacking.is_enough()
        && let Some(counts) = lacking.ask("config.chunks", deadline, chunks_of_shards(client)).await
    {
        readings.extend(of_chunks(&counts));
    }
    if !lacking.is_enough() {
        readings.extend(documents_of_shards(client, deadline, &mut lacking).await);
    }
    reading::sort(&mut readings);
    Ok(Collected::but(&lacking, readings))
}

/// What is read of an answer.
type Read = fn(&Document) -> Vec<Reading>;

/// Counts the chunks of each shard.
async fn chunks_of_shards(client: &Client) -> mongodb::error::Result<Vec<Document>> {
    let chunks = client.database("config").collection::<Document>("chunks");
    let stages = [doc! { "$group": {
        "_id": "$shard",
        "chunks": { "$sum": 1 },
        "jumbo": { "$sum": { "$cond": [{ "$eq": ["$jumbo", true] }, 1, 0] } },
    } }];
    let mut cursor = chunks.aggregate(stages).await?;
    let mut counts = Vec::new();
    while cursor.advance().await? {
        counts.push(cursor.deserialize_current()?);
    }
    Ok(counts)
}

/// Counts the documents of each shard. Where one database cannot be read no sum is right, so there is none.
async fn documents_of_shards(client: &Client, deadline: Duration, lacking: &mut Lacking) -> Vec<Reading> {
    let begun = Instant::now();
    let listed = lacking.ask("the list of databases", deadline, client.list_database_names().into_future()).await;
    let Some(names) = listed else { return Vec::new() };
    let mut stats = Vec::new();
    for name in names {
        if begun.elapsed() > deadline * 4 {
            let error = Error::new(ErrorKind::Timeout, "there are too many databases");
            lacking.note("the number of documents of each shard", &error, Duration::ZERO);
            return Vec::new();
        }
        let database = client.database(&name);
        let asked = database.run_command(doc! { "dbStats": 1 });
        match lacking.ask(&name, deadline, asked.into_future()).await {
            Some(answer) => stats.push(answer),
            None => return Vec::new(),
        }
    }
    of_documents(&stats)
}

/// An answer of `balancerStatus`.
fn of_balancer(status: &Document) -> Vec<Reading> {
    let enabled = status.get_str("mode").ok().map(|mode| f64::from(u8::from(mode != "off")));
    let running = status.get("inBalancerRound").and_then(number);
    [("mongodb_balancer_enabled", enabled), ("mongodb_balancer_running", running)]
        .into_iter()
        .filter_map(|(name, value)| reading(name, &[], value?))
        .collect()
}

/// An answer of `listShards`. A state of 1 is that of a shard that has been taken up.
fn of_shards(list: &Document) -> Vec<Reading> {
    let shards = list.get_array("shards").into_iter().flatten().filter_map(Bson::as_document);
    let shard = |shard: &Document| {
        let is_taken_up = shard.get("state").and_then(number) == Some(1.0);
        let drains = shard.get_bool("draining").unwrap_or(false);
        let name = shard.get_str("_id").ok()?;
        let state = if drains {
            "draining"
        } else if is_taken_up {
            "active"
        } else {
            "joining"
        };
        Some(
            ["active", "draining", "joining"]
                .map(|each| reading("mongodb_shard_state", &[name, each], f64::from(u8::from(each == state)))),
        )
    };
    shards.filter_map(shard).flatten().flatten().collect()
}

/// An answer of `connPoolStats`: who of the shards can be reached, and the connections to them.
fn of_connections(stats: &Document) -> Vec<Reading> {
    let mut readings = Vec::new();
    let sets = stats.get_document("replicaSets").into_iter().flatten();
    for (set, hosts) in sets.filter_map(|(set, of)| Some((set, of.as_document()?.get_array("hosts").ok()?))) {
        for host in hosts.iter().filter_map(Bson::as_document) {
            let (Ok(address), Some(is_reached)) = (host.get_str("addr"), host.get("ok").and_then(number)) else { continue };
            readings.extend(reading("mongodb_shard_member_up", &[set, address], is_reached));
        }
    }
    let hosts = stats.get_document("hosts").into_iter().flatten();
    for (host, of) in hosts.filter_map(|(host, of)| Some((host, of.as_document()?))) {
        for (field, state) in [("inUse", "in_use"), ("available", "available"), ("refreshing", "refreshing")] {
            let value = of.get(field).and_then(number);
            readings.extend(value.and_then(|value| reading("mongodb_shard_pool_connections", &[host, state], value)));
        }
    }
    readings
}

/// Chunks of each shard, counted in `config.chunks`.
fn of_chunks(counts: &[Document]) -> Vec<Reading> {
    let mut readings = Vec::new();
    for (name, field) in [("mongodb_chunks", "chunks"), ("mongodb_jumbo_chunks", "jumbo")] {
        for count in counts {
            let of = count.get_str("_id").ok().zip(count.get(field).and_then(number));
            readings.extend(of.and_then(|(shard, count)| reading(name, &[shard], count)));
        }
    }
    readings
}

/// Answers of `dbStats` of all databases. Of each shard there is one, by the text that names its set and members.
fn of_documents(stats: &[Document]) -> Vec<Reading> {
    let mut documents: BTreeMap<&str, f64> = BTreeMap::new();
    let of_shards = stats.iter().filter_map(|stats| stats.get_document("raw").ok()).flatten();
    for (shard, stats) in of_shards.filter_map(|(shard, stats)| Some((shard, stats.as_document()?))) {
        let name = shard.split_once('/').map_or(&**shard, |(set, _)| set);
        *documents.entry(name).or_default() += stats.get("objects").and_then(number).unwrap_or(0.0);
    }
    documents.into_iter().filter_map(|(shard, count)| reading("mongodb_shard_documents", &[shard], count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(readings: &[Reading]) -> Vec<(&str, Vec<&str>, f64)> {
        readings.iter().map(|of| (of.metric.name, of.labels.iter().map(String::as_str).collect(), of.as_number())).collect()
    }

    /// Answers in the form that the server's documentation gives them: there is no router to ask where these tests run.
    #[test]
    fn a_router_tells_its_shards_their_members_and_their_chunks() {
        let balancer = of_balancer(&doc! { "mode": "full", "inBalancerRound": false, "numBalancerRounds": 3_i64 });
        assert_eq!(shown(&balancer), [("mongodb_balancer_enabled", vec![], 1.0), ("mongodb_balancer_running", vec![], 0.0)]);
        let shards =
            doc! { "shards": [{ "_id": "a", "host": "a/h:1", "state": 1 }, { "_id": "b", "state": 1, "draining": true }] };
        let states: Vec<_> = of_shards(&shards).into_iter().filter(|of| of.as_number() > 0.0).map(|of| of.labels).collect();
        assert_eq!(states, [["a", "active"], ["b", "draining"]]);
        let pools = doc! {
            "hosts": { "h:1": { "inUse": 2, "available": 3, "refreshing": 0 } },
            "replicaSets": { "a": { "hosts": [{ "addr": "h:1", "ok": true, "ismaster": true }, { "addr": "h:2", "ok": false }] } },
        };
        let connections = of_connections(&pools);
        assert_eq!(
            shown(&connections)[..3],
            [
                ("mongodb_shard_member_up", vec!["a", "h:1"], 1.0),
                ("mongodb_shard_member_up", vec!["a", "h:2"], 0.0),
                ("mongodb_shard_pool_connections", vec!["h:1", "in_use"], 2.0),
            ]
        );
        let stats = |objects: i64| doc! { "raw": { "a/h:1,h:2": { "objects": objects }, "b/h:3": { "objects": 1 } } };
        let documents = of_documents(&[stats(3), stats(4)]);
        assert_eq!(shown(&documents), [("mongodb_shard_documents", vec!["a"], 7.0), ("mongodb_shard_documents", vec!["b"], 2.0)]);
        let chunks = of_chunks(&[doc! { "_id": "a", "chunks": 5, "jumbo": 1 }, doc! { "_id": "b", "chunks": 7_i64, "jumbo": 0 }]);
        assert_eq!(shown(&chunks)[1..3], [("mongodb_chunks", vec!["b"], 7.0), ("mongodb_jumbo_chunks", vec!["a"], 1.0)]);
    }
}
