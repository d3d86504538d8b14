//! M7: a day of monitoring, in paused time. By itself in its process, as it looks at the process' memory and files.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says by panicking that something is wrong")]

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mongo_core::{
    ConnectOptions,
    bson::{Bson, DateTime, Document, Timestamp, doc},
    clock::Clock,
    metrics::MemoryMetrics,
};
use mongo_monitor::{Alerts, ClientWatch, Monitor, MonitorSettings, default_rules};
use mongo_testkit::ScriptedServer;
use tokio::time::Instant;

/// A clock that goes with tokio's, but for the wall clock, which is set back by an hour at noon.
#[derive(Debug)]
struct Paused(Instant);

impl Clock for Paused {
    fn wall(&self) -> SystemTime {
        let passed = self.0.elapsed();
        let set_back = if passed > NOON { Duration::from_secs(3600) } else { Duration::ZERO };
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + passed - set_back
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

/// What a primary of version 6.0 answers, which has been up since the test began and has had ten inserts a second.
fn answer(command: &Document, own: &str, up: Duration, status: &Document) -> Document {
    let millis = i64::try_from(up.as_millis()).unwrap();
    let now = DateTime::from_millis(1_700_000_000_000 + millis);
    let at = Timestamp { time: u32::try_from(1_700_000_000 + up.as_secs()).unwrap(), increment: 1 };
    let cursor = |documents: Vec<Document>| doc! { "cursor": { "id": 0_i64, "ns": "shop.orders", "firstBatch": documents } };
    match command.keys().next().map(String::as_str) {
        Some("hello" | "isMaster" | "ismaster") => ScriptedServer::hello(doc! {
            "setName": "rs", "setVersion": 1, "hosts": [own, GONE], "primary": own, "me": own, "secondary": false,
        }),
        Some("serverStatus") => {
            let mut status = status.clone();
            status.insert("uptimeMillis", millis);
            status.insert("localTime", now);
            status.insert("opcounters", doc! { "insert": millis / 100 });
            status
        }
        Some("replSetGetStatus") => doc! { "set": "rs", "term": 1_i64, "date": now, "members": [
            { "_id": 0, "name": own, "health": 1.0, "state": 1, "uptime": 1, "optime": { "ts": at, "t": 1_i64 }, "optimeDate": now, "self": true, "configVersion": 1 },
            { "_id": 1, "name": GONE, "health": 0.0, "state": 8, "uptime": 0, "configVersion": -1 },
        ] },
        Some("find") => cursor(vec![doc! { "ts": at }]),
        Some("listDatabases") => doc! { "databases": [{ "name": "shop" }] },
        Some("listCollections") => cursor((0..200).map(|n| doc! { "name": format!("c{n}"), "type": "collection" }).collect()),
        Some("dbStats") => doc! { "objects": 12, "dataSize": 1.0, "storageSize": 1.0, "indexSize": 1.0 },
        Some("top") => doc! { "totals": { "shop.c7": { "queries": { "time": millis, "count": millis } } } },
        Some("aggregate") => cursor(Vec::new()),
        _ => doc! {},
    }
}

/// Kilobytes of memory, tasks, and open files.
fn held() -> (u64, usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (memory.unwrap(), tokio::runtime::Handle::current().metrics().num_alive_tasks(), files)
}

#[tokio::test(start_paused = true)]
async fn a_day_with_a_member_that_is_gone_leaves_nothing_behind() {
    let began = Instant::now();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/server_status_6.0.json");
    let value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let Bson::Document(status) = Bson::try_from(value).unwrap() else { unreachable!() };
    let own = Arc::new(std::sync::OnceLock::<String>::new());
    let name = Arc::clone(&own);
    let server =
        ScriptedServer::start(move |command| answer(command, name.get().map_or("", String::as_str), began.elapsed(), &status))
            .await
            .unwrap();
    own.set(server.address().to_string()).unwrap();
    let mut settings = MonitorSettings::default();
    settings.interval = Duration::from_secs(60);
    let options = ConnectOptions::from_uri(format!("mongodb://{}/?replicaSet=rs", server.address())).unwrap();
    let monitor = Monitor::start_with_clock(options, settings.clone(), Arc::new(Paused(began))).await.unwrap();
    monitor.alert(Alerts::new(default_rules(&settings)).unwrap());
    monitor.export(Arc::new(MemoryMetrics::default()));
    monitor.include(ClientWatch::new());
    // Until all that is kept for an hour is there.
    tokio::time::sleep(Duration::from_secs(2 * 3600)).await;
    let before = held();
    tokio::time::sleep(Duration::from_secs(22 * 3600)).await;
    let after = held();
    assert!(after.0 < before.0 + 4096 && after.1 <= before.1 + 2 && after.2 <= before.2 + 2, "{before:?} {after:?}");

    // And it has watched all the while.
    let view = monitor.view();
    let up: Vec<_> = view.members.iter().map(|member| (&*member.host, member.number("mongodb_up", &[]))).collect();
    let own = server.address().to_string();
    assert!(up.contains(&(&own, Some(1.0))) && up.contains(&(GONE, Some(0.0))), "{up:?}");
    let hour = monitor.summary(&own, "mongodb_operations_total", &["insert"], Duration::from_secs(3600)).unwrap();
    assert!(hour.readings > 50 && !hour.has_gap && hour.rate.is_some_and(|rate| (rate - 10.0).abs() < 0.5), "{hour:?}");
    let fires: Vec<String> = monitor.alerts().into_iter().filter(|alert| alert.muted.is_none()).map(|alert| alert.rule).collect();
    assert!(fires.contains(&"instance_down_long".to_owned()) && !fires.contains(&"monitor_blind".to_owned()), "{fires:?}");
    monitor.stop().await;
}

/// Where nobody listens.
const GONE: &str = "127.0.0.1:1";
const NOON: Duration = Duration::from_secs(12 * 3600);
