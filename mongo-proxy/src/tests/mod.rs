//! Clients before a server that does what a real one cannot be made to do.

use std::{sync::Arc, time::Duration};

use bson::{Document, doc};
use mongo_core::{CancellationToken, metrics::MemoryMetrics};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};

use crate::{
    Action, ConcurrencyRule, Denial, Key, Match, Proxy, ProxyHandle, ProxySettings, RateRule, RequestLog, Rule, Rules,
    wire::{
        header::{HEADER, Header, Opcode},
        scan::{CHECKSUM_PRESENT, EXHAUST_ALLOWED, MORE_TO_COME},
    },
};

mod draining;
mod large;
mod rules;
mod seeing;
mod sessions;
mod topology;

/// A proxy before a listener that stands for a server.
struct Stage {
    server: TcpListener,
    proxy: std::net::SocketAddr,
    metrics: Arc<MemoryMetrics>,
    handle: ProxyHandle,
    cancel: CancellationToken,
    running: JoinHandle<mongo_core::Result<()>>,
}

async fn stage(change: impl FnOnce(&mut ProxySettings)) -> Stage {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut settings = ProxySettings::new(server.local_addr().unwrap().to_string());
    change(&mut settings);
    let metrics = Arc::new(MemoryMetrics::default());
    let proxy = Proxy::bind_with_metrics("127.0.0.1:0", settings, Arc::clone(&metrics) as _).await.unwrap();
    let (address, handle, cancel) = (proxy.address(), proxy.handle(), CancellationToken::new());
    let stop = cancel.clone();
    let running = tokio::spawn(async move { proxy.run(&stop).await });
    Stage { server, proxy: address, metrics, handle, cancel, running }
}

impl Stage {
    async fn connect(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.proxy).await.unwrap();
        let (server, _) = self.server.accept().await.unwrap();
        (client, server)
    }

    fn ended(&self, outcome: &str) -> Option<u64> {
        self.metrics.counter_value("mongo_proxy_connections_total", &[("outcome", outcome)])
    }

    fn malformed(&self, reason: &str) -> Option<u64> {
        self.metrics.counter_value("mongo_proxy_malformed_total", &[("reason", reason)])
    }
}

/// A message with this body.
fn message(request_id: i32, response_to: i32, flags: u32, body: &Document) -> Vec<u8> {
    let body = body.to_vec().unwrap();
    let header = Header { length: HEADER + 5 + body.len(), request_id, response_to, opcode: Opcode::Message };
    let mut message = Vec::new();
    header.write(&mut message);
    message.extend(flags.to_le_bytes());
    message.push(0);
    message.extend(body);
    message
}

fn ping(request_id: i32) -> Vec<u8> {
    message(request_id, 0, 0, &doc! { "ping": 1, "$db": "admin" })
}

async fn whole_message(stream: &mut TcpStream) -> (Header, Vec<u8>) {
    let mut bytes = vec![0; HEADER];
    stream.read_exact(&mut bytes).await.unwrap();
    let header = Header::read(bytes.first_chunk().unwrap()).unwrap();
    bytes.resize(header.length, 0);
    stream.read_exact(&mut bytes[HEADER..]).await.unwrap();
    (header, bytes)
}

/// All that comes until the end.
async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is an end as well.
    let _may_be_reset = stream.read_to_end(&mut bytes).await;
    bytes
}

/// Within which something that must happen does.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it does not happen")
}

/// Somebody logs in, after which large messages are taken.
async fn log_in(client: &mut TcpStream, server: &mut TcpStream) {
    client.write_all(&message(1, 0, 0, &doc! { "saslContinue": 1, "$db": "admin" })).await.unwrap();
    soon(whole_message(server)).await;
    server.write_all(&message(9, 1, 0, &doc! { "done": true, "ok": 1 })).await.unwrap();
    let (header, _) = soon(whole_message(server)).await;
    let users = doc! { "authInfo": { "authenticatedUsers": [{ "user": "ada", "db": "admin" }] }, "ok": 1 };
    server.write_all(&message(9, header.request_id, 0, &users)).await.unwrap();
    soon(whole_message(client)).await;
}

fn find(request_id: i32) -> Vec<u8> {
    message(request_id, 0, 0, &doc! { "find": "orders", "$db": "shop" })
}

/// What is in a message that has a body and nothing else.
fn body_of(message: &[u8]) -> Document {
    Document::from_reader(&message[HEADER + 5..]).unwrap()
}

/// A request comes to the server, is answered, and the answer comes back.
async fn served(client: &mut TcpStream, server: &mut TcpStream, request: &[u8]) -> Vec<u8> {
    answered(client, server, request, &doc! { "ok": 1 }).await
}

async fn answered(client: &mut TcpStream, server: &mut TcpStream, request: &[u8], answer: &Document) -> Vec<u8> {
    client.write_all(request).await.unwrap();
    let (header, seen) = soon(whole_message(server)).await;
    server.write_all(&message(1000, header.request_id, 0, answer)).await.unwrap();
    assert_eq!(soon(whole_message(client)).await.0.response_to, header.request_id);
    seen
}

/// A message with a sequence behind its body, and with a checksum if the flags say so.
fn with_sequence(request_id: i32, flags: u32, body: &Document, name: &str, documents: &[Document]) -> Vec<u8> {
    let mut message = message(request_id, 0, flags, body);
    add_sequence(&mut message, name, documents);
    if flags & CHECKSUM_PRESENT != 0 {
        let length = i32::try_from(message.len() + 4).unwrap();
        message[..4].copy_from_slice(&length.to_le_bytes());
        let checksum = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI).checksum(&message);
        message.extend(checksum.to_le_bytes());
    }
    message
}

fn add_sequence(message: &mut Vec<u8>, name: &str, documents: &[Document]) {
    let documents: Vec<u8> = documents.iter().flat_map(|document| document.to_vec().unwrap()).collect();
    message.push(1);
    message.extend(i32::try_from(4 + name.len() + 1 + documents.len()).unwrap().to_le_bytes());
    message.extend(name.as_bytes());
    message.push(0);
    message.extend(documents);
    let length = i32::try_from(message.len()).unwrap();
    message[..4].copy_from_slice(&length.to_le_bytes());
}

/// The same message in the compressed form, with Snappy.
fn compressed(plain: &[u8]) -> Vec<u8> {
    let header = Header::read(plain.first_chunk().unwrap()).unwrap();
    let inner = &plain[HEADER..];
    let packed = snap::raw::Encoder::new().compress_vec(inner).unwrap();
    let mut message = Vec::new();
    Header { length: HEADER + 9 + packed.len(), opcode: Opcode::Compressed, ..header }.write(&mut message);
    message.extend(2013_i32.to_le_bytes());
    message.extend(i32::try_from(inner.len()).unwrap().to_le_bytes());
    message.push(1);
    message.extend(packed);
    message
}

fn rules(rules: impl IntoIterator<Item = Rule>) -> impl FnOnce(&mut ProxySettings) {
    let rules = Rules::new(rules);
    move |settings| settings.rules = rules
}

/// The next message is the answer to this, and says that.
async fn refused(client: &mut TcpStream, to: i32) -> Document {
    let (header, message) = soon(whole_message(client)).await;
    assert_eq!(header.response_to, to);
    let answer = body_of(&message);
    assert_eq!(answer.get_f64("ok").unwrap(), 0.0);
    answer
}

fn why(answer: &Document) -> (i32, &str) {
    (answer.get_i32("code").unwrap(), answer.get_str("codeName").unwrap())
}
