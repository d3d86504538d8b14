//! Any second: capturing the oplog, and restoring a point in time.

use std::{collections::BTreeMap, time::Duration};

use mongo_backup::{
    Backup, Capture, CaptureReport, CaptureSettings, Key, MemoryArchive, Repository, Restore, RestorePoint, SnapshotChoice,
};
use mongo_core::{
    CancellationToken, Deployment, ErrorKind, Result,
    bson::{Document, Timestamp, doc},
    mongodb::{
        IndexModel,
        options::{IndexOptions, TimeseriesOptions, ValidationLevel},
    },
};
use tokio::task::JoinHandle;

use crate::{
    support::{Fingerprint, data_hash, differing, fill, fingerprints, mark, own, own_of},
    workload::Workload,
};

/// A capture that runs beside a test.
pub(crate) struct Capturing {
    stop: CancellationToken,
    running: JoinHandle<Result<CaptureReport>>,
}

impl Capturing {
    pub(crate) fn start(deployment: &Deployment, repository: &Repository) -> Self {
        let stop = CancellationToken::new();
        let mut settings = CaptureSettings::default();
        settings.every = Duration::from_millis(100);
        settings.poll = Duration::from_millis(20);
        let builder = Capture::builder(deployment, repository).settings(settings).cancellation(stop.clone());
        let capture = builder.build().unwrap();
        Self { stop, running: tokio::spawn(async move { capture.run().await }) }
    }

    pub(crate) async fn stop(self) -> CaptureReport {
        self.stop.cancel();
        self.running.await.unwrap().unwrap()
    }
}

pub(crate) async fn repository() -> Repository {
    Repository::open_or_init(MemoryArchive::new(), Key::host([3; 32])).await.unwrap()
}

/// A position, and everything as it was there.
struct Moment {
    position: Timestamp,
    state: BTreeMap<String, Fingerprint>,
}

async fn moment(deployment: &Deployment, databases: &[&str]) -> Moment {
    let position = mark(deployment).await;
    Moment { position, state: fingerprints(deployment, databases).await }
}

#[tokio::test]
async fn every_position_is_restored_as_it_was() {
    let (_server, source) = own().await;
    let (_other, target) = own().await;
    let repository = repository().await;
    for seed in 0..2 {
        let name = format!("shop_{seed}");
        let mut workload = Workload::new(&source, &name, seed);
        workload.begin().await;
        workload.run(200).await;
        let capturing = Capturing::start(&source, &repository);
        Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
        let mut moments = Vec::new();
        for _ in 0..6 {
            workload.run(120).await;
            let position = mark(&source).await;
            moments.push((position, data_hash(&source, &name).await));
        }
        let report = capturing.stop().await;
        assert!(report.gaps.is_empty() && report.slices > 1 && report.until >= moments.last().unwrap().0, "{report:?}");
        for (position, expected) in moments {
            let restore = Restore::builder(&repository, SnapshotChoice::Latest)
                .into(&target)
                .namespaces(&format!("{name}.*"))
                .rename(&format!("{name}.*"), &format!("at_{}_{}.*", position.time, position.increment))
                .at(RestorePoint::Position(position));
            let report = restore.build().unwrap().run().await.unwrap();
            assert!(report.is_complete(), "{report:?}");
            assert!(report.point.unwrap() <= position);
            let restored = data_hash(&target, &format!("at_{}_{}", position.time, position.increment)).await;
            assert_eq!(restored, expected, "seed {seed} at {position:?}");
        }
    }
}

#[tokio::test]
async fn definitions_are_restored_as_they_were_at_every_position() {
    storm_of_definitions("6.0").await;
}

#[tokio::test]
async fn definitions_of_older_servers_are_restored_as_they_were_at_every_position() {
    for version in ["4.4", "5.0"] {
        storm_of_definitions(version).await;
    }
}

