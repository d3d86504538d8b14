//! M11: a router, played by a script, and several deployments that are shards of one whole.

use mongo_core::{
    ConnectOptions,
    bson::{Document, doc},
};
use mongo_monitor::ClusterView;
use mongo_testkit::{ScriptedServer, TestDeployment};

use crate::monitor::{collector, start, until, watching};

/// What a router answers, in the form of the server's documentation. There is no router where these tests run.
fn router(command: &Document) -> Document {
    let cursor = |documents: Vec<Document>| doc! { "cursor": { "id": 0_i64, "ns": "config.chunks", "firstBatch": documents } };
    match command.keys().next().map(String::as_str) {
        Some("hello" | "isMaster" | "ismaster") => ScriptedServer::hello(doc! { "msg": "isdbgrid" }),
        Some("serverStatus") => doc! { "process": "mongos", "version": "6.0.5", "pid": 1_i64, "connections": { "current": 3 } },
        Some("replSetGetStatus") => {
            doc! { "ok": 0.0, "errmsg": "replSetGetStatus is not supported through mongos", "info": "mongos" }
        }
        Some("hostInfo") => doc! { "system": { "memSizeMB": 64, "numCores": 2 } },
        Some("balancerStatus") => doc! { "mode": "full", "inBalancerRound": true },
        Some("listShards") => {
            doc! { "shards": [{ "_id": "a", "host": "a/h:1", "state": 1 }, { "_id": "b", "host": "b/h:2", "state": 1 }] }
        }
        Some("connPoolStats") => doc! {
            "hosts": { "h:1": { "inUse": 1, "available": 2, "refreshing": 0 } },
            "replicaSets": { "a": { "hosts": [{ "addr": "h:1", "ok": true }] }, "b": { "hosts": [{ "addr": "h:2", "ok": false }] } },
        },
        Some("listDatabases") => doc! { "databases": [{ "name": "shop" }] },
        Some("listCollections") => cursor(Vec::new()),
        Some("dbStats") => doc! { "objects": 12, "raw": { "a/h:1": { "objects": 5 }, "b/h:2": { "objects": 7 } } },
        Some("aggregate") if command.get_str("aggregate").ok() == Some("chunks") => {
            cursor(vec![doc! { "_id": "a", "chunks": 4, "jumbo": 0 }, doc! { "_id": "b", "chunks": 6, "jumbo": 1 }])
        }
        Some("aggregate") => cursor(Vec::new()),
        Some("ping" | "endSessions") => doc! {},
        _ => doc! { "ok": 0.0, "code": 59, "codeName": "CommandNotFound", "errmsg": "no such command" },
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_shows_its_shards() {
    let server = ScriptedServer::start(router).await.unwrap();
    let monitor = start(ConnectOptions::from_uri(format!("mongodb://{}", server.address())).unwrap()).await;
    let view = until(&monitor, "the shards are shown", |view| {
        view.members[0].number("mongodb_chunks", &["b"]) == Some(6.0) && view.members[0].is_up()
    })
    .await;
    let failures: Vec<_> = view.members[0].collectors.iter().filter_map(|collector| collector.failure.as_ref()).collect();
    assert!(failures.is_empty(), "{failures:?}");
    let number = |name: &str, labels: &[&str]| view.members[0].number(name, labels);
    assert_eq!(number("mongodb_balancer_running", &[]), Some(1.0));
    assert_eq!((number("mongodb_jumbo_chunks", &["a"]), number("mongodb_jumbo_chunks", &["b"])), (Some(0.0), Some(1.0)));
    assert_eq!((number("mongodb_shard_documents", &["a"]), number("mongodb_shard_documents", &["b"])), (Some(5.0), Some(7.0)));
    assert_eq!(number("mongodb_shard_member_up", &["b", "h:2"]), Some(0.0));
    assert_eq!(number("mongodb_shard_state", &["a", "active"]), Some(1.0));
    assert_eq!(number("mongodb_instance_info", &["6.0.5", "", "mongos", ""]), Some(1.0));
    let text = view.to_open_metrics();
    assert!(
        text.contains("mongodb_shard_state{server=") && text.contains("shard=\"a\",mongodb_shard_state=\"active\"} 1.0"),
        "{text}"
    );
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_router_does_not_answer_is_named_and_hides_nothing_else() {
    let script = |command: &Document| match command.keys().next().map(String::as_str) {
        Some("listShards") => doc! { "ok": 0.0, "code": 13, "codeName": "Unauthorized", "errmsg": "not authorized" },
        Some("dbStats") => doc! { "ok": 0.0, "code": 8000, "codeName": "AtlasError", "errmsg": "a shard does not answer" },
        _ => router(command),
    };
    let server = ScriptedServer::start(script).await.unwrap();
    let monitor = start(ConnectOptions::from_uri(format!("mongodb://{}", server.address())).unwrap()).await;
    let view = until(&monitor, "the rest is shown", |view| view.members[0].number("mongodb_chunks", &["b"]) == Some(6.0)).await;
    let number = |name: &str, labels: &[&str]| view.members[0].number(name, labels);
    assert_eq!(number("mongodb_shard_member_up", &["b", "h:2"]), Some(0.0));
    // What was not told is absent, and a sum without one of its parts is none.
    assert_eq!((number("mongodb_shard_state", &["a", "active"]), number("mongodb_shard_documents", &["a"])), (None, None));
    let told = collector(&view.members[0], "sharding").failure.clone().unwrap();
    assert!(told.contains("clusterMonitor") && told.contains("listShards") && told.contains("shop cannot be read"), "{told}");
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_of_their_own_are_counted_together() {
    let (one, other) =
        (TestDeployment::replica_set(1).start().await.unwrap(), TestDeployment::replica_set(1).start().await.unwrap());
    for (server, count) in [(&one, 3), (&other, 4)] {
        let orders = server.client().await.unwrap().database("shop").collection("orders");
        orders.insert_many((0..count).map(|n| doc! { "n": n })).await.unwrap();
    }
    let monitors = [("one", watching(&one).await), ("other", watching(&other).await)];
    let cluster = || ClusterView::of(monitors.iter().map(|(name, monitor)| (*name, monitor)));
    until(&monitors[0].1, "both are well", |_| cluster().shard_health_ratio == 1.0).await;
    until(&monitors[1].1, "all is counted", |_| {
        let documents: Vec<_> = cluster().shards.iter().map(|shard| shard.documents).collect();
        documents == [Some(3.0), Some(4.0)]
    })
    .await;
    other.member(0).kill().unwrap();
    until(&monitors[1].1, "one is gone", |_| {
        let cluster = cluster();
        (cluster.shard_health_ratio, cluster.replica_health_ratio) == (0.5, 0.5) && cluster.shards[1].members_up == 0
    })
    .await;
    for (_, monitor) in monitors {
        monitor.stop().await;
    }
}
