//! From the client to the server.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Ended, INFLATED_HERE, LONGEST_FIRST, Session, blocking,
    judge::{Evidence, Judged, is_bulk_write, judge},
};
use crate::{
    command::touched::NAMESPACES_OF_BULK_WRITE,
    peer::{Gone, LARGE},
    wire::{
        Malformed,
        bson_scan::LONGEST_DOCUMENT,
        compression,
        header::{HEADER, Header, Opcode},
        query, refusal, rewrite,
        scan::{MORE_TO_COME, Scan},
    },
};

/// What a request is, as far as its reply is concerned.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    pub(super) header: Header,
    /// Of an OP_MSG.
    pub(super) flags: u32,
    pub(super) judged: Judged<'a>,
}

impl<'a> Session<'a> {
    /// Checks a request and passes it on.
    pub(super) async fn pass_on(&mut self, header: Header, judged: &mut Option<Judged<'a>>) -> Result<u32, Ended> {
        self.is_silent = false;
        let passed = match header.opcode {
            Opcode::Message => self.pass_on_message(header, judged).await,
            Opcode::Compressed => self.pass_on_compressed(header, judged).await,
            Opcode::Query => self.pass_on_query(header, judged).await,
            Opcode::Reply => Err(Ended::Malformed(Malformed::Opcode)),
        };
        // Who awaits no answer would take it for one to what it asks next.
        // Nor is a stranger told anything who asks for too much.
        let is_told = !self.is_silent && !matches!(passed, Err(Ended::Malformed(Malformed::First)));
        if let (Err(Ended::Malformed(malformed)), true) = (&passed, is_told) {
            self.memory = None;
            // That the connection ends is what counts; that its owner learns why is a courtesy.
            let reply = refusal::malformed(header, *malformed);
            let _may_have_gone = self.client.send(&reply, self.shared.settings.message_within).await;
        }
        passed
    }

    /// As it comes, document by document.
    async fn pass_on_message(&mut self, header: Header, judged: &mut Option<Judged<'a>>) -> Result<u32, Ended> {
        // When more of it was waited for first: what it waits for itself before, as memory, is not its own time.
        let mut began = None;
        let book = self.shared.rules();
        let mut scan = Scan::new(header);
        // Of what is buffered, and of the message.
        let (mut checked, mut sent) = (HEADER, 0);
        // Once its body is there.
        let mut is_bulk: Option<bool> = None;
        let mut changed = Changed::default();
        loop {
            let there = self.client.buffered().len().min(header.length - sent);
            let advanced = scan.advance(&self.client.buffered()[checked..there]);
            self.is_silent = scan.flags() & MORE_TO_COME != 0;
            checked += advanced.map_err(Ended::Malformed)?;
            if judged.is_none()
                && let Some(body) = scan.body()
            {
                // Nothing was sent yet, so that places in the message are places in the buffer.
                let message = &self.client.buffered()[..checked];
                let is_bulk = *is_bulk.get_or_insert_with(|| book.needs_namespaces() && is_bulk_write(&message[body.clone()]));
                // Nobody has a part in a limit for half a message, unless it is too long to be kept.
                let must_wait = !scan.is_complete() && (is_bulk || header.length <= LARGE);
                if !must_wait {
                    let of_bulk_write =
                        scan.sequence(NAMESPACES_OF_BULK_WRITE).and_then(|sequence| message.get(sequence)).unwrap_or_default();
                    let evidence =
                        Evidence { length: header.length, body: &message[body.clone()], database: None, of_bulk_write };
                    let found = judge(evidence, &book, &self.who, self.shared);
                    let mut found = found.map_err(Ended::Malformed)?;
                    if let Some(document) = found.changed.take() {
                        changed = Changed::new(message, header, body, &document);
                    }
                    self.settle(judged.insert(found)).await?;
                    began = None;
                }
            }
            if let Some(judged) = judged.as_ref()
                && (scan.is_complete() || checked >= LARGE)
            {
                if judged.refused.is_none() {
                    let end = if scan.is_complete() { checked - changed.checksum } else { checked };
                    let (head, from) = changed.take_head();
                    self.send_to_server(head, from..end).await?;
                }
                self.client.used(checked);
                sent += checked;
                checked = 0;
            }
            if scan.is_complete() {
                return Ok(scan.flags());
            }
            if self.client.buffered().len() > LARGE {
                // Once it is known what it is, no more than a document is kept. A body that comes first is known when it is there, but for a bulk write.
                let is_known = sent > 0 || judged.is_some();
                let is_body_first = self.client.buffered().get(HEADER + 4) == Some(&0);
                let most = if is_known || (is_body_first && !book.needs_namespaces()) {
                    LONGEST_DOCUMENT + LARGE
                } else {
                    header.length
                };
                // What comes before the body is there twice with it, if another one is passed on.
                let before = if is_body_first { LONGEST_DOCUMENT } else { header.length };
                let twice = if is_known || !book.rewrites() { 0 } else { header.length.min(before) };
                self.take_memory(header.length.min(most) + twice).await?;
            }
            let received = sent + self.client.buffered().len();
            let until = self.shared.message_until(*began.get_or_insert_with(Instant::now), received);
            self.client.fill_until(LARGE, until).await.map_err(Ended::Client)?;
        }
    }

