//! Documents that are redacted or given new `_id`s on their way, and restores that happen whole or not at all.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::TryStreamExt as _;
use mongo_backup::{
    Backup, ErrorKind, NewIds, Redaction, Redactions, Reference, Repository, Restore, RestoreMode, SnapshotChoice, Verify,
};
use mongo_core::{
    Deployment, NamespaceSelection,
    bson::{Bson, Document, doc, oid::ObjectId},
    mongodb::{IndexModel, options::IndexOptions},
    transform::FailingTransform,
};

use crate::{
    point_in_time::repository,
    support::{data_hash, fill, own, run_example},
};

async fn all(deployment: &Deployment, database: &str, collection: &str) -> Vec<Document> {
    let found = deployment.database(database).collection::<Document>(collection).find(doc! {}).sort(doc! { "_id": 1 }).await;
    found.unwrap().try_collect().await.unwrap()
}

async fn back_up(deployment: &Deployment, repository: &Repository) {
    Backup::builder(deployment, repository).namespaces("shop.*").build().unwrap().run().await.unwrap();
}

fn copy(repository: &Repository, target: &Deployment, to: &str) -> mongo_backup::RestoreBuilder {
    Restore::builder(repository, SnapshotChoice::Latest).into(target).rename("shop.*", &format!("{to}.*"))
}

/// Customers, and orders that refer to them in every place in which one can.
async fn shop(deployment: &Deployment) {
    let customers: Vec<ObjectId> = (0..50).map(|_| ObjectId::new()).collect();
    let database = deployment.database("shop");
    let documents = customers.iter().enumerate().map(|(number, id)| {
        doc! { "_id": id, "email": format!("{}@b.example", number % 40), "card": { "number": "4111", "kind": "debit" }, "friend": customers[(number + 7) % 50] }
    });
    database.collection("customers").insert_many(documents).await.unwrap();
    let orders = (0..200_i32).map(|number| {
        let customer = |at: i32| customers[((number + at) % 50) as usize];
        doc! { "_id": number, "customer": customer(0), "shared": [customer(1), customer(2)], "lines": [{ "for": customer(3) }, { "for": Bson::Null }],
            "email": format!("{}@b.example", number % 40), "elsewhere": ObjectId::new() }
    });
    database.collection("orders").insert_many(orders).await.unwrap();
    let notes = (0..20_i32).map(|number| doc! { "_id": format!("note {number}"), "order": number });
    database.collection("notes").insert_many(notes).await.unwrap();
}

/// B14.
#[tokio::test]
async fn what_is_redacted_is_nowhere_in_the_snapshot_and_joins_still_work() {
    let (_server, source) = own().await;
    shop(&source).await;
    let repository = repository().await;
    back_up(&source, &repository).await;
    let redactions = Redactions::new("secret")
        .rule("shop.*", "email", Redaction::Hash)
        .and_then(|rules| rules.rule("shop.customers", "card.number", Redaction::Mask))
        .and_then(|rules| rules.rule("shop.orders", "elsewhere", Redaction::Drop))
        .unwrap();
    let backup = Backup::builder(&source, &repository).namespaces("shop.*").transform(Arc::new(redactions)).build().unwrap();
    let report = backup.run().await.unwrap();
    assert!(report.full_scan.as_ref().is_some_and(|reason| reason.contains("changed on the way")), "{report:?}");
    assert!(Verify::new(&repository).run().await.unwrap().is_sound());
    copy(&repository, &source, "copy").build().unwrap().run().await.unwrap();
    let (customers, orders) = (all(&source, "copy", "customers").await, all(&source, "copy", "orders").await);
    assert_eq!((customers.len(), orders.len()), (50, 200));
    assert!(
        customers.iter().all(|customer| customer.get_document("card").unwrap() == &doc! { "number": "***", "kind": "debit" })
    );
    assert!(orders.iter().all(|order| !order.contains_key("elsewhere") && order.contains_key("customer")));
    let emails: BTreeMap<&str, usize> = customers.iter().fold(BTreeMap::new(), |mut emails, customer| {
        *emails.entry(customer.get_str("email").unwrap()).or_default() += 1;
        emails
    });
    assert_eq!(emails.len(), 40, "equal ones are equal, others are not");
    assert!(orders.iter().all(|order| emails.contains_key(order.get_str("email").unwrap())));
    assert!(emails.keys().all(|email| !email.contains('@')));
    // What comes after it takes nothing over from it.
    back_up(&source, &repository).await;
    copy(&repository, &source, "plain").build().unwrap().run().await.unwrap();
    assert_eq!(data_hash(&source, "plain").await, data_hash(&source, "shop").await);
}