/// Reference f 26, and rules 15 and 17 to 23, as far as the version knows them.
async fn storm_of_definitions(version: &str) {
    let (has_time_series, has_clustered) = (version > "4.4", version > "5.0");
    let (_server, source) = own_of(version).await;
    let repository = repository().await;
    let (a, b) = (source.database("a"), source.database("b"));
    let databases = ["a", "b", "c"];
    fill(&source, "a", "kept", 300).await;
    fill(&source, "a", "renamed", 300).await;
    fill(&source, "a", "dropped", 300).await;
    fill(&source, "a", "target", 10).await;
    fill(&source, "a", "across", 50).await;
    fill(&source, "a", "to_cap", 50).await;
    fill(&source, "c", "whole", 50).await;
    a.create_collection("view").view_on("kept").pipeline(vec![doc! { "$match": { "group": 1 } }]).await.unwrap();
    let collection = |name: &str| a.collection::<Document>(name);
    let index = |key: Document| IndexModel::builder().keys(key).build();
    collection("kept").create_index(index(doc! { "group": 1 })).await.unwrap();
    collection("kept").create_index(index(doc! { "text": -1 })).await.unwrap();
    let seconds = TimeseriesOptions::builder().time_field("t").meta_field("m".to_owned()).build();
    if has_time_series {
        a.create_collection("old_series").timeseries(seconds.clone()).await.unwrap();
        a.collection::<Document>("old_series")
            .insert_one(doc! { "t": mongo_core::bson::DateTime::from_millis(0), "m": 1, "v": 1 })
            .await
            .unwrap();
    }

    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let capturing = Capturing::start(&source, &repository);
    let mut moments = vec![moment(&source, &databases).await];
    let rename = |from: &str, to: &str, drop: bool| {
        let admin = source.database("admin");
        let command = doc! { "renameCollection": from, "to": to, "dropTarget": drop };
        async move { admin.run_command(command).await.unwrap() }
    };

    // Renamed, made anew under the old name, and over another.
    rename("a.renamed", "a.elsewhere", false).await;
    fill(&source, "a", "renamed", 20).await;
    collection("elsewhere").update_many(doc! {}, doc! { "$set": { "moved": true } }).await.unwrap();
    rename("a.elsewhere", "a.target", true).await;
    collection("target").create_index(index(doc! { "moved": 1 })).await.unwrap();
    moments.push(moment(&source, &databases).await);

    // Dropped and made anew with other options; across databases; capped.
    collection("dropped").drop().await.unwrap();
    moments.push(moment(&source, &databases).await);
    a.create_collection("dropped")
        .validator(doc! { "x": { "$gt": 0 } })
        .validation_level(ValidationLevel::Moderate)
        .await
        .unwrap();
    collection("dropped").insert_one(doc! { "_id": 1, "x": 1 }).await.unwrap();
    rename("a.across", "b.across", false).await;
    a.run_command(doc! { "convertToCapped": "to_cap", "size": 1 << 20 }).await.unwrap();
    for number in 100..140 {
        collection("to_cap").insert_one(doc! { "_id": number, "later": true }).await.unwrap();
    }
    moments.push(moment(&source, &databases).await);

    // Indexes: on what is empty and what is not, changed, dropped, and one that fails.
    let options = IndexOptions::builder().expire_after(Duration::from_secs(1_000_000_000)).name("ttl".to_owned()).build();
    collection("kept").create_index(IndexModel::builder().keys(doc! { "when": 1 }).options(options).build()).await.unwrap();
    a.create_collection("empty").await.unwrap();
    let unique = IndexOptions::builder().unique(true).build();
    collection("empty").create_index(IndexModel::builder().keys(doc! { "u": 1 }).options(unique.clone()).build()).await.unwrap();
    collection("kept").create_index(IndexModel::builder().keys(doc! { "group": -1 }).options(unique).build()).await.unwrap_err();
    let change = |change: Document| {
        let a = a.clone();
        async move { a.run_command(change).await.unwrap() }
    };
    change(doc! { "collMod": "kept", "index": { "name": "ttl", "expireAfterSeconds": 1_500_000_000 } }).await;
    change(doc! { "collMod": "kept", "index": { "keyPattern": { "group": 1 }, "hidden": true } }).await;
    collection("kept").drop_index("text_-1").await.unwrap();
    change(doc! { "collMod": "kept", "validator": { "group": { "$gte": 0 } } }).await;
    change(doc! { "collMod": "view", "viewOn": "kept", "pipeline": [{ "$match": { "group": 2 } }] }).await;
    moments.push(moment(&source, &databases).await);

    // Kinds of collections.
    if has_time_series {
        a.create_collection("series").timeseries(seconds).await.unwrap();
        let measured =
            |number: i64| doc! { "t": mongo_core::bson::DateTime::from_millis(number * 60_000), "m": number % 3, "v": number };
        a.collection("series").insert_many((0..50).map(measured)).await.unwrap();
        a.collection::<Document>("series").create_index(index(doc! { "m": 1, "t": -1 })).await.unwrap();
        a.collection("old_series").insert_many((0..50).map(measured)).await.unwrap();
        change(doc! { "collMod": "old_series", "timeseries": { "granularity": "minutes" } }).await;
    }
    if has_clustered {
        change(doc! { "create": "clustered", "clusteredIndex": { "key": { "_id": 1 }, "unique": true } }).await;
        collection("clustered").insert_one(doc! { "_id": 5 }).await.unwrap();
    }
    a.create_collection("capped").capped(true).size(4096).max(5).await.unwrap();
    for number in 0..20 {
        collection("capped").insert_one(doc! { "_id": 19 - number }).await.unwrap();
    }
    a.create_collection("collated")
        .collation(
            mongo_core::mongodb::options::Collation::builder()
                .locale("fr")
                .strength(mongo_core::mongodb::options::CollationStrength::Primary)
                .build(),
        )
        .await
        .unwrap();
    collection("collated").insert_one(doc! { "_id": "a" }).await.unwrap();
    collection("collated").update_one(doc! { "_id": "A" }, doc! { "$set": { "x": 1 } }).await.unwrap();
    collection("collated").create_index(index(doc! { "x": 1 })).await.unwrap();
    moments.push(moment(&source, &databases).await);

    // What is unique: made so step by step, and exchanged within a transaction.
    collection("exchanged").insert_many([doc! { "_id": "a", "k": 1 }, doc! { "_id": "b", "k": 2 }]).await.unwrap();
    let by_k = doc! { "keyPattern": { "k": 1 } };
    let step = |name: &str, value: bool| {
        let mut index = by_k.clone();
        index.insert(name, value);
        doc! { "collMod": "exchanged", "index": index }
    };
    if has_clustered {
        collection("exchanged").create_index(index(doc! { "k": 1 })).await.unwrap();
        change(step("prepareUnique", true)).await;
        moments.push(moment(&source, &databases).await);
        change(step("unique", true)).await;
    } else {
        let unique = IndexOptions::builder().unique(true).build();
        collection("exchanged").create_index(IndexModel::builder().keys(doc! { "k": 1 }).options(unique).build()).await.unwrap();
    }
    let mut session = source.client().start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    for (id, k) in [("a", 0), ("b", 1), ("a", 2)] {
        let set = doc! { "$set": { "k": k } };
        collection("exchanged").update_one(doc! { "_id": id }, set).session(&mut session).await.unwrap();
    }
    session.commit_transaction().await.unwrap();
    moments.push(moment(&source, &databases).await);

    // By an aggregation, in a transaction, and a database dropped and made anew.
    let cursor = collection("kept").aggregate([doc! { "$match": { "group": 3 } }, doc! { "$out": "selected" }]).await.unwrap();
    drop(cursor);
    let mut session = source.client().start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    let made = doc! { "createIndexes": "in_transaction", "indexes": [{ "key": { "n": 1 }, "name": "n" }] };
    a.run_command(made).session(&mut session).await.unwrap();
    collection("in_transaction").insert_one(doc! { "_id": 1 }).session(&mut session).await.unwrap();
    collection("kept").delete_many(doc! { "group": 4 }).session(&mut session).await.unwrap();
    session.commit_transaction().await.unwrap();
    collection("series").drop().await.unwrap();
    source.database("c").drop().await.unwrap();
    fill(&source, "c", "anew", 7).await;
    a.collection::<Document>("view").drop().await.unwrap();
    b.create_collection("other_view").view_on("across").pipeline(Vec::<Document>::new()).await.unwrap();
    moments.push(moment(&source, &databases).await);
    capturing.stop().await;

    let (_other, target) = own_of(version).await;
    for (number, moment) in moments.iter_mut().enumerate() {
        for database in databases {
            target.database(database).drop().await.unwrap();
        }
        let restore =
            Restore::builder(&repository, SnapshotChoice::Latest).into(&target).at(RestorePoint::Position(moment.position));
        let report = restore.build().unwrap().run().await.unwrap();
        assert!(report.is_complete(), "{version}, {number}: {report:?}");
        let mut restored = fingerprints(&target, &databases).await;
        if version < "6.0" {
            // Older servers put the fields of an index definition into an order of their own.
            let both = moment.state.values_mut().chain(restored.values_mut());
            both.for_each(Fingerprint::forget_order_in_indexes);
        }
        let differing: Vec<_> = differing(&moment.state, &restored);
        for name in &differing {
            eprintln!("{name} {:#?} {:#?}", moment.state.get(name), restored.get(name));
        }
        assert!(differing.is_empty(), "{version}, moment {number}: {differing:?}");
    }
}

