//! From the server to the client.

use std::sync::atomic::{AtomicI32, Ordering::Relaxed};

use bson::{RawDocument, RawDocumentBuf, rawdoc};
use tokio::time::{Instant, sleep_until};

use super::{Ended, INFLATED_HERE, Session, Work, blocking, judge::Expects, request::Asked};
use crate::{
    command::Leaves,
    hello,
    peer::{LARGE, SMALL},
    wire::{
        Malformed, bson_scan, compression,
        header::{HEADER, Header, Opcode},
        reply::{self, LONGEST_READ, Whole},
        rewrite,
        scan::{EXHAUST_ALLOWED, MORE_TO_COME},
    },
};

impl Session<'_> {
    /// Passes the reply on, and those that follow it; and says how many bytes that were.
    pub(super) async fn relay(&mut self, asked: &Asked<'_>) -> Result<usize, Ended> {
        let expects = asked.judged.expects;
        let changes = expects.login || expects.load_balanced || (expects.hello && self.shared.members().is_some());
        let mut answers = asked.header.request_id;
        let (mut bytes, mut is_login) = (0, false);
        loop {
            let reply = self.next_reply(answers != asked.header.request_id).await?;
            if reply.response_to != answers {
                return Err(Ended::WrongReply);
            }
            bytes += reply.length;
            let more_follow = match reply.opcode {
                Opcode::Query => return Err(Ended::WrongReply),
                _ if changes => {
                    let (flags, is_now) = self.pass_back_changed(reply, expects).await?;
                    is_login |= is_now;
                    flags & MORE_TO_COME != 0
                }
                Opcode::Message => {
                    let more_follow = self.flags_of(reply).await? & MORE_TO_COME != 0;
                    if asked.judged.leaves == Leaves::Cursor && self.leaves_cursor(reply) {
                        self.shared.leaves_something();
                    }
                    self.pass_back(reply).await?;
                    more_follow
                }
                // Only who has said so may be sent more than one.
                Opcode::Compressed if asked.flags & EXHAUST_ALLOWED != 0 => {
                    self.shared.leaves_something();
                    self.pass_back_inflated(reply).await? & MORE_TO_COME != 0
                }
                Opcode::Compressed | Opcode::Reply => {
                    if asked.judged.leaves == Leaves::Cursor && self.leaves_cursor(reply) {
                        self.shared.leaves_something();
                    }
                    self.pass_back(reply).await?;
                    false
                }
            };
            if !more_follow {
                if is_login {
                    self.identify().await?;
                }
                return Ok(bytes);
            }
            answers = reply.request_id;
            self.server_is_at = Work::Stream;
        }
    }

    /// Whether a cursor is there after this reply, of which the beginning was read. One that is not there as a whole may leave one, and so may one that would
    /// take long to be inflated.
    fn leaves_cursor(&self, reply: Header) -> bool {
        let Some(message) = self.server.buffered().get(..reply.length) else { return true };
        let inflated = match reply.opcode {
            Opcode::Compressed if compression::says(&message[HEADER..]).is_ok_and(|length| length <= INFLATED_FOR_A_LOOK) => {
                match compression::inflate(reply, &message[HEADER..]) {
                    Ok((_, inflated)) => inflated,
                    Err(_) => return true,
                }
            }
            Opcode::Compressed => return true,
            _ => Vec::new(),
        };
        let message = if inflated.is_empty() { message } else { &inflated };
        let body = message.get(HEADER + 5..);
        let length = body.and_then(|body| bson_scan::length_of(body).ok().flatten());
        let answer = body.zip(length).and_then(|(body, length)| RawDocument::from_bytes(body.get(..length)?).ok());
        match answer.map(|answer| answer.get("cursor")) {
            Some(Ok(None)) => false,
            Some(Ok(Some(cursor))) => cursor.as_document().and_then(|cursor| cursor.get_i64("id").ok()) != Some(0),
            _ => true,
        }
    }

    /// Passes on the reply to a hello or to who logs in, after having looked into it; and gives its flags, and whether somebody is logged in or out by it.
    async fn pass_back_changed(&mut self, reply: Header, expects: Expects) -> Result<(u32, bool), Ended> {
        let whole = self.whole_reply(reply).await?;
        let answer = whole.document().map_err(|_| Ended::WrongReply)?;
        let Whole { header, message, body, flags } = &whole;
        let is_logged_in = expects.login && is_login(answer, expects.hello);
        let members = self.shared.members().filter(|_| expects.hello);
        let is_good = answer.get("ok").is_ok_and(|ok| ok.is_some_and(is_one));
        if is_good && (members.is_some() || expects.load_balanced) {
            let document = hello::answer(answer, members, expects.load_balanced).map_err(|_| Ended::WrongReply)?;
            let (mut head, checksum) = rewrite::head(message, *header, body.clone(), &document);
            head.extend_from_slice(&message[body.end..message.len() - checksum]);
            self.send_to_client(&head).await?;
        } else {
            self.send_to_client(message).await?;
        }
        Ok((*flags, is_logged_in))
    }

    /// Who takes memory that others need must be somebody whom the server serves.
    pub(super) async fn must_be_welcome(&mut self) -> Result<(), Ended> {
        if self.is_welcome().await? { Ok(()) } else { Err(Ended::Malformed(Malformed::First)) }
    }

    /// Whether the server serves the client. Of who has not logged in nobody knows whether that is needed: the server is asked something that is not
    /// everybody's to know. Nothing of a request may be on its way to it.
    pub(super) async fn is_welcome(&mut self) -> Result<bool, Ended> {
        if !self.who.users.is_empty() {
            return Ok(true);
        }
        if let Some(is_welcome) = self.is_welcome {
            return Ok(is_welcome);
        }
        let question = rawdoc! {
            "listDatabases": 1, "nameOnly": true, "authorizedDatabases": true, "filter": { "name": "admin" },
            "$readPreference": { "mode": "secondaryPreferred" }, "$db": "admin",
        };
        let answer = self.ask_in_any_version(question).await?;
        let is_welcome = answer.get("ok").is_ok_and(|ok| ok.is_some_and(is_one));
        self.is_welcome = Some(is_welcome);
        Ok(is_welcome)
    }

    /// Asks the server who is logged in now: it alone knows, whatever the way was. Nothing of what a client logs in with is looked at here.
    pub(super) async fn identify(&mut self) -> Result<(), Ended> {
        // Who says nothing more needs no name.
        if self.server.is_told_the_end() {
            return Ok(());
        }
        self.server_is_at = Work::Nothing;
        let answer = self.ask_in_any_version(rawdoc! { "connectionStatus": 1, "$db": "admin" }).await?;
        let users = answer.get_document("authInfo").and_then(|info| info.get_array("authenticatedUsers"));
        let users = users.map_err(|_| Ended::WrongReply)?.into_iter().map(|user| {
            let user = user.ok()?.as_document()?;
            Some(format!("{}.{}", user.get_str("db").ok()?, user.get_str("user").ok()?))
        });
        self.who.users = users.collect::<Option<_>>().ok_or(Ended::WrongReply)?;
        self.connection.is_of(&self.who);
        Ok(())
    }

    /// As [`ask`](Self::ask), also of a server that wants to be told the version of its interface (`requireApiVersion`).
    async fn ask_in_any_version(&mut self, mut command: RawDocumentBuf) -> Result<RawDocumentBuf, Ended> {
        let answer = self.ask(&command).await?;
        if !wants_api_version(&answer) {
            return Ok(answer);
        }
        command.append(bson::cstr!("apiVersion"), "1");
        self.ask(&command).await
    }

    /// Asks the server something for the proxy itself, between two requests of the client.
    async fn ask(&mut self, command: &RawDocument) -> Result<RawDocumentBuf, Ended> {
        static NUMBER: AtomicI32 = AtomicI32::new(1);
        let request_id = NUMBER.fetch_add(1, Relaxed);
        let request = reply::request(request_id, command);
        self.server.send(&request, self.shared.settings.message_within).await.map_err(Ended::Server)?;
        let reply = self.next_reply(false).await?;
        if reply.response_to != request_id {
            return Err(Ended::WrongReply);
        }
        let answer = self.whole_reply(reply).await?;
        answer.document().map(ToOwned::to_owned).map_err(|_| Ended::WrongReply)
    }

    /// Reads a short reply as a whole, inflates and checks it.
    async fn whole_reply(&mut self, reply: Header) -> Result<Whole, Ended> {
        if reply.length > LONGEST_READ {
            return Err(Ended::WrongReply);
        }
        while self.server.buffered().len() < reply.length {
            self.more_of_the_server().await?;
        }
        Whole::read(reply, self.server.take(reply.length)).map_err(|_| Ended::WrongReply)
    }

    async fn send_to_client(&mut self, message: &[u8]) -> Result<(), Ended> {
        self.client.send(message, self.shared.settings.message_within).await.map_err(Ended::Client)
    }

    /// Waits for the header of a reply, however long that takes: how long an operation may take is the server's business. Of replies that follow each other there may be no end: those are not waited for by a proxy
    /// that stops.
    async fn next_reply(&mut self, is_one_more: bool) -> Result<Header, Ended> {
        let shared = self.shared;
        loop {
            if let Some(header) = self.server.header() {
                return header.map_err(|_| Ended::WrongReply);
            }
            let is_between = self.server.buffered().is_empty();
            tokio::select! {
                biased;
                more = self.more_of_the_server() => match more {
                    // One that was told the end, and goes instead of answering.
                    Err(Ended::Server(_)) if is_between && self.server.is_told_the_end() => return Err(Ended::Closed),
                    more => more?,
                },
                () = shared.stopping(), if is_one_more && is_between => return Err(Ended::Stopped),
            }
        }
    }

    /// Reads more of the server, and looks whether the client is still there. If it says that nothing more comes, the server is told so, and does with it what it
    /// does with its own clients: it ends what it is at, if that can be, and answers. Whether anybody is there to read that nobody knows, so that it is waited
    /// for only so long.
    async fn more_of_the_server(&mut self) -> Result<(), Ended> {
        let mut patience = None;
        loop {
            if self.client.has_ended() {
                if self.server_is_at == Work::Stream {
                    // A driver that watches a server goes like that, and nobody would end it otherwise.
                    return Err(Ended::Closed);
                }
                patience.get_or_insert(Instant::now() + self.shared.settings.message_within);
                let is_last = !self.client.has_message();
                if is_last && self.server_is_at == Work::Request && !self.server.is_told_the_end() {
                    // If it cannot be told, reading from it says why.
                    let _may_have_gone = self.server.tell_the_end();
                }
            }
            let is_full = self.client.buffered().len() >= LARGE;
            let may_say_more = !is_full && !self.client.has_ended();
            tokio::select! {
                biased;
                filled = self.server.fill(LARGE) => return filled.map_err(Ended::Server),
                filled = self.client.fill(SMALL), if may_say_more => match filled {
                    Ok(()) => return Ok(()),
                    Err(_) if self.client.has_ended() => {}
                    Err(gone) => return Err(Ended::Client(gone)),
                },
                () = until(patience) => return Err(Ended::Closed),
            }
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
        self.send_to_client(&message).await?;
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

/// Waits until then; for ever if there is no such time.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Whether a server has answered that it must be told the version of its interface (`requireApiVersion`): for that its code has no name.
pub(crate) fn wants_api_version(answer: &RawDocument) -> bool {
    matches!(answer.get("code"), Ok(Some(code)) if matches!(code.as_i32(), Some(API_VERSION_REQUIRED | API_VERSION_ERROR)))
}

/// Whether somebody is logged in with this answer.
fn is_login(answer: &RawDocument, to_hello: bool) -> bool {
    let is_done = |answer: &RawDocument| match answer.get("done") {
        Ok(Some(done)) => done.as_bool() == Some(true),
        // Other ways than SASL have one step.
        Ok(None) => true,
        Err(_) => false,
    };
    if to_hello {
        return answer.get_document("speculativeAuthenticate").is_ok_and(is_done);
    }
    answer.get("ok").is_ok_and(|ok| ok.is_some_and(is_one)) && is_done(answer)
}

fn is_one(value: bson::RawBsonRef<'_>) -> bool {
    value.as_f64() == Some(1.0) || value.as_i32() == Some(1) || value.as_i64() == Some(1) || value.as_bool() == Some(true)
}

const INFLATED_FOR_A_LOOK: usize = 16 << 10;
const API_VERSION_REQUIRED: i32 = 498_870;
const API_VERSION_ERROR: i32 = 322;
