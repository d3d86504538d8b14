//! P7: what the driver sees of a replica set behind the proxy, and how it fails over.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use futures_util::TryStreamExt as _;
use mongo_core::{
    bson::{Document, doc},
    mongodb::{
        Client,
        options::{ClientOptions, ReadPreference, SelectionCriteria},
    },
    replica_set::{Member, ReconfigureMode, ReplicaSetExt as _},
};
use mongo_proxy::{ProxyHandle, ProxySettings, Topology};
use mongo_testkit::TestDeployment;
use tokio::task::JoinSet;

use crate::{
    proxy::listening,
    support::{open, own, replicated},
};

/// Three members behind a proxy, and a client that knows one address of it.
async fn behind(server: &TestDeployment) -> (JoinSet<()>, ProxyHandle, Client) {
    let settings = ProxySettings::new(server.member(0).host_port()).with_topology(Topology::ReplicaSet);
    let (running, address, handle) = listening(settings).await;
    (running, handle, client(server, address).await)
}

async fn client(server: &TestDeployment, address: SocketAddr) -> Client {
    let uri = format!("mongodb://{address}/?replicaSet={}&heartbeatFrequencyMS=500", server.replica_set_name().unwrap());
    let mut options = ClientOptions::parse(uri).await.unwrap();
    options.server_selection_timeout = Some(Duration::from_secs(30));
    Client::with_options(options).unwrap()
}

