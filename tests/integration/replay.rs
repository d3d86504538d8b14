//! Applying what an oplog tells.

use std::sync::Arc;

use mongo_core::{
    CancellationToken, Deployment, ErrorKind,
    bson::{Document, RawDocumentBuf, Timestamp, doc, rawdoc},
    transfer::{
        oplog::{Action, Effect, Entry, Operation, Oplog, OplogRead, Transactions},
        replay::{ApplyPath, Missing, Replay, ReplaySettings, ReplayTarget, ReplayTotals},
    },
};
use mongo_testkit::TestDeployment;

use crate::{
    support::{data_hash, mark, open, own},
    workload::Workload,
};

/// The entries of a deployment from a position on.
async fn entries(deployment: &Deployment, from: Timestamp) -> Vec<RawDocumentBuf> {
    let oplog = Oplog::of(deployment).unwrap();
    let mut scan = oplog.read(from, oplog.newest().await.unwrap());
    let mut all = Vec::new();
    loop {
        match scan.next().await.unwrap() {
            OplogRead::Entries(batch) => all.extend(batch.documents().unwrap().map(|entry| entry.unwrap().to_owned())),
            OplogRead::End => return all,
            other => panic!("{other:?}"),
        }
    }
}

struct Replayed {
    totals: ReplayTotals,
    missing: Vec<Missing>,
}

/// Applies the operations on one database to another.
async fn replay(entries: &[RawDocumentBuf], from: &str, to: (&Deployment, &str), settings: ReplaySettings) -> Replayed {
    let mut replay = Replay::open(to.0, settings, CancellationToken::new()).await.unwrap();
    let mut transactions = Transactions::new(1 << 10);
    for entry in entries {
        let push = |operation: &Operation<'_>| {
            let collection = operation.namespace.strip_prefix(&format!("{from}."))?;
            Some(Arc::new(ReplayTarget::new(format!("{}.{collection}", to.1).parse().unwrap())))
        };
        match transactions.take(&Entry::parse(entry).unwrap()).unwrap() {
            Effect::One(operation) => {
                if let Some(target) = push(&operation) {
                    replay.push(&target, &operation).await.unwrap();
                }
            }
            Effect::Many(mut group) => {
                while let Some(carried) = group.next_carried().unwrap() {
                    for action in carried.actions().unwrap() {
                        if let Action::Operation(operation) = action
                            && let Some(target) = push(&operation)
                        {
                            replay.push(&target, &operation).await.unwrap();
                        }
                    }
                }
            }
            _ => {}
        }
    }
    let (totals, missing) = replay.finish().await.unwrap();
    Replayed { totals, missing }
}

fn by(path: ApplyPath) -> ReplaySettings {
    let mut settings = ReplaySettings::default();
    settings.path = Some(path);
    settings.batch_operations = 50;
    settings
}

async fn make(deployment: &Deployment, database: &str, workload: &Workload) {
    for collection in workload.collections() {
        deployment.database(database).create_collection(collection).await.unwrap();
    }
}

async fn every_path_agrees(version: &str, paths: &[ApplyPath]) {
    let server = TestDeployment::replica_set(1).version(version).start().await.unwrap();
    let source = open(&server).await;
    for seed in 0..3 {
        let from = format!("source_{seed}");
        let mut workload = Workload::new(&source, &from, seed);
        workload.begin().await;
        let start = mark(&source).await;
        workload.run(600).await;
        mark(&source).await;
        let entries = entries(&source, start).await;
        let expected = data_hash(&source, &from).await;
        assert_eq!(expected.len(), 3);
        for path in paths {
            let to = format!("{path:?}_{seed}").to_lowercase();
            make(&source, &to, &workload).await;
            let replayed = replay(&entries, &from, (&source, &to), by(*path)).await;
            assert!(replayed.missing.is_empty() && replayed.totals.operations > 400, "{version} {path:?} {:?}", replayed.totals);
            assert_eq!(data_hash(&source, &to).await, expected, "{version} {path:?} seed {seed}");
            // Once more, and from the middle: nothing changes.
            replay(&entries[entries.len() / 2..], &from, (&source, &to), by(*path)).await;
            assert_eq!(data_hash(&source, &to).await, expected, "{version} {path:?} seed {seed}, again");
        }
    }
}

#[tokio::test]
async fn every_way_to_apply_an_update_gives_the_same_bytes() {
    every_path_agrees("6.0", &[ApplyPath::ApplyOps, ApplyPath::Pipelines, ApplyPath::Ourselves]).await;
}

