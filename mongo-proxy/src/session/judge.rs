//! What is to become of a request, and the waiting that comes of it.

use std::{borrow::Cow, pin::pin, time::Duration};

use bson::RawDocumentBuf;
use tokio::time::sleep;

use super::{Ended, Session, unasked};
use crate::{
    command::{Command, Leaves, Transaction},
    hello::{self, Hello},
    peer::{LARGE, SMALL},
    proxy::{Opening, Shared},
    rules::{Access, Held, Refused, RuleBook, Ruling, Step, Who, wait_for_rate, wait_for_slot},
    wire::{Malformed, bson_scan::LONGEST_DOCUMENT, header::LONGEST, rewrite},
};

/// What is known of a request once its body was read.
#[derive(Debug)]
pub(super) struct Judged<'a> {
    pub(super) access: Option<Access>,
    pub(super) name: Cow<'static, str>,
    /// By which [`kind::name`](crate::command::kind::name) knows the command again.
    command_number: usize,
    /// `database.collection`, or the database.
    pub(super) namespace: String,
    /// Its body, if another one is to be passed on.
    pub(super) changed: Option<RawDocumentBuf>,
    pub(super) expects: Expects,
    pub(super) refused: Option<Refused>,
    /// The names of the rules that have something to do with it.
    pub(super) rules: Vec<String>,
    /// What it may leave behind.
    pub(super) leaves: Leaves,
    /// As long as it is there, a proxy that stops waits for what it may leave.
    opening: Option<Opening<'a>>,
    /// Whether it goes on with something that was begun before it.
    continues: bool,
    ruling: Ruling,
    /// How it is refused if the proxy stops before it was passed on.
    if_stopped: Refused,
    /// The name of the client's application, if it says it now.
    application: Option<String>,
    /// What it holds while it is under way.
    held: Held,
}

/// What is to be looked for in a reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Expects {
    /// It is that of a hello.
    pub(super) hello: bool,
    /// Of one of a client that looks for a load balancer.
    pub(super) load_balanced: bool,
    /// Whether somebody is logged in or out by it.
    pub(super) login: bool,
}

/// A request as far as it is judged: of a message of so many bytes the body, with the database if it does not say that itself, and what a bulk write says
/// of its namespaces behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Evidence<'a> {
    pub(super) length: usize,
    pub(super) body: &'a [u8],
    pub(super) database: Option<&'a str>,
    pub(super) of_bulk_write: &'a [u8],
}

/// Judges a request.
pub(super) fn judge<'s>(evidence: Evidence<'_>, book: &RuleBook, who: &Who, shared: &'s Shared) -> Result<Judged<'s>, Malformed> {
    let command = Command::read(evidence.body, evidence.database)?;
    let leaves = command.may_leave();
    // Before it is looked whether the proxy drains: one of both notices the other.
    let opening = (leaves != Leaves::Nothing).then(|| shared.opening());
    let mut judged = Judged {
        access: command.access(),
        name: command.to_name(),
        command_number: command.number(),
        namespace: command.to_namespace(),
        changed: None,
        expects: Expects::default(),
        refused: None,
        rules: Vec::new(),
        leaves,
        opening,
        continues: command.continues(),
        ruling: Ruling::default(),
        if_stopped: draining(&command),
        application: None,
        held: Held::default(),
    };
    if command.is_hello() {
        let hello = Hello::read(&command);
        let without = hello.without(shared.shows_certificate());
        if !without.is_empty() {
            judged.changed = Some(rewrite::document(command.body(), &without, &RawDocumentBuf::new())?);
        }
        judged.application = hello.application.map(str::to_owned);
        judged.expects = Expects { hello: true, load_balanced: hello.is_load_balanced, login: hello.logs_in };
    } else if matches!(command.name, "saslStart" | "saslContinue" | "authenticate" | "logout") {
        judged.expects.login = true;
        if shared.shows_certificate() && hello::shows_certificate(command.body()) {
            judged.refused = Some(Refused::Certificate);
        }
    } else if shared.is_draining() && !command.continues() {
        judged.refused = Some(judged.if_stopped.clone());
    } else if !book.is_empty() {
        judged.ruling = book.rule(&book.facts(&command, evidence.of_bulk_write, who), shared.now());
        judged.rules = judged.ruling.rules.iter().map(|(rule, _)| rule.rule.name.clone()).collect();
        let (max_time, comment) = judged.ruling.rewriting();
        if max_time.is_some() || comment.is_some() {
            let changed = rewrite::command(command.body(), max_time, comment)?;
            let length = evidence.length - evidence.body.len() + changed.as_bytes().len();
            // A server ends the connection of who sends more, and there are drivers that send exactly as much.
            if length <= LONGEST && changed.as_bytes().len() <= LONGEST_DOCUMENT {
                judged.changed = Some(changed);
            }
        }
    }
    Ok(judged)
}

/// The refusal of a proxy that stops, as a server's own. A driver tries a write again whose number it could be known by, and a transaction from its beginning.
fn draining(command: &Command<'_>) -> Refused {
    Refused::Draining(match command.transaction {
        Transaction::Starts | Transaction::GoesOn => Some("TransientTransactionError"),
        Transaction::Outside if command.is_numbered => Some("RetryableWriteError"),
        _ => None,
    })
}

/// Whether the namespaces of this command stand behind its body.
pub(super) fn is_bulk_write(body: &[u8]) -> bool {
    Command::read(body, None).is_ok_and(|command| command.name == "bulkWrite")
}

