//! M1, M3, M7: sampling the members of a replica set, and what comes of one that hangs, restarts, refuses or may not be asked.

use std::{sync::Arc, time::Duration};

use mongo_core::{
    ConnectOptions,
    bson::{Document, doc},
};
use mongo_monitor::{
    Alert, AlertPhase, AlertSink, Alerts, CollectingSink, Expression, METRICS, MemberView, Monitor, MonitorSettings, Quantity,
    Rule, Severity, Threshold, View, default_rules,
};
use mongo_testkit::TestDeployment;

pub(crate) async fn start(options: ConnectOptions) -> Monitor {
    let mut settings = MonitorSettings::default();
    settings.interval = Duration::from_millis(100);
    settings.namespace_interval = Duration::from_millis(500);
    settings.deadline = Duration::from_secs(2);
    let monitor = Monitor::start(options, settings).await.unwrap();
    monitor.sampled().await;
    monitor
}

pub(crate) async fn watching(server: &TestDeployment) -> Monitor {
    start(ConnectOptions::from_uri(server.uri()).unwrap()).await
}

/// Looks again and again until what is shown is as expected.
pub(crate) async fn until(monitor: &Monitor, what: &str, is_so: impl Fn(&View) -> bool) -> View {
    let looking = async {
        loop {
            let view = monitor.view();
            if is_so(&view) {
                return view;
            }
            monitor.changed().await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(180), looking).await {
        Ok(view) => view,
        Err(_) => panic!("{what}: {:#?}", monitor.view()),
    }
}

pub(crate) fn member<'a>(view: &'a View, host: &str) -> &'a MemberView {
    view.members.iter().find(|member| member.host == host).unwrap()
}

pub(crate) fn collector<'a>(member: &'a MemberView, name: &str) -> &'a mongo_monitor::CollectorView {
    member.collectors.iter().find(|collector| collector.name == name).unwrap()
}

pub(crate) fn is_in_state(member: &MemberView, state: &str) -> bool {
    member.number("mongodb_member_state", &[state]) == Some(1.0)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_is_sampled_and_rates_are_those_of_what_was_done() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let primary = server.member(server.primary().await.unwrap()).host_port();
    let monitor = watching(&server).await;
    let is_complete = |view: &View| {
        let count = |state: &str| view.members.iter().filter(|member| is_in_state(member, state)).count();
        (view.members.len(), count("PRIMARY"), count("SECONDARY")) == (3, 1, 2)
    };
    let view = until(&monitor, "three members are seen", is_complete).await;
    assert!(view.members.iter().all(|member| member.number("mongodb_up", &[]) == Some(1.0)));

    let inserted = |view: &View| member(view, &primary).number("mongodb_operations_total", &["insert"]).unwrap_or(0.0);
    let before = inserted(&view);
    let orders = server.client().await.unwrap().database("shop").collection::<Document>("orders");
    for _ in 0..30 {
        orders.insert_one(doc! { "n": 1 }).await.unwrap();
    }
    until(&monitor, "the inserts are counted", |view| inserted(view) >= before + 30.0).await;
    let summary = monitor.summary(&primary, "mongodb_operations_total", &["insert"], Duration::from_secs(600)).unwrap();
    assert!(summary.last - summary.min >= 30.0 && summary.rate.unwrap() > 0.0 && !summary.has_gap, "{summary:?}");

    // Lag is told by the primary, and by it alone.
    let view = monitor.view();
    for member in &view.members {
        let told: Vec<&str> = member
            .readings
            .iter()
            .filter(|reading| reading.metric.name == "mongodb_replica_lag_seconds")
            .filter_map(|reading| reading.label("member"))
            .collect();
        assert_eq!(told.len(), if member.host == primary { 2 } else { 0 }, "{told:?}");
        assert!(!told.contains(&&*primary));
        assert!(member.number("mongodb_oplog_window_seconds", &[]).is_some());
    }
    // Everything is in the table, and nothing of it is an answer's own text.
    let text = view.to_open_metrics();
    assert!(view.members.iter().flat_map(|member| &member.readings).all(|reading| METRICS.contains(reading.metric)));
    assert!(text.contains(&format!("mongodb_up{{server=\"{primary}\"}} 1.0\n")) && text.ends_with("# EOF\n"), "{text}");
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_hangs_is_shown_as_down_and_holds_up_nobody() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let primary = server.primary().await.unwrap();
    let hung = server.member((primary + 1) % 3);
    let host = hung.host_port();
    let monitor = watching(&server).await;
    until(&monitor, "three members are up", |view| {
        view.members.len() == 3 && view.members.iter().all(|member| member.number("mongodb_up", &[]) == Some(1.0))
    })
    .await;
    hung.pause().unwrap();
    let view = until(&monitor, "it is down", |view| member(view, &host).number("mongodb_up", &[]) == Some(0.0)).await;
    assert!(collector(member(&view, &host), "up").failure.is_some());
    for other in view.members.iter().filter(|member| member.host != host) {
        assert_eq!(other.number("mongodb_up", &[]), Some(1.0));
        let age = collector(other, "server_status").age_seconds.unwrap();
        assert!(age < 1.5, "{} has waited: {age}", other.host);
    }
    // What it said last is no longer shown as if it were so.
    let stale = |view: &View| member(view, &host).number("mongodb_connections", &["current"]).is_none();
    let view = until(&monitor, "its readings are gone", stale).await;
    assert!(collector(member(&view, &host), "server_status").age_seconds.unwrap() > 2.0);
    hung.resume().unwrap();
    until(&monitor, "it is up again", |view| {
        let member = member(view, &host);
        member.number("mongodb_up", &[]) == Some(1.0) && member.number("mongodb_connections", &["current"]).is_some()
    })
    .await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_a_gap_in_a_rate() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let host = server.member(0).host_port();
    let monitor = watching(&server).await;
    let requests = |last| monitor.summary(&host, "mongodb_network_requests_total", &[], Duration::from_secs(last));
    until(&monitor, "there is a rate", |_| requests(600).is_some_and(|summary| summary.rate.is_some())).await;
    assert!(!requests(600).unwrap().has_gap);
    server.member(0).kill().unwrap();
    until(&monitor, "it is down", |view| member(view, &host).number("mongodb_up", &[]) == Some(0.0)).await;
    server.member(0).restart().await.unwrap();
    until(&monitor, "it is back", |_| requests(600).is_some_and(|summary| summary.has_gap)).await;
    until(&monitor, "there is a rate", |_| requests(600).is_some_and(|summary| summary.rate.is_some_and(|rate| rate >= 0.0)))
        .await;
    monitor.stop().await;
}

