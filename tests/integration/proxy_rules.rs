//! P2 to P4, P8: what rules do to the driver, on a real server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::TryStreamExt as _;
use mongo_core::{
    bson::{Document, doc},
    mongodb::{
        Client, Collection,
        error::{Error, ErrorKind},
        event::{EventHandler, cmap::CmapEvent, sdam::SdamEvent},
        options::{ClientOptions, Credential, ServerApi, ServerApiVersion},
    },
};
use mongo_proxy::{Access, Action, ConcurrencyRule, Denial, Key, Match, ProxyHandle, ProxySettings, RateRule, Rule, Rules};
use mongo_testkit::TestDeployment;
use tokio::task::JoinSet;

use crate::{proxy::listening, support::own};

/// A client through a proxy with rules, and what its driver has done because of them.
struct Guarded {
    _running: JoinSet<()>,
    handle: ProxyHandle,
    client: Client,
    pools_cleared: Arc<AtomicUsize>,
    servers_given_up: Arc<AtomicUsize>,
}

impl Guarded {
    async fn new(
        server: &TestDeployment,
        rules: impl IntoIterator<Item = Rule>,
        change: impl FnOnce(&mut ClientOptions),
    ) -> Self {
        let settings = ProxySettings::new(server.member(0).host_port()).with_rules(Rules::new(rules));
        let (running, address, handle) = listening(settings).await;
        let mut options = ClientOptions::parse(format!("mongodb://{address}/?directConnection=true")).await.unwrap();
        options.server_selection_timeout = Some(Duration::from_secs(10));
        let (pools_cleared, servers_given_up) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (cleared, given_up) = (Arc::clone(&pools_cleared), Arc::clone(&servers_given_up));
        options.cmap_event_handler = Some(EventHandler::callback(move |event| {
            if matches!(event, CmapEvent::PoolCleared(_)) {
                cleared.fetch_add(1, SeqCst);
            }
        }));
        options.sdam_event_handler = Some(EventHandler::callback(move |event| {
            if let SdamEvent::ServerDescriptionChanged(changed) = event
                && changed.new_description.error().is_some()
            {
                given_up.fetch_add(1, SeqCst);
            }
        }));
        change(&mut options);
        let client = Client::with_options(options).unwrap();
        Self { _running: running, handle, client, pools_cleared, servers_given_up }
    }

    fn collection(&self, name: &str) -> Collection<Document> {
        self.client.database("shop").collection(name)
    }

    /// How often a rule was asked since the last time, and whether the driver has kept its connections and its server.
    fn seen(&self, rule: usize) -> (u64, bool) {
        let kept = self.pools_cleared.load(SeqCst) == 0 && self.servers_given_up.load(SeqCst) == 0;
        (self.handle.rules().rules[rule].matched, kept)
    }
}

fn code(error: &Error) -> Option<i32> {
    match &*error.kind {
        ErrorKind::Command(error) => Some(error.code),
        _ => None,
    }
}

