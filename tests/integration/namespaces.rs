//! M11, M12: databases and collections, also when there are very many.

use std::{collections::BTreeSet, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongo_core::{
    ConnectOptions,
    bson::{Document, doc},
};
use mongo_monitor::{Monitor, MonitorSettings, View};
use mongo_testkit::TestDeployment;

use crate::monitor::{collector, until};

async fn watching(server: &TestDeployment, namespaces: usize) -> Monitor {
    let mut settings = MonitorSettings::default();
    settings.interval = Duration::from_millis(100);
    settings.namespace_interval = Duration::from_millis(100);
    settings.namespaces = namespaces;
    let monitor = Monitor::start(ConnectOptions::from_uri(server.uri()).unwrap(), settings).await.unwrap();
    monitor.sampled().await;
    monitor
}

fn shown(view: &View) -> BTreeSet<String> {
    let readings = view.members.iter().flat_map(|member| &member.readings);
    let sizes = readings.filter(|reading| reading.metric.name == "mongodb_collection_bytes");
    sizes.filter_map(|reading| Some(format!("{}.{}", reading.label("database")?, reading.label("collection")?))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_and_uses_of_collections_and_indexes_are_those_of_the_server() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let shop = server.client().await.unwrap().database("shop");
    let orders = shop.collection::<Document>("orders");
    orders.insert_many((0..500).map(|n| doc! { "n": n, "text": "x".repeat(100) })).await.unwrap();
    shop.run_command(doc! { "createIndexes": "orders", "indexes": [{ "key": { "n": 1 }, "name": "n_1" }] }).await.unwrap();
    shop.run_command(doc! { "create": "of_orders", "viewOn": "orders", "pipeline": [] }).await.unwrap();
    for n in 0..7 {
        orders.find_one(doc! { "n": n }).await.unwrap();
    }
    let monitor = watching(&server, 10).await;
    let number = |view: &View, name: &str, labels: &[&str]| view.members[0].number(name, labels);
    let view = until(&monitor, "the index has been used", |view| {
        // A look asks for as much as it has time for.
        number(view, "mongodb_index_accesses_total", &["shop", "orders", "n_1"]) == Some(7.0)
            && number(view, "mongodb_stored_documents", &[]).is_some()
            && number(view, "mongodb_collection_documents", &["shop", "orders"]).is_some()
    })
    .await;
    assert_eq!(number(&view, "mongodb_collection_documents", &["shop", "orders"]), Some(500.0));
    // The definition of the view is a document too.
    assert_eq!(number(&view, "mongodb_database_documents", &["shop"]), Some(501.0));
    assert_eq!(number(&view, "mongodb_stored_documents", &[]), Some(501.0));
    let data = number(&view, "mongodb_collection_bytes", &["shop", "orders", "data"]).unwrap();
    assert!((500.0 * 130.0..500.0 * 150.0).contains(&data), "{data}");
    assert_eq!(number(&view, "mongodb_collection_operations_total", &["shop", "orders", "query"]), Some(7.0));
    assert!(number(&view, "mongodb_collection_operation_seconds_total", &["shop", "orders", "insert"]).unwrap() > 0.0);
    assert!(number(&view, "mongodb_filesystem_bytes", &["total"]).unwrap() > 1e9);
    // A view holds nothing.
    assert_eq!(shown(&view), BTreeSet::from(["shop.orders".to_owned()]));

    // What is gone is no longer shown.
    orders.drop().await.unwrap();
    until(&monitor, "it is gone", |view| shown(view).is_empty()).await;
    monitor.stop().await;
}

/// The same as for two, but for the time it takes to know all sizes.
#[tokio::test(flavor = "multi_thread")]
async fn of_ten_thousand_collections_the_busy_ones_are_shown_and_the_other_collectors_do_not_wait() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let client = server.client().await.unwrap();
    let create = |number: i32| {
        let database = client.database(&format!("many_{}", number % 4));
        // One file for each instead of two: there are machines on which a process may not open more than twenty thousand.
        let create = doc! { "create": format!("collection_{number}"), "clusteredIndex": { "key": { "_id": 1 }, "unique": true } };
        async move { database.run_command(create).await.map(drop) }
    };
    stream::iter((0..10_000).map(create)).buffer_unordered(16).try_collect::<()>().await.unwrap();
    let busy = client.database("many_3").collection::<Document>("collection_9999");
    for _ in 0..3000 {
        busy.insert_one(doc! { "n": 1 }).await.unwrap();
    }
    let monitor = watching(&server, 20).await;
    let inserts = ["many_3", "collection_9999", "insert"];
    let busiest = |view: &View| -> BTreeSet<String> {
        let operations = view.members[0].readings.iter().filter(|one| one.metric.name == "mongodb_collection_operations_total");
        operations.filter_map(|reading| reading.label("collection").map(str::to_owned)).collect()
    };
    let view = until(&monitor, "the collections are looked at", |view| {
        // A look asks for as much as it has time for.
        view.members[0].number("mongodb_namespaces", &["collection"]) == Some(10_000.0)
            && view.members[0].number("mongodb_collection_operations_total", &inserts) == Some(3000.0)
            && busiest(view).len() >= 20
    })
    .await;
    let only = &view.members[0];
    let busiest = busiest(&view);
    assert_eq!(busiest.len(), 20, "{busiest:?}");
    assert!(only.readings.len() < 1000, "{} series", only.readings.len());
    // All that is not about collections is as young as ever, however long those take.
    let age = collector(only, "server_status").age_seconds.unwrap();
    let took = collector(only, "namespaces").took_seconds.unwrap();
    assert!(age < 1.0, "{age}, and the collections took {took}");
    monitor.stop().await;
}
