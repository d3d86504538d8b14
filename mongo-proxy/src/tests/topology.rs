//! What clients see of what is behind the proxy.

use bson::oid::ObjectId;

use super::*;
use crate::Topology;

/// A hello comes to the server and is answered: what the server has seen, and what the client sees.
async fn hello(client: &mut TcpStream, server: &mut TcpStream, asks: &Document, answer: &Document) -> (Document, Document) {
    client.write_all(&message(1, 0, 0, asks)).await.unwrap();
    let (_, seen) = soon(whole_message(server)).await;
    server.write_all(&message(2, 1, 0, answer)).await.unwrap();
    (body_of(&seen), body_of(&soon(whole_message(client)).await.1))
}

#[tokio::test]
async fn who_looks_for_a_balancer_finds_one_and_the_server_hears_nothing_of_it() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    let process = ObjectId::from_bytes([7; 12]);
    let asks = doc! { "hello": 1, "loadBalanced": true, "client": { "application": { "name": "shop" } }, "$db": "admin" };
    let answer = doc! { "isWritablePrimary": true, "topologyVersion": { "processId": process, "counter": 6_i64 }, "ok": 1 };
    let (seen, told) = hello(&mut client, &mut server, &asks, &answer).await;
    assert_eq!(seen, doc! { "hello": 1, "client": { "application": { "name": "shop" } }, "$db": "admin" });
    let mut expected = answer.clone();
    expected.insert("serviceId", process);
    assert_eq!(told, expected);
    assert_eq!(stage.handle.connections()[0].application.as_deref(), Some("shop"));
    // Who does not look for one is shown what there is.
    let asks = doc! { "hello": 1, "loadBalanced": false, "$db": "admin" };
    let (seen, told) = hello(&mut client, &mut server, &asks, &answer).await;
    assert_eq!((seen, told), (asks, answer));
    // An error stays what it is.
    let error = doc! { "ok": 0, "code": 18 };
    let asks = doc! { "hello": 1, "loadBalanced": true, "$db": "admin" };
    assert_eq!(hello(&mut client, &mut server, &asks, &error).await.1, error);
}

/// A proxy before a replica set of which one member, which this test is, is up.
async fn set_stage(port: u16) -> (TcpListener, Proxy) {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let me = server.local_addr().unwrap();
    let settings = ProxySettings::new(format!("127.0.0.1:1,{me}")).with_topology(Topology::ReplicaSet);
    let listen = format!("127.0.0.1:{port}");
    let binding = tokio::spawn(async move { Proxy::bind(&listen, settings).await });
    let (mut asked, _) = soon(server.accept()).await.unwrap();
    soon(whole_message(&mut asked)).await;
    let answer = doc! { "setName": "rs", "hosts": [me.to_string(), "b.internal:27017"], "ok": 1 };
    asked.write_all(&message(2, 1, 0, &answer)).await.unwrap();
    (server, soon(binding).await.unwrap().unwrap())
}