#[tokio::test]
async fn a_transform_that_fails_leaves_no_snapshot_and_one_of_buckets_is_refused() {
    let (_server, source) = own().await;
    fill(&source, "shop", "orders", 500).await;
    let repository = repository().await;
    let backup = |transform: FailingTransform| {
        Backup::builder(&source, &repository).namespaces("shop.*").transform(Arc::new(transform)).build().unwrap()
    };
    let error = backup(FailingTransform::after(300)).run().await.unwrap_err();
    assert!(error.report().contains("could not be changed") && error.report().contains("shop.orders"), "{}", error.report());
    assert!(repository.snapshots().await.unwrap().snapshots.is_empty());
    let series = doc! { "create": "series", "timeseries": { "timeField": "t" } };
    source.database("shop").run_command(series).await.unwrap();
    assert_eq!(backup(FailingTransform::after(0)).plan().await.unwrap_err().kind(), ErrorKind::Unsupported);
}

/// B9.
#[tokio::test]
async fn references_hold_when_documents_get_new_ids() {
    let (_server, source) = own().await;
    shop(&source).await;
    let repository = repository().await;
    back_up(&source, &repository).await;
    let everything = NamespaceSelection::all();
    let found = repository.find_references(&SnapshotChoice::Latest, &everything).await.unwrap();
    let told: Vec<String> = found.iter().map(|found| format!("{}/{}={}", found.from, found.field, found.to)).collect();
    let customers = ["shop.customers/friend", "shop.orders/customer", "shop.orders/lines.for", "shop.orders/shared"];
    assert_eq!(told, customers.map(|field| format!("{field}=shop.customers")));

    let declared = Reference::new("shop.notes".parse().unwrap(), "order", "shop.orders".parse().unwrap());
    let new_ids = found.into_iter().chain([declared]).try_fold(NewIds::new("secret"), NewIds::with).unwrap();
    // Into the very collections that they come from.
    let restore = Restore::builder(&repository, SnapshotChoice::Latest).into(&source).mode(RestoreMode::Insert);
    let report = restore.transform(Arc::new(new_ids)).build().unwrap().run().await.unwrap();
    assert!(report.is_complete() && report.documents == 270, "{report:?}");
    let old: Vec<Document> = all(&source, "shop", "orders").await;
    assert_eq!(old.len(), 400);
    for (from, path, to) in [
        ("orders", "$customer", "customers"),
        ("orders", "$shared", "customers"),
        ("customers", "$friend", "customers"),
        ("notes", "$order", "orders"),
    ] {
        let pipeline = [
            doc! { "$unwind": path },
            doc! { "$lookup": { "from": to, "localField": &path[1..], "foreignField": "_id", "as": "found" } },
            doc! { "$match": { "found": { "$size": 1 } } },
            doc! { "$count": "held" },
        ];
        let held = source.database("shop").collection::<Document>(from).aggregate(pipeline).await.unwrap();
        let held: Vec<Document> = held.try_collect().await.unwrap();
        let expected = match (from, path) {
            ("orders", "$shared") => 800,
            ("orders", _) => 400,
            ("customers", _) => 100,
            _ => 40,
        };
        assert_eq!(held[0].get_i32("held").unwrap(), expected, "{from} {path}");
    }
}

