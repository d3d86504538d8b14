//! The driver's ordinary work through the proxy.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use futures_util::TryStreamExt as _;
use mongo_core::{
    CancellationToken, ConnectOptions, ErrorKind,
    bson::{Document, doc},
    connect,
    mongodb::{Client, IndexModel, error::WriteFailure, options::ClientOptions},
};
use mongo_proxy::{ListenTls, Proxy, ProxyHandle, ProxySettings, UpstreamTls};
use mongo_testkit::TestDeployment;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::Command,
    task::JoinSet,
};

use crate::support::{endless, example, gone, own, under_way};

/// A client of the first member of a server, through a proxy that ends with the set of tasks.
async fn through(server: &TestDeployment) -> (JoinSet<()>, Client) {
    let (running, address, _) = listening(ProxySettings::new(server.member(0).host_port())).await;
    let uri = format!("mongodb://{address}/?directConnection=true");
    let mut options = ClientOptions::parse(uri).await.unwrap();
    options.server_selection_timeout = Some(Duration::from_secs(10));
    (running, Client::with_options(options).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_driver_does_its_work_through_the_proxy() {
    let (server, _) = own().await;
    let (_running, client) = through(&server).await;
    let shop = client.database("shop");
    let orders = shop.collection::<Document>("orders");
    // Many at once, and many batches.
    let many: Vec<Document> = (0..5_000).map(|id| doc! { "_id": id, "customer": id % 7, "note": "x".repeat(500) }).collect();
    assert_eq!(orders.insert_many(&many).await.unwrap().inserted_ids.len(), 5_000);
    let found: Vec<Document> =
        orders.find(doc! {}).sort(doc! { "_id": 1 }).batch_size(100).await.unwrap().try_collect().await.unwrap();
    assert_eq!(found, many);
    orders.create_index(IndexModel::builder().keys(doc! { "customer": 1 }).build()).await.unwrap();
    assert_eq!(orders.update_many(doc! { "customer": 3 }, doc! { "$inc": { "n": 1 } }).await.unwrap().modified_count, 714);
    let groups = orders.aggregate([doc! { "$group": { "_id": "$customer" } }]).await.unwrap();
    assert_eq!(groups.try_collect::<Vec<_>>().await.unwrap().len(), 7);
    // Errors are those of the server.
    let twice = orders.insert_one(doc! { "_id": 1 }).await.unwrap_err();
    assert!(
        matches!(*twice.kind, mongo_core::mongodb::error::ErrorKind::Write(WriteFailure::WriteError(error)) if error.code == 11000)
    );
    // As large as can be.
    let large = doc! { "_id": "large", "bytes": mongo_core::bson::Binary { subtype: mongo_core::bson::spec::BinarySubtype::Generic, bytes: (0..12_000_000_u32).map(|n| n as u8).collect() } };
    orders.insert_one(&large).await.unwrap();
    assert_eq!(orders.find_one(doc! { "_id": "large" }).await.unwrap(), Some(large));
    // A transaction.
    let mut session = client.start_session().await.unwrap();
    for commits in [true, false] {
        session.start_transaction().await.unwrap();
        orders.insert_one(doc! { "_id": format!("t {commits}") }).session(&mut session).await.unwrap();
        if commits {
            session.commit_transaction().await.unwrap();
        } else {
            session.abort_transaction().await.unwrap();
        }
    }
    assert_eq!(orders.count_documents(doc! { "_id": { "$in": ["t true", "t false"] } }).await.unwrap(), 1);
    // What has changed.
    let mut changes = orders.watch().await.unwrap();
    orders.delete_one(doc! { "_id": 7 }).await.unwrap();
    let change = changes.try_next().await.unwrap().unwrap();
    assert_eq!(change.document_key, Some(doc! { "_id": 7 }));
}

/// A proxy that ends with the set of tasks, and where it listens.
pub(crate) async fn listening(settings: ProxySettings) -> (JoinSet<()>, SocketAddr, ProxyHandle) {
    let proxy = Proxy::bind("127.0.0.1:0", settings).await.unwrap();
    let (address, handle) = (proxy.address(), proxy.handle());
    let mut running = JoinSet::new();
    running.spawn(async move { proxy.run(&CancellationToken::new()).await.unwrap() });
    (running, address, handle)
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_on_both_sides_a_password_passes_through_and_certificates_are_checked() {
    let server = TestDeployment::replica_set(1).with_auth().with_tls().start().await.unwrap();
    let ca = server.ca_file().unwrap();
    let shown = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(ca.with_file_name("server.pem"), shown.path()).unwrap();
    let settings = ProxySettings::new(server.member(0).host_port())
        .with_listen_tls(ListenTls::new(shown.path()))
        .with_upstream_tls(UpstreamTls::default().with_ca_file(ca));
    let (_running, address, handle) = listening(settings.clone()).await;
    let (user, password) = server.credentials().unwrap();
    let reach = async |address: SocketAddr, ca: &Path| -> mongo_core::Result<()> {
        let uri = format!("mongodb://{address}/?directConnection=true");
        let options = ConnectOptions::from_uri(uri).unwrap().with_credentials(user, password).with_ca_file(ca);
        let deployment = connect(options.with_server_selection_timeout(Duration::from_secs(5))).await?;
        deployment.database("shop").collection::<Document>("c").insert_one(doc! {}).await?;
        Ok(())
    };
    reach(address, ca).await.unwrap();

    // Another authority's certificate from now on.
    let other = TestDeployment::standalone().with_tls().start().await.unwrap();
    let others_ca = other.ca_file().unwrap();
    std::fs::copy(others_ca.with_file_name("server.pem"), shown.path()).unwrap();
    reach(address, ca).await.unwrap();
    handle.reload_certificates().unwrap();
    assert_eq!(reach(address, ca).await.unwrap_err().kind(), ErrorKind::Unavailable);
    reach(address, others_ca).await.unwrap();
    // What is not fit changes nothing, and says why.
    for unfit in [std::fs::read(others_ca).unwrap(), b"nothing".to_vec()] {
        std::fs::write(shown.path(), unfit).unwrap();
        let error = handle.reload_certificates().unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("file: "), "{error}");
    }
    reach(address, others_ca).await.unwrap();
    assert!(Proxy::bind("127.0.0.1:0", settings.clone()).await.is_err(), "nor is a proxy begun with it");

    // A server that the proxy does not know is none.
    std::fs::copy(ca.with_file_name("server.pem"), shown.path()).unwrap();
    for stranger in
        [UpstreamTls::default().with_ca_file(others_ca), UpstreamTls::default().with_ca_file(ca).with_server_name("elsewhere")]
    {
        let (_running, address, _) = listening(settings.clone().with_upstream_tls(stranger)).await;
        assert_eq!(reach(address, ca).await.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    // Nor does one without TLS talk to anybody with it.
    let (_running, address, _) = listening(ProxySettings::new(server.member(0).host_port())).await;
    assert_eq!(reach(address, ca).await.unwrap_err().kind(), ErrorKind::Unavailable);
}

/// A message with this body.
fn message(request_id: i32, body: &Document) -> Vec<u8> {
    let body = body.to_vec().unwrap();
    let mut message = Vec::new();
    for number in [i32::try_from(21 + body.len()).unwrap(), request_id, 0, 2013, 0] {
        message.extend(number.to_le_bytes());
    }
    message.push(0);
    message.extend(body);
    message
}

/// Asks, and gives the answer.
async fn ask(stream: &mut TcpStream, body: &Document) -> Document {
    stream.write_all(&message(1, body)).await.unwrap();
    answer(stream).await
}

async fn answer(stream: &mut TcpStream) -> Document {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await.unwrap();
    let mut rest = vec![0; usize::try_from(i32::from_le_bytes(length)).unwrap() - 4];
    stream.read_exact(&mut rest).await.unwrap();
    Document::from_reader(&rest[17..]).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_taken_for_the_proxy_by_its_certificate() {
    let server = TestDeployment::replica_set(1).with_auth().with_tls().start().await.unwrap();
    let mut upstream = UpstreamTls::default().with_ca_file(server.ca_file().unwrap());
    upstream.certificate_file = Some(server.client_certificate().unwrap().to_owned());
    let settings = ProxySettings::new(server.member(0).host_port()).with_upstream_tls(upstream);
    let (_running, address, handle) = listening(settings).await;
    let mut stranger = TcpStream::connect(address).await.unwrap();
    let login = doc! { "authenticate": 1, "mechanism": "MONGODB-X509", "db": "$external" };
    let hello = ask(&mut stranger, &doc! { "hello": 1, "speculativeAuthenticate": &login, "$db": "admin" }).await;
    assert!(hello.get_f64("ok").unwrap() > 0.0 && !hello.contains_key("speculativeAuthenticate"), "{hello}");
    let mut login = login;
    login.insert("$db", "$external");
    let refused = ask(&mut stranger, &login).await;
    assert_eq!((refused.get_i32("code").unwrap(), refused.get_str("codeName").unwrap()), (18, "AuthenticationFailed"));
    let status = ask(&mut stranger, &doc! { "connectionStatus": 1, "$db": "admin" }).await;
    assert!(status.get_document("authInfo").unwrap().get_array("authenticatedUsers").unwrap().is_empty());
    assert_eq!(handle.statistics().refused["certificate"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_closes_half_a_connection_has_the_answer_and_what_nobody_waits_for_ends() {
    for with_tls in [false, true] {
        let builder = TestDeployment::standalone();
        let server = if with_tls { builder.with_tls() } else { builder }.start().await.unwrap();
        let mut settings = ProxySettings::new(server.member(0).host_port());
        settings.message_within = Duration::from_secs(3600);
        if with_tls {
            settings = settings.with_upstream_tls(UpstreamTls::default().with_ca_file(server.ca_file().unwrap()));
        }
        let (_running, address, handle) = listening(settings).await;
        let admin = server.client().await.unwrap();
        let half = async |body: Document| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(&message(1, &body)).await.unwrap();
            stream.shutdown().await.unwrap();
            let answered = async {
                let answer = answer(&mut stream).await;
                assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
                answer
            };
            tokio::time::timeout(Duration::from_secs(30), answered).await.unwrap()
        };
        let many: Vec<Document> = (0..500).map(|id| doc! { "_id": id }).collect();
        let inserted = half(doc! { "insert": "many", "documents": many, "$db": "shop" }).await;
        assert_eq!((inserted.get_i32("n").unwrap(), inserted.get_f64("ok").unwrap()), (500, 1.0));
        // What would take for ever the server ends, as it does for its own clients.
        let endless = |comment: &str| {
            doc! { "aggregate": "many", "pipeline": endless("many"), "cursor": {}, "comment": comment, "$db": "shop" }
        };
        let ended = half(endless("half")).await;
        assert_eq!((ended.get_i32("code").unwrap(), ended.get_str("codeName").unwrap()), (279, "ClientDisconnect"), "{ended}");
        // And so it does when a client has gone.
        let mut stream = TcpStream::connect(address).await.unwrap();
        let body = endless("gone");
        let never = tokio::spawn(async move { ask(&mut stream, &body).await });
        under_way(&admin, doc! { "command.comment": "gone" }, &never).await;
        never.abort();
        assert!(gone(&admin, &doc! { "command.comment": "gone" }).await);
        nobody(&handle).await;
    }
}

/// The README says how much that is.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_costs_as_much_memory_as_is_said() {
    let server = TestDeployment::standalone().start().await.unwrap();
    let mut proxy = Command::new(example("proxy"))
        .args(["--upstream", &server.member(0).host_port()])
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut says = BufReader::new(proxy.stderr.take().unwrap()).lines();
    let says_first = tokio::time::timeout(Duration::from_secs(30), says.next_line()).await.unwrap().unwrap().unwrap();
    let address = says_first.split(['/', '?']).nth(2).unwrap().to_owned();
    // Which is counted when it is asked for, other than what `status` says.
    let map = format!("/proc/{}/smaps_rollup", proxy.id().unwrap());
    let resident = || {
        let map = std::fs::read_to_string(&map).unwrap();
        let line = map.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
    };
    // With as much said as would not fit into what is kept.
    let hello = doc! { "hello": 1, "comment": "x".repeat(20_000), "$db": "admin" };
    let connect = async |number: usize| {
        let mut clients = Vec::new();
        for _ in 0..number {
            let mut client = TcpStream::connect(&address).await.unwrap();
            assert_eq!(ask(&mut client, &hello).await.get_f64("ok").unwrap(), 1.0);
            clients.push(client);
        }
        clients
    };
    let _first = connect(100).await;
    let before = resident();
    let _others = connect(400).await;
    let each = (resident() - before) as f64 / 400.0;
    // At least its buffers.
    assert!((8.0..20.0).contains(&each), "{each} KiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_are_served() {
    let (server, _) = own().await;
    let (_running, address, handle) = listening(ProxySettings::new(server.member(0).host_port())).await;
    let hello = message(1, &doc! { "hello": 1, "$db": "admin" });
    let mut clients = Vec::new();
    for _ in 0..1000 {
        clients.push(TcpStream::connect(address).await.unwrap());
    }
    // Each asks, and then each has its answer.
    for client in &mut clients {
        client.write_all(&hello).await.unwrap();
    }
    for client in &mut clients {
        let mut header = [0; 16];
        tokio::time::timeout(Duration::from_secs(60), client.read_exact(&mut header)).await.unwrap().unwrap();
        assert_eq!(header[8..12], 1_i32.to_le_bytes());
    }
    assert_eq!(handle.connections().len(), 1000);
    drop(clients);
    nobody(&handle).await;
}

/// Waits until nobody is connected.
async fn nobody(handle: &ProxyHandle) {
    let gone = async {
        while !handle.connections().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("they are still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_each_have_their_own_answers() {
    let (server, deployment) = own().await;
    crate::support::fill(&deployment, "shop", "c", 1000).await;
    let (_running, client) = through(&server).await;
    let mut all = JoinSet::new();
    for first in 0..100 {
        let collection = client.database("shop").collection::<Document>("c");
        all.spawn(async move {
            for id in (first..1000).step_by(100) {
                let found = collection.find_one(doc! { "_id": id }).await.unwrap().unwrap();
                assert_eq!(found.get_i32("_id").unwrap(), id);
            }
        });
    }
    while let Some(done) = all.join_next().await {
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_driver_finds_its_way_back_when_the_server_does() {
    let (server, _) = own().await;
    let (_running, client) = through(&server).await;
    let orders = client.database("shop").collection::<Document>("orders");
    orders.insert_one(doc! { "_id": 1 }).await.unwrap();
    server.member(0).pause().unwrap();
    let mut hangs = tokio::spawn({
        let orders = orders.clone();
        async move { orders.find_one(doc! { "_id": 1 }).await }
    });
    let early = tokio::time::timeout(Duration::from_millis(500), &mut hangs).await;
    assert!(early.is_err(), "who answered for a server that hangs?");
    server.member(0).resume().unwrap();
    assert!(hangs.await.unwrap().unwrap().is_some());
    server.step_down().await.unwrap();
    let back = async { while orders.insert_one(doc! {}).await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(60), back).await.expect("it does not come back");
}
