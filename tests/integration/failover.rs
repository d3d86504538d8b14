//! M4: what is told of a set that loses its primary, and for how long nobody took writes, against what the set itself says.

use std::{sync::Arc, time::Duration};

use mongo_core::bson::{DateTime, Document, doc};
use mongo_monitor::{CollectingSink, FailoverEvent, FailoverKind, Monitor};
use mongo_testkit::TestDeployment;

use crate::monitor::{until, watching};

async fn watched() -> (TestDeployment, Monitor) {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let monitor = watching(&server).await;
    until(&monitor, "three members are up", |view| view.members.iter().filter(|member| member.is_up()).count() == 3).await;
    (server, monitor)
}

/// Waits for an event of a kind.
async fn event(monitor: &Monitor, kind: FailoverKind) -> FailoverEvent {
    let find = || monitor.failovers().into_iter().rev().find(|event| event.kind == kind);
    until(monitor, &format!("{kind} is told"), |_| find().is_some()).await;
    find().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_downtime_of_a_killed_primary_is_that_of_the_election() {
    let (server, monitor) = watched().await;
    let told = Arc::new(CollectingSink::default());
    monitor.tell_failovers(Arc::<CollectingSink>::clone(&told));
    let primary = server.primary().await.unwrap();
    let before = DateTime::now();
    server.member(primary).kill().unwrap();
    let lost = event(&monitor, FailoverKind::NoPrimary).await;
    let found = event(&monitor, FailoverKind::NewPrimary).await;
    let after = DateTime::now();
    assert!(before <= lost.at && lost.at <= found.at && found.at <= after, "{lost:?} {found:?}");
    let down = found.down_seconds.unwrap();
    let between = (found.at.timestamp_millis() - lost.at.timestamp_millis()) as f64 / 1e3;
    assert!((down - between).abs() < 0.1, "{down} {between}");
    // The set itself: who is elected says when his term began. The driver learns it after that, and from him.
    let new = server.primary().await.unwrap();
    assert_eq!(found.server.as_deref(), Some(&*server.member(new).host_port()));
    let status = server.member(new).client().await.unwrap().database("admin").run_command(doc! { "replSetGetStatus": 1 }).await;
    let status = status.unwrap();
    let term: &DateTime = status.get_document("electionCandidateMetrics").unwrap().get_datetime("newTermStartDate").unwrap();
    assert!(lost.at <= *term && *term <= found.at, "{lost:?} {term} {found:?}");
    // And it does not learn it much later: its members tell it without being asked.
    assert!(found.at.timestamp_millis() - term.timestamp_millis() < 5_000, "{term} {found:?}");
    // Who died is told as well, with how long he was away.
    let dead = server.member(primary).host_port();
    assert_eq!(event(&monitor, FailoverKind::ServerDown).await.server.as_deref(), Some(&*dead));
    assert_eq!(event(&monitor, FailoverKind::MajorityAtRisk).await.server, None);
    server.member(primary).restart().await.unwrap();
    let back = event(&monitor, FailoverKind::ServerUp).await;
    assert_eq!(back.server.as_deref(), Some(&*dead));
    assert!(back.down_seconds.unwrap() >= down - 0.1, "{back:?}");
    let kinds: Vec<FailoverKind> = told.take_failovers().into_iter().map(|event| event.kind).collect();
    for kind in [FailoverKind::ServerDown, FailoverKind::NoPrimary, FailoverKind::NewPrimary, FailoverKind::ServerUp] {
        assert_eq!(kinds.iter().filter(|told| **told == kind).count(), 1, "{kinds:?}");
    }
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_steps_down_is_no_server_that_is_down() {
    let (server, monitor) = watched().await;
    let orders = server.client().await.unwrap().database("shop").collection::<Document>("orders");
    orders.insert_one(doc! { "n": 1 }).await.unwrap();
    let before = server.member(server.primary().await.unwrap()).host_port();
    server.step_down().await.unwrap();
    let found = event(&monitor, FailoverKind::NewPrimary).await;
    assert_ne!(found.server.as_deref(), Some(&*before));
    let down: Vec<_> = monitor.failovers().into_iter().filter(|event| event.kind == FailoverKind::ServerDown).collect();
    assert!(down.is_empty(), "{down:?}");
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_by_itself_that_is_away_is_missed_for_as_long() {
    let server = TestDeployment::standalone().start().await.unwrap();
    let monitor = watching(&server).await;
    until(&monitor, "it is up", |view| view.members.iter().any(mongo_monitor::MemberView::is_up)).await;
    server.member(0).kill().unwrap();
    let lost = event(&monitor, FailoverKind::NoWritableServer).await;
    server.member(0).restart().await.unwrap();
    let found = event(&monitor, FailoverKind::WritableServer).await;
    let between = Duration::from_millis(u64::try_from(found.at.timestamp_millis() - lost.at.timestamp_millis()).unwrap());
    assert!((found.down_seconds.unwrap() - between.as_secs_f64()).abs() < 0.1, "{lost:?} {found:?}");
    monitor.stop().await;
}
