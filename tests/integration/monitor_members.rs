//! M1, M3: members that are not like others, and those that go away.

use std::{collections::BTreeSet, time::Duration};

use mongo_core::{
    ConnectOptions,
    bson::doc,
    mongodb::Client,
    replica_set::{Member, ReplicaSetConfig, ReplicaSetExt as _, initiate},
};
use mongo_monitor::Monitor;
use mongo_testkit::TestDeployment;

use crate::monitor::{collector, is_in_state, member, start, until, watching};

/// A primary, an arbiter, and a secondary that is hidden and an hour behind.
async fn odd_set() -> (TestDeployment, Monitor) {
    let server = TestDeployment::replica_set(3).uninitiated().start().await.unwrap();
    let [primary, arbiter, late] = [0, 1, 2].map(|index| server.member(index).host_port());
    let config = ReplicaSetConfig::new(server.replica_set_name().unwrap())
        .with_member(Member::new(&primary))
        .with_member(Member::arbiter(&arbiter))
        .with_member(Member::new(&late).with_priority(0.0).hidden().delayed_by(Duration::from_secs(3600)));
    initiate(&ConnectOptions::from_uri(server.member(0).uri()).unwrap(), &config).await.unwrap();
    let client = Client::with_options(server.client_options().await.unwrap()).unwrap();
    client.wait_for_primary(Duration::from_secs(60)).await.unwrap();
    let monitor = watching(&server).await;
    (server, monitor)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_arbiter_and_a_hidden_delayed_member_are_sampled_as_what_they_are() {
    let (server, monitor) = odd_set().await;
    let [primary, arbiter, late] = [0, 1, 2].map(|index| server.member(index).host_port());
    let view = until(&monitor, "all are seen", |view| {
        let is = |host: &str, state: &str| view.members.iter().any(|member| member.host == host && is_in_state(member, state));
        is(&primary, "PRIMARY") && is(&arbiter, "ARBITER") && is(&late, "SECONDARY")
    })
    .await;
    let hosts: BTreeSet<&str> = view.members.iter().map(|member| &*member.host).collect();
    assert_eq!(hosts, BTreeSet::from([&*primary, &*arbiter, &*late]));
    for member in &view.members {
        let failures: Vec<_> = member.collectors.iter().filter_map(|collector| collector.failure.as_ref()).collect();
        assert!(failures.is_empty(), "{}: {failures:?}", member.host);
        assert!(member.number("mongodb_connections", &["current"]).is_some(), "{}", member.host);
    }
    // Who has no data has no lag and no oplog, and neither is zero.
    let of_arbiter = member(&view, &arbiter);
    assert_eq!(of_arbiter.number("mongodb_oplog_window_seconds", &[]), None);
    assert_eq!(member(&view, &primary).number("mongodb_replica_lag_seconds", &[&arbiter]), None);
    assert_eq!(view.primary().unwrap().host, primary);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_member_lags_by_its_delay() {
    let (server, monitor) = odd_set().await;
    let [primary, late] = [0, 2].map(|index| server.member(index).host_port());
    let orders = server.client().await.unwrap().database("shop").collection("orders");
    let lag = |view: &mongo_monitor::View| member(view, &primary).number("mongodb_replica_lag_seconds", &[&late]);
    // What is written now arrives there in an hour: with each write it is further behind.
    orders.insert_one(doc! { "n": 1 }).await.unwrap();
    let view = until(&monitor, "it lags", |view| lag(view).is_some_and(|lag| lag >= 2.0)).await;
    assert!(lag(&view).unwrap() < 3600.0);
    // It is to be: nobody is alarmed by it.
    assert_eq!(member(&view, &primary).number("mongodb_replica_lag_beyond_delay_seconds", &[&late]), Some(0.0));
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_in_recovery_is_shown_as_that_and_what_it_refuses_is_named() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let monitor = watching(&server).await;
    until(&monitor, "three members", |view| view.members.len() == 3).await;
    let index = (server.primary().await.unwrap() + 1) % 3;
    let host = server.member(index).host_port();
    let direct = server.member(index).client().await.unwrap();
    // Ends its reads and makes it RECOVERING until it is told otherwise.
    direct.database("admin").run_command(doc! { "replSetMaintenance": true }).await.unwrap();
    let view = until(&monitor, "it is in recovery", |view| {
        let member = member(view, &host);
        is_in_state(member, "RECOVERING") && collector(member, "namespaces").failure.is_some()
    })
    .await;
    let recovering = member(&view, &host);
    assert!(recovering.is_up() && recovering.number("mongodb_connections", &["current"]).is_some());
    direct.database("admin").run_command(doc! { "replSetMaintenance": false }).await.unwrap();
    until(&monitor, "it is back", |view| {
        let member = member(view, &host);
        is_in_state(member, "SECONDARY") && member.collectors.iter().all(|collector| collector.failure.is_none())
    })
    .await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_begins_while_nobody_is_there_shows_who_was_named_and_finds_the_others_later() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let hosts: BTreeSet<String> = (0..3).map(|index| server.member(index).host_port()).collect();
    (0..3).for_each(|index| server.member(index).kill().unwrap());
    let monitor = start(ConnectOptions::from_uri(server.member(0).uri()).unwrap()).await;
    let view = monitor.view();
    assert!(view.members.iter().all(|member| member.number("mongodb_up", &[]) == Some(0.0)), "{view:?}");
    monitor.stop().await;
    let monitor = watching(&server).await;
    for index in 0..3 {
        server.member(index).restart().await.unwrap();
    }
    until(&monitor, "all are up", |view| {
        let up: BTreeSet<String> =
            view.members.iter().filter(|member| member.is_up()).map(|member| member.host.clone()).collect();
        up == hosts
    })
    .await;
    monitor.stop().await;
}
