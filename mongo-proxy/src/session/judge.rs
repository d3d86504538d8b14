//! What is to become of a request, and the waiting that comes of it.

use std::{pin::pin, time::Duration};

use bson::RawDocumentBuf;
use tokio::time::sleep;

use super::{Ended, Session, unasked};
use crate::{
    command::{Command, Transaction, kind},
    hello::{self, Hello},
    peer::{Gone, LARGE, SMALL},
    proxy::Shared,
    rules::{Access, Held, Refused, RuleBook, Ruling, Step, Who, wait_for_rate, wait_for_slot},
    wire::{Malformed, rewrite},
};

/// What is known of a request once its body was read.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) access: Option<Access>,
    pub(super) name: String,
    /// `database.collection`, or the database.
    pub(super) namespace: String,
    /// Its body, if another one is to be passed on.
    pub(super) changed: Option<RawDocumentBuf>,
    pub(super) expects: Expects,
    pub(super) refused: Option<Refused>,
    /// The names of the rules that have something to do with it.
    pub(super) rules: Vec<String>,
    ruling: Ruling,
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
    /// Whether somebody is logged in by it.
    pub(super) login: bool,
}

/// Judges a request by its body. `database` for what does not say it itself.
pub(super) fn judge(
    body: &[u8],
    database: Option<&str>,
    of_bulk_write: &[u8],
    book: &RuleBook,
    who: &Who,
    shared: &Shared,
) -> Result<Judged, Malformed> {
    let command = Command::read(body, database)?;
    let access = command.access();
    let mut judged = Judged {
        access,
        name: command.name.to_owned(),
        namespace: match command.collection() {
            Some(collection) => format!("{}.{collection}", command.database),
            None => command.database.to_owned(),
        },
        changed: None,
        expects: Expects::default(),
        refused: None,
        rules: Vec::new(),
        ruling: Ruling::default(),
        application: None,
        held: Held::new(),
    };
    if command.is_hello() {
        let hello = Hello::read(&command);
        let without = hello.without(shared.shows_certificate());
        if !without.is_empty() {
            judged.changed = Some(rewrite::document(command.body(), &without, &RawDocumentBuf::new())?);
        }
        judged.application = hello.application.map(str::to_owned);
        judged.expects = Expects { hello: true, load_balanced: hello.is_load_balanced, login: hello.logs_in };
    } else if matches!(command.name, "saslStart" | "saslContinue" | "authenticate") {
        judged.expects.login = true;
        if shared.shows_certificate() && hello::shows_certificate(command.body()) {
            judged.refused = Some(Refused::Certificate);
        }
    } else if shared.is_draining() && !command.continues() {
        judged.refused = Some(Refused::Draining);
    } else if !book.is_empty() {
        judged.ruling = book.rule(&book.facts(&command, of_bulk_write, who), shared.now());
        judged.rules = judged.ruling.rules.iter().map(|(rule, _)| rule.rule.name.clone()).collect();
        let (max_time, comment) = judged.ruling.rewriting();
        if max_time.is_some() || comment.is_some() {
            judged.changed = Some(rewrite::command(command.body(), max_time, comment)?);
        }
    }
    if command.may_open_cursor() || command.transaction != Transaction::Outside {
        shared.begins_something();
    }
    Ok(judged)
}

/// Whether the namespaces of this command stand behind its body.
pub(super) fn is_bulk_write(body: &[u8]) -> bool {
    Command::read(body, None).is_ok_and(|command| command.name == "bulkWrite")
}

impl Session<'_> {
    /// Notes what a client has said of itself, and does what the rules say: after it the request may be passed on, or is refused.
    pub(super) async fn settle(&mut self, judged: &mut Judged) -> Result<(), Ended> {
        self.connection.begins(kind::spelling(&judged.name).unwrap_or("another"));
        // What is said later is not taken by the server either.
        if self.who.application.is_none() && judged.application.is_some() {
            self.who.application = judged.application.take();
            self.connection.is_of(&self.who);
        }
        if judged.refused.is_some() || judged.ruling.is_pass() {
            judged.held.append(&mut judged.ruling.observed);
            return Ok(());
        }
        let mut ruling = std::mem::take(&mut judged.ruling);
        judged.held.append(&mut ruling.observed);
        judged.refused = self.carry_out(&ruling, &mut judged.held).await?;
        Ok(())
    }

    async fn carry_out(&mut self, ruling: &Ruling, held: &mut Held) -> Result<Option<Refused>, Ended> {
        // Who is denied has no part in any limit.
        for (rule, _) in &ruling.rules {
            let denial = rule.steps().iter().find_map(|step| if let Step::Deny(denial) = step { Some(*denial) } else { None });
            if let Some(denial) = denial {
                rule.tally.refused.add_one();
                return Ok(Some(Refused::Denied(denial, rule.rule.name.clone())));
            }
        }
        for (rule, keys) in &ruling.rules {
            let name = &rule.rule.name;
            let mut keys = keys.iter().map(String::as_str);
            let mut waited = false;
            for step in rule.steps() {
                let now = self.shared.now();
                let refused = match step {
                    Step::Delay(time) => {
                        waited = true;
                        self.while_it_waits(sleep(*time)).await?;
                        None
                    }
                    Step::Rate(limit, rates) => {
                        match wait_for_rate(limit, rates, keys.next().unwrap_or_default(), now, ruling.max_time, name) {
                            Ok(Duration::ZERO) => None,
                            Ok(wait) => {
                                waited = true;
                                self.while_it_waits(sleep(wait)).await?;
                                None
                            }
                            Err(refused) => Some(refused),
                        }
                    }
                    Step::Slot(limit, slots) => {
                        let key = keys.next().unwrap_or_default();
                        let slot = self.while_it_waits(wait_for_slot(limit, slots, key, now, ruling.max_time, name)).await?;
                        match slot {
                            Ok((slot, had_to_wait)) => {
                                waited |= had_to_wait;
                                held.push(slot);
                                None
                            }
                            Err(refused) => Some(refused),
                        }
                    }
                    Step::Deny(_) | Step::ClampMaxTime(_) | Step::Tag(_) => None,
                };
                if let Some(refused) = refused {
                    rule.tally.refused.add_one();
                    held.clear();
                    return Ok(Some(refused));
                }
            }
            if waited {
                rule.tally.waited.add_one();
            }
        }
        Ok(None)
    }

    /// Waits for something, and looks whether the client is still there.
    async fn while_it_waits<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Ended> {
        let mut work = pin!(work);
        loop {
            let is_full = self.client.buffered().len() >= LARGE;
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                filled = self.client.fill(SMALL), if !is_full => match filled {
                    Ok(()) => {}
                    Err(Gone::Closed) => return Err(Ended::Closed),
                    Err(gone) => return Err(Ended::Client(gone)),
                },
                filled = self.server.fill(SMALL) => return Err(unasked(filled)),
            }
        }
    }
}
