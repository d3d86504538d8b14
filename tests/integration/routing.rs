//! Read routing among the members of a real replica set.

use std::{collections::BTreeSet, time::Duration};

use mongo_core::{
    CancellationToken, Deployment, ErrorKind, Result,
    bson::{Document, doc},
    mongodb::options::WriteConcern,
};
use mongo_testkit::TestDeployment;
use mongo_workload::{MemberRole, ReadRoute, ReadRouter, ReadToken, RouterSettings, Target};

use crate::support::{mark, open, own, release, stop_followers};

async fn three() -> (TestDeployment, Deployment, ReadRouter) {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let deployment = open(&server).await;
    let majority = deployment.database("shop").collection::<Document>("c");
    let everywhere = WriteConcern::builder().w(mongo_core::mongodb::options::Acknowledgment::Nodes(3)).build();
    majority.insert_one(doc! { "_id": 1 }).write_concern(everywhere).await.unwrap();
    // Patient: other tests are at work as well.
    let mut settings = RouterSettings::default();
    (settings.answer_within, settings.believe_for) = (Duration::from_secs(2), Duration::from_secs(20));
    let router = ReadRouter::open(&deployment, settings).await.unwrap();
    (server, deployment, router)
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
