//! One client's connection, and the connection to the server that belongs to it alone.
//!
//! A client has one request under way at a time, as the protocol has it: it is checked, passed on, and its reply comes back before the next is looked at. What a client sends meanwhile stays in a small buffer, and
//! then in the network: whoever does not wait is made to. So nothing is reordered, and cursors, transactions and authentication belong to a connection on both sides.

use std::fmt;

use tokio::{sync::SemaphorePermit, time::Instant};

use crate::{
    peer::{Gone, LARGE, Peer, SMALL},
    proxy::Shared,
    wire::{
        Malformed, compression,
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
        Self { client, server, shared, is_known: false, memory: None }
    }

    /// Serves the client until one of both has gone.
    pub(crate) async fn run(mut self) -> Ended {
        loop {
            match self.exchange().await {
                Ok(()) => {
                    self.is_known = true;
                    self.server.rest();
                }
                Err(ended) => return ended,
            }
        }
    }

    /// One request and all that comes of it.
    async fn exchange(&mut self) -> Result<(), Ended> {
        let header = self.next_request().await?;
        let asked = self.pass_on(header).await?;
        self.memory = None;
        self.client.rest();
        if let Some(asked) = asked
            && asked.flags & MORE_TO_COME == 0
        {
            self.relay(asked).await?;
        }
        Ok(())
    }

    /// Waits for the header of a request.
    async fn next_request(&mut self) -> Result<Header, Ended> {
        // From the first byte on a message has so long until it is there.
        let mut until = (!self.client.buffered().is_empty()).then(|| self.shared.message_until());
        if !self.is_known {
            until.get_or_insert(self.shared.message_until());
        }
        loop {
            if let Some(header) = self.client.header() {
                let header = header.map_err(Ended::Malformed)?;
                if !self.is_known && header.length > LONGEST_FIRST {
                    return Err(Ended::Malformed(Malformed::Unauthenticated));
                }
                return Ok(header);
            }
            tokio::select! {
                biased;
                filled = fill_until(&mut self.client, until) => match filled {
                    Ok(()) => {
                        until.get_or_insert(self.shared.message_until());
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

    /// Checks a request and passes it on. Nothing, if it was answered here.
    async fn pass_on(&mut self, header: Header) -> Result<Option<Asked>, Ended> {
        let passed = match header.opcode {
            Opcode::Message => self.pass_on_message(header).await,
            Opcode::Compressed => self.pass_on_compressed(header).await,
            Opcode::Query => self.pass_on_query(header).await,
            Opcode::Reply => Err(Ended::Malformed(Malformed::Opcode)),
        };
        if let Err(Ended::Malformed(malformed)) = &passed {
            // That the connection ends is what counts; that its owner learns why is a courtesy.
            let reply = refusal::malformed(header, *malformed);
            let _may_have_gone = self.client.send(&reply, self.shared.settings.message_within).await;
        }
        passed
    }

    /// As it comes, document by document.
    async fn pass_on_message(&mut self, header: Header) -> Result<Option<Asked>, Ended> {
        let until = self.shared.message_until();
        let mut scan = Scan::new(header);
        // Of what is buffered, and of the message.
        let (mut checked, mut sent) = (HEADER, 0);
        let mut is_allowed = false;
        loop {
            let there = self.client.buffered().len().min(header.length - sent);
            checked += scan.advance(&self.client.buffered()[checked..there]).map_err(Ended::Malformed)?;
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
                let within = self.shared.settings.message_within;
                self.server.send(&self.client.buffered()[..checked], within).await.map_err(Ended::Server)?;
                self.client.used(checked);
                sent += checked;
                checked = 0;
            }
            if scan.is_complete() {
                return Ok(Some(Asked { header, flags: scan.flags() }));
            }
            self.more_of_the_client(until).await?;
        }
    }

    /// Reads more of a request.
    async fn more_of_the_client(&mut self, until: Instant) -> Result<(), Ended> {
        let bytes = self.client.buffered().len() + LARGE;
        self.shared.memory(&mut self.memory, bytes, until).await.ok_or(Ended::Client(Gone::Stalled))?;
        self.client.fill_until(LARGE, until).await.map_err(Ended::Client)
    }

    /// Waits for all of a message, and takes it.
    async fn whole(&mut self, header: Header) -> Result<Vec<u8>, Ended> {
        let until = self.shared.message_until();
        while self.client.buffered().len() < header.length {
            self.more_of_the_client(until).await?;
        }
        Ok(self.client.take(header.length).into())
    }

    /// As a whole, as it came, after having looked into it.
    async fn pass_on_compressed(&mut self, header: Header) -> Result<Option<Asked>, Ended> {
        let message = self.whole(header).await?;
        let inflated = compression::says(&message[HEADER..]).map_err(Ended::Malformed)?;
        let (bytes, until) = (message.len() + inflated, self.shared.message_until());
        self.shared.memory(&mut self.memory, bytes, until).await.ok_or(Ended::Client(Gone::Stalled))?;
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
        let looked = if header.length > INFLATED_HERE { blocking(look).await? } else { look() };
        let (message, flags) = looked.map_err(Ended::Malformed)?;
        self.server.send(&message, self.shared.settings.message_within).await.map_err(Ended::Server)?;
        Ok(Some(Asked { header, flags }))
    }

    async fn pass_on_query(&mut self, header: Header) -> Result<Option<Asked>, Ended> {
        if header.length > LONGEST_FIRST {
            return Err(Ended::Malformed(Malformed::Length));
        }
        let message = self.whole(header).await?;
        let body = query::check(&message).map_err(Ended::Malformed)?;
        let command = Command::read(&message[body], Some("admin")).map_err(Ended::Malformed)?;
        if !command.is_hello() {
            return Err(Ended::Malformed(Malformed::Opcode));
        }
        self.server.send(&message, self.shared.settings.message_within).await.map_err(Ended::Server)?;
        Ok(Some(Asked { header, flags: 0 }))
    }

    /// Passes the reply on, and those that follow it.
    async fn relay(&mut self, asked: Asked) -> Result<(), Ended> {
        let mut answers = asked.header.request_id;
        loop {
            let reply = self.next_reply().await?;
            if reply.response_to != answers {
                return Err(Ended::WrongReply);
            }
            let more_follow = match reply.opcode {
                Opcode::Message => self.flags_of(reply, HEADER + 4).await? & MORE_TO_COME != 0,
                // Only who has said so may be sent more than one.
                Opcode::Compressed if asked.flags & EXHAUST_ALLOWED != 0 => {
                    self.compressed_flags_of(reply).await? & MORE_TO_COME != 0
                }
                Opcode::Compressed | Opcode::Reply => false,
                Opcode::Query => return Err(Ended::WrongReply),
            };
            self.pass_back(reply).await?;
            if !more_follow {
                return Ok(());
            }
            answers = reply.request_id;
        }
    }

    /// Waits for the header of a reply, however long that takes: how long an operation may take is the server's business.
    async fn next_reply(&mut self) -> Result<Header, Ended> {
        loop {
            if let Some(header) = self.server.header() {
                return header.map_err(|_| Ended::WrongReply);
            }
            self.more_of_the_server().await?;
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

    /// The flags of a reply, which end `at`.
    async fn flags_of(&mut self, reply: Header, at: usize) -> Result<u32, Ended> {
        if reply.length < at {
            return Err(Ended::WrongReply);
        }
        loop {
            if let Some(flags) = self.server.buffered().get(at - 4..at).and_then(|flags| flags.first_chunk::<4>()) {
                return Ok(u32::from_le_bytes(*flags));
            }
            self.more_of_the_server().await?;
        }
    }

    /// The flags of a compressed reply, which has to be inflated for that.
    async fn compressed_flags_of(&mut self, reply: Header) -> Result<u32, Ended> {
        while self.server.buffered().len() < reply.length {
            self.more_of_the_server().await?;
        }
        let body = &self.server.buffered()[HEADER..reply.length];
        let (_, message) = compression::inflate(reply, body).map_err(|_| Ended::WrongReply)?;
        let flags = message.get(HEADER..).and_then(|message| message.first_chunk::<4>()).ok_or(Ended::WrongReply)?;
        Ok(u32::from_le_bytes(*flags))
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

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Ended> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Ended::Stopped)
}

/// The longest message before the first answer, and the longest legacy one.
const LONGEST_FIRST: usize = 64 << 10;
/// Compressed bytes that are inflated without going to another thread for it.
const INFLATED_HERE: usize = 256 << 10;
