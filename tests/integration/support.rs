//! Helpers of the integration tests.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::{Command, Output},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use mongo_core::{
    ConnectOptions, Deployment,
    bson::{Document, RawDocumentBuf, Timestamp, doc, rawdoc},
    connect,
    mongodb::{
        Client, Database,
        options::{Acknowledgment, WriteConcern},
    },
    transfer::oplog::Oplog,
};
use mongo_testkit::TestDeployment;
use tokio::task::JoinHandle;

/// Connects to a test deployment.
pub(crate) async fn open(server: &TestDeployment) -> Deployment {
    // Short, so that a test that kills the server does not wait half a minute for the answer.
    let options = ConnectOptions::from_uri(server.uri()).unwrap().with_server_selection_timeout(Duration::from_secs(10));
    connect(options).await.unwrap()
}

/// The server that tests share, and a database of this test's own on it.
pub(crate) async fn shared(prefix: &str) -> (Deployment, String) {
    let server = mongo_testkit::shared().await.unwrap();
    (open(server).await, mongo_testkit::unique_name(prefix))
}

/// A one-member replica set for a test that backs up everything or breaks something.
pub(crate) async fn own() -> (TestDeployment, Deployment) {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let deployment = open(&server).await;
    (server, deployment)
}

/// The same of another version than usual.
pub(crate) async fn own_of(version: &str) -> (TestDeployment, Deployment) {
    let server = TestDeployment::replica_set(1).version(version).start().await.unwrap();
    let deployment = open(&server).await;
    (server, deployment)
}

/// Waits until the server has an operation under way that matches, while `work` is not finished.
pub(crate) async fn under_way<T>(client: &Client, operation: Document, work: &JoinHandle<T>) {
    let pipeline = [doc! { "$currentOp": {} }, doc! { "$match": operation }];
    loop {
        let operations = client.database("admin").aggregate(pipeline.clone()).await.unwrap();
        if !operations.try_collect::<Vec<_>>().await.unwrap().is_empty() {
            return;
        }
        assert!(!work.is_finished(), "the work did not wait for the operation");
        tokio::task::yield_now().await;
    }
}

/// Keeps every secondary of a replica set from applying what the primary writes, until they are released.
pub(crate) async fn stop_followers(server: &TestDeployment) -> Vec<Database> {
    let primary = server.primary().await.unwrap();
    let mut stopped = Vec::new();
    for (_, member) in server.members().iter().enumerate().filter(|(index, _)| *index != primary) {
        let admin = member.client().await.unwrap().database("admin");
        let stop = doc! { "configureFailPoint": "rsSyncApplyStop", "mode": "alwaysOn" };
        let before = admin.run_command(stop).await.unwrap().get_i32("count").unwrap();
        let entered = doc! { "waitForFailPoint": "rsSyncApplyStop", "timesEntered": i64::from(before + 1), "maxTimeMS": 20_000 };
        admin.run_command(entered).await.unwrap();
        stopped.push(admin);
    }
    stopped
}

/// Lets followers follow again.
pub(crate) async fn release(followers: Vec<Database>) {
    for admin in followers {
        admin.run_command(doc! { "configureFailPoint": "rsSyncApplyStop", "mode": "off" }).await.unwrap();
    }
}

/// The position of a note, behind which everything is new.
pub(crate) async fn mark(deployment: &Deployment) -> Timestamp {
    let note = doc! { "appendOplogNote": 1, "data": { "msg": "a test begins" } };
    let reply = deployment.database("admin").run_command(note).await.unwrap();
    let position = reply.get_timestamp("operationTime").unwrap();
    while Oplog::of(deployment).unwrap().newest().await.unwrap() < position {
        tokio::task::yield_now().await;
    }
    position
}

/// Waits until all that was written is on each of so many members.
pub(crate) async fn replicated(deployment: &Deployment, members: u32) {
    let everywhere = WriteConcern::builder().w(Acknowledgment::Nodes(members)).build();
    let marks = deployment.database("mark").collection::<Document>("marks");
    marks.insert_one(doc! {}).write_concern(everywhere).await.unwrap();
}

/// Numbered documents in `database.collection`.
pub(crate) async fn fill(deployment: &Deployment, database: &str, collection: &str, documents: i32) {
    let collection = deployment.database(database).collection::<RawDocumentBuf>(collection);
    for start in (0..documents).step_by(5000) {
        let batch = (start..(start + 5000).min(documents))
            .map(|number| rawdoc! { "_id": number, "text": format!("document number {number} {}", "x".repeat(number as usize % 200)), "group": number % 17 });
        collection.insert_many(batch).await.unwrap();
    }
}

/// Every byte that a namespace consists of.
#[derive(Debug, PartialEq)]
pub(crate) struct Fingerprint {
    kind: String,
    options: RawDocumentBuf,
    indexes: Vec<RawDocumentBuf>,
    documents: Vec<RawDocumentBuf>,
}

