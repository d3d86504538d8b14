//! One client's connection, and the connection to the server that belongs to it alone.
//!
//! A client has one request under way at a time, as the protocol has it: it is checked, passed on, and its reply comes back before the next is looked at. What a client sends meanwhile stays in a small buffer, and
//! then in the network: whoever does not wait is made to. So nothing is reordered, and cursors, transactions and authentication belong to a connection on both sides.

use std::{fmt, time::Duration};

use tokio::{sync::SemaphorePermit, time::Instant};

use crate::{
    peer::{Gone, LARGE, Peer, SMALL},
    proxy::Shared,
    wire::{
        Malformed,
        bson_scan::LONGEST_DOCUMENT,
        compression,
        header::{HEADER, Header, Opcode},
        query, refusal,
        request::Command,
        scan::{EXHAUST_ALLOWED, MORE_TO_COME, Scan},
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
    /// Whether the first request was answered: only then may there be large ones.
    is_known: bool,
    /// Whether the request under way is one that nobody waits for an answer to.
    is_silent: bool,
    /// What the request under way holds of the memory for large ones.
    memory: Option<SemaphorePermit<'a>>,
}

/// What a request is, as far as its reply is concerned.
#[derive(Clone, Copy, Debug)]
struct Asked {
    header: Header,
    flags: u32,
}

impl<'a> Session<'a> {
    pub(crate) fn new(client: Peer, server: Peer, shared: &'a Shared) -> Self {
        Self { client, server, shared, is_known: false, is_silent: false, memory: None }
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
        let header = self.next_request().await?;
        let asked = self.pass_on(header).await?;
        self.client.rest();
        self.memory = None;
        if asked.flags & MORE_TO_COME == 0 {
            self.relay(asked).await?;
            self.is_known = true;
        }
        Ok(())
    }

    /// Waits for the header of a request.
    async fn next_request(&mut self) -> Result<Header, Ended> {
        // From the first byte on a message has so long until it is there.
        let mut until = (!self.client.buffered().is_empty()).then(|| self.shared.message_until(Instant::now(), 0));
        if !self.is_known {
            until.get_or_insert(self.shared.message_until(Instant::now(), 0));
        }
        loop {
            if self.shared.is_stopping() {
                return Err(Ended::Stopped);
            }
            if let Some(header) = self.client.header() {
                let header = header.map_err(Ended::Malformed)?;
                if !self.is_known && (header.length > LONGEST_FIRST || header.opcode == Opcode::Compressed) {
                    return Err(Ended::Malformed(Malformed::First));
                }
                return Ok(header);
            }
            tokio::select! {
                biased;
                filled = fill_until(&mut self.client, until) => match filled {
                    Ok(()) => {
                        until.get_or_insert(self.shared.message_until(Instant::now(), 0));
                    }
                    Err(Gone::Closed) => return Err(Ended::Closed),
                    Err(gone) => return Err(Ended::Client(gone)),
                },
                // Nothing was asked of it.
                filled = self.server.fill(SMALL) => return Err(match filled {
                    Ok(()) => Ended::WrongReply,
                    Err(Gone::Closed) => Ended::Closed,
                    Err(gone) => Ended::Server(gone),
                }),
                () = self.shared.stopping() => return Err(Ended::Stopped),
            }
        }
    }

    /// Checks a request and passes it on.
    async fn pass_on(&mut self, header: Header) -> Result<Asked, Ended> {
        self.is_silent = false;
        let passed = match header.opcode {
            Opcode::Message => self.pass_on_message(header).await,
            Opcode::Compressed => self.pass_on_compressed(header).await,
            Opcode::Query => self.pass_on_query(header).await,
            Opcode::Reply => Err(Ended::Malformed(Malformed::Opcode)),
        };
        // Who awaits no answer would take it for one to what it asks next.
        if let (Err(Ended::Malformed(malformed)), false) = (&passed, self.is_silent) {
            self.memory = None;
            // That the connection ends is what counts; that its owner learns why is a courtesy.
            let reply = refusal::malformed(header, *malformed);
            let _may_have_gone = self.client.send(&reply, self.shared.settings.message_within).await;
        }
        passed
    }

    /// As it comes, document by document.
    async fn pass_on_message(&mut self, header: Header) -> Result<Asked, Ended> {
        let began = Instant::now();
        let mut scan = Scan::new(header);
        // Of what is buffered, and of the message.
        let (mut checked, mut sent) = (HEADER, 0);
        let mut is_allowed = false;
        loop {
            let there = self.client.buffered().len().min(header.length - sent);
            let advanced = scan.advance(&self.client.buffered()[checked..there]);
            self.is_silent = scan.flags() & MORE_TO_COME != 0;
            checked += advanced.map_err(Ended::Malformed)?;
            if !is_allowed && let Some(body) = scan.body() {
                // Nothing was sent yet, so that places in the message are places in the buffer.
                let command = Command::read(&self.client.buffered()[body], None).map_err(Ended::Malformed)?;
                tracing::trace!(
                    command = command.name,
                    database = command.database,
                    collection = command.collection(),
                    "a request"
                );
                is_allowed = true;
            }
            if is_allowed && (scan.is_complete() || checked >= LARGE) {
                self.server.send(&self.client.buffered()[..checked], SERVER_TAKES_WITHIN).await.map_err(Ended::Server)?;
                self.client.used(checked);
                sent += checked;
                checked = 0;
            }
            if scan.is_complete() {
                return Ok(Asked { header, flags: scan.flags() });
            }
            if self.client.buffered().len() > LARGE {
                // A body comes first, or all has to wait for it.
                let is_body_first = sent > 0 || self.client.buffered().get(HEADER + 4) == Some(&0);
                let most = if is_body_first { LONGEST_DOCUMENT + LARGE } else { header.length };
                self.take_memory(header.length.min(most)).await?;
            }
            let received = sent + self.client.buffered().len();
            self.client.fill_until(LARGE, self.shared.message_until(began, received)).await.map_err(Ended::Client)?;
        }
    }

    /// Takes memory for what is larger than 64 KiB, once for all that the request will need: if each had a part and waited for the rest, nobody could go on.
    async fn take_memory(&mut self, bytes: usize) -> Result<(), Ended> {
        if self.memory.is_none() {
            self.memory = Some(self.shared.memory(bytes).await.ok_or(Ended::Client(Gone::Stalled))?);
        }
        Ok(())
    }

    /// Waits until there are so many bytes of a message.
    async fn at_least(&mut self, bytes: usize, began: Instant) -> Result<(), Ended> {
        while self.client.buffered().len() < bytes {
            let until = self.shared.message_until(began, self.client.buffered().len());
            self.client.fill_until(LARGE, until).await.map_err(Ended::Client)?;
        }
        Ok(())
    }

    /// As a whole, as it came, after having looked into it.
    async fn pass_on_compressed(&mut self, header: Header) -> Result<Asked, Ended> {
        let began = Instant::now();
        self.at_least(header.length.min(HEADER + compression::PREFIX), began).await?;
        let inflated = compression::says(&self.client.buffered()[HEADER..]).map_err(Ended::Malformed)?;
        if header.length + inflated > LARGE {
            self.take_memory(header.length + inflated).await?;
        }
        self.at_least(header.length, began).await?;
        let message = self.client.take(header.length);
        let look = move || {
            let (inner, inflated) = compression::inflate(header, &message[HEADER..])?;
            let mut scan = Scan::new(inner);
            scan.advance(&inflated[HEADER..])?;
            match scan.body() {
                Some(body) if scan.is_complete() => {
                    Command::read(&inflated[body], None)?;
                    Ok((message, scan.flags()))
                }
                _ => Err(Malformed::Bounds),
            }
        };
        // Whoever shares the thread does not wait for a large one.
        let looked = if inflated > INFLATED_HERE { blocking(look).await? } else { look() };
        let (message, flags) = looked.map_err(Ended::Malformed)?;
        self.server.send(&message, SERVER_TAKES_WITHIN).await.map_err(Ended::Server)?;
        Ok(Asked { header, flags })
    }

    async fn pass_on_query(&mut self, header: Header) -> Result<Asked, Ended> {
        if header.length > LONGEST_FIRST {
            return Err(Ended::Malformed(Malformed::Length));
        }
        self.at_least(header.length, Instant::now()).await?;
        let message = self.client.take(header.length);
        let body = query::check(&message).map_err(Ended::Malformed)?;
        let command = Command::read(&message[body], Some("admin")).map_err(Ended::Malformed)?;
        if !command.is_hello() {
            return Err(Ended::Malformed(Malformed::Opcode));
        }
        self.server.send(&message, SERVER_TAKES_WITHIN).await.map_err(Ended::Server)?;
        Ok(Asked { header, flags: 0 })
    }

    /// Passes the reply on, and those that follow it.
    async fn relay(&mut self, asked: Asked) -> Result<(), Ended> {
        let mut answers = asked.header.request_id;
        loop {
            let reply = self.next_reply(answers != asked.header.request_id).await?;
            if reply.response_to != answers {
                return Err(Ended::WrongReply);
            }
            let more_follow = match reply.opcode {
                Opcode::Message => {
                    let more_follow = self.flags_of(reply).await? & MORE_TO_COME != 0;
                    self.pass_back(reply).await?;
                    more_follow
                }
                // Only who has said so may be sent more than one.
                Opcode::Compressed if asked.flags & EXHAUST_ALLOWED != 0 => {
                    self.pass_back_inflated(reply).await? & MORE_TO_COME != 0
                }
                Opcode::Compressed | Opcode::Reply => {
                    self.pass_back(reply).await?;
                    false
                }
                Opcode::Query => return Err(Ended::WrongReply),
            };
            if !more_follow {
                return Ok(());
            }
            answers = reply.request_id;
        }
    }

    /// Waits for the header of a reply, however long that takes: how long an operation may take is the server's business. Of replies that follow each other there may be no end: those are not waited for by a proxy
    /// that stops.
    async fn next_reply(&mut self, is_one_more: bool) -> Result<Header, Ended> {
        loop {
            if let Some(header) = self.server.header() {
                return header.map_err(|_| Ended::WrongReply);
            }
            if !is_one_more || !self.server.buffered().is_empty() {
                self.more_of_the_server().await?;
                continue;
            }
            let shared = self.shared;
            tokio::select! {
                biased;
                more = self.more_of_the_server() => more?,
                () = shared.stopping() => return Err(Ended::Stopped),
            }
        }
    }

    /// Reads more of the server, and looks whether the client is still there: if not, the server ends what it is at when its connection closes.
    async fn more_of_the_server(&mut self) -> Result<(), Ended> {
        let is_full = self.client.buffered().len() >= LARGE;
        tokio::select! {
            biased;
            filled = self.server.fill(LARGE) => filled.map_err(Ended::Server),
            filled = self.client.fill(SMALL), if !is_full => match filled {
                Ok(()) => Ok(()),
                Err(Gone::Closed) => Err(Ended::Closed),
                Err(gone) => Err(Ended::Client(gone)),
            },
        }
    }

    /// The flags of a reply.
    async fn flags_of(&mut self, reply: Header) -> Result<u32, Ended> {
        if reply.length < HEADER + 4 {
            return Err(Ended::WrongReply);
        }
        loop {
            if let Some(flags) = self.server.buffered().get(HEADER..).and_then(|rest| rest.first_chunk::<4>()) {
                return Ok(u32::from_le_bytes(*flags));
            }
            self.more_of_the_server().await?;
        }
    }

    /// Passes a compressed reply on, and gives its flags, for which it has to be inflated.
    async fn pass_back_inflated(&mut self, reply: Header) -> Result<u32, Ended> {
        while self.server.buffered().len() < reply.length.min(HEADER + compression::PREFIX) {
            self.more_of_the_server().await?;
        }
        let inflated = compression::says(&self.server.buffered()[HEADER..]).map_err(|_| Ended::WrongReply)?;
        if reply.length + inflated > LARGE {
            self.take_memory(reply.length + inflated).await?;
        }
        while self.server.buffered().len() < reply.length {
            self.more_of_the_server().await?;
        }
        let message = self.server.take(reply.length);
        let look = move || compression::inflate(reply, &message[HEADER..]).map(|(_, inflated)| (message, inflated));
        let looked = if inflated > INFLATED_HERE { blocking(look).await? } else { look() };
        let (message, inflated) = looked.map_err(|_| Ended::WrongReply)?;
        let flags = inflated.get(HEADER..).and_then(|rest| rest.first_chunk::<4>()).ok_or(Ended::WrongReply)?;
        let flags = u32::from_le_bytes(*flags);
        drop(inflated);
        self.client.send(&message, self.shared.settings.message_within).await.map_err(Ended::Client)?;
        self.memory = None;
        Ok(flags)
    }

    /// Passes a reply on as it comes.
    async fn pass_back(&mut self, reply: Header) -> Result<(), Ended> {
        let mut left = reply.length;
        loop {
            let piece = self.server.buffered().len().min(left);
            let within = self.shared.settings.message_within;
            self.client.send(&self.server.buffered()[..piece], within).await.map_err(Ended::Client)?;
            self.server.used(piece);
            left -= piece;
            if left == 0 {
                return Ok(());
            }
            self.more_of_the_server().await?;
        }
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
/// A server that is at work on what it was sent without being asked for an answer takes no more meanwhile, and that may be long.
const SERVER_TAKES_WITHIN: Duration = Duration::from_secs(600);
