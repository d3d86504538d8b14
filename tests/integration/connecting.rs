//! C1-C4: connecting with authentication and TLS, and what health says.

use std::time::Duration;

use mongo_core::{ConnectOptions, ErrorKind, HealthStatus, ServerVersion, Topology, connect};
use mongo_testkit::TestDeployment;

#[tokio::test(flavor = "multi_thread")]
async fn authentication_works_and_its_failure_shows_no_password() {
    let server = TestDeployment::replica_set(1).with_auth().start().await.unwrap();
    let deployment = connect(ConnectOptions::from_uri(server.uri()).unwrap()).await.unwrap();
    assert!(matches!(deployment.topology(), Topology::ReplicaSet(_)));
    assert!(deployment.server_version() >= ServerVersion::new(4, 2, 0));

    let options = ConnectOptions::from_uri(server.uri()).unwrap().with_credentials("somebody", "hunter2-secret");
    let error = connect(options.with_server_selection_timeout(Duration::from_secs(3))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{}", error.report());
    assert!(!format!("{error:?} {}", error.report()).contains("hunter2"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_verified_with_the_authority_and_refused_without() {
    let server = TestDeployment::replica_set(1).with_tls().start().await.unwrap();
    connect(ConnectOptions::from_uri(server.uri()).unwrap()).await.unwrap();
    let plain = format!("mongodb://{}/?directConnection=true", server.member(0).host_port());
    let with_ca = ConnectOptions::from_uri(plain.clone()).unwrap().with_ca_file(server.ca_file().unwrap());
    connect(with_ca).await.unwrap();
    let system_roots = ConnectOptions::from_uri(plain).unwrap().with_tls().with_server_selection_timeout(Duration::from_secs(2));
    let error = connect(system_roots).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.report());
    assert!(error.report().contains("certificate"), "{}", error.report());
}

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_a_set_that_loses_its_primary_and_its_life() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let options = ConnectOptions::from_uri(server.uri()).unwrap().with_server_selection_timeout(Duration::from_secs(1));
    let deployment = connect(options).await.unwrap();
    let timeout = Duration::from_secs(5);
    let health = deployment.ready(timeout).await.unwrap();
    assert_eq!((health.status, health.members.len()), (HealthStatus::Healthy, 1));
    assert!(health.latency.is_some() && health.primary.is_some());
    server.member(0).kill().unwrap();
    let health = deployment.health(timeout).await;
    assert_eq!(health.status, HealthStatus::Down);
    assert!(!health.reasons.is_empty());
    assert_eq!(deployment.ready(timeout).await.unwrap_err().kind(), ErrorKind::Unavailable);
}
