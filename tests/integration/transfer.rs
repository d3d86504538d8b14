//! `mongo_core::transfer` by itself: ranges, scans, writes.

use std::collections::BTreeSet;

use mongo_core::{
    CancellationToken, Deployment, ErrorKind, Namespace,
    bson::{Bson, Document, RawDocumentBuf, Timestamp, doc, rawdoc},
    mongodb::options::WriteConcern,
    transfer::{
        majority::PendingMajority,
        partition::{Key, KeyRange, PartitionSettings, partition},
        scan::{MemoryBudget, ScanSource},
        write::{WriteMode, WriteTarget},
    },
};

use mongo_testkit::TestDeployment;

use crate::{
    awkward,
    support::{fill, open, own, release, shared, stop_followers},
};

async fn read(source: &ScanSource, range: KeyRange) -> Vec<RawDocumentBuf> {
    let mut scan = source.scan(range);
    let mut documents = Vec::new();
    while let Some(batch) = scan.next().await.unwrap() {
        documents.extend(batch.documents().unwrap().map(|document| document.unwrap().to_owned()));
    }
    documents
}

/// Case f.1: at every number of ranges each document is read exactly once; plain range filters lose most of them.
#[tokio::test(flavor = "multi_thread")]
async fn mixed_ids_are_read_exactly_once_at_any_cut() {
    let (_server, deployment) = own().await;
    awkward::write(&deployment).await;
    let namespace: Namespace = "awkward.mixed_ids".parse().unwrap();
    let source = ScanSource::new(deployment.clone(), namespace.clone());
    let all = read(&source, KeyRange::everything()).await;
    assert!(all.len() >= 26, "{}", all.len());
    let keys: Vec<_> = all.iter().map(|document| Key::of(document).unwrap()).collect();
    for step in 1..=3 {
        let bounds: Vec<_> = keys.iter().skip(1).step_by(step).cloned().collect();
        let mut seen = Vec::new();
        let mut lower = None;
        for bound in bounds {
            seen.extend(read(&source, KeyRange::between(lower, Some(bound.clone()))).await);
            lower = Some(bound);
        }
        seen.extend(read(&source, KeyRange::between(lower, None)).await);
        assert_eq!(seen, all, "a bound at every {step}. document");
    }
    let collection = deployment.database("awkward").collection::<Document>("mixed_ids");
    let filtered = collection.count_documents(doc! { "_id": { "$gte": "a" } }).await.unwrap();
    assert!(filtered < 5, "the server brackets types, or this test shows nothing: {filtered}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_compare_as_the_server_sorts_them() {
    let (_server, deployment) = own().await;
    awkward::write(&deployment).await;
    let (random, name) = (fastrand::Rng::with_seed(11), "order");
    let collection = deployment.database(name).collection::<Document>("c");
    let mut random = random;
    for _ in 0..3000 {
        let (small, large) = (random.i32(-20..20), random.i64(..));
        let id: Bson = match random.u8(0..12) {
            0 => small.into(),
            1 => large.into(),
            2 => (f64::from(small) / 4.0).into(),
            3 => f64::from_bits(random.u64(..)).into(),
            4 => Bson::Decimal128(format!("{small}.{}E{}", random.u16(..), small).parse().unwrap()),
            5 => (large as f64).into(),
            6 => doc! { "a": small, "b": "x" }.into(),
            7 => doc! { "b": f64::from(small) }.into(),
            8 => format!("{small} ü").into(),
            9 => mongo_core::bson::Binary {
                subtype: (random.u8(0..2) * 128).into(),
                bytes: vec![random.u8(..); random.usize(0..3)],
            }
            .into(),
            10 => Timestamp { time: random.u32(..), increment: random.u32(..) }.into(),
            _ => mongo_core::bson::DateTime::from_millis(large >> 20).into(),
        };
        // Equal numbers have one place, and the second is refused.
        let _ = collection.insert_one(doc! { "_id": id }).await;
    }
    for namespace in ["order.c", "awkward.mixed_ids"] {
        let source = ScanSource::new(deployment.clone(), namespace.parse().unwrap());
        let all = read(&source, KeyRange::everything()).await;
        let keys: Vec<_> = all.iter().map(|document| Key::of(document).unwrap()).collect();
        for (position, pair) in keys.windows(2).enumerate() {
            let ids = || (pair[0].to_extended_json(), pair[1].to_extended_json());
            assert!(pair[0].compare(&pair[1]).is_lt(), "{namespace}, {position}: {:?}", ids());
            assert!(pair[1].compare(&pair[0]).is_gt(), "{namespace}, {position}: {:?}", ids());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_in_mixed_ids_loses_neither_end() {
    let (server, deployment) = own().await;
    awkward::write(&deployment).await;
    let mut source = ScanSource::new(deployment, "awkward.mixed_ids".parse().unwrap());
    source.average_document_bytes = u32::MAX;
    let all = read(&source, KeyRange::everything()).await;
    // Batches of 16: the first getMore fails, and the scan goes on with `min` at the 16th document.
    let lost = doc! { "failCommands": ["getMore"], "errorCode": 43, "appName": "mongo-core" };
    server.fail_command(0, doc! { "times": 1 }, lost).await.unwrap();
    assert_eq!(read(&source, KeyRange::everything()).await, all);
}

#[tokio::test(flavor = "multi_thread")]
async fn sampled_ranges_cover_a_collection_without_overlap() {
    let (deployment, database) = shared("ranges").await;
    fill(&deployment, &database, "c", 20_000).await;
    let namespace: Namespace = format!("{database}.c").parse().unwrap();
    let settings = PartitionSettings::default().with_target_bytes(150_000);
    let ranges = partition(&deployment, &namespace, (20_000, 3_000_000), settings, None).await.unwrap();
    assert!((10..=20).contains(&ranges.len()), "{} ranges", ranges.len());
    let source = ScanSource::new(deployment, namespace);
    let mut ids = BTreeSet::new();
    let mut largest = 0;
    for range in ranges {
        let documents = read(&source, range).await;
        largest = largest.max(documents.len());
        for document in documents {
            assert!(ids.insert(document.get_i32("_id").unwrap()), "read twice");
        }
    }
    assert_eq!(ids.len(), 20_000);
    assert!(largest < 8_000, "a range of {largest} documents");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_cursor_restarts_at_the_last_key_without_gap_or_repetition() {
    let (server, deployment) = own().await;
    fill(&deployment, "shop", "orders", 10_000).await;
    let mut source = ScanSource::new(deployment, "shop.orders".parse().unwrap());
    source.batch_bytes = 16_000;
    source.average_document_bytes = 160;
    let mut scan = source.scan(KeyRange::everything());
    let mut ids = Vec::new();
    let mut batches = 0;
    while let Some(batch) = scan.next().await.unwrap() {
        ids.extend(batch.documents().unwrap().map(|document| document.unwrap().get_i32("_id").unwrap()));
        batches += 1;
        if batches % 20 == 5 {
            let lost = doc! { "failCommands": ["getMore"], "errorCode": 43, "appName": "mongo-core" };
            server.fail_command(0, doc! { "times": 1 }, lost).await.unwrap();
        }
    }
    assert!(batches > 50, "{batches} batches");
    assert_eq!(ids, (0..10_000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_budget_is_given_back() {
    let (deployment, database) = shared("budget").await;
    fill(&deployment, &database, "c", 5_000).await;
    let mut source = ScanSource::new(deployment, format!("{database}.c").parse().unwrap());
    source.budget = MemoryBudget::new(20 << 20);
    let mut scan = source.scan(KeyRange::everything());
    let batch = scan.next().await.unwrap().unwrap();
    let held = source.budget.in_use();
    assert!(held > 0 && held < 8 << 20, "a batch holds its own size, not the largest possible: {held}");
    drop(batch);
    assert_eq!(source.budget.in_use(), 0);
    while scan.next().await.unwrap().is_some() {}
    assert_eq!(source.budget.in_use(), 0);
}

async fn target(prefix: &str) -> (Deployment, WriteTarget, String) {
    let (deployment, database) = shared(prefix).await;
    let target = WriteTarget::new(deployment.clone(), format!("{database}.c").parse().unwrap());
    (deployment, target, database)
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_documents_are_named_and_the_others_written() {
    let (deployment, target, database) = target("refused").await;
    let indexes = doc! { "createIndexes": "c", "indexes": [{ "key": { "email": 1 }, "name": "email", "unique": true }] };
    deployment.database(&database).run_command(indexes).await.unwrap();
    let documents: Vec<RawDocumentBuf> =
        (0..100).map(|number| rawdoc! { "_id": number % 90, "email": format!("{}@x", number % 80) }).collect();
    let references: Vec<_> = documents.iter().map(AsRef::as_ref).collect();
    let outcome = target.write(&references).await.unwrap();
    assert_eq!((outcome.written, outcome.refused.len()), (80, 20));
    assert!(outcome.refused.iter().all(|refused| refused.code == 11000 && refused.kind == ErrorKind::Rejected));
    assert_eq!(outcome.refused.iter().filter(|refused| refused.is_duplicate_id()).count(), 10);
    assert!(outcome.refused.iter().all(|refused| refused.index >= 80));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_larger_than_a_command_is_split() {
    let (deployment, target, database) = target("split").await;
    let documents: Vec<RawDocumentBuf> =
        (0..50).map(|number| rawdoc! { "_id": number, "filling": "x".repeat(1 << 20) }).collect();
    let references: Vec<_> = documents.iter().map(AsRef::as_ref).collect();
    let outcome = target.write(&references).await.unwrap();
    assert_eq!((outcome.written, outcome.refused.len()), (50, 0));
    assert_eq!(deployment.database(&database).collection::<Document>("c").count_documents(doc! {}).await.unwrap(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn zero_timestamps_survive_every_mode() {
    let (deployment, mut target, database) = target("zero").await;
    let zero = Bson::Timestamp(Timestamp { time: 0, increment: 0 });
    let c = deployment.database(&database).collection::<Document>("c");
    for (mode, id) in [(WriteMode::Insert, 1), (WriteMode::Upsert, 2), (WriteMode::Upsert, 1)] {
        target.mode = mode;
        let document = RawDocumentBuf::try_from(&doc! { "_id": id, "t": zero.clone(), "n": { "t": zero.clone() } }).unwrap();
        let outcome = target.write(&[&document]).await.unwrap();
        assert_eq!(outcome.written, 1);
        assert_eq!(c.find_one(doc! { "_id": id }).await.unwrap().unwrap().get("t"), Some(&zero), "{mode:?}");
    }
    // An insert that meets an existing document changes nothing.
    c.insert_one(doc! { "_id": 3, "mine": true }).await.unwrap();
    target.mode = WriteMode::Insert;
    let document = RawDocumentBuf::try_from(&doc! { "_id": 3, "t": zero }).unwrap();
    let outcome = target.write(&[&document]).await.unwrap();
    assert_eq!((outcome.written, outcome.refused.len()), (0, 1));
    assert_eq!(c.find_one(doc! { "_id": 3 }).await.unwrap().unwrap(), doc! { "_id": 3, "mine": true });
}

fn w1(deployment: &Deployment) -> WriteTarget {
    let mut target = WriteTarget::new(deployment.clone(), "shop.c".parse().unwrap());
    target.write_concern = WriteConcern::nodes(1);
    target
}

#[tokio::test(flavor = "multi_thread")]
async fn pending_writes_are_settled_when_a_majority_holds_them_and_not_before() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let deployment = open(&server).await;
    w1(&deployment).write(&[&rawdoc! { "_id": 0 }]).await.unwrap();
    let followers = stop_followers(&server).await;
    let pending = PendingMajority::new();
    let written = w1(&deployment).write(&[&rawdoc! { "_id": 1 }]).await.unwrap();
    pending.note(written.op_time.unwrap());
    // It looks first and listens to the token then: had a majority the write, it would say so.
    let stopped = CancellationToken::new();
    stopped.cancel();
    assert_eq!(pending.settle(&deployment, &stopped).await.unwrap_err().kind(), ErrorKind::Cancelled);
    release(followers).await;
    pending.settle(&deployment, &CancellationToken::new()).await.unwrap();
    pending.settle(&deployment, &stopped).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pending_writes_of_two_primaries_are_never_settled() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let deployment = open(&server).await;
    let pending = PendingMajority::new();
    let first = w1(&deployment).write(&[&rawdoc! { "_id": 1 }]).await.unwrap().op_time.unwrap();
    pending.note(first);
    server.step_down().await.unwrap();
    server.primary().await.unwrap();
    let deployment = open(&server).await;
    let second = w1(&deployment).write(&[&rawdoc! { "_id": 2 }]).await.unwrap().op_time.unwrap();
    assert!(second.term > first.term && second > first);
    // The second is not noted: what is known of the new primary is all that tells.
    let third = doc! { "insert": "c", "documents": [{ "_id": 3 }], "writeConcern": { "w": "majority" } };
    deployment.database("shop").run_command(third).await.unwrap();
    assert_eq!(pending.settle(&deployment, &CancellationToken::new()).await.unwrap_err().kind(), ErrorKind::Conflict);
    let pending = PendingMajority::new();
    pending.note(first);
    pending.note(second);
    assert_eq!(pending.settle(&deployment, &CancellationToken::new()).await.unwrap_err().kind(), ErrorKind::Conflict);
}
