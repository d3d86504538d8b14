//! A server that answers by a script, for what a real one cannot be made to do: be a router, or be asked for a day within seconds.

use std::{fmt, net::SocketAddr, sync::Arc};

use mongo_core::bson::{Document, doc};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

use crate::{Error, Result};

/// Speaks MongoDB's wire protocol on the loopback interface, and leaves to a function what to say.
///
/// Every command goes to the function, also `hello`, for which [`hello`](Self::hello) has an answer; what it gives is sent as it is, with `ok: 1` if it says nothing of that. There is
/// no authentication, compression or checksum, and of a message only its first section is looked at. It runs on the current runtime, so time may be paused.
///
/// ```no_run
/// # async fn example() -> mongo_testkit::Result<()> {
/// use mongo_core::bson::doc;
/// use mongo_testkit::ScriptedServer;
///
/// let router = ScriptedServer::start(|command| match command.keys().next().map(String::as_str) {
///     Some("hello" | "isMaster" | "ismaster") => ScriptedServer::hello(doc! { "msg": "isdbgrid" }),
///     _ => doc! {},
/// })
/// .await?;
/// let uri = format!("mongodb://{}", router.address());
/// # Ok(()) }
/// ```
pub struct ScriptedServer {
    address: SocketAddr,
    accepting: AbortHandle,
}

type Script = dyn Fn(&Document) -> Document + Send + Sync;

impl fmt::Debug for ScriptedServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl ScriptedServer {
    /// Begins to listen.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn start(script: impl Fn(&Document) -> Document + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(Error::io("listen for a scripted server"))?;
        let address = listener.local_addr().map_err(Error::io("listen for a scripted server"))?;
        let script: Arc<Script> = Arc::new(script);
        let accepting = tokio::spawn(async move {
            let mut serving = tokio::task::JoinSet::new();
            // The tasks of connections end with this one.
            while let Ok((stream, _)) = listener.accept().await {
                serving.spawn(serve(stream, Arc::clone(&script)));
                while serving.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, accepting: accepting.abort_handle() })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What a server of version 6.0 answers to `hello`, with some fields besides.
    pub fn hello(more: Document) -> Document {
        let mut hello = doc! {
            "helloOk": true, "isWritablePrimary": true, "ismaster": true, "maxBsonObjectSize": 16 << 20, "maxMessageSizeBytes": 48_000_000,
            "maxWriteBatchSize": 100_000, "minWireVersion": 0, "maxWireVersion": 17, "readOnly": false, "connectionId": 1,
        };
        hello.extend(more);
        hello
    }
}

impl Drop for ScriptedServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Answers what comes on a connection, until it is closed or something comes that is not understood.
async fn serve(mut stream: TcpStream, script: Arc<Script>) {
    while let Ok(()) = answer(&mut stream, &script).await {}
}

async fn answer(stream: &mut TcpStream, script: &Arc<Script>) -> std::io::Result<()> {
    let bad = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned());
    let mut header = [0; 16];
    stream.read_exact(&mut header).await?;
    let field = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    let (length, request, opcode) = (field(0), field(4), field(12));
    if !(16..=48_000_000).contains(&length) {
        return Err(bad("the length of a message"));
    }
    let mut body = vec![0; length as usize - 16];
    stream.read_exact(&mut body).await?;
    let document = match opcode {
        // Flags, the kind of the first section, its document.
        OP_MSG => body.get(5..),
        // Flags, the name of a collection, how many to skip and to give, the query.
        OP_QUERY => body.get(4..).and_then(|rest| rest.get(rest.iter().position(|byte| *byte == 0)? + 9..)),
        _ => None,
    };
    let document = document.ok_or_else(|| bad("a message that is not understood"))?;
    let command = Document::from_reader(document).map_err(std::io::Error::other)?;
    let mut reply = script(&command);
    if !reply.contains_key("ok") {
        reply.insert("ok", 1.0);
    }
    let reply = reply.to_vec().map_err(std::io::Error::other)?;
    let (opcode, before): (u32, &[u8]) = match opcode {
        OP_MSG => (OP_MSG, &[0; 5]),
        // Flags, a cursor, where it stands, and one document.
        _ => (OP_REPLY, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
    };
    let length = u32::try_from(16 + before.len() + reply.len()).map_err(std::io::Error::other)?;
    let mut message = Vec::with_capacity(length as usize);
    for field in [length, 1, request, opcode] {
        message.extend(field.to_le_bytes());
    }
    message.extend(before);
    message.extend(reply);
    stream.write_all(&message).await
}

const OP_REPLY: u32 = 1;
const OP_QUERY: u32 = 2004;
const OP_MSG: u32 = 2013;