#[tokio::test]
async fn updates_of_older_servers_are_applied_as_well() {
    every_path_agrees("5.0", &[ApplyPath::ApplyOps, ApplyPath::Ourselves]).await;
    every_path_agrees("4.4", &[ApplyPath::Ourselves]).await;
}

/// New documents go by a command of their own, together with what is done to them within the batch.
#[tokio::test]
async fn inserts_take_the_place_of_what_is_there_and_what_is_done_to_them_is_not_lost() {
    let (_server, source) = own().await;
    let start = mark(&source).await;
    let orders = source.database("from").collection::<Document>("orders");
    orders.insert_many((0..40).map(|id| doc! { "_id": id, "n": 0, "list": [1, 2] })).await.unwrap();
    orders.update_many(doc! { "_id": { "$lt": 20 } }, doc! { "$set": { "list.1": "two", "later": true } }).await.unwrap();
    orders.delete_many(doc! { "_id": { "$mod": [5, 0] } }).await.unwrap();
    orders.insert_many((0..10).map(|id| doc! { "_id": id * 5, "n": "anew" })).await.unwrap();
    mark(&source).await;
    let mut entries = entries(&source, start).await;
    let expected = data_hash(&source, "from").await;
    // Where a client inserts it, most servers put the time in its place.
    let now = mark(&source).await;
    let odd = rawdoc! { "_id": "odd", "when": Timestamp { time: 0, increment: 0 } };
    entries.push(rawdoc! { "op": "i", "ns": "from.orders", "o": odd.clone(), "ts": now, "t": 1_i64, "v": 2_i64 });
    for path in [ApplyPath::ApplyOps, ApplyPath::Pipelines, ApplyPath::Ourselves] {
        for lanes in [1, 3] {
            let to = format!("{path:?}_{lanes}").to_lowercase();
            let there = source.database(&to).collection::<Document>("orders");
            there.insert_many((0..40).step_by(3).map(|id| doc! { "_id": id, "from": "before" })).await.unwrap();
            let mut settings = by(path);
            settings.batch_operations = 500;
            settings.lanes = lanes.try_into().unwrap();
            for _ in 0..2 {
                let replayed = replay(&entries, "from", (&source, &to), settings.clone()).await;
                assert!(replayed.missing.is_empty(), "{path:?} {:?}", replayed.missing);
                let there = there.clone_with_type::<RawDocumentBuf>();
                let found = there.find_one_and_delete(doc! { "_id": "odd" }).await.unwrap();
                assert_eq!(found.as_ref(), Some(&odd), "{path:?}, {lanes} lanes");
                assert_eq!(data_hash(&source, &to).await, expected, "{path:?}, {lanes} lanes");
            }
        }
    }
}

/// Reference f 25: the oplog tells it in several entries, and its operations do not stay in memory.
#[tokio::test]
async fn a_transaction_of_more_than_16_mib_is_applied_whole() {
    let (_server, source) = own().await;
    let before = || (0..10).map(|id| doc! { "_id": id, "n": 0 });
    let papers = source.database("from").collection::<Document>("papers");
    papers.insert_many(before()).await.unwrap();
    let start = mark(&source).await;
    let mut session = source.client().start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    for id in 10..34 {
        let paper = doc! { "_id": id, "text": id.to_string().repeat(500_000) };
        papers.insert_one(paper).session(&mut session).await.unwrap();
    }
    papers.update_many(doc! {}, doc! { "$set": { "n": 1 } }).session(&mut session).await.unwrap();
    papers.delete_one(doc! { "_id": 0 }).session(&mut session).await.unwrap();
    session.commit_transaction().await.unwrap();
    mark(&source).await;
    let entries = entries(&source, start).await;
    let of_transaction = |entry: &&RawDocumentBuf| entry.as_bytes().len() > 1 << 20 && entry.get_document("o").is_ok();
    let told: Vec<usize> = entries.iter().filter(of_transaction).map(|entry| entry.as_bytes().len()).collect();
    assert!(told.len() > 1 && told.iter().sum::<usize>() > 16 << 20, "{told:?}");
    let expected = data_hash(&source, "from").await;
    for path in [ApplyPath::ApplyOps, ApplyPath::Pipelines, ApplyPath::Ourselves] {
        let to = format!("{path:?}").to_lowercase();
        source.database(&to).collection::<Document>("papers").insert_many(before()).await.unwrap();
        let replayed = replay(&entries, "from", (&source, &to), by(path)).await;
        assert!(replayed.missing.is_empty(), "{path:?} {:?}", replayed.missing);
        assert_eq!(data_hash(&source, &to).await, expected, "{path:?}");
    }
}