/// The addresses at which the driver finds members.
async fn hosts(client: &Client) -> BTreeSet<String> {
    let hello = client.database("admin").run_command(doc! { "hello": 1 }).await.unwrap();
    hello.get_array("hosts").unwrap().iter().map(|host| host.as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_is_seen_through_the_proxy_and_secondaries_are_read_from() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let (_running, handle, client) = behind(&server).await;
    let orders = client.database("shop").collection::<Document>("orders");
    orders.insert_one(doc! { "_id": 1 }).await.unwrap();
    replicated(&open(&server).await, 3).await;
    let members = handle.statistics().members;
    assert_eq!(
        members.keys().cloned().collect::<BTreeSet<_>>(),
        server.members().iter().map(mongo_testkit::Member::host_port).collect()
    );
    let seen = hosts(&client).await;
    assert_eq!(seen, members.into_values().collect());
    let secondary = SelectionCriteria::ReadPreference(ReadPreference::Secondary { options: None });
    for _ in 0..20 {
        assert!(orders.find_one(doc! {}).selection_criteria(secondary.clone()).await.unwrap().is_some());
    }
    let upstreams: BTreeSet<String> = handle.connections().into_iter().map(|connection| connection.upstream).collect();
    assert_eq!(upstreams.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_outlive_a_failover_through_the_proxy_and_none_is_done_twice() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let (_running, _, client) = behind(&server).await;
    let orders = client.database("shop").collection::<Document>("orders");
    orders.insert_many((0..4).map(|id| doc! { "_id": id, "n": 0 })).await.unwrap();
    let mut writers = JoinSet::new();
    let stop = mongo_core::CancellationToken::new();
    let (written, mut enough) = tokio::sync::mpsc::unbounded_channel::<()>();
    for id in 0..4 {
        let (orders, stop, written) = (orders.clone(), stop.clone(), written.clone());
        writers.spawn(async move {
            let mut done = 0;
            while !stop.is_cancelled() {
                // The driver tries it once more by itself; that must be enough for an election, and add nothing twice.
                orders.update_one(doc! { "_id": id }, doc! { "$inc": { "n": 1 } }).await.unwrap();
                done += 1;
                let _gone = written.send(());
            }
            (id, done)
        });
    }
    let more = async |enough: &mut tokio::sync::mpsc::UnboundedReceiver<()>| {
        let some = async {
            for _ in 0..200 {
                enough.recv().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(120), some).await.expect("nothing is written any more");
    };
    more(&mut enough).await;
    server.step_down().await.unwrap();
    while enough.try_recv().is_ok() {}
    more(&mut enough).await;
    stop.cancel();
    for (id, done) in writers.join_all().await {
        let found = orders.find_one(doc! { "_id": id }).await.unwrap().unwrap();
        assert_eq!(found.get_i32("n").unwrap(), done, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_driver_finds_a_new_primary_when_the_old_one_is_killed() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let (_running, _, client) = behind(&server).await;
    let orders = client.database("shop").collection::<Document>("orders");
    orders.insert_one(doc! {}).await.unwrap();
    let primary = server.primary().await.unwrap();
    server.member(primary).kill().unwrap();
    let back = async { while orders.insert_one(doc! {}).await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(120), back).await.expect("no new primary is found");
    server.member(primary).restart().await.unwrap();
    // Through the same address as before.
    let all = async { while hosts(&client).await.len() < 3 {} };
    tokio::time::timeout(Duration::from_secs(60), all).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_joins_has_a_door_and_one_that_leaves_is_not_seen_any_more() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let own = server.client().await.unwrap();
    let primary = server.primary().await.unwrap();
    let third = server.member((primary + 1) % 3).host_port();
    let without = |gone: String| {
        move |config: &mut mongo_core::replica_set::ReplicaSetConfig| {
            *config = config.clone().without_member(&gone);
            Ok(())
        }
    };
    own.reconfigure(ReconfigureMode::Safe, without(third.clone())).await.unwrap();
    let settings = ProxySettings::new(server.member(primary).host_port()).with_topology(Topology::ReplicaSet);
    let (_running, address, handle) = listening(settings).await;
    let client = client(&server, address).await;
    assert_eq!(hosts(&client).await.len(), 2);
    own.reconfigure(ReconfigureMode::Safe, |config| {
        *config = config.clone().with_member(Member::new(third.clone()));
        Ok(())
    })
    .await
    .unwrap();
    let now = async {
        loop {
            let seen = hosts(&client).await;
            if seen.len() == 3 {
                break seen;
            }
        }
    };
    let seen = tokio::time::timeout(Duration::from_secs(60), now).await.expect("the new member is not seen");
    let members = handle.statistics().members;
    assert!(seen.contains(&members[&third]));
    // Somebody is there.
    let direct = format!("mongodb://{}/?directConnection=true", members[&third]);
    let direct = Client::with_uri_str(direct).await.unwrap();
    direct.database("admin").run_command(doc! { "ping": 1 }).await.unwrap();
    own.reconfigure(ReconfigureMode::Safe, without(third.clone())).await.unwrap();
    let gone = async { while hosts(&client).await.len() > 2 {} };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("the member that has left is still seen");
}

#[tokio::test(flavor = "multi_thread")]
async fn as_a_load_balancer_the_proxy_keeps_cursors_and_transactions_where_they_belong() {
    let (server, _) = own().await;
    let (_running, address, handle) = listening(ProxySettings::new(server.member(0).host_port())).await;
    let uri = format!("mongodb://{address}/?loadBalanced=true&appName=balanced");
    let client = Client::with_uri_str(uri).await.unwrap();
    let orders = client.database("shop").collection::<Document>("orders");
    orders.insert_many((0..500).map(|id| doc! { "_id": id })).await.unwrap();
    // Several cursors at once, each with batches to come.
    let mut cursors = Vec::new();
    for _ in 0..5 {
        cursors.push(orders.find(doc! {}).batch_size(20).await.unwrap());
    }
    for cursor in cursors {
        assert_eq!(cursor.try_collect::<Vec<_>>().await.unwrap().len(), 500);
    }
    let mut session = client.start_session().await.unwrap();
    for (id, commits) in [("a", true), ("b", false)] {
        session.start_transaction().await.unwrap();
        orders.insert_one(doc! { "_id": id }).session(&mut session).await.unwrap();
        orders.update_one(doc! { "_id": id }, doc! { "$set": { "x": 1 } }).session(&mut session).await.unwrap();
        if commits {
            session.commit_transaction().await.unwrap();
        } else {
            session.abort_transaction().await.unwrap();
        }
    }
    assert_eq!(orders.count_documents(doc! { "_id": { "$in": ["a", "b"] } }).await.unwrap(), 1);
    let mut changes = orders.watch().await.unwrap();
    orders.delete_one(doc! { "_id": 7 }).await.unwrap();
    assert_eq!(changes.try_next().await.unwrap().unwrap().document_key, Some(doc! { "_id": 7 }));
    assert!(handle.connections().iter().any(|connection| connection.application.as_deref() == Some("balanced")));
}
