//! The testkit's containers. Needs Docker and an image; see the README.
#![cfg(feature = "docker")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use mongo_core::mongodb::{
    Client,
    bson::{Document, doc},
    error::Error as DriverError,
    options::WriteConcern,
};
use mongo_testkit::{Error, Source, TestDeployment};
use tokio::time::{Instant, sleep, timeout};

async fn insert(client: &Client, id: i32) -> Result<(), DriverError> {
    let things = client.database("test").collection("things");
    things.insert_one(doc! { "_id": id }).write_concern(WriteConcern::majority()).await.map(|_| ())
}

async fn count(client: &Client) -> u64 {
    client.database("test").collection::<Document>("things").count_documents(doc! {}).await.unwrap()
}

/// How many containers there are, running or not, for the deployment with this folder.
fn containers(deployment_folder: &str) -> usize {
    let name = format!("name={}", deployment_folder.rsplit('/').next().unwrap());
    let listed = Command::new("docker").args(["ps", "--all", "--quiet", "--filter", &name]).output().unwrap();
    String::from_utf8_lossy(&listed.stdout).lines().count()
}

fn folder(deployment: &TestDeployment) -> String {
    deployment.folder().to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_is_killed_paused_and_restarted() {
    let set = TestDeployment::replica_set(1).in_containers().with_tls().start().await.unwrap();
    assert!(matches!(set.source(), Source::Docker { .. }), "{}", set.source());
    let client = set.client().await.unwrap();
    insert(&client, 1).await.unwrap();

    let member = set.member(0);
    member.kill().unwrap();
    member.kill().unwrap();
    assert!(!member.is_running());
    assert!(matches!(member.pause(), Err(Error::Server(_))));
    member.restart().await.unwrap();
    set.primary().await.unwrap();
    assert_eq!(count(&client).await, 1);

    member.pause().unwrap();
    assert!(timeout(Duration::from_millis(200), insert(&client, 2)).await.is_err());
    member.resume().unwrap();
    insert(&client, 3).await.unwrap();
    member.pause().unwrap();
    member.restart().await.unwrap();
    assert!(member.log_tail(5).lines().count() == 5);

    let folder = folder(&set);
    assert_eq!(containers(&folder), 1);
    drop(set);
    assert_eq!(containers(&folder), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_servers_with_authentication_elect_another() {
    let set = TestDeployment::replica_set(3).in_containers().with_auth().with_fault_proxies().start().await.unwrap();
    let client = set.client().await.unwrap();
    insert(&client, 1).await.unwrap();
    set.step_down().await.unwrap();
    let primary = set.primary().await.unwrap();
    set.member(primary).kill().unwrap();
    assert_ne!(set.primary().await.unwrap(), primary);
    insert(&client, 2).await.unwrap();
    assert_eq!(count(&client).await, 2);
    let folder = folder(&set);
    set.stop().await;
    assert_eq!(containers(&folder), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_its_arguments_says_so() {
    let error = TestDeployment::standalone().in_containers().with_arg("--no-such-option").start().await.unwrap_err();
    assert!(error.to_string().contains("no-such-option"), "{error}");
}

/// A container is no child of anybody here, yet it goes with the process. The process is this test once more.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_test_process_leaves_no_container() {
    const ROLE: &str = "MONGO_TESTKIT_VICTIM";
    if std::env::var_os(ROLE).is_some() {
        let standalone = TestDeployment::standalone().in_containers().start().await.unwrap();
        println!("\nvictim {}", folder(&standalone));
        sleep(Duration::from_secs(600)).await;
        return;
    }
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_test_process_leaves_no_container", "--nocapture"])
        .env(ROLE, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let line = lines.find(|line| line.as_ref().unwrap().starts_with("victim ")).unwrap().unwrap();
    let folder = line.trim_start_matches("victim ");
    assert_eq!(containers(folder), 1);
    victim.kill().unwrap();
    victim.wait().unwrap();
    let begin = Instant::now();
    while containers(folder) > 0 {
        assert!(begin.elapsed() < Duration::from_secs(10), "the container is still there");
        sleep(Duration::from_millis(50)).await;
    }
}
