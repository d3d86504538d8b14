//! P9: what breaks in the middle, and what strangers send, before a real server.

use std::{net::SocketAddr, time::Duration};

use futures_util::TryStreamExt as _;
use mongo_core::{
    bson::{Document, doc},
    mongodb::{
        Client,
        error::{ErrorKind, Result},
        options::ClientOptions,
    },
};
use mongo_proxy::ProxySettings;
use mongo_testkit::FaultProxy;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::Instant,
};

use crate::{
    proxy::listening,
    support::{fill, own},
};

async fn client(address: SocketAddr) -> Client {
    let mut options = ClientOptions::parse(format!("mongodb://{address}/?directConnection=true&retryReads=false")).await.unwrap();
    options.server_selection_timeout = Some(Duration::from_secs(20));
    Client::with_options(options).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_breaks_off_is_an_error_of_the_connection_and_no_short_answer() {
    let (server, deployment) = own().await;
    fill(&deployment, "shop", "orders", 20_000).await;
    let between = FaultProxy::start(server.member(0).host_port()).await.unwrap();
    let (_running, address, _) = listening(ProxySettings::new(between.address().to_string())).await;
    let client = client(address).await;
    let orders = client.database("shop").collection::<Document>("orders");
    let read =
        async || -> Result<usize> { Ok(orders.find(doc! {}).batch_size(20_000).await?.try_collect::<Vec<_>>().await?.len()) };
    assert_eq!(read().await.unwrap(), 20_000);
    for bytes in [0, 10, 100, 10_000, 1_000_000] {
        between.truncate_after(bytes);
        let error = read().await.unwrap_err();
        assert!(matches!(*error.kind, ErrorKind::Io(_) | ErrorKind::ConnectionPoolCleared { .. }), "{bytes}: {error}");
        between.heal();
        // Heartbeats may have had their part in it: the driver finds its way back.
        let back = async { while read().await.is_err() {} };
        tokio::time::timeout(Duration::from_secs(60), back).await.expect("it does not come back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_at_work_gives_nobody_half_an_answer() {
    let (server, deployment) = own().await;
    fill(&deployment, "shop", "orders", 20_000).await;
    let (_running, address, handle) = listening(ProxySettings::new(server.member(0).host_port())).await;
    let client = client(address).await;
    let mut readers = JoinSet::new();
    let (read, mut some) = tokio::sync::mpsc::channel::<()>(1000);
    for _ in 0..4 {
        let (orders, read) = (client.database("shop").collection::<Document>("orders"), read.clone());
        readers.spawn(async move {
            loop {
                let found = async { orders.find(doc! {}).batch_size(20_000).await?.try_collect::<Vec<_>>().await };
                match found.await {
                    Ok(found) => assert_eq!(found.len(), 20_000),
                    Err(error) => return error,
                }
                let _full = read.try_send(());
            }
        });
    }
    for _ in 0..8 {
        some.recv().await.unwrap();
    }
    server.member(0).kill().unwrap();
    while let Some(error) = readers.join_next().await {
        let error = error.unwrap();
        // Who begins anew meanwhile finds nobody.
        let kinds = |kind: &ErrorKind| {
            matches!(kind, ErrorKind::Io(_) | ErrorKind::ConnectionPoolCleared { .. } | ErrorKind::ServerSelection { .. })
        };
        assert!(kinds(&error.kind), "{error}");
    }
    server.member(0).restart().await.unwrap();
    let orders = client.database("shop").collection::<Document>("orders");
    let back = async { while orders.insert_one(doc! {}).await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(60), back).await.expect("it does not come back");
    assert_eq!(handle.statistics().large_messages_bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_strangers_send_for_a_minute_the_server_sees_none_of_it_and_others_are_served() {
    let (server, deployment) = own().await;
    fill(&deployment, "shop", "orders", 100).await;
    let mut settings = ProxySettings::new(server.member(0).host_port());
    settings.message_within = Duration::from_secs(2);
    let (_running, address, handle) = listening(settings).await;
    let requests = async || {
        let status = deployment.database("admin").run_command(doc! { "serverStatus": 1 }).await.unwrap();
        status.get_document("network").unwrap().get_i64("numRequests").unwrap()
    };
    let before = requests().await;
    let until = Instant::now() + Duration::from_secs(60);
    let mut strangers = JoinSet::new();
    for seed in 0..2 {
        strangers.spawn(async move {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut sent = 0_u64;
            while Instant::now() < until {
                let Ok(mut stream) = TcpStream::connect(address).await else { continue };
                let bytes = noise(&mut random);
                let _may_be_cut_off = stream.write_all(&bytes).await;
                let mut answer = [0; 200];
                // Some wait to be told something, some do not, and some say nothing more until they are sent away.
                match random.u8(..20) {
                    0 => drop(stream.read(&mut answer).await),
                    1..6 => drop(stream.shutdown().await),
                    _ => {}
                }
                sent += 1;
                // Other tests need the machine, too.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            sent
        });
    }
    let client = client(address).await;
    let orders = client.database("shop").collection::<Document>("orders");
    let mut served = 0;
    while Instant::now() < until {
        assert!(orders.find_one(doc! { "_id": served % 100 }).await.unwrap().is_some());
        served += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let sent: u64 = strangers.join_all().await.into_iter().sum();
    assert!(sent > 2000 && served > 100, "{sent} {served}");
    // What the server has seen was asked by those who are no strangers; with what drivers ask now and then.
    let seen = requests().await - before - i64::from(served);
    assert!((0..300).contains(&seen), "{seen} of {sent}");
    let statistics = handle.statistics();
    assert!(statistics.malformed.values().filter(|number| **number > 0).count() >= 5, "{statistics:?}");
    // Nothing is left of them.
    let gone = async {
        loop {
            let now = handle.statistics();
            if now.large_messages_bytes == 0 && now.connections < 10 {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("strangers are still there");
}

/// What is no message, in one of many ways.
fn noise(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut some = |most: usize| -> Vec<u8> { (0..random.usize(1..most)).map(|_| random.u8(..)).collect() };
    let message = |length: i32, opcode: i32, rest: &[u8]| {
        let mut message: Vec<u8> = [length, 1, 0, opcode].into_iter().flat_map(i32::to_le_bytes).collect();
        message.extend(rest);
        message
    };
    let ping = doc! { "ping": 1, "$db": "admin" }.to_vec().unwrap();
    let whole = |flags: u32, kind: u8, body: &[u8]| {
        let mut rest = flags.to_le_bytes().to_vec();
        rest.push(kind);
        rest.extend(body);
        message(16 + rest.len() as i32, 2013, &rest)
    };
    let garbage = some(400);
    match garbage.len() % 12 {
        0 => message(i32::MAX, 2013, &garbage),
        1 => message(-5, 2013, &garbage),
        // Of a message that is long, the beginning.
        2 => message(60_000, 2013, &whole(0, 0, &ping)[16..]),
        3 => message(16 + garbage.len() as i32, 2012, &garbage),
        // A bomb that says that it is a gigabyte.
        4 => message(30, 2012, &[&2013_i32.to_le_bytes()[..], &(1_i32 << 30).to_le_bytes(), &[2; 6]].concat()),
        5 => whole(4, 0, &ping),
        6 => whole(0, 7, &ping),
        7 => whole(0, 1, &ping),
        // A checksum that is none.
        8 => {
            let mut checked = whole(1, 0, &ping);
            checked.extend([1, 2, 3, 4]);
            let length = checked.len() as i32;
            checked[..4].copy_from_slice(&length.to_le_bytes());
            checked
        }
        // A length in it that leads out of it.
        9 => {
            let mut bad = ping.clone();
            bad[0] = 200;
            whole(0, 0, &bad)
        }
        // A value of no type.
        10 => {
            let mut bad = ping.clone();
            bad[4] = 0x55;
            whole(0, 0, &bad)
        }
        _ => garbage,
    }
}
