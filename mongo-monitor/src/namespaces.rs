//! Databases and collections: how large they are, and what is done with them.
//!
//! All of this costs the server more the more collections there are, so it is rationed. Who is busiest is asked of `top`, in one command. Sizes are asked of one collection
//! at a time, those that are shown and the others in turn, for a hundredth of a second a look: of ten thousand collections some are known
//! after the first look and all after some days. And of all that is known only the first of it are shown, those that are busiest, then those that are largest.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mongo_core::{
    Result,
    bson::{Bson, Document, doc},
    mongodb::{self, Client},
};
use tokio::time::Instant;

use crate::{
    collector::{Collected, number},
    lacking::{Lacking, within},
    monitor::MonitorSettings,
    reading::{self, Reading, reading},
};

/// What is known of the databases and collections of a member.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    databases: BTreeMap<String, Database>,
    collections: BTreeMap<Name, Collection>,
    /// Who is asked next of those whose turn it is.
    next_database: Option<String>,
    /// How often it was looked.
    look: u64,
    /// What may not be read.
    forbidden: BTreeSet<String>,
}

/// Database and collection.
type Name = (String, String);

#[derive(Debug, Default)]
struct Database {
    sizes: Vec<Size>,
    objects: Option<f64>,
}

#[derive(Debug, Default)]
struct Collection {
    sizes: Vec<Size>,
    objects: Option<f64>,
    /// In which look; 0 for none.
    measured: u64,
    /// By kind of operation, how many there were and how many microseconds they took.
    done: Vec<(&'static str, f64, f64)>,
    /// How many microseconds operations took, lately more than formerly.
    busy: f64,
}

type Size = (&'static str, f64);

impl Collection {
    fn bytes(&self) -> f64 {
        self.sizes.iter().find(|(kind, _)| *kind == "storage").map_or(0.0, |(_, bytes)| *bytes)
    }

    fn took(&self) -> f64 {
        self.done.iter().map(|(_, _, micros)| micros).sum()
    }
}

impl Namespaces {
    /// # Cancel safety
    /// What is known stays, and is a mixture of older and newer.
    pub(crate) async fn read(&mut self, client: &Client, settings: &MonitorSettings) -> Result<Collected> {
        let mut lacking = Lacking::knowing(self.forbidden.clone());
        self.look_who_is_there(client, settings.deadline, &mut lacking).await?;
        let begun = Instant::now();
        let is_router = match top(client, settings.deadline).await {
            Ok(totals) => {
                lacking.may_read(BUSIEST);
                self.take_totals(&totals);
                false
            }
            // A router has none, and of a collection it has one size for each shard: those are told by shard.
            Err(error) if error.server_code() == Some(COMMAND_NOT_FOUND) => true,
            Err(error) => {
                lacking.note(BUSIEST, &error, begun.elapsed());
                false
            }
        };
        let filesystem = self.measure_databases(client, settings, &mut lacking).await;
        let shown = if is_router { Vec::new() } else { self.measure_collections(client, settings, &mut lacking).await };
        let mut readings = self.of_databases(settings.namespaces, &filesystem);
        readings.extend(self.of_collections(&shown));
        for name in &shown {
            if lacking.is_enough() {
                break;
            }
            let asked = index_uses(client, name);
            let uses = lacking.ask(&format!("{INDEXES}{}.{}", name.0, name.1), settings.deadline, asked).await;
            readings.extend(uses.into_iter().flatten());
        }
        self.forbidden = lacking.forbidden().clone();
        reading::sort(&mut readings);
        Ok(Collected::but(&lacking, readings))
    }

    async fn look_who_is_there(&mut self, client: &Client, deadline: Duration, lacking: &mut Lacking) -> Result<()> {
        let listed = client.list_database_names().authorized_databases(true);
        let names: BTreeSet<String> = within(deadline, listed.into_future()).await?.into_iter().collect();
        let mut collections = BTreeSet::new();
        for database in names.iter().filter(|name| !SYSTEM.contains(&name.as_str())) {
            let listed = match lacking.is_enough() {
                true => None,
                false => lacking.ask(&format!("the list of {database}"), deadline, collections_of(client, database)).await,
            };
            match listed {
                Some(listed) => collections.extend(listed.into_iter().map(|name| (database.clone(), name))),
                // What is known of it goes on being known.
                None => collections.extend(self.collections.keys().filter(|(of, _)| of == database).cloned()),
            }
        }
        self.databases.retain(|name, _| names.contains(name));
        for name in names {
            self.databases.entry(name).or_default();
        }
        self.collections.retain(|name, _| collections.contains(name));
        for name in collections {
            self.collections.entry(name).or_default();
        }
        let (databases, collections) = (&self.databases, &self.collections);
        lacking.forget_but(|what| match what.strip_prefix(INDEXES).unwrap_or(what).split_once('.') {
            Some((database, name)) => collections.contains_key(&(database.to_owned(), name.to_owned())),
            // What has a blank in it is no name of a database.
            None => what.contains(' ') || databases.contains_key(what),
        });
        Ok(())
    }

    /// Takes in an answer of `top`.
    fn take_totals(&mut self, totals: &Document) {
        for ((database, name), collection) in &mut self.collections {
            let Ok(total) = totals.get_document(format!("{database}.{name}")) else { continue };
            let before = collection.took();
            let known = OPERATIONS.iter().filter_map(|(theirs, ours)| {
                let of = total.get_document(theirs).ok()?;
                Some((*ours, number(of.get("count")?)?, number(of.get("time")?)?))
            });
            // A collection that was not known before has done all it did just now, or at any time: that is no matter.
            collection.done = known.collect();
            let grown = (collection.took() - before).max(0.0);
            collection.busy = collection.busy / 2.0 + grown;
        }
    }

    /// The sizes of the databases whose turn it is; gives that of the file system.
    async fn measure_databases(&mut self, client: &Client, settings: &MonitorSettings, lacking: &mut Lacking) -> Vec<Size> {
        let turn = in_turn(self.databases.keys(), self.next_database.as_ref());
        let (begun, mut filesystem) = (Instant::now(), Vec::new());
        for name in turn {
            // Also what may not be read takes its time.
            if begun.elapsed() >= RATION || lacking.is_enough() {
                break;
            }
            let database = client.database(&name);
            let asked = database.run_command(doc! { "dbStats": 1 });
            self.next_database = Some(name.clone());
            let Some(stats) = lacking.ask(&name, settings.deadline, asked.into_future()).await else { continue };
            let database = self.databases.entry(name.clone()).or_default();
            database.sizes = sizes(&stats, &[("dataSize", "data"), ("storageSize", "storage"), ("indexSize", "index")]);
            database.objects = stats.get("objects").and_then(number);
            filesystem = sizes(&stats, &[("fsUsedSize", "used"), ("fsTotalSize", "total")]);
        }
        filesystem
    }

    /// The sizes of the collections that are shown and of those whose turn it is; gives the former.
    async fn measure_collections(&mut self, client: &Client, settings: &MonitorSettings, lacking: &mut Lacking) -> Vec<Name> {
        let mut order: Vec<&Name> = self.collections.keys().collect();
        order.sort_by(|one, other| {
            let (one, other) = (&self.collections[*one], &self.collections[*other]);
            other.busy.total_cmp(&one.busy).then(other.bytes().total_cmp(&one.bytes()))
        });
        let others = order.split_off(settings.namespaces.min(order.len()));
        let shown: Vec<Name> = order.into_iter().cloned().collect();
        self.look += 1;
        let begun = Instant::now();
        for name in &self.whose_turn(&shown, others.into_iter().cloned().collect()) {
            if begun.elapsed() >= RATION || lacking.is_enough() {
                break;
            }
            let stages = [
                doc! { "$collStats": { "storageStats": {} } },
                doc! { "$project": {
                    "count": "$storageStats.count", "data": "$storageStats.size", "storage": "$storageStats.storageSize",
                    "index": "$storageStats.totalIndexSize", "free": "$storageStats.freeStorageSize",
                } },
            ];
            let asked = first(client, name, stages);
            let Some(stats) = lacking.ask(&format!("{}.{}", name.0, name.1), settings.deadline, asked).await else { continue };
            let Some(collection) = self.collections.get_mut(name) else { continue };
            let kinds = [("data", "data"), ("storage", "storage"), ("index", "index"), ("free", "free")];
            collection.sizes = sizes(&stats, &kinds);
            collection.objects = stats.get("count").and_then(number);
            collection.measured = self.look;
        }
        shown
    }

    /// In which order sizes are asked for: first those that are shown and not known yet, then in turn one of the others and one that is shown; of each those first that are known for
    /// longest.
    fn whose_turn(&self, shown: &[Name], mut others: Vec<Name>) -> Vec<Name> {
        let measured = |name: &Name| self.collections.get(name).map_or(0, |collection| collection.measured);
        others.sort_by_key(measured);
        let mut shown = shown.to_vec();
        shown.sort_by_key(measured);
        let known = shown.split_off(shown.partition_point(|name| measured(name) == 0));
        let (mut others, mut known) = (others.into_iter(), known.into_iter());
        let mut turn = shown;
        loop {
            let (other, one) = (others.next(), known.next());
            if other.is_none() && one.is_none() {
                return turn;
            }
            turn.extend(other.into_iter().chain(one));
        }
    }

    fn of_databases(&self, most: usize, filesystem: &[Size]) -> Vec<Reading> {
        let mut largest: Vec<(&String, &Database)> = self.databases.iter().collect();
        let bytes = |database: &Database| database.sizes.iter().map(|(_, bytes)| bytes).sum::<f64>();
        largest.sort_by(|(_, one), (_, other)| bytes(other).total_cmp(&bytes(one)));
        let mut readings = Vec::new();
        for (name, database) in largest.into_iter().take(most) {
            for (kind, bytes) in &database.sizes {
                readings.extend(reading("mongodb_database_bytes", &[name, kind], *bytes));
            }
            readings.extend(database.objects.and_then(|objects| reading("mongodb_database_documents", &[name], objects)));
        }
        readings.extend(filesystem.iter().filter_map(|(kind, bytes)| reading("mongodb_filesystem_bytes", &[kind], *bytes)));
        let theirs = self.databases.iter().filter(|(name, _)| !SYSTEM.contains(&name.as_str()));
        // Before all have been asked it is not known.
        let documents: Option<f64> = theirs.map(|(_, database)| database.objects).sum();
        readings.extend(documents.and_then(|documents| reading("mongodb_stored_documents", &[], documents)));
        for (kind, count) in [("database", self.databases.len()), ("collection", self.collections.len())] {
            #[expect(clippy::cast_precision_loss, reason = "a count of collections")]
            readings.extend(reading("mongodb_namespaces", &[kind], count as f64));
        }
        readings
    }

    fn of_collections(&self, shown: &[Name]) -> Vec<Reading> {
        let mut readings = Vec::new();
        for name in shown {
            let Some(collection) = self.collections.get(name) else { continue };
            let (database, name) = (&*name.0, &*name.1);
            for (kind, bytes) in &collection.sizes {
                readings.extend(reading("mongodb_collection_bytes", &[database, name, kind], *bytes));
            }
            let objects =
                collection.objects.and_then(|objects| reading("mongodb_collection_documents", &[database, name], objects));
            readings.extend(objects);
            for (op, count, micros) in &collection.done {
                readings.extend(reading("mongodb_collection_operations_total", &[database, name, op], *count));
                readings.extend(reading("mongodb_collection_operation_seconds_total", &[database, name, op], micros / 1e6));
            }
        }
        readings
    }
}

/// What the server did with each collection since it was started.
async fn top(client: &Client, deadline: Duration) -> Result<Document> {
    let admin = client.database("admin");
    let mut answer = within(deadline, admin.run_command(doc! { "top": 1 }).into_future()).await?;
    match answer.remove("totals") {
        Some(Bson::Document(totals)) => Ok(totals),
        _ => Ok(Document::new()),
    }
}

/// The collections of a database that hold data.
async fn collections_of(client: &Client, database: &str) -> mongodb::error::Result<Vec<String>> {
    let found = doc! { "listCollections": 1, "nameOnly": true, "authorizedCollections": true };
    let mut cursor = client.database(database).run_cursor_command(found).await?;
    let mut names = Vec::new();
    while cursor.advance().await? {
        let collection = cursor.deserialize_current()?;
        let (Ok(name), kind) = (collection.get_str("name"), collection.get_str("type").ok()) else { continue };
        if kind == Some("collection") && (!name.starts_with("system.") || name.starts_with("system.buckets.")) {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// How often each index of a collection was used since the server was started.
async fn index_uses(client: &Client, name: &Name) -> mongodb::error::Result<Vec<Reading>> {
    let collection = client.database(&name.0).collection::<Document>(&name.1);
    let stages = [doc! { "$indexStats": {} }, doc! { "$project": { "name": 1, "uses": "$accesses.ops" } }];
    let mut cursor = collection.aggregate(stages).await?;
    let mut readings = Vec::new();
    while cursor.advance().await? {
        let index = cursor.deserialize_current()?;
        let uses = index.get_str("name").ok().zip(index.get("uses").and_then(number));
        readings.extend(uses.and_then(|(index, uses)| reading("mongodb_index_accesses_total", &[&name.0, &name.1, index], uses)));
    }
    Ok(readings)
}

async fn first<const N: usize>(client: &Client, name: &Name, stages: [Document; N]) -> mongodb::error::Result<Document> {
    let mut cursor = client.database(&name.0).collection::<Document>(&name.1).aggregate(stages).await?;
    Ok(if cursor.advance().await? { cursor.deserialize_current()? } else { Document::new() })
}

/// All names, beginning after the one that was last.
fn in_turn<'a, T: Ord + Clone + 'a>(names: impl Iterator<Item = &'a T>, last: Option<&T>) -> Vec<T> {
    let (mut later, mut earlier) = (Vec::new(), Vec::new());
    for name in names {
        if last.is_none_or(|last| name > last) { &mut later } else { &mut earlier }.push(name.clone());
    }
    later.append(&mut earlier);
    later
}

fn sizes(stats: &Document, fields: &[(&str, &'static str)]) -> Vec<Size> {
    fields.iter().filter_map(|(field, kind)| Some((*kind, stats.get(field).and_then(number)?))).collect()
}

/// What is in these is the server's own.
const SYSTEM: [&str; 3] = ["admin", "config", "local"];
/// How `top` names operations, and how they are named elsewhere.
const OPERATIONS: [(&str, &str); 6] = [
    ("queries", "query"),
    ("getmore", "getmore"),
    ("insert", "insert"),
    ("update", "update"),
    ("remove", "remove"),
    ("commands", "command"),
];
/// How what is told of a collection's indexes begins.
const INDEXES: &str = "indexes of ";
/// How what `top` tells is named.
const BUSIEST: &str = "which collections are busiest";
const COMMAND_NOT_FOUND: i32 = 59;
/// How long sizes are asked for, of databases and of collections, each.
const RATION: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn known(names: &[&str]) -> Namespaces {
        let collections = names.iter().map(|name| (("shop".to_owned(), (*name).to_owned()), Collection::default()));
        Namespaces { collections: collections.collect(), ..Namespaces::default() }
    }

    fn busy(namespaces: &Namespaces, name: &str) -> f64 {
        namespaces.collections[&("shop".to_owned(), name.to_owned())].busy
    }

    #[test]
    fn who_was_busy_once_makes_room_for_who_is_busy_now() {
        let mut namespaces = known(&["a", "b"]);
        let totals = |a: i64, b: i64| {
            let total = |micros: i64| doc! { "queries": { "count": 1, "time": micros }, "note": "no operation" };
            doc! { "note": "all times in microseconds", "shop.a": total(a), "shop.b": total(b) }
        };
        namespaces.take_totals(&totals(1000, 0));
        assert!(busy(&namespaces, "a") > busy(&namespaces, "b"));
        for round in 1..=4 {
            namespaces.take_totals(&totals(1000, round * 100));
        }
        assert!(busy(&namespaces, "a") < busy(&namespaces, "b"));
        // The server began anew: what it has done since is little, and not less than nothing.
        namespaces.take_totals(&totals(0, 5));
        assert!(busy(&namespaces, "a") >= 0.0);
    }

    #[test]
    fn sizes_of_what_is_shown_and_not_known_come_first_and_then_everybody_in_turn() {
        let mut namespaces = known(&["a", "b", "c", "d", "e"]);
        let name = |name: &str| ("shop".to_owned(), name.to_owned());
        for (of, look) in [("a", 3), ("b", 0), ("c", 5), ("d", 1), ("e", 0)] {
            namespaces.collections.get_mut(&name(of)).unwrap().measured = look;
        }
        let turn = namespaces.whose_turn(&[name("a"), name("b")], vec![name("c"), name("d"), name("e")]);
        assert_eq!(turn, ["b", "e", "a", "d", "c"].map(name));
    }

    #[test]
    fn everybody_has_a_turn_also_when_names_come_and_go() {
        let names = ["a", "b", "c", "d"];
        assert_eq!(in_turn(names.iter(), None), names);
        assert_eq!(in_turn(names.iter(), Some(&"b")), ["c", "d", "a", "b"]);
        assert_eq!(in_turn(["a", "d"].iter(), Some(&"b")), ["d", "a"]);
        assert_eq!(in_turn(names.iter(), Some(&"d")), names);
    }
}