#[tokio::test]
async fn a_point_that_was_not_captured_is_refused_and_the_nearest_are_named() {
    let (_server, source) = own().await;
    let repository = repository().await;
    fill(&source, "shop", "orders", 100).await;
    let snapshot = Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let capturing = Capturing::start(&source, &repository);
    fill(&source, "shop", "more", 100).await;
    let end = mark(&source).await;
    let until = capturing.stop().await.until;
    assert!(until >= end);
    let listed = repository.snapshots().await.unwrap().snapshots;
    assert_eq!(repository.reach(&listed[0]).await.unwrap(), Some(until));
    for (point, beyond) in [(until.time + 10, true), (1_000_000, false)] {
        let restore = Restore::builder(&repository, SnapshotChoice::Latest).into(&source).rename("shop", "copy");
        let error = restore.at(RestorePoint::Second(point)).build().unwrap().run().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        let nearest = if beyond { format!("{}:{}", until.time, until.increment) } else { "nearest".to_owned() };
        assert!(error.to_string().contains(&nearest), "{error}");
    }
    let restore = Restore::builder(&repository, snapshot.id).into(&source).rename("shop", "copy");
    let report = restore.at(RestorePoint::Second(until.time)).build().unwrap().run().await.unwrap();
    assert_eq!(report.point, Some(until));
    assert_eq!(data_hash(&source, "copy").await, data_hash(&source, "shop").await);
}