fn secrets() -> Match {
    Match::default().namespaces(["shop.secrets"])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_denied_the_driver_does_not_try_again_and_keeps_its_connections() {
    let (server, _) = own().await;
    for (denial, expected) in [(Denial::Unauthorized, 13), (Denial::QueryRejected, 411), (Denial::ReadOnly, 371)] {
        let guarded = Guarded::new(&server, [Rule::new("no", [Action::Deny(denial)]).with_match(secrets())], |_| {}).await;
        let (secrets, orders) = (guarded.collection("secrets"), guarded.collection("orders"));
        orders.insert_one(doc! {}).await.unwrap();
        assert_eq!(code(&secrets.find_one(doc! {}).await.unwrap_err()), Some(expected));
        assert_eq!(guarded.seen(0), (1, true), "a read that was denied with {expected}");
        assert_eq!(code(&secrets.insert_one(doc! {}).await.unwrap_err()), Some(expected));
        assert_eq!(guarded.seen(0), (2, true), "a write that was denied with {expected}");
        orders.insert_one(doc! {}).await.unwrap();
        // Nor is anything left of it on the server.
        let names = server.client().await.unwrap().database("shop").list_collection_names().await.unwrap();
        assert_eq!(names, ["orders"]);
        assert!(guarded.handle.connections().iter().any(|connection| connection.requests > 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_too_often_the_driver_tries_again_later_and_keeps_its_connections() {
    let (server, _) = own().await;
    // One in an age: the driver gives up after it has tried it twice more.
    let limit = RateRule::new(0.0001, 1).keyed(Key::Namespace);
    let rule = Rule::new("rarely", [Action::LimitRate(limit)]).with_match(Match::default().namespaces(["shop.*"]));
    let guarded = Guarded::new(&server, [rule], |_| {}).await;
    let orders = guarded.collection("orders");
    orders.insert_one(doc! { "_id": 0 }).await.unwrap();
    let began = guarded.seen(0).0;
    // It waits as long as it was told to: the next is welcome in an age, but it waits ten seconds at most.
    let error = tokio::time::timeout(Duration::from_secs(120), orders.insert_one(doc! { "_id": 1 })).await.unwrap().unwrap_err();
    assert_eq!(code(&error), Some(462));
    assert!(error.contains_label("SystemOverloadedError"));
    assert_eq!(guarded.seen(0), (began + 3, true));

    // Five a second: all of them get through, and none of them twice, if the driver tries it often enough.
    let guarded = Guarded::new(&server, [], |options| options.max_adaptive_retries = Some(20)).await;
    let orders = guarded.collection("orders");
    let often = Rule::new("often", [Action::LimitRate(RateRule::new(5.0, 1))]);
    guarded.handle.set_rules(&Rules::new([often])).unwrap();
    for id in 10..16 {
        orders.insert_one(doc! { "_id": id }).await.unwrap();
    }
    assert_eq!(orders.count_documents(doc! { "_id": { "$gte": 10 } }).await.unwrap(), 6);
    let (asked, kept) = guarded.seen(0);
    assert!(asked > 7 && kept, "{asked}: nothing was refused, or connections were dropped");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_time_left_in_the_queue_is_told_so_once() {
    let (server, _) = own().await;
    let rule = Rule::new("evenly", [Action::LimitRate(RateRule::new(0.001, 1).waiting(Duration::from_secs(3600)))]);
    let guarded = Guarded::new(&server, [rule.with_match(Match::default().commands(["find"]))], |_| {}).await;
    let orders = guarded.collection("orders");
    orders.find_one(doc! {}).await.unwrap();
    let error = orders.find_one(doc! {}).max_time(Duration::from_millis(100)).await.unwrap_err();
    assert_eq!(code(&error), Some(50));
    assert_eq!(guarded.seen(0), (2, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_drains_sends_the_driver_elsewhere() {
    let (server, _) = own().await;
    // It thinks nothing of the server until it hears of it again, which it asks for every ten seconds.
    let patience = |options: &mut ClientOptions| options.server_selection_timeout = Some(Duration::from_secs(30));
    let guarded = Guarded::new(&server, [], patience).await;
    let orders = guarded.collection("orders");
    orders.insert_many((0..10).map(|id| doc! { "_id": id })).await.unwrap();
    let mut cursor = orders.find(doc! {}).batch_size(2).await.unwrap();
    assert!(cursor.advance().await.unwrap());
    guarded.handle.drain();
    let error = orders.insert_one(doc! { "_id": 10 }).await.unwrap_err();
    // It has tried it once more where it thought that it had found another, as nothing of it was begun.
    assert_eq!(code(&error), Some(91));
    assert_eq!(guarded.handle.statistics().refused["draining"], 2);
    assert!(guarded.pools_cleared.load(SeqCst) >= 1 && guarded.servers_given_up.load(SeqCst) >= 1);
    // The cursor goes on, although all connections were dropped.
    let mut read = 1;
    while cursor.advance().await.unwrap() {
        read += 1;
    }
    assert_eq!(read, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_proxy_that_stops_no_acknowledged_write_is_lost_and_no_cursor_broken() {
    let (server, deployment) = own().await;
    let mut settings = ProxySettings::new(server.member(0).host_port());
    settings.drain_within = Duration::from_secs(6);
    let proxy = mongo_proxy::Proxy::bind("127.0.0.1:0", settings).await.unwrap();
    let uri = format!("mongodb://{}/?directConnection=true&serverSelectionTimeoutMS=2000", proxy.address());
    let cancel = mongo_core::CancellationToken::new();
    let stop = cancel.clone();
    let running = tokio::spawn(async move { proxy.run(&stop).await });
    let client = Client::with_uri_str(&uri).await.unwrap();
    let orders = client.database("shop").collection::<Document>("orders");
    orders.insert_many((0..40).map(|id| doc! { "_id": format!("read {id}") })).await.unwrap();
    // Of a client of its own: that of the writers drops its connections when they are refused.
    let reader = Client::with_uri_str(&uri).await.unwrap();
    let mut cursor = reader
        .database("shop")
        .collection::<Document>("orders")
        .find(doc! { "_id": { "$regex": "^read" } })
        .batch_size(2)
        .await
        .unwrap();
    assert!(cursor.advance().await.unwrap());
    let mut writers = JoinSet::new();
    let (written, mut enough) = tokio::sync::mpsc::channel::<()>(1000);
    for writer in 0..8 {
        let (orders, written) = (orders.clone(), written.clone());
        writers.spawn(async move {
            let mut acknowledged = Vec::new();
            for number in 0.. {
                let id = format!("{writer} {number}");
                if orders.insert_one(doc! { "_id": &id }).await.is_err() {
                    break;
                }
                acknowledged.push(id);
                let _full = written.try_send(());
            }
            acknowledged
        });
    }
    for _ in 0..200 {
        enough.recv().await.unwrap();
    }
    cancel.cancel();
    let mut read = 1;
    while cursor.advance().await.unwrap() {
        read += 1;
    }
    assert_eq!(read, 40);
    running.await.unwrap().unwrap();
    let acknowledged = writers.join_all().await.concat();
    assert!(acknowledged.len() >= 200);
    let there = deployment.database("shop").collection::<Document>("orders");
    let found = there.count_documents(doc! { "_id": { "$in": &acknowledged } }).await.unwrap();
    assert_eq!(found, acknowledged.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn users_have_rules_of_their_own() {
    let server = TestDeployment::replica_set(1).with_auth().start().await.unwrap();
    let (root, password) = server.credentials().unwrap();
    let own = server.client().await.unwrap();
    for user in ["ada", "bob"] {
        let create = doc! { "createUser": user, "pwd": "secret", "roles": ["readWrite"] };
        own.database("shop").run_command(create).await.unwrap();
    }
    let login = |user: &str, password: &str, source: &str| {
        Credential::builder().username(user.to_owned()).password(password.to_owned()).source(source.to_owned()).build()
    };
    let rules = [
        Rule::new("ada only reads", [Action::Deny(Denial::Unauthorized)])
            .with_match(Match::default().users(["shop.ada"]).access(Access::Write)),
        Rule::new("others", [Action::Allow]).with_match(Match::default().users(["shop.bob", "admin.*"])),
        Rule::new("nobody else", [Action::Deny(Denial::QueryRejected)]),
    ];
    for (user, password, source, may_write) in
        [("ada", "secret", "shop", false), ("bob", "secret", "shop", true), (root, password, "admin", true)]
    {
        let guarded =
            Guarded::new(&server, rules.clone(), |options| options.credential = Some(login(user, password, source))).await;
        let written = guarded.collection("orders").insert_one(doc! {}).await;
        assert_eq!(written.as_ref().err().and_then(code), (!may_write).then_some(13), "{user}: {written:?}");
        let users = guarded.handle.connections().into_iter().flat_map(|connection| connection.users);
        let users: std::collections::BTreeSet<String> = users.collect();
        assert_eq!(users.into_iter().collect::<Vec<_>>(), [format!("{source}.{user}")]);
    }
    // Who is not logged in is none of them, and nor is who gives a wrong password.
    let guarded = Guarded::new(&server, rules.clone(), |_| {}).await;
    assert_eq!(code(&guarded.collection("orders").find_one(doc! {}).await.unwrap_err()), Some(411));
    let guarded = Guarded::new(&server, rules, |options| options.credential = Some(login("bob", "wrong", "shop"))).await;
    assert!(guarded.collection("orders").find_one(doc! {}).await.is_err());
    assert!(guarded.handle.connections().iter().all(|connection| connection.users.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_wants_to_hear_the_version_of_its_interface_is_told_by_the_proxy_too() {
    let server = TestDeployment::replica_set(1).with_auth().start().await.unwrap();
    let (root, password) = server.credentials().unwrap();
    let own = server.client().await.unwrap();
    own.database("admin").run_command(doc! { "setParameter": 1, "requireApiVersion": true }).await.unwrap();
    let mut settings = ProxySettings::new(server.member(0).host_port());
    settings.topology = mongo_proxy::Topology::ReplicaSet;
    let (_running, address, handle) = listening(settings).await;
    let uri = format!("mongodb://{address}/?replicaSet={}", server.replica_set_name().unwrap());
    let mut options = ClientOptions::parse(uri).await.unwrap();
    options.server_api = Some(ServerApi::builder().version(ServerApiVersion::V1).build());
    let large = doc! { "text": "x".repeat(200_000) };
    let stranger = Client::with_options(options.clone()).unwrap();
    assert!(stranger.database("shop").collection::<Document>("orders").insert_one(&large).await.is_err());
    assert!(handle.statistics().malformed["first"] > 0, "{:?}", handle.statistics());
    let credential = Credential::builder().username(root.to_owned()).password(password.to_owned()).source("admin".to_owned());
    options.credential = Some(credential.build());
    let client = Client::with_options(options).unwrap();
    client.database("shop").collection::<Document>("orders").insert_one(&large).await.unwrap();
    assert!(handle.connections().iter().any(|connection| connection.users == [format!("admin.{root}")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_too_long_is_ended_by_the_server_and_carries_its_comment() {
    let (server, deployment) = own().await;
    let rule = Rule::new("briefly", [Action::ClampMaxTime(Duration::from_millis(300)), Action::Tag("guarded".to_owned())]);
    let guarded = Guarded::new(&server, [rule], |_| {}).await;
    let orders = guarded.collection("orders");
    orders.insert_many((0..5).map(|id| doc! { "_id": id })).await.unwrap();
    let slowly = doc! { "$where": "sleep(1000) || true" };
    for asks in [None, Some(Duration::from_secs(60))] {
        let mut find = orders.find(slowly.clone());
        if let Some(time) = asks {
            find = find.max_time(time);
        }
        let outcome = find.await.unwrap_err();
        assert_eq!(code(&outcome), Some(50), "{outcome}");
    }
    deployment.database("shop").run_command(doc! { "profile": 2 }).await.unwrap();
    orders.find_one(doc! { "_id": 1 }).await.unwrap();
    let profile = deployment.database("shop").collection::<Document>("system.profile");
    let seen = profile.find_one(doc! { "op": "query", "command.find": "orders" }).await.unwrap().unwrap();
    assert_eq!(seen.get_document("command").unwrap().get_str("comment").unwrap(), "guarded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_switch_lets_nothing_be_written_in_any_way() {
    let (server, _) = own().await;
    let guarded = Guarded::new(&server, [], |_| {}).await;
    let orders = guarded.collection("orders");
    orders.insert_many((0..5).map(|id| doc! { "_id": id })).await.unwrap();
    let read_only = Rule::new("read only", [Action::Deny(Denial::ReadOnly)]).with_match(Match::default().access(Access::Write));
    guarded.handle.set_rules(&Rules::new([read_only])).unwrap();
    let (shop, admin) = (guarded.client.database("shop"), guarded.client.database("admin"));
    let writes = [
        (&shop, doc! { "insert": "orders", "documents": [{ "_id": 9 }] }),
        (&shop, doc! { "update": "orders", "updates": [{ "q": {}, "u": { "$set": { "x": 1 } } }] }),
        (&shop, doc! { "delete": "orders", "deletes": [{ "q": {}, "limit": 0 }] }),
        (&shop, doc! { "findAndModify": "orders", "query": {}, "remove": true }),
        (&shop, doc! { "findandmodify": "orders", "query": {}, "remove": true }),
        (&shop, doc! { "aggregate": "orders", "pipeline": [{ "$out": "copy" }], "cursor": {} }),
        (&shop, doc! { "aggregate": "orders", "pipeline": [{ "$merge": { "into": "copy" } }], "cursor": {} }),
        (
            &shop,
            doc! { "mapReduce": "orders", "map": "function() { emit(1, 1) }", "reduce": "function() { return 1 }", "out": "copy" },
        ),
        (&shop, doc! { "create": "copy" }),
        (&shop, doc! { "createIndexes": "orders", "indexes": [{ "key": { "a": 1 }, "name": "a" }] }),
        (&shop, doc! { "drop": "orders" }),
        (&shop, doc! { "dropDatabase": 1 }),
        (&shop, doc! { "createUser": "eve", "pwd": "x", "roles": [] }),
        (&admin, doc! { "renameCollection": "shop.orders", "to": "shop.copy" }),
        (&admin, doc! { "bulkWrite": 1, "ops": [{ "insert": 0, "document": {} }], "nsInfo": [{ "ns": "shop.copy" }] }),
        (&admin, doc! { "applyOps": [{ "op": "i", "ns": "shop.copy", "o": { "_id": 1 } }] }),
        (&admin, doc! { "setParameter": 1, "logLevel": 0 }),
    ];
    for (database, write) in writes {
        assert_eq!(code(&database.run_command(write.clone()).await.unwrap_err()), Some(371), "{write}");
    }
    let found: Vec<Document> = orders.find(doc! {}).sort(doc! { "_id": 1 }).await.unwrap().try_collect().await.unwrap();
    assert_eq!(found, (0..5).map(|id| doc! { "_id": id }).collect::<Vec<_>>());
    assert_eq!(shop.list_collection_names().await.unwrap(), ["orders"]);
    let inline = doc! { "mapReduce": "orders", "map": "function() { emit(1, 1) }", "reduce": "function() { return 1 }", "out": { "inline": 1 } };
    shop.run_command(inline).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_come_at_once_only_so_many_are_on_the_server() {
    let (server, deployment) = own().await;
    let limit = ConcurrencyRule::new(3).waiting(Duration::from_secs(600));
    let rule = Rule::new("three", [Action::LimitConcurrency(limit)]).with_match(Match::default().commands(["find"]));
    let guarded = Guarded::new(&server, [rule], |options| options.max_pool_size = Some(40)).await;
    let orders = guarded.collection("orders");
    orders.insert_one(doc! {}).await.unwrap();
    let mut all = JoinSet::new();
    for _ in 0..20 {
        let orders = orders.clone();
        all.spawn(async move { orders.find_one(doc! { "$where": "sleep(50) || true" }).await.unwrap() });
    }
    let mut most = 0;
    let finds = [doc! { "$currentOp": {} }, doc! { "$match": { "command.filter.$where": { "$exists": true } } }];
    while !all.is_empty() {
        tokio::select! {
            Some(done) = all.join_next() => assert!(done.unwrap().is_some()),
            now = async {
                let operations = deployment.database("admin").aggregate(finds.clone()).await.unwrap();
                operations.try_collect::<Vec<_>>().await.unwrap().len()
            } => most = most.max(now),
        }
    }
    assert!((1..=3).contains(&most), "{most}");
    let status = guarded.handle.rules().rules.remove(0);
    assert_eq!((status.matched, status.refused), (20, 0));
    assert!(status.waited > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn inside_a_transaction_a_refusal_ends_nothing_that_the_driver_would_not_end() {
    let (server, _) = own().await;
    let rule = Rule::new("no", [Action::Deny(Denial::Unauthorized)]).with_match(secrets());
    let everything = Rule::new("all", [Action::Deny(Denial::Unauthorized)]);
    let guarded = Guarded::new(&server, [rule], |_| {}).await;
    let (orders, secrets) = (guarded.collection("orders"), guarded.collection("secrets"));
    orders.insert_one(doc! { "_id": 0 }).await.unwrap();
    let mut session = guarded.client.start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    orders.insert_one(doc! { "_id": 1 }).session(&mut session).await.unwrap();
    assert_eq!(code(&secrets.insert_one(doc! { "_id": 1 }).session(&mut session).await.unwrap_err()), Some(13));
    orders.insert_one(doc! { "_id": 2 }).session(&mut session).await.unwrap();
    // Whatever the rules are, what was begun can be ended.
    guarded.handle.set_rules(&Rules::new([everything])).unwrap();
    assert!(orders.find_one(doc! {}).await.is_err());
    session.commit_transaction().await.unwrap();
    guarded.handle.set_rules(&Rules::default()).unwrap();
    assert_eq!(orders.count_documents(doc! {}).await.unwrap(), 3);
}
