//! Waiting for a majority once, instead of after every batch.
//!
//! A write that the primary alone has acknowledged can be rolled back; a batch that waits for the majority makes the server
//! flush its journal, and the writer wait for the slowest of the members that count. But the oplog is one sequence: when a
//! majority holds the last of many writes of one term, it holds all of them. So a bulk load may write with `w: 1`, note
//! where in the oplog each batch came to stand, and settle all of them at the end.

use std::{sync::Mutex, time::Duration};

use mongodb::bson::{Document, Timestamp, doc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::write::WriteOutcome;
use crate::{
    connect::{Deployment, integer},
    error::{Error, ErrorKind, Result},
    lock::lock,
};

/// A place in the oplog of a replica set: a time in the term of one primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct OpTime {
    /// The term; every election begins a new one.
    pub term: i64,
    /// The time.
    pub timestamp: Timestamp,
}

impl OpTime {
    /// Reads a field `{ts, t}`, as replies to writes and `hello` have it. A server that has nothing to tell says term -1.
    pub(super) fn in_field(document: &Document, name: &str) -> Option<Self> {
        let field = document.get_document(name).ok()?;
        let term = integer(field, "t").filter(|term| *term >= 0)?;
        Some(Self { term, timestamp: field.get_timestamp("ts").ok()? })
    }

    /// The later of two places of one term.
    pub(super) fn later_of(first: Option<Self>, second: Option<Self>) -> Result<Option<Self>> {
        match (first, second) {
            (Some(first), Some(second)) if first.term != second.term => Err(elected()),
            _ => Ok(first.max(second)),
        }
    }
}

fn elected() -> Error {
    Error::new(ErrorKind::Conflict, "another primary was elected meanwhile, and may not have all that was written: begin again")
}

/// Writes that wait for their majority.
#[derive(Debug, Default)]
pub struct PendingMajority {
    /// The first and the last place noted.
    noted: Mutex<Option<(OpTime, OpTime)>>,
}

impl PendingMajority {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes where a write came to stand.
    pub fn note(&self, written: OpTime) {
        let mut noted = lock(&self.noted);
        *noted = Some(noted.map_or((written, written), |(first, last)| (first.min(written), last.max(written))));
    }

    /// Notes where a batch came to stand.
    ///
    /// # Errors
    /// `Unsupported` when documents were written and the server does not tell where.
    pub fn note_outcome(&self, outcome: &WriteOutcome) -> Result<()> {
        match outcome.op_time {
            Some(op_time) => self.note(op_time),
            None if outcome.written == 0 => {}
            None => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "the server does not tell where in its oplog a write stands: choose a write concern by number",
                ));
            }
        }
        Ok(())
    }

    /// Notes the last write of anybody, so that what was written without a reply that tells its place is waited for too.
    ///
    /// # Errors
    /// The server's own.
    pub async fn note_latest(&self, deployment: &Deployment) -> Result<()> {
        if let Some(latest) = last_write(deployment, "opTime").await? {
            self.note(latest);
        }
        Ok(())
    }

    /// Waits until a majority of the replica set holds every write that was noted. Gives up when the majority has not come
    /// any nearer for a minute.
    ///
    /// # Errors
    /// `Conflict` when another primary was elected meanwhile: it may not have what was written. `Timeout` when no majority
    /// follows, `Cancelled` by the token, or the server's own.
    ///
    /// # Cancel safety
    /// Dropping the future ends the waiting and nothing else.
    pub async fn settle(&self, deployment: &Deployment, cancel: &CancellationToken) -> Result<()> {
        let noted = *lock(&self.noted);
        let Some((first, last)) = noted else { return Ok(()) };
        if first.term != last.term {
            return Err(elected());
        }
        let mut nearest = None;
        // An answer can take as long as the search for a primary, so it is time that counts, not the number of answers.
        let mut moved = Instant::now();
        loop {
            // A server in trouble, and one that has just become primary, has nothing to tell for a while.
            let (held, trouble) = match last_write(deployment, "majorityOpTime").await {
                Ok(held) => (held, None),
                Err(error) if error.is_retryable() => (None, Some(error)),
                Err(error) => return Err(error),
            };
            if held.is_some_and(|held| held.term > last.term) {
                return Err(elected());
            }
            if held >= Some(last) {
                return Ok(());
            }
            if held > nearest {
                nearest = held;
                moved = Instant::now();
            }
            if moved.elapsed() >= PATIENCE {
                let error =
                    Error::new(ErrorKind::Timeout, "no majority of the replica set follows the primary: look at its members");
                return Err(match trouble {
                    Some(trouble) => error.with_source(trouble),
                    None => error,
                });
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(Error::cancelled()),
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }
}

/// A place that `hello` tells: `opTime` of the last write, or `majorityOpTime`.
async fn last_write(deployment: &Deployment, field: &str) -> Result<Option<OpTime>> {
    let hello = deployment.database("admin").run_command(doc! { "hello": 1 }).await?;
    Ok(hello.get_document("lastWrite").ok().and_then(|write| OpTime::in_field(write, field)))
}

/// What a majority has: nothing up to it can be rolled back.
pub(super) async fn majority_time(deployment: &Deployment) -> Result<Timestamp> {
    let held = last_write(deployment, "majorityOpTime").await?;
    held.map(|held| held.timestamp)
        .ok_or_else(|| Error::new(ErrorKind::Unavailable, "the primary does not tell yet what a majority has"))
}

const POLL: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn at(term: i64, time: u32) -> OpTime {
        OpTime { term, timestamp: Timestamp { time, increment: 0 } }
    }

    #[test]
    fn a_later_term_is_later_whatever_the_time() {
        assert!(at(2, 10) > at(1, 20));
        assert!(at(1, 20) > at(1, 10));
    }

    #[test]
    fn places_are_read_as_the_server_writes_them() {
        let reply = doc! { "opTime": { "ts": Timestamp { time: 7, increment: 0 }, "t": 3_i64 }, "n": 1 };
        assert_eq!(OpTime::in_field(&reply, "opTime"), Some(at(3, 7)));
        assert_eq!(OpTime::in_field(&doc! { "n": 1 }, "opTime"), None);
        let nothing = doc! { "opTime": { "ts": Timestamp { time: 0, increment: 0 }, "t": -1_i64 } };
        assert_eq!(OpTime::in_field(&nothing, "opTime"), None);
    }

    #[test]
    fn two_terms_in_one_batch_are_an_election() {
        assert_eq!(OpTime::later_of(Some(at(1, 5)), Some(at(1, 3))).unwrap(), Some(at(1, 5)));
        assert_eq!(OpTime::later_of(None, Some(at(2, 3))).unwrap(), Some(at(2, 3)));
        assert_eq!(OpTime::later_of(Some(at(1, 5)), Some(at(2, 6))).unwrap_err().kind(), ErrorKind::Conflict);
    }
}
