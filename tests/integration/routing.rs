//! Read routing among the members of a real replica set.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use mongo_core::{
    CancellationToken, Deployment, ErrorKind, Result,
    bson::{Document, doc},
    metrics::MemoryMetrics,
    mongodb::options::WriteConcern,
};
use mongo_testkit::TestDeployment;
use mongo_workload::{MemberRole, ReadRoute, ReadRouter, ReadToken, RouterSettings, Target, Tier};

use crate::support::{endless, fill, gone, mark, open, own, release, replicated, stop_followers};

async fn three() -> (TestDeployment, Deployment, ReadRouter) {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let deployment = open(&server).await;
    deployment.database("shop").collection::<Document>("c").insert_one(doc! { "_id": 1 }).await.unwrap();
    replicated(&deployment, 3).await;
    let router = ReadRouter::open(&deployment, patient()).await.unwrap();
    (server, deployment, router)
}

/// Other tests are at work as well.
pub(crate) fn patient() -> RouterSettings {
    let mut settings = RouterSettings::default();
    (settings.answer_within, settings.believe_for) = (Duration::from_secs(2), Duration::from_secs(20));
    settings
}

/// Who answers.
async fn who(deployment: &Deployment, target: Target) -> Result<(String, MemberRole)> {
    let reply = deployment.database("admin").run_command(doc! { "hello": 1 }).selection_criteria(target.selection).await?;
    let role = if reply.get_bool("isWritablePrimary").unwrap() { MemberRole::Primary } else { MemberRole::Secondary };
    assert_eq!(reply.get_str("me").unwrap(), target.address);
    Ok((target.address, role))
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_go_where_the_route_says() {
    let (_server, deployment, router) = three().await;
    assert_eq!(router.members().len(), 3);
    let mut answered = BTreeSet::new();
    for _ in 0..60 {
        let (address, role) = router.read(&ReadRoute::secondary(), |target| who(&deployment, target)).await.unwrap();
        assert_eq!(role, MemberRole::Secondary);
        answered.insert(address);
        let (_, role) = router.read(&ReadRoute::primary(), |target| who(&deployment, target)).await.unwrap();
        assert_eq!(role, MemberRole::Primary);
    }
    assert_eq!(answered.len(), 2, "both secondaries have their share");
    // A find goes there, too.
    let orders = deployment.database("shop").collection::<Document>("c");
    let secondary = ReadRoute::secondary();
    let found = router.read(&secondary, |target| {
        let find = orders.find_one(doc! { "_id": 1 }).selection_criteria(target.selection);
        async move { Ok(find.await?) }
    });
    assert!(found.await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_written_reads_what_was_written_also_in_another_process() {
    let (server, deployment, router) = three().await;
    let orders = deployment.database("shop").collection::<Document>("c");
    let followers = stop_followers(&server).await;
    let w1 = WriteConcern::builder().w(mongo_core::mongodb::options::Acknowledgment::Nodes(1)).build();
    let mut session = deployment.client().start_session().await.unwrap();
    orders.insert_one(doc! { "_id": 2 }).write_concern(w1).session(&mut session).await.unwrap();
    let mut token = ReadToken::default();
    token.note("shop", session.operation_time().unwrap()).unwrap();
    // As it comes out of a header.
    let token: ReadToken = token.to_string().parse().unwrap();
    router.ask().await.unwrap();
    let route = ReadRoute::secondary_preferred().after(&token, "shop");
    let (_, role) = router.read(&route, |target| who(&deployment, target)).await.unwrap();
    assert_eq!(role, MemberRole::Primary, "no secondary has it");
    let stale = router.choose(&ReadRoute::secondary().after(&token, "shop")).unwrap_err();
    assert_eq!(stale.kind(), ErrorKind::Unavailable);
    let (_, role) = router.read(&ReadRoute::secondary_preferred(), |target| who(&deployment, target)).await.unwrap();
    assert_eq!(role, MemberRole::Secondary, "who has not written does not mind");
    release(followers).await;
    mark(&deployment).await;
    let stop = CancellationToken::new();
    let back = async {
        loop {
            router.ask().await.unwrap();
            if let Ok(target) = router.choose(&ReadRoute::secondary().after(&token, "shop")) {
                break target;
            }
        }
    };
    let target = tokio::time::timeout(Duration::from_secs(60), back).await.expect("the secondaries do not catch up");
    let found = orders.find_one(doc! { "_id": 2 }).selection_criteria(target.selection).await.unwrap();
    assert!(found.is_some(), "{} says that it has it", target.address);
    stop.cancel();
    router.watch(&stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_hangs_is_passed_over_and_an_election_is_followed() {
    let (server, deployment, router) = three().await;
    let primary = server.primary().await.unwrap();
    let hung = (primary + 1) % 3;
    let hung_address = server.member(hung).host_port();
    server.member(hung).pause().unwrap();
    let believed = async {
        loop {
            router.ask().await.unwrap();
            let chosen: BTreeSet<String> = (0..50).map(|_| router.choose(&ReadRoute::secondary()).unwrap().address).collect();
            if !chosen.contains(&hung_address) {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(90), believed).await.expect("it is still believed");
    for _ in 0..10 {
        let (address, _) = router.read(&ReadRoute::secondary(), |target| who(&deployment, target)).await.unwrap();
        assert_ne!(address, hung_address);
    }
    server.member(hung).resume().unwrap();
    let before = router.choose(&ReadRoute::primary()).unwrap().address;
    server.step_down().await.unwrap();
    let followed = async {
        loop {
            // Between two primaries nobody is fit, or one that has not heard of it yet.
            let _may_find_nobody = router.ask().await;
            if router.choose(&ReadRoute::primary()).is_ok_and(|target| target.address != before) {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), followed).await.expect("the new primary is not found");
    let (_, role) = router.read(&ReadRoute::primary(), |target| who(&deployment, target)).await.unwrap();
    assert_eq!(role, MemberRole::Primary);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_hangs_on_one_member_is_served_by_another_and_ends_on_the_first() {
    let (server, deployment, _) = three().await;
    fill(&deployment, "shop", "big", 500).await;
    replicated(&deployment, 3).await;
    let metrics = MemoryMetrics::default();
    let router = ReadRouter::open_with_metrics(&deployment, patient(), &metrics).await.unwrap();
    let big = deployment.database("shop").collection::<Document>("big");
    let route = ReadRoute::secondary().hedged("aggregate big");
    let quick = || vec![doc! { "$limit": 1 }, doc! { "$project": { "_id": 1 } }];
    let read = async |hangs: Option<&str>| {
        let work = |target: Target| {
            let stages = if hangs == Some(target.address.as_str()) { endless("big") } else { quick() };
            let aggregate = big.aggregate(stages).comment("hedged").selection_criteria(target.selection);
            async move {
                aggregate.await?;
                Ok(target.address)
            }
        };
        tokio::time::timeout(Duration::from_secs(60), router.read(&route, work)).await.expect("nobody answers").unwrap()
    };
    for _ in 0..100 {
        read(None).await;
        router.ask().await.unwrap();
    }
    let secondary = (server.primary().await.unwrap() + 1) % 3;
    let hangs = server.member(secondary).host_port();
    let won = || metrics.counter_value("mongo_workload_hedges_total", &[("outcome", "won")]);
    let before = won();
    // It is its turn in every second read.
    while won() == before {
        assert_ne!(read(Some(&hangs)).await, hangs);
        router.ask().await.unwrap();
    }
    let member = server.member(secondary).client().await.unwrap();
    assert!(gone(&member, &doc! { "command.comment": "hedged" }).await, "what nobody waits for any more is still at work");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overload_is_not_passed_on_as_a_multiple_of_itself() {
    let (server, deployment, router) = three().await;
    // IngressRequestRateLimitExceeded, as a server says that has too much to do.
    for member in 0..3 {
        server.fail_command(member, "alwaysOn", doc! { "failCommands": ["distinct"], "errorCode": 462 }).await.unwrap();
    }
    let orders = deployment.database("shop").collection::<Document>("c");
    let (asked, anybody) = (AtomicU32::new(0), ReadRoute::chain([Tier::Any]));
    let mut gave_up = 0;
    for _ in 0..60 {
        router.ask().await.unwrap();
        let read = router.read(&anybody, |target| {
            asked.fetch_add(1, Relaxed);
            let distinct = orders.distinct("_id", doc! {}).selection_criteria(target.selection);
            async move { Ok(distinct.await?) }
        });
        let error = read.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        gave_up += u32::from(error.to_string().contains("retry budget spent"));
    }
    // Nobody is left alone for it. Ten more from the beginning, and one for each five reads.
    let asked = asked.into_inner();
    assert!((60..=60 + 10 + 12).contains(&asked) && gave_up > 0, "{asked} asked, {gave_up} gave up");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_replica_set_says_so() {
    let server = TestDeployment::standalone().start().await.unwrap();
    let deployment = open(&server).await;
    let refused = ReadRouter::open(&deployment, RouterSettings::default()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    let (_one, deployment) = own().await;
    let router = ReadRouter::open(&deployment, RouterSettings::default()).await.unwrap();
    assert_eq!(router.choose(&ReadRoute::secondary()).unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(router.choose(&ReadRoute::secondary_preferred()).unwrap().role, MemberRole::Primary);
}