/// What has become of a wait.
enum Waited<T> {
    Done(T),
    /// The proxy has stopped meanwhile.
    Stopped,
}

impl Session<'_> {
    /// Notes what a client has said of itself, and does what the rules say: after it the request may be passed on, or is refused.
    pub(super) async fn settle(&mut self, judged: &mut Judged<'_>) -> Result<(), Ended> {
        self.connection.begins(judged.command_number);
        // What is said later is not taken by the server either.
        if self.who.application.is_none() && judged.application.is_some() {
            self.who.application = judged.application.take();
            self.connection.is_of(&self.who);
        }
        let mut ruling = std::mem::take(&mut judged.ruling);
        judged.held.slots.append(&mut ruling.observed);
        if judged.refused.is_none() && !ruling.is_pass() {
            judged.refused = match self.carry_out(&ruling, &mut judged.held).await? {
                // It may have waited until after nothing new is begun.
                Waited::Done(None) if self.shared.is_draining() && !judged.continues => Some(judged.if_stopped.clone()),
                Waited::Done(refused) => refused,
                Waited::Stopped => Some(judged.if_stopped.clone()),
            };
        }
        if judged.refused.is_none() {
            judged.held.passes_on();
        } else {
            (judged.held, judged.opening) = (Held::default(), None);
        }
        Ok(())
    }

    async fn carry_out(&mut self, ruling: &Ruling, held: &mut Held) -> Result<Waited<Option<Refused>>, Ended> {
        // Who is denied has no part in any limit.
        for (rule, _) in &ruling.rules {
            let denial = rule.steps().iter().find_map(|step| if let Step::Deny(denial) = step { Some(*denial) } else { None });
            if let Some(denial) = denial {
                rule.tally.refused.add_one();
                return Ok(Waited::Done(Some(Refused::Denied(denial, rule.rule.name.clone()))));
            }
        }
        let limits = |step: &Step| matches!(step, Step::Rate(..) | Step::Slot(..));
        if ruling.rules.iter().any(|(rule, _)| rule.steps().iter().any(limits)) && !self.is_welcome().await? {
            // Whom the server refuses anyway takes nothing from those whom it serves.
            return Ok(Waited::Done(None));
        }
        let began = self.shared.now();
        // Who has memory for a large message does not keep it from others for long.
        let most = if self.memory.is_some() { self.shared.settings.message_within / 2 } else { Duration::MAX };
        for (rule, keys) in &ruling.rules {
            let name = &rule.rule.name;
            let mut keys = keys.iter().map(String::as_str);
            let mut waited = false;
            for step in rule.steps() {
                let now = self.shared.now();
                // What is left of the client's own time.
                let left = ruling.max_time.map(|time| time.saturating_sub(now - began));
                let patience = |wait_at_most: Duration| wait_at_most.min(most.saturating_sub(now - began));
                let refused = match step {
                    Step::Delay(time) if left.is_some_and(|left| left < *time) => Some(Refused::OutOfTime(name.clone())),
                    Step::Delay(time) if patience(*time) < *time => Some(Refused::Limited(None, name.clone())),
                    Step::Delay(time) => {
                        waited = true;
                        let Waited::Done(()) = self.while_it_waits(sleep(*time)).await? else { return Ok(Waited::Stopped) };
                        None
                    }
                    Step::Rate(limit, rates) => {
                        let patience = patience(limit.wait_at_most);
                        match wait_for_rate(rates, keys.next().unwrap_or_default(), now, patience, left, name) {
                            Ok((wait, turn)) => {
                                held.turns.push(turn);
                                if !wait.is_zero() {
                                    waited = true;
                                    let Waited::Done(()) = self.while_it_waits(sleep(wait)).await? else {
                                        return Ok(Waited::Stopped);
                                    };
                                }
                                None
                            }
                            Err(refused) => Some(refused),
                        }
                    }
                    Step::Slot(limit, slots) => {
                        let patience = patience(limit.wait_at_most);
                        let slot = wait_for_slot(slots, keys.next().unwrap_or_default(), now, patience, left, name);
                        let Waited::Done(slot) = self.while_it_waits(slot).await? else { return Ok(Waited::Stopped) };
                        match slot {
                            Ok((slot, had_to_wait)) => {
                                waited |= had_to_wait;
                                held.slots.push(slot);
                                None
                            }
                            Err(refused) => Some(refused),
                        }
                    }
                    Step::Deny(_) | Step::ClampMaxTime(_) | Step::Tag(_) => None,
                };
                if let Some(refused) = refused {
                    rule.tally.refused.add_one();
                    return Ok(Waited::Done(Some(refused)));
                }
            }
            if waited {
                rule.tally.waited.add_one();
            }
        }
        Ok(Waited::Done(None))
    }

    /// Waits for something, and looks whether the client is still there.
    async fn while_it_waits<T>(&mut self, work: impl Future<Output = T>) -> Result<Waited<T>, Ended> {
        let mut work = pin!(work);
        loop {
            let is_full = self.client.buffered().len() >= LARGE;
            tokio::select! {
                biased;
                done = &mut work => return Ok(Waited::Done(done)),
                () = self.stop.cancelled() => return Ok(Waited::Stopped),
                filled = self.client.fill(SMALL), if !is_full => match filled {
                    Ok(()) => {}
                    // Nobody who waits in line is taken to be there still.
                    Err(_) if self.client.has_ended() => return Err(Ended::Closed),
                    Err(gone) => return Err(Ended::Client(gone)),
                },
                filled = self.server.fill(SMALL) => return Err(unasked(filled)),
            }
        }
    }
}