#[tokio::test]
async fn members_are_seen_at_addresses_of_the_proxy_also_those_that_come_later() {
    let (server, proxy) = set_stage(0).await;
    let (me, handle) = (server.local_addr().unwrap().to_string(), proxy.handle());
    let running = tokio::spawn(async move { proxy.run(&CancellationToken::new()).await });
    let members = handle.statistics().members;
    assert_eq!(members.keys().cloned().collect::<Vec<_>>(), [me.clone(), "b.internal:27017".to_owned()]);
    let mut client = TcpStream::connect(&members[&me]).await.unwrap();
    let (mut upstream, _) = soon(server.accept()).await.unwrap();
    let answer = doc! {
        "setName": "rs", "setVersion": 3, "hosts": [&me, "B.internal:27017"], "passives": ["c.internal:27017"], "arbiters": ["d.internal:27017"],
        "primary": "b.internal:27017", "me": &me, "ok": 1,
    };
    let (_, told) = hello(&mut client, &mut upstream, &doc! { "hello": 1, "$db": "admin" }, &answer).await;
    let now = handle.statistics().members;
    assert_eq!(now.len(), 4);
    let expected = doc! {
        "setName": "rs", "setVersion": 3, "ok": 1, "hosts": [&now[&me], &now["b.internal:27017"]], "passives": [&now["c.internal:27017"]],
        "arbiters": [&now["d.internal:27017"]], "primary": &now["b.internal:27017"], "me": &now[&me],
    };
    assert_eq!(told, expected);
    assert!(members.iter().all(|(member, shown)| now[member] == *shown));
    // Where it said that somebody listens, somebody does.
    TcpStream::connect(&now["c.internal:27017"]).await.unwrap();
    // In each of the answers that follow each other, and in those to the old hello.
    client.write_all(&message(5, 0, EXHAUST_ALLOWED, &doc! { "hello": 1, "$db": "admin" })).await.unwrap();
    soon(whole_message(&mut upstream)).await;
    for (id, to, flags) in [(10, 5, MORE_TO_COME), (11, 10, 0)] {
        upstream.write_all(&message(id, to, flags, &answer)).await.unwrap();
        let (header, told) = soon(whole_message(&mut client)).await;
        assert_eq!((header.request_id, header.response_to), (id, to));
        assert_eq!((told[HEADER], body_of(&told)), (u8::try_from(flags).unwrap(), expected.clone()));
    }
    running.abort();
}

#[tokio::test]
async fn members_listen_at_ports_that_follow_each_other_and_pass_over_those_that_are_taken() {
    // Somewhere there are four in a row.
    for attempt in 0..50_u16 {
        let first = 21_000 + attempt * 20;
        let Ok(taken) = TcpListener::bind(("127.0.0.1", first + 1)).await else { continue };
        let (server, proxy) = set_stage(first).await;
        let members = proxy.handle().statistics().members;
        let me = server.local_addr().unwrap().to_string();
        if proxy.address().port() != first {
            continue;
        }
        assert_eq!(members[&me], format!("127.0.0.1:{first}"));
        let other: u16 = members["b.internal:27017"].rsplit(':').next().unwrap().parse().unwrap();
        assert!(other > first + 1, "{other}");
        drop(taken);
        return;
    }
    panic!("no ports are free");
}

#[tokio::test]
async fn what_is_no_replica_set_is_told_so_and_so_is_who_cannot_be_asked() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = ProxySettings::new(server.local_addr().unwrap().to_string()).with_topology(Topology::ReplicaSet);
    let binding = tokio::spawn({
        let settings = settings.clone();
        async move { Proxy::bind("127.0.0.1:0", settings).await }
    });
    let (mut asked, _) = soon(server.accept()).await.unwrap();
    soon(whole_message(&mut asked)).await;
    asked.write_all(&message(2, 1, 0, &doc! { "isWritablePrimary": true, "ok": 1 })).await.unwrap();
    let error = soon(binding).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("no member of a replica set"), "{error}");
    // Settings that cannot be meant.
    for (what, change) in [
        (
            "advertise",
            Box::new(|settings: &mut ProxySettings| settings.advertise = Some("proxy:27018".to_owned()))
                as Box<dyn Fn(&mut ProxySettings)>,
        ),
        ("upstream", Box::new(|settings| settings.upstream = "mongodb://127.0.0.1:27017".to_owned())),
        ("upstream", Box::new(|settings| settings.upstream = "127.0.0.1".to_owned())),
        ("times", Box::new(|settings| settings.drain_within = Duration::MAX)),
        ("max_connections", Box::new(|settings| settings.max_connections = 0)),
    ] {
        let mut settings = settings.clone();
        change(&mut settings);
        let error = Proxy::bind("127.0.0.1:0", settings).await.unwrap_err();
        assert!(error.kind() == mongo_core::ErrorKind::InvalidInput && error.to_string().contains(what), "{error}");
    }
    // Nor can clients be sent to every address that there is.
    let error = Proxy::bind("0.0.0.0:0", settings.clone()).await.unwrap_err();
    assert!(error.to_string().contains("advertise"), "{error}");
    drop((asked, server));
    let error = Proxy::bind("127.0.0.1:0", settings).await.unwrap_err();
    assert_eq!(error.kind(), mongo_core::ErrorKind::Unavailable);
}
