//! One client's connection, and the connection to the server that belongs to it alone.
//!
//! A client has one request under way at a time, as the protocol has it: it is checked, passed on, and its reply comes back before the next is looked at. What a client sends meanwhile stays in a small buffer, and
//! then in the network: whoever does not wait is made to. So nothing is reordered, and cursors, transactions and authentication belong to a connection on both sides.

mod judge;
mod reply;
mod request;

pub(crate) use reply::wants_api_version;

use std::{fmt, io, sync::Arc};

use mongo_core::{CancellationToken, clock::Clock as _};
use tokio::{sync::SemaphorePermit, task::coop::consume_budget, time::Instant};

use self::request::Asked;
use crate::{
    command::Leaves,
    connections::Connection,
    peer::{Gone, Peer, SMALL},
    proxy::Shared,
    requests::LoggedRequest,
    rules::Who,
    wire::{
        Malformed,
        header::{Header, Opcode},
        refusal,
        scan::MORE_TO_COME,
    },
};

/// How a session ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The client has gone, or the server has closed the connection between two replies.
    Closed,
    /// The client's connection failed, or it was too slow.
    Client(Gone),
    /// The server's did. The client is told nothing but that: what became of its request nobody knows.
    Server(Gone),
    /// The server could not be connected to.
    NoServer(io::Error),
    /// The client sent what is no message.
    Malformed(Malformed),
    /// The server sent what is no reply to what it was asked.
    WrongReply,
    /// The proxy is being stopped.
    Stopped,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Client(gone) => write!(f, "the client's connection: {gone}"),
            Self::Server(gone) => write!(f, "the server's connection: {gone}"),
            Self::NoServer(error) => write!(f, "the server cannot be connected to: {error}"),
            Self::Malformed(why) => write!(f, "the client sent what is no message: {why}"),
            Self::WrongReply => f.write_str("the server sent what is no reply"),
            Self::Stopped => f.write_str("the proxy is being stopped"),
        }
    }
}

/// A session.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    client: Peer,
    server: Peer,
    shared: &'a Shared,
    connection: &'a Arc<Connection>,
    who: Who,
    /// Whether the first request was answered: only then may there be large ones.
    is_known: bool,
    /// Whether the server serves it though it has not logged in, once that was asked.
    is_welcome: Option<bool>,
    /// Whether the request under way is one that nobody waits for an answer to.
    is_silent: bool,
    /// What the server is at for the client.
    server_is_at: Work,
    /// Whether the proxy is being stopped. Its own, as it has a lock that is taken at each request.
    stop: CancellationToken,
    /// What the request under way holds of the memory for large ones.
    memory: Option<SemaphorePermit<'a>>,
}

/// What a server is at for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Nothing, or a question of the proxy's own.
    Nothing,
    /// A request, which it has as a whole.
    Request,
    /// It has answered, and more answers follow until the client goes.
    Stream,
}

impl<'a> Session<'a> {
    pub(crate) fn new(client: Peer, server: Peer, shared: &'a Shared, connection: &'a Arc<Connection>) -> Self {
        let who = Who { address: connection.client.ip().to_canonical(), application: None, users: Vec::new() };
        Self {
            client,
            server,
            shared,
            connection,
            who,
            is_known: false,
            is_welcome: None,
            is_silent: false,
            server_is_at: Work::Nothing,
            stop: shared.stop_of_a_session(),
            memory: None,
        }
    }

    /// Serves the client until one of both has gone.
    pub(crate) async fn run(mut self) -> Ended {
        let ended = loop {
            match self.exchange().await {
                Ok(()) => self.server.rest(),
                Err(ended) => break ended,
            }
        };
        self.memory = None;
        // First, as a client may take its time to go.
        self.shared.instruments.ended(&ended);
        tokio::join!(self.server.close(false), self.client.close(matches!(ended, Ended::Malformed(_))));
        ended
    }

    /// One request and all that comes of it.
    async fn exchange(&mut self) -> Result<(), Ended> {
        if self.server.is_told_the_end() {
            // What is left of the client's is no request.
            return Err(Ended::Closed);
        }
        // Of who has sent many requests at once, and waits for nothing, others on the same thread have their turn in between.
        consume_budget().await;
        let header = self.next_request().await?;
        let began = Instant::now();
        if header.length > LONGEST_FIRST {
            self.must_be_welcome().await?;
        }
        let mut judged = None;
        let asked = match (self.pass_on(header, &mut judged).await, judged) {
            (Ok(flags), Some(judged)) => Asked { header, flags, judged },
            (failed, judged) => {
                let ended = failed.err().unwrap_or(Ended::WrongReply);
                if let Some(judged) = judged {
                    let asked = Asked { header, flags: 0, judged };
                    let failed = Err(ended);
                    self.tell(asked, began, &failed);
                    return failed.map(drop);
                }
                return Err(ended);
            }
        };
        self.client.rest();
        self.memory = None;
        if asked.judged.refused.is_none() {
            self.server_is_at = Work::Request;
        }
        let answered = self.answer(&asked).await;
        self.server_is_at = Work::Nothing;
        if asked.judged.leaves == Leaves::Transaction && asked.judged.refused.is_none() {
            self.shared.leaves_something();
        }
        self.tell(asked, began, &answered);
        answered.map(drop)
    }