/// A capped collection forgets its oldest documents while it is read, and what it forgot must not come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_capped_collection_that_overflows_while_it_is_read_is_restored_in_order() {
    for version in ["4.4", "6.0"] {
        let (_server, source) = own_of(version).await;
        let repository = repository().await;
        let log = source.database("shop").collection::<Document>("log");
        source.database("shop").run_command(doc! { "create": "log", "capped": true, "size": 1 << 20, "max": 60 }).await.unwrap();
        let stop = CancellationToken::new();
        let writing = tokio::spawn({
            let (log, stop) = (log.clone(), stop.clone());
            async move {
                for number in 0.. {
                    if stop.is_cancelled() {
                        break;
                    }
                    log.insert_one(doc! { "_id": number, "text": "x".repeat(100) }).await.unwrap();
                }
            }
        });
        let capturing = Capturing::start(&source, &repository);
        while log.estimated_document_count().await.unwrap() < 60 {
            tokio::task::yield_now().await;
        }
        for _ in 0..4 {
            Backup::builder(&source, &repository).namespaces("shop.*").build().unwrap().run().await.unwrap();
        }
        stop.cancel();
        writing.await.unwrap();
        let moment = moment(&source, &["shop"]).await;
        capturing.stop().await;
        for snapshot in repository.snapshots().await.unwrap().snapshots {
            source.database("shop").drop().await.unwrap();
            // As it was when it had just been read: the newest sixty, in order, and no older one between them.
            let early = RestorePoint::Position(snapshot.consistent_from().unwrap());
            let restore = Restore::builder(&repository, snapshot.id.clone()).into(&source).at(early);
            restore.build().unwrap().run().await.unwrap();
            let numbers: Vec<i32> = {
                use futures_util::TryStreamExt as _;
                let all: Vec<Document> =
                    log.find(doc! {}).sort(doc! { "$natural": 1 }).await.unwrap().try_collect().await.unwrap();
                all.iter().map(|document| document.get_i32("_id").unwrap()).collect()
            };
            let last = *numbers.last().unwrap();
            assert_eq!(numbers, ((last - 59).max(0)..=last).collect::<Vec<_>>(), "{version}");
            source.database("shop").drop().await.unwrap();
            let restore = Restore::builder(&repository, snapshot.id).into(&source).at(RestorePoint::Position(moment.position));
            assert!(restore.build().unwrap().run().await.unwrap().is_complete());
            let restored = fingerprints(&source, &["shop"]).await;
            assert!(differing(&moment.state, &restored).is_empty(), "{version}: {:#?} {restored:#?}", moment.state);
        }
    }
}
