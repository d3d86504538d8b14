//! The testkit on real servers. Needs what the testkit needs; see its README.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use mongo_core::mongodb::{
    Client,
    bson::{Document, doc},
    error::Error as DriverError,
    options::{ClientOptions, WriteConcern},
};
use mongo_testkit::{Error, TestDeployment, shared, unique_name};
use tokio::time::{Instant, sleep, timeout};

async fn ping(client: &Client) -> Result<Document, DriverError> {
    client.database("admin").run_command(doc! { "ping": 1 }).await
}

/// Waits for a majority, which is not the default before MongoDB 5.0: what a single member knows may die with it.
async fn insert(client: &Client, id: i32) -> Result<(), DriverError> {
    let things = client.database("test").collection("things");
    things.insert_one(doc! { "_id": id }).write_concern(WriteConcern::majority()).await.map(|_| ())
}

async fn count(client: &Client) -> u64 {
    client.database("test").collection::<Document>("things").count_documents(doc! {}).await.unwrap()
}

/// Waits until `condition` holds, or fails the test.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}: not within 10 s");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Whether the process is no more; one that has ended and is not reaped yet counts as gone. A server in a container
/// is no process of ours, and has tests of its own.
fn is_gone(process_id: Option<u32>) -> bool {
    let Some(process_id) = process_id else { return true };
    let state = Command::new("ps").args(["-o", "stat=", "-p", &process_id.to_string()]).output().unwrap();
    let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
    state.is_empty() || state.starts_with('Z')
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standalone_and_a_set_come_up_and_say_where_from() {
    let (standalone, set) =
        tokio::try_join!(TestDeployment::standalone().start(), TestDeployment::replica_set(1).start()).unwrap();

    assert!(standalone.uri().ends_with("/?directConnection=true"), "{}", standalone.uri());
    assert_eq!(standalone.replica_set_name(), None);
    let hello = standalone.client().await.unwrap().database("admin").run_command(doc! { "hello": 1 }).await.unwrap();
    assert!(hello.get("setName").is_none());

    let client = set.client().await.unwrap();
    let hello = client.database("admin").run_command(doc! { "hello": 1 }).await.unwrap();
    assert_eq!(hello.get_str("setName").ok(), set.replica_set_name());
    let build = client.database("admin").run_command(doc! { "buildInfo": 1 }).await.unwrap();
    assert_eq!(build.get_str("version").unwrap(), set.version());
    assert!(set.source().to_string().ends_with(&format!("(MongoDB {})", set.version())), "{}", set.source());
    assert!(set.member(0).log_tail(3).lines().count() == 3);
    // Sessions are there from the start: a transaction is the strictest user of them.
    let mut session = client.start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    let things = client.database("test").collection("things");
    things.insert_one(doc! { "_id": 1 }).session(&mut session).await.unwrap();
    session.commit_transaction().await.unwrap();
    assert_eq!(count(&client).await, 1);

    let folder = set.folder().to_owned();
    let process_id = set.member(0).process_id();
    set.stop().await;
    assert!(!folder.exists() && is_gone(process_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_the_password() {
    let (standalone, set) = tokio::try_join!(
        TestDeployment::standalone().with_auth().start(),
        TestDeployment::replica_set(1).with_auth().with_tls().start(),
    )
    .unwrap();
    for deployment in [standalone, set] {
        let (user, password) = deployment.credentials().unwrap();
        assert_eq!(user, "root");
        let mut options = deployment.client_options().await.unwrap();
        assert_eq!(options.credential.as_ref().and_then(|credential| credential.password.as_deref()), Some(password));
        ping(&Client::with_options(options.clone()).unwrap()).await.unwrap();
        insert(&deployment.member(0).client().await.unwrap(), 1).await.unwrap();

        options.credential = None;
        assert!(insert(&Client::with_options(options).unwrap(), 2).await.is_err());
        // The fail points need a login, too.
        deployment.fail_command(0, "alwaysOn", doc! { "failCommands": ["find"], "errorCode": 2 }).await.unwrap();
        deployment.fail_command_off(0).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_tls() {
    let set = TestDeployment::replica_set(1).with_tls().with_fault_proxies().start().await.unwrap();
    ping(&set.client().await.unwrap()).await.unwrap();

    let certificate = set.client_certificate().unwrap().to_str().unwrap();
    let with_certificate = format!("{}&tlsCertificateKeyFile={certificate}", set.uri());
    ping(&Client::with_uri_str(with_certificate).await.unwrap()).await.unwrap();

    let trusts_another = TestDeployment::standalone().with_tls().start().await.unwrap();
    let theirs = trusts_another.ca_file().unwrap().to_str().unwrap();
    let plain = format!("mongodb://{}/?directConnection=true", set.member(0).host_port());
    for wrong in [plain.clone(), format!("{plain}&tls=true&tlsCAFile={theirs}")] {
        let mut options = ClientOptions::parse(wrong).await.unwrap();
        options.server_selection_timeout = Some(Duration::from_millis(500));
        assert!(ping(&Client::with_options(options).unwrap()).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_comes_back_with_its_data() {
    let set = TestDeployment::replica_set(1).start().await.unwrap();
    let client = set.client().await.unwrap();
    insert(&client, 1).await.unwrap();

    let member = set.member(0);
    let (host, first) = (member.host_port(), member.process_id());
    member.kill().unwrap();
    assert!(!member.is_running() && member.process_id().is_none() && is_gone(first));
    assert!(matches!(member.pause(), Err(Error::Server(_))));
    member.kill().unwrap();
    member.restart().await.unwrap();
    assert_eq!(member.host_port(), host);
    set.primary().await.unwrap();
    assert_eq!(count(&client).await, 1);
    insert(&client, 2).await.unwrap();

    // One that runs is shut down first.
    let second = member.process_id();
    member.restart().await.unwrap();
    assert!(is_gone(second));
    set.primary().await.unwrap();
    assert_eq!(count(&client).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_server_answers_when_it_may() {
    let standalone = TestDeployment::standalone().start().await.unwrap();
    let client = standalone.client().await.unwrap();
    ping(&client).await.unwrap();

    let member = standalone.member(0);
    member.pause().unwrap();
    assert!(member.is_running());
    assert!(timeout(Duration::from_millis(200), ping(&client)).await.is_err());
    member.resume().unwrap();
    ping(&client).await.unwrap();

    // A drop while it is frozen leaves nothing either.
    let process_id = member.process_id();
    member.pause().unwrap();
    drop(standalone);
    assert!(is_gone(process_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_of_three_gets_a_new_primary() {
    let set = TestDeployment::replica_set(3).start().await.unwrap();
    let client = set.client().await.unwrap();
    insert(&client, 1).await.unwrap();

    let first = set.primary().await.unwrap();
    set.step_down().await.unwrap();
    let second = set.primary().await.unwrap();
    assert_ne!(first, second);
    insert(&client, 2).await.unwrap();

    set.member(second).kill().unwrap();
    let third = set.primary().await.unwrap();
    assert_ne!(second, third);
    insert(&client, 3).await.unwrap();
    set.member(second).restart().await.unwrap();
    assert_eq!(count(&client).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_of_one_steps_down_and_comes_back() {
    let set = TestDeployment::replica_set(1).start().await.unwrap();
    let client = set.member(0).client().await.unwrap();
    let term = async |client: &Client| {
        let status = client.database("admin").run_command(doc! { "replSetGetStatus": 1 }).await.unwrap();
        status.get_i64("term").unwrap()
    };
    let before = term(&client).await;
    set.step_down().await.unwrap();
    assert!(term(&client).await > before);
    assert!(matches!(TestDeployment::standalone().start().await.unwrap().step_down().await, Err(Error::Command { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_proxies_stand_between_a_set_and_everybody() {
    let set = TestDeployment::replica_set(2).with_fault_proxies().start().await.unwrap();
    let proxy = |index: usize| set.member(index).fault_proxy().unwrap();
    let client = set.client().await.unwrap();
    insert(&client, 1).await.unwrap();
    let hosts = client.database("admin").run_command(doc! { "hello": 1 }).await.unwrap();
    let hosts: Vec<_> = hosts.get_array("hosts").unwrap().iter().map(|host| host.as_str().unwrap()).collect();
    assert_eq!(hosts, [proxy(0).address().to_string(), proxy(1).address().to_string()]);

    // A lost reply: the driver must try again, and the server must know the write.
    let primary = set.primary().await.unwrap();
    set.fail_command(primary, doc! { "times": 1 }, doc! { "failCommands": ["insert"], "closeConnection": true }).await.unwrap();
    insert(&client, 2).await.unwrap();
    proxy(primary).reset();
    insert(&client, 3).await.unwrap();

    let mut options = set.client_options().await.unwrap();
    options.server_selection_timeout = Some(Duration::from_millis(500));
    let impatient = Client::with_options(options).unwrap();
    ping(&impatient).await.unwrap();
    proxy(0).cut();
    proxy(1).cut();
    assert!(ping(&impatient).await.is_err());
    // Past the proxies the testkit still knows its way.
    set.fail_command_off(primary).await.unwrap();
    proxy(0).heal();
    proxy(1).heal();
    set.primary().await.unwrap();
    insert(&client, 4).await.unwrap();
    assert_eq!(count(&client).await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shared_set_serves_whoever_asks() {
    let names: Vec<_> = (0..3).map(|_| unique_name("shared")).collect();
    let tasks: Vec<_> = names
        .into_iter()
        .map(|name| {
            tokio::spawn(async move {
                let client = shared().await.unwrap().client().await.unwrap();
                let things = client.database(&name).collection::<Document>("things");
                things.insert_one(doc! { "_id": 1 }).await.unwrap();
                assert_eq!(things.count_documents(doc! {}).await.unwrap(), 1);
                client.database(&name).drop().await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// The same static deployment from another runtime than that of the test above.
#[test]
fn the_shared_set_outlives_a_runtime() {
    for _ in 0..2 {
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            ping(&shared().await.unwrap().client().await.unwrap()).await.unwrap();
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_test_leaves_nothing() {
    let (sender, receiver) = std::sync::mpsc::channel::<(Option<u32>, PathBuf)>();
    let test = tokio::spawn(async move {
        let standalone = TestDeployment::standalone().start().await.unwrap();
        sender.send((standalone.member(0).process_id(), standalone.folder().to_owned())).unwrap();
        panic!("as a test would");
    });
    assert!(test.await.unwrap_err().is_panic());
    let (process_id, folder) = receiver.recv().unwrap();
    assert!(is_gone(process_id) && !folder.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_its_arguments_says_so() {
    let error = TestDeployment::replica_set(2).with_arg("--no-such-option").start().await.unwrap_err();
    assert!(matches!(error, Error::Server(_)), "{error:?}");
    assert!(error.to_string().contains("no-such-option") && !error.to_string().contains('\n'), "{error}");
    assert!(matches!(TestDeployment::replica_set(8).start().await, Err(Error::Invalid(_))));
}

/// Kills a process that has a deployment, and sees the watchdog clean up. The process is this test once more.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_test_process_leaves_nothing() {
    const ROLE: &str = "MONGO_TESTKIT_VICTIM";
    if std::env::var_os(ROLE).is_some() {
        let set = TestDeployment::replica_set(1).start().await.unwrap();
        let process_id = set.member(0).process_id().map_or_else(|| "-".to_owned(), |id| id.to_string());
        println!("\nvictim {process_id} {}", set.folder().display());
        sleep(Duration::from_secs(600)).await;
        return;
    }
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_test_process_leaves_nothing", "--nocapture"])
        .env(ROLE, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let line = lines.find(|line| line.as_ref().unwrap().starts_with("victim ")).unwrap().unwrap();
    let words: Vec<_> = line.splitn(3, ' ').collect();
    let (process_id, folder) = (words[1].parse().ok(), Path::new(words[2]));
    assert!(folder.exists());

    victim.kill().unwrap();
    victim.wait().unwrap();
    eventually("the server ends", || is_gone(process_id)).await;
    eventually("the folder goes", || !folder.exists()).await;
}
