//! Setting up a replica set, changing it, and writing to it in each replication mode (C9, C10).

use std::{num::NonZeroU32, time::Duration};

use mongo_core::{
    ConnectOptions, Error, ErrorKind, ReplicationMode, Result as CoreResult,
    bson::{Document, doc},
    connect,
    replica_set::{
        Member, MemberState, ReconfigureMode, ReplicaSetConfig, ReplicaSetExt, ReplicaSetSettings, StepDownSettings, initiate,
    },
};
use mongo_testkit::TestDeployment;

type TestResult = Result<(), Box<dyn std::error::Error>>;

const PATIENCE: Duration = Duration::from_secs(60);

fn kind<T>(result: CoreResult<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

/// A configuration of the first `members` servers, quick to elect.
fn config(deployment: &TestDeployment, members: usize) -> Result<ReplicaSetConfig, Box<dyn std::error::Error>> {
    let name = deployment.replica_set_name().ok_or("a set has a name")?;
    let settings = ReplicaSetSettings::default()
        .with_election_timeout(Duration::from_secs(1))
        .with_heartbeat_interval(Duration::from_millis(200));
    let members = deployment.members().iter().take(members);
    Ok(members.fold(ReplicaSetConfig::new(name).with_settings(settings), |config, member| {
        config.with_member(Member::new(member.host_port()))
    }))
}

fn member_options(deployment: &TestDeployment, index: usize) -> CoreResult<ConnectOptions> {
    ConnectOptions::from_uri(deployment.member(index).uri())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_is_initiated_grown_steered_and_shrunk() -> TestResult {
    let deployment = TestDeployment::replica_set(3).uninitiated().start().await?;
    let first = member_options(&deployment, 0)?;
    let mut config = config(&deployment, 2)?;
    config.members[0] = config.members[0].clone().with_tag("dc", "north").with_priority(2.0);

    initiate(&first, &config).await?;
    assert_eq!(kind(initiate(&first, &config).await), Some(ErrorKind::Conflict));

    let client = connect(ConnectOptions::from_uri(deployment.uri())?).await?.client().clone();
    let primary = client.wait_for_primary(PATIENCE).await?;
    assert_eq!(Some(primary.set.as_str()), deployment.replica_set_name());
    // A direct connection to another member finds the same primary.
    let through_second = deployment.member(1).client().await?.wait_for_primary(PATIENCE).await?;
    assert_eq!(through_second, primary);

    let running = client.replica_set_config().await?;
    assert_eq!(running.members.len(), 2);
    assert_eq!(running.members[0].tags.get("dc").map(String::as_str), Some("north"));
    assert_eq!(running.settings.election_timeout, Some(Duration::from_secs(1)));

    // The third joins without a vote, then gets one.
    let third = deployment.member(2).host_port();
    let grown = client
        .reconfigure(ReconfigureMode::Safe, |config| {
            *config = config.clone().with_member(Member::new(third.clone()).non_voting().with_tag("dc", "south"));
            Ok(())
        })
        .await?;
    assert_eq!((grown.members.len(), grown.voting_members(), grown.data_bearing_members()), (3, 2, 3));
    assert!(grown.version > running.version);
    let voting = client
        .reconfigure(ReconfigureMode::Safe, |config| {
            let member = config.member_mut(&third).ok_or_else(|| Error::internal("it is there"))?;
            member.votes = 1;
            member.priority = 1.0;
            Ok(())
        })
        .await?;
    assert_eq!(voting.voting_members(), 3);

    let deadline = tokio::time::Instant::now() + PATIENCE;
    let status = loop {
        let status = client.replica_set_status().await?;
        if status.members.iter().all(|member| matches!(member.state, MemberState::Primary | MemberState::Secondary)) {
            break status;
        }
        assert!(tokio::time::Instant::now() < deadline, "{status:?}");
        tokio::task::yield_now().await;
    };
    assert_eq!(status.primary().map(|member| member.host.clone()), Some(client.wait_for_primary(PATIENCE).await?.host));
    assert!(status.members.iter().all(|member| member.is_up && status.lag(member).is_some()));

    let before = client.wait_for_primary(PATIENCE).await?;
    client.step_down(StepDownSettings::default().with_duration(Duration::from_secs(30))).await?;
    // The client learns of the election with the next heartbeat.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let now = client.wait_for_primary(PATIENCE).await?;
        if now.host != before.host {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "the primary never changed");
        tokio::task::yield_now().await;
    }

    let gone = before.host.clone();
    let shrunk = client
        .reconfigure(ReconfigureMode::Safe, |config| {
            *config = config.clone().without_member(&gone);
            Ok(())
        })
        .await?;
    assert_eq!(shrunk.members.len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_break_a_rule_are_refused_before_the_server_sees_them() -> TestResult {
    let deployment = TestDeployment::replica_set(3).start().await?;
    let client = deployment.client().await?;
    let version = client.replica_set_config().await?.version;
    let two_votes = client
        .reconfigure(ReconfigureMode::Safe, |config| {
            for member in config.members.iter_mut().skip(1) {
                member.votes = 0;
                member.priority = 0.0;
            }
            Ok(())
        })
        .await;
    assert_eq!(kind(two_votes), Some(ErrorKind::InvalidInput));
    let too_eager = client
        .reconfigure(ReconfigureMode::Safe, |config| {
            config.members[0].hidden = true;
            Ok(())
        })
        .await;
    assert_eq!(kind(too_eager), Some(ErrorKind::InvalidInput));
    let own_error = client.reconfigure(ReconfigureMode::Safe, |_| Err(Error::cancelled())).await;
    assert_eq!(kind(own_error), Some(ErrorKind::Cancelled));
    assert_eq!(client.replica_set_config().await?.version, version);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_changes_at_once_both_happen() -> TestResult {
    let deployment = TestDeployment::replica_set(1).start().await?;
    let client = deployment.client().await?;
    let tag = |name: &'static str| {
        let client = client.clone();
        async move {
            client
                .reconfigure(ReconfigureMode::Safe, move |config| {
                    config.members[0].tags.insert(name.to_owned(), "x".to_owned());
                    Ok(())
                })
                .await
        }
    };
    let (one, two, three) = tokio::join!(tag("one"), tag("two"), tag("three"));
    one?;
    two?;
    three?;
    let tags = &client.replica_set_config().await?.members[0].tags;
    assert!(["one", "two", "three"].iter().all(|name| tags.contains_key(*name)), "{tags:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_change_needs_no_majority() -> TestResult {
    let deployment = TestDeployment::replica_set(3).start().await?;
    let primary = deployment.primary().await?;
    let left: usize = (0..3).find(|index| *index != primary).ok_or("three members")?;
    for index in (0..3).filter(|index| *index != left) {
        deployment.member(index).kill()?;
    }
    let survivor = deployment.member(left).host_port();
    let client = deployment.member(left).client().await?;
    client
        .reconfigure(ReconfigureMode::Force, |config| {
            config.members.retain(|member| member.host == survivor);
            Ok(())
        })
        .await?;
    assert_eq!(client.wait_for_primary(PATIENCE).await?.host, survivor);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_no_members_say_so() -> TestResult {
    let standalone = TestDeployment::standalone().start().await?;
    let options = ConnectOptions::from_uri(standalone.uri())?;
    let config = ReplicaSetConfig::new("rs").with_member(Member::new(standalone.member(0).host_port()));
    assert_eq!(kind(initiate(&options, &config).await), Some(ErrorKind::Unsupported));
    let client = standalone.client().await?;
    assert_eq!(kind(client.wait_for_primary(PATIENCE).await), Some(ErrorKind::Unsupported));
    assert_eq!(kind(client.replica_set_config().await), Some(ErrorKind::Unsupported));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_initiation_that_cannot_work_is_refused_and_harms_nothing() -> TestResult {
    let deployment = TestDeployment::replica_set(1).uninitiated().start().await?;
    let options = member_options(&deployment, 0)?;
    let good = config(&deployment, 1)?;
    let mut wrong_name = good.clone();
    wrong_name.name = "another".to_owned();
    assert_eq!(kind(initiate(&options, &wrong_name).await), Some(ErrorKind::InvalidInput));
    let unreachable = good.clone().with_member(Member::new("127.0.0.1:1"));
    assert_eq!(kind(initiate(&options, &unreachable).await), Some(ErrorKind::Unavailable));
    let mut deadly = good.clone();
    deadly.settings.other.insert("getLastErrorDefaults", doc! { "w": "majority", "wtimeout": 0 });
    if !deployment.version().starts_with("4.") {
        assert_eq!(kind(initiate(&options, &deadly).await), Some(ErrorKind::Unsupported));
    }
    let client = deployment.member(0).client().await?;
    assert_eq!(kind(client.replica_set_config().await), Some(ErrorKind::NotFound));
    assert_eq!(kind(client.wait_for_primary(Duration::from_millis(300)).await), Some(ErrorKind::Timeout));
    initiate(&options, &good).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_without_a_successor_stays() -> TestResult {
    let deployment = TestDeployment::replica_set(1).start().await?;
    let settings = StepDownSettings::default().with_catch_up(Duration::from_secs(1));
    assert_eq!(kind(deployment.client().await?.step_down(settings).await), Some(ErrorKind::Unavailable));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_replication_mode_waits_for_its_members() -> TestResult {
    let deployment = TestDeployment::replica_set(3).start().await?;
    let client = deployment.client().await?;
    let members = u32::try_from(client.replica_set_config().await?.data_bearing_members())?;
    let members = NonZeroU32::new(members).ok_or("there are members")?;
    let plain = client.database("modes").collection::<Document>("writes");
    let modes = [ReplicationMode::Asynchronous, ReplicationMode::SemiSynchronous, ReplicationMode::Synchronous];
    for mode in modes {
        mode.on_collection(&plain, members).insert_one(doc! { "mode": mode.as_str() }).await?;
        let database = mode.on_database(&client.database("modes"), members);
        assert_eq!(database.collection::<Document>("writes").write_concern(), Some(&mode.write_concern(members)));
    }

    let primary = deployment.primary().await?;
    let victim = (0..3).find(|index| *index != primary).ok_or("three members")?;
    deployment.member(victim).kill()?;
    for mode in [ReplicationMode::Asynchronous, ReplicationMode::SemiSynchronous] {
        mode.on_collection(&plain, members).insert_one(doc! { "mode": mode.as_str(), "down": 1 }).await?;
    }
    let mut options = ReplicationMode::Synchronous.collection_options(members);
    options.write_concern = Some(ReplicationMode::Synchronous.write_concern_within(members, Duration::from_millis(500)));
    let all = client.database("modes").collection_with_options::<Document>("writes", options);
    let error = all.insert_one(doc! { "mode": "synchronous", "down": 1 }).await.map_err(Error::from);
    assert_eq!(kind(error), Some(ErrorKind::Timeout));
    // The time limit undoes nothing.
    assert_eq!(plain.count_documents(doc! { "mode": "synchronous" }).await?, 2);
    Ok(())
}
