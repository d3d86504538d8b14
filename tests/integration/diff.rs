//! B20: what two snapshots do not have in common, down to the `_id`.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use mongo_backup::{
    ArchiveSink, Backup, Diff, DiffReport, DocumentChange, IdRange, Key, MemoryArchive, ObjectMeta, ObjectName, Presence,
    PutMode, PutOutcome, Repository, Restore, RestoreMode, SnapshotChoice, SnapshotId,
};
use mongo_core::{
    Deployment, ErrorKind, NamespaceSelection, Result,
    bson::{Document, RawDocument, RawDocumentBuf, doc},
};

use crate::support::{fill, shared};

async fn snapshot(deployment: &Deployment, repository: &Repository, database: &str) -> SnapshotId {
    Backup::builder(deployment, repository).namespaces(&format!("{database}.*")).build().unwrap().run().await.unwrap().id
}

/// `_id`s of one kind of change, as numbers.
fn ids(report: &DiffReport, change: DocumentChange) -> BTreeSet<i64> {
    let listed = report.namespaces.iter().flat_map(|namespace| &namespace.listed).filter(|document| document.change == change);
    listed.map(|document| document.id.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_document_that_differs_is_named_and_no_other() {
    let (deployment, database) = shared("diff").await;
    fill(&deployment, &database, "c", 30_000).await;
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    let before = snapshot(&deployment, &repository, &database).await;
    let collection = deployment.database(&database).collection::<Document>("c");
    let mut random = fastrand::Rng::with_seed(3);
    let mut pick = |count: usize| -> BTreeSet<i64> { (0..count).map(|_| random.i64(0..30_000)).collect() };
    let (changed, mut removed) = (pick(60), pick(40));
    removed.retain(|id| !changed.contains(id));
    // Some scattered between the others, some behind the end.
    let added: BTreeSet<i64> = (30_000..30_700).collect();
    collection
        .update_many(doc! { "_id": { "$in": changed.iter().collect::<Vec<_>>() } }, doc! { "$set": { "new": 1 } })
        .await
        .unwrap();
    collection.delete_many(doc! { "_id": { "$in": removed.iter().collect::<Vec<_>>() } }).await.unwrap();
    collection.insert_many(added.iter().map(|id| doc! { "_id": *id, "x": "y".repeat(100) })).await.unwrap();
    let after = snapshot(&deployment, &repository, &database).await;

    let report = Diff::new(&repository, &before, &after).list(10_000).run().await.unwrap();
    let [namespace] = report.namespaces.as_slice() else { panic!("{report:?}") };
    assert_eq!((namespace.presence, namespace.definition_changed), (Presence::Both, false));
    assert_eq!(ids(&report, DocumentChange::Changed), changed);
    assert_eq!(ids(&report, DocumentChange::Removed), removed);
    assert_eq!(ids(&report, DocumentChange::Added), added);
    assert_eq!(
        (namespace.added, namespace.removed, namespace.changed),
        (added.len() as u64, removed.len() as u64, changed.len() as u64)
    );
    let back = Diff::new(&repository, &after, &before).list(10_000).run().await.unwrap();
    assert_eq!(ids(&back, DocumentChange::Added), removed);
    assert_eq!(ids(&back, DocumentChange::Removed), added);
    let short = Diff::new(&repository, &before, SnapshotChoice::Latest).list(7).run().await.unwrap();
    assert_eq!((short.namespaces[0].listed.len(), short.namespaces[0].added), (7, added.len() as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_that_came_went_or_changed_their_definition_are_told() {
    let (deployment, database) = shared("diff_names").await;
    for name in ["gone", "same", "indexed", "emptied"] {
        fill(&deployment, &database, name, 300).await;
    }
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    let before = snapshot(&deployment, &repository, &database).await;
    let handle = deployment.database(&database);
    handle.collection::<RawDocumentBuf>("gone").drop().await.unwrap();
    handle.collection::<RawDocumentBuf>("emptied").delete_many(doc! {}).await.unwrap();
    let index = doc! { "createIndexes": "indexed", "indexes": [{ "key": { "group": 1 }, "name": "group_1" }] };
    handle.run_command(index).await.unwrap();
    fill(&deployment, &database, "new", 20).await;
    let after = snapshot(&deployment, &repository, &database).await;

    let report = Diff::new(&repository, &before, &after).run().await.unwrap();
    let told: Vec<_> = report
        .namespaces
        .iter()
        .map(|found| {
            (found.namespace.collection(), found.presence, found.definition_changed, found.added, found.removed, found.changed)
        })
        .collect();
    assert_eq!(
        told,
        [
            ("emptied", Presence::Both, false, 0, 300, 0),
            ("gone", Presence::Removed, false, 0, 300, 0),
            ("indexed", Presence::Both, true, 0, 0, 0),
            ("new", Presence::Added, false, 20, 0, 0),
        ]
    );
    let only = NamespaceSelection::all().including(&format!("{database}.new")).unwrap();
    assert_eq!(Diff::new(&repository, &before, &after).selection(only).run().await.unwrap().namespaces.len(), 1);
    let nothing = NamespaceSelection::all().including("no.such").unwrap();
    let error = Diff::new(&repository, &before, &after).selection(nothing).run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

/// Counts the objects that are read.
#[derive(Debug)]
struct Counting(MemoryArchive, Arc<AtomicU64>);

#[async_trait]
impl ArchiveSink for Counting {
    fn describe(&self) -> String {
        self.0.describe()
    }
    async fn put(&self, name: &ObjectName, bytes: Bytes, mode: PutMode) -> Result<PutOutcome> {
        self.0.put(name, bytes, mode).await
    }
    async fn get(&self, name: &ObjectName, range: Option<std::ops::Range<u64>>) -> Result<Bytes> {
        self.1.fetch_add(1, SeqCst);
        self.0.get(name, range).await
    }
    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list(prefix)
    }
    async fn delete(&self, name: &ObjectName) -> Result<()> {
        self.0.delete(name).await
    }
    async fn head(&self, name: &ObjectName) -> Result<ObjectMeta> {
        self.0.head(name).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_equal_snapshots_cost_two_objects_and_a_small_change_few() {
    let (deployment, database) = shared("diff_cost").await;
    fill(&deployment, &database, "c", 60_000).await;
    let reads = Arc::new(AtomicU64::new(0));
    let repository =
        Repository::open_or_init(Counting(MemoryArchive::new(), Arc::clone(&reads)), Key::unencrypted()).await.unwrap();
    let first = snapshot(&deployment, &repository, &database).await;
    let second = snapshot(&deployment, &repository, &database).await;
    reads.store(0, SeqCst);
    assert!(Diff::new(&repository, &first, &second).run().await.unwrap().is_empty());
    assert_eq!(reads.load(SeqCst), 2, "the two manifests");

    let collection = deployment.database(&database).collection::<Document>("c");
    collection.update_one(doc! { "_id": 31_000 }, doc! { "$set": { "new": 1 } }).await.unwrap();
    let third = snapshot(&deployment, &repository, &database).await;
    reads.store(0, SeqCst);
    let report = Diff::new(&repository, &second, &third).run().await.unwrap();
    assert_eq!(ids(&report, DocumentChange::Changed), BTreeSet::from([31_000]));
    // The indexes, and on each side: a manifest, a node and a segment of the catalog, the nodes and one segment of the collection.
    // As a rule sixteen; how high a tree is depends on the random key of its repository.
    assert!(reads.load(SeqCst) <= 24, "{} reads", reads.load(SeqCst));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_document_or_a_range_is_restored_without_reading_the_rest() {
    let (deployment, database) = shared("one").await;
    fill(&deployment, &database, "c", 60_000).await;
    let reads = Arc::new(AtomicU64::new(0));
    let repository =
        Repository::open_or_init(Counting(MemoryArchive::new(), Arc::clone(&reads)), Key::unencrypted()).await.unwrap();
    let snapshot = snapshot(&deployment, &repository, &database).await;
    let collection = deployment.database(&database).collection::<Document>("c");
    let lost = collection.find_one_and_delete(doc! { "_id": 31_000 }).await.unwrap().unwrap();
    collection.delete_many(doc! { "_id": { "$gte": 40_000, "$lte": 40_499 } }).await.unwrap();
    let restore = |range: IdRange| {
        let pattern = format!("{database}.c");
        let builder = Restore::builder(&repository, &snapshot).into(&deployment).namespaces(&pattern).mode(RestoreMode::Insert);
        builder.ids(range).build().unwrap()
    };
    reads.store(0, SeqCst);
    // A double finds the document whose `_id` is an equal integer, as it does on the server.
    let report = restore(IdRange::one(31_000.0).unwrap()).run().await.unwrap();
    assert_eq!((report.documents, report.refused), (1, 0));
    assert_eq!(collection.find_one(doc! { "_id": 31_000 }).await.unwrap(), Some(lost));
    // The index, the manifest, the catalog, two or three nodes and one segment.
    assert!(reads.load(SeqCst) <= 16, "{} reads", reads.load(SeqCst));

    let report = restore(IdRange::between(Some(40_000.into()), Some(40_499.into())).unwrap()).run().await.unwrap();
    assert_eq!((report.documents, report.refused), (500, 0));
    assert_eq!(collection.count_documents(doc! {}).await.unwrap(), 60_000);
    let nothing = restore(IdRange::one("no such document").unwrap()).run().await.unwrap();
    assert_eq!(nothing.documents, 0);

    let even = |document: &RawDocument| document.get_i32("_id").is_ok_and(|id| id % 2 == 0);
    let target = format!("{database}_even");
    let filtered = Restore::builder(&repository, &snapshot)
        .into(&deployment)
        .rename(&format!("{database}.*"), &format!("{target}.*"))
        .filter(Arc::new(even))
        .build()
        .unwrap();
    assert_eq!(filtered.run().await.unwrap().documents, 30_000);
    let everything = Restore::builder(&repository, &snapshot).into(&deployment).ids(IdRange::one(1).unwrap());
    fill(&deployment, &database, "d", 1).await;
    self::snapshot(&deployment, &repository, &database).await;
    let of_two = Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment).ids(IdRange::one(1).unwrap());
    assert!(everything.build().is_ok());
    assert_eq!(of_two.build().unwrap().plan().await.unwrap_err().kind(), ErrorKind::InvalidInput);
}