/// B8.
#[tokio::test]
async fn a_small_set_is_restored_whole_or_not_at_all() {
    let (_server, source) = own().await;
    shop(&source).await;
    let orders = source.database("shop").collection::<Document>("orders");
    let unique = IndexOptions::builder().unique(true).build();
    orders.create_index(IndexModel::builder().keys(doc! { "elsewhere": 1 }).options(unique).build()).await.unwrap();
    let repository = repository().await;
    back_up(&source, &repository).await;
    let report = copy(&repository, &source, "copy").all_or_nothing().build().unwrap().run().await.unwrap();
    assert_eq!((report.documents, report.indexes), (270, 1));
    assert_eq!(data_hash(&source, "copy").await, data_hash(&source, "shop").await);
    assert_eq!(source.database("copy").collection::<Document>("orders").list_index_names().await.unwrap().len(), 2);

    // One document is in the way: nothing of all collections appears, and nothing changes.
    let partial = source.database("partial");
    partial.collection("orders").insert_one(doc! { "_id": 199, "mine": true }).await.unwrap();
    let restore = copy(&repository, &source, "partial").mode(RestoreMode::Insert).all_or_nothing();
    let error = restore.build().unwrap().run().await.unwrap_err();
    assert!(error.to_string().contains("nothing was restored"), "{error}");
    assert_eq!(partial.list_collection_names().await.unwrap(), ["orders"]);
    assert_eq!(all(&source, "partial", "orders").await, [doc! { "_id": 199, "mine": true }]);
    let restore = copy(&repository, &source, "partial").mode(RestoreMode::Upsert).all_or_nothing();
    assert_eq!(restore.build().unwrap().run().await.unwrap().documents, 270);

    let mut settings = mongo_backup::RestoreSettings::default();
    settings.transaction_bytes = 1000;
    settings.all_or_nothing = true;
    let restore = Restore::builder(&repository, SnapshotChoice::Latest).into(&source).settings(settings).rename("shop", "small");
    let error = restore.build().unwrap().plan().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("270 documents") && error.to_string().contains("1000"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_redacts_renews_and_restores_at_once() {
    let (server, source) = own().await;
    shop(&source).await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (archive, rules, uri) = (path("r"), path("rules.json"), server.uri());
    std::fs::write(&rules, r#"{"secret": "s", "rules": [{"ns": "shop.*", "field": "email", "action": "hash"}]}"#).unwrap();
    let run = |arguments: &[&str]| {
        let output = run_example("backup", &[arguments, &["--uri", &uri, "--archive", &archive]].concat());
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (succeeded, said) = run(&["create", "--ns", "shop.*", "--sanitize", &rules]);
    assert!(succeeded, "{said}");
    let (succeeded, said) = run(&[
        "restore",
        "--rename",
        "shop=copy",
        "--all-or-nothing",
        "--new-ids",
        "--reference",
        "shop.notes/order=shop.orders",
    ]);
    assert!(succeeded && said.contains("shop.orders/customer refers to shop.customers"), "{said}");
    let orders = all(&source, "copy", "orders").await;
    let customers = all(&source, "copy", "customers").await;
    assert!(orders.iter().all(|order| customers.iter().any(|customer| customer.get("_id") == order.get("customer"))));
    assert!(orders.iter().all(|order| order.get_str("email").unwrap().len() == 32));
    for (bad, cause) in [
        (r#"{"rules": [{"ns": "a.b", "field": "x", "action": "hash"}]}"#, "secret"),
        (r#"{"rules": []}"#, "no rule"),
        (r#"{"rules": [{"ns": "a.b", "field": "x", "action": "burn"}]}"#, "not as it should be"),
    ] {
        std::fs::write(&rules, bad).unwrap();
        let (succeeded, said) = run(&["create", "--sanitize", &rules]);
        assert!(!succeeded && said.contains(cause), "{said}");
    }
}