#[tokio::test]
async fn a_way_that_the_target_does_not_have_is_refused() {
    let server = TestDeployment::replica_set(1).version("5.0").start().await.unwrap();
    let target = open(&server).await;
    let error = Replay::open(&target, by(ApplyPath::Pipelines), CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let chosen = Replay::open(&target, ReplaySettings::default(), CancellationToken::new()).await.unwrap();
    assert_eq!(chosen.path(), ApplyPath::ApplyOps);
}

/// Rule 24: an update of a missing document is in order if the document goes, or comes anew, later.
#[tokio::test]
async fn an_update_of_a_missing_document_is_noted_until_it_is_deleted_or_inserted() {
    let (_server, target) = own().await;
    for path in [ApplyPath::ApplyOps, ApplyPath::Pipelines, ApplyPath::Ourselves] {
        let name = format!("ledger_{path:?}").to_lowercase();
        target.database(&name).create_collection("c").await.unwrap();
        let operation = |op: &str, id: i32| {
            let (o, o2) = match op {
                "u" => (rawdoc! { "$v": 2, "diff": { "u": { "a": 1 } } }, rawdoc! { "_id": id }),
                _ => (rawdoc! { "_id": id, "whole": true }, rawdoc! {}),
            };
            rawdoc! { "op": op, "ns": "from.c", "o": o, "o2": o2, "ts": Timestamp { time: 1, increment: 1 } }
        };
        let entries = [
            operation("u", 1),
            operation("u", 2),
            operation("u", 3),
            operation("u", 1),
            operation("d", 1),
            operation("i", 2),
            operation("u", 2),
        ];
        let mut settings = by(path);
        settings.batch_operations = 2;
        let replayed = replay(&entries, "from", (&target, &name), settings).await;
        let missing: Vec<String> = replayed.missing.iter().map(|missing| missing.id.to_extended_json()).collect();
        assert_eq!(missing, [r#"{"$numberInt":"3"}"#], "{path:?}");
        let left: Vec<Document> = {
            use futures_util::TryStreamExt as _;
            target.database(&name).collection("c").find(doc! {}).await.unwrap().try_collect().await.unwrap()
        };
        assert_eq!(left, [doc! { "_id": 2, "whole": true, "a": 1 }], "{path:?}: never half a document");
    }
}

/// The order of a capped collection is part of its content, and so are updates of what is in it.
#[tokio::test]
async fn updates_of_a_capped_collection_are_applied_in_their_place() {
    use futures_util::TryStreamExt as _;
    let (_server, target) = own().await;
    for path in [ApplyPath::ApplyOps, ApplyPath::Pipelines, ApplyPath::Ourselves] {
        let name = format!("capped_{path:?}").to_lowercase();
        let database = target.database(&name);
        database.run_command(doc! { "create": "c", "capped": true, "size": 1 << 20 }).await.unwrap();
        let collection = database.collection::<Document>("c");
        collection.insert_many((1..4).map(|id| doc! { "_id": id, "v": "a" })).await.unwrap();
        let operation = |op: &str, o: RawDocumentBuf, id: i32| {
            rawdoc! { "op": op, "ns": "from.c", "o": o, "o2": { "_id": id }, "ts": Timestamp { time: 1, increment: 1 } }
        };
        let entries = [
            operation("u", rawdoc! { "_id": 2, "v": "b" }, 2),
            operation("i", rawdoc! { "_id": 1, "v": "a" }, 1),
            operation("u", rawdoc! { "$v": 2, "diff": { "u": { "v": "c" } } }, 3),
            operation("i", rawdoc! { "_id": 4, "v": "d" }, 4),
            operation("u", rawdoc! { "_id": 9, "v": "gone" }, 9),
        ];
        let mut replay = Replay::open(&target, by(path), CancellationToken::new()).await.unwrap();
        let mut capped = ReplayTarget::new(format!("{name}.c").parse().unwrap());
        capped.in_order = true;
        let capped = Arc::new(capped);
        for entry in &entries {
            let Some(Action::Operation(operation)) = Action::parse(entry).unwrap() else { panic!() };
            replay.push(&capped, &operation).await.unwrap();
        }
        let (_, missing) = replay.finish().await.unwrap();
        assert!(missing.is_empty(), "{path:?}: what was dropped at the beginning need not be there");
        let all: Vec<Document> =
            collection.find(doc! {}).sort(doc! { "$natural": 1 }).await.unwrap().try_collect().await.unwrap();
        let values: Vec<&str> = all.iter().map(|document| document.get_str("v").unwrap()).collect();
        assert_eq!(values, ["a", "b", "c", "d"], "{path:?}");
    }
}