    /// Sends what is there of a changed message, and then what is buffered.
    async fn send_to_server(&mut self, mut head: Vec<u8>, rest: std::ops::Range<usize>) -> Result<(), Ended> {
        let mut rest = &self.client.buffered()[rest];
        if !head.is_empty() {
            // As one, where that is cheap.
            if rest.len() <= LARGE {
                head.extend_from_slice(rest);
                rest = &[];
            }
            self.server.send(&head, SERVER_TAKES_WITHIN).await.map_err(Ended::Server)?;
        }
        if rest.is_empty() { Ok(()) } else { self.server.send(rest, SERVER_TAKES_WITHIN).await.map_err(Ended::Server) }
    }

    /// Takes memory for what is larger than 64 KiB, once for all that the request will need: if each had a part and waited for the rest, nobody could go on.
    pub(super) async fn take_memory(&mut self, bytes: usize) -> Result<(), Ended> {
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
    async fn pass_on_compressed(&mut self, header: Header, judged: &mut Option<Judged<'a>>) -> Result<u32, Ended> {
        let began = Instant::now();
        let book = self.shared.rules();
        self.at_least(header.length.min(HEADER + compression::PREFIX), began).await?;
        let inflated = compression::says(&self.client.buffered()[HEADER..]).map_err(Ended::Malformed)?;
        // A body that is changed is there twice, but not what it was compressed to.
        let beside = if book.rewrites() { header.length.max(inflated.min(LONGEST_DOCUMENT)) } else { header.length };
        if beside + inflated > LARGE {
            self.must_be_welcome().await?;
            self.take_memory(beside + inflated).await?;
        }
        self.at_least(header.length, began).await?;
        let message = self.client.take(header.length);
        let look = move || {
            let (inner, inflated) = compression::inflate(header, &message[HEADER..])?;
            let mut scan = Scan::new(inner);
            scan.advance(&inflated[HEADER..])?;
            let body = scan.body().filter(|_| scan.is_complete()).ok_or(Malformed::Bounds)?;
            Ok((message, inner, inflated, scan, body))
        };
        // Whoever shares the thread does not wait for a large one.
        let looked = if inflated > INFLATED_HERE { blocking(look).await? } else { look() };
        let (message, inner, mut inflated, scan, body) = looked.map_err(Ended::Malformed)?;
        self.is_silent = scan.flags() & MORE_TO_COME != 0;
        let of_bulk_write =
            scan.sequence(NAMESPACES_OF_BULK_WRITE).and_then(|sequence| inflated.get(sequence)).unwrap_or_default();
        let evidence = Evidence { length: inner.length, body: &inflated[body.clone()], database: None, of_bulk_write };
        let found = judge(evidence, &book, &self.who, self.shared);
        let mut found = found.map_err(Ended::Malformed)?;
        let pieces = match found.changed.take() {
            // Each side may leave a message as it is, whatever was agreed on.
            Some(document) => {
                drop(message);
                let mut changed = Changed::new(&inflated, inner, body, &document);
                inflated.truncate(inflated.len() - changed.checksum);
                let (head, from) = changed.take_head();
                inflated.drain(..from);
                [head, inflated]
            }
            None => {
                drop(inflated);
                [message, Vec::new()]
            }
        };
        let judged = judged.insert(found);
        self.settle(judged).await?;
        if judged.refused.is_none() {
            for piece in pieces {
                self.server.send(&piece, SERVER_TAKES_WITHIN).await.map_err(Ended::Server)?;
            }
        }
        Ok(scan.flags())
    }

    async fn pass_on_query(&mut self, header: Header, judged: &mut Option<Judged<'a>>) -> Result<u32, Ended> {
        if header.length > LONGEST_FIRST {
            return Err(Ended::Malformed(Malformed::Length));
        }
        self.at_least(header.length, Instant::now()).await?;
        let message = self.client.take(header.length);
        let body = query::check(&message).map_err(Ended::Malformed)?;
        let evidence =
            Evidence { length: header.length, body: &message[body.clone()], database: Some("admin"), of_bulk_write: &[] };
        let found = judge(evidence, &self.shared.rules(), &self.who, self.shared);
        let mut found = found.map_err(Ended::Malformed)?;
        if !found.expects.hello {
            return Err(Ended::Malformed(Malformed::Opcode));
        }
        let message = match found.changed.take() {
            Some(document) => rewrite::head(&message, header, body, &document).0,
            None => message,
        };
        self.settle(judged.insert(found)).await?;
        self.server.send(&message, SERVER_TAKES_WITHIN).await.map_err(Ended::Server)?;
        Ok(0)
    }
}

/// A message of which another body is passed on.
#[derive(Debug, Default)]
struct Changed {
    /// What is sent in the place of all up to the end of the body.
    head: Vec<u8>,
    /// Where the body ended.
    from: usize,
    /// Bytes at the end of the message that are not sent.
    checksum: usize,
}

impl Changed {
    fn new(message: &[u8], header: Header, body: std::ops::Range<usize>, document: &bson::RawDocument) -> Self {
        let from = body.end;
        let (head, checksum) = rewrite::head(message, header, body, document);
        Self { head, from, checksum }
    }

    /// What is to be sent first, and from where on what was there is: once.
    fn take_head(&mut self) -> (Vec<u8>, usize) {
        (std::mem::take(&mut self.head), std::mem::take(&mut self.from))
    }
}

/// A server that is at work on what it was sent without being asked for an answer takes no more meanwhile, and that may be long.
const SERVER_TAKES_WITHIN: Duration = Duration::from_secs(600);