    /// Sees to it that a request has its answer, if it awaits one, and says how many bytes that were.
    async fn answer(&mut self, asked: &Asked<'_>) -> Result<usize, Ended> {
        let is_silent = asked.flags & MORE_TO_COME != 0;
        match &asked.judged.refused {
            // Who awaits no answer would take it for one to what it asks next.
            Some(_) if is_silent => Ok(0),
            Some(refused) => {
                let reply = refusal::refused(asked.header, refused);
                self.client.send(&reply, self.shared.settings.message_within).await.map_err(Ended::Client)?;
                Ok(0)
            }
            None if is_silent => {
                // The server has logged somebody in, or not, and says nothing of it.
                if asked.judged.expects.login {
                    self.identify().await?;
                }
                Ok(0)
            }
            None => {
                let bytes = self.relay(asked).await?;
                self.is_known = true;
                Ok(bytes)
            }
        }
    }

    /// Counts a request that is over, and logs it if that is wanted.
    fn tell(&mut self, asked: Asked<'_>, began: Instant, answered: &Result<usize, Ended>) {
        self.connection.rests();
        let judged = asked.judged;
        let took = began.elapsed();
        self.shared.instruments.request(judged.access, judged.refused.as_ref(), took);
        let is_work = judged.access.is_some() || judged.refused.is_some();
        if !is_work || !self.shared.requests.wants(took, judged.refused.is_some() || answered.is_err()) {
            return;
        }
        self.shared.requests.log(LoggedRequest {
            at: self.shared.clock.wall(),
            connection: Some(self.connection.id),
            client: Some(self.connection.client),
            application: self.who.application.clone(),
            users: self.who.users.clone(),
            command: judged.name.into_owned(),
            namespace: judged.namespace,
            took,
            request_bytes: asked.header.length,
            reply_bytes: *answered.as_ref().unwrap_or(&0),
            failed: answered.as_ref().err().map(ToString::to_string),
            refused: judged.refused.map(|refused| refused.as_str()),
            rules: judged.rules,
        });
    }

    /// Waits for the header of a request.
    async fn next_request(&mut self) -> Result<Header, Ended> {
        let mut until = None;
        loop {
            if self.stop.is_cancelled() {
                return Err(Ended::Stopped);
            }
            if let Some(header) = self.client.header() {
                let header = header.map_err(Ended::Malformed)?;
                if !self.is_known && (header.length > LONGEST_FIRST || header.opcode == Opcode::Compressed) {
                    return Err(Ended::Malformed(Malformed::First));
                }
                return Ok(header);
            }
            // From the first byte on a message has so long until it is there.
            if until.is_none() && (!self.is_known || !self.client.buffered().is_empty()) {
                until = Some(self.shared.message_until(Instant::now(), 0));
            }
            tokio::select! {
                biased;
                filled = fill_until(&mut self.client, until) => match filled {
                    Ok(()) => {}
                    Err(Gone::Closed) => return Err(Ended::Closed),
                    Err(gone) => return Err(Ended::Client(gone)),
                },
                // Nothing was asked of it.
                filled = self.server.fill(SMALL) => return Err(unasked(filled)),
                () = self.stop.cancelled() => return Err(Ended::Stopped),
            }
        }
    }
}

/// How a session ends whose server did something though nothing was asked of it.
fn unasked(filled: Result<(), Gone>) -> Ended {
    match filled {
        Ok(()) => Ended::WrongReply,
        Err(Gone::Closed) => Ended::Closed,
        Err(gone) => Ended::Server(gone),
    }
}

async fn fill_until(peer: &mut Peer, until: Option<Instant>) -> Result<(), Gone> {
    match until {
        Some(until) => peer.fill_until(SMALL, until).await,
        None => peer.fill(SMALL).await,
    }
}

/// Does work that takes long on a thread for that. A panic in it is one here.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Ended> {
    tokio::task::spawn_blocking(work).await.map_err(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_) => Ended::Stopped,
    })
}

/// The longest message before the first answer, and the longest legacy one.
const LONGEST_FIRST: usize = 64 << 10;
/// Bytes that are inflated without going to another thread for it.
const INFLATED_HERE: usize = 256 << 10;