/// After a restart a rate is not known until there are two readings of the new run: that is no reason to tell that all is well.
#[tokio::test(flavor = "multi_thread")]
async fn an_alert_on_a_rate_is_not_resolved_by_a_restart() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let host = server.member(0).host_port();
    let monitor = watching(&server).await;
    // The monitor itself asks, so there are always requests.
    let requests = Quantity::of("mongodb_network_requests_total").rate_over(4);
    let rule = Rule::new("requests", Severity::Warning, Expression::Each(requests), Threshold::Above(0.0), "somebody asks");
    let sink = Arc::new(CollectingSink::default());
    monitor.alert(Alerts::new(vec![rule]).unwrap().with_sink(Arc::clone(&sink) as Arc<dyn AlertSink>));
    let fires = |monitor: &Monitor| monitor.alerts().iter().any(|alert| alert.phase == AlertPhase::Firing && alert.has_data);
    until(&monitor, "it fires", |_| fires(&monitor)).await;
    server.member(0).kill().unwrap();
    until(&monitor, "it has no data", |_| monitor.alerts().iter().all(|alert| !alert.has_data)).await;
    let before = monitor.summary(&host, "mongodb_network_requests_total", &[], Duration::from_secs(600)).unwrap().readings;
    server.member(0).restart().await.unwrap();
    let readings = |monitor: &Monitor| {
        monitor
            .summary(&host, "mongodb_network_requests_total", &[], Duration::from_secs(600))
            .map_or(0, |summary| summary.readings)
    };
    until(&monitor, "it is read again", |_| readings(&monitor) > before).await;
    until(&monitor, "it fires with a rate of the new run", |_| fires(&monitor)).await;
    let told: Vec<AlertPhase> = sink.take().iter().map(|alert| alert.phase).collect();
    assert_eq!(told, [AlertPhase::Firing], "once, and never as resolved");
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_refuses_is_named_and_the_rest_is_shown() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let monitor = watching(&server).await;
    let refused = doc! { "failCommands": ["serverStatus"], "errorCode": 8000, "appName": "mongo-monitor" };
    server.fail_command(0, "alwaysOn", refused).await.unwrap();
    let view =
        until(&monitor, "the refusal is told", |view| collector(&view.members[0], "server_status").failure.is_some()).await;
    let only = &view.members[0];
    assert!(collector(only, "replica_set").failure.is_none() && collector(only, "up").failure.is_none(), "{:?}", only.collectors);
    assert!(is_in_state(only, "PRIMARY"));
    server.fail_command_off(0).await.unwrap();
    until(&monitor, "it is read again", |view| collector(&view.members[0], "server_status").failure.is_none()).await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_may_not_see_the_statistics_sees_who_is_up() {
    let server = TestDeployment::replica_set(1).with_auth().start().await.unwrap();
    let admin = server.client().await.unwrap().database("admin");
    for (name, role) in
        [("nobody", doc! { "role": "read", "db": "shop" }), ("watcher", doc! { "role": "clusterMonitor", "db": "admin" })]
    {
        admin.run_command(doc! { "createUser": name, "pwd": "secret-word", "roles": [role] }).await.unwrap();
    }
    let options = |name: &str| ConnectOptions::from_uri(server.uri()).unwrap().with_credentials(name, "secret-word");
    let monitor = start(options("nobody")).await;
    let view = monitor.view();
    let only = &view.members[0];
    assert_eq!(only.number("mongodb_up", &[]), Some(1.0));
    // Also who may not see the status learns who takes writes.
    assert_eq!(view.primary().map(|member| &member.host), Some(&only.host));
    for name in ["server_status", "replica_set", "current_operations", "namespaces"] {
        let failure = collector(only, name).failure.clone().unwrap();
        assert!(failure.contains("clusterMonitor") && !failure.contains("secret-word"), "{failure}");
    }
    // Once it may be read, it is no longer named.
    let grant = doc! { "grantRolesToUser": "nobody", "roles": [{ "role": "clusterMonitor", "db": "admin" }] };
    admin.run_command(grant).await.unwrap();
    until(&monitor, "everything is read", |view| view.members[0].collectors.iter().all(|collector| collector.failure.is_none()))
        .await;
    monitor.stop().await;

    let monitor = start(options("watcher")).await;
    let view = monitor.view();
    assert!(view.members[0].collectors.iter().all(|collector| collector.failure.is_none()), "{:?}", view.members[0].collectors);
    assert!(view.members[0].number("mongodb_oplog_window_seconds", &[]).is_some());
    monitor.stop().await;
}

