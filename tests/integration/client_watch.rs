//! M10: what a client does, counted by its driver's events.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mongo_core::{
    bson::{Document, doc},
    mongodb::{Client, event::EventHandler, options::ClientOptions},
};
use mongo_monitor::{ClientWatch, Reading, Value};
use mongo_testkit::TestDeployment;

use crate::monitor::watching;

fn reading(watch: &ClientWatch, name: &str, labels: &[(&str, &str)]) -> Option<Reading> {
    let is_meant = |of: &Reading| of.metric.name == name && labels.iter().all(|(label, value)| of.label(label) == Some(*value));
    watch.readings().into_iter().find(is_meant)
}

async fn client(watch: &ClientWatch, mut options: ClientOptions) -> Client {
    options.max_pool_size = Some(2);
    watch.attach(&mut options);
    Client::with_options(options).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_are_counted_by_what_they_do_and_what_becomes_of_them() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let host = server.member(0).host_port();
    let watch = ClientWatch::new();
    let mut options = server.client_options().await.unwrap();
    // Who listened before goes on listening.
    let heard = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&heard);
    options.command_event_handler = Some(EventHandler::callback(move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    let client = client(&watch, options).await;
    let orders = client.database("shop").collection::<Document>("orders");
    for n in 0..5 {
        orders.insert_one(doc! { "_id": n, "email": "ada@example.org" }).await.unwrap();
    }
    orders.insert_one(doc! { "_id": 0 }).await.unwrap_err();
    client.database("shop").run_command(doc! { "noSuchCommand": "ada@example.org" }).await.unwrap_err();
    let duration = "db_client_operation_duration_seconds";
    let about = [("db_namespace", "shop"), ("db_collection_name", "orders"), ("server", &*host)];
    let inserts =
        reading(&watch, duration, &[&about[..], &[("db_operation_name", "insert"), ("error_type", "")]].concat()).unwrap();
    // To the server a write that is refused is a command that was done.
    assert_eq!(inserts.as_number(), 6.0);
    let Value::Histogram(histogram) = &inserts.value else { panic!("{inserts:?}") };
    assert!(histogram.sum > 0.0 && histogram.buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1));
    assert_eq!(
        reading(&watch, duration, &[("db_operation_name", "noSuchCommand"), ("error_type", "59")]).unwrap().as_number(),
        1.0
    );
    assert!(heard.load(Ordering::Relaxed) >= 14, "{heard:?}");

    // Beside what the servers do, in the text for Prometheus, and with nobody's data.
    let monitor = watching(&server).await;
    monitor.include(watch.clone());
    let text = monitor.view().to_open_metrics();
    assert!(text.contains(&format!(
        "{duration}_count{{db_operation_name=\"insert\",db_namespace=\"shop\",db_collection_name=\"orders\",server=\"{host}\",error_type=\"\"}} 6\n"
    )), "{text}");
    assert!(!text.contains("ada@example.org"), "{text}");
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_shows_who_has_its_connections_and_who_waits_for_one() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let host = server.member(0).host_port();
    let watch = ClientWatch::new();
    let client = client(&watch, server.client_options().await.unwrap()).await;
    let orders = client.database("shop").collection::<Document>("orders");
    orders.insert_one(doc! {}).await.unwrap();
    let number = |name: &str, state: Option<&str>| {
        let labels: Vec<(&str, &str)> = [("server", &*host)].into_iter().chain(state.map(|state| ("state", state))).collect();
        reading(&watch, name, &labels).map(|reading| reading.as_number())
    };
    // A connection is given back a moment after the answer.
    let given_back = async {
        while number("db_client_connection_count", Some("idle")) != Some(1.0) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), given_back).await.expect("one connection is idle");
    let hung = doc! { "failCommands": ["find"], "blockConnection": true, "blockTimeMS": 5_000 };
    server.fail_command(0, "alwaysOn", hung).await.unwrap();
    let finding: Vec<_> = (0..5)
        .map(|_| {
            let orders = orders.clone();
            tokio::spawn(async move { orders.find_one(doc! {}).await })
        })
        .collect();
    let waiting = async {
        loop {
            let used = number("db_client_connection_count", Some("used"));
            if used == Some(2.0) && number("db_client_connection_pending_requests", None) == Some(3.0) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("two have a connection, and three wait for one");
    server.fail_command_off(0).await.unwrap();
    finding.iter().for_each(tokio::task::JoinHandle::abort);
    let states = watch.readings();
    let state = states.iter().find(|of| of.metric.name == "mongodb_client_server_state" && of.label("state") == Some("primary"));
    assert_eq!(state.map(|of| of.as_number()), Some(1.0));
    assert!(reading(&watch, "mongodb_client_heartbeat_duration_seconds", &[("server", &host)]).unwrap().as_number() >= 1.0);
}