impl Fingerprint {
    /// Sorts the fields of each index definition, not what is inside them.
    pub(crate) fn forget_order_in_indexes(&mut self) {
        for index in &mut self.indexes {
            let mut fields: Vec<_> = index.iter().map(Result::unwrap).collect();
            fields.sort_by_key(|(name, _)| name.as_str().to_owned());
            let mut sorted = RawDocumentBuf::new();
            fields.into_iter().for_each(|(name, value)| sorted.append(name, value));
            *index = sorted;
        }
    }
}

/// Fingerprints of all namespaces of some databases; documents are sorted unless their order is content.
pub(crate) async fn fingerprints(deployment: &Deployment, databases: &[&str]) -> BTreeMap<String, Fingerprint> {
    let mut all = BTreeMap::new();
    for name in databases {
        let database = deployment.database(name);
        let infos: Vec<RawDocumentBuf> = listed(deployment, name, rawdoc! { "listCollections": 1 }).await;
        for info in infos {
            let collection = info.get_str("name").unwrap().to_owned();
            if collection == "system.views" {
                continue;
            }
            let kind = info.get_str("type").unwrap().to_owned();
            let options = info.get_document("options").unwrap().to_owned();
            let (mut indexes, mut documents) = (Vec::new(), Vec::new());
            if kind != "view" {
                indexes = listed(deployment, name, rawdoc! { "listIndexes": collection.as_str() }).await;
                indexes.sort_by(|a, b| a.get_str("name").unwrap().cmp(b.get_str("name").unwrap()));
            }
            if kind == "collection" {
                let natural = doc! { "$natural": 1 };
                let cursor = database
                    .collection::<RawDocumentBuf>(&collection)
                    .find(doc! {})
                    .hint(mongo_core::mongodb::options::Hint::Keys(natural))
                    .await
                    .unwrap();
                documents = cursor.try_collect().await.unwrap();
                if !options.get_bool("capped").unwrap_or(false) {
                    documents.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
                }
            }
            all.insert(format!("{name}.{collection}"), Fingerprint { kind, options, indexes, documents });
        }
    }
    all
}

async fn listed(deployment: &Deployment, database: &str, command: RawDocumentBuf) -> Vec<RawDocumentBuf> {
    let mut batches = deployment.database(database).run_raw_cursor_command(command).batch().await.unwrap();
    let mut all = Vec::new();
    while let Some(batch) = batches.try_next().await.unwrap() {
        for item in batch.doc_slices().unwrap() {
            all.push(item.unwrap().as_document().unwrap().to_owned());
        }
    }
    all
}

/// The names of the namespaces whose fingerprints differ.
pub(crate) fn differing(a: &BTreeMap<String, Fingerprint>, b: &BTreeMap<String, Fingerprint>) -> Vec<String> {
    let mut names: Vec<_> = a.keys().chain(b.keys()).filter(|name| a.get(*name) != b.get(*name)).cloned().collect();
    names.dedup();
    names
}

/// The server's own hash of a database.
pub(crate) async fn db_hash(deployment: &Deployment, database: &str) -> Document {
    let reply = deployment.database(database).run_command(doc! { "dbHash": 1 }).await.unwrap();
    reply.get_document("collections").unwrap().clone()
}

/// The same without the definitions of views, which name their database.
pub(crate) async fn data_hash(deployment: &Deployment, database: &str) -> Document {
    let mut hash = db_hash(deployment, database).await;
    hash.remove("system.views");
    hash
}

/// An example's program, as `cargo test --workspace` builds it.
pub(crate) fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    let path = path.join("examples").join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --examples` or `cargo test --workspace`", path.display());
    path
}

/// Runs an example and waits for it.
pub(crate) fn run_example(name: &str, arguments: &[&str]) -> Output {
    Command::new(example(name)).args(arguments).output().unwrap()
}

/// Whether no such operation is left within ten seconds.
pub(crate) async fn gone(client: &Client, operation: &Document) -> bool {
    let look = async {
        loop {
            let stages = [doc! { "$currentOp": {} }, doc! { "$match": operation.clone() }];
            let mut found = client.database("admin").aggregate(stages).await.unwrap();
            if !found.advance().await.unwrap() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), look).await.is_ok()
}

/// What takes a server far longer than any test waits: five hundred documents of a collection, each with all others, each of these with all others again, and so on.
pub(crate) fn endless(collection: &str) -> Vec<Document> {
    (0..4).fold(Vec::new(), |inner, _| {
        // It depends on the outer document, so that the server does not keep its result.
        let mut pipeline = vec![doc! { "$match": { "$expr": { "$ne": ["$_id", "$$outer"] } } }];
        pipeline.extend(inner);
        pipeline.push(doc! { "$project": { "_id": 1 } });
        vec![doc! { "$lookup": { "from": collection, "let": { "outer": "$_id" }, "pipeline": pipeline, "as": "all" } }]
    })
}