/// Looks again and again until something is told.
pub(crate) async fn told(alerts: &mut Alerts, monitor: &Monitor) -> Vec<Alert> {
    let looking = async {
        loop {
            let news = alerts.evaluate(monitor);
            if !news.is_empty() {
                return news;
            }
            monitor.changed().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(180), looking).await.expect("nothing was told in a minute")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_member_alarms_once_and_a_healthy_set_does_not() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let primary = server.primary().await.unwrap();
    let hung = server.member((primary + 1) % 3);
    let monitor = watching(&server).await;
    until(&monitor, "three members are up and have a state", |view| {
        let is_known = |member: &MemberView| is_in_state(member, "PRIMARY") || is_in_state(member, "SECONDARY");
        view.members.len() == 3 && view.members.iter().all(is_known)
    })
    .await;
    // What the crate comes with, impatiently: what is well must not even be pending.
    let mut impatient = default_rules(&MonitorSettings::default());
    // How full the machine's disk and memory are is no matter of the set.
    impatient.retain(|rule| !["disk", "disk_full", "memory"].contains(&&*rule.name));
    impatient.iter_mut().for_each(|rule| rule.for_seconds = 0);
    let news = Alerts::new(impatient).unwrap().evaluate(&monitor);
    assert!(news.is_empty(), "{news:#?}");

    let up = Expression::Each(Quantity::of("mongodb_up"));
    let mut alerts = Alerts::new(vec![Rule::new("down", Severity::Critical, up, Threshold::Below(0.5), "look at it")]).unwrap();
    assert!(alerts.evaluate(&monitor).is_empty());
    hung.pause().unwrap();
    let of = |news: Vec<Alert>| news.into_iter().map(|alert| (alert.member.unwrap(), alert.phase)).collect::<Vec<_>>();
    assert_eq!(of(told(&mut alerts, &monitor).await), [(hung.host_port(), AlertPhase::Firing)]);
    assert!(alerts.evaluate(&monitor).is_empty(), "it was told");
    hung.resume().unwrap();
    assert_eq!(of(told(&mut alerts, &monitor).await), [(hung.host_port(), AlertPhase::Resolved)]);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_operation_is_shown_with_its_shape_and_without_anybodys_data() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let mut options = server.client_options().await.unwrap();
    options.app_name = Some("shop".to_owned());
    let orders = mongo_core::mongodb::Client::with_options(options).unwrap().database("shop").collection::<Document>("orders");
    orders.insert_one(doc! { "email": "ada@example.org" }).await.unwrap();
    let admin = server.client().await.unwrap().database("admin");
    // Hangs where the operation is under way already, which `failCommand` does not.
    let hang = async |mode: &str| {
        let data = doc! { "nss": "shop.orders" };
        admin
            .run_command(doc! { "configureFailPoint": "waitInFindBeforeMakingBatch", "mode": mode, "data": data })
            .await
            .unwrap();
    };
    for show_values in [false, true] {
        hang("alwaysOn").await;
        let mut settings = MonitorSettings::default();
        settings.interval = Duration::from_millis(100);
        settings.slow_operation = Duration::from_millis(500);
        settings.show_values = show_values;
        let monitor = Monitor::start(ConnectOptions::from_uri(server.uri()).unwrap(), settings.clone()).await.unwrap();
        monitor.sampled().await;
        assert!(monitor.view().members[0].slow_operations.is_empty(), "{:?}", monitor.view().members[0].slow_operations);
        let orders = orders.clone();
        let finding = tokio::spawn(async move { orders.find_one(doc! { "email": "ada@example.org" }).await });
        let view = until(&monitor, "it is slow", |view| !view.members[0].slow_operations.is_empty()).await;
        let slow = &view.members[0].slow_operations[0];
        assert_eq!(
            (&*slow.op, &*slow.namespace, slow.application.as_deref()),
            ("query", "shop.orders", Some("shop")),
            "{slow:?}"
        );
        assert!(slow.running_seconds >= 0.5);
        let email = slow.command.get_document("filter").unwrap().get_str("email").unwrap();
        assert_eq!(email, if show_values { "ada@example.org" } else { "?" });
        let everything = format!("{view:?} {} {}", serde_json::to_string(&view).unwrap(), view.to_open_metrics());
        assert_eq!(everything.contains("ada@"), show_values, "{everything}");
        let news = Alerts::new(default_rules(&settings)).unwrap().evaluate(&monitor);
        assert_eq!(news.iter().map(|alert| &*alert.rule).collect::<Vec<_>>(), ["slow_operation"], "{news:?}");
        hang("off").await;
        finding.await.unwrap().unwrap();
        until(&monitor, "it is over", |view| view.members[0].slow_operations.is_empty()).await;
        monitor.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_has_collected_itself_is_read_and_where_it_no_longer_does_it_is_asked() {
    let server = TestDeployment::replica_set(2).start().await.unwrap();
    let admins = [server.member(0).client().await.unwrap(), server.member(1).client().await.unwrap()]
        .map(|client| client.database("admin"));
    let collect = async |is_on: bool| {
        for admin in &admins {
            admin.run_command(doc! { "setParameter": 1, "diagnosticDataCollectionEnabled": is_on }).await.unwrap();
        }
    };
    collect(true).await;
    let primary = server.member(server.primary().await.unwrap()).host_port();
    let monitor = watching(&server).await;
    // Only there does it tell of its machine.
    let is_collected = |member: &MemberView| member.number("mongodb_host_cpu_seconds_total", &["user"]).is_some();
    let view = until(&monitor, "both tell what they have collected", |view| {
        view.members.len() == 2 && view.members.iter().all(is_collected)
    })
    .await;
    let inserted = |view: &View| member(view, &primary).number("mongodb_operations_total", &["insert"]).unwrap_or(0.0);
    let before = inserted(&view);
    let orders = server.client().await.unwrap().database("shop").collection::<Document>("orders");
    for _ in 0..30 {
        orders.insert_one(doc! { "n": 1 }).await.unwrap();
    }
    let all_is_there = |view: &View| {
        let member = member(view, &primary);
        inserted(view) >= before + 30.0
            && member.number("mongodb_oplog_window_seconds", &[]).is_some()
            && member.number("mongodb_oplog_bytes", &["max"]).is_some()
            && member.number("mongodb_operation_duration_seconds", &["writes"]).is_some_and(|count| count >= 30.0)
            && member.readings.iter().any(|reading| reading.metric.name == "mongodb_replica_lag_seconds")
    };
    let view = until(&monitor, "what was done is counted", all_is_there).await;
    assert!(view.members.iter().all(is_collected));
    // Read ten times in each second in which it is collected once, there are as many readings as collections: rates are those of the data.
    let uptime = || monitor.summary(&primary, "mongodb_uptime_seconds", &[], Duration::from_secs(600)).unwrap();
    let first = uptime();
    until(&monitor, "five seconds have passed", |_| uptime().last >= first.last + 5.0).await;
    let second = uptime();
    assert!((second.readings - first.readings) as f64 <= second.last - first.last + 2.0, "{first:?} {second:?}");

    // What was collected last stays there to be read: it must not be taken for being so now.
    collect(false).await;
    until(&monitor, "they are asked", |view| !view.members.iter().any(is_collected)).await;
    let before = inserted(&monitor.view());
    orders.insert_one(doc! { "n": 1 }).await.unwrap();
    let view = until(&monitor, "what was done since is counted", |view| inserted(view) > before).await;
    assert!(member(&view, &primary).number("mongodb_oplog_bytes", &["max"]).is_some());
    assert!(!monitor.summary(&primary, "mongodb_operations_total", &["insert"], Duration::from_secs(600)).unwrap().has_gap);
    monitor.stop().await;
}

/// The status and the body of an answer.
async fn get(address: std::net::SocketAddr, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_readiness_follow_a_set_that_loses_its_primary_and_its_life() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let monitor = Arc::new(watching(&server).await);
    let up = Expression::Each(Quantity::of("mongodb_up"));
    let down = Rule::new("down", Severity::Critical, up, Threshold::Below(0.5), "look at it");
    monitor.alert(Alerts::new(vec![down]).unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = mongo_monitor::router(Arc::clone(&monitor));
    let serving = tokio::spawn(async move { axum::serve(listener, router).await });
    // Asks until the answer is as expected.
    let until = async |path: &str, is_so: &dyn Fn(u16, &serde_json::Value) -> bool| {
        let mut last = None;
        let asking = async {
            loop {
                let (status, body) = get(address, path).await;
                let body: serde_json::Value = serde_json::from_str(&body).unwrap();
                let so = is_so(status, &body);
                last = Some((status, body));
                if so {
                    return;
                }
                monitor.changed().await;
            }
        };
        let timed_out = tokio::time::timeout(Duration::from_secs(60), asking).await.is_err();
        let (status, body) = last.unwrap();
        assert!(!timed_out, "{path}: {status} {body:#}");
        body
    };
    until("/health", &|status, health| status == 200 && health["status"] == "healthy" && health["members_up"] == 3).await;
    until("/ready", &|status, _| status == 200).await;
    let status = until("/api/replication/status", &|_, status| {
        status["members"].as_array().unwrap().iter().filter(|member| member["lag_seconds"].is_number()).count() == 2
    })
    .await;
    assert!(status["primary"].is_string() && status["term"].as_f64().unwrap() >= 1.0, "{status:#}");
    let (code, text) = get(address, "/metrics").await;
    assert!(code == 200 && text.ends_with("# EOF\n") && text.contains("mongodb_member_state"));
    let host = server.member(0).host_port();
    until("/api/dashboard?range=60", &|_, dashboard| {
        let mut series = dashboard["over_range"][&host].as_array().unwrap().iter();
        series.any(|series| series["name"] == "mongodb_operations_total" && series["rate"].is_number())
    })
    .await;
    assert_eq!(get(address, "/api/dashboard?range=soon").await.0, 400);
    assert_eq!(get(address, "/nothing").await.0, 404);

    // Two of three are gone: the last one sees no majority.
    let primary = server.primary().await.unwrap();
    server.member(primary).kill().unwrap();
    server.member((primary + 1) % 3).kill().unwrap();
    until("/ready", &|status, _| status == 503).await;
    until("/health", &|status, health| {
        status == 200 && health["status"] == "degraded" && health["members_up"] == 1 && health["critical"] == 2
    })
    .await;
    let dashboard = until("/api/dashboard", &|_, dashboard| dashboard["alerts"].as_array().unwrap().len() == 2).await;
    assert_eq!(dashboard["alerts"][0]["phase"], "firing");
    server.member((primary + 2) % 3).kill().unwrap();
    // That nobody answers is when alarms matter most.
    until("/health", &|status, health| status == 503 && health["status"] == "down" && health["critical"] == 3).await;
    serving.abort();
}
